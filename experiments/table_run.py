"""Carry out a table's jobs (see _tables.py): each once, those that were interrupted again; and print it."""

import contextlib
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tables import ROOT, Job, Plan, Row

from guided_diffusion.errors import UserError, one_line


class Runner:
    """Runs the jobs of a plan. OUT/state/JOB.json says that a job was started or is finished."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.folder = ROOT / plan.out

    def run(self, jobs: Iterable[Job], at_once: int = 1) -> None:
        """Run what is not finished, `at_once` steps beside each other, each after those that it needs.

        Where several run, their output goes to OUT/output/JOB.txt. UserError that names the command which fails;
        those that run beside it are waited for first.
        """
        with self._alone() as lock:
            waiting = []
            for job in jobs:
                state = self._state(job)
                self._compare(job, state)
                if state.get("finished"):
                    print(f"{job.name}: finished before, skipped", flush=True)
                else:
                    waiting.append(job)
            self._run(waiting, at_once, lock)

    def forget(self, names: Iterable[str], jobs: Iterable[Job]) -> None:
        """Delete what the steps of these names, and all of `jobs` that need them, have made."""
        jobs, stale = list(jobs), set()
        for job in jobs:  # each stands after what it needs
            if job.step.name in names or job.name in names or stale & {j.name for j in self.plan.needs(job)}:
                stale.add(job.name)
        if unknown := [n for n in names if all(n not in (job.name, job.step.name) for job in jobs)]:
            raise UserError(f"--again {unknown[0]}: there is no such step")
        with self._alone():
            for name in stale:
                shutil.rmtree(self.folder / name, ignore_errors=True)
                self._file(name).unlink(missing_ok=True)

    def seconds(self, jobs: Iterable[Job]) -> dict[str, float]:
        """How long each finished job ran, all its attempts together."""
        states = {job.name: self._state(job) for job in jobs}
        return {name: state["seconds"] for name, state in states.items() if state.get("finished")}

    def finished(self, job: Job) -> bool:
        """Whether it has been carried out."""
        return bool(self._state(job).get("finished"))

    def _run(self, waiting: list[Job], at_once: int, lock: int) -> None:
        failures = []
        with Commands(lock) as commands:
            while commands.running or (waiting and not failures):
                while waiting and not failures and len(commands.running) < at_once:
                    unfinished = {job.name for job in [*waiting, *(c.job for c in commands.running)]}
                    ready = (j for j in waiting if not unfinished & {n.name for n in self.plan.needs(j)})
                    job = next(ready, None)
                    if job is None:
                        break
                    waiting.remove(job)
                    self._start(job, commands, at_once)
                job, code = commands.wait()
                try:
                    self._end(job, code)
                except UserError as error:
                    failures.append(error)
        if failures:
            raise failures[0]

    def _start(self, job: Job, commands: "Commands", at_once: int) -> None:
        words = self._words(job)
        before = self._state(job).get("seconds", 0.0)
        (ROOT / self.plan.here(job)).mkdir(parents=True, exist_ok=True)
        print(f"\n{job.name}:\n$ {shlex.join(words)}", flush=True)
        output = self.folder / "output" / f"{job.name}.txt" if at_once > 1 else None
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_once))} if output else {}
        if output is not None:
            print(f"  output: {output}", flush=True)

        def note(seconds: float) -> None:
            declared = self.plan.command(job, resolve=False)
            self._write(job, {"command": declared, "finished": False, "seconds": before + seconds})

        commands.start(job, words, note, output, environment | dict(os.environ))

    def _end(self, job: Job, code: int) -> None:
        if code:
            output = self.folder / "output" / f"{job.name}.txt"
            where = f"in {output}" if output.exists() else "above"
            raise UserError(
                f"step {job.name} failed with exit code {code}: {shlex.join(self._words(job))} - mend what it "
                f"says {where} and give the same command again: it continues there"
            )
        for name in job.step.makes:
            if not (ROOT / self.plan.made(job, name)).exists():
                raise UserError(
                    f"step {job.name} ended without an error but has not made {self.plan.made(job, name)}: "
                    f"{shlex.join(self._words(job))}"
                )
        self._write(job, self._state(job) | {"finished": True})
        print(f"{job.name}: finished after {self._state(job)['seconds']:.0f} s", flush=True)

    def _words(self, job: Job) -> list[str]:
        if job.step.resume is not None:
            found = self.plan.newest(job.step.resume["when"], job)
            if found is not None:
                return self.plan.command(job, job.step.resume["run"], found)
        return self.plan.command(job)

    def _compare(self, job: Job, state: dict[str, Any]) -> None:
        if state and state["command"] != self.plan.command(job, resolve=False):
            raise UserError(
                f"step {job.name} was run before by another command ({shlex.join(state['command'])}); "
                f"--again {job.name} runs it anew with all that needs it, another --out keeps both"
            )

    def _file(self, name: str) -> Path:
        return self.folder / "state" / f"{name}.json"

    def _state(self, job: Job) -> dict[str, Any]:
        file = self._file(job.name)
        return json.loads(file.read_text()) if file.exists() else {}

    def _write(self, job: Job, state: dict[str, Any]) -> None:
        write_whole(self._file(job.name), json.dumps(state, indent=1) + "\n")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[int]:
        """Hold the folder's lock. The commands inherit it: one that outlives this process still holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self.plan.out} is in use by another process (or by a command that it left running)"
                ) from None
            yield file.fileno()


@dataclass(frozen=True)
class Command:
    """A command that runs for a job; `note` is told how long it has run, at its start and at its end."""

    job: Job
    process: subprocess.Popen
    note: Callable[[float], None]
    started: float

    def ended(self) -> None:
        """To be called once it has."""
        self.note(time.monotonic() - self.started)


class Commands:
    """Commands that run beside each other, in the root of the repository.

    Where this process is told to stop (SIGTERM, Ctrl-C) the commands are told so once, and may take their time to
    save: in sessions of their own they do not hear the terminal's or the scheduler's signal as well, which would end
    them at once. At a second signal they are killed.
    """

    def __init__(self, lock: int):
        self.lock = lock
        self.running: list[Command] = []

    def __enter__(self) -> "Commands":
        self._former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        return self

    def start(
        self,
        job: Job,
        words: list[str],
        note: Callable[[float], None],
        output: Path | None,
        environment: Mapping[str, str],
    ) -> None:
        """Start a command; output: a file for what it prints, None for this process's own output."""
        note(0.0)
        words = [sys.executable if word == "python" else word for word in words]
        with contextlib.ExitStack() as stack:
            to = None
            if output is not None:
                output.parent.mkdir(parents=True, exist_ok=True)
                to = stack.enter_context(open(output, "a"))
            try:
                process = subprocess.Popen(
                    words,
                    cwd=ROOT,
                    env=environment,
                    stdout=to,
                    stderr=None if to is None else subprocess.STDOUT,
                    pass_fds=(self.lock,),
                    start_new_session=True,
                )
            except OSError as error:
                raise UserError(f"{shlex.join(words)} cannot be started: {error.strerror}") from error
        self.running.append(Command(job, process, note, time.monotonic()))

    def wait(self) -> tuple[Job, int]:
        """The next command that ends, and its exit code."""
        while True:
            for command in self.running:
                if command.process.poll() is not None:
                    self.running.remove(command)
                    command.ended()
                    return command.job, command.process.returncode
            time.sleep(0.1)

    def __exit__(self, *_) -> None:
        for command in self.running:
            command.process.terminate()
        try:
            for command in self.running:
                command.process.wait()
        except BaseException:
            for command in self.running:
                command.process.kill()
            raise
        finally:
            for command in self.running:
                command.ended()
            signal.signal(signal.SIGTERM, self._former)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def numbers(plan: Plan, runner: Runner, row: Row) -> dict[str, list[float]]:
    """The measured numbers of a row by column, one for each seed; none where the step is left out."""
    found: dict[str, list[float]] = {}
    for column, cell in plan.table.cells_of(row).items():
        step, _, made = cell["from"].partition(".")
        jobs = {job.name: job for job in (plan.job(step, row, seed) for seed in plan.seeds)}.values()
        files = [plan.made(job, made) for job in jobs if not plan.left_out(job) and runner.finished(job)]
        times = plan.table.columns[column].get("times", 1)
        values = [_number(ROOT / file, cell["key"]) for file in files]
        found[column] = [times * value for value in values if value is not None]
    return found


def _number(path: Path, key: str) -> float | None:
    try:
        value = json.loads(path.read_text())
        for part in str(key).split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path} has no number {key}: {type(error).__name__} {one_line(error)}") from error
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise UserError(f"{key} of {path} is no number but {value!r}")
    return value


def markdown(plan: Plan, measured: dict[str, dict[str, list[float]]], rows: Iterable[Row]) -> str:
    """The table; below each of our numbers (mean, and standard deviation over the seeds) the paper's, where it
    has any for the table.

    Rows and columns without any number are left out.
    """
    rows = [row for row in rows if row.paper or any(measured[row.id].values())]
    columns = {
        name: column
        for name, column in plan.table.columns.items()
        if any(name in row.paper or measured[row.id].get(name) for row in rows)
    }
    titles = ["", *(column.get("title", name) for name, column in columns.items())]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    compared = any(row.paper for row in rows)
    for row in rows:
        cells = [
            _cell(measured[row.id].get(name, []), row.paper.get(name), column.get("format", ".3f"), compared)
            for name, column in columns.items()
        ]
        lines.append("| " + " | ".join([row.title, *cells]) + " |")
    several = len(plan.seeds) > 1
    seeds = (
        f"seeds {', '.join(map(str, plan.seeds))}, mean ± standard deviation"
        if several
        else f"seed {plan.seeds[0]}"
    )
    measurement = f"measured ({plan.scale} scale, {seeds})"
    if compared:
        about = f"Upper numbers: {measurement}; in italics below: the paper's. A dash: not measured, or not known."
    else:
        about = f"All {measurement}. A dash: not measured."
    return "\n".join([f"**{plan.table.title}**", "", *lines, "", about, *plan.table.notes]) + "\n"


def _cell(values: list[float], paper: Any, form: str, compared: bool) -> str:
    mean = format(statistics.fmean(values), form) if values else "–"
    if len(values) > 1 and not math.isnan(deviation := statistics.stdev(values)):
        mean += f" ± {deviation:{form}}"
    if not compared:
        return mean
    theirs = "–" if paper is None else format(paper, form) if isinstance(paper, int | float) else str(paper)
    return f"{mean}<br>*{theirs}*"
