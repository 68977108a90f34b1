"""Which modalities are given, wanted and left out: one reading of --given, --want and --without for every program, and the
sharing out of samples among ranks."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

import numpy as np
import torch.distributed as dist

from .. import dist_util
from ..errors import UserValueError, closest

RANDOM = "random"  # the source of a label that is to be drawn


def names_of(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def known_name(flag: str, name: str, known: Iterable[str], alias: Mapping[str, str] | None = None) -> str:
    """`name` as the model has it, or by way of `alias`. UserValueError, with the nearest one, if it has none."""
    known = list(known)
    name = name if name in known else (alias or {}).get(name, name)
    if name not in known:
        has = ", ".join(known) or "nothing to choose from"
        raise UserValueError(f"{flag}: the model has no {name!r}, but {has}{closest(name, known)}")
    return name


def sources_given(
    specs: Sequence[str], known: Iterable[str], alias: Mapping[str, str] | None = None
) -> dict[str, str]:
    """{name: source} of --given NAME=SOURCE, several times. UserValueError for a name that is not `known` or given
    twice."""
    sources: dict[str, str] = {}
    known = list(known)
    for spec in specs:
        name, found, source = spec.partition("=")
        if not found or not source:
            raise UserValueError(f"--given {spec}: expected NAME=FILE_OR_FOLDER")
        name = known_name(f"--given {spec}", name, known, alias)
        if name in sources:
            raise UserValueError(f"--given {spec}: {name} is given twice")
        sources[name] = source
    return sources


def names_without(text: str, modalities: Iterable[str]) -> list[str]:
    """The names of --without, which must be modalities."""
    return [known_name(f"--without {name}", name, modalities) for name in names_of(text)]


def names_wanted(
    text: str,
    names: Sequence[str],
    given: Iterable[str],
    in_part: Iterable[str] = (),
    alias: Mapping[str, str] | None = None,
) -> list[str]:
    """The names of --want, by default all of `names` that are not given; `in_part` are those of which a part is given."""
    taken = set(given) - set(in_part)
    wanted = [known_name(f"--want {name}", name, [*names, *taken], alias) for name in names_of(text)]
    for name in wanted:
        if name in taken:
            raise UserValueError(f"--want {name}: that is given already")
    wanted = wanted or [name for name in names if name not in taken]
    if not wanted:
        raise UserValueError("everything is given: nothing is left to sample")
    return wanted


# -------------------------------------------------------------------------------------------------- samples and ranks


def own_share(count: int) -> range:
    """The numbers of the samples that this rank makes, of `count` in all."""
    return range(dist_util.get_rank(), count, dist_util.get_world_size())


def batches(numbers: Sequence[int], size: int) -> list[list[int]]:
    """`numbers` in runs of at most `size`."""
    if size < 1:
        raise UserValueError(f"the batch size must be at least 1, not {size}")
    rest = iter(numbers)
    return list(iter(lambda: list(islice(rest, size)), []))


def store(arrays: dict[str, dict[int, np.ndarray]], numbers: Sequence[int], made: Mapping) -> None:
    """Add tensors by name [b, ...] to the rows of `arrays`, under these numbers."""
    for name, value in made.items():
        arrays.setdefault(name, {}).update(zip(numbers, value.float().cpu().numpy(), strict=True))


def gathered(arrays: dict[str, dict[int, np.ndarray]]) -> dict[str, np.ndarray]:
    """The rows of all ranks, {name: {number: row}}, in the order of their numbers."""
    ranks = [arrays]
    if dist_util.get_world_size() > 1:
        ranks = [None] * dist_util.get_world_size()
        dist.all_gather_object(ranks, arrays)
    names = dict.fromkeys(name for rank in ranks for name in rank)
    merged = {name: {k: v for rank in ranks for k, v in rank.get(name, {}).items()} for name in names}
    return {name: np.stack([rows[k] for k in sorted(rows)]) for name, rows in merged.items()}
