"""Factors of the learning rate by step, for LambdaLR (interface: latent-diffusion, ldm/lr_scheduler.py)."""

import logging
import math
from collections.abc import Sequence

from guided_diffusion.errors import UserValueError

_logger = logging.getLogger(__name__)


class _Schedule:
    """A function of the step, that is logged every verbosity_interval steps (0: never)."""

    def __init__(self, verbosity_interval: int):
        self.verbosity_interval = verbosity_interval

    def factor(self, n: int) -> float:
        """The factor at step n."""
        raise NotImplementedError

    def schedule(self, n: int, **kwargs) -> float:
        """The factor at step n, from 0 on."""
        factor = self.factor(n)
        if self.verbosity_interval and n % self.verbosity_interval == 0:
            _logger.info("step %d: learning-rate factor %.4g", n, factor)
        return factor

    __call__ = schedule


def _cosine(low, high, progress):
    """From `high` at progress 0 to `low` at 1 and beyond."""
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * min(progress, 1.0)))


class LambdaWarmUpCosineScheduler(_Schedule):
    """Linear from lr_start to lr_max in warm_up_steps, then half a cosine down to lr_min at max_decay_steps.

    With a base learning rate of 1 these are rates, else factors.
    """

    def __init__(self, warm_up_steps, lr_min, lr_max, lr_start, max_decay_steps, verbosity_interval=0):
        super().__init__(verbosity_interval)
        if warm_up_steps >= max_decay_steps:
            raise UserValueError(
                f"the warm-up of {warm_up_steps} steps must end before max_decay_steps, {max_decay_steps}"
            )
        self.warm_up_steps, self.max_decay_steps = warm_up_steps, max_decay_steps
        self.lr_start, self.lr_max, self.lr_min = lr_start, lr_max, lr_min

    def factor(self, n):
        if n < self.warm_up_steps:
            return self.lr_start + (self.lr_max - self.lr_start) * n / self.warm_up_steps
        progress = (n - self.warm_up_steps) / (self.max_decay_steps - self.warm_up_steps)
        return _cosine(self.lr_min, self.lr_max, progress)


class LambdaWarmUpCosineScheduler2(_Schedule):
    """Cycles, each linear from f_start to f_max and then half a cosine down to f_min; the last value stays.

    All arguments but verbosity_interval are lists with an entry per cycle; cycle_lengths count steps, warm-up
    included. UserValueError for lists of different lengths, or a warm-up longer than its cycle.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ):
        super().__init__(verbosity_interval)
        cycles = (warm_up_steps, f_min, f_max, f_start, cycle_lengths)
        if len({len(values) for values in cycles}) != 1 or not len(cycle_lengths):
            raise UserValueError("a schedule of cycles needs lists of one length, an entry per cycle")
        if any(warm > length for warm, length in zip(warm_up_steps, cycle_lengths, strict=True)):
            raise UserValueError(
                f"warm_up_steps {list(warm_up_steps)} exceed cycle_lengths {list(cycle_lengths)}"
            )
        self.cycles = list(zip(*cycles, strict=True))

    def factor(self, n):
        for number, (warm, low, high, start, length) in enumerate(self.cycles):
            # The last step of a cycle is n = its length, as in upstream.
            if n <= length or number == len(self.cycles) - 1:
                if n < warm:
                    return start + (high - start) * n / warm
                return self.decay(low, high, n, warm, length)
            n -= length
        raise AssertionError("unreachable: the last cycle has no end")

    @staticmethod
    def decay(low: float, high: float, n: int, warm: int, length: int) -> float:
        """The factor at step n of a cycle after its warm-up."""
        return _cosine(low, high, (n - warm) / max(length - warm, 1))


class LambdaLinearScheduler(LambdaWarmUpCosineScheduler2):
    """As LambdaWarmUpCosineScheduler2, but f_min + (f_max - f_min) (length - n) / length after the warm-up,
    not below f_min."""

    @staticmethod
    def decay(low, high, n, warm, length):
        return low + (high - low) * max(length - n, 0) / length
