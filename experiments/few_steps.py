"""How far samples of few steps are from the data, by sampler and by where the timesteps are.

    python experiments/few_steps.py --data quickstart/data/train.npz --runs quickstart/joint quickstart/single \\
        --arms "dpm++sde mean 20" "ddpm even 250" --num_samples 1000

An arm is SAMPLER SPACING STEPS. Spacings: mean (`few_timesteps`), even, even:ABAR (beginning at the last timestep with
that abar), snr:ABAR (even in log-SNR), snr:ABAR:LAMBDA (ending at that one), rho:ABAR:RHO[:LAMBDA] (Karras et al. 2022).
Prints the Frechet distance to the data in the features of three classifiers of digits, their mean first. Single seed, 0.
"""

from guided_diffusion import flags


def parser() -> flags.Parser:
    """The flags of this script."""
    own = flags.Parser(__doc__)
    own.add(
        "--data",
        required=True,
        group="data",
        path="source",
        help="digits with labels, as the quickstart writes them",
    )
    own.add(
        "--runs",
        nargs="+",
        required=True,
        group="model",
        path="source",
        help="run folders of mt_image_train.py",
    )
    own.add("--arms", nargs="+", required=True, group="sampling", help="SAMPLER SPACING STEPS")
    own.add("--num_samples", default=1000)
    return own


if __name__ == "__main__":
    flags.answer_early(parser)  # before the slow imports

import numpy as np
import torch as th
from quickstart import as_tensor, judge

from evaluations.frechet import fit, frechet_distance
from guided_diffusion.errors import UserValueError, exit_on_user_error
from guided_diffusion.figures import to_uint8
from guided_diffusion.mt.model import JointModel, joint_process
from guided_diffusion.mt.sampling import joint_sample
from guided_diffusion.mt.solvers import few_timesteps, half_log_snr
from guided_diffusion.script_util import DiffusionConfig, split_flags
from guided_diffusion.seeding import PerSample

BATCH = 250


def timesteps(abar: np.ndarray, spacing: str, count: int) -> list[int]:
    """`count` timesteps, ascending, by a spacing of the module's docstring."""
    kind, *numbers = spacing.split(":")
    numbers, lambdas, every = [float(n) for n in numbers], half_log_snr(abar), np.arange(len(abar))
    if kind == "mean":
        return few_timesteps(abar, count)
    last = int((abar >= (numbers[0] if numbers else 0)).nonzero()[0][-1])
    if kind == "even":
        return np.linspace(0, last, count).round().astype(int).tolist()
    if kind not in ("snr", "rho"):
        raise UserValueError(f"unknown spacing {spacing!r}: choose mean, even, snr or rho")
    rho = numbers.pop(1) if kind == "rho" else None
    ends = np.array([min([*numbers[1:], lambdas[0]]), lambdas[last]])
    wanted = np.linspace(*ends, count)
    if rho:
        wanted = -rho * np.log(np.linspace(*np.exp(-ends / rho), count))
    order = np.arange(count)
    kept = np.maximum.accumulate(np.interp(-wanted, -lambdas, every).round().astype(int) - order) + order
    return np.minimum(kept, last - order[::-1]).tolist()


def samples(model: JointModel, sampler: str, spacing: str, count: int, number: int) -> np.ndarray:
    """`number` images uint8 [N, H, W, C]."""
    config = DiffusionConfig(**split_flags(model.flags)[1])
    kept = timesteps(model.modalities.process.alphas_cumprod, spacing, count)
    diffusion = joint_process(config, list(model.modalities), model.flags["aggregation"], kept)
    made = []
    for first in range(0, number, BATCH):
        random = PerSample.derived(0, range(first, min(first + BATCH, number)), "cpu")
        shape = (len(random), *model.shape)
        drawn = joint_sample(diffusion, model.modalities, model.network, shape, random, sampler=sampler)
        made.append(to_uint8(drawn.images))
    return np.concatenate(made)


@exit_on_user_error()
def main():
    args = parser().parse_args()
    arms = [arm.split() for arm in args.arms]
    for arm in arms:
        if len(arm) != 3 or arm[0] not in flags.SAMPLERS or not arm[2].isdecimal():
            raise UserValueError(
                f"--arms {' '.join(arm)!r}: expected SAMPLER SPACING STEPS, such as 'dpm++sde mean 20'"
            )
    with np.load(args.data) as arrays:
        images, labels = arrays["arr_0"], th.from_numpy(arrays["labels"])
    judges = [judge(images, labels, seed)[:-1] for seed in range(3)]
    with th.no_grad():
        real = [fit(features(as_tensor(images))) for features in judges]
        for run in args.runs:
            model = JointModel.load(run)
            for sampler, spacing, count in arms:
                made = as_tensor(samples(model, sampler, spacing, int(count), args.num_samples))
                found = [frechet_distance(fit(f(made)), r) for f, r in zip(judges, real, strict=True)]
                each = " ".join(f"{one:.1f}" for one in found)
                print(f"{run} {sampler} {spacing} {count}: {np.mean(found):.2f} ({each})", flush=True)


if __name__ == "__main__":
    main()
