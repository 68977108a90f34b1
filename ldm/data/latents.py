"""Latents computed once: the cache's files, and the dataset that reads them.

A cache is a folder: shard-00000.safetensors, ... with the latents of `shard_size` items each, and index.json, which
says what they are of. In a shard stand, for every key of the images, KEY [n, c, h, w], the means of the first
stage's posterior (or its latents where it has none), KEY_std, and with stored flips KEY_flipped, KEY_flipped_std.
Nothing is scaled. Representations of the items' first images may stand beside: NAME [n, d], NAME_flipped.
"""

import dataclasses
import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.data import Dataset

from guided_diffusion.errors import UserError, UserFileError, UserValueError
from guided_diffusion.image_files import is_turned
from ldm.checkpoint import load_state_dict
from ldm.data.base import Images, Item
from ldm.data.captions import CaptionFolder
from ldm.util import instantiate_from_config

_logger = logging.getLogger(__name__)
FORMAT = 1
CACHED = "ldm.data.latents.CachedLatents"
ENCODER = ("encoder.", "quant_conv.")  # the tensors on which latents depend
PREFIX = "first_stage_model."  # of a first stage inside a latent diffusion's checkpoint


@dataclass(frozen=True)
class CacheIndex:
    """What a cache is of. Everything but `scale_factor` is known before the first latent is computed."""

    format: int
    first_stage: str  # checksum of the encoder
    size: tuple[int, int]  # (height, width) of the images
    keys: tuple[str, ...]
    flips: bool  # every image is stored flipped as well
    dtype: str
    shard_size: int
    batch_size: int  # by which it was computed: rounding depends on it
    items: tuple[str, ...]  # the images' files
    scale_factor: dict[str, float] | None = None  # 1 / standard deviation, by key; None: not finished
    representations: dict[str, str] | None = None  # checksum of the encoder, by name
    options: dict[str, str] | None = (
        None  # of the dataset, and by key how its files are read; None: not noted
    )
    sources: tuple[str, ...] | None = None  # checksum of the names, sizes and times of every item's files

    @property
    def shards(self) -> int:
        """The number of shards."""
        return -(-len(self.items) // self.shard_size)

    def to_json(self) -> str:
        content = {
            name: value for name, value in vars(self).items() if value is not None or name == "scale_factor"
        }
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def read(cls, root: str | Path) -> "CacheIndex":
        """The index of a folder. UserError where there is none that this version can read."""
        path = Path(root) / "index.json"
        if not path.is_file():
            raise UserFileError(
                f"{root} is no cache of latents (no index.json): scripts/cache_latents.py makes one"
            )
        try:
            content = json.loads(path.read_text())
            made = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in content.items()})
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not an index of latents: {error}") from error
        if made.format != FORMAT:
            raise UserError(
                f"{path} is of format {made.format}, this program reads {FORMAT}: cache the latents again"
            )
        return made

    def difference(self, other: "CacheIndex") -> str | None:
        """In words, the first thing in which two caches differ; None where they are of the same."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name == "scale_factor" or mine == theirs:
                continue
            if field.name == "first_stage":
                return "another first stage (its encoder's checksum differs)"
            if field.name == "representations":
                names = (", ".join(some or ()) or "none" for some in (mine, theirs))
                return "other representations ({} instead of {}, or another encoder)".format(*names)
            if field.name == "items":
                return f"other images ({len(mine)} instead of {len(theirs)}, or other names)"
            if mine is None:
                return "an earlier version, which did not note what its images hold"
            if field.name == "options":
                name = next(k for k in {**mine, **theirs} if mine.get(k) != theirs.get(k))
                if name in self.keys:
                    return f"another way of reading {name} (annotation, palette or half)"
                if name == "captions":
                    return "other captions"
                return f"another {name} ({mine.get(name)} instead of {theirs.get(name)})"
            if field.name == "sources":
                edited = [k for k, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b]
                return f"other contents of {self.items[edited[0]]} or its pair ({len(edited)} of {len(mine)} items changed)"
            return f"another {field.name} ({_words(mine)} instead of {_words(theirs)})"
        return None


def shard_path(root: str | Path, number: int) -> Path:
    """The file of a shard."""
    return Path(root) / f"shard-{number:05d}.safetensors"


# What of a dataset changes no latent: crops and flips are off when it is cached, and which caption is taken is drawn when
# it is read.
_APART = ("size", "random_crop", "random_flip", "caption", "caption_key")


def identity(images: Images) -> dict:
    """Fields of the index that tell these images from others of the same names.

    A file is known by its name, size and time of change (ns); how it is read by all that its Source says.
    """
    sources, told, ways = [], {}, {key: set() for key in images.keys}
    for entry in images.entries:
        files = []
        for key, source in entry.items():
            way = {name: value for name, value in vars(source).items() if name != "path"}
            same = tuple(map(id, way.values()))
            told[same] = told.get(same) or _told(way)
            ways[key].add(told[same])
            try:
                stat = source.path.stat()
            except OSError as error:
                raise UserFileError(f"{source.path} cannot be read: {error.strerror}") from None
            files.append(f"{source.path} {stat.st_size} {stat.st_mtime_ns}")
        sources.append(_digest("\n".join(files)))
    plain = {
        k: str(v) for k, v in vars(images).items() if isinstance(v, str | int | float) and k not in _APART
    }
    options = (
        plain
        | {key: _digest("\n".join(sorted(some))) for key, some in ways.items()}
        | {"orientation": "upright"}
    )
    if isinstance(images, CaptionFolder):
        options["captions"] = _digest(repr(images.captions))
    return {"options": options, "sources": tuple(sources)}


def _told(value) -> str:
    """All that a value, a dataclass of such, or an array holds, as text."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return repr({name: _told(inner) for name, inner in value.items()})
    return _digest(value.tobytes().hex()) if isinstance(value, np.ndarray) else repr(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def encoder_checksum(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the encoder's tensors in a first stage's state dict, by name."""
    return _checksum({name: value for name, value in weights.items() if name.startswith(ENCODER)})


def extractor_checksums(extractors: Mapping[str, nn.Module | Mapping]) -> dict[str, str] | None:
    """By name, SHA-256 of all tensors of encoders of representations, or of those that their configurations make;
    None where there are none."""
    checksums = {}
    for name, made in extractors.items():
        encoder = (
            instantiate_from_config(made, nn.Module, f"extractors.{name}")
            if isinstance(made, Mapping)
            else made
        )
        # The buffers too: they hold the preprocessing.
        checksums[name] = _checksum({**dict(encoder.named_parameters()), **dict(encoder.named_buffers())})
    return checksums or None


def _checksum(weights: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().float().cpu().contiguous()  # as the model holds it
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def first_stage_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a first stage, from its own checkpoint or from that of a latent diffusion with it."""
    weights = load_state_dict(path)
    inside = {k.removeprefix(PREFIX): v for k, v in weights.items() if k.startswith(PREFIX)}
    return inside or weights


class CachedLatents(Dataset):
    """Items {KEY_latent: float32 [c, h, w], KEY_latent_std: the same where there is one, "file_path_": str}.

    With representations also {NAME: float32 [d]}; with captioned `images` also a caption, drawn as they draw it.
    UserError for a cache that is unfinished, or made of other images, of another size, with another first stage or
    with other encoders of representations than said here.
    """

    def __init__(
        self,
        root: str | Path,
        images: Images
        | Mapping
        | None = None,  # what was cached, to be compared; cache_latents.py reads it; captions are its
        first_stage: str | Path | None = None,  # its checkpoint, to be compared
        keys: Sequence[str] | None = None,  # of those cached; all by default
        random_flip: bool = False,  # left-right, half of the time; needs stored flips
        extractors: Mapping[str, nn.Module | Mapping] | None = None,  # of representations, to be compared
    ):
        super().__init__()
        self.root = Path(root)
        self.index = index = CacheIndex.read(root)
        self.keys = tuple(keys or index.keys)
        self.random_flip = random_flip
        if index.scale_factor is None:
            raise UserError(
                f"the cache {root} is not finished: run scripts/cache_latents.py again, it continues"
            )
        if unknown := sorted(set(self.keys) - set(index.keys)):
            raise UserValueError(f"the cache {root} has no {unknown[0]!r}, only {', '.join(index.keys)}")
        if random_flip and not index.flips:
            raise UserValueError(
                f"the cache {root} has no flipped images: cache them with --flips, or set random_flip off"
            )
        if (
            first_stage is not None
            and encoder_checksum(first_stage_weights(first_stage)) != index.first_stage
        ):
            raise UserError(
                f"the cache {root} was made with another first stage than {first_stage}: cache the latents again"
            )
        if images is not None:
            if isinstance(images, Mapping):
                images = instantiate_from_config(images, Images, "images")
            noted = {} if index.sources is None else self._noted(images)
            self._compare(size=images.size, items=tuple(images.paths), keys=images.keys, **noted)
            if not noted:
                _logger.warning(
                    "the cache %s was made by an earlier version, which did not note what its images hold: whether "
                    "they have changed is not known", root
                )  # fmt: skip
        if extractors is not None:
            self._compare(representations=extractor_checksums(extractors))
        self.captioned = images if isinstance(images, CaptionFolder) else None
        self._open: dict[int, safe_open] = {}

    def __len__(self) -> int:
        return len(self.index.items)

    @property
    def scale_factor(self) -> dict[str, float]:
        """1 / the standard deviation of the latents, by key."""
        return self.index.scale_factor

    def check_model(self, model: nn.Module) -> None:
        """UserError where the cache was made with another first stage, or other extractors, than `model` has."""
        first_stage = getattr(model, "first_stage_model", None)
        if first_stage is not None:
            self._compare(first_stage=encoder_checksum(first_stage.state_dict()))
        own = extractor_checksums(dict(getattr(model, "extractors", {}).items())) or {}
        self._compare(representations={**(self.index.representations or {}), **own} or None)

    def __getitem__(self, index: int) -> Item:
        number = range(len(self))[index]
        flipped = "_flipped" if self.random_flip and random.random() < 0.5 else ""
        shard, row = divmod(number, self.index.shard_size)
        item: Item = {}
        for key in self.keys:
            item[f"{key}_latent"] = self._read(shard, f"{key}{flipped}", row)
            if f"{key}_std" in self._shard(shard).keys():
                item[f"{key}_latent_std"] = self._read(shard, f"{key}{flipped}_std", row)
        for name in self.index.representations or ():
            item[name] = self._read(shard, f"{name}{flipped}", row)
        if self.captioned:
            item[self.captioned.caption_key] = self.captioned.draw_caption(number)
        return {**item, "file_path_": self.index.items[number]}

    def __getstate__(self):
        return {**self.__dict__, "_open": {}}  # open files do not travel to data workers

    def _read(self, shard: int, name: str, row: int) -> torch.Tensor:
        return self._shard(shard).get_slice(name)[row].float()

    def _shard(self, number: int):
        if number not in self._open:
            self._open[number] = open_shard(shard_path(self.root, number))
        return self._open[number]

    def _noted(self, images: Images) -> dict:
        """`identity`, without what a former version did not note. UserError where it read an image as it is stored."""
        said, then = identity(images), self.index.options or {}
        if "orientation" not in then:
            turned = (s.path for entry in images.entries for s in entry.values() if is_turned(s.path))
            if path := next(turned, None):
                raise UserError(
                    f"the cache {self.root} was made by a former version, which may have read {path} as it is stored, not "
                    "upright: cache the latents again"
                )
        kept = {k: v for k, v in said["options"].items() if k in then or k not in ("orientation", "captions")}
        return {**said, "options": kept}

    def _compare(self, **said) -> None:
        if difference := self.index.difference(dataclasses.replace(self.index, **said)):
            raise UserError(f"the cache {self.root} was made with {difference}: cache the latents again")


def check_caches(model: nn.Module, dataset: object) -> None:
    """`CachedLatents.check_model` for the caches that a dataset is, holds or wraps."""
    if isinstance(dataset, CachedLatents):
        dataset.check_model(model)
    inner = [getattr(dataset, name, None) for name in ("data", "dataset")]
    for part in (*inner, *getattr(dataset, "datasets", ())):
        if part is not None:
            check_caches(model, part)


def open_shard(path: Path):
    """An open shard. UserError where it is missing or damaged."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserFileError(f"{path} is missing: run scripts/cache_latents.py again") from None
    except SafetensorError as error:
        raise UserError(
            f"{path} is damaged ({error}): delete it and run scripts/cache_latents.py again"
        ) from error


def _words(value) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) and isinstance(value[0], int) else str(value)


def open_images(config: dict, split: str) -> Images:
    """The dataset to be cached, without random crops and flips."""
    try:
        data = config["data"]["params"][split]
        data = data["params"]["images"] if data["target"] == CACHED else data
    except (KeyError, TypeError):
        raise UserValueError(
            f"the configuration has no data.params.{split} with images (or CachedLatents with `images`)"
        ) from None
    images = instantiate_from_config(data, Images, f"{split}, of which latents are cached")
    images.random_crop = images.random_flip = False
    return images
