"""The multi-task variational bound of a model of mt_image_train.py, in bits per dimension, term by term.

    python scripts/mt_image_nll.py --model_path runs/mine --data_dir images/ --num_samples 64 --steps 250

L0: prior; L1: transitions of the latent; L2_NAME: each modality given the latent, mean over timesteps; L3:
the image itself; total: an upper bound of -log p(image, modalities). With `--modalities ""` models these are
image_nll.py's numbers. nll.npz in the log's folder holds every term of every image, by timestep.
"""

from guided_diffusion import flags
from guided_diffusion.errors import exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script."""
    own = flags.Parser(__doc__)
    own.add("--model_path", required=True, help="a run folder or a checkpoint*.pt")
    own.add("--weights", default="ema")
    own.add("--data_dir", required=True)
    own.add("--label_from", default="auto", help="what gives the classes; auto: as in training")
    own.add("--missing", default="error")
    own.add("--num_samples", default=1000, help="images to measure, the first of the data")
    own.add("--batch_size", default=16)
    own.add("--steps", default="")
    own.add("--seed", default=0)
    own.add("--clip_denoised", default=True)
    own.add("--log_dir", unset=flags.OWN_FOLDER)
    return own


@exit_on_user_error()
def main():
    args = parser().parse_args()
    from guided_diffusion.mt.run import measure_bound

    measure_bound(args)


if __name__ == "__main__":
    main()
