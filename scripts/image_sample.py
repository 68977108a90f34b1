"""Generate images from a model and save them as one .npz, the form that ADM's evaluator reads.

python scripts/image_sample.py --model_path ema_0.9999_250000.pt --num_samples 100 (and the model's flags of training)
"""

from guided_diffusion import flags
from guided_diffusion.errors import exit_on_user_error


def main():
    args = create_argparser().parse_args()
    from guided_diffusion import cli, dist_util, logger
    from guided_diffusion.image_files import to_uint8
    from guided_diffusion.script_util import create_model_and_diffusion

    cli.start(args)
    execution = cli.execution_of(args)
    logger.log("creating model and diffusion...")
    model, diffusion = create_model_and_diffusion(**cli.pick(args, flags.model_and_diffusion_defaults()))
    model = cli.load_model(model, args.model_path, "model_path", args.use_fp16, execution)
    sample = cli.sampler_of(diffusion, args.use_ddim)
    shape = (args.batch_size, args.image_channels, args.image_size, args.image_size)

    def draw(k):
        kwargs = {}
        if args.class_cond:
            kwargs["y"] = cli.random_labels(args.batch_size, args.num_classes)
        images = sample(
            model, shape, clip_denoised=args.clip_denoised, model_kwargs=kwargs, device=dist_util.dev()
        )
        return to_uint8(images), *kwargs.values()

    logger.log("sampling...")
    names = cli.names_of(args, args.model_path) if args.class_cond else ()
    cli.sample(args, draw, execution, model, class_names=names)


def create_argparser():
    return flags.add_sampling_flags(
        flags.make_parser(__doc__, flags.sampling_defaults(), flags.model_and_diffusion_defaults())
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main()
