"""How autoencoders are trained: two optimizers, one for the autoencoder and one for the discriminator of its
loss (as latent-diffusion, ldm/models/autoencoder.py).

Both are stepped by hand in one training step. One reconstruction serves both: the discriminator is trained on
what the autoencoder made before its own update. The trainer's `global_step` counts updates of the autoencoder
alone, so that `disc_start` and `max_steps` mean what they mean upstream.
"""

import contextlib
from collections.abc import Mapping

import pytorch_lightning as pl
import torch
from torch import nn

from guided_diffusion.errors import UserValueError
from ldm.util import Schedule, instantiate_from_config

_BETAS = (0.5, 0.9)


class FirstStageTraining(pl.LightningModule):
    """The training of an autoencoder that has `loss`, `encoder`, `decoder`, quant_conv and post_quant_conv.

    learning_rate: of both optimizers, set by who trains it; lr_g_factor: of the autoencoder's rate;
    scheduler_config: target with a method schedule(step) that multiplies the rates; use_ema: keep a moving
    average `model_ema`. accumulate_grad_batches and gradient_clip_val are here what they are for Lightning's
    trainer, which refuses them for models that step by hand.
    """

    learning_rate: float
    lr_g_factor = 1.0
    scheduler_config: Mapping | None = None
    use_ema = False
    accumulate_grad_batches = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm = "norm"

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def loss_arguments(self, x: torch.Tensor) -> tuple[tuple, dict]:
        """Arguments of the loss for images [B, C, H, W]: (positional ones before optimizer_idx,
        keywords)."""
        raise NotImplementedError

    def generator_modules(self) -> list[nn.Module]:
        """What the autoencoder's optimizer trains."""
        return [self.encoder, self.decoder, self.quant_conv, self.post_quant_conv]

    def configure_optimizers(self):
        """Adam for the autoencoder, and Adam for the discriminator. `UserValueError` if the loss has none."""
        if not hasattr(self.loss, "discriminator"):
            raise UserValueError(
                f"this {type(self).__name__} cannot be trained: its lossconfig ({type(self.loss).__name__}) "
                "is no training loss; give ldm.modules.losses.LPIPSWithDiscriminator, for example"
            )
        generator = [p for module in self.generator_modules() for p in module.parameters()]
        rates = (self.lr_g_factor * self.learning_rate, self.learning_rate)
        groups = (generator, self.loss.discriminator.parameters())
        optimizers = [
            torch.optim.Adam(group, lr=lr, betas=_BETAS) for group, lr in zip(groups, rates, strict=True)
        ]
        if self.scheduler_config is None:
            return optimizers
        schedule = instantiate_from_config(self.scheduler_config, Schedule, "scheduler_config").schedule
        schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
        return optimizers, [{"scheduler": s, "interval": "step", "frequency": 1} for s in schedulers]

    def training_step(self, batch, batch_idx):
        """One update of the autoencoder, and of the discriminator once it takes part."""
        generator, discriminator = self.optimizers()
        step, update = self.global_step, self._completes_an_update(batch_idx)
        x = self.get_input(batch, self.image_key)
        arguments, keywords = self.loss_arguments(x)

        def loss_of(optimizer_idx):
            return self.loss(
                *arguments, optimizer_idx, step, last_layer=self.get_last_layer(), split="train", **keywords
            )

        with self._only(generator):
            aeloss, log = loss_of(0)
            self._backward(aeloss, generator, update)
            if update:
                generator.step()
                generator.zero_grad()
        self.log("aeloss", aeloss.detach(), prog_bar=True, on_step=True, on_epoch=True, batch_size=len(x))
        self.log_dict(log, on_step=True, on_epoch=False, batch_size=len(x))
        if self.loss.adversarial_at(step):
            with self._only(discriminator):
                discloss, log = loss_of(1)
                self._backward(discloss, discriminator, update)
                if update:
                    # torch's own optimizer: Lightning would count its steps into global_step.
                    discriminator.optimizer.step()
                    discriminator.zero_grad()
            self.log(
                "discloss", discloss.detach(), prog_bar=True, on_step=True, on_epoch=True, batch_size=len(x)
            )
            self.log_dict(log, on_step=True, on_epoch=False, batch_size=len(x))
        if update:
            self.after_update()

    def after_update(self) -> None:
        """What follows every update: the learning rates' schedules and the moving average."""
        # Not in on_train_batch_end: callbacks, checkpoints among them, come before that hook.
        schedulers = self.lr_schedulers() if self.scheduler_config is not None else ()
        for scheduler in schedulers:
            scheduler.step()
        if self.use_ema:
            self.model_ema(self)

    def validation_step(self, batch, batch_idx):
        """Logs val/..., and with a moving average also val_ema/..., its own figures."""
        self._validate(batch, "val")
        if self.use_ema:
            with self.ema_scope():
                self._validate(batch, "val_ema")

    @contextlib.contextmanager
    def ema_scope(self, context=None):
        """Inside, the weights are the moving average's (where there is one)."""
        if not self.use_ema:
            yield
            return
        self.model_ema.store(self.parameters())
        self.model_ema.copy_to(self)
        try:
            yield
        finally:
            self.model_ema.restore(self.parameters())

    def _validate(self, batch, split):
        x = self.get_input(batch, self.image_key)
        arguments, keywords = self.loss_arguments(x)
        options = dict(last_layer=self.get_last_layer(), split=split, **keywords)
        aeloss, log = self.loss(*arguments, 0, self.global_step, **options)
        _, disc_log = self.loss(*arguments, 1, self.global_step, **options)
        self.log(
            f"{split}/rec_loss",
            log.pop(f"{split}/rec_loss"),
            prog_bar=True,
            sync_dist=True,
            batch_size=len(x),
        )
        self.log(f"{split}/aeloss", aeloss, sync_dist=True, batch_size=len(x))
        self.log_dict(log | disc_log, sync_dist=True, batch_size=len(x))

    @contextlib.contextmanager
    def _only(self, optimizer):
        """Inside, only this optimizer's parameters collect gradients."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def _completes_an_update(self, batch_idx):
        return (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch

    def _backward(self, loss, optimizer, update):
        self.manual_backward(loss / self.accumulate_grad_batches)
        if update and self.gradient_clip_val:
            self.clip_gradients(
                optimizer,
                gradient_clip_val=self.gradient_clip_val,
                gradient_clip_algorithm=self.gradient_clip_algorithm,
            )
