"""Likelihoods of the variational bound, in nats per element (upstream: guided_diffusion/losses.py)."""

import math

import torch as th


def normal_kl(mean1, logvar1, mean2, logvar2):
    """KL(N(mean1, e^logvar1) || N(mean2, e^logvar2)), elementwise, in nats.

    Arguments broadcast; each may be a number, but at least one must be a tensor (ValueError).
    """
    like = next((a for a in (mean1, logvar1, mean2, logvar2) if isinstance(a, th.Tensor)), None)
    if like is None:
        raise ValueError("normal_kl needs at least one tensor among its arguments")
    logvar1, logvar2 = (a if isinstance(a, th.Tensor) else th.tensor(a).to(like) for a in (logvar1, logvar2))
    # Summed in this order the rounding is upstream's, which shows where the divergence is tiny, as in the
    # prior term.
    entropy_gap = -1.0 + logvar2 - logvar1
    variance_ratio = th.exp(logvar1 - logvar2)
    return 0.5 * (entropy_gap + variance_ratio + (mean1 - mean2) ** 2 * th.exp(-logvar2))


def approx_standard_normal_cdf(x):
    """The standard normal distribution function by its tanh approximation (absolute error below 1e-3)."""
    return 0.5 * (1.0 + th.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x, *, means, log_scales):
    """log of the mass that N(means, e^(2 log_scales)) gives to the 1/255-wide bin around x, elementwise.

    x: 8-bit images scaled to [-1, 1]; the two outermost bins reach to infinity. All shapes equal
    (ValueError).
    """
    if not x.shape == means.shape == log_scales.shape:
        raise ValueError(
            f"shapes differ: x {tuple(x.shape)}, means {tuple(means.shape)}, log_scales {tuple(log_scales.shape)}"
        )
    inverse_scale = th.exp(-log_scales)
    upper = approx_standard_normal_cdf((x - means + 1.0 / 255.0) * inverse_scale)
    lower = approx_standard_normal_cdf((x - means - 1.0 / 255.0) * inverse_scale)
    mass = th.where(x < -0.999, upper, th.where(x > 0.999, 1.0 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()
