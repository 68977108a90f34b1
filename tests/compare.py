"""The one rule by which computed numbers are compared with recorded or derived ones."""

import numpy as np
import torch as th

BITS = 1e-6  # the floor of bits per dimension: the terms of a KL divergence are of size 1


def agree(actual, expected, what="", rtol=1e-4, floor=0.0):
    """Assert equal shapes, and every entry within rtol of the largest magnitude of `expected`, or within `floor`.

    Small entries are not compared on their own scale: a sum carries the rounding of its largest terms. Where all of
    `expected` is what is left of larger terms (a KL divergence near zero, the gradient of a bias before a normalisation),
    say so by `floor`: about eight float32 roundings, 1e-6, of those terms.
    """
    actual, expected = (
        np.asarray(a.detach() if isinstance(a, th.Tensor) else a, dtype=np.float64)
        for a in (actual, expected)
    )
    assert actual.shape == expected.shape, f"{what}: {actual.shape} against {expected.shape}"
    error = np.abs(actual - expected).max(initial=0)
    allowed = max(rtol * np.abs(expected).max(initial=0), floor)
    assert error <= allowed, f"{what}: off by {error:.2g}, {allowed:.2g} allowed"
