"""Conditions that are noised before the U-Net sees them, and is told how far (interface and state-dict keys: Stable
Diffusion 2, ldm/modules/diffusionmodules/upscaling.py; Ho et al. 2021)."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from guided_diffusion import checkpoint_util
from guided_diffusion.errors import UserFileError
from guided_diffusion.seeding import PerSample
from ldm.checkpoint import is_weightless
from ldm.models.diffusion.sampling import TABLES, make_diffusion, noise_betas, tables
from ldm.modules.diffusionmodules.util import extract_into_tensor, timestep_embedding


class AbstractLowScaleModel(nn.Module):
    """A condition as it is: x -> (x, None). noise_schedule_config: arguments of make_beta_schedule, and timesteps."""

    def __init__(self, noise_schedule_config: Mapping | None = None):
        super().__init__()
        if noise_schedule_config is not None:
            self.register_schedule(**noise_schedule_config)

    def register_schedule(
        self, beta_schedule="linear", timesteps=1000, linear_start=1e-4, linear_end=2e-2, cosine_s=8e-3
    ):
        """Make the tables, float32 [T], that checkpoints hold."""
        betas = noise_betas(None, beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        self.num_timesteps, made = timesteps, tables(make_diffusion(betas, "eps"))
        for name in TABLES[:8]:  # those of noising alone
            self.register_buffer(name, made[name])

    def q_sample(self, x_start, t, noise=None):
        """x_t of x_0."""
        signal, spread = (
            extract_into_tensor(table, t, x_start.shape)
            for table in (self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod)
        )
        return signal * x_start + spread * (torch.randn_like(x_start) if noise is None else noise)

    def forward(self, x):
        return x, None

    def decode(self, x):
        """x itself."""
        return x


class ImageConcatWithNoiseAugmentation(AbstractLowScaleModel):
    """x [B, ...] -> (x noised, its levels int64 [B]): those given, or any below max_noise_level. random: generators of
    the samples (None: the global one). to_cuda has no effect: the tables are where the module is."""

    def __init__(self, noise_schedule_config, max_noise_level=1000, to_cuda=False):
        super().__init__(noise_schedule_config)
        self.max_noise_level = max_noise_level

    def forward(self, x, noise_level=None, random: PerSample | None = None):
        if noise_level is None:
            bound, n = self.max_noise_level, len(x)
            noise_level = torch.randint(bound, (n,)) if random is None else random.randint(bound)
        noise_level = noise_level.to(x.device)
        return self.q_sample(x, noise_level, None if random is None else random.randn_like(x)), noise_level


class SimpleImageConcat(AbstractLowScaleModel):
    """No noise: x -> (x, level 0)."""

    max_noise_level = 0

    def forward(self, x, noise_level=None, random: PerSample | None = None):
        return x, x.new_zeros(len(x), dtype=torch.long)


class Timestep(nn.Module):
    """Sinusoidal embedding: [B] -> [B, dim]."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, t):
        return timestep_embedding(t, self.dim)


class CLIPEmbeddingNoiseAugmentation(ImageConcatWithNoiseAugmentation):
    """Image embeddings [B, D] -> (noised in standard form, embedding of their level [B, timestep_dim]).

    clip_stats_path: file with (mean, deviation) [D] of the standard form, without it 0 and 1. Others as in
    ImageConcatWithNoiseAugmentation. UserFileError if the file has something else.
    """

    def __init__(self, *args, clip_stats_path=None, timestep_dim=256, **kwargs):
        super().__init__(*args, **kwargs)
        mean, std = torch.zeros(timestep_dim), torch.ones(timestep_dim)
        if clip_stats_path is not None and not is_weightless():
            mean, std = _statistics(clip_stats_path)
        self.register_buffer("data_mean", mean[None], persistent=False)
        self.register_buffer("data_std", std[None], persistent=False)
        self.time_embed = Timestep(timestep_dim)

    def scale(self, x):
        """Into standard form."""
        return (x - self.data_mean) / self.data_std

    def unscale(self, x):
        """Back out of it."""
        return x * self.data_std + self.data_mean

    def forward(self, x, noise_level=None, random: PerSample | None = None):
        z, level = super().forward(self.scale(x), noise_level, random)
        return self.unscale(z), self.time_embed(level)


def _statistics(path: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    content = checkpoint_util.read(path)
    if isinstance(content, (list, tuple)) and len(content) == 2 and all(map(torch.is_tensor, content)):
        return content[0].float().flatten(), content[1].float().flatten()
    raise UserFileError(f"clip_stats_path: {path} does not hold two tensors, the mean and the deviation")
