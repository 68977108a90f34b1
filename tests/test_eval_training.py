"""What training tells while it goes: evaluations on held-out images, speed, memory, Weights & Biases."""

import csv
import sys
import types

import numpy as np
import pytest
import torch as th

from guided_diffusion import logger
from guided_diffusion.errors import UserError
from guided_diffusion.pace import Pace
from guided_diffusion.train_util import _told_of_memory
from tests.mt_driver import digits, refusal, train


def rows(folder):
    with open(folder / "progress.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return digits(tmp_path_factory.mktemp("data") / "digits.npz")


def test_held_out_losses_labels_and_a_judge(data, tmp_path, monkeypatch, capsys):
    """Every N steps: the loss is the sum of its parts, quarters average to the whole, the judge scores samples."""
    from evaluations.judge import Judge, save_judge

    th.manual_seed(0)
    save_judge(Judge(10, None), 0.5, tmp_path / "judge.pt")
    monkeypatch.setattr("tests.mt_driver.ENVIRONMENT", {"OPENAI_LOG_FORMAT": "csv"})
    judged = ["--eval_judge", tmp_path / "judge.pt", "--eval_samples", 6, "--sample_steps", 2]
    more = ["--eval_every", 2, "--log_interval", 1, "--val_data_dir", digits(tmp_path / "val.npz", 40)]
    train(data, tmp_path / "run", "--iterations", 4, *more, *judged)
    found = rows(tmp_path / "run")
    assert [bool(row["eval/loss"]) for row in found] == [False, True, False, True]
    row = {name: float(value) for name, value in found[-1].items() if value}
    whole = row["eval/mse"] + 0.1 * (row["eval/KL_masked"] + row["eval/KL_label"])
    assert row["eval/loss"] == pytest.approx(whole, rel=1e-4)
    for name in ("loss", "KL_masked", "accuracy_label"):
        quarters = [row[f"eval/{name}_q{q}"] for q in range(4) if f"eval/{name}_q{q}" in row]
        assert min(quarters) <= row[f"eval/{name}"] <= max(quarters)
    assert (
        row["eval/frechet"] > 0 and 0 <= row["eval/precision"] <= 1 and 0 <= row["eval/label_agreement"] <= 1
    )
    assert (
        row["lr"] == pytest.approx(1e-3)
        and row["images_per_second"] > 0
        and 0 <= row["waiting_for_data"] <= 1
    )
    assert row["hours_left"] == 0
    # Training is the same without it.
    train(data, tmp_path / "plain", "--iterations", 4, "--log_interval", 1)
    assert [row["loss"] for row in rows(tmp_path / "plain")] == [row["loss"] for row in found]


def test_what_cannot_be_evaluated_is_one_line(data, tmp_path, capsys):
    where = ("--data_dir", data, "--log_dir", tmp_path / "run", "--image_size", 8, "--image_channels", 1)
    model = ("--num_channels", 32, "--channel_mult", "1", "--num_res_blocks", 1, "--eval_every", 2)
    for flags, message in (
        (("--held_out", 0), "no image is held out"),
        (("--eval_judge", data), "is not a checkpoint but another zip archive"),
        (("--eval_judge", tmp_path / "absent.pt"), "does not exist"),
    ):
        assert message in refusal(capsys, "mt_image_train", *where, *model, *flags)


def test_wandb_is_logged_to_or_missed_in_one_line(tmp_path, monkeypatch):
    logged = []
    run = types.SimpleNamespace(log=lambda kvs, step: logged.append((step, kvs)), finish=lambda: None)
    fake = types.SimpleNamespace(init=lambda **options: logged.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with logger.scoped_configure(dir=str(tmp_path / "run"), format_strs=["csv"]):
        logger.log_config({"lr": 1e-3}, "digits")
        logger.logkvs({"step": 3, "loss": 0.5, "KL_label_q2": 1.5, "eval/frechet": 7, "samples": 8})
        logger.dumpkvs()
    assert logged[0]["project"] == "digits" and logged[0]["config"] == {"lr": 1e-3}
    expected = {"run/step": 3, "loss/loss": 0.5, "head/KL_label_q2": 1.5, "eval/frechet": 7, "run/samples": 8}
    assert logged[1] == (3, expected)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        logger.scoped_configure(dir=str(tmp_path / "run"), format_strs=["csv"]),
        pytest.raises(UserError, match="pip install wandb"),
    ):
        logger.log_config({}, "digits")


def test_the_pace_is_of_the_steps_since_the_last_report(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("guided_diffusion.pace.time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    pace = Pace()
    for _ in range(2):
        with pace.waiting():
            now[0] += 1
        now[0] += 3
        pace.step(16)
    report = pace.report(steps_left=900)
    assert (
        report["images_per_second"] == 4 and report["waiting_for_data"] == 0.25 and report["hours_left"] == 1
    )
    now[0] += 2
    pace.step(16)
    assert pace.report()["images_per_second"] == 8 and "hours_left" not in pace.report()


@pytest.mark.parametrize(("size", "advice"), [(64, "--microbatch 32"), (1, "a smaller model")])
def test_too_little_memory_says_what_helps(size, advice):
    with pytest.raises(UserError, match=advice), _told_of_memory(size):
        raise th.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_counts_are_readable_and_a_bar_steps_aside(tmp_path):
    import io

    from tqdm import tqdm

    screen = io.StringIO()
    human = logger.HumanOutputFormat(screen)
    with tqdm(total=3, file=screen) as bar:
        bar.update()
        human.writekvs({"samples": 2450, "loss": np.float32(0.25)})
        text = screen.getvalue()
    assert "| samples | 2,450" in text and "| 0.25" in text and "e+03" not in text
    # The table begins on a line of its own.
    assert "\r" in text.split("-----")[0][-3:] or text.split("-----")[0].endswith("\n")


def test_main_logs_to_wandb_or_misses_it_in_one_line(tmp_path, monkeypatch):
    from ldm.training import logs

    run = types.SimpleNamespace(logdir=tmp_path / "2026-a")
    assert logs.wandb_loggers("", run) == []
    with pytest.raises(UserError, match="pip install wandb"):
        logs.wandb_loggers("digits", run)
    made = []
    monkeypatch.setattr(logs, "WandbLogger", lambda **options: made.append(options) or "logger")
    assert logs.wandb_loggers("digits", run) == ["logger"]
    assert made == [dict(project="digits", save_dir=str(tmp_path / "2026-a"), name="2026-a")]
