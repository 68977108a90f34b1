"""Figure 6: accuracy against iterations of finetuning, for several runs of classifier_train.py.

    python experiments/figure6.py --runs "E=runs/finetuned-e" "without MT-Diffusion=runs/plain" --out figure6.png

Each run is a log folder with its progress.csv. Draws top-1 (solid) and top-5 (dashed) accuracy of the
validation data (--prefix train: of the training data) to figure6.png, and writes the numbers to figure6.csv.
"""

from guided_diffusion import flags
from guided_diffusion.errors import UserError, UserFileError, UserValueError, exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script."""
    own = flags.Parser(__doc__)
    own.add(
        "--runs",
        nargs="+",
        required=True,
        metavar="NAME=FOLDER",
        group="data",
        help="in the order of the legend",
    )
    own.add("--prefix", choices=("val", "train"), default="val", group="data", help="which accuracies")
    own.add("--title", default="Finetuning the classifier")
    own.add(
        "--classes",
        default=0,
        low=0,
        group="results",
        help="classes of the data, for the line of chance; 0: no line",
    )
    own.add("--out", default="figure6.png", path="image", help="the plot, also as .pdf")
    return own


if __name__ == "__main__":
    flags.answer_early(parser)  # before the slow imports


import csv
import os

from guided_diffusion.figures import Curve, Plot, save_plots


def read_run(name: str, folder: str, prefix: str) -> list[tuple[int, float, float]]:
    """(step, top-1, top-5) of every line of a run's progress.csv that has them. UserError if none has."""
    path = os.path.join(folder, "progress.csv")
    if not os.path.isfile(path):
        raise UserFileError(f"{name}: no progress.csv in {folder} (a log folder of classifier_train.py)")
    columns = ("step", f"{prefix}_acc@1", f"{prefix}_acc@5")
    try:
        with open(path, newline="") as file:
            rows = [[row.get(column) for column in columns] for row in csv.DictReader(file)]
        points = [(int(float(s)), float(a), float(b)) for s, a, b in rows if s and a and b]
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not points:
        hint = ": train with --val_data_dir" if prefix == "val" else ""
        raise UserError(f"{path} has no {columns[1]}{hint}")
    return points


@exit_on_user_error()
def main():
    args = parser().parse_args()
    runs = {}
    for spec in args.runs:
        name, found, folder = spec.partition("=")
        if not found or name in runs:
            raise UserValueError(f"--runs {spec}: expected NAME=FOLDER, each name once")
        runs[name] = read_run(name, folder, args.prefix)
    curves = []
    for place, (top, dashed) in enumerate((("top-1", False), ("top-5", True)), start=1):
        for name, points in runs.items():
            y = [100 * point[place] for point in points]
            curves.append(Curve(f"{name}, {top}", [point[0] for point in points], y, dashed))
    save_plots(
        [
            Plot(
                curves,
                "iterations",
                "accuracy in %",
                args.title,
                100 / args.classes if args.classes else None,
            )
        ],
        args.out,
    )
    with open(os.path.splitext(args.out)[0] + ".csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "iteration", "top1", "top5"])
        writer.writerows([name, *point] for name, points in runs.items() for point in points)
    for name, points in runs.items():
        step, top1, top5 = points[-1]
        print(f"{name}: top-1 {top1:.2%}, top-5 {top5:.2%} after {step} iterations")


if __name__ == "__main__":
    main()
