"""Cross-attention and the spatial transformer (interface: latent-diffusion, ldm/modules/attention.py; the
linear projections are Stable Diffusion 2's).

A feature map [B, C, H, W] is read as H * W tokens [B, T, D]; the context [B, S, D'] is any sequence of
vectors.
"""

import torch
import torch.nn.functional as F
from torch import nn

from guided_diffusion.errors import UserValueError
from guided_diffusion.nn import GroupNorm32, checkpoint, zero_module
from guided_diffusion.unet import ContextBlock


def Normalize(in_channels: int) -> GroupNorm32:
    """32 groups, computed in float32; its epsilon, 1e-6, is not the U-Net's."""
    if in_channels % 32:
        raise UserValueError(
            f"{in_channels} channels cannot be normalised in 32 groups: choose a multiple of 32"
        )
    return GroupNorm32(32, in_channels, eps=1e-6)


class GEGLU(nn.Module):
    """A linear layer gated by GELU of another (Shazeer 2020): [..., dim_in] -> [..., dim_out]."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two layers with `mult` * dim hidden units: [..., dim] -> [..., dim_out, else dim].

    glu: GEGLU instead of GELU; dropout: rate in [0, 1).
    """

    def __init__(
        self, dim: int, dim_out: int | None = None, mult: int = 4, glu: bool = False, dropout: float = 0.0
    ):
        super().__init__()
        hidden = int(dim * mult)
        first = GEGLU(dim, hidden) if glu else nn.Sequential(nn.Linear(dim, hidden), nn.GELU())
        self.net = nn.Sequential(first, nn.Dropout(dropout), nn.Linear(hidden, dim_out or dim))

    def forward(self, x):
        return self.net(x)


class LinearAttention(nn.Module):
    """Attention whose cost is linear in the number of positions (Katharopoulos et al. 2020): [B, dim, H, W]
    -> the same."""

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32):
        super().__init__()
        self.heads = heads
        width = heads * dim_head
        self.to_qkv = nn.Conv2d(dim, 3 * width, 1, bias=False)
        self.to_out = nn.Conv2d(width, dim, 1)

    def forward(self, x):
        q, k, v = self.to_qkv(x).flatten(2).unflatten(1, (3, self.heads, -1)).unbind(1)  # [B, heads, C, T]
        summary = k.softmax(dim=-1) @ v.transpose(-1, -2)  # [B, heads, C, C]
        mixed = summary.transpose(-1, -2) @ q
        return self.to_out(mixed.flatten(1, 2).unflatten(2, x.shape[2:]))


class CrossAttention(nn.Module):
    """Multi-head attention of queries [B, T, query_dim] to a context [B, S, context_dim].

    context_dim: query_dim unless given; heads, dim_head: number and width of the heads; dropout: of the
    output.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.heads = heads
        width, context_dim = heads * dim_head, context_dim or query_dim
        self.to_q = nn.Linear(query_dim, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, query_dim), nn.Dropout(dropout))

    def forward(self, x, context=None, mask=None):
        """Self-attention without `context`; mask: bool [B, S], True where the context may be seen."""
        if context is None:
            context = x
        q, k, v = (
            tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, tokens, dim_head]
            for tokens in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        if mask is not None:
            mask = mask.flatten(1)[:, None, None]  # [B, 1, 1, S]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward network, each normalised first and with a residual.

    gated_ff: GEGLU in the feed-forward network; checkpoint: save memory for time; disable_self_attn: the
    first attention reads the context too.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = True,
        disable_self_attn: bool = False,
    ):
        super().__init__()
        self.disable_self_attn = disable_self_attn
        self.checkpoint = checkpoint
        first_context = context_dim if disable_self_attn else None
        self.attn1 = CrossAttention(dim, first_context, n_heads, d_head, dropout)
        self.ff = FeedForward(dim, dropout=dropout, glu=gated_ff)
        self.attn2 = CrossAttention(dim, context_dim, n_heads, d_head, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x, context=None):
        """x [B, T, dim], context [B, S, context_dim] -> [B, T, dim]."""
        return checkpoint(self._forward, (x, context), self.parameters(), self.checkpoint)

    def _forward(self, x, context):
        x = x + self.attn1(self.norm1(x), context if self.disable_self_attn else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(ContextBlock):
    """Transformer blocks on the positions of a feature map, with a residual around them.

    depth: number of blocks; use_linear: project tokens by linear layers (Stable Diffusion 2) instead of
    feature maps by 1x1 convolutions; disable_self_attn, use_checkpoint: see BasicTransformerBlock.
    """

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | None = None,
        disable_self_attn: bool = False,
        use_linear: bool = False,
        use_checkpoint: bool = True,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.use_linear = use_linear
        width = n_heads * d_head
        self.norm = Normalize(in_channels)
        self.proj_in = nn.Linear(in_channels, width) if use_linear else nn.Conv2d(in_channels, width, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                width,
                n_heads,
                d_head,
                dropout=dropout,
                context_dim=context_dim,
                checkpoint=use_checkpoint,
                disable_self_attn=disable_self_attn,
            )
            for _ in range(depth)
        )
        back = nn.Linear(width, in_channels) if use_linear else nn.Conv2d(width, in_channels, 1)
        self.proj_out = zero_module(back)

    def forward(self, x, context=None):
        """x [B, C, H, W], context [B, S, context_dim] -> [B, C, H, W]."""
        tokens = self._to_tokens(self.norm(x))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self._to_map(tokens, x.shape[2:])

    def _to_tokens(self, x):
        if self.use_linear:
            return self.proj_in(x.flatten(2).transpose(1, 2))
        return self.proj_in(x).flatten(2).transpose(1, 2)

    def _to_map(self, tokens, size: torch.Size):
        if self.use_linear:
            tokens = self.proj_out(tokens)
            return tokens.transpose(1, 2).unflatten(2, size)
        return self.proj_out(tokens.transpose(1, 2).unflatten(2, size))
