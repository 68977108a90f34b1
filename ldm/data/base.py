"""What the datasets of images share: one place, flip and size for all images of an item."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Dataset

from guided_diffusion.errors import UserValueError
from guided_diffusion.image_files import draw_cut
from ldm.data.images import INTERPOLATIONS, Reading, Resampling, Source
from ldm.util import instantiate_from_config

Item = dict[str, Any]


class Images(Dataset):
    """Items of one or several images of one scene: {key: float32 [H, W, 3] in [-1, 1], "file_path_": str}.

    Crops and flips are drawn from Python's `random`. Raises UserValueError for an unknown interpolation or size,
    BadImageError for a damaged file when its item is read.
    """

    def __init__(
        self,
        entries: Sequence[Mapping[str, Source]],  # by key; `file_path_` is the first one's
        size: int | Sequence[int],  # of a square, or (height, width)
        random_crop: bool = False,  # 0.8 to all of the image, else the whole middle
        random_flip: bool = False,  # left-right, half of the time
        interpolation: str = "bicubic",  # of photos; label maps are resized with the nearest pixel
    ):
        super().__init__()
        if interpolation not in INTERPOLATIONS:
            raise UserValueError(
                f"interpolation must be one of {', '.join(INTERPOLATIONS)}, not {interpolation!r}"
            )
        self.entries = list(entries)
        self.size = parse_size(size)
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.interpolation = interpolation

    @classmethod
    def readings(cls, **params) -> dict[str, Reading]:
        """How the images of such a data set are read, by key, from its parameters alone: no file is opened."""
        return {}

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of an item's images."""
        return tuple(self.entries[0])

    @property
    def paths(self) -> list[str]:
        """`file_path_` of every item."""
        return [_path(entry) for entry in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Item:
        entry = self.entries[index]
        images = {key: source.read() for key, source in entry.items()}
        first = next(iter(images.values()))
        cut = draw_cut(first.size, self.size, self.random_crop, self.random_flip)
        item: Item = {}
        for key, image in images.items():
            is_map = entry[key].reading.is_map
            resample = Resampling.NEAREST if is_map else INTERPOLATIONS[self.interpolation]
            item[key] = np.ascontiguousarray(cut.apply(image, resample)).astype(np.float32) / 127.5 - 1
        return {**item, "file_path_": _path(entry)}


class FirstStageImages(Dataset):
    """The images of a paired dataset one by one, as an autoencoder wants them: each as `image`.

    data: the paired dataset, or its configuration; keys: which of its images (all of them by default).
    """

    def __init__(self, data: Dataset | Mapping, keys: Sequence[str] | None = None):
        super().__init__()
        self.data = _made(data)
        self.keys = tuple(keys or self.data.keys)
        if unknown := sorted(set(self.keys) - set(self.data.keys)):
            raise UserValueError(
                f"the data have no {unknown[0]!r}: their keys are {', '.join(self.data.keys)}"
            )

    def __len__(self) -> int:
        return len(self.data) * len(self.keys)

    def __getitem__(self, index: int) -> Item:
        number, key = divmod(index, len(self.keys))
        pair = self.data[number]
        return {"image": pair[self.keys[key]], "file_path_": pair["file_path_"]}


class Concatenated(ConcatDataset):
    """Several datasets, or their configurations, one after the other."""

    def __init__(self, parts: Sequence[Dataset | Mapping]):
        if not parts:
            raise UserValueError("Concatenated needs at least one dataset under `parts`")
        super().__init__([_made(part) for part in parts])


def parse_size(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) out of a number or a pair. UserValueError for anything else."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise UserValueError(f"size must be a number of pixels or [height, width], not {size!r}")
    return pair


def check_sizes(entries: Sequence[Mapping[str, Source]]) -> None:
    """UserValueError that names the first pair whose images are of different sizes."""
    for entry in entries:
        sizes = {key: source.size() for key, source in entry.items()}
        if len(set(sizes.values())) > 1:
            told = ", ".join(
                f"{source.path} is {'x'.join(map(str, sizes[key]))}" for key, source in entry.items()
            )
            raise UserValueError(f"the images of a pair must be of one size (upright), but {told}")


def _path(entry: Mapping[str, Source]) -> str:
    return str(next(iter(entry.values())).path)


def _made(data: Dataset | Mapping) -> Dataset:
    return data if isinstance(data, Dataset) else instantiate_from_config(data, Dataset, "data")
