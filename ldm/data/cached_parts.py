"""The parts of a latent diffusion's configuration that a latent cache is made with."""

import torch

from guided_diffusion.errors import UserValueError
from ldm.checkpoint import load_weights
from ldm.data.latents import first_stage_weights
from ldm.util import instantiate_from_config


def open_first_stage(config: dict, ckpt: str) -> torch.nn.Module:
    """The first stage of a configuration with its weights. UserError where one of the two is missing."""
    try:
        params = dict(config["model"]["params"]["first_stage_config"])
    except (KeyError, TypeError):
        raise UserValueError("the configuration has no model.params.first_stage_config") from None
    if ckpt:
        params["params"] = {k: v for k, v in params.get("params", {}).items() if k != "ckpt_path"}
    first_stage = instantiate_from_config(params, torch.nn.Module, "first_stage_config")
    if ckpt:
        optional = ("loss.", "model_ema.", "colorize")
        load_weights(first_stage, first_stage_weights(ckpt), ckpt, optional=optional)
    elif list(first_stage.parameters()) and not params.get("params", {}).get("ckpt_path"):
        raise UserValueError("which weights does the first stage have? Give --ckpt")
    return first_stage.eval().requires_grad_(False)


def open_extractors(config: dict) -> dict[str, torch.nn.Module]:
    """The encoders of representations of a configuration, by name. UserError where there are none."""
    found = config["model"]["params"].get("extractors")
    if not isinstance(found, dict) or not found:
        raise UserValueError("the configuration has no model.params.extractors, which make representations")
    return {
        name: instantiate_from_config(given, torch.nn.Module, f"extractors.{name}")
        .eval()
        .requires_grad_(False)
        for name, given in found.items()
    }
