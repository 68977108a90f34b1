"""A complete small training run, started by tests in processes of its own: python tests/train_driver.py FOLDER --flags.

The data are a function of the position alone: images in [-1, 1] of 8 x 8 pixels and their labels.
"""

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch as th

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion import checkpoint_util, dist_util, logger  # noqa: E402
from guided_diffusion.errors import exit_on_user_error  # noqa: E402
from guided_diffusion.resample import create_named_schedule_sampler  # noqa: E402
from guided_diffusion.script_util import create_gaussian_diffusion  # noqa: E402
from guided_diffusion.train_util import TrainLoop  # noqa: E402
from guided_diffusion.unet import UNetModel  # noqa: E402


def small_model():
    th.manual_seed(0)
    model = UNetModel(8, 1, 64, 1, 1, (), channel_mult=(1,), num_classes=4, use_scale_shift_norm=True)
    # Upstream starts with zeros in the last layers, which hides everything before them from the first steps.
    for parameter in model.parameters():
        th.nn.init.normal_(parameter, std=0.05)
    return model


def sample_images(batch_size, start=0, broken=()):
    """This rank's batches from step `start` on; the same global batch however many ranks share it.

    broken: places (counted over everything) of images that are not finite.
    """
    step = start
    while True:
        first = (step * dist_util.get_world_size() + dist_util.get_rank()) * batch_size
        rows, labels = [], []
        for place in range(first, first + batch_size):
            generator = th.Generator().manual_seed(place)
            rows.append(th.rand(1, 8, 8, generator=generator) * 2 - 1 + (th.nan if place in broken else 0))
            labels.append(place % 4)
        yield th.stack(rows), {"y": th.tensor(labels)}
        step += 1


def loop(batch_size=2, sampler="uniform", model=None, **changes):
    diffusion = create_gaussian_diffusion(steps=100)
    flags = {
        "model": model or small_model(),
        "diffusion": diffusion,
        "data": partial(sample_images, batch_size),
        "batch_size": batch_size,
        "microbatch": -1,
        "lr": 3e-4,
        "ema_rate": "0.9,0.99",
        "log_interval": 5,
        "save_interval": 5,
        "resume_checkpoint": "",
        "schedule_sampler": create_named_schedule_sampler(sampler, diffusion),
        "seed": 3,
    }
    return TrainLoop(**{**flags, **changes})


def say(line):
    """Print a line whole: with PYTHONUNBUFFERED, print writes in pieces, which mix with other ranks'."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--microbatch", type=int, default=-1)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--save_interval", type=int, default=5)
    parser.add_argument("--sampler", default="uniform")
    parser.add_argument("--resume", default="")
    parser.add_argument("--unseeded", action="store_true")
    parser.add_argument(
        "--slow", type=float, default=0, help="seconds that writing one checkpoint file takes"
    )
    parser.add_argument("--broken", type=int, nargs="*", default=[])
    parser.add_argument("--pause", type=float, default=0, help="seconds between two steps")
    args = parser.parse_args()

    if args.slow:
        whole = checkpoint_util.write

        def write_slowly(value, file):
            whole(value, file)
            file.flush()
            file.truncate(file.tell() // 2)
            time.sleep(args.slow)  # a process killed here leaves half a file
            file.seek(0)
            whole(value, file)

        checkpoint_util.write = write_slowly

    say(f"pid {os.getpid()}")
    dist_util.setup_dist()
    logger.configure(dir=args.folder, format_strs=["json"])
    if args.unseeded:
        th.manual_seed(dist_util.get_rank())

    def data(start):
        for batch in sample_images(args.batch_size, start, args.broken):
            time.sleep(args.pause)
            say("step")
            yield batch

    training = loop(
        args.batch_size,
        args.sampler,
        data=data,
        microbatch=args.microbatch,
        iterations=args.iterations,
        save_interval=args.save_interval,
        resume_checkpoint=args.resume,
        seed=None if args.unseeded else 3,
    )
    training.run_loop()
    say("finished" if not training.stop_requested else "stopped")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
