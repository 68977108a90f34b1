"""Reproduce a table of the paper: train what is missing, sample, evaluate, and print it in Markdown.

    python experiments/reproduce.py table4 --scale small --data camvid
    python experiments/reproduce.py table4 --scale small --data camvid --dry_run      # the commands, to run by hand
    python experiments/reproduce.py table4 --scale paper --data cityscapes --seeds 0,1,2 --only joint
    python experiments/reproduce.py table2 --scale small --data cifar10 --jobs 2      # two steps beside each other

Stopped at any point, the same command continues: finished steps are skipped, an interrupted training resumes. The
steps are the project's own commands; configs/tables/NAME.yaml declares them (experiments/_tables.py describes how).
Results: OUT/table.md, OUT/results.json, and a folder for every step.
"""

import argparse
import json
import os
import platform
import shlex
from pathlib import Path

from table_run import Runner, markdown, numbers, write_whole  # noqa: E402
from tables import ROOT, Plan, load_table  # noqa: E402

from guided_diffusion.errors import UserValueError, exit_on_user_error  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = flags.add_argument
    add("table", help="a name in configs/tables, or a .yaml file")
    add("--scale", default="small", help="small: for one machine; paper: its sizes and lengths")
    add("--data", default="", help="the folder (or file) with the data")
    add("--out", default="", help="where everything goes (default: runs/TABLE-SCALE)")
    add("--only", default="", metavar="ROW,...", help="ids of the rows to make (default: all)")
    add(
        "--seeds",
        default="0",
        metavar="S,...",
        help="runs of every row; their mean and deviation are printed",
    )
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="change a variable of the table")
    add("--again", action="append", default=[], metavar="STEP", help="run a step and all that needs it anew")
    add("--write", default="", metavar="FILE", help="write the table there too, with times and machine")
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="steps that run at once; each has its share of the cores",
    )
    add("--dry_run", action="store_true", help="only print the commands")
    return flags


@exit_on_user_error()
def main():
    args = parser().parse_args()
    if args.jobs < 1:
        raise UserValueError(f"--jobs {args.jobs}: give the number of steps to run at once")
    table = load_table(args.table)
    out = _relative(args.out or ROOT / "runs" / f"{table.path.stem}-{args.scale}")
    data = _relative(args.data) if args.data else ""
    plan = Plan(table, args.scale, _seeds(args.seeds), out, data, _changes(args.set))
    only = [part for part in args.only.split(",") if part]
    rows = plan.rows(only)
    jobs = plan.jobs(rows, () if only else table.also)
    if args.dry_run:
        for job in jobs:
            print(f"# {job.name}\n{shlex.join(plan.command(job, resolve=False))}")
        return
    runner = Runner(plan)
    if args.again:
        runner.forget(args.again, plan.jobs(plan.rows(), table.also))
    runner.run(jobs, args.jobs)
    measured = {row.id: numbers(plan, runner, row) for row in rows}
    text = markdown(plan, measured, rows)
    seconds = runner.seconds(jobs)
    results = {
        "rows": measured,
        "seconds": seconds,
        "scale": args.scale,
        "seeds": plan.seeds,
        "machine": machine(),
    }
    write_whole(ROOT / out / "results.json", json.dumps(results, indent=1) + "\n")
    write_whole(ROOT / out / "table.md", text)
    if args.write:
        write_whole(Path(args.write), f"{text}\n{_account(plan, seconds)}")
    print(f"\n{text}\nWritten to {out}: table.md, results.json", flush=True)


def _relative(path: str | Path) -> str:
    """The path as the commands see it, which run in the root of the repository."""
    absolute = Path(path).absolute()
    return str(absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else absolute)


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserValueError(f"--seeds {text}: give different numbers from 0 up, such as 0,1,2")
    return seeds


def _changes(pairs: list[str]) -> dict[str, str]:
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise UserValueError(f"--set {wrong[0]}: give NAME=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)


def machine() -> str:
    """What the commands ran on."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"


def _account(plan: Plan, seconds: dict[str, float]) -> str:
    lines = [f"Machine: {machine()}.", "", "| step | seconds |", "|---|---|"]
    lines += [f"| {name} | {taken:.0f} |" for name, taken in seconds.items()]
    lines.append(f"| all | {sum(seconds.values()):.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
