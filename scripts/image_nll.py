"""The variational bound on the negative log likelihood of images, in bits per dimension.

Prints the mean bound and writes vb_terms.npz, mse_terms.npz and xstart_mse_terms.npz: one mean per timestep, T-1 first.

python scripts/image_nll.py --data_dir FOLDER --model_path MODEL --num_samples 1000 (and the model's flags of training)
"""

import os

import numpy as np
import torch as th
import torch.distributed as dist

from guided_diffusion import cli, dist_util, logger
from guided_diffusion.errors import exit_on_user_error
from guided_diffusion.image_datasets import load_data
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults

TERMS = ("vb", "mse", "xstart_mse")


def main():
    args = create_argparser().parse_args()
    cli.start(args)
    logger.log("creating model and diffusion...")
    model, diffusion = create_model_and_diffusion(**cli.pick(args, model_and_diffusion_defaults()))
    model = cli.load_model(model, args.model_path, "model_path", args.use_fp16)
    logger.log("creating data loader...")
    data = load_data(
        data_dir=args.data_dir,
        batch_size=args.batch_size,
        image_size=args.image_size,
        class_cond=args.class_cond,
        deterministic=True,
        image_channels=args.image_channels,
    )
    logger.log("evaluating...")
    with th.no_grad():
        run_bpd_evaluation(model, diffusion, data, args.num_samples, args.clip_denoised)


def run_bpd_evaluation(model, diffusion, data, num_samples, clip_denoised):
    """Evaluate batches until `num_samples` images (of all ranks) are done; returns the mean bound in bits/dim."""
    bounds, terms, done = [], {name: [] for name in TERMS}, 0
    while done < num_samples:
        images, cond = next(data)
        images = images.to(dist_util.dev())
        cond = {name: value.to(dist_util.dev()) for name, value in cond.items()}
        result = diffusion.calc_bpd_loop(model, images, clip_denoised=clip_denoised, model_kwargs=cond)
        for name, rows in terms.items():
            rows.append(mean_over_ranks(result[name].mean(dim=0)).cpu().numpy())
        bounds.append(mean_over_ranks(result["total_bpd"].mean()).item())
        done += len(images) * dist_util.get_world_size()
        logger.log(f"done {done} samples: bpd={np.mean(bounds)}")
    if dist_util.get_rank() == 0:
        for name, rows in terms.items():
            path = os.path.join(logger.get_dir(), f"{name}_terms.npz")
            logger.log(f"saving {name} terms to {path}")
            np.savez(path, np.mean(rows, axis=0))
    dist.barrier()
    logger.log("evaluation complete")
    return float(np.mean(bounds))


def mean_over_ranks(tensor):
    return th.stack(cli.gather(tensor)).mean(dim=0)


def create_argparser():
    own = dict(data_dir="", clip_denoised=True, num_samples=1000, batch_size=1, model_path="")
    return cli.make_parser(__doc__, own, model_and_diffusion_defaults())


if __name__ == "__main__":
    with exit_on_user_error():
        main()
