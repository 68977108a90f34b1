"""Reproduce a table of the paper: train what is missing, sample, evaluate, and print it in Markdown.

    python experiments/reproduce.py table4 --scale small --data camvid
    python experiments/reproduce.py table4 --scale small --data camvid --dry_run      # the commands, to run by hand
    python experiments/reproduce.py table4 --scale paper --data cityscapes --seeds 0,1,2 --only joint
    python experiments/reproduce.py table2 --scale small --data cifar10 --jobs 2      # two steps beside each other

Stopped at any point, the same command continues. A step that was run by another command, or read other files than it
would now, is refused until --again asks for it. configs/tables/NAME.yaml declares the steps (README.md there), doit
(pydoit.org) orders and runs them. Results: OUT/table.md, OUT/results.json, and a folder for every step.
"""

from guided_diffusion import flags
from guided_diffusion.errors import UserError, UserValueError, exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script."""
    own, many = flags.Parser(__doc__), dict(action="append", default=[])
    data, results, machine = (dict(group=name) for name in ("data", "results", "machine"))
    own.add("table", help="a name in configs/tables, or a .yaml file")
    own.add("--scale", default="small", help="small: for one machine; paper: its sizes and lengths", **data)
    own.add("--data", default="", help="the folder (or file) with the data", **data)
    own.add("--out", default="", unset="runs/TABLE-SCALE")
    own.add("--only", default="", metavar="ROW,...", unset="all", help="ids of the rows to make", **results)
    told = "runs of every row, printed with mean and deviation"
    own.add("--seeds", default="0", metavar="S,...", help=told, **results)
    own.add("--set", metavar="NAME=VALUE", help="change a variable of the table", **many, **data)
    own.add("--again", metavar="STEP", help="run a step and all that needs it anew", **many, **results)
    told = "write the table there too, with times and machine"
    own.add("--write", default="", metavar="FILE", help=told, **results)
    told = "steps that run at once, sharing the cores"
    own.add("--jobs", default=1, low=1, high=1024, help=told, **machine)
    own.add("--dry_run", action="store_true", help="only print the commands", **results)
    return own


if __name__ == "__main__":
    flags.answer_early(parser)  # before the slow imports


import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from doit.control import TaskControl
from doit.dependency import Dependency, JsonDB
from doit.exceptions import TaskFailed
from doit.reporter import ZeroReporter
from doit.runner import MThreadRunner
from doit.task import dict_to_task
from omegaconf import OmegaConf
from tables import ROOT, Job, Plan, relative

from guided_diffusion.config_file import load_with_bases


@exit_on_user_error()
def main():
    args = parser().parse_args()
    if wrong := [pair for pair in args.set if "=" not in pair]:
        raise UserValueError(f"--set {wrong[0]}: give NAME=VALUE")
    seeds = args.seeds.split(",")
    if len(set(seeds)) < len(seeds) or not all(seed.isdecimal() for seed in seeds):
        raise UserValueError(f"--seeds {args.seeds}: give different numbers from 0 up, such as 0,1,2")
    changes = dict(pair.split("=", 1) for pair in args.set)
    out, data = (str(relative(path)) if path else "" for path in (args.out, args.data))
    plan = Plan(args.table, args.scale, map(int, seeds), out, data, changes)
    only = [part for part in args.only.split(",") if part]
    rows = plan.choose(only)
    jobs = plan.jobs(rows, () if only else plan.also)
    if args.dry_run:
        for job in jobs:
            print(f"# {job.name}\n{shlex.join(job.command(resolve=False))}")
        return
    folder = ROOT / plan.out
    with alone(folder) as lock:
        state = State(plan)
        forget(plan, state, args.again)
        run(plan, state, jobs, args.jobs, lock)
    measured = {row.id: plan.numbers(row) for row in rows}
    text = plan.markdown(measured, rows)
    seconds = {job.name: state.get_value(job.name, "seconds") for job in jobs}
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    results = {
        "rows": measured,
        "seconds": seconds,
        "scale": args.scale,
        "seeds": plan.seeds,
        "machine": machine,
    }
    write_whole(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_whole(folder / "table.md", text)
    if args.write:
        times = seconds | {"all": sum(seconds.values())}
        lines = [f"| {name} | {taken:.0f} |" for name, taken in times.items()]
        account = [text, f"Machine: {machine}.", "", "| step | seconds |", "|---|---|", *lines]
        write_whole(Path(args.write), "\n".join(account) + "\n")
    print(f"\n{text}\nWritten to {plan.out}: table.md, results.json", flush=True)


def run(plan: Plan, state: "State", jobs: list[Job], at_once: int, lock: int) -> None:
    """Run what is not finished, `at_once` steps beside each other; then their output goes to OUT/output/JOB.txt.

    UserError that names the command which fails; those that run beside it are waited for first.
    """
    commands, reporter = Commands(plan, at_once, lock), Reporter(sys.stdout, {})
    common = {"uptodate": [lambda task, values: values["finished"]], "verbosity": 0, "io": {"capture": False}}
    tasks = [
        dict_to_task(
            {"name": job.name, "actions": [(commands.run, [job])], "meta": {"job": job}, **common}
            | {"task_dep": [other.name for other in job.needs()]}
        )
        for job in jobs
    ]
    control = TaskControl(tasks)
    control.process(None)
    for task in tasks:  # all of them before any runs
        if state.get_values(task.name):
            state.get_status(task, control.tasks)
    handlers = {n: signal.signal(n, lambda n, _: sys.exit(128 + n)) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        MThreadRunner(state, reporter, num_process=at_once).run_all(control.task_dispatcher())
    finally:
        commands.stop()  # there are some where this process is told to stop (by signal, or Ctrl-C)
        for task in tasks:
            if task.values and not task.values["finished"]:
                state.remove_success(task)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if reporter.failed:
        raise UserError(reporter.failed[0])


class Reporter(ZeroReporter):
    """Says which steps are finished, and keeps what went wrong."""

    def __init__(self, outstream, options):
        super().__init__(outstream, options)
        self.failed = []

    def skip_uptodate(self, task):
        print(f"{task.name}: finished before, skipped", flush=True)

    def add_success(self, task):
        print(f"{task.name}: finished after {task.values['seconds']:.0f} s", flush=True)

    def add_failure(self, task, fail):
        self.failed.append(fail.message)


class Records(JsonDB):
    """doit's file of records, written whole, so that a killed run leaves no half of it."""

    def dump(self):
        write_whole(Path(self.name), self.codec.encode(self._db))


class State(Dependency):
    """Which steps are up to date: doit's records (OUT/steps.json), on disk at every change.

    Steps that began have one too, so that they go on only as what they began as; where doit would run a step again
    whose command or files have changed, it is refused: what it made may have taken days.
    """

    def __init__(self, plan: Plan):
        if (ROOT / plan.out / "state").exists():
            raise UserError(f"{plan.out} is of a former version, which cannot go on: give another --out")
        super().__init__(Records, str(ROOT / plan.out / "steps.json"))
        self.plan = plan

    def get_status(self, task, tasks_dict, get_log=False):
        job, before = task.meta["job"], self.get_values(task.name)
        reads, task.file_dep = read_by(job)
        task.values = {"finished": False, "seconds": 0.0, **before, "reads": reads}
        self._set(task.name, "_values_:", task.values)
        status = super().get_status(task, tasks_dict, get_log=True)
        if before:
            known = before["reads"]
            other = [name for name in {**reads, **known} if reads.get(name) != known.get(name)]
            for reason in ("changed_file_dep", "added_file_dep", "removed_file_dep"):
                other += [relative(file) for file in status.reasons.get(reason) or []]
            if other:
                another = "another " + (
                    f"command ({known['command']})" if other[0] == "command" else str(other[0])
                )
                raise UserError(
                    f"step {task.name} was run before with {another}; --again {task.name} runs it anew with all that "
                    "needs it, another --out keeps both"
                )
        if before.get("finished"):
            made_by(job)
        else:
            self.save_success(task)
        return status

    def save_success(self, task, result_hash=None):
        super().save_success(task, result_hash)
        self.backend.dump()

    def remove_success(self, task):
        """Of a step that stopped: how long it ran."""
        self._set(task.name, "_values_:", task.values)
        self.backend.dump()


def made_by(job: Job) -> list[Path]:
    """The files that a finished job has made. UserError for those that are not there."""
    made = [ROOT / job.made(name) for name in job.step.makes or ["here"]]
    found = (file for path in made for file in (path.rglob("*") if path.is_dir() else [path]))
    return [file for file in found if file.is_file()]


def read_by(job: Job) -> tuple[dict[str, str], set[str]]:
    """What a job's result depends on: its command and the content of configurations that it names, as texts by name, and
    files: others that it names, and those made by the jobs that it needs."""
    words = job.command(resolve=False)
    texts, files = {"command": shlex.join(words)}, set()
    for path in {ROOT / part for word in words for part in (word, word.rpartition("=")[2]) if part}:
        if path.suffix in (".yaml", ".yml") and path.is_file():
            content = json.dumps(OmegaConf.to_container(load_with_bases(path)), sort_keys=True)
            texts[str(relative(path))] = hashlib.sha256(content.encode()).hexdigest()
        elif path.suffix != ".py" and path.is_file() and not path.is_relative_to(ROOT / job.plan.out):
            files.add(str(path))
    for other in job.needs():
        with contextlib.suppress(UserError):  # not made yet, or gone, which is told of that job
            files |= {str(path) for path in made_by(other)}
    return texts, files


def forget(plan: Plan, state: State, names: list[str]) -> None:
    """Delete what the steps of these names, and all that need them in any row, have made."""
    jobs = plan.jobs(plan.rows, plan.also) if names else []
    if unknown := [name for name in names if all(name not in (job.name, job.step.name) for job in jobs)]:
        raise UserError(f"--again {unknown[0]}: there is no such step")
    stale = set()
    for job in jobs:  # each stands after what it needs
        if {job.step.name, job.name} & set(names) or stale & {other.name for other in job.needs()}:
            stale.add(job.name)
            state.remove(job.name)
            shutil.rmtree(ROOT / job.here, ignore_errors=True)
    state.backend.dump()


class Commands:
    """The commands of jobs, run in the root of the repository.

    In sessions of their own they do not hear the terminal's or the scheduler's signal, which would end them at once. They
    inherit the lock: one that outlives this process still holds it.
    """

    def __init__(self, plan: Plan, at_once: int, lock: int):
        self.plan, self.at_once, self.lock = plan, at_once, lock
        self.running, self.stopped = set(), False

    def run(self, job: Job, task) -> TaskFailed | None:
        """For doit: what went wrong, if anything."""
        started, before = time.monotonic(), task.values["seconds"]
        try:
            words = job.command()
            with self._started(job, words) as process:
                code = process.wait()
                task.values["seconds"] = before + time.monotonic() - started
            if self.stopped:
                # One that has saved may well end with 0.
                return TaskFailed(f"step {job.name} was told to stop")
            if code:
                said = f"in {self._output(job)}" if self.at_once > 1 else "above"
                raise UserError(
                    f"step {job.name} failed with exit code {code}: {shlex.join(words)} - mend what it says {said} and "
                    "give the same command again: it continues there"
                )
            made_by(job)
        except UserError as error:
            return TaskFailed(str(error))
        task.values["finished"] = True

    def _output(self, job):
        return ROOT / self.plan.out / "output" / f"{job.name}.txt"

    @contextlib.contextmanager
    def _started(self, job, words):
        options, text = {}, f"\n{job.name}:\n$ {shlex.join(words)}\n"
        (ROOT / job.here).mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if self.at_once > 1:
                self._output(job).parent.mkdir(exist_ok=True)
                file = stack.enter_context(open(self._output(job), "a"))
                threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.at_once))}
                options = {"stdout": file, "stderr": subprocess.STDOUT, "env": threads | dict(os.environ)}
                text += f"  output: {file.name}\n"
            if self.stopped:
                raise UserError("told to stop")
            print(text, end="", flush=True)
            words = [sys.executable if word == "python" else word for word in words]
            options |= {"cwd": ROOT, "pass_fds": (self.lock,), "start_new_session": True}
            try:
                process = subprocess.Popen(words, **options)
            except OSError as error:
                raise UserError(f"{shlex.join(words)} cannot be started: {error.strerror}") from error
        self.running.add(process)
        yield process
        self.running.remove(process)

    def stop(self) -> None:
        """Tell those that run, once, and wait: they may take their time to save."""
        self.stopped = True
        for process in list(self.running):
            process.terminate()
        while self.running:
            time.sleep(0.05)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[int]:
    """Hold a folder's lock; the number of its open file. UserError where another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            told = "in use by another process (or by a command that it left running)"
            raise UserError(f"{folder} is {told}") from None
        yield file.fileno()


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


if __name__ == "__main__":
    main()
