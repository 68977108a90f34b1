"""The parts of Lightning's trainer from the configuration's section `lightning`."""

import os
from collections.abc import Mapping

import pytorch_lightning as pl
import torch
import torch.distributed.fsdp
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy

from guided_diffusion.errors import UserError, UserValueError
from ldm.models.diffusion.image_diffusion import DDPM
from ldm.training.callbacks import StepSeeds
from ldm.training.config import Run, merged
from ldm.util import instantiate_from_config

_MAX_EPOCHS = 1000
# What a model that steps its optimizers by hand does itself: Lightning's trainer refuses these.
_BY_HAND = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
_PRECISIONS = ("32-true", "bf16-mixed", "32", 32, None)


def prepare_trainer(config: Mapping, model: pl.LightningModule) -> dict:
    """Arguments of pl.Trainer from lightning.trainer, with upstream's `gpus` understood.

    For models that optimise by hand, accumulation and clipping move to the model. `UserValueError` for a
    model that cannot do them, and for precisions other than 32-true and bf16-mixed.
    """
    config = {key: value for key, value in config.items() if value is not None}
    if "gpus" in config:
        config |= {"devices": config.pop("gpus"), "accelerator": "gpu"}
    config["devices"] = _devices(config.get("devices"))
    _fit_launcher(config)
    if config.get("precision") not in _PRECISIONS:
        raise UserValueError(f"precision is 32-true or bf16-mixed, got {config['precision']!r}")
    if "max_epochs" not in config and "max_steps" not in config:
        config["max_epochs"] = _MAX_EPOCHS
    if not model.automatic_optimization:
        for name in _BY_HAND:
            if name in config and not hasattr(type(model), name):
                raise UserValueError(f"{type(model).__name__} steps its optimizers by hand and has no {name}")
            if name in config:
                setattr(model, name, config.pop(name))
    return config


def _devices(value):
    """A number or a list of indices for pl.Trainer, of 2, "2", "0,1", "0,", [0, 1], -1, "auto" or None."""
    if value is None or value == "auto":
        return "auto" if torch.cuda.is_available() else 1
    text = str(value).strip()
    try:
        if isinstance(value, list | tuple):
            devices = [int(v) for v in value]
        elif "," in text:
            devices = [int(v) for v in text.split(",") if v.strip()]
        else:
            devices = int(text)
    except ValueError:
        devices = 0
    if not devices or (isinstance(devices, int) and devices < -1):
        raise UserValueError(f"devices is a number or a list such as 0,1; got {value!r}")
    return devices


def _fit_launcher(config):
    """Take the number of processes from torchrun where it started them; refuse mpiexec, which Lightning does
    not see."""
    if any(int(os.environ.get(name, 1)) > 1 for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")):
        raise UserError(
            "start several processes with --devices or torchrun: mpiexec's would not find each other"
        )
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    total, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if config["devices"] in (1, "auto"):
        config |= {"devices": local, "num_nodes": total // local}
    if world_size(config) != total:
        raise UserValueError(
            f"torchrun started {total} processes, but the configuration asks for {world_size(config)} "
            "(devices x num_nodes)"
        )


def world_size(config: Mapping) -> int:
    """The number of processes that the prepared arguments of pl.Trainer ask for."""
    devices = config["devices"]
    if devices in ("auto", -1):
        devices = max(1, torch.cuda.device_count())
    count = len(devices) if isinstance(devices, list) else devices
    return count * int(config.get("num_nodes", 1))


def make_strategy(config: Mapping, model: pl.LightningModule, find_unused: bool = False):
    """The strategy that `config` (prepared arguments of pl.Trainer) names: auto, ddp or fsdp.

    Where two optimizers take turns, DDP must look which parameters a loss reaches; elsewhere with find_unused
    (lightning.find_unused_parameters). fsdp is FSDP2, on GPUs and CPUs; its checkpoints are whole. `UserValueError` for
    fsdp with what is no diffusion, or with learn_logvar.
    """
    strategy = config.get("strategy", "auto")
    if strategy == "fsdp":
        _check_fsdp(model)
        return ModelParallelStrategy(world_size(config), 1, save_distributed_checkpoint=False)
    if strategy == "ddp" or (strategy == "auto" and world_size(config) > 1):
        return DDPStrategy(find_unused_parameters=find_unused or not model.automatic_optimization)
    return strategy


def _check_fsdp(model):
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        raise UserValueError(f"strategy fsdp needs torch 2.6 or newer, this is {torch.__version__}; use ddp")
    if not isinstance(model, DDPM):
        raise UserValueError(f"strategy fsdp trains diffusion models, not {type(model).__name__}; use ddp")
    if model.learn_logvar:
        raise UserValueError("strategy fsdp cannot train learn_logvar, which is in no block; use ddp")


def make_callbacks(
    lightning: Mapping, config: Mapping, model: pl.LightningModule, run: Run, seed: int
) -> list[pl.Callback]:
    """The default callbacks with the changes of lightning.callbacks (null leaves one out), and the best
    checkpoints.

    Where the model has a `monitor`, the three best by it are kept, else the newest epoch.
    """
    setup = {
        "resume": str(run.resume) if run.resume else None,
        "now": run.now,
        "logdir": str(run.logdir),
        "ckptdir": str(run.ckptdir),
        "cfgdir": str(run.cfgdir),
        "config": config,
        "lightning_config": lightning,
    }
    images = {"batch_frequency": 750, "max_images": 4, "clamp": True, "save_dir": str(run.logdir)}
    rate = {"logging_interval": "step"}
    defaults = {
        "setup_callback": {"target": "ldm.training.callbacks.SetupCallback", "params": setup},
        "image_logger": {"target": "ldm.training.callbacks.ImageLogger", "params": images},
        "learning_rate_logger": {"target": "pytorch_lightning.callbacks.LearningRateMonitor", "params": rate},
        "cuda_callback": {"target": "ldm.training.callbacks.CUDACallback"},
    }
    given = lightning.get("callbacks") or {}
    configs = {
        name: merged(defaults.get(name, {}), given.get(name))
        for name in (*defaults, *(name for name in given if name not in defaults))
        if name not in given or given[name] is not None
    }
    callbacks = [
        instantiate_from_config(config, pl.Callback, f"lightning.callbacks.{name}")
        for name, config in configs.items()
    ]
    return [StepSeeds(seed), *callbacks, _best_checkpoints(lightning, model, run)]


def _best_checkpoints(lightning, model, run):
    params = {"dirpath": str(run.ckptdir), "filename": "{epoch:06}"}
    if getattr(model, "monitor", None):
        params |= {"monitor": model.monitor, "save_top_k": 3}
    target = "pytorch_lightning.callbacks.ModelCheckpoint"
    config = merged({"target": target, "params": params}, lightning.get("modelcheckpoint"))
    # One file an epoch: a resumed run writes it again, instead of another with -v1 in its name.
    several = {"every_n_train_steps", "train_time_interval"} & config["params"].keys()
    several = several or "val_check_interval" in (lightning.get("trainer") or {})
    config["params"].setdefault("enable_version_counter", bool(several))
    # last.ckpt is kept by SaveLast: two writers of one file would not do.
    config["params"] = {**config["params"], "save_last": None}
    return instantiate_from_config(config, pl.callbacks.ModelCheckpoint, "lightning.modelcheckpoint")
