"""What main.py's tests put into its configurations: little datasets, and callbacks that end a run."""

import os
import random
import signal

import numpy as np
import pytorch_lightning as pl
import torch


class Ramps(torch.utils.data.Dataset):
    """`size` images [8, 8, 3] that differ, each with a random shift drawn when it is read.

    root: a folder that has to exist, as a dataset of files needs one.
    """

    def __init__(self, size, shift=0.2, root=None):
        if root is not None and not os.path.isdir(root):
            from guided_diffusion.errors import UserFileError

            raise UserFileError(f"there is no folder {root}")
        self.size, self.shift = size, shift

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        ramp = np.linspace(-1, 1, 8, dtype=np.float32) * (index + 1) / self.size
        image = np.stack([ramp[:, None] + 0 * ramp, ramp + 0 * ramp[:, None], -ramp[:, None] * ramp], axis=-1)
        noise = self.shift * (random.random() + np.random.rand() + float(torch.rand(())))
        return {"image": (image + np.float32(noise)).astype(np.float32), "index": index}


class SignalAt(pl.Callback):
    """Sends this process a signal at the start of the step after `step` updates."""

    def __init__(self, step, name):
        self.step, self.number = step, signal.Signals[name]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and trainer.is_global_zero:
            os.kill(os.getpid(), self.number)


class LookAtLast(pl.Callback):
    """Notes at the start of each step which step last.ckpt holds: `seen`, updates -> updates in the file."""

    seen: dict[int, int] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        path = os.path.join(trainer.default_root_dir, "checkpoints", "last.ckpt")
        if os.path.exists(path):
            self.seen[trainer.global_step] = torch.load(path, weights_only=True)["global_step"]
