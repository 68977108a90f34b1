"""The multi-task variational bound, term by term (paper Theorem 1)."""

import math
from dataclasses import dataclass

import torch as th

from ..gaussian_diffusion import GaussianDiffusion
from ..losses import normal_kl
from ..nn import mean_flat
from ..seeding import PerSample
from .aggregation import JointOutput, from_frame
from .denoiser import JointDenoiser
from .modality_set import Batch, ModalitySet, network_timesteps


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
    modalities: ModalitySet,
    network,
    batch: Batch,
    clip_denoised: bool = True,
    random: PerSample | None = None,
) -> Bound:
    """The whole bound on `batch.images` [B, C, H, W] and their modalities over the steps of `diffusion`, the
    reverse process being the sampler's own.

    random: the noise's generators (the global one if None). A modality without a head is a condition: the
    bound is that of the rest given it.
    """
    images = batch.images
    conditions = {name: value for name, value in batch.values.items() if modalities[name].head == "none"}
    denoiser = JointDenoiser(modalities, network, conditions)
    encodings = modalities.encode(network, batch, images)
    bits = math.log(2.0) * images[0].numel()
    transitions, lengths = [], {name: [] for name in batch.values if name not in conditions}
    for step in range(diffusion.num_timesteps):
        t = th.full((len(images),), step, device=images.device)
        noise = random.randn_like(images) if random is not None else th.randn_like(images)
        y_t = diffusion.q_sample(images, t, noise)
        timesteps = network_timesteps(diffusion, t)
        said = denoiser(from_frame(diffusion, y_t, t, encodings), timesteps)
        # Both means move by shift_{t-1}: the divergence is that of the single task, where the model's shift is
        # what it has beyond the true one.
        joint = isinstance(said, JointOutput)
        model = said._replace(encodings=_beyond(said.encodings, encodings)) if joint else said
        term = diffusion._vb_terms_bpd(lambda *_, model=model: model, images, y_t, t, clip_denoised)
        transitions.append(term["output"])
        for name in lengths:
            variance = modalities.variance(network, name, timesteps)
            length = modalities[name].code_length(said.predictions[name], batch.values[name], variance) / bits
            mask = batch.mask(name, length)
            lengths[name].append(length if mask is None else length * mask)
    by_step = th.stack(transitions, dim=1)
    L1 = by_step.clone()
    L1[:, 0] = 0
    L2 = {name: th.stack(columns, dim=1) for name, columns in lengths.items()}
    return Bound(prior_bpd(diffusion, images, encodings), L1, L2, by_step[:, 0])


def prior_bpd(diffusion: GaussianDiffusion, images: th.Tensor, encodings) -> th.Tensor:
    """KL(q(z_T | X) || N(0, I)) in bits per dimension: [B]. It counts the shift that is left at the end."""
    t = th.full((len(images),), diffusion.num_timesteps - 1, device=images.device)
    mean, _, log_variance = diffusion.q_mean_variance(images, t)
    mean = from_frame(diffusion, mean, t, encodings)
    return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)


def _beyond(estimated, true):
    """estimated - true encodings, by name, of all that are in either."""
    zero = 0.0
    return {n: estimated.get(n, zero) - true.get(n, zero) for n in dict.fromkeys([*estimated, *true])}
