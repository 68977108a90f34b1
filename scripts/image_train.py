"""Train a diffusion model on images.

    python scripts/image_train.py --data_dir FOLDER --image_size 64 --batch_size 32
    mpiexec -n 8 python scripts/image_train.py ...      (or torchrun --nproc_per_node 8)

Resume with --resume_checkpoint RUN_FOLDER.
"""

from guided_diffusion import flags
from guided_diffusion.errors import exit_on_user_error


def main():
    args = create_argparser().parse_args()
    from guided_diffusion import cli, dist_util, logger
    from guided_diffusion.script_util import create_model_and_diffusion

    cli.start(args)
    logger.log("creating model and diffusion...")
    model, diffusion = create_model_and_diffusion(**cli.pick(args, flags.model_and_diffusion_defaults()))
    cli.train(
        args,
        model.to(dist_util.dev()),
        diffusion,
        image_size=args.image_size,
        class_cond=args.class_cond,
        ema_rate=args.ema_rate,
        use_fp16=args.use_fp16,
        fp16_scale_growth=args.fp16_scale_growth,
        lr_anneal_steps=args.lr_anneal_steps,
    )


def create_argparser():
    defaults = flags.training_defaults(), flags.model_and_diffusion_defaults()
    return flags.add_training_flags(flags.make_parser(__doc__, *defaults))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
