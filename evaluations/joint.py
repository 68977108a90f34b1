"""Metrics of jointly generated pairs: an image, and its label, segmentation map, masked copy or representation.

    python evaluations/joint.py ref.npz samples.npz
    python evaluations/joint.py ref.npz samples.npz --modality arr_1 --conditional conditional.npz --json joint.json
    python evaluations/joint.py ref.npz samples.npz --modality maps --palette cityscapes --predicted segmenter.npz

Images stand under arr_0, the other half of each pair under --modality: labels, integers [N] or probabilities
[N, C]; maps of class numbers, integers [N, H, W]; images, uint8 [N, H, W, 3], or maps of colours with --palette;
representations, floats [N, D]. Prints the joint Frechet distance, how often labels agree, the mIoU of maps or masks,
and with --conditional how far pairs drawn jointly are from images drawn for given partners: see docs/evaluation.md.
"""

from evaluations.arguments import add_json_option, add_network_options, write_json
from guided_diffusion.errors import UserValueError, exit_on_user_error
from guided_diffusion.flags import Parser, answer_early


def parser() -> Parser:
    """The flags of this program."""
    own = Parser(__doc__)
    own.add("ref_batch", path="source", help="real pairs, .npz")
    own.add("sample_batch", path="source", help="jointly generated pairs, .npz")
    own.add("--modality", default="arr_1", group="data", help="array with the other half of the pairs")
    own.add("--ref_modality", group="data", unset="as --modality", help="its name in the reference")
    own.add(
        "--conditional",
        path="source",
        group="data",
        help="pairs whose images were generated for given partners",
    )
    own.add(
        "--predicted",
        path="source",
        group="data",
        help="labels or maps (arr_0) found in the generated images",
    )
    own.add(
        "--palette",
        group="data",
        help="palette of segmentation maps: cityscapes, camvid, or a file with `R G B name` lines",
    )
    add_network_options(own)
    add_json_option(own)
    own.add("--seed", default=0, help="seed of the regroupings")
    return own


if __name__ == "__main__":
    answer_early(parser)  # before the slow imports


import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from evaluations.features import BATCH_SIZE, extract_features
from evaluations.frechet import frechet_distance
from evaluations.images import ArrayImages, NpzImages, class_names, load_array
from evaluations.inception import RESIZE_MODE, Inception, load_inception
from evaluations.joint_metrics import (
    fit_classifier,
    joint_frechet,
    label_agreement,
    map_pair_miou,
    masked_pair_miou,
    partner_scale,
    regrouped_frechet,
)
from guided_diffusion import dist_util
from guided_diffusion.image_files import check_labels, renumber
from guided_diffusion.palettes import Palette, load_palette, to_indices

Kind = Literal["labels", "maps", "images", "vectors"]


@dataclass(frozen=True)
class Pairs:
    """N images with the other half of each pair, as features and as data."""

    pool: Tensor  # [N, 2048] of the images
    partner: Tensor  # [N, D] of the other half
    holds: Kind
    data: np.ndarray  # the other half itself
    images: np.ndarray | None  # where the metric looks at pixels


@dataclass(frozen=True)
class Consistency:
    """Jointly against conditionally generated pairs."""

    joint_frechet: float  # between the two
    joint_frechet_if_equal: float  # between random regroupings of both
    label_agreement_conditional: float | None
    n_conditional: int


@dataclass(frozen=True)
class JointEvaluation:
    """The joint metrics, and everything needed to compute them again. None: does not apply to this modality."""

    joint_frechet: float
    frechet: float  # of the images alone
    partner_frechet: float  # of the other halves alone
    label_agreement: float | None
    classifier_accuracy: float | None  # of the linear classifier on held-out references
    pair_miou: float | None
    consistency: Consistency | None
    modality: str
    kind: Kind
    partner_scale: float
    n_reference: int
    n_samples: int
    seed: int
    resize: str
    weights: str
    weights_sha256: str


@dataclass(frozen=True)
class Partner:
    """The other halves of N pairs."""

    holds: Kind
    data: np.ndarray  # labels as integers [N], -1 for unknown
    name: str
    class_names: list[str] | None = None  # of labels


def read_partner(path: str | Path, key: str) -> Partner:
    """What stands under `key` of an .npz, told by type and shape. Raises UserError for anything else."""
    data, name = load_array(path, key), f"{key} of {path}"
    integer = np.issubdtype(data.dtype, np.integer)
    if data.ndim == 1 and integer:
        return Partner("labels", check_labels(data, len(data), name), name, class_names(path))
    if data.ndim == 3 and integer:
        return Partner("maps", data, name)
    if data.ndim == 4 and data.shape[-1] == 3 and data.dtype == np.uint8:
        return Partner("images", data, name)
    if data.ndim == 2 and np.issubdtype(data.dtype, np.floating):
        if not np.isfinite(data).all():
            raise UserValueError(f"{name} holds NaN or infinite values")
        total = data.sum(1)
        if (data >= 0).all() and (np.isclose(total, 1, atol=1e-3) | (total == 0)).all():
            return Partner("labels", np.where(total > 0, data.argmax(1), -1), name, class_names(path))
        return Partner("vectors", data, name)
    raise UserValueError(
        f"{name} is {data.dtype} {list(data.shape)}, expected labels [N], maps [N, H, W], "
        "uint8 images [N, H, W, 3] or float vectors [N, D]"
    )


def read_predicted(path: str | Path, reference: Partner, samples: Partner) -> np.ndarray:
    """What a classifier or segmenter found in the generated images (arr_0), labels numbered as the reference numbers them.
    UserError unless it is of the kind and number of the samples' partners."""
    found = read_partner(path, "arr_0")
    if found.holds == "images" and samples.holds != "images" or samples.holds == "vectors":
        raise UserValueError(
            f"{found.name} holds {found.holds}, the pairs {samples.holds}: nothing to compare"
        )
    if (found.holds == "labels") != (samples.holds == "labels"):
        raise UserValueError(f"{found.name} holds {found.holds}, the pairs {samples.holds}")
    if found.data.shape[:3] != samples.data.shape[:3]:
        shapes = list(found.data.shape), list(samples.data.shape)
        raise UserValueError(
            f"{found.name} is {shapes[0]}, {samples.name} {shapes[1]}: they must be of one number and size"
        )
    if found.holds == "labels" and reference.class_names:
        return renumber(found.data, found.class_names, reference.class_names, found.name)
    return found.data


def load_pairs(
    path: str | Path,
    partner: Partner,
    network: Inception,
    classes: int | None = None,
    palette: Palette | None = None,
    batch_size: int = BATCH_SIZE,
) -> Pairs | None:
    """Images of an .npz with their partners. `classes`: width of the labels' one-hot vectors. None on ranks above 0."""
    images = NpzImages(path)
    if len(partner.data) != images.shape[0]:
        raise UserValueError(
            f"{path} has {images.shape[0]} images, but {partner.name} are {len(partner.data)}"
        )
    features = extract_features(images, network, batch_size)
    beside = _partner_features(partner, network, classes, palette, batch_size)
    if features is None:
        return None
    arrays = load_array(path, "arr_0") if partner.holds == "images" and not palette else None
    return Pairs(features.pool, beside, partner.holds, partner.data, arrays)


def _partner_features(
    partner: Partner, network: Inception, classes: int | None, palette: Palette | None, batch_size: int
) -> Tensor | None:
    data = partner.data
    if partner.holds == "vectors":
        return torch.from_numpy(data).float()
    if partner.holds == "labels":
        vectors = torch.zeros(len(data), classes)
        known = np.flatnonzero(data >= 0)
        vectors[known, data[known]] = 1
        return vectors
    if partner.holds == "maps":
        if palette is None:
            raise UserValueError(f"{partner.name} holds class indices: --palette says which")
        colors = np.concatenate([palette.colors, palette.void_colors[:1], np.zeros((1, 3), np.uint8)])
        data = colors[to_indices(data, palette)]
    features = extract_features(ArrayImages(data, partner.name), network, batch_size)
    return None if features is None else features.pool


def evaluate_joint(
    reference: Pairs,
    samples: Pairs,
    network: Inception,
    modality: str = "arr_1",
    conditional: Pairs | None = None,
    predicted: np.ndarray | None = None,
    palette: Palette | None = None,
    seed: int = 0,
) -> JointEvaluation:
    """All joint metrics that apply to this kind of pairs; `modality` is its name in the report."""
    kind = samples.holds
    scale = partner_scale(reference.pool, reference.partner)
    pairs, real = (samples.pool, samples.partner), (reference.pool, reference.partner)
    classifier = (
        fit_classifier(reference.pool, reference.data) if kind == "labels" and predicted is None else None
    )
    agreement = miou = None
    if kind == "labels":
        found = classifier.predict(samples.pool) if classifier else predicted
        agreement = label_agreement(samples.data, found)
    elif palette and predicted is not None:
        miou = map_pair_miou(samples.data, predicted, palette)
    elif kind == "images" and not palette:
        miou = masked_pair_miou(samples.images, samples.data)
    consistency = None
    if conditional:
        given = (conditional.pool, conditional.partner)
        consistency = Consistency(
            joint_frechet=joint_frechet(pairs, given, scale),
            joint_frechet_if_equal=regrouped_frechet(pairs, given, scale, seed),
            label_agreement_conditional=(
                label_agreement(conditional.data, classifier.predict(conditional.pool))
                if classifier
                else None
            ),
            n_conditional=len(conditional.pool),
        )
    return JointEvaluation(
        joint_frechet=joint_frechet(real, pairs, scale),
        frechet=frechet_distance(reference.pool, samples.pool),
        partner_frechet=frechet_distance(reference.partner, samples.partner),
        label_agreement=agreement,
        classifier_accuracy=classifier.accuracy if classifier else None,
        pair_miou=miou,
        consistency=consistency,
        modality=modality,
        kind=kind,
        partner_scale=scale,
        n_reference=len(reference.pool),
        n_samples=len(samples.pool),
        seed=seed,
        resize=RESIZE_MODE,
        weights=network.source,
        weights_sha256=network.sha256,
    )


def main(arguments: list[str] | None = None) -> None:
    with exit_on_user_error():
        args = parser().parse_args(arguments)
        dist_util.setup_dist()
        run(args)


def run(args: argparse.Namespace) -> None:
    """Evaluate as the command line asks. Raises UserError."""
    palette = load_palette(args.palette) if args.palette else None
    keys = {args.ref_batch: args.ref_modality or args.modality}
    files = [path for path in (args.ref_batch, args.sample_batch, args.conditional) if path]
    partners = [read_partner(path, keys.get(path, args.modality)) for path in files]
    if len({partner.holds for partner in partners}) > 1:
        kinds = ", ".join(f"{partner.name}: {partner.holds}" for partner in partners)
        raise UserValueError(f"the pairs are not of one kind ({kinds})")
    if partners[0].class_names:  # the reference's numbers hold for all
        partners[1:] = [
            replace(p, data=renumber(p.data, p.class_names, partners[0].class_names, p.name))
            for p in partners[1:]
        ]
    predicted = read_predicted(args.predicted, partners[0], partners[1]) if args.predicted else None
    sizes = {NpzImages(path).shape[1:3] for path in files}
    if len(sizes) > 1:
        raise UserValueError(f"the images are of different sizes {sorted(sizes)} (height, width)")
    classes = max(int(p.data.max()) for p in partners) + 1 if partners[0].holds == "labels" else None
    network = load_inception(args.inception, args.device)
    pairs = [
        load_pairs(path, partner, network, classes, palette, args.batch_size)
        for path, partner in zip(files, partners, strict=True)
    ]
    if pairs[0] is None:  # another rank has them
        return
    conditional = pairs[2] if args.conditional else None
    result = evaluate_joint(
        pairs[0], pairs[1], network, args.modality, conditional, predicted, palette, args.seed
    )
    for line in report(result):
        print(line)
    write_json(args.json, result)


def report(result: JointEvaluation) -> list[str]:
    """The lines that the command prints."""
    lines = [
        f"Joint Frechet distance: {result.joint_frechet}",
        f"Frechet distance of the images: {result.frechet}",
        f"Frechet distance of {result.modality}: {result.partner_frechet}",
    ]
    if result.label_agreement is not None:
        lines.append(f"Label agreement: {result.label_agreement}")
    if result.classifier_accuracy is not None:
        lines.append(f"Classifier accuracy on held-out references: {result.classifier_accuracy}")
    if result.pair_miou is not None:
        lines.append(f"Pair mIoU: {result.pair_miou}")
    if given := result.consistency:
        lines.append(f"Joint against conditional: {given.joint_frechet}")
        lines.append(f"Joint against conditional, if they were one: {given.joint_frechet_if_equal}")
        if given.label_agreement_conditional is not None:
            lines.append(f"Label agreement, conditional: {given.label_agreement_conditional}")
    return lines


if __name__ == "__main__":
    main()
