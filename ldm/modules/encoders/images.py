"""Image encoders: from images to representations (interface: Stable Diffusion 2, ldm/modules/encoders/modules.py)."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from guided_diffusion.errors import UserFileError
from ldm.modules.encoders.base import (
    RELEASED,
    AbstractEncoder,
    frozen,
    import_transformers,
    load_pretrained,
    reading,
    subfolder,
)


class FrozenOpenCLIPImageEmbedder(AbstractEncoder):
    """CLIP's image encoder, in transformers' form: images -> their projected embedding, which is not normalised.

    arch, version: of the released model, whose hub repository is taken; or version is a folder or hub name. A folder
    holds a whole CLIP or its vision model, itself or under `image_encoder` as diffusers writes it. device is accepted
    and has no effect: the encoder runs where its weights are. UserFileError if there is none.
    """

    def __init__(self, arch="ViT-H-14", version="laion2b_s32b_b79k", device=None, freeze=True):
        super().__init__()
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

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> [B, D]."""
        return self.model(pixel_values=self.preprocess(images)).image_embeds


def load_vision_model(source: str):
    """The vision model, with its projection, of a folder or of a name on the hub. UserFileError if it is not there."""
    transformers = import_transformers("an image encoder")
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
