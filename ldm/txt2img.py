"""Images for a prompt, and joint models in any direction: what scripts/txt2img.py does with its flags."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from guided_diffusion import cli, dist_util, logger
from guided_diffusion.errors import UserValueError
from guided_diffusion.execution import Execution
from guided_diffusion.figures import Row, contact_sheet, to_uint8
from guided_diffusion.mt import directions
from guided_diffusion.sample_shards import Shards
from ldm import inference
from ldm.data.captions import read_prompts
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.joint import JointLatentDiffusion

DIGITS = 5
# Flags on which images do not depend, or (prompt, given) by their values.
_NOT_OF_SAMPLES = (
    "outdir",
    "ckpt",
    "config",
    "skip_grid",
    "skip_save",
    "n_rows",
    "prompt",
    "from_file",
    "given",
)


@dataclass(frozen=True)
class Drawing:
    """What is drawn by which model: given values by name, the names wanted, and what is left out."""

    model: LatentDiffusion
    folder: Path
    wanted: Sequence[str]
    given: Mapping[str, torch.Tensor] = field(default_factory=dict)
    without: Sequence[str] = ()


def run(args) -> None:
    """Draw with the flags of scripts/txt2img.py."""
    prompts = [args.prompt]
    if args.from_file:
        prompts = read_prompts(os.path.join(os.curdir, args.from_file))  # a path: never a prompt
    dist_util.setup_dist()
    cli.open_log(args.outdir, format_strs=["stdout"])
    drawing, baseline = plan(args)
    if drawing.model.first_stage_key in drawing.given:
        arrays = {name: value.cpu().numpy() for name, value in read_off(args, drawing, prompts).items()}
        if dist_util.get_rank() == 0:
            save_arrays(args, arrays)
        return
    for_each = args.n_iter * args.n_samples
    logger.log(f"{for_each} images for each of {len(prompts)} prompts")
    drawings = [drawing, *([] if baseline is None else [baseline])]
    execution = inference.prepare(args, *{id(d.model): d.model for d in drawings}.values())
    shards = [draw_all(args, each, prompts, execution) for each in drawings]
    arrays, *_ = [own.join(for_each * len(prompts)) for own in shards]
    if dist_util.get_rank() == 0:
        save_arrays(args, arrays)
        finish(args, drawing, baseline, prompts)
    for own in shards:
        own.remove()


def plan(args) -> tuple[Drawing, Drawing | None]:
    """What to draw, and the baseline beside it. UserValueError for what the models cannot do."""
    config = inference.merged_config([args.config])
    check_size(args, config)
    model = inference.load_model(config, args.ckpt)
    if args.C != model.channels:
        raise UserValueError(f"--C {args.C}: this model's latents have {model.channels} channels")
    image = model.first_stage_key
    given = inference.read_given(args.given, model, size=(args.H, args.W), config=config)
    modalities = [name for name in inference.names_of(model) if name != image]
    without = directions.names_without(args.without, modalities)
    wanted = inference.names_wanted(args.want, given, model, without)
    if image not in (*wanted, *given):
        raise UserValueError(f"--want {args.want}: without a given {image} it is drawn, and has to be wanted")
    drawing = Drawing(model, Path(args.outdir) / "samples", wanted, given, without)
    if not args.baseline:
        return drawing, None
    if args.baseline == "same":
        if not modalities:
            raise UserValueError("--baseline same: this model has no modalities to leave out")
        return drawing, Drawing(model, Path(args.outdir) / "baseline", [image], without=modalities)
    other = inference.load_model(
        inference.merged_config([args.baseline_config or args.config]), args.baseline
    )
    if other.channels != model.channels:
        raise UserValueError(f"--baseline: its latents have {other.channels} channels, not {model.channels}")
    return drawing, Drawing(other, Path(args.outdir) / "baseline", [other.first_stage_key])


def check_size(args, config: Mapping) -> None:
    """UserValueError for a height or width that the U-Net of a configuration cannot halve as often as it does."""
    unet = ((config.get("model") or {}).get("params") or {}).get("unet_config") or {}
    levels = len((unet.get("params") or {}).get("channel_mult") or [1])
    stride = args.f * 2 ** (levels - 1)
    for flag in ("H", "W"):
        if getattr(args, flag) % stride:
            raise UserValueError(
                f"--{flag} must be a multiple of {stride} for this model, not {getattr(args, flag)}"
            )


@torch.no_grad()
def read_off(args, drawing: Drawing, prompts: list[str]) -> dict[str, torch.Tensor]:
    """What is wanted of the given images, under the prompts in turn; by name, [N, D] or [N, classes]."""
    model, given = drawing.model, dict(drawing.given)
    arrays = given.pop(model.first_stage_key)
    if args.baseline:
        raise UserValueError("--baseline draws images: leave it out where they are given")
    if images := [name for name in drawing.wanted if name in model.image_names]:
        raise UserValueError(f"--want {images[0]}: scripts/sample_diffusion.py draws images of images")
    found: dict[str, list[torch.Tensor]] = {name: [] for name in drawing.wanted}
    for numbers in directions.batches(range(len(arrays)), args.n_samples):
        cond = model.get_learned_conditioning([prompts[n % len(prompts)] for n in numbers])
        values = {name: inference.take(value, numbers) for name, value in given.items()}
        read = model.predict(arrays[numbers], values, conditioning=cond, seed=args.seed, indices=numbers)
        for name, rows in found.items():
            rows.append(read[name])
    return {name: torch.cat(rows) for name, rows in found.items()}


def draw_all(args, drawing: Drawing, prompts: list[str], execution: Execution) -> Shards:
    """This rank's images, as files in the drawing's folder; its vectors and labels in shards."""
    for_each = args.n_iter * args.n_samples
    about = inference.samples_depend_on(args, _NOT_OF_SAMPLES, execution, drawing.model, drawing.given)
    shards = Shards(drawing.folder, about | {"prompts": prompts, "without": drawing.without})
    left = shards.missing(directions.own_share(len(prompts) * for_each))
    with drawing.model.ema_scope(), execution.running():
        for numbers in directions.batches(left, args.n_samples):
            arrays = {}
            drawn = draw(args, drawing, [prompts[n // for_each] for n in numbers], numbers)
            inference.save_images(drawn.pop(drawing.model.first_stage_key), drawing.folder, numbers, DIGITS)
            for name, value in drawn.items():
                if value.ndim == 4:
                    inference.save_images(value, drawing.folder.with_name(name), numbers, DIGITS)
                else:
                    arrays[name] = value.float().cpu().numpy()
            shards.add(numbers, arrays)
    return shards


@torch.no_grad()
def draw(args, drawing: Drawing, prompts: list[str], numbers: list[int]) -> dict[str, torch.Tensor]:
    """What is wanted of the samples with these numbers, by name; images [b, 3, H, W] in [-1, 1]."""
    model = drawing.model
    # With a fixed code the samples of all batches have the noise of the first.
    seeds = [n % args.n_samples for n in numbers] if args.fixed_code else numbers
    own = {}
    if isinstance(model, JointLatentDiffusion):
        own = {"strength": args.strength, "absent": drawing.without}
    drawn = inference.draw(
        model,
        len(numbers),
        {name: inference.take(value, numbers) for name, value in drawing.given.items()},
        drawing.wanted,
        sampler=args.sampler,
        steps=args.ddim_steps,
        seed=args.seed,
        indices=seeds,
        eta=args.ddim_eta,
        conditioning=model.get_learned_conditioning(prompts),
        unconditional=model.get_unconditional_conditioning(len(prompts)) if args.scale != 1 else None,
        guidance=args.scale,
        shape=(args.C, args.H // args.f, args.W // args.f),
        progress=dist_util.get_rank() == 0,
        **own,
    )
    return {name: value.float().cpu() for name, value in drawn.items()}


def save_arrays(args, arrays: Mapping[str, np.ndarray]) -> None:
    """NAME.npy of every array, in the output folder."""
    for name, array in arrays.items():
        path = Path(args.outdir) / f"{name}.npy"
        np.save(path, array)
        logger.log(f"saved {path}, {'x'.join(map(str, array.shape))}")


def finish(args, drawing: Drawing, baseline: Drawing | None, prompts: list[str]) -> None:
    """The sheet, and only that with --skip_save."""
    numbers = range(len(prompts) * args.n_iter * args.n_samples)
    drawings = [drawing, *([] if baseline is None else [baseline])]
    if not args.skip_grid:
        path = Path(args.outdir) / f"grid-{len(list(Path(args.outdir).glob('grid-*.png'))):04}.png"
        contact_sheet(sheet_rows(args, drawings, prompts, numbers)).save(path)
        logger.log(f"saved {path}")
    for made in drawings:
        if args.skip_save:
            for number in numbers:
                (made.folder / f"{number:0{DIGITS}}.png").unlink()
        else:
            logger.log(f"saved {len(numbers)} images in {made.folder}")


def sheet_rows(args, drawings: Sequence[Drawing], prompts: list[str], numbers: range) -> list[Row]:
    """Rows of the sheet: what is given, then each prompt's images, above the baseline's."""
    for_each = args.n_iter * args.n_samples
    columns = args.n_rows or for_each
    rows = [
        Row(name, to_uint8(inference.take(value, range(min(columns, len(numbers))))), mark="given")
        for name, value in drawings[0].given.items()
        if value.ndim == 4
    ]
    images = [inference.read_images(drawing.folder, numbers, DIGITS) for drawing in drawings]
    for k, prompt in enumerate(prompts):
        for first in range(0, for_each, columns):
            part = slice(k * for_each + first, k * for_each + min(first + columns, for_each))
            titles = [prompt if first == 0 else "", "... by the baseline"]
            rows += [Row(title, own[part]) for title, own in zip(titles, images, strict=False)]
    return rows
