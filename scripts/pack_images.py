"""Pack a folder of images into one .npz of uint8 arrays, scaled and cropped once, for data sets that are too large to
decode in every epoch.

    python scripts/pack_images.py imagenet/train imagenet64.npz --image_size 64 --num_workers 8
    python scripts/mt_image_train.py --data_dir imagenet64.npz --image_size 64 ...

Training sees the batches that the folder itself gives (without --random_crop, which needs the whole images), at the cost
of reading bytes: the file is not compressed, and every rank maps it. It holds arr_0 = uint8 [N, H, W, C], where the
names of files or folders give classes labels = int64 [N] and class_names, and takes N x size x size x channels bytes.
"""

from guided_diffusion import flags
from guided_diffusion.errors import UserValueError, exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script."""
    own = flags.Parser(__doc__)
    own.add("source", path="source", help="a folder of images, or an .npz of larger ones")
    own.add("target", help="a name that ends in .npz")
    own.add("--image_size", kind=int, required=True)
    own.add("--image_channels", default=3)
    own.add("--label_from", default="auto")
    own.add(
        "--num_classes",
        default=0,
        low=0,
        help="keeps class names that are numbers below it; 0: they are counted",
    )
    own.add(
        "--max_bad", default=10, help="unreadable images, for which the next one stands in, before it stops"
    )
    own.add("--num_workers", default=2)
    return own


@exit_on_user_error()
def main():
    args = parser().parse_args()
    if not args.target.endswith(".npz"):
        raise UserValueError(f"{args.target} must end in .npz")
    import numpy as np

    from guided_diffusion.array_files import Rows, write_npz
    from guided_diffusion.image_datasets import load_once, open_dataset
    from guided_diffusion.image_files import NoLabelsError
    from guided_diffusion.progress import tqdm

    options = dict(image_channels=args.image_channels, max_bad=args.max_bad, random_flip=False)
    try:
        named = dict(class_cond=True, label_from=args.label_from, num_classes=args.num_classes)
        dataset = open_dataset(args.source, args.image_size, **named, **options)
    except NoLabelsError as error:
        if args.label_from != "auto":
            raise
        print(f"without labels: {error}")
        dataset = open_dataset(args.source, args.image_size, **options)
    count, labels = len(dataset), []

    def images():
        for batch, cond in load_once(dataset, 64, args.num_workers):
            labels.extend(cond["y"].tolist() if cond else ())
            bar.update(len(batch))
            yield from batch.numpy().transpose(0, 2, 3, 1)

    def known_labels():  # by then all images have been read: of those that cannot be, the next one's stands
        yield np.array(labels)

    shape = (count, args.image_size, args.image_size, args.image_channels)
    arrays = {"arr_0": Rows(shape, np.dtype(np.uint8), images())}
    if dataset.local_classes is not None:
        arrays["labels"] = Rows((count,), np.dtype(np.int64), known_labels())
        arrays["class_names"] = np.array(dataset.class_names)
    with tqdm(total=count, unit="image") as bar:
        write_npz(args.target, arrays)
    print(f"{args.target}: {count} images, {len(dataset.class_names)} classes")


if __name__ == "__main__":
    main()
