"""Equation 6: the noise's squared error, and a KL term for every modality (paper section 2.2.5)."""

from collections.abc import Mapping
from typing import NamedTuple

import torch as th

from ..gaussian_diffusion import GaussianDiffusion
from ..seeding import PerSample
from .modality_set import Batch, ModalitySet, network_timesteps


class JointLosses(NamedTuple):
    """What training needs of a batch."""

    terms: dict[str, th.Tensor]  # [B] each: `loss`, the diffusion's own terms, and KL_name of every modality
    predictions: dict[str, th.Tensor]  # what the heads returned, by name


def multitask_losses(
    modalities: ModalitySet,
    network,
    batch: Batch,
    t: th.Tensor,
    *,
    diffusion: GaussianDiffusion | None = None,
    noise: th.Tensor | None = None,
    random: PerSample | None = None,
    encoder=None,
    conditioning: Mapping | None = None,
    unshifted_probability: float = 0.0,
) -> JointLosses:
    """Equation 6 at timesteps t [B] for `batch.images` [B, C, H, W] and their modalities.

    `loss` is the sum: MSE(eps) + sum_i lambda_i KL_i. A missing value adds neither shift nor loss. diffusion: a
    respaced process (default: the full one); random: decides which X inputs are replaced by the null input, and
    which shifts are left out (none if None); encoder: the network that encodes, where `network` is wrapped for
    training; conditioning: what else the network is called with (`context`); unshifted_probability: share of the
    samples of each modality whose shift is left out while its loss stays, so that heads learn to read the image.
    """
    images, diffusion = batch.images, diffusion or modalities.process
    noise = th.randn_like(images) if noise is None else noise
    shown = _shown(modalities, batch, random)
    shifted = _shifted(modalities, batch, random, unshifted_probability)
    encodings = modalities.encode(network if encoder is None else encoder, shifted, images)
    z = diffusion.q_sample(images, t, noise, encodings)
    present = modalities.present_among(encodings, images, shifted)
    output, predictions = modalities.apply(
        network, z, network_timesteps(diffusion, t), shown, conditioning, present, training=True
    )
    # In the moving frame this is the single-task loss of what the network said.
    terms = diffusion.training_losses(lambda *_, **__: output, images, t, noise=noise)
    for name, value in batch.values.items():
        if name not in predictions:
            continue  # no head: a condition only
        loss = modalities[name].loss(predictions[name].float(), value)
        mask = batch.mask(name, loss)
        terms[f"KL_{name}"] = loss if mask is None else loss * mask
        terms["loss"] = terms["loss"] + modalities[name].loss_weight * terms[f"KL_{name}"]
    return JointLosses(terms, predictions)


# Of the samples, whose vectors are encoded by a pass of the U-Net: 10 % of a step, of which the backward pass is two.
ENCODED = 0.3


def _shifted(modalities, batch, random, probability):
    if random is None or not modalities.aggregated:
        return batch
    costly = [k for k, name in enumerate(modalities.aggregated) if modalities[name].needs_context]
    if not modalities.presence:
        costly = []  # the network could not tell that a shift is missing
    if not probability and not costly:
        return batch
    draws = random.rand(len(modalities.aggregated)).to(batch.images.device)
    keep = draws >= probability
    if costly:  # all null inputs are one more row
        most = max(int(ENCODED * len(draws) / len(costly)) - 1, 1)
        latest = draws[:, costly].argsort(dim=0, descending=True)[most:]
        keep[:, costly] = keep[:, costly].scatter(0, latest, False)
    columns = dict(zip(modalities.aggregated, keep.unbind(1), strict=True))
    everywhere = th.ones_like(keep[:, 0])
    return batch.only({name: columns.get(name, everywhere) for name in batch.values})


def _shown(modalities, batch, random):
    """The network's X inputs in training: with their null probability, or where missing, zeros."""
    shown = {}
    for m in modalities:
        if m.as_input and m.name in batch.values:
            value = batch.values[m.name]
            if random is not None:
                keep = (random.rand() >= m.null_probability).to(value)
                value = value * keep.reshape(-1, *[1] * (value.dim() - 1))
            mask = batch.mask(m.name, value)
            shown[m.name] = value if mask is None else value * mask
    return shown
