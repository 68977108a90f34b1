"""Images for people: contact sheets of samples and their modalities, and curves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch as th
from PIL import Image, ImageDraw, ImageFont

from . import image_files

_MARGIN, _TEXT = 6, 13
_INK, _PAPER = (30, 30, 30), (255, 255, 255)


def to_uint8(images: th.Tensor, known: th.Tensor | None = None) -> np.ndarray:
    """`image_files.to_uint8` as an array on the CPU: [B, C, H, W] in [-1, 1] -> uint8 [B, H, W, C].

    known: bool [B, 1, H, W], or one that broadcasts: pixels that are given data, which come back exactly.
    """
    sampled = image_files.to_uint8(images).cpu()
    if known is None:
        return sampled.numpy()
    exact = image_files.stored_pixels(images.permute(0, 2, 3, 1).cpu().numpy())
    return np.where(known.permute(0, 2, 3, 1).cpu().numpy(), exact, sampled.numpy())


def label_captions(labels: Sequence[Sequence[int]], class_names: Sequence[str] = ()) -> list[str]:
    """A caption for each image: its classes by every modality, [modalities][N], by name where they have names."""
    names = dict(enumerate(class_names))
    return [
        " ".join(names.get(int(n), str(int(n))) for n in numbers) for numbers in zip(*labels, strict=True)
    ]


@dataclass(frozen=True)
class Row:
    """One row of a sheet: images uint8 [N, H, W, C] under a title, each with a caption if there are any."""

    title: str
    images: np.ndarray
    captions: Sequence[str] = field(default_factory=tuple)


def contact_sheet(rows: Sequence[Row], tile: int = 64) -> Image.Image:
    """The rows below each other; images are enlarged without smoothing to about `tile` pixels, never
    reduced.

    Grey, RGB and RGBA images are drawn (the last over white); of others, the first channel.
    """
    font = ImageFont.load_default(size=_TEXT)
    blocks = [_block(row, tile, font) for row in rows if len(row.images)]
    if not blocks:
        raise ValueError("a contact sheet needs at least one image")
    width = max(block.width for block in blocks)
    sheet = Image.new("RGB", (width + 2 * _MARGIN, sum(b.height + _MARGIN for b in blocks) + _MARGIN), _PAPER)
    top = _MARGIN
    for block in blocks:
        sheet.paste(block, (_MARGIN, top))
        top += block.height + _MARGIN
    return sheet


def _block(row, tile, font):
    images = [_image(image, tile) for image in row.images]
    side = images[0].size
    caption_height = _TEXT + 4 if row.captions else 0
    title_width = int(font.getlength(row.title)) + 2
    width = max(len(images) * (side[0] + _MARGIN) - _MARGIN, title_width)
    block = Image.new("RGB", (width, _TEXT + 5 + side[1] + caption_height), _PAPER)
    draw = ImageDraw.Draw(block)
    draw.text((0, 0), row.title, fill=_INK, font=font)
    for k, pil in enumerate(images):
        left = k * (side[0] + _MARGIN)
        block.paste(pil, (left, _TEXT + 5))
        if k < len(row.captions):
            middle = left + side[0] / 2
            draw.text((middle, _TEXT + 6 + side[1]), row.captions[k], fill=_INK, font=font, anchor="mt")
    return block


def _image(image, tile):
    channels = image.shape[-1]
    if channels == 3:
        pil = Image.fromarray(image, "RGB")
    elif channels == 4:
        over = Image.fromarray(image, "RGBA")
        pil = Image.alpha_composite(Image.new("RGBA", over.size, (255, 255, 255, 255)), over).convert("RGB")
    else:
        pil = Image.fromarray(np.ascontiguousarray(image[..., 0]), "L").convert("RGB")
    factor = max(1, round(tile / pil.height))
    return pil.resize((pil.width * factor, pil.height * factor), Image.Resampling.NEAREST)


@dataclass(frozen=True)
class Curve:
    """Points (x, y) joined by lines, under a name in the legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


@dataclass(frozen=True)
class Axes:
    """Where the curves of `line_plot` lie in the image: data ranges, and their box in pixels."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    box: tuple[int, int, int, int]  # left, top, right, bottom

    def pixel(self, x: float, y: float) -> tuple[float, float]:
        """The place of a point."""
        left, top, right, bottom = self.box
        across = (x - self.x_range[0]) / (self.x_range[1] - self.x_range[0])
        up = (y - self.y_range[0]) / (self.y_range[1] - self.y_range[0])
        return left + across * (right - left), bottom - up * (bottom - top)


# Told apart by the colour-blind too (Okabe and Ito).
_COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0))


def line_plot(
    curves: Sequence[Curve], x_label: str, y_label: str, title: str = "", size: tuple[int, int] = (640, 420)
) -> tuple[Image.Image, Axes]:
    """The curves over labelled axes with round ticks and a legend below; y starts at 0 if no value is
    negative.

    Points that are not finite are left out. ValueError if nothing remains.
    """
    curves = [_finite(curve) for curve in curves]
    if not any(len(curve.x) for curve in curves):
        raise ValueError("a plot needs at least one finite point")
    xs, ys = ([v for c in curves for v in values(c)] for values in (lambda c: c.x, lambda c: c.y))
    x_ticks, y_ticks = round_ticks(min(xs), max(xs)), round_ticks(min(0.0, *ys), max(ys))
    font = ImageFont.load_default(size=_TEXT)
    legend = _legend_lines(curves, size[0] - 4 * _MARGIN, font)
    numbers = max(font.getlength(_number(tick)) for tick in y_ticks)
    line = _TEXT + 5
    box = (
        int(numbers) + line + 3 * _MARGIN,
        line + _MARGIN,
        size[0] - 3 * _MARGIN,
        size[1] - 2 * line - len(legend) * line - 2 * _MARGIN,
    )
    axes = Axes((x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1]), box)
    image = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(image)
    _draw_axes(draw, axes, x_ticks, y_ticks, font)
    middle = (box[0] + box[2]) / 2
    draw.text((middle, _MARGIN), title, fill=_INK, font=font, anchor="mt")
    draw.text((middle, box[3] + line + 2), x_label, fill=_INK, font=font, anchor="mt")
    _draw_upright(image, y_label, (_MARGIN, (box[1] + box[3]) / 2), font)
    for k, curve in enumerate(curves):
        _draw_curve(draw, axes, curve, _COLOURS[k % len(_COLOURS)])
    for row, entries in enumerate(legend):
        for left, k in entries:
            top = box[3] + (2 + row) * line + 2 * _MARGIN
            middle_y = top + _TEXT / 2
            _draw_path(
                draw, [(left, middle_y), (left + 24, middle_y)], _COLOURS[k % len(_COLOURS)], curves[k].dashed
            )
            draw.text((left + 30, top), curves[k].name, fill=_INK, font=font)
    return image, axes


def round_ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers at even distances whose first and last enclose low..high."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def _finite(curve):
    kept = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    return Curve(curve.name, [x for x, _ in kept], [y for _, y in kept], curve.dashed)


def _number(value):
    return f"{value:.6g}"


def _draw_axes(draw, axes, x_ticks, y_ticks, font):
    left, top, right, bottom = axes.box
    grid = (225, 225, 225)
    for tick in x_ticks:
        place, _ = axes.pixel(tick, axes.y_range[0])
        draw.line([(place, top), (place, bottom)], fill=grid)
        draw.text((place, bottom + 4), _number(tick), fill=_INK, font=font, anchor="mt")
    for tick in y_ticks:
        _, place = axes.pixel(axes.x_range[0], tick)
        draw.line([(left, place), (right, place)], fill=grid)
        draw.text((left - 4, place), _number(tick), fill=_INK, font=font, anchor="rm")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill=_INK)


def _draw_curve(draw, axes, curve, colour):
    points = [axes.pixel(x, y) for x, y in zip(curve.x, curve.y, strict=True)]
    _draw_path(draw, points, colour, curve.dashed)
    for x, y in points if len(points) <= 40 else ():
        draw.ellipse([(x - 2.5, y - 2.5), (x + 2.5, y + 2.5)], fill=colour)


def _draw_path(draw, points, colour, dashed):
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        # Dashes of 4 pixels.
        pieces = max(1, round(math.hypot(x1 - x0, y1 - y0) / 4)) if dashed else 1
        for k in range(0, pieces, 2):
            start, end = k / pieces, (k + 1) / pieces
            draw.line(
                [
                    (x0 + start * (x1 - x0), y0 + start * (y1 - y0)),
                    (x0 + end * (x1 - x0), y0 + end * (y1 - y0)),
                ],
                fill=colour,
                width=2,
            )


def _draw_upright(image, text, place, font):
    strip = Image.new("L", (int(font.getlength(text)) + 2, _TEXT + 4), 0)
    ImageDraw.Draw(strip).text((1, 0), text, fill=255, font=font)
    strip = strip.rotate(90, expand=True)
    image.paste(_INK, (int(place[0]), int(place[1] - strip.height / 2)), strip)


def _legend_lines(curves, width, font):
    """(left, index) of the legend's entries, by line."""
    lines, left = [[]], 2 * _MARGIN
    for k, curve in enumerate(curves):
        wide = 30 + font.getlength(curve.name) + 16
        if lines[-1] and left + wide > width:
            lines.append([])
            left = 2 * _MARGIN
        lines[-1].append((left, k))
        left += wide
    return lines
