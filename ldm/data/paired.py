"""Pairs of images of one scene: in two parallel folders, or side by side in one file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from guided_diffusion.errors import UserError, UserFileError, UserValueError
from guided_diffusion.image_files import list_images, opened
from ldm.data.base import Images, check_sizes
from ldm.data.images import Reading, Source, pair_readings

KEYS = ("image", "label_map")
# What is a label map and no photo: in the first images of a folder, of so many pixels at least, so many colours at most, as
# only files without loss keep them.
LOOKED_AT, FEW_PIXELS, FEW_COLORS = 3, 1024, 40
LOSSY = ("JPEG", "MPO", "WEBP")


class Pairs(Images):
    """What both kinds of pairs share."""

    def _refuse_smoothed_maps(self) -> None:
        """UserValueError where the images under a key that is read as photos are label maps, which scaling would smooth."""
        for key, source in self.entries[0].items():
            some = [entry[key] for entry in self.entries[:LOOKED_AT]]
            if not source.reading.is_map and all(self._looks_like_map(one) for one in some):
                raise UserValueError(
                    f"{source.path} looks like a label map, whose classes scaling to {self.size[0]}x{self.size[1]} would mix: "
                    f"say maps: [{key}], with a palette where it holds class numbers, or maps: [] where it is a photo"
                )

    def _looks_like_map(self, source: Source) -> bool:
        with opened(source.path) as image:
            if image.format in LOSSY:
                return False
            numbered = image.mode == "P" and image.format != "GIF"
        pixels = np.asarray(source.read())
        if pixels.shape[:2] == self.size and not self.random_crop:
            return False  # nothing is scaled
        colors = len(np.unique(pixels.reshape(-1, 3), axis=0))
        return numbered or (pixels.shape[0] * pixels.shape[1] >= FEW_PIXELS and 1 < colors <= FEW_COLORS)


class ParallelFolders(Pairs):
    """Two folders with files of equal names (without extension), subfolders too.

    Raises UserFileError that names a missing partner, UserValueError for pairs of different sizes.
    """

    def __init__(
        self,
        image_root: str | Path,
        other_root: str | Path,
        size: int | Sequence[int],
        keys: Sequence[str] = KEYS,
        maps: Sequence[str] | None = None,  # keys that are label maps, see pair_readings
        palette: str | None = None,  # of label maps: they hold class numbers, or its colours
        **how,  # random_crop, random_flip, interpolation: see Images
    ):
        readings = self.readings(keys, maps, palette)
        pairs = pair_files(Path(image_root), Path(other_root))
        super().__init__(pair_entries(pairs, readings), size, **how)
        if maps is None:
            self._refuse_smoothed_maps()

    @classmethod
    def readings(
        cls,
        keys: Sequence[str] = KEYS,
        maps: Sequence[str] | None = None,
        palette: str | None = None,
        interpolation: str = "bicubic",
        **_params,
    ) -> dict[str, Reading]:
        return pair_readings(two_keys(keys), maps, palette, interpolation=interpolation)


class SideBySide(Pairs):
    """Images whose left and right halves are a pair, as pix2pix distributes them. keys: (left, right)."""

    def __init__(
        self,
        root: str | Path,
        size: int | Sequence[int],
        keys: Sequence[str] = KEYS,
        maps: Sequence[str] | None = None,
        **how,
    ):
        readings = self.readings(keys, maps)
        entries = [
            {key: Source(Path(path), readings[key], half) for half, key in enumerate(readings)}
            for path in list_images(root)
        ]
        check_sizes(entries)
        super().__init__(entries, size, **how)
        if maps is None:
            self._refuse_smoothed_maps()

    @classmethod
    def readings(
        cls,
        keys: Sequence[str] = KEYS,
        maps: Sequence[str] | None = None,
        interpolation: str = "bicubic",
        **_params,
    ) -> dict[str, Reading]:
        return pair_readings(two_keys(keys), maps, interpolation=interpolation)


class Night2Day(SideBySide):
    """night2day as pix2pix distributes it: ROOT/{train,val,test}/*.jpg, the night on the left, the day right."""

    def __init__(self, root: str | Path, split: str, size: int | Sequence[int], **how):
        super().__init__(split_folder(root, split), size, keys=("night", "day"), **how)

    @classmethod
    def readings(cls, keys: Sequence[str] = ("night", "day"), *args, **params) -> dict[str, Reading]:
        return super().readings(keys, *args, **params)


class CamVid(ParallelFolders):
    """CamVid with 11 classes: photos ROOT/SPLIT/*, annotations with class numbers ROOT/SPLITannot/*."""

    def __init__(
        self,
        root: str | Path,
        split: str,
        size: int | Sequence[int],
        keys: Sequence[str] = KEYS,
        **how,
    ):
        annotations = Path(root) / f"{split}annot"
        super().__init__(split_folder(root, split), annotations, size, keys, **how)

    @classmethod
    def readings(
        cls, keys: Sequence[str] = KEYS, *_maps, interpolation: str = "bicubic", **_params
    ) -> dict[str, Reading]:
        keys = two_keys(keys)
        return pair_readings(keys, keys[1:], "camvid", interpolation=interpolation)


def split_folder(root: str | Path, split: str) -> Path:
    """ROOT/SPLIT. UserFileError that names the splits which are there."""
    folder = Path(root) / split
    if not folder.is_dir():
        there = sorted(entry.name for entry in Path(root).glob("*") if entry.is_dir())
        raise UserFileError(f"there is no split {folder}; {root} has {', '.join(there) or 'no folders'}")
    return folder


def two_keys(keys: Sequence[str]) -> tuple[str, str]:
    """The names of a pair's images. UserValueError unless they are two different ones."""
    if len(keys) != 2 or keys[0] == keys[1]:
        raise UserValueError(f"keys must be two different names, not {list(keys)}")
    return tuple(keys)


def pair_files(
    first: Path, second: Path, first_end: str = "", second_end: str = ""
) -> list[tuple[Path, Path]]:
    """Files of two folders that differ in folder, extension and ending alone, in the order of their names.

    first_end, second_end: endings of the names before the extension; files without them are passed over.
    UserFileError that names a file without a partner.
    """
    one, other = _by_name(first, first_end), _by_name(second, second_end)
    for here, there, folder in ((one, other, second), (other, one, first)):
        if lonely := sorted(here.keys() - there.keys()):
            raise UserFileError(
                f"{here[lonely[0]]} has no partner in {folder} ({len(lonely)} of {len(here)} have none)"
            )
    return [(one[name], other[name]) for name in sorted(one)]


def _by_name(folder: Path, end: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in map(Path, list_images(folder)):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if not name.endswith(end):
            continue
        name = name.removesuffix(end)
        if name in found:
            raise UserError(f"{found[name]} and {path} have one name: which of them belongs to the pair?")
        found[name] = path
    if not found:
        raise UserFileError(f"{folder} has no images named *{end}")
    return found


def pair_entries(
    pairs: Sequence[tuple[Path, Path]], readings: Mapping[str, Reading]
) -> list[dict[str, Source]]:
    """The entries of `Images` for pairs of files, their sizes checked."""
    entries = [
        {key: Source(path, reading) for (key, reading), path in zip(readings.items(), pair, strict=True)}
        for pair in pairs
    ]
    check_sizes(entries)
    return entries
