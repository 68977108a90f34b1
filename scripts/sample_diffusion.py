"""Sample a model that main.py trained, in any direction (interface: latent-diffusion,
scripts/sample_diffusion.py).

    python scripts/sample_diffusion.py -r logs/RUN -n 16
        images, with all their modalities where the model has any
    python scripts/sample_diffusion.py -r logs/RUN --given label_map=maps/ --want image
        photographs for given label maps (a joint model, or one that is conditioned on label_map)
    python scripts/sample_diffusion.py -r logs/RUN --given image=photos/ --want label_map
        label maps of photographs (a joint model)

Writes LOGDIR/samples/STEP/TIME/: img/000000.png, ... (other modalities in folders of their names, labels and
vectors as NAME.npy), numpy/NxHxWxC-samples.npz and samples.png. The same seed gives the same images for any
batch size and number of ranks. Further arguments key.key=value override the configuration.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from guided_diffusion import dist_util, logger
from guided_diffusion.errors import UserValueError, exit_on_user_error
from guided_diffusion.figures import Row, contact_sheet, label_captions, to_uint8
from guided_diffusion.image_files import MOST_CLASSES, class_number
from ldm import inference
from ldm.checkpoint import trained_steps
from ldm.data.images import reading_of
from ldm.models.diffusion.joint import JointLatentDiffusion
from ldm.modules.encoders.modules import ClassEmbedder, TextEncoder

SHEET = 16  # samples in the image


def parser() -> argparse.ArgumentParser:
    """Upstream's flags with their defaults, and --given, --want, --sampler, --seed, --scale."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = flags.add_argument
    add("-r", "--resume", required=True, metavar="LOGDIR_OR_CKPT", help="a run of main.py, or its checkpoint")
    add("-n", "--n_samples", type=int, help="default: as many as are given, or 50000")
    add(
        "-e", "--eta", type=float, help="noise of DDIM's steps (default 1; 0, which is none, with modalities)"
    )
    add("-v", "--vanilla_sample", action="store_true", help="ancestral sampling in all steps")
    add("-l", "--logdir", help="where the results go (default: the run's folder)")
    add("-c", "--custom_steps", type=int, default=50, help="sampling steps (default 50)")
    add("--batch_size", type=int, default=10)
    add("--given", action="append", default=[], metavar="NAME=FILE_OR_FOLDER", help="what is known")
    add("--want", default="", help="names separated by commas (default: everything that is not given)")
    add("--sampler", choices=list(inference.SAMPLERS), default="ddim")
    add("--scale", type=float, default=1.0, help="of classifier-free guidance; 1 for none")
    add("--strength", type=float, default=1.0, help="of conditioning on a given U modality; 1 is exact")
    add("--null_label", type=int, help="the class that says nothing, for --scale")
    add("--seed", type=int, default=0)
    return flags


@exit_on_user_error()
def main():
    args, overrides = parser().parse_known_args()
    run, checkpoint = inference.locate(args.resume)
    dist_util.setup_dist()
    config = inference.merged_config(inference.configurations(run), overrides)
    model = inference.load_model(config, checkpoint)
    out = results_folder(Path(args.logdir or run) / "samples" / f"{trained_steps(checkpoint):08}")
    logger.configure(dir=str(out), format_strs=["stdout"])
    given = read_given(args.given, model, config)
    wanted = inference.names_wanted(args.want, given, model)
    count = args.n_samples or (len(next(iter(given.values()))) if given else 50000)
    if count < 1:
        raise UserValueError(f"--n_samples must be at least 1, not {count}")
    logger.log(f"sampling {count}, given {', '.join(given) or 'nothing'}, wanted {', '.join(wanted)}")
    arrays = {}
    with model.ema_scope():
        for numbers in inference.batches(inference.own_share(count), args.batch_size):
            # What is given is repeated in turn until there is enough.
            part = {name: inference.take(value, numbers) for name, value in given.items()}
            for name, value in sample(args, model, part, wanted, numbers).items():
                if value.ndim == 4:
                    inference.save_images(value, out / folder_of(name, model), numbers)
                else:
                    arrays.setdefault(name, {}).update(zip(numbers, value.cpu().numpy(), strict=True))
    finish(out, count, given, wanted, inference.gathered(arrays), model, config.get("class_names") or ())


# ------------------------------------------------------------------------------------------------------ what to sample


def results_folder(parent: Path) -> Path:
    """parent/TIME, the same on every rank."""
    name = [time.strftime("%Y-%m-%d-%H-%M-%S")]
    if dist_util.get_world_size() > 1:
        dist.broadcast_object_list(name)
    return parent / name[0]


def read_given(specs: list[str], model, config: dict) -> dict:
    """What --given NAME=SOURCE says: images [N, C, H, W], labels [N] or [N, classes], vectors [N, D],
    captions. config: the run's, see inference.read_given."""
    condition = model.cond_stage_key if model.model.conditioning_key is not None else None
    readers = {}
    if condition is not None:
        readers = {condition: lambda source, model: read_condition(source, model, config)}
    values = inference.read_given(specs, model, readers, config=config)
    if condition is not None and condition not in values:
        raise UserValueError(f"this model is conditioned on {condition}: give --given {condition}=...")
    return values


def read_condition(source: str, model, config: dict):
    """Captions (text, or a file with one on each line), class numbers, or images, as the model's
    conditioner takes them."""
    if isinstance(model.cond_stage_model, TextEncoder):
        return Path(source).read_text().splitlines() if Path(source).is_file() else [source]
    if isinstance(model.cond_stage_model, ClassEmbedder) or model.cond_stage_model is None:
        names, most = (
            config.get("class_names") or (),
            getattr(model.cond_stage_model, "n_classes", MOST_CLASSES),
        )
        try:
            return torch.tensor([class_number(part.strip(), names, most) for part in source.split(",")])
        except UserValueError as error:
            raise UserValueError(f"{model.cond_stage_key}={source}: {error}") from None
    reading = reading_of(model.cond_stage_key, config.get("data"))
    return inference.read_model_images(source, model, reading=reading)


# ------------------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def sample(args, model, given: dict, wanted: list[str], numbers: list[int]) -> dict[str, torch.Tensor]:
    """What is wanted, by name, for the samples with these numbers; images [b, C, H, W] in [-1, 1]."""
    n, given = len(numbers), dict(given)
    conditioning = None
    if model.model.conditioning_key is not None:
        conditioning = model.get_learned_conditioning(on_device(given.pop(model.cond_stage_key), model))
    free = model.get_unconditional_conditioning(n, args.null_label) if args.scale != 1 else None
    name = "ddpm" if args.vanilla_sample else args.sampler
    joint = isinstance(model, JointLatentDiffusion)
    eta = args.eta if args.eta is not None else float(name == "ddim" and not joint)
    return inference.draw(
        model,
        n,
        given,
        wanted,
        sampler=name,
        steps=None if args.vanilla_sample else args.custom_steps,
        seed=args.seed,
        indices=numbers,
        eta=0.0 if name == "ddpm" else eta,
        conditioning=conditioning,
        unconditional=free,
        guidance=args.scale,
        progress=dist_util.get_rank() == 0,
        **({"strength": args.strength} if joint else {}),
    )


def on_device(raw, model):
    """Raw conditioning where the model is, labels under their name."""
    if not isinstance(raw, torch.Tensor):
        return raw
    raw = raw.to(model.device)
    return {model.cond_stage_key: raw} if raw.ndim == 1 else raw


# ------------------------------------------------------------------------------------------------------------- results


def folder_of(name: str, model) -> str:
    """Of the image `img`, as upstream has it; else the modality's name."""
    return "img" if name == model.first_stage_key else name


def finish(
    out: Path, count: int, given: dict, wanted: list[str], arrays: dict, model, class_names=()
) -> None:
    """The arrays and the sheet, by rank 0, once all images are there."""
    if dist_util.get_world_size() > 1:
        dist.barrier()
    if dist_util.get_rank():
        return
    for name, array in arrays.items():
        np.save(out / f"{name}.npy", array)
    labels = [array[:SHEET].argmax(1) for name, array in arrays.items() if name not in model.standards]
    captions = label_captions(labels, class_names)
    rows = [
        Row(f"{name} (given)", to_uint8(inference.take(value, list(range(min(SHEET, count))))))
        for name, value in given.items()
        if isinstance(value, torch.Tensor) and value.ndim == 4
    ]
    for name in wanted:
        if name in arrays:
            continue
        images = inference.read_images(out / folder_of(name, model), range(count))
        rows.append(Row(name, images[:SHEET], captions))
        if name == model.first_stage_key:
            (out / "numpy").mkdir(exist_ok=True)
            np.savez(out / "numpy" / f"{'x'.join(map(str, images.shape))}-samples.npz", images)
    if rows:
        contact_sheet(rows).save(out / "samples.png")
    logger.log(f"saved {count} samples in {out}")


if __name__ == "__main__":
    main()
