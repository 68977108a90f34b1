"""Segmentation accuracy as Table 4 of the paper counts it: per-pixel accuracy, per-class accuracy, class IoU.

    python evaluations/segmentation.py truth/ predictions/ --palette cityscapes
    python evaluations/segmentation.py truth.npz predictions.npz --palette my_palette.txt --json scores.json

Each side is a folder of images, paired by file name, or an .npz (arr_0): colour maps [N, H, W, 3], every pixel of
which counts as the nearest colour of the palette, or class indices [N, H, W]. Pixels whose truth is void do not
count; a prediction of void counts as a miss, and against no other class (Cityscapes' own rule).

A palette is one of evaluations/palettes, or a file with one class per line, `R G B name`, in the order of the class
indices; a line named `void` (any number of them, anywhere) is a colour that does not count, `void exactly` one that
does not attract its neighbours either. A number in brackets after a name is not read here. GIMP's .gpl files have this
form.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # run as a script: look for modules in the repository, not in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from PIL import Image

from evaluations.arguments import add_json_option
from evaluations.errors import EvaluationError, MissingFileError, exit_on_error
from evaluations.images import list_images, load_array

PALETTES = Path(__file__).resolve().parent / "palettes"
VOID_INDEX = 255  # in index maps, beside the palette's own
# Cityscapes names the same image differently in each of its folders.
SUFFIXES = ("_leftImg8bit", "_gtFine_color", "_gtFine_labelTrainIds", "_gtFine_labelIds")


@dataclass(frozen=True)
class Palette:
    """The classes that count, and how they are painted."""

    name: str
    classes: tuple[str, ...]
    colors: np.ndarray  # [classes, 3] uint8
    void_colors: np.ndarray  # [voids, 3] uint8
    exact_void_colors: np.ndarray = field(
        default_factory=lambda: np.empty((0, 3), np.uint8)
    )  # void only if met exactly

    def __len__(self) -> int:
        return len(self.classes)


def load_palette(name: str | Path) -> Palette:
    """A palette that the project knows (`cityscapes`, `camvid`), or that in a file.

    Raises EvaluationError for a line that is not `R G B name`.
    """
    path = Path(name)
    if not path.is_file():
        path = PALETTES / f"{name}.txt"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PALETTES.glob("*.txt")))
        raise MissingFileError(f"palette {name} does not exist: name a file, or one of {known}")
    rows = [
        row
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (row := _row(line, number, path))
    ]
    exactly = [row for row in rows if row[1].startswith("void exactly")]
    counted = [row for row in rows if row[1] != "void" and row not in exactly]
    classes = tuple(label for _, label in counted)
    if not classes or len(set(classes)) < len(classes):
        raise EvaluationError(f"palette {path} needs at least one class, and every name only once")
    return Palette(
        name=path.stem,
        classes=classes,
        colors=_colors(counted),
        void_colors=_colors(row for row in rows if row[1] == "void"),
        exact_void_colors=_colors(exactly),
    )


def _row(line: str, number: int, path: Path) -> tuple[tuple[int, ...], str] | None:
    """Colour and name of a palette file's line, None where it has none."""
    words = line.replace(",", " ").split()
    if not words or words[0].startswith("#") or words[0] in ("GIMP", "Name:", "Columns:"):
        return None
    if len(words) < 4 or not all(word.isdigit() and int(word) < 256 for word in words[:3]):
        raise EvaluationError(
            f"line {number} of {path} is not `R G B name` with numbers from 0 to 255: {line}"
        )
    name = " ".join(words[3:])
    return tuple(int(word) for word in words[:3]), re.sub(r" \[\d+\]$", "", name)


def _colors(rows: Iterable[tuple[tuple[int, ...], str]]) -> np.ndarray:
    return np.array([color for color, _ in rows], np.uint8).reshape(-1, 3)


CITYSCAPES = load_palette("cityscapes")
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)  # of its classes in *_labelIds.png


@dataclass(frozen=True)
class SegmentationScores:
    """Table 4's three numbers, between 0 and 1, and what they are the means of."""

    pixel_accuracy: float  # share of all counted pixels whose class is right
    class_accuracy: float  # mean over the classes that occur in the truth
    class_iou: float  # mean over the classes that occur in truth or prediction
    accuracy_by_class: dict[str, float | None]  # None for a class that does not occur
    iou_by_class: dict[str, float | None]
    n: int  # images
    pixels: int  # counted
    palette: str

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)


class Confusion:
    """Counts how often each true class was predicted as each class."""

    def __init__(self, palette: Palette):
        self.palette, self.images = palette, 0
        k = len(palette)
        self._counts = np.zeros((k, k + 1), np.int64)  # [truth, prediction]; the last column is void

    def add(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Count one image or several: index maps [..., H, W] of one shape, where len(palette) is void."""
        if truth.shape != prediction.shape:
            raise EvaluationError(
                f"truth is {list(truth.shape)}, prediction {list(prediction.shape)}: scale them alike"
            )
        k = len(self.palette)
        counted = truth.ravel() < k
        pairs = truth.ravel()[counted].astype(np.int64) * (k + 1) + prediction.ravel()[counted]
        self._counts += np.bincount(pairs, minlength=k * (k + 1)).reshape(k, k + 1)
        self.images += int(np.prod(truth.shape[:-2]))

    def scores(self) -> SegmentationScores:
        """Raises EvaluationError where no pixel counts."""
        pixels = int(self._counts.sum())
        if not pixels:
            raise EvaluationError("no pixel counts: the truth is void everywhere")
        hits = self._counts.diagonal()
        true, predicted = self._counts.sum(1), self._counts[:, :-1].sum(0)
        accuracy = _ratio(hits, true)
        iou = _ratio(hits, true + predicted - hits)
        return SegmentationScores(
            pixel_accuracy=float(hits.sum() / pixels),
            class_accuracy=float(np.nanmean(accuracy)),
            class_iou=float(np.nanmean(iou)),
            accuracy_by_class=self._by_class(accuracy),
            iou_by_class=self._by_class(iou),
            n=self.images,
            pixels=pixels,
            palette=self.palette.name,
        )

    def _by_class(self, values: np.ndarray) -> dict[str, float | None]:
        pairs = zip(self.palette.classes, values.tolist(), strict=True)
        return {name: None if np.isnan(value) else value for name, value in pairs}


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=denominator > 0)


def segmentation_scores(
    truth: Iterable[np.ndarray], predictions: Iterable[np.ndarray], palette: Palette = CITYSCAPES
) -> SegmentationScores:
    """Scores of `predictions` against `truth`: images one by one, colour maps [H, W, 3] or index maps [H, W]."""
    confusion = Confusion(palette)
    for one, other in zip(truth, predictions, strict=True):
        confusion.add(to_indices(one, palette)[None], to_indices(other, palette)[None])
    return confusion.scores()


def to_indices(image: np.ndarray, palette: Palette) -> np.ndarray:
    """Class indices, len(palette) for void, of a colour map [..., 3] uint8 or an index map.

    A colour counts as the nearest of the palette, void included. In an index map 255, -1 and the number after the last
    class are void. Raises EvaluationError for floats and for numbers that are no class.
    """
    if image.dtype == bool or not np.issubdtype(image.dtype, np.integer):
        raise EvaluationError(
            f"a segmentation map must hold integers or uint8 colours, this one is {image.dtype}"
        )
    if image.ndim >= 3 and image.shape[-1] == 3:
        return _nearest(image, palette)
    k = len(palette)
    indices = image.astype(np.int64)
    indices = np.where((indices == VOID_INDEX) | (indices == -1), k, indices)
    if indices.min() < 0 or indices.max() > k:
        wrong = int(indices.max()) if indices.max() > k else int(indices.min())
        raise EvaluationError(
            f"class {wrong} is not in palette {palette.name}, which has 0 to {k - 1} (and 255: void)"
        )
    return indices


def _nearest(image: np.ndarray, palette: Palette) -> np.ndarray:
    colors = np.concatenate([palette.colors, palette.void_colors]).astype(np.int64)
    # A map has few distinct colours, or at most a few thousand around each where it was generated or compressed.
    packed = image.reshape(-1, 3).astype(np.int64) @ (1 << 16, 1 << 8, 1)
    distinct, where = np.unique(packed, return_inverse=True)
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


def open_maps(path: str | Path) -> dict[str, np.ndarray | Path]:
    """The maps of a folder or .npz by name; files are not read yet."""
    path = Path(path)
    if path.is_dir():
        files = list_images(path)
        if not files:
            raise EvaluationError(f"{path} holds no images")
        return {_pair_name(file.relative_to(path)): file for file in files}
    return {str(number): image for number, image in enumerate(load_array(path, "arr_0"))}


def paired_maps(truth: str | Path, predictions: str | Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Truth and prediction, image by image, in the order of their names. Raises EvaluationError if some do not pair."""
    first, second = open_maps(truth), open_maps(predictions)
    if lonely := sorted(first.keys() ^ second.keys()):
        raise EvaluationError(
            f"{truth} has {len(first)} maps and {predictions} {len(second)}; {len(lonely)} do not pair, such as {lonely[0]}"
        )
    for name in sorted(first):
        yield _read_map(first[name]), _read_map(second[name])


def _pair_name(file: Path) -> str:
    stem = file.with_suffix("").as_posix()
    for suffix in SUFFIXES:
        stem = stem.removesuffix(suffix)
    return stem


def _read_map(given: np.ndarray | Path) -> np.ndarray:
    if isinstance(given, np.ndarray):
        return given
    try:
        with Image.open(given) as image:
            # A palette image ("P") or a grey one holds the class indices themselves.
            pixels = np.asarray(image if image.mode in ("P", "L", "I", "I;16") else image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise EvaluationError(f"{given} cannot be read as an image ({error})") from error
    if given.stem.endswith("_labelIds") and pixels.ndim == 2:
        table = np.full(256, VOID_INDEX)
        table[list(CITYSCAPES_IDS)] = range(len(CITYSCAPES_IDS))
        return table[pixels]
    return pixels


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("truth", help="folder or .npz")
    parser.add_argument("predictions", help="folder or .npz")
    parser.add_argument(
        "--palette", default=CITYSCAPES.name, help="cityscapes, camvid, or a file with `R G B name` lines"
    )
    add_json_option(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    with exit_on_error():
        run(args)


def run(args: argparse.Namespace) -> None:
    """Score as the command line asks. Raises EvaluationError."""
    confusion = Confusion(load_palette(args.palette))
    for truth, prediction in paired_maps(args.truth, args.predictions):
        confusion.add(
            to_indices(truth, confusion.palette)[None], to_indices(prediction, confusion.palette)[None]
        )
    scores = confusion.scores()
    print("Per-pixel accuracy:", scores.pixel_accuracy)
    print("Per-class accuracy:", scores.class_accuracy)
    print("Class IoU:", scores.class_iou)
    if args.json:
        args.json.write_text(scores.to_json() + "\n")


if __name__ == "__main__":
    main()
