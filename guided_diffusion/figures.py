"""Pictures for people: contact sheets of samples and their modalities."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch as th
from PIL import Image, ImageDraw, ImageFont

_MARGIN, _TEXT = 6, 13
_INK, _PAPER = (30, 30, 30), (255, 255, 255)


def to_uint8(images: th.Tensor) -> np.ndarray:
    """Images [B, C, H, W] in [-1, 1] -> uint8 [B, H, W, C], as ADM stores samples."""
    return (
        ((images + 1) * 127.5)
        .round()
        .clamp(0, 255)
        .to(th.uint8)
        .permute(0, 2, 3, 1)
        .contiguous()
        .cpu()
        .numpy()
    )


@dataclass(frozen=True)
class Row:
    """One row of a sheet: images uint8 [N, H, W, C] under a title, each with a caption if there are any."""

    title: str
    images: np.ndarray
    captions: Sequence[str] = field(default_factory=tuple)


def contact_sheet(rows: Sequence[Row], tile: int = 64) -> Image.Image:
    """The rows below each other; pictures are enlarged without smoothing to about `tile` pixels, never
    reduced.

    Grey, RGB and RGBA images are drawn (the last over white); of others, the first channel.
    """
    font = ImageFont.load_default(size=_TEXT)
    blocks = [_block(row, tile, font) for row in rows if len(row.images)]
    if not blocks:
        raise ValueError("a contact sheet needs at least one picture")
    width = max(block.width for block in blocks)
    sheet = Image.new("RGB", (width + 2 * _MARGIN, sum(b.height + _MARGIN for b in blocks) + _MARGIN), _PAPER)
    top = _MARGIN
    for block in blocks:
        sheet.paste(block, (_MARGIN, top))
        top += block.height + _MARGIN
    return sheet


def _block(row, tile, font):
    pictures = [_picture(image, tile) for image in row.images]
    side = pictures[0].size
    caption_height = _TEXT + 4 if row.captions else 0
    title_width = int(font.getlength(row.title)) + 2
    width = max(len(pictures) * (side[0] + _MARGIN) - _MARGIN, title_width)
    block = Image.new("RGB", (width, _TEXT + 5 + side[1] + caption_height), _PAPER)
    draw = ImageDraw.Draw(block)
    draw.text((0, 0), row.title, fill=_INK, font=font)
    for k, picture in enumerate(pictures):
        left = k * (side[0] + _MARGIN)
        block.paste(picture, (left, _TEXT + 5))
        if k < len(row.captions):
            middle = left + side[0] / 2
            draw.text((middle, _TEXT + 6 + side[1]), row.captions[k], fill=_INK, font=font, anchor="mt")
    return block


def _picture(image, tile):
    channels = image.shape[-1]
    if channels == 3:
        picture = Image.fromarray(image, "RGB")
    elif channels == 4:
        over = Image.fromarray(image, "RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", over.size, (255, 255, 255, 255)), over).convert(
            "RGB"
        )
    else:
        picture = Image.fromarray(np.ascontiguousarray(image[..., 0]), "L").convert("RGB")
    factor = max(1, round(tile / picture.height))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
