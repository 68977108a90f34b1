"""experiments/reproduce.py on toy tables: each step once, resumed where it stopped, and the declared table printed."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
# A toy training: counts to {steps} in a file, one line each, and stops at {stop} as if it failed. Told to stop, it saves
# and ends with 0, as trainings do.
TRAIN = """
import json, pathlib, signal, sys, time
here, steps, stop, speed, seed = sys.argv[1:6]
def end(*_):
    pathlib.Path(here, "weights-0.txt").write_text("0.1")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
log = pathlib.Path(here, "log.txt")
done = len(log.read_text().split()) if log.exists() else 0
print(f"training {here} from {done} with {sys.argv[6:]}", flush=True)
for step in range(done, int(steps)):
    time.sleep(float(speed))
    with log.open("a") as file:
        file.write(f"{step}\\n")
    if step == int(stop):
        sys.exit(3)
pathlib.Path(here, "weights-7.txt").write_text(str(0.5 + 0.1 * int(seed)))
"""
SCORE = """
import json, pathlib, sys
value = float(pathlib.Path(sys.argv[1]).read_text())
pathlib.Path(sys.argv[2]).write_text(json.dumps({"scores": {"accuracy": value}, "fid": 9}))
"""
TABLE = {
    "title": "Table 0",
    "notes": ["A note."],
    "columns": {
        "accuracy": {"title": "Accuracy", "format": ".1f", "times": 100},
        "fid": {"title": "FID", "format": ".2f"},
        "empty": {"title": "Nothing"},
    },
    "scales": {"small": {"steps": 4}, "paper": {"steps": 400}},
    "variables": {"stop": -1, "speed": 0, "inception": "", "flags": ""},
    "steps": {
        "train": {
            "per": ["row", "seed"],
            "run": "python {data}/train.py {here} {steps} {stop} {speed} {seed} {flags}",
            "resume": {
                "when": "{here}/log.txt",
                "run": "python {data}/train.py {here} {steps} -1 0 {seed} resumed {found}",
            },
            "makes": {"weights": "{here}/weights-*.txt"},
        },
        "score": {
            "per": ["row", "seed"],
            "run": "python {data}/score.py {train.weights} {here}/scores.json",
            "makes": {"file": "{here}/scores.json"},
        },
        "fid": {
            "per": ["row", "seed"],
            "only_with": ["inception"],
            "run": "cp {score.file} {here}/fid.json",
            "makes": {"file": "{here}/fid.json"},
        },
        "sheet": {"run": "cp {train@A.weights} {here}/sheet.txt", "per": ["seed"]},
    },
    "cells": {
        "accuracy": {"from": "score.file", "key": "scores.accuracy"},
        "fid": {"from": "fid.file", "key": "fid"},
    },
    "rows": [
        {"id": "A", "title": "Row A", "paper": {"accuracy": 88}},
        {"id": "A*", "title": "Row A*", "set": {"flags": "--from {train@A.weights}"}},
    ],
    "also": ["sheet"],
}


@pytest.fixture
def reproduce(tmp_path, run_script):
    """reproduce("--seeds", "0,1", ...): the finished job of the toy table, whose folder has a space in its name."""
    data = tmp_path / "the data"
    data.mkdir()
    (data / "train.py").write_text(TRAIN)
    (data / "score.py").write_text(SCORE)

    def run(*arguments, table=TABLE, run=run_script):
        (tmp_path / "toy.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
        return run("reproduce", tmp_path / "toy.yaml", "--data", data, "--out", tmp_path / "out", *arguments)

    run.out = tmp_path / "out"
    return run


def started(name, *arguments):
    """The job, running in a process of its own."""
    command = [sys.executable, f"experiments/{name}.py", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def until(true):
    for _ in range(600):
        if true():
            return
        time.sleep(0.05)
    pytest.fail("it does not come true")


def begun(reproduce, speed):
    """The flags of a slow run, its process, and the log of its training, which has begun."""
    slow = ("--set", f"speed={speed}", "--set", "steps=8", "--only", "A")
    job = reproduce(*slow, run=started)
    log = reproduce.out / "train-A-seed0/log.txt"
    until(lambda: log.exists() and log.read_text())
    return slow, job, log


def test_the_declared_table_is_printed_and_nothing_runs_twice(reproduce):
    job = reproduce("--seeds", "0,1")
    assert job.returncode == 0, job.stderr
    lines = job.stdout.splitlines()
    assert "**Table 0**" in lines and "A note." in lines
    # 50 and 60: mean 55, standard deviation 7.07. FID was left out, and with it its column.
    assert "|  | Accuracy |" in lines
    assert "| Row A | 55.0 ± 7.1<br>*88.0* |" in lines
    assert "| Row A* | 55.0 ± 7.1<br>*–* |" in lines
    assert (reproduce.out / "table.md").read_text() in job.stdout
    results = json.loads((reproduce.out / "results.json").read_text())
    assert results["rows"]["A"]["accuracy"] == [50.0, 60.0]
    assert set(results["seconds"]) > {"train-A-seed0", "train-A_-seed1", "sheet-seed0"}

    again = reproduce("--seeds", "0,1")
    assert again.returncode == 0 and "training" not in again.stdout
    assert again.stdout[again.stdout.index("**Table") :] == job.stdout[job.stdout.index("**Table") :]
    assert (reproduce.out / "train-A-seed0/log.txt").read_text() == "0\n1\n2\n3\n"


def test_a_failing_command_is_named_and_then_resumed(reproduce):
    job = reproduce("--set", "stop=1")
    assert job.returncode == 2
    assert "step train-A-seed0 failed with exit code 3: python" in job.stderr.splitlines()[-1]
    assert "train.py" in job.stderr and not (reproduce.out / "table.md").exists()
    job = reproduce("--set", "stop=1")
    assert (
        job.returncode == 2 and "train-A_-seed0 failed" in job.stderr
    )  # A went on and ended, then A* stopped
    assert "from 2 with ['resumed'" in job.stdout and "score-A-seed0" in job.stdout
    job = reproduce("--set", "stop=1")
    assert job.returncode == 0 and "train-A-seed0: finished before, skipped" in job.stdout
    assert (reproduce.out / "train-A_-seed0/log.txt").read_text() == "0\n1\n2\n3\n"


def test_killed_in_the_middle_it_takes_its_command_along_and_continues(reproduce):
    slow, job, log = begun(reproduce, 5)
    busy = reproduce(*slow)
    assert busy.returncode == 2 and "is in use by another process" in busy.stderr
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(10) == 128 + signal.SIGTERM
    done = log.read_text().split()
    assert 1 <= len(done) < 8
    record = json.loads((reproduce.out / "steps.json").read_text())["train-A-seed0"]["_values_:"]
    assert not record["finished"] and record["seconds"] > 0.2
    job = reproduce(*slow)  # the lock is free: no command was left behind
    assert job.returncode == 0, job.stderr
    assert f"from {len(done)} with ['resumed'" in job.stdout
    assert log.read_text().split() == [str(k) for k in range(8)]


# Waits for the folder of the other seed to say that it runs too.
MEET = """
import pathlib, sys, time
here, other = sys.argv[1:3]
print(f"{here} waits", flush=True)
pathlib.Path(here, "here.txt").touch()
for _ in range(400):
    if pathlib.Path(other, "here.txt").exists():
        pathlib.Path(here, "met.json").write_text('{"met": 1}')
        break
    time.sleep(0.05)
"""


def test_jobs_run_beside_each_other_and_each_after_what_it_needs(reproduce, tmp_path):
    (tmp_path / "the data/meet.py").write_text(MEET)
    met = {
        "title": "Met",
        "columns": {"met": {"title": "Met", "format": ".0f"}},
        "scales": {"small": {}},
        "steps": {
            "left": {
                "run": "python {data}/meet.py {here} {out}/right",
                "makes": {"file": "{here}/met.json"},
            },
            "right": {
                "run": "python {data}/meet.py {here} {out}/left",
                "makes": {"file": "{here}/met.json"},
            },
            "both": {
                "run": "cp {left.file} {here}/met.json",
                "needs": ["right"],
                "makes": {"file": "{here}/met.json"},
            },
        },
        "rows": [{"id": "A", "title": "A", "cells": {"met": {"from": "both.file", "key": "met"}}}],
    }
    job = reproduce("--jobs", "2", table=met)
    assert job.returncode == 0, job.stderr
    assert "| A | 1 |" in job.stdout
    lines = job.stdout.splitlines()
    ends = [
        next(k for k, line in enumerate(lines) if line.startswith(f"{n}: finished"))
        for n in ("left", "right")
    ]
    assert lines.index("both:") > max(ends)
    # What they print goes to files, where it does not mix.
    assert "waits" not in job.stdout
    assert (reproduce.out / "output/left.txt").read_text() == f"{reproduce.out}/left waits\n"


def test_a_failure_beside_others_lets_them_end_and_names_its_output(reproduce):
    job = reproduce("--jobs", "2", "--seeds", "0,1", "--set", "stop=1")
    assert job.returncode == 2
    assert "failed with exit code 3" in job.stderr and "output/train-A-seed" in job.stderr.replace("'", "")
    assert not (reproduce.out / "table.md").exists()
    assert reproduce("--jobs", "0").returncode == 2


def test_another_command_than_before_is_refused_until_asked_for(reproduce):
    assert reproduce().returncode == 0
    job = reproduce("--set", "steps=5")
    assert job.returncode == 2 and "train-A-seed0 was run before with another command" in job.stderr
    job = reproduce("--set", "steps=5", "--again", "train", "--only", "A")
    assert job.returncode == 0 and "train-A-seed0 from 0" in job.stdout
    assert (reproduce.out / "train-A-seed0/log.txt").read_text() == "0\n1\n2\n3\n4\n"
    # What needs it, in other rows too, is gone.
    assert not (reproduce.out / "train-A_-seed0").exists() and not (reproduce.out / "sheet-seed0").exists()


def test_dry_run_prints_what_a_shell_would_do(reproduce):
    job = reproduce("--dry_run", "--only", "A*", "--set", "inception=w.pth")
    assert job.returncode == 0 and not reproduce.out.exists()
    names = [line[2:] for line in job.stdout.splitlines() if line.startswith("# ")]
    assert names == ["train-A-seed0", "train-A_-seed0", "score-A_-seed0", "fid-A_-seed0"]
    assert f"--from '{reproduce.out}/train-A-seed0/weights-*.txt'" in job.stdout.replace("'\"'\"'", "'")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--scale", "large"), "has the scales small, paper, not large"),
        (("--only", "B"), "--only B: the rows are A, A*"),
        (("--seeds", "0,0"), "--seeds 0,0: give different numbers"),
        (("--set", "stepz=1"), "--set stepz: the variables of"),
        (("--again", "trains"), "--again trains: there is no such step"),
    ],
)
def test_mistakes_on_the_command_line(reproduce, arguments, message):
    job = reproduce(*arguments)
    assert job.returncode == 2 and message in job.stderr and "Traceback" not in job.stderr


def changed(**parts):
    return {**TABLE, **parts}


@pytest.mark.parametrize(
    "table, message",
    [
        (
            changed(steps={"train": {"rum": "python"}}),
            "is not a table as configs/tables/README.md describes it",
        ),
        (changed(cells={"accuracy": {"from": "train.scores", "key": "a"}}), "no step makes train.scores"),
        (changed(rows=[{"id": "A*", "title": ""}, {"id": "A+", "title": ""}]), "two rows have the same id"),
        (changed(variables={}), "uses {stop}, which is not declared"),
        (changed(also=["draw"]), "there is no step draw"),
    ],
)
def test_mistakes_in_a_table(reproduce, table, message):
    job = reproduce(table=table)
    assert job.returncode == 2 and message in job.stderr and "Traceback" not in job.stderr


def test_a_step_that_makes_nothing_is_not_finished(reproduce):
    steps = {**TABLE["steps"], "train": {**TABLE["steps"]["train"], "makes": {"weights": "{here}/other.txt"}}}
    job = reproduce(table=changed(steps=steps))
    assert job.returncode == 2 and "ended without an error but has not made" in job.stderr


def settings_of(reproduce, text):
    """The toy table, whose score names a configuration with a base; and the file of that base."""
    data = reproduce.out.parent / "the data"
    (data / "base.yaml").write_text(text)
    (data / "own.yaml").write_text("base: base.yaml\nrows: 3\n")
    run = TABLE["steps"]["score"]["run"] + " --config={data}/own.yaml"
    return changed(steps={**TABLE["steps"], "score": {**TABLE["steps"]["score"], "run": run}})


def test_a_changed_configuration_is_refused_and_a_changed_comment_is_not(reproduce):
    table = settings_of(reproduce, "width: 1\n")
    assert reproduce(table=table).returncode == 0
    job = reproduce(table=settings_of(reproduce, "# said otherwise\nwidth: 1\n"))
    assert job.returncode == 0 and "score-A-seed0: finished before, skipped" in job.stdout
    job = reproduce(table=settings_of(reproduce, "width: 2\n"))
    assert job.returncode == 2 and "training" not in job.stdout
    assert re.search(
        r"step score-A-seed0 was run before with another .*own.yaml; --again score-A-seed0", job.stderr
    )
    job = reproduce("--again", "score", table=table)
    assert job.returncode == 0 and "score-A_-seed0: finished after" in job.stdout
    assert "train-A-seed0: finished before, skipped" in job.stdout


def test_changed_results_of_a_needed_step_are_refused(reproduce):
    assert reproduce().returncode == 0
    weights = reproduce.out / "train-A-seed0/weights-7.txt"
    text = weights.read_text()
    weights.write_text(text)  # as it was: its time does not matter
    assert reproduce().returncode == 0
    weights.write_text("0.9")
    job = reproduce()
    assert job.returncode == 2 and "score-A-seed0 was run before with another" in job.stderr
    assert "weights-7.txt" in job.stderr
    weights.unlink()
    job = reproduce()
    assert (
        job.returncode == 2 and "train-A-seed0 ended without an error but has not made weights" in job.stderr
    )
    job = reproduce("--again", "train")
    assert job.returncode == 0 and "| Row A | 50.0<br>*88.0* |" in job.stdout


def test_an_interrupted_step_goes_on_only_as_what_it_began_as(reproduce):
    assert reproduce("--set", "stop=1").returncode == 2
    job = reproduce("--set", "stop=1", "--set", "steps=5")
    assert job.returncode == 2 and "train-A-seed0 was run before with another command" in job.stderr
    assert (reproduce.out / "train-A-seed0/log.txt").read_text() == "0\n1\n"


def test_a_run_killed_without_notice_continues(reproduce):
    slow, job, log = begun(reproduce, 0.4)
    job.kill()
    job.wait(10)
    until(
        lambda: "in use" not in reproduce(*slow).stderr
    )  # the command that it left holds the folder until it ends
    job = reproduce(*slow)
    assert job.returncode == 0, job.stderr
    assert log.read_text().split() == [str(k) for k in range(8)]


def test_the_folder_of_a_former_version_is_refused(reproduce):
    (reproduce.out / "state").mkdir(parents=True)
    job = reproduce()
    assert job.returncode == 2 and "is of a former version" in job.stderr and "another --out" in job.stderr


def test_a_table_takes_the_rest_from_its_base(reproduce, tmp_path):
    (tmp_path / "rest.yaml").write_text(yaml.safe_dump(TABLE))
    table = {"base": "rest.yaml", "title": "Table 00", "cells": {"accuracy": "score.file scores.accuracy"}}
    job = reproduce("--only", "A", table=table)
    assert job.returncode == 0, job.stderr
    assert "**Table 00**" in job.stdout and "| Row A | 50.0<br>*88.0* |" in job.stdout


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_every_declared_table_can_be_planned(scale, monkeypatch):
    """Its commands have no names left, and name scripts and configurations that are there."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    tables = importlib.import_module("tables")
    known = {name: {"inception": "i.pb"} for name in ("table2", "table3", "table4", "night2day")}
    known["table3"] |= {"adm": "adm.pt", "classifier": "classifier.pt"}
    for path in sorted((ROOT / "configs/tables").glob("*.yaml")):
        if path.stem == "base" or (path.stem, scale) == ("night2day", "small"):
            continue
        plan = tables.Plan(path.stem, scale, [0], "", "data", known.get(path.stem, {}))
        jobs = plan.jobs(plan.rows, plan.also)
        assert len(jobs) >= 2
        for job in jobs:
            words = job.command(resolve=False)
            assert all(words) and not re.search(r"[{}]", " ".join(words).replace("{m}", "")), words
            files = [
                word for word in words if re.fullmatch(r"(configs|scripts|experiments|evaluations)/\S+", word)
            ]
            assert all((ROOT / file).is_file() for file in files), words
        assert all(row.paper or plan.cells_of(row) for row in plan.rows)
