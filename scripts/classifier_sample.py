"""Generate images with a model that a noisy classifier guides towards random classes.

python scripts/classifier_sample.py --model_path MODEL --classifier_path CLASSIFIER --classifier_scale 1.0 (and flags)
"""

from guided_diffusion import flags
from guided_diffusion.errors import exit_on_user_error


def main():
    args = create_argparser().parse_args()
    import torch as th

    from guided_diffusion import cli, dist_util, logger
    from guided_diffusion.image_files import to_uint8
    from guided_diffusion.script_util import create_classifier, create_model_and_diffusion

    cli.start(args)
    execution = cli.execution_of(args)
    logger.log("creating model and diffusion...")
    model, diffusion = create_model_and_diffusion(**cli.pick(args, flags.model_and_diffusion_defaults()))
    model = cli.load_model(model, args.model_path, "model_path", args.use_fp16, execution)
    logger.log("loading classifier...")
    classifier = create_classifier(**cli.pick(args, flags.classifier_defaults()))
    classifier = cli.load_model(
        classifier, args.classifier_path, "classifier_path", args.classifier_use_fp16, execution
    )
    sample = cli.sampler_of(diffusion, args.use_ddim)
    shape = (args.batch_size, args.image_channels, args.image_size, args.image_size)

    def guidance(x, t, y):
        """classifier_scale * grad_x log p(y | x_t) (Dhariwal & Nichol 2021, algorithms 1 and 2)."""
        with th.enable_grad():
            x = x.detach().requires_grad_()
            log_p = classifier(x, t).log_softmax(dim=-1).gather(1, y[:, None])
            return th.autograd.grad(log_p.sum(), x)[0] * args.classifier_scale

    def network(x, t, y):
        return model(x, t, y) if args.class_cond else model(x, t)

    def draw(k):
        labels = cli.random_labels(args.batch_size, args.num_classes)
        images = sample(
            network,
            shape,
            clip_denoised=args.clip_denoised,
            model_kwargs={"y": labels},
            cond_fn=guidance,
            device=dist_util.dev(),
        )
        return to_uint8(images), labels

    logger.log("sampling...")
    names = cli.names_of(args, args.classifier_path, args.model_path)
    cli.sample(args, draw, execution, model, classifier, class_names=names)


def create_argparser():
    own = dict(classifier_path="", classifier_scale=1.0)
    return flags.add_sampling_flags(
        flags.make_parser(
            __doc__,
            flags.sampling_defaults(),
            own,
            flags.model_and_diffusion_defaults(),
            flags.classifier_defaults(),
        )
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main()
