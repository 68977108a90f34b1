"""diffusers' folders: how their files are read, what the parts of a U-Net are called, and models of pixels as its UNet2DModel.

A folder of a pixel model is a UNet2DModel's (config.json, diffusion_pytorch_model.safetensors) with the settings of a
DDPMScheduler beside it, and a model_index.json where DDPMPipeline can run it: without classes.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from .. import checkpoint_util
from ..errors import UserError, UserFileError, UserValueError
from ..flags import model_and_diffusion_defaults
from ..script_util import ModelConfig, split_flags

Weights = dict[str, torch.Tensor]
VERSION = "0.42.1"  # of diffusers, by which the files that are written were read

# ------------------------------------------------------------------------------------------------------------ files

# Of a part's files, in the order in which they are looked for.
_STEMS = (
    ("diffusion_pytorch_model", "safetensors"),
    ("model", "safetensors"),
    ("diffusion_pytorch_model", "bin"),
    ("pytorch_model", "bin"),
)
_VARIANTS = ("", ".fp16")


def read_part(part: Path, read: Callable[[Path], Weights]) -> Weights:
    """The tensors of a part's folder, by diffusers' names."""
    for variant in _VARIANTS:
        for stem, kind in _STEMS:
            whole, index = part / f"{stem}{variant}.{kind}", part / f"{stem}.{kind}.index{variant}.json"
            if whole.is_file():
                return read(whole)
            if index.is_file():
                return _read_shards(index, read)
    raise UserFileError(
        f"the folder {part} holds no weights in diffusers' layout (diffusion_pytorch_model.safetensors or "
        ".bin, model.safetensors, pytorch_model.bin)"
    )


def _read_shards(index, read):
    """The tensors of the files that an index names."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, Mapping) or not all(
        isinstance(v, str) and Path(v).name == v for v in files.values()
    ):
        raise UserError(f"{index} does not say which files beside it hold which tensors (weight_map)")
    tensors = {}
    for file in sorted(set(files.values())):
        tensors |= read(index.parent / file)
    lost = [name for name in files if name not in tensors]
    if lost:
        raise UserError(f"{index}: {len(lost)} tensors are in none of the files (first: {lost[0]})")
    return tensors


def read_json(path: Path) -> dict:
    """What a JSON file holds. UserError where that is no object."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def write_json(path: Path, content: Mapping) -> None:
    """Write one of diffusers' JSON files; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------------ names

UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_INSIDE = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
BLOCK = re.compile(
    r"(?P<half>encoder\.|decoder\.|)(?:down|up)_blocks\.(?P<level>\d+)\.(?P<kind>\w+)\.(?P<i>\d+)"
)


def unet_blocks(names: Iterable[str]) -> dict[str, str]:
    """Where the blocks of every level are among the input and output blocks, which are counted through."""
    modules = {name.removesuffix(".weight") for name in names}
    found = {match.group() for name in modules if (match := BLOCK.match(name))}
    places, n = {}, 1
    for level, blocks in enumerate(_levels("down_blocks", found)):
        for i in range(blocks):
            places[f"down_blocks.{level}.resnets.{i}"] = f"input_blocks.{n}.0"
            places[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{n}.1"
            n += 1
        shrinks = f"down_blocks.{level}.downsamplers.0"
        if f"{shrinks}.norm1" in modules:
            places[shrinks] = f"input_blocks.{n}.0"
        elif shrinks in found:
            places[f"{shrinks}.conv"] = f"input_blocks.{n}.0.op"
        if shrinks in found:
            n += 1
    n = 0
    for level, blocks in enumerate(_levels("up_blocks", found)):
        for i in range(blocks):
            places[f"up_blocks.{level}.resnets.{i}"] = f"output_blocks.{n}.0"
            places[f"up_blocks.{level}.attentions.{i}"] = f"output_blocks.{n}.1"
            n += 1
        behind = 2 if f"up_blocks.{level}.attentions.0" in found else 1
        places[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{n - 1}.{behind}"
    return places


def _levels(side, found):
    """How many residual blocks each level of a side has."""
    counts = []
    while blocks := sum(name.startswith(f"{side}.{len(counts)}.resnets.") for name in found):
        counts.append(blocks)
    return counts


def translated(
    tensors: Mapping[str, torch.Tensor],
    places: Mapping[str, str],
    inside: Mapping[str, str],
    source: str | Path,
) -> Weights:
    """`tensors` renamed: the module by `places`, the layer in it by `inside`, where it has another name."""
    renamed = {}
    for name, value in tensors.items():
        path, _, kind = name.rpartition(".")
        parts = path.split(".")
        modules = (".".join(parts[:cut]) for cut in range(len(parts), 0, -1))
        module = next((module for module in modules if module in places), None)
        if module is None:
            raise UserError(f"{source}: {name} is no tensor of a model that is known")
        layer = path[len(module) + 1 :]
        renamed[".".join(filter(None, (places[module], inside.get(layer, layer), kind)))] = value
    return renamed


def reversed_names(places: Mapping[str, str], inside: Mapping[str, str]) -> tuple[dict, dict]:
    """`places` and `inside` of `translated` for the way back; of several names for one the first."""
    return {own: name for name, own in places.items()}, {own: n for n, own in reversed(list(inside.items()))}


def unet_names(layers: int, attends: list[bool], resnets_resample: bool) -> list[str]:
    """A name of every block that diffusers' U-Net has, with `layers` residual blocks in a level; attends: whether there is
    attention, by level; resnets_resample: whether residual blocks change the resolution."""
    names, last = [], len(attends) - 1
    for side, more, sampler in (("down", 0, "downsamplers"), ("up", 1, "upsamplers")):
        for level, attention in enumerate(attends if side == "down" else attends[::-1]):
            block = f"{side}_blocks.{level}"
            names += [f"{block}.resnets.{i}.conv1" for i in range(layers + more)]
            names += [f"{block}.attentions.{i}.norm" for i in range((layers + more) * attention)]
            if level < last:
                names.append(f"{block}.{sampler}.0.{'norm1' if resnets_resample else 'conv'}")
    return names


# ---------------------------------------------------------------------------------------------------- models of pixels

CLASS = "UNet2DModel"
_INSIDE = UNET_INSIDE | {
    "group_norm": "norm",
    "to_out.0": "proj_out",
    # Before diffusers 0.18:
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "proj_out",
}
_PLACES = UNET | {"class_embedding": "label_emb"}
_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def unet2d_config(flags: Mapping) -> dict:
    """The config.json of a UNet2DModel that is the network of ADM's flags. UserValueError where diffusers has none."""
    model = ModelConfig.from_flags(**split_flags(dict(flags))[0])
    widths = [int(mult * model.num_channels) for mult in model.channel_mult]
    attends = [2**level in model.attention_strides for level in range(len(widths))]
    if model.channel_mult[0] != 1:
        raise UserValueError(
            f"diffusers cannot express channel_mult {','.join(map(str, model.channel_mult))}: its timestep embedding is as "
            f"wide as the first level, {widths[0]}, here {model.num_channels}"
        )
    if flags["rescale_timesteps"] and flags["diffusion_steps"] != 1000:
        raise UserValueError(
            f"diffusers cannot express rescale_timesteps with diffusion_steps {flags['diffusion_steps']}: its networks are "
            "told the timestep as it is"
        )
    ends = "Resnet{}sampleBlock2D" if model.resblock_updown else "{}Block2D"
    plain = {side: ends.format(side) for side in ("Down", "Up")}
    kinds = {
        side: [f"Attn{side}Block2D" if has else plain[side] for has in attends] for side in ("Down", "Up")
    }
    how = "resnet" if model.resblock_updown else "conv"
    return {
        "_class_name": CLASS,
        "_diffusers_version": VERSION,
        "sample_size": model.image_size,
        "in_channels": model.image_channels,
        "out_channels": model.image_channels * (2 if model.learn_sigma else 1),
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "freq_shift": 0,
        "flip_sin_to_cos": True,
        "down_block_types": kinds["Down"],
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": kinds["Up"][::-1],
        "block_out_channels": widths,
        "layers_per_block": model.num_res_blocks,
        "mid_block_scale_factor": 1,
        "downsample_padding": 1,
        "downsample_type": how,
        "upsample_type": how,
        "dropout": model.dropout,
        "act_fn": "silu",
        "attention_head_dim": _head_width(model, widths, attends),
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if model.use_scale_shift_norm else "default",
        "add_attention": True,
        "num_class_embeds": model.num_classes,
    }


def _head_width(model, widths, attends):
    """Channels of an attention head; None, diffusers' word for one head, of whatever width."""
    if model.num_head_channels != -1:
        return model.num_head_channels
    upward = model.num_heads if model.num_heads_upsample == -1 else model.num_heads_upsample
    if model.num_heads == upward == 1:
        return None
    attended = [width for width, has in zip(widths, attends, strict=True) if has]
    found = {width // model.num_heads for width in (*attended, widths[-1])} | {w // upward for w in attended}
    if len(found) > 1:
        raise UserValueError(
            f"diffusers cannot express num_heads {model.num_heads}: its attention heads have one width at all levels, here "
            f"{', '.join(map(str, sorted(found)))} channels"
        )
    return found.pop()


def scheduler_config(flags: Mapping) -> dict:
    """The scheduler_config.json of a DDPMScheduler that is the process of ADM's flags, of all steps."""
    scale = 1000 / flags["diffusion_steps"]
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": flags["diffusion_steps"],
        "beta_schedule": _SCHEDULES[flags["noise_schedule"]],
        "beta_start": scale * 0.0001,
        "beta_end": scale * 0.02,
        "variance_type": "learned_range" if flags["learn_sigma"] else "fixed_large",
        "prediction_type": "sample" if flags["predict_xstart"] else "epsilon",
        "clip_sample": True,
    }


def unet2d_weights(weights: Mapping[str, torch.Tensor], flags: Mapping, source: str) -> Weights:
    """ADM's tensors under UNet2DModel's names."""
    apart = {}
    for name, value in weights.items():
        module, _, kind = name.rpartition(".")
        if module.endswith(".qkv"):
            for part, rows in zip("qkv", _rows(value, flags), strict=True):
                apart[f"{module.removesuffix('qkv')}to_{part}.{kind}"] = (
                    rows.flatten(1) if kind == "weight" else rows
                )
        else:
            apart[name] = value[..., 0] if module.endswith(".proj_out") and value.ndim == 3 else value
    places, inside = reversed_names(_places(unet2d_config(flags)), _INSIDE)
    return {name: value.contiguous() for name, value in translated(apart, places, inside, source).items()}


def _places(config):
    attends = [kind.startswith("Attn") for kind in config["down_block_types"]]
    return _PLACES | unet_blocks(
        unet_names(config["layers_per_block"], attends, config["downsample_type"] == "resnet")
    )


def _rows(value, flags):
    """Queries, keys and values [3, C, ...] of a fused tensor [3 C, ...] in one of ADM's two orders."""
    if flags["use_new_attention_order"]:
        return value.unflatten(0, (3, -1))
    heads = _heads(len(value) // 3, flags)
    return value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(1, 2)


def _heads(width, flags):
    return flags["num_heads"] if flags["num_head_channels"] == -1 else width // flags["num_head_channels"]


def write_unet2d(
    weights: Mapping[str, torch.Tensor], flags: Mapping, folder: str | Path, source: str
) -> list[str]:
    """Write ADM's network as a UNet2DModel's folder; the names of the files."""
    folder, config = Path(folder), unet2d_config(flags)
    tensors = unet2d_weights(weights, flags, source)
    files = {"config.json": config, "scheduler_config.json": scheduler_config(flags)}
    if not flags["class_cond"]:
        index = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", CLASS]}
        files["model_index.json"] = {"_class_name": "DDPMPipeline", "_diffusers_version": VERSION, **index}
    for name, content in files.items():
        write_json(folder / name, content)
    whole = folder / "diffusion_pytorch_model.safetensors"
    checkpoint_util.save_safetensors(tensors, whole)
    return [str(folder / name) for name in files] + [str(whole)]


def is_unet2d(folder: str | Path) -> bool:
    """Is it the folder of a UNet2DModel, or of a pipeline with one?"""
    return _unet2d_part(Path(folder)) is not None


def _unet2d_part(folder):
    for part in (folder, folder / "unet"):
        if (part / "config.json").is_file() and read_json(part / "config.json").get("_class_name") == CLASS:
            return part
    return None


def read_unet2d(folder: str | Path) -> tuple[Weights, dict]:
    """(weights, flags) of ADM's network and process that a UNet2DModel's folder describes. UserError where ADM has none."""
    part = _unet2d_part(Path(folder))
    config = read_json(part / "config.json")
    beside = (part / "scheduler_config.json", part.parent / "scheduler" / "scheduler_config.json")
    scheduler = next((read_json(path) for path in beside if path.is_file()), {})
    try:
        flags = _flags_of(config, scheduler)
        wanted = unet2d_config(flags)
    except (KeyError, TypeError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{part / 'config.json'} does not describe a {CLASS} ({error})") from None
    if not flags["use_scale_shift_norm"]:
        wanted["attn_norm_num_groups"] = config.get("attn_norm_num_groups")  # None: as many as elsewhere
    for name, value in wanted.items():
        if not name.startswith("_") and config.get(name, value) != value:
            raise UserError(
                f"{part / 'config.json'}: ADM has no network with {name} {config[name]!r}, only {value!r}"
            )
    tensors = read_part(part, lambda path: checkpoint_util.read_weights(path))
    weights = translated(tensors, _places(wanted), _INSIDE, part)
    joined = {name: value for name, value in weights.items() if not re.search(r"\.to_[qkv]\.", name)}
    for name in weights:
        if ".to_q." in name:
            rows = [weights[name.replace(".to_q.", f".to_{p}.")] for p in "qkv"]
            joined[name.replace(".to_q.", ".qkv.")] = torch.cat(rows)
    for name, value in joined.items():
        if re.search(r"\d\.(qkv|proj_out)\.weight$", name) and value.ndim == 2:
            joined[name] = value[..., None]  # a convolution of one position
    return joined, flags


def _flags_of(config, scheduler):
    widths, kinds = config["block_out_channels"], config["down_block_types"]
    size, steps = config["sample_size"], scheduler.get("num_train_timesteps", 1000)
    schedule = {name: own for own, name in _SCHEDULES.items()}.get(scheduler.get("beta_schedule", "linear"))
    if schedule is None:
        raise UserError(f"ADM has no noise schedule {scheduler['beta_schedule']!r}")
    head = config.get("attention_head_dim", 8)
    flags = dict(
        image_size=size,
        num_channels=widths[0],
        num_res_blocks=config["layers_per_block"],
        channel_mult=",".join(f"{width / widths[0]:g}" for width in widths),
        attention_resolutions=",".join(
            str(size >> i) for i, kind in enumerate(kinds) if kind.startswith("Attn")
        ),
        num_heads=1 if head is None else model_and_diffusion_defaults()["num_heads"],
        num_head_channels=-1 if head is None else head,
        dropout=config.get("dropout", 0.0),
        class_cond=config.get("num_class_embeds") is not None,
        use_scale_shift_norm=config.get("resnet_time_scale_shift") == "scale_shift",
        resblock_updown=config.get("downsample_type") == "resnet",
        use_new_attention_order=True,
        learn_sigma=config["out_channels"] == 2 * config["in_channels"],
        image_channels=config["in_channels"],
        diffusion_steps=steps,
        noise_schedule=schedule,
        predict_xstart=scheduler.get("prediction_type") == "sample",
    )
    if flags["class_cond"]:
        flags["num_classes"] = config["num_class_embeds"]
    return model_and_diffusion_defaults() | flags
