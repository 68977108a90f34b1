"""Grids of images during training (interface: latent-diffusion, main.py, ImageLogger)."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image

_COLUMNS, _PADDING = 4, 2


def image_grid(images: torch.Tensor, columns: int = _COLUMNS, padding: int = _PADDING) -> torch.Tensor:
    """[B, C, H, W] -> [C, height, width]: rows of `columns` images in black frames, as torchvision has
    it."""
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    frame = (rows * (height + padding) + padding, columns * (width + padding) + padding)
    grid = images.new_zeros(channels, *frame)
    for k, image in enumerate(images):
        top, left = (
            i * (side + padding) + padding
            for i, side in zip(divmod(k, columns), (height, width), strict=True)
        )
        grid[:, top : top + height, left : left + width] = image
    return grid


class ImageLogger(pl.Callback):
    """Writes what the model's `log_images` returns: PNG grids in `save_dir`/images/{train,val}, and
    TensorBoard.

    batch_frequency: steps between grids of training images; max_images: per grid; clamp: images to
    [-1, 1]; increase_log_steps: also at steps 1, 2, 4, ... before; rescale: images are in [-1, 1], not
    [0, 1]; disabled: do nothing; log_on_batch_idx: count the epoch's batches, not the steps;
    log_first_step: also at step 0; log_images_kwargs: for `log_images`. Of every validation the first
    batch is shown. save_dir: by default the trainer's folder. enable_autocast: draw in half precision. Files: NAME_gs-STEP_e-EPOCH_b-BATCH.png.
    """

    def __init__(
        self,
        batch_frequency: int,
        max_images: int,
        clamp: bool = True,
        increase_log_steps: bool = True,
        rescale: bool = True,
        disabled: bool = False,
        log_on_batch_idx: bool = False,
        log_first_step: bool = False,
        log_images_kwargs: Mapping | None = None,
        save_dir: str | Path | None = None,
        enable_autocast: bool = False,
    ):
        super().__init__()
        self.batch_freq = batch_frequency
        self.max_images = max_images
        self.clamp, self.rescale, self.disabled = clamp, rescale, disabled
        self.log_on_batch_idx, self.log_first_step = log_on_batch_idx, log_first_step
        self.log_images_kwargs = dict(log_images_kwargs or {})
        self.save_dir, self.enable_autocast = save_dir, enable_autocast
        powers = range(batch_frequency.bit_length()) if increase_log_steps else ()
        self.log_steps = {2**n for n in powers} if batch_frequency > 0 else set()
        self._logged_at = -1  # several batches of one step, when gradients accumulate, give one grid

    def check_frequency(self, step: int) -> bool:
        """Whether images are due at `step`."""
        if step == 0:
            return self.log_first_step
        return step in self.log_steps or (self.batch_freq > 0 and step % self.batch_freq == 0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Training images, when they are due."""
        step = batch_idx if self.log_on_batch_idx else trainer.global_step
        if not self.disabled and trainer.global_step != self._logged_at and self.check_frequency(step):
            self._logged_at = trainer.global_step
            self.log_img(trainer, pl_module, batch, batch_idx, "train")

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        """Images of the first batch, but none in the check before training."""
        if not self.disabled and batch_idx == 0 and trainer.global_step > 0:
            self.log_img(trainer, pl_module, batch, batch_idx, "val")

    @torch.no_grad()
    def log_img(self, trainer, pl_module, batch, batch_idx: int, split: str) -> None:
        """Draw and write. Every rank draws, since a sharded model needs them all; rank 0 writes."""
        if self.max_images < 1 or not hasattr(pl_module, "log_images"):
            return
        was_training = pl_module.training
        pl_module.eval()
        with torch.autocast(pl_module.device.type, enabled=self.enable_autocast):
            images = pl_module.log_images(batch, split=split, **self.log_images_kwargs)
        pl_module.train(was_training)
        if trainer.is_global_zero:
            place = f"gs-{trainer.global_step:06}_e-{trainer.current_epoch:06}_b-{batch_idx:06}"
            for name, arrays in images.items():
                self._write(trainer, split, name, self._grid(arrays), place)

    def _grid(self, images):
        """Of at most max_images images: [C, height, width] in [0, 1]."""
        images = images[: self.max_images].detach().float().cpu()
        if self.clamp:
            images = images.clamp(-1.0, 1.0)
        if self.rescale:
            images = (images + 1.0) / 2.0
        return image_grid(images)

    def _write(self, trainer, split, name, grid, place):
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # by which Lightning logs, so that a resumed
        for logger in trainer.loggers:  # run's logs are cut in one place
            if isinstance(logger, pl.loggers.TensorBoardLogger):
                logger.experiment.add_image(f"{split}/{name}", grid.clamp(0, 1), step)
        folder = Path(self.save_dir or trainer.default_root_dir) / "images" / split
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (grid.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{name.replace('/', '_')}_{place}.png")
