"""A pytest plugin: run the tests with the last bits of another processor.

    pytest -p tests.other_processor

What libraries compute differently from machine to machine (exponentials, sums, products of matrices, convolutions) is
moved by one unit in the last place, for most values, by a rule of the value alone: what is computed twice stays equal.
Additions and products of single numbers are the same everywhere and stay. Denormal numbers are flushed to zero.
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
    """Move float32 values to a neighbour, up or down as their bits say; whole numbers, zero among them, stay."""
    if not isinstance(x, th.Tensor) or x.dtype != th.float32 or x.device.type != "cpu" or not x.numel():
        return
    code = (x.contiguous().view(th.int32) * 0x61C88647) >> 28
    towards = th.where((code & 1).bool(), th.inf, -th.inf).to(x)
    stays = ((code & 6) == 0) | (x == x.round())
    x.copy_(th.where(stays, x, th.nextafter(x, towards)))


class OtherProcessor(TorchDispatchMode):
    """Within it, results of ROUNDED operations are moved."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.removesuffix("_") in ROUNDED:
            for result in out if isinstance(out, (tuple, list)) else [out]:
                move(result)
        return out


@pytest.fixture(autouse=True)
def other_processor():
    th.set_flush_denormal(True)
    with OtherProcessor():
        yield
