"""Segmentation accuracy as Table 4 of the paper counts it: per-pixel accuracy, per-class accuracy, class IoU.

    python evaluations/segmentation.py truth/ predictions/ --palette cityscapes
    python evaluations/segmentation.py truth.npz predictions.npz --palette my_palette.txt --json scores.json

Each side is a folder of images, paired by file name, or an .npz (arr_0): colour maps [N, H, W, 3], every pixel of
which counts as the nearest colour of the palette, or class indices [N, H, W]. Pixels whose truth is void do not
count; a prediction of void counts as a miss, and against no other class (Cityscapes' own rule). A palette is one of
guided_diffusion/palettes, or a file of that form.
"""

from evaluations.arguments import add_json_option, write_json
from guided_diffusion.errors import UserError, UserValueError, exit_on_user_error
from guided_diffusion.flags import Parser, answer_early


def parser() -> Parser:
    """The flags of this program."""
    own = Parser(__doc__)
    own.add("truth", path="source", help="folder or .npz")
    own.add("predictions", path="source", help="folder or .npz")
    own.add(
        "--palette",
        default="cityscapes",
        group="data",
        help="cityscapes, camvid, or a file with `R G B name` lines",
    )
    add_json_option(own)
    return own


if __name__ == "__main__":
    answer_early(parser)  # before the slow imports


import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluations.images import list_images, load_array
from guided_diffusion.image_files import read_image, read_pixels
from guided_diffusion.palettes import NUMBERS, VOID_NUMBER, Palette, load_palette, to_indices

# Cityscapes names the same image differently in each of its folders.
SUFFIXES = ("_leftImg8bit", "_gtFine_color", "_gtFine_labelTrainIds", "_gtFine_labelIds")


CITYSCAPES = load_palette("cityscapes")


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


class Confusion:
    """Counts how often each true class was predicted as each class."""

    def __init__(self, palette: Palette):
        self.palette, self.images = palette, 0
        k = len(palette)
        self._counts = np.zeros((k, k + 1), np.int64)  # [truth, prediction]; the last column is void

    def add(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Count one image or several: index maps [..., H, W] of one shape, where len(palette) is void."""
        if truth.shape != prediction.shape:
            raise UserValueError(
                f"truth is {list(truth.shape)}, prediction {list(prediction.shape)}: scale them alike"
            )
        k = len(self.palette)
        counted = truth.ravel() < k
        pairs = truth.ravel()[counted].astype(np.int64) * (k + 1) + prediction.ravel()[counted]
        self._counts += np.bincount(pairs, minlength=k * (k + 1)).reshape(k, k + 1)
        self.images += int(np.prod(truth.shape[:-2]))

    def scores(self) -> SegmentationScores:
        """Raises UserError where no pixel counts."""
        pixels = int(self._counts.sum())
        if not pixels:
            raise UserValueError("no pixel counts: the truth is void everywhere")
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


def open_maps(path: str | Path) -> dict[str, np.ndarray | Path]:
    """The maps of a folder or .npz by name; files are not read yet."""
    path = Path(path)
    if path.is_dir():
        files = list_images(path)
        return {_pair_name(file.relative_to(path)): file for file in files}
    maps = load_array(path, "arr_0")
    if maps.ndim not in (3, 4):
        raise UserValueError(
            f"arr_0 of {path} must be maps [N, H, W] or [N, H, W, 3], not {list(maps.shape)}"
        )
    return {str(number): image for number, image in enumerate(maps)}


def paired_maps(
    truth: str | Path, predictions: str | Path, palette: Palette
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Truth and prediction, image by image, in the order of their names. Raises UserError if some do not pair."""
    first, second = open_maps(truth), open_maps(predictions)
    if lonely := sorted(first.keys() ^ second.keys()):
        raise UserValueError(
            f"{truth} has {len(first)} maps and {predictions} {len(second)}; {len(lonely)} do not pair, such as {lonely[0]}"
        )
    for name in sorted(first):
        yield _read_map(first[name], palette), _read_map(second[name], palette)


def _pair_name(file: Path) -> str:
    stem = file.with_suffix("").as_posix()
    for suffix in SUFFIXES:
        stem = stem.removesuffix(suffix)
    return stem


def _read_map(given: np.ndarray | Path, palette: Palette) -> np.ndarray:
    if isinstance(given, np.ndarray):
        return given
    image = read_image(given)
    if image.mode not in NUMBERS:
        return _colours(given, np.asarray(read_pixels(given)), palette)
    try:  # a palette image ("P") or a grey one holds the class indices themselves
        if not given.stem.endswith("_labelIds"):
            return palette.numbers(np.asarray(image))
        found = CITYSCAPES.numbers(np.asarray(image), ids=True)
        return np.where(found == len(CITYSCAPES), VOID_NUMBER, found)
    except UserError as error:
        raise UserValueError(f"{given}: {error}") from None


def _colours(path: Path, pixels: np.ndarray, palette: Palette) -> np.ndarray:
    """`pixels` [H, W, 3] unless they are class numbers, which the nearest colours would silently replace."""
    if pixels.max(initial=0) <= len(palette) and (pixels == pixels[..., :1]).all():
        try:
            palette.check_colors(pixels)
        except UserError as error:
            raise UserValueError(f"{path}: {error}") from None
    return pixels


def main(arguments: list[str] | None = None) -> None:
    with exit_on_user_error():
        args = parser().parse_args(arguments)
        run(args)


def run(args: argparse.Namespace) -> None:
    """Score as the command line asks. Raises UserError."""
    confusion = Confusion(load_palette(args.palette))
    for truth, prediction in paired_maps(args.truth, args.predictions, confusion.palette):
        confusion.add(
            to_indices(truth, confusion.palette)[None], to_indices(prediction, confusion.palette)[None]
        )
    scores = confusion.scores()
    print("Per-pixel accuracy:", scores.pixel_accuracy)
    print("Per-class accuracy:", scores.class_accuracy)
    print("Class IoU:", scores.class_iou)
    write_json(args.json, scores)


if __name__ == "__main__":
    main()
