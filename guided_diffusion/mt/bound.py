"""The multi-task variational bound, term by term (paper Theorem 1)."""

import math
from dataclasses import dataclass

import torch as th

from ..gaussian_diffusion import GaussianDiffusion
from ..seeding import PerSample
from .denoiser import JointDenoiser
from .modality_set import Batch, MultiTask


@dataclass(frozen=True)
class Bound:
    """The multi-task variational bound, in bits per dimension of the image.

    L0 [B]: prior, KL(q(z_T | X) || p(z_T)). L1 [B, T]: transitions, KL(q(z_{t-1} | z_t, X) || p(z_{t-1} |
    z_t)), column t; column 0 is not used. L2: by modality [B, T], code length of x_i given z_t. L3 [B]: the
    image given z_1's successor, -log p(x_0 | z_0 at t = 0).
    """

    L0: th.Tensor
    L1: th.Tensor
    L2: dict[str, th.Tensor]
    L3: th.Tensor

    @property
    def total(self) -> th.Tensor:
        """[B]: L0 + sum_t L1 + L3 + sum_i mean_t L2_i. Decoding x_i at any one t gives a bound of -log p(X),
        hence so does the mean; the paper's sum over t would count x_i T times."""
        return self.L0 + self.L1.sum(dim=1) + self.L3 + sum(v.mean(dim=1) for v in self.L2.values())


@th.no_grad()
def multitask_bound(
    diffusion: GaussianDiffusion,
    tasks: MultiTask,
    network,
    images: th.Tensor,
    batch: Batch,
    clip_denoised: bool = True,
    random: PerSample | None = None,
) -> Bound:
    """The whole bound on images [B, C, H, W] and their modalities (paper Theorem 1), the reverse process
    being the sampler's own.

    random: the noise's generators (the global one if None). A modality without a head is a condition: the
    bound is that of the rest given it.
    """
    conditions = {name: value for name, value in batch.values.items() if tasks[name].head == "none"}
    denoiser = JointDenoiser(tasks, network, conditions)
    encodings = tasks.encode(network, batch, images)
    bits = math.log(2.0) * images[0].numel()
    transitions, codes = [], {name: [] for name in batch.values if name not in conditions}
    for step in range(diffusion.num_timesteps):
        t = th.full((len(images),), step, device=images.device)
        noise = random.randn_like(images) if random is not None else th.randn_like(images)
        z_t = diffusion.q_sample(images, t, noise, encodings)
        seen: dict = {}

        def model(z, timesteps, seen=seen, **kwargs):
            seen["joint"], seen["timesteps"] = denoiser(z, timesteps), timesteps
            return seen["joint"]

        term = diffusion._vb_terms_bpd(model, images, z_t, t, clip_denoised, encodings=encodings)
        transitions.append(term["output"])
        for name in codes:
            m, value = tasks[name], batch.values[name]
            variance = (
                tasks.variance(network, name, seen["timesteps"]) if m.likelihood == "gaussian" else None
            )
            length = m.code_length(seen["joint"].predictions[name], value, variance) / bits
            mask = batch.mask(name, length)
            codes[name].append(length if mask is None else length * mask)
    by_step = th.stack(transitions, dim=1)
    L1 = by_step.clone()
    L1[:, 0] = 0
    L2 = {name: th.stack(columns, dim=1) for name, columns in codes.items()}
    return Bound(diffusion._prior_bpd(images, encodings), L1, L2, by_step[:, 0])
