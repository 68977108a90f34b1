"""Inception Score, FID, sFID, precision and recall of a batch of samples, as ADM's evaluator prints them.

    python evaluations/evaluator.py ref.npz samples.npz
    python evaluations/evaluator.py ref.npz samples.npz --json scores.json --bootstrap 100
    torchrun --nproc_per_node 8 evaluations/evaluator.py ref.npz samples.npz

Both files hold uint8 images [N, H, W, 3] under arr_0; a folder of images does as well. Statistics in a file (`mu`,
`sigma`, `mu_s`, `sigma_s`) are used for FID and sFID, as ADM does it.
"""

from evaluations.arguments import add_json_option, add_network_options, write_json
from guided_diffusion.errors import UserError, UserValueError, exit_on_user_error
from guided_diffusion.flags import Parser, answer_early


def parser() -> Parser:
    """The flags of this program."""
    own = Parser(__doc__)
    own.add("ref_batch", path="source", help="reference batch: .npz or folder")
    own.add("sample_batch", path="source", help="samples: .npz or folder")
    add_network_options(own)
    add_json_option(own)
    own.add(
        "--bootstrap",
        default=0,
        low=1,
        high=1_000_000,
        group="results",
        help="95 % intervals of FID and sFID from so many draws",
    )
    own.add("--seed", default=0, help="seed of the bootstrap and of the bias estimate")
    return own


if __name__ == "__main__":
    answer_early(parser)  # before the slow imports


import argparse
import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from evaluations.features import BATCH_SIZE, extract_features
from evaluations.frechet import (
    Gaussian,
    Source,
    Statistics,
    fit,
    frechet_bias,
    frechet_distance,
    frechet_interval,
)
from evaluations.images import Images, load_array, npz_keys, open_images
from evaluations.inception import RESIZE_MODE, Inception, load_inception
from evaluations.precision_recall import precision_recall
from evaluations.scores import inception_score
from guided_diffusion import dist_util

FEW = 2048  # images: below the number of features, FID's covariance is singular and its bias large
META = "meta"  # key of an .npz written by make_reference.py: JSON that says how its statistics were computed


@dataclass(frozen=True)
class Activations:
    """The features of a set of images, and what is compared of them."""

    name: str
    size: tuple[int, int]  # height, width in pixels
    pool: Tensor  # [N, 2048] float32
    spatial: Tensor  # [N, 2023] float32
    given: tuple[Statistics, Statistics] | None = None  # that came with the file, perhaps from other images

    def __len__(self) -> int:
        return len(self.pool)

    @functools.cached_property
    def gaussians(self) -> tuple[Gaussian, Gaussian]:
        """What FID and sFID compare; kept, since a reference is compared again and again in training."""
        pool, spatial = self.given or (self.pool, self.spatial)
        return fit(pool), fit(spatial)

    @property
    def sources(self) -> tuple[Source, Source]:
        """What FID and sFID may be computed from again, with fewer or other images: the features if they can vary."""
        return self.gaussians if self.given else (self.pool, self.spatial)


@dataclass(frozen=True)
class FrechetDetail:
    """How far a Frechet distance can be trusted at these numbers of images."""

    bias: float | None  # about how much it is too large; None where there are 2,048 images or more
    interval: tuple[float, float] | None  # 95 % bootstrap interval; None if not asked for


@dataclass(frozen=True)
class Evaluation:
    """The five scores, and everything needed to compute them again."""

    inception_score: float
    fid: float
    sfid: float
    precision: float
    recall: float
    fid_detail: FrechetDetail
    sfid_detail: FrechetDetail
    n_reference: int
    n_samples: int
    reference: str
    samples: str
    reference_statistics: str  # "images" or "file"
    image_size: tuple[int, int]  # height, width in pixels
    resize: str
    weights: str
    weights_sha256: str
    seed: int
    bootstrap_repetitions: int
    torch_version: str
    device: str


def activations(
    images: Images,
    network: Inception,
    given: tuple[Statistics, Statistics] | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> Activations | None:
    """Features and statistics of `images`; `given` statistics of pool_3 and of the spatial features take precedence.

    With several ranks on rank 0, and None on the others.
    """
    features = extract_features(images, network, batch_size, progress)
    if features is None:
        return None
    widths = features.pool.shape[1], features.spatial.shape[1]
    if given and (len(given[0].mu), len(given[1].mu)) != widths:
        raise UserValueError(
            f"the statistics with {images.name} are of {len(given[0].mu)} and {len(given[1].mu)} features, "
            f"this network has {widths[0]} and {widths[1]}"
        )
    return Activations(images.name, images.shape[1:3], features.pool, features.spatial, given)


def evaluate(
    reference: Activations, samples: Activations, network: Inception, bootstrap: int = 0, seed: int = 0
) -> Evaluation:
    """All scores of `samples` against `reference`. `bootstrap`: repetitions for the intervals of FID and sFID."""
    if reference.size != samples.size:
        raise UserValueError(
            f"{samples.name} has {_pixels(samples.size)} pixels, {reference.name} has {_pixels(reference.size)}: "
            "take a reference of the samples' size"
        )
    if bootstrap and reference.given and samples.given:
        raise UserValueError(
            "a bootstrap interval needs images, both files bring their statistics ready-made"
        )
    neighbours = precision_recall(reference.pool, samples.pool, device=network.device)
    fid, sfid = (frechet_distance(a, b) for a, b in zip(reference.gaussians, samples.gaussians, strict=True))
    few = any(len(given) < FEW and not given.given for given in (reference, samples))
    details = []
    for first, second, distance in zip(reference.sources, samples.sources, (fid, sfid), strict=True):
        bias = frechet_bias(first, second, distance, seed) if few else None
        interval = frechet_interval(first, second, distance, bootstrap, seed) if bootstrap else None
        details.append(FrechetDetail(bias, interval))
    return Evaluation(
        inception_score=inception_score(network.probabilities(samples.pool)),
        fid=fid,
        sfid=sfid,
        precision=neighbours.precision,
        recall=neighbours.recall,
        fid_detail=details[0],
        sfid_detail=details[1],
        n_reference=len(reference),
        n_samples=len(samples),
        reference=reference.name,
        samples=samples.name,
        reference_statistics="file" if reference.given else "images",
        image_size=samples.size,
        resize=RESIZE_MODE,
        weights=network.source,
        weights_sha256=network.sha256,
        seed=seed,
        bootstrap_repetitions=bootstrap,
        torch_version=torch.__version__,
        device=str(network.device),
    )


def given_statistics(path: str | Path) -> tuple[Statistics, Statistics] | None:
    """The statistics of pool_3 and of the spatial features in a reference batch, or None if it has none."""
    if Path(path).is_dir() or "mu" not in npz_keys(path):
        return None
    mu, sigma, mu_s, sigma_s = (load_array(path, key) for key in ("mu", "sigma", "mu_s", "sigma_s"))
    try:
        return Statistics(mu, sigma), Statistics(mu_s, sigma_s)
    except UserError as error:
        raise UserValueError(f"{path}: {error}") from error


def bias_warning(result: Evaluation) -> str | None:
    """One line on how much FID and sFID are too large, where there are few images."""
    if result.fid_detail.bias is None:
        return None
    n = min(result.n_reference, result.n_samples)
    return (
        f"FID and sFID from {n} images (fewer than {FEW:,}) are biased upwards: here by at least about "
        f"{result.fid_detail.bias:.3g} of {result.fid:.4g} and {result.sfid_detail.bias:.3g} of {result.sfid:.4g}; "
        "compare only scores from equal numbers of images"
    )


def _warn_of_other_weights(path: str | Path, network: Inception) -> None:
    """Statistics computed by another network are not comparable; only our own reference batches say which it was."""
    if Path(path).is_dir() or META not in npz_keys(path):
        return
    used = json.loads(str(load_array(path, META))).get("weights_sha256")
    if used != network.sha256:
        _note(f"warning: the statistics in {path} were computed with other Inception weights (sha256 {used})")


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def _say(text: str) -> None:
    if dist_util.get_rank() == 0:
        print(text, flush=True)


def _note(text: str) -> None:
    if dist_util.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    with exit_on_user_error():
        args = parser().parse_args(arguments)
        dist_util.setup_dist()
        run(args)


def run(args: argparse.Namespace) -> None:
    """Evaluate as the command line asks, printing as ADM's evaluator does. Raises UserError."""
    reference_images, sample_images = open_images(args.ref_batch), open_images(args.sample_batch)
    reference_given, samples_given = given_statistics(args.ref_batch), given_statistics(args.sample_batch)
    network = load_inception(args.inception, args.device)
    _warn_of_other_weights(args.ref_batch, network)

    _say("warming up PyTorch...")
    network(torch.zeros(1, 8, 8, 3))

    _say("computing reference batch activations...")
    reference = activations(reference_images, network, reference_given, args.batch_size)
    _say("computing/reading reference batch statistics...")
    _say("computing sample batch activations...")
    samples = activations(sample_images, network, samples_given, args.batch_size)
    _say("computing/reading sample batch statistics...")
    if reference is None or samples is None:  # another rank has them
        return
    _say("Computing evaluations...")
    result = evaluate(reference, samples, network, args.bootstrap, args.seed)
    print("Inception Score:", result.inception_score)
    print("FID:", result.fid)
    print("sFID:", result.sfid)
    print("Precision:", result.precision)
    print("Recall:", result.recall)
    for name, detail in (("FID", result.fid_detail), ("sFID", result.sfid_detail)):
        if detail.interval:
            _note(f"{name} 95 % interval: {detail.interval[0]:.6g} to {detail.interval[1]:.6g}")
    if warning := bias_warning(result):
        _note(f"warning: {warning}")
    write_json(args.json, result)


if __name__ == "__main__":
    main()
