"""Between images and the latents that are diffused: the first stage, its scale, cached latents."""

import logging
from collections.abc import Mapping

import torch
from torch import nn

from guided_diffusion.errors import UserValueError
from guided_diffusion.seeding import PerSample
from ldm.modules.distributions.distributions import AbstractDistribution, DiagonalGaussianDistribution
from ldm.util import instantiate_from_config

_logger = logging.getLogger(__name__)


def frozen(module: nn.Module) -> nn.Module:
    """`module` in evaluation mode, its parameters without gradients."""
    return module.eval().requires_grad_(False)


def from_batch(batch: Mapping, key: str, what: str):
    """batch[key]; UserValueError that names `what` wants it."""
    if key not in batch:
        raise UserValueError(f"the batch has no {key!r} ({what}): it has {', '.join(map(repr, batch))}")
    return batch[key]


def channels_first(x: torch.Tensor) -> torch.Tensor:
    """Images [B, H, W, C] or [B, H, W] as float32 [B, C, H, W]."""
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4:
        raise UserValueError(f"images in a batch are [B, H, W, C] or [B, H, W], not {list(x.shape)}")
    return x.permute(0, 3, 1, 2).contiguous().float()


class FirstStageCoding:
    """Images <-> scaled latents, for a module with `first_stage_model` and `scale_factor`."""

    def instantiate_first_stage(self, config: Mapping) -> None:
        """Make `first_stage_model`, frozen."""
        self.first_stage_model = frozen(instantiate_from_config(config, nn.Module, "first_stage_config"))

    @torch.no_grad()
    def encode_first_stage(self, x: torch.Tensor):
        """What the first stage's encoder returns for images [B, C, H, W] in [-1, 1]: latents, or their
        distribution."""
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(self, encoder_posterior, random: PerSample | None = None) -> torch.Tensor:
        """Scaled latents [B, c, h, w]: a draw from the distribution by the generators `random` (None: the
        global one)."""
        return self.scale_factor * _draw(encoder_posterior, random)

    @torch.no_grad()
    def decode_first_stage(self, z: torch.Tensor, force_not_quantize: bool = False) -> torch.Tensor:
        """Images [B, C, H, W] of scaled latents [B, c, h, w]; force_not_quantize: see VQModelInterface."""
        return self.differentiable_decode_first_stage(z, force_not_quantize)

    def differentiable_decode_first_stage(
        self, z: torch.Tensor, force_not_quantize: bool = False
    ) -> torch.Tensor:
        """`decode_first_stage`, with gradients."""
        options = {"force_not_quantize": True} if force_not_quantize else {}
        return self.first_stage_model.decode(z / self.scale_factor, **options)

    def encode_images(self, images: torch.Tensor, random: PerSample | None = None) -> torch.Tensor:
        """Scaled latents of images [B, C, H, W]: draws by `random`, or the most probable ones."""
        return self.scale_factor * self._unscaled(self.encode_first_stage(images), random)

    def latents(self, batch: Mapping, key: str, random: PerSample | None = None) -> torch.Tensor:
        """Scaled latents [B, c, h, w] of a batch's images `key` [B, H, W, C], or of `key`_latent, cached.

        Cached means [B, c, h, w] are unscaled, and with `key`_latent_std beside them a distribution. random:
        draws from it; None takes the most probable ones.
        """
        if f"{key}_latent" not in batch:
            return self.encode_images(channels_first(from_batch(batch, key, "images")), random)
        mean = batch[f"{key}_latent"].float()
        std = batch.get(f"{key}_latent_std")
        drawn = mean if std is None or random is None else mean + std.float() * random.randn_like(mean)
        return self.scale_factor * drawn

    @staticmethod
    def _unscaled(posterior, random):
        if random is None and isinstance(posterior, AbstractDistribution):
            return posterior.mode()
        return _draw(posterior, random)

    @torch.no_grad()
    def measure_scale(self, latents: torch.Tensor) -> None:
        """Set scale_factor to 1 / the standard deviation of latents [B, c, h, w], of all ranks together."""
        flat = latents.flatten().double()
        moments = torch.stack([flat.mean(), flat.square().mean()])
        if self._trainer is not None:
            moments = self.all_gather(moments).reshape(-1, 2).mean(dim=0)
        std = float((moments[1] - moments[0] ** 2).sqrt())
        if not 0 < std < float("inf"):
            raise UserValueError(
                f"the first stage's latents have a standard deviation of {std}: scale_by_std cannot use them"
            )
        self.scale_factor.fill_(1 / std)
        _logger.info("scale_factor is %.6g, 1 / the standard deviation of the first batch", 1 / std)


def _draw(posterior, random):
    if isinstance(posterior, torch.Tensor):
        return posterior
    if random is not None and isinstance(posterior, DiagonalGaussianDistribution):
        return posterior.mean + posterior.std * random.randn_like(posterior.mean)
    if isinstance(posterior, AbstractDistribution):
        return posterior.sample()
    raise UserValueError(
        f"the first stage encodes to a {type(posterior).__name__}: expected latents or their distribution "
        "(for a VQModel take VQModelInterface)"
    )
