"""Tables of results, declared in YAML: what is to be run for each row, and which numbers are printed.

A table is a file configs/tables/NAME.yaml, which `experiments/reproduce.py NAME --scale small` carries out:

    title: "Table 0: an example"
    notes: [lines printed under the table]
    columns:                                # in the order of printing
      fid: {title: FID, format: .2f}        # format of Python; `times: 100` multiplies first
    scales:                                 # variables by scale; `--set NAME=VALUE` changes one
      small: {config: configs/small.yaml, iterations: 2000}
      paper: {config: configs/paper.yaml, iterations: 300000}
    variables: {inception: ""}              # the same at every scale
    steps:
      reference:                            # runs once
        run: python evaluations/make_reference.py {data} {here}/ref.npz
        makes: {file: "{here}/ref.npz"}     # must be there afterwards; others write {reference.file}
      train:
        per: [row, seed]                    # once for every row and seed
        run: >-
          python main.py --base {config} -t --seed {seed} --logdir {here} {flags}
        resume:                             # what runs instead where the newest match of `when` is {found}
          when: "{here}/*/checkpoints/last.ckpt"
          run: python main.py -t --resume {found}
        makes: {weights: "{here}/*/checkpoints/last.ckpt"}     # of several matches the newest counts
      evaluate:
        per: [row, seed]
        only_with: [inception]              # left out, its numbers too, where this variable is empty
        run: python evaluations/evaluator.py {reference.file} {sample.file} --json {here}/scores.json
        makes: {scores: "{here}/scores.json"}
    cells:                                  # column: where its number stands, a key (or a.b) of a JSON file
      fid: {from: evaluate.scores, key: fid}
    rows:
      - id: M                               # for --only, and in folder names
        title: MT-Diffusion (M)
        set: {flags: "--modalities label:U"}                   # variables of this row
        paper: {fid: 3.64}                  # the paper's numbers, printed below ours
      - id: M-star
        title: MT-Diffusion (M*)
        set: {flags: "--resume_checkpoint {train@M.weights}"}  # a step of another row
        cells: {fid: {from: finetune.scores, key: fid}}        # this row's own cells go before the table's
        also: [figure]                      # steps that the row needs beside those of its cells
    also: [sheet]                           # steps that are run whatever the rows, except with --only

Names in braces: {here} the step's own folder, {out}, {data}, {seed}, {row} (its id), {scale}, variables, and
{STEP.NAME} for what a step `makes` ({STEP.here} is its folder). A step runs after those that it mentions, or
names under `needs:`. A command is split into words like a shell's before names are filled in, so that paths
may have spaces; a variable of several words ({flags} as a word of its own) is split as well. It runs in the
root of the repository, without a shell; `python` is the running one. A literal brace is doubled.

A step that stopped in the middle is run again by the same command in the same folder (or by `resume`), so it
has to continue or to overwrite.
"""

import glob
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from guided_diffusion.errors import UserError, UserFileError, UserValueError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs" / "tables"
BUILT_IN = ("here", "out", "data", "seed", "row", "scale", "found")


@dataclass(frozen=True)
class Step:
    """One command of a table, as declared."""

    name: str
    run: str
    per: tuple[str, ...] = ()  # row, seed
    makes: Mapping[str, str] = field(default_factory=dict)  # name -> path or pattern
    resume: Mapping[str, str] | None = None  # when, run
    needs: tuple[str, ...] = ()
    only_with: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    id: str
    title: str
    set: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, Any] = field(default_factory=dict)
    cells: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    also: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The id as a part of file names."""
        return re.sub(r"[^\w.]+", "_", self.id)


@dataclass(frozen=True)
class Table:
    """A declaration, checked."""

    path: Path
    title: str
    columns: Mapping[str, Mapping[str, Any]]
    scales: Mapping[str, Mapping[str, Any]]
    steps: Mapping[str, Step]
    rows: tuple[Row, ...]
    variables: Mapping[str, Any] = field(default_factory=dict)
    cells: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def cells_of(self, row: Row) -> dict[str, Mapping[str, str]]:
        """Where the numbers of a row stand, by column."""
        return {**self.cells, **row.cells}


@dataclass(frozen=True)
class Job:
    """A step for one row and one seed (None where the step does not depend on it)."""

    step: Step
    row: Row | None
    seed: int | None

    @property
    def name(self) -> str:
        """Unique within a table, and the name of the job's folder."""
        parts = [self.step.name]
        if self.row is not None:
            parts.append(self.row.slug)
        if self.seed is not None:
            parts.append(f"seed{self.seed}")
        return "-".join(parts)


def load_table(name: str) -> Table:
    """The table NAME of configs/tables, or in the file NAME. UserError for what cannot be understood."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise UserFileError(f"there is no table {name}: known are {known}, or give a .yaml file")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not sound YAML: {error}") from error
    try:
        steps = {key: Step(key, **_tuples(value, path)) for key, value in content.pop("steps").items()}
        rows = tuple(Row(**_tuples(row, path)) for row in content.pop("rows"))
        table = Table(path, steps=steps, rows=rows, **_tuples(content, path))
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a table as experiments/_tables.py describes it: {error}") from error
    _check(table)
    return table


def _tuples(mapping: Mapping[str, Any], path: Path) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in mapping.items()}


def _check(table: Table) -> None:
    def refuse(what: str) -> None:
        raise UserError(f"{table.path}: {what}")

    if len({row.slug for row in table.rows}) < len(table.rows):
        refuse("two rows have the same id, or ids that differ in signs alone")
    for step in table.steps.values():
        if step.resume is not None and set(step.resume) != {"when", "run"}:
            refuse(f"`resume` of step {step.name} needs `when` and `run`")
        if not set(step.per) <= {"row", "seed"}:
            refuse(f"`per` of step {step.name} can have row and seed, not {', '.join(step.per)}")
    for row in table.rows:
        for column, cell in table.cells_of(row).items():
            step, _, made = str(cell.get("from", "")).partition(".")
            if column not in table.columns or "key" not in cell:
                refuse(f"cell {column} of row {row.id} needs a declared column and a `key`")
            if step not in table.steps or made not in table.steps[step].makes:
                refuse(f"cell {column} of row {row.id}: no step makes {cell.get('from')}")
        if unknown := sorted(set(row.paper) - set(table.columns)):
            refuse(f"row {row.id} has the paper's number for {unknown[0]}, which is no column")


class Plan:
    """A table at one scale: its jobs in order, their commands and files."""

    def __init__(self, table: Table, scale: str, seeds: Iterable[int], out: str, data: str, changes=None):
        if scale not in table.scales:
            raise UserValueError(f"{table.path} has the scales {', '.join(table.scales)}, not {scale}")
        self.table, self.scale, self.seeds, self.out, self.data = table, scale, tuple(seeds), out, data
        self.variables = {**table.variables, **table.scales[scale]}
        own = {name for row in table.rows for name in row.set}
        if unknown := sorted(set(changes or {}) - set(self.variables) - own):
            raise UserValueError(
                f"--set {unknown[0]}: the variables of {table.path} are {', '.join(sorted({*self.variables, *own}))}"
            )
        self.changes = dict(changes or {})

    def rows(self, only: Iterable[str] = ()) -> list[Row]:
        """The rows with these ids, or all. UserValueError for an unknown one."""
        ids = [row.id for row in self.table.rows]
        if unknown := sorted(set(only) - set(ids)):
            raise UserValueError(f"--only {unknown[0]}: the rows are {', '.join(ids)}")
        return [row for row in self.table.rows if not only or row.id in only]

    def jobs(self, rows: Iterable[Row], also: Iterable[str] = ()) -> list[Job]:
        """All that these rows (and these steps) need, each after what it needs."""
        found: dict[str, Job] = {}
        for row in rows:
            steps = [cell["from"].partition(".")[0] for cell in self.table.cells_of(row).values()]
            for name in [*steps, *row.also]:
                for seed in self.seeds:
                    self._add(self.job(name, row, seed), found, ())
        for name in also:
            for seed in self.seeds:
                for row in self.table.rows if "row" in self._step(name).per else [None]:
                    self._add(self.job(name, row, seed), found, ())
        return list(found.values())

    def job(self, name: str, row: Row | None, seed: int | None) -> Job:
        """The job of a step as seen from a row and a seed. `STEP@ROW` is that of another row."""
        name, at, other = name.partition("@")
        step = self._step(name)
        if at:
            row = self.rows([other])[0]
        if ("row" in step.per and row is None) or ("seed" in step.per and seed is None):
            raise UserError(
                f"{self.table.path}: {name} runs per {' and '.join(step.per)}, a step that needs it does not"
            )
        return Job(step, row if "row" in step.per else None, seed if "seed" in step.per else None)

    def left_out(self, job: Job) -> bool:
        """Whether a variable that the step, or one that it needs, cannot do without is empty."""
        if any(not self._text(name, job) for name in job.step.only_with):
            return True
        return any(self.left_out(other) for other in self.needs(job))

    def needs(self, job: Job) -> list[Job]:
        """The jobs that this one mentions or names."""
        found = [self.job(name, job.row, job.seed) for name in job.step.needs]
        texts = [job.step.run, *job.step.makes.values(), *(job.step.resume or {}).values()]
        for text in texts:
            self._expand(text, job, found)
        return [other for other in found if other != job]

    def here(self, job: Job) -> str:
        """The job's folder."""
        return f"{self.out}/{job.name}"

    def command(self, job: Job, run: str | None = None, found: str = "", resolve: bool = True) -> list[str]:
        """The words of the step's command, or of `run`. `resolve`: patterns as the files that they match."""
        words = []
        for word in shlex.split(job.step.run if run is None else run):
            alone = re.fullmatch(r"\{(\w+)\}", word)
            if alone and alone[1] not in BUILT_IN:
                words += self.command(job, self._text(alone[1], job), found, resolve)
            else:
                words.append(self._expand(word, job, resolve=resolve, match=found))
        return words

    def made(self, job: Job, name: str, resolve: bool = True) -> str:
        """The path of what a job makes. UserError where nothing matches its pattern (`resolve`)."""
        if name == "here":
            return self.here(job)
        if name not in job.step.makes:
            raise UserError(f"{self.table.path}: step {job.step.name} does not make {name}")
        declared = job.step.makes[name]
        if not (resolve and glob.has_magic(declared)):
            return self._expand(declared, job)
        newest = self.newest(declared, job)
        if newest is None:
            raise UserError(f"step {job.name} has not made {name}: nothing is {self._expand(declared, job)}")
        return newest

    def newest(self, pattern: str, job: Job) -> str | None:
        """The newest file that matches a pattern with names, below the repository's root or absolute."""
        matches = glob.glob(str(ROOT / self._expand(pattern, job, escape=True)))
        if not matches:
            return None
        path = Path(max(matches, key=lambda match: Path(match).stat().st_mtime))
        return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)

    def _add(self, job: Job, found: dict[str, Job], path: tuple[str, ...]) -> None:
        if job.name in path:
            raise UserError(f"{self.table.path}: step {job.name} needs itself ({' -> '.join(path)})")
        if job.name in found or self.left_out(job):
            return
        for other in self.needs(job):
            self._add(other, found, (*path, job.name))
        found[job.name] = job

    def _step(self, name: str) -> Step:
        if name not in self.table.steps:
            raise UserError(f"{self.table.path} has no step {name}")
        return self.table.steps[name]

    def _expand(self, text, job, found=None, resolve=False, match="", escape=False, depth=0) -> str:
        """`text` with the names in it filled in; jobs that it mentions are added to `found`."""
        if depth > 20:
            raise UserError(f"{self.table.path}: the variables in {text!r} need each other")
        parts = []
        for literal, name, _, _ in Formatter().parse(str(text)):
            parts.append(literal)
            if name is None:
                continue
            head, dot, made = name.rpartition(".")
            if dot:
                other = self.job(head, job.row, job.seed)
                if found is not None:
                    found.append(other)
                value = self.made(other, made, resolve and other != job)
            elif name in BUILT_IN:
                value = self._built_in(name, job, match)
            else:
                value = self._expand(self._text(name, job), job, found, resolve, match, False, depth + 1)
            parts.append(glob.escape(value) if escape else value)
        return "".join(parts)

    def _built_in(self, name: str, job: Job, match: str) -> str:
        if name == "data" and not self.data:
            raise UserValueError(f"step {job.step.name} needs the data: say where it is with --data")
        values = {"here": self.here(job), "out": self.out, "data": self.data, "scale": self.scale}
        values |= {"found": match, "row": job.row and job.row.id, "seed": job.seed}
        if values[name] is None:
            raise UserError(f"{self.table.path}: step {job.step.name} uses {{{name}}} but is not per {name}")
        return str(values[name])

    def _text(self, name: str, job: Job) -> str:
        known = {**self.variables, **(job.row.set if job.row else {}), **self.changes}
        if name not in known:
            raise UserError(f"{self.table.path}: step {job.step.name} uses {{{name}}}, which is not declared")
        return str(known[name])
