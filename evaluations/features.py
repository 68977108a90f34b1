"""Inception features of a set of images, in one pass; reading overlaps with computing, ranks share the work."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluations import distributed
from evaluations.arguments import BATCH_SIZE
from evaluations.images import Images, prefetch
from evaluations.inception import Inception, InceptionOutput
from guided_diffusion import dist_util
from guided_diffusion.progress import tqdm


@dataclass(frozen=True)
class Features:
    """Features of N images, float32, on the CPU."""

    pool: Tensor  # [N, 2048]
    spatial: Tensor  # [N, 2023]

    def __len__(self) -> int:
        return len(self.pool)


def stream_features(
    images: Images, network: Inception, batch_size: int = BATCH_SIZE, progress: bool = True
) -> Iterator[InceptionOutput]:
    """Features of this rank's share of `images`, batch by batch, on the CPU. `progress`: a bar on standard error."""
    start, stop = distributed.share(images.shape[0])
    batches = prefetch(_tensors(images, start, stop, batch_size, network.device))
    with tqdm(total=stop - start, unit="image", disable=not progress or dist_util.get_rank() > 0) as bar:
        for batch in batches:
            output = network(batch)
            yield InceptionOutput(output.pool.cpu(), output.spatial.cpu())
            bar.update(len(batch))


def extract_features(
    images: Images, network: Inception, batch_size: int = BATCH_SIZE, progress: bool = True
) -> Features | None:
    """Features of all `images`, in their order; with several ranks on rank 0, and None on the others."""
    count = images.shape[0]
    parts = list(stream_features(images, network, batch_size, progress))
    gathered = []
    for column in ("pool", "spatial"):
        rows = [getattr(part, column) for part in parts]
        # More ranks than images: some have none.
        gathered.append(distributed.gather_rows(torch.cat(rows) if rows else torch.empty(0, 0), count))
    return None if gathered[0] is None else Features(*gathered)


def _tensors(
    images: Images, start: int, stop: int, batch_size: int, device: torch.device
) -> Iterator[Tensor]:
    for batch in images.batches(start, stop, batch_size):
        tensor = torch.from_numpy(np.require(batch, requirements="W"))  # a copy where the array is read-only
        yield tensor.pin_memory() if device.type == "cuda" else tensor
