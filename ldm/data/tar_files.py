"""The samples of one tar file, read from its start to its end."""

import contextlib
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys, tar_file_expander

from guided_diffusion.errors import UserError

# What tarfile, its decompressors, and webdataset (a file that stands twice, an unknown protocol) raise.
_UNREADABLE = (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, lzma.LZMAError)


class Sample(NamedTuple):
    """The files of a shard that share a key."""

    name: str  # SHARD/KEY
    files: dict[str, bytes]  # by their ending in small letters, without the dot


def read_shard(address: str) -> Iterator[Sample]:
    """The samples of the tar file at a path, http(s)://..., or pipe:COMMAND, which may be compressed.

    A shard without samples gives one without files. UserError, which names the shard, where it cannot be
    read to its end: what a resumed run sees must not depend on how far a transfer went.
    """
    empty = True
    try:
        with _opened(address) as stream:
            for found in group_by_keys(tar_file_expander([{"url": address, "stream": stream}])):
                empty = False
                files = {ending: data for ending, data in found.items() if not ending.startswith("__")}
                yield Sample(f"{address}/{found['__key__']}", files)
    except _UNREADABLE as error:
        raise UserError(f"the shard {address} cannot be read: {_reason(error)}") from error
    if empty:
        yield Sample(f"{address}/*", {})


class _Whole:
    """A stream that must not end: tarfile stops by itself at the mark with which an archive ends, and takes
    a file that ends before it for complete."""

    def __init__(self, stream):
        self.stream = stream

    def read(self, size: int) -> bytes:
        """Up to `size` bytes. tarfile.ReadError at the stream's end; OSError if it is a failed command's."""
        content = self.stream.read(size)
        if not content:
            self.stream.close()
            raise tarfile.ReadError("it ends before the end of the archive")
        return content


@contextlib.contextmanager
def _opened(address: str) -> Iterator[_Whole]:
    stream = gopen(address)
    try:
        yield _Whole(stream)
    finally:
        with contextlib.suppress(OSError):  # of a command that was not read to its end
            stream.close()


def _reason(error: BaseException) -> str:
    """The message of an error to which webdataset has added its own remarks."""
    said = getattr(error, "strerror", None) or next(iter(error.args), type(error).__name__)
    return " ".join(str(said).split(" @ ")[0].split())
