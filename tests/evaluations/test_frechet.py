"""Frechet distances against closed forms, and what is said about their error."""

import numpy as np
import pytest
import torch

from evaluations.frechet import (
    RunningStatistics,
    Statistics,
    frechet_bias,
    frechet_distance,
    frechet_interval,
    statistics,
)
from guided_diffusion.errors import UserError


def gaussian(n, d, seed=0, scale=1.0, shift=0.0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=random, dtype=torch.float64) * scale + shift


def test_two_gaussians_of_known_distance():
    first = Statistics(np.array([0.0, 0.0]), np.diag([4.0, 9.0]))
    second = Statistics(np.array([3.0, 4.0]), np.diag([1.0, 16.0]))
    # |(3, 4)|^2 + (2 - 1)^2 + (3 - 4)^2
    assert frechet_distance(first, second) == pytest.approx(27.0, abs=1e-12)
    assert frechet_distance(second, first) == pytest.approx(27.0, abs=1e-12)


def test_covariances_that_do_not_commute():
    a = np.array([[2.0, 1.0], [1.0, 3.0]])
    b = np.array([[1.0, -0.5], [-0.5, 4.0]])
    product = a @ b
    # For 2x2 matrices: Tr (ab)^(1/2) = sqrt(Tr ab + 2 sqrt(det ab))
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(Statistics(np.zeros(2), a), Statistics(np.zeros(2), b)) == pytest.approx(
        expected, abs=1e-12
    )


def test_singular_covariances_are_real_and_need_no_offset():
    first = Statistics(np.zeros(3), np.diag([1.0, 0.0, 0.0]))
    second = Statistics(np.zeros(3), np.diag([0.0, 1.0, 0.0]))
    assert frechet_distance(first, second) == pytest.approx(2.0, abs=1e-12)


def test_fewer_features_than_dimensions_give_the_same_as_their_covariance():
    few, others = gaussian(20, 50), gaussian(30, 50, seed=1, scale=1.3)
    assert frechet_distance(few, others) == pytest.approx(
        frechet_distance(statistics(few), statistics(others)), rel=1e-7
    )


def test_a_set_has_no_distance_to_itself():
    features = gaussian(40, 10)
    assert 0 <= frechet_distance(features, features) < 1e-9


def test_statistics_agree_with_numpy_far_from_the_origin():
    features = gaussian(10_000, 5, shift=1e5).numpy()
    running = RunningStatistics()
    for part in np.array_split(features, 7):
        running.add(torch.from_numpy(part))
    result = running.result()
    assert np.allclose(result.mu, features.mean(0), rtol=1e-14)
    assert np.allclose(result.sigma, np.cov(features, rowvar=False), rtol=1e-8, atol=1e-9)


def test_statistics_of_parts_merge_to_those_of_the_whole():
    features = gaussian(100, 6, shift=3.0)
    parts = [RunningStatistics() for _ in range(3)]
    for running, part in zip(parts, features.split(45), strict=True):
        running.add(part)
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    parts[0].merge(RunningStatistics())
    assert parts[0].count == 100
    assert np.allclose(parts[0].result().sigma, np.cov(features.numpy(), rowvar=False), atol=1e-12)


def test_impossible_statistics_are_named():
    with pytest.raises(UserError, match="NaN"):
        Statistics(np.array([0.0, np.nan]), np.eye(2))
    with pytest.raises(UserError, match="do not fit together"):
        Statistics(np.zeros(3), np.eye(2))
    with pytest.raises(UserError, match="at least 2 images"):
        statistics(torch.zeros(1, 4))
    with pytest.raises(UserError, match="differ in number: 3 against 2"):
        frechet_distance(Statistics(np.zeros(3), np.eye(3)), Statistics(np.zeros(2), np.eye(2)))


def test_bias_estimate_is_about_the_bias():
    # Both sets come from one distribution: whatever the distance is, it is bias.
    first, second = gaussian(400, 20, seed=2), gaussian(400, 20, seed=3)
    distance = frechet_distance(first, second)
    assert distance / 2 < frechet_bias(first, second, distance) < distance * 2


def test_statistics_that_are_given_have_no_bias_of_their_own():
    samples = gaussian(400, 20, seed=3)
    exact = Statistics(np.zeros(20), np.eye(20))
    distance = frechet_distance(exact, samples)
    one_sided = frechet_bias(exact, samples, distance)
    assert distance / 2 < one_sided < distance * 2
    assert one_sided < frechet_bias(
        gaussian(400, 20, seed=2), samples, frechet_distance(gaussian(400, 20, seed=2), samples)
    )


def test_interval_holds_the_distance_and_shrinks_with_more_images():
    widths = []
    for n in (100, 1600):
        first, second = gaussian(n, 8), gaussian(n, 8, seed=1, shift=0.5)
        distance = frechet_distance(first, second)
        low, high = frechet_interval(first, second, distance, 40)
        assert low < distance < high
        widths.append(high - low)
    # The standard error falls with the square root of the number: here to a quarter.
    assert widths[0] / 8 < widths[1] < widths[0] / 2


def test_interval_covers_what_other_samples_give():
    distances = [
        frechet_distance(gaussian(200, 6, seed=2 * s), gaussian(200, 6, seed=2 * s + 1, shift=0.5))
        for s in range(60)
    ]
    low, high = frechet_interval(gaussian(200, 6), gaussian(200, 6, seed=1, shift=0.5), distances[0], 100)
    spread = np.quantile(distances, 0.975) - np.quantile(distances, 0.025)
    assert spread / 1.6 < high - low < spread * 1.6


def test_interval_lies_around_the_distance_although_redrawn_sets_are_further_apart():
    first, second = gaussian(40, 20), gaussian(40, 20, seed=1)  # few: redrawing raises the distance by a lot
    distance = frechet_distance(first, second)
    low, high = frechet_interval(first, second, distance, 60)
    assert abs((low + high) / 2 - distance) < (high - low) / 4


def test_the_same_seed_gives_the_same_estimates():
    first, second = gaussian(50, 5), gaussian(50, 5, seed=1)
    assert frechet_interval(first, second, 1.0, 5, seed=4) == frechet_interval(first, second, 1.0, 5, seed=4)
    assert frechet_interval(first, second, 1.0, 5, seed=4) != frechet_interval(first, second, 1.0, 5, seed=5)
    assert frechet_bias(first, second, 1.0, seed=4) == frechet_bias(first, second, 1.0, seed=4)
