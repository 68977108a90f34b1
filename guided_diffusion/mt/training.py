"""Training of several modalities: ADM's loop with the loss of equation 6 (paper section 2.2.5)."""

import contextlib
import math
from collections.abc import Callable, Mapping

import torch as th
import torch.distributed as dist

from .. import dist_util, logger
from ..checkpoint_util import rng_state, set_rng_state
from ..seeding import PerSample, derive_seed
from ..train_util import TrainLoop
from .modality_set import ModalitySet, batch_of, derive_values
from .model import JointModel
from .weighting import Surgery, Weighting

# Streams of random numbers beside the loop's own; 4 is evaluation.py's.
_DATA, _HELD_OUT, _SINGLE_TASK, _SURGERY = 1, 2, 3, 5
_PASSES = 2  # over the held-out images, to measure the heads
_CODE_COST = 0.05  # of a step's time, which refreshing the codes may take
_BACKWARD = 2  # forward passes that a backward pass costs


class JointTrainLoop(TrainLoop):
    """TrainLoop for a `JointModel`; a seed is required.

    held_out: (images [N, C, H, W] in [-1, 1], dict of tensors [N]) that training does not see; before every
    save, the heads' squared errors on them become the heads' `variance`. With the model's
    single_task_probability a sample's modalities all count as missing, so that the network learns the image alone
    beside the joint model (M*, E*). Codes of labels are refreshed at steps 0, 1, 2, 4, ... and every code_interval.
    weighting: of the tasks; None: equation 6 as it stands.
    on_eval(loop) measures the averaged weights after every eval_every-th step; what it returns is logged under eval/.
    Everything else as in TrainLoop.
    """

    def __init__(
        self,
        *,
        model: JointModel,
        held_out: tuple[th.Tensor, dict] | None = None,
        eval_every: int = 0,
        on_eval: Callable[["JointTrainLoop"], dict[str, float]] | None = None,
        weighting: Weighting | None = None,
        **kwargs,
    ):
        self.weighting = weighting and weighting.to(dist_util.dev())
        self.surgery = Surgery(model.network) if weighting and weighting.method == "pcgrad" else None
        self.joint, self.modalities, self.held_out = model, model.modalities, held_out
        self.eval_every, self.on_eval = eval_every, on_eval
        super().__init__(model=model.network, diffusion=model.diffusion, **kwargs)
        if kwargs.get("compile"):  # the network's own forward does not reach these
            for m in self.modalities:
                if m.head == "classifier":
                    self.model.heads[m.name].compile()
        self.use_ddp = self.use_ddp and self.surgery is None
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
        terms = losses.terms
        if self.weighting is not None:
            self._tasks = self.weighting(terms, t)
            terms = {**terms, "loss": sum(self._tasks)}
        return terms, t, weights

    def forward_backward(self, batch, cond):
        """See TrainLoop."""
        super().forward_backward(batch, cond)
        if self.surgery is not None:
            self.surgery.finish(derive_seed(self.seed, _SURGERY, self.step + self.resume_step))
        if self.weighting is not None:
            self.weighting.learn()

    def backward(self, losses, weights, share):
        """See TrainLoop; where gradients are combined, they wait for the whole batch."""
        if self.surgery is None:
            super().backward(losses, weights, share)
        else:
            self.surgery.add([(task * weights).mean() * share for task in self._tasks])

    def _distribute(self, find_unused_parameters):
        return self.model if self.surgery is not None else super()._distribute(find_unused_parameters)

    def extra_state(self):
        """See TrainLoop."""
        if self.weighting is None or self.weighting.method != "uncertainty":
            return {}
        return {
            "log_variances": dict(
                zip(self.weighting.lambdas, self.weighting.log_variances.tolist(), strict=True)
            )
        }

    def load_extra_state(self, state):
        """See TrainLoop."""
        for k, name in enumerate(self.weighting.lambdas if self.weighting is not None else ()):
            if name in state.get("log_variances", {}):
                self.weighting.log_variances[k] = state["log_variances"][name]

    def log_step(self):
        """See TrainLoop; also evaluates where that is due."""
        super().log_step()
        if not self.step % self.log_interval:
            for name, value in self.extra_state().get("log_variances", {}).items():
                logger.logkv(f"log_variance_{name}", value)
        done = self.step + self.resume_step + 1
        if self.on_eval is not None and self.eval_every and done % self.eval_every == 0:
            kept = rng_state()
            with self.ema_weights():
                found = self.on_eval(self)
            self.model.train()
            set_rng_state(kept)
            logger.logkvs({f"eval/{name}": value for name, value in found.items()})
            if found:
                logger.log(
                    f"after {done} steps: "
                    + ", ".join(f"{k} {v:.4g}" for k, v in found.items() if k[-3:-1] != "_q")
                )

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
    """Measure the Gaussian heads' errors on `images` at every timestep, on all ranks together: heads.Heads says what.

    With that p(x_i | z_t) conditions on given values. conditioning: what else the network is called with, by name:
    tensors [N, ...] or lists of them.
    """
    gaussian = [m for m in modalities if m.likelihood == "gaussian" and m.head != "none"]
    if not gaussian:
        return
    was_training = network.training
    network.eval()
    device, diffusion = images.device, modalities.process
    steps = diffusion.num_timesteps
    codes = modalities.constant_codes(network, images[:1])  # the same for every image
    errors = {m.name: _Errors(m, gaussian, device) for m in gaussian}
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
            residuals = {}
            for m in (m for m in gaussian if m.name in batch.values):
                there = batch.present.get(m.name, th.ones_like(t)).to(part)[:, None]
                residuals[m.name] = (predictions[m.name].float() - batch.values[m.name]).flatten(1) * there
            for name in residuals:
                there = batch.present.get(name, th.ones_like(t)).bool()
                index = t[there] * modalities[name].variance_bins // steps
                errors[name].add(index, {other: r[there] for other, r in residuals.items()})
    for m in gaussian:
        errors[m.name].write(network.heads[m.name])
    network.train(was_training)


def _rows(conditioning, chunk):
    """The samples `chunk` of tensors, or lists of tensors, by name."""
    return {
        name: value[chunk] if isinstance(value, th.Tensor) else [part[chunk] for part in value]
        for name, value in conditioning.items()
    }


class _Errors:
    """Moments of one Gaussian head's errors, by the bins of its timesteps."""

    near = 2  # bins between samples that are compared

    def __init__(self, modality, gaussian, device):
        self.name, self.others = modality.name, [m.name for m in gaussian]
        self.alike = [m.name for m in gaussian if m.shape == modality.shape]
        self.bins, self.size = modality.variance_bins, math.prod(modality.shape)
        # Columns: samples, and for each head its squared error and its product with this one's.
        self.sums = th.zeros(self.bins, 1 + 2 * len(gaussian), dtype=th.float64, device=device)
        # Of pairs of samples: squared products, and how many.
        self.pairs = th.zeros(2, self.bins * self.bins, dtype=th.float64, device=device)

    def add(self, index, residuals):
        """Errors [B, n] of all heads, by name, in the bins `index` [B]."""
        own, columns = residuals[self.name].double(), [th.ones(len(index), device=index.device)]
        for name in self.others:
            other = residuals.get(name, residuals[self.name] * 0).double()
            product = (own * other).mean(1) if name in self.alike else 0 * columns[0]
            columns += [other.square().mean(1), product]
        self.sums.index_add_(0, index, th.stack([c.double() for c in columns], dim=1))
        gram, place = (own @ own.T).square(), index[:, None] * self.bins + index
        apart = (index[:, None] - index).abs() <= self.near
        apart &= ~th.eye(len(index), dtype=th.bool, device=index.device)
        self.pairs[0].index_add_(0, place[apart], gram[apart])
        self.pairs[1].index_add_(0, place[apart], th.ones_like(gram[apart]))

    def write(self, head):
        """Into the head's buffers."""
        if dist_util.get_world_size() > 1:
            dist.all_reduce(self.sums)
            dist.all_reduce(self.pairs)
        count, columns = self.sums[:, 0], self.sums[:, 1:].unflatten(1, (-1, 2))
        k = self.others.index(self.name)
        variance = _filled(columns[:, k, 0], count).clamp(min=1e-6)
        head.variance.copy_(variance)
        if not hasattr(head, "share"):
            return
        scale = (columns[:, k, :1] * columns[:, :, 0]).clamp(min=1e-30).sqrt()
        for j, _ in enumerate(self.others):
            head.correlation[:, j] = _filled(columns[:, j, 1] / scale[:, j] * count, count).clamp(-1, 1)
        head.share.copy_(self._share(variance))

    def _share(self, variance):
        """n_eff / n = trace(S)^2 / (n trace(S^2)), S the covariance of the dimensions' errors: for two samples r and
        r' the mean of (r r')^2 is trace(S^2)."""
        squares, count = self.pairs.unflatten(1, (self.bins, self.bins))
        squares = squares / (variance[:, None] * variance).to(squares) / self.size
        window = [slice(max(k - self.near, 0), k + self.near + 1) for k in range(self.bins)]
        count, squares = (th.stack([x[w, w].sum() for w in window]) for x in (count, squares))
        inverse = _filled(squares, count)
        return (1 / inverse.clamp(min=1e-30)).clamp(1 / self.size, 1)


def _filled(total, count):
    """The means of every bin; empty ones take the next lower one's."""
    means = (total / count.clamp(min=1)).tolist()
    known = next((m for m, c in zip(means, count.tolist(), strict=True) if c), 1.0)
    for i, seen in enumerate(count.tolist()):
        known = means[i] = means[i] if seen else known
    return th.tensor(means, device=total.device)
