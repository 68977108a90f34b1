"""What tasks do to each other, from a folder of `reproduce.py transfer`: the change of each task's held-out loss when it is
trained with another, and with all, against training it alone; above 0 it is better, in % of the loss alone.

Seeds are compared each with itself; what is missing is left out. Writes transfer.md and transfer.png (a heat map) into --out.
"""

from guided_diffusion import flags
from guided_diffusion.errors import UserFileError, exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script."""
    own = flags.Parser(__doc__)
    own.add("folder", help="OUT of reproduce.py", path="source")
    own.add("--out", default="transfer")
    return own


if __name__ == "__main__":
    flags.answer_early(parser)  # before the slow imports


import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path

LOSSES = {  # of every task, as held_out_scores.py names them
    "image": "mse",
    "masked": "KL_masked",
    "label": "KL_label",
    "map": "KL_map",
    "representation": "KL_representation",
}
Scores = Mapping[str, Mapping[int, Mapping[str, float]]]  # by row and seed


@exit_on_user_error()
def main():
    args = parser().parse_args()
    changes = matrix(read(Path(args.folder)))
    if not changes:
        raise UserFileError(f"{args.folder} has no task both alone and with another: run its rows first")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    text = markdown(changes)
    (Path(args.out) / "transfer.md").write_text(text)
    draw(changes, Path(args.out) / "transfer.png")
    print(text)


def read(folder: Path) -> Scores:
    """The scores of every row and seed in a folder of `reproduce.py transfer`."""
    found: dict[str, dict[int, dict]] = {}
    for path in sorted(folder.glob("score-*-seed*/scores.json")):
        row, _, seed = path.parent.name.removeprefix("score-").rpartition("-seed")
        found.setdefault(row, {})[int(seed)] = json.loads(path.read_text())
    return found


def matrix(scores: Scores) -> dict[tuple[str, str], list[float]]:
    """(task, the other or `all`) -> 100 (1 - L / L_alone), one for each seed that has both."""
    changes: dict[tuple[str, str], list[float]] = {}
    for task, loss in LOSSES.items():
        for other in (*LOSSES, "all"):
            pair = sorted({task, other}, key=list(LOSSES).index) if other != "all" else ["all"]
            both, alone = scores.get("_".join(pair), {}), scores.get(task, {})
            if other != task and (seeds := sorted(both.keys() & alone.keys())):
                changes[task, other] = [100 * (1 - both[s][loss] / alone[s][loss]) for s in seeds]
    return changes


def markdown(changes: Mapping[tuple[str, str], list[float]]) -> str:
    """The table: mean, and standard deviation where there are several seeds."""
    lines = [
        ["task, % better", *(f"with {name}" for name in LOSSES), "with all"],
        ["---"] * (len(LOSSES) + 2),
    ]
    for task in LOSSES:
        lines.append([task, *(cell(changes.get((task, other), [])) for other in (*LOSSES, "all"))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(values: list[float]) -> str:
    """-1.2 ± 0.3, or a dash."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.1f}{spread}"


def draw(changes: Mapping[tuple[str, str], list[float]], path: Path) -> None:
    """The heat map: a row for each scored task, a column for each other."""
    from matplotlib.figure import Figure

    others = (*LOSSES, "all")
    means = [
        [statistics.fmean(changes[t, o]) if (t, o) in changes else math.nan for o in others] for t in LOSSES
    ]
    limit = max(abs(value) for row in means for value in row if not math.isnan(value)) or 1.0
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(means, cmap="RdBu", vmin=-limit, vmax=limit)
    axes.set_xticks(range(len(others)), [f"with {name}" for name in others], rotation=30, ha="right")
    axes.set_yticks(range(len(LOSSES)), LOSSES)
    for i, row in enumerate(means):
        for j, value in enumerate(row):
            axes.text(j, i, "" if math.isnan(value) else f"{value:+.1f}", ha="center", va="center")
    figure.colorbar(shown, label="held-out loss against training alone, % better")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
