"""Inception Score, precision and recall on cases computed by hand."""

import numpy as np
import pytest
import torch

from evaluations.precision_recall import precision_recall
from evaluations.scores import inception_score
from guided_diffusion.errors import UserError


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_inception_score_of_known_distributions():
    assert inception_score(np.eye(8)) == pytest.approx(8)  # sure of a different class each time
    assert inception_score(np.tile([0.2, 0.3, 0.5], (6, 1))) == pytest.approx(1)  # all alike
    p = np.array([[0.9, 0.1], [0.1, 0.9]])
    # KL of (0.9, 0.1) from (0.5, 0.5)
    assert inception_score(p) == pytest.approx(np.exp(0.9 * np.log(1.8) + 0.1 * np.log(0.2)))


def test_inception_score_counts_a_short_last_split_as_a_full_one():
    p = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert inception_score(p, split=2) == pytest.approx((2 + 1) / 2)


def test_inception_score_splits_consecutively():
    p = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert inception_score(p, split=2) == pytest.approx(1)
    assert inception_score(p, split=4) == pytest.approx(2)


def test_precision_and_recall_where_they_differ():
    reference = column(0, 1, 2, 3)  # 3rd neighbours at distance 3, 2, 2, 3
    samples = column(2.5, 10, 11, 12)  # at 9.5, 7.5, 8.5, 9.5
    result = precision_recall(reference, samples)
    assert result.precision == 1 / 4  # only 2.5 lies in the reference's balls
    assert result.recall == 1  # the ball around 2.5 reaches to -7
    swapped = precision_recall(samples, reference)
    assert (swapped.precision, swapped.recall) == (1, 1 / 4)


def test_the_edge_of_a_ball_belongs_to_it_and_a_point_is_not_its_own_neighbour():
    reference = column(0, 2)
    result = precision_recall(reference, column(4, 4.001), neighbours=1)
    assert result.precision == 1 / 2  # the ball around 2 reaches to 4 exactly
    assert result.recall == 0


def test_duplicates_are_neighbours_at_no_distance():
    result = precision_recall(column(5, 5, 9), column(5, 4.9, 20, 30), neighbours=1)
    assert result.precision == 1 / 4  # the balls around 5 hold 5 alone, the one around 9 ends there


def test_blocks_do_not_change_the_result():
    random = torch.Generator().manual_seed(0)
    reference, samples = torch.randn(90, 6, generator=random), torch.randn(70, 6, generator=random) + 0.3
    whole = precision_recall(reference, samples)
    assert 0 < whole.precision < 1 and 0 < whole.recall < 1
    assert precision_recall(reference, samples, block_elements=200) == whole
    assert precision_recall(reference, samples, block_elements=1) == whole


def test_a_common_shift_does_not_change_the_result():
    random = torch.Generator().manual_seed(1)
    reference, samples = torch.randn(60, 6, generator=random), torch.randn(60, 6, generator=random) + 0.3
    assert precision_recall(reference + 100, samples + 100) == precision_recall(reference, samples)


def test_too_few_images_for_the_neighbours():
    with pytest.raises(UserError, match="more than 3 images"):
        precision_recall(column(0, 1, 2), column(0, 1, 2, 3))
