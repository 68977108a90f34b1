"""OpenCLIP's and OpenAI's names of a CLIP's weights, in transformers' terms."""

from collections.abc import Mapping

import torch

_TOP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_VISION = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
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
    return _translated({name.removeprefix("model."): value for name, value in weights.items()}, _TOP)


def vision_from_open_clip(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The image encoder's, with its projection; `model.` and `visual.` in front are dropped, and the text encoder."""
    own = {name.removeprefix("model."): value for name, value in weights.items()}
    own = {name.removeprefix("visual."): v for name, v in own.items() if name.startswith("visual.")}
    translated = {f"vision_model.{name}": value for name, value in _translated(own, _VISION).items()}
    return translated | ({"visual_projection.weight": own["proj"].T} if "proj" in own else {})


def _translated(weights, top):
    translated = {}
    for name, value in weights.items():
        if name in top:
            translated[top[name]] = value
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


def to_open_clip(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`from_open_clip` undone: a text encoder's tensors, of transformers' CLIPTextModel, in OpenCLIP's names."""
    own = {name.removeprefix("text_model."): value for name, value in weights.items()}
    top, block = ({theirs: ours for ours, theirs in names.items()} for names in (_TOP, _BLOCK))
    renamed = {}
    for name, value in own.items():
        if name in top:
            renamed[top[name]] = value
        elif name.startswith("encoder.layers."):
            number, _, rest = name.removeprefix("encoder.layers.").partition(".")
            layer, _, kind = rest.rpartition(".")
            place = f"transformer.resblocks.{number}."
            if layer in block:
                renamed[f"{place}{block[layer]}.{kind}"] = value
            elif layer == "self_attn.q_proj":
                rows = [own[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                renamed[f"{place}attn.in_proj_{kind}"] = torch.cat(rows)
    return renamed
