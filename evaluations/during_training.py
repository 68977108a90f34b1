"""Scores of a training's samples by a judge of judge.py, or by the Inception network."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from evaluations.frechet import frechet_distance
from evaluations.inception import load_inception
from evaluations.joint_metrics import label_agreement
from evaluations.judge import inspect, load_judge
from evaluations.precision_recall import NEIGHBOURS, precision_recall
from guided_diffusion import image_files
from guided_diffusion.errors import UserValueError

INCEPTION = "inception"
_BATCH = 64


def open_judge(source: str, device, class_names: list[str] | None = None) -> Callable:
    """A function (images, samples, labels or None) -> Frechet distance, precision, recall and, by a judge's file, the share
    of samples that it gives their label. images, samples: uint8 [N, H, W, C], 1 or 3 channels.

    source: a file of `judge.py train`, or `inception`. class_names: of the labels. The features of `images` are computed
    once. UserError for other files.
    """
    reads, classify = _inception(device) if source == INCEPTION else _judge(source, device)
    names = None if classify is None else classify.class_names
    known: dict[int, Tensor] = {}

    def score(images: np.ndarray, samples: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        if min(len(images), len(samples)) <= NEIGHBOURS:
            raise UserValueError(
                f"--eval_judge needs more than {NEIGHBOURS} held-out images and samples, there are {len(images)} and "
                f"{len(samples)}: give --val_data_dir, or a larger --held_out"
            )
        if id(images) not in known:
            known.clear()
            known[id(images)] = reads(_rgb(images))[0]
        features, probabilities = reads(_rgb(samples))
        manifold = precision_recall(known[id(images)], features)
        found = {
            "frechet": frechet_distance(known[id(images)], features),
            "precision": manifold.precision,
            "recall": manifold.recall,
        }
        if labels is not None and probabilities is not None:
            if names and class_names:
                labels = image_files.renumber(labels, class_names, names, "the data")
            found["label_agreement"] = label_agreement(labels, probabilities.argmax(1).numpy())
        return found

    return score


def _judge(source, device):
    judge, _ = load_judge(source)
    judge.to(device)
    return (lambda images: inspect(judge, images, device)), judge


def _inception(device):
    network = load_inception()

    @torch.no_grad()
    def reads(images):
        parts = (images[first : first + _BATCH] for first in range(0, len(images), _BATCH))
        return torch.cat(
            [network(torch.from_numpy(np.ascontiguousarray(part))).pool.cpu() for part in parts]
        ), None

    return reads, None


def _rgb(images: np.ndarray) -> np.ndarray:
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images[..., :3]
