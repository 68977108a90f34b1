"""Curves, Figure 6 and the accuracy of labels by timestep."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.errors import UserValueError
from guided_diffusion.figures import Curve, Plot, draw_plots, save_plots
from tests.mt_driver import digits, in_process, refusal, train

BLUE, ORANGE = (0, 114, 178), (213, 94, 0)


def of_colour(image, colour):
    """The number of pixels of about a colour."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    return int((np.abs(pixels - colour).max(axis=-1) < 12).sum())


def lines_of(plot):
    (axes,) = draw_plots([plot]).axes
    return axes, {line.get_label(): line for line in axes.lines}


def test_curves_pass_through_their_points():
    axes, lines = lines_of(Plot([Curve("a", [0, 250, 1000], [10.0, 80.0, 40.0])], "t", "%", "a title"))
    assert lines["a"].get_xydata().tolist() == [[0, 10], [250, 80], [1000, 40]]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("t", "%", "a title")
    assert axes.get_ylim()[0] == 0 and [text.get_text() for text in axes.get_legend().get_texts()] == ["a"]


def test_coincident_curves_all_show(tmp_path):
    same = [Curve(name, [0, 1, 2], [1, 2, 1]) for name in ("a", "b")]
    save_plots([Plot(same, "x", "y")], tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        # Beyond the legend's short line, each has its share of the common line.
        assert of_colour(image, BLUE) > 400 and of_colour(image, ORANGE) > 400
    assert (tmp_path / "plot.pdf").read_bytes().startswith(b"%PDF")


def test_dashes_and_chance_are_drawn():
    _, lines = lines_of(Plot([Curve("a", [0, 1], [1, 1], dashed=True)], "x", "y", chance=0.25))
    assert lines["a"].get_linestyle() == "--" and lines["chance, 0.25"].get_ydata()[0] == 0.25


def test_missing_points_leave_a_gap_and_nothing_is_refused(tmp_path):
    _, lines = lines_of(Plot([Curve("a", [0, 1, 2], [1, float("nan"), 1])], "x", "y"))
    assert np.isnan(lines["a"].get_ydata()[1])
    with pytest.raises(ValueError, match="at least one finite point"):
        lines_of(Plot([Curve("a", [0], [float("nan")])], "x", "y"))
    with pytest.raises(UserValueError, match=r"name it \.png"):
        save_plots([Plot([Curve("a", [0], [1])], "x", "y")], tmp_path / "plot.jpg")


def log_folder(path, points):
    path.mkdir()
    with open(path / "progress.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "train_acc@1", "val_acc@1", "val_acc@5"])
        for step, top1, top5 in points:
            writer.writerow([step, 0.5, top1, top5])
    return path


def test_figure_6(tmp_path, capsys):
    e = log_folder(tmp_path / "e", [(0, 0.2, 0.6), (50, "", ""), (100, 0.4, 0.9)])
    plain = log_folder(tmp_path / "plain", [(0, 0.1, 0.5), (100, 0.3, 0.7)])
    out = tmp_path / "figure6.png"
    in_process("figure6", "--runs", f"E={e}", f"plain={plain}", "--out", out)
    rows = [row for row in csv.reader(open(tmp_path / "figure6.csv"))]
    assert rows == [
        ["run", "iteration", "top1", "top5"],
        ["E", "0", "0.2", "0.6"],
        ["E", "100", "0.4", "0.9"],
        ["plain", "0", "0.1", "0.5"],
        ["plain", "100", "0.3", "0.7"],
    ]
    assert "E: top-1 40.00%, top-5 90.00% after 100 iterations" in capsys.readouterr().out
    with Image.open(out) as image:
        assert of_colour(image, BLUE) > 50 and of_colour(image, ORANGE) > 50
    assert out.with_suffix(".pdf").exists()
    for runs, message in (
        (["E"], "expected NAME=FOLDER"),
        ([f"E={tmp_path / 'absent'}"], "no progress.csv in"),
        ([f"E={log_folder(tmp_path / 'empty', [])}"], "train with --val_data_dir"),
    ):
        assert message in refusal(capsys, "figure6", "--runs", *runs, "--out", out)


def test_label_accuracy(tmp_path, capsys):
    """Numbers for every time and the average; a model that knows nothing is right about as often as chance."""
    data = digits(tmp_path / "digits.npz", 100)
    train(data, tmp_path / "run", "--iterations", 1, "--modalities", "label:U")
    out = tmp_path / "plot.png"
    flags = (
        "--model_path",
        tmp_path / "run",
        "--data_dir",
        data,
        "--out",
        out,
        "--times",
        "0,20,39",
        "--average",
        "0,5",
    )
    in_process("label_accuracy", *flags, "--num_samples", 60)
    assert "right (60)" in capsys.readouterr().out
    rows = list(csv.DictReader(open(tmp_path / "plot.csv")))
    assert [int(row["t"]) for row in rows] == [0, 20, 39]
    summary = json.loads((tmp_path / "plot.json").read_text())
    assert summary["images"] == 60 and summary["times"] == [0, 5] and 0 <= summary["accuracy"] < 0.35
    assert summary["by_time"]["model"]["20"] == float(rows[1]["model"])
    with Image.open(out) as image:
        assert of_colour(image, BLUE) > 20
    train(data, tmp_path / "bare", "--iterations", 1, "--modalities", "")
    unlabelled = digits(tmp_path / "unlabelled.npz", 20, unlabelled=20)
    for more, message in (
        (("--model_path", tmp_path / "bare"), "predicts no label"),
        (("--times", "0,40"), "time 40 is outside 0..39"),
        (("--data_dir", unlabelled), "no label"),
    ):
        assert message in refusal(capsys, "label_accuracy", *flags, *more)


def restoration(path, *values):
    path.write_text(
        json.dumps({"cells": [{"method": "any", "masks": 5, "lpips": v, "error": 0.01} for v in values]})
    )
    return path


def test_restoration_against_steps(run_script, tmp_path):
    tables = [
        f"{name}={restoration(tmp_path / f'{name}.json', 0.3, 0.2, 0.1)}" for name in ("joint", "alone")
    ]
    out = tmp_path / "curve.png"
    assert run_script("steps_curve", "--tables", *tables, "--steps", 10, 20, "--out", out).returncode == 0
    assert out.exists() and out.with_suffix(".pdf").exists()
    refused = run_script("steps_curve", "--tables", *tables, "--steps", 10, "--out", out)
    assert refused.returncode == 2 and "has 2 methods, --steps 1 numbers" in refused.stderr
