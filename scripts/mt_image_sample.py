"""Sample a model of mt_image_train.py in any direction: these modalities are given, those are wanted.

    python scripts/mt_image_sample.py --model_path runs/mine
        images with all their modalities; with --given label=3 images of class 3, with --given
        masked=holes.png what alpha 0 marks is restored, with --given image=holes.png by replacing known
        pixels at every step
    python scripts/mt_image_sample.py --model_path runs/mine --classifier_path model010000.pt
        images guided towards classes, drawn or those of --given label=3, by ADM's classifier (its flags
        classifier_* as in training); --classifier_path own: by the model's own head
    python scripts/mt_image_sample.py --model_path runs/mine --given image=photos/ --want label
        the labels of images

The model's configuration is in the checkpoint. The same seed gives the same images for any batch size and
number of ranks. In the log's folder: samples_NxHxWxC.npz (arr_0 = uint8 images as ADM writes them, every
modality under its name, arr_1 = classes that were drawn or guided to) and samples.png.
"""

import argparse
import os

import numpy as np
import torch as th
import torch.distributed as dist

from guided_diffusion import cli, dist_util, logger
from guided_diffusion.errors import UserError, UserValueError, exit_on_user_error
from guided_diffusion.figures import Row, contact_sheet, label_captions, to_uint8
from guided_diffusion.image_files import are_numbers
from guided_diffusion.mt.files import GivenImages, read_images, read_labels, read_vectors
from guided_diffusion.mt.guidance import ClassGuidance, classifier_flags, classifier_guide
from guided_diffusion.mt.modalities import Modality
from guided_diffusion.mt.model import JointModel
from guided_diffusion.mt.sampling import SAMPLERS, Known, random_labels
from guided_diffusion.script_util import add_dict_to_argparser, str2bool
from guided_diffusion.seeding import PerSample

SHEET = 16  # samples in the image


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
        help="what is known: image, or a modality of the model; label=random draws classes",
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
        type=cli.integers,
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
    add(
        "--guidance_scale",
        type=float,
        default=1.0,
        help="classifier-free: towards given X modalities, or all of a model trained with "
        "--single_task_probability; 1 is none",
    )
    add("--without", default="", help="modalities that are left out, as in single-task steps: label,masked")
    add(
        "--classifier_path",
        default="",
        help="guide by a classifier of classifier_train.py, or `own`: the model's own head",
    )
    add("--classifier_scale", type=float, default=1.0, help="of that guidance, as in ADM")
    add("--num_classes", type=int, default=0, help="of the classifier, where the model has no labels")
    add_dict_to_argparser(flags, classifier_flags())
    add("--log_dir", help="where the results go (default: $OPENAI_LOGDIR, or a new temporary folder)")
    return flags


@exit_on_user_error()
def main():
    args = parser().parse_args()
    dist_util.setup_dist()
    logger.configure(dir=args.log_dir)
    model = JointModel.load(args.model_path, args.weights)
    model.network.to(dist_util.dev())
    guidance = ClassGuidance.from_flags(vars(args), model)
    args.drawn = {spec.partition("=")[0] for spec in args.given if spec.endswith("=random")}
    given, holes = read_given([s for s in args.given if not s.endswith("=random")], model, guidance)
    for name in args.drawn:
        if name in given or name not in model.modalities.names or model.modalities[name].kind != "label":
            raise UserValueError(f"--given {name}=random: only a label of the model is drawn, and only once")
    absent = names_of(args.without)
    wanted = names_wanted(args.want, given, holes, absent, model)
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
        for name, value in sample(args, model, guidance, absent, *on_device, indices).items():
            if name in ("image", "classes") or name in wanted or name in given:
                parts.setdefault(name, []).append(value.cpu())
    arrays = in_order(parts, count)
    if dist_util.get_rank() == 0:
        write(arrays, given, holes, wanted, model)
    if dist_util.get_world_size() > 1:
        dist.barrier()


def read_given(
    specs: list[str], model: JointModel, guidance: ClassGuidance | None
) -> tuple[dict[str, th.Tensor], dict[str, th.Tensor]]:
    """(values by name [N, ...], known pixels by name bool [N, 1, H, W]) of --given NAME=FILE."""
    size, channels = model.flags["image_size"], model.flags["image_channels"]
    modalities: dict[str, Modality] = {m.name: m for m in model.modalities}
    if guidance is not None:
        modalities[guidance.target.name] = guidance.target
    values, known = {}, {}
    for spec in specs:
        name, found, source = spec.partition("=")
        if not found or not source:
            raise UserValueError(f"--given {spec}: expected NAME=FILE")
        if name != "image" and name not in modalities:
            names = ", ".join(["image", *modalities])
            raise UserValueError(f"--given {spec}: the model has no {name!r}, but {names}")
        if name in values:
            raise UserValueError(f"--given {spec}: {name} is given twice")
        if name == "image" or modalities[name].kind == "image":
            images: GivenImages = read_images(source, channels, size)
            values[name] = images.values
            if images.known is not None:
                known[name] = images.known
        elif modalities[name].kind == "label":
            values[name] = read_labels(source, modalities[name], model.class_names)
        else:
            values[name] = read_vectors(source, modalities[name])
    for name in known:
        if name != "image" and modalities[name].derive is None:
            raise UserValueError(
                f"--given {spec}: pixels are missing, which only image and masked images may have"
            )
    return values, known


def names_of(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def names_wanted(want: str, given: dict, holes: dict, absent: list[str], model: JointModel) -> list[str]:
    """The names of --want, by default all that the model can tell and that are not given, and an image with
    holes."""
    names = ["image", *(m.name for m in model.modalities if m.head != "none" and m.name not in absent)]
    wanted = names_of(want) or [n for n in names if n not in given or (n == "image" and n in holes)]
    for name in wanted:
        if name in given and name not in holes:
            raise UserValueError(f"--want {name}: that is given already")
        if name not in names:
            raise UserValueError(f"--want {name}: the model has {', '.join(names)}")
    if not wanted:
        raise UserValueError("everything is given: nothing is left to sample")
    return wanted


def sample(
    args,
    model: JointModel,
    guidance: ClassGuidance | None,
    absent: list[str],
    given: dict,
    holes: dict,
    indices: th.Tensor,
) -> dict[str, th.Tensor]:
    """Images and modalities [b, ...] of the samples with the given indices; `classes` [b], where they were
    drawn or guided to."""
    random = PerSample.derived(args.seed, indices.tolist(), dist_util.dev())
    if "image" in given and "image" not in holes:
        if guidance is not None or args.guidance_scale != 1 or absent:
            raise UserValueError("the image is given: there is nothing to guide, and nothing to leave out")
        images = given.pop("image")
        values = model.predict(images, given, times=args.times, random=random)
        return {"image": images, **values}
    known = None
    for name, where in holes.items():
        every_step = args.replace_known or name == "image"
        known = Known(given[name], where, every_step, args.resample)
    given.pop("image", None)
    strength = {m.name: args.strength for m in model.modalities}
    cond_fn, extra = None, {}
    if guidance is not None:
        target, label = guidance.target.name, guidance.choose(given, random)
        extra["classes"] = label.argmax(dim=1)
        given.pop(target, None) if target not in model.modalities.names else None
        if guidance.classifier is None:
            given[target], strength[target] = label, guidance.scale
        else:
            cond_fn = classifier_guide(guidance.classifier, extra["classes"], guidance.scale)
            if target in model.modalities.names and guidance.target.as_input:
                given[target] = label  # as in ADM, network and classifier are told the same
    names = args.drawn | {m.name for m in model.modalities if m.kind == "label" and m.required}
    for name, label in random_labels(model.modalities, random, names - {*given, *absent}).items():
        given[name], extra["classes"] = label, label.argmax(dim=1)
    result = model.sample(
        random,
        args.steps,
        given=given,
        strength=strength,
        known=known,
        sampler=args.sampler,
        order=args.order,
        clip_denoised=args.clip_denoised,
        cond_fn=cond_fn,
        guidance=args.guidance_scale,
        absent=absent,
        progress=dist_util.get_rank() == 0,
    )
    return {"image": result.images, **result.values, **extra}


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
    stored, rows = {}, []
    for name in ["image", *model.modalities.names]:
        if name not in arrays:
            continue
        is_image = name == "image" or model.modalities[name].kind == "image"
        value = arrays[name]
        if is_image:
            known = holes.get(name, th.ones(1, 1, 1, 1, dtype=th.bool)) if name in given else None
            value = to_uint8(th.from_numpy(value), known)
            rows.append(
                Row(
                    f"{name} ({'given' if name in given else 'generated'})",
                    value[:SHEET],
                    captions(arrays, model),
                )
            )
        stored["arr_0" if name == "image" else name] = value
    if "classes" in arrays:
        stored["arr_1"] = arrays["classes"].astype(np.int64)  # ADM's name for the labels
    if not are_numbers(model.class_names):
        stored["class_names"] = np.array(model.class_names)  # evaluations tell by them which number is which
    stored |= {f"{name}_known": where[:, 0].numpy() for name, where in holes.items()}
    path = os.path.join(logger.get_dir(), f"samples_{'x'.join(map(str, stored['arr_0'].shape))}.npz")
    np.savez(path, **stored)
    sheet = os.path.join(logger.get_dir(), "samples.png")
    contact_sheet(rows).save(sheet)
    logger.log(f"saved {path} and {sheet}")


def captions(arrays: dict, model: JointModel) -> list[str]:
    """The most probable labels of the samples in the image."""
    labels = [
        arrays[m.name][:SHEET].argmax(axis=1)
        for m in model.modalities
        if m.kind == "label" and m.name in arrays
    ]
    return label_captions(labels, model.class_names)


if __name__ == "__main__":
    main()
