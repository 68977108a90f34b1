"""A pretrained generator as the encoder of a modality (MT-Diffusion, section 2.2.4, encoder 2)."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from guided_diffusion.errors import UserValueError
from guided_diffusion.seeding import PerSample
from ldm.checkpoint import is_weightless
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.base import frozen
from ldm.util import instantiate_from_config


class PretrainedGenerator(nn.Module):
    """The latent [B, C, h, w] that a trained latent diffusion draws for a value, always from the same noise.

    config: target and params of that model, in the same latent space; ckpt_path: its weights; steps: of DDIM; seed: of
    the noise; classes: values are probabilities [B, classes] of labels, encoded as the mixture of the classes'
    latents, which are drawn once; without, values are what its conditioner takes, such as vectors [B, D].
    UserValueError for a model that is conditioned on nothing.
    """

    def __init__(
        self, config: Mapping, ckpt_path: str | Path, steps: int = 25, seed: int = 0, classes: int = 0
    ):
        super().__init__()
        config = {**config, "params": {**config.get("params", {}), "ckpt_path": None}}
        self.model = frozen(instantiate_from_config(config, LatentDiffusion, "config"))
        if self.model.model.conditioning_key is None:
            raise UserValueError("a pretrained generator must be conditioned on what it encodes")
        if not is_weightless():
            self.model.init_from_ckpt(ckpt_path)
        self.steps, self.seed, self.classes = steps, seed, classes
        self.register_buffer("codes", torch.zeros(classes, *self.model.latent_shape))
        self.register_buffer("drawn", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        if not self.classes:
            return self._draw(value.float())
        if not self.drawn:
            for label in range(self.classes):
                labels = torch.tensor([label], device=self.codes.device)
                self.codes[label] = self._draw({self.model.cond_stage_key: labels})[0]
            self.drawn.fill_(True)
        return torch.einsum("bk,kchw->bchw", value.to(self.codes), self.codes)

    def _draw(self, raw):
        cond = self.model.get_learned_conditioning(raw)
        n = len(next(iter(raw.values())) if isinstance(raw, Mapping) else raw)
        noise = PerSample([self.seed] * n, self.codes.device).randn(self.model.latent_shape)
        with self.model.ema_scope():
            sample = DDIMSampler(self.model).sample
            return sample(self.steps, n, self.model.latent_shape, cond, eta=0.0, x_T=noise, verbose=False)[0]
