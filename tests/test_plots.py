"""Curves, Figure 6 and the accuracy of labels by timestep."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.figures import Curve, line_plot, round_ticks
from tests.mt_driver import digits, in_process, refusal, train

BLUE, ORANGE = (0, 114, 178), (213, 94, 0)


def of_colour(image, colour, box=None):
    """(x, y) of the pixels of a colour, inside a box."""
    pixels = np.asarray(image)
    y, x = (pixels == colour).all(axis=-1).nonzero()
    if box:
        left, top, right, bottom = box
        inside = (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
        x, y = x[inside], y[inside]
    return x, y


def test_curves_pass_through_their_points():
    x, y = [0, 250, 1000], [10.0, 80.0, 40.0]
    image, axes = line_plot([Curve("a", x, y)], "t", "%")
    assert axes.x_range == (0, 1000) and axes.y_range == (0, 80)
    left, top, right, bottom = axes.box
    assert axes.pixel(0, 0) == (left, bottom) and axes.pixel(1000, 80) == (right, top)
    for px, py in (axes.pixel(a, b) for a, b in zip(x, y, strict=True)):
        assert image.getpixel((round(px), round(py))) == BLUE
    # Half-way along the first line, and nothing far from the curve.
    px, py = axes.pixel(125, 45)
    assert BLUE in {
        image.getpixel((round(px) + dx, round(py) + dy)) for dx in (-1, 0, 1) for dy in (-1, 0, 1)
    }
    xs, ys = of_colour(image, BLUE, axes.box)
    values = 80 * (bottom - ys) / (bottom - top)
    expected = np.interp((xs - left) / (right - left) * 1000, x, y)
    steep = np.abs((xs - left) / (right - left) * 1000 - 250) < 30
    assert np.abs(values - expected)[~steep].max() < 5


def test_curves_are_told_apart():
    """By colour, and by dashes: a dashed line has gaps."""
    solid, axes = line_plot([Curve("a", [0, 1], [1, 1]), Curve("b", [0, 1], [2, 2])], "x", "y")
    dashed, _ = line_plot([Curve("a", [0, 1], [1, 1]), Curve("b", [0, 1], [2, 2], dashed=True)], "x", "y")
    assert len(of_colour(solid, BLUE, axes.box)[0]) and len(of_colour(solid, ORANGE, axes.box)[0])
    whole, gaps = (len(set(of_colour(p, ORANGE, axes.box)[0].tolist())) for p in (solid, dashed))
    assert 0.4 < gaps / whole < 0.75
    # The legend, below the axes, has both colours.
    below = (0, axes.box[3] + 20, solid.width, solid.height)
    assert len(of_colour(solid, BLUE, below)[0]) and len(of_colour(solid, ORANGE, below)[0])


def test_ticks_and_labels_are_written():
    image, axes = line_plot([Curve("a", [0, 900], [0, 9])], "iterations", "accuracy", "a title")
    ink = np.asarray(image.convert("L")) < 128
    left, top, right, bottom = axes.box
    for tick in (0, 200, 400, 600, 800, 1000):
        px = round(axes.pixel(tick, 0)[0])
        assert ink[bottom + 4 : bottom + 16, px - 8 : px + 9].any(), tick
    for tick in (0, 2, 4, 6, 8, 10):
        py = round(axes.pixel(0, tick)[1])
        assert ink[py - 6 : py + 7, left - 20 : left - 3].any(), tick
    assert ink[:top, left:right].any()  # the title
    assert ink[(top + bottom) // 2 - 40 : (top + bottom) // 2 + 40, 4:22].any()  # the upright label
    assert ink[bottom + 18 : bottom + 36, (left + right) // 2 - 30 : (left + right) // 2 + 30].any()


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1000, [0, 200, 400, 600, 800, 1000]),
        (0, 0.93, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3, 4, [-4, -2, 0, 2, 4]),
        (7, 7, [6.4, 6.6, 6.8, 7.0, 7.2, 7.4, 7.6]),
    ],
)
def test_ticks_are_round_and_enclose_the_data(low, high, ticks):
    made = round_ticks(low, high)
    assert made[0] <= low and made[-1] >= high and 3 <= len(made) <= 9
    if low != high:
        assert made == pytest.approx(ticks)


def test_missing_points_are_left_out_and_nothing_is_refused():
    with_gap, _ = line_plot([Curve("a", [0, 1, 2], [1, float("nan"), 1])], "x", "y")
    without, _ = line_plot([Curve("a", [0, 2], [1, 1])], "x", "y")
    assert (np.asarray(with_gap) == np.asarray(without)).all()
    with pytest.raises(ValueError, match="at least one finite point"):
        line_plot([Curve("a", [0], [float("nan")])], "x", "y")


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
        # Accuracies in percent on an axis from 0 to 100: E begins at 20.
        _, axes = line_plot([Curve("a", [0, 100], [10, 90])], "iterations", "accuracy in %", "t")
        assert len(of_colour(image, BLUE)[0]) > 50 and len(of_colour(image, ORANGE)[0]) > 50
        ends = [np.sort(of_colour(image, colour, axes.box)[1]).mean() for colour in (BLUE, ORANGE)]
        assert ends[0] < ends[1]  # the higher curve stands higher
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
        assert len(of_colour(image, BLUE)[0]) > 20
    train(data, tmp_path / "bare", "--iterations", 1, "--modalities", "")
    unlabelled = digits(tmp_path / "unlabelled.npz", 20, unlabelled=20)
    for more, message in (
        (("--model_path", tmp_path / "bare"), "predicts no label"),
        (("--times", "0,40"), "time 40 is outside 0..39"),
        (("--data_dir", unlabelled), "no label"),
    ):
        assert message in refusal(capsys, "label_accuracy", *flags, *more)
