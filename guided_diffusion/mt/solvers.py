"""Few steps: which timesteps to take, and the exponential integrator behind the multistep samplers.

In lambda = log(abar / (1 - abar)) / 2, and with c_i = atil_i / sqrt(abar), the probability flow of equation 4 is
d(z / sigma) = exp(lambda) x dlambda + sum_i d(exp(lambda) c_i) e_i, sigma = sqrt(1 - abar). A multistep method puts
polynomials through the latest x and e_i and integrates them exactly.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch as th

from ..errors import UserValueError

FIRST_SIGNAL = 1e-3  # abar where sampling in few steps begins: below it a network's image is mostly its error
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_POINTS, _WEIGHTS = (_POINTS + 1) / 2, _WEIGHTS / 2  # on [0, 1]


def half_log_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """lambda of abar: float64 [T]."""
    return (np.log(alphas_cumprod) - np.log1p(-alphas_cumprod)) / 2


def few_timesteps(alphas_cumprod: np.ndarray, count: int) -> list[int]:
    """`count` timesteps, ascending, from timestep 0 to the last with abar of FIRST_SIGNAL, even in the mean of timestep
    and lambda, each as a share of its range: evenness in lambda alone spends half of the steps on noise that nobody
    sees, in timesteps it leaps over the last of it.

    Where places round to the same timestep, its neighbours are taken; a count beyond those timesteps takes
    noisier ones too, all T in the end. UserValueError outside 1..T.
    """
    total = len(alphas_cumprod)
    if not 1 <= count <= total:
        raise UserValueError(f"{count} steps: choose between 1 and the {total} of the process")
    last = max(int((alphas_cumprod >= min(FIRST_SIGNAL, alphas_cumprod[0])).nonzero()[0][-1]), count - 1)
    if count == 1:
        return [last]
    lambdas, times = half_log_snr(alphas_cumprod), np.arange(last + 1)
    way = times / last + (lambdas[0] - lambdas[: last + 1]) / (lambdas[0] - lambdas[last])
    kept = np.interp(np.linspace(0, 2, count), way, times).round().astype(int)
    order = np.arange(count)
    kept = np.maximum.accumulate(kept - order) + order  # each later than the one before
    return np.minimum(kept, last - order[::-1]).tolist()


class State(NamedTuple):
    """What the model said at an index of the process."""

    index: int
    x_start: th.Tensor
    encodings: Mapping[str, th.Tensor] | None


def usable(lambdas: np.ndarray, i: int, history: Sequence[State], order: int) -> list[State]:
    """The latest states, newest first, that a step from index i to i - 1 may extrapolate: at most `order`, and none
    beyond a gap of less than half the step. Where that is the first gap, the change over it is taken as one over the
    whole step: even timesteps grow in lambda towards the image."""
    kept, step = [history[0]], lambdas[i - 1] - lambdas[i]
    for state in history[1:order]:
        share = (lambdas[kept[-1].index] - lambdas[state.index]) / step
        if share < 1 / 2:
            return [kept[0], _between(*kept, state, share)] if len(kept) == 1 else kept
        kept.append(state)
    return kept


def _between(a, b, share):
    codes = {name: th.lerp(e, b.encodings[name], share) for name, e in (a.encodings or {}).items()}
    return State(b.index, th.lerp(a.x_start, b.x_start, share), codes)


def multistep(diffusion, z: th.Tensor, i: int, states: Sequence[State]) -> th.Tensor:
    """z_{i-1} of z_i [B, C, ...]: the flow of the polynomials through `states`, of order len(states).

    With a state at i - 1 among them it is the implicit method, a corrector.
    """
    abar = diffusion.alphas_cumprod
    lambdas, target = half_log_snr(abar), i - 1
    h = lambdas[target] - lambdas[i]
    places = (lambdas[[s.index for s in states]] - lambdas[i]) / h
    basis = _through(places, np.eye(len(states)))  # Lagrange's polynomials
    growth = _WEIGHTS * abar[target] ** 0.5 * np.exp(h * (_POINTS - 1))
    images = (growth * h) @ basis(_POINTS)
    ratio = ((1 - abar[target]) / (1 - abar[i])) ** 0.5
    out = ratio * z + sum(w * s.x_start for w, s in zip(images, states, strict=True))
    for name in states[0].encodings or {}:
        table = diffusion.aggregation.coefficients[diffusion.aggregation.names.index(name)]
        at = sorted({target, i, *(s.index for s in states)})
        amount = _through((lambdas[at] - lambdas[i]) / h, table[at] / abar[at] ** 0.5)
        rate = growth * (h * amount(_POINTS) + amount(_POINTS, 1))
        codes = rate @ basis(_POINTS)
        out = out + sum(w * s.encodings[name] for w, s in zip(codes, states, strict=True))
    return out


def _through(places, values):
    """The polynomial through values [n, ...] at `places` [n]: (points, order of the derivative) -> [P, ...]."""
    coefficients = np.linalg.solve(np.vander(places, increasing=True), values)

    def at(points, derivative=0):
        powers = np.polynomial.polynomial.polyder(coefficients, derivative)
        return np.vander(points, len(powers), increasing=True) @ powers

    return at
