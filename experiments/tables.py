"""Tables of results as configs/tables/README.md describes them: what is to be run, and how its numbers are printed."""

import glob
import json
import math
import re
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

from omegaconf import OmegaConf

from guided_diffusion.config_file import load_with_bases
from guided_diffusion.errors import UserError, UserFileError, UserValueError, one_line

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs" / "tables"
BUILT_IN = ("here", "out", "data", "seed", "row", "scale", "found")


@dataclass(frozen=True)
class Step:
    """One command of a table, as declared."""

    name: str
    run: str
    per: list[str] = field(default_factory=list)  # row, seed
    makes: Mapping[str, str] = field(default_factory=dict)  # name -> path or pattern
    resume: Mapping[str, str] | None = None  # when, run
    needs: list[str] = field(default_factory=list)
    only_with: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One row of a table, as declared."""

    id: str
    title: str
    set: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, Any] = field(default_factory=dict)
    cells: Mapping[str, Any] = field(default_factory=dict)
    also: list[str] = field(default_factory=list)

    @property
    def slug(self) -> str:
        """The id as a part of file names."""
        return re.sub(r"[^\w.]+", "_", self.id)


class Job:
    """A step of a table for one row and one seed (None where the step does not depend on it)."""

    def __init__(self, plan: "Plan", step: Step, row: Row | None, seed: int | None):
        self.plan, self.step, self.row, self.seed = plan, step, row, seed
        parts = [step.name, row and row.slug, None if seed is None else f"seed{seed}"]
        self.name = "-".join(part for part in parts if part)  # unique within a table, and that of its folder
        self.here = f"{plan.out}/{self.name}"

    def needs(self) -> list["Job"]:
        """The jobs that this one mentions or names."""
        texts = [self.step.run, *self.step.makes.values(), *(self.step.resume or {}).values()]
        try:
            mentioned = [
                name.rpartition(".")[0] for text in texts for name in self._names(text) if "." in name
            ]
        except RecursionError:
            self.plan.refuse(f"variables of step {self.step.name} need each other")
        jobs = [self.plan.job(name, self.row, self.seed) for name in [*self.step.needs, *mentioned]]
        return list({job.name: job for job in jobs if job.name != self.name}.values())

    def left_out(self) -> bool:
        """Whether a variable that the step, or one that it needs, cannot do without is empty."""
        empty = any(not self.fill(f"{{{name}}}") for name in self.step.only_with)
        return empty or any(job.left_out() for job in self.needs())

    def command(self, resolve: bool = True) -> list[str]:
        """The words of what is to be run now: `resume` where it applies, and patterns as the files that they match
        (`resolve`); else as declared."""
        found = (
            newest(self.fill(self.step.resume["when"], glob.escape)) if resolve and self.step.resume else None
        )
        return self._words(self.step.resume["run"] if found else self.step.run, resolve, found or "")

    def made(self, name: str, resolve: bool = True) -> str:
        """The path of what the job makes ("here": its folder). UserError where nothing matches its pattern."""
        if name == "here":
            return self.here
        if name not in self.step.makes:
            self.plan.refuse(f"step {self.step.name} does not make {name}")
        path = self.fill(self.step.makes[name])
        if not resolve:
            return path
        if (found := newest(self.fill(self.step.makes[name], glob.escape))) is None:
            raise UserError(
                f"step {self.name} ended without an error but has not made {name} ({path}), or it is gone; "
                f"--again {self.name} runs it anew"
            )
        return found

    def fill(
        self, text: str, quote: Callable[[str], str] = str, resolve: bool = False, found: str = ""
    ) -> str:
        """`text` with the names in it filled in, and their values quoted."""

        class Names(Formatter):
            def get_field(_, name, args, kwargs):
                return quote(self._value(name, resolve, found)), name

        return Names().format(text)

    def _words(self, text, resolve, found):
        """Split before names are filled in; a variable that is a word of its own may be several."""
        words = []
        for word in shlex.split(text):
            alone = re.fullmatch(r"\{(\w+)\}", word)
            if alone and alone[1] not in BUILT_IN:
                words += self._words(self._variable(alone[1]), resolve, found)
            else:
                words.append(self.fill(word, str, resolve, found))
        return words

    def _names(self, text):
        """The names in a text, and those in the variables that it takes."""
        for _, name, _, _ in Formatter().parse(text):
            if name is not None:
                yield name
                if "." not in name and name not in BUILT_IN:
                    yield from self._names(self._variable(name))

    def _value(self, name, resolve, found):
        step, dot, made = name.rpartition(".")
        if dot:
            job = self.plan.job(step, self.row, self.seed)
            return job.made(made, resolve and job.name != self.name)
        if name not in BUILT_IN:
            return self.fill(self._variable(name), str, resolve, found)
        if name == "data" and not self.plan.data:
            raise UserValueError(f"step {self.step.name} needs the data: say where it is with --data")
        known = {"here": self.here, "found": found, "row": self.row and self.row.id, "seed": self.seed}
        value = known[name] if name in known else getattr(self.plan, name)
        if value is None:
            self.plan.refuse(f"step {self.step.name} uses {{{name}}} but is not per {name}")
        return str(value)

    def _variable(self, name):
        known = {**self.plan.variables, **(self.row.set if self.row else {}), **self.plan.changes}
        if name not in known:
            self.plan.refuse(f"step {self.step.name} uses {{{name}}}, which is not declared")
        return str(known[name])


class Plan:
    """A table at one scale: its jobs in order, their commands and files, and what it looks like.

    name: of a file in configs/tables, or a .yaml file. UserError for what cannot be understood.
    """

    def __init__(self, name: str, scale: str, seeds: Iterable[int], out: str, data: str, changes: Mapping):
        path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml") if not p.stem.startswith("base")))
            raise UserFileError(f"there is no table {name}: known are {known}, or give a .yaml file")
        self.path, self.scale, self.seeds, self.data, self.changes = path, scale, list(seeds), data, changes
        self.out = out or str(Path("runs") / f"{path.stem}-{scale}")
        try:
            self._declare(**OmegaConf.to_container(load_with_bases(path)))
        except (TypeError, AttributeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{path} is not a table as configs/tables/README.md describes it: {error}"
            ) from error

    def _declare(self, title, columns, scales, steps, rows, variables=None, cells=None, also=(), notes=()):
        self.title, self.columns, self.cells, self.notes = title, columns, cells or {}, notes
        self.steps = {name: Step(name, **step) for name, step in steps.items()}
        self.rows, self.also = [Row(**row) for row in rows], also
        scales = {name: own for name, own in scales.items() if own is not None}
        if self.scale not in scales:
            raise UserValueError(f"{self.path} has the scales {', '.join(scales)}, not {self.scale}")
        self.variables = {**(variables or {}), **scales[self.scale]}
        known = sorted({*self.variables, *(name for row in self.rows for name in row.set)})
        if unknown := sorted(set(self.changes) - set(known)):
            raise UserValueError(f"--set {unknown[0]}: the variables of {self.path} are {', '.join(known)}")
        if len({row.slug for row in self.rows}) < len(self.rows):
            self.refuse("two rows have the same id, or ids that differ in signs alone")
        for step in self.steps.values():
            if step.resume is not None and set(step.resume) != {"when", "run"}:
                self.refuse(f"`resume` of step {step.name} needs `when` and `run`")
            if not set(step.per) <= {"row", "seed"}:
                self.refuse(f"`per` of step {step.name} can have row and seed, not {', '.join(step.per)}")
        for row in self.rows:
            if unknown := sorted(set(row.paper) - set(columns)):
                self.refuse(f"row {row.id} has the paper's number for {unknown[0]}, which is no column")
            for column, (step, made, key) in self.cells_of(row).items():
                if column not in columns or not key:
                    self.refuse(f"cell {column} of row {row.id} needs a declared column and a `key`")
                if step not in self.steps or made not in self.steps[step].makes:
                    self.refuse(f"cell {column} of row {row.id}: no step makes {step}.{made}")

    def refuse(self, what: str) -> None:
        """Raise a UserError about the table."""
        raise UserError(f"{self.path}: {what}")

    def cells_of(self, row: Row) -> dict[str, tuple[str, str, str]]:
        """Where a row's numbers stand, by column: step, what it makes, key in it."""
        found = {}
        for column, cell in {**self.cells, **row.cells}.items():
            text = cell if isinstance(cell, str) else f"{cell.get('from')} {cell.get('key', '')}"
            source, _, key = text.partition(" ")
            step, _, made = source.partition(".")
            found[column] = (step, made, key)
        return found

    def choose(self, ids: Iterable[str]) -> list[Row]:
        """The rows with these ids, or all. UserValueError for an unknown one."""
        known = [row.id for row in self.rows]
        if unknown := sorted(set(ids) - set(known)):
            raise UserValueError(f"--only {unknown[0]}: the rows are {', '.join(known)}")
        return [row for row in self.rows if not ids or row.id in ids]

    def jobs(self, rows: Iterable[Row], also: Iterable[str] = ()) -> list[Job]:
        """All that these rows (and these steps) need, each after what it needs."""
        steps = [
            (name, row) for row in rows for name in [*(c[0] for c in self.cells_of(row).values()), *row.also]
        ]
        for name in also:
            steps += [(name, row) for row in (self.rows if "row" in self._step(name).per else [None])]
        found: dict[str, Job] = {}

        def add(job, path=()):
            if job.name in path:
                self.refuse(f"step {job.name} needs itself ({' -> '.join(path)})")
            if job.name not in found and not job.left_out():
                for other in job.needs():
                    add(other, (*path, job.name))
                found[job.name] = job

        for name, row in steps:
            for seed in self.seeds:
                add(self.job(name, row, seed))
        return list(found.values())

    def job(self, name: str, row: Row | None, seed: int | None) -> Job:
        """The job of a step as seen from a row and a seed. `STEP@ROW` is that of another row."""
        name, at, other = name.partition("@")
        step, row = self._step(name), self.choose([other])[0] if at else row
        if ("row" in step.per and row is None) or ("seed" in step.per and seed is None):
            self.refuse(f"{name} runs per {' and '.join(step.per)}, a step that needs it does not")
        return Job(self, step, row if "row" in step.per else None, seed if "seed" in step.per else None)

    def _step(self, name: str) -> Step:
        if name not in self.steps:
            self.refuse(f"there is no step {name}")
        return self.steps[name]

    def numbers(self, row: Row) -> dict[str, list[float]]:
        """A row's measured numbers by column, one for each seed; none where the step is left out."""
        measured = {}
        for column, (step, made, key) in self.cells_of(row).items():
            jobs = {job.name: job for job in (self.job(step, row, seed) for seed in self.seeds)}.values()
            values = [_number(ROOT / job.made(made), key) for job in jobs if not job.left_out()]
            times = self.columns[column].get("times", 1)
            measured[column] = [times * value for value in values if value is not None]
        return measured

    def markdown(self, measured: Mapping[str, Mapping[str, list[float]]], rows: Iterable[Row]) -> str:
        """The table; below each of our numbers (mean, and standard deviation over the seeds) the paper's, where it
        has any for the table. Rows and columns without any number are left out."""
        rows = [row for row in rows if row.paper or any(measured[row.id].values())]
        shown = [n for n in self.columns if any(n in row.paper or measured[row.id].get(n) for row in rows)]
        compared = {name for row in rows for name in row.paper}
        lines = [["", *(self.columns[name].get("title", name) for name in shown)], ["---"] * (1 + len(shown))]
        for row in rows:
            cells = []
            for name in shown:
                form, paper = self.columns[name].get("format", ".3f"), row.paper.get(name, "–")
                cells.append(_mean(measured[row.id].get(name, []), form))
                if name in compared:
                    cells[-1] += f"<br>*{format(paper, form) if isinstance(paper, int | float) else paper}*"
            lines.append([row.title, *cells])
        seeds = ", ".join(map(str, self.seeds))
        seeds = f"seeds {seeds}, mean ± standard deviation" if len(self.seeds) > 1 else f"seed {seeds}"
        about = f"{'Upper numbers' if compared else 'All'}: measured ({self.scale} scale, {seeds})"
        about += "; in italics below: the paper's. A dash: not measured, or not known." if compared else "."
        text = [f"| {' | '.join(line)} |" for line in lines]
        return "\n".join([f"**{self.title}**", "", *text, "", about, *self.notes]) + "\n"


def newest(pattern: str) -> str | None:
    """The newest file that matches a pattern, below the repository's root or absolute."""
    found = [Path(file) for file in glob.glob(str(ROOT / pattern))]
    return str(relative(max(found, key=lambda file: file.stat().st_mtime))) if found else None


def relative(path: str | Path) -> Path:
    """The path as the commands see it, which run in the root of the repository."""
    absolute = Path(path).absolute()
    return absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else absolute


def _number(path: Path, key: str) -> float | None:
    try:
        value = json.loads(path.read_text())
        for part in key.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path} has no number {key}: {type(error).__name__} {one_line(error)}") from error
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise UserError(f"{key} of {path} is no number but {value!r}")
    return value


def _mean(values: list[float], form: str) -> str:
    mean = format(statistics.fmean(values), form) if values else "–"
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return mean if math.isnan(deviation) else f"{mean} ± {deviation:{form}}"
