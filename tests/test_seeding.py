"""Random numbers that belong to a sample."""

import itertools

import pytest
import torch as th

from guided_diffusion.seeding import PerSample, derive_seed


def test_streams_differ():
    """Different lists of integers give different seeds, also where they differ by zeros, order or length alone."""
    lists = [
        numbers for length in (1, 2, 3) for numbers in itertools.product((0, 1, 2, 7, 2**32), repeat=length)
    ]
    assert len({derive_seed(*numbers) for numbers in lists}) == len(lists)


def test_seeds_are_stable_and_in_range():
    assert derive_seed(3, 4) == derive_seed(3, 4)
    assert all(0 <= derive_seed(5, i) < 2**63 for i in range(100))
    with pytest.raises(ValueError):
        derive_seed(-1)


def test_a_sample_does_not_depend_on_its_batch():
    """Row k is the same alone, in a batch, and in another order, through a whole history of draws."""

    def draws(random):
        return [
            random.randn((2, 3)),
            random.rand(4),
            random.randint(9, 5),
            random.randn_like(random.randn((3,))),
        ]

    whole = draws(PerSample.derived(11, range(6)))
    parts = [draws(PerSample.derived(11, indices)) for indices in ([4, 1], [0], [5, 3, 2])]
    for i, all_rows in enumerate(whole):
        rows = th.cat([part[i] for part in parts])
        assert th.equal(rows, all_rows[[4, 1, 0, 5, 3, 2]])


def test_samples_and_seeds_are_independent():
    a, b = (PerSample.derived(seed, range(40)).randn((50,)) for seed in (0, 1))
    everything = th.cat([a, b])
    correlation = th.corrcoef(everything).fill_diagonal_(0).abs().max()
    assert correlation < 0.7  # sqrt(1 / 50) = 0.14 is one standard deviation
    assert everything.mean() == pytest.approx(0, abs=0.07)
    assert everything.std() == pytest.approx(1, abs=0.05)


def test_distributions():
    random = PerSample.derived(2, range(20))
    uniform, whole = random.rand(500), random.randint(11, 500)
    assert uniform.dtype == th.float64 and 0 <= uniform.min() and uniform.max() < 1
    assert uniform.mean() == pytest.approx(0.5, abs=0.015)
    counts = th.bincount(whole.flatten(), minlength=11) / whole.numel()
    assert len(counts) == 11 and (counts - 1 / 11).abs().max() < 0.012
    assert random.randint(3).shape == (20,) and len(random) == 20


def test_dtype_and_batch():
    random = PerSample([1, 2])
    assert random.randn_like(th.zeros(2, 3, dtype=th.float64)).dtype == th.float64
    with pytest.raises(ValueError, match="a batch of 3 for 2 generators"):
        random.randn_like(th.zeros(3, 3))
