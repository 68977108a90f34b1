"""Command-line options that several evaluations share."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from guided_diffusion.flags import Parser

BATCH_SIZE = 64
STRENGTH = 0.5  # of SDEdit
NETS = ("alex", "vgg", "squeeze")  # of LPIPS


def add_json_option(parser: Parser) -> None:
    """--json."""
    parser.add("--json", kind=Path)


def write_json(path: Path | None, result: Any) -> None:
    """Write a result (a dataclass) as --json asks, if it does."""
    if path:
        path.write_text(json.dumps(asdict(result), indent=2) + "\n")


def add_network_options(parser: Parser) -> None:
    """--inception, --batch_size and --device."""
    parser.add(
        "--inception",
        path="source",
        group="model",
        unset="downloaded",
        help="Inception weights (.pb, .tgz, .pth)",
    )
    parser.add("--batch_size", default=BATCH_SIZE, group="machine", help="images of a step of the network")
    parser.add("--device")


def add_label_option(parser: Parser) -> None:
    """--label_from."""
    parser.add(
        "--label_from", default="auto", help="what gives the classes of a folder's images, as in training"
    )


def add_size_option(parser: Parser) -> None:
    """--image_size."""
    parser.add(
        "--image_size",
        kind=int,
        group="data",
        unset="as they are",
        help="pixels of an edge: crop and scale to a square as ADM's training does",
    )
