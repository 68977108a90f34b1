"""What the losses of both autoencoders share: perceptual distance, discriminator and the balance between the
two (Esser et al. 2021, section 3.1)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from guided_diffusion.errors import UserError, UserValueError
from ldm.checkpoint import is_weightless
from ldm.util import instantiate_from_config

# The perceptual network comes in by configuration, so that nothing here depends on the evaluations.
_LPIPS = {"target": "evaluations.lpips.load_lpips", "params": {"net": "vgg", "device": "cpu"}}

# Keeps the balance finite where the discriminator's gradient vanishes; its largest value.
_DELTA, _LARGEST_WEIGHT = 1e-4, 1e4


def hinge_d_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    """(E[max(0, 1 - real)] + E[max(0, 1 + fake)]) / 2."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    """(-E[log sigmoid(real)] - E[log(1 - sigmoid(fake))]) / 2."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


DISCRIMINATOR_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}


def adopt_weight(weight: float, global_step: int, threshold: int = 0, value: float = 0.0) -> float:
    """`weight` from step `threshold` on, `value` before."""
    return value if global_step < threshold else weight


class AdversarialLoss(nn.Module):
    """Perceptual distance and discriminator, with the arguments that both losses have.

    disc_start: the generator's updates before the discriminator joins (until then it is neither run nor
    trained); perceptual_weight: 0 makes no perceptual network; perceptual_config: target and params of the
    network, a module (a, b in [-1, 1] [B, 3, H, W]) -> distance [B]; by default LPIPS on VGG-16 with its
    published weights, downloaded once. `UserValueError` for an unknown disc_loss and for weights that
    cannot be had.
    """

    def __init__(
        self,
        disc_start: int,
        disc_factor: float,
        disc_weight: float,
        disc_conditional: bool,
        disc_loss: str,
        discriminator: nn.Module,
        pixelloss_weight: float,
        perceptual_weight: float,
        perceptual_config: Mapping | None,
    ):
        super().__init__()
        if disc_loss not in DISCRIMINATOR_LOSSES:
            known = ", ".join(DISCRIMINATOR_LOSSES)
            raise UserValueError(f"disc_loss is one of {known}; got {disc_loss!r}")
        self.pixel_weight = pixelloss_weight
        self.perceptual_weight = perceptual_weight
        if perceptual_weight > 0:
            self.perceptual_loss = _perceptual_network(perceptual_config or _LPIPS)
        self.discriminator = discriminator
        self.discriminator_iter_start = disc_start
        self.disc_loss = DISCRIMINATOR_LOSSES[disc_loss]
        self.disc_factor = disc_factor
        self.discriminator_weight = disc_weight
        self.disc_conditional = disc_conditional

    def adversarial_at(self, global_step: int) -> bool:
        """Whether the discriminator takes part at this step."""
        return adopt_weight(self.disc_factor, global_step, self.discriminator_iter_start) > 0

    def perceptual(self, inputs: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        """Perceptual distance per image [B, 1, 1, 1]; 0 where perceptual_weight is."""
        if self.perceptual_weight > 0:
            return self.perceptual_loss(inputs.contiguous(), reconstructions.contiguous()).view(-1, 1, 1, 1)
        return inputs.new_zeros(len(inputs), 1, 1, 1)

    def calculate_adaptive_weight(
        self, nll_loss: torch.Tensor, g_loss: torch.Tensor, last_layer: nn.Parameter
    ) -> torch.Tensor:
        """disc_weight * |d nll / d last_layer| / (|d g / d last_layer| + 1e-4), the ratio at most 1e4
        (VQGAN, eq. 7)."""
        (of_nll,) = torch.autograd.grad(nll_loss, last_layer, retain_graph=True)
        (of_g,) = torch.autograd.grad(g_loss, last_layer, retain_graph=True)
        ratio = of_nll.norm() / (of_g.norm() + _DELTA)
        return ratio.clamp(0.0, _LARGEST_WEIGHT).detach() * self.discriminator_weight

    def generator_term(self, nll_loss, reconstructions, global_step, last_layer, cond):
        """(what fooling the discriminator adds to the loss, and for the log: d_weight, disc_factor, g_loss).

        Without gradients (validation) there is no balance to find: d_weight is 0, as upstream.
        """
        nothing = nll_loss.new_zeros(())
        if not self.adversarial_at(global_step):
            return nothing, {"d_weight": nothing, "disc_factor": nothing, "g_loss": nothing}
        g_loss = -self._logits(reconstructions.contiguous(), cond).mean()
        if torch.is_grad_enabled():
            d_weight = self.calculate_adaptive_weight(nll_loss, g_loss, last_layer)
        else:
            d_weight = nothing
        factor = nll_loss.new_tensor(self.disc_factor)
        log = {"d_weight": d_weight, "disc_factor": factor, "g_loss": g_loss.detach()}
        return d_weight * factor * g_loss, log

    def discriminator_step(self, inputs, reconstructions, global_step, cond, split):
        """(the discriminator's loss, what is logged): it learns to tell images from reconstructions."""
        if not self.adversarial_at(global_step):
            nothing = inputs.new_zeros(())
            return nothing, {f"{split}/{key}": nothing for key in ("disc_loss", "logits_real", "logits_fake")}
        real = self._logits(inputs.contiguous().detach(), cond)
        fake = self._logits(reconstructions.contiguous().detach(), cond)
        loss = self.disc_factor * self.disc_loss(real, fake)
        return loss, {
            f"{split}/disc_loss": loss.detach(),
            f"{split}/logits_real": real.detach().mean(),
            f"{split}/logits_fake": fake.detach().mean(),
        }

    def _logits(self, images, cond):
        if self.disc_conditional != (cond is not None):
            raise UserValueError(
                "disc_conditional: true needs a condition, which this model does not give its loss"
                if self.disc_conditional
                else "a loss without disc_conditional takes no condition"
            )
        return self.discriminator(images if cond is None else torch.cat((images, cond), dim=1))


class _ScalingLayer(nn.Module):
    """Holds the constants of LPIPS's input scaling under the names that released checkpoints give them."""

    def __init__(self, shift: torch.Tensor, scale: torch.Tensor):
        super().__init__()
        self.register_buffer("shift", shift.clone())
        self.register_buffer("scale", scale.clone())


def _perceptual_network(config: Mapping) -> nn.Module:
    """The frozen network of `config`, in evaluation mode."""
    if is_weightless() and config is _LPIPS:
        config = {"target": "evaluations.lpips.LPIPS", "params": {"net": "vgg"}}
    try:
        network = instantiate_from_config(config, nn.Module, "perceptual_config")
    except UserError as error:
        raise UserValueError(f"the perceptual loss (perceptual_config): {error}") from error
    if hasattr(network, "shift") and hasattr(network, "scale"):
        network.scaling_layer = _ScalingLayer(network.shift, network.scale)
    return network.eval().requires_grad_(False)
