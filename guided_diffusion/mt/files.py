"""Given and wanted modalities as files: images, arrays, labels (what `mt_image_sample.py` reads and
writes)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch as th

from ..errors import UserFileError, UserValueError
from ..image_files import (
    MODES,
    center_crop_arr,
    class_number,
    draw_cut,
    list_images,
    open_arrays,
    opened,
    renumber,
    stored_class_names,
    to_channels,
    upright,
)
from .cells import Cell, cut_out, given_cells
from .modalities import Modality, one_hot


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
        files = list_images(path) if path.is_dir() else [path]
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
    with open_arrays(path) as arrays:
        if "arr_0" not in arrays:
            raise UserValueError(f"{path} has no array arr_0 (uint8 [N, H, W, C])")
        pixels, mask = arrays["arr_0"], arrays.get("mask")
    if pixels.dtype != np.uint8 or pixels.ndim != 4:
        raise UserValueError(
            f"{path}: arr_0 must be uint8 [N, H, W, C], not {pixels.dtype} {list(pixels.shape)}"
        )
    if 0 in pixels.shape:
        raise UserValueError(f"{path}: arr_0 holds no images, it is {list(pixels.shape)}")
    if mask is not None and mask.shape != pixels.shape[:3]:
        raise UserValueError(f"{path}: mask is {list(mask.shape)}, the images {list(pixels.shape)}")
    return pixels, None if mask is None else mask.astype(bool)


def _from_image(path, channels, size):
    if channels not in MODES:
        raise UserValueError(f"{path}: the model's images have {channels} channels: give them as an .npz")
    with opened(path) as file:
        image = upright(file, str(path))
        # In a model of RGBA images alpha is a channel like the others.
        alpha = np.asarray(image.convert("RGBA"))[..., 3] if channels != 4 else np.full((1, 1), 255)
        flat = to_channels(image, channels)
    if flat.size != (size, size) and alpha.min() < 255:
        raise UserValueError(
            f"{path}: an image with missing pixels must have the model's size, {size}x{size}"
        )
    pixels = np.asarray(flat) if flat.size == (size, size) else center_crop_arr(flat, size)
    known = alpha > 0 if alpha.min() < 255 else np.ones((size, size), bool)
    return pixels.reshape(size, size, channels), known


def read_labels(source: str, modality: Modality, class_names: Sequence[str] = ()) -> th.Tensor:
    """Labels as probability vectors [N, classes]: from "3", "0,1,2", "cat,dog", or an .npz / .npy of integers [N] or
    probabilities [N, classes]. class_names: of the model; those that an .npz brings are matched with them."""
    classes = modality.shape[0]
    if Path(source).suffix in (".npy", ".npz"):
        with open_arrays(source) as arrays:
            array = _named(arrays, (modality.name, "labels", "arr_1", "arr_0"), source)
            names = stored_class_names(arrays, source)
        if array.ndim == 2 and array.dtype.kind in "iuf":
            return modality.check(th.from_numpy(array.astype(np.float32)))
        numbers = array
    else:
        names = None
        try:
            numbers = np.array(
                [class_number(part.strip(), class_names, classes) for part in source.split(",")]
            )
        except UserValueError as error:
            raise UserValueError(f"{modality.name}={source}: {error}; or give an .npz or .npy file") from None
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise UserValueError(f"{source}: labels must be integers [N] or probabilities [N, {classes}]")
    if len(numbers) == 0 or numbers.min() < 0 or numbers.max() >= (len(names) if names else classes):
        raise UserValueError(f"{modality.name}={source}: class numbers must be 0..{classes - 1}")
    if names and class_names:
        numbers = renumber(numbers, names, class_names, source)
    return one_hot(th.from_numpy(numbers.astype(np.int64)), classes)


def read_vectors(source: str, modality: Modality) -> th.Tensor:
    """Vectors [N, D] from an .npy, an .npz under the modality's name or arr_0, a folder of .npy [D], or text such as
    "0.5,-1" for one."""
    if not Path(source).exists() and re.fullmatch(r"[-+\d.eE,\s]+", source):
        return th.from_numpy(modality.from_cell(Cell(source, f"{modality.name}={source}")))[None]
    if Path(source).suffix not in (".npy", ".npz"):
        return read_values(source, modality)
    with open_arrays(source) as arrays:
        array = _named(arrays, (modality.name, "arr_0"), source)
    if array.dtype.kind not in "iuf":
        raise UserValueError(f"{source}: vectors must be numbers [N, D], not {array.dtype}")
    modality.check(th.from_numpy(array.astype(np.float32)))
    return th.from_numpy(
        np.stack([modality.from_cell(Cell(row, f"{source} row {k}")) for k, row in enumerate(array)])
    )


def read_values(
    source: str, modality: Modality, image_shape: tuple[int, int, int] | None = None
) -> th.Tensor:
    """Values [N, ...] of a modality from a file, a folder (by name) or an array, as training reads them; what lies on
    the image's pixels is cut to the middle square of `image_shape`. UserError that names the file or row."""
    rows = []
    for cell in given_cells(source, modality.name):
        found = modality.from_cell(cell)
        if modality.rank == 3 and found.ndim > 1:
            size = image_shape[1:]
            found = cut_out(draw_cut(found.shape[1::-1], size), found, modality.nearest)
        rows.append(modality.finish(found))
    return modality.check(modality.from_data(th.from_numpy(np.stack(rows)))[0])


def _named(arrays: Mapping, names, source):
    for name in names:
        if name in arrays:
            return arrays[name]
    raise UserValueError(f"{source} has none of the arrays {', '.join(names)}")
