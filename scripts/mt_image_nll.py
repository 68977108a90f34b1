"""The multi-task variational bound of a model of mt_image_train.py, in bits per dimension, term by term.

    python scripts/mt_image_nll.py --model_path runs/mine --data_dir images/ --num_samples 64 --steps 250

L0: prior; L1: transitions of the latent; L2_NAME: each modality given the latent, mean over timesteps; L3:
the image itself; total: an upper bound of -log p(image, modalities). With `--modalities ""` models these are
image_nll.py's numbers. nll.npz in the log's folder holds every term of every image, by timestep.
"""

import argparse
import os

import numpy as np
import torch as th
import torch.distributed as dist

from guided_diffusion import dist_util, logger
from guided_diffusion.errors import UserValueError, exit_on_user_error
from guided_diffusion.image_datasets import classes_of, open_dataset
from guided_diffusion.image_files import LABEL_FROM
from guided_diffusion.mt.modality_set import batch_of
from guided_diffusion.mt.model import JointModel
from guided_diffusion.script_util import str2bool
from guided_diffusion.seeding import PerSample


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = flags.add_argument
    add("--model_path", required=True, help="a run folder or a checkpoint*.pt")
    add("--weights", default="ema", help="ema (its first), a rate such as 0.9999, or model")
    add("--data_dir", required=True, help="a folder of images or an .npz file")
    add(
        "--label_from",
        choices=LABEL_FROM,
        default="auto",
        help="what gives the classes; auto: as in training",
    )
    add("--num_samples", type=int, default=1000, help="images to measure, the first of the data")
    add("--batch_size", type=int, default=16)
    add("--steps", default="", help="a bound over fewer steps (default: all)")
    add("--seed", type=int, default=0)
    add("--clip_denoised", type=str2bool, default=True)
    add("--log_dir", help="where the results go (default: $OPENAI_LOGDIR, or a new temporary folder)")
    return flags


@exit_on_user_error()
def main():
    args = parser().parse_args()
    if args.num_samples < 1 or args.batch_size < 1:
        raise UserValueError("num_samples and batch_size must be at least 1")
    dist_util.setup_dist()
    logger.configure(dir=args.log_dir)
    model = JointModel.load(args.model_path, args.weights)
    model.network.to(dist_util.dev())
    labelled = model.modalities.first("label") is not None
    dataset = open_dataset(
        args.data_dir,
        model.flags["image_size"],
        class_cond=labelled,
        random_flip=False,
        image_channels=model.flags["image_channels"],
        **classes_of(model.flags, args.label_from),
    )
    count = min(args.num_samples, len(dataset))
    own = range(dist_util.get_rank(), count, dist_util.get_world_size())
    parts = []
    for first in range(0, len(own), args.batch_size):
        indices = own[first : first + args.batch_size]
        parts.append(bound_of(dataset, indices, model, args))
        logger.log(f"{min(first + args.batch_size, len(own))} of {len(own)} images")
    every = [parts]
    if dist_util.get_world_size() > 1:
        every = [None] * dist_util.get_world_size()
        dist.all_gather_object(every, parts)
    merged = [part for rank in every for part in rank]
    terms = {name: np.concatenate([part[name] for part in merged]) for name in merged[0]}
    if dist_util.get_rank() == 0:
        path = os.path.join(logger.get_dir(), "nll.npz")
        np.savez(path, **terms)
        for name, values in terms.items():
            # L1 is a sum over timesteps, L2 a mean.
            by_image = values.sum(axis=1) if name == "L1" else values
            logger.log(f"{name}: {by_image.mean():.5f} bits per dimension")
        steps = terms["L1"].shape[1]
        logger.log(f"{count} images, {steps} steps, saved to {path}")


def bound_of(dataset, indices, model: JointModel, args) -> dict[str, np.ndarray]:
    """Every term [b] or [b, T] for the images with these indices."""
    items = [dataset[index] for index in indices]
    images = th.stack([th.from_numpy(image) for image, _ in items]).to(dist_util.dev())
    cond = {
        key: th.stack([th.from_numpy(extra[key]) for _, extra in items]).to(dist_util.dev())
        for key in items[0][1]
    }
    random = PerSample.derived(args.seed, indices, dist_util.dev())
    batch = model.derived(images, batch_of(model.modalities, cond), random)
    bound = model.bound(batch, args.steps, clip_denoised=args.clip_denoised, random=random)
    terms = {"L0": bound.L0, "L1": bound.L1}
    terms |= {f"L2_{name}": values for name, values in bound.L2.items()}
    terms |= {"L3": bound.L3, "total": bound.total}
    return {name: value.cpu().numpy() for name, value in terms.items()}


if __name__ == "__main__":
    main()
