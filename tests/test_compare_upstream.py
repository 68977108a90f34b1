"""benchmarks/compare_upstream.py: its table, and with UPSTREAM_GUIDED_DIFFUSION naming a checkout of upstream the whole
at toy size."""

import json
import os
import re
import subprocess
import sys

import pytest

from benchmarks import compare_upstream
from benchmarks.compare_upstream import OURS, UPSTREAM, Loop, paired, report
from tests.conftest import ROOT

ABOUT = dict(
    date="2030-01-02", command="python x.py", machine="M, 2 cores", sizes="8 pixels", method="In turns."
)


def test_ratios_are_of_turns_of_one_round_and_missed_goals_are_named():
    group = [
        Loop("step", UPSTREAM, {}),
        Loop("step", OURS, {}, goal=0.75),
        Loop("step", "heads", {}, beside=OURS, goal=1.03),
        Loop("step", "packed", {}),
    ]
    # The machine slows down tenfold in the last round: the ratios stay.
    times = {
        UPSTREAM: [1.0, 2.0, 20.0],
        OURS: [0.5, 1.0, 10.0],
        "heads": [0.6, 1.2, 12.0],
        "packed": [1.0, 2.0, 20.0],
    }
    rows = paired(group, times)
    assert rows[0].ratio is None
    assert [row.ratio for row in rows[1:]] == pytest.approx([0.5, 1.2, 1], abs=1e-9)
    assert [row.met for row in rows] == [None, True, False, None]
    text = report(ABOUT, rows)
    assert "M, 2 cores" in text and "2030-01-02" in text and "In turns." in text
    assert "| step | upstream | 2000.0 | 1500.0 to 11000.0 |  |  |  |  |  |" in text
    assert (
        "| step | this project | 1000.0 | 750.0 to 5500.0 | 0.50 | 0.50 to 0.50 | upstream | 0.75 | yes |"
        in text
    )
    assert "| 1.20 | 1.20 to 1.20 | this project | 1.03 | **no** |" in text
    assert text.endswith("Goals missed: step, heads (1.20, aimed at 1.03).\n")


def test_every_loop_has_its_reference_in_its_group():
    found = compare_upstream.loops("folder", "packed.npz", 5)
    for group in compare_upstream.groups(found):
        names = [loop.name for loop in group]
        assert names[:2] == [UPSTREAM, OURS] and len(set(names)) == len(names)
        assert all(loop.beside in names for loop in group)
    assert {loop.case["kind"] for loop in found} == {"train", "sample", "load"}


def test_a_folder_that_is_no_checkout_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_upstream", "--upstream", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        compare_upstream.main()
    assert end.value.code == 2 and "there is no guided_diffusion/train_util.py" in capsys.readouterr().err


def test_beside_upstream_itself(tmp_path):
    upstream = os.environ.get("UPSTREAM_GUIDED_DIFFUSION", "")
    if not upstream:
        pytest.skip("UPSTREAM_GUIDED_DIFFUSION names no checkout of upstream")
    sizes = "--image_size 8 --num_channels 32 --batch_size 4 --steps 2 --rounds 1".split()
    command = [
        sys.executable,
        ROOT / "benchmarks/compare_upstream.py",
        "--upstream",
        upstream,
        "--out",
        tmp_path,
    ]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "compare_upstream.json").read_text())
    rows = {(row["group"], row["name"]): row for row in results["rows"]}
    assert all(row["times"][0] > 0 for row in rows.values()) and len(rows) == 15
    assert (
        rows["training step, bf16", OURS]["ratio"] > 0
        and rows["training step, fp32", UPSTREAM]["ratio"] is None
    )
    table = (tmp_path / "compare_upstream.md").read_text()
    assert len(re.findall(r"^\| (?:training|sampling|loading)", table, re.MULTILINE)) == 15
