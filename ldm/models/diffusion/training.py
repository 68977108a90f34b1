"""How a diffusion is trained: steps, moving average, optimizer (interface: latent-diffusion's DDPM)."""

import contextlib
import logging
import os

import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from guided_diffusion.errors import UserValueError
from guided_diffusion.seeding import PerSample, derive_seed
from ldm.util import Schedule, instantiate_from_config

_logger = logging.getLogger(__name__)

# Streams of random numbers.
_TRAINING, _VALIDATION = 0, 1


class DiffusionTraining(pl.LightningModule):
    """Lightning's hooks, for a module with `shared_step`, `model`, `logvar` and, with use_ema, `model_ema`.

    What is random in training belongs to (seed, number of the batch, place in it), so that resuming changes
    nothing; `seed` is that of Lightning's seed_everything, else 0. The trainer sets `learning_rate`.
    """

    def __init__(self):
        super().__init__()
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))

    def batch_random(self, batch, batch_idx: int, stream: int = _TRAINING) -> PerSample:
        """The generators of a batch's samples, on every rank others."""
        size = len(next(value for value in batch.values() if isinstance(value, (torch.Tensor, list, tuple))))
        first = self.global_rank * size if self._trainer is not None else 0
        seeds = (derive_seed(self.seed, stream, batch_idx, first + place) for place in range(size))
        return PerSample(seeds, self.device)

    def _batch_number(self, batch_idx):
        """Of all epochs, where there is a trainer."""
        return batch_idx if self._trainer is None else self.trainer.fit_loop.total_batch_idx

    def training_step(self, batch, batch_idx):
        random = self.batch_random(batch, self._batch_number(batch_idx))
        loss, log = self.shared_step(batch, random)
        self.log_dict(log, prog_bar=True, logger=True, on_step=True, on_epoch=True, batch_size=len(random))
        self.log("global_step", float(self.global_step), prog_bar=True, on_step=True, on_epoch=False)
        if self.scheduler_config is not None and self._trainer is not None:
            rate = self.optimizers().param_groups[0]["lr"]
            self.log("lr_abs", rate, prog_bar=True, logger=True, on_step=True, on_epoch=False)
        return loss

    @torch.no_grad()
    def validation_step(self, batch, batch_idx):
        random = self.batch_random(batch, batch_idx, _VALIDATION)
        _, log = self.shared_step(batch, random)
        if self.use_ema:
            with self.ema_scope():  # with the same noise
                _, average = self.shared_step(batch, self.batch_random(batch, batch_idx, _VALIDATION))
            log |= {f"{name}_ema": value for name, value in average.items()}
        self.log_dict(log, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(random))

    def optimizer_step(self, *args, **kwargs):
        """Lightning calls this at every update, which the moving average follows."""
        super().optimizer_step(*args, **kwargs)
        if self.use_ema:
            self.model_ema(self.model)

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimizer changes."""
        return [*self.model.parameters(), *([self.logvar] if self.learn_logvar else [])]

    def configure_optimizers(self):
        if getattr(self, "learning_rate", None) is None:
            raise UserValueError("set learning_rate before training (main.py does, from base_learning_rate)")
        optimizer = torch.optim.AdamW(self.trained_parameters(), lr=self.learning_rate)
        if self.scheduler_config is None:
            return optimizer
        schedule = instantiate_from_config(self.scheduler_config, Schedule, "scheduler_config").schedule
        scheduler = {"scheduler": LambdaLR(optimizer, schedule), "interval": "step", "frequency": 1}
        return [optimizer], [scheduler]

    @contextlib.contextmanager
    def ema_scope(self, context=None):
        """Inside, the network's weights are the moving average's (where there is one); may be nested.

        context: what for, to be logged.
        """
        if context is not None and self.use_ema:
            _logger.info("%s: with the moving average's weights", context)
        with self.model_ema.in_place_of(self.model) if self.use_ema else contextlib.nullcontext():
            yield
