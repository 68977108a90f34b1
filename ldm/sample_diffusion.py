"""Sample a model that main.py trained, in any direction: what scripts/sample_diffusion.py does with its flags."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from guided_diffusion import cli, dist_util, logger
from guided_diffusion.array_files import Rows, write_npz
from guided_diffusion.errors import UserValueError
from guided_diffusion.figures import Row, contact_sheet, label_captions, to_uint8
from guided_diffusion.image_files import MOST_CLASSES, class_number
from guided_diffusion.mt import directions
from guided_diffusion.sample_shards import Shards
from ldm import inference
from ldm.checkpoint import trained_steps
from ldm.data.captions import read_prompts
from ldm.data.images import reading_of
from ldm.models.diffusion.joint import JointLatentDiffusion
from ldm.modules.encoders.modules import ClassEmbedder, TextEncoder

SHEET = 16  # samples in the image
_NOT_OF_SAMPLES = ("resume", "logdir", "batch_size", "n_samples", "given")  # `given` by its values


def run(args, overrides: list[str]) -> None:
    """Sample with the flags of scripts/sample_diffusion.py; overrides: key.key=value of the configuration."""
    run, checkpoint = inference.locate(args.resume)
    dist_util.setup_dist()
    config = inference.merged_config(inference.configurations(run), overrides)
    model = inference.load_model(config, checkpoint)
    execution = inference.prepare(args, model)
    given = read_given(args.given, model, config)
    about = inference.samples_depend_on(args, _NOT_OF_SAMPLES, execution, model, given) | {
        "overrides": overrides
    }
    out = results_folder(Path(args.logdir or run) / "samples" / f"{trained_steps(checkpoint):08}", about)
    cli.open_log(str(out), format_strs=["stdout"])
    wanted = inference.names_wanted(args.want, given, model)
    count = args.n_samples or (len(next(iter(given.values()))) if given else 50000)
    logger.log(f"sampling {count}, given {', '.join(given) or 'nothing'}, wanted {', '.join(wanted)}")
    shards = Shards(out, about)
    with model.ema_scope(), execution.running():
        for numbers in directions.batches(shards.missing(directions.own_share(count)), args.batch_size):
            arrays = {}
            # What is given is repeated in turn until there is enough.
            part = {name: inference.take(value, numbers) for name, value in given.items()}
            for name, value in sample(args, model, part, wanted, numbers).items():
                if value.ndim == 4:
                    inference.save_images(value, out / folder_of(name, model), numbers)
                else:
                    arrays[name] = value.float().cpu().numpy()
            shards.add(numbers, arrays)
    arrays = shards.join(count)
    if dist_util.get_rank() == 0:
        finish(out, count, given, wanted, arrays, model, config.get("class_names") or ())
    shards.remove()


# ------------------------------------------------------------------------------------------------------ what to sample


def results_folder(parent: Path, about: dict) -> Path:
    """parent/TIME, the same on every rank: where a command like this was interrupted, or a new one."""
    now = time.strftime("%Y-%m-%d-%H-%M-%S")
    return dist_util.from_rank_zero(lambda: Shards.unfinished(parent, about) or parent / now)


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
        return read_prompts(source)
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
def sample(
    args, model, given: dict, wanted: list[str], numbers: list[int], watch: Callable | None = None
) -> dict[str, torch.Tensor]:
    """What is wanted, by name, for the samples with these numbers; images [b, C, H, W] in [-1, 1]. watch: as in
    guided_diffusion's `joint_sample`, of latents."""
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
        watch=watch,
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
    """The arrays and the sheet, on rank 0, once all images are there."""
    for name, array in arrays.items():
        np.save(out / f"{name}.npy", array)
    labels = [array[:SHEET].argmax(1) for name, array in arrays.items() if name not in model.standards]
    captions = label_captions(labels, class_names)
    rows = [
        Row(name, to_uint8(inference.take(value, list(range(min(SHEET, count))))), mark="given")
        for name, value in given.items()
        if isinstance(value, torch.Tensor) and value.ndim == 4
    ]
    for name in wanted:
        if name in arrays:
            continue
        folder = out / folder_of(name, model)
        first = inference.read_images(folder, range(min(SHEET, count)))
        rows.append(Row(name, first, captions, "generated"))
        if name == model.first_stage_key:
            (out / "numpy").mkdir(exist_ok=True)
            shape = (count, *first.shape[1:])
            images = Rows(shape, first.dtype, (inference.read_images(folder, [n])[0] for n in range(count)))
            write_npz(out / "numpy" / f"{'x'.join(map(str, shape))}-samples.npz", {"arr_0": images})
    if rows:
        contact_sheet(rows).save(out / "samples.png")
    logger.log(f"saved {count} samples in {out}")
