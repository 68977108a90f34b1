"""Sample a model of mt_image_train.py: give any of the image and its modalities, generate the rest.

    python scripts/mt_image_sample.py --model_path runs/mine                                  # all modalities
    python scripts/mt_image_sample.py --model_path runs/mine --given label=3
    python scripts/mt_image_sample.py --model_path runs/mine --given masked=holes.png         # restore where alpha is 0
    python scripts/mt_image_sample.py --model_path runs/mine --given image=photos/ --want label
    python scripts/mt_image_sample.py --model_path runs/mine --classifier_path own            # guided to classes

The same seed gives the same images for any batch size and number of ranks. In the log's folder: samples_NxHxWxC.npz (arr_0 = uint8 images as ADM writes them, every modality under its
name, arr_1 = classes that were drawn or guided to) and samples.png, which marks what is given, generated and true.
The same command with that --log_dir goes on where it was interrupted.
"""

from guided_diffusion import flags
from guided_diffusion.errors import exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script."""
    own = flags.Parser(__doc__)
    own.add(
        "--model_path",
        required=True,
        help="a run folder, a checkpoint*.pt, or a model*.pt or ema_*.pt beside its config.yaml",
    )
    own.add("--weights", default="ema")
    own.add(
        "--given",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="what is known: image, or a modality of the model; label=random draws classes; may be repeated",
    )
    own.add("--want", default="")
    own.add("--without", default="")
    own.add("--num_samples", kind=int, unset="as many as are given, or 16")
    own.add("--batch_size", default=64)
    own.add("--sampler", default="", unset=f"{flags.FEW_SAMPLER}; ddpm with --resample")
    own.add("--steps", default="", unset=f"{flags.FEW_STEPS}; all with ddpm")
    own.add("--seed", default=0)
    own.add("--strength", kind=float, unset=flags.OWN_STRENGTH)
    own.add("--replace_known", action="store_true")
    own.add("--resample", default=1)
    own.add("--times", default="0,10,20")
    own.add("--order", default="posterior")
    own.add("--clip_denoised", default=True)
    own.add("--guidance_scale", default=1.0)
    own.add(
        "--classifier_path",
        default="",
        also=("own",),
        help="guide by a classifier of classifier_train.py, or `own`: the model's own head",
    )
    own.add("--classifier_scale", default=1.0)
    own.add(
        "--num_classes",
        default=0,
        help="classes of the classifier where the model has no labels; 0: the model's",
    )
    own.add_flags(flags.classifier_flags())
    own.add("--film", default="")
    flags.add_sampling_flags(own)
    own.add("--log_dir", unset=flags.OWN_FOLDER)
    return own


@exit_on_user_error()
def main():
    args = parser().parse_args()
    from guided_diffusion.mt.run import sample

    sample(args)


if __name__ == "__main__":
    main()
