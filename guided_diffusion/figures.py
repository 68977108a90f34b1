"""Images for people: contact sheets of samples and their modalities, films of the denoising, and curves."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch as th
from PIL import Image, ImageDraw, ImageFont

from . import image_files
from .errors import UserValueError

_MARGIN, _TEXT = 6, 13
WIDTH = 1200  # pixels of a sheet, which a screen shows
_INK, _PAPER = (30, 30, 30), (255, 255, 255)
# Told apart by the colour-blind too (Okabe and Ito).
_COLOURS = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (230, 159, 0),
    (60, 60, 60),
)
MARKS = {"given": _COLOURS[0], "generated": _COLOURS[1], "true": _COLOURS[2]}  # where a row's images are from


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
    """One row of a sheet: images uint8 [N, H, W, C] under a title, each with a caption if there are any. mark: a
    key of MARKS, or ""."""

    title: str
    images: np.ndarray
    captions: Sequence[str] = field(default_factory=tuple)
    mark: str = ""

    def columns(self, first: int, last: int) -> "Row":
        """The images first..last-1, with their captions."""
        return Row(self.title, self.images[first:last], self.captions[first:last], self.mark)


def contact_sheet(rows: Sequence[Row], tile: int = 64, width: int = WIDTH) -> Image.Image:
    """The rows below each other; where they are wider than `width` pixels, their further columns follow below,
    those of all rows together. Images are enlarged without smoothing to about `tile` pixels, never reduced.

    Grey, RGB and RGBA images are drawn (the last over white); of others, the first channel.
    """
    font = ImageFont.load_default(size=_TEXT)
    rows = [row for row in rows if len(row.images)]
    if not rows:
        raise ValueError("a contact sheet needs at least one image")
    step = max(_step(row, tile, font) for row in rows)
    fit, most = max(1, (width - _MARGIN) // step), max(len(row.images) for row in rows)
    lines = math.ceil(most / fit)
    fit = math.ceil(most / lines)  # as even as they can be
    parts = [row.columns(first, first + fit) for first in range(0, most, fit) for row in rows]
    blocks = [_block(row, tile, font) for row in parts if len(row.images)]
    across = max(block.width for block in blocks)
    sheet = Image.new(
        "RGB", (across + 2 * _MARGIN, sum(b.height + _MARGIN for b in blocks) + _MARGIN), _PAPER
    )
    top = _MARGIN
    for block in blocks:
        sheet.paste(block, (_MARGIN, top))
        top += block.height + _MARGIN
    return sheet


def _step(row, tile, font):
    """Pixels from one image of a row to the next: long captions move them apart."""
    wide = max((font.getlength(caption) for caption in row.captions), default=0)
    return max(_image(row.images[0], tile).width, math.ceil(wide)) + _MARGIN


def _block(row, tile, font):
    images = [_image(image, tile) for image in row.images]
    side, step = images[0].size, _step(row, tile, font)
    caption_height = _TEXT + 4 if row.captions else 0
    mark = f"{'  ' * bool(row.title)}{row.mark}" if row.mark else ""
    title_width = int(font.getlength(row.title + mark)) + 2
    width = max(len(images) * step - _MARGIN, title_width)
    block = Image.new("RGB", (width, _TEXT + 5 + side[1] + caption_height), _PAPER)
    draw = ImageDraw.Draw(block)
    draw.text((0, 0), row.title, fill=_INK, font=font)
    if row.mark:
        draw.text((font.getlength(row.title), 0), mark, fill=MARKS[row.mark], font=font)
    for k, pil in enumerate(images):
        middle = k * step + (step - _MARGIN) / 2
        block.paste(pil, (int(middle - side[0] / 2), _TEXT + 5))
        if k < len(row.captions):
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


# -------------------------------------------------------------------------------------------------------------- films

FILM_FRAMES = 48  # at most
_FRAME, _LAST = 100, 2000  # milliseconds that a frame of a film lasts


def is_frame(done: int, total: int) -> bool:
    """Whether the step number `done` (from 1) of `total` is one of the at most FILM_FRAMES that a film shows; the last
    one is."""
    every = math.ceil(total / FILM_FRAMES)
    return (total - done) % every == 0


def save_film(frames: Sequence[Image.Image], file) -> None:
    """Write frames as an animated GIF that repeats. file: a path or an open binary file."""
    width, height = (max(size) for size in zip(*(frame.size for frame in frames), strict=True))
    even = [Image.new("RGB", (width, height), _PAPER) for _ in frames]
    for page, frame in zip(even, frames, strict=True):
        page.paste(frame, (0, 0))
    durations = [_FRAME] * (len(even) - 1) + [_LAST]
    even[0].save(file, "GIF", save_all=True, append_images=even[1:], duration=durations, loop=0)


# ------------------------------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Curve:
    """Points (x, y) joined by lines, under a name in the legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


@dataclass(frozen=True)
class Plot:
    """Curves over one pair of axes. chance: a level that knowing nothing reaches, drawn dotted; None for none.

    Values that are not finite leave a gap. y starts at 0 if none is negative.
    """

    curves: Sequence[Curve]
    x_label: str
    y_label: str
    title: str = ""
    chance: float | None = None
    top: float | None = None  # of y


def save_plots(
    plots: Sequence[Plot], path: str | os.PathLike, size: tuple[float, float] = (6.4, 4.4)
) -> None:
    """Write the plots side by side, each of `size` inches, to `path` (.png) and the same name with .pdf.

    Curves that coincide stay visible: earlier ones are wider, and every one has its own colour and markers.
    ValueError if a plot has no finite point.
    """
    figure = draw_plots(plots, size)
    stem, ending = os.path.splitext(path)
    if ending.lower() not in (".png", ".pdf"):
        raise UserValueError(f"{path}: a plot is written as .png and .pdf; name it .png")
    for name in (".png", ".pdf"):
        figure.savefig(
            stem + name, dpi=150, metadata={"Software": None} if name == ".png" else {"CreationDate": None}
        )


def draw_plots(plots: Sequence[Plot], size: tuple[float, float] = (6.4, 4.4)):
    """The matplotlib figure that `save_plots` writes; it opens no window."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(size[0] * len(plots), size[1]), layout="constrained")
    for axes, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
        _draw_plot(axes, plot)
    return figure


def _draw_plot(axes, plot):
    values = [float(y) for curve in plot.curves for y in curve.y if math.isfinite(y)]
    if not values:
        raise ValueError("a plot needs at least one finite point")
    count = len(plot.curves)
    wider = min(1.6, 3.5 / count)  # points
    for k, curve in enumerate(plot.curves):
        axes.plot(
            curve.x,
            curve.y,
            label=curve.name,
            color=[part / 255 for part in _COLOURS[k % len(_COLOURS)]],
            linestyle="--" if curve.dashed else "-",
            linewidth=1.4 + wider * (count - 1 - k),
            marker="osD^vPX*"[k % 8] if len(curve.x) <= 40 else "",
            markersize=4 + wider * (count - 1 - k),
            markeredgecolor="white",
            markeredgewidth=0.5,
        )
    if plot.chance is not None:
        axes.axhline(
            plot.chance, color="0.4", linestyle=":", linewidth=1.2, label=f"chance, {plot.chance:.3g}"
        )
    axes.set(xlabel=plot.x_label, ylabel=plot.y_label, title=plot.title)
    if min(values) >= 0:
        axes.set_ylim(bottom=0, top=plot.top)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False, fontsize="small")
