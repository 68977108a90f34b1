"""Images and their labels for training (interface: openai/guided-diffusion, image_datasets.py).

The data is a folder of images (subfolders too), or an .npz file with uint8 images [N, H, W, C] under arr_0 and,
optionally, integer labels [N] under arr_1 or labels, where -1 means unlabelled, and their class_names [classes].
Which files are images, and what their classes are, says image_files.py.
"""

import atexit
import contextlib
import copy
import random
import signal
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch as th
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from . import dist_util, logger
from .array_files import mapped_member
from .checkpoint_util import is_remote
from .errors import UserError, UserValueError
from .image_files import (
    MODES,
    BadImageError,
    LabelledImages,
    NoLabelsError,
    center_crop_arr,
    check_labels,
    from_uint8,
    list_images,
    list_labelled_images,
    open_arrays,
    random_crop_arr,
    read_pixels,
    renumber,
    stored_class_names,
    to_channels,
)

# Training stops when more images than this cannot be read.
MAX_BAD = 10

Batches = Iterator[tuple[th.Tensor, dict[str, th.Tensor]]]


def load_data(
    *,
    data_dir: str,  # folder or .npz
    batch_size: int,  # of this rank
    image_size: int,  # images are scaled to it on the shorter side, then cropped to a square
    class_cond: bool = False,  # give labels
    deterministic: bool = False,  # in the order of the file names
    random_crop: bool = False,
    random_flip: bool = True,  # left-right, half of the time
    num_workers: int = 1,
    image_channels: int = 3,
    max_bad: int = MAX_BAD,  # unreadable images before training stops
    label_from: str = "auto",  # or "prefix" or "folder", where both have a meaning
    allow_unlabelled: bool = False,  # accept labels of -1
    class_names: Sequence[str] | None = None,  # of the model: labels are numbered by them
    num_classes: int = 0,  # numbers that are names stay what they say below it
) -> Batches:
    """Endless batches (float32 [B, C, H, W] in [-1, 1], {"y": int64 [B]} or {}) of this rank's share.

    Raises UserError where the data cannot be used: at once, or later at more than `max_bad` bad images.
    """
    dataset = open_dataset(
        data_dir,
        image_size,
        class_cond=class_cond,
        random_crop=random_crop,
        random_flip=random_flip,
        image_channels=image_channels,
        shard=dist_util.get_rank(),
        num_shards=dist_util.get_world_size(),
        max_bad=max_bad,
        label_from=label_from,
        class_names=class_names,
        num_classes=num_classes,
    )
    if len(dataset) < batch_size:
        raise UserValueError(
            f"{data_dir!r} has {len(dataset)} images for this rank, fewer than batch_size {batch_size}; "
            "use a smaller batch, fewer ranks or more images"
        )
    if class_cond and not allow_unlabelled and min(dataset.local_classes) < 0:
        raise UserValueError(
            f"{data_dir!r} has unlabelled images (-1), which a class-conditional model cannot use"
        )
    loader = DataLoader(
        _Guarded(dataset),
        batch_size=batch_size,
        shuffle=not deterministic,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=th.cuda.is_available(),
        collate_fn=_collate,
        worker_init_fn=outlive_signals,
    )
    return _endless(loader, max_bad, as_floats=True)


def load_stream(
    dataset: "SquareImages",  # all of the data, not a rank's share
    batch_size: int,  # of this rank
    seed: int,
    start_step: int = 0,
    num_workers: int = 1,
    rank: int | None = None,  # of this process, where None
    world_size: int | None = None,
) -> Batches:
    """Endless shuffled batches that continue at any step exactly as if they had never stopped.

    (uint8 [B, C, H, W], which `TrainLoop` converts on its device; {"position": int64 [B]}, and "y" as of `load_data`).
    The position is the number of the sample in the global stream.
    Which image stands there, and how it is cropped and flipped, depends on (seed, position) alone: not on
    the workers, and not on how the ranks share a global batch. Leaves the global random generators alone.
    """
    batches = ResumableBatches(
        len(dataset),
        batch_size,
        seed,
        start_step=start_step,
        rank=dist_util.get_rank() if rank is None else rank,
        world_size=dist_util.get_world_size() if world_size is None else world_size,
    )
    loader = DataLoader(
        _Seeded(dataset, seed),
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=th.cuda.is_available(),
        collate_fn=_collate,
        worker_init_fn=outlive_signals,
        generator=th.Generator(),  # else the loader would draw a seed from the global generator
    )
    return _endless(loader, dataset.max_bad)


def load_once(dataset: "SquareImages", batch_size: int, num_workers: int = 0) -> Batches:
    """All images once, in their order: (uint8 [b, C, H, W], {"y": int64 [b]} or {})."""
    loader = DataLoader(
        _Guarded(dataset),
        batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=outlive_signals,
    )
    return _pass(loader, dataset.max_bad, set())


def outlive_signals(_worker: int) -> None:
    """The `worker_init_fn` of data workers: they go on after Ctrl-C and a SIGTERM.

    Terminals and schedulers send those to every process of a job, but only the training process can finish
    its step and save; it ends its workers itself. A second SIGTERM has its usual effect.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _frame: signal.signal(number, signal.SIG_DFL))


def open_dataset(
    path: str,  # folder or .npz
    image_size: int,
    *,
    class_cond: bool = False,
    random_crop: bool = False,
    random_flip: bool = True,
    image_channels: int = 3,
    shard: int = 0,
    num_shards: int = 1,
    max_bad: int = MAX_BAD,
    label_from: str = "auto",
    class_names: Sequence[str] | None = None,  # (): of a model of a former version, which has none
    num_classes: int = 0,
) -> "SquareImages":
    """The dataset behind `load_data`: every `num_shards`-th image from `shard` on.

    With `class_cond` it has `class_names` and `label_from`, to be kept with the model and given here for every
    later folder. Raises UserError where the data is missing, empty or, with `class_cond`, without labels that
    have a meaning, or with classes that are not among the `class_names` given.
    """
    if not path:
        raise UserValueError("unspecified data directory: give a folder of images or an .npz file")
    if image_channels not in MODES and not _is_npz(path):
        raise UserValueError(f"images have 1, 3 or 4 channels, not {image_channels}")
    common = dict(
        shard=shard,
        num_shards=num_shards,
        random_crop=random_crop,
        random_flip=random_flip,
        image_channels=image_channels,
        max_bad=max_bad,
    )
    if _is_npz(path):
        images, labels, names = _read_npz(path)
        if class_cond and labels is None:
            raise NoLabelsError(f"{path!r} has no labels: add them as integers [N] under 'labels' or 'arr_1'")
        if class_cond and class_names:
            labels, names = renumber(labels, names, class_names, path), class_names
        labels = labels if class_cond else None
        dataset = ArrayDataset(images, labels, resolution=image_size, class_names=names, **common)
    else:
        # One rank looks: to list a million files takes a minute, and all would ask one file server at once.
        found = dist_util.from_rank_zero(
            lambda: (
                list_labelled_images(path, label_from, class_names, num_classes)
                if class_cond
                else LabelledImages(list_images(path), None, [])
            )
        )
        dataset = ImageDataset(
            image_size,
            found.paths,
            found.labels,
            class_names=found.class_names,
            label_from=found.label_from,
            **common,
        )
    if len(dataset) == 0:
        raise UserValueError(f"{path!r} has fewer images than there are ranks ({num_shards})")
    return dataset


def classes_of(config: Mapping, label_from: str = "auto") -> dict[str, Any]:
    """`class_names` and `label_from` of `open_dataset`, for a later folder of the model that has this configuration.

    label_from: what the user asks for; with `auto` the rule by which the model was trained holds.
    """
    # A model of a former version has classes, but no names; one without labels has neither.
    names = config.get("class_names") or (() if config.get("num_classes") else None)
    rule = config.get("label_from", "auto") if label_from == "auto" else label_from
    return {"class_names": names, "label_from": rule}


class SquareImages(Dataset):
    """Square images, cropped and flipped, with labels where `local_classes` is not None. See `load`.

    A subclass says in `pixels` where they come from. The next one stands in for one that cannot be read.
    """

    label_from = "auto"  # the rule that gave the labels, where they are those of files

    def __init__(
        self,
        resolution: int,
        local_images: Sequence[str] | np.ndarray,  # what `pixels` reads from
        local_classes: Sequence[int] | np.ndarray | None,
        class_names: Sequence[str],
        random_crop: bool,
        random_flip: bool,
        image_channels: int,
        max_bad: int,
    ):
        super().__init__()
        self.resolution = resolution
        self.local_images = local_images
        self.local_classes = local_classes
        self.class_names = list(class_names)
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.image_channels = image_channels
        self.max_bad = max_bad
        self._bad: set[str] = set()

    def __len__(self) -> int:
        return len(self.local_images)

    def subset(self, indices: Sequence[int]) -> "SquareImages":
        """The dataset of only these images, in this order."""
        part = copy.copy(self)
        part.local_images = _choose(self.local_images, indices)
        part.local_classes = None if self.local_classes is None else _choose(self.local_classes, indices)
        return part

    def pixels(self, idx: int, rng: random.Random) -> np.ndarray:
        """Image `idx`, cropped: uint8 [resolution, resolution, C]. Raises BadImageError."""
        raise NotImplementedError

    def load(self, idx: int, rng: random.Random = random) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Image `idx`: (uint8 [C, H, W], {"y": int64 []} or {}). Raises BadImageError.

        It is cropped and flipped with numbers from `rng`; none is drawn before the image has been read.
        """
        arr = self.pixels(idx, rng)
        if self.random_flip and rng.random() < 0.5:
            arr = arr[:, ::-1]
        arr = np.array(
            arr.transpose(2, 0, 1), order="C"
        )  # a copy: an array that is mapped cannot be written to
        if self.local_classes is None:
            return arr, {}
        return arr, {"y": np.array(self.local_classes[idx], dtype=np.int64)}

    def load_or_next(
        self, idx: int, rng: random.Random = random
    ) -> tuple[np.ndarray | None, dict[str, np.ndarray], list[str]]:
        """`load`, or the next image that can be read, and what is wrong with those before it.

        The array is None where `max_bad` + 1 images, or all, are unreadable.
        """
        bad: list[str] = []
        for offset in range(min(self.max_bad + 1, len(self))):
            try:
                return *self.load((idx + offset) % len(self), rng), bad
            except BadImageError as error:
                bad.append(str(error))
        return None, {}, bad

    def __getitem__(self, idx: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """`load` with Python's global generator, the image as float32 in [-1, 1].

        Warns of bad images; UserError at more than `max_bad`.
        """
        arr, out_dict, bad = self.load_or_next(idx)
        _report(bad, self._bad, self.max_bad, warnings.warn)
        if arr is None:
            raise _none_readable(bad)
        return from_uint8(th.from_numpy(arr)).numpy(), out_dict

    def _crop(self, image: Image.Image, rng: random.Random) -> np.ndarray:
        if self.random_crop:
            arr = random_crop_arr(image, self.resolution, rng=rng)
        else:
            arr = center_crop_arr(image, self.resolution)
        return arr.reshape(self.resolution, self.resolution, self.image_channels)


class ImageDataset(SquareImages):
    """Images in files: every `num_shards`-th of `image_paths` from `shard` on."""

    def __init__(
        self,
        resolution: int,
        image_paths: Sequence[str],
        classes: Sequence[int] | None = None,
        shard: int = 0,
        num_shards: int = 1,
        random_crop: bool = False,
        random_flip: bool = True,
        *,
        image_channels: int = 3,
        max_bad: int = MAX_BAD,
        class_names: Sequence[str] = (),
        label_from: str = "auto",
    ):
        self.label_from = label_from
        super().__init__(
            resolution,
            image_paths[shard::num_shards],
            None if classes is None else classes[shard::num_shards],
            class_names,
            random_crop,
            random_flip,
            image_channels,
            max_bad,
        )

    def pixels(self, idx: int, rng: random.Random) -> np.ndarray:
        image = read_pixels(self.local_images[idx], self.image_channels)
        return self._crop(image, rng)


class ArrayDataset(SquareImages):
    """Images in memory: uint8 [N, H, W, C] or [N, H, W], with labels [N] (-1: unlabelled) or None.

    `resolution` and `image_channels` are the images' own where None. Raises UserValueError for other data.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: Sequence[int] | np.ndarray | None = None,
        *,
        resolution: int | None = None,
        shard: int = 0,
        num_shards: int = 1,
        random_crop: bool = False,
        random_flip: bool = False,
        image_channels: int | None = None,
        max_bad: int = MAX_BAD,
        class_names: Sequence[str] | None = None,
    ):
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4 or images.dtype != np.uint8:
            raise UserValueError(
                f"images must be uint8 [N, H, W, C] or [N, H, W], not {images.dtype} {list(images.shape)}"
            )
        if 0 in images.shape:
            raise UserValueError(f"there are no images: the array is {list(images.shape)}")
        height, width, channels = images.shape[1:]
        resolution = min(height, width) if resolution is None else resolution
        image_channels = channels if image_channels is None else image_channels
        as_is = (height, width, channels) == (resolution, resolution, image_channels) and not random_crop
        if not as_is and not {channels, image_channels} <= MODES.keys():
            raise UserValueError(
                f"images of {height}x{width} with {channels} channels cannot be turned into "
                f"{resolution}x{resolution} with {image_channels}: only 1, 3 and 4 channels can be converted"
            )
        if labels is not None:
            labels = check_labels(np.asarray(labels), len(images), "an array")
            if class_names is None:
                class_names = [str(i) for i in range(int(labels.max(initial=-1)) + 1)]
            labels = labels[shard::num_shards]
        super().__init__(
            resolution,
            images[shard::num_shards],
            labels,
            class_names or (),
            random_crop,
            random_flip,
            image_channels,
            max_bad,
        )

    def pixels(self, idx: int, rng: random.Random) -> np.ndarray:
        arr = self.local_images[idx]
        if not self.random_crop and arr.shape == (self.resolution, self.resolution, self.image_channels):
            return arr
        image = Image.fromarray(arr.squeeze(-1) if arr.shape[-1] == 1 else arr)
        return self._crop(to_channels(image, self.image_channels), rng)


def hold_out(
    dataset: SquareImages, count: int, seed: int
) -> tuple[SquareImages, tuple[th.Tensor, dict[str, th.Tensor]]]:
    """Split off `count` random images: (the rest, (float32 [count, C, H, W], {"y": int64 [count]} or {})).

    Which ones depends on (the size of the dataset, seed). They are neither flipped nor cropped at random. One
    that cannot be read stays in the rest.
    """
    still = copy.copy(dataset)
    still.random_crop = still.random_flip = False
    chosen, items = [], []
    for idx in np.random.RandomState(seed % 2**32).permutation(len(dataset)).tolist():
        if len(chosen) == count:
            break
        with contextlib.suppress(BadImageError):
            arr, out_dict = still.load(idx)
            chosen.append(idx)
            items.append((arr, out_dict, []))
    if len(chosen) < count:
        raise UserValueError(
            f"{count} images cannot be held out of {len(dataset)}: only {len(chosen)} can be read"
        )
    rest = dataset.subset(sorted(set(range(len(dataset))) - set(chosen)))
    if not items:
        shape = (0, dataset.image_channels, dataset.resolution, dataset.resolution)
        return rest, (
            th.zeros(shape),
            {} if dataset.local_classes is None else {"y": th.zeros(0, dtype=th.int64)},
        )
    images, cond, _ = _collate(items)
    return rest, (from_uint8(images), cond)


class ResumableBatches(Sampler[list[tuple[int, int]]]):
    """An endless deterministic stream of samples, cut into batches of (position, index into the dataset).

    Position k = 0, 1, 2, ... belongs to epoch k // size; its order is a permutation drawn from (seed, epoch).
    At step s rank r takes batch_size positions from (s * world_size + r) * batch_size on, so that two ranks
    with batch b see what one rank with batch 2b sees. Starting at a late step costs one permutation.
    """

    def __init__(
        self,
        size: int,  # of the dataset
        batch_size: int,  # of one rank
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if min(size, batch_size, world_size) < 1 or not 0 <= rank < world_size or start_step < 0:
            raise UserValueError(
                f"no batches of {batch_size} from {size} images at step {start_step} "
                f"for rank {rank} of {world_size}"
            )
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, None
        step = self.start_step
        while True:
            first = (step * self.world_size + self.rank) * self.batch_size
            batch = []
            for position in range(first, first + self.batch_size):
                if position // self.size != epoch:
                    epoch = position // self.size
                    order = epoch_order(self.size, self.seed, epoch)
                batch.append((position, int(order[position % self.size])))
            yield batch
            step += 1


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the dataset in an epoch: a permutation of range(size) that depends on (seed, epoch)."""
    # RandomState's numbers are frozen; those of NumPy's newer generators may change with its version.
    low, high = seed % 2**32, seed // 2**32 % 2**32
    return np.random.RandomState([low, high, epoch]).permutation(size)


def _list_image_files_recursively(data_dir: str) -> list[str]:
    """The paths of all images below a folder, depth first in alphabetical order."""
    return list_images(data_dir)


def _choose(values: Sequence[Any] | np.ndarray, indices: Sequence[int]) -> Sequence[Any] | np.ndarray:
    return values[indices] if isinstance(values, np.ndarray) else [values[idx] for idx in indices]


def _is_npz(path: str) -> bool:
    return path.lower().endswith(".npz")


def _read_npz(path: str) -> tuple[np.ndarray, np.ndarray | None, list[str] | None]:
    """(images, labels [N] or None, names of the classes or None)."""
    with open_arrays(path) as arrays:
        if "arr_0" not in arrays:
            raise UserValueError(f"{path!r} has no array arr_0 with the images, only {', '.join(arrays)}")
        # Every rank would hold all of a file that is read; of a mapped one all share what is used.
        images = None if is_remote(path) else mapped_member(path, "arr_0", check=True)
        if images is None:
            logger.log(f"{path} is compressed or remote: it is read whole by every rank")
            images = arrays["arr_0"]
        if images.ndim < 3:
            raise UserValueError(
                f"arr_0 of {path!r} must be images [N, H, W, C] or [N, H, W], not {list(images.shape)}"
            )
        labels = next((arrays[key] for key in ("labels", "arr_1") if key in arrays), None)
        if labels is not None:
            labels = check_labels(labels, len(images), path)
        return images, labels, stored_class_names(arrays, path)


class _Guarded(Dataset):
    """A dataset whose items tell which images could not be read: the main process counts them."""

    def __init__(self, dataset: SquareImages):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, idx: int) -> tuple[np.ndarray | None, dict[str, np.ndarray], list[str]]:
        return self.dataset.load_or_next(idx)


class _Seeded(_Guarded):
    """The same for the keys of `ResumableBatches`: the augmentation is a function of (seed, position)."""

    def __init__(self, dataset: SquareImages, seed: int):
        super().__init__(dataset)
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray | None, dict[str, np.ndarray], list[str]]:
        position, idx = key
        arr, out_dict, bad = self.dataset.load_or_next(idx, random.Random(f"{self.seed}/{position}"))
        return arr, {"position": np.array(position, dtype=np.int64), **out_dict}, bad


def _collate(
    items: Sequence[tuple[np.ndarray | None, dict[str, np.ndarray], list[str]]],
) -> tuple[th.Tensor | None, dict[str, th.Tensor], list[str]]:
    arrays, dicts, bad = zip(*items, strict=True)
    messages = [message for one in bad for message in one]
    if any(arr is None for arr in arrays):  # too many bad ones: the messages will stop the training
        return None, {}, messages
    cond = {key: th.from_numpy(np.stack([d[key] for d in dicts])) for key in dicts[0]}
    return th.from_numpy(np.stack(arrays)), cond, messages


def _endless(loader: DataLoader, max_bad: int, as_floats: bool = False) -> Batches:
    stream = _batches(loader, max_bad, as_floats)
    # A program may end in the middle of a stream: closing it tells its workers, which one signal would not.
    atexit.register(_close, weakref.ref(stream))
    return stream


def _close(reference: weakref.ref) -> None:
    stream = reference()
    if stream is not None:
        stream.close()


def _batches(loader: DataLoader, max_bad: int, as_floats: bool) -> Batches:
    seen: set[str] = set()
    while True:
        for batch, cond in _pass(loader, max_bad, seen):
            yield from_uint8(batch) if as_floats else batch, cond


def _pass(loader: DataLoader, max_bad: int, seen: set[str]) -> Batches:
    for batch, cond, bad in loader:
        _report(bad, seen, max_bad, logger.warn)
        if batch is None:
            raise _none_readable(bad)
        yield batch, cond


def _report(bad: Sequence[str], seen: set[str], max_bad: int, warn: Callable[[str], Any]) -> None:
    """Warn of every bad image once. Raises UserError at more than `max_bad` of them."""
    for message in bad:
        if message in seen:
            continue
        seen.add(message)
        if len(seen) > max_bad:
            raise UserError(
                f"more than max_bad={max_bad} images cannot be read, the last of them {message}; "
                "repair or remove them (the others were named before)"
            )
        warn(f"WARNING: skipped an image that cannot be read ({len(seen)} of at most {max_bad}): {message}")


def _none_readable(bad: Sequence[str]) -> UserError:
    return UserError(f"none of the images can be read, for instance {bad[-1]}")
