"""The training program: how its parts are put together (interface: latent-diffusion, main.py)."""

import logging
import pdb
import sys
import warnings
from collections.abc import Mapping, Sequence

import pytorch_lightning as pl
from omegaconf import OmegaConf
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from guided_diffusion.checkpoint_util import lock_folder
from guided_diffusion.errors import UserError, UserValueError
from ldm.data.latents import check_caches
from ldm.models.diffusion.joint import with_defaults, with_former_defaults
from ldm.training.checkpoints import (
    AtomicCheckpointIO,
    SaveLast,
    StoppedBySignal,
    check_resumable,
    fits,
)
from ldm.training.config import Run, load_config, locate
from ldm.training.data import DataModuleFromConfig
from ldm.training.flags import parse
from ldm.training.logs import make_logger, wandb_loggers
from ldm.training.position import ExactResume
from ldm.training.setup import make_callbacks, make_strategy, prepare_trainer, world_size
from ldm.util import instantiate_from_config

_logger = logging.getLogger(__name__)


# Lightning's warnings about what is meant to be so.
_NO_CONCERN = (
    ".*your dataloader is not resumable",  # the position in the data is in the checkpoint all the same
    "Experiment logs directory .* exists",  # its CSV file is put back
    "Checkpoint directory .* exists and is not empty",  # a resumed run goes on in its folder
    "Using ModelCheckpoint with manual optimization",  # checkpoints are taken after the update
    "Detected call of .lr_scheduler.step",  # the discriminator's schedule runs before it takes part
    ".*isinstance.treespec, LeafSpec.",  # between Lightning and torch
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program. `UserError` for what the user can repair."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for message in _NO_CONCERN:
        warnings.filterwarnings("ignore", message=message)
    options, overrides = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        _run(options, overrides)
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except StoppedBySignal:
        raise
    except Exception as error:
        if options.debug and not isinstance(error, UserError):
            pdb.post_mortem(error.__traceback__)
        raise


def _run(options, overrides):
    if not options.base and not options.resume:
        raise UserValueError(
            "nothing to work on: give a configuration (--base CONFIG) or a run (--resume PATH)"
        )
    run = locate(options.logdir, options.project, options.name, options.postfix, options.resume, options.base)
    kept = sorted(run.cfgdir.glob("*.yaml")) if run.resume else []
    if run.resume and not kept:
        raise UserError(f"{run.cfgdir} holds no configuration (*.yaml) to resume with")
    config = load_config([*kept, *options.base], overrides, _flags(options))
    plain = OmegaConf.to_container(config, resolve=True)
    lightning = plain.pop("lightning", None) or {}
    plain = with_former_defaults(plain) if run.resume else with_defaults(plain)

    pl.seed_everything(options.seed, verbose=False)
    model = instantiate_from_config(plain["model"], pl.LightningModule, "model")
    data = instantiate_from_config(plain["data"], pl.LightningDataModule, "data")
    trainer_config = prepare_trainer(lightning.get("trainer") or {}, model)
    if isinstance(data, DataModuleFromConfig):
        data.seed = options.seed
        # Its own sampler shares the data out; Lightning's would replace it.
        trainer_config["use_distributed_sampler"] = False
    data.prepare_data()
    data.setup()
    for name, dataset in getattr(data, "datasets", {}).items():
        _logger.info(
            "data %s: %s, %d samples", name, type(getattr(dataset, "data", dataset)).__name__, len(dataset)
        )
        check_caches(model, dataset)
    logged = check_resumable(run.resume, model) if run.resume else None
    model.learning_rate = _learning_rate(plain, options.scale_lr, trainer_config, model)

    every = ((lightning.get("modelcheckpoint") or {}).get("params") or {}).get("every_n_train_steps") or 0
    save = SaveLast(run.ckptdir, every)
    trainer_config["strategy"] = make_strategy(
        trainer_config, model, bool(lightning.get("find_unused_parameters"))
    )
    if options.train and rank_zero_only.rank == 0:
        lock_folder(run.logdir)
    resume = ExactResume()
    parts = dict(
        logger=[
            make_logger(lightning, run, logged if options.train else None),
            *wandb_loggers(options.wandb, run),
        ],
        callbacks=[resume, *make_callbacks(lightning, plain, model, run, options.seed), save],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=run.logdir,
    )
    try:
        trainer = pl.Trainer(**trainer_config, **parts)
    except (TypeError, ValueError) as error:
        raise UserError(f"lightning.trainer: {error}") from error
    _work(trainer, model, data, run, options, resume)


def _work(trainer, model, data, run: Run, options, resume: ExactResume):
    """Train, test, or both."""
    testable = hasattr(data, "test_dataloader") and "test" in getattr(data, "dataset_configs", ())
    test = testable and not options.no_test and type(model).test_step is not pl.LightningModule.test_step
    if not options.train and not test:
        raise UserValueError(
            "nothing to do: give -t to train, or a data section `test` and a model with test_step"
        )
    checkpoint = str(run.resume) if run.resume else None
    if options.train:
        try:
            trainer.fit(model, data, ckpt_path=checkpoint)
        except Exception:
            if checkpoint is None or resume.begun:
                raise
            with fits(run.resume):  # it was being read
                raise
        if not resume.begun and trainer.is_global_zero:
            _logger.info(
                "%s: finished at step %d; to go on, raise lightning.trainer.max_steps or max_epochs",
                run.logdir,
                trainer.global_step,
            )
    if test:
        trainer.test(model, data, ckpt_path=None if options.train else checkpoint)


def _flags(options) -> dict[str, object]:
    """The command line's own settings of Lightning's trainer."""
    if options.gpus and options.devices:
        raise UserValueError("--gpus and --devices mean the same: give one")
    given = {
        "devices": options.devices or options.gpus,
        "strategy": options.strategy,
        "precision": options.precision,
    }
    flags = {f"lightning.trainer.{name}": value for name, value in given.items() if value}
    if options.gpus:
        flags["lightning.trainer.accelerator"] = "gpu"
    return flags


def _learning_rate(plain: Mapping, scale: bool, trainer_config: Mapping, model) -> float:
    """base_learning_rate, with `scale` times the number of samples of an update."""
    base = plain["model"]["base_learning_rate"]
    if not scale:
        _logger.info("learning rate %.2e, as given", base)
        return base
    batch = (plain["data"].get("params") or {}).get("batch_size", 1)
    accumulated = max(
        trainer_config.get("accumulate_grad_batches", 1), getattr(model, "accumulate_grad_batches", 1)
    )
    processes = world_size(trainer_config)
    rate = accumulated * processes * batch * base
    _logger.info(
        "learning rate %.2e = %d (accumulated batches) x %d (processes) x %d (batch size) x %.2e (base)",
        rate, accumulated, processes, batch, base,
    )  # fmt: skip
    return rate
