"""The U-Net together with the way in which conditioning reaches it (interface: latent-diffusion's
DiffusionWrapper)."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from guided_diffusion.errors import UserValueError
from ldm.util import instantiate_from_config

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
        vector; c_adm: a vector; y: the class input of a modality; present: which modalities are in x; context: a further sequence behind
        c_crossattn, or the only one, as the U-Net encodes a vector modality. UserValueError if something is
        missing.
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
