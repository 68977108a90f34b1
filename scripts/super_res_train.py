"""Train a super-resolution model: images of large_size pixels given the same in small_size.

python scripts/super_res_train.py --data_dir FOLDER --large_size 256 --small_size 64 --batch_size 8
"""

from guided_diffusion import flags
from guided_diffusion.errors import exit_on_user_error


def main():
    args = create_argparser().parse_args()
    import torch.nn.functional as F

    from guided_diffusion import cli, dist_util, logger
    from guided_diffusion.image_files import from_uint8
    from guided_diffusion.script_util import sr_create_model_and_diffusion

    cli.start(args)
    logger.log("creating model...")
    model, diffusion = sr_create_model_and_diffusion(
        **cli.pick(args, flags.sr_model_and_diffusion_defaults())
    )

    def with_low_res(batches):
        for images, cond in batches:
            # Averages over areas: what a camera with larger pixels sees.
            cond["low_res"] = F.interpolate(from_uint8(images), args.small_size, mode="area")
            yield images, cond

    cli.train(
        args,
        model.to(dist_util.dev()),
        diffusion,
        image_size=args.large_size,
        class_cond=args.class_cond,
        prepare=with_low_res,
        ema_rate=args.ema_rate,
        use_fp16=args.use_fp16,
        fp16_scale_growth=args.fp16_scale_growth,
        lr_anneal_steps=args.lr_anneal_steps,
    )


def create_argparser():
    defaults = flags.training_defaults(), flags.sr_model_and_diffusion_defaults()
    return flags.add_training_flags(flags.make_parser(__doc__, *defaults))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
