"""This project's speed beside a checkout of openai/guided-diffusion, in paired runs on this machine.

    OMP_NUM_THREADS=1 python benchmarks/compare_upstream.py --upstream guided-diffusion

Every loop runs in a process of its own; they take turns, in one order and then in the other, and the ratios are those
of turns of one round. Writes OUT/compare_upstream.md and .json.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import numpy as np
from PIL import Image

from guided_diffusion import flags
from guided_diffusion.errors import UserError, UserFileError, exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]
UPSTREAM, OURS = "upstream", "this project"
LABEL = "{{label: {{variant: U, head: {head}}}}}"
CLASSIFIER = "classifier, classifier: {width: 64, depth: 2, attention_resolutions: '16,8'}"
IMAGES = 192  # of the folder that is read, JPEG of 320 x 256 pixels


@dataclass(frozen=True)
class Loop:
    """What is timed. units: in a turn; beside: what its ratio is to; goal: the largest ratio that was aimed at."""

    group: str
    name: str
    case: Mapping
    units: int = 1
    beside: str = UPSTREAM
    goal: float | None = None


def loops(folder: str, packed: str, steps: int) -> list[Loop]:
    """All, group by group; the first of a group is upstream's. folder: images; packed: the same as .npz."""

    def training(precision, **more):
        return dict(kind="train", precision=precision, **more)

    def label(head, classes):
        return training("fp32", modalities=LABEL.format(head=head), num_classes=classes)

    step, half = "training step, fp32", "training step, bf16"
    found = [
        Loop(step, UPSTREAM, training("fp32")),
        Loop(step, OURS, training("fp32"), goal=0.75),
        Loop(step, "with the masked image", training("fp32", modalities="masked:X"), 1, OURS, 1.03),
        Loop(step, "with the label, M, 10 classes", label("middle", 10), 1, OURS, 1.10),
        Loop(step, "with the label, M, 1000 classes", label("middle", 1000), 1, OURS, 1.10),
        Loop(step, "with the label, E, 10 classes", label(CLASSIFIER, 10), 1, OURS, None),
        Loop(half, UPSTREAM, training("bf16")),
        Loop(half, OURS, training("bf16"), goal=0.55),
    ]
    for name, word in (("ddpm", str(steps)), ("ddim", f"ddim{steps}")):
        group, case = f"sampling by {name}, {steps} steps", dict(kind="sample", steps=word)
        found += [Loop(group, UPSTREAM, case), Loop(group, OURS, case, goal=0.8)]
    group = "loading a batch"
    found += [
        Loop(group, name, dict(kind="load", data_dir=folder), 20, goal=g)
        for name, g in ((UPSTREAM, None), (OURS, 1.0))
    ]
    found.append(Loop(group, "packed", dict(kind="load", data_dir=packed), 20))
    return found


class Worker:
    """A loop in its process."""

    def __init__(self, loop: Loop, sizes: Mapping, checkout: Path, clock: str):
        ours = loop.name != UPSTREAM
        self.loop, self.root, self.clock = loop, ROOT if ours else checkout, clock
        case = {**loop.case, **sizes, "ours": ours}
        path = os.pathsep.join([str(self.root), os.environ.get("PYTHONPATH", "")])
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks/upstream_worker.py"), json.dumps(case)],
            env={**os.environ, "PYTHONPATH": path, "OPENAI_LOG_FORMAT": "log,csv"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def start(self) -> int:
        """Wait until it is warm; the number of its threads. UserError where it is of the wrong package."""
        hello = self._answer()
        if Path(hello["package"]).resolve().parent != self.root.resolve():
            raise UserError(f"{hello['package']} was imported in place of {self.root}/guided_diffusion")
        self._added = 1 + hello["share"]
        self.turn(1)
        return hello["threads"]

    def turn(self, units: int | None = None) -> float:
        """Seconds of a unit of work."""
        units = units or self.loop.units
        self._process.stdin.write(f"{units}\n")
        self._process.stdin.flush()
        return self._added * self._answer()[self.clock] / units

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            said = (self._log.read().strip() or "nothing").splitlines()[-1]
            raise UserError(f"{self.loop.group}, {self.loop.name}: it ended, and said {said}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
        self._log.close()


@dataclass
class Row:
    """Of the table. times: seconds of a unit by round; ratios: to another loop's, by round."""

    group: str
    name: str
    times: list[float]
    beside: str = ""
    goal: float | None = None
    ratios: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        """The median of the rounds'."""
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None where there is none."""
        return None if self.goal is None or self.ratio is None else self.ratio <= self.goal


def paired(group: Sequence[Loop], times: Mapping[str, list[float]]) -> list[Row]:
    """The rows of a group's loops from their times by name."""
    rows = []
    for loop in group:
        row = Row(loop.group, loop.name, times[loop.name])
        if loop.name != loop.beside and loop.name != UPSTREAM:
            row.beside, row.goal = loop.beside, loop.goal
            row.ratios = [a / b for a, b in zip(times[loop.name], times[loop.beside], strict=True)]
        rows.append(row)
    return rows


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def measure(
    group: Sequence[Loop], rounds: int, sizes: Mapping, checkout: Path, clock: str
) -> tuple[list[Row], int]:
    """(rows, threads of a process) of loops that take turns."""
    times: dict[str, list[float]] = {loop.name: [] for loop in group}
    with ExitStack() as stack:
        workers = [Worker(loop, sizes, checkout, clock) for loop in group]
        for worker in workers:
            stack.callback(worker.close)
        threads = {worker.start() for worker in workers}
        for number in range(rounds):
            for worker in workers[:: 1 if number % 2 else -1]:
                times[worker.loop.name].append(worker.turn())
    return paired(group, times), max(threads)


def report(results: Mapping, rows: Sequence[Row]) -> str:
    """The results as Markdown."""
    lines = [f"# Beside guided-diffusion, {results['date']}", "", f"`{results['command']}`", ""]
    lines += [f"{results['machine']}; {results['sizes']}.", ""]
    lines += [results["method"], ""]
    lines += ["| | | median, ms | quartiles, ms | ratio | quartiles | to | goal | met |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        low, high = (1e3 * value for value in quartiles(row.times))
        cells = [row.group, row.name, f"{1e3 * statistics.median(row.times):.1f}", f"{low:.1f} to {high:.1f}"]
        if row.ratios:
            low, high = quartiles(row.ratios)
            goal, met = ("", "") if row.met is None else (f"{row.goal:.2f}", "yes" if row.met else "**no**")
            cells += [f"{row.ratio:.2f}", f"{low:.2f} to {high:.2f}", row.beside, goal, met]
        else:
            cells += [""] * 5
        lines.append("| " + " | ".join(cells) + " |")
    missed = [
        f"{row.group}, {row.name} ({row.ratio:.2f}, aimed at {row.goal:.2f})"
        for row in rows
        if row.met is False
    ]
    lines += ["", f"Goals missed: {'; '.join(missed) or 'none'}."]
    return "\n".join(lines) + "\n"


CLOCKS = {"wall": "by the clock", "processor": "in seconds of processors, since others were busy too"}
METHOD = (
    "The loops of a group take turns, and a ratio is of two turns of one round. A training step is one of "
    "`TrainLoop.run_loop`, with loss, backward pass, AdamW, moving average and logging, as the training scripts "
    "call it (here with a seed); bf16 is autocast, for upstream around its loop. Steps with a label hold the share that "
    "encoding its classes anew takes at the interval of the flags. E's classifier is 64 wide and 2 deep. Batches are read by "
    f"`load_data` from {IMAGES} JPEG files of 320 x 256 pixels, or from what scripts/pack_images.py makes of them."
)


def machine(threads: int) -> str:
    """Its processor, load and packages."""
    import torch

    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{name}, {os.cpu_count()} cores, threads of a process: {threads}, load {load} at the end; "
        f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
    )


def write_images(folder: Path) -> Path:
    """Photographs of nothing, smooth as such are, in two classes."""
    folder.mkdir()
    random = np.random.RandomState(0)
    for i in range(IMAGES):
        small = Image.fromarray(random.randint(0, 256, (16, 20, 3)).astype(np.uint8))
        small.resize((320, 256), Image.Resampling.BICUBIC).save(folder / f"{'ab'[i % 2]}_{i}.jpg", quality=90)
    return folder


def groups(found: Sequence[Loop]) -> Iterator[list[Loop]]:
    """The loops that take turns."""
    for name in dict.fromkeys(loop.group for loop in found):
        yield [loop for loop in found if loop.group == name]


def parser() -> flags.Parser:
    """The flags of this program."""
    own = flags.Parser(__doc__)
    own.add("--upstream", required=True, path="source", help="a checkout of openai/guided-diffusion")
    own.add("--out", default=str(ROOT / "benchmarks" / "results"))
    own.add("--rounds", default=7, low=1, high=1000, help="turns of every loop")
    own.add(
        "--clock",
        default="wall",
        choices=("wall", "processor"),
        help="what is counted; processor: seconds of processors, where others keep the machine busy",
    )
    own.add("--image_size", default=32, low=8)
    own.add("--num_channels", default=64)
    own.add("--batch_size", default=8)
    own.add("--steps", default=5, kind=int, low=1, high=1000, help="of a sampling", unset="5")
    return own


@exit_on_user_error()
def main():
    """Measure everything and write it down."""
    args = parser().parse_args()
    checkout = Path(args.upstream).resolve()
    if not (checkout / "guided_diffusion" / "train_util.py").exists():
        raise UserFileError(f"--upstream {args.upstream}: there is no guided_diffusion/train_util.py in it")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    sizes = {name: getattr(args, name) for name in ("image_size", "num_channels", "batch_size")}
    rows, threads = [], 1
    with tempfile.TemporaryDirectory() as folder:
        images, packed = write_images(Path(folder) / "images"), Path(folder) / "packed.npz"
        pack = [ROOT / "scripts/pack_images.py", images, packed, "--image_size", args.image_size]
        subprocess.run([sys.executable, *map(str, pack)], check=True, capture_output=True)
        for group in groups(loops(str(images), str(packed), args.steps)):
            found, threads = measure(group, args.rounds, sizes, checkout, args.clock)
            rows += found
            for row in found:
                told = f", {row.ratio:.2f} of {row.beside}" if row.ratios else ""
                print(
                    f"{row.group}, {row.name}: {1e3 * statistics.median(row.times):.1f} ms{told}", flush=True
                )
    results = {
        "date": str(date.today()),
        "command": " ".join(["python benchmarks/compare_upstream.py", *sys.argv[1:]]),
        "machine": machine(threads),
        "sizes": f"{args.image_size} pixels, {args.num_channels} channels, batch {args.batch_size}, {args.rounds} rounds, {CLOCKS[args.clock]}",
        "method": METHOD,
    }
    text = report(results, rows)
    told = [{**vars(row), "ratio": row.ratio, "met": row.met} for row in rows]
    (out / "compare_upstream.json").write_text(json.dumps(results | {"rows": told}, indent=1) + "\n")
    (out / "compare_upstream.md").write_text(text)
    print(f"\n{text}\nWritten to {out}: compare_upstream.md, compare_upstream.json")


if __name__ == "__main__":
    main()
