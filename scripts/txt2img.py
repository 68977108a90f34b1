"""Images for a prompt, from a latent diffusion model with a text encoder (interface: latent-diffusion and
Stable Diffusion, scripts/txt2img.py), and with a joint model in any direction.

    python scripts/txt2img.py --prompt "a painting of a fox" --config CONFIG.yaml --ckpt MODEL.ckpt
    python scripts/txt2img.py --prompt "a fox" ... --want image,representation      # both
    python scripts/txt2img.py --prompt "" ... --given representation=photo.jpg      # variations of an image
    python scripts/txt2img.py --prompt "" ... --given image=photos/ --want representation

Writes OUTDIR/samples/00000.png, ..., vectors as OUTDIR/NAME.npy, with --baseline OUTDIR/baseline/00000.png, ...,
and one sheet OUTDIR/grid-0000.png with a row for each prompt. The same seed gives the same images for any
n_samples per batch and number of ranks (mpiexec, torchrun).
"""

from guided_diffusion import flags
from guided_diffusion.errors import UserValueError, exit_on_user_error


def parser() -> flags.Parser:
    """Upstream's flags with their defaults."""
    own = flags.Parser(__doc__)
    model, sampling, results = dict(group="model"), dict(group="sampling"), dict(group="results")
    own.add(
        "--prompt",
        default="a painting of a virus monster playing guitar",
        help="the text to draw",
        **sampling,
    )
    own.add(
        "--from-file",
        default="",
        path="source",
        help="a file with a prompt on each line, in place of --prompt",
        **sampling,
    )
    own.add(
        "--outdir", default="outputs/txt2img-samples", path="folder", help="where the images go", **results
    )
    own.add("--skip_grid", action="store_true", help="write no sheet, only images", **results)
    own.add("--skip_save", action="store_true", help="write no images, only the sheet", **results)
    own.add("--ddim_steps", "--steps", default=50, low=1, high=100_000, help="sampling steps", **sampling)
    own.add("--plms", action="store_true", help="sample by PLMS in place of DDIM", **sampling)
    own.add(
        "--dpm_solver",
        "--dpm",
        action="store_true",
        help="sample by DPM-Solver++ in place of DDIM",
        **sampling,
    )
    own.add(
        "--sampler",
        default="",
        choices=("ddim", "plms", "heun", "dpm++", "dpm++sde", "dpm++3m", "unipc"),
        also=("",),
        unset="ddim, or what --plms or --dpm_solver says",
    )
    own.add(
        "--fixed_code",
        action="store_true",
        help="start every batch of a prompt from the same noise",
        **sampling,
    )
    own.add("--ddim_eta", default=0.0, low=0, high=1, help="noise of DDIM's steps, 0 for none", **sampling)
    own.add("--n_iter", default=2, low=1, high=100_000, help="batches for each prompt", **sampling)
    own.add("--H", default=512, low=1, high=8192, help="height in pixels", **sampling)
    own.add("--W", default=512, low=1, high=8192, help="width in pixels", **sampling)
    own.add("--C", default=4, low=1, high=1024, help="channels of the latent", **model)
    own.add(
        "--f",
        default=8,
        low=1,
        high=1024,
        help="pixels for each position of the latent, along an edge",
        **model,
    )
    own.add("--n_samples", default=3, high=100_000, help="images in a batch")
    own.add("--n_rows", default=0, low=0, help="images in a row of the sheet; 0: all of a prompt", **results)
    own.add("--scale", default=7.5)
    own.add(
        "--config",
        default="configs/stable-diffusion/v1-inference.yaml",
        path="source",
        help="describes the model",
        **model,
    )
    own.add(
        "--ckpt",
        default="models/ldm/stable-diffusion-v1/model.ckpt",
        path="source",
        help="the model's weights",
        **model,
    )
    own.add("--seed", default=42)
    own.add("--given", action="append", default=[], metavar="NAME=FILE_OR_FOLDER")
    own.add("--want", default="")
    own.add("--strength", kind=float, unset=flags.OWN_STRENGTH)
    own.add("--without", default="")
    own.add(
        "--baseline",
        default="",
        metavar="same|CKPT",
        path="source",
        also=("same",),
        help="draw the same prompts and seeds with nothing given: same, with this checkpoint's modalities left out, or by another",
        **sampling,
    )
    own.add(
        "--baseline_config", default="", path="source", unset="--config", help="describes its model", **model
    )
    return flags.add_sampling_flags(
        own,
        "autocast",
        precision=dict(
            help="number format of the network; autocast: float16 on CUDA, else fp32, as full",
            choices=("autocast", "full", *flags.PRECISIONS),
        ),
    )


@exit_on_user_error()
def main():
    args = parser().parse_args()
    chosen = [name for name in ("--plms", "--dpm_solver", "--sampler") if getattr(args, name.strip("-"))]
    if len(chosen) > 1:
        raise UserValueError(f"{' and '.join(chosen)} are two samplers: give one")
    args.sampler = args.sampler or ("plms" if args.plms else "dpm++" if args.dpm_solver else "ddim")
    from ldm import txt2img

    txt2img.run(args)


if __name__ == "__main__":
    main()
