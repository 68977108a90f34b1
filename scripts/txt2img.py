"""Pictures for a prompt, from a latent diffusion model with a text encoder (interface: latent-diffusion and
Stable Diffusion, scripts/txt2img.py).

    python scripts/txt2img.py --prompt "a painting of a fox" --config CONFIG.yaml --ckpt MODEL.ckpt

Writes OUTDIR/samples/00000.png, ... and one sheet OUTDIR/grid-0000.png with a row for each prompt. The same
seed gives the same pictures for any n_samples per batch and number of ranks (mpiexec, torchrun).
"""

import argparse
from pathlib import Path

import _ldm
import torch
import torch.distributed as dist

from guided_diffusion import dist_util, logger
from guided_diffusion.errors import UserFileError, UserValueError, exit_on_user_error
from guided_diffusion.figures import Row, contact_sheet
from guided_diffusion.seeding import PerSample

DIGITS = 5


def parser() -> argparse.ArgumentParser:
    """Upstream's flags with their defaults."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = flags.add_argument
    add("--prompt", default="a painting of a virus monster playing guitar", help="the text to draw")
    add("--from-file", dest="from_file", help="a file with a prompt on each line, in place of --prompt")
    add("--outdir", default="outputs/txt2img-samples", help="where the pictures go")
    add("--skip_grid", action="store_true", help="write no sheet, only pictures")
    add("--skip_save", action="store_true", help="write no pictures, only the sheet")
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
    add("--n_samples", type=int, default=3, help="pictures in a batch")
    add("--n_rows", type=int, default=0, help="pictures in a row of the sheet (0: all of a prompt)")
    add("--scale", type=float, default=7.5, help="of classifier-free guidance; 1 for none")
    add("--config", default="configs/stable-diffusion/v1-inference.yaml", help="describes the model")
    add("--ckpt", default="models/ldm/stable-diffusion-v1/model.ckpt", help="its weights")
    add("--seed", type=int, default=42, help="the same seed gives the same pictures")
    add("--precision", choices=_ldm.PRECISIONS, default="autocast", help="autocast: float16 on CUDA")
    return flags


@exit_on_user_error()
def main():
    args = parser().parse_args()
    prompts = read_prompts(args)
    if min(args.n_iter, args.n_samples) < 1 or args.H % args.f or args.W % args.f:
        raise UserValueError("n_iter and n_samples must be at least 1, H and W multiples of f")
    dist_util.setup_dist()
    logger.configure(dir=args.outdir, format_strs=["stdout"])
    model = _ldm.load_model(_ldm.merged_config([args.config]), args.ckpt)
    shape = (args.C, args.H // args.f, args.W // args.f)
    if args.C != model.channels:
        raise UserValueError(f"--C {args.C}: this model's latents have {model.channels} channels")
    for_each = args.n_iter * args.n_samples
    count = len(prompts) * for_each
    folder = Path(args.outdir) / "samples"
    logger.log(f"{for_each} pictures for each of {len(prompts)} prompts")
    with model.ema_scope():
        for numbers in _ldm.batches(_ldm.own_share(count), args.n_samples):
            pictures = draw(args, model, shape, [prompts[n // for_each] for n in numbers], numbers)
            _ldm.save_pictures(pictures, folder, numbers, DIGITS)
    if dist_util.get_world_size() > 1:
        dist.barrier()
    if dist_util.get_rank() == 0:
        finish(args, folder, prompts, for_each)


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
def draw(args, model, shape, prompts: list[str], numbers: list[int]) -> torch.Tensor:
    """Pictures [b, 3, H, W] of the samples with these numbers."""
    name = "plms" if args.plms else "dpm++" if args.dpm_solver else "ddim"
    # With a fixed code the samples of all batches have the noise of the first.
    seeds = [n % args.n_samples for n in numbers] if args.fixed_code else numbers
    random = PerSample.derived(args.seed, seeds, dist_util.dev())
    with _ldm.precision(args.precision):
        guided = {}
        if args.scale != 1:
            guided["unconditional_guidance_scale"] = args.scale
            guided["unconditional_conditioning"] = model.get_unconditional_conditioning(len(prompts))
        latents, _ = _ldm.SAMPLERS[name](model).sample(
            args.ddim_steps,
            len(prompts),
            shape,
            model.get_learned_conditioning(prompts),
            eta=args.ddim_eta,
            verbose=dist_util.get_rank() == 0,
            random=random,
            **guided,
        )
        return model.decode_first_stage(latents).float().cpu()


def finish(args, folder: Path, prompts: list[str], for_each: int) -> None:
    """The sheet, and only that with --skip_save."""
    numbers = range(len(prompts) * for_each)
    if not args.skip_grid:
        pictures = _ldm.read_pictures(folder, numbers, DIGITS)
        columns = args.n_rows or for_each
        rows = []
        for k, prompt in enumerate(prompts):
            own = pictures[k * for_each : (k + 1) * for_each]
            rows += [
                Row(prompt if first == 0 else "", own[first : first + columns])
                for first in range(0, for_each, columns)
            ]
        path = Path(args.outdir) / f"grid-{len(list(Path(args.outdir).glob('grid-*.png'))):04}.png"
        contact_sheet(rows).save(path)
        logger.log(f"saved {path}")
    if args.skip_save:
        for number in numbers:
            (folder / f"{number:0{DIGITS}}.png").unlink()
    else:
        logger.log(f"saved {len(numbers)} pictures in {folder}")


if __name__ == "__main__":
    main()
