"""Train one U-Net on images and other modalities of them.

    python scripts/mt_image_train.py --data_dir images/ --modalities masked:X,label:U --log_dir runs/mine
    mpiexec -n 8 python scripts/mt_image_train.py --config mine.yaml --data_dir images/
    torchrun --nproc_per_node 8 scripts/mt_image_train.py --config mine.yaml --data_dir images/

Flags: ADM's, and those of the modalities. `--config FILE.yaml` sets any of them; the command line wins. The same
command continues a run that was stopped, bit for bit. --init_from RUN finetunes: with --modalities "" only the
generator, with --train heads only the heads. --log_dir receives checkpoint*.pt (complete),
with --adm_files True model*.pt, ema_*.pt, opt*.pt (as ADM writes them), config.yaml, progress.csv, tb/ (TensorBoard) and samples*.png.
"""

from guided_diffusion import flags
from guided_diffusion.errors import exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script."""
    own = flags.Parser(__doc__)
    own.add(
        "--config",
        default="",
        path="source",
        help="a YAML file with any of these flags; the command line wins",
    )
    return own.add_flags(
        flags.mt_training_defaults(),
        num_classes=dict(help="classes of the labels; 0: as many as the data have"),
        precision=dict(
            help="number format of the network; auto: bf16 where the GPU has it",
            choices=("auto", *flags.PRECISIONS),
        ),
        compile=dict(help="torch.compile the model; auto: on a GPU", choices=("auto", "true", "false")),
        log_dir=dict(unset=flags.OWN_FOLDER),
        val_data_dir=dict(
            help="images, with their modalities, that --eval_every measures on", unset="those of --held_out"
        ),
    )


@exit_on_user_error()
def main():
    given = flags.parse_flags(parser())
    from guided_diffusion.mt.run import train

    train(given, open_judge)


def open_judge(*where):
    """The judge of --eval_judge; its packages are loaded where it is asked for."""
    from evaluations.during_training import open_judge

    return open_judge(*where)


if __name__ == "__main__":
    main()
