"""Every attention layer takes a fused kernel, in float32 and bfloat16, forwards and backwards."""

import pytest
import torch as th
from torch.profiler import ProfilerActivity, profile

from guided_diffusion.unet import AttentionBlock, AttentionPool2d
from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.model import AttnBlock

MAPS, SEQUENCE = (2, 32, 8, 8), (2, 64, 32)
LAYERS = {
    "adm": (lambda: AttentionBlock(32, num_heads=2), MAPS),
    "adm, new order": (lambda: AttentionBlock(32, num_heads=2, use_new_attention_order=True), MAPS),
    "adm, pooled": (lambda: AttentionPool2d(8, 32, 16), MAPS),
    "autoencoder": (lambda: AttnBlock(32), MAPS),
    "transformer": (lambda: CrossAttention(32, heads=2, dim_head=16), SEQUENCE),
}


@pytest.mark.parametrize("dtype", [th.float32, th.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_kernel_is_fused(name, dtype):
    """By the events of torch's profiler: `_attention_math` writes out the [T, T] weights."""
    make, shape = LAYERS[name]
    th.manual_seed(0)
    layer, x = make(), th.randn(shape).requires_grad_()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        with th.autocast("cpu", dtype=th.bfloat16, enabled=dtype is th.bfloat16):
            out = layer(x)
        out.float().sum().backward()
    kernels = {event.key.removeprefix("aten::") for event in recorded.key_averages()}
    kernels = {name for name in kernels if name.startswith("_scaled_dot_product")}
    assert not any("math" in kernel for kernel in kernels), kernels
    assert {
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    } <= kernels
