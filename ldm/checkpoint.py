"""Weights in latent-diffusion's layout, from .ckpt or .safetensors files, or from diffusers' folders."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from guided_diffusion import checkpoint_util
from ldm.diffusers_layout import load_folder

_logger = logging.getLogger(__name__)


def is_weightless() -> bool:
    """Are modules being made on the meta device (`with torch.device("meta")`)? Then no weights are read, so that a
    configuration's network can be looked at without them."""
    return torch.empty(0).device.type == "meta"


def load_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, on the CPU.

    path: of a file, or of a folder in diffusers' layout. `UserError` as of `checkpoint_util.read`.
    """
    if Path(path).is_dir():
        return load_folder(path, load_state_dict)
    return checkpoint_util.read_weights(path)


def trained_steps(path: str | Path) -> int:
    """How many updates a checkpoint of a training run has seen; 0 for weights alone."""
    content = {} if Path(path).is_dir() else checkpoint_util.read(path)
    steps = content.get("global_step", 0) if isinstance(content, Mapping) else 0
    return steps if isinstance(steps, int) else 0


def load_weights(
    module: nn.Module,
    weights: Mapping[str, torch.Tensor],
    source: str | Path,
    ignore_keys: Iterable[str] = (),
    optional: Iterable[str] = (),
) -> None:
    """Fill `module` from `weights`, which were read from `source`.

    ignore_keys: prefixes of names in the file to leave out; optional: prefixes of names in the module that
    the file may lack. What the module does not know is left out, and logged. A file with the moving average alone gives
    the network that. `UserError` as of `checkpoint_util.load_weights`.
    """
    if not any(name.startswith("model.") for name in weights):
        averages = {
            name: weights.get("model_ema." + name.removeprefix("model.").replace(".", ""))
            for name in module.state_dict()
            if name.startswith("model.")
        }
        weights = {**weights, **{name: value for name, value in averages.items() if value is not None}}
    unknown = checkpoint_util.load_weights(module, weights, source, ignore_keys, optional, strict=False)
    if unknown:
        _logger.warning("%s: %d tensors are not used (first: %s)", source, len(unknown), unknown[0])
