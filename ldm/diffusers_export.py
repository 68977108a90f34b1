"""A latent diffusion model with a text encoder as a folder of diffusers' StableDiffusionPipeline."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from guided_diffusion.checkpoint_util import STEM, fit_channels, save_safetensors
from guided_diffusion.errors import UserValueError
from guided_diffusion.mt.diffusers_layout import (
    UNET,
    UNET_INSIDE,
    VERSION,
    Weights,
    reversed_names,
    translated,
    unet_blocks,
    unet_names,
    write_json,
)
from ldm.diffusers_layout import PREDICTIONS, SCHEDULES, VAE_INSIDE, vae_places
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.util import make_beta_schedule
from ldm.modules.encoders.clip_weights import from_open_clip
from ldm.modules.encoders.modules import FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder

_UNET_FILE = "diffusion_pytorch_model.safetensors"
# What StableDiffusionPipeline may have, and these models do not.
_ABSENT = dict.fromkeys(("feature_extractor", "image_encoder", "safety_checker"), [None, None])


def write_pipeline(model: LatentDiffusion, folder: str | Path, ema: bool = True) -> list[str]:
    """Write a model's parts for StableDiffusionPipeline; the names of the files.

    ema: the moving average's weights, where there are any. A joint model's heads, and what only its modalities read, are
    left out: what is written draws images for captions. UserValueError for what diffusers cannot express.
    """
    folder = Path(folder)
    with model.ema_scope() if ema else torch.no_grad():
        unet = unet_part(model)
        unet = (unet[0], {name: value.detach().clone() for name, value in unet[1].items()})
    parts = {
        "unet": unet,
        "vae": vae_part(model),
        "text_encoder": text_part(model),
    }  # all, before one is written
    for name, (config, weights) in parts.items():
        write_json(folder / name / "config.json", config)
        save_safetensors(
            weights, folder / name / ("model.safetensors" if name == "text_encoder" else _UNET_FILE)
        )
    tokenizer = copy.deepcopy(model.cond_stage_model.tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.cond_stage_model.padding)
    tokenizer.model_max_length = model.cond_stage_model.max_length
    tokenizer.save_pretrained(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(model))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": VERSION,
        "requires_safety_checker": False,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **_ABSENT,
    }
    write_json(folder / "model_index.json", index)
    return [str(path) for path in sorted(folder.rglob("*")) if path.is_file()]


def _cannot(what: str) -> UserValueError:
    return UserValueError(f"diffusers' Stable Diffusion cannot express {what}")


def unet_part(model: LatentDiffusion) -> tuple[dict, Weights]:
    """(config, weights) of a UNet2DConditionModel."""
    net = model.model.diffusion_model
    if model.model.conditioning_key != "crossattn" or not getattr(net, "use_spatial_transformer", False):
        raise _cannot(
            f"the conditioning {model.model.conditioning_key}: captions reach its U-Net by cross-attention alone"
        )
    for name, plain in (("resblock_updown", False), ("use_scale_shift_norm", False), ("num_classes", None), ("n_embed", None),
                        ("conv_resample", True), ("dims", 2)):  # fmt: skip
        if getattr(net, name) != plain:
            raise _cannot(f"{name} {getattr(net, name)!r} of this U-Net")
    mult, layers, depth = net.channel_mult, net.num_res_blocks, net.transformer_depth
    if mult[0] != 1 or not isinstance(layers, int) or not isinstance(depth, int):
        raise _cannot(
            f"channel_mult {list(mult)}, num_res_blocks {layers}, transformer_depth {depth} of this U-Net"
        )
    widths = [int(m * net.model_channels) for m in mult]
    attends = [2**level in net.attention_resolutions for level in range(len(mult))]
    heads = [
        net.num_heads if net.num_head_channels == -1 else width // net.num_head_channels for width in widths
    ]
    kinds = {
        side: [f"CrossAttn{side}Block2D" if has else f"{side}Block2D" for has in attends]
        for side in ("Down", "Up")
    }
    size = model.image_size if isinstance(model.image_size, int) else list(model.image_size)
    config = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": VERSION,
        "sample_size": size,
        "in_channels": model.channels,
        "out_channels": net.out_channels,
        "down_block_types": kinds["Down"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": kinds["Up"][::-1],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "cross_attention_dim": net.context_dim,
        "attention_head_dim": heads,  # the number of heads, under a name that diffusers keeps
        "transformer_layers_per_block": depth,
        "use_linear_projection": net.use_linear_in_transformer,
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "dropout": net.dropout,
    }
    state = {n: v for n, v in net.state_dict().items() if not n.startswith(("heads.", "presence."))}
    stem = state[STEM]
    state = fit_channels(state, {STEM: stem[:, : model.channels]}, at=model.channels)
    places, inside = reversed_names(UNET | unet_blocks(unet_names(layers, attends, False)), UNET_INSIDE)
    return config, translated(state, places, inside, "the U-Net")


def vae_part(model: LatentDiffusion) -> tuple[dict, Weights]:
    """(config, weights) of an AutoencoderKL."""
    stage = model.first_stage_model
    if not isinstance(stage, AutoencoderKL):
        raise _cannot(f"the first stage {type(stage).__name__}: it has AutoencoderKL")
    encoder, decoder = stage.encoder, stage.decoder
    attends = [level for level in (*encoder.down, *decoder.up) if len(level.attn)]
    if attends or not hasattr(encoder.mid.attn_1, "q") or decoder.tanh_out or decoder.give_pre_end:
        raise _cannot(
            "a first stage with attention outside its middle, linear attention, tanh_out or give_pre_end"
        )
    widths = [level.block[0].conv1.out_channels for level in encoder.down]
    doubled, latent = stage.quant_conv.in_channels, stage.post_quant_conv.in_channels
    if doubled != 2 * latent:
        raise _cannot(f"an embed_dim, {latent}, that is not z_channels, {doubled // 2}")
    config = {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": VERSION,
        "in_channels": encoder.conv_in.in_channels,
        "out_channels": decoder.conv_out.out_channels,
        "latent_channels": latent,
        "block_out_channels": widths,
        "layers_per_block": len(encoder.down[0].block),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "act_fn": "silu",
        "norm_num_groups": 32,
        "sample_size": encoder.resolution,
        "scaling_factor": float(model.scale_factor),
    }
    state = {
        name: value
        for name, value in stage.state_dict().items()
        if not name.startswith(("loss.", "model_ema."))
    }
    state.pop("colorize", None)
    layers = len(encoder.down[0].block)
    names = [
        f"{half}.{side}_blocks.{level}.{kind}.{i}.x"
        for half, side, more in (("encoder", "down", 0), ("decoder", "up", 1))
        for level in range(len(widths))
        for kind, count in (("resnets", layers + more), (f"{side}samplers", 1))
        for i in range(count)
    ]
    places, inside = reversed_names(vae_places(names), VAE_INSIDE)
    weights = translated(state, places, inside, "the first stage")
    return config, {n: v[..., 0, 0] if ".attentions." in n and v.ndim == 4 else v for n, v in weights.items()}


def text_part(model: LatentDiffusion) -> tuple[dict, Weights]:
    """(config, weights) of transformers' CLIPTextModel, whose last state is what the U-Net reads."""
    encoder = model.cond_stage_model
    if isinstance(encoder, FrozenOpenCLIPEmbedder):
        config, weights = encoder.model.config, from_open_clip(encoder.model.state_dict())
    elif isinstance(encoder, FrozenCLIPEmbedder) and encoder.layer == "last":
        text = encoder._text_model
        config = text.config
        weights = {name.removeprefix("text_model."): value for name, value in text.state_dict().items()}
    else:
        layer = f" with the layer {encoder.layer}" if isinstance(encoder, FrozenCLIPEmbedder) else ""
        raise _cannot(
            f"the conditioner {type(encoder).__name__}{layer}: it has CLIP's text encoder and reads its last state"
        )
    blocks = config.num_hidden_layers - getattr(encoder, "unread", 0)
    unread = tuple(f"encoder.layers.{i}." for i in range(blocks, config.num_hidden_layers))
    described = json.loads(config.to_json_string()) | {
        "architectures": ["CLIPTextModel"],
        "num_hidden_layers": blocks,
    }
    others = (*unread, "embeddings.position_ids")
    return described, {f"text_model.{n}": v for n, v in weights.items() if not n.startswith(others)}


def scheduler_config(model: LatentDiffusion) -> Mapping:
    """The scheduler_config.json of a DDIMScheduler whose steps are those of DDIMSampler."""
    betas = np.asarray(model.diffusion.betas, dtype=np.float64)
    ends = (len(betas), float(betas[0]), float(betas[-1]))
    known = (
        name
        for name, own in SCHEDULES.items()
        if np.allclose(make_beta_schedule(own, *ends), betas, rtol=1e-6, atol=0)
    )
    name = next(known, None)
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": len(betas),
        "beta_start": ends[1],
        "beta_end": ends[2],
        "beta_schedule": name or "linear",
        "trained_betas": None if name else betas.tolist(),
        "prediction_type": {own: told for told, own in PREDICTIONS.items()}[model.parameterization],
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
