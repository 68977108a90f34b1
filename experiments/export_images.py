"""Write the images of a dataset as files, at the size of training and under numbers: what samples are made from and
compared with.

    python experiments/export_images.py --config configs/translation/camvid-small.yaml --split validation --out out \
        data.params.validation.params.images.params.root=camvid

Writes OUT/KEY/000000.png, ... for every key of the dataset in the configuration's `data` (of cached latents, its
`images`), without random crops and flips. The numbers are those of scripts/sample_diffusion.py, which takes
--given KEY=OUT/KEY; evaluations/segmentation.py and evaluator.py compare its folders with these. name=value sets any
entry of the configuration.
"""

import argparse
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from guided_diffusion.errors import UserValueError, exit_on_user_error
from guided_diffusion.image_files import stored_pixels
from ldm import inference
from ldm.data.latents import open_images


@exit_on_user_error()
def main():
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flags.add_argument("--config", required=True, help="with the dataset (.yaml)")
    flags.add_argument(
        "--split", default="validation", help="train, validation or test: an entry of its data"
    )
    flags.add_argument("--out", required=True, help="the folder for the images")
    flags.add_argument("--num_samples", type=int, help="only so many, the first ones")
    flags.add_argument("changes", nargs="*", metavar="name=value", help="entries of the configuration")
    args = flags.parse_args()
    images = open_images(inference.merged_config([args.config], args.changes), args.split)
    count = len(images) if args.num_samples is None else args.num_samples
    if not 1 <= count <= len(images):
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
