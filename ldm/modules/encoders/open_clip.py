"""OpenCLIP's text transformer under its own names, as Stable Diffusion 2's checkpoints hold it."""

from collections import OrderedDict

import torch
from torch import nn

# What the comparison of texts with images needs; no diffusion reads it.
COMPARISON = ("text_projection", "logit_scale")


class QuickGELU(nn.Module):
    """GELU as OpenAI's CLIP approximates it: x sigmoid(1.702 x)."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


class TextBlock(nn.Module):
    """Causal self-attention and a perceptron, each normalised first and with a residual: [B, S, D] -> the same."""

    def __init__(self, width: int, heads: int, hidden: int, activation: type[nn.Module], eps: float):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width, eps)
        layers = dict(c_fc=nn.Linear(width, hidden), gelu=activation(), c_proj=nn.Linear(hidden, width))
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x, mask):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class OpenCLIPText(nn.Module):
    """The transformer that a CLIPTextConfig of transformers describes."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.positional_embedding = nn.Parameter(torch.zeros(config.max_position_embeddings, width))
        # Square in all released models; the configurations' projection_dim is often another's.
        self.text_projection = nn.Parameter(torch.zeros(width, width), requires_grad=False)
        self.logit_scale = nn.Parameter(torch.zeros([]), requires_grad=False)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        how = (config.num_attention_heads, config.intermediate_size, ACTIVATIONS[config.hidden_act])
        blocks = [TextBlock(width, *how, config.layer_norm_eps) for _ in range(config.num_hidden_layers)]
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(blocks)
        self.ln_final = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, tokens: torch.Tensor, leave_out: int = 0) -> torch.Tensor:
        """Tokens int64 [B, S] -> normalised states [B, S, D] after all blocks but the last `leave_out`."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        blocks = self.transformer.resblocks
        for block in blocks[: len(blocks) - leave_out]:
            x = block(x, mask)
        return self.ln_final(x)
