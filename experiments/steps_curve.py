"""A curve against steps of training, one for each table of `evaluations/restoration.py table` (E.5).

    python experiments/steps_curve.py --tables joint=a.json conditional=b.json --steps 300 600 900 1200 --out curve.png

Each table has one method for every number of steps, in their order, after the masked images. Draws LPIPS (PNG and PDF), and that of
the masked images as a dashed line.
"""

from guided_diffusion import flags
from guided_diffusion.errors import UserError, UserFileError, UserValueError, exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script."""
    own = flags.Parser(__doc__)
    own.add(
        "--tables",
        nargs="+",
        required=True,
        metavar="NAME=FILE",
        group="data",
        help="in the order of the legend",
    )
    own.add(
        "--steps",
        nargs="+",
        kind=int,
        required=True,
        low=0,
        group="data",
        help="steps of training, for each method",
    )
    own.add("--out", default="curve.png", path="image", help="the plot")
    return own


if __name__ == "__main__":
    flags.answer_early(parser)  # before the slow imports


import json


def read_table(spec: str, count: int) -> tuple[str, list[dict]]:
    """(NAME, its cells): the masked images' first, then `count` others. UserError where FILE holds another number."""
    name, found, path = spec.partition("=")
    if not found:
        raise UserValueError(f"--tables {spec}: expected NAME=FILE")
    try:
        with open(path) as file:
            cells = json.load(file)["cells"]
    except OSError as error:
        raise UserFileError(f"--tables {spec}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no table of evaluations/restoration.py --json") from error
    if len(cells) != count + 1:
        raise UserError(f"{path} has {len(cells) - 1} methods, --steps {count} numbers")
    return name, cells


@exit_on_user_error()
def main():
    args = parser().parse_args()
    tables = dict(read_table(spec, len(args.steps)) for spec in args.tables)
    from guided_diffusion.figures import Curve, Plot, save_plots  # here, since it takes long

    curves = [
        Curve(name, args.steps, [cell["lpips"] for cell in cells[1:]]) for name, cells in tables.items()
    ]
    masked = next(iter(tables.values()))[0]["lpips"]
    curves.append(Curve("masked images", args.steps, [masked] * len(args.steps), dashed=True))
    save_plots([Plot(curves, "steps of training", "LPIPS to the clean images")], args.out)


if __name__ == "__main__":
    main()
