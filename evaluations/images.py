"""Sets of images, read in pieces: an .npz file as ADM's samplers write it, a folder, or an array in memory."""

import contextlib
import queue
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Protocol, TypeVar

import numpy as np

from guided_diffusion import image_files
from guided_diffusion.errors import UserError, UserValueError

DECODERS = 8  # threads; Pillow releases the interpreter's lock while it decodes
AHEAD = 4  # batches that are read while the network works
T = TypeVar("T")


class Images(Protocol):
    """N images of one size, uint8 RGB."""

    name: str  # for messages and reports
    shape: tuple[int, int, int, int]  # N, height, width, 3

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        """The images `start` to `stop`, in order, [at most size, H, W, 3] at a time."""
        ...


class ArrayImages:
    """Images in memory: uint8 [N, H, W, 3]."""

    def __init__(self, array: np.ndarray, name: str = "array"):
        check_array(array.shape, array.dtype, name, lambda: [array])
        self.array, self.name, self.shape = array, name, array.shape

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        for first in range(start, stop, size):
            yield self.array[first : min(first + size, stop)]


class NpzImages:
    """Images under `key` in an .npz file, read from the file piece by piece. grey: also [N, H, W, 1], as RGB."""

    def __init__(self, path: str | Path, key: str = "arr_0", grey: bool = False):
        self.path, self.key, self.name = Path(path), key, f"{key} of {path}"
        keys = npz_keys(path)
        if key not in keys:
            raise UserValueError(
                f"{path} has no array {key} (it holds {', '.join(sorted(keys)) or 'nothing'})"
            )
        with self._member() as member:
            self._stored, self._fortran, self._dtype = _read_header(member, self.name)
        is_grey = grey and self._stored[3:] == (1,)
        self.shape = (*self._stored[:3], 3) if is_grey else self._stored
        check_array(self.shape, self._dtype, self.name, lambda: self._rows(0, self.shape[0], 256))

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        for rows in self._rows(start, stop, size):
            yield np.broadcast_to(rows, (len(rows), *self.shape[1:]))

    @contextlib.contextmanager
    def _member(self) -> Iterator[IO[bytes]]:
        """The array's bytes, open. UserError for what cannot be read of them (a bad checksum too)."""
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.key}.npy") as member:
                yield member
        except UserError:
            raise
        except image_files.UNREADABLE_ARRAYS as error:
            raise UserValueError(f"{self.name} cannot be read: {error}") from error

    def _rows(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        if self._fortran:  # its rows are not consecutive in the file
            array = load_array(self.path, self.key)
            yield from (array[first : min(first + size, stop)] for first in range(start, stop, size))
            return
        row = int(np.prod(self._stored[1:])) * self._dtype.itemsize
        with self._member() as member:
            _read_header(member, self.name)
            member.seek(start * row, 1)
            for first in range(start, stop, size):
                count = min(size, stop - first)
                data = member.read(count * row)
                if len(data) < count * row:
                    raise UserValueError(f"{self.name} ends early: the file is incomplete, write it again")
                yield np.frombuffer(data, self._dtype).reshape(count, *self._stored[1:])


class FolderImages:
    """Image files, decoded by several threads. Grey and palette images become RGB, as ADM's data loader does it.

    `size` crops and scales to a square as ADM's training does; without it all images must be of one size.
    """

    def __init__(self, files: list[Path], name: str, size: int | None = None):
        self.files, self.name, self.size = files, name, size
        height, width = self._decode(files[0]).shape[:2]
        self.shape = (len(files), height, width, 3)

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(DECODERS) as pool:
            for first in range(start, stop, size):
                images = list(pool.map(self._decode, self.files[first : min(first + size, stop)]))
                for file, image in zip(self.files[first:stop], images, strict=False):
                    if image.shape != self.shape[1:]:
                        raise UserValueError(
                            f"{file} is {_pixels(image.shape)}, others are {_pixels(self.shape[1:])}: "
                            f"scale them to one size (make_reference.py: --image_size)"
                        )
                yield np.stack(images)

    def _decode(self, file: Path) -> np.ndarray:
        return decode_image(file, self.size)


def open_images(path: str | Path, size: int | None = None) -> Images:
    """Images from an .npz file (arr_0) or a folder. Raises UserError for anything else."""
    path = Path(path).expanduser()
    if path.is_dir():
        return FolderImages(list_images(path), str(path), size)
    return NpzImages(path)


def list_images(folder: str | Path) -> list[Path]:
    """All image files below a folder, sorted by path. UserError where there is none."""
    return [Path(file) for file in image_files.list_images(Path(folder).expanduser())]


def npz_keys(path: str | Path) -> set[str]:
    """Names of the arrays in an .npz file."""
    with image_files.open_arrays(path) as arrays:
        return set(arrays)


def load_array(path: str | Path, key: str) -> np.ndarray:
    """One array of an .npz file. Raises UserError where it is missing, damaged or not numeric."""
    with image_files.open_arrays(path) as arrays:
        if key not in arrays:
            raise UserValueError(
                f"{path} has no array {key} (it holds {', '.join(sorted(arrays)) or 'nothing'})"
            )
        return arrays[key]


def class_names(path: str | Path) -> list[str] | None:
    """The names of the classes that an .npz file brings for its labels, None where it has none."""
    with image_files.open_arrays(path) as arrays:
        return image_files.stored_class_names(arrays, path)


def check_array(shape: tuple, dtype: np.dtype, name: str, pieces: Callable[[], Iterable[np.ndarray]]) -> None:
    """Raise UserError unless an array holds uint8 RGB images [N, H, W, 3], N >= 1.

    `pieces` yields the data; only read to say more about an array that is not acceptable anyway.
    """
    if dtype != np.uint8:
        extra = ""
        if np.issubdtype(dtype, np.floating):
            broken = sum(int((~np.isfinite(piece)).sum()) for piece in pieces())
            extra = f" and {broken} of its values are NaN or infinite" if broken else ""
            extra += "; from [-1, 1] convert with ((x + 1) * 127.5).clip(0, 255).astype('uint8')"
        raise UserValueError(f"{name} is {dtype}, images must be uint8 0 to 255{extra}")
    if len(shape) == 3 or (len(shape) == 4 and shape[-1] == 1):
        raise UserValueError(
            f"{name} holds grey images {list(shape)}: repeat the channel to get [N, H, W, 3]"
        )
    if len(shape) != 4 or shape[-1] != 3:
        hint = ": move the channels last" if len(shape) == 4 and shape[1] == 3 else ""
        raise UserValueError(f"{name} has shape {list(shape)}, expected [N, H, W, 3]{hint}")
    if 0 in shape:
        raise UserValueError(f"{name} is empty: its shape is {list(shape)}")


def decode_image(file: Path, size: int | None = None) -> np.ndarray:
    """One image file as uint8 RGB [H, W, 3], cropped as ADM's training does to `size` pixels if that is given."""
    image = image_files.read_pixels(file)
    return image_files.center_crop_arr(image, size) if size else np.asarray(image)


def prefetch(items: Iterable[T], ahead: int = AHEAD) -> Iterator[T]:
    """The same items, produced by a thread while the caller works on earlier ones. Errors come through."""
    waiting: queue.Queue = queue.Queue(ahead)
    abandoned = threading.Event()

    def put(entry: tuple[T | None, BaseException | None, bool]) -> bool:
        while not abandoned.is_set():
            try:
                waiting.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put((item, None, False)):
                    return
            put((None, None, True))
        except BaseException as error:  # noqa: BLE001 - raised again where the items are used
            put((None, error, True))

    threading.Thread(target=produce, daemon=True).start()
    try:
        while True:
            item, error, last = waiting.get()
            if error:
                raise error
            if last:
                return
            yield item
    finally:
        abandoned.set()


def _read_header(member, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of the array that starts here."""
    try:
        version = np.lib.format.read_magic(member)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        return read(member)
    except ValueError as error:
        raise UserValueError(f"{name} is not a NumPy array ({error})") from error


def _pixels(shape: tuple) -> str:
    return f"{shape[1]}x{shape[0]}"
