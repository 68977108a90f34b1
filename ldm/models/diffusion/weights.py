"""Weights to start from, for the diffusion models."""

from collections.abc import Mapping

import torch

from guided_diffusion.errors import UserError
from ldm.checkpoint import load_state_dict, load_weights
from ldm.diffusers_layout import parameterization
from ldm.models.diffusion.schedule import TABLES
from ldm.modules.ema import LitEma


class StartingWeights:
    """`init_from_ckpt`, for a module with `model`, `betas` and, with use_ema, `model_ema`."""

    def init_from_ckpt(self, path, ignore_keys=(), only_model=False) -> None:
        """Take the weights of a .ckpt or .safetensors file, but none whose name starts with one of
        `ignore_keys`; only_model: the U-Net's alone.

        The file may lack the moving average, which then starts at the weights, and the tables of the
        schedule. `path` may be a folder in diffusers' layout. UserError if it belongs to another model, another
        noise schedule or another parameterization.
        """
        told = parameterization(path)
        if told not in (None, self.parameterization):
            raise UserError(
                f"the network of {path} predicts {told}, the configuration says {self.parameterization}: set "
                "parameterization"
            )
        weights = self.adapt_weights(load_state_dict(path))
        betas = weights.get("betas")
        if not only_model and betas is not None and not _same_table(betas, self.betas):
            raise UserError(f"{path} was trained with another noise schedule than the configuration says")
        if only_model:
            # In the file the network is `model.diffusion_model`, or alone.
            weights = {name.removeprefix("model."): value for name, value in weights.items()}
            weights = {name: value for name, value in weights.items() if name.startswith("diffusion_model.")}
            load_weights(self.model, weights, path, ignore_keys, self.optional_weights(weights, ""))
        else:
            load_weights(self, weights, path, ignore_keys, self.optional_weights(weights, "model."))
        if self.use_ema and (only_model or not any(name.startswith("model_ema.") for name in weights)):
            self.model_ema = LitEma(self.model)

    def adapt_weights(self, weights: dict) -> dict:
        """A checkpoint's tensors by name, as this model has them."""
        return weights

    def optional_weights(self, weights: Mapping, prefix: str) -> tuple[str, ...]:
        """Prefixes of names that a checkpoint may lack; prefix: of the wrapped network's names."""
        return ("model_ema.", "logvar", "scale_factor", *TABLES)


def _same_table(table, own):
    return table.shape == own.shape and torch.allclose(table.float().cpu(), own.cpu(), rtol=1e-3, atol=1e-7)
