"""Samples on disk while they are made: every rank writes its batches as shards, which rank 0 joins into one .npz.

So no rank ever holds all of them, and a command that was interrupted goes on: the same command finds its shards.
"""

import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from . import dist_util, logger
from .array_files import Rows, mapped_member, mapped_npz, write_npz
from .errors import UserError

FOLDER, _NOTE = "shards", "about.json"
_NUMBERS, _TORCH, _CUDA = "@numbers", "@torch", "@cuda"  # no names of arrays: those are words
_OPEN = 64  # shards that are mapped at a time while they are joined


def _text(about: Mapping[str, Any]) -> str:
    return json.dumps(about, sort_keys=True, default=str)


class Shards:
    """The samples of one command in `folder`/shards; made on every rank.

    about: plain values on which the samples depend. Shards of a command with others are removed, which is logged.
    """

    def __init__(self, folder: str | os.PathLike, about: Mapping[str, Any]):
        self.folder = Path(dist_util.from_rank_zero(lambda: str(folder))) / FOLDER
        if dist_util.get_rank() == 0:
            self._begin(_text(about))
        dist_util.barrier()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._places = self._scan()
        if self._places:
            logger.log(f"{len(self._places)} samples are in {self.folder}: going on")

    @staticmethod
    def unfinished(parent: Path, about: Mapping[str, Any]) -> Path | None:
        """The folder in `parent`, the newest, where a command like this was interrupted."""
        notes = sorted(parent.glob(f"*/{FOLDER}/{_NOTE}"), key=os.path.getmtime)
        return next((n.parent.parent for n in reversed(notes) if n.read_text() == _text(about)), None)

    def _begin(self, text):
        note = self.folder / _NOTE
        if self.folder.exists() and (not note.exists() or note.read_text() != text):
            logger.log(f"{self.folder} holds samples of another command, which are removed")
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for stray in self.folder.glob("*.tmp"):
            stray.unlink()
        note.write_text(text)

    def _scan(self) -> dict[int, tuple[Path, int]]:
        places = {}
        for path in sorted(self.folder.glob("*.npz")):
            try:
                with np.load(path) as shard:
                    numbers = shard[_NUMBERS].tolist()
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                continue  # torn by a power cut: as if it had not been written
            places.update((number, (path, row)) for row, number in enumerate(numbers))
        return places

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Those of `numbers` that are not there yet."""
        return [number for number in numbers if number not in self._places]

    def add(
        self, numbers: Sequence[int], arrays: Mapping[str, np.ndarray], random_state: bool = False
    ) -> None:
        """Write the samples with these numbers, arrays [b, ...] by name. random_state: with the state of torch's
        generators, for `restore`."""
        own = {_NUMBERS: np.array(numbers, dtype=np.int64)}
        if random_state:
            own[_TORCH] = th.get_rng_state().numpy()
            if th.cuda.is_available():
                own[_CUDA] = th.cuda.get_rng_state(dist_util.dev()).numpy()
        path = self.folder / f"{numbers[0]:09}.npz"
        write_npz(path, {**arrays, **own})
        self._places.update((number, (path, row)) for row, number in enumerate(numbers))

    def restore(self, number: int) -> None:
        """Set torch's generators to where they were after the sample `number` had been written."""
        with np.load(self._places[number][0]) as shard:
            th.set_rng_state(th.from_numpy(shard[_TORCH]))
            if _CUDA in shard and th.cuda.is_available():
                th.cuda.set_rng_state(th.from_numpy(shard[_CUDA]), dist_util.dev())

    def join(
        self,
        count: int,
        path: Callable[[tuple[int, ...]], str | os.PathLike] | None = None,
        more: Mapping[str, np.ndarray | Rows] | None = None,
    ) -> dict[str, np.ndarray]:
        """On rank 0, once all ranks are here: samples 0 to `count` - 1 of all ranks, by name, row by row.

        path: (shape of arr_0) -> the .npz to write, with `more` arrays in it; returned are views of it. Without one the
        arrays, which are small then. UserError where shards are missing. `remove` is to follow.
        """
        dist_util.barrier()
        if dist_util.get_rank():
            return {}
        self._places = self._scan()
        if lacking := self.missing(range(count)):
            raise UserError(
                f"{len(lacking)} of {count} samples are not in {self.folder}: all ranks must write to one folder"
            )
        with np.load(self._places[0][0]) as shard:
            forms = {name: (shard[name].shape, shard[name].dtype) for name in shard if "@" not in name}
        arrays = {
            name: Rows((count, *shape[1:]), dtype, self.rows(name, count))
            for name, (shape, dtype) in forms.items()
        }
        if path is None:
            return {name: np.stack(list(array.rows)) for name, array in arrays.items()}
        target = path(arrays["arr_0"].shape)
        logger.log(f"saving to {target}")
        write_npz(target, {**arrays, **(more or {})})
        return mapped_npz(target)

    def names(self) -> list[str]:
        """Of the arrays in the shard of sample 0."""
        with np.load(self._places[0][0]) as shard:
            return shard.files

    def rows(self, name: str, count: int) -> Iterator[np.ndarray]:
        """The array `name` of samples 0 to `count` - 1, one after the other."""
        opened = lru_cache(_OPEN)(lambda path: mapped_member(path, name))
        for number in range(count):
            path, row = self._places[number]
            yield opened(path)[row]

    def remove(self) -> None:
        """Delete the shards, when what was made of them stands; called on every rank."""
        if dist_util.get_rank() == 0:
            shutil.rmtree(self.folder)
        dist_util.barrier()


def fingerprint(values: th.nn.Module | Mapping[str, Any]) -> str:
    """A checksum of a network's weights, or of tensors by name: tells whether samples were made from the same."""
    total = 0
    for name, value in (values.state_dict() if isinstance(values, th.nn.Module) else values).items():
        total = zlib.crc32(name.encode(), total)
        if isinstance(value, th.Tensor):
            value = value.detach().cpu().contiguous().reshape(-1).view(th.uint8).numpy()
        total = zlib.crc32(value if isinstance(value, np.ndarray) else repr(value).encode(), total)
    return f"{total:08x}"
