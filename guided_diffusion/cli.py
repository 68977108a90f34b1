"""What the scripts share once their flags are read: starting a run, training, collecting samples."""

import argparse
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch as th
import torch.distributed as dist

from . import checkpoint_util, dist_util, logger
from .errors import UserValueError
from .execution import Execution
from .flags import (
    args_to_dict,
    classifier_defaults,
    model_and_diffusion_defaults,
    sr_model_and_diffusion_defaults,
)
from .image_datasets import SquareImages, classes_of, load_stream, open_dataset
from .image_files import NoLabelsError, are_numbers, check_labels, open_arrays
from .resample import create_named_schedule_sampler
from .sample_shards import Shards, fingerprint
from .seeding import derive_seed
from .train_util import TrainLoop, resumed_checkpoint


def start(args: argparse.Namespace) -> None:
    """Join the other ranks, open the log, take the network's flags from its checkpoint where they are at their defaults,
    and seed this rank unlike the others."""
    dist_util.setup_dist()
    open_log(args.log_dir)
    network = sr_model_and_diffusion_defaults() if "large_size" in args else model_and_diffusion_defaults()
    for flag, described in (("model_path", network), ("classifier_path", classifier_defaults())):
        if path := getattr(args, flag, ""):
            typed = getattr(args, "typed", ())
            vars(args).update(checkpoint_util.with_flags_of(path, vars(args), described, typed, strict=True))
    # Without this all ranks would draw the same noise: torch starts every process at one fixed seed.
    entropy = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed
    checkpoint_util.seed_everything(derive_seed(entropy, dist_util.get_rank()))


def open_log(log_dir: str | None, name: str = "", format_strs: list[str] | None = None) -> None:
    """Log to `log_dir`, else to $OPENAI_LOGDIR, else to runs/DATE-`name`, or where there is no name to a temporary
    folder; the same one on every rank. Tells if GPUs are idle."""
    if not log_dir and name and not os.getenv("OPENAI_LOGDIR"):
        log_dir = dist_util.from_rank_zero(
            lambda: _new_folder(f"runs/{time.strftime('%Y-%m-%d-%H-%M-%S')}-{name}")
        )
    logger.configure(dir=log_dir or None, format_strs=format_strs)
    gpus = th.cuda.device_count()
    if dist_util.get_world_size() == 1 and gpus > 1:
        logger.log(
            f"this uses 1 of {gpus} GPUs; for all: mpiexec -n {gpus} python ..., or torchrun --nproc_per_node {gpus} ..."
        )


def _new_folder(path):
    """`path`, or path-2, path-3, ... where it is there already."""
    for number in itertools.count(1):
        folder = path if number == 1 else f"{path}-{number}"
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:
            continue


def pick(args: argparse.Namespace, defaults: dict) -> dict:
    """The flags that a factory of script_util takes."""
    return args_to_dict(args, defaults.keys())


def schedule_sampler(name: str, diffusion):
    """`create_named_schedule_sampler`, with an unknown name as a mistake of the user's."""
    try:
        return create_named_schedule_sampler(name, diffusion)
    except NotImplementedError as error:
        raise UserValueError(str(error)) from None


def load_model(
    model: th.nn.Module, path: str, flag: str, use_fp16: bool = False, execution: Execution | None = None
) -> th.nn.Module:
    """`model` with the weights of `path`, on this rank's device, for inference; as `execution` runs it."""
    if not path:
        raise UserValueError(f"give --{flag}, the weights to use (a model*.pt or ema_*.pt file)")
    checkpoint_util.load_weights(model, checkpoint_util.read_weights(path), path)
    model.to(dist_util.dev())
    if use_fp16:
        model.convert_to_fp16()
    return execution.prepare(model.eval()) if execution else model.eval()


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
    """Train with the flags of `flags.training_defaults` and `flags.add_training_flags`; `more` goes to `loop`.

    prepare: changes the stream of batches (images [b, C, H, W], {"y": [b]}). from_data: what `loop` takes by
    name that depends on the data. The classes' names go into the run's configuration, and those of a run that is
    continued hold.
    """
    try:
        dataset = open_dataset(
            args.data_dir,
            image_size,
            class_cond=class_cond,
            random_crop=random_crop,
            image_channels=args.image_channels,
            **known_classes(args, class_cond),
        )
    except NoLabelsError as error:
        without = "; or train without labels: --class_cond False" if hasattr(args, "class_cond") else ""
        raise UserValueError(f"{error}{without}") from None
    if class_cond:
        fixed = bool(args.resume_checkpoint) or "num_classes" not in getattr(args, "typed", ())
        check_classes(dataset.class_names, args.num_classes, fixed)
        args.class_names, args.label_from = dataset.class_names, dataset.label_from
    check_batch(len(dataset), args.batch_size)
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


def check_classes(class_names: list[str], num_classes: int, fixed: bool = False) -> None:
    """UserValueError if the model has other classes than the data. A model whose number is `fixed`, by its weights or as upstream's
    default, may have more, which is told."""
    if len(class_names) > num_classes or len(class_names) < num_classes and not fixed:
        raise UserValueError(
            f"the data have {len(class_names)} classes, the model would have {num_classes}: give --num_classes "
            f"{len(class_names)}"
        )
    if len(class_names) < num_classes:
        logger.warn(
            f"the data have {len(class_names)} classes, the model {num_classes}: those from {len(class_names)} on are not trained"
        )


def check_batch(images: int, batch_size: int) -> None:
    """UserValueError if a batch is larger than the data."""
    if batch_size > images:
        raise UserValueError(f"--batch_size {batch_size} is more than the {images} images of the data")


# ---------------------------------------------------------------------------------------------------------- sampling


def sampler_of(diffusion, use_ddim: bool) -> Callable:
    """The diffusion's ancestral or DDIM sampling loop."""
    return diffusion.ddim_sample_loop if use_ddim else diffusion.p_sample_loop


def random_labels(count: int, num_classes: int) -> th.Tensor:
    """Uniform labels, int64 [count], on this rank's device."""
    return th.randint(num_classes, (count,), device=dist_util.dev())


# Flags on which samples do not depend: a command may be continued with others.
NOT_OF_SAMPLES = ("log_dir", "num_samples", "model_path", "classifier_path", "base_samples")


def execution_of(args: argparse.Namespace) -> Execution:
    """How the networks run, by the flags of `flags.add_sampling_flags`; use_fp16 stands for precision fp16."""
    if args.use_fp16 and args.precision not in ("auto", "fp16"):
        raise UserValueError(f"--use_fp16 and --precision {args.precision} are two formats: give one")
    return Execution.from_flags(vars(args), dist_util.dev(), full=args.use_fp16)


def sample(
    args: argparse.Namespace,
    draw: Callable[[int], Iterable[th.Tensor]],
    execution: Execution,
    *sources: th.nn.Module | Mapping,
    class_names: Sequence[str] = (),
) -> None:
    """Draw --num_samples on all ranks: samples_NxHxWxC.npz in the log's folder, arr_0 = uint8 images, arr_1 = labels
    where there are any, with their class_names where they are known.

    draw: (number of the round) -> tensors [batch_size, ...] of this rank. sources: networks and values that the samples
    depend on. An interrupted command goes on from its last round, with the random numbers that it would have had.
    """
    rank, ranks, size = dist_util.get_rank(), dist_util.get_world_size(), args.batch_size
    kept = {name: value for name, value in vars(args).items() if name not in NOT_OF_SAMPLES}
    about = {**kept, "ranks": ranks, "execution": vars(execution), "from": [*map(fingerprint, sources)]}
    shards = Shards(logger.get_dir(), about)
    firsts = [(k * ranks + rank) * size for k in range(math.ceil(args.num_samples / (size * ranks)))]
    begun = next((k for k, first in enumerate(firsts) if shards.missing([first])), len(firsts))
    if begun:
        shards.restore(firsts[begun - 1])
    for k in range(begun, len(firsts)):
        with execution.running():
            arrays = {f"arr_{i}": drawn.cpu().numpy() for i, drawn in enumerate(draw(k))}
        shards.add(range(firsts[k], firsts[k] + size), arrays, random_state=True)
        logger.log(f"created {(k + 1) * size * ranks} samples")
    shards.join(args.num_samples, samples_path, {"class_names": np.array(class_names)} if class_names else {})
    shards.remove()
    logger.log("sampling complete")


def samples_path(shape: tuple[int, ...]) -> str:
    """samples_NxHxWxC.npz in the log's folder, for images of this shape."""
    return os.path.join(logger.get_dir(), f"samples_{'x'.join(map(str, shape))}.npz")


def gather(tensor: th.Tensor) -> list[th.Tensor]:
    """The tensors of all ranks, which have one shape, on every rank."""
    if dist_util.get_world_size() == 1:
        return [tensor]
    parts = [th.empty_like(tensor) for _ in range(dist_util.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts


def names_of(args: argparse.Namespace, *paths: str) -> list[str]:
    """The names of the classes by number, as the first of these checkpoints knows them; [] where none does, or where they
    are called by their numbers."""
    for path in paths:
        names = checkpoint_util.config_of(path).get("class_names") or []
        if len(names) == args.num_classes and not are_numbers(names):
            return list(names)
    return []


def base_batches(args):
    """(number of the round) -> this rank's low-resolution images, taken in turn: {"low_res": [b, C, s, s] in [-1, 1], "y":
    int64 [b]}."""
    images, labels = read_samples(args.base_samples, args.small_size, args.image_channels, args.class_cond)
    rank, ranks = dist_util.get_rank(), dist_util.get_world_size()
    if len(images) < ranks:
        raise UserValueError(
            f"{args.base_samples} has {len(images)} images for {ranks} ranks: start fewer ranks"
        )
    places = range(rank, len(images), ranks)

    def batch(k):
        first = k * args.batch_size
        chosen = [places[i % len(places)] for i in range(first, first + args.batch_size)]
        low_res = th.from_numpy(images[chosen]).float().permute(0, 3, 1, 2) / 127.5 - 1
        return {"low_res": low_res, **({"y": th.from_numpy(labels[chosen])} if args.class_cond else {})}

    return batch


def read_samples(path, size, channels, with_labels):
    """(uint8 [N, s, s, C], int64 [N] or None) of a file that image_sample.py wrote; UserError if it is another."""
    if not path:
        raise UserValueError("give --base_samples, the .npz file of images to enlarge")
    with open_arrays(path) as found:
        arrays = dict(found)
    images, labels = arrays.get("arr_0"), arrays.get("arr_1")
    expected = f"uint8 [N, {size}, {size}, {channels}] (--small_size, --image_channels)"
    if images is None or images.dtype != np.uint8 or images.shape[1:] != (size, size, channels):
        found = "no arr_0" if images is None else f"{images.dtype} {list(images.shape)}"
        raise UserValueError(f"{path} must hold arr_0 = {expected}, it has {found}")
    if with_labels and (labels is None or labels.shape != (len(images),)):
        raise UserValueError(f"{path} has no labels arr_1 = [N], which a class-conditional model needs")
    if not len(images):
        raise UserValueError(f"{path} holds no images")
    return images, check_labels(labels, len(images), path) if with_labels else None


# ---------------------------------------------------------------------------------------------------------- measuring

TERMS = ("vb", "mse", "xstart_mse")


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
    return th.stack(gather(tensor)).mean(dim=0)
