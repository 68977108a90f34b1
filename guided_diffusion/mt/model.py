"""From flags and configuration files to a model of several modalities, and from a checkpoint back to it."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch as th
from omegaconf import OmegaConf

from .. import checkpoint_util, dist_util
from ..errors import UserError, UserFileError, UserValueError
from ..gaussian_diffusion import get_named_beta_schedule
from ..respace import SpacedDiffusion
from ..script_util import (
    DiffusionConfig,
    ModelConfig,
    add_dict_to_argparser,
    model_and_diffusion_defaults,
    split_flags,
)
from ..unet import UNetModel
from .aggregation import Aggregation
from .modalities import parse_modalities
from .modality_set import MultiTask

CONFIG_NAME = "config.yaml"


def mt_defaults() -> dict:
    """The flags that describe a model: ADM's, and `modalities` (see parse_modalities; "" for none),
    `aggregation` and `single_task_probability` (how often it learned the image alone)."""
    flags = model_and_diffusion_defaults()
    del flags["class_cond"]  # a label is a modality
    return flags | dict(modalities="masked:U,label:U", aggregation="bump", single_task_probability=0.0)


@dataclass
class JointModel:
    """A network of several modalities with all that is needed to train or sample it.

    flags: those of `mt_defaults`, as plain values; tasks, network, diffusion: built from them.
    """

    flags: dict
    tasks: MultiTask
    network: UNetModel
    diffusion: SpacedDiffusion

    @classmethod
    def from_flags(cls, flags: Mapping) -> "JointModel":
        """Build from flags of `mt_defaults` (others are left out). UserValueError for impossible values."""
        flags = {name: flags[name] for name in mt_defaults()}
        model_flags, diffusion_flags = split_flags(flags)
        spec, aggregation = model_flags.pop("modalities"), model_flags.pop("aggregation")
        single_task = model_flags.pop("single_task_probability")
        if not 0 <= single_task <= 1:
            raise UserValueError(f"single_task_probability must be from 0 to 1, not {single_task}")
        size, channels = flags["image_size"], flags["image_channels"]
        classes = flags["num_classes"]
        modalities = parse_modalities(spec, (channels, size, size), classes)
        labelled = any(m.kind == "label" for m in modalities)
        model_config = ModelConfig.from_flags(class_cond=labelled, **model_flags)
        diffusion_config = DiffusionConfig(**diffusion_flags)
        tasks = MultiTask(
            modalities,
            channels,
            classes if labelled else None,
            steps=diffusion_config.steps,
            rescaled=diffusion_config.rescale_timesteps,
        )
        network = model_config.build(
            lambda **options: UNetModel(
                **{**options, "in_channels": tasks.input_channels, "modalities": modalities}
            )
        )
        tasks.process = _joint_diffusion(replace(diffusion_config, timestep_respacing=""), tasks, aggregation)
        tasks.single_task = single_task > 0
        return cls(flags, tasks, network, _joint_diffusion(diffusion_config, tasks, aggregation))

    def respaced(self, steps: str | int) -> SpacedDiffusion:
        """The diffusion over fewer steps ("" for all, a number, "ddim50", "10,15,20"), with the same
        marginals."""
        _, flags = split_flags({**self.flags, "timestep_respacing": str(steps)})
        return _joint_diffusion(DiffusionConfig(**flags), self.tasks, self.flags["aggregation"])

    @classmethod
    def load(cls, path: str, weights: str = "ema") -> "JointModel":
        """The model of a checkpoint, in evaluation mode on the CPU; its configuration is in the file or
        beside it.

        path: a complete checkpoint (checkpoint*.pt), a run folder (its newest one), or ADM's model*.pt or
        ema_*.pt beside the run's config.yaml. weights: of a complete checkpoint, `ema` (the first rate), one
        rate such as `0.9999`, or `model`. UserError if something is missing or does not fit.
        """
        state, flags, source = _read(path, weights)
        model = cls.from_flags({**mt_defaults(), **flags})
        checkpoint_util.load_weights(model.network, state, source)
        model.network.eval()
        return model


# Parts that a model may have beside ADM's U-Net, and another may lack.
_OPTIONAL = ("heads.", "label_emb.")


def initialise(network: UNetModel, path: str) -> tuple[list[str], list[str]]:
    """Give `network` the weights of another run, for finetuning: of `path` as in `JointModel.load` (averaged
    ones where there are any), or of ADM's model*.pt or ema_*.pt by themselves.

    Heads and the label's embedding may be missing there, and keep their fresh weights; what the network lacks
    of them is left. Input channels that the network has beyond those of `path` (X modalities) begin at zero,
    without influence. Returns the names of both kinds, shortened. UserError for any other difference.
    """
    try:
        state, _, source = _read(path, "ema")
    except UserFileError:
        state, source = dist_util.load_state_dict(path, map_location="cpu"), path
    return take_over(network, state, source)


def take_over(network: UNetModel, state: Mapping, source: str) -> tuple[list[str], list[str]]:
    """`initialise` with the weights `state` that were read from `source`."""
    own = network.state_dict()
    if not isinstance(state, Mapping):
        raise UserError(f"{source} holds no weights (a dict of tensors by name)")
    fresh = [name for name in own if name not in state and name.startswith(_OPTIONAL)]
    left = [name for name in state if name not in own and name.startswith(_OPTIONAL)]
    weights = {name: value for name, value in state.items() if name not in left}
    stem = "input_blocks.0.0.weight"
    more = own[stem].shape[1] - weights[stem].shape[1] if stem in weights else 0
    if more > 0:
        first = weights[stem]
        weights[stem] = th.cat([first, first.new_zeros(len(first), more, *first.shape[2:])], dim=1)
    checkpoint_util.load_weights(network, weights | {name: own[name] for name in fresh}, source)
    return _parts(fresh), _parts(left)


def _parts(names):
    """heads.label.0.weight -> heads.label, label_emb.weight -> label_emb; each once."""
    return list(
        dict.fromkeys(n.split(".")[0] if n.startswith("label") else ".".join(n.split(".")[:2]) for n in names)
    )


def _joint_diffusion(config, tasks, schedule):
    """The process with the aggregation of the full process: respacing keeps its marginals."""
    if not tasks.peaks:
        return config.build()
    betas = get_named_beta_schedule(config.noise_schedule, config.steps)
    return config.build(aggregation=Aggregation.named(schedule, betas, tasks.peaks))


def _read(path, weights):
    """(state dict, flags, file name) of what `path` means."""
    if os.path.isdir(path):
        found = checkpoint_util.find_complete_checkpoint(path)
        if found is None:
            raise UserFileError(f"no complete checkpoint (checkpoint*.pt) in {path}")
        path = found
    content = dist_util.load_state_dict(path, map_location="cpu")
    if not (isinstance(content, dict) and content.get("format") == checkpoint_util.FORMAT):
        beside = Path(path).parent / CONFIG_NAME
        if not beside.exists():
            raise UserFileError(
                f"{path} holds weights alone, and there is no {CONFIG_NAME} beside it to describe the model"
            )
        return content, read_config(beside), path
    if not {"modalities", "aggregation"} <= set(content["config"]):
        raise UserError(
            f"{path} does not describe a model of mt_image_train.py: it was written by another script"
        )
    if weights == "model":
        return content["model"], content["config"], path
    rates = list(content["ema"])
    rate = rates[0] if weights == "ema" and rates else weights
    if rate not in rates:
        raise UserValueError(
            f"{path} has no EMA {weights!r}; it has {', '.join(rates) or 'none'}, and `model`"
        )
    return content["ema"][rate], content["config"], path


# Flags and configuration files


def read_config(path: str | Path) -> dict:
    """A YAML file as plain values. UserError if it is missing or not a mapping."""
    if not os.path.isfile(path):
        raise UserFileError(f"no such configuration file: {path}")
    try:
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a mapping from flags to values")
    return config


def write_config(config: Mapping, path: str | Path) -> None:
    """Write plain values as YAML."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.create(dict(config))))


def parse_flags(defaults: Mapping, argv: list[str] | None = None, description: str | None = None) -> dict:
    """Flags from the command line over those of `--config FILE` over `defaults`. UserError for unknown names
    in the file.

    A value in the file must have the type of the flag; a flag whose default is text also takes a mapping
    there.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--config", default="", help="a YAML file with any of these flags; the command line wins"
    )
    add_dict_to_argparser(parser, dict(defaults))
    path = parser.parse_args(argv).config
    if path:
        config = read_config(path)
        unknown = sorted(set(config) - set(defaults))
        if unknown:
            raise UserError(f"{path}: unknown flag {', '.join(unknown)}")
        parser.set_defaults(
            **{name: _as_flag(name, value, defaults[name], path) for name, value in config.items()}
        )
    flags = vars(parser.parse_args(argv))
    del flags["config"]
    return flags


def _as_flag(name, value, default, path):
    if isinstance(default, str):
        return (
            value
            if isinstance(value, (dict, str))
            else ",".join(map(str, value if isinstance(value, list) else [value]))
        )
    kinds = {bool: (bool,), int: (int,), float: (int, float)}.get(type(default), (type(default),))
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UserError(f"{path}: {name} must be of type {type(default).__name__}, not {value!r}")
    return type(default)(value)
