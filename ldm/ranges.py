"""What numbers and sections of a configuration may be, by their names under `params`: checked before anything is
made of them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from guided_diffusion.errors import UserValueError


def _whole(least: int, multiple: int = 1) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least and v % multiple == 0


def _several(one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: all(map(one, v)) if isinstance(v, list | tuple) and v else one(v)


def _number(low: float, high: float) -> Callable[[Any], bool]:
    """low < value < high."""
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and low < v < high


_GROUPS = 32  # of every GroupNorm
_KINDS = {
    "a whole number from 1 on": (
        _several(_whole(1)),
        "timesteps channels image_size in_channels out_channels num_res_blocks embed_dim n_embed z_channels resolution "
        "out_ch log_every_t context_dim transformer_depth channel_mult ch_mult batch_size num_timesteps_cond",
    ),
    "a whole number from 0 on": (_whole(0), "num_workers disc_start max_images"),
    f"a positive multiple of {_GROUPS}": (_whole(1, _GROUPS), "model_channels ch"),
    "between 0 and 1": (_number(0, 1), "linear_start linear_end"),
    "from 0 to less than 1": (lambda v: v == 0 or _number(0, 1)(v), "dropout"),
    "a positive number": (_number(0, math.inf), "scale_factor cosine_s lr_g_factor"),
    "a mapping": (
        lambda v: isinstance(v, Mapping),
        "ddconfig lossconfig unet_config first_stage_config scheduler_config extractors",
    ),
}
_RANGES = {name: (kind, good) for kind, (good, names) in _KINDS.items() for name in names.split()}


def check_ranges(params: Mapping, where: str) -> None:
    """UserValueError that names the first value that is out of its range; null is left to its default."""
    for name, value in params.items():
        kind, good = _RANGES.get(name, ("", None))
        if good is not None and value is not None and not good(value):
            raise UserValueError(f"{where}: {name} must be {kind}, not {value!r}")
        if (
            isinstance(value, Mapping) and "target" not in value and name != "classifier"
        ):  # which has ADM's forms
            check_ranges(value, f"{where}: {name}")
