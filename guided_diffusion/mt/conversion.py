"""Models in and out: from ADM's checkpoints and back to them, and safetensors files that describe
themselves.

A safetensors file has the model's flags in its metadata, under `mt_diffusion`: {"kind": "joint" or "adm",
"flags": ...} as JSON. A .pt file has its flags beside it: a joint model in config.yaml, ADM's as words
for its scripts in NAME.flags.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch as th

from .. import checkpoint_util
from ..errors import UserError
from ..script_util import (
    NUM_CLASSES,
    create_model_and_diffusion,
    default_channel_mult,
    model_and_diffusion_defaults,
)
from .diffusers_layout import is_unet2d, read_unet2d, unet2d_config, write_unet2d
from .model import (
    CONFIG_NAME,
    JointModel,
    mt_defaults,
    read_config,
    take_over,
    with_former_defaults,
    write_config,
)

KINDS = ("joint", "adm")
UPSTREAM_SIZES = (64, 128, 256, 512)  # at which upstream has channel multipliers of its own
_LABELS = "label_emb.weight"


@dataclass(frozen=True)
class Package:
    """Weights, and what is known about them.

    task: `joint` (a model of mt_image_train.py), `adm` (a single-task one), None if the file does not
    say; flags: those of `mt_defaults` or `model_and_diffusion_defaults` that are known.
    """

    weights: dict[str, th.Tensor]
    task: str | None
    flags: dict
    source: str


def read(path: str, weights: str = "ema") -> Package:
    """A run folder, a checkpoint*.pt, a .safetensors file, ADM's .pt, with or without a config.yaml or a
    NAME.flags beside it, or the folder of a UNet2DModel of diffusers.

    weights: which of a complete checkpoint, as in `JointModel.load`. UserError for anything else.
    """
    if str(path).endswith(".safetensors"):
        about = checkpoint_util.read_metadata(path, checkpoint_util.METADATA)
        kind, flags = about.get("kind"), about.get("flags", {})
        if kind not in (None, *KINDS) or not isinstance(flags, dict):
            raise UserError(f"{path} describes itself as another program's: kind {kind!r}, flags {flags!r}")
        return Package(checkpoint_util.read_weights(path), kind, flags, str(path))
    if os.path.isdir(path) and is_unet2d(path):
        state, flags = read_unet2d(path)
        return Package(state, "adm", flags, str(path))
    known = checkpoint_util.config_of(path)
    named = os.path.isdir(path) or os.path.basename(path).startswith("checkpoint")
    is_run = named or "modalities" in known
    if is_run or (Path(path).parent / CONFIG_NAME).exists():
        model = JointModel.load(path, weights)
        return Package(model.network.state_dict(), "joint", model.flags, str(path))
    flags = {name: known[name] for name in model_and_diffusion_defaults() if name in known}
    return Package(checkpoint_util.read_weights(path), None, flags, str(path))


def write(package: Package, path: str) -> list[str]:
    """Write weights and flags to `path`, .safetensors or .pt; the names of the files written. One for diffusers
    becomes the folder `path`.

    UserError for another ending, or where a config.yaml of another model lies beside a .pt.
    """
    target = Path(path)
    if package.task == "diffusers":
        return write_unet2d(package.weights, package.flags, target, package.source)
    if target.suffix not in (".pt", ".safetensors"):
        raise UserError(f"{path}: the name must end in .pt or .safetensors")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".safetensors":
        about = {checkpoint_util.METADATA: {"kind": package.task, "flags": package.flags}}
        checkpoint_util.save_safetensors(package.weights, target, about)
        return [str(target)]
    beside = target.parent / CONFIG_NAME if package.task == "joint" else target.with_suffix(".flags")
    if package.task == "joint":
        if beside.exists() and read_config(beside) != package.flags:
            raise UserError(f"{beside} describes another model: choose another folder for {target.name}")
        write_config(package.flags, beside)
    else:
        beside.write_text(adm_words(package.flags) + "\n")
    checkpoint_util.save_atomic(package.weights, str(target))
    return [str(target), str(beside)]


def joint_model(package: Package) -> JointModel:
    """The model of a `joint` package, in evaluation mode on the CPU. UserError if weights and flags do
    not fit.
    """
    model = JointModel.from_flags(with_former_defaults(package.flags))
    checkpoint_util.load_weights(model.network, package.weights, package.source)
    model.network.eval()
    return model


def from_adm(package: Package, flags: Mapping) -> tuple[Package, list[str]]:
    """A joint model that begins with ADM's weights, and the names of its parts that are fresh.

    flags: of `model_and_diffusion_defaults` and `mt_defaults`, over those of the package. Heads begin at
    ADM's initialisation, the input channels of X modalities at zero, so that the noise it predicts
    without modalities is ADM's. UserError where the weights belong to another model, or know classes and
    no modality is a label.
    """
    flags = {**package.flags, **flags}
    if _LABELS in package.weights:
        flags["num_classes"] = len(package.weights[_LABELS])
    known = mt_defaults()
    model = JointModel.from_flags({**known, **{name: flags[name] for name in known if name in flags}})
    if model.modalities.num_classes is None and _LABELS in package.weights:
        raise UserError(
            f"{package.source} is class-conditional ({flags['num_classes']} classes): one modality must be a "
            "label, as in --modalities label:X"
        )
    fresh, _ = take_over(model.network, package.weights, package.source)
    model.modalities.refresh_codes(model.network, th.zeros(1, *model.shape))
    return Package(model.network.state_dict(), "joint", model.flags, package.source), fresh


def to_adm(package: Package, class_cond: bool | None = None) -> Package:
    """The single-task part of a joint model, as ADM's create_model_and_diffusion reads it.

    Heads are dropped, and the input channels of X modalities, which leaves the network as it is for their
    null input. class_cond: keep the class embedding (default: if the network saw the label, variant X);
    without it the network is the one for no label. UserError if there are no classes to keep.
    """
    model = joint_model(package)
    label = model.modalities.first("label")
    if class_cond and label is None:
        raise UserError(f"{package.source} knows no classes: leave out --class_cond")
    keep = label is not None and label.as_input if class_cond is None else class_cond
    state = {
        name: value
        for name, value in model.network.state_dict().items()
        if not name.startswith(("heads.", "presence.", "codes."))
    }
    if not keep:
        state.pop(_LABELS, None)
    defaults = model_and_diffusion_defaults()
    flags = {name: model.flags[name] for name in defaults if name in model.flags} | {"class_cond": keep}
    if not keep:
        flags["num_classes"] = defaults["num_classes"]
    if flags["channel_mult"] == "" and flags["image_size"] not in UPSTREAM_SIZES:
        flags["channel_mult"] = ",".join(map(str, default_channel_mult(flags["image_size"])))
    single, _ = create_model_and_diffusion(**flags)
    state = checkpoint_util.fit_channels(state, single.state_dict())
    checkpoint_util.load_weights(single, state, package.source)
    return Package(state, "adm", flags, package.source)


def to_diffusers(package: Package, flags: Mapping, class_cond: bool | None = None) -> Package:
    """A single-task model, or the single-task part of a joint one (`to_adm`), to be written for diffusers.

    flags: of `model_and_diffusion_defaults`, over those that the package knows. UserError where weights and flags do not
    fit, or diffusers has no such network.
    """
    if package.task == "joint":
        package = to_adm(package, class_cond)
    flags = {**model_and_diffusion_defaults(), **package.flags, **flags}
    single, _ = create_model_and_diffusion(**flags)
    checkpoint_util.load_weights(single, package.weights, package.source)
    unet2d_config(flags)  # refuses what cannot be expressed
    return Package(single.state_dict(), "diffusers", flags, package.source)


def adm_words(flags: Mapping) -> str:
    """The flags as words for ADM's scripts, without those at their defaults."""
    defaults = model_and_diffusion_defaults()
    return " ".join(f"--{name}={value}" for name, value in flags.items() if value != defaults[name])


def obstacles(flags: Mapping) -> list[str]:
    """What upstream has as constants where these flags say otherwise: what must be changed there first."""
    found = []
    if flags["class_cond"] and flags["num_classes"] != NUM_CLASSES:
        found.append(
            f"NUM_CLASSES in its script_util.py is {NUM_CLASSES}, here {flags['num_classes']} (its scripts take no "
            "--num_classes)"
        )
    default = default_channel_mult(512) if flags["image_size"] == 512 else ()
    mult = [float(number) for number in flags["channel_mult"].split(",") if number]
    if any(not number.is_integer() for number in mult) and tuple(mult) != tuple(default):
        found.append(f"it reads whole channel multipliers only, here {flags['channel_mult']}")
    if flags["image_channels"] != 3:
        found.append(f"its create_model makes networks of 3 channels, here {flags['image_channels']}")
    return found
