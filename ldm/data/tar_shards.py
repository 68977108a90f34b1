"""LAION-like data: captioned images in tar files, read as a stream that continues exactly where it stopped.

A shard is a tar file in webdataset's layout: KEY.jpg, KEY.txt and whatever else belongs to a sample stand one
after the other. The stream goes over the shards again and again, each pass in its own order. Several readers
share it: lane k of n reads the k-th, (k+n)-th, ... shard of every pass. What a lane delivers depends on
(seed, lane, lanes) alone.
"""

import functools
import glob
import hashlib
import io
import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset
from webdataset.shardlists import expand_urls

from guided_diffusion.checkpoint_util import seed_everything
from guided_diffusion.errors import UserError, UserFileError, UserValueError
from guided_diffusion.image_datasets import MAX_BAD
from guided_diffusion.image_files import BadImageError, draw_cut, opened, to_channels, upright
from guided_diffusion.seeding import derive_seed
from ldm.data.base import Item, parse_size
from ldm.data.images import INTERPOLATIONS
from ldm.data.tar_files import Sample, read_shard

FORMATS = ("jpg", "jpeg", "png", "webp")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")  # pipe:COMMAND, http://..., not a path
_PIPE = re.compile(r"pipe:", re.IGNORECASE)
_PATIENCE = 10_000  # samples in a row without a usable one, before the stream gives up
_BLOCK, _SAMPLE = 0, 1  # what a seed is for

_logger = logging.getLogger(__name__)


class Position(NamedTuple):
    """How far a lane has come."""

    passes: int = 0  # over all shards, that are finished
    turn: int = 0  # number of the present shard among the lane's in this pass
    taken: int = 0  # samples of it, in their shuffled order, the skipped ones too
    broken: int = 0  # samples skipped since the stream began, because they cannot be used
    small: int = 0  # and because their images are smaller than min_size


class BrokenSampleError(UserError):
    """A sample that cannot be used; the message names it and says why."""


class TarShards(IterableDataset):
    """Items {image_key: float32 [H, W, 3] in [-1, 1], caption_key: str, "file_path_": "SHARD/KEY"}.

    Training goes through ldm.training.shard_data.ShardDataModule; iterating gives the first
    `samples_per_epoch` items. The order of the shards is drawn for every pass, and within a shard samples are
    shuffled in blocks. Crops and flips are drawn for (seed, pass, shard, sample).
    UserError for shards that are not there or are cut off, and for more broken samples than `max_bad`: an
    undecodable image, no image, no caption or an empty one.
    """

    def __init__(
        self,
        shards: str | Sequence[str],  # paths, folders of *.tar, globs, http://, pipe:COMMAND; with {0..9}
        size: int | Sequence[int],  # of a square, or (height, width)
        samples_per_epoch: int,  # of all processes together
        image_key: str = "jpg",  # its item's key; in the shard any of FORMATS may stand instead
        caption_key: str = "txt",
        random_crop: bool = False,  # 0.8 to all of the image, else the whole middle
        random_flip: bool = False,  # left-right, half of the time
        interpolation: str = "bicubic",
        shuffle: int = 1000,  # samples of a block, which memory holds undecoded; 0: leave as they are
        min_size: int = 0,  # pixels; images with a shorter side below it are left out
        max_bad: int = MAX_BAD,  # broken samples of one process
        allow_pipes: bool = False,  # run the commands of pipe:COMMAND
    ):
        super().__init__()
        if interpolation not in INTERPOLATIONS:
            raise UserValueError(
                f"interpolation must be one of {', '.join(INTERPOLATIONS)}, not {interpolation!r}"
            )
        _check_number("samples_per_epoch", samples_per_epoch, least=1)
        for name, value in {"shuffle": shuffle, "min_size": min_size, "max_bad": max_bad}.items():
            _check_number(name, value, least=0)
        self.shards = list_shards(shards, allow_pipes)
        self.size = parse_size(size)
        self.samples_per_epoch = samples_per_epoch
        self.image_key, self.caption_key = image_key, caption_key
        self.random_crop, self.random_flip = random_crop, random_flip
        self.interpolation = interpolation
        self.shuffle, self.min_size, self.max_bad = shuffle, min_size, max_bad

    def __len__(self) -> int:
        return self.samples_per_epoch

    def __iter__(self) -> Iterator[Item]:
        return (item for item, _ in itertools.islice(self.stream(seed=0), len(self)))

    @property
    def checksum(self) -> str:
        """Eight digits that tell one list of shards from another."""
        return _checksum(self.shards)

    @functools.cached_property
    def sizes(self) -> str:
        """Eight digits that change with the size of a shard on this machine."""
        paths = [Path(shard.removeprefix("file:")) for shard in self.shards]
        return _checksum(str(path.stat().st_size if path.is_file() else None) for path in paths)

    def order(self, seed: int, passes: int) -> list[int]:
        """The numbers of the shards in the order of the pass that follows `passes` others."""
        generator = torch.Generator().manual_seed(derive_seed(seed, passes))
        return torch.randperm(len(self.shards), generator=generator).tolist()

    def stream(
        self, seed: int, lane: int = 0, lanes: int = 1, start: Position | None = None
    ) -> Iterator[tuple[Item, Position]]:
        """(item, the position after it) of a lane without end, from `start` or the beginning on.

        The random generators of this process are seeded for every sample.
        """
        start = start or Position()
        broken, small, in_vain = start.broken, start.small, 0
        for place, shard, index, sample in self._walk(seed, lane, lanes, start):
            seed_everything(derive_seed(seed, _SAMPLE, place.passes, shard, index))
            try:
                item = self._item(sample)
                small += item is None
            except BrokenSampleError as error:
                item, broken = None, broken + 1
                self.check_broken(broken, f", the last of them {error}")
                _logger.warning("skipped a broken sample: %s", error)
            in_vain = in_vain + 1 if item is None else 0
            if item is not None:
                yield item, place._replace(broken=broken, small=small)
            elif in_vain == _PATIENCE:
                raise UserError(
                    f"{in_vain} samples in a row cannot be used, the last of them in {self.shards[shard]}: "
                    f"they are broken, or smaller than min_size={self.min_size}"
                )

    def check_broken(self, count: int, which: str = "") -> None:
        """UserError if `count` broken samples are too many; `which` goes on with its message."""
        if count > self.max_bad:
            raise UserError(f"{count} samples are broken, more than max_bad={self.max_bad}{which}")

    def _walk(
        self, seed: int, lane: int, lanes: int, start: Position
    ) -> Iterator[tuple[Position, int, int, Sample]]:
        """(position after it without its counts, number of the shard, number in the shard, sample)."""
        passes, turn, taken = start.passes, start.turn, start.taken
        while True:
            for shard in self.order(seed, passes)[lane::lanes][turn:]:
                for index, sample in self._shuffled(seed, passes, shard, taken):
                    taken += 1
                    yield Position(passes, turn, taken), shard, index, sample
                turn, taken = turn + 1, 0
            passes, turn = passes + 1, 0

    def _shuffled(self, seed: int, passes: int, shard: int, skip: int) -> Iterator[tuple[int, Sample]]:
        """(number in the shard, sample) in the order of the pass, without the first `skip`."""
        size = max(1, self.shuffle)
        first, within = divmod(skip, size)
        samples = itertools.islice(enumerate(read_shard(self.shards[shard])), first * size, None)
        for block in itertools.count(first):
            some = list(itertools.islice(samples, size))
            if not some:
                return
            generator = torch.Generator().manual_seed(derive_seed(seed, _BLOCK, passes, shard, block))
            for k in torch.randperm(len(some), generator=generator).tolist()[within:]:
                yield some[k]
            within = 0

    def _item(self, sample: Sample) -> Item | None:
        """The item of a sample; None for too small an image. BrokenSampleError where it cannot be used."""
        content = next((sample.files[k] for k in (self.image_key, *FORMATS) if k in sample.files), None)
        if content is None:
            raise BrokenSampleError(f"{sample.name} has no image ({', '.join(FORMATS)})")
        caption = self._caption(sample)
        image = _decoded(content, sample.name, self.min_size)
        if image is None:
            return None
        cut = draw_cut(image.size, self.size, self.random_crop, self.random_flip)
        pixels = np.ascontiguousarray(cut.apply(image, INTERPOLATIONS[self.interpolation]))
        pil = pixels.astype(np.float32) / 127.5 - 1
        return {self.image_key: pil, self.caption_key: caption, "file_path_": sample.name}

    def _caption(self, sample: Sample) -> str:
        try:
            caption = sample.files.get(self.caption_key, b"").decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            why = f"its caption is not text in UTF-8: {error.reason} at byte {error.start}"
            raise BrokenSampleError(f"{sample.name}: {why}") from None
        if not caption:
            raise BrokenSampleError(f"{sample.name} has no caption ({self.caption_key})")
        return caption


def _checksum(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]


def list_shards(shards: str | Sequence[str], allow_pipes: bool = False) -> list[str]:
    """The paths and addresses that `shards` means, as TarShards takes it. UserError where there are none, and for
    commands unless they are allowed."""
    entries = [shards] if isinstance(shards, str) else shards
    if not isinstance(entries, Sequence) or not all(isinstance(entry, str) for entry in entries):
        raise UserValueError(f"shards must be a path or an address, or a list of such, not {shards!r}")
    found = [shard for entry in entries for shard in _expanded(entry)]
    if not found:
        raise UserFileError("there are no shards: the list is empty")
    if not allow_pipes and (pipes := [shard for shard in found if _PIPE.match(shard)]):
        raise UserValueError(
            f"the shard {pipes[0]} is a command to be run: if you trust it, set allow_pipes: true"
        )
    if len(set(found)) < len(found):
        twice = next(shard for k, shard in enumerate(found) if shard in found[:k])
        raise UserValueError(f"the shard {twice} is named twice")
    return found


def _check_number(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise UserValueError(f"{name} must be a whole number from {least} on, not {value!r}")


def _expanded(entry: str) -> list[str]:
    try:
        addresses = expand_urls(entry)
    except ValueError as error:
        raise UserValueError(f"the braces in {entry!r} cannot be expanded: {error}") from None
    found: list[str] = []
    for address in addresses:
        if _ADDRESS.match(address) or Path(address).is_file():
            found.append(address)
            continue
        pattern = str(Path(glob.escape(address)) / "*.tar") if Path(address).is_dir() else address
        paths = sorted(glob.glob(pattern))
        if not paths:
            raise UserFileError(f"there are no shards {pattern}")
        found += paths
    return found


def _decoded(content: bytes, name: str, min_size: int) -> Image.Image | None:
    """The image in RGB; None, from its head alone, where its shorter side is below `min_size`."""
    try:
        with opened(io.BytesIO(content), name) as image:
            return None if min(image.size) < min_size else to_channels(upright(image, name), 3)
    except BadImageError as error:
        raise BrokenSampleError(str(error)) from error
