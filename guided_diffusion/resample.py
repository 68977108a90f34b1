"""Which timesteps to train on (upstream: guided_diffusion/resample.py)."""

from abc import ABC, abstractmethod

import numpy as np
import torch as th
import torch.distributed as dist


def create_named_schedule_sampler(name, diffusion):
    """`uniform` or `loss-second-moment`, for the timesteps of `diffusion`; NotImplementedError for other
    names."""
    samplers = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}
    if name not in samplers:
        raise NotImplementedError(f"unknown schedule sampler {name!r}: choose one of {', '.join(samplers)}")
    return samplers[name](diffusion)


class ScheduleSampler(ABC):
    """A distribution over timesteps with importance weights that keep the mean loss unbiased."""

    @abstractmethod
    def weights(self):
        """Positive numpy weights, one per timestep; they need not sum to one."""

    def sample(self, batch_size, device):
        """Draw timesteps with NumPy's global generator: (t int64 [B], weights float32 [B]), both on `device`."""
        p = np.asarray(self.weights(), dtype=np.float64)
        p = p / p.sum()
        drawn = np.random.choice(len(p), size=(batch_size,), p=p)
        return th.from_numpy(drawn).long().to(device), self.importance(p, drawn).to(device)

    @staticmethod
    def importance(p, drawn):
        """1 / (T p_t) for each drawn timestep: float32 [B]."""
        return th.from_numpy(1.0 / (len(p) * p[drawn])).float()


class UniformSampler(ScheduleSampler):
    """Every timestep alike."""

    def __init__(self, diffusion):
        self.diffusion = diffusion

    def weights(self):
        return np.ones(self.diffusion.num_timesteps)


class LossAwareSampler(ScheduleSampler):
    """A sampler that learns from the losses of all ranks."""

    def update_with_local_losses(self, local_ts, local_losses):
        """Share this rank's timesteps [b] and losses [b] with all ranks, then update; b may differ by rank.

        Every rank ends with the same state, since all see the same samples in the same order.
        """
        pairs = [(local_ts.tolist(), local_losses.detach().float().tolist())]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, pairs[0])
            pairs = gathered
        self.update_with_all_losses(
            [t for ts, _ in pairs for t in ts],
            [loss for _, losses in pairs for loss in losses],
        )

    @abstractmethod
    def update_with_all_losses(self, ts, losses):
        """Update from lists of timesteps and losses, the same on every rank; must be deterministic."""


class LossSecondMomentResampler(LossAwareSampler):
    """Weight each timestep by the root mean square of its latest losses (Nichol & Dhariwal 2021, section
    3.3)."""

    def __init__(self, diffusion, history_per_term=10, uniform_prob=0.001):
        self.diffusion = diffusion
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._loss_history = np.zeros([diffusion.num_timesteps, history_per_term], dtype=np.float64)
        self._loss_counts = np.zeros([diffusion.num_timesteps], dtype=np.int64)

    def weights(self):
        steps = len(self._loss_counts)
        if not self._warmed_up():
            return np.ones([steps], dtype=np.float64)
        rms = np.sqrt(np.square(self._loss_history).mean(axis=-1))
        return rms / rms.sum() * (1 - self.uniform_prob) + self.uniform_prob / steps

    def update_with_all_losses(self, ts, losses):
        for t, loss in zip(ts, losses, strict=True):
            filled = self._loss_counts[t]
            if filled < self.history_per_term:
                self._loss_history[t, filled] = loss
                self._loss_counts[t] += 1
            else:
                # Oldest first: the row is a queue of fixed length.
                self._loss_history[t] = np.append(self._loss_history[t, 1:], loss)

    def _warmed_up(self):
        return bool((self._loss_counts == self.history_per_term).all())

    def state_dict(self):
        """What resuming needs, as tensors."""
        return {"history": th.from_numpy(self._loss_history), "counts": th.from_numpy(self._loss_counts)}

    def load_state_dict(self, state):
        """Continue from `state_dict()`; ValueError if it belongs to another number of timesteps."""
        if tuple(state["history"].shape) != self._loss_history.shape:
            raise ValueError(
                f"the saved loss history is {tuple(state['history'].shape)}, this diffusion needs {self._loss_history.shape}"
            )
        self._loss_history = state["history"].numpy().copy()
        self._loss_counts = state["counts"].numpy().copy()
