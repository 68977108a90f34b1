"""One image: where it is read from, and how it is cut to the size of training."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from guided_diffusion.errors import UserValueError
from guided_diffusion.image_datasets import UNREADABLE, BadImageError, _to_channels
from ldm.data.palettes import Palette

Resampling = Image.Resampling
INTERPOLATIONS = {
    "nearest": Resampling.NEAREST,
    "linear": Resampling.BILINEAR,  # upstream's word
    "bilinear": Resampling.BILINEAR,
    "bicubic": Resampling.BICUBIC,
    "lanczos": Resampling.LANCZOS,
}
CLASS_NUMBERS = ("P", "L", "I", "I;16")  # modes of Pillow in which a label map holds numbers, not colours
LARGEST_CROP = 0.8  # of a random crop: its side is this share to all of the image's, as in ADM


@dataclass(frozen=True)
class Source:
    """Where an image comes from. A label map is never smoothed; `palette` paints one that holds numbers."""

    path: Path
    is_map: bool = False
    palette: Palette | None = None
    ids: bool = False  # the numbers are the palette's `ids`
    half: int | None = None  # 0: the left half of a side-by-side image, 1: the right one

    def size(self) -> tuple[int, int]:
        """(width, height), from the file's head alone. BadImageError where there is none."""
        try:
            with Image.open(self.path) as image:
                width, height = image.size
        except UNREADABLE as error:
            raise BadImageError(f"{self.path} cannot be read as an image: {error}") from error
        if self.half is None:
            return width, height
        if width % 2:
            raise UserValueError(f"{self.path} is {width} pixels wide, which are not two images side by side")
        return width // 2, height

    def read(self) -> Image.Image:
        """The image in RGB. BadImageError, which names the file, where it is damaged."""
        try:
            with Image.open(self.path) as image:
                image.load()
        except UNREADABLE as error:
            raise BadImageError(f"{self.path} cannot be read as an image: {error}") from error
        if self.half is not None:
            middle = image.width // 2
            image = image.crop((self.half * middle, 0, (self.half + 1) * middle, image.height))
        if self.is_map and image.mode in CLASS_NUMBERS:
            return self._painted(image)
        return _to_channels(image, 3)

    def _painted(self, image: Image.Image) -> Image.Image:
        if self.palette is None:
            if image.mode == "P":  # brings its colours along
                return image.convert("RGB")
            raise UserValueError(f"{self.path} holds class numbers: say with `palette` how they are painted")
        try:
            return Image.fromarray(self.palette.paint(np.asarray(image), self.ids))
        except UserValueError as error:
            raise UserValueError(f"{self.path}: {error}") from None


@dataclass(frozen=True)
class Cut:
    """A place in images of one size: the same for a photo and its label map."""

    halvings: int  # averages of 2x2 pixels before the resampling
    scaled: tuple[int, int]  # (width, height) that the whole image gets
    left: int
    top: int
    size: tuple[int, int]  # (height, width) that is cut out of it
    flip: bool

    def apply(self, image: Image.Image, resample: Resampling) -> np.ndarray:
        """The cut out of an image: uint8 [H, W, 3]. NEAREST invents no colour."""
        if resample != Resampling.NEAREST:
            for _ in range(self.halvings):
                image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
        if image.size != self.scaled:
            image = image.resize(self.scaled, resample)
        height, width = self.size
        arr = np.asarray(image)[self.top : self.top + height, self.left : self.left + width]
        return arr[:, ::-1] if self.flip else arr


def draw_cut(
    image: tuple[int, int],  # (width, height)
    size: tuple[int, int],  # (height, width)
    random_crop: bool,
    random_flip: bool,
) -> Cut:
    """The middle of an image, scaled so that it just covers `size`, or a random part of it.

    For squares the numbers drawn and the pixels cut are ADM's (center_crop_arr, random_crop_arr).
    """
    height, width = cover = size
    if random_crop:
        tall = random.randrange(height, -int(-height // LARGEST_CROP) + 1)
        cover = (tall, round(width * tall / height))
    w, h = image
    halvings = 0
    while w >= 2 * cover[1] and h >= 2 * cover[0]:  # one resampling step would alias at large factors
        w, h, halvings = w // 2, h // 2, halvings + 1
    scale = max(cover[1] / w, cover[0] / h)
    scaled = (round(w * scale), round(h * scale))
    spare = (scaled[1] - height, scaled[0] - width)
    top, left = (random.randrange(s + 1) for s in spare) if random_crop else (s // 2 for s in spare)
    flip = random_flip and random.random() < 0.5
    return Cut(halvings, scaled, left, top, size, flip)
