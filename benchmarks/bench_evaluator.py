"""Speed and memory of the evaluator, beside the same network in torch-fidelity's and pytorch-fid's form.

    python benchmarks/bench_evaluator.py                          features: images per second, and the peers' in turn
    python benchmarks/bench_evaluator.py --num_images 10000       one pass over 10,000 images
    python benchmarks/bench_evaluator.py --metrics                FID, precision and recall of 10,000 against 50,000

The weights are random ones of the full size (speed does not depend on them), so nothing is downloaded. The peers are
measured where they can be imported (`pip install torch-fidelity pytorch-fid`; both need torchvision); each gets the
same images and weights, in turn with ours in every repetition, at the better of two batch sizes.
"""

import argparse
import functools
import json
import os
import platform
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from evaluations.evaluator import Activations
from evaluations.features import extract_features
from evaluations.frechet import frechet_distance
from evaluations.images import open_images
from evaluations.inception import Inception
from evaluations.inception_weights import ARCHITECTURE, InceptionWeights, seeded_weights
from evaluations.precision_recall import precision_recall
from guided_diffusion.errors import exit_on_user_error
from guided_diffusion.flags import Parser

PEER_BATCHES = (8, 50)  # 50 is pytorch-fid's default


def port_state(weights: InceptionWeights) -> dict[str, torch.Tensor]:
    """The weights under the names of the .pth port, which both peers read."""
    features, classes = weights.softmax.shape
    state = {"fc.weight": torch.from_numpy(weights.softmax.T.copy()), "fc.bias": torch.zeros(classes)}
    for spec in ARCHITECTURE:
        kernel, norm = weights.convolutions[spec.name]
        arrays = {
            "conv.weight": kernel,
            "bn.weight": np.ones_like(norm.beta) if norm.gamma is None else norm.gamma,
            "bn.bias": norm.beta,
            "bn.running_mean": norm.mean,
            "bn.running_var": norm.variance,
        }
        for name, array in arrays.items():
            state[f"{spec.port_name}.{name}"] = torch.from_numpy(np.ascontiguousarray(array, np.float32))
        state[f"{spec.port_name}.bn.num_batches_tracked"] = torch.tensor(0)
    return state


Extract = Callable[[np.ndarray, int], torch.Tensor]  # (images, batch size) -> pool_3 [N, 2048]


def torch_fidelity(state: dict[str, torch.Tensor], device: torch.device) -> Extract:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(state, file.name)
        network = FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=file.name
        )
    network = network.to(device).eval()

    def extract(images: np.ndarray, batch_size: int) -> torch.Tensor:
        batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(batch_size)
        return torch.cat([network(batch.contiguous().to(device))[0].cpu() for batch in batches])

    return extract


def pytorch_fid(state: dict[str, torch.Tensor], device: torch.device) -> Extract:
    from pytorch_fid import inception

    inception.load_state_dict_from_url = lambda *_args, **_kwargs: state
    network = inception.InceptionV3([3]).to(device).eval()

    def extract(images: np.ndarray, batch_size: int) -> torch.Tensor:
        batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(batch_size)
        return torch.cat([network(batch.to(device) / 255)[0][:, :, 0, 0].cpu() for batch in batches])

    return extract


def find_peers(state: dict[str, torch.Tensor], device: torch.device) -> dict[str, Extract]:
    """The peers that can be imported here; says why of the others."""
    peers = {}
    for name, make in (("torch-fidelity", torch_fidelity), ("pytorch-fid", pytorch_fid)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peers[name] = make(state, device)
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
            print(f"{name}: not measured ({str(error).splitlines()[0]})")
    return peers


class Taken(NamedTuple):
    """Seconds that some work took: by the clock, and of all this process's threads. A busy machine spoils the first."""

    clock: float
    cpu: float


def measure(work: Callable[[], object]) -> Taken:
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Taken(time.perf_counter() - clock, time.process_time() - cpu)


def peak_gib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@torch.inference_mode()
def bench_features(args: argparse.Namespace, device: torch.device) -> dict:
    weights = seeded_weights(divisor=1)
    network = Inception(weights, "random", "").to(device)
    peers = find_peers(port_state(weights), device)
    arrays = np.random.default_rng(0).integers(0, 256, (args.num_images, 64, 64, 3), np.uint8)
    runs: dict[str, list[Taken]] = {"ours": []}
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/images.npz", arr_0=arrays)
        images = open_images(f"{folder}/images.npz")

        def ours() -> None:
            extract_features(images, network, args.batch_size, progress=False)

        few = arrays[: 2 * max(PEER_BATCHES)]
        batches = {}
        for name, extract in peers.items():
            extract(few, PEER_BATCHES[0])  # warm up
            trials = {size: measure(functools.partial(extract, few, size)).cpu for size in PEER_BATCHES}
            batches[name], runs[name] = min(trials, key=trials.get), []
        network(torch.from_numpy(arrays[:16]))
        for _ in range(args.repetitions):
            runs["ours"].append(measure(ours))
            for name, extract in peers.items():
                runs[name].append(measure(functools.partial(extract, arrays, batches[name])))
    result = {}
    for name, taken in runs.items():
        rates = [args.num_images / one.clock for one in taken]
        per_cpu = statistics.median(args.num_images / one.cpu for one in taken)
        result[name] = {"images_per_second": rates, "images_per_cpu_second": per_cpu}
        line = (
            f"{name}: {statistics.median(rates):.1f} images/s (median of {len(rates)}, {min(rates):.1f} to "
            f"{max(rates):.1f}), {per_cpu:.1f} per CPU second; "
        )
        if name == "ours":
            print(line + "reading the .npz included")
            continue
        pairs = list(zip(taken, runs["ours"], strict=True))
        by_clock = statistics.median(theirs.clock / own.clock for theirs, own in pairs)
        by_cpu = statistics.median(theirs.cpu / own.cpu for theirs, own in pairs)
        result[name] |= {"ours_faster_by_clock": by_clock, "ours_faster_by_cpu": by_cpu}
        print(
            f"{line}batches of {batches[name]}, from memory; ours is {by_clock:.2f} times as fast ({by_cpu:.2f} by CPU)"
        )
    same = arrays[:16]
    if "torch-fidelity" in peers:
        theirs, own = peers["torch-fidelity"](same, 8), network(torch.from_numpy(same)).pool.cpu()
        result["difference_from_torch_fidelity"] = float((own - theirs).norm() / theirs.norm())
        print(
            f"pool_3 differs from torch-fidelity's by {result['difference_from_torch_fidelity']:.1e} (relative)"
        )
    result["peak_gib"] = peak_gib()
    print(f"peak memory {result['peak_gib']:.2f} GiB")
    return result


def bench_metrics(args: argparse.Namespace, device: torch.device) -> dict:
    random = torch.Generator().manual_seed(0)
    sets = []
    for name, count in (("reference", args.references), ("samples", args.samples)):
        features = (torch.randn(count, width, generator=random) for width in (2048, 2023))
        sets.append(Activations(name, (64, 64), *features))
    reference, samples = sets
    result = {"references": args.references, "samples": args.samples}
    neighbours = measure(lambda: precision_recall(reference.pool, samples.pool, device=device))
    distances = measure(
        lambda: [frechet_distance(a, b) for a, b in zip(reference.gaussians, samples.gaussians, strict=True)]
    )
    result |= {"precision_recall": neighbours._asdict(), "fid_sfid": distances._asdict()}
    result["peak_gib"] = peak_gib()
    print(
        f"{args.references} against {args.samples} random features: precision and recall {neighbours.clock:.0f} s "
        f"({neighbours.cpu:.0f} CPU s), FID and sFID {distances.clock:.0f} s ({distances.cpu:.0f} CPU s), "
        f"peak memory {result['peak_gib']:.2f} GiB"
    )
    return result


def machine(device: torch.device) -> dict:
    """What the numbers were measured on."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def parser() -> Parser:
    """The flags of this program."""
    own = Parser(__doc__)
    many = dict(low=1, high=10_000_000, group="data")
    own.add("--num_images", default=200, help="images of 64x64 per pass", **many)
    own.add("--repetitions", default=3, low=1, high=10_000, group="results", help="passes")
    own.add("--batch_size", default=64)
    own.add("--threads", kind=int, low=1, high=4096, group="machine", unset="all", help="threads of the CPU")
    own.add(
        "--metrics",
        action="store_true",
        group="results",
        help="measure FID, precision and recall instead of features",
    )
    own.add("--references", default=10_000, help="with --metrics", **many | dict(low=4))
    own.add("--samples", default=50_000, help="with --metrics", **many | dict(low=4))
    own.add("--json")
    return own


@exit_on_user_error()
def main() -> None:
    args = parser().parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = {"machine": machine(device)}
    print(" ".join(f"{name}={value}" for name, value in measured["machine"].items()))
    measured |= bench_metrics(args, device) if args.metrics else bench_features(args, device)
    if args.json:
        Path(args.json).write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
