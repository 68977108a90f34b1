"""Enlarge a batch of samples with a super-resolution model.

python scripts/super_res_sample.py --model_path MODEL --base_samples samples_100x64x64x3.npz --num_samples 100 (and flags)
"""

import itertools

import blobfile as bf
import numpy as np
import torch as th

from guided_diffusion import cli, dist_util, logger
from guided_diffusion.errors import UserFileError, UserValueError, exit_on_user_error
from guided_diffusion.image_files import to_uint8
from guided_diffusion.script_util import sr_create_model_and_diffusion, sr_model_and_diffusion_defaults


def main():
    args = create_argparser().parse_args()
    cli.start(args)
    logger.log("loading data...")
    base = base_batches(args)
    logger.log("creating model...")
    model, diffusion = sr_create_model_and_diffusion(**cli.pick(args, sr_model_and_diffusion_defaults()))
    model = cli.load_model(model, args.model_path, "model_path", args.use_fp16)
    sample = cli.sampler_of(diffusion, args.use_ddim)
    shape = (args.batch_size, args.image_channels, args.large_size, args.large_size)

    def draw():
        kwargs = {name: value.to(dist_util.dev()) for name, value in next(base).items()}
        images = sample(
            model, shape, clip_denoised=args.clip_denoised, model_kwargs=kwargs, device=dist_util.dev()
        )
        return (to_uint8(images),)

    logger.log("creating samples...")
    cli.save_samples(*cli.collect(args.num_samples, draw))


def base_batches(args):
    """This rank's low-resolution images, again and again: {"low_res": [b, C, s, s] in [-1, 1], "y": int64 [b]}."""
    images, labels = read_samples(args.base_samples, args.small_size, args.image_channels, args.class_cond)
    rank, ranks = dist_util.get_rank(), dist_util.get_world_size()
    if len(images) < ranks:
        raise UserValueError(
            f"{args.base_samples} has {len(images)} images for {ranks} ranks: start fewer ranks"
        )
    places = itertools.cycle(range(rank, len(images), ranks))

    def batches():
        while True:
            chosen = list(itertools.islice(places, args.batch_size))
            low_res = th.from_numpy(images[chosen]).float().permute(0, 3, 1, 2) / 127.5 - 1
            yield {"low_res": low_res, **({"y": th.from_numpy(labels[chosen])} if args.class_cond else {})}

    return batches()


def read_samples(path, size, channels, with_labels):
    """(uint8 [N, s, s, C], int64 [N] or None) of a file that image_sample.py wrote; UserError if it is another."""
    if not path:
        raise UserValueError("give --base_samples, the .npz file of images to enlarge")
    if not bf.exists(path):
        raise UserFileError(f"base_samples not found: {path}")
    with bf.BlobFile(path, "rb") as file:
        try:
            arrays = dict(np.load(file))
        except (ValueError, OSError, TypeError) as error:
            raise UserValueError(f"{path} is not an .npz file: {error}") from error
    images, labels = arrays.get("arr_0"), arrays.get("arr_1")
    expected = f"uint8 [N, {size}, {size}, {channels}] (--small_size, --image_channels)"
    if images is None or images.dtype != np.uint8 or images.shape[1:] != (size, size, channels):
        found = "no arr_0" if images is None else f"{images.dtype} {list(images.shape)}"
        raise UserValueError(f"{path} must hold arr_0 = {expected}, it has {found}")
    if with_labels and (labels is None or labels.shape != (len(images),)):
        raise UserValueError(f"{path} has no labels arr_1 = [N], which a class-conditional model needs")
    return images, labels.astype(np.int64) if with_labels else None


def create_argparser():
    own = dict(base_samples="")
    return cli.make_parser(__doc__, cli.sampling_defaults(), own, sr_model_and_diffusion_defaults())


if __name__ == "__main__":
    with exit_on_user_error():
        main()
