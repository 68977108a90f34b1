"""Where a checkpoint stands in its run, put so that Lightning goes on exactly there.

Lightning (2.6) reads a checkpoint's position off counters whose state depends on the hook that saved it, and goes
wrong for some of these: it skips or repeats an epoch's data, or loses a validation. Here every checkpoint is
reduced to one of three states before Lightning reads it.
"""

import logging
from collections.abc import MutableMapping

import pytorch_lightning as pl
import torch
from pytorch_lightning.loops import evaluation_loop, training_epoch_loop

_logger = logging.getLogger(__name__)

EPOCH, BATCH, VALIDATED = "between epochs", "after a batch", "after a batch and its validation"
# Of a checkpoint: what an epoch's means consist of so far, and what callbacks monitor, by key.
_MEANS, _METRICS = "epoch_means", "callback_metrics"


def _rates(group):
    """The rate without its schedule's factor, and the weight decay."""
    return {"lr": group.get("initial_lr", group["lr"]), "weight_decay": group.get("weight_decay")}


def settle(loops: MutableMapping) -> tuple[str, int]:
    """Change a checkpoint's `loops` to one of the states; (the state, batches that are in the logs)."""
    fit = loops["fit_loop"]
    epochs, batches, state = (
        fit[name] for name in ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.state_dict")
    )
    last = batches["is_last_batch"]
    ended = epochs["total"]["processed"] == epochs["total"]["ready"]  # by its last batch, or by max_steps
    validated = batches["total"]["completed"] == batches["total"]["processed"]
    state["_batches_that_stepped"] += not ended
    logged = state["_batches_that_stepped"]
    if last and (ended or validated):
        for counts in epochs.values():
            counts["processed"] = counts["completed"] = counts["started"] = counts["ready"]
        batches["total"]["completed"] = batches["total"]["processed"]
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False
        return EPOCH, logged
    for counts in epochs.values():
        counts["processed"] = counts["completed"] = counts["ready"] - 1
    for counts in (
        batches["total"],
        batches["current"],
    ):  # one less at the last batch would end the epoch at once
        counts["completed"] = counts["processed"] - (not last)
    state["_batches_that_stepped"] -= 1  # Lightning adds it
    return VALIDATED if validated and not ended else BATCH, logged


class ExactResume(pl.Callback):
    """Brings a resumed run where its checkpoint was: a validation that was due is made up for, and the means over
    an epoch contain the batches before (on several ranks: those of rank 0)."""

    def __init__(self):
        self.state: str | None = None  # None: the run does not continue another
        self.begun = False  # training, since the program started
        self._means: dict[str, dict] = {}
        self._metrics: dict[str, torch.Tensor] = {}

    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        """Note the means so far."""
        checkpoint[_METRICS] = {key: value.cpu() for key, value in trainer.callback_metrics.items()}
        names = ("fx", "name", "prog_bar", "logger", "on_step")
        checkpoint[_MEANS] = {
            key: {
                "log": {name: getattr(metric.meta, name) for name in names}
                | {"sync_dist": metric.meta.sync.should},
                "value": metric.value,
                "cumulated_batch_size": metric.cumulated_batch_size,
            }
            for key, metric in trainer.fit_loop.epoch_loop._results.items()
            if metric.is_tensor and metric.meta.is_mean_reduction and metric.meta.on_epoch
        }

    def on_load_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        """Settle its position."""
        if trainer.state.fn != "fit":
            return
        self.state, _ = settle(checkpoint["loops"])
        self._means = {} if self.state == EPOCH else checkpoint.get(_MEANS, {})
        self._metrics = checkpoint.get(_METRICS, {})

    def on_fit_start(self, trainer, pl_module) -> None:
        """Note what the configuration says of the optimizers, which the checkpoint's state replaces."""
        self._given = [
            [_rates(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers
        ]

    def on_train_start(self, trainer, pl_module) -> None:
        """Let Lightning's loops begin an epoch, validate, or end the epoch."""
        self.begun = True
        if self.state is not None:
            self._use_given(trainer)
        loop = trainer.fit_loop.epoch_loop
        trainer._logger_connector._callback_metrics.update(self._metrics)
        if self.state == EPOCH:
            loop.restarting = False
            loop.reset_restart_stage()
        if self.state != BATCH:
            return
        due = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
        if not due and not loop.batch_progress.is_last_batch:
            return
        for counts in (loop.batch_progress.total, loop.batch_progress.current):
            counts.completed = counts.processed
        loop._restart_stage = training_epoch_loop.RestartStage.RESTARTED_ON_LAST
        if due:
            loop.val_loop.batch_progress.reset()
            loop.val_loop._restart_stage = evaluation_loop.RestartStage.RESTARTED_MID_EVALUATION
        else:
            loop.val_loop._has_run = True
            loop._batches_that_stepped += 1
        if loop.batch_progress.is_last_batch:
            for mean in self._means.values():
                loop._results.log(**mean["log"], value=mean["value"], sync_dist_fn=trainer.strategy.reduce)
            self._add_means(loop._results, replace=True)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Add the batches before to the means, once there are any."""
        self._add_means(trainer.fit_loop.epoch_loop._results)

    def _use_given(self, trainer):
        """Learn at the configuration's rates; a schedule goes on from where it was."""
        told = set()
        for optimizer, given in zip(trainer.optimizers, self._given, strict=True):
            for group, new in zip(optimizer.param_groups, given, strict=True):
                old = _rates(group)
                told |= {f"{name}: {old[name]} -> {new[name]}" for name in new if new[name] != old[name]}
                if new["lr"] != old["lr"]:
                    group["lr"] *= new["lr"] / old["lr"]
                    group["initial_lr"] = new["lr"]
                group |= {"weight_decay": new["weight_decay"]} if "weight_decay" in group else {}
        for schedule in (config.scheduler for config in trainer.lr_scheduler_configs):
            if hasattr(schedule, "base_lrs"):
                schedule.base_lrs = [group["initial_lr"] for group in schedule.optimizer.param_groups]
        for line in sorted(told) if trainer.is_global_zero else ():
            _logger.info(line)

    def _add_means(self, results, replace=False):
        for key, mean in self._means.items():
            if key in results:
                for name in ("value", "cumulated_batch_size"):
                    before = mean[name].to(results[key].value.device)
                    setattr(results[key], name, before if replace else getattr(results[key], name) + before)
        self._means = {}
