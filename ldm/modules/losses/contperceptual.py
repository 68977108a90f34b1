"""Loss of the KL autoencoder (interface: latent-diffusion, ldm/modules/losses/contperceptual.py)."""

from collections.abc import Mapping

import torch
from torch import nn

from ldm.modules.losses.adversarial import AdversarialLoss
from ldm.modules.losses.discriminator import NLayerDiscriminator


class DummyLoss(nn.Module):
    """No loss: of a first stage that is not trained."""


class LPIPSWithDiscriminator(AdversarialLoss):
    """Negative log likelihood of a Laplacian on pixels and perceptual distance, KL of the latents, adversary.

    logvar_init: log variance of the likelihood, which is not trained (as upstream: its optimizers leave it
    out); kl_weight: of the KL, small; pixelloss_weight: of the absolute error; other arguments as in
    `AdversarialLoss`. The likelihood and the KL are sums over an image, averaged over the batch.
    """

    def __init__(
        self,
        disc_start: int,
        logvar_init: float = 0.0,
        kl_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_loss: str = "hinge",
        perceptual_config: Mapping | None = None,
    ):
        discriminator = NLayerDiscriminator(disc_in_channels, 64, disc_num_layers, use_actnorm)
        adversary = (disc_start, disc_factor, disc_weight, disc_conditional, disc_loss, discriminator)
        super().__init__(*adversary, pixelloss_weight, perceptual_weight, perceptual_config)
        self.kl_weight = kl_weight
        self.logvar = nn.Parameter(torch.tensor(float(logvar_init)), requires_grad=False)

    def forward(
        self,
        inputs,
        reconstructions,
        posteriors,
        optimizer_idx,
        global_step,
        last_layer=None,
        cond=None,
        split="train",
        weights=None,
    ):
        """(loss, what is logged) of images and reconstructions [B, C, H, W].

        posteriors: with kl() [B]; optimizer_idx: 0 for the autoencoder, 1 for the discriminator; global_step:
        updates of the autoencoder so far; last_layer: its last weight; weights: of the likelihood, [B,
        1, 1, 1].
        """
        if optimizer_idx == 1:
            return self.discriminator_step(inputs, reconstructions, global_step, cond, split)
        rec_loss = self.pixel_weight * (inputs - reconstructions).abs()
        rec_loss = rec_loss + self.perceptual_weight * self.perceptual(inputs, reconstructions)
        nll = rec_loss / self.logvar.exp() + self.logvar
        weighted_nll = (nll if weights is None else weights * nll).sum() / len(inputs)
        nll_loss = nll.sum() / len(inputs)
        kl_loss = posteriors.kl().sum() / len(inputs)
        adversary, adversary_log = self.generator_term(
            nll_loss, reconstructions, global_step, last_layer, cond
        )
        loss = weighted_nll + self.kl_weight * kl_loss + adversary
        log = {
            "total_loss": loss.detach(),
            "logvar": self.logvar.detach(),
            "kl_loss": kl_loss.detach(),
            "nll_loss": nll_loss.detach(),
            "rec_loss": rec_loss.detach().mean(),
            **adversary_log,
        }
        return loss, {f"{split}/{key}": value for key, value in log.items()}
