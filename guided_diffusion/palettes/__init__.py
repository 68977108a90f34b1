"""The colours in which label maps are painted: a file of `R G B name` lines, one for each class in the order of the
class numbers. GIMP's .gpl files have this form.

A line named `void` (any number of them, anywhere) is a colour that does not count, `void exactly` one that does not
attract its neighbours either. In brackets after a name: another number of the class (Cityscapes' *_labelIds.png).
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import UserFileError, UserValueError
from ..text_files import read_lines

FOLDER = Path(__file__).resolve().parent
NUMBERS = ("P", "L", "I", "I;16", "I;16B", "I;16L")  # modes of Pillow in which a map holds class numbers
VOID_NUMBER = 255  # in maps of numbers, beside -1 and the number after the last class
LARGEST_ID = 255  # of a class; larger numbers are those of instances


@dataclass(frozen=True)
class Palette:
    """The K classes that count, and how they are painted."""

    name: str
    classes: tuple[str, ...]
    colors: np.ndarray  # uint8 [K, 3]
    void_colors: np.ndarray  # uint8 [voids, 3]
    # Void only where met exactly.
    exact_void_colors: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.uint8))
    ids: tuple[int | None, ...] = ()  # other numbers of the K classes

    def __len__(self) -> int:
        return len(self.classes)

    def numbers(self, found: np.ndarray, ids: bool = False) -> np.ndarray:
        """Class numbers, integers [...], with K for void: 255, -1 and K itself.

        ids: what is found are the palette's `ids`, and others up to 255 are void. UserValueError for a number that is
        no class.
        """
        found, void = found.astype(np.int64), len(self)
        found = np.where((found == VOID_NUMBER) | (found == -1), void if not ids else VOID_NUMBER, found)
        most = LARGEST_ID if ids else void
        if found.min(initial=0) < 0 or found.max(initial=0) > most:
            wrong = int(found.max()) if found.max() > most else int(found.min())
            what = "no number of a class" if ids else f"not in palette {self.name}, which has 0 to {void - 1}"
            raise UserValueError(f"class {wrong} is {what} (and 255: void)")
        if not ids:
            return found
        known = {number: index for index, number in enumerate(self.ids) if number is not None}
        return np.array([known.get(number, void) for number in range(LARGEST_ID + 1)])[found]

    def paint(self, found: np.ndarray, ids: bool = False) -> np.ndarray:
        """Class numbers [H, W], as of `numbers`, as colours, uint8 [H, W, 3]; void in its first colour, or black."""
        black = np.zeros((1, 3), np.uint8)
        return np.concatenate([self.colors, self.void_colors, black])[self.numbers(found, ids)]

    def check_colors(self, image: np.ndarray) -> np.ndarray:
        """`image` itself, uint8 [H, W, 3], if all its colours are the palette's; UserValueError that names another."""
        own = _packed(np.concatenate([self.colors, self.void_colors, self.exact_void_colors]))
        own = np.sort(np.append(own, 0))  # black: what is outside of everything
        packed = _packed(image)
        place = np.searchsorted(own, packed).clip(max=len(own) - 1)
        strange = packed[own[place] != packed]
        if len(strange):
            color = (int(strange[0]) >> 16, int(strange[0]) >> 8 & 255, int(strange[0]) & 255)
            hint = (
                "class numbers are given with one channel" if len(set(color)) == 1 else "JPEG changes colours"
            )
            raise UserValueError(f"colour {color} is not in palette {self.name}; {hint}")
        return image


def to_indices(image: np.ndarray, palette: Palette) -> np.ndarray:
    """Class numbers, K for void, of a colour map [..., 3] uint8 or a map of numbers.

    A colour counts as the nearest of the palette, void included. UserValueError for floats and for numbers that are no
    class.
    """
    if image.dtype == bool or not np.issubdtype(image.dtype, np.integer):
        raise UserValueError(
            f"a segmentation map must hold integers or uint8 colours, this one is {image.dtype}"
        )
    if image.ndim < 3 or image.shape[-1] != 3:
        return palette.numbers(image)
    colors = np.concatenate([palette.colors, palette.void_colors]).astype(np.int64)
    # A map has few distinct colours, or at most a few thousand around each where it was generated or compressed.
    distinct, where = np.unique(_packed(image), return_inverse=True)
    values = np.stack([distinct >> 16, distinct >> 8 & 255, distinct & 255], 1)
    nearest = np.concatenate(
        [
            ((block[:, None] - colors) ** 2).sum(2).argmin(1)
            for block in np.array_split(values, len(values) // 65536 + 1)
        ]
    )
    exactly_void = (values[:, None] == palette.exact_void_colors).all(2).any(1)
    nearest = np.where(exactly_void, len(palette), np.minimum(nearest, len(palette)))
    return nearest[where.ravel()].reshape(image.shape[:-1])


def _packed(colors: np.ndarray) -> np.ndarray:
    """Colours [..., 3] as one number each: int64 [N]."""
    return colors.reshape(-1, 3).astype(np.int64) @ (1 << 16, 1 << 8, 1)


@functools.cache
def load_palette(name: str | Path) -> Palette:
    """A palette that the project knows (`cityscapes`, `camvid`), or that in a file.

    UserError for another one, or for a line that is not `R G B name`.
    """
    path = Path(name) if Path(name).is_file() else FOLDER / f"{name}.txt"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.txt")))
        raise UserFileError(f"palette {name} does not exist: name a file, or one of {known}")
    rows = [row for number, line in read_lines(path) if (row := _row(line, number, path))]
    exactly = [row for row in rows if row[1].startswith("void exactly")]
    counted = [row for row in rows if row[1] != "void" and row not in exactly]
    classes = tuple(label for _, label, _ in counted)
    if not classes or len(set(classes)) < len(classes):
        raise UserValueError(f"palette {path} needs at least one class, and every name only once")
    voids = _colors(row for row in rows if row[1] == "void")
    ids = tuple(number for _, _, number in counted)
    return Palette(path.stem, classes, _colors(counted), voids, _colors(exactly), ids)


def _row(line: str, number: int, path: Path) -> tuple[tuple[int, ...], str, int | None] | None:
    """Colour, name and other number of a palette file's line, None where it has none."""
    words = line.replace(",", " ").split()
    if not words or words[0].startswith("#") or words[0] in ("GIMP", "Name:", "Columns:"):
        return None
    if len(words) < 4 or not all(word.isdigit() and int(word) < 256 for word in words[:3]):
        raise UserValueError(
            f"line {number} of {path} is not `R G B name` with numbers from 0 to 255: {line}"
        )
    label, number_of_it = re.fullmatch(r"(.*?)(?: \[(\d+)\])?", " ".join(words[3:])).groups()
    return tuple(map(int, words[:3])), label, None if number_of_it is None else int(number_of_it)


def _colors(rows: Iterable[tuple]) -> np.ndarray:
    return np.array([row[0] for row in rows], np.uint8).reshape(-1, 3)
