"""Equations 3 to 5 and Theorem 2: what the modalities add to the forward process."""

import logging

import numpy as np
import pytest
import torch as th

from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import get_named_beta_schedule
from guided_diffusion.mt.aggregation import SCHEDULES, Aggregation
from guided_diffusion.respace import space_timesteps
from tests.compare import agree
from tests.oracle import process

BETAS = ("linear", "cosine")
every = pytest.mark.parametrize("schedule", SCHEDULES)
both = pytest.mark.parametrize("betas", BETAS)


def table(schedule, betas, steps=1000, peaks=None):
    """(Aggregation, alphas, abar) of a full process."""
    betas = get_named_beta_schedule(betas, steps)
    return Aggregation.named(schedule, betas, peaks or {"e": 0.5}), 1 - betas, np.cumprod(1 - betas)


@both
@every
def test_theorem_2_in_closed_form(schedule, betas):
    """atil_t = sum over j <= t of w_j sqrt(abar_t / abar_{j-1})."""
    joint, _, abar = table(schedule, betas)
    before = np.append(1.0, abar[:-1])
    closed = np.sqrt(abar) * np.cumsum(joint.weights[0] / np.sqrt(before))
    np.testing.assert_allclose(joint.coefficients[0], closed, rtol=1e-10)


@both
@every
def test_theorem_2_by_monte_carlo(schedule, betas):
    """Equation 3 step by step ends in the mean and variance of equation 4 at every t."""
    steps, count, z0, encodings = 40, 20000, 0.3, np.array([0.7, -0.4])
    joint, alphas, abar = table(schedule, betas, steps, {"a": 0.5, "b": 0.25})
    random = np.random.default_rng(0)
    z = np.full(count, z0)
    for t in range(steps):
        # Equation 3
        z = np.sqrt(alphas[t]) * (z + joint.weights[:, t] @ encodings)
        z = z + np.sqrt(1 - alphas[t]) * random.standard_normal(count)
        # Equation 4
        mean = np.sqrt(abar[t]) * z0 + joint.coefficients[:, t] @ encodings
        assert z.mean() == pytest.approx(mean, abs=5 * np.sqrt((1 - abar[t]) / count) + 1e-9 * abs(mean))
        assert z.var() == pytest.approx(1 - abar[t], rel=0.06)


@every
def test_weights_and_coefficients_are_inverse(schedule):
    joint, alphas, _ = table(schedule, "cosine")
    back = Aggregation.from_coefficients(joint.names, joint.coefficients, alphas)
    np.testing.assert_allclose(back.weights, joint.weights, atol=1e-9 * joint.coefficients.max())


@both
def test_bump(betas):
    """Its peak is kappa, both ends are free of the modality, and the transitions only ever add."""
    peaks = {"a": 0.5, "b": 0.25}
    joint, _, abar = table("bump", betas, peaks=peaks)
    np.testing.assert_allclose(joint.coefficients.max(axis=1), [0.5, 0.25], rtol=1e-4)
    assert joint.coefficients[:, 0].max() < 1e-3
    assert joint.coefficients[:, -1].max() < 0.01
    before = np.append(1.0, abar[:-1])
    # The closed form of the weights.
    weights = 1.5 * np.sqrt(3) * np.sqrt(before) * (before - abar)
    np.testing.assert_allclose(joint.weights, np.outer([0.5, 0.25], weights), atol=1e-13)
    assert (weights >= 0).all()
    assert joint.weights.min() > -1e-13


@pytest.mark.parametrize("steps", [10, "ddim25", "5,10,35"])
@both
def test_bump_respaced(betas, steps):
    """The same closed form holds on fewer steps, so that the weights stay at least 0."""
    joint, _, abar = table("bump", betas)
    kept = sorted(space_timesteps(1000, str(steps)))
    abar = abar[kept]
    before = np.append(1.0, abar[:-1])
    fewer = joint.respaced(kept, abar / before)
    np.testing.assert_allclose(
        fewer.weights[0], 0.75 * np.sqrt(3) * np.sqrt(before) * (before - abar), atol=1e-12
    )
    assert fewer.weights.min() > -1e-12


@both
@pytest.mark.parametrize("schedule", ["constant", "paper-normalized"])
def test_scaled_schedules(schedule, betas):
    """Constant weights, and the paper's times a constant, scaled so that the peak is kappa."""
    joint, _, _ = table(schedule, betas, peaks={"a": 0.5, "b": 0.1})
    np.testing.assert_allclose(joint.coefficients.max(axis=1), [0.5, 0.1], rtol=1e-12)
    t = np.arange(1000)
    shape = np.ones(1000) if schedule == "constant" else t / (1000 - t)
    np.testing.assert_allclose(joint.weights[0], joint.weights[0, 500] * shape / shape[500], rtol=1e-12)


def test_literal_weights(caplog):
    """The numbers that the literal weights reach, whatever the peaks, and the warning about them."""
    with caplog.at_level(logging.WARNING):
        linear, _, _ = table("paper", "linear", peaks={"e": 0.5, "f": 0.1})
    assert "atil = 4547" in caplog.text and "float32" in caplog.text
    cosine, _, _ = table("paper", "cosine")
    np.testing.assert_allclose(linear.weights[1], np.arange(1000) / (1000 - np.arange(1000)))
    for row in linear.coefficients:
        assert [round(row[t]) for t in (500, 999)] == [116, 4547]
    assert round(cosine.coefficients[0, 500]) == 165
    assert round(cosine.coefficients.max()) == 898


def test_only_literal_weights_warn(caplog):
    for schedule in set(SCHEDULES) - {"paper"}:
        table(schedule, "linear")
    assert not caplog.records


@every
def test_respaced_marginals_are_exact(schedule):
    """Respacing picks the marginals; the recursion of its weights leads to the same ones."""
    joint, _, abar = table(schedule, "linear")
    kept = [0, 1, 7, 250, 600, 998, 999]
    ratio = abar[kept] / np.append(1.0, abar[kept][:-1])
    fewer = joint.respaced(kept, ratio)
    np.testing.assert_array_equal(fewer.coefficients, joint.coefficients[:, kept])
    again = Aggregation.from_weights(joint.names, fewer.weights, ratio)
    np.testing.assert_allclose(again.coefficients, fewer.coefficients, rtol=1e-9, atol=1e-12)


@both
def test_rerunning_the_recursion_would_lose_the_shift(betas):
    """The original weights on respaced alphas give a peak several times too small: why respacing does not do that."""
    joint, _, abar = table("bump", betas)
    kept = sorted(space_timesteps(1000, [50]))
    rerun = Aggregation.from_weights(
        joint.names, joint.weights[:, kept], abar[kept] / np.append(1.0, abar[kept][:-1])
    )
    assert rerun.coefficients.max() < 0.5 / 3


@every
def test_spaced_diffusion_keeps_the_marginals(schedule):
    full, fewer = (process("cosine", steps, aggregation=schedule, peaks={"e": 0.5}) for steps in (1000, 20))
    np.testing.assert_array_equal(
        fewer.aggregation.coefficients, full.aggregation.coefficients[:, fewer.timestep_map]
    )
    x, noise, e = th.randn(3, 4, 1, 2, 2)
    k = th.tensor([0, 5, 11, 19])
    original = th.tensor(fewer.timestep_map)[k]
    agree(fewer.q_sample(x, k, noise, {"e": e}), full.q_sample(x, original, noise, {"e": e}), rtol=1e-5)


# Equation 5


@both
@every
def test_equation_5_is_the_moving_frame(schedule, betas):
    """The posterior mean of equation 5 equals DDPM's in y_t = z_t - shift_t, plus shift_{t-1}; in float64."""
    random = np.random.default_rng(1)
    joint, alphas, abar = table(schedule, betas, peaks={"a": 0.5, "b": 0.5})
    before, atil = np.append(1.0, abar[:-1]), joint.coefficients
    x0, eps, e = random.standard_normal(1000), random.standard_normal(1000), random.standard_normal((2, 1))
    shift, shift_before = (atil * e).sum(0), (np.append(np.zeros((2, 1)), atil[:, :-1], axis=1) * e).sum(0)
    z = np.sqrt(abar) * x0 + shift + np.sqrt(1 - abar) * eps
    # Equation 5
    mean = (z - (1 - alphas) / np.sqrt(1 - abar) * eps) / np.sqrt(alphas) - (joint.weights * e).sum(0)
    y = z - shift
    ddpm = np.sqrt(before) * (1 - alphas) / (1 - abar) * x0 + np.sqrt(alphas) * (1 - before) / (1 - abar) * y
    scale = np.abs(z) + 1
    assert (np.abs(mean - ddpm - shift_before) / scale).max() < 1e-10
    # And the code, which computes in float32.
    diffusion = process(betas, aggregation=schedule, peaks={"a": 0.5, "b": 0.5})
    t = th.arange(1000)
    encodings = {
        name: th.full((1000, 1), float(value)) for name, value in zip("ab", e.flatten(), strict=True)
    }
    ours = diffusion.q_posterior_mean_variance(
        th.tensor(x0)[:, None].float(), th.tensor(z)[:, None].float(), t, encodings
    )
    assert (np.abs(ours[0][:, 0].numpy() - mean) / scale).max() < 2e-5


@pytest.mark.parametrize("schedule", ["bump", "constant"])
@pytest.mark.parametrize("t", [1, 6, 17])
def test_posterior_by_brute_force(schedule, t):
    """Bayes' rule on a grid, from equations 3 and 4 alone, in one dimension."""
    diffusion = process(total=40, steps=40, aggregation=schedule, peaks={"e": 0.5})
    joint, a, abar = diffusion.aggregation, 1 - diffusion.betas, diffusion.alphas_cumprod
    x0, e, z_t = 0.4, -0.8, 0.9
    grid = np.linspace(-8, 8, 160001)
    likelihood = -((z_t - np.sqrt(a[t]) * (grid + joint.weights[0, t] * e)) ** 2) / (2 * (1 - a[t]))
    prior = -((grid - np.sqrt(abar[t - 1]) * x0 - joint.coefficients[0, t - 1] * e) ** 2) / (
        2 * (1 - abar[t - 1])
    )
    p = np.exp(likelihood + prior - (likelihood + prior).max())
    p /= p.sum()
    mean = (p * grid).sum()
    ours, variance, log_variance = (
        float(v)
        for v in diffusion.q_posterior_mean_variance(
            th.tensor([[x0]]), th.tensor([[z_t]]), th.tensor([t]), {"e": th.tensor([[e]])}
        )
    )
    assert ours == pytest.approx(mean, abs=1e-5)
    assert variance == pytest.approx((p * (grid - mean) ** 2).sum(), rel=1e-3)
    assert log_variance == pytest.approx(np.log(variance), abs=1e-4)


# The table's own promises


def test_shift():
    """Every sample at its own time, -1 being the data; nothing at all without encodings."""
    joint, _, _ = table("bump", "linear", peaks={"a": 0.5, "b": 0.25})
    e = {"a": th.randn(3, 2, 4, 4), "b": th.randn(3, 2, 4, 4)}
    total = joint.shift(e, th.tensor([-1, 300, 999]))
    assert total[0].abs().max() == 0
    for row, t in ((1, 300), (2, 999)):
        expected = sum(float(joint.coefficients[i, t]) * e[name][row] for i, name in enumerate("ab"))
        th.testing.assert_close(total[row], expected)
    assert joint.shift({}, th.tensor([5])) is None
    with pytest.raises(KeyError, match="no modality 'c' in the aggregation of a, b"):
        joint.shift({"c": e["a"]}, th.tensor([1, 2, 3]))


def test_frame_goes_and_comes_back():
    diffusion = process(peaks={"e": 0.5})
    z, e, t = th.randn(4, 1, 3, 3), {"e": th.randn(4, 1, 3, 3)}, th.tensor([-1, 0, 500, 999])
    y = diffusion.aggregation.to_frame(z, t, e)
    assert not th.allclose(y[2], z[2], atol=0.1) and th.equal(y[0], z[0])
    th.testing.assert_close(diffusion.aggregation.from_frame(y, t, e), z)


def test_refusals():
    betas = get_named_beta_schedule("linear", 1000)
    with pytest.raises(
        UserError, match="unknown aggregation schedule 'hump': choose one of bump, late, paper"
    ):
        Aggregation.named("hump", betas, {"e": 0.5})
    for peak in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="peaks must be numbers of at least 0"):
            Aggregation.named("bump", betas, {"e": peak})
    with pytest.raises(ValueError, match=r"table of 1 modalities x 5 steps, got \(1, 4\)"):
        Aggregation.from_weights(["e"], np.zeros((1, 4)), np.ones(5))


def test_design_rule():
    """An error of a prediction moves the noise by at most 0.65 of itself with the default, and by far more with literal weights."""
    for betas in BETAS:
        joint, _, abar = table("bump", betas)
        assert (joint.coefficients / np.sqrt(1 - abar)).max() == pytest.approx(0.65, abs=0.01)
        assert "e: max atil 0.5 at t = " in joint.report(abar) and "(ok)" in joint.report(abar)
        assert "TOO LARGE" in table("paper", betas)[0].report(abar)
