"""What training measures of a joint model on images that it does not see: losses, heads, and samples against images."""

from collections.abc import Callable

import numpy as np
import torch as th

from .. import dist_util
from ..figures import to_uint8
from ..flags import FEW_SAMPLER
from ..seeding import PerSample, derive_seed
from . import directions
from .modality_set import batch_of
from .model import JointModel
from .sampling import random_labels

# (uint8 [N, H, W, C] images, uint8 [M, H, W, C] samples, their labels int64 [M] or None) -> scores by name.
Judge = Callable[[np.ndarray, np.ndarray, np.ndarray | None], dict[str, float]]
_EVALUATION = 4  # the stream of random numbers
_BATCH = 64


@th.no_grad()
def held_out_losses(
    model: JointModel, images: th.Tensor, cond: dict[str, th.Tensor], seed: int, unshifted: float = 0.0
) -> dict[str, float]:
    """The terms of equation 6 on images [N, C, H, W] at timesteps that cover the process evenly, and the share of labels
    that their heads put first; each in all and by quarter of the process (_q0 to _q3). The same noise in every call. unshifted: share of the shifts that
    are left out; without any, heads read the image alone."""
    model.network.eval()
    table: dict[str, list[float]] = {}
    quarters: list[int] = []
    total = model.diffusion.num_timesteps
    for numbers in directions.batches(range(len(images)), _BATCH):
        rows = th.tensor(numbers)
        random = PerSample((derive_seed(seed, _EVALUATION, n) for n in numbers), images.device)
        part = images[rows.to(images.device)]
        values = batch_of(model.modalities, {k: v[rows.to(v.device)] for k, v in cond.items()})
        batch = model.derived(part, values, random)
        # A stride that shares no factor with N spreads the quarters over the images.
        t = ((rows * 7919 % len(images)) * total // len(images)).to(images.device)
        found = model.losses(
            batch, t, noise=random.randn_like(part), random=random, unshifted_probability=unshifted
        )
        terms = {name: value.float().tolist() for name, value in found.terms.items()}
        terms |= label_hits(model, batch, found.predictions)
        for name, value in terms.items():
            table.setdefault(name, []).extend(value)
        quarters += (4 * t // total).tolist()
    means = {}
    for name, column in table.items():
        for suffix, keep in (("", range(4)), *((f"_q{q}", (q,)) for q in range(4))):
            kept = [v for v, q in zip(column, quarters, strict=True) if q in keep and v == v]
            if kept:
                means[f"{name}{suffix}"] = sum(kept) / len(kept)
    return means


def label_hits(model: JointModel, batch, predictions: dict) -> dict[str, list[float]]:
    """1 where a label's head is right, 0 where not, NaN where a sample has no label: accuracy_NAME [B]."""
    found = {}
    for m in model.modalities:
        if m.kind != "label" or m.name not in predictions:
            continue
        truth = batch.values[m.name]
        right = (predictions[m.name].argmax(dim=1) == truth.argmax(dim=1)).double()
        found[f"accuracy_{m.name}"] = th.where(truth.sum(dim=1) > 0, right, th.nan).tolist()
    return found


@th.no_grad()
def judged_samples(
    model: JointModel, images: np.ndarray, judge: Judge, count: int, steps: int, seed: int
) -> dict[str, float]:
    """Scores of `count` joint samples against images uint8 [N, H, W, C], which every rank helps to draw; on rank 0, {} on
    the others. Samples are the same in every call, up to the weights."""
    model.network.eval()
    label, rows = model.modalities.first("label"), {}
    for numbers in directions.batches(directions.own_share(count), _BATCH):
        random = PerSample.derived(seed, numbers, dist_util.dev())
        given = random_labels(model.modalities, random)
        fewer = min(steps, model.diffusion.num_timesteps)
        drawn = model.sample(random, fewer, given=given, sampler=FEW_SAMPLER)
        directions.store(rows, numbers, {"image": drawn.images, **drawn.values})
    arrays = directions.gathered(rows)
    if dist_util.get_rank() != 0:
        return {}
    samples = to_uint8(th.from_numpy(arrays["image"]))
    labels = arrays[label.name].argmax(axis=1) if label is not None and label.name in arrays else None
    return judge(images, samples, labels)
