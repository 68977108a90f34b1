"""The variational bound on the negative log likelihood of images, in bits per dimension.

Prints the mean bound and writes vb_terms.npz, mse_terms.npz and xstart_mse_terms.npz: one mean per timestep, T-1 first.

python scripts/image_nll.py --data_dir FOLDER --model_path MODEL --num_samples 1000 (and the model's flags of training)
"""

from guided_diffusion import flags
from guided_diffusion.errors import exit_on_user_error


def main():
    args = create_argparser().parse_args()
    from guided_diffusion import cli, logger
    from guided_diffusion.image_datasets import load_data
    from guided_diffusion.script_util import create_model_and_diffusion

    cli.start(args)
    logger.log("creating model and diffusion...")
    model, diffusion = create_model_and_diffusion(**cli.pick(args, flags.model_and_diffusion_defaults()))
    model = cli.load_model(model, args.model_path, "model_path", args.use_fp16)
    logger.log("creating data loader...")
    data = load_data(
        data_dir=args.data_dir,
        batch_size=args.batch_size,
        image_size=args.image_size,
        class_cond=args.class_cond,
        deterministic=True,
        image_channels=args.image_channels,
    )
    logger.log("evaluating...")
    cli.run_bpd_evaluation(model, diffusion, data, args.num_samples, args.clip_denoised)


def create_argparser():
    own = dict(data_dir="", clip_denoised=True, num_samples=1000, batch_size=1, model_path="")
    return flags.make_parser(__doc__, own, flags.model_and_diffusion_defaults())


if __name__ == "__main__":
    with exit_on_user_error():
        main()
