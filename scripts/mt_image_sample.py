"""Sample a model of mt_image_train.py in any direction: these modalities are given, those are wanted.

    python scripts/mt_image_sample.py --model_path runs/mine
        images with all their modalities; with --given label=3 pictures of class 3, with --given
        masked=holes.png what alpha 0 marks is restored, with --given image=holes.png by replacing known
        pixels at every step
    python scripts/mt_image_sample.py --model_path runs/mine --given image=photos/ --want label
        the labels of pictures

The model's configuration is in the checkpoint. The same seed gives the same pictures for any batch size and
number of ranks. In the log's folder: samples_NxHxWxC.npz (arr_0 = uint8 images as ADM writes them, every
modality under its name) and samples.png.
"""

import argparse
import os

import _common  # noqa: F401 (first: it makes the package importable)
import numpy as np
import torch as th
import torch.distributed as dist

from guided_diffusion import dist_util, logger
from guided_diffusion.errors import UserError, UserValueError, exit_on_user_error
from guided_diffusion.figures import Row, contact_sheet, to_uint8
from guided_diffusion.mt_data import GivenImages, read_images, read_labels, read_vectors
from guided_diffusion.mt_util import JointModel
from guided_diffusion.multitask import predict_modalities
from guided_diffusion.samplers import SAMPLERS, Known, joint_sample
from guided_diffusion.script_util import str2bool
from guided_diffusion.seeding import PerSample

SHEET = 16  # samples in the picture


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = flags.add_argument
    add(
        "--model_path",
        required=True,
        help="a run folder, a checkpoint*.pt, or a model*.pt or ema_*.pt beside its config.yaml",
    )
    add(
        "--weights",
        default="ema",
        help="of a complete checkpoint: ema (its first), a rate such as 0.9999, or model",
    )
    add(
        "--given",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="what is known: image, or a modality of the model",
    )
    add("--want", default="", help="names separated by commas (default: everything that is not given)")
    add("--num_samples", type=int, default=0, help="default: as many as are given, or 16")
    add("--batch_size", type=int, default=64)
    add("--sampler", choices=list(SAMPLERS), default="ddpm")
    add("--steps", default="", help="fewer steps: a number, ddim50, 10,15,20 (default: all)")
    add("--seed", type=int, default=0)
    add(
        "--strength",
        type=float,
        default=1.0,
        help="of conditioning on a given U modality; 1 is exact, 0 holds it only",
    )
    add(
        "--replace_known",
        action="store_true",
        help="put known pixels back at every step, not only at the end",
    )
    add(
        "--resample", type=int, default=1, help="with --replace_known: passes over every step (RePaint; ddpm)"
    )
    add(
        "--times",
        type=integers,
        default="0,10,20",
        help="diffusion indices at which a given image is read, averaged",
    )
    add(
        "--order",
        choices=["posterior", "paper"],
        default="posterior",
        help="paper: Algorithm 1 to the letter",
    )
    add("--clip_denoised", type=str2bool, default=True)
    add("--log_dir", help="where the results go (default: $OPENAI_LOGDIR, or a new temporary folder)")
    return flags


def integers(text: str) -> list[int]:
    """Numbers separated by commas."""
    return [int(part) for part in text.split(",")]


@exit_on_user_error()
def main():
    args = parser().parse_args()
    dist_util.setup_dist()
    logger.configure(dir=args.log_dir)
    model = JointModel.load(args.model_path, args.weights)
    model.network.to(dist_util.dev())
    given, holes = read_given(args.given, model)
    wanted = names_wanted(args.want, given, holes, model)
    count = args.num_samples or (len(next(iter(given.values()))) if given else 16)
    if count < 1 or args.batch_size < 1:
        raise UserValueError("num_samples and batch_size must be at least 1")
    # What is given is repeated in turn until there is enough.
    given, holes = (
        {name: value[th.arange(count) % len(value)] for name, value in some.items()}
        for some in (given, holes)
    )
    own = range(dist_util.get_rank(), count, dist_util.get_world_size())
    logger.log(f"sampling {count}, given {', '.join(given) or 'nothing'}, wanted {', '.join(wanted)}")
    parts = {}
    for first in range(0, len(own), args.batch_size):
        indices = th.tensor(own[first : first + args.batch_size])
        on_device = [
            {name: value[indices].to(dist_util.dev()) for name, value in some.items()}
            for some in (given, holes)
        ]
        for name, value in sample(args, model, *on_device, indices).items():
            if name == "image" or name in wanted or name in given:
                parts.setdefault(name, []).append(value.cpu())
    arrays = in_order(parts, count)
    if dist_util.get_rank() == 0:
        write(arrays, given, holes, wanted, model)
    if dist_util.get_world_size() > 1:
        dist.barrier()


def read_given(specs: list[str], model: JointModel) -> tuple[dict[str, th.Tensor], dict[str, th.Tensor]]:
    """(values by name [N, ...], known pixels by name bool [N, 1, H, W]) of --given NAME=FILE."""
    size, channels = model.flags["image_size"], model.flags["image_channels"]
    values, known = {}, {}
    for spec in specs:
        name, found, source = spec.partition("=")
        if not found or not source:
            raise UserValueError(f"--given {spec}: expected NAME=FILE")
        if name != "image" and name not in model.tasks.modalities:
            names = ", ".join(["image", *model.tasks.modalities])
            raise UserValueError(f"--given {spec}: the model has no {name!r}, but {names}")
        if name in values:
            raise UserValueError(f"--given {spec}: {name} is given twice")
        if name == "image" or model.tasks[name].kind == "image":
            images: GivenImages = read_images(source, channels, size)
            values[name] = images.values
            if images.known is not None:
                known[name] = images.known
        elif model.tasks[name].kind == "label":
            values[name] = read_labels(source, model.tasks[name])
        else:
            values[name] = read_vectors(source, model.tasks[name])
    for name in known:
        if name != "image" and model.tasks[name].derive is None:
            raise UserValueError(
                f"--given {spec}: pixels are missing, which only image and masked images may have"
            )
    return values, known


def names_wanted(want: str, given: dict, holes: dict, model: JointModel) -> list[str]:
    """The names of --want, by default all that are not given, and an image with holes."""
    names = ["image", *model.tasks.modalities]
    wanted = [name.strip() for name in want.split(",") if name.strip()] or [
        n for n in names if n not in given or (n == "image" and n in holes)
    ]
    for name in wanted:
        if name not in names:
            raise UserValueError(f"--want {name}: the model has {', '.join(names)}")
        if name in given and name not in holes:
            raise UserValueError(f"--want {name}: that is given already")
    if not wanted:
        raise UserValueError("everything is given: nothing is left to sample")
    return wanted


def sample(args, model: JointModel, given: dict, holes: dict, indices: th.Tensor) -> dict[str, th.Tensor]:
    """Images and modalities [b, ...] of the samples with the given indices."""
    random = PerSample.derived(args.seed, indices.tolist(), dist_util.dev())
    if "image" in given and "image" not in holes:
        images = given.pop("image")
        values = predict_modalities(
            model.diffusion, model.tasks, model.network, images, given, args.times, random
        )
        return {"image": images, **values}
    known = None
    for name, where in holes.items():
        every_step = args.replace_known or name == "image"
        known = Known(given[name], where, every_step, args.resample)
    given.pop("image", None)
    shape = (len(indices), *(model.flags[k] for k in ("image_channels", "image_size", "image_size")))
    result = joint_sample(
        model.respaced(args.steps),
        model.tasks,
        model.network,
        shape,
        random,
        given=given,
        strength=args.strength,
        known=known,
        sampler=args.sampler,
        order=args.order,
        clip_denoised=args.clip_denoised,
        progress=dist_util.get_rank() == 0,
    )
    return {"image": result.images, **result.values}


def in_order(parts: dict[str, list[th.Tensor]], count: int) -> dict[str, np.ndarray]:
    """The samples of all ranks in the order of their indices, on every rank."""
    own = {name: th.cat(tensors).numpy() for name, tensors in parts.items()}
    ranks = [own]
    if dist_util.get_world_size() > 1:
        ranks = [None] * dist_util.get_world_size()
        dist.all_gather_object(ranks, own)
    full = {}
    for name in next(r for r in ranks if r):
        array = np.empty((count, *next(r[name] for r in ranks if r).shape[1:]), dtype=np.float32)
        for rank, values in enumerate(ranks):
            if values:
                array[rank :: len(ranks)] = values[name]
        full[name] = array
    return full


def write(arrays: dict, given: dict, holes: dict, wanted: list[str], model: JointModel) -> None:
    """samples_NxHxWxC.npz and samples.png in the log's folder."""
    bad = [name for name in wanted if not np.isfinite(arrays[name]).all()]
    if bad:
        raise UserError(f"the samples of {', '.join(bad)} are not finite: the model or the sampler diverged")
    images = to_uint8(th.from_numpy(arrays["image"]))
    stored, rows = {}, []
    for name in ["image", *model.tasks.modalities]:
        if name not in arrays:
            continue
        is_image = name == "image" or model.tasks[name].kind == "image"
        value = to_uint8(th.from_numpy(arrays[name])) if is_image else arrays[name]
        if is_image:
            rows.append(
                Row(
                    f"{name} ({'given' if name in given else 'generated'})",
                    value[:SHEET],
                    captions(arrays, model),
                )
            )
        stored["arr_0" if name == "image" else name] = value
    stored |= {f"{name}_known": where[:, 0].numpy() for name, where in holes.items()}
    path = os.path.join(logger.get_dir(), f"samples_{'x'.join(map(str, images.shape))}.npz")
    np.savez(path, **stored)
    sheet = os.path.join(logger.get_dir(), "samples.png")
    contact_sheet(rows).save(sheet)
    logger.log(f"saved {path} and {sheet}")


def captions(arrays: dict, model: JointModel) -> list[str]:
    """The most probable labels of the samples in the picture."""
    labels = [
        arrays[m.name][:SHEET].argmax(axis=1) for m in model.tasks if m.kind == "label" and m.name in arrays
    ]
    return [" ".join(map(str, numbers)) for numbers in zip(*labels, strict=True)]


if __name__ == "__main__":
    main()
