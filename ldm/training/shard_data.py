"""Training on tar shards: batches from lanes, and a position that a resumed run continues exactly.

Every data worker of every process reads one lane of the stream (ldm/data/tar_shards.py). Torch takes the
workers in turn: batch k of an epoch comes from lane k mod lanes of its process. Each batch brings its lane's
position along, so that a checkpoint holds the positions of the batches that were trained on, not of those
that were read ahead.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, default_collate

from guided_diffusion import dist_util
from guided_diffusion.errors import UserError, UserValueError
from guided_diffusion.seeding import derive_seed
from ldm.data.tar_shards import Position, TarShards
from ldm.training.data import SPLITS, DataModuleFromConfig, EpochSampler

POSITION = "stream_position_"  # of a batch, until the data module takes it out: (lane, Position)
_logger = logging.getLogger(__name__)


class Request(NamedTuple):
    """What a data worker is asked for: the next batch of a lane."""

    lane: int  # among those of this process
    start: Position | None  # where the lane stands; None: after the worker's last batch


class LaneSampler(EpochSampler):
    """The requests for one epoch after the other, from any batch on.

    batches: of an epoch, per process; positions: where the lanes stand whenever the sampler is iterated.
    """

    def __init__(self, batches: int, positions: list[Position]):
        super().__init__(batches, batch_size=1, seed=0, shuffle=False)
        self.positions = positions

    def __len__(self) -> int:
        """Batches of a whole epoch in this process."""
        return self.size

    def __iter__(self) -> Iterator[Request]:
        lanes, starts = len(self.positions), dict(enumerate(self.positions))
        return (Request(k % lanes, starts.pop(k % lanes, None)) for k in range(self._done, self.size))


class LaneBatches(Dataset):
    """Answers requests with batches; a worker keeps its lane open between them.

    lanes: of one process; report: batches bring their position along, under POSITION.
    """

    def __init__(self, shards: TarShards, batch_size: int, seed: int, lanes: int, report: bool):
        self.shards, self.batch_size, self.seed, self.report = shards, batch_size, seed, report
        self.first, self.lanes = dist_util.get_rank() * lanes, dist_util.get_world_size() * lanes
        self._here: tuple[int, Position] | None = None  # after the last batch

    def __getitem__(self, request: Request) -> dict:
        lane, start = request
        if start is not None and (lane, start) != self._here:
            self._stream = self.shards.stream(self.seed, self.first + lane, self.lanes, start)
        items = []
        for _ in range(self.batch_size):
            item, position = next(self._stream)
            items.append(item)
        self._here = (lane, position)
        batch = default_collate(items)
        return {**batch, POSITION: self._here} if self.report else batch


class ShardDataModule(DataModuleFromConfig):
    """DataModuleFromConfig for data of which some, or all, are TarShards.

    Every process gets ceil(samples_per_epoch / (processes x batch_size)) whole batches per epoch, so that
    none waits for another that has run out; the next epoch goes on where the last one stopped. Validation,
    test and prediction see the stream's beginning every time. No process has more data workers than shards:
    they would have nothing to read. `shuffle_*` concern other datasets only.
    `UserError` for fewer shards than processes, and for a checkpoint that stopped in the middle of an epoch
    of other shards, processes, data workers, or batches. At an epoch's end they may change: then a new pass
    begins.
    """

    _positions: list[Position]  # of this process's lanes, after the batches that were trained on
    _resume_lanes: list[Position] | None = None

    def state_dict(self) -> dict:
        """As DataModuleFromConfig's; for TarShards with `lanes`, the positions by process and lane. Every
        process takes part."""
        state = super().state_dict()
        if state and self._streams():
            state["lanes"] = _from_all([tuple(position) for position in self._positions])
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue from `state_dict()`."""
        super().load_state_dict(state_dict)
        if not self._streams() or not state_dict.get("lanes"):
            return
        lanes = [[Position(*position) for position in lane] for lane in state_dict["lanes"]]
        now = self._layout()
        if all(state_dict.get(key, value) == value for key, value in now.items()):
            self._resume_lanes = lanes[dist_util.get_rank()]
            return
        _logger.info("the shards or those who read them have changed: a new pass over the shards begins")
        flat = [position for rank in lanes for position in rank]
        self._resume_lanes = [Position(1 + max(position.passes for position in flat))] * now["data workers"]
        if dist_util.get_rank() == 0:
            broken, small = (sum(getattr(p, kind) for p in flat) for kind in ("broken", "small"))
            self._resume_lanes[0] = self._resume_lanes[0]._replace(broken=broken, small=small)

    def on_before_batch_transfer(self, batch, dataloader_idx: int):
        """Note a training batch's position and take it out."""
        if not isinstance(batch, Mapping) or POSITION not in batch:
            return batch
        batch = dict(batch)
        lane, self._positions[lane] = batch.pop(POSITION)
        self.datasets["train"].check_broken(sum(position.broken for position in self._positions))
        if self.trainer.is_last_batch:
            self._report()
        return batch

    def _report(self):
        """Log how many samples were skipped, by all processes since the run began."""
        counts = [sum(getattr(p, kind) for p in self._positions) for kind in ("broken", "small")]
        strategy = self.trainer.strategy
        counts = torch.tensor(counts, dtype=torch.float32, device=strategy.root_device)
        broken, small = strategy.reduce(counts, reduce_op="sum").tolist()
        step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in self.trainer.loggers:
            logger.log_metrics({"data/broken": broken, "data/small": small}, step=step)
        if self.trainer.is_global_zero:
            _logger.info("skipped so far: %d broken samples, %d small images", broken, small)

    def _check(self, name, target, dataset):
        if not isinstance(dataset, TarShards):
            super()._check(name, target, dataset)
        elif self.wrap:
            raise UserValueError(f"data.{name}: `wrap` is for mere sequences, not for TarShards")

    def _streams(self):
        return isinstance(self.datasets.get("train"), TarShards)

    def _layout(self):
        """Who reads what of the training data: what positions depend on."""
        shards = self.datasets["train"]
        return {
            "processes": dist_util.get_world_size(),
            "data workers": max(1, self._workers(shards)),
            "shards": f"{len(shards.shards)} (checksum {shards.checksum})",
            "sizes of shards": f"checksum {shards.sizes}",
            "shuffle": shards.shuffle,
            "seed": self.seed,
        }

    def _size(self):
        return super()._size() | (self._layout() if self._streams() else {})

    def _workers(self, shards):
        """The number of data workers for `shards`; 0: this process reads them itself."""
        count, ranks = len(shards.shards), dist_util.get_world_size()
        if count < ranks:
            raise UserError(
                f"{count} shards cannot be shared out between {ranks} processes: make more of them"
            )
        return min(self.num_workers, count // ranks)

    def _loader(self, name):
        shards = self.datasets[name]
        if not isinstance(shards, TarShards):
            return super()._loader(name)
        workers, train = self._workers(shards), name == "train"
        if workers < self.num_workers:
            _logger.info(
                "data %s: %d data workers, as there are %d shards", name, workers, len(shards.shards)
            )
        positions = [Position()] * max(1, workers)
        if train:
            positions = self._positions = list(self._resume_lanes or positions)
        batches = -(-len(shards) // (dist_util.get_world_size() * self.batch_size))
        seed = derive_seed(self.seed, SPLITS.index(name))
        return DataLoader(
            LaneBatches(shards, self.batch_size, seed, lanes=len(positions), report=train),
            batch_size=None,  # a request is for a batch
            sampler=LaneSampler(batches, positions),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _from_all(value) -> list:
    """The processes' values, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist_util.get_world_size()
    dist.all_gather_object(values, value)
    return values
