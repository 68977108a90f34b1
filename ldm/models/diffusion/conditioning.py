"""What a latent diffusion is conditioned on: from a batch to the U-Net's inputs.

Raw conditioning is what the data bring: images, class labels, captions, vectors. Learned conditioning is a
dict of the U-Net's inputs: `c_concat` and `c_crossattn` (lists of tensors), `c_adm` (a tensor).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from guided_diffusion.errors import UserValueError
from guided_diffusion.seeding import PerSample
from ldm.models.diffusion.first_stage import channels_first, from_batch, frozen
from ldm.modules.distributions.distributions import AbstractDistribution
from ldm.util import instantiate_from_config

FIRST_STAGE, UNCONDITIONAL = "__is_first_stage__", "__is_unconditional__"


def resolve_key(config, conditioning_key: str | None, concat_mode: bool) -> str | None:
    """The conditioning key that upstream's constructor parameters mean."""
    if config == UNCONDITIONAL:
        return conditioning_key if conditioning_key == "adm" else None
    if conditioning_key is None:
        return "concat" if concat_mode else "crossattn"
    return conditioning_key


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


class Conditioning:
    """Conditioners, for a module with cond_stage_key, concat_keys, ucg_training and a first stage."""

    def instantiate_cond_stage(self, config) -> None:
        """Make `cond_stage_model`: the first stage itself, None where unconditional, or what `config`
        says."""
        if config == FIRST_STAGE:
            if self.cond_stage_trainable:
                raise UserValueError(
                    "the first stage as conditioner is frozen: cond_stage_trainable must be off"
                )
            self.cond_stage_model = self.first_stage_model
            return
        model = instantiate_from_config(config, nn.Module, "cond_stage_config")
        if model is None and self.cond_stage_trainable:
            raise UserValueError("there is no conditioner to train: cond_stage_trainable must be off")
        self.cond_stage_model = model if model is None or self.cond_stage_trainable else frozen(model)

    @property
    def conditioned_on_images(self) -> bool:
        """Is the first stage the conditioner?"""
        return self.cond_stage_model is not None and self.cond_stage_model is self.first_stage_model

    def raw_conditioning(self, batch: Mapping, random: PerSample | None = None):
        """batch[cond_stage_key] as the conditioner takes it; None where the model has no conditioning.

        Images [B, H, W, C] become [B, C, H, W], labels [B] a dict with that key, captions and vectors stay.
        random: decides which samples get the null values of ucg_training.
        """
        if self.model.conditioning_key is None:
            return None
        key = self.cond_stage_key
        if self.conditioned_on_images and f"{key}_latent" in batch:
            raw = {f"{key}_latent": batch[f"{key}_latent"].float()}
        else:
            raw = from_batch(batch, key, "cond_stage_key")
            if isinstance(raw, torch.Tensor):
                raw = self._dropped(key, raw.to(self.device), random)
                if raw.ndim >= 3:
                    raw = channels_first(raw)
                elif raw.ndim == 1:
                    raw = {key: raw}
            else:
                raw = self._dropped(key, list(raw), random)
        maps = [self._concat_map(batch, name, random) for name in self.concat_keys]
        return {"raw": raw, "c_concat": maps} if maps else raw

    def _dropped(self, key, values, random):
        """Values of training samples, each replaced with probability p by the null value, for guidance
        without a classifier (Ho & Salimans 2022)."""
        rule = self.ucg_training.get(key)
        if rule is None or random is None:
            return values
        drop = random.rand() < rule["p"]
        if isinstance(values, list):
            return [rule["val"] if gone else value for value, gone in zip(values, drop.tolist(), strict=True)]
        mask = drop.to(values.device).reshape(-1, *[1] * (values.ndim - 1))
        return torch.where(
            mask, torch.as_tensor(rule["val"], dtype=values.dtype, device=values.device), values
        )

    def _concat_map(self, batch, name, random):
        """A map beside the latent: an image encoded, or a mask of one channel resized to the latent."""
        if f"{name}_latent" in batch:
            return self.latents(batch, name, random)
        image = channels_first(from_batch(batch, name, "concat_keys"))
        if image.shape[1] == 1:
            return F.interpolate(image, size=self.latent_shape[1:])
        return self.encode_images(image, random)

    def get_learned_conditioning(self, c) -> dict[str, list[torch.Tensor]]:
        """The U-Net's inputs for raw conditioning `c`.

        `c` may be what `raw_conditioning` returns, or what the conditioner takes: captions, a dict with
        labels, images [B, C, H, W].
        """
        if c is None:
            return {}
        maps = []
        if isinstance(c, Mapping) and "raw" in c:
            c, maps = c["raw"], c["c_concat"]
        learned = self.as_conditioning(self._learned(c))
        return {**learned, "c_concat": [*learned.get("c_concat", ()), *maps]} if maps else learned

    def _learned(self, c):
        if self.conditioned_on_images and isinstance(c, Mapping):
            return c[f"{self.cond_stage_key}_latent"]
        model = self.cond_stage_model
        if model is None:
            return c[self.cond_stage_key] if isinstance(c, Mapping) else c
        if self.cond_stage_forward is not None:
            return getattr(model, self.cond_stage_forward)(c)
        with torch.set_grad_enabled(self.cond_stage_trainable and torch.is_grad_enabled()):
            c = model.encode(c) if callable(getattr(model, "encode", None)) else model(c)
        return c.mode() if isinstance(c, AbstractDistribution) else c

    def as_conditioning(self, cond) -> dict[str, list[torch.Tensor]]:
        """Conditioning of any accepted form, a dict, a list or one tensor, as a dict of the U-Net's inputs."""
        if cond is None:
            return {}
        if isinstance(cond, Mapping):
            return dict(cond)
        cond = list(cond) if isinstance(cond, (list, tuple)) else [cond]
        return {"c_concat" if self.model.conditioning_key == "concat" else "c_crossattn": cond}

    def get_unconditional_conditioning(
        self, batch_size: int, null_label=None
    ) -> dict[str, list[torch.Tensor]]:
        """Conditioning that says nothing, for classifier-free guidance: the conditioner's `null` input, or
        `null_label` (a caption, a class) in its place.

        UserValueError if the conditioner has none.
        """
        if null_label is None and self.cond_stage_key in self.ucg_training:
            null_label = self.ucg_training[self.cond_stage_key]["val"]
        if null_label is None:
            null_label = getattr(self.cond_stage_model, "null", None)
        if null_label is None:
            raise UserValueError(
                "this model's conditioner has no null input: guidance needs one (give null_label, or train "
                "with ucg_training)"
            )
        if isinstance(null_label, str):
            return self.get_learned_conditioning([null_label] * batch_size)
        labels = torch.full((batch_size,), null_label, device=self.device)
        return self.get_learned_conditioning({self.cond_stage_key: labels})
