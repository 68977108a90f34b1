"""How the modalities enter the diffusion latent (paper section 2.2.2, equations 3 to 5, Theorem 2).

z_t = sqrt(abar_t) z_0 + sum_i atil_t^i e_i + sqrt(1 - abar_t) eps, where e_i is the encoding of modality i.
The sum is the *shift*: y_t = z_t - shift_t is a plain DDPM (the moving frame), so the tables here and the way
into that frame and back are all that the process gains.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch as th

from ..errors import UserValueError

logger = logging.getLogger(__name__)

# Power of (1 - abar_t) in atil_t.
_POWERS = {"bump": 1, "late": 6}
SCHEDULES = (*_POWERS, "paper-normalized", "constant", "paper")


class JointOutput(NamedTuple):
    """What a model of several modalities says of (z_t, t)."""

    output: th.Tensor  # the network's own output [B, C or 2C, ...], conditioned on what is given
    encodings: Mapping[str, th.Tensor] | None = None  # e_i, known or estimated [B, C, ...]
    predictions: Mapping[str, th.Tensor] | None = None  # what the heads returned
    values: Mapping[str, th.Tensor] | None = None  # the modalities themselves, given or expected
    score: th.Tensor | None = None  # gradient of log p(given | z_t) in z_t; `output` has it already


@dataclass(frozen=True)
class Aggregation:
    """The tables of equation 4, one row per modality.

    names: N modality names; coefficients: atil, float64 [N, T]; weights: w of equation 3, float64 [N, T].
    """

    names: tuple[str, ...]
    coefficients: np.ndarray
    weights: np.ndarray

    @classmethod
    def from_weights(cls, names: Sequence[str], weights: np.ndarray, alphas: np.ndarray) -> "Aggregation":
        """The marginal of the transitions: Theorem 2, atil_t = sqrt(a_t) (w_t + atil_{t-1}), starting from 0.

        weights [N, T]; alphas [T] = 1 - betas. ValueError if the shapes do not fit.
        """
        weights = _table(names, weights, len(alphas))
        coefficients = np.empty_like(weights)
        previous = np.zeros(len(weights))
        for t, alpha in enumerate(alphas):
            previous = np.sqrt(alpha) * (weights[:, t] + previous)
            coefficients[:, t] = previous
        return cls(tuple(names), coefficients, weights)

    @classmethod
    def from_coefficients(
        cls, names: Sequence[str], coefficients: np.ndarray, alphas: np.ndarray
    ) -> "Aggregation":
        """The transitions of given marginals: Theorem 2 solved for w_t = atil_t / sqrt(a_t) - atil_{t-1}."""
        coefficients = _table(names, coefficients, len(alphas))
        before = np.concatenate([np.zeros((len(coefficients), 1)), coefficients[:, :-1]], axis=1)
        return cls(tuple(names), coefficients, coefficients / np.sqrt(alphas) - before)

    @classmethod
    def named(cls, schedule: str, betas: np.ndarray, peaks: Mapping[str, float]) -> "Aggregation":
        """A schedule of `SCHEDULES` for the process `betas` [T]; peaks: the largest atil wanted of each modality.

        bump: atil_t proportional to sqrt(abar_t) (1 - abar_t), zero at both ends: z_T is N(0, I), the data are
        untouched. late: to sqrt(abar_t) (1 - abar_t)^6, nothing at small t. paper-normalized: the paper's
        w_t = t / (T - t) times one constant; constant: w_t = const, scaled likewise. paper: the literal weights,
        whatever the peaks; logs a warning with the sizes they reach. ValueError for another name.
        """
        names = tuple(peaks)
        kappa = np.array([peaks[name] for name in names], dtype=np.float64).reshape(-1, 1)
        if not (np.isfinite(kappa) & (kappa >= 0)).all():
            raise UserValueError(f"aggregation peaks must be numbers of at least 0, got {dict(peaks)}")
        betas = np.asarray(betas, dtype=np.float64)
        alphas, steps = 1 - betas, np.arange(len(betas))
        if schedule in _POWERS:
            power, abar = _POWERS[schedule], np.cumprod(alphas)
            top = 1 / (2 * power + 1)  # abar at the maximum
            curve = np.sqrt(abar / top) * ((1 - abar) / (1 - top)) ** power
            return cls.from_coefficients(names, kappa * curve, alphas)
        if schedule not in SCHEDULES:
            raise UserValueError(
                f"unknown aggregation schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}"
            )
        weights = np.ones(len(betas)) if schedule == "constant" else steps / (len(betas) - steps)
        unit = cls.from_weights(("unit",), weights[None], alphas)
        if schedule != "paper":
            return cls.from_weights(names, kappa * unit.weights / unit.coefficients.max(), alphas)
        logger.warning(
            "the paper's literal weights make the shift reach atil = %.4g (atil_T = %.4g) while sqrt(abar) <= 1: "
            "the modality hides the noise that is to be predicted; use float32 and expect bad samples "
            "(aggregation 'bump' avoids this)",
            unit.coefficients.max(),
            unit.coefficients[0, -1],
        )
        return cls.from_weights(names, np.repeat(unit.weights, len(names), axis=0), alphas)

    def respaced(self, kept: Sequence[int], alphas: np.ndarray) -> "Aggregation":
        """The same marginals at the `kept` steps of a process whose respaced alphas are given.

        The recursion is not run again on them: that would make the shift several times too small.
        """
        return self.from_coefficients(self.names, self.coefficients[:, list(kept)], alphas)

    def shift(self, encodings: Mapping[str, th.Tensor], t: th.Tensor) -> th.Tensor | None:
        """sum_i atil_t^i e_i of the given encodings [B, C, ...] at t int64 [B]; None if there is none.

        t = -1 stands for the data, where every shift is 0. KeyError for an unknown modality.
        """
        total = None
        for name, encoding in encodings.items():
            if name not in self.names:
                known = ", ".join(self.names) or "nothing"
                raise KeyError(f"no modality {name!r} in the aggregation of {known}")
            row = np.append(self.coefficients[self.names.index(name)], 0.0)  # index -1 is the last
            factor = th.from_numpy(row).to(t.device)[t].to(encoding.dtype)
            term = factor.reshape(-1, *[1] * (encoding.dim() - 1)) * encoding
            total = term if total is None else total + term
        return total

    # The moving frame: what GaussianDiffusion calls.

    def to_frame(self, z_t: th.Tensor, t: th.Tensor, encodings: Mapping[str, th.Tensor] | None) -> th.Tensor:
        """y_t of the latent z_t [B, C, ...], given encodings (None or empty: z_t itself)."""
        return z_t - self.shift(encodings, t) if encodings else z_t

    def from_frame(
        self, y_t: th.Tensor, t: th.Tensor, encodings: Mapping[str, th.Tensor] | None
    ) -> th.Tensor:
        """z_t of y_t, the inverse of `to_frame`; t = -1 is the image itself."""
        return y_t + self.shift(encodings, t) if encodings else y_t

    def opened(self, output, z_t: th.Tensor, t: th.Tensor) -> tuple:
        """(network output, y_t, JointOutput) of what a model returned at z_t; a plain tensor has no
        JointOutput (None), and z_t is y_t."""
        if not isinstance(output, JointOutput):
            return output, z_t, None
        return output.output, self.to_frame(z_t, t, output.encodings), output

    # Sizes

    def detectability(self, alphas_cumprod: np.ndarray, size: int) -> np.ndarray:
        """How far a code of unit RMS over `size` numbers stands out of the noise: d_t = atil_t sqrt(size) /
        sqrt(1 - abar_t), [N, T]."""
        return self.coefficients * np.sqrt(size / (1 - alphas_cumprod))

    def report(self, alphas_cumprod: np.ndarray) -> str:
        """The design rule as text: an error of a prediction moves the noise by atil / sqrt(1 - abar) times
        itself."""
        lines = []
        for name, row in zip(self.names, self.coefficients, strict=True):
            leverage = row / np.sqrt(1 - alphas_cumprod)
            verdict = "ok" if leverage.max() <= 3 else "TOO LARGE: prediction errors drown the noise"
            lines.append(
                f"{name}: max atil {row.max():.3g} at t = {row.argmax()}, atil_T {row[-1]:.2g}, "
                f"max atil / sqrt(1 - abar) {leverage.max():.3g} ({verdict})"
            )
        return "\n".join(lines)


def detectable_peak(schedule: str, betas: np.ndarray, size: int, detectability: float) -> float:
    """The peak at which the largest d_t of a code over `size` numbers is `detectability`."""
    unit = Aggregation.named(schedule, betas, {"unit": 1.0})
    abar = np.cumprod(1 - np.asarray(betas, dtype=np.float64))
    return detectability / float(unit.detectability(abar, size).max())


def to_frame(diffusion, z_t: th.Tensor, t: th.Tensor, encodings) -> th.Tensor:
    """`Aggregation.to_frame` for a diffusion that may have none."""
    return diffusion.aggregation.to_frame(z_t, t, encodings) if encodings else z_t


def from_frame(diffusion, y_t: th.Tensor, t: th.Tensor, encodings) -> th.Tensor:
    """`Aggregation.from_frame` for a diffusion that may have none."""
    return diffusion.aggregation.from_frame(y_t, t, encodings) if encodings else y_t


def encodings_of(step: Mapping) -> Mapping[str, th.Tensor] | None:
    """The modalities' encodings in a step's dict (p_mean_variance, p_sample, ...), None where there are none."""
    return step["joint"].encodings if "joint" in step else None


def _table(names, values, steps):
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (len(names), steps):
        raise UserValueError(
            f"expected a table of {len(names)} modalities x {steps} steps, got {values.shape}"
        )
    return values
