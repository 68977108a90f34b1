"""Conditioners: from labels, captions or pictures to what the U-Net reads (interface and state-dict keys:
latent-diffusion, ldm/modules/encoders/modules.py).

Text encoders are transformers' CLIP models, from a local folder or the hub. They are in evaluation mode and
without gradients unless `freeze` is off.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from guided_diffusion.errors import UserFileError, UserValueError
from ldm.models.diffusion.first_stage import frozen
from ldm.modules.encoders.clip_weights import from_open_clip


class AbstractEncoder(nn.Module):
    """What a conditioner is: `encode` makes the U-Net's input of what the data bring."""

    def encode(self, *args, **kwargs):
        """As calling it."""
        return self(*args, **kwargs)


class ClassEmbedder(AbstractEncoder):
    """A learned vector for every class; class n_classes - 1 may serve as the null class (ucg_training).

    key: of the labels in a batch.
    """

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class"):
        super().__init__()
        self.key, self.n_classes = key, n_classes
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Mapping[str, torch.Tensor], key: str | None = None) -> torch.Tensor:
        """batch[key], labels int64 [B], -> a context of one token [B, 1, embed_dim]."""
        labels = batch[key or self.key]
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.n_classes:
            raise UserValueError(
                f"class labels must lie in 0..{self.n_classes - 1}, got {int(labels.min())}..{int(labels.max())}"
            )
        return self.embedding(labels[:, None])


class SpatialRescaler(AbstractEncoder):
    """Maps resized n_stages times by `multiplier`, then, with out_channels, mixed by a 1x1 convolution.

    method: of torch's interpolate.
    """

    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
    ):
        super().__init__()
        methods = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")
        if method not in methods:
            raise UserValueError(f"unknown interpolation {method!r}: choose one of {', '.join(methods)}")
        self.n_stages = n_stages
        self.interpolator = partial(F.interpolate, scale_factor=multiplier, mode=method)
        self.remap_output = out_channels is not None
        if self.remap_output:
            self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in_channels, H, W] -> [B, out_channels or in_channels, h, w]."""
        for _ in range(self.n_stages):
            x = self.interpolator(x)
        return self.channel_mapper(x) if self.remap_output else x


class TextEncoder(AbstractEncoder):
    """A CLIP text encoder of transformers: captions -> [B, max_length, D].

    source: a folder, or a name on the hub; a folder may hold `text_encoder` and `tokenizer` as diffusers
    writes them. UserFileError if there is none.
    """

    null = ""  # what guidance leads away from

    def __init__(self, source: str, max_length: int, freeze: bool, layer: str, layers: Sequence[str]):
        super().__init__()
        if layer not in layers:
            raise UserValueError(f"unknown layer {layer!r}: choose one of {', '.join(layers)}")
        self.layer, self.max_length = layer, max_length
        self.tokenizer, model = load_text_model(source)
        # transformers 5 calls the inner model what transformers 4 calls its part `text_model`, as checkpoints do.
        self.transformer = model if hasattr(model, "text_model") else nn.ModuleDict({"text_model": model})
        if freeze:
            self.freeze()

    def freeze(self) -> None:
        """Evaluation mode, no gradients."""
        frozen(self)

    @property
    def _text_model(self):
        return (
            self.transformer["text_model"]
            if isinstance(self.transformer, nn.ModuleDict)
            else self.transformer
        )

    def tokens(self, text: str | Sequence[str]) -> torch.Tensor:
        """Captions as int64 [B, max_length]: begin, text (cut where too long), end, padding."""
        text = [text] if isinstance(text, str) else list(text)
        rows = self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
        padded = [row + [self.padding] * (self.max_length - len(row)) for row in rows]
        return torch.tensor(padded, device=next(self.parameters()).device)

    @property
    def padding(self) -> int:
        """The token after the end."""
        return self.tokenizer.eos_token_id

    def _hidden_states(self, text):
        # No mask: the padding was seen in training.
        return self._text_model(input_ids=self.tokens(text), output_hidden_states=True)

    def _normalised(self, states):
        model = self._text_model
        return getattr(model, "text_model", model).final_layer_norm(states)


class FrozenCLIPEmbedder(TextEncoder):
    """CLIP's text encoder, as in Stable Diffusion 1.

    version: folder or hub name; layer: `last` (normalised), `pooled` (one token) or `hidden`, the states
    after layer_idx (negative from the end) as they are. device is accepted and has no effect: the encoder
    runs where its weights are.
    """

    def __init__(
        self,
        version="openai/clip-vit-large-patch14",
        device=None,
        max_length=77,
        freeze=True,
        layer="last",
        layer_idx=None,
    ):
        super().__init__(version, max_length, freeze, layer, ("last", "pooled", "hidden"))
        depth = self._text_model.config.num_hidden_layers
        if layer == "hidden" and (layer_idx is None or not -depth - 1 <= layer_idx <= depth):
            raise UserValueError(f"layer hidden needs layer_idx in {-depth - 1}..{depth}, got {layer_idx}")
        self.layer_idx = layer_idx

    def forward(self, text):
        """Captions -> [B, max_length, D]; [B, 1, D] for the layer `pooled`."""
        out = self._hidden_states(text)
        if self.layer == "last":
            return out.last_hidden_state
        return out.pooler_output[:, None] if self.layer == "pooled" else out.hidden_states[self.layer_idx]

    def adapt_weights(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A checkpoint's tensors by name, without the table of positions that older ones hold."""
        return {name: value for name, value in weights.items() if not name.endswith(".position_ids")}


class FrozenOpenCLIPEmbedder(TextEncoder):
    """OpenCLIP's text encoder, as in Stable Diffusion 2, in transformers' form.

    arch, version: of the released model, whose hub repository is taken; or version is a folder or hub name.
    layer: `last`, or `penultimate`, the states before the last block; both normalised. device: see
    FrozenCLIPEmbedder.
    """

    RELEASED = {("ViT-H-14", "laion2b_s32b_b79k"): "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}

    def __init__(
        self,
        arch="ViT-H-14",
        version="laion2b_s32b_b79k",
        device=None,
        max_length=77,
        freeze=True,
        layer="last",
    ):
        source = self.RELEASED.get((arch, version), version)
        super().__init__(source, max_length, freeze, layer, ("last", "penultimate"))

    @property
    def padding(self):
        return 0

    def forward(self, text):
        """Captions -> [B, max_length, D]."""
        states = self._hidden_states(text).hidden_states
        return self._normalised(states[-1 if self.layer == "last" else -2])

    def adapt_weights(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A checkpoint's tensors by name; open_clip's are translated."""
        if not any(name.startswith("model.") for name in weights):
            return dict(weights)
        return {f"transformer.text_model.{name}": value for name, value in from_open_clip(weights).items()}


def load_text_model(source: str):
    """(tokenizer, text model) of a folder or of a name on the hub. UserFileError if they are not there."""
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
        from transformers.utils import logging as transformers_logging
    except ImportError:
        raise UserValueError(
            "a text encoder needs the package transformers, which is not installed"
        ) from None
    parts = {"text_encoder": "", "tokenizer": ""}
    if Path(source).is_dir():
        parts = {part: part if (Path(source) / part).is_dir() else "" for part in parts}
    transformers_logging.disable_progress_bar()  # of reading the weights, which takes a moment
    try:
        tokenizer = CLIPTokenizer.from_pretrained(source, subfolder=parts["tokenizer"])
        model = CLIPTextModel.from_pretrained(source, subfolder=parts["text_encoder"])
    except OSError as error:
        raise UserFileError(
            f"there is no text encoder {source}: neither a folder with a CLIP model and its tokenizer, nor a "
            f"hub repository that can be reached ({str(error).splitlines()[0]})"
        ) from None
    return tokenizer, model.eval()
