"""Enlarge a batch of samples with a super-resolution model.

python scripts/super_res_sample.py --model_path MODEL --base_samples samples_100x64x64x3.npz --num_samples 100 (and flags)
"""

from guided_diffusion import flags
from guided_diffusion.errors import exit_on_user_error


def main():
    args = create_argparser().parse_args()
    from guided_diffusion import cli, dist_util, logger
    from guided_diffusion.image_files import to_uint8
    from guided_diffusion.script_util import sr_create_model_and_diffusion

    cli.start(args)
    execution = cli.execution_of(args)
    logger.log("loading data...")
    base = cli.base_batches(args)
    logger.log("creating model...")
    model, diffusion = sr_create_model_and_diffusion(
        **cli.pick(args, flags.sr_model_and_diffusion_defaults())
    )
    model = cli.load_model(model, args.model_path, "model_path", args.use_fp16, execution)
    sample = cli.sampler_of(diffusion, args.use_ddim)
    shape = (args.batch_size, args.image_channels, args.large_size, args.large_size)

    def draw(k):
        kwargs = {name: value.to(dist_util.dev()) for name, value in base(k).items()}
        images = sample(
            model, shape, clip_denoised=args.clip_denoised, model_kwargs=kwargs, device=dist_util.dev()
        )
        return (to_uint8(images),)

    logger.log("creating samples...")
    cli.sample(args, draw, execution, model, base(0))


def create_argparser():
    own = dict(base_samples="")
    return flags.add_sampling_flags(
        flags.make_parser(__doc__, flags.sampling_defaults(), own, flags.sr_model_and_diffusion_defaults())
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main()
