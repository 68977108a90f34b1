"""Random numbers that belong to a sample, not to a batch: the same whatever the batch size, the rank and the
history."""

from collections.abc import Iterable

import numpy as np
import torch as th

from .errors import UserValueError


def derive_seed(*numbers: int) -> int:
    """One 63-bit seed out of several integers in 0..2^64-1; different lists give independent streams."""
    # SeedSequence takes 32-bit words and ignores zeros at the end: the length and words of one width keep
    # lists apart.
    words = [word for n in numbers for word in (int(n) & 0xFFFFFFFF, int(n) >> 32)]
    state = np.random.SeedSequence([len(numbers), *words]).generate_state(2, dtype=np.uint32)
    return (int(state[0]) << 31) ^ int(state[1])


class PerSample:
    """One generator for each sample of a batch. Draws are [B, ...], row k from generator k alone.

    seeds: B integers; device: where the numbers are made (CPU and CUDA streams differ).
    """

    def __init__(self, seeds: Iterable[int], device: th.device | str = "cpu"):
        self.device = th.device(device)
        self._generators = [th.Generator(self.device).manual_seed(int(seed) & (2**63 - 1)) for seed in seeds]

    @classmethod
    def derived(cls, seed: int, indices: Iterable[int], device: th.device | str = "cpu") -> "PerSample":
        """A generator for (seed, index) of every sample index."""
        return cls((derive_seed(seed, index) for index in indices), device)

    def __len__(self):
        return len(self._generators)

    def _stack(self, draw):
        return th.stack([draw(generator) for generator in self._generators])

    def randn(self, shape, dtype=th.float32) -> th.Tensor:
        """Standard normal [B, *shape]."""
        return self._stack(lambda g: th.randn(shape, generator=g, device=self.device, dtype=dtype))

    def randn_like(self, x: th.Tensor) -> th.Tensor:
        """Standard normal, shaped like x [B, ...]; ValueError if B is not the number of generators."""
        if len(x) != len(self):
            raise UserValueError(f"a batch of {len(x)} for {len(self)} generators")
        return self.randn(x.shape[1:], x.dtype).to(x.device)

    def rand(self, *shape: int) -> th.Tensor:
        """Uniform in [0, 1), float64 [B, *shape]."""
        return self._stack(lambda g: th.rand(shape, generator=g, device=self.device, dtype=th.float64))

    def randint(self, high: int, *shape: int) -> th.Tensor:
        """Uniform in 0..high-1, int64 [B, *shape]."""
        return self._stack(lambda g: th.randint(high, shape, generator=g, device=self.device))
