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
            self.step = None  # once, also where several batches make an update
            os.kill(os.getpid(), self.number)


class LookAtLast(pl.Callback):
    """Notes at the start of each step which step last.ckpt holds: `seen`, updates -> updates in the file."""

    seen: dict[int, int] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        path = os.path.join(trainer.default_root_dir, "checkpoints", "last.ckpt")
        if os.path.exists(path):
            self.seen[trainer.global_step] = torch.load(path, weights_only=True)["global_step"]


class Line(pl.LightningModule):
    """The smallest model that trains: three numbers, dropout's draw, a schedule, a metric to be monitored.

    `seen` notes what every batch was: ("train" or "val", updates before it, epoch, samples, a draw, learning rate).
    """

    seen: list[tuple] = []

    def __init__(self, monitor="val/loss"):
        super().__init__()
        self.monitor = monitor
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def _loss(self, batch, what):
        draw = torch.rand(())
        loss = (batch["image"].mean((0, 1, 2)) * (1 + draw) - self.weight).square().mean()
        rate = self.optimizers().param_groups[0]["lr"]
        samples = tuple(batch["index"].tolist())
        if not self.trainer.sanity_checking:
            self.seen.append((what, self.global_step, self.current_epoch, samples, float(draw), rate))
        return loss

    def training_step(self, batch, batch_idx):
        loss = self._loss(batch, "train")
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self._loss(batch, "val"))


class Killed(BaseException):
    """What `KillAt` raises: nothing that runs in the program may catch it."""


class KillAt(pl.Callback):
    """Ends the program at the `count`-th call of a hook, as SIGKILL would."""

    def __init__(self, hook, count):
        self.hook, self.left = hook, count
        setattr(self, hook, self._called)

    def _called(self, trainer, *rest):
        self.left -= not trainer.sanity_checking
        if self.left == 0:
            raise Killed


called: list[dict] = []


class Marker:
    """A class that belongs nowhere, and notes it when it is called all the same."""

    def __init__(self, **params):
        called.append(params)


class Labelled(Ramps):
    """`Ramps` without their shift, each with another image beside it and a class of three."""

    def __init__(self, size):
        super().__init__(size, shift=0)

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {**sample, "other": -sample["image"], "what": index % 3}
