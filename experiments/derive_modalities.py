"""Make data of several modalities from labelled images: OUT/train.npz, and OUT/test.npz of every fifth image.

    python experiments/derive_modalities.py digits runs/digits                      # scikit-learn's, 8x8, grey
    python experiments/derive_modalities.py FOLDER runs/five --size 64 --channels 3 # a folder for every class

Beside arr_0 and labels: map, 1 where a pixel is brighter than the image's threshold after Otsu (1979), else 0; and
representation, the image's first principal components (of at most 16x16 pixels, fitted to the training part), each of
variance 1. A masked image is made in training.
"""

from guided_diffusion import flags
from guided_diffusion.errors import UserValueError, exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script."""
    own = flags.Parser(__doc__)
    own.add(
        "source", help="`digits`, or a folder (or .npz) of labelled images", path="source", also=("digits",)
    )
    own.add("out", help="where the files go", path="folder")
    own.add("--size", default=64, low=8, high=1024, group="data", help="pixels along an edge; digits have 8")
    own.add("--channels", default=3, low=1, high=3, group="data", help="1 grey, 3 RGB; digits are grey")
    own.add("--components", default=16, low=1, high=256, group="data", help="numbers of a representation")
    return own


if __name__ == "__main__":
    flags.answer_early(parser)  # before the slow imports


from pathlib import Path

import numpy as np

from guided_diffusion.image_datasets import open_dataset

EVERY = 5  # of the images one is held out
COARSE = 16  # pixels along an edge of what a representation is made of


@exit_on_user_error()
def main():
    args = parser().parse_args()
    images, labels, names = read(args.source, args.size, args.channels)
    held = np.arange(len(images)) % EVERY == EVERY - 1
    if min(held.sum(), (~held).sum()) < 1:
        raise UserValueError(f"{args.source}: {len(images)} images cannot be divided into two parts")
    vectors = principal(coarse(images), ~held, args.components)
    maps = np.stack([brighter(image) for image in images])
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name, part in (("train", ~held), ("test", held)):
        path = Path(args.out) / f"{name}.npz"
        arrays = dict(arr_0=images, labels=labels, map=maps, representation=vectors)
        np.savez(path, class_names=np.array(names), **{key: value[part] for key, value in arrays.items()})
        print(f"{path}: {part.sum()} images")


def read(source: str, size: int, channels: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(uint8 [N, H, W, C], int64 [N], names of the classes), in an order that mixes the classes and is always the same."""
    if source == "digits":
        from sklearn.datasets import load_digits

        data = load_digits()
        images = (data.images[..., None] / 16 * 255).round().astype(np.uint8)
        labels, names = data.target.astype(np.int64), [str(k) for k in range(10)]
    else:
        dataset = open_dataset(source, size, class_cond=True, random_flip=False, image_channels=channels)
        items = [dataset[k] for k in range(len(dataset))]
        images = np.stack([as_uint8(image) for image, _ in items])
        labels = np.array([int(more["y"]) for _, more in items])
        names = list(dataset.class_names)
    order = np.random.RandomState(0).permutation(len(images))
    return images[order], labels[order], names


def as_uint8(image: np.ndarray) -> np.ndarray:
    """An item of a data set [C, H, W] as pixels [H, W, C]."""
    pixels = (
        image if image.dtype == np.uint8 else np.clip((image + 1) * 127.5, 0, 255).round().astype(np.uint8)
    )
    return pixels.transpose(1, 2, 0)


def brighter(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W]: 1 where the mean of the channels lies above the threshold that parts it best, 0 elsewhere."""
    grey = image.mean(axis=2)
    levels = np.unique(grey)
    below = [grey <= level for level in levels[:: max(1, len(levels) // 64)]]
    spread = [
        b.mean() * (1 - b.mean()) * (grey[~b].mean() - grey[b].mean()) ** 2 if not b.all() else 0.0
        for b in below
    ]
    return (~below[int(np.argmax(spread))]).astype(np.uint8)


def coarse(images: np.ndarray) -> np.ndarray:
    """float64 [N, D]: means of blocks, at most COARSE along an edge."""
    n, h, w, c = images.shape
    step = max(1, -(-h // COARSE))
    cut = images[:, : h // step * step, : w // step * step] / 127.5 - 1
    return cut.reshape(n, h // step, step, w // step, step, c).mean(axis=(2, 4)).reshape(n, -1)


def principal(rows: np.ndarray, fitted: np.ndarray, count: int) -> np.ndarray:
    """float32 [N, count]: the principal components of `rows` [N, D] by those of the mask `fitted`. UserValueError for more
    than these have."""
    known = rows[fitted] - rows[fitted].mean(axis=0)
    _, scale, axes = np.linalg.svd(known, full_matrices=False)
    if count > (rank := int((scale > 1e-6 * scale[0]).sum())):
        raise UserValueError(f"--components {count}: these images have {rank}")
    axes = axes[:count] * np.sign(axes[:count, np.abs(axes[:count]).argmax(axis=1)].diagonal())[:, None]
    return ((rows - rows[fitted].mean(axis=0)) @ axes.T / scale[:count] * np.sqrt(len(known))).astype(
        np.float32
    )


if __name__ == "__main__":
    main()
