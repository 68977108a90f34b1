"""Given and wanted modalities as files: images, arrays, labels (what `mt_image_sample.py` reads and
writes)."""

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch as th
from PIL import Image, UnidentifiedImageError

from ..errors import UserError, UserFileError, UserValueError
from ..image_datasets import MODES, _to_channels, center_crop_arr
from .modalities import Modality, one_hot

IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp")


@dataclass(frozen=True)
class GivenImages:
    """Images from a file: values [N, C, H, W] in [-1, 1], and which pixels are there, bool [N, 1, H, W]
    (None: all)."""

    values: th.Tensor
    known: th.Tensor | None


def read_images(source: str, channels: int, size: int) -> GivenImages:
    """Images of `size` pixels from an image, a folder of them (by name), or an .npz (`arr_0` uint8 [N, H,
    W, C]).

    Missing pixels are those of alpha 0, or where the .npz has `mask` [N, H, W] false; their values become 0.
    UserError if a file is missing, damaged or of another size.
    """
    path = Path(source)
    if not path.exists():
        raise UserFileError(f"no such file or folder: {source}")
    if path.suffix == ".npz":
        pixels, mask = _from_npz(path)
    else:
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES) if path.is_dir() else [path]
        if not files:
            raise UserFileError(f"no images in {source}")
        pairs = [_from_image(file, channels, size) for file in files]
        pixels, mask = np.stack([p for p, _ in pairs]), np.stack([m for _, m in pairs])
    if pixels.shape[1:] != (size, size, channels):
        raise UserValueError(
            f"{source}: the images are {'x'.join(map(str, pixels.shape[1:]))}, the model's {size}x{size}x{channels}"
        )
    values = th.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
    if mask is None or mask.all():
        return GivenImages(values, None)
    known = th.from_numpy(mask)[:, None]
    return GivenImages(values * known, known)


def _from_npz(path):
    arrays = _read_arrays(path)
    if "arr_0" not in arrays:
        raise UserValueError(f"{path} has no array arr_0 (uint8 [N, H, W, C])")
    pixels, mask = arrays["arr_0"], arrays.get("mask")
    if pixels.dtype != np.uint8 or pixels.ndim != 4:
        raise UserValueError(
            f"{path}: arr_0 must be uint8 [N, H, W, C], not {pixels.dtype} {list(pixels.shape)}"
        )
    if mask is not None and mask.shape != pixels.shape[:3]:
        raise UserValueError(f"{path}: mask is {list(mask.shape)}, the images {list(pixels.shape)}")
    return pixels, None if mask is None else mask.astype(bool)


def _from_image(path, channels, size):
    if channels not in MODES:
        raise UserValueError(f"{path}: the model's images have {channels} channels: give them as an .npz")
    try:
        with Image.open(path) as image:
            image.load()
            # In a model of RGBA images alpha is a channel like the others.
            alpha = np.asarray(image.convert("RGBA"))[..., 3] if channels != 4 else np.full((1, 1), 255)
            flat = _to_channels(image, channels)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error
    if flat.size != (size, size) and alpha.min() < 255:
        raise UserValueError(
            f"{path}: an image with missing pixels must have the model's size, {size}x{size}"
        )
    pixels = np.asarray(flat) if flat.size == (size, size) else center_crop_arr(flat, size)
    known = alpha > 0 if alpha.min() < 255 else np.ones((size, size), bool)
    return pixels.reshape(size, size, channels), known


def read_labels(source: str, modality: Modality) -> th.Tensor:
    """Labels as probability vectors [N, classes]: from "3", "0,1,2", or an .npz / .npy of integers [N] or
    probabilities [N, classes]."""
    classes = modality.shape[0]
    if Path(source).suffix in (".npy", ".npz"):
        array = _named(_read_arrays(source), (modality.name, "labels", "arr_1", "arr_0"), source)
        if array.ndim == 2:
            return modality.check(th.from_numpy(array.astype(np.float32)))
        numbers = array
    else:
        try:
            numbers = np.array([int(part) for part in source.split(",")])
        except ValueError:
            raise UserValueError(
                f"{modality.name}={source}: give class numbers (3 or 0,1,2) or an .npz or .npy file"
            ) from None
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise UserValueError(f"{source}: labels must be integers [N] or probabilities [N, {classes}]")
    if len(numbers) == 0 or numbers.min() < 0 or numbers.max() >= classes:
        raise UserValueError(f"{modality.name}={source}: class numbers must be 0..{classes - 1}")
    return one_hot(th.from_numpy(numbers.astype(np.int64)), classes)


def read_vectors(source: str, modality: Modality) -> th.Tensor:
    """Vectors [N, D] from an .npy, or an .npz under the modality's name or arr_0."""
    array = _named(_read_arrays(source), (modality.name, "arr_0"), source)
    if array.dtype.kind not in "iuf":
        raise UserValueError(f"{source}: vectors must be numbers [N, D], not {array.dtype}")
    return modality.check(th.from_numpy(array.astype(np.float32)))


def _read_arrays(source: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name, or that of an .npy as arr_0. UserError if it is missing or damaged."""
    if not Path(source).exists():
        raise UserFileError(f"no such file: {source}")
    try:
        loaded = np.load(source)
        if isinstance(loaded, np.ndarray):
            return {"arr_0": loaded}
        with loaded:
            return dict(loaded)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{source} is not a sound .npy or .npz file: {error}") from error


def _named(arrays: Mapping, names, source):
    for name in names:
        if name in arrays:
            return arrays[name]
    raise UserValueError(f"{source} has none of the arrays {', '.join(names)}")
