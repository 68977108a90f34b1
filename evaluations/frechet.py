"""Frechet distances between Gaussians fitted to features (FID: Heusel et al. 2017; sFID: Nash et al. 2021).

    |mu_1 - mu_2|^2 + Tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))

The square root of the product of two covariances need not be computed, and cannot come out complex: with factors
S_i = R_i^T R_i its trace is the sum of the singular values of R_1 R_2^T. Everything is float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from guided_diffusion.errors import UserValueError

BLOCK = 4096  # rows that are converted to float64 at a time


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] (denominator n - 1) of features, float64."""

    mu: np.ndarray
    sigma: np.ndarray

    def __post_init__(self) -> None:
        d = self.mu.shape[0] if self.mu.ndim == 1 else -1
        if self.sigma.shape != (d, d):
            raise UserValueError(
                f"statistics do not fit together: the mean is {self.mu.shape}, the covariance {self.sigma.shape}"
            )
        if not (np.isfinite(self.mu).all() and np.isfinite(self.sigma).all()):
            raise UserValueError("statistics hold NaN or infinite values")


class RunningStatistics:
    """Mean and covariance of features that arrive in pieces, in memory that does not grow with their number."""

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros(1, dtype=torch.float64)  # [D]
        self._scatter = torch.zeros(1, 1, dtype=torch.float64)  # [D, D] sum of (x - mean)(x - mean)^T

    def add(self, features: Tensor) -> None:
        """Count further features [B, D]."""
        for block in features.split(BLOCK):
            x = block.to("cpu", torch.float64)
            mean = x.mean(0)
            x = x - mean
            self._combine(len(x), mean, x.T @ x)

    def merge(self, other: "RunningStatistics") -> None:
        """Count the features that `other` has counted."""
        if other.count:
            self._combine(other.count, other._mean, other._scatter)

    def _combine(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        # Chan et al. 1979: the scatter of two groups is that of each plus that of their means. No digits cancel.
        total = self.count + count
        difference = mean - self._mean
        between = torch.outer(difference, difference) * (self.count * count / total)
        self._scatter = self._scatter + scatter + between
        self._mean = self._mean + difference * (count / total)
        self.count = total

    def result(self) -> Statistics:
        """Raises UserError for fewer than two features, which have no covariance."""
        if self.count < 2:
            raise UserValueError(f"a covariance needs at least 2 images, there are {self.count}")
        return Statistics(self._mean.numpy(), (self._scatter / (self.count - 1)).numpy())


def statistics(features: Tensor | np.ndarray) -> Statistics:
    """Mean and covariance of features [N, D]."""
    running = RunningStatistics()
    running.add(torch.as_tensor(features))
    return running.result()


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and a factor R [r, D] of the covariance R^T R, float64."""

    mu: Tensor
    factor: Tensor


Source = (
    Tensor | Statistics | Gaussian
)  # features [N, D], or what was computed of images that are not at hand


def fit(source: Source) -> Gaussian:
    """The Gaussian with the mean and covariance of `source`."""
    if isinstance(source, Gaussian):
        return source
    if isinstance(source, Tensor):
        n, d = source.shape
        if 2 <= n <= d:  # the centred features are a factor themselves: no decomposition needed
            x = source.double()
            mu = x.mean(0)
            return Gaussian(mu, (x - mu) / (n - 1) ** 0.5)
        source = statistics(source)
    values, vectors = torch.linalg.eigh(torch.from_numpy(np.asarray(source.sigma, np.float64)))
    # Rounding leaves the zeros of a singular covariance slightly positive or negative.
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    factor = values[kept].sqrt()[:, None] * vectors[:, kept].T
    return Gaussian(torch.from_numpy(np.asarray(source.mu, np.float64)), factor)


def frechet_distance(first: Source, second: Source) -> float:
    """Squared Frechet distance of two Gaussians; real and not negative, also for singular covariances."""
    a, b = fit(first), fit(second)
    if a.mu.shape != b.mu.shape:
        raise UserValueError(f"features differ in number: {len(a.mu)} against {len(b.mu)}")
    cross = torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    spread = a.factor.square().sum() + b.factor.square().sum()
    return max(0.0, float((a.mu - b.mu).square().sum() + spread - 2 * cross))


def frechet_bias(first: Source, second: Source, distance: float, seed: int = 0) -> float:
    """About how much `distance` is too large because the sets are finite.

    The bias falls as 1/n once n exceeds the number of features (Chong and Forsyth 2020), so halving the sets adds about
    as much as the sets themselves already have too much; with fewer images than features it is a lower bound.
    What is no features is taken as it is.
    """
    random = torch.Generator().manual_seed(seed)
    halves = zip(_halves(first, random), _halves(second, random), strict=True)
    return float(np.mean([frechet_distance(a, b) for a, b in halves])) - distance


def _halves(source: Source, random: torch.Generator) -> list[Gaussian]:
    if not isinstance(source, Tensor):
        return [fit(source)] * 2
    order = torch.randperm(len(source), generator=random)
    return [fit(source[part]) for part in order.tensor_split(2)]


def frechet_interval(
    first: Source, second: Source, distance: float, repetitions: int, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Bootstrap interval of `distance` at these numbers of images.

    Features are drawn anew with replacement, anything else stays. Repeated images raise every redrawn distance alike, so
    the quantiles are taken around their mean: the interval says how far another set of the same size may fall, not how
    large the distance would be with more images (that is `frechet_bias`).
    """
    random = torch.Generator().manual_seed(seed)
    redraws = (_redraws(source, repetitions, random) for source in (first, second))
    draws = [frechet_distance(a, b) for a, b in zip(*redraws, strict=True)]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]) - np.mean(draws) + distance
    return max(0.0, float(low)), float(high)


def _redraws(source: Source, repetitions: int, random: torch.Generator) -> Iterator[Gaussian]:
    fixed = None if isinstance(source, Tensor) else fit(source)
    for _ in range(repetitions):
        yield fixed or fit(source[torch.randint(len(source), (len(source),), generator=random)])
