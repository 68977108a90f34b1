"""The fast kernels give what the plain ones give, and keep less."""

import pytest
import torch as th
from torch import nn

from guided_diffusion.nn import Conv2d, GroupNorm32, normalization
from tests.compare import agree


def gradients(module, x, grad):
    x = x.clone().requires_grad_()
    module.zero_grad()
    output = module(x)
    output.backward(grad)
    return output.detach(), x.grad, module.weight.grad.clone(), module.bias.grad.clone()


@pytest.mark.parametrize("shape", [(2, 32, 16, 16), (1, 32, 17, 24), (3, 48, 33, 16)])
def test_winograd_is_the_direct_convolution(shape):
    th.manual_seed(0)
    module = Conv2d(shape[1], 40, 3, padding=1)
    assert module._suits_winograd(th.zeros(shape), module.weight)
    plain = nn.Conv2d(shape[1], 40, 3, padding=1).double()
    plain.load_state_dict(module.state_dict())
    x, grad = th.randn(shape), th.randn(shape[0], 40, *shape[2:])
    for ours, exact in zip(
        gradients(module, x, grad), gradients(plain, x.double(), grad.double()), strict=True
    ):
        assert float((ours - exact).abs().max()) < 2e-5 * float(exact.abs().max())


def test_winograd_takes_only_what_it_suits():
    x, module = th.zeros(1, 32, 32, 32), Conv2d(32, 32, 3, padding=1)
    assert module._suits_winograd(x, module.weight)
    for other in (
        Conv2d(32, 32, 1),
        Conv2d(32, 32, 3, padding=1, stride=2),
        Conv2d(32, 3, 3, padding=1),
        Conv2d(32, 32, 3, padding=1, bias=False).double(),
        Conv2d(32, 32, 3, padding=1, groups=2),
        Conv2d(32, 32, 3, padding=1, padding_mode="circular"),
    ):
        assert not other._suits_winograd(x, other.weight)
    assert not module._suits_winograd(x[..., :8], module.weight)
    with th.autocast("cpu", dtype=th.bfloat16):
        assert not module._suits_winograd(x, module.weight)
    assert Conv2d(32, 32, 3, padding=1, bias=False)(x).shape == x.shape


@pytest.mark.parametrize("shape", [(16, 16), (24, 24), (17, 64), (25, 25), (28, 20), (64, 64)])
def test_winograd_gives_an_image_the_same_bits_alone_and_in_a_batch(shape):
    """One seed is one image for any batch size; NNPACK by itself takes another algorithm from 25 pixels on."""
    th.manual_seed(0)
    module = Conv2d(16, 16, 3, padding=1)
    x, grad = th.randn(2, 5, 16, *shape)
    together = gradients(module, x, grad)[:2]
    alone = [gradients(module, x[i : i + 1], grad[i : i + 1])[:2] for i in range(5)]
    assert all(map(th.equal, together, map(th.cat, zip(*alone, strict=True))))


def test_without_nnpack_the_bits_are_those_of_nn_conv2d():
    th.manual_seed(0)
    module, plain = Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
    plain.load_state_dict(module.state_dict())
    x, grad = th.randn(2, 32, 32, 32), th.randn(2, 32, 32, 32)
    with th.backends.nnpack.flags(enabled=False):
        assert all(map(th.equal, gradients(module, x, grad), gradients(plain, x, grad)))


def test_normalisation_under_bfloat16_keeps_no_float32_copy():
    th.manual_seed(0)
    module = normalization(64)
    nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    x = th.randn(2, 64, 8, 8)
    kept = []
    with th.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        with th.autocast("cpu", dtype=th.bfloat16):
            output = module(x.bfloat16().requires_grad_())
    assert output.dtype == th.bfloat16
    assert not [t for t in kept if t.dtype == th.float32 and t.numel() >= x.numel()]
    plain = nn.GroupNorm(32, 64)
    plain.load_state_dict(module.state_dict())
    exact = plain(x.bfloat16().float())
    assert float((output.float() - exact).abs().max()) < 0.01 * float(exact.abs().max())
    assert isinstance(module, GroupNorm32)
    agree(module(x), plain(x), rtol=1e-6)
