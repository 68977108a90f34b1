"""Noise schedules, and the building blocks under latent-diffusion's names (interface:
ldm/modules/diffusionmodules/util.py)."""

import logging

import numpy as np
import torch

from guided_diffusion.errors import UserValueError
from guided_diffusion.gaussian_diffusion import betas_for_alpha_bar
from guided_diffusion.nn import (
    GroupNorm32,
    SiLU,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    mean_flat,
    normalization,
    scale_module,
    zero_module,
)
from guided_diffusion.nn import timestep_embedding as sinusoidal_embedding

__all__ = [
    "GroupNorm32",
    "SiLU",
    "avg_pool_nd",
    "betas_for_alpha_bar",
    "checkpoint",
    "conv_nd",
    "extract_into_tensor",
    "linear",
    "make_beta_schedule",
    "make_ddim_sampling_parameters",
    "make_ddim_timesteps",
    "mean_flat",
    "noise_like",
    "normalization",
    "scale_module",
    "timestep_embedding",
    "zero_module",
]

_logger = logging.getLogger(__name__)


def make_beta_schedule(
    schedule: str,
    n_timestep: int,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> np.ndarray:
    """The betas, float64 [n_timestep].

    schedule: `linear` (in sqrt(beta), unlike ADM's), `sqrt_linear` (in beta), `sqrt` (its square root), each
    from linear_start to linear_end, or `cosine` (`squaredcos_cap_v2`) with the offset cosine_s. `UserValueError` for another name.
    """
    if schedule == "linear":
        return np.linspace(linear_start**0.5, linear_end**0.5, n_timestep, dtype=np.float64) ** 2
    if schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64)
    if schedule == "sqrt":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64) ** 0.5
    if schedule in ("cosine", "squaredcos_cap_v2"):
        # Nichol & Dhariwal 2021, equation 17.
        return np.asarray(
            betas_for_alpha_bar(
                n_timestep, lambda s: np.cos((s + cosine_s) / (1 + cosine_s) * np.pi / 2) ** 2
            )
        )
    raise UserValueError(f"unknown beta schedule {schedule!r}: choose linear, cosine, sqrt_linear or sqrt")


def make_ddim_timesteps(
    ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int, verbose: bool = True
) -> np.ndarray:
    """The timesteps that DDIM keeps, int64, ascending.

    ddim_discr_method: `uniform` (every (T // steps)-th, so more than asked for where steps does not divide T)
    or `quad` (quadratically spaced, finer near the data). `UserValueError` for another method, or steps
    outside 1..T.
    """
    if not 1 <= num_ddim_timesteps <= num_ddpm_timesteps:
        raise UserValueError(
            f"{num_ddim_timesteps} sampling steps: choose between 1 and the {num_ddpm_timesteps} of training"
        )
    if ddim_discr_method == "uniform":
        steps = np.arange(0, num_ddpm_timesteps, num_ddpm_timesteps // num_ddim_timesteps)
    elif ddim_discr_method == "quad":
        steps = np.linspace(0, np.sqrt(0.8 * num_ddpm_timesteps), num_ddim_timesteps) ** 2
        steps = steps.astype(np.int64)
    else:
        raise UserValueError(f"unknown DDIM discretisation {ddim_discr_method!r}: choose uniform or quad")
    # One later, so that the last step of sampling, to alphas_cumprod[0], still removes noise; not where this
    # leaves
    # the schedule.
    steps = steps + (steps[-1] + 1 < num_ddpm_timesteps)
    if verbose:
        _logger.info("DDIM timesteps: %s", steps)
    return steps


def make_ddim_sampling_parameters(
    alphacums: np.ndarray, ddim_timesteps: np.ndarray, eta: float, verbose: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sigmas, alphas, alphas_prev) at the kept timesteps, float64.

    alphacums: alphas_cumprod [T]; eta: 0 deterministic, 1 as noisy as DDPM (Song et al. 2020, equation 16).
    """
    alphacums = np.asarray(alphacums, dtype=np.float64)
    alphas = alphacums[ddim_timesteps]
    alphas_prev = np.concatenate([alphacums[:1], alphas[:-1]])
    # sigma = eta sqrt((1 - abar_prev) / (1 - abar)) sqrt(1 - abar / abar_prev)
    sigmas = eta * np.sqrt((1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev))
    if verbose:
        _logger.info("DDIM with eta = %s: abar %s, before %s, sigma %s", eta, alphas, alphas_prev, sigmas)
    return sigmas, alphas, alphas_prev


def extract_into_tensor(a: torch.Tensor, t: torch.Tensor, x_shape: tuple[int, ...]) -> torch.Tensor:
    """a[t] shaped to multiply a batch of x_shape: table [T], t int64 [B] -> [B, 1, ...]."""
    return a[t].reshape(len(t), *[1] * (len(x_shape) - 1))


def timestep_embedding(timesteps, dim, max_period=10000, repeat_only=False):
    """Sinusoidal embedding, cosines first, or with `repeat_only` the bare timestep: [B] -> [B, dim]."""
    if repeat_only:
        return timesteps[:, None].expand(-1, dim)
    return sinusoidal_embedding(timesteps, dim, max_period)


def noise_like(shape: tuple[int, ...], device, repeat: bool = False) -> torch.Tensor:
    """Standard normal noise of `shape`; with `repeat` the same for every sample of the batch."""
    if not repeat:
        return torch.randn(shape, device=device)
    return torch.randn((1, *shape[1:]), device=device).expand(shape).clone()
