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
batch size and number of ranks; the same command goes on with samples that were interrupted. Further arguments key.key=value override the configuration.
"""

from guided_diffusion import flags
from guided_diffusion.errors import exit_on_user_error


def parser() -> flags.Parser:
    """Upstream's flags with their defaults, and --given, --want, --sampler, --seed, --scale."""
    own = flags.Parser(__doc__)
    own.add(
        "-r",
        "--resume",
        required=True,
        metavar="LOGDIR_OR_CKPT",
        group="model",
        path="source",
        help="a run of main.py, or its checkpoint",
    )
    own.add("-n", "--n_samples", kind=int, unset="as many as are given, or 50000")
    own.add(
        "-e",
        "--eta",
        kind=float,
        group="sampling",
        low=0,
        high=1,
        unset="1; with modalities 0",
        help="noise of DDIM's steps, 0 for none",
    )
    own.add(
        "-v",
        "--vanilla_sample",
        action="store_true",
        group="sampling",
        help="ancestral sampling in all steps",
    )
    own.add(
        "-l",
        "--logdir",
        group="results",
        path="folder",
        unset="the run's folder",
        help="where the results go",
    )
    own.add("-c", "--custom_steps", default=50, group="sampling", low=1, high=100_000, help="sampling steps")
    own.add("--batch_size", default=10)
    own.add("--given", action="append", default=[], metavar="NAME=FILE_OR_FOLDER")
    own.add("--want", default="")
    own.add(
        "--sampler",
        choices=("ddim", "plms", "heun", "dpm++", "dpm++sde", "dpm++3m", "unipc", "ddpm"),
        default="ddim",
    )
    own.add("--scale", default=1.0)
    own.add("--strength", kind=float, unset=flags.OWN_STRENGTH)
    own.add(
        "--null_label", kind=int, group="sampling", low=0, help="the class that says nothing, for --scale"
    )
    own.add("--seed", default=0)
    return flags.add_sampling_flags(own)


@exit_on_user_error()
def main():
    args, overrides = parser().parse_known_args()
    from ldm import sample_diffusion

    sample_diffusion.run(args, overrides)


if __name__ == "__main__":
    main()
