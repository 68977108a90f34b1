"""Agreement with openai/guided-diffusion, on reference outputs recorded from it (float32, CPU)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch as th

from guided_diffusion import respace, script_util
from guided_diffusion.unet import UNetModel
from tests.compare import BITS, agree
from tests.parity.weights import fill

FOLDER = Path(__file__).parent / "parity" / "adm"
INDEX = json.loads((FOLDER / "index.json").read_text())
FACTORIES = {
    "unet": (script_util.model_and_diffusion_defaults, script_util.create_model_and_diffusion),
    "superres": (script_util.sr_model_and_diffusion_defaults, script_util.sr_create_model_and_diffusion),
}


def arrays(name):
    with np.load(FOLDER / f"{name}.npz") as data:
        return {key: th.from_numpy(data[key]) for key in data.files if data[key].size}


def build(case):
    if case["kind"] == "raw_unet":
        return UNetModel(**case["flags"])
    if case["kind"] == "classifier":
        defaults = script_util.classifier_defaults()
        return script_util.create_classifier(**{**defaults, **case["flags"]})
    defaults, create = FACTORIES[case["kind"]]
    return create(**{**defaults(), **case["flags"]})[0]


@pytest.mark.parametrize("name", INDEX["unet"])
def test_network(name):
    """Same state dict in the same order, same output, same gradients with respect to input and weights."""
    case, data = INDEX["unet"][name], arrays(name)
    model = build(case)
    fill(model)
    model.eval()
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == case["state"]
    assert list(model.state_dict()) == list(case["state"])
    inputs = {key: data[key] for key in ("y", "low_res") if key in data}
    x = data["x"].requires_grad_()
    out = model(x, data["t"], **inputs)
    agree(out.detach(), data["out"], "output")
    (out * data["probe"]).sum().backward()
    agree(x.grad, data["grad_x"], "gradient of the input")
    norms = {k: float(p.grad.norm()) for k, p in model.named_parameters()}
    # A bias in front of a normalisation has a gradient of rounding errors only.
    floor = 1e-6 * max(case["grad_norms"].values())
    for key, norm in case["grad_norms"].items():
        agree(norms[key], norm, key, rtol=1e-3, floor=floor)
    assert set(norms) == set(case["grad_norms"])


def toy_model(learn_sigma):
    """The model that the references were recorded with: cheap, and sensitive to timestep and position."""

    def model(x, t, **_):
        s = (t.float() / 1000).reshape(-1, *[1] * (x.dim() - 1))
        eps = th.tanh(x * (0.5 + s)) + 0.1 * x.roll(1, dims=-1)
        return th.cat([eps, th.sin(3 * x + s)], dim=1) if learn_sigma else eps

    return model


@pytest.fixture(scope="module", params=list(INDEX["diffusion"]))
def case(request):
    flags = INDEX["diffusion"][request.param]["flags"]
    return (
        script_util.create_gaussian_diffusion(**flags),
        toy_model(flags.get("learn_sigma", False)),
        arrays(request.param),
    )


TABLES = [
    "betas",
    "alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "timestep_map",
]


@pytest.mark.parametrize("table", TABLES)
def test_tables(case, table):
    diffusion, _, data = case
    if table not in data:
        pytest.skip("not recorded for this case")
    agree(getattr(diffusion, table), data[table], table, rtol=1e-12)


def test_forward_and_reverse_moments(case):
    diffusion, model, data = case
    x0, noise, t = data["x0"], data["noise"], data["t"]
    x_t = diffusion.q_sample(x0, t, noise)
    agree(x_t, data["q_sample"], "q_sample")
    agree(diffusion.q_posterior_mean_variance(x0, x_t, t)[0], data["q_post_mean"], "q_post_mean")
    seen = set()
    for clip in (0, 1):
        out = diffusion.p_mean_variance(model, x_t, t, clip_denoised=bool(clip))
        for key, value in out.items():
            name = f"p_{key}_clip{clip}"
            if name in data:
                agree(value, data[name], name)
                seen.add(name)
    assert len(seen) == len([key for key in data if key.startswith("p_") and "_clip" in key])


def test_losses(case):
    diffusion, model, data = case
    terms = diffusion.training_losses(model, data["x0"], data["t"], noise=data["noise"])
    recorded = {key.removeprefix("loss_"): value for key, value in data.items() if key.startswith("loss_")}
    assert set(terms) == set(recorded)
    for key, value in terms.items():
        agree(value, recorded[key], key)
    agree(diffusion._prior_bpd(data["x0"]), data["prior_bpd"], "prior_bpd", floor=BITS)


def test_single_steps(case):
    diffusion, model, data = case
    x_t, t = diffusion.q_sample(data["x0"], data["t"], data["noise"]), data["t"]

    def guide(x, t, **_):
        return 0.3 * th.cos(x)

    agree(diffusion.ddim_sample(model, x_t, t)["sample"], data["ddim0"], "ddim")
    th.manual_seed(5)
    agree(diffusion.ddim_sample(model, x_t, t, eta=0.7)["sample"], data["ddim07_seed5"], "ddim, eta 0.7")
    th.manual_seed(6)
    agree(diffusion.p_sample(model, x_t, t)["sample"], data["p_sample_seed6"], "p_sample")
    th.manual_seed(8)
    agree(diffusion.p_sample(model, x_t, t, cond_fn=guide)["sample"], data["p_sample_cond_seed8"], "guided")
    th.manual_seed(8)
    agree(
        diffusion.ddim_sample(model, x_t, t, cond_fn=guide)["sample"], data["ddim_cond_seed8"], "guided ddim"
    )
    reverse = diffusion.ddim_reverse_sample(model, x_t, data["rev_t"])["sample"]
    agree(reverse, data["ddim_reverse"], "ddim_reverse")


def test_seeded_loops(case):
    """Random numbers are drawn in upstream's order."""
    diffusion, model, data = case
    if "p_sample_loop_seed7" not in data:
        pytest.skip("recorded for at most 60 steps")
    shape = tuple(data["x0"].shape)
    th.manual_seed(7)
    agree(diffusion.p_sample_loop(model, shape, device="cpu"), data["p_sample_loop_seed7"], "p_sample_loop")
    th.manual_seed(7)
    agree(diffusion.ddim_sample_loop(model, shape, device="cpu"), data["ddim_loop_seed7"], "ddim_sample_loop")
    th.manual_seed(9)
    bound = diffusion.calc_bpd_loop(model, data["x0"])
    recorded = {key.removeprefix("bpd_"): value for key, value in data.items() if key.startswith("bpd_")}
    assert set(recorded) == set(bound)
    for key, value in bound.items():
        agree(value, recorded[key], key, floor=BITS)


@pytest.mark.parametrize("total, sections, kept", INDEX["space_timesteps"])
def test_space_timesteps(total, sections, kept):
    assert sorted(respace.space_timesteps(total, sections)) == kept
