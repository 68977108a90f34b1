"""Write the pictures of a dataset as files, at the size of training and under numbers: what samples are made from and
compared with.

    python scripts/export_pictures.py --config configs/translation/camvid-small.yaml --split validation --out out \
        data.params.validation.params.pictures.params.root=camvid

Writes OUT/KEY/000000.png, ... for every key of the dataset in the configuration's `data` (of cached latents, its
`pictures`), without random crops and flips. The numbers are those of scripts/sample_diffusion.py, which takes
--given KEY=OUT/KEY; evaluations/segmentation.py and evaluator.py compare its folders with these. name=value sets any
entry of the configuration.
"""

import argparse
from pathlib import Path

import _ldm  # (first: it makes the packages importable)
import torch
from cache_latents import open_pictures
from tqdm import tqdm

from guided_diffusion.errors import UserValueError, exit_on_user_error


@exit_on_user_error()
def main():
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flags.add_argument("--config", required=True, help="with the dataset (.yaml)")
    flags.add_argument(
        "--split", default="validation", help="train, validation or test: an entry of its data"
    )
    flags.add_argument("--out", required=True, help="the folder for the pictures")
    flags.add_argument("--num_samples", type=int, help="only so many, the first ones")
    flags.add_argument("changes", nargs="*", metavar="name=value", help="entries of the configuration")
    args = flags.parse_args()
    pictures = open_pictures(_ldm.merged_config([args.config], args.changes), args.split)
    count = len(pictures) if args.num_samples is None else args.num_samples
    if not 1 <= count <= len(pictures):
        raise UserValueError(f"--num_samples {count}: the split {args.split} has {len(pictures)} pictures")
    for number in tqdm(range(count), desc="pictures", dynamic_ncols=True):
        item = pictures[number]
        for key in pictures.keys:
            picture = torch.from_numpy(item[key]).permute(2, 0, 1)[None]
            _ldm.save_pictures(picture, Path(args.out) / key, [number])
    print(f"{count} of {', '.join(pictures.keys)} in {args.out}")


if __name__ == "__main__":
    main()
