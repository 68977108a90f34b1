"""A page to play with a model, in the browser.

    python scripts/demo.py --model_path runs/mine
        serve a run of mt_image_train.py at http://127.0.0.1:7860
    python scripts/demo.py --model_path logs/RUN --port 8000
        the same for a latent diffusion model of main.py

Upload or draw an image, mask what the model is to restore, choose a class, set what is given and what to generate. Image
and modalities appear side by side, with the denoising as a film. Needs the extra `demo`: pip install -e ".[demo]". The page
listens only on this machine unless --host names another address; anyone who can reach it can use the model. It sends
nothing to other machines.
"""

from pathlib import Path

from guided_diffusion import flags
from guided_diffusion.errors import UserError, exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script."""
    own = flags.Parser(__doc__)
    own.add(
        "--model_path",
        required=True,
        help="a run of mt_image_train.py or its checkpoint*.pt, or a run of main.py or its .ckpt",
    )
    own.add("--weights", default="ema")
    own.add("--host", default="127.0.0.1")
    own.add("--port", default=7860)
    own.add("--queue", default=8)
    own.add("--max_upload", default=8.0)
    return own


@exit_on_user_error()
def main():
    args = parser().parse_args()
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        raise UserError(f'{error.name} is missing: pip install -e ".[demo]"') from None
    from guided_diffusion import dist_util
    from guided_diffusion.mt.page import PixelStudio, application, bound_socket, hosts_of

    place = bound_socket(args.host, args.port)  # before the model is read, which may take long
    dist_util.setup_dist()
    if is_latent(args.model_path):
        from ldm.page import LatentStudio

        studio = LatentStudio(args.model_path)
    else:
        studio = PixelStudio(args.model_path, args.weights)
    page = application(studio, args.queue, args.max_upload, hosts_of(args.host))
    address, port = place.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    place.listen(128)
    print(f"open http://{shown}:{port} in a browser; Ctrl-C ends it", flush=True)
    uvicorn.Server(uvicorn.Config(page, log_level="warning")).run(sockets=[place])


def is_latent(path: str) -> bool:
    """Whether `path` is a run of main.py or its checkpoint."""
    where = Path(path)
    if where.is_dir():
        return any((where / name).exists() for name in ("checkpoints/last.ckpt", "model.ckpt"))
    return where.suffix == ".ckpt"


if __name__ == "__main__":
    main()
