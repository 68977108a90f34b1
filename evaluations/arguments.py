"""Command-line options that several scripts share."""

import argparse
from pathlib import Path

from evaluations.features import BATCH_SIZE
from guided_diffusion.image_files import LABEL_FROM


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def new_file(text: str) -> Path:
    """A file in a folder that exists: found out before the work, not after it."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} cannot be written: name a file in a folder that exists")
    return path


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument(
        "--json", metavar="FILE", type=new_file, help="also write the scores, and all they depend on, as JSON"
    )


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """--inception, --batch_size and --device."""
    parser.add_argument(
        "--inception", metavar="FILE", help="Inception weights (.pb, .tgz, .pth); downloaded if not given"
    )
    parser.add_argument(
        "--batch_size", type=positive, default=BATCH_SIZE, help="images per step of the network"
    )
    add_device_option(parser)


def add_label_option(parser: argparse.ArgumentParser) -> None:
    """--label_from."""
    parser.add_argument(
        "--label_from",
        choices=LABEL_FROM,
        default="auto",
        help="what gives the classes of a folder's images, as in training",
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; the GPU by default where there is one")
