"""A diffusion's network over several devices in shards: torch's FSDP2, one unit per block."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from guided_diffusion.unet import AttentionBlock, ResBlock
from ldm.modules.attention import BasicTransformerBlock

BLOCKS = (ResBlock, AttentionBlock, BasicTransformerBlock)


def shard(network: nn.Module, mesh, reshard: bool = True, calls: Iterable[str | None] = ()) -> None:
    """Leave this rank of `mesh` its share of the parameters of `network`; a block's are gathered while it computes.

    reshard: given back after the forward pass; otherwise kept until the backward pass, for networks that ranks may
    call a different number of times. calls: names of methods, beside `forward`, that compute.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # Classifiers are called after the network, and are roots of their own.
    heads = getattr(network, "heads", None) or {}
    for part in (*(m for m in network.modules() if isinstance(m, BLOCKS)), *heads.values(), network):
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard)
        part._reshards, part._gathered = reshard, False
    for name in calls:
        if name and hasattr(network, name):
            register_fsdp_forward_method(network, name)


def local(tensors) -> list[torch.Tensor]:
    """This rank's shares of tensors, without gradients; those that are not in shards as they are."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in (tensor.detach() for tensor in tensors)]


def like_shards(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A whole tensor in shards as `other` is; as it is where `other` is whole."""
    if not hasattr(other, "to_local"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, other.device_mesh, other.placements)


@contextlib.contextmanager
def gathered(*networks: nn.Module | None) -> Iterator[None]:
    """Inside, the parameters of networks in shards are whole on every rank, so that ranks may call them as often as
    they like. May be nested; networks that are whole stay as they are."""
    parts = [
        part
        for network in networks
        if hasattr(network, "unshard") and not network._gathered
        for part in network.modules()
        if hasattr(part, "unshard")
    ]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.set_reshard_after_backward(False, recurse=False)
        part.unshard()
        part._gathered = True
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part._reshards, recurse=False)
            part.set_reshard_after_backward(True, recurse=False)
            part._gathered = False
