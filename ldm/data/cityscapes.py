"""Cityscapes in the layout in which it is distributed."""

from collections.abc import Sequence
from pathlib import Path

from guided_diffusion.errors import UserValueError
from ldm.data.base import Images
from ldm.data.images import Reading, pair_readings
from ldm.data.paired import KEYS, pair_entries, pair_files, split_folder, two_keys

ANNOTATIONS = ("color", "labelIds", "labelTrainIds")


class Cityscapes(Images):
    """Photos ROOT/leftImg8bit/SPLIT/CITY/*_leftImg8bit.png, annotations ROOT/gtFine/SPLIT/CITY/*_gtFine_*.png.

    annotation: which of the annotation's files are used. color has the colours of all classes; those with numbers
    are painted in the colours of the 19 classes that count, everything else in black.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,  # train, val
        size: int | Sequence[int],
        keys: Sequence[str] = KEYS,
        annotation: str = "color",
        **how,  # random_crop, random_flip, interpolation: see Images
    ):
        readings = self.readings(keys, annotation)
        pairs = pair_files(
            split_folder(Path(root) / "leftImg8bit", split),
            split_folder(Path(root) / "gtFine", split),
            "_leftImg8bit",
            f"_gtFine_{annotation}",
        )
        super().__init__(pair_entries(pairs, readings), size, **how)

    @classmethod
    def readings(
        cls,
        keys: Sequence[str] = KEYS,
        annotation: str = "color",
        interpolation: str = "bicubic",
        **_params,
    ) -> dict[str, Reading]:
        if annotation not in ANNOTATIONS:
            raise UserValueError(f"annotation must be one of {', '.join(ANNOTATIONS)}, not {annotation!r}")
        keys, palette = two_keys(keys), None if annotation == "color" else "cityscapes"
        return pair_readings(keys, keys[1:], palette, annotation == "labelIds", interpolation)
