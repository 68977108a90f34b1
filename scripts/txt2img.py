"""Images for a prompt, from a latent diffusion model with a text encoder (interface: latent-diffusion and
Stable Diffusion, scripts/txt2img.py), and with a joint model in any direction.

    python scripts/txt2img.py --prompt "a painting of a fox" --config CONFIG.yaml --ckpt MODEL.ckpt
    python scripts/txt2img.py --prompt "a fox" ... --want image,representation      # both
    python scripts/txt2img.py --prompt "" ... --given representation=photo.jpg      # variations of an image
    python scripts/txt2img.py --prompt "a fox" ... --given representation=photo.jpg # ... that the text describes
    python scripts/txt2img.py --prompt "" ... --given image=photos/ --want representation
    python scripts/txt2img.py --prompt "a fox" ... --baseline same                  # beside the plain sampler

A vector is given as .npy or .npz, or as images that the model's own extractor reads; of several values the next one is
taken for every sample. --baseline draws the same prompts with the same seeds and nothing given: `same`, by this
checkpoint with its modalities left out, or by another checkpoint, of --baseline_config.

Writes OUTDIR/samples/00000.png, ..., OUTDIR/baseline/00000.png, ..., vectors as OUTDIR/NAME.npy, and one sheet
OUTDIR/grid-0000.png with a row for each prompt. The same seed gives the same images for any n_samples per batch and
number of ranks (mpiexec, torchrun).
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from guided_diffusion import dist_util, logger
from guided_diffusion.errors import UserFileError, UserValueError, exit_on_user_error
from guided_diffusion.figures import Row, contact_sheet, to_uint8
from ldm import inference
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.joint import JointLatentDiffusion

DIGITS = 5


def parser() -> argparse.ArgumentParser:
    """Upstream's flags with their defaults."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = flags.add_argument
    add("--prompt", default="a painting of a virus monster playing guitar", help="the text to draw")
    add("--from-file", dest="from_file", help="a file with a prompt on each line, in place of --prompt")
    add("--outdir", default="outputs/txt2img-samples", help="where the images go")
    add("--skip_grid", action="store_true", help="write no sheet, only images")
    add("--skip_save", action="store_true", help="write no images, only the sheet")
    add("--ddim_steps", "--steps", type=int, default=50, help="sampling steps")
    samplers = flags.add_mutually_exclusive_group()
    samplers.add_argument("--plms", action="store_true", help="sample by PLMS in place of DDIM")
    samplers.add_argument("--dpm_solver", "--dpm", action="store_true", help="sample by DPM-Solver++")
    add("--fixed_code", action="store_true", help="start every batch of a prompt from the same noise")
    add("--ddim_eta", type=float, default=0.0, help="noise of DDIM's steps, 0 for none")
    add("--n_iter", type=int, default=2, help="batches for each prompt")
    add("--H", type=int, default=512, help="height in pixels")
    add("--W", type=int, default=512, help="width in pixels")
    add("--C", type=int, default=4, help="channels of the latent")
    add("--f", type=int, default=8, help="pixels for each position of the latent, along an edge")
    add("--n_samples", type=int, default=3, help="images in a batch")
    add("--n_rows", type=int, default=0, help="images in a row of the sheet (0: all of a prompt)")
    add("--scale", type=float, default=7.5, help="of classifier-free guidance; 1 for none")
    add("--config", default="configs/stable-diffusion/v1-inference.yaml", help="describes the model")
    add("--ckpt", default="models/ldm/stable-diffusion-v1/model.ckpt", help="its weights")
    add("--seed", type=int, default=42, help="the same seed gives the same images")
    add("--given", action="append", default=[], metavar="NAME=FILE_OR_FOLDER", help="what is known")
    add("--want", default="", help="names separated by commas (default: everything that is not given)")
    add("--strength", type=float, default=1.0, help="of conditioning on a given U modality; 1 is exact")
    add(
        "--without",
        default="",
        metavar="NAME,...",
        help="modalities that are left out, neither in the latent nor drawn",
    )
    add("--baseline", default="", metavar="same|CKPT", help="what to draw beside it, see above")
    add("--baseline_config", default="", help="describes the baseline's model (default: --config)")
    add("--precision", choices=inference.PRECISIONS, default="autocast", help="autocast: float16 on CUDA")
    return flags


@dataclass(frozen=True)
class Drawing:
    """What is drawn by which model: given values by name, the names wanted, and what is left out."""

    model: LatentDiffusion
    folder: Path
    wanted: Sequence[str]
    given: Mapping[str, torch.Tensor] = field(default_factory=dict)
    without: Sequence[str] = ()


@exit_on_user_error()
def main():
    args = parser().parse_args()
    prompts = read_prompts(args)
    if min(args.n_iter, args.n_samples) < 1 or args.H % args.f or args.W % args.f:
        raise UserValueError("n_iter and n_samples must be at least 1, H and W multiples of f")
    dist_util.setup_dist()
    logger.configure(dir=args.outdir, format_strs=["stdout"])
    drawing, baseline = plan(args)
    if drawing.model.first_stage_key in drawing.given:
        arrays = {name: value.cpu().numpy() for name, value in read_off(args, drawing, prompts).items()}
        if dist_util.get_rank() == 0:
            save_arrays(args, arrays)
        return
    for_each = args.n_iter * args.n_samples
    logger.log(f"{for_each} images for each of {len(prompts)} prompts")
    arrays = draw_all(args, drawing, prompts)
    if baseline is not None:
        draw_all(args, baseline, prompts)
    if dist_util.get_world_size() > 1:
        dist.barrier()
    if dist_util.get_rank() == 0:
        save_arrays(args, arrays)
        finish(args, drawing, baseline, prompts)


def plan(args) -> tuple[Drawing, Drawing | None]:
    """What to draw, and the baseline beside it. UserValueError for what the models cannot do."""
    config = inference.merged_config([args.config])
    model = inference.load_model(config, args.ckpt)
    if args.C != model.channels:
        raise UserValueError(f"--C {args.C}: this model's latents have {model.channels} channels")
    image = model.first_stage_key
    given = inference.read_given(args.given, model, size=(args.H, args.W), config=config)
    without = [name.strip() for name in args.without.split(",") if name.strip()]
    modalities = [name for name in inference.names_of(model) if name != image]
    for name in without:
        if name not in modalities:
            raise UserValueError(f"--without {name}: the modalities are {', '.join(modalities) or 'none'}")
    wanted = inference.names_wanted(args.want, {**given, **dict.fromkeys(without)}, model)
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


def read_prompts(args) -> list[str]:
    """--prompt, or the lines of --from-file."""
    if not args.from_file:
        return [args.prompt]
    if not Path(args.from_file).is_file():
        raise UserFileError(f"--from-file: there is no file {args.from_file}")
    prompts = [line.strip() for line in Path(args.from_file).read_text().splitlines() if line.strip()]
    if not prompts:
        raise UserValueError(f"--from-file: {args.from_file} holds no prompt")
    return prompts


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
    for numbers in inference.batches(range(len(arrays)), args.n_samples):
        cond = model.get_learned_conditioning([prompts[n % len(prompts)] for n in numbers])
        values = {name: inference.take(value, numbers) for name, value in given.items()}
        read = model.predict(arrays[numbers], values, conditioning=cond, seed=args.seed, indices=numbers)
        for name, rows in found.items():
            rows.append(read[name])
    return {name: torch.cat(rows) for name, rows in found.items()}


def draw_all(args, drawing: Drawing, prompts: list[str]) -> dict[str, np.ndarray]:
    """This rank's images, as files in the drawing's folder; the vectors and labels of all ranks, by name."""
    for_each = args.n_iter * args.n_samples
    arrays: dict[str, dict[int, np.ndarray]] = {}
    with drawing.model.ema_scope():
        for numbers in inference.batches(inference.own_share(len(prompts) * for_each), args.n_samples):
            drawn = draw(args, drawing, [prompts[n // for_each] for n in numbers], numbers)
            inference.save_images(drawn.pop(drawing.model.first_stage_key), drawing.folder, numbers, DIGITS)
            for name, value in drawn.items():
                if value.ndim == 4:
                    inference.save_images(value, drawing.folder.with_name(name), numbers, DIGITS)
                else:
                    arrays.setdefault(name, {}).update(zip(numbers, value.numpy(), strict=True))
    return inference.gathered(arrays)


@torch.no_grad()
def draw(args, drawing: Drawing, prompts: list[str], numbers: list[int]) -> dict[str, torch.Tensor]:
    """What is wanted of the samples with these numbers, by name; images [b, 3, H, W] in [-1, 1]."""
    model = drawing.model
    name = "plms" if args.plms else "dpm++" if args.dpm_solver else "ddim"
    # With a fixed code the samples of all batches have the noise of the first.
    seeds = [n % args.n_samples for n in numbers] if args.fixed_code else numbers
    with inference.precision(args.precision):
        directions = {}
        if isinstance(model, JointLatentDiffusion):
            directions = {"strength": args.strength, "absent": drawing.without}
        drawn = inference.draw(
            model,
            len(numbers),
            {name: inference.take(value, numbers) for name, value in drawing.given.items()},
            drawing.wanted,
            sampler=name,
            steps=args.ddim_steps,
            seed=args.seed,
            indices=seeds,
            eta=args.ddim_eta,
            conditioning=model.get_learned_conditioning(prompts),
            unconditional=model.get_unconditional_conditioning(len(prompts)) if args.scale != 1 else None,
            guidance=args.scale,
            shape=(args.C, args.H // args.f, args.W // args.f),
            progress=dist_util.get_rank() == 0,
            **directions,
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
        Row(f"{name} (given)", to_uint8(inference.take(value, range(min(columns, len(numbers))))))
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


if __name__ == "__main__":
    main()
