"""Image encoders: from images to representations (interface: Stable Diffusion 2, ldm/modules/encoders/modules.py)."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F

from guided_diffusion.errors import UserFileError, UserValueError
from ldm.checkpoint import is_weightless
from ldm.modules.encoders.base import (
    RELEASED,
    AbstractEncoder,
    frozen,
    import_transformers,
    load_pretrained,
    reading,
    released_config,
    subfolder,
)
from ldm.modules.encoders.clip_weights import vision_from_open_clip


class FrozenOpenCLIPImageEmbedder(AbstractEncoder):
    """CLIP's image encoder, in transformers' form: images -> their projected embedding, which is not normalised.

    arch, version: of the released model, whose hub repository is taken; or version is a folder or hub name. A folder
    holds a whole CLIP or its vision model, itself or under `image_encoder` as diffusers writes it. device is accepted
    and has no effect: the encoder runs where its weights are. UserFileError if there is none.
    """

    def __init__(self, arch="ViT-H-14", version="laion2b_s32b_b79k", device=None, freeze=True, ucg_rate=0.0):
        super().__init__()
        self.ucg_rate = ucg_rate
        source = RELEASED.get((arch, version), version)
        self.model = load_vision_model(source)
        mean, std = read_normalisation(source)
        # Of colours in [0, 1]. They come with the folder, not with a checkpoint.
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        if freeze:
            self.freeze()

    def freeze(self) -> None:
        """Evaluation mode, no gradients."""
        frozen(self)

    @property
    def width(self) -> int:
        """D, the length of a representation."""
        return self.model.visual_projection.out_features

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in [-1, 1] as the model wants them: the shorter side resized to its size, the middle
        cut out, colours normalised. [B, 3, S, S]."""
        size = self.model.config.image_size
        height, width = images.shape[2:]
        shorter = min(height, width)
        scaled = [size * height // shorter, size * width // shorter]
        if scaled != [height, width]:
            images = F.interpolate(images, scaled, mode="bicubic", align_corners=False, antialias=True)
        top, left = ((side - size) // 2 for side in scaled)
        colours = (images[..., top : top + size, left : left + size].clamp(-1, 1) + 1) / 2
        return (colours - self.mean) / self.std

    def forward(self, images: torch.Tensor, no_dropout: bool = False) -> torch.Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> [B, D]; in training with ucg_rate some 0, unless no_dropout."""
        out = self.model(pixel_values=self.preprocess(images)).image_embeds
        if not (self.ucg_rate and self.training) or no_dropout:
            return out
        return out * (torch.rand(len(out), 1, device=out.device) >= self.ucg_rate)

    def adapt_weights(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A checkpoint's tensors by name; OpenCLIP's and OpenAI's are translated."""
        if not any(name.startswith("model.visual.") for name in weights):
            return dict(weights)
        return {f"model.{name}": value for name, value in vision_from_open_clip(weights).items()}


# What OpenAI's package calls its models.
OPENAI = {
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-B/32": "openai/clip-vit-base-patch32",
}


class FrozenClipImageEmbedder(FrozenOpenCLIPImageEmbedder):
    """OpenAI's CLIP image encoder, images prepared by kornia: stretched to a square, which is not cut.

    model: ViT-L/14, ViT-B/16, ViT-B/32, a folder or a hub name; antialias: smooth before resizing; jit and device are
    accepted and have no effect. Others as in FrozenOpenCLIPImageEmbedder.
    """

    def __init__(self, model, jit=False, device=None, antialias=False, ucg_rate=0.0):
        super().__init__(version=OPENAI.get(model, model), ucg_rate=ucg_rate)
        self.antialias = antialias

    def preprocess(self, images):
        """Images [B, 3, H, W] in [-1, 1] as the model wants them, [B, 3, S, S]."""
        try:
            import kornia
        except ImportError:
            raise UserValueError(
                f"{type(self).__name__} needs the package kornia, which is not installed"
            ) from None
        side = self.model.config.image_size
        options = dict(interpolation="bicubic", align_corners=True, antialias=self.antialias)
        images = kornia.geometry.resize(images, (side, side), **options)
        return kornia.enhance.normalize((images + 1) / 2, self.mean.flatten(), self.std.flatten())


class ClipImageEmbedder(FrozenClipImageEmbedder):
    """As Stable Diffusion 2 has it: smoothed before resizing."""

    def __init__(self, model, jit=False, device=None, antialias=True, ucg_rate=0.0):
        super().__init__(model, jit, device, antialias, ucg_rate)


def load_vision_model(source: str):
    """The vision model, with its projection, of a folder or of a name on the hub; where no weights are read
    (is_weightless), of the released sizes. UserFileError if it is not there."""
    transformers = import_transformers("an image encoder")
    if is_weightless():
        return transformers.CLIPVisionModelWithProjection(released_config(source, "vision"))
    part = subfolder(source, ["image_encoder"])
    with reading(source, "image encoder"):
        config = transformers.AutoConfig.from_pretrained(source, subfolder=part)
    vision = getattr(config, "vision_config", None)
    if vision is not None:  # a whole CLIP, whose own projection_dim holds: that of its part may say otherwise
        vision.projection_dim = config.projection_dim
    return load_pretrained(transformers.CLIPVisionModelWithProjection, source, part, "image encoder", vision)


def read_normalisation(source: str) -> tuple[list[float], list[float]]:
    """(mean, standard deviation) of the colours that an encoder was trained on, from the preprocessor_config.json of
    its folder or hub repository; CLIP's where it has none. UserFileError for a file that does not say it."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    from transformers.utils import cached_file

    if is_weightless():
        return OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    try:
        path = cached_file(
            source,
            "preprocessor_config.json",
            subfolder=subfolder(source, ["feature_extractor", "image_encoder"]),
            _raise_exceptions_for_missing_entries=False,
        )
    except OSError as error:
        raise UserFileError(f"{source} cannot be reached ({str(error).splitlines()[0]})") from None
    if path is None:
        return OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    try:
        content = json.loads(Path(path).read_text())
        mean, std = ([float(x) for x in content[key]] for key in ("image_mean", "image_std"))
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError
    except (ValueError, TypeError, KeyError):
        raise UserFileError(f"{path} does not say image_mean and image_std, three numbers each") from None
    return mean, std
