"""What a latent diffusion is conditioned on: from a batch to the U-Net's inputs.

Raw conditioning is what the data bring: images, class labels, captions, vectors. Learned conditioning is a
dict of the U-Net's inputs: `c_concat` and `c_crossattn` (lists of tensors), `c_adm` (a tensor).
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from guided_diffusion.errors import UserValueError
from guided_diffusion.seeding import PerSample
from ldm.modules.distributions.distributions import AbstractDistribution
from ldm.util import instantiate_from_config

FIRST_STAGE, UNCONDITIONAL = "__is_first_stage__", "__is_unconditional__"

# What each kind of conditioning must bring.
NEEDS = {
    None: (),
    "concat": ("c_concat",),
    "crossattn": ("c_crossattn",),
    "hybrid": ("c_concat", "c_crossattn"),
    "adm": ("c_crossattn",),
    "crossattn-adm": ("c_crossattn", "c_adm"),
    "hybrid-adm": ("c_concat", "c_crossattn", "c_adm"),
}


class DiffusionWrapper(nn.Module):
    """`diffusion_model`, and how it is conditioned.

    conditioning_key: None; `concat`, maps beside the latent; `crossattn`, a context; `hybrid`, both; `adm`, a
    class or vector as `y`, also in addition to the others (`crossattn-adm`, `hybrid-adm`: Stable Diffusion
    2). UserValueError for another key.
    """

    def __init__(self, diff_model_config: Mapping, conditioning_key: str | None):
        super().__init__()
        if conditioning_key not in NEEDS:
            raise UserValueError(
                f"unknown conditioning_key {conditioning_key!r}: choose one of {', '.join(map(str, NEEDS))}"
            )
        self.diffusion_model = instantiate_from_config(diff_model_config, nn.Module, "unet_config")
        self.conditioning_key = conditioning_key

    @property
    def heads(self) -> nn.ModuleDict:
        """The U-Net's heads of modalities, by name."""
        return self.diffusion_model.heads

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: Sequence[torch.Tensor] | None = None,
        c_crossattn: Sequence[torch.Tensor] | None = None,
        c_adm: torch.Tensor | None = None,
        *,
        y: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        present: torch.Tensor | None = None,
    ):
        """What the U-Net returns at latents x [B, C, h, w] and timesteps t [B].

        c_concat: maps [B, C', h, w]; c_crossattn: sequences [B, S, D], joined, or for `adm` one class or
        vector; c_adm: a vector; y: the class input of a modality; context: a further sequence behind
        c_crossattn, or the only one, as the U-Net encodes a vector modality; present: which modalities are in
        x. UserValueError if something is missing.
        """
        key = self.conditioning_key
        if context is not None:
            c_crossattn = [*(c_crossattn or ()), context]
        given = {"c_concat": c_concat, "c_crossattn": c_crossattn, "c_adm": c_adm}
        for name in given:
            if (given[name] is not None) != (name in NEEDS[key]):
                state = "needs" if name in NEEDS[key] else "does not take"
                raise UserValueError(f"a model with conditioning_key {key} {state} {name}")
        if c_concat is not None:
            x = torch.cat([x, *c_concat], dim=1)
        options = {}
        if key == "adm":
            options["y"] = c_crossattn[0]
        elif c_crossattn is not None:
            options["context"] = torch.cat(list(c_crossattn), dim=1)
        if c_adm is not None:
            options["y"] = c_adm
        if y is not None:
            if "y" in options:
                raise UserValueError(
                    "the U-Net has one class input: it cannot take both a modality and conditioning"
                )
            options["y"] = y
        if present is not None:
            options["present"] = present
        return self.diffusion_model(x, t, **options)


def resolve_key(config, conditioning_key: str | None, concat_mode: bool) -> str | None:
    """The conditioning key that upstream's constructor parameters mean."""
    if config == UNCONDITIONAL:
        return conditioning_key if conditioning_key == "adm" else None
    if conditioning_key is None:
        return "concat" if concat_mode else "crossattn"
    return conditioning_key


# From a batch


def from_batch(batch: Mapping, key: str, what: str):
    """batch[key]; UserValueError that names `what` wants it."""
    if key not in batch:
        raise UserValueError(f"the batch has no {key!r} ({what}): it has {', '.join(map(repr, batch))}")
    return batch[key]


def channels_first(x: torch.Tensor) -> torch.Tensor:
    """Images [B, H, W, C] or [B, H, W] as float32 [B, C, H, W]."""
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4:
        raise UserValueError(f"images in a batch are [B, H, W, C] or [B, H, W], not {list(x.shape)}")
    return x.permute(0, 3, 1, 2).contiguous().float()


def sometimes_null(values, rule: Mapping, random: PerSample):
    """Values of training samples, a tensor [B, ...] or a list, each replaced by rule["val"] with probability
    rule["p"], for guidance without a classifier (Ho & Salimans 2022)."""
    drop = random.rand() < rule["p"]
    if isinstance(values, list):
        return [rule["val"] if gone else value for value, gone in zip(values, drop.tolist(), strict=True)]
    mask = drop.to(values.device).reshape(-1, *[1] * (values.ndim - 1))
    return torch.where(mask, torch.as_tensor(rule["val"], dtype=values.dtype, device=values.device), values)


# Of a LatentDiffusion


def raw_conditioning(model, batch: Mapping, key: str, random: PerSample | None = None):
    """batch[key] as the model's conditioner takes it; None where the model has no conditioning.

    Images [B, H, W, C] become [B, C, H, W], labels [B] a dict with cond_stage_key, captions and vectors stay; with
    concat_keys it is {"raw": that, "c_concat": their maps}, and so with all else that the model's `beside` brings.
    random: decides which samples get the null values of ucg_training.
    """
    if model.model.conditioning_key is None:
        return None
    own = model.cond_stage_key
    if model.conditioned_on_images and f"{key}_latent" in batch:
        raw = {f"{own}_latent": batch[f"{key}_latent"].float()}
    else:
        raw = from_batch(batch, key, "cond_stage_key")
        raw = raw.to(model.device) if isinstance(raw, torch.Tensor) else list(raw)
        if random is not None and key in model.ucg_training:
            raw = sometimes_null(raw, model.ucg_training[key], random)
        if isinstance(raw, torch.Tensor) and raw.ndim != 2:
            raw = channels_first(raw) if raw.ndim >= 3 else {own: raw}
    beside = model.beside(batch, random)
    return {"raw": raw, **beside} if beside else raw


def concat_map(model, batch: Mapping, name: str, random: PerSample | None = None) -> torch.Tensor:
    """A map beside the latent: an image encoded, or a mask of one channel resized to the latent."""
    if f"{name}_latent" in batch:
        return model.latents(batch, name, random)
    image = channels_first(from_batch(batch, name, "concat_keys")).to(model.device)
    if image.shape[1] == 1:
        return F.interpolate(image, size=model.latent_shape[1:])
    return model.encode_images(image, random)


def learned_conditioning(model, c) -> dict:
    """The U-Net's inputs for what `raw_conditioning` returns, or what the conditioner takes: captions, a dict with
    labels, images [B, C, H, W]."""
    if c is None:
        return {}
    beside = {}
    if isinstance(c, Mapping) and "raw" in c:
        c, beside = c["raw"], {name: value for name, value in c.items() if name != "raw"}
    learned = model.as_conditioning(_learned(model, c))
    if maps := [*learned.get("c_concat", ()), *beside.get("c_concat", ())]:
        beside["c_concat"] = maps
    return {**learned, **beside}


def _learned(model, c):
    conditioner = model.cond_stage_model
    if model.conditioned_on_images and isinstance(c, Mapping):
        return c[f"{model.cond_stage_key}_latent"]
    if conditioner is None:
        return c[model.cond_stage_key] if isinstance(c, Mapping) else c
    if model.cond_stage_forward is not None:
        return getattr(conditioner, model.cond_stage_forward)(c)
    with torch.set_grad_enabled(model.cond_stage_trainable and torch.is_grad_enabled()):
        encode = getattr(conditioner, "encode", None)
        c = encode(c) if callable(encode) else conditioner(c)
    return c.mode() if isinstance(c, AbstractDistribution) else c


def null_conditioning(model, batch_size: int, null_label=None) -> dict:
    """The U-Net's inputs that say nothing, for classifier-free guidance: for the conditioner's `null` input, or
    `null_label` (a caption, a class, or a list of one) in its place.

    UserValueError if the conditioner has none.
    """
    if null_label is None and model.cond_stage_key in model.ucg_training:
        null_label = model.ucg_training[model.cond_stage_key]["val"]
    if null_label is None:
        null_label = getattr(model.cond_stage_model, "null", None)
    if null_label is None:
        raise UserValueError(
            "this model's conditioner has no null input: guidance needs one (give null_label, or train "
            "with ucg_training)"
        )
    if isinstance(null_label, list | tuple) and len(null_label) == 1:
        (null_label,) = null_label
    if isinstance(null_label, str):
        return model.get_learned_conditioning([null_label] * batch_size)
    labels = torch.full((batch_size,), null_label, device=model.device)
    return model.get_learned_conditioning({model.cond_stage_key: labels})


# Batches of conditioning


def select(values, where):
    """The samples `where` (indices or a slice) of conditioning, raw or learned."""
    if isinstance(values, Mapping):
        return {name: select(value, where) for name, value in values.items()}
    if isinstance(values, torch.Tensor):
        return values[where]
    if isinstance(values, (list, tuple)) and values and isinstance(values[0], torch.Tensor):
        return [value[where] for value in values]
    indices = range(len(values))[where] if isinstance(where, slice) else where
    return [values[int(i)] for i in indices]


def joined(parts: Sequence[Mapping]) -> dict:
    """Batches of learned conditioning, or of tensors by name, as one: the samples of the first part first."""
    first = parts[0]
    for other in parts[1:]:
        if set(other) != set(first):
            raise UserValueError(
                f"one batch of conditioning has {', '.join(first)}, another {', '.join(other)}"
            )
    return {
        name: torch.cat([part[name] for part in parts])
        if isinstance(values, torch.Tensor)
        else [torch.cat(pieces) for pieces in zip(*(part[name] for part in parts), strict=True)]
        for name, values in first.items()
    }
