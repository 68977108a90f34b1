"""What the network predicts: the noise (eps), the latent (x0) or the velocity v = sqrt(abar_t) eps - sqrt(1 -
abar_t) x_0 (Salimans & Ho 2022; Stable Diffusion 2.1-v); the process, its tables and its loss weights for each.
"""

from collections.abc import Iterable

import numpy as np
import torch

from guided_diffusion.errors import UserValueError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from guided_diffusion.respace import SpacedDiffusion
from ldm.modules.diffusionmodules.util import make_beta_schedule

PARAMETERIZATIONS = ("eps", "x0", "v")

# Buffers that checkpoints hold, in their order; GaussianDiffusion has them under the same names.
TABLES = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


def noise_betas(
    given_betas=None,
    beta_schedule="linear",
    timesteps=1000,
    linear_start=1e-4,
    linear_end=2e-2,
    cosine_s=8e-3,
) -> np.ndarray:
    """The betas that a configuration's parameters mean, float64 [T]."""
    if given_betas is not None:
        return np.asarray(given_betas, dtype=np.float64)
    return make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)


def make_diffusion(
    betas: np.ndarray,
    parameterization: str,
    aggregation=None,
    kept: Iterable[int] | None = None,
) -> GaussianDiffusion:
    """The process of `betas` [T], or with the same marginals over the timesteps `kept`; aggregation: of the
    modalities in it, if any.

    A network that predicts v is seen as one of eps (`Denoiser`). UserValueError for an unknown
    parameterization.
    """
    if parameterization not in PARAMETERIZATIONS:
        raise UserValueError(
            f"unknown parameterization {parameterization!r}: choose one of {', '.join(PARAMETERIZATIONS)}"
        )
    mean_type = ModelMeanType.START_X if parameterization == "x0" else ModelMeanType.EPSILON
    options = dict(
        betas=betas,
        model_mean_type=mean_type,
        model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=LossType.MSE,
    )
    if aggregation is not None:
        options["aggregation"] = aggregation
    return GaussianDiffusion(**options) if kept is None else SpacedDiffusion(kept, **options)


def tables(diffusion: GaussianDiffusion) -> dict[str, torch.Tensor]:
    """The buffers that a checkpoint holds, float32 [T], by name in their order."""
    arrays = {name: getattr(diffusion, name) for name in TABLES}
    # Here the logarithm at t = 0, where the variance is 0, has a floor of its own.
    arrays["posterior_log_variance_clipped"] = np.log(diffusion.posterior_variance.clip(min=1e-20))
    return {name: torch.tensor(table, dtype=torch.float32) for name, table in arrays.items()}


def elbo_weights(diffusion: GaussianDiffusion, parameterization: str) -> torch.Tensor:
    """How the squared error counts in the variational bound at each timestep, float32 [T].

    eps: beta^2 / (2 sigma^2 alpha (1 - abar)) (Ho et al. 2020, equation 12), t = 0 taking the next one's; x0:
    upstream's sqrt(abar) / (2 (2 - abar)); v: 1.
    """
    abar, betas = diffusion.alphas_cumprod, diffusion.betas
    if parameterization == "v":
        weights = np.ones_like(betas)
    elif parameterization == "x0":
        weights = 0.5 * np.sqrt(abar) / (2 - abar)
    else:
        variance = np.append(np.nan, diffusion.posterior_variance[1:])
        weights = betas**2 / (2 * variance * (1 - betas) * (1 - abar))
    if len(weights) > 1:
        weights[0] = weights[1]
    return torch.tensor(np.nan_to_num(weights), dtype=torch.float32)


def min_snr_weights(diffusion: GaussianDiffusion, parameterization: str, gamma: float) -> torch.Tensor:
    """How the squared error counts at each timestep so that the error of x_0 counts min(SNR, gamma), float32
    [T] (Hang et al. 2023, section 3.4); SNR = abar / (1 - abar).

    eps: min(SNR, gamma) / SNR; x0: min(SNR, gamma); v: min(SNR, gamma) / (SNR + 1).
    """
    snr = diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod)
    per_error = {"eps": snr, "x0": np.ones_like(snr), "v": snr + 1}[parameterization]
    return torch.tensor(np.minimum(snr, gamma) / per_error, dtype=torch.float32)


class Denoiser:
    """A latent diffusion's network as guided_diffusion calls it: (z, timesteps, **conditioning) -> noise, or
    x_0, with the heads' predictions where it has heads.

    model: a LatentDiffusion; timesteps are those of the full process. A velocity becomes the noise
    sqrt(abar_t) v + sqrt(1 - abar_t) z_t, in float32.
    """

    def __init__(self, model):
        self.model, self.wrapper = model, model.model

    def __call__(self, z: torch.Tensor, timesteps: torch.Tensor, **conditioning):
        output = self.wrapper(z, timesteps, **conditioning)
        if self.model.parameterization != "v":
            return output
        v, predictions = output if isinstance(output, tuple) else (output, None)
        latent = z[:, : v.shape[1]].float()  # beside it there may be modalities, as further channels
        eps = self.model.predict_eps_from_z_and_v(latent, timesteps, v.float())
        return eps if predictions is None else (eps, predictions)

    codes = None  # here codes do not stand still

    @property
    def heads(self):
        """The heads of the modalities, by name."""
        return self.wrapper.heads

    @property
    def training(self) -> bool:
        """Is the network in training mode?"""
        return self.wrapper.training

    def parameters(self):
        """The network's."""
        return self.wrapper.parameters()

    def eval(self):
        """Put the network into evaluation mode."""
        return self.train(False)

    def train(self, mode: bool = True):
        """Put the network into training mode, or out of it."""
        self.wrapper.train(mode)
        return self
