"""How much the terms of equation 6 count in training: by timestep, and against each other.

By timestep: P2 (Choi et al. 2022) and min-SNR (Hang et al. 2023). Against each other: the lambdas, learned log-variances
(Kendall et al. 2018), or gradients without conflicts (PCGrad, Yu et al. 2020). Intervals of t may be tasks of their own
(Go et al. 2023).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch as th
import torch.distributed as dist

from .. import dist_util
from ..errors import UserValueError
from ..gaussian_diffusion import GaussianDiffusion, ModelMeanType
from .modality_set import ModalitySet

RATE = 0.01  # of the log-variances' gradient descent, whose gradient is kept within [-1, 1]
PLAIN = dict(
    loss_weighting="none", task_weighting="fixed", image_weight=1.0, task_intervals=1
)  # equation 6 as it stands


def timestep_weights(
    diffusion: GaussianDiffusion,
    name: str,
    p2_k: float = 1.0,
    p2_gamma: float = 1.0,
    min_snr_gamma: float = 5.0,
) -> th.Tensor:
    """What multiplies the squared error at every timestep, float32 [T]; SNR = abar / (1 - abar).

    Of the noise: p2: 1 / (k + SNR)^gamma; min_snr: min(SNR, gamma) / SNR. An error of x_0 counts SNR times as much, which
    makes it the same loss.
    """
    snr = diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod)
    if name == "none":
        return th.ones(len(snr))
    weights = (p2_k + snr) ** -p2_gamma if name == "p2" else np.minimum(snr, min_snr_gamma) / snr
    if diffusion.model_mean_type is ModelMeanType.START_X:
        weights = weights * snr
    return th.from_numpy(weights).float()


class Weighting:
    """The terms of `multitask_losses` as tasks: `image` (or `image.0`, ... by intervals of t) and every modality with a
    head. flags: those of PLAIN, p2_k, p2_gamma and min_snr_gamma. UserValueError for what cannot be combined."""

    def __init__(self, modalities: ModalitySet, diffusion: GaussianDiffusion, flags: Mapping):
        self.method, self.intervals = flags["task_weighting"], flags["task_intervals"]
        if flags["loss_weighting"] != "none" and diffusion.loss_type.is_vb():
            raise UserValueError(
                "--loss_weighting weighs a squared error: it cannot be used with --use_kl True"
            )
        if self.intervals > 1 and self.method == "fixed":
            raise UserValueError("--task_intervals needs --task_weighting uncertainty or pcgrad")
        options = {name: flags[name] for name in ("p2_k", "p2_gamma", "min_snr_gamma")}
        self.by_time = timestep_weights(diffusion, flags["loss_weighting"], **options)
        self.parts = ["image"] if self.intervals == 1 else [f"image.{k}" for k in range(self.intervals)]
        lambdas = dict.fromkeys(self.parts, flags["image_weight"])
        lambdas |= {m.name: m.loss_weight for m in modalities if m.head != "none"}
        self.lambdas = {name: value for name, value in lambdas.items() if value > 0}
        if not self.lambdas:
            raise UserValueError("--image_weight 0: there is no other loss to train on")
        if self.method != "fixed" and len(self.lambdas) < 2:
            raise UserValueError(f"--task_weighting {self.method} needs two tasks: this model has one")
        self.fixed = th.tensor(list(self.lambdas.values()))
        self.log_variances = th.tensor([-math.log(value) for value in self.lambdas.values()])  # s_i, at first
        self._seen = th.zeros(2, len(self.lambdas))  # of this step: sums of the tasks' losses, and samples

    def to(self, device) -> "Weighting":
        """With its tensors on a device."""
        for name in ("by_time", "fixed", "log_variances", "_seen"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def __call__(self, terms: Mapping[str, th.Tensor], t: th.Tensor) -> list[th.Tensor]:
        """The tasks' losses [B], whose sum is trained on: those of `multitask_losses` at timesteps t [B], weighted."""
        image = terms["loss"]
        if "mse" in terms:
            image = terms["mse"] * self.by_time[t] + terms.get("vb", 0.0)
        else:
            for name, value in self.lambdas.items():
                image = image - value * terms.get(f"KL_{name}", 0.0)
        tasks = {f"KL_{name}": name for name in self.lambdas}
        losses = {name: terms[key] for key, name in tasks.items() if key in terms}
        interval = t * self.intervals // len(self.by_time)
        losses |= {name: image * (interval == k) for k, name in enumerate(self.parts)}
        nothing = th.zeros_like(image)
        losses = th.stack([losses.get(name, nothing) for name in self.lambdas])
        # What is missing has a loss of exactly 0.
        self._seen += th.stack([losses.detach().sum(dim=1), (losses.detach() != 0).float().sum(dim=1)])
        weights = th.exp(-self.log_variances) if self.method == "uncertainty" else self.fixed
        return list(losses * weights[:, None])

    def learn(self) -> None:
        """At the end of a step, on every rank: descend exp(-s_i) L_i + s_i in every s_i. What is not finite is passed over."""
        if self.method == "uncertainty":
            if dist_util.get_world_size() > 1:
                dist.all_reduce(self._seen)
            total, count = self._seen
            gradient = (1 - th.exp(-self.log_variances) * total / count.clamp(min=1)) * (count > 0)
            self.log_variances -= RATE * gradient.nan_to_num(0, 0, 0).clamp(-1, 1)
        self._seen.zero_()


class Surgery:
    """PCGrad: of each task's gradient the parts are removed that point against another's, in random order; then they are
    added. For parameters that tasks share; heads keep their own gradient. Holds one gradient for every task."""

    def __init__(self, network: th.nn.Module):
        named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        named.sort(key=lambda pair: pair[0].startswith("heads."))
        self.parameters = [p for _, p in named]
        self.shared = sum(p.numel() for name, p in named if not name.startswith("heads."))
        self.touched: set[int] = set()
        self.gradients: th.Tensor | None = None  # [tasks, parameters]

    def add(self, losses: Sequence[th.Tensor]) -> None:
        """The gradients of a microbatch's tasks, scalars each."""
        rows = []
        for loss in losses:
            found = (
                th.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True)
                if loss.requires_grad
                else [None] * len(self.parameters)
            )
            self.touched |= {k for k, g in enumerate(found) if g is not None}
            pairs = zip(found, self.parameters, strict=True)
            rows.append(th.cat([(th.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
        rows = th.stack(rows)
        self.gradients = rows if self.gradients is None else self.gradients + rows

    def finish(self, seed: int) -> None:
        """Leave the combined gradient, the mean over the ranks, in the parameters. seed: of the order, the same everywhere."""
        gradients, self.gradients = self.gradients, None
        if dist_util.get_world_size() > 1:
            dist.all_reduce(gradients)
            gradients /= dist_util.get_world_size()
        shared = gradients[:, : self.shared]
        combined = without_conflicts(shared @ shared.T, th.Generator().manual_seed(seed)) @ shared
        combined = th.cat([combined, gradients[:, self.shared :].sum(dim=0)])
        parts = combined.split([p.numel() for p in self.parameters])
        for k, (parameter, part) in enumerate(zip(self.parameters, parts, strict=True)):
            parameter.grad = part.view_as(parameter).clone() if k in self.touched else None
        self.touched.clear()


def without_conflicts(gram: th.Tensor, generator: th.Generator) -> th.Tensor:
    """How often each of N gradients with the inner products `gram` [N, N] counts in PCGrad's sum, [N]."""
    count = len(gram)
    rows = th.eye(count, dtype=gram.dtype, device=gram.device)
    for i in range(count):
        for j in th.randperm(count, generator=generator).tolist():
            if j != i:  # project where the inner product is negative
                rows[i, j] -= (rows[i] @ gram[:, j]).clamp(max=0) / gram[j, j].clamp(min=1e-30)
    return rows.sum(dim=0)
