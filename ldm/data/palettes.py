"""The colours in which label maps are painted. The files are those that evaluations/segmentation.py reads."""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guided_diffusion.errors import UserFileError, UserValueError

FOLDER = Path(__file__).resolve().parents[2] / "evaluations" / "palettes"
_LINE = re.compile(r"\s*(\d+)[,\s]+(\d+)[,\s]+(\d+)[,\s]+(.+?)(?:\s*\[(\d+)\])?\s*")


@dataclass(frozen=True)
class Palette:
    """Colours by class number; the last one, number K, is void's."""

    name: str
    colors: np.ndarray  # uint8 [K + 1, 3]
    ids: tuple[int | None, ...]  # other numbers of the K classes (Cityscapes' *_labelIds.png)

    def paint(self, numbers: np.ndarray, ids: bool = False) -> np.ndarray:
        """Class numbers, integers [H, W], as colours, uint8 [H, W, 3].

        K, 255 and -1 are void. ids: the numbers are the palette's `ids`, and all others are void.
        UserValueError for a number that is no class.
        """
        void = len(self.ids)
        if ids:
            known = {number: index for index, number in enumerate(self.ids) if number is not None}
            return self.colors[[known.get(n, void) for n in range(256)]][np.asarray(numbers, np.uint8)]
        numbers = np.where((numbers == 255) | (numbers == -1), void, numbers.astype(np.int64))
        if numbers.min(initial=0) < 0 or numbers.max(initial=0) > void:
            wrong = int(numbers.max()) if numbers.max() > void else int(numbers.min())
            raise UserValueError(f"class {wrong} is not in palette {self.name}, which has 0 to {void - 1}")
        return self.colors[numbers]


@functools.cache
def load_palette(name: str) -> Palette:
    """A palette of evaluations/palettes, or that in a file of `R G B name` lines. UserError for another one."""
    path = Path(name) if Path(name).is_file() else FOLDER / f"{name}.txt"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.txt")))
        raise UserFileError(f"palette {name} does not exist: known are {known}, or name a file")
    lines = [_LINE.fullmatch(line) for line in path.read_text().splitlines()]
    rows = [(np.array(line.groups()[:3], np.uint8), line[4], line[5]) for line in lines if line]
    classes = [(color, number) for color, label, number in rows if not label.startswith("void")]
    void = next((color for color, label, _ in rows if label == "void"), np.zeros(3, np.uint8))
    if not classes:
        raise UserValueError(f"palette {path} has no line `R G B name` with a class")
    ids = tuple(None if number is None else int(number) for _, number in classes)
    return Palette(path.stem, np.stack([*(color for color, _ in classes), void]), ids)
