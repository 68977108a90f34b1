"""One image of a scene: where it is read from, and how: as a photo, or as a label map."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from guided_diffusion.errors import UserValueError
from guided_diffusion.image_files import image_size, opened, to_channels, upright
from guided_diffusion.palettes import NUMBERS, Palette, load_palette

Resampling = Image.Resampling
INTERPOLATIONS = {
    "nearest": Resampling.NEAREST,
    "linear": Resampling.BILINEAR,  # upstream's word
    "bilinear": Resampling.BILINEAR,
    "bicubic": Resampling.BICUBIC,
    "lanczos": Resampling.LANCZOS,
}
LABEL_MAPS = ("label_map",)  # keys whose images are label maps, where nothing else is said


@dataclass(frozen=True)
class Reading:
    """How a file becomes an image. A label map is never smoothed; `palette` paints one that holds numbers, and one
    that holds colours must hold the palette's alone."""

    is_map: bool = False
    palette: Palette | None = None
    ids: bool = False  # the numbers are the palette's `ids`
    interpolation: str = "bicubic"  # of a photo

    @property
    def resample(self) -> Resampling:
        """What resizes it."""
        return Resampling.NEAREST if self.is_map else INTERPOLATIONS[self.interpolation]

    def read(self, path: Path, half: int | None = None) -> Image.Image:
        """The image in RGB; `half` as in Source. UserError that names the file, where it cannot be used."""
        with opened(path) as file:
            image = upright(file, str(path))
            if half is not None:
                middle = image.width // 2
                image = image.crop((half * middle, 0, (half + 1) * middle, image.height))
            holds_numbers = self.is_map and image.mode in NUMBERS
            image = image if holds_numbers else to_channels(image, 3)
        try:
            if holds_numbers:
                return self._painted(image)
            if self.palette is not None:
                self.palette.check_colors(np.asarray(image))
            return image
        except UserValueError as error:
            raise UserValueError(f"{path}: {error}") from None

    def _painted(self, image: Image.Image) -> Image.Image:
        if self.palette is not None:
            return Image.fromarray(self.palette.paint(np.asarray(image), self.ids))
        if image.mode == "P":  # brings its colours along
            return image.convert("RGB")
        raise UserValueError("it holds class numbers: say with `palette` how they are painted")


@dataclass(frozen=True)
class Source:
    """Where an image comes from."""

    path: Path
    reading: Reading = Reading()
    half: int | None = None  # 0: the left half of a side-by-side image, 1: the right one

    def size(self) -> tuple[int, int]:
        """(width, height), from the file's head alone. BadImageError where there is none."""
        width, height = image_size(self.path)
        if self.half is None:
            return width, height
        if width % 2:
            raise UserValueError(f"{self.path} is {width} pixels wide, which are not two images side by side")
        return width // 2, height

    def read(self) -> Image.Image:
        """The image in RGB. UserError, which names the file, where it cannot be used."""
        return self.reading.read(self.path, self.half)


def pair_readings(
    keys: tuple[str, ...],
    maps: tuple[str, ...] | None = None,  # keys that are label maps
    palette: str | None = None,
    ids: bool = False,
    interpolation: str = "bicubic",
) -> dict[str, Reading]:
    """How the images of a pair are read, by key.

    Without `maps` a `label_map` is a label map, or with a palette, if no key is called so, the last one.
    UserValueError where `maps` are no keys, or nothing is left for the palette to paint.
    """
    if unknown := [key for key in maps or () if key not in keys]:
        raise UserValueError(f"maps: there is no key {unknown[0]!r} among {', '.join(keys)}")
    if maps is None:
        maps = [key for key in keys if key in LABEL_MAPS] or (keys[-1:] if palette else ())
    if palette and not maps:
        raise UserValueError(
            f"palette {palette} has nothing to paint: say with `maps` which keys are label maps"
        )
    painted = load_palette(palette) if palette else None
    return {
        key: Reading(True, painted, ids) if key in maps else Reading(interpolation=interpolation)
        for key in keys
    }


def reading_of(key: str, data: Mapping | None) -> Reading:
    """How the data sets of a configuration (its section `data`) read the images under `key`.

    Where it does not say, a `label_map` is a label map in colours, everything else a photo.
    """
    for found in _readings(data):
        if key in found:
            return found[key]
    return Reading(is_map=key in LABEL_MAPS)


def _readings(config):
    """Of every data set in a configuration, how it reads its images, by key."""
    from ldm.data.base import Images  # here: it is built on this module
    from ldm.util import get_obj_from_str

    if isinstance(config, Mapping):
        target, params = config.get("target"), config.get("params") or {}
        if isinstance(target, str) and target.startswith("ldm.data."):
            kind = get_obj_from_str(target)
            if isinstance(kind, type) and issubclass(kind, Images):
                yield kind.readings(**params)
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            yield from _readings(value)
