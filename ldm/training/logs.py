"""The logger of a run; in a resumed one every step is logged once."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from guided_diffusion.errors import UserError
from guided_diffusion.logger import drop_events_from
from ldm.training.config import Run, merged
from ldm.util import instantiate_from_config


def make_logger(lightning: Mapping, run: Run, logged: int | None = None) -> Logger:
    """lightning.logger, by default TensorBoard in logdir/tensorboard (upstream's testtube is gone).

    logged: batches that a resumed run's logs keep; what TensorBoard and CSVLogger hold of later ones is left out.
    """
    params = {"save_dir": str(run.logdir), "name": "tensorboard", "version": ""}
    default = {"target": "pytorch_lightning.loggers.TensorBoardLogger", "params": params}
    given = lightning.get("logger") or {}
    another = given.get("target", default["target"]) != default["target"]
    config = given if another else merged(default, given)
    logger = instantiate_from_config(config, Logger, "lightning.logger")
    if logged is not None and isinstance(logger, TensorBoardLogger) and rank_zero_only.rank == 0:
        drop_events_from(logger.log_dir, logged)
    if logged is not None and isinstance(logger, CSVLogger) and rank_zero_only.rank == 0:
        _continue_csv(logger, logged, "version" in (config.get("params") or {}))
    return logger


def wandb_loggers(project: str, run: Run) -> list[Logger]:
    """A logger for Weights & Biases, in `project`; none for "". UserError where the package is missing."""
    if not project:
        return []
    try:
        return [WandbLogger(project=project, save_dir=str(run.logdir), name=Path(run.logdir).name)]
    except ImportError:
        raise UserError("--wandb: Weights & Biases is not installed: pip install wandb") from None


def _continue_csv(logger, logged, named):
    """Lightning would begin another version, and delete what one of the same name has."""
    if not named:
        logger._version = max(0, logger.version - 1)
    path = Path(logger.log_dir) / "metrics.csv"
    if not path.is_file():
        return
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        kept = [row for row in rows if int(row["step"]) < logged]
        names = rows.fieldnames
    writer = logger.experiment  # deletes the file
    writer.metrics_keys = list(names)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        new = csv.DictWriter(file, names)
        new.writeheader()
        new.writerows(kept)
    os.replace(partial, path)
