"""Small building blocks shared by the networks (upstream: guided_diffusion/nn.py)."""

import math

import torch as th
import torch.nn as nn
from torch.utils.checkpoint import checkpoint as _torch_checkpoint

SiLU = nn.SiLU

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_AVG_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class GroupNorm32(nn.GroupNorm):
    """Group normalisation computed in float32 whatever the input's type, which it gives back."""

    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


def _by_dims(table, dims, *args, **kwargs):
    try:
        layer = table[dims]
    except KeyError:
        raise ValueError(f"unsupported dimensions: {dims} (expected 1, 2 or 3)") from None
    return layer(*args, **kwargs)


def conv_nd(dims, *args, **kwargs):
    """A convolution over `dims` = 1, 2 or 3 spatial axes; ValueError for any other number."""
    return _by_dims(_CONV, dims, *args, **kwargs)


def avg_pool_nd(dims, *args, **kwargs):
    """An average pool over `dims` = 1, 2 or 3 spatial axes; ValueError for any other number."""
    return _by_dims(_AVG_POOL, dims, *args, **kwargs)


def linear(*args, **kwargs):
    """A fully connected layer."""
    return nn.Linear(*args, **kwargs)


@th.no_grad()
def update_ema(target_params, source_params, rate=0.99):
    """Move `target_params` in place towards `source_params`: target = rate * target + (1 - rate) * source.

    rate: a number, or a tensor of one, which stays on its device.
    """
    target, source = list(target_params), list(source_params)
    if not target:
        return
    th._foreach_mul_(target, rate)
    if isinstance(rate, th.Tensor):
        th._foreach_add_(target, th._foreach_mul(source, 1 - rate))
    else:
        th._foreach_add_(target, source, alpha=1 - rate)


def zero_module(module):
    """Set every parameter of `module` to zero; returns the module."""
    return scale_module(module, 0.0)


@th.no_grad()
def scale_module(module, scale):
    """Multiply every parameter of `module` by `scale`; returns the module."""
    for parameter in module.parameters():
        parameter.mul_(scale)
    return module


def mean_flat(tensor):
    """Mean over all axes but the first: [B, ...] -> [B]."""
    return tensor.flatten(1).mean(dim=1) if tensor.dim() > 1 else tensor


def normalization(channels):
    """The networks' normalisation layer: 32 groups over `channels`."""
    return GroupNorm32(32, channels)


def timestep_embedding(timesteps, dim, max_period=10000):
    """Sinusoidal embedding of (possibly fractional) timesteps, cosines first: [B] -> [B, dim] in float32.

    Angular frequencies fall geometrically from 1 to 1 / max_period over dim // 2 terms.
    """
    half = dim // 2
    exponents = th.arange(half, dtype=th.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * th.exp(-math.log(max_period) * exponents)[None]
    embedding = th.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


def checkpoint(func, inputs, params, flag):
    """Call func(*inputs); with `flag`, forget its activations and compute them again in the backward pass.

    `params` is part of upstream's signature; torch finds the parameters by itself.
    """
    if not flag:
        return func(*inputs)
    return _torch_checkpoint(func, *inputs, use_reentrant=False)
