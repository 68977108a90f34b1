"""Write the images of a dataset as files, at the size of training and under numbers: what samples are made from and
compared with.

    python experiments/export_images.py --config configs/translation/camvid-small.yaml --split validation --out out \
        data.params.validation.params.images.params.root=camvid

Writes OUT/KEY/000000.png, ... for every key of the dataset in the configuration's `data` (of cached latents, its
`images`), without random crops and flips. The numbers are those of scripts/sample_diffusion.py, which takes
--given KEY=OUT/KEY; evaluations/segmentation.py and evaluator.py compare its folders with these. name=value sets any
entry of the configuration.
"""

from guided_diffusion import flags
from guided_diffusion.errors import UserValueError, exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script."""
    own = flags.Parser(__doc__)
    own.add("--config", required=True, path="source", group="data", help="with the dataset (.yaml)")
    own.add(
        "--split", default="validation", group="data", help="which entry of its data: train, validation, test"
    )
    own.add("--out", required=True, help="the folder for the images")
    own.add("--num_samples", kind=int, unset="all", help="only so many, the first ones")
    own.add("changes", nargs="*", metavar="name=value", help="entries of the configuration")
    return own


if __name__ == "__main__":
    flags.answer_early(parser)  # before the slow imports


from pathlib import Path

from PIL import Image

from guided_diffusion.image_files import stored_pixels
from guided_diffusion.progress import tqdm
from ldm import inference
from ldm.data.latents import open_images


@exit_on_user_error()
def main():
    args = parser().parse_args()
    images = open_images(inference.merged_config([args.config], args.changes), args.split)
    count = len(images) if args.num_samples is None else args.num_samples
    if count > len(images):
        raise UserValueError(f"--num_samples {count}: the split {args.split} has {len(images)} images")
    for number in tqdm(range(count), desc="images", dynamic_ncols=True):
        item = images[number]
        for key in images.keys:
            folder = Path(args.out) / key
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(stored_pixels(item[key])).save(folder / f"{number:06}.png")
    print(f"{count} of {', '.join(images.keys)} in {args.out}")


if __name__ == "__main__":
    main()
