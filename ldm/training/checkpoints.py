"""Checkpoints of a training run: whole or not there, at moments from which a resumed run continues
exactly."""

import contextlib
import logging
import os
import signal
import threading
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from guided_diffusion.checkpoint_util import read, save_atomic
from guided_diffusion.errors import UserError, UserFileError
from ldm.training.position import settle

LAST = "last.ckpt"
# What Lightning reads of a checkpoint that a run continues from.
_PARTS = dict(state_dict=dict, loops=dict, optimizer_states=list, lr_schedulers=list, callbacks=dict)
_PARTS |= dict(epoch=int, global_step=int, epoch_means=dict, callback_metrics=dict)
_NEW = ("epoch_means", "callback_metrics")  # which earlier versions did not write
_logger = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's files, written beside their place and moved there once they are on disk."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        """Write `checkpoint` to the local file `path`."""
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO takes no storage_options")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        save_atomic(checkpoint, str(path))

    def load_checkpoint(self, path, map_location="cpu", weights_only=None) -> dict:
        """Read a file that `save_checkpoint` wrote; never anything that could run code."""
        return read(path, map_location=map_location)


class StoppedBySignal(SystemExit):
    """Ends training after a signal; the state is saved. Exit code 0, as after the last step."""

    def __init__(self):
        super().__init__(0)


class SaveLast(pl.callbacks.Checkpoint):
    """Keeps `folder`/last.ckpt up to date: at the end of every epoch, every so many steps, and on signals.

    every_n_train_steps: updates, 0: only at the ends of epochs. SIGUSR1 saves after the current update;
    SIGTERM, Ctrl-C and a closed terminal save and stop, a second one has its usual effect. It saves only between updates (a
    file never holds half an accumulated gradient), and what was logged until then is on the disk as well.
    """

    def __init__(self, folder: str | Path, every_n_train_steps: int = 0):
        self.path = Path(folder) / LAST
        self.every_n_train_steps = every_n_train_steps
        self._asked: set[int] = set()
        self._previous: dict[int, object] = {}
        self._saved = self._stop = False

    def on_train_start(self, trainer, pl_module) -> None:
        """Listen to the signals (here, since Lightning installs its own handlers before)."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._previous[number] = signal.signal(number, self._note)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Save if it is time, or if a signal on any rank asks for it. An epoch's last batch is saved by the epoch's
        end, after the validation."""
        accumulated = max(trainer.accumulate_grad_batches, getattr(pl_module, "accumulate_grad_batches", 1))
        asked = self._on_any_rank(trainer, bool(self._asked))
        if (batch_idx + 1) % accumulated and not trainer.is_last_batch:
            return
        step = trainer.global_step
        final = step == trainer.max_steps
        due = self.every_n_train_steps and step % self.every_n_train_steps == 0
        if (asked and not final) if trainer.is_last_batch else (asked or due or final):
            self.save(trainer)
        if asked:
            self._stop = self._on_any_rank(trainer, not self._asked <= {signal.SIGUSR1})
            self._asked.clear()

    def on_train_batch_start(self, trainer, *rest) -> None:
        """Once a saved step's metrics are logged: write the logs, and stop if a signal asked for it."""
        if self._saved:
            self._saved = False
            for logger in trainer.loggers:
                logger.save()
        if self._stop:
            if trainer.is_global_zero:
                _logger.warning(
                    "stopped by a signal after %d steps; saved %s", trainer.global_step, self.path
                )
            raise StoppedBySignal

    on_validation_start = on_train_end = on_train_batch_start

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        """Save, unless the epoch was cut short: then the last batch's checkpoint is the one to resume
        from."""
        if trainer.is_last_batch:
            self.save(trainer)

    def teardown(self, trainer, pl_module, stage) -> None:
        """Leave the signals as they were."""
        for number, handler in self._previous.items():
            with contextlib.suppress(TypeError):  # None: not installed from Python
                signal.signal(number, handler)
        self._previous = {}

    def save(self, trainer: pl.Trainer) -> None:
        """Write last.ckpt; every rank takes part."""
        trainer.save_checkpoint(trainer.strategy.broadcast(str(self.path)), weights_only=False)
        self._saved = True

    def _note(self, number, frame):
        self._asked.add(number)
        if number != signal.SIGUSR1:
            signal.signal(number, self._previous[number] or signal.SIG_DFL)

    def _on_any_rank(self, trainer, flag):
        return trainer.strategy.reduce_boolean_decision(flag, all=False)


def check_resumable(path: str | Path, model: torch.nn.Module) -> int:
    """See that `path` is a whole checkpoint of a training run of this `model`; the batches that its logs have.

    `UserFileError` if it is missing; `UserError` if it is damaged, weights alone, or another model's.
    """
    if not Path(path).is_file():
        raise UserFileError(f"there is no checkpoint {path} to resume from")
    content = read(path)
    if not isinstance(content, dict) or "loops" not in content or "optimizer_states" not in content:
        raise UserError(
            f"{path} holds no training state (optimizers, position); to start from its weights alone give "
            "model.params.ckpt_path"
        )
    for name, kind in _PARTS.items():
        if not isinstance(content.get(name, {} if name in _NEW else None), kind):
            found = f"has it as {type(content[name]).__name__}" if name in content else "lacks it"
            raise UserError(
                f"{path} is not a whole checkpoint of a run: {name!r} is a {kind.__name__}, the file {found}"
            )
    given, own = content["state_dict"], model.state_dict()
    for name in (*own, *given):
        if name not in given or name not in own or getattr(given[name], "shape", None) != own[name].shape:
            what = (
                "lacks"
                if name not in given
                else "has the unknown tensor"
                if name not in own
                else "has another"
            )
            raise UserError(f"{path} is not a checkpoint of this {type(model).__name__}: it {what} {name}")
    with fits(path):
        return settle(content["loops"])[1]


@contextlib.contextmanager
def fits(path: str | Path):
    """`UserError` of one line where a part of the checkpoint `path` has another form than this run's."""
    try:
        yield
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{path} does not fit this run ({type(error).__name__}: {reason})") from error
