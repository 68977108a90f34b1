"""Stable Diffusion 1 and 2 in diffusers' folder layout, under latent-diffusion's names.

A folder has a part in each of `unet`, `vae` and `text_encoder`, and beside them `scheduler`. Stable Diffusion
2's text encoder comes without its last block, which that model does not read: FrozenOpenCLIPEmbedder knows.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from guided_diffusion.errors import UserError, UserFileError
from guided_diffusion.mt.diffusers_layout import (
    BLOCK,
    UNET,
    UNET_INSIDE,
    Weights,
    read_json,
    read_part,
    translated,
    unet_blocks,
)
from ldm.modules.diffusionmodules.util import make_beta_schedule

# diffusers' schedules of beta, as make_beta_schedule calls them.
SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear"}

# What diffusers says that a network predicts, as `parameterization` calls it.
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}

_VAE = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
_VAE_HALF = {
    "conv_in": "conv_in",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
    "conv_norm_out": "norm_out",
    "conv_out": "conv_out",
}
VAE_INSIDE = {
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
            weights |= _prefixed(prefix, translate(read_part(source, read), source))
    return (
        weights
        | _betas(folder / "scheduler" / "scheduler_config.json")
        | _scale(folder / "vae" / "config.json")
    )


def _single_part(folder, read):
    tensors = read_part(folder, read)
    if "encoder.conv_in.weight" in tensors:
        return vae_weights(tensors, folder)
    if "time_embedding.linear_1.weight" in tensors:
        return _prefixed(_PARTS["unet"][0], unet_weights(tensors, folder))
    raise UserError(f"{folder} holds neither a U-Net nor an autoencoder in diffusers' layout")


def _prefixed(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


# The files


def parameterization(folder: str | Path) -> str | None:
    """What the network of a pipeline's folder predicts, `eps`, `v` or `x0`; None where nothing says it. UserError
    where it is something else."""
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    told = read_json(path).get("prediction_type") if path.is_file() else None
    if told is not None and told not in PREDICTIONS:
        raise UserError(f"{path}: the network predicts {told!r}; known are {', '.join(PREDICTIONS)}")
    return PREDICTIONS.get(told)


def _scale(path):
    """{`scale_factor`: float32 []} of an autoencoder's config.json; else nothing."""
    told = read_json(path).get("scaling_factor") if path.is_file() else None
    return {"scale_factor": torch.tensor(float(told))} if isinstance(told, int | float) else {}


def _betas(path):
    """{`betas`: float32 [T]}, by which a model sees that it was made for the same noise; else nothing."""
    config = read_json(path) if path.is_file() else {}
    keys = ("beta_schedule", "num_train_timesteps", "beta_start", "beta_end")
    name, *values = (config.get(key) for key in keys)
    changed = config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr")
    if name not in SCHEDULES or changed or not all(isinstance(value, int | float) for value in values):
        return {}
    return {"betas": torch.from_numpy(make_beta_schedule(SCHEDULES[name], *values)).float()}


# The names


def unet_weights(tensors: Mapping[str, torch.Tensor], source: str | Path) -> Weights:
    """A U-Net's tensors under latent-diffusion's names. UserError, naming `source`, for an unknown one."""
    return translated(tensors, UNET | unet_blocks(tensors), UNET_INSIDE, source)


def vae_weights(tensors: Mapping[str, torch.Tensor], source: str | Path) -> Weights:
    """An autoencoder's tensors under latent-diffusion's names; the linear layers of its attention [C, C]
    become convolutions [C, C, 1, 1]. UserError, naming `source`, for an unknown one."""
    weights = translated(tensors, vae_places(tensors), VAE_INSIDE, source)
    return {name: value[:, :, None, None] if value.ndim == 2 else value for name, value in weights.items()}


def vae_places(names: Iterable[str]) -> dict[str, str]:
    """Where an autoencoder's modules are, with the blocks of `names`. latent-diffusion counts the decoder's levels from
    the finest."""
    blocks = [match for name in names if (match := BLOCK.match(name))]
    last = max((int(match["level"]) for match in blocks if match["half"] == "decoder."), default=0)
    places = dict(_VAE)
    for half in ("encoder.", "decoder."):
        places |= {half + name: half + place for name, place in _VAE_HALF.items()}
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


_PARTS = {
    "unet": ("model.diffusion_model.", unet_weights),
    "vae": ("first_stage_model.", vae_weights),
    "text_encoder": ("cond_stage_model.transformer.text_model.", text_weights),
}
