"""Images as files, for the whole project: which there are, of what class they are, their pixels, their crop.

Names that begin with a dot, and `__MACOSX`, are neither images nor classes; linked folders are entered. 16 bits of
grey become 8 (v >> 8), palettes become colours, and EXIF data that say how an image lies are followed, as viewers do
and ADM does not. docs/recipes.md tells how classes are found and numbered.
"""

import contextlib
import logging
import math
import mmap
import os
import random
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import blobfile as bf
import numpy as np
import torch as th
from PIL import Image, ImageOps

from . import logger
from .checkpoint_util import is_remote
from .errors import UserError, UserFileError, UserValueError

SUFFIXES = ("jpg", "jpeg", "png", "gif", "bmp", "webp", "tif", "tiff")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's mode for a number of channels
LABEL_FROM = ("auto", "prefix", "folder")
MOST_CLASSES = 100_000  # a larger label is a mistake, and would need memory for every class below it
LARGEST_CROP = 0.8  # of a random crop: its side is this share to all of the image's, as in ADM

# What Pillow raises for a file that is truncated, corrupt or no image at all.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# What NumPy raises for an archive that is truncated, corrupt or none at all.
UNREADABLE_ARRAYS = (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)

_ORIENTATION = 0x0112  # of EXIF; 1: as it is stored
_log = logging.getLogger(__name__)
_told: set[str] = set()
_turned = mmap.mmap(-1, 1)  # one byte that data workers share with their parent: whether it has been told


class BadImageError(UserError):
    """An image that cannot be read; the message names it and says why."""


class NoLabelsError(UserValueError):
    """Data that give no labels with a meaning."""


class LabelledImages(NamedTuple):
    """The images of a folder. `labels` are indices into `class_names`."""

    paths: list[str]
    labels: list[int] | None
    class_names: list[str]
    label_from: str = "auto"  # prefix or folder: the rule that gave them


# -------------------------------------------------------------------------------------------------------------- lists


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image."""
    stem, _, suffix = os.path.basename(name).rpartition(".")
    return bool(stem) and suffix.lower() in SUFFIXES and not _hidden(os.path.basename(name))


def list_images(folder: str | Path) -> list[str]:
    """The paths of all images below a folder, depth first in alphabetical order.

    Tells once how many other files there are. UserFileError where the folder or any image is missing.
    """
    folder = str(folder)
    if not bf.exists(folder):
        raise UserFileError(f"data not found: {folder!r} does not exist")
    if not bf.isdir(folder):
        raise UserFileError(f"{folder!r} is neither a folder of images nor an .npz file")
    skipped: Counter[str] = Counter()
    paths = list(_walk(folder, skipped, ()))
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common())
        tell(f"{folder}: {len(paths)} images; passed over {kinds}")
    if not paths:
        raise UserFileError(f"no images in {folder} or its subfolders ({', '.join(SUFFIXES)})")
    return paths


def _walk(folder: str, skipped: Counter[str], above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """The images below a folder; `above`: the folders on the way to it, which a link must not enter again."""
    if is_remote(folder):  # an object store has no links
        entries = [(entry.name, entry.is_dir) for entry in bf.scandir(folder)]
    else:
        here = os.stat(folder)
        above = (*above, (here.st_dev, here.st_ino))
        with os.scandir(folder) as found:
            entries = [(entry.name, _is_folder(entry)) for entry in found]
    for name, is_folder in sorted(entries):
        path = bf.join(folder, name)
        if _hidden(name):
            skipped["hidden"] += 1
        elif is_folder is None:
            skipped["dangling links"] += 1
        elif not is_folder and is_image(name):
            yield path
        elif not is_folder:
            suffix = os.path.splitext(name)[1]
            skipped[f"*{suffix}" if suffix else "without a suffix"] += 1
        elif not is_remote(folder) and os.path.islink(path) and _identity(path) in above:
            skipped["links to a folder above"] += 1
        else:
            yield from _walk(path, skipped, above)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_folder(entry: os.DirEntry) -> bool | None:
    """None for a link to nothing. Only links cost a look at what they mean."""
    return None if entry.is_symlink() and not os.path.exists(entry.path) else entry.is_dir()


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def tell(message: str) -> None:
    """Warn once in a run, on the first rank."""
    if message not in _told and logger.get_rank_without_mpi_import() == 0:
        _told.add(message)
        _log.warning(message)  # not by the run's logger: data workers and evaluations have none


# ------------------------------------------------------------------------------------------------------------- labels


def list_labelled_images(
    data_dir: str | Path,
    label_from: str = "auto",  # "prefix" or "folder" leave only that
    class_names: Sequence[str]
    | None = None,  # of a model; (): of one that has none, numbered by the alphabet
    num_classes: int = 0,
) -> LabelledImages:
    """All images below a folder with their labels, by the rules at the head of this module.

    UserValueError where no rule gives labels with a meaning, or names that are not among `class_names`.
    """
    data_dir = str(data_dir)
    paths = list_images(data_dir)
    if class_names:
        kind, names = _known_names(data_dir, paths, label_from, class_names)
    else:
        kind, names = _names_with_meaning(data_dir, paths, label_from)
        class_names = sorted(set(names)) if class_names is not None else number_names(names, num_classes)
    number = {name: i for i, name in enumerate(class_names)}
    used = set(names)
    if missing := [name for name in class_names if name not in used]:
        tell(f"{data_dir} has no images of {len(missing)} of {len(class_names)} classes: {_some(missing)}")
    return LabelledImages(paths, [number[name] for name in names], list(class_names), kind)


def number_names(names: Iterable[str], num_classes: int) -> list[str]:
    """The names of the classes in the order of their numbers."""
    distinct = set(names)
    if not all(re.fullmatch("[0-9]+", name) for name in distinct):
        return sorted(distinct)
    ordered = sorted(distinct, key=lambda name: (int(name), name))
    last = int(ordered[-1])
    if len({int(name) for name in ordered}) == len(ordered) and last < num_classes:
        own = {int(name): name for name in ordered}
        return [own.get(i, str(i)) for i in range(last + 1)]
    if [int(name) for name in ordered] != list(range(len(ordered))):
        where = next(i for i, name in enumerate(ordered) if int(name) != i)
        tell(
            f"the classes are called {_some(ordered)}: class {ordered[where]} gets number {where}, and so on in "
            f"their order; --num_classes {last + 1} keeps the numbers"
        )
    return ordered


def _rules(label_from: str) -> dict[str, list[Callable[[str, str], str | None]]]:
    if label_from not in LABEL_FROM:
        raise UserValueError(f"label_from must be auto, prefix or folder, not {label_from!r}")
    rules = {"prefix": [_prefix], "folder": [_class_folder, _top_folder]}
    # The kind asked for comes first.
    return dict(sorted(rules.items(), key=lambda item: item[0] != label_from))


def _known_names(
    data_dir: str, paths: list[str], label_from: str, class_names: Sequence[str]
) -> tuple[str, list[str]]:
    """(rule, name of every image): the first rule whose names are all known."""
    known, unknown = set(class_names), []
    for kind, rules in _rules(label_from).items():
        for rule in rules:
            names = [rule(data_dir, path) for path in paths]
            if None not in names:
                strange = sorted(set(names) - known)
                if not strange:
                    if label_from not in ("auto", kind):
                        tell(f"{data_dir}: the classes that the model knows are those of the {kind}")
                    return kind, names
                unknown.append(strange)
    fewest = min(unknown, key=len, default=[])
    raise UserValueError(
        f"{data_dir!r} has classes that the model does not know: {_some(fewest) or 'no names at all'}; "
        f"it knows {_some(class_names)}"
    )


def _names_with_meaning(data_dir: str, paths: list[str], label_from: str) -> tuple[str, list[str]]:
    rules = _rules(label_from)
    names = {kind: _first_with_meaning(rules[kind], data_dir, paths) for kind in rules}
    chosen = next((k for k in ("prefix", "folder") if label_from in ("auto", k) and names[k]), None)
    if chosen is None:
        raise NoLabelsError(
            f"{data_dir!r} has no labels with a meaning: among its {len(paths)} images "
            f"{_tried(label_from)} at least two classes of several images. Name the files "
            "CLASS_anything.png, or put each class into a folder of its own"
        )
    if label_from == "auto" and all(names.values()) and not _same_partition(*names.values()):
        prefixes, folders = (sorted(set(names[kind])) for kind in ("prefix", "folder"))
        tell(
            f"labels: file names ({', '.join(prefixes[:3])}, ...) and folders ({', '.join(folders[:3])}, ...) "
            "differ; using the file names. --label_from folder takes the folders"
        )
    return chosen, names[chosen]


def _prefix(data_dir: str, path: str) -> str | None:
    prefix, underscore, _ = bf.basename(path).partition("_")
    return prefix if underscore else None


def _class_folder(data_dir: str, path: str) -> str | None:
    folders = [part for part in _folders(data_dir, path) if part.lower() != "images"]
    return folders[-1] if folders else None


def _top_folder(data_dir: str, path: str) -> str | None:
    folders = _folders(data_dir, path)
    return folders[0] if folders else None


def _folders(data_dir: str, path: str) -> list[str]:
    return [part for part in path[len(data_dir) :].split("/") if part][:-1]


def _first_with_meaning(
    rules: Sequence[Callable[[str, str], str | None]], data_dir: str, paths: Sequence[str]
) -> list[str] | None:
    """The names that the first rule gives whose names have a meaning; None where none has."""
    for rule in rules:
        names = [rule(data_dir, path) for path in paths]
        counts = Counter(names)
        shared = sum(count for count in counts.values() if count > 1)
        if None not in counts and len(counts) > 1 and 2 * shared >= len(names):
            return names
    return None


def _tried(label_from: str) -> str:
    by_prefix = "the file names up to the first '_'"
    if label_from == "auto":
        return f"neither {by_prefix} nor the folders make"
    return f"{by_prefix if label_from == 'prefix' else 'the folders'} do not make"


def _same_partition(a: Sequence[str], b: Sequence[str]) -> bool:
    return len(set(zip(a, b, strict=True))) == len(set(a)) == len(set(b))


def _some(names: Sequence[str], most: int = 10) -> str:
    """The first names of a list."""
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def class_number(text: str, class_names: Sequence[str], num_classes: int) -> int:
    """The number of the class that a person calls `text`: its name or, where no class is called by a number,
    its number. UserValueError for anything else."""
    if text in class_names:
        return list(class_names).index(text)
    called_by_numbers = any(name.isdigit() for name in class_names)
    if re.fullmatch("[0-9]+", text) and not called_by_numbers and int(text) < num_classes:
        return int(text)
    numbers = f"class numbers must be 0..{num_classes - 1}"
    if are_numbers(class_names):
        raise UserValueError(f"{text!r} is no class: {numbers}; this model has no names for them")
    more = "" if called_by_numbers else f", and {numbers}"
    raise UserValueError(f"{text!r} is no class: the classes are {_some(class_names)}{more}")


def are_numbers(class_names: Sequence[str]) -> bool:
    """Whether classes are called by their numbers, or not at all."""
    return all(name == str(i) for i, name in enumerate(class_names))


def renumber(
    labels: np.ndarray,
    names: Sequence[str] | None,
    class_names: Sequence[str],
    source: str | Path,
) -> np.ndarray:
    """Labels [N] that are indices into `names` (-1: unlabelled) as indices into `class_names`; without `names` as they
    are, which is told. UserValueError for a label of a class that is not there."""
    if names is None:
        tell(f"{source} has no class names: its numbers are taken as those of {_some(class_names)}")
    used = sorted(set(labels[labels >= 0].tolist()))
    if used and used[-1] >= len(names or class_names):
        raise UserValueError(
            f"{source} has label {used[-1]}, but there are {len(names or class_names)} classes"
        )
    if names is None:
        return labels
    if unknown := [names[i] for i in used if names[i] not in class_names]:
        raise UserValueError(
            f"{source} has classes that are not known: {_some(unknown)}; known are {_some(class_names)}"
        )
    place = {name: i for i, name in enumerate(class_names)}
    table = np.array([place.get(name, -1) for name in names] + [-1], dtype=np.int64)  # the last one is for -1
    return table[labels]


def check_labels(labels: np.ndarray, count: int, source: str) -> np.ndarray:
    """Labels of an array file as int64 [count]; UserValueError for anything but numbers from -1 (none) on."""
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserValueError(
            f"{source}: labels must be {count} integers from -1 (unlabelled) up, one for each image, "
            f"not {labels.dtype} {list(labels.shape)}"
        )
    wrong = labels[(labels < -1) | (labels >= MOST_CLASSES)]
    if len(wrong):
        raise UserValueError(
            f"{source}: label {wrong[0]} is no class number: they go from -1 (unlabelled) to {MOST_CLASSES - 1}"
        )
    return labels.astype(np.int64)


# ------------------------------------------------------------------------------------------------------------- pixels


@contextlib.contextmanager
def opened(source: str | Path | BinaryIO, name: str = "") -> Iterator[Image.Image]:
    """An image of which the head has been read. BadImageError that calls it `name` for what cannot be read of it,
    here or inside."""
    name = name or str(source)
    try:
        with contextlib.ExitStack() as stack:
            file = source
            if isinstance(source, str) and is_remote(source):
                file = stack.enter_context(bf.BlobFile(source, "rb"))
            yield stack.enter_context(Image.open(file))
    except UserError:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImageError(f"{name} cannot be read as an image: its contents are none") from error
    except UNREADABLE as error:
        raise BadImageError(f"{name} cannot be read as an image: {error}") from error


def read_image(source: str | Path | BinaryIO, name: str = "") -> Image.Image:
    """A whole image in its own mode, upright. BadImageError as of `opened`."""
    with opened(source, name) as image:
        return upright(image, name or str(source))


def upright(image: Image.Image, name: str) -> Image.Image:
    """The image as its EXIF data want it shown; tells once in a run that there is such an image."""
    image.load()
    if _orientation(image) == 1:
        return image
    if not _turned[0] and logger.get_rank_without_mpi_import() == 0:
        _turned[0] = 1
        _log.warning(
            "%s is stored turned or mirrored; it and others like it are set upright, as their EXIF data say",
            name,
        )
    return ImageOps.exif_transpose(image)


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data say nothing, and Pillow raises whatever happens
        return 1
    return found if found in range(1, 9) else 1


def is_turned(source: str | Path) -> bool:
    """Whether an image is stored otherwise than upright, from its head alone. BadImageError where there is none."""
    with opened(source) as image:
        return _orientation(image) != 1


def image_size(source: str | Path) -> tuple[int, int]:
    """(width, height) of an image when upright, from its head alone. BadImageError where there is none."""
    with opened(source) as image:
        return image.size[::-1] if _orientation(image) >= 5 else image.size


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """The image with 1, 3 or 4 channels of 8 bits. ValueError for floats, whose range nobody knows."""
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16 bits: Pillow would clip them at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floats: save them as 8 or 16 bits")
    return image.convert(MODES[channels])


def read_pixels(source: str | Path | BinaryIO, channels: int = 3, name: str = "") -> Image.Image:
    """A whole image upright with 1, 3 or 4 channels of 8 bits. BadImageError as of `opened`."""
    with opened(source, name) as image:
        return to_channels(upright(image, name or str(source)), channels)


def to_uint8(images: th.Tensor) -> th.Tensor:
    """[B, C, H, W] in [-1, 1] -> uint8 [B, H, W, C], as ADM stores samples: truncated, not rounded."""
    return ((images + 1) * 127.5).clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).contiguous()


def from_uint8(images: th.Tensor) -> th.Tensor:
    """uint8 pixels as data sets give them: float32 in [-1, 1], on their device."""
    # By a tensor: CUDA would multiply by the inverse of a number, which is not the CPU's last bit.
    return images.to(th.float32) / th.full((), 127.5, device=images.device) - 1


def stored_pixels(image: np.ndarray) -> np.ndarray:
    """The 8-bit pixels that a data set's image, float32 in [-1, 1], was made of: exactly those, for files of
    data."""
    return ((image + 1) * 127.5).round().clip(0, 255).astype(np.uint8)


# --------------------------------------------------------------------------------------------------------------- crop


@dataclass(frozen=True)
class Cut:
    """A place in images of one size: the same for a photo and its label map."""

    halvings: int  # averages of 2x2 pixels before the resampling
    scaled: tuple[int, int]  # (width, height) that the whole image gets
    left: int
    top: int
    size: tuple[int, int]  # (height, width) that is cut out of it
    flip: bool = False

    def apply(self, image: Image.Image, resample: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
        """The cut out of an image: uint8 [H, W] or [H, W, C]. NEAREST invents no colour."""
        if resample != Image.Resampling.NEAREST:
            for _ in range(self.halvings):  # one step of resampling would alias at large factors
                image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        if image.size != self.scaled:
            image = image.resize(self.scaled, resample)
        height, width = self.size
        arr = np.array(image)[self.top : self.top + height, self.left : self.left + width]
        return arr[:, ::-1] if self.flip else arr


def draw_cut(
    image: tuple[int, int],  # (width, height)
    size: tuple[int, int],  # (height, width)
    random_crop: bool = False,
    random_flip: bool = False,
    rng: Any = random,
    fractions: tuple[float, float] = (LARGEST_CROP, 1.0),  # of the image's side, for a random crop
) -> Cut:
    """The middle of an image, scaled so that it just covers `size`, or a random part of it.

    For squares the numbers drawn and the pixels cut are ADM's (center_crop_arr, random_crop_arr).
    """
    height, width = cover = size
    if random_crop:
        least, most = (math.ceil(height / fraction) for fraction in reversed(fractions))
        tall = rng.randrange(least, most + 1)
        cover = (tall, round(width * tall / height))
    w, h = image
    halvings = 0
    while w >= 2 * cover[1] and h >= 2 * cover[0]:
        w, h, halvings = w // 2, h // 2, halvings + 1
    scale = max(cover[1] / w, cover[0] / h)
    scaled = (round(w * scale), round(h * scale))
    spare = (scaled[1] - height, scaled[0] - width)
    top, left = (rng.randrange(s + 1) for s in spare) if random_crop else (s // 2 for s in spare)
    return Cut(halvings, scaled, left, top, size, random_flip and rng.random() < 0.5)


def center_crop_arr(pil_image: Image.Image, image_size: int) -> np.ndarray:
    """The middle square of an image, its shorter side scaled to `image_size`: uint8 [H, W] or [H, W, C]."""
    return draw_cut(pil_image.size, (image_size, image_size)).apply(pil_image)


def random_crop_arr(
    pil_image: Image.Image,
    image_size: int,
    min_crop_frac: float = LARGEST_CROP,
    max_crop_frac: float = 1.0,
    *,
    rng: random.Random = random,
) -> np.ndarray:
    """A random square: uint8 [H, W] or [H, W, C].

    Its side is a random fraction, between the two given, of the image's shorter side. Draws three numbers
    from `rng`: the scale, the top, the left.
    """
    cut = draw_cut(
        pil_image.size, (image_size, image_size), True, rng=rng, fractions=(min_crop_frac, max_crop_frac)
    )
    return cut.apply(pil_image)


# ------------------------------------------------------------------------------------------------------------- arrays


@contextlib.contextmanager
def open_arrays(source: str | Path) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of an .npz by name, read where they are asked for, or that of an .npy as arr_0.

    UserError for what is missing, damaged (a bad checksum too), or holds anything but numbers and text.
    """
    if not bf.exists(str(source)):
        raise UserFileError(f"{source} does not exist")
    try:
        with contextlib.ExitStack() as stack:
            file = (
                stack.enter_context(bf.BlobFile(str(source), "rb")) if is_remote(str(source)) else str(source)
            )
            loaded = np.load(file, allow_pickle=False)
            _check_members(loaded)
            yield {"arr_0": loaded} if isinstance(loaded, np.ndarray) else stack.enter_context(loaded)
    except UserError:
        raise
    except UNREADABLE_ARRAYS as error:
        why = "it holds something else than numbers and text" if "pickle" in str(error) else error
        raise UserValueError(f"{source} is not a sound .npy or .npz file: {why}") from error


def _check_members(loaded: Any) -> None:
    """ValueError where an archive has a file *.npy that is no array: NumPy would return its bytes."""
    for info in getattr(getattr(loaded, "zip", None), "infolist", list)():
        if info.filename.endswith(".npy"):
            with loaded.zip.open(info) as member:
                if not member.read(6).startswith(np.lib.format.MAGIC_PREFIX):
                    raise ValueError(f"its {info.filename} is no array")


def stored_class_names(arrays: Mapping[str, np.ndarray], source: str | Path) -> list[str] | None:
    """The names of the classes in an .npz file, as samples and references bring them; None where it has none."""
    if "class_names" not in arrays:
        return None
    names = arrays["class_names"]
    if names.ndim != 1 or names.dtype.kind != "U" or len(set(names.tolist())) < len(names):
        raise UserValueError(f"{source}: class_names must be different texts [classes]")
    return names.tolist()
