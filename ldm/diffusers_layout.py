"""Stable Diffusion 1 and 2 in diffusers' folder layout, under latent-diffusion's names.

A folder has a part in each of `unet`, `vae` and `text_encoder`, and beside them `scheduler`. Stable Diffusion
2's text encoder comes without its last block, which that model does not read: FrozenOpenCLIPEmbedder knows.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from guided_diffusion.errors import UserError, UserFileError
from ldm.modules.diffusionmodules.util import make_beta_schedule

Weights = dict[str, torch.Tensor]

# Of a part's files, in the order in which they are looked for.
_STEMS = (
    ("diffusion_pytorch_model", "safetensors"),
    ("model", "safetensors"),
    ("diffusion_pytorch_model", "bin"),
    ("pytorch_model", "bin"),
)
_VARIANTS = ("", ".fp16")
# diffusers' schedules of beta, as make_beta_schedule calls them.
_SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear"}

# What diffusers says that a network predicts, as `parameterization` calls it.
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}

_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_INSIDE = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
_VAE_HALF = {
    "conv_in": "conv_in",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
    "conv_norm_out": "norm_out",
    "conv_out": "conv_out",
}
_VAE_INSIDE = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    # Attention in the names since diffusers 0.18, then in those before.
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}
_BLOCK = re.compile(
    r"(?P<half>encoder\.|decoder\.|)(?:down|up)_blocks\.(?P<level>\d+)\.(?P<kind>\w+)\.(?P<i>\d+)"
)


def load_folder(folder: str | Path, read: Callable[[Path], Weights]) -> Weights:
    """The tensors of a pipeline's folder, by their names in a checkpoint of latent diffusion.

    read: gives the tensors of one file. Parts that the folder lacks are left out, all but the U-Net; `betas`
    comes with them where scheduler_config.json describes a schedule that latent diffusion knows, `scale_factor`
    where the autoencoder's config.json says scaling_factor. The folder
    may also be one part: `unet`, or `vae`, whose names are then those of the autoencoder alone. UserFileError
    for a folder of another kind or without weights; UserError for damaged files, and tensors that Stable
    Diffusion 1 and 2 do not have.
    """
    folder = Path(folder)
    if not (folder / "unet").is_dir():
        if (folder / "model_index.json").is_file():
            raise UserFileError(f"{folder} has a model_index.json, but no folder unet with weights")
        return _single_part(folder, read)
    weights = {}
    for part, (prefix, translate) in _PARTS.items():
        if (folder / part).is_dir():
            source = folder / part
            weights |= _prefixed(prefix, translate(_read_part(source, read), source))
    return (
        weights
        | _betas(folder / "scheduler" / "scheduler_config.json")
        | _scale(folder / "vae" / "config.json")
    )


def _single_part(folder, read):
    tensors = _read_part(folder, read)
    if "encoder.conv_in.weight" in tensors:
        return vae_weights(tensors, folder)
    if "time_embedding.linear_1.weight" in tensors:
        return _prefixed(_PARTS["unet"][0], unet_weights(tensors, folder))
    raise UserError(f"{folder} holds neither a U-Net nor an autoencoder in diffusers' layout")


def _prefixed(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


# The files


def _read_part(part, read):
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
    files = _read_json(index).get("weight_map")
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


def _read_json(path):
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def parameterization(folder: str | Path) -> str | None:
    """What the network of a pipeline's folder predicts, `eps`, `v` or `x0`; None where nothing says it. UserError
    where it is something else."""
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    told = _read_json(path).get("prediction_type") if path.is_file() else None
    if told is not None and told not in _PREDICTIONS:
        raise UserError(f"{path}: the network predicts {told!r}; known are {', '.join(_PREDICTIONS)}")
    return _PREDICTIONS.get(told)


def _scale(path):
    """{`scale_factor`: float32 []} of an autoencoder's config.json; else nothing."""
    told = _read_json(path).get("scaling_factor") if path.is_file() else None
    return {"scale_factor": torch.tensor(float(told))} if isinstance(told, int | float) else {}


def _betas(path):
    """{`betas`: float32 [T]}, by which a model sees that it was made for the same noise; else nothing."""
    config = _read_json(path) if path.is_file() else {}
    keys = ("beta_schedule", "num_train_timesteps", "beta_start", "beta_end")
    name, *values = (config.get(key) for key in keys)
    changed = config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr")
    if name not in _SCHEDULES or changed or not all(isinstance(value, int | float) for value in values):
        return {}
    return {"betas": torch.from_numpy(make_beta_schedule(_SCHEDULES[name], *values)).float()}


# The names


def unet_weights(tensors: Mapping[str, torch.Tensor], source: str | Path) -> Weights:
    """A U-Net's tensors under latent-diffusion's names. UserError, naming `source`, for an unknown one."""
    return _translated(tensors, _UNET | _unet_blocks(tensors), _UNET_INSIDE, source)


def _unet_blocks(names):
    """Where the blocks of every level are among the input and output blocks, which are counted through."""
    found = {match.group() for name in names if (match := _BLOCK.match(name))}
    places, n = {}, 1
    for level, blocks in enumerate(_levels("down_blocks", found)):
        for i in range(blocks):
            places[f"down_blocks.{level}.resnets.{i}"] = f"input_blocks.{n}.0"
            places[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{n}.1"
            n += 1
        if f"down_blocks.{level}.downsamplers.0" in found:
            places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
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


def vae_weights(tensors: Mapping[str, torch.Tensor], source: str | Path) -> Weights:
    """An autoencoder's tensors under latent-diffusion's names; the linear layers of its attention [C, C]
    become convolutions [C, C, 1, 1]. UserError, naming `source`, for an unknown one."""
    places = dict(_VAE)
    for half in ("encoder.", "decoder."):
        places |= {half + name: half + place for name, place in _VAE_HALF.items()}
    weights = _translated(tensors, places | _vae_blocks(tensors), _VAE_INSIDE, source)
    return {name: value[:, :, None, None] if value.ndim == 2 else value for name, value in weights.items()}


def _vae_blocks(names: Iterable[str]):
    """The blocks of every level. latent-diffusion counts the decoder's from the finest."""
    blocks = [match for name in names if (match := _BLOCK.match(name))]
    last = max((int(match["level"]) for match in blocks if match["half"] == "decoder."), default=0)
    places = {}
    for match in blocks:
        level, i = int(match["level"]), match["i"]
        side = f"up.{last - level}" if match["half"] == "decoder." else f"down.{level}"
        inside = {"resnets": f"block.{i}", "attentions": f"attn.{i}"}
        inside |= {"downsamplers": "downsample", "upsamplers": "upsample"}
        if match["kind"] in inside:
            places[match.group()] = f"{match['half']}{side}.{inside[match['kind']]}"
    return places


def text_weights(tensors: Mapping[str, torch.Tensor], source: str | Path) -> Weights:
    """A CLIP text model's tensors without `text_model.` in front, which not all versions of transformers
    write, and without what belongs to the comparison with images. UserError, naming `source`, if there are
    none."""
    weights = {name.removeprefix("text_model."): value for name, value in tensors.items()}
    if "embeddings.token_embedding.weight" not in weights:
        raise UserError(f"{source} holds no CLIP text model")
    others = ("text_projection.", "embeddings.position_ids")
    return {name: value for name, value in weights.items() if not name.startswith(others)}


def _translated(tensors, places, inside, source):
    """`tensors` renamed: the module by `places`, the layer in it by `inside`, where it has another name."""
    renamed = {}
    for name, value in tensors.items():
        path, _, kind = name.rpartition(".")
        parts = path.split(".")
        modules = (".".join(parts[:cut]) for cut in range(len(parts), 0, -1))
        module = next((module for module in modules if module in places), None)
        if module is None:
            raise UserError(f"{source}: {name} is no tensor of Stable Diffusion 1 or 2")
        layer = path[len(module) + 1 :]
        renamed[".".join(filter(None, (places[module], inside.get(layer, layer), kind)))] = value
    return renamed


_PARTS = {
    "unet": ("model.diffusion_model.", unet_weights),
    "vae": ("first_stage_model.", vae_weights),
    "text_encoder": ("cond_stage_model.transformer.text_model.", text_weights),
}
