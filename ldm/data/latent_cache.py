"""Fill a cache of latents (its files: ldm/data/latents.py): one pass over the images, resumable by shards."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Subset

from guided_diffusion.errors import UserError, UserFileError, UserValueError
from ldm.data.base import Images
from ldm.data.latents import (
    FORMAT,
    CacheIndex,
    encoder_checksum,
    extractor_checksums,
    identity,
    open_shard,
    shard_path,
)
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def fill_cache(
    images: Images,
    first_stage: nn.Module,  # in evaluation mode, on the device to be used
    root: str | Path,
    flips: bool = False,
    dtype: str = "float32",
    shard_size: int = 1024,
    batch_size: int = 8,
    num_workers: int = 0,
    progress=iter,  # wraps the numbers of the shards that are missing
    extractors: Mapping[str, nn.Module] | None = None,  # of representations, by name; as first_stage
) -> CacheIndex:
    """Encode what is not there yet. Stopped and started again, the files are those of an uninterrupted pass.

    UserError where the folder holds latents of something else, or is filled by files that are no cache.
    """
    if images.random_crop or images.random_flip:
        raise UserValueError(
            "what is cached must not be cropped or flipped at random (flips are stored beside)"
        )
    if min(shard_size, batch_size) < 1 or dtype not in DTYPES:
        raise UserValueError(
            f"shards and batches need at least one image, and dtype is one of {', '.join(DTYPES)}"
        )
    extractors = extractors or {}
    if taken := sorted(set(extractors) & set(images.keys)):
        raise UserValueError(f"{taken[0]!r} is an image of the data: its representation needs another name")
    root = Path(root)
    index = CacheIndex(
        format=FORMAT,
        first_stage=encoder_checksum(first_stage.state_dict()),
        size=images.size,
        keys=images.keys,
        flips=flips,
        dtype=dtype,
        shard_size=shard_size,
        batch_size=batch_size,
        items=tuple(images.paths),
        representations=extractor_checksums(extractors),
        **identity(images),
    )
    _claim(root, index)
    for number in progress([n for n in range(index.shards) if not shard_path(root, n).exists()]):
        rows = range(number * shard_size, min((number + 1) * shard_size, len(images)))
        loader = DataLoader(Subset(images, rows), batch_size, num_workers=num_workers)
        tensors = _encoded(loader, first_stage, extractors, index)
        partial = root / f".{shard_path(root, number).name}.partial"
        save_file(tensors, partial)
        os.replace(partial, shard_path(root, number))
    finished = dataclasses.replace(index, scale_factor=measure_scale(root, index))
    _write(root, finished)
    return finished


def _claim(root: Path, index: CacheIndex) -> None:
    """Write the index of a new cache, or compare that of one that is there."""
    try:
        there = CacheIndex.read(root)
    except UserFileError:
        if root.is_dir() and any(root.glob("shard-*")):
            raise UserError(f"{root} has shards but no index.json: name another folder") from None
        root.mkdir(parents=True, exist_ok=True)
        _write(root, index)
        return
    if difference := there.difference(index):
        raise UserError(f"{root} was made with {difference}: delete it, or name another folder")


def _write(root: Path, index: CacheIndex) -> None:
    partial = root / ".index.json.partial"
    partial.write_text(index.to_json())
    os.replace(partial, root / "index.json")


@torch.no_grad()
def _encoded(
    loader: Iterable, first_stage: nn.Module, extractors: Mapping[str, nn.Module], index: CacheIndex
) -> dict[str, torch.Tensor]:
    """The tensors of one shard by name: latents [n, c, h, w] and representations [n, d]."""
    parts: dict[str, list[torch.Tensor]] = {}
    for batch in loader:
        for key in index.keys:
            for suffix, x in _turned(batch[key], first_stage, index.flips):
                mean, std = moments(first_stage, x)
                parts.setdefault(key + suffix, []).append(mean)
                if std is not None:
                    parts.setdefault(f"{key}{suffix}_std", []).append(std)
        for name, extractor in extractors.items():
            for suffix, x in _turned(batch[index.keys[0]], extractor, index.flips):
                parts.setdefault(name + suffix, []).append(extractor(x))
    tensors = {name: torch.cat(some).to(DTYPES[index.dtype]).cpu() for name, some in parts.items()}
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise UserError(f"{name} has values that are not finite: the encoder that made it is not sound")
    return tensors


def _turned(images: torch.Tensor, encoder: nn.Module, flips: bool) -> list[tuple[str, torch.Tensor]]:
    """Images [B, H, W, C] as [B, C, H, W] where `encoder` is, and with `flips` flipped; each with the ending of its
    tensors' names."""
    x = images.permute(0, 3, 1, 2).to(next(encoder.parameters(), images).device)
    both = [("", x), ("_flipped", x.flip(-1))]
    return [(suffix, value.contiguous()) for suffix, value in both[: 1 + flips]]


def moments(first_stage: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Latents of images [B, C, H, W]: mean and standard deviation [B, c, h, w] of a Gaussian posterior, or the
    latents themselves and None."""
    posterior = first_stage.encode(x)
    if isinstance(posterior, DiagonalGaussianDistribution):
        return posterior.mean, posterior.std
    if isinstance(posterior, torch.Tensor):
        return posterior, None
    raise UserValueError(
        f"the first stage encodes to a {type(posterior).__name__}, which cannot be cached: for a VQModel take "
        "VQModelInterface"
    )


def measure_scale(root: Path, index: CacheIndex) -> dict[str, float]:
    """1 / the standard deviation of all latents of a key, as drawn from their posteriors."""
    scales = {}
    for key in index.keys:
        count = total = squares = spread = 0.0
        for mean, std in _rows(root, index, key):
            count += mean.size
            total += mean.sum()
            squares += (mean**2).sum()
            spread += (std**2).sum()
        variance = (squares + spread) / count - (total / count) ** 2
        if not variance > 0:
            raise UserError(f"the latents of {key} are all the same: the first stage is not sound")
        scales[key] = float(variance**-0.5)
    return scales


def _rows(root: Path, index: CacheIndex, key: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for number in range(index.shards):
        shard = open_shard(shard_path(root, number))
        mean = shard.get_tensor(key).double().numpy()
        name = f"{key}_std"
        std = shard.get_tensor(name).double().numpy() if name in shard.keys() else np.zeros(1)
        yield mean, std
