"""Agreement with CompVis/latent-diffusion and Stability-AI/stablediffusion, on reference outputs recorded
from them (float32, CPU)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch as th

from guided_diffusion.mt.model import read_config
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.util import (
    make_beta_schedule,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
)
from ldm.util import count_params, instantiate_from_config
from tests.compare import agree
from tests.parity.weights import fill

PARITY = Path(__file__).parent / "parity"
CONFIGS = Path(__file__).parents[1] / "configs"
INDEX = {name: json.loads((PARITY / name / "index.json").read_text()) for name in ("ldm", "ldm_sd2")}


def cases(group):
    return [pytest.param(folder, name, id=name) for folder in INDEX for name in INDEX[folder][group]]


def arrays(folder, name):
    with np.load(PARITY / folder / f"{name}.npz") as data:
        return {key: th.from_numpy(data[key]) for key in data.files}


def build(kind, params):
    """The model of a case, by its upstream path, as configurations make it."""
    if kind == "unet":
        return UNetModel(**params)
    target = {"kl": "ldm.models.autoencoder.AutoencoderKL", "vq": "ldm.models.autoencoder.VQModel"}[kind]
    loss = {"target": "torch.nn.Identity"}
    return instantiate_from_config({"target": target, "params": {**params, "lossconfig": loss}})


def assert_same_state(model, state):
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == state
    assert list(model.state_dict()) == list(state)


@pytest.mark.parametrize("folder, name", cases("unet"))
def test_unet(folder, name):
    """Same state dict in the same order, same output, same gradient with respect to the input."""
    case, data = INDEX[folder]["unet"][name], arrays(folder, name)
    model = build("unet", case["params"])
    assert_same_state(model, case["state"])
    fill(model)
    model.eval()
    x = data["x"].requires_grad_()
    out = model(x, data["t"], **{key: data[key] for key in ("context", "y") if key in data})
    agree(out.detach(), data["out"], "output")
    (out * data["probe"]).sum().backward()
    agree(x.grad, data["grad_x"], "gradient of the input")


@pytest.mark.parametrize("folder, name", cases("autoencoder"))
@th.no_grad()
def test_autoencoder(folder, name):
    case, data = INDEX[folder]["autoencoder"][name], arrays(folder, name)
    model = build(case["kind"], case["params"])
    assert_same_state(model, case["state"])
    fill(model)
    model.eval()
    if isinstance(model, AutoencoderKL):
        posterior = model.encode(data["x"])
        agree(posterior.mean, data["mean"], "mean")
        agree(posterior.logvar, data["logvar"], "logvar")
        agree(posterior.kl(), data["kl"], "kl")
        th.manual_seed(3)
        agree(posterior.sample(), data["sample_seed3"], "sample")
        agree(model.decode(posterior.mode()), data["dec"], "decoded mode")
        agree(model(data["x"], sample_posterior=False)[0], data["dec"], "reconstruction")
    else:
        quant, loss, (_, _, indices) = model.encode(data["x"])
        agree(quant, data["quant"], "codebook entries")
        agree(loss.reshape(1), data["loss"], "codebook loss")
        assert th.equal(indices, data["indices"])
        agree(model.decode(quant), data["dec"], "decoded")


@pytest.mark.parametrize("folder, name", cases("keys"))
def test_released_models(folder, name):
    """The full-size models have upstream's state dicts and parameter counts."""
    case = INDEX[folder]["keys"][name]
    with th.device("meta"):
        model = build(case["kind"], case["params"])
    assert_same_state(model, case["state"])
    assert count_params(model) == case["n_params"]


@pytest.mark.parametrize(
    "config, folder, name",
    [
        ("translation/cityscapes", "ldm", "paper_translation_unet"),
        ("translation/night2day", "ldm", "paper_translation_unet"),
        ("stable-diffusion/v1-inference", "ldm", "sd1_unet"),
        ("stable-diffusion/v2-inference", "ldm_sd2", "sd2_unet"),
        ("stable-diffusion/v2-inference-v", "ldm_sd2", "sd2_unet"),
    ],
)
def test_configurations_describe_the_released_models(config, folder, name):
    """The U-Net and the first stage (kl-f8) that a configuration asks for."""
    params = read_config(CONFIGS / f"{config}.yaml")["model"]["params"]
    if name == "paper_translation_unet":  # upstream's was made with it, the paper leaves it out (E.1)
        assert params["unet_config"]["params"].pop("use_scale_shift_norm") is False
        params["unet_config"]["params"]["use_scale_shift_norm"] = True
    first_stage = dict(params["first_stage_config"], params=dict(params["first_stage_config"]["params"]))
    first_stage["params"].pop("ckpt_path", None)  # a file that the user brings
    with th.device("meta"):
        unet, autoencoder = (instantiate_from_config(part) for part in (params["unet_config"], first_stage))
    assert_same_state(unet, INDEX[folder]["keys"][name]["state"])
    assert_same_state(autoencoder, INDEX["ldm"]["keys"]["kl_f8"]["state"])


@pytest.mark.parametrize("folder, name", cases("schedules"))
def test_schedules(folder, name):
    case = INDEX[folder]["schedules"][name]
    args = case["args"]
    betas = make_beta_schedule(
        args["schedule"], args["n"], linear_start=args["start"], linear_end=args["end"]
    )
    agree(betas[:5], case["betas_head"], "first betas", rtol=1e-10)
    agree(betas[-5:], case["betas_tail"], "last betas", rtol=1e-10)
    alphas_cumprod = np.cumprod(1 - betas)
    assert alphas_cumprod[args["n"] // 2] == pytest.approx(case["alphas_cumprod_mid"], rel=1e-10)
    assert alphas_cumprod[-1] == pytest.approx(case["alphas_cumprod_last"], rel=1e-10)
    for steps in (10, 50, 200):
        tables = case[f"ddim{steps}"]
        timesteps = make_ddim_timesteps("uniform", steps, args["n"], verbose=False)
        assert timesteps.tolist() == tables["timesteps"]
        sigmas, alphas, before = make_ddim_sampling_parameters(alphas_cumprod, timesteps, 0.5, verbose=False)
        agree(sigmas, tables["sigmas"], "sigmas", rtol=1e-10)
        agree(alphas, tables["alphas"], "alphas", rtol=1e-10)
        agree(before, tables["alphas_prev"], "alphas_prev", rtol=1e-10)
