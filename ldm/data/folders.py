"""Single images in folders, for autoencoders and unconditional models."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from guided_diffusion.errors import UserFileError, UserValueError
from guided_diffusion.image_files import list_images
from ldm.data.base import Images
from ldm.data.images import Reading, Source


class ImageFolder(Images):
    """All images below one folder or several, under the key `image`.

    size, random_crop, random_flip, interpolation: see Images. UserFileError for an empty folder.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        size: int | Sequence[int] = 256,
        roots: Sequence[str | Path] = (),  # instead of `root`
        **how,
    ):
        if (root is None) == (not roots):
            raise UserValueError("ImageFolder needs one of `root` and `roots`, and not both")
        folders = [root] if root is not None else roots
        paths = [path for folder in folders for path in list_images(folder)]
        super().__init__([{"image": Source(Path(path))} for path in paths], size, **how)

    @classmethod
    def readings(cls, interpolation: str = "bicubic", **_params) -> dict[str, Reading]:
        return {"image": Reading(interpolation=interpolation)}


def read_images(
    source: str | Path,
    size: int | Sequence[int],
    reading: Reading = Reading(),  # noqa: B008 - it is frozen
) -> torch.Tensor:
    """The images of a folder in the order of their names, or one image: float32 [N, 3, H, W] in [-1, 1], the
    middle of each, scaled to just cover `size`. UserError where there are none."""
    path = Path(source)
    if not path.exists():
        raise UserFileError(f"no such file or folder: {source}")
    paths = list_images(path) if path.is_dir() else [path]
    sources = [{"image": Source(Path(file), reading)} for file in paths]
    data = Images(sources, size, interpolation=reading.interpolation)
    return torch.from_numpy(np.stack([data[k]["image"] for k in range(len(data))])).permute(0, 3, 1, 2)
