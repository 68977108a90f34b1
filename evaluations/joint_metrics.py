"""What joint.py computes of pairs (image, partner): pure functions of features, labels and maps."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluations.frechet import frechet_distance
from evaluations.segmentation import Confusion
from guided_diffusion.errors import UserValueError
from guided_diffusion.palettes import Palette, to_indices

MASK_VALUE = 127.5  # 0 in [-1, 1]: what masked pixels hold
MASK_TOLERANCE = 12  # of 255: generated grey is never exact
REGROUPINGS = 5
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # strengths tried for the linear classifier
HELD_OUT = 5  # every fifth reference image


def joint_frechet(reference: tuple[Tensor, Tensor], samples: tuple[Tensor, Tensor], scale: float) -> float:
    """Frechet distance of concatenated features: images' [N, D] and partners' [N, E] times `scale`."""
    return frechet_distance(_beside(*reference, scale), _beside(*samples, scale))


def partner_scale(pool: Tensor, partner: Tensor) -> float:
    """FJD's weight of the partner: makes both halves equally long on average over the reference (their alpha)."""
    length = partner.double().norm(dim=1).mean()
    return float(pool.double().norm(dim=1).mean() / length) if length > 0 else 1.0


def _beside(pool: Tensor, partner: Tensor, scale: float) -> Tensor:
    return torch.cat([pool.double(), partner.double() * scale], 1)


def label_agreement(generated: np.ndarray, found: np.ndarray) -> float:
    """Share of pairs whose `generated` label is the one `found` in the image, both [N]; -1 is left out."""
    if generated.shape != found.shape:
        raise UserValueError(f"{len(generated)} generated labels, but {len(found)} found ones")
    known = generated >= 0
    if not known.any():
        raise UserValueError("no generated label is known (all are -1)")
    return float((generated[known] == found[known]).mean())


@dataclass(frozen=True)
class LinearClassifier:
    """Least squares on standardised features: one target per class."""

    mean: Tensor  # [D]
    deviation: Tensor  # [D]
    weight: Tensor  # [D + 1, classes]
    classes: np.ndarray  # the label of each output
    accuracy: float  # on references left out of the fit

    def predict(self, features: Tensor) -> np.ndarray:
        """Labels [N] of features [N, D]."""
        return self.classes[(_design(features, self.mean, self.deviation) @ self.weight).argmax(1).numpy()]


def fit_classifier(features: Tensor, labels: np.ndarray) -> LinearClassifier:
    """Classifier for `labels` [N] from `features` [N, D]; its ridge is the one that does best on every fifth image."""
    known = labels >= 0
    classes, targets = np.unique(labels[known], return_inverse=True)
    if len(classes) < 2 or known.sum() < 2 * HELD_OUT:
        raise UserValueError(
            "a classifier needs references of at least two classes: give labels with --predicted"
        )
    features = features[torch.from_numpy(known)]
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(targets), len(classes)).double()
    held_out = torch.arange(len(features)) % HELD_OUT == 0
    mean, deviation = features.double().mean(0), features.double().std(0).clamp(min=1e-6)
    x = _design(features, mean, deviation)

    def solve(rows: Tensor, ridge: float) -> Tensor:
        gram = x[rows].T @ x[rows]
        gram.diagonal().add_(ridge * len(rows))
        return torch.linalg.solve(gram, x[rows].T @ one_hot[rows])

    def accuracy(ridge: float) -> float:
        scores = x[held_out] @ solve((~held_out).nonzero()[:, 0], ridge)
        return (scores.argmax(1) == one_hot[held_out].argmax(1)).double().mean().item()

    accuracies = {ridge: accuracy(ridge) for ridge in RIDGES}
    best = max(accuracies, key=accuracies.get)
    return LinearClassifier(mean, deviation, solve(torch.arange(len(x)), best), classes, accuracies[best])


def _design(features: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    x = (features.double() - mean) / deviation
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)


def masked_pair_miou(images: np.ndarray, masked: np.ndarray, tolerance: int = MASK_TOLERANCE) -> float:
    """How well masked copies fit their images, both uint8 [N, H, W, 3]: mean IoU of masked and of visible pixels.

    A pixel is masked where the copy is grey within `tolerance` of 255. It should be where the copy differs from the
    image by more than that, and nowhere else; pixels where the image itself is grey tell nothing and do not count.
    """
    if images.shape != masked.shape:
        raise UserValueError(f"images are {list(images.shape)}, masked copies {list(masked.shape)}")
    intersection, union = np.zeros(2), np.zeros(2)
    for image, copy in zip(images.astype(np.float32), masked.astype(np.float32), strict=True):
        grey = (np.abs(copy - MASK_VALUE) <= tolerance).all(-1)
        differs = (np.abs(copy - image) > tolerance).any(-1)
        telling = ~(np.abs(image - MASK_VALUE) <= 2 * tolerance).all(-1)
        for index, (a, b) in enumerate(((grey, differs), (~grey, ~differs))):
            intersection[index] += (a & b & telling).sum()
            union[index] += ((a | b) & telling).sum()
    present = union > 0
    return float((intersection[present] / union[present]).mean()) if present.any() else 1.0


def map_pair_miou(generated: np.ndarray, found: np.ndarray, palette: Palette) -> float:
    """Class IoU of generated segmentation maps against those `found` in the images (indices or colours, [N, ...])."""
    if len(generated) != len(found):
        raise UserValueError(f"{len(generated)} generated maps, but {len(found)} found ones")
    confusion = Confusion(palette)
    for one, other in zip(found, generated, strict=True):
        confusion.add(to_indices(one, palette)[None], to_indices(other, palette)[None])
    return confusion.scores().class_iou


def regrouped_frechet(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], scale: float, seed: int = 0
) -> float:
    """What their joint Frechet distance would be if both sets came from one distribution: the mean over random
    divisions of all pairs into two sets of the same sizes."""
    everything = torch.cat([_beside(*first, scale), _beside(*second, scale)])
    random = torch.Generator().manual_seed(seed)
    n = len(first[0])
    distances = []
    for _ in range(REGROUPINGS):
        order = torch.randperm(len(everything), generator=random)
        distances.append(frechet_distance(everything[order[:n]], everything[order[n:]]))
    return float(np.mean(distances))
