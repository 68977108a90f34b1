"""Objects from configurations, noise schedules, moving averages and distributions of latent diffusion."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch as th
from omegaconf import OmegaConf

from guided_diffusion.errors import UserValueError
from ldm.modules.diffusionmodules import util
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution, DiracDistribution
from ldm.modules.ema import LitEma
from ldm.util import (
    count_params,
    default,
    exists,
    get_obj_from_str,
    instantiate_from_config,
    isimage,
    ismap,
    log_txt_as_img,
)
from tests.compare import agree

ROOT = Path(__file__).resolve().parents[1]


def test_a_configuration_makes_an_object():
    config = OmegaConf.create({"target": "torch.nn.Conv2d", "params": {"in_channels": 3, "out_channels": 5}})
    config.params.kernel_size = "${params.in_channels}"
    layer = instantiate_from_config(config)
    assert isinstance(layer, th.nn.Conv2d) and layer.weight.shape == (5, 3, 3, 3)
    assert isinstance(instantiate_from_config({"target": "torch.nn.Identity"}), th.nn.Identity)


@pytest.mark.parametrize("word", ["__is_first_stage__", "__is_unconditional__"])
def test_words_in_place_of_a_conditioner_make_nothing(word):
    assert instantiate_from_config(word) is None


@pytest.mark.parametrize(
    "config, said",
    [
        ({"params": {}}, "target"),
        ("__is_something__", "target"),
        ({"target": "Linear"}, "package.module.name"),
        ({"target": "ldm.nothing.Here"}, "no module ldm.nothing"),
        ({"target": "ldm.util.nothing"}, "ldm.util has no nothing"),
        ({"target": "torch.nn.Linear", "params": {"in_features": 1}}, "out_features"),
        (
            {"target": "torch.nn.Linear", "params": {"in_features": 1, "out_features": 1, "width": 1}},
            "width",
        ),
    ],
)
def test_a_wrong_configuration_is_named(config, said):
    with pytest.raises(UserValueError, match=said) as caught:
        instantiate_from_config(config)
    assert "\n" not in str(caught.value)


def targets():
    """The project's own targets in its configurations."""
    text = "".join(path.read_text() for path in sorted((ROOT / "configs").rglob("*.yaml")))
    return sorted(set(re.findall(r"target: ((?:ldm|guided_diffusion)[\w.]+)", text)))


@pytest.mark.parametrize(
    "target", [*targets(), *(f"ldm.modules.diffusionmodules.model.{n}coder" for n in ("En", "De"))]
)
def test_a_misspelt_parameter_is_named_by_every_target(target):
    """Also where ** hands it on, and before what is missing."""
    with pytest.raises(UserValueError, match="params of .*unexpected keyword argument 'chanels'"):
        instantiate_from_config({"target": target, "params": {"chanels": 4}})


def test_a_package_that_a_target_needs_is_named(tmp_path, monkeypatch):
    (tmp_path / "needy.py").write_text("import no_such_package_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserValueError, match="needs the package no_such_package_here"):
        get_obj_from_str("needy.Thing")


def test_errors_inside_a_constructor_are_not_mistaken_for_wrong_params():
    with pytest.raises(RuntimeError):
        instantiate_from_config(
            {"target": "torch.nn.Linear", "params": {"in_features": -1, "out_features": 1}}
        )


def test_reload_runs_the_module_again(tmp_path, monkeypatch):
    (tmp_path / "changing.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert get_obj_from_str("changing.value") == 1
    (tmp_path / "changing.py").write_text("value = 2 + 0\n")
    assert get_obj_from_str("changing.value") == 1
    assert get_obj_from_str("changing.value", reload=True) == 2


def test_small_helpers():
    assert exists(0) and not exists(None)
    assert (default(0, 1), default(None, 1), default(None, lambda: 2)) == (0, 1, 2)
    assert count_params(th.nn.Linear(3, 2)) == 8
    assert isimage(th.zeros(1, 3, 2, 2)) and not isimage(th.zeros(1, 4, 2, 2)) and not isimage("image")
    assert ismap(th.zeros(1, 4, 2, 2)) and not ismap(th.zeros(1, 3, 2, 2))


def test_captions_are_drawn():
    images = log_txt_as_img((64, 32), ["", "a long caption that has to be broken into lines"])
    assert images.shape == (2, 3, 32, 64)
    assert (images[0] == 1).all()
    assert images.min() < -0.5 and images.max() == 1
    assert (images[1, :, 16:] < 0).any()  # it goes on below the first line


def test_beta_schedules():
    betas = {name: util.make_beta_schedule(name, 100) for name in ("linear", "cosine", "sqrt_linear", "sqrt")}
    for values in betas.values():
        assert values.shape == (100,) and values.dtype == np.float64
        assert (np.diff(values) > 0).all() and 0 < values[0] and values[-1] <= 0.999
    assert betas["linear"][[0, -1]] == pytest.approx([1e-4, 2e-2])
    # Linear in the square root, in beta, and its square root.
    assert np.diff(np.sqrt(betas["linear"]), 2) == pytest.approx(0, abs=1e-12)
    assert np.diff(betas["sqrt_linear"], 2) == pytest.approx(0, abs=1e-12)
    assert betas["sqrt"] ** 2 == pytest.approx(betas["sqrt_linear"])
    with pytest.raises(UserValueError, match="'exponential'.*cosine"):
        util.make_beta_schedule("exponential", 100)


@pytest.mark.parametrize("method", ["uniform", "quad"])
def test_ddim_timesteps_stay_in_the_schedule(method):
    for steps in (1, 10, 300, 999, 1000):
        kept = util.make_ddim_timesteps(method, steps, 1000, verbose=False)
        assert kept.min() >= 0 and kept.max() < 1000 and (np.diff(kept) >= 0).all()
    assert util.make_ddim_timesteps("quad", 5, 1000, verbose=False).tolist() == [1, 51, 201, 451, 801]
    assert util.make_ddim_timesteps("uniform", 1000, 1000, verbose=False).tolist() == list(range(1000))


@pytest.mark.parametrize("method, steps", [("cubic", 10), ("uniform", 0), ("uniform", 1001)])
def test_wrong_ddim_timesteps(method, steps):
    with pytest.raises(UserValueError, match=f"{method if steps == 10 else steps}"):
        util.make_ddim_timesteps(method, steps, 1000, verbose=False)


def test_ddim_at_eta_one_is_as_noisy_as_ddpm():
    """On all steps sigma^2 is the posterior variance beta (1 - abar_prev) / (1 - abar)."""
    betas = util.make_beta_schedule("linear", 50)
    abar = np.cumprod(1 - betas)
    sigmas, alphas, before = util.make_ddim_sampling_parameters(abar, np.arange(50), 1.0, verbose=False)
    assert alphas == pytest.approx(abar)
    assert before[1:] == pytest.approx(abar[:-1]) and before[0] == abar[0]
    assert sigmas[1:] ** 2 == pytest.approx(betas[1:] * (1 - abar[:-1]) / (1 - abar[1:]))


def test_tensors_of_the_batch():
    table, t = th.arange(10.0), th.tensor([3, 7])
    assert util.extract_into_tensor(table, t, (2, 4, 8, 8)).tolist() == [[[[3.0]]], [[[7.0]]]]
    assert util.timestep_embedding(t, 4, repeat_only=True).tolist() == [[3] * 4, [7] * 4]
    agree(util.timestep_embedding(t, 4)[:, 0], th.cos(t.float()), rtol=1e-5)
    repeated, free = util.noise_like((2, 3), "cpu", repeat=True), util.noise_like((2, 3), "cpu")
    assert th.equal(repeated[0], repeated[1]) and not th.equal(free[0], free[1])


# ------------------------------------------------------------------------------------------------ moving
# averages


def test_the_moving_average_follows_the_formula():
    model = th.nn.Sequential(th.nn.Linear(2, 1), th.nn.Linear(1, 1))
    model[1].bias.requires_grad_(False)
    ema = LitEma(model, decay=0.5)
    assert set(ema.state_dict()) == {"decay", "num_updates", "0weight", "0bias", "1weight"}
    average = model[0].weight.detach().clone()
    for n in range(1, 12):
        with th.no_grad():
            model[0].weight.add_(1)
        ema(model)
        decay = min(0.5, (1 + n) / (10 + n))  # 2/11, 3/12, ... at first
        average = decay * average + (1 - decay) * model[0].weight.detach()
        assert th.allclose(ema.state_dict()["0weight"], average)
    assert ema.num_updates == 11
    constant = LitEma(model, decay=0.75, use_num_upates=False)
    with th.no_grad():
        model[0].weight.add_(1)
    constant(model)
    assert th.allclose(constant.state_dict()["0weight"], model[0].weight - 0.75)
    assert constant.num_updates == -1


def test_weights_are_swapped_for_the_average_and_back():
    model = th.nn.Linear(2, 2)
    ema = LitEma(model)
    averaged, trained = model.weight.detach().clone(), model.weight.detach() + 1
    with th.no_grad():
        model.weight.copy_(trained)
    ema.store(model.parameters())
    ema.copy_to(model)
    assert th.equal(model.weight, averaged)
    ema.restore(model.parameters())
    assert th.equal(model.weight, trained)
    with pytest.raises(ValueError, match="decay"):
        LitEma(model, decay=1.5)


# --------------------------------------------------------------------------------------------------
# distributions


def test_gaussian_latents_agree_with_torch():
    th.manual_seed(0)
    parameters = th.randn(3, 8, 2, 2)
    ours, other = (DiagonalGaussianDistribution(p) for p in (parameters, th.randn(3, 8, 2, 2)))
    mean, logvar = parameters.chunk(2, dim=1)
    torch_ours = th.distributions.Normal(mean, (logvar / 2).exp())
    torch_other = th.distributions.Normal(other.mean, other.std)
    standard = th.distributions.Normal(0.0, 1.0)

    def summed(x):
        return x.sum(dim=(1, 2, 3))

    kl = th.distributions.kl_divergence
    assert th.allclose(ours.kl(), summed(kl(torch_ours, standard)), rtol=1e-4)
    assert th.allclose(ours.kl(other), summed(kl(torch_ours, torch_other)), rtol=1e-4)
    x = th.randn(3, 4, 2, 2)
    assert th.allclose(ours.nll(x), -summed(torch_ours.log_prob(x)), rtol=1e-4)
    assert th.equal(ours.mode(), mean)
    draws = th.stack([ours.sample() for _ in range(4000)])
    assert th.allclose(draws.mean(0), mean, atol=0.3) and th.allclose(
        draws.std(0) / ours.std, th.ones(()), atol=0.1
    )


def test_gaussian_latents_at_the_edges():
    wild = DiagonalGaussianDistribution(th.tensor([0.0, 0.0, -100.0, 100.0]).reshape(1, 4, 1, 1))
    assert wild.logvar.flatten().tolist() == [-30, 20]
    certain = DiagonalGaussianDistribution(th.ones(1, 4, 1, 1), deterministic=True)
    assert th.equal(certain.sample(), certain.mean)
    assert certain.kl() == 0 and certain.nll(certain.mean) == 0
    value = th.randn(2)
    assert DiracDistribution(value).sample() is value and DiracDistribution(value).mode() is value
    assert math.isfinite(wild.kl())
