"""Objects from configurations, and small helpers (interface: latent-diffusion, ldm/util.py)."""

import contextlib
import difflib
import importlib
import inspect
import logging
import re
from abc import ABC
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from guided_diffusion.errors import UserValueError
from guided_diffusion.nn import mean_flat
from ldm.ranges import check_ranges

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

_OWN = ("ldm", "guided_diffusion")  # packages whose parameters ldm/ranges.py knows
# What of taming-transformers configurations name, and is here.
_OF_TAMING = {
    "taming.modules.losses.vqperceptual": "ldm.modules.losses.vqperceptual",
    "taming.modules.losses": "ldm.modules.losses.vqperceptual",
    "taming.modules.vqvae.quantize": "ldm.modules.quantize",
    "taming.modules.discriminator.model": "ldm.modules.losses.discriminator",
    "taming.lr_scheduler": "ldm.lr_scheduler",
}
_UNKNOWN = re.compile(r"got an unexpected keyword argument '(\w+)'")

# What configurations write in place of a conditioner's `target`: the first stage serves, or nothing does.
_NOTHING_TO_MAKE = ("__is_first_stage__", "__is_unconditional__")


class Indexed(ABC):  # noqa: B024
    """Any class whose objects have a length and items that cannot be set: an array or a table of a file could write to it
    as soon as it is made."""

    @classmethod
    def __subclasshook__(cls, other):
        has = [hasattr(other, name) for name in ("__len__", "__getitem__", "__setitem__")]
        return has == [True, True, False]


@runtime_checkable
class Schedule(Protocol):
    """A class whose objects have factors of the learning rate."""

    def schedule(self, n): ...


def instantiate_from_config(config: Mapping | str, expected: type | None = None, key: str = ""):
    """config["target"](**config["params"]); None for the words __is_first_stage__ and __is_unconditional__.

    expected: what the target must be a subclass of; without it any callable is called, so give it wherever the
    configuration comes from a file. key: where the configuration stands, for messages. `UserValueError` for a
    target that does not exist or is something else, and for parameters that it does not know or lacks, or that
    are out of range (ldm/ranges.py).
    """
    if isinstance(config, str) and config in _NOTHING_TO_MAKE:
        return None
    make, params = resolve(config, expected, key), config.get("params") or {}
    where = f"params of {config['target']}"
    if not isinstance(params, Mapping):
        raise UserValueError(f"{where} must be a mapping of names to values, not {params!r}")
    if str(getattr(make, "__module__", "")).split(".")[0] in _OWN:
        _refuse_unexpected(make, params, where)  # before what is missing, of which the name may be misspelt
        check_ranges(params, where)
    try:
        inspect.signature(make).bind(**params)
    except TypeError as error:
        raise UserValueError(f"{where}: {error}{_hint(make, error)}") from None
    except ValueError:
        pass  # a class written in C need not tell its signature
    try:
        return make(**params)
    except TypeError as error:  # of a base class, to which ** handed the parameter on
        if (unknown := _UNKNOWN.search(str(error))) is None or unknown[1] not in params:
            raise
        raise UserValueError(f"{where}: {unknown[0]}{_hint(make, error)}") from error


def resolve(config: Mapping, expected: type | None = None, key: str = ""):
    """What `config["target"]` names, which is not called. It must be a subclass of `expected` (if that is given), or a
    function that is annotated to return one.

    The module that holds it is imported, which runs it: name modules that you trust.
    """
    at = f"{key}: " if key else ""
    if not isinstance(config, Mapping) or "target" not in config:
        got = (
            f"the keys {', '.join(map(str, config))}"
            if isinstance(config, Mapping) and config
            else repr(config)
        )
        raise UserValueError(f"{at}a configuration needs the key `target`, the class to make; got {got}")
    if unknown := [name for name in config if name not in ("target", "params")]:
        near = difflib.get_close_matches(str(unknown[0]), ("params",), cutoff=0.7)
        if near:
            raise UserValueError(f"{at}unknown key {unknown[0]!r} beside `target`: do you mean {near[0]!r}?")
    target = config["target"]
    made = get_obj_from_str(target)
    if expected is None:
        return made
    # A function may make what belongs here, and says so: `def load_lpips(...) -> LPIPS`.
    makes = made
    if inspect.isfunction(made):
        makes = None
        with contextlib.suppress(Exception):  # annotations are any expressions
            makes = inspect.get_annotations(made, eval_str=True).get("return")
    if not inspect.isclass(makes) or not issubclass(makes, expected):
        raise UserValueError(
            f"{at}target {target} is {'another class' if inspect.isclass(made) else 'no class'}: "
            f"here belongs a subclass of {expected.__module__}.{expected.__qualname__}"
        )
    return made


def refuse_unknown(where: str, names: Iterable, known: Iterable[str]) -> None:
    """UserValueError that names the first of `names` that is not among the known ones, and the nearest of these."""
    known = list(known)
    for name in names:
        if name not in known:
            raise UserValueError(f"{where}: unknown {name!r}{nearest(name, known)}")


def _refuse_unexpected(make, params: Mapping, where: str) -> None:
    """UserValueError for the first name that neither `make` takes nor the bases to which it hands on `**`."""
    known = parameters(make)
    for function in inspect.getmro(make) if inspect.isclass(make) else (make,):
        own = vars(function).get("__init__") if inspect.isclass(function) else function
        if inspect.isfunction(own) and all(
            p.kind != p.VAR_KEYWORD for p in inspect.signature(own).parameters.values()
        ):
            break  # `known` is all
    else:
        return
    for name in params:
        if name not in known:
            raise UserValueError(
                f"{where}: got an unexpected keyword argument {name!r}{nearest(name, known)}"
            )


def parameters(*functions) -> list[str]:
    """The names of the parameters of functions or classes, and of the bases to which a class hands on `**`."""
    names = []
    for function in functions:
        for part in inspect.getmro(function) if inspect.isclass(function) else (function,):
            part = vars(part).get("__init__") if inspect.isclass(part) else part
            if inspect.isfunction(part):
                found = inspect.signature(part).parameters.values()
                names += [p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
                if all(p.kind != p.VAR_KEYWORD for p in found):
                    break
    return [name for name in dict.fromkeys(names) if name != "self"]


def _hint(make, error):
    unknown = _UNKNOWN.search(str(error))
    return nearest(unknown[1], parameters(make)) if unknown else ""


def nearest(name: object, known: Sequence[str]) -> str:
    """The end of a message on a name that is not known: the nearest of the known ones, or all."""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"; do you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}" if known else ""


def get_obj_from_str(string: str, reload: bool = False):
    """The object that `package.module.name` means; `reload` runs the module again first.

    `UserValueError` if the path, or a package that the module needs, does not exist.
    """
    module_name, _, name = string.rpartition(".") if isinstance(string, str) else ("", "", "")
    if not module_name or not all(part.isidentifier() for part in string.split(".")):
        raise UserValueError(f"target {string!r} is not of the form package.module.name")
    module_name = _OF_TAMING.get(module_name, module_name)
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
