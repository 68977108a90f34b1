"""Cityscapes in the layout in which it is distributed."""

from collections.abc import Sequence
from pathlib import Path

from guided_diffusion.errors import UserValueError
from ldm.data.base import Images
from ldm.data.paired import pair_entries, pair_files, split_folder, two_keys

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
        keys: Sequence[str] = ("image", "label_map"),
        annotation: str = "color",
        **how,  # random_crop, random_flip, interpolation: see Images
    ):
        if annotation not in ANNOTATIONS:
            raise UserValueError(f"annotation must be one of {', '.join(ANNOTATIONS)}, not {annotation!r}")
        pairs = pair_files(
            split_folder(Path(root) / "leftImg8bit", split),
            split_folder(Path(root) / "gtFine", split),
            "_leftImg8bit",
            f"_gtFine_{annotation}",
        )
        palette = None if annotation == "color" else "cityscapes"
        maps = two_keys(keys)[1:]
        super().__init__(pair_entries(pairs, keys, maps, palette, ids=annotation == "labelIds"), size, **how)
