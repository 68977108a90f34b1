"""Scores during training: a callback that draws samples, compares them with a reference and records the result.

    evaluation = EvaluationCallback("ref.npz", sample, every=10_000, num_samples=2048, log_dir="runs/1")
    for step in range(1, steps + 1):
        ...
        evaluation(step)

`sample(count, seed)` returns `count` uint8 images [count, H, W, 3], the k-th of them drawn from `seed` + k. With
several ranks every rank calls the callback and draws its share of the samples.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from evaluations import distributed
from evaluations.evaluator import Activations, Evaluation, activations, evaluate, given_statistics
from evaluations.features import BATCH_SIZE
from evaluations.images import check_array, open_images
from evaluations.inception import Inception, load_inception
from guided_diffusion.errors import UserValueError

RECORD = "evaluations.jsonl"  # one line per evaluation, in the log folder
SCORES = ("inception_score", "fid", "sfid", "precision", "recall")


class EvaluationCallback:
    """Call it after every training step; it works on every `every`-th.

    The reference's features are computed once. Rank 0 appends each result to `evaluations.jsonl` in `log_dir` and to
    TensorBoard as evaluation/fid and so on. The training's random state is left as it was. Raises UserError:
    about the reference or the weights at once, before any training; about the samples when they are drawn.
    """

    def __init__(
        self,
        reference: str | Path,
        sample: Callable[[int, int], np.ndarray | torch.Tensor],
        *,
        every: int,  # steps
        num_samples: int,
        log_dir: str | Path,
        network: Inception | None = None,  # the official weights by default
        batch_size: int = BATCH_SIZE,  # images per step of the network
        seed: int = 0,  # of the first sample
    ):
        self._images, self._given = open_images(reference), given_statistics(reference)
        self._network = network or load_inception()
        self._sample, self._every, self._count, self._seed = sample, every, num_samples, seed
        self._batch_size, self._log_dir = batch_size, Path(log_dir)
        self._reference: Activations | None = None

    def __call__(self, step: int) -> Evaluation | None:
        """The scores after `step` on rank 0; None on other ranks and after steps that are not evaluated."""
        if step % self._every or step == 0:
            return None
        samples = activations(self._draw(), self._network, batch_size=self._batch_size, progress=False)
        if self._reference is None:
            self._reference = activations(
                self._images, self._network, self._given, self._batch_size, progress=False
            )
        if samples is None or self._reference is None:
            return None
        result = evaluate(self._reference, samples, self._network, seed=self._seed)
        self._record(step, result)
        return result

    def _draw(self) -> "_Share":
        start, stop = distributed.share(self._count)
        gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=gpus):
            drawn = self._sample(stop - start, self._seed + start)
        if isinstance(drawn, torch.Tensor):
            drawn = drawn.cpu().numpy()
        check_array(drawn.shape, drawn.dtype, "the sampler's result", lambda: [drawn])
        if len(drawn) != stop - start:
            raise UserValueError(f"the sampler returned {len(drawn)} images, {stop - start} were asked for")
        return _Share(drawn, start, self._count)

    def _record(self, step: int, result: Evaluation) -> None:
        self._log_dir.mkdir(parents=True, exist_ok=True)
        with open(self._log_dir / RECORD, "a") as file:
            file.write(json.dumps({"step": step, **asdict(result)}) + "\n")
        with SummaryWriter(self._log_dir) as writer:
            for name in SCORES:
                writer.add_scalar(f"evaluation/{name}", getattr(result, name), step)


class _Share:
    """The samples that this rank drew, as its share of all of them."""

    name = "samples"

    def __init__(self, array: np.ndarray, start: int, count: int):
        self._array, self._start = array, start
        self.shape = (count, *array.shape[1:])

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        for first in range(start - self._start, stop - self._start, size):
            yield self._array[first : min(first + size, stop - self._start)]
