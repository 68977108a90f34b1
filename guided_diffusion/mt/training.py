"""Training of several modalities: ADM's loop with the loss of equation 6 (paper section 3.4)."""

import contextlib
from collections.abc import Mapping

import torch as th
import torch.distributed as dist

from .. import dist_util
from ..seeding import PerSample, derive_seed
from ..train_util import TrainLoop
from .modalities import one_hot
from .modality_set import Batch, MultiTask, derive_values, multitask_losses

# Streams of random numbers beside the loop's own.
_DATA, _HELD_OUT, _SINGLE_TASK = 1, 2, 3
_PASSES = 2  # over the held-out images, to measure the heads


class MultiTaskTrainLoop(TrainLoop):
    """TrainLoop for a network of `tasks`; a seed is required.

    held_out: (images [N, C, H, W] in [-1, 1], dict of tensors [N]) that training does not see; before every
    save, the heads' squared errors on them become the heads' `variance`. single_task_probability: with it a
    sample's modalities all count as missing, so that the network learns the image alone beside the joint
    model (M*, E*). Everything else as in TrainLoop.
    """

    def __init__(
        self,
        *,
        tasks: MultiTask,
        held_out: tuple[th.Tensor, dict] | None = None,
        single_task_probability: float = 0.0,
        **kwargs,
    ):
        self.tasks, self.held_out = tasks, held_out
        self.single_task_probability = single_task_probability
        super().__init__(**kwargs)

    def compute_losses(self, micro, micro_cond):
        """Equation 6 on a microbatch; see TrainLoop.compute_losses."""
        t, weights = self.sample_timesteps(len(micro))
        random = self.sample_random(len(micro), _DATA, micro.device)
        batch = derive_values(self.tasks, micro, batch_of(self.tasks, micro_cond), random)
        if self.single_task_probability:
            alone = self.sample_random(len(micro), _SINGLE_TASK, micro.device).rand()
            batch = batch.only(alone >= self.single_task_probability)
        noise = self.sample_noise(micro)
        with self.autocast():
            losses = multitask_losses(
                self.diffusion,
                self.tasks,
                self.ddp_model,
                micro,
                batch,
                t,
                noise,
                random,
                encoder=self.model,
            )
        return losses, t, weights

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
                measure_variance(self.diffusion, self.tasks, self.model, *self.held_out, seed=self.seed)
        super().save()


@th.no_grad()
def _copy(target, source):
    for parameter, value in zip(target, source, strict=True):
        parameter.copy_(value)


def batch_of(tasks: MultiTask, cond: dict[str, th.Tensor]) -> Batch:
    """The modalities' values that the data bring: a label under `y` (int64, -1 for none), others under their
    names."""
    values, present = {}, {}
    for m in tasks:
        if m.kind == "label" and "y" in cond:
            values[m.name] = one_hot(cond["y"], m.shape[0])
            present[m.name] = cond["y"] >= 0
        elif m.name in cond:
            values[m.name] = m.check(cond[m.name])
    return Batch(values, present)


@th.no_grad()
def measure_variance(
    diffusion,
    tasks: MultiTask,
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
    gaussian = [m for m in tasks if m.likelihood == "gaussian"]
    if not gaussian:
        return
    was_training = network.training
    network.eval()
    device, steps = images.device, diffusion.num_timesteps
    # The same for every image, and a forward pass for every class.
    codes = {m.name: tasks.constant_codes(network, m, images[:1]) for m in tasks if m.encoder == "unet"}
    bins = {m.name: th.zeros(2, m.variance_bins, dtype=th.float64, device=device) for m in gaussian}
    for number in range(_PASSES):
        own = range(dist_util.get_rank(), len(images), dist_util.get_world_size())
        for chunk in (th.tensor(own[first : first + 64]) for first in range(0, len(own), 64)):
            random = PerSample((derive_seed(seed, _HELD_OUT, number, int(i)) for i in chunk), device)
            part = images[chunk]
            batch = batch_of(tasks, {k: v[chunk] for k, v in cond.items()})
            batch = derive_values(tasks, part, batch, random)
            # Stratified: every part of the process gets its share, and every image different parts.
            place = (chunk.to(device) / len(images) + number / _PASSES) % 1
            t = ((place + random.rand() / len(images)) % 1 * steps).long()
            encodings = tasks.encode(network, batch, part, codes)
            z = diffusion.q_sample(part, t, random.randn_like(part), encodings)
            shown = {name: value for name, value in batch.values.items() if tasks[name].as_input}
            _, predictions = tasks.apply(
                network, z, tasks.timesteps(t), shown, _rows(conditioning or {}, chunk)
            )
            for m in gaussian:
                error = m.loss(predictions[m.name].float(), batch.values[m.name]).double()
                index = t * m.variance_bins // steps
                bins[m.name][0].index_add_(0, index, error)
                bins[m.name][1].index_add_(0, index, th.ones_like(error))
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
