"""One value of a modality as the data have it - a file, an entry of a table, a row of an array - read into an array.

Training, `--given` and the bound read by these functions alone. Numbers keep their values: 16 bits and floats too.
"""

import colorsys
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserFileError, UserValueError
from ..image_files import MODES, SUFFIXES, Cut, class_number, image_size, open_arrays, opened, upright
from ..palettes import NUMBERS, Palette, load_palette, to_indices

_FILE = re.compile(r"\.[A-Za-z]\w{0,4}$")  # the end of a file's name
VOID = -1  # the class number of a pixel without a class


@dataclass(frozen=True)
class Cell:
    """A value as it is stored. content: a path, a file's bytes, a Pillow image, an array, a number, numbers or text;
    None: missing. where: what messages call it. suffix: of bytes. folder: where a text that is a path begins."""

    content: object
    where: str
    suffix: str = ""
    folder: Path | None = None

    @property
    def missing(self) -> bool:
        """Whether there is no value: None, empty text, or NaN alone."""
        content = self.content
        if isinstance(content, float) and np.isnan(content):
            return True
        return content is None or (isinstance(content, str) and not content.strip())

    def refuse(self, why: object) -> UserValueError:
        """The error that names this value."""
        return UserValueError(f"{self.where}: {why}")

    @property
    def path(self) -> Path | None:
        """The file that it is in, None where it is in none."""
        if isinstance(self.content, str) and self.folder is not None and _FILE.search(self.content.strip()):
            return self.folder / self.content.strip()
        return self.content if isinstance(self.content, Path) else None

    def file(self) -> str | io.BytesIO:
        """What can be opened: the path, or the bytes. UserError where there is neither."""
        if isinstance(self.content, bytes):
            return io.BytesIO(self.content)
        if self.path is None:
            raise self.refuse(f"{str(self.content)[:60]!r} is no file")
        if not self.path.exists():
            raise UserFileError(f"{self.where}: there is no file {self.path}")
        return str(self.path)

    @property
    def is_array(self) -> bool:
        """Whether it is an array, in memory or as .npy."""
        return isinstance(self.content, np.ndarray) or self._suffix == ".npy"

    @property
    def is_image(self) -> bool:
        """Whether it can be an image: a file, or an array with pixels."""
        if isinstance(self.content, np.ndarray):
            return self.content.ndim in (2, 3)
        if self._suffix == ".npy":
            return self.array().ndim in (2, 3)
        return isinstance(self.content, Image.Image) or self._suffix.lstrip(".") in SUFFIXES

    @property
    def _suffix(self):
        return (self.suffix if self.path is None else self.path.suffix).lower()

    def array(self) -> np.ndarray:
        """The array of an .npy file, or the one that it is."""
        if isinstance(self.content, np.ndarray):
            return self.content
        file = self.file()
        if isinstance(file, str):
            with open_arrays(file) as arrays:
                return arrays["arr_0"]
        try:
            return np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise self.refuse(f"it is no sound .npy file: {error}") from None

    def numbers(self) -> np.ndarray:
        """Numbers [...] of an array, a list, a number, or text such as "1 2 3", "1,2,3" or "[1, 2, 3]"."""
        if self.is_array:
            found = self.array()
        elif isinstance(self.content, str):
            words = re.split(r"[\s,;]+", self.content.strip().strip("[]").strip())
            try:
                found = np.array([float(word) for word in words])
            except ValueError:
                raise self.refuse(f"{self.content[:40]!r} are no numbers") from None
        elif isinstance(self.content, bytes):
            try:
                found = np.array(json.loads(self.content))
            except ValueError:
                raise self.refuse("it holds no numbers") from None
        else:
            try:
                found = np.array(self.content, dtype=np.float64)
            except (TypeError, ValueError):
                raise self.refuse("it holds no numbers") from None
        if found.dtype.kind not in "biuf":
            raise self.refuse(f"it holds no numbers but {found.dtype}")
        return found

    def size(self) -> tuple[int, int]:
        """(width, height) of an image or array with pixels, from a file's head where there is one."""
        if self.is_array:
            shape = self.array().shape
            if len(shape) not in (2, 3):
                raise self.refuse(f"an image must be [H, W] or [H, W, C], not {list(shape)}")
            return shape[1], shape[0]
        if isinstance(self.content, Image.Image):
            return self.content.size
        return image_size(self.file())

    def image(self) -> Image.Image:
        """The image in a file, upright, in its own mode. BadImageError that names it where it cannot be read."""
        if isinstance(self.content, Image.Image):
            return upright(self.content, self.where)
        with opened(self.file(), self.where) as file:
            deep = _deep_colour(file)
            image = upright(file, self.where)
        if deep:
            raise self.refuse(
                "16-bit colours of a PNG cannot be read in full: save it as .npy or with one channel"
            )
        return image


def _deep_colour(file) -> bool:
    """Whether Pillow is about to cut 16-bit colours down to 8 bits."""
    rawmode = str(file.tile[0][3] if file.format == "PNG" and file.tile else "")
    return rawmode in ("RGB;16B", "RGBA;16B", "LA;16B")


# ----------------------------------------------------------------------------------------------------------- images


def pixels_of(cell: Cell, channels: int | None = None) -> np.ndarray:
    """The pixels of an image: [H, W, C] as uint8, uint16 or float32. channels: what 8-bit images are turned into.

    UserError where it has others, holds NaN, or is something else than an image.
    """
    if cell.is_array:
        found = cell.array()
        if found.ndim not in (2, 3) or found.dtype.kind not in "buif":
            raise cell.refuse(
                f"an image must be numbers [H, W] or [H, W, C], not {found.dtype} {list(found.shape)}"
            )
        found = found[..., None] if found.ndim == 2 else found
    else:
        image = cell.image()
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            found = np.asarray(image)[..., None]
        else:
            own = {"1": "L", "L": "L", "LA": "L", "RGBA": "RGBA"}.get(image.mode, "RGB")
            found = np.asarray(image.convert(MODES.get(channels, own)))
            found = found[..., None] if found.ndim == 2 else found
    if channels is not None and found.shape[2] != channels:
        raise cell.refuse(f"it has {found.shape[2]} channels, and others {channels}")
    if found.dtype in (np.uint8, np.uint16):
        return found
    if found.dtype.kind in "bui":
        if found.min(initial=0) < 0 or found.max(initial=0) > 65535:
            raise cell.refuse(
                f"whole numbers must lie in 0..65535, not {found.min()}..{found.max()}: save floats"
            )
        return found.astype(np.uint16 if found.dtype.itemsize > 1 else np.uint8)
    if not np.isfinite(found).all():
        raise cell.refuse("it holds NaN or infinity")
    return found.astype(np.float32)


def in_range(numbers: np.ndarray, low: float, high: float, cell: Cell) -> np.ndarray:
    """`numbers` itself; UserValueError that names the first outside of low..high."""
    wrong = numbers[(numbers < low) | (numbers > high)]
    if wrong.size:
        raise cell.refuse(f"{wrong.flat[0]:g} is outside of the range {low:g} to {high:g}")
    return numbers


def cut_out(cut: Cut, pixels: np.ndarray, nearest: bool = False) -> np.ndarray:
    """The cut of pixels [H, W, C] or [H, W]: as it is where nothing is resized. nearest: invent no value.

    8-bit images of 1, 3 and 4 channels come out as `Cut.apply` gives them; others are resized as floats.
    """
    resample = Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC
    if pixels.ndim == 2:
        return cut.apply(Image.fromarray(pixels.astype(np.int32)), resample)
    height, width, channels = pixels.shape
    if cut.scaled == (width, height) and not cut.halvings:
        found = pixels[cut.top : cut.top + cut.size[0], cut.left : cut.left + cut.size[1]]
        return found[:, ::-1] if cut.flip else found
    if pixels.dtype == np.uint8 and channels in MODES:
        found = cut.apply(Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels), resample)
        return found.reshape(*cut.size, channels)
    layers = [
        cut.apply(Image.fromarray(layer.astype(np.float32)), resample) for layer in pixels.transpose(2, 0, 1)
    ]
    return np.stack(layers, axis=-1)


def scaled(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Pixels [H, W, C] of a range as float32 [C, H, W] in [-1, 1]; what resizing overshoots is clipped."""
    found = (pixels.astype(np.float32) - low) / ((high - low) / 2) - 1
    return np.ascontiguousarray(found.transpose(2, 0, 1), dtype=np.float32).clip(-1, 1)


def restored(values: np.ndarray, low: float, high: float, dtype: str) -> np.ndarray:
    """The inverse of `scaled`, and of other values in [-1, 1]."""
    found = (values.astype(np.float64).clip(-1, 1) + 1) * ((high - low) / 2) + low
    return (found if dtype.startswith("float") else found.round()).astype(dtype)


# -------------------------------------------------------------------------------------------------------------- maps


def as_palette(about: "Mapping | str | Palette") -> Palette:
    """A palette by name, by file, or as a configuration keeps it (`palette_mapping`)."""
    if isinstance(about, Palette):
        return about
    if not isinstance(about, Mapping):
        return load_palette(str(about))
    try:
        colors = [
            np.array(about.get(key) or [], np.uint8).reshape(-1, 3)
            for key in ("colors", "void", "exact_void")
        ]
        classes, ids = tuple(map(str, about["classes"])), tuple(about.get("ids") or ())
        if len(classes) != len(colors[0]) or not classes:
            raise ValueError("it needs as many colors as classes")
        return Palette(str(about.get("name", "own")), classes, *colors, ids)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise UserValueError(f"a palette is a name, a file, or classes and colors: {error}") from None


def palette_mapping(palette: Palette) -> dict:
    """The palette as plain values, which a checkpoint keeps."""
    return dict(
        name=palette.name,
        classes=list(palette.classes),
        colors=palette.colors.tolist(),
        void=palette.void_colors.tolist(),
        exact_void=palette.exact_void_colors.tolist(),
        ids=list(palette.ids),
    )


def even_colors(classes: int) -> np.ndarray:
    """Colours for classes that have none: hues at even distances, light and dark in turn; uint8 [classes, 3]."""
    rows = [colorsys.hsv_to_rgb(k / classes, 1.0, (1.0, 0.6)[k % 2]) for k in range(classes)]
    return np.round(np.array(rows) * 255).astype(np.uint8)


def numbers_of(cell: Cell, classes: int, palette: Palette | None) -> np.ndarray:
    """The class numbers of a label map, int64 [H, W], VOID where a pixel has none, of a map of numbers or, with a
    palette, of its colours. UserError for a number or colour that is no class."""
    if cell.is_array:
        found = cell.array()
        found = found[..., 0] if found.ndim == 3 and found.shape[2] == 1 else found
    else:
        image = cell.image()
        found = np.asarray(image if image.mode in NUMBERS else image.convert("RGB"))
    colours = found.ndim == 3
    if found.dtype.kind not in "iu" or found.ndim not in (2, 3) or (colours and found.shape[2] != 3):
        raise cell.refuse(
            f"a map must hold class numbers [H, W] or colours, not {found.dtype} {list(found.shape)}"
        )
    if palette is None:
        if colours:
            raise cell.refuse("it holds colours: name their palette, as in palette: camvid")
        return _plain_numbers(found.astype(np.int64), classes, cell)
    try:
        found = to_indices(palette.check_colors(found) if colours else found, palette)
    except UserValueError as error:
        raise cell.refuse(error) from None
    return np.where(found >= classes, VOID, found).astype(np.int64)


def _plain_numbers(found, classes, cell):
    found = np.where(found == 255, VOID, found) if classes <= 255 else found
    wrong = found[(found < VOID) | (found >= classes)]
    if wrong.size:
        raise cell.refuse(f"class {wrong.flat[0]} is not one of 0..{classes - 1} (and 255: void)")
    return found


# ------------------------------------------------------------------------------------------------------------ labels


def label_of(cell: Cell, class_names: Sequence[str], classes: int) -> int:
    """The number of a class that is stored as a name or a number; -1 stays. UserValueError for another."""
    content = cell.content
    if isinstance(content, Path):
        content = content.read_bytes()
    if isinstance(content, bytes):
        content = content.decode("utf-8", "replace").strip()
    if isinstance(content, np.ndarray) and content.ndim == 0:
        content = content[()]
    if isinstance(content, float | np.floating) and float(content).is_integer():
        content = int(content)
    text = str(content).strip()
    if text == "-1":
        return -1
    if isinstance(content, int | np.integer) and not isinstance(content, bool) and 0 <= content < classes:
        return int(content)
    try:
        return class_number(text, class_names, classes)
    except UserValueError as error:
        raise cell.refuse(error) from None


# ----------------------------------------------------------------------------------------- what a flag gives as values


def given_cells(source: str, name: str) -> Iterator[Cell]:
    """The values of one modality in a file, a folder of files (by name), or an .npz or .npy with an array [N, ...]
    under its name or arr_0. UserError where there are none."""
    path = Path(source)
    if not path.exists():
        raise UserFileError(f"no such file or folder: {source}")
    if path.suffix in (".npz", ".npy"):
        with open_arrays(path) as arrays:
            key = next((key for key in (name, "arr_0") if key in arrays), None)
            if key is None:
                raise UserValueError(f"{source} has none of the arrays {name}, arr_0")
            array = arrays[key]
        for k, row in enumerate(array):
            yield Cell(row, f"{source} row {k} of {key}")
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        if not files:
            raise UserFileError(f"{source} has no files")
        yield from (Cell(file, str(file)) for file in files)
    else:
        yield Cell(path, str(path))
