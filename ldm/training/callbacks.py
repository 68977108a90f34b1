"""Callbacks of a training run: its folders, its random numbers, its use of time and memory."""

import logging
import resource
import time
from collections.abc import Mapping
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from guided_diffusion.checkpoint_util import seed_everything
from guided_diffusion.seeding import derive_seed
from ldm.training.image_logger import ImageLogger

__all__ = ["CUDACallback", "ImageLogger", "SetupCallback", "StepSeeds"]

_logger = logging.getLogger(__name__)
_MIB = 2**20


class SetupCallback(pl.Callback):
    """Makes the run's folders and writes its configuration, before the first step and on rank 0 only.

    now: time of the start, in the names cfgdir/<now>-project.yaml and cfgdir/<now>-lightning.yaml;
    resume: the run's PATH where it is resumed, for the log.
    """

    def __init__(
        self,
        resume: str | None,
        now: str,
        logdir: str,
        ckptdir: str,
        cfgdir: str,
        config: Mapping,
        lightning_config: Mapping,
    ):
        super().__init__()
        self.resume, self.now = resume, now
        self.folders = [Path(folder) for folder in (logdir, ckptdir, cfgdir)]
        self.config, self.lightning_config = config, lightning_config

    def on_fit_start(self, trainer, pl_module) -> None:
        """Write."""
        if not trainer.is_global_zero:
            return
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)
        cfgdir = self.folders[-1]
        OmegaConf.save(OmegaConf.create(dict(self.config)), cfgdir / f"{self.now}-project.yaml")
        lightning = OmegaConf.create({"lightning": dict(self.lightning_config)})
        OmegaConf.save(lightning, cfgdir / f"{self.now}-lightning.yaml")
        what = f"continues {self.resume}" if self.resume else "begins"
        _logger.info("the run %s in %s", what, self.folders[0])


class StepSeeds(pl.Callback):
    """Before every step, all random generators are seeded from (seed, epoch, batch, rank).

    So dropout, the draws of posteriors and the like depend on nothing that happened before: a resumed
    run draws what the uninterrupted one does. Validation draws the same every time.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        """Seed for training."""
        seed_everything(derive_seed(self.seed, 0, trainer.current_epoch, batch_idx, trainer.global_rank))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        """Seed for validation."""
        seed_everything(derive_seed(self.seed, 1, dataloader_idx, batch_idx, trainer.global_rank))

    on_test_batch_start = on_validation_batch_start


class CUDACallback(pl.Callback):
    """Logs time (s) and peak memory (MiB, mean over ranks) of every epoch: epoch_time, peak_memory.

    Memory is the GPU's where there is one, else this process's resident set, whose peak is the run's so far.
    """

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        """Start the clock."""
        self._device = trainer.strategy.root_device
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            torch.cuda.synchronize(self._device)
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        """Report; but not on an epoch that was resumed in its middle."""
        if not hasattr(self, "_start"):
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            memory = torch.cuda.max_memory_allocated(self._device) / _MIB
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        figures = {"epoch_time": time.monotonic() - self._start, "peak_memory": memory}
        figures = {key: torch.tensor(value, device=self._device) for key, value in figures.items()}
        figures = {key: float(trainer.strategy.reduce(value)) for key, value in figures.items()}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.fit_loop.epoch_loop._batches_that_stepped - 1)
        if trainer.is_global_zero:
            _logger.info(
                "epoch %d: %.1f s, peak memory %.0f MiB",
                trainer.current_epoch,
                figures["epoch_time"],
                figures["peak_memory"],
            )
