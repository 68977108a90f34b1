"""Objects from configurations, and small helpers (interface: latent-diffusion, ldm/util.py)."""

import importlib
import inspect
import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from guided_diffusion.errors import UserValueError
from guided_diffusion.nn import mean_flat

__all__ = [
    "count_params",
    "default",
    "exists",
    "get_obj_from_str",
    "instantiate_from_config",
    "isimage",
    "ismap",
    "log_txt_as_img",
    "mean_flat",
]

_logger = logging.getLogger(__name__)

# What configurations write in place of a conditioner's `target`: the first stage serves, or nothing does.
_NOTHING_TO_MAKE = ("__is_first_stage__", "__is_unconditional__")


def instantiate_from_config(config: Mapping | str):
    """config["target"](**config["params"]); None for the words __is_first_stage__ and __is_unconditional__.

    `UserValueError` for a configuration without target, a target that does not exist, and parameters that it
    does not know or lacks.
    """
    if isinstance(config, str) and config in _NOTHING_TO_MAKE:
        return None
    if not isinstance(config, Mapping) or "target" not in config:
        raise UserValueError(f"a configuration needs the key `target`, the class to make; got {config!r}")
    make, params = get_obj_from_str(config["target"]), config.get("params") or {}
    try:
        inspect.signature(make).bind(**params)
    except TypeError as error:
        raise UserValueError(f"params of {config['target']}: {error}") from None
    except ValueError:
        pass  # a class written in C need not tell its signature
    return make(**params)


def get_obj_from_str(string: str, reload: bool = False):
    """The object that `package.module.name` means; `reload` runs the module again first.

    `UserValueError` if the path, or a package that the module needs, does not exist.
    """
    module_name, _, name = string.rpartition(".")
    if not module_name:
        raise UserValueError(f"target {string!r} is not of the form package.module.name")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise UserValueError(f"target {string}: there is no module {error.name}") from None
        raise UserValueError(
            f"target {string} needs the package {error.name}, which is not installed"
        ) from error
    if reload:
        module = importlib.reload(module)
    try:
        return getattr(module, name)
    except AttributeError:
        raise UserValueError(f"target {string}: {module_name} has no {name}") from None


def exists(x) -> bool:
    """Is it anything but None?"""
    return x is not None


def default(val, d):
    """`val`, or where it is None `d`: a value, or a function that makes it."""
    if val is not None:
        return val
    return d() if inspect.isfunction(d) else d


def count_params(model: torch.nn.Module, verbose: bool = False) -> int:
    """The number of parameters of `model`; `verbose` logs it in millions."""
    total = sum(parameter.numel() for parameter in model.parameters())
    if verbose:
        _logger.info("%s has %.2f M params.", type(model).__name__, total / 1e6)
    return total


def ismap(x) -> bool:
    """Is it a batch of maps, [B, C, H, W] with more channels than an image has?"""
    return isinstance(x, torch.Tensor) and x.ndim == 4 and x.shape[1] > 3


def isimage(x) -> bool:
    """Is it a batch of images, [B, 1 or 3, H, W]?"""
    return isinstance(x, torch.Tensor) and x.ndim == 4 and x.shape[1] in (1, 3)


def log_txt_as_img(wh: tuple[int, int], xc: Sequence[str], size: int = 10) -> torch.Tensor:
    """Captions drawn black on white: [len(xc), 3, height, width] in [-1, 1].

    wh: (width, height) in pixels; size: of the font, in pixels.
    """
    width, _ = wh
    per_line = max(1, 40 * width // 256)
    font = ImageFont.load_default(size)
    images = []
    for caption in xc:
        image = Image.new("RGB", wh, color="white")
        lines = [caption[i : i + per_line] for i in range(0, len(caption), per_line)]
        ImageDraw.Draw(image).text((0, 0), "\n".join(lines), fill="black", font=font)
        images.append(np.asarray(image))
    stack = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return stack / 127.5 - 1
