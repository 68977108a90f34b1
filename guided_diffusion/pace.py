"""How fast training goes, what it waits for, and how much memory it takes."""

import contextlib
import time
from collections.abc import Iterator

import torch as th


class Pace:
    """Counts the images and seconds since the last `report`."""

    def __init__(self):
        self._clock = time.perf_counter
        self._first = True
        self._begin()

    def _begin(self):
        self._since, self._waited, self._images, self._steps = self._clock(), 0.0, 0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as waiting for data."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    def step(self, images: int) -> bool:
        """Count a step on so many images of all ranks; returns whether it was the first of all."""
        first, self._first = self._first, False
        self._images += images
        self._steps += 1
        return first

    def report(self, steps_left: int | None = None) -> dict[str, float]:
        """images_per_second, waiting_for_data (share of the time), on a GPU peak_memory_gib, and hours_left where
        the number of steps is known."""
        passed = max(self._clock() - self._since, 1e-9)
        found = {
            "images_per_second": self._images / passed,
            "waiting_for_data": min(1.0, self._waited / passed),
        }
        if th.cuda.is_available():
            found["peak_memory_gib"] = th.cuda.max_memory_allocated() / 2**30
        if steps_left is not None and self._steps:
            found["hours_left"] = steps_left * passed / self._steps / 3600
        self._begin()
        return found

    def peak_memory(self) -> str:
        """The GPU's peak memory so far, of what it has; "" without a GPU."""
        if not th.cuda.is_available():
            return ""
        total = th.cuda.get_device_properties(th.cuda.current_device()).total_memory
        return f"{th.cuda.max_memory_allocated() / 2**30:.1f} GiB of {total / 2**30:.1f} GiB"
