"""OpenCLIP's names of a text encoder's weights, in transformers' terms."""

from collections.abc import Mapping

import torch

_TOP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def from_open_clip(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The text encoder's tensors in transformers' names; `model.` in front is dropped, what belongs to the
    comparison with images (text_projection, logit_scale) left out."""
    translated = {}
    for name, value in weights.items():
        name = name.removeprefix("model.")
        if name in _TOP:
            translated[_TOP[name]] = value
        elif name.startswith("transformer.resblocks."):
            number, _, rest = name.removeprefix("transformer.resblocks.").partition(".")
            for part, tensor in _in_block(rest, value).items():
                translated[f"encoder.layers.{number}.{part}"] = tensor
    return translated


def _in_block(name, value):
    if name.startswith("attn.in_proj_"):  # queries, keys and values in one
        kind = name.removeprefix("attn.in_proj_")
        return {
            f"self_attn.{part}_proj.{kind}": rows
            for part, rows in zip("qkv", value.chunk(3, dim=0), strict=True)
        }
    layer, _, kind = name.rpartition(".")
    return {f"{_BLOCK[layer]}.{kind}": value} if layer in _BLOCK else {}
