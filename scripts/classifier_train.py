"""Train a classifier on noised images, for classifier guidance.

python scripts/classifier_train.py --data_dir FOLDER --val_data_dir FOLDER --image_size 64 --num_classes 10 --batch_size 32
"""

from guided_diffusion import flags
from guided_diffusion.errors import exit_on_user_error


def main():
    args = create_argparser().parse_args()
    from guided_diffusion import cli, dist_util, logger
    from guided_diffusion.classifier_loop import ClassifierLoop, open_val_data
    from guided_diffusion.script_util import create_classifier_and_diffusion

    cli.start(args)
    logger.log("creating model and diffusion...")
    model, diffusion = create_classifier_and_diffusion(
        **cli.pick(args, flags.classifier_and_diffusion_defaults())
    )
    cli.train(
        args,
        model.to(dist_util.dev()),
        diffusion,
        image_size=args.image_size,
        class_cond=True,
        random_crop=True,
        loop=ClassifierLoop,
        ema_rate="",
        use_fp16=args.classifier_use_fp16,
        lr_anneal_steps=args.iterations if args.anneal_lr else 0,
        noised=args.noised,
        from_data={"val_data": lambda dataset: open_val_data(args, dataset)},
        eval_interval=args.eval_interval,
    )


def create_argparser():
    own = dict(
        data_dir="",
        val_data_dir="",
        noised=True,
        iterations=150000,
        lr=3e-4,
        weight_decay=0.0,
        anneal_lr=False,
        batch_size=4,
        microbatch=-1,
        schedule_sampler="uniform",
        resume_checkpoint="",
        log_interval=10,
        eval_interval=5,
        save_interval=10000,
    )
    parser = flags.make_parser(__doc__, own, flags.classifier_and_diffusion_defaults())
    return flags.add_training_flags(parser, iterations=False)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
