"""A model of several modalities with all that is needed to train and sample it, and its checkpoints."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch as th
from omegaconf import OmegaConf

from .. import checkpoint_util
from ..errors import UserError, UserFileError
from ..flags import FLAGS, mt_defaults, read_config
from ..gaussian_diffusion import get_named_beta_schedule
from ..respace import SpacedDiffusion
from ..script_util import (
    DiffusionConfig,
    ModelConfig,
    split_flags,
)
from ..seeding import PerSample
from ..unet import UNetModel
from .aggregation import Aggregation
from .bound import Bound, multitask_bound
from .denoiser import predict_modalities
from .hub import HubModel, training_of
from .losses import JointLosses, multitask_losses
from .modalities import Modality, parse_modalities
from .modality_set import Batch, ModalitySet, Values, derive_values, peaks, with_peaks
from .sampling import EVENLY_SPACED, JointSample, joint_sample
from .solvers import few_timesteps

CONFIG_NAME = "config.yaml"
REPORTED = (50, 200, 500, 800)  # of 1000: timesteps at which the start-up report tells d_t


# What runs had that were made before these flags.
FORMER = dict(detectability=0.0, presence=False, unshifted_probability=0.0, code_interval=1)


class JointModel(HubModel):
    """Modalities, aggregation, network and diffusion, made together.

    modalities: the set, which owns the full process; network: module or callable that `ModalitySet.apply` calls;
    diffusion: what it is sampled with by default, the full process or a respaced one; flags: those of
    `mt_defaults`, as plain values, where it was made of them. Models are shared by `save_pretrained`, `push_to_hub`
    and `from_pretrained` (hub.py).
    """

    def __init__(self, modalities: ModalitySet, network, diffusion=None, flags: Mapping | None = None):
        self.modalities, self.network = modalities, network
        self.diffusion = diffusion or modalities.process
        self.flags = dict(flags or {})
        self.training: dict = {}  # what is known of how it was trained

    @classmethod
    def from_flags(cls, flags: Mapping) -> "JointModel":
        """Build from flags of `mt_defaults` (others are left out). UserValueError for impossible values."""
        flags = {name: flags[name] for name in mt_defaults()}
        own = ("modalities", "aggregation", *FORMER, "single_task_probability")
        names = {name: flags[name] for name in ("class_names", "label_from")}
        model_flags, diffusion_flags = split_flags({k: v for k, v in flags.items() if k not in names})
        spec, schedule, detectability, presence, unshifted, interval, single_task = map(model_flags.pop, own)
        for name in own:
            FLAGS[name].check(name, flags[name])
        shape = (flags["image_channels"], flags["image_size"], flags["image_size"])
        config = DiffusionConfig(**diffusion_flags)
        betas = get_named_beta_schedule(config.noise_schedule, config.steps)
        parsed = parse_modalities(spec, shape, flags["num_classes"], embedded=True)
        parsed = with_peaks(parsed, schedule, betas, shape, detectability)
        classes = next((m.shape[0] for m in parsed if m.data_key == "y"), None)
        if classes:
            model_flags["num_classes"] = classes
        model_config = ModelConfig.from_flags(class_cond=bool(classes), **model_flags)
        modalities = ModalitySet(
            parsed,
            shape[0],
            joint_process(replace(config, timestep_respacing=""), parsed, schedule),
            num_classes=classes,
            presence=presence,
            single_task=single_task > 0,
        )
        network = model_config.build(
            lambda **options: UNetModel(**{**options, "in_channels": modalities.input_channels})
        )
        # After the U-Net, whose fresh weights are those of the single task.
        width, mult = model_config.num_channels, model_config.channel_mult
        network.heads = modalities.make_heads(int(mult[-1] * width), int(mult[0] * width))
        network.presence = modalities.make_presence(4 * width)
        if interval != 1 and (codes := modalities.make_codes(shape)) is not None:
            network.codes = codes
        return cls(modalities, network, joint_process(config, parsed, schedule), flags)

    @classmethod
    def load(cls, path: str, weights: str = "ema") -> "JointModel":
        """The model of a checkpoint, in evaluation mode on the CPU; its configuration is in the file or
        beside it.

        path: a complete checkpoint (checkpoint*.pt), a run folder (its newest one), a .safetensors that describes
        itself or a folder of `save_pretrained`, or ADM's model*.pt or ema_*.pt beside the run's config.yaml. weights: of a complete checkpoint, `ema` (the first rate), one
        rate such as `0.9999`, or `model`. UserError if something is missing or does not fit.
        """
        state, flags, source = _read(path, weights)
        check_flags(flags, source)
        model = cls.from_flags(with_former_defaults(flags))
        checkpoint_util.load_weights(model.network, state, source)
        model.network.dtype = th.float32  # of the weights, also where they were trained with use_fp16
        model.network.eval()
        model.training = training_of(flags)
        return model

    @property
    def class_names(self) -> Sequence[str]:
        """The names of a label's classes, () where the model has none."""
        return self.flags.get("class_names") or ()

    def respaced(self, steps: str | int, even: bool = False) -> SpacedDiffusion:
        """The diffusion over fewer steps ("" for all, a number, "ddim50", "10,15,20"), with the same marginals.

        A number means `few_timesteps`, or with `even` upstream's, as in its --timestep_respacing.
        """
        _, flags = split_flags({**self.flags, "timestep_respacing": str(steps)})
        kept = None
        if not even and str(steps).isdecimal():
            kept = few_timesteps(self.modalities.process.alphas_cumprod, int(steps))
        return joint_process(DiffusionConfig(**flags), list(self.modalities), self.flags["aggregation"], kept)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return (self.flags["image_channels"], self.flags["image_size"], self.flags["image_size"])

    def losses(self, batch: Batch, t: th.Tensor, network=None, **options) -> JointLosses:
        """Equation 6 on `batch` (with its images) at timesteps t [B]; options: of `multitask_losses`.

        network: the same network, where it is wrapped for training.
        """
        options.setdefault("unshifted_probability", self.flags.get("unshifted_probability", 0.0))
        return multitask_losses(
            self.modalities,
            self.network if network is None else network,
            batch,
            t,
            encoder=self.network,
            diffusion=self.diffusion,
            **options,
        )

    def sample(self, random: PerSample, steps: str | int | None = None, **options) -> JointSample:
        """One sample for each generator of `random`; options: of `joint_sample`, such as given and sampler.

        steps: as in `respaced`, even for samplers of EVENLY_SPACED; None: the diffusion's own.
        """
        even = options.get("sampler", "ddpm") in EVENLY_SPACED
        diffusion = self.diffusion if steps is None else self.respaced(steps, even)
        shape = (len(random), *(options.pop("shape", None) or self.shape))
        return joint_sample(diffusion, self.modalities, self.network, shape, random, **options)

    def predict(self, images: th.Tensor, given: Values | None = None, **options) -> Values:
        """The modalities of images [B, C, H, W]; options: of `predict_modalities`."""
        return predict_modalities(self.modalities, self.network, images, given, **options)

    def bound(self, batch: Batch, steps: str | int | None = None, **options) -> Bound:
        """The variational bound on `batch` (with its images); options: of `multitask_bound`."""
        diffusion = self.diffusion if steps is None else self.respaced(steps, even=True)
        return multitask_bound(diffusion, self.modalities, self.network, batch, **options)

    def derived(self, images: th.Tensor, batch: Batch, random: PerSample) -> Batch:
        """`batch` with its images, and what is made from them."""
        return derive_values(self.modalities, images, batch, random)

    def report(self) -> str:
        """For every modality that enters the latent how far its shift may carry an error of its prediction, and
        how far it stands out of the noise (d_t) at a few timesteps."""
        process, size = self.modalities.process, int(np.prod(self.shape))
        if process.aggregation is None or not process.aggregation.names:
            return ""
        lines = process.aggregation.report(process.alphas_cumprod).splitlines()
        d = process.aggregation.detectability(process.alphas_cumprod, size)
        times = [t * process.num_timesteps // 1000 for t in REPORTED]
        for k, m in enumerate(m for m in self.modalities if m.aggregated):
            told = ", ".join(f"{d[k, t]:.2g} at t = {t}" for t in times)
            lines[k] += f"; d_t {told}"
            if not m.has_content_everywhere and d[k].max() > 5 and not self.modalities.presence:
                lines[k] += " (the shift gives it away: its head learns nothing of images where d_t > 1)"
        return "\n".join(lines)


def joint_process(
    config: DiffusionConfig, modalities: Sequence[Modality], schedule: str, kept: Sequence[int] | None = None
) -> SpacedDiffusion:
    """The process with the aggregation of the full process: respacing keeps its marginals. Without modalities the
    single task's. kept: its timesteps, in place of those that the configuration says."""
    if not modalities:
        return config.build(use_timesteps=kept)
    betas = get_named_beta_schedule(config.noise_schedule, config.steps)
    return config.build(use_timesteps=kept, aggregation=Aggregation.named(schedule, betas, peaks(modalities)))


def with_former_defaults(flags: Mapping) -> dict:
    """A checkpoint's flags with those that did not exist when it was made."""
    return {**mt_defaults(), **FORMER, **flags}


def check_flags(flags: Mapping, source: str) -> None:
    """UserError where the configuration of `source` has a value of another type than the flag, or out of its range."""
    for name, default in mt_defaults().items():
        value = flags.get(name, default)
        if not _fits(name, value, default):
            kind = "text" if isinstance(default, str) else type(default).__name__
            raise UserError(
                f"the configuration of {source} cannot be used: {name} must be {kind}, not {value!r}"
            )
        if value != default and name != "num_classes":  # 0 without labels
            FLAGS[name].check(f"the configuration of {source} cannot be used: {name}", value)


def _fits(name: str, value, default) -> bool:
    if isinstance(value, bool) != isinstance(default, bool):
        return False
    if name == "class_names":
        return isinstance(value, list | tuple | str) and all(isinstance(one, str) for one in value)
    if name == "modalities":
        return isinstance(value, str | dict)
    lists = isinstance(value, list | tuple) and all(isinstance(one, int | str) for one in value)
    return (
        lists
        if isinstance(value, list | tuple)
        else isinstance(value, (int, float) if type(default) is float else type(default))
    )


# Parts that a model may have beside ADM's U-Net, and another may lack.
_OPTIONAL = ("heads.", "label_emb.", "presence.", "codes.")


def config_of(path: str) -> dict | None:
    """The configuration of the run at `path`, as of `initialise`; None where there are weights alone."""
    try:
        return _read(path, "model")[1]
    except UserFileError:
        return None


def initialise(network: UNetModel, path: str) -> tuple[list[str], list[str]]:
    """Give `network` the weights of another run, for finetuning: of `path` as in `JointModel.load` (averaged
    ones where there are any), or of ADM's model*.pt or ema_*.pt by themselves.

    Heads and the label's embedding may be missing there, and keep their fresh weights; what the network lacks
    of them is left. Input channels that the network has beyond those of `path` (X modalities) begin at zero,
    without influence; those that it lacks are left. Returns the names of both kinds, shortened. UserError for any other difference.
    """
    try:
        state, _, source = _read(path, "ema")
    except UserFileError:
        state, source = checkpoint_util.read_weights(path), path
    return take_over(network, state, source)


def take_over(network: UNetModel, state: Mapping, source: str) -> tuple[list[str], list[str]]:
    """`initialise` with the weights `state` that were read from `source`."""
    own = network.state_dict()
    fresh = [name for name in own if name not in state and name.startswith(_OPTIONAL)]
    left = [name for name in state if name not in own and name.startswith(_OPTIONAL)]
    weights = {name: value for name, value in state.items() if name not in left}
    fitted = checkpoint_util.fit_channels(weights, own)
    checkpoint_util.load_weights(network, fitted | {name: own[name] for name in fresh}, source)
    surplus = _channels(weights) - _channels(fitted)
    return _parts(fresh), _parts(left) + [f"{surplus} input channels"] * (surplus > 0)


def _channels(weights):
    return weights[checkpoint_util.STEM].shape[1]


def _parts(names):
    """heads.label.0.weight -> heads.label, label_emb.weight -> label_emb; each once. Codes are no weights."""
    depth = {"heads": 2}
    parts = (name.split(".") for name in names if not name.startswith("codes."))
    return list(dict.fromkeys(".".join(part[: depth.get(part[0], 1)]) for part in parts))


def _read(path, weights):
    """(state dict, flags, file name) of what `path` means."""
    if os.path.isdir(path):
        shared = os.path.join(path, checkpoint_util.HUB_WEIGHTS)
        found = shared if os.path.isfile(shared) else checkpoint_util.find_complete_checkpoint(path)
        if found is None:
            raise UserFileError(f"no complete checkpoint (checkpoint*.pt) in {path}")
        path = found
    if str(path).endswith(".safetensors"):
        about = checkpoint_util.read_metadata(path, checkpoint_util.METADATA)
        if about.get("kind") == "joint":
            return checkpoint_util.read_weights(path), about["flags"], path
    content = checkpoint_util.read(path)
    if not (isinstance(content, dict) and content.get("format") == checkpoint_util.FORMAT):
        beside = Path(path).parent / CONFIG_NAME
        if not beside.exists():
            raise UserFileError(
                f"{path} holds weights alone, and there is no {CONFIG_NAME} beside it to describe the model"
            )
        return checkpoint_util.weights_of(content, path), read_config(beside), path
    checkpoint_util.check_complete(content, path)
    if not {"modalities", "aggregation"} <= set(content["config"]):
        raise UserError(
            f"{path} does not describe a model of mt_image_train.py: it was written by another script"
        )
    checkpoint_util.warn_of_young_average(content, path, weights)
    return checkpoint_util.weights_of(content, path, weights), content["config"], path


def write_config(config: Mapping, path: str | Path) -> None:
    """Write plain values as YAML."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.create(dict(config))))
