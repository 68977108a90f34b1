"""What the scripts share: flags, starting a run, training, collecting samples."""

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch as th
import torch.distributed as dist

from . import checkpoint_util, dist_util, logger
from .errors import UserValueError
from .image_datasets import SquareImages, classes_of, load_stream, open_dataset
from .image_files import LABEL_FROM
from .resample import create_named_schedule_sampler
from .script_util import (
    add_dict_to_argparser,
    args_to_dict,
    classifier_defaults,
    model_and_diffusion_defaults,
    sr_model_and_diffusion_defaults,
)
from .seeding import derive_seed
from .train_util import PRECISIONS, TrainLoop, resumed_checkpoint

# ------------------------------------------------------------------------------------------------------------- flags


def training_defaults() -> dict:
    """Upstream's flags of image and super-resolution training."""
    return dict(
        data_dir="",
        schedule_sampler="uniform",
        lr=1e-4,
        weight_decay=0.0,
        lr_anneal_steps=0,
        batch_size=1,
        microbatch=-1,  # -1 disables microbatches
        ema_rate="0.9999",  # comma-separated list of EMA values
        log_interval=10,
        save_interval=10000,
        resume_checkpoint="",
        use_fp16=False,
        fp16_scale_growth=1e-3,
    )


def sampling_defaults() -> dict:
    """Upstream's flags of every script that samples."""
    return dict(clip_denoised=True, num_samples=10000, batch_size=16, use_ddim=False, model_path="")


def make_parser(doc: str, *defaults: dict) -> argparse.ArgumentParser:
    """One flag per entry of `defaults` (later ones win), and those that every script has."""
    parser = argparse.ArgumentParser(
        description=doc.strip(), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    merged = {name: value for some in defaults for name, value in some.items()}
    add_dict_to_argparser(parser, merged)
    parser.add_argument("--seed", type=int, help="the same seed gives the same result; fresh by default")
    parser.add_argument(
        "--log_dir", help="where the results go (default: $OPENAI_LOGDIR, or a new temporary folder)"
    )
    return parser


def integers(text: str) -> list[int]:
    """Numbers separated by commas: a type for flags."""
    return [int(part) for part in text.split(",")]


def add_training_flags(parser: argparse.ArgumentParser, iterations: bool = True) -> argparse.ArgumentParser:
    """Flags of training that upstream lacks; `iterations` where the script does not have its own."""
    group = parser.add_argument_group("beyond guided-diffusion")
    if iterations:
        group.add_argument("--iterations", type=int, default=0, help="stop after so many steps (0: never)")
    group.add_argument("--precision", choices=PRECISIONS, default="fp32")
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group.add_argument("--progress", action="store_true", help="show a progress bar")
    group.add_argument("--label_from", choices=LABEL_FROM, default="auto", help="what gives the classes")
    group.add_argument("--num_workers", type=int, default=1, help="processes that read images, per rank")
    group.add_argument(
        "--max_nonfinite", type=int, default=20, help="steps that may be skipped for NaN or infinity"
    )
    return parser


def start(args: argparse.Namespace) -> None:
    """Join the other ranks, open the log, take the network's flags from its checkpoint where they are at their defaults,
    and seed this rank unlike the others."""
    dist_util.setup_dist()
    logger.configure(dir=args.log_dir)
    network = sr_model_and_diffusion_defaults() if "large_size" in args else model_and_diffusion_defaults()
    for flag, described in (("model_path", network), ("classifier_path", classifier_defaults())):
        if path := getattr(args, flag, ""):
            vars(args).update(checkpoint_util.with_flags_of(path, vars(args), described))
    # Without this all ranks would draw the same noise: torch starts every process at one fixed seed.
    entropy = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed
    checkpoint_util.seed_everything(derive_seed(entropy, dist_util.get_rank()))


def pick(args: argparse.Namespace, defaults: dict) -> dict:
    """The flags that a factory of script_util takes."""
    return args_to_dict(args, defaults.keys())


def schedule_sampler(name: str, diffusion):
    """`create_named_schedule_sampler`, with an unknown name as a mistake of the user's."""
    try:
        return create_named_schedule_sampler(name, diffusion)
    except NotImplementedError as error:
        raise UserValueError(str(error)) from None


def load_model(model: th.nn.Module, path: str, flag: str, use_fp16: bool = False) -> th.nn.Module:
    """`model` with the weights of `path`, on this rank's device, for inference."""
    if not path:
        raise UserValueError(f"give --{flag}, the weights to use (a model*.pt or ema_*.pt file)")
    checkpoint_util.load_weights(model, checkpoint_util.read_weights(path), path)
    model.to(dist_util.dev())
    if use_fp16:
        model.convert_to_fp16()
    return model.eval()


# ---------------------------------------------------------------------------------------------------------- training


def train(
    args: argparse.Namespace,
    model: th.nn.Module,
    diffusion,
    *,
    image_size: int,
    class_cond: bool,
    loop: type[TrainLoop] = TrainLoop,
    random_crop: bool = False,
    prepare: Callable[[Iterator], Iterator] = iter,
    from_data: Mapping[str, Callable[[SquareImages], Any]] | None = None,
    **more,
) -> None:
    """Train with the flags of `training_defaults` and `add_training_flags`; `more` goes to `loop`.

    prepare: changes the stream of batches (images [b, C, H, W], {"y": [b]}). from_data: what `loop` takes by
    name that depends on the data. The classes' names go into the run's configuration, and those of a run that is
    continued hold.
    """
    dataset = open_dataset(
        args.data_dir,
        image_size,
        class_cond=class_cond,
        random_crop=random_crop,
        image_channels=args.image_channels,
        **known_classes(args, class_cond),
    )
    if class_cond:
        check_classes(dataset.class_names, args.num_classes)
        args.class_names, args.label_from = dataset.class_names, dataset.label_from
    more |= {name: make(dataset) for name, make in (from_data or {}).items()}
    training = loop(
        model=model,
        diffusion=diffusion,
        data=None,
        batch_size=args.batch_size,
        microbatch=args.microbatch,
        lr=args.lr,
        log_interval=args.log_interval,
        save_interval=args.save_interval,
        resume_checkpoint=args.resume_checkpoint,
        schedule_sampler=schedule_sampler(args.schedule_sampler, diffusion),
        weight_decay=args.weight_decay,
        iterations=args.iterations,
        seed="auto" if args.seed is None else args.seed,
        precision=args.precision,
        compile=args.compile,
        config=vars(args),
        max_nonfinite=args.max_nonfinite,
        progress=args.progress,
        **more,
    )

    def batches(start_step):
        stream = load_stream(
            dataset, args.batch_size, training.seed, start_step, num_workers=args.num_workers
        )
        for images, cond in prepare(stream):
            cond.pop("position")  # everything else is passed to the model
            yield images, cond

    training.data = batches
    logger.log("training...")
    training.run_loop()


def known_classes(args: argparse.Namespace, class_cond: bool) -> dict:
    """What `open_dataset` is told of the classes: those of the run that `train` continues."""
    told = {"label_from": args.label_from, "num_classes": args.num_classes if class_cond else 0}
    path = resumed_checkpoint(args.resume_checkpoint) if class_cond else None
    if path is None:
        return told
    return told | classes_of(checkpoint_util.load_complete(path)["config"] or {}, args.label_from)


def check_classes(class_names: list[str], num_classes: int) -> None:
    """UserValueError if the data have more classes than the model."""
    if len(class_names) > num_classes:
        raise UserValueError(
            f"the data have {len(class_names)} classes: give --num_classes {len(class_names)}"
        )


# ---------------------------------------------------------------------------------------------------------- sampling


def sampler_of(diffusion, use_ddim: bool) -> Callable:
    """The diffusion's ancestral or DDIM sampling loop."""
    return diffusion.ddim_sample_loop if use_ddim else diffusion.p_sample_loop


def random_labels(count: int, num_classes: int) -> th.Tensor:
    """Uniform labels, int64 [count], on this rank's device."""
    return th.randint(num_classes, (count,), device=dist_util.dev())


def collect(num_samples: int, draw: Callable[[], Iterable[th.Tensor]]) -> list[np.ndarray]:
    """Call `draw` on every rank until there are `num_samples`; its tensors [b, ...] of all ranks as arrays [N, ...]."""
    if num_samples < 1:
        raise UserValueError(f"num_samples must be at least 1, not {num_samples}")
    batches, made = [], 0
    while made < num_samples:
        batch = [th.cat(gather(tensor)).cpu().numpy() for tensor in draw()]
        batches.append(batch)
        made += len(batch[0])
        logger.log(f"created {made} samples")
    return [np.concatenate(arrays)[:num_samples] for arrays in zip(*batches, strict=True)]


def gather(tensor: th.Tensor) -> list[th.Tensor]:
    """The tensors of all ranks, which have one shape, on every rank."""
    if dist_util.get_world_size() == 1:
        return [tensor]
    parts = [th.empty_like(tensor) for _ in range(dist_util.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts


def save_samples(*arrays: np.ndarray) -> None:
    """samples_NxHxWxC.npz in the log's folder: arr_0 = uint8 images, arr_1 = labels where there are any."""
    if dist_util.get_rank() == 0:
        shape = "x".join(map(str, arrays[0].shape))
        path = os.path.join(logger.get_dir(), f"samples_{shape}.npz")
        logger.log(f"saving to {path}")
        np.savez(path, *arrays)
    dist.barrier()
    logger.log("sampling complete")
