"""Pairs of images of one scene: in two parallel folders, or side by side in one file."""

from collections.abc import Sequence
from pathlib import Path

from guided_diffusion.errors import UserError, UserFileError, UserValueError
from guided_diffusion.image_datasets import _list_images
from ldm.data.base import Images, check_sizes
from ldm.data.images import Source
from ldm.data.palettes import load_palette

LABEL_MAPS = ("label_map",)  # keys whose images are label maps, where nothing else is said


class ParallelFolders(Images):
    """Two folders with files of equal names (without extension), subfolders too.

    Raises UserFileError that names a missing partner, UserValueError for pairs of different sizes.
    """

    def __init__(
        self,
        image_root: str | Path,
        other_root: str | Path,
        size: int | Sequence[int],
        keys: Sequence[str] = ("image", "label_map"),
        maps: Sequence[str] = LABEL_MAPS,  # keys that are label maps: nearest pixel, painted
        palette: str | None = None,  # of label maps that hold class numbers
        **how,  # random_crop, random_flip, interpolation: see Images
    ):
        pairs = pair_files(Path(image_root), Path(other_root))
        super().__init__(pair_entries(pairs, keys, maps, palette), size, **how)


class SideBySide(Images):
    """Images whose left and right halves are a pair, as pix2pix distributes them. keys: (left, right)."""

    def __init__(
        self,
        root: str | Path,
        size: int | Sequence[int],
        keys: Sequence[str] = ("image", "label_map"),
        maps: Sequence[str] = LABEL_MAPS,
        **how,
    ):
        left, right = two_keys(keys)
        entries = [
            {key: Source(Path(path), is_map=key in maps, half=half) for half, key in enumerate((left, right))}
            for path in _list_images(str(root))
        ]
        check_sizes(entries)
        super().__init__(entries, size, **how)


class Night2Day(SideBySide):
    """night2day as pix2pix distributes it: ROOT/{train,val,test}/*.jpg, the night on the left, the day right."""

    def __init__(self, root: str | Path, split: str, size: int | Sequence[int], **how):
        super().__init__(split_folder(root, split), size, keys=("night", "day"), **how)


class CamVid(ParallelFolders):
    """CamVid with 11 classes: photos ROOT/SPLIT/*, annotations with class numbers ROOT/SPLITannot/*."""

    def __init__(
        self,
        root: str | Path,
        split: str,
        size: int | Sequence[int],
        keys: Sequence[str] = ("image", "label_map"),
        **how,
    ):
        annotations = Path(root) / f"{split}annot"
        super().__init__(
            split_folder(root, split),
            annotations,
            size,
            keys,
            maps=two_keys(keys)[1:],
            palette="camvid",
            **how,
        )


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
    for path in map(Path, _list_images(str(folder))):
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
    pairs: Sequence[tuple[Path, Path]],
    keys: Sequence[str],
    maps: Sequence[str],
    palette: str | None,
    ids: bool = False,
) -> list[dict[str, Source]]:
    """The entries of `Images` for pairs of files, their sizes checked."""
    names = two_keys(keys)
    painted = None if palette is None else load_palette(palette)
    entries = [
        {
            key: Source(path, key in maps, painted if key in maps else None, ids)
            for key, path in zip(names, pair, strict=True)
        }
        for pair in pairs
    ]
    check_sizes(entries)
    return entries
