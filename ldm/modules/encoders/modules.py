"""Conditioners: from labels, captions or images to what the U-Net reads (interface and state-dict keys:
latent-diffusion, ldm/modules/encoders/modules.py).

Text encoders are transformers' CLIP models, from a local folder or the hub. They are in evaluation mode and
without gradients unless `freeze` is off.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from guided_diffusion.errors import UserFileError, UserValueError
from ldm.checkpoint import is_weightless
from ldm.modules.diffusionmodules.upscaling import CLIPEmbeddingNoiseAugmentation
from ldm.modules.encoders.base import (
    RELEASED,
    AbstractEncoder,
    frozen,
    import_transformers,
    load_pretrained,
    released_config,
    subfolder,
)
from ldm.modules.encoders.clip_weights import to_open_clip
from ldm.modules.encoders.images import (
    ClipImageEmbedder,
    FrozenClipImageEmbedder,
    FrozenOpenCLIPImageEmbedder,
)
from ldm.modules.encoders.open_clip import COMPARISON, OpenCLIPText
from ldm.modules.encoders.transformer import BERTEmbedder, BERTTokenizer, TransformerEmbedder

__all__ = [
    "AbstractEncoder",
    "BERTEmbedder",
    "BERTTokenizer",
    "CLIPEmbeddingNoiseAugmentation",
    "ClassEmbedder",
    "ClipImageEmbedder",
    "FrozenCLIPEmbedder",
    "FrozenClipImageEmbedder",
    "FrozenOpenCLIPEmbedder",
    "FrozenOpenCLIPImageEmbedder",
    "SpatialRescaler",
    "TextEncoder",
    "TransformerEmbedder",
    "load_text_model",
]


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
        self._hold(model)
        if freeze:
            self.freeze()

    def _hold(self, model) -> None:
        """Keep the text model of transformers, under the names that checkpoints have."""
        raise NotImplementedError

    def freeze(self) -> None:
        """Evaluation mode, no gradients."""
        frozen(self)

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

    def _hold(self, model):
        # transformers 5 calls the inner model what transformers 4 calls its part `text_model`, as checkpoints do.
        self.transformer = model if hasattr(model, "text_model") else nn.ModuleDict({"text_model": model})

    @property
    def _text_model(self):
        return (
            self.transformer["text_model"]
            if isinstance(self.transformer, nn.ModuleDict)
            else self.transformer
        )

    def forward(self, text):
        """Captions -> [B, max_length, D]; [B, 1, D] for the layer `pooled`."""
        # No mask: the padding was seen in training.
        out = self._text_model(input_ids=self.tokens(text), output_hidden_states=True)
        if self.layer == "last":
            return out.last_hidden_state
        return out.pooler_output[:, None] if self.layer == "pooled" else out.hidden_states[self.layer_idx]

    def adapt_weights(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A checkpoint's tensors by name, without the table of positions that older ones hold."""
        return {name: value for name, value in weights.items() if not name.endswith(".position_ids")}


class FrozenOpenCLIPEmbedder(TextEncoder):
    """OpenCLIP's text encoder, as in Stable Diffusion 2, under its names.

    arch, version: of the released model, whose hub repository is taken; or version is a folder or hub name.
    layer: `last`, or `penultimate`, the states before the last block; both normalised. Stable Diffusion 2 in
    diffusers' layout leaves the last block out, which `penultimate` does not read. device: see
    FrozenCLIPEmbedder.
    """

    BLOCKS = {"ViT-H-14": 24}

    def __init__(
        self,
        arch="ViT-H-14",
        version="laion2b_s32b_b79k",
        device=None,
        max_length=77,
        freeze=True,
        layer="last",
    ):
        source = RELEASED.get((arch, version), version)
        super().__init__(source, max_length, freeze, layer, ("last", "penultimate"))
        self._blocks = self.model.config.num_hidden_layers
        cut = self._blocks + 1 == self.BLOCKS.get(arch)
        self.unread = 0 if layer == "last" or cut else 1  # blocks

    def _hold(self, model):
        self.model = OpenCLIPText(model.config)
        self.model.load_state_dict(to_open_clip(model.state_dict()), strict=False, assign=True)

    @property
    def padding(self):
        return 0

    def forward(self, text):
        """Captions -> [B, max_length, D]."""
        return self.model(self.tokens(text), self.unread)

    def adapt_weights(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A checkpoint's tensors by name; those of transformers are translated, and what is not read may be missing:
        the comparison with images, a last block."""
        own = {name: value for name, value in weights.items() if not name.endswith(".attn_mask")}
        if any(name.startswith("transformer.") for name in own):
            own = to_open_clip({name.removeprefix("transformer."): value for name, value in own.items()})
            own = {f"model.{name}": value for name, value in own.items()}
        if not own:
            return own
        last = f"model.transformer.resblocks.{self._blocks - 1}."
        unread = [f"model.{name}" for name in COMPARISON] + [last] * self.unread
        missing = [n for n in unread if not any(name.startswith(n) for name in own)]
        return own | {n: v for n, v in self.state_dict().items() if n.startswith(tuple(missing))}


def load_text_model(source: str):
    """(tokenizer, text model) of a folder or of a name on the hub; where no weights are read (is_weightless), (None,
    model of the released sizes). UserFileError if they are not there."""
    transformers = import_transformers("a text encoder")
    if is_weightless():
        return None, transformers.CLIPTextModel(released_config(source, "text"))
    part = subfolder(source, ["text_encoder"])
    model = load_pretrained(transformers.CLIPTextModel, source, part, "text encoder")
    part = subfolder(source, ["tokenizer"])
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(source, subfolder=part)
    except OSError as error:
        raise UserFileError(
            f"the text encoder {source} has no tokenizer ({str(error).splitlines()[0]})"
        ) from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a folder without one
        raise UserFileError(f"the text encoder {source} has no tokenizer (tokenizer.json)")
    return tokenizer, model
