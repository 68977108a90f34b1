"""Training of several modalities: ADM's loop with the loss of equation 6 (paper section 2.2.5)."""

import contextlib
import math
from collections.abc import Mapping

import torch as th
import torch.distributed as dist

from .. import dist_util, logger
from ..seeding import PerSample, derive_seed
from ..train_util import TrainLoop
from .modality_set import ModalitySet, batch_of, derive_values
from .model import JointModel

# Streams of random numbers beside the loop's own.
_DATA, _HELD_OUT, _SINGLE_TASK = 1, 2, 3
_PASSES = 2  # over the held-out images, to measure the heads
_CODE_COST = 0.05  # of a step's time, which refreshing the codes may take
_BACKWARD = 2  # forward passes that a backward pass costs


class JointTrainLoop(TrainLoop):
    """TrainLoop for a `JointModel`; a seed is required.

    held_out: (images [N, C, H, W] in [-1, 1], dict of tensors [N]) that training does not see; before every
    save, the heads' squared errors on them become the heads' `variance`. With the model's
    single_task_probability a sample's modalities all count as missing, so that the network learns the image alone
    beside the joint model (M*, E*). Codes of labels are refreshed at steps 0, 1, 2, 4, ... and every code_interval.
    Everything else as in TrainLoop.
    """

    def __init__(self, *, model: JointModel, held_out: tuple[th.Tensor, dict] | None = None, **kwargs):
        self.joint, self.modalities, self.held_out = model, model.modalities, held_out
        super().__init__(model=model.network, diffusion=model.diffusion, **kwargs)
        if kwargs.get("compile"):  # the network's own forward does not reach these
            for m in self.modalities:
                if m.head == "classifier":
                    self.model.heads[m.name].compile()
        self.code_interval = code_interval(model, self.global_batch)
        if rows := sum(m.encoded_rows for m in self.modalities):
            share = rows / self.code_interval / ((1 + _BACKWARD) * self.global_batch)
            logger.log(
                f"labels: {rows} codes, encoded every {self.code_interval} steps, about {share:.2%} of a step's time"
            )

    def compute_losses(self, micro, micro_cond):
        """Equation 6 on a microbatch; see TrainLoop.compute_losses."""
        if not self._micro_start:
            self._refresh_codes(micro)
        t, weights = self.sample_timesteps(len(micro))
        random = self.sample_random(len(micro), _DATA, micro.device)
        batch = self.joint.derived(micro, batch_of(self.modalities, micro_cond), random)
        if alone := self.joint.flags["single_task_probability"]:
            draws = self.sample_random(len(micro), _SINGLE_TASK, micro.device).rand()
            batch = batch.only(draws >= alone)
        noise = self.sample_noise(micro)
        with self.autocast():
            losses = self.joint.losses(batch, t, self.ddp_model, noise=noise, random=random)
        return losses.terms, t, weights

    def _refresh_codes(self, like):
        step = self.step + self.resume_step
        if is_refresh_step(step, self.code_interval):
            self.modalities.refresh_codes(self.model, like)

    @contextlib.contextmanager
    def ema_weights(self):
        """The model with the weights of its first moving average, for sampling; buffers are the model's own."""
        own = [p.detach().clone() for p in self.model.parameters()]
        if self.ema_params:
            average = self._weights(self.ema_params[0])
            _copy(self.model.parameters(), [average[name] for name, _ in self.model.named_parameters()])
        try:
            yield self.model
        finally:
            _copy(self.model.parameters(), own)

    def save(self):
        if self.held_out is not None:
            with self.ema_weights():
                measure_variance(self.modalities, self.model, *self.held_out, seed=self.seed)
        super().save()


@th.no_grad()
def _copy(target, source):
    for parameter, value in zip(target, source, strict=True):
        parameter.copy_(value)


def code_interval(model: JointModel, batch_size: int) -> int:
    """Steps between two refreshes of the labels' codes: the flag, or see `affordable_interval`."""
    return model.flags["code_interval"] or affordable_interval(model.modalities, batch_size)


def affordable_interval(modalities: ModalitySet, batch_size: int) -> int:
    """As many steps between two refreshes of the codes as make them cost 5 % of the steps of `batch_size` samples, at
    least 100."""
    rows = sum(m.encoded_rows for m in modalities)
    return max(100, math.ceil(rows / (_CODE_COST * (1 + _BACKWARD) * batch_size)))


def is_refresh_step(step: int, interval: int) -> bool:
    """Are codes refreshed at this step: 0, 1, 2, 4, ... and every `interval`?"""
    return step % interval == 0 or (step < interval and step & (step - 1) == 0)


@th.no_grad()
def measure_variance(
    modalities: ModalitySet,
    network,
    images: th.Tensor,
    cond: dict[str, th.Tensor],
    seed: int = 0,
    conditioning: Mapping | None = None,
) -> None:
    """Write the Gaussian heads' squared error on `images` at every timestep into their `variance` (shared by
    all ranks).

    That is the variance with which p(x_i | z_t) conditions on a given value. conditioning: what else the
    network is called with, by name: tensors [N, ...] or lists of them.
    """
    gaussian = [m for m in modalities if m.likelihood == "gaussian" and m.head != "none"]
    if not gaussian:
        return
    was_training = network.training
    network.eval()
    device, diffusion = images.device, modalities.process
    steps = diffusion.num_timesteps
    codes = modalities.constant_codes(network, images[:1])  # the same for every image
    bins = {m.name: th.zeros(2, m.variance_bins, dtype=th.float64, device=device) for m in gaussian}
    for number in range(_PASSES):
        own = range(dist_util.get_rank(), len(images), dist_util.get_world_size())
        for chunk in (th.tensor(own[first : first + 64]) for first in range(0, len(own), 64)):
            random = PerSample((derive_seed(seed, _HELD_OUT, number, int(i)) for i in chunk), device)
            part = images[chunk]
            batch = batch_of(modalities, {k: v[chunk] for k, v in cond.items()})
            batch = derive_values(modalities, part, batch, random)
            # Stratified: every part of the process gets its share, and every image different parts.
            place = (chunk.to(device) / len(images) + number / _PASSES) % 1
            t = ((place + random.rand() / len(images)) % 1 * steps).long()
            encodings = modalities.encode(network, batch, part, codes)
            z = diffusion.q_sample(part, t, random.randn_like(part), encodings)
            shown = {name: value for name, value in batch.values.items() if modalities[name].as_input}
            present = modalities.present_among(encodings, z, batch)
            rows = _rows(conditioning or {}, chunk)
            _, predictions = modalities.apply(network, z, modalities.timesteps(t), shown, rows, present)
            for m in gaussian:
                if m.name not in batch.values:
                    continue
                error = m.loss(predictions[m.name].float(), batch.values[m.name]).double()
                there = batch.present.get(m.name, th.ones_like(t)).to(error)
                index = t * m.variance_bins // steps
                bins[m.name][0].index_add_(0, index, error * there)
                bins[m.name][1].index_add_(0, index, there)
    for m in gaussian:
        if dist_util.get_world_size() > 1:
            dist.all_reduce(bins[m.name])
        network.heads[m.name].variance.copy_(_filled(bins[m.name]))
    network.train(was_training)


def _rows(conditioning, chunk):
    """The samples `chunk` of tensors, or lists of tensors, by name."""
    return {
        name: value[chunk] if isinstance(value, th.Tensor) else [part[chunk] for part in value]
        for name, value in conditioning.items()
    }


def _filled(table):
    """Mean error of every bin; empty ones take the next lower one's."""
    total, count = table
    means = (total / count.clamp(min=1)).tolist()
    known = next((m for m, c in zip(means, count.tolist(), strict=True) if c), 1.0)
    for i, seen in enumerate(count.tolist()):
        known = means[i] = means[i] if seen else known
    return th.tensor(means).clamp(min=1e-6)
