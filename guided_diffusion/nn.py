"""Small building blocks shared by the networks (upstream: guided_diffusion/nn.py)."""

import math

import torch as th
import torch.nn as nn
from torch.utils.checkpoint import checkpoint as _torch_checkpoint

SiLU = nn.SiLU

_WINOGRAD_FROM = 16  # pixels along an edge; below, the direct convolution is faster
_BY_ONE_ABOVE = 24  # pixels along an edge


class Conv2d(nn.Conv2d):
    """nn.Conv2d; on a CPU, in float32, 3x3 convolutions of images that are not small go by Winograd's algorithm (Lavin and
    Gray 2016): 0.6 of the time of oneDNN's direct one, equal to it to about 1e-5 of the largest value, and the same for
    an image alone as in a batch."""

    def _conv_forward(self, input, weight, bias):
        if self._suits_winograd(input, weight):
            return _Winograd.apply(input, weight, bias)
        return super()._conv_forward(input, weight, bias)

    def _suits_winograd(self, input, weight):
        return (
            input.device.type == "cpu"
            and input.dtype == weight.dtype == th.float32
            and input.dim() == 4
            and min(input.shape[2:]) >= _WINOGRAD_FROM
            and min(weight.shape[:2]) >= _WINOGRAD_FROM  # of few channels its transforms would cost more
            and self.kernel_size == (3, 3)
            and self.padding == self.stride == self.dilation == (1, 1)
            and self.padding_mode == "zeros"
            and self.groups == 1
            and th.backends.nnpack.is_available()
            and th._C._get_nnpack_enabled()  # th.backends.nnpack.set_flags(False) leaves nn.Conv2d's own bits
            and not th.is_autocast_enabled("cpu")
            and not th.compiler.is_compiling()
        )


def _by_tiles(input, weight, bias):
    """NNPACK's 3x3 convolution with padding 1."""
    # Of several larger images it takes Fourier transforms, of one never: the bits would depend on the batch size.
    parts = input.split(1) if max(input.shape[2:]) > _BY_ONE_ABOVE else [input]
    return th.cat([th._nnpack_spatial_convolution(part, weight, bias, padding=[1, 1]) for part in parts])


class _Winograd(th.autograd.Function):
    """A 3x3 convolution of stride 1; the gradient of its input is another one, with the kernels turned."""

    @staticmethod
    def forward(ctx, input, weight, bias):
        ctx.save_for_backward(input, weight)
        ctx.has_bias = bias is not None
        return _by_tiles(input, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        wanted = [False, ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
        to_input = None
        if ctx.needs_input_grad[0]:
            turned = weight.flip(2, 3).transpose(0, 1).contiguous()
            to_input = _by_tiles(grad.contiguous(), turned, None)
        sizes = [weight.shape[0]] if ctx.has_bias else None
        one = [1, 1]
        _, to_weight, to_bias = th.ops.aten.convolution_backward(
            grad, input, weight, sizes, one, one, one, False, [0, 0], 1, wanted
        )
        return to_input, to_weight, to_bias


_CONV = {1: nn.Conv1d, 2: Conv2d, 3: nn.Conv3d}
_AVG_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class GroupNorm32(nn.GroupNorm):
    """Group normalisation computed in float32 whatever the input's type, which it gives back.

    Under autocast to bfloat16 the kernel takes bfloat16 and sums in float32, so that no float32 copy is kept.
    """

    def forward(self, x):
        if x.dtype != th.bfloat16 or x.is_meta or not th.is_autocast_enabled(x.device.type):
            return super().forward(x.float()).type(x.dtype)
        weight, bias = self.weight, self.bias
        if x.device.type != "cpu":  # whose kernel takes float32 weights beside bfloat16
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        with th.autocast(x.device.type, enabled=False):  # which would make the copy
            return nn.functional.group_norm(x, self.num_groups, weight, bias, self.eps)


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
    if (
        isinstance(rate, th.Tensor) and rate.device.type == "cuda"
    ):  # a kernel for all takes no tensor as the share
        moves = th._foreach_sub(source, target)
        th._foreach_mul_(moves, (1 - rate).to(target[0].dtype))
        th._foreach_add_(target, moves)
    elif isinstance(rate, th.Tensor):
        th._foreach_lerp_(target, source, [(1 - rate).to(target[0].dtype)] * len(target))
    else:
        th._foreach_lerp_(target, source, 1 - rate)


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
