"""Work shared among the ranks of torchrun (or of a training run that is already under way)."""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from evaluations.errors import EvaluationError

T = TypeVar("T")


@contextlib.contextmanager
def ranks() -> Iterator[None]:
    """Inside, the ranks that torchrun started are together, unless they were already or there is one."""
    joins = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if joins:
        dist.init_process_group("gloo")  # features travel through the CPU; no kernel waits for them
    try:
        yield
    finally:
        if joins:
            dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Which GPU of its machine this rank uses."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """The device of that name; by default the GPU of this rank where there is one, else the CPU.

    Raises EvaluationError for a device that is not there.
    """
    if name is None:
        return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch.cuda raises either where there is no CUDA
        raise EvaluationError(f"device {name} cannot be used ({str(error).splitlines()[0]})") from error
    return device


def share(count: int, of_rank: int | None = None) -> tuple[int, int]:
    """Start and stop of the consecutive part of `count` items that a rank (this one by default) works on."""
    r, world = (rank() if of_rank is None else of_rank), world_size()
    return count * r // world, count * (r + 1) // world


def gather_rows(rows: Tensor, count: int) -> Tensor | None:
    """Rank 0: all `count` rows in order, each rank having contributed its `share`. Other ranks: None."""
    if world_size() == 1:
        return rows
    group = _gloo()
    if rank() > 0:
        dist.send(rows.cpu().contiguous(), dst=0, group=group)
        return None
    whole = torch.empty((count, *rows.shape[1:]), dtype=rows.dtype)
    whole[: len(rows)] = rows.cpu()
    for other in range(1, world_size()):
        start, stop = share(count, other)
        dist.recv(whole[start:stop], src=other, group=group)
    return whole


def gather_objects(item: T) -> list[T] | None:
    """Rank 0: the `item` of every rank, in their order. Other ranks: None."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size() if rank() == 0 else None
    dist.gather_object(item, items, dst=0, group=_gloo())
    return items


@functools.cache
def _gloo() -> dist.ProcessGroup | None:
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
