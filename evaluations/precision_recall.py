"""Improved precision and recall (Kynkaanniemi et al. 2019) in bounded memory.

A set's manifold is the union of balls around its features, each reaching to that feature's k-th nearest neighbour in
the set. Precision: the share of samples inside the reference's manifold. Recall: the share of references inside the
samples'. Distances are computed in blocks, so memory does not grow with the product of the two numbers.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from guided_diffusion.errors import UserValueError

NEIGHBOURS = 3
BLOCK_ELEMENTS = 1 << 25  # distances held at once: 128 MiB in float32


@dataclass(frozen=True)
class PrecisionRecall:
    precision: float
    recall: float


def precision_recall(
    reference: Tensor,
    samples: Tensor,
    neighbours: int = NEIGHBOURS,
    device: str | torch.device | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> PrecisionRecall:
    """Precision and recall of `samples` [M, D] against `reference` [N, D], in the features' own precision.

    Raises UserError where a set is too small to have `neighbours` neighbours.
    """
    device = device or reference.device
    # Distances are unchanged by a common shift; around the mean, |x|^2 + |y|^2 - 2 x y cancels fewer digits.
    center = reference.mean(0, keepdim=True)
    reference, samples = _Points((reference - center).to(device)), _Points((samples - center).to(device))
    with _full_matmul_precision():
        reference_radii = _radii(reference, neighbours, block_elements)
        sample_radii = _radii(samples, neighbours, block_elements)
        reference_inside = torch.zeros(len(reference), dtype=torch.bool, device=device)
        sample_inside = torch.zeros(len(samples), dtype=torch.bool, device=device)
        for rows in _slices(len(samples), max(1, block_elements // len(reference))):
            distances = _squared_distances(samples, rows, reference, slice(None))
            sample_inside[rows] = (distances <= reference_radii).any(1)
            reference_inside |= (distances <= sample_radii[rows, None]).any(0)
    return PrecisionRecall(
        precision=sample_inside.double().mean().item(), recall=reference_inside.double().mean().item()
    )


class _Points:
    """Features [N, D] with their squared lengths."""

    def __init__(self, features: Tensor):
        self.features, self.squares = features, features.square().sum(1)

    def __len__(self) -> int:
        return len(self.features)


def _radii(points: _Points, neighbours: int, block_elements: int) -> Tensor:
    """Squared distance [N] of each feature to its k-th nearest neighbour, itself not counted."""
    n = len(points)
    if n <= neighbours:
        raise UserValueError(
            f"precision and recall need more than {neighbours} images on each side, there are {n}"
        )
    nearest = points.squares.new_full((n, neighbours), torch.inf)
    blocks = list(_slices(n, max(1, math.isqrt(block_elements))))
    for number, rows in enumerate(blocks):
        for columns in blocks[number:]:  # distances are symmetric: half of the blocks are enough
            distances = _squared_distances(points, rows, points, columns)
            if rows == columns:
                distances.fill_diagonal_(torch.inf)
            else:
                nearest[columns] = _nearest(nearest[columns], distances.T, neighbours)
            nearest[rows] = _nearest(nearest[rows], distances, neighbours)
    return nearest[:, -1]


def _nearest(known: Tensor, distances: Tensor, neighbours: int) -> Tensor:
    """The smallest distances [B, neighbours], ascending, of those `known` and of `distances` [B, any]."""
    found = distances.topk(min(neighbours, distances.shape[1]), largest=False).values
    return torch.cat([known, found], 1).topk(neighbours, largest=False).values


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _squared_distances(a: _Points, rows: slice, b: _Points, columns: slice) -> Tensor:
    """[rows, columns], never negative."""
    squares = a.squares[rows, None] + b.squares[columns]
    return squares.addmm_(a.features[rows], b.features[columns].T, alpha=-2).clamp_(min=0)


@contextlib.contextmanager
def _full_matmul_precision() -> Iterator[None]:
    """Keep NVIDIA's TF32 out of the distances."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
