"""Loss scaling and master weights: a float16 step is the float32 step, and a bad step changes nothing."""

import math

import pytest
import torch as th
from torch import nn

from guided_diffusion import fp16_util, logger
from guided_diffusion.fp16_util import MixedPrecisionTrainer


class Net(nn.Module):
    """A convolution in float16 between layers in float32, as in the U-Net."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.out = nn.Linear(4, 2)
        self.unused = nn.Parameter(th.ones(3))
        self.register_buffer("count", th.tensor(7.0))

    def convert_to_fp16(self):
        self.conv.apply(fp16_util.convert_module_to_f16)

    def forward(self, x):
        hidden = self.conv(x.to(self.conv.weight.dtype)).float()
        return self.out(self.norm(hidden).mean(dim=(2, 3)))


@pytest.fixture(autouse=True)
def own_logger(tmp_path):
    with logger.scoped_configure(dir=str(tmp_path), format_strs=["log"]):
        yield


@pytest.fixture
def net():
    th.manual_seed(0)
    return Net()


def gradient(net, seed=1):
    x = th.randn(5, 3, 6, 6, generator=th.Generator().manual_seed(seed))
    return net(x).square().mean()


def test_only_convolutions_are_cast_and_back(net):
    net.apply(fp16_util.convert_module_to_f16)
    assert {name for name, p in net.named_parameters() if p.dtype == th.float16} == {
        "conv.weight",
        "conv.bias",
    }
    net.apply(fp16_util.convert_module_to_f32)
    assert all(p.dtype == th.float32 for p in net.parameters())


def test_masters_are_one_vector_and_one_matrix_with_the_same_values(net):
    groups = fp16_util.get_param_groups_and_shapes(net.named_parameters())
    masters = fp16_util.make_master_params(groups)
    vectors, matrices = 3 + 4 + 4 + 4 + 2, 4 * 27 + 8
    assert [tuple(master.shape) for master in masters] == [(vectors,), (1, matrices)]
    assert all(master.requires_grad and master.is_leaf for master in masters)
    for (group, _), master in zip(groups, masters, strict=True):
        for (_, param), value in zip(group, fp16_util.unflatten_master_params(group, master), strict=True):
            assert th.equal(param, value)


@pytest.mark.parametrize("use_fp16", [False, True])
def test_state_dict_round_trip_keeps_float32_values(net, use_fp16):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    trainer = MixedPrecisionTrainer(model=net, use_fp16=use_fp16)
    state = trainer.master_params_to_state_dict(trainer.master_params)
    assert list(state) == list(before)
    for name, value in state.items():
        assert value.dtype == th.float32
        assert th.equal(value, before[name]), name
    doubled = {name: value.detach() * 2 for name, value in state.items()}
    masters = trainer.state_dict_to_master_params(doubled)
    for ours, theirs in zip(masters, trainer.master_params, strict=True):
        assert th.equal(ours, 2 * theirs)


def test_a_float16_step_is_the_float32_step():
    results = {}
    for use_fp16 in (False, True):
        th.manual_seed(0)
        net = Net()
        trainer = MixedPrecisionTrainer(model=net, use_fp16=use_fp16, initial_lg_loss_scale=10)
        opt = th.optim.SGD(trainer.master_params, lr=0.1)
        for _ in range(3):
            trainer.zero_grad()
            trainer.backward(gradient(net))
            assert trainer.optimize(opt) is True
        results[use_fp16] = (trainer.master_params_to_state_dict(trainer.master_params), logger.dumpkvs())
    (exact, exact_log), (rounded, rounded_log) = results[False], results[True]
    th.manual_seed(0)
    start = Net().state_dict()
    for name in exact:
        assert th.allclose(exact[name], rounded[name], atol=2e-3), name
        if name not in ("count", "unused"):
            assert not th.equal(exact[name], start[name]), name
    assert set(exact_log) == {"grad_norm", "param_norm"}
    assert set(rounded_log) == {"grad_norm", "param_norm", "lg_loss_scale"}
    assert rounded_log["grad_norm"] == pytest.approx(exact_log["grad_norm"], rel=1e-2)
    assert rounded_log["param_norm"] == pytest.approx(exact_log["param_norm"], rel=1e-3)
    assert net.conv.weight.dtype == th.float16


def test_norms_are_those_of_all_values_together(net):
    trainer = MixedPrecisionTrainer(model=net)
    trainer.backward(gradient(net))
    gradients = th.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    values = th.cat([p.detach().flatten() for p in net.parameters()])
    trainer.optimize(th.optim.SGD(trainer.master_params, lr=0.0))
    logged = logger.dumpkvs()
    assert logged["grad_norm"] == pytest.approx(gradients.norm().item(), rel=1e-5)
    assert logged["param_norm"] == pytest.approx(values.norm().item(), rel=1e-5)


def test_the_scale_grows_slowly_and_falls_by_one_at_an_overflow(net, tmp_path):
    trainer = MixedPrecisionTrainer(
        model=net, use_fp16=True, initial_lg_loss_scale=40, fp16_scale_growth=0.25
    )
    opt = th.optim.SGD(trainer.master_params, lr=0.1)
    before = [master.detach().clone() for master in trainer.master_params]
    trainer.backward(gradient(net))  # 2**40 times a gradient does not fit into float16
    assert trainer.optimize(opt) is False
    assert trainer.lg_loss_scale == 39
    assert all(th.equal(a, b) for a, b in zip(before, trainer.master_params, strict=True))
    assert all(master.grad is None for master in trainer.master_params)
    assert logger.dumpkvs() == {"lg_loss_scale": 40}
    assert "decreased lg_loss_scale to 39" in (tmp_path / "log.txt").read_text()

    trainer.lg_loss_scale = 8
    trainer.zero_grad()
    trainer.backward(gradient(net))
    assert trainer.optimize(opt) is True
    assert trainer.lg_loss_scale == 8.25


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_skipped_in_float32_where_asked(net, bad):
    trainer = MixedPrecisionTrainer(model=net, skip_nonfinite=True)
    opt = th.optim.AdamW(trainer.master_params, lr=0.1)
    before = [param.detach().clone() for param in net.parameters()]
    trainer.backward(gradient(net))
    net.out.bias.grad[0] = bad
    assert trainer.optimize(opt) is False
    assert all(th.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert logger.dumpkvs() == {}

    trainer.zero_grad()
    trainer.backward(gradient(net))
    assert trainer.optimize(opt) is True


def test_without_asking_the_step_is_taken_as_upstream_takes_it(net):
    trainer = MixedPrecisionTrainer(model=net)
    trainer.backward(gradient(net))
    net.out.bias.grad[0] = math.nan
    assert trainer.optimize(th.optim.SGD(trainer.master_params, lr=0.1)) is True
    assert math.isnan(net.out.bias[0].item())


def test_zero_grad_fills_in_place(net):
    gradient(net).backward()
    held = net.out.weight.grad
    fp16_util.zero_grad(net.parameters())
    assert net.out.weight.grad is held and not held.any()
    assert net.unused.grad is None
    assert th.equal(fp16_util.param_grad_or_zeros(net.unused), th.zeros(3))


@pytest.mark.parametrize(
    "value, overflow", [(1.0, False), (math.inf, True), (-math.inf, True), (math.nan, True)]
)
def test_check_overflow(value, overflow):
    assert fp16_util.check_overflow(value) is overflow
