"""The transformer of BERTEmbedder: tokens to vectors (interface and state-dict keys: latent-diffusion,
ldm/modules/x_transformer.py, whose variants no model uses)."""

import torch
import torch.nn.functional as F
from torch import nn

from guided_diffusion.errors import UserValueError
from ldm.modules.attention import FeedForward


class AbsolutePositionalEmbedding(nn.Module):
    """A learned vector for every place of a sequence."""

    def __init__(self, dim: int, max_seq_len: int):
        super().__init__()
        self.emb = nn.Embedding(max_seq_len, dim)
        nn.init.normal_(self.emb.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Those of x's places: [B, S, ...] -> [1, S, dim]."""
        return self.emb.weight[None, : x.shape[1]]


class Attention(nn.Module):
    """Multi-head self-attention [B, S, dim] -> the same."""

    def __init__(self, dim: int, dim_head: int = 64, heads: int = 8, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        width = heads * dim_head
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, width, bias=False) for _ in range(3))
        self.to_out = nn.Linear(width, dim)

    def forward(self, x, mask=None):
        """mask: bool [B, S], True where tokens count."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        mask = None if mask is None else mask[:, None, None]
        rate = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """`depth` times attention and a feed-forward network, each normalised first and with a residual."""

    def __init__(
        self, dim: int, depth: int, heads: int = 8, attn_dropout: float = 0.0, ff_dropout: float = 0.0
    ):
        super().__init__()
        self.dim, self.depth = dim, depth
        self.layers = nn.ModuleList()
        for _ in range(depth):
            for layer in (
                Attention(dim, heads=heads, dropout=attn_dropout),
                FeedForward(dim, dropout=ff_dropout),
            ):
                self.layers.append(nn.ModuleList([nn.LayerNorm(dim), layer]))

    def forward(self, x, mask=None):
        """x: [B, S, dim]; mask: of Attention."""
        for norm, layer in self.layers:
            x = x + (layer(norm(x), mask) if isinstance(layer, Attention) else layer(norm(x)))
        return x


class TransformerWrapper(nn.Module):
    """Tokens through an Encoder: int64 [B, S], S at most max_seq_len, -> logits [B, S, num_tokens]."""

    def __init__(self, *, num_tokens: int, max_seq_len: int, attn_layers: Encoder, emb_dropout: float = 0.0):
        super().__init__()
        dim = attn_layers.dim
        self.num_tokens, self.max_seq_len = num_tokens, max_seq_len
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.pos_emb = AbsolutePositionalEmbedding(dim, max_seq_len)
        self.emb_dropout = nn.Dropout(emb_dropout)
        self.attn_layers = attn_layers
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens)
        nn.init.normal_(self.token_emb.weight, std=0.02)

    def forward(self, x, return_embeddings=False, mask=None):
        """return_embeddings: the vectors [B, S, dim] in place of logits; mask: of Attention. UserValueError for tokens
        that the model does not have, and for more than max_seq_len."""
        if x.shape[1] > self.max_seq_len:
            raise UserValueError(f"{x.shape[1]} tokens: this transformer reads at most {self.max_seq_len}")
        if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < self.num_tokens:
            raise UserValueError(
                f"tokens must lie in 0..{self.num_tokens - 1}, got {int(x.min())}..{int(x.max())}"
            )
        h = self.emb_dropout(self.token_emb(x) + self.pos_emb(x))
        h = self.norm(self.attn_layers(h, mask))
        return h if return_embeddings else self.to_logits(h)
