"""Loss of the VQ autoencoder (interface: latent-diffusion, ldm/modules/losses/vqperceptual.py)."""

from collections.abc import Mapping

import torch

from guided_diffusion.errors import UserValueError
from ldm.modules.losses.adversarial import (
    AdversarialLoss,
    adopt_weight,
    hinge_d_loss,
    vanilla_d_loss,
)
from ldm.modules.losses.contperceptual import DummyLoss
from ldm.modules.losses.discriminator import NLayerDiscriminator

__all__ = [
    "DummyLoss",
    "VQLPIPSWithDiscriminator",
    "adopt_weight",
    "hinge_d_loss",
    "l1",
    "l2",
    "measure_perplexity",
    "vanilla_d_loss",
]


def l1(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """|x - y|, element by element."""
    return (x - y).abs()


def l2(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(x - y)^2, element by element."""
    return (x - y) ** 2


_PIXEL_LOSSES = {"l1": l1, "l2": l2}


def measure_perplexity(predicted_indices: torch.Tensor, n_embed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(perplexity of the codebook's use, n_embed if all entries are used alike; number of entries used)."""
    counts = torch.bincount(predicted_indices.flatten(), minlength=n_embed)
    p = counts.float() / counts.sum()
    return (-(p * (p + 1e-10).log()).sum()).exp(), (counts > 0).sum()


class VQLPIPSWithDiscriminator(AdversarialLoss):
    """Pixel and perceptual distance, the codebook's loss, adversary.

    codebook_weight: of the codebook's loss; pixelloss_weight: of the pixel distance, pixel_loss: l1 or l2;
    n_classes: size of the codebook, to log its use; perceptual_loss: the name lpips (another network comes by
    perceptual_config); disc_ndf: width of the discriminator; other arguments as in `AdversarialLoss`.
    """

    def __init__(
        self,
        disc_start: int,
        codebook_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_ndf: int = 64,
        disc_loss: str = "hinge",
        n_classes: int | None = None,
        perceptual_loss: str = "lpips",
        pixel_loss: str = "l1",
        perceptual_config: Mapping | None = None,
    ):
        if perceptual_loss != "lpips":
            raise UserValueError(
                f"perceptual_loss is lpips, got {perceptual_loss!r}; "
                "name another network in perceptual_config"
            )
        if pixel_loss not in _PIXEL_LOSSES:
            raise UserValueError(f"pixel_loss is l1 or l2, got {pixel_loss!r}")
        discriminator = NLayerDiscriminator(disc_in_channels, disc_ndf, disc_num_layers, use_actnorm)
        adversary = (disc_start, disc_factor, disc_weight, disc_conditional, disc_loss, discriminator)
        super().__init__(*adversary, pixelloss_weight, perceptual_weight, perceptual_config)
        self.codebook_weight = codebook_weight
        self.n_classes = n_classes
        self.pixel_loss = _PIXEL_LOSSES[pixel_loss]

    def forward(
        self,
        codebook_loss,
        inputs,
        reconstructions,
        optimizer_idx,
        global_step,
        last_layer=None,
        cond=None,
        split="train",
        predicted_indices=None,
    ):
        """(loss, what is logged); as in `LPIPSWithDiscriminator`, but a mean over elements, not a sum.

        predicted_indices: of the codebook's entries, whose use is logged where n_classes is given.
        """
        if optimizer_idx == 1:
            return self.discriminator_step(inputs, reconstructions, global_step, cond, split)
        p_loss = self.perceptual(inputs, reconstructions)
        rec_loss = self.pixel_weight * self.pixel_loss(inputs, reconstructions)
        rec_loss = rec_loss + self.perceptual_weight * p_loss
        nll_loss = rec_loss.mean()
        adversary, adversary_log = self.generator_term(
            nll_loss, reconstructions, global_step, last_layer, cond
        )
        loss = nll_loss + adversary + self.codebook_weight * codebook_loss.mean()
        log = {
            "total_loss": loss.detach(),
            "quant_loss": codebook_loss.detach().mean(),
            "nll_loss": nll_loss.detach(),
            "rec_loss": nll_loss.detach(),
            "p_loss": p_loss.detach().mean(),
            **adversary_log,
        }
        if predicted_indices is not None and self.n_classes is not None:
            used = measure_perplexity(predicted_indices, self.n_classes)
            log |= dict(zip(("perplexity", "cluster_usage"), (value.float() for value in used), strict=True))
        return loss, {f"{split}/{key}": value for key, value in log.items()}
