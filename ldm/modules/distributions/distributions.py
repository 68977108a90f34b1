"""Distributions over latents (interface: latent-diffusion, ldm/modules/distributions/distributions.py)."""

import math
from abc import ABC, abstractmethod

import torch

from guided_diffusion.errors import UserValueError
from guided_diffusion.losses import normal_kl
from guided_diffusion.seeding import PerSample

__all__ = ["AbstractDistribution", "DiracDistribution", "DiagonalGaussianDistribution", "draw", "normal_kl"]


class AbstractDistribution(ABC):
    """What an encoder returns: something to draw from, with a most probable value."""

    @abstractmethod
    def sample(self) -> torch.Tensor:
        """One draw."""

    @abstractmethod
    def mode(self) -> torch.Tensor:
        """The most probable value."""


class DiracDistribution(AbstractDistribution):
    """All mass on `value`."""

    def __init__(self, value: torch.Tensor):
        self.value = value

    def sample(self):
        return self.value

    def mode(self):
        return self.value


class DiagonalGaussianDistribution(AbstractDistribution):
    """Independent Gaussians, one per element.

    parameters: means and log variances, concatenated on channels [B, 2C, ...]; log variances are clamped to
    [-30, 20]. deterministic: all mass on the mean.
    """

    def __init__(self, parameters: torch.Tensor, deterministic: bool = False):
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.zeros_like(self.mean) if deterministic else (0.5 * self.logvar).exp()
        self.var = self.std**2

    def sample(self):
        """One draw [B, C, ...], with torch's generator of the parameters' device."""
        return self.mean + self.std * torch.randn_like(self.mean)

    def mode(self):
        """The mean [B, C, ...]."""
        return self.mean

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> torch.Tensor:
        """KL(self || other, else N(0, I)) per sample, [B] in nats; 0 where deterministic."""
        if self.deterministic:
            return self.mean.new_zeros(1)
        mean, logvar = (0.0, 0.0) if other is None else (other.mean, other.logvar)
        return normal_kl(self.mean, self.logvar, mean, logvar).flatten(1).sum(dim=1)

    def nll(self, sample: torch.Tensor, dims: tuple[int, ...] = (1, 2, 3)) -> torch.Tensor:
        """-log p(sample) summed over `dims`, in nats; 0 where deterministic."""
        if self.deterministic:
            return self.mean.new_zeros(1)
        # -log N(x; mean, var) = (log 2 pi + log var + (x - mean)^2 / var) / 2
        squares = (sample - self.mean) ** 2 / self.var
        return 0.5 * (math.log(2 * math.pi) + self.logvar + squares).sum(dim=tuple(dims))


def draw(encoded, random: PerSample | None) -> torch.Tensor:
    """Latents of what a first stage's encoder returns: latents, or a draw from their distribution by the generators
    `random` (None: the global one)."""
    if isinstance(encoded, torch.Tensor):
        return encoded
    if random is not None and isinstance(encoded, DiagonalGaussianDistribution):
        return encoded.mean + encoded.std * random.randn_like(encoded.mean)
    if isinstance(encoded, AbstractDistribution):
        return encoded.sample()
    raise UserValueError(
        f"the first stage encodes to a {type(encoded).__name__}: expected latents or their distribution "
        "(for a VQModel take VQModelInterface)"
    )
