"""Write a reference batch for the evaluator: images and the statistics of their features, under ADM's keys.

    python evaluations/make_reference.py imagenet/train ref64.npz --image_size 64
    python evaluations/make_reference.py imagenet/train ref64.npz --image_size 64 --classes classes.txt --labels
    python evaluations/make_reference.py samples.npz ref.npz
    torchrun --nproc_per_node 8 evaluations/make_reference.py imagenet/train ref64.npz --image_size 64

The statistics (`mu`, `sigma`, `mu_s`, `sigma_s`) are those of all the source's images; `arr_0` keeps --num_images of
them, drawn by --seed, for precision and recall. An image's class is what training takes for it (the file name up to
the first underscore, else the folder; --label_from says which); of an .npz it is the number in arr_1. --labels writes
the classes' names too, as `class_names`. `meta` says how all this was computed, as JSON.
"""

from pathlib import Path

from evaluations.arguments import add_label_option, add_network_options, add_size_option
from guided_diffusion.errors import UserValueError, exit_on_user_error
from guided_diffusion.flags import Parser, answer_early

NUM_IMAGES = 10_000  # that ADM's reference batches keep


def parser() -> Parser:
    """The flags of this program."""
    own = Parser(__doc__)
    own.add("source", path="source", help="folder of images, or .npz with arr_0")
    own.add("output", kind=Path, path="file", help="the .npz to write")
    add_size_option(own)
    own.add("--num_images", default=NUM_IMAGES, low=1, group="data", help="images kept in arr_0")
    own.add(
        "--classes",
        path="source",
        group="data",
        unset="all",
        help="only these: a text file, one name per line",
    )
    own.add(
        "--labels",
        action="store_true",
        group="results",
        help="also write the labels of the kept images, as arr_1",
    )
    add_label_option(own)
    own.add("--seed", default=0, help="seed that chooses the images to keep")
    add_network_options(own)
    return own


if __name__ == "__main__":
    answer_early(parser)  # before the slow imports


import argparse
import json
import os
from dataclasses import asdict, dataclass

import numpy as np

from evaluations import distributed
from evaluations.evaluator import META
from evaluations.features import BATCH_SIZE, stream_features
from evaluations.frechet import RunningStatistics, Statistics
from evaluations.images import (
    ArrayImages,
    FolderImages,
    Images,
    NpzImages,
    class_names,
    list_images,
    load_array,
    npz_keys,
)
from evaluations.inception import RESIZE_MODE, Inception, load_inception
from guided_diffusion import dist_util, image_files
from guided_diffusion.text_files import read_lines

CROP_MODE = "box-halving-bicubic-center"  # of center_crop_arr


@dataclass(frozen=True)
class Selection:
    """The images that make the reference, with the class of each where it is known."""

    images: Images
    labels: np.ndarray | None  # [N] numbers of the classes, as training numbers them, or arr_1 of the .npz
    class_names: list[str] | None = None  # of these numbers


@dataclass(frozen=True)
class Meta:
    """How a reference batch was made; stored in it as JSON."""

    source: str
    n_statistics: int
    n_images: int
    image_size: int | None
    crop: str | None
    classes: list[str] | None
    seed: int
    resize: str
    weights: str
    weights_sha256: str


def select(
    source: str | Path,
    image_size: int | None = None,
    classes: list[str] | None = None,
    label_from: str = "auto",
    grey: bool = False,
) -> Selection:
    """Images of a folder or .npz, only those of `classes` if given. Raises UserError where none are left. grey: as of
    `NpzImages`."""
    source = Path(source).expanduser()
    if source.is_file():
        return _select_from_npz(source, image_size, classes, grey)
    try:
        found = image_files.list_labelled_images(source, label_from)
    except image_files.NoLabelsError:
        if classes or label_from != "auto":
            raise
        return Selection(FolderImages(list_images(source), str(source), image_size), None)
    wanted = set(found.class_names if classes is None else classes)
    if missing := sorted(wanted - set(found.class_names)):
        raise UserValueError(f"{source} has no images of class {', '.join(missing[:5])}")
    kept = [i for i, label in enumerate(found.labels) if found.class_names[label] in wanted]
    images = FolderImages([Path(found.paths[i]) for i in kept], str(source), image_size)
    return Selection(images, np.array(found.labels)[kept], found.class_names)


def _select_from_npz(
    source: Path, image_size: int | None, classes: list[str] | None, grey: bool
) -> Selection:
    images = NpzImages(source, grey=grey)
    if image_size and images.shape[1:3] != (image_size, image_size):
        raise UserValueError(
            f"{images.name} has shape {list(images.shape)}: --image_size scales folders only"
        )
    labels, names = None, class_names(source)
    # ADM's name, or that of this project's data.
    key = next((name for name in ("arr_1", "labels") if name in npz_keys(source)), None)
    if key is not None:
        labels = image_files.check_labels(load_array(source, key), images.shape[0], f"{key} of {source}")
    if classes is None:
        return Selection(images, labels, names)
    if labels is None:
        raise UserValueError(f"{source} has no labels (arr_1 or labels) to select classes by")
    numbers = {name: i for i, name in enumerate(names or map(str, range(labels.max(initial=-1) + 1)))}
    wanted = [numbers.get(name) for name in classes]
    if not set(wanted) <= set(labels.tolist()):
        known = ", ".join(list(numbers)[:10]) if names else f"numbers from {labels.min()} to {labels.max()}"
        raise UserValueError(f"the classes of {source} are {known}")
    chosen = np.flatnonzero(np.isin(labels, wanted))
    return Selection(ArrayImages(pick(images, chosen), images.name), labels[chosen], names)


def read_classes(path: str | Path) -> list[str]:
    """Class names of a text file: the first word of every line; lines that start with # are comments."""
    if not Path(path).is_file():
        raise UserValueError(f"class list {path} does not exist")
    names = [line.split()[0] for _, line in read_lines(path) if not line.startswith("#")]
    if not names:
        raise UserValueError(f"class list {path} is empty: write one class name per line")
    return names


def pick(images: Images, indices: np.ndarray, batch_size: int = BATCH_SIZE) -> np.ndarray:
    """The images at `indices` (ascending) as one array."""
    if isinstance(images, FolderImages):
        chosen = FolderImages([images.files[i] for i in indices], images.name, images.size)
        return np.concatenate(list(chosen.batches(0, len(indices), batch_size)))
    kept = np.empty((len(indices), *images.shape[1:]), np.uint8)
    first = 0
    for batch in images.batches(0, images.shape[0], batch_size):
        inside = (indices >= first) & (indices < first + len(batch))
        kept[inside] = batch[indices[inside] - first]
        first += len(batch)
    return kept


def reference_statistics(
    images: Images, network: Inception, batch_size: int = BATCH_SIZE, progress: bool = True
) -> tuple[Statistics, Statistics] | None:
    """Statistics of pool_3 and of the spatial features of all `images`; None on ranks other than 0."""
    running = RunningStatistics(), RunningStatistics()
    for output in stream_features(images, network, batch_size, progress):
        running[0].add(output.pool)
        running[1].add(output.spatial)
    everyone = distributed.gather_objects(running)
    if everyone is None:
        return None
    for other in everyone[1:]:
        running[0].merge(other[0])
        running[1].merge(other[1])
    return running[0].result(), running[1].result()


def write_reference(
    path: str | Path,
    images: np.ndarray,
    pool: Statistics,
    spatial: Statistics,
    meta: Meta,
    labels: np.ndarray | None,
    names: list[str] | None = None,
) -> None:
    """Write the .npz, whole or not at all; `names` are those of the labels' classes."""
    arrays = {
        "arr_0": images,
        "mu": pool.mu,
        "sigma": pool.sigma,
        "mu_s": spatial.mu,
        "sigma_s": spatial.sigma,
    }
    if labels is not None:
        arrays["arr_1"] = labels
        if names:
            arrays["class_names"] = np.array(names)
    unfinished = Path(f"{path}.unfinished")
    with open(unfinished, "wb") as file:
        np.savez(file, **arrays, **{META: np.array(json.dumps(asdict(meta)))})
    os.replace(unfinished, path)


def main(arguments: list[str] | None = None) -> None:
    with exit_on_user_error():
        args = parser().parse_args(arguments)
        dist_util.setup_dist()
        run(args)


def run(args: argparse.Namespace) -> None:
    """Write the reference batch that the command line asks for. Raises UserError."""
    if args.output.suffix != ".npz":
        raise UserValueError(f"{args.output} cannot be written: a reference batch is an .npz file")
    classes = read_classes(args.classes) if args.classes else None
    selection = select(args.source, args.image_size, classes, args.label_from)
    if args.labels and selection.labels is None:
        raise UserValueError(f"{args.source} has no labels (arr_1)")
    network = load_inception(args.inception, args.device)
    computed = reference_statistics(selection.images, network, args.batch_size)
    if computed is None:  # another rank has them
        return
    count = selection.images.shape[0]
    kept = np.sort(np.random.default_rng(args.seed).permutation(count)[: args.num_images])
    meta = Meta(
        source=str(args.source),
        n_statistics=count,
        n_images=len(kept),
        image_size=args.image_size,
        crop=CROP_MODE if args.image_size else None,
        classes=classes,
        seed=args.seed,
        resize=RESIZE_MODE,
        weights=network.source,
        weights_sha256=network.sha256,
    )
    labels = selection.labels[kept] if args.labels else None
    write_reference(args.output, pick(selection.images, kept), *computed, meta, labels, selection.class_names)
    print(f"{args.output}: statistics of {count} images, {len(kept)} of them kept")


if __name__ == "__main__":
    main()
