"""Losses of a joint model on images that it has not seen: every term of equation 6 without any shift, so that heads read
the noised image alone, and the share of labels that are read right.

    python experiments/held_out_scores.py runs/mine data/test.npz --json scores.json --samples 500

--samples also draws so many and measures their Frechet distance to the images, in pixels.
"""

from guided_diffusion import flags
from guided_diffusion.errors import exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script."""
    own = flags.Parser(__doc__)
    own.add("model", help="a run's folder or a checkpoint", path="source")
    own.add("data", help="images with their modalities, as for training", path="source")
    own.add("--json", default="")
    own.add("--images", default=360, low=1, high=100_000, group="data", help="how many of them, at most")
    own.add("--samples", default=0, low=0, high=100_000, group="sampling", help="samples to draw; 0: none")
    own.add("--steps", default=25, kind=int, low=1, high=100_000, group="sampling", help="of DPM-Solver++")
    own.add("--seed", default=0)
    return own


if __name__ == "__main__":
    flags.answer_early(parser)  # before the slow imports


import json
from pathlib import Path

import torch as th

from evaluations.frechet import fit, frechet_distance
from guided_diffusion.image_datasets import hold_out
from guided_diffusion.mt.evaluation import held_out_losses
from guided_diffusion.mt.model import JointModel
from guided_diffusion.mt.run import data_of
from guided_diffusion.seeding import PerSample

BATCH = 250  # samples that are drawn at once


@exit_on_user_error()
def main():
    args = parser().parse_args()
    model = JointModel.load(args.model)
    dataset = data_of(model, args.data)
    _, (images, cond) = hold_out(dataset, min(args.images, len(dataset)), seed=0)
    scores = held_out_losses(model, images, cond, args.seed, unshifted=1.0)
    if args.samples:
        drawn = [
            model.sample(PerSample.derived(args.seed, numbers), args.steps, sampler="dpm++").images.clamp(
                -1, 1
            )
            for numbers in th.arange(args.samples).split(BATCH)
        ]
        scores["frechet"] = frechet_distance(fit(th.cat(drawn).flatten(1)), fit(images.flatten(1)))
    for name, value in scores.items():
        print(f"{name}: {value:.4f}")
    if args.json:
        Path(args.json).write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
