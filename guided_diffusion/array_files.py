"""Arrays on disk that need not fit into memory: .npz files mapped, and written row by row."""

import mmap
import os
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from .checkpoint_util import replacing

_LOCAL_HEADER = struct.Struct(
    "<4s22xHH"
)  # of a zip member: its signature, the lengths of its name and its extra field


@dataclass(frozen=True)
class Rows:
    """An array [len, ...] of which one row, or a few, are made at a time: `rows` gives arrays of `shape`[1:]."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Iterable[np.ndarray]


def write_npz(path: str | os.PathLike, arrays: Mapping[str, np.ndarray | Rows]) -> None:
    """The file that np.savez makes of `arrays`, bit for bit, completely or not at all. UserError where the disk is full."""

    def size():
        return sum(int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize for a in arrays.values())

    with (
        replacing(os.fspath(path), size) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
    ):
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                _write(member, array)


def _write(member, array):
    if not isinstance(array, Rows):
        np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
        return
    descr = np.lib.format.dtype_to_descr(np.dtype(array.dtype))
    header = {"descr": descr, "fortran_order": False, "shape": tuple(array.shape)}
    np.lib.format.write_array_header_1_0(member, header)
    for row in array.rows:
        member.write(np.ascontiguousarray(row, dtype=array.dtype).data)


def mapped_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a local .npz by name: views of the file (see `mapped_member`), or read where that is impossible."""
    with np.load(path, allow_pickle=False) as arrays:
        found = {name: mapped_member(path, name) for name in arrays.files}
        return {name: arrays[name] if view is None else view for name, view in found.items()}


def mapped_member(path: str | os.PathLike, name: str, check: bool = False) -> np.ndarray | None:
    """The array `name` of a local .npz as a view of the file, of which only what is used is read; None where that is
    impossible: it is compressed, of Fortran order, or holds objects. check: read it once for its checksum, which nobody
    looks at later; zipfile.BadZipFile where that is another. KeyError where the array is not there."""
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        member = archive.getinfo(f"{name}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            return None
        if check:
            with archive.open(member) as content:
                while content.read(1 << 22):
                    pass
        file.seek(member.header_offset)
        signature, *lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        if signature != b"PK\x03\x04":
            raise zipfile.BadZipFile(f"{name}.npy has no header where the directory says")
        file.seek(sum(lengths), os.SEEK_CUR)
        shape, fortran, dtype = _header(file)
        if fortran or dtype.hasobject:
            return None
        return _map(file, dtype, shape)


def _header(file):
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _map(file: BinaryIO, dtype, shape) -> np.ndarray:
    count, offset = int(np.prod(shape)), file.tell()
    if not count:
        return np.zeros(shape, dtype)
    if offset + count * dtype.itemsize > os.fstat(file.fileno()).st_size:
        raise ValueError("it is truncated")
    whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(whole, dtype, count, offset).reshape(shape)
