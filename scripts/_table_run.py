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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from _tables import ROOT, Job, Plan, Row

from guided_diffusion.errors import UserError, one_line


class Runner:
    """Runs the jobs of a plan. OUT/state/JOB.json says that a job was started or is finished."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.folder = ROOT / plan.out

    def run(self, jobs: Iterable[Job]) -> None:
        """Run what is not finished. UserError that names the command which fails."""
        with self._alone() as lock:
            for job in jobs:
                state = self._state(job)
                self._compare(job, state)
                if state.get("finished"):
                    print(f"{job.name}: finished before, skipped", flush=True)
                else:
                    self._run(job, state, lock)

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

    def _run(self, job: Job, state: dict[str, Any], lock: int) -> None:
        words = self._words(job)
        declared = self.plan.command(job, resolve=False)
        before = state.get("seconds", 0.0)
        self._write(job, {"command": declared, "finished": False, "seconds": before})
        (ROOT / self.plan.here(job)).mkdir(parents=True, exist_ok=True)
        print(f"\n{job.name}:\n$ {shlex.join(words)}", flush=True)
        started = time.monotonic()
        try:
            code = execute(words, lock)
        finally:
            seconds = before + time.monotonic() - started
            self._write(job, {"command": declared, "finished": False, "seconds": seconds})
        if code:
            raise UserError(
                f"step {job.name} failed with exit code {code}: {shlex.join(words)} - mend what it says "
                "above and give the same command again: it continues there"
            )
        for name in job.step.makes:
            if not (ROOT / self.plan.made(job, name)).exists():
                raise UserError(
                    f"step {job.name} ended without an error but has not made {self.plan.made(job, name)}: "
                    f"{shlex.join(words)}"
                )
        self._write(job, {"command": declared, "finished": True, "seconds": seconds})

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


def execute(words: list[str], lock: int) -> int:
    """Run a command in the root of the repository; its exit code.

    Where this process is told to stop (SIGTERM, Ctrl-C) the command is told so once, and may take its time to save:
    in a session of its own it does not hear the terminal's or the scheduler's signal as well, which would end it at
    once. At a second signal it is killed.
    """
    words = [sys.executable if word == "python" else word for word in words]
    try:
        process = subprocess.Popen(words, cwd=ROOT, pass_fds=(lock,), start_new_session=True)
    except OSError as error:
        raise UserError(f"{shlex.join(words)} cannot be started: {error.strerror}") from error
    former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        try:
            process.wait()
        except BaseException:
            process.kill()
            raise
        raise
    finally:
        signal.signal(signal.SIGTERM, former)


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
    """The table; below each of our numbers (mean, and standard deviation over the seeds) the paper's.

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
    for row in rows:
        cells = [
            _cell(measured[row.id].get(name, []), row.paper.get(name), column.get("format", ".3f"))
            for name, column in columns.items()
        ]
        lines.append("| " + " | ".join([row.title, *cells]) + " |")
    several = len(plan.seeds) > 1
    seeds = (
        f"seeds {', '.join(map(str, plan.seeds))}, mean ± standard deviation"
        if several
        else f"seed {plan.seeds[0]}"
    )
    about = f"Upper numbers: measured ({plan.scale} scale, {seeds}); in italics below: the paper's. "
    about += "A dash: not measured, or not known."
    return "\n".join([f"**{plan.table.title}**", "", *lines, "", about, *plan.table.notes]) + "\n"


def _cell(values: list[float], paper: Any, form: str) -> str:
    mean = format(statistics.fmean(values), form) if values else "–"
    if len(values) > 1 and not math.isnan(deviation := statistics.stdev(values)):
        mean += f" ± {deviation:{form}}"
    theirs = "–" if paper is None else format(paper, form) if isinstance(paper, int | float) else str(paper)
    return f"{mean}<br>*{theirs}*"
