"""A pytest plugin: run the tests with the last bits of another processor.

    pytest -p tests.other_processor

What libraries compute differently from machine to machine (exponentials, sums, products of matrices, convolutions) is
moved by one unit in the last place, for most values, by a rule of the value alone: what is computed twice stays equal.
Additions and products of single numbers, and what a matrix of zeros and ones picks, are the same everywhere and stay. Denormal numbers are flushed to zero.
Processes that a test starts are as ever. A tolerance that fails here is too tight for its quantity.
"""

import pytest
import torch as th
from torch.utils._python_dispatch import TorchDispatchMode

ROUNDED = set(
    "exp expm1 log log1p log2 pow sin cos tanh sigmoid silu gelu erf softplus rsqrt logsumexp _softmax _log_softmax "
    "silu_backward gelu_backward tanh_backward mm addmm bmm baddbmm dot convolution convolution_backward sum mean var std "
    "prod cumsum cumprod linalg_vector_norm native_group_norm native_group_norm_backward native_layer_norm "
    "native_layer_norm_backward _scaled_dot_product_flash_attention_for_cpu avg_pool2d _adaptive_avg_pool2d "
    "upsample_bilinear2d upsample_bicubic2d".split()
)


def move(x):
    """Move float32 values to a neighbour, up or down as their bits say; short fractions, whole numbers, and zero stay."""
    if not isinstance(x, th.Tensor) or x.dtype != th.float32 or x.device.type != "cpu" or not x.numel():
        return
    bits = x.contiguous().view(th.int32)
    code = (bits * 0x61C88647) >> 28
    towards = th.where((code & 1).bool(), th.inf, -th.inf).to(x)
    stays = ((code & 6) == 0) | ((bits & 0xFFF) == 0)
    x.copy_(th.where(stays, x, th.nextafter(x, towards)))


def picks(factors):
    """Is one of the matrices of zeros and ones?"""
    return any(
        isinstance(f, th.Tensor) and f.dim() == 2 and bool(((f == 0) | (f == 1)).all()) for f in factors
    )


class OtherProcessor(TorchDispatchMode):
    """Within it, results of ROUNDED operations are moved."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.removesuffix("_")
        if name in ROUNDED and not (name in ("mm", "addmm") and picks(args)):
            for result in out if isinstance(out, (tuple, list)) else [out]:
                move(result)
        return out


@pytest.fixture(autouse=True)
def other_processor():
    th.set_flush_denormal(True)
    with OtherProcessor():
        yield
