"""Work shared among the ranks of mpiexec or torchrun (or of a training run that is already under way)."""

import functools
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from guided_diffusion import dist_util
from guided_diffusion.dist_util import get_rank, get_world_size
from guided_diffusion.errors import UserValueError

T = TypeVar("T")


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """The device of that name; by default the GPU of this rank where there is one, else the CPU.

    Raises UserError for a device that is not there.
    """
    if name is None:
        return dist_util.dev()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch.cuda raises either where there is no CUDA
        raise UserValueError(f"device {name} cannot be used ({str(error).splitlines()[0]})") from error
    return device


def share(count: int, of_rank: int | None = None) -> tuple[int, int]:
    """Start and stop of the consecutive part of `count` items that a rank (this one by default) works on."""
    r, world = (get_rank() if of_rank is None else of_rank), get_world_size()
    return count * r // world, count * (r + 1) // world


def gather_rows(rows: Tensor, count: int) -> Tensor | None:
    """Rank 0: all `count` rows in order, each rank having contributed its `share`. Other ranks: None."""
    if get_world_size() == 1:
        return rows
    group = _gloo()
    if get_rank() > 0:
        dist.send(rows.cpu().contiguous(), dst=0, group=group)
        return None
    whole = torch.empty((count, *rows.shape[1:]), dtype=rows.dtype)
    whole[: len(rows)] = rows.cpu()
    for other in range(1, get_world_size()):
        start, stop = share(count, other)
        dist.recv(whole[start:stop], src=other, group=group)
    return whole


def gather_objects(item: T) -> list[T] | None:
    """Rank 0: the `item` of every rank, in their order. Other ranks: None."""
    if get_world_size() == 1:
        return [item]
    items = [None] * get_world_size() if get_rank() == 0 else None
    dist.gather_object(item, items, dst=0, group=_gloo())
    return items


@functools.cache
def _gloo() -> dist.ProcessGroup | None:
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
