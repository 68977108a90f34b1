"""Latent diffusion's U-Net: ADM's, with spatial transformers and a context (interface: latent-diffusion,
ldm/modules/diffusionmodules/openaimodel.py).

The network is guided_diffusion's; what is added here is which layer attends, and the context on its way to
it.
"""

import torch
import torch.nn as nn

from guided_diffusion import unet
from guided_diffusion.errors import UserValueError
from guided_diffusion.fp16_util import convert_module_to_f16, convert_module_to_f32
from guided_diffusion.nn import conv_nd, normalization
from guided_diffusion.unet import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    EncoderUNetModel,
    QKVAttention,
    QKVAttentionLegacy,
    ResBlock,
    TimestepBlock,
    TimestepEmbedSequential,
    Upsample,
    count_flops_attn,
)
from ldm.modules.attention import SpatialTransformer

__all__ = [
    "AttentionBlock",
    "AttentionPool2d",
    "Downsample",
    "EncoderUNetModel",
    "QKVAttention",
    "QKVAttentionLegacy",
    "ResBlock",
    "SpatialTransformer",
    "TimestepBlock",
    "TimestepEmbedSequential",
    "UNetModel",
    "Upsample",
    "convert_module_to_f16",
    "convert_module_to_f32",
    "count_flops_attn",
]

# What the constructor takes beyond guided_diffusion's.
_OWN_OPTIONS = (
    "use_spatial_transformer",
    "transformer_depth",
    "context_dim",
    "n_embed",
    "legacy",
    "use_linear_in_transformer",
    "use_bf16",
    "adm_in_channels",
    "disable_self_attentions",
    "disable_middle_self_attn",
)


class UNetModel(unet.UNetModel):
    """guided_diffusion's U-Net that may attend to a context.

    One of num_heads and num_head_channels is required. use_spatial_transformer: transformers of
    `transformer_depth` blocks that read a context [B, S, context_dim], in place of attention blocks;
    use_linear_in_transformer: Stable Diffusion 2's; n_embed: the output is logits over that many codebook
    entries; legacy: num_heads_upsample counts, in attention blocks without num_head_channels; num_classes:
    `sequential` for vectors y [B, adm_in_channels], `continuous` for numbers [B, 1]; disable_self_attentions (one per
    level), disable_middle_self_attn: where transformers read the context alone; use_bf16: run in bfloat16 by autocast.
    use_fp16 is accepted and has no effect: the trainer's precision (autocast) decides. Others as in
    guided_diffusion.unet.UNetModel.

    `UserValueError` for options that contradict each other.
    """

    def __init__(
        self,
        image_size,
        in_channels,
        model_channels,
        out_channels,
        num_res_blocks,
        attention_resolutions,
        dropout=0,
        channel_mult=(1, 2, 4, 8),
        conv_resample=True,
        dims=2,
        num_classes=None,
        use_checkpoint=False,
        use_fp16=False,
        num_heads=-1,
        num_head_channels=-1,
        num_heads_upsample=-1,
        use_scale_shift_norm=False,
        resblock_updown=False,
        use_new_attention_order=False,
        use_spatial_transformer=False,
        transformer_depth=1,
        context_dim=None,
        n_embed=None,
        legacy=True,
        use_linear_in_transformer=False,
        use_bf16=False,
        adm_in_channels=None,
        disable_self_attentions=None,
        disable_middle_self_attn=False,
        heads=None,
        presence=None,
    ):
        options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        own = {name: options.pop(name) for name in _OWN_OPTIONS}
        if num_heads == num_head_channels == -1:
            raise UserValueError("the U-Net needs num_heads or num_head_channels")
        if use_spatial_transformer != (context_dim is not None):
            raise UserValueError("use_spatial_transformer and context_dim must be given together")
        if (num_classes == "sequential") != (adm_in_channels is not None):
            raise UserValueError("num_classes: sequential and adm_in_channels must be given together")
        if isinstance(num_classes, str) and num_classes not in ("sequential", "continuous"):
            raise UserValueError(f"num_classes is a number, sequential or continuous, not {num_classes!r}")
        attending = [k for k in range(len(channel_mult)) if 2**k in attention_resolutions]
        alone = list(disable_self_attentions or [False] * len(channel_mult))
        if len(alone) != len(channel_mult):
            raise UserValueError("disable_self_attentions needs one value for each level of channel_mult")
        # Of the transformers in the order in which they are made: down, middle, up.
        self._without_self = iter(
            [alone[k] for k in attending for _ in range(num_res_blocks)]
            + [disable_middle_self_attn]
            + [alone[k] for k in reversed(attending) for _ in range(num_res_blocks + 1)]
        )
        # Plain values, before the constructor below, which makes the attention layers.
        for name, value in own.items():
            setattr(self, name, value)
        super().__init__(**{**options, "use_fp16": False})
        if n_embed is not None:
            ch = self.out[0].num_channels
            self.id_predictor = nn.Sequential(normalization(ch), conv_nd(dims, ch, n_embed, 1))

    @property
    def predict_codebook_ids(self) -> bool:
        """Is the output logits over a codebook?"""
        return self.n_embed is not None

    def _attention(self, channels, num_heads):
        if self.legacy and not self.use_spatial_transformer:
            return super()._attention(channels, num_heads)
        heads = self.num_heads
        if self.num_head_channels != -1:
            heads = channels // self.num_head_channels
        if not heads or channels < heads:
            raise UserValueError(
                f"{channels} channels cannot be split into heads: num_heads is {self.num_heads}, "
                f"num_head_channels {self.num_head_channels}"
            )
        if not self.use_spatial_transformer:
            return super()._attention(channels, heads)
        return SpatialTransformer(
            channels,
            heads,
            channels // heads,
            depth=self.transformer_depth,
            context_dim=self.context_dim,
            use_linear=self.use_linear_in_transformer,
            use_checkpoint=self.use_checkpoint,
            disable_self_attn=next(self._without_self),
        )

    def _class_embedding(self, num_classes):
        if num_classes == "continuous":
            return nn.Linear(1, self.time_embed_dim)
        if num_classes == "sequential":
            width = self.time_embed_dim
            layers = nn.Linear(self.adm_in_channels, width), nn.SiLU(), nn.Linear(width, width)
            return nn.Sequential(nn.Sequential(*layers))
        return super()._class_embedding(num_classes)

    def _embed(self, timesteps, y):
        if y is None or not isinstance(self.num_classes, str):
            return super()._embed(timesteps, y)
        return self._embed_time(timesteps) + self.label_emb(y)

    def _predict(self, x, *conditioning):
        if not self.use_bf16:
            return super()._predict(x, *conditioning)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return _as(x.dtype, super()._predict(x, *conditioning))

    def convert_to_fp16(self):
        """As in guided_diffusion; transformers have no float16 weights (`UserValueError`)."""
        if self.use_spatial_transformer:
            raise UserValueError(
                "a U-Net with spatial transformers runs in float16 by autocast, not by its weights"
            )
        super().convert_to_fp16()

    def forward(
        self,
        x,
        timesteps,
        context=None,
        y=None,
        present=None,
    ):
        """x [B, in_channels, H, W], timesteps [B], context [B, S, context_dim] exactly where there are
        spatial transformers, y exactly if class-conditional -> what guided_diffusion's U-Net returns."""
        self._expect_context(context)
        emb = self._embed(timesteps, y)
        if present is not None:
            emb = emb + self.presence(present)
        return self._predict(x, emb, context)

    def _expect_context(self, context):
        if self.use_spatial_transformer:
            if context is None or context.ndim != 3 or context.shape[2] != self.context_dim:
                got = None if context is None else tuple(context.shape)
                raise UserValueError(f"the context must be of shape [B, S, {self.context_dim}], got {got}")
        elif context is not None:
            raise UserValueError("this U-Net takes no context: it was made without use_spatial_transformer")

    def _read_out(self, last):
        return self.id_predictor(last) if self.predict_codebook_ids else super()._read_out(last)


def _as(dtype, output):
    """An output, or an output with predictions by name, in another type."""
    if isinstance(output, tuple):
        return output[0].to(dtype), {name: value.to(dtype) for name, value in output[1].items()}
    return output.to(dtype)
