"""The command line of main.py (interface: latent-diffusion). Imports no torch."""

import argparse
import re
from collections.abc import Sequence

from guided_diffusion.flags import Parser

_OVERRIDE = re.compile(r"(model|data|lightning)(\.[^/=]+)*=")


def parser() -> Parser:
    """Upstream's flags, and --devices, --strategy, --precision, which were Lightning's."""
    own = Parser(
        "Train an autoencoder or a latent diffusion model from a configuration.",
        prog="main.py",
        epilog="Any other argument key.key=value overrides the configuration, as in "
        "data.params.batch_size=8 or lightning.trainer.max_epochs=20.",
    )
    run, work, machine = dict(group="results"), dict(group="optimisation"), dict(group="machine")
    switch = dict(nargs="?", const=True, choices=())
    own.add("-n", "--name", help="name of the run, which follows the time in its folder's name", **run)
    own.add("-r", "--resume", path="source", help="continue from this run's folder or checkpoint", **work)
    own.add(
        "-b",
        "--base",
        nargs="*",
        default=[],
        metavar="CONFIG",
        group="model",
        path="source",
        help="configurations, merged from left to right",
    )
    own.add("-t", "--train", default=False, help="train", **work, **switch)
    own.add("--no-test", default=False, help="do not test after training", **work, **switch)
    own.add("-p", "--project", help="folder below --logdir that holds this run with others", **run)
    own.add("-d", "--debug", default=False, help="after an error, open the debugger", **work, **switch)
    own.add("-s", "--seed", default=23)
    own.add("-f", "--postfix", default="", help="end of the run's name", **run)
    own.add("-l", "--logdir", default="logs", path="folder", help="holds the runs", **run)
    own.add(
        "--scale_lr",
        default=True,
        help="learning rate = base_learning_rate x processes x batch size x accumulated batches",
        **work,
        **switch,
    )
    own.add(
        "--devices", unset="all GPUs, or one CPU process", help="a number, or a list such as 0,1", **machine
    )
    own.add("--gpus", help="--devices under upstream's name (0, means GPU 0)", **machine)
    own.add(
        "--strategy",
        choices=("auto", "ddp", "fsdp"),
        unset="auto: ddp on several devices",
        help="how several devices work together",
        **machine,
    )
    own.add("--wandb", default="")
    own.add("--precision", choices=("32-true", "bf16-mixed"), unset="32-true", **machine)
    return own


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(the flags, the overrides of the configuration). `UserError` for flags that there are not."""
    # Taken out first: the flags before them (-t, --base) would swallow them as their values.
    overrides = [argument for argument in arguments if _OVERRIDE.match(argument)]
    options, unknown = parser().parse_known_args([a for a in arguments if not _OVERRIDE.match(a)])
    return options, [*overrides, *unknown]
