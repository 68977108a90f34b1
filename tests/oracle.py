"""Networks that know the exact answer: the posterior means of small joint distributions, in closed form.

With them a sampler's samples, a bound or a conditioning rule can be compared with what they must be. All pixels are independent and alike.
"""

import numpy as np
import torch as th
import torch.nn as nn

from guided_diffusion.gaussian_diffusion import (
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from guided_diffusion.mt.aggregation import Aggregation
from guided_diffusion.mt.heads import Heads
from guided_diffusion.mt.modalities import ImageModality, LabelModality
from guided_diffusion.mt.modality_set import ModalitySet
from guided_diffusion.respace import SpacedDiffusion, space_timesteps

T = 1000


def process(schedule="linear", steps=T, aggregation="bump", peaks=None, total=T, kept=None, **options):
    """A diffusion over `steps` of `total` timesteps, or over those `kept`; peaks: kappa by modality, None for a single task."""
    betas = get_named_beta_schedule(schedule, total)
    defaults = {
        "model_mean_type": ModelMeanType.EPSILON,
        "model_var_type": ModelVarType.FIXED_SMALL,
        "loss_type": LossType.MSE,
    }
    joint = None if peaks is None else Aggregation.named(aggregation, betas, peaks)
    kept = space_timesteps(total, [steps]) if kept is None else kept
    return SpacedDiffusion(kept, betas=betas, aggregation=joint, **{**defaults, **options})


class _Oracle(nn.Module):
    """Tables of a full process, and picking from them at a batch's timesteps."""

    def __init__(self, diffusion):
        super().__init__()
        self.process = diffusion
        self.anchor = nn.Parameter(th.zeros(()))  # samplers ask a network for its device
        abar = diffusion.alphas_cumprod
        assert len(abar) == diffusion.original_num_steps, "an oracle needs the tables of every timestep"
        self.signal, self.sigma = np.sqrt(abar), np.sqrt(1 - abar)
        joint = diffusion.aggregation
        self.shift = np.zeros(len(abar)) if joint is None else joint.coefficients[0]

    @staticmethod
    def pick(table, t, like):
        return th.from_numpy(table)[t].to(like).reshape(-1, *[1] * (like.dim() - 1))


class GaussianPair(_Oracle):
    """x ~ N(mean, spread^2) and the image modality e = slope x + offset + N(0, extra^2), pixel by pixel.

    learned: it also returns the logarithm of the exact variance of z_{t-1} given z_t (ModelVarType.LEARNED).
    """

    def __init__(self, diffusion, mean=0.2, spread=0.3, slope=0.5, offset=-0.1, extra=0.15, learned=False):
        super().__init__(diffusion)
        self.learned = learned
        a, b, s = self.signal, self.shift, self.sigma
        self.mean, self.spread = mean, spread
        self.e_mean, var_e, cov = slope * mean + offset, (slope * spread) ** 2 + extra**2, slope * spread**2
        self.z_mean = a * mean + b * self.e_mean
        self.z_var = a**2 * spread**2 + b**2 * var_e + 2 * a * b * cov + s**2
        self.gain_e = (a * cov + b * var_e) / self.z_var
        self.heads = nn.ModuleDict({"e": nn.Module()})
        self.heads["e"].register_buffer(
            "variance", th.from_numpy(var_e - self.gain_e**2 * self.z_var).float()
        )
        # z_{t-1} = c_x x + c_e e + c_z z_t + noise: the variance given z_t alone
        c_x = diffusion.posterior_mean_coef1
        c_e = np.append(0.0, b[:-1]) - diffusion.posterior_mean_coef2 * b
        prior = c_x**2 * spread**2 + 2 * c_x * c_e * cov + c_e**2 * var_e
        explained = (c_x * (a * spread**2 + b * cov) + c_e * (a * cov + b * var_e)) ** 2 / self.z_var
        self.log_variance = np.log(diffusion.posterior_variance + prior - explained)
        # p(x | e)
        self.x_given_e = lambda e: mean + cov / var_e * (e - self.e_mean)
        self.spread_given_e = np.sqrt(spread**2 - cov**2 / var_e)

    def forward(self, z, t, y=None):
        away = z - self.pick(self.z_mean, t, z)
        eps = away * self.pick(self.sigma / self.z_var, t, z)
        if self.learned:
            eps = th.cat([eps, self.pick(self.log_variance, t, z).expand_as(eps)], dim=1)
        return eps, {"e": self.e_mean + away * self.pick(self.gain_e, t, z)}

    def flow(self, z, start, end):
        """Where the exact probability flow takes z from one timestep to another; end = None is the image."""
        mean, var = (self.mean, self.spread**2) if end is None else (self.z_mean[end], self.z_var[end])
        return mean + np.sqrt(var / self.z_var[start]) * (z - self.z_mean[start])

    def modalities(self, pixels=(1, 1, 1)):
        return ModalitySet([ImageModality("e", pixels)], pixels[0], self.process)


class GaussianSeveral(_Oracle):
    """An image and the image modalities `names`, pixel by pixel N(0, covariance [1 + K, 1 + K]), the image first."""

    def __init__(self, diffusion, covariance, names=("a", "b")):
        super().__init__(diffusion)
        self.names, covariance = names, np.asarray(covariance)
        way = np.stack([self.signal, *diffusion.aggregation.coefficients], axis=1)  # [T, 1 + K]
        self.z_var = np.einsum("ti,ij,tj->t", way, covariance, way) + self.sigma**2
        self.gains = way @ covariance / self.z_var[:, None]
        errors = covariance - self.gains[:, :, None] * self.gains[:, None] * self.z_var[:, None, None]
        errors = errors[:, 1:, 1:]
        spread = np.sqrt(np.diagonal(errors, axis1=1, axis2=2))
        self.heads = Heads({name: nn.Module() for name in names}, dict.fromkeys(names, len(way)))
        for k, name in enumerate(names):
            self.heads[name].variance.copy_(th.from_numpy(spread[:, k] ** 2))
            self.heads[name].correlation.copy_(th.from_numpy(errors[:, k] / spread / spread[:, k : k + 1]))

    def forward(self, z, t, y=None):
        told = {name: z * self.pick(self.gains[:, 1 + k], t, z) for k, name in enumerate(self.names)}
        return z * self.pick(self.sigma / self.z_var, t, z), told

    def modalities(self, pixels=(1, 1, 1)):
        return ModalitySet([ImageModality(name, pixels) for name in self.names], pixels[0], self.process)


class LabelledMixture(_Oracle):
    """x | label k ~ N(means[k], spread^2), one pixel; the label's code is the constant codes[k].

    bias is added to the head's probability of the first label, as an imperfect head would.
    """

    def __init__(
        self, diffusion, means=(-0.6, 0.5), prior=(0.3, 0.7), codes=(1.0, -1.0), spread=0.15, bias=0.0
    ):
        super().__init__(diffusion)
        self.means, self.prior, self.codes = (th.tensor(v) for v in (means, prior, codes))
        self.spread, self.bias = spread, bias

    def forward(self, z, t, y=None):
        a, b, s = (self.pick(v, t, z)[:, :, 0, 0] for v in (self.signal, self.shift, self.sigma))
        centre = a * self.means + b * self.codes  # [B, K]
        var = a**2 * self.spread**2 + s**2
        away = z[:, :, 0, 0] - centre
        logits = self.prior.log() - away**2 / (2 * var)
        eps = (logits.softmax(1) * s * away / var).sum(1)
        if self.bias:
            p = logits.softmax(1)[:, :1] * (1 - 2 * self.bias) + self.bias
            logits = th.cat([p, 1 - p], dim=1).clamp(min=1e-30).log()
        return eps.reshape(-1, 1, 1, 1), {"label": logits}

    def modalities(self):
        def encode(value):
            return (value @ self.codes).reshape(-1, 1, 1, 1)

        label = LabelModality("label", (len(self.means),), encoder=encode, head="middle")
        return ModalitySet([label], 1, self.process)

    def sample(self, count, generator):
        k = th.multinomial(self.prior, count, replacement=True, generator=generator)
        return self.means[k] + self.spread * th.randn(count, generator=generator), k
