"""The configuration of a training run: YAML files, overrides, and where the run lives."""

import inspect
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from guided_diffusion.config_file import load_with_bases
from guided_diffusion.errors import UserError, UserFileError, UserValueError
from ldm.training.checkpoints import LAST
from ldm.util import nearest

_KNOWN = {
    "": ("model", "data", "lightning", "class_names"),
    "model": ("base_learning_rate", "target", "params"),
    "data": ("target", "params"),
    "lightning": ("trainer", "callbacks", "modelcheckpoint", "logger", "find_unused_parameters"),
}
# Of Lightning's trainer, what this program sets itself.
_OWN = ("self", "logger", "callbacks", "plugins", "default_root_dir", "use_distributed_sampler")


@dataclass(frozen=True)
class Run:
    """Where a run lives and when this process of it began."""

    logdir: Path
    now: str
    resume: Path | None  # the checkpoint to continue from

    @property
    def ckptdir(self) -> Path:
        return self.logdir / "checkpoints"

    @property
    def cfgdir(self) -> Path:
        return self.logdir / "configs"


def locate(
    logdir: str, project: str | None, name: str | None, postfix: str, resume: str | None, base: Sequence[str]
) -> Run:
    """The run's folder: of the checkpoint or folder `resume`, else logdir[/project]/<time>_<name><postfix>.

    name: None for the first configuration's. `UserError` for a folder or checkpoint that is not there,
    and for `name` together with `resume`.
    """
    now = time.strftime("%Y-%m-%dT%H-%M-%S")
    if resume is None:
        if name is None and base:
            name = Path(base[0]).stem
        folder = Path(logdir) / project if project else Path(logdir)
        return Run(folder / f"{now}{'_' + name if name else ''}{postfix}", now, None)
    if name is not None:
        raise UserValueError(
            "--name and --resume exclude each other: a resumed run keeps its name (-l, -f too)"
        )
    path = Path(resume)
    if path.is_dir():
        run, checkpoint = path, path / "checkpoints" / LAST
    elif path.is_file():
        if path.parent.name != "checkpoints":
            raise UserError(
                f"{path} does not lie in the folder `checkpoints` of a run: "
                "there is no configuration to resume with"
            )
        run, checkpoint = path.parent.parent, path
    else:
        raise UserFileError(f"--resume: there is no folder or checkpoint {path}")
    if not checkpoint.is_file():
        raise UserFileError(
            f"--resume: {run} has no checkpoint {checkpoint.relative_to(run)} yet; start it anew"
        )
    return Run(run, now, checkpoint)


def load_config(
    paths: Sequence[str | Path], overrides: Sequence[str] = (), flags: Mapping | None = None
) -> DictConfig:
    """The files merged from left to right, then `overrides` (a.b.c=value), then `flags` (dotted name ->
    value).

    `UserError` for a file that is missing or no YAML mapping, for an override without `=`, for sections
    and keys that this program does not know, and for references that lead nowhere.
    """
    for override in overrides:
        if override.startswith("-") or "=" not in override:
            raise UserValueError(f"unknown argument {override!r}: overrides are written key.key=value")
    merged = OmegaConf.create()
    try:
        for path in paths:
            merged = OmegaConf.merge(merged, load_with_bases(path))
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(list(overrides)))
        for key, value in (flags or {}).items():
            OmegaConf.update(merged, key, value)
        _check(OmegaConf.to_container(merged, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration cannot be merged: {str(error).splitlines()[0]}") from error
    return merged


def merged(default: Mapping, given: Mapping | None) -> dict:
    """`default` (target, params) with what is `given` in its place."""
    given = given or {}
    return {**default, **given, "params": {**(default.get("params") or {}), **(given.get("params") or {})}}


def _check(config):
    for section, known in _KNOWN.items():
        _refuse_unknown(section, _section(config, section), known)
    names = [f"lightning.callbacks.{name}" for name in _section(config, "lightning.callbacks")]
    for name in ("model", "data", "lightning.modelcheckpoint", "lightning.logger", *names):
        _section(config, f"{name}.params")
    for section in ("model", "data"):
        if not config.get(section):
            raise UserError(f"the configuration has no section `{section}`")
        if "target" not in config[section]:
            raise UserError(f"the section `{section}` of the configuration needs the key `target`")
    rate = config["model"].get("base_learning_rate")
    if not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise UserValueError(f"model.base_learning_rate must be a positive number, got {rate!r}")
    known = [name for name in inspect.signature(pl.Trainer.__init__).parameters if name not in _OWN]
    _refuse_unknown("lightning.trainer", _section(config, "lightning.trainer"), [*known, "gpus"])


def _section(config, name):
    """The mapping at a dotted name, empty where there is nothing."""
    path = ""
    for part in name.split(".") if name else ():
        path, config = f"{path}.{part}".lstrip("."), config.get(part)
        if config is None:
            return {}
        if not isinstance(config, Mapping):
            raise UserValueError(f"`{path}` in the configuration is not a mapping")
    return config


def _refuse_unknown(section, values, known):
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        where = f"section `{section}`" if section else "top level"
        raise UserValueError(
            f"unknown key {', '.join(unknown)} in the configuration's {where}{nearest(unknown[0], known)}"
        )
