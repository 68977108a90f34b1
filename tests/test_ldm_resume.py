"""main.py --resume at every position of an epoch: the same batches, weights, validations, checkpoints and logs as
without the interruption."""

import csv
import subprocess
import sys

import pytest
import torch as th
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from guided_diffusion.checkpoint_util import _locks
from guided_diffusion.errors import UserError
from ldm.training.cli import main
from tests.conftest import ROOT
from tests.ldm_training_driver import Killed, Line
from tests.test_main import RAMPS, TRAINER, tensors

DRIVER = "tests.ldm_training_driver"
LIMITS = {"max_steps": {"max_steps": 8, "max_epochs": -1}, "max_epochs": {"max_epochs": 3}}
# Three batches an epoch. Where a run ends: at which call of a hook, or by a signal after how many updates.
PLACES = [
    ("on_train_batch_start", 4),
    ("on_train_batch_start", 8),
    ("on_train_epoch_start", 3),
    ("on_validation_start", 2),
    ("on_validation_end", 2),
    ("on_train_epoch_end", 2),
    ("SIGTERM", 0),
    ("SIGTERM", 1),
    ("SIGTERM", 2),
    ("SIGTERM", 3),
    ("SIGTERM", 5),
    ("SIGHUP", 7),
    ("SIGUSR1", 2),
]


class Run:
    """A run of the tiny model in `folder`: what it leaves, and the batches that it has seen."""

    def __init__(self, folder, validation, limit, stop=None, logger=None, changes=()):
        self.folder = folder
        sizes = {"train": 6, "validation": 2} if validation else {"train": 6}
        data = {name: {"target": RAMPS, "params": {"size": size}} for name, size in sizes.items()}
        monitor = "val/loss" if validation else "train/loss"
        stops = {"stop": stop} if stop else {}
        content = {
            "model": {
                "base_learning_rate": 0.1,
                "target": f"{DRIVER}.Line",
                "params": {"monitor": monitor},
            },
            "data": {
                "target": "main.DataModuleFromConfig",
                "params": {"batch_size": 2, "num_workers": 0, **data},
            },
            "lightning": {
                "trainer": TRAINER | LIMITS[limit],
                "callbacks": dict.fromkeys(("image_logger", "learning_rate_logger", "cuda_callback")) | stops,
                "logger": logger
                or {
                    "target": "pytorch_lightning.loggers.CSVLogger",
                    "params": {"save_dir": str(folder)},
                },
            },
        }
        folder.mkdir()
        OmegaConf.save(OmegaConf.create(content), folder / "line.yaml")
        self.seen = self._main("-b", str(folder / "line.yaml"), "-l", str(folder / "logs"), *changes)

    def resume(self, checkpoint="last.ckpt"):
        """Go on without the callback that ended it; what it saw before the checkpoint stays seen."""
        path = self.checkpoint(checkpoint)
        step = th.load(path, weights_only=True)["global_step"]
        before = [batch for batch in self.seen if batch[1] < step or batch[0] == "val"]
        self.seen = before + self._main("-r", str(path), "lightning.callbacks.stop=null")

    def _main(self, *arguments):
        Line.seen.clear()
        try:
            main([*arguments, "-t"])
        except (Killed, SystemExit):
            pass
        return list(Line.seen)

    def checkpoint(self, name):
        return next((self.folder / "logs").iterdir()) / "checkpoints" / name

    def checkpoints(self):
        """{name: content}"""
        folder = self.checkpoint("")
        return {path.name: th.load(path, weights_only=True) for path in sorted(folder.iterdir())}

    def batches(self, what):
        return sorted(set(batch for batch in self.seen if batch[0] == what), key=lambda batch: batch[1])

    def logged(self):
        """[(step, name, value)] of the CSV files."""
        rows = [row for path in self.folder.rglob("metrics.csv") for row in csv.DictReader(path.open())]
        values = [(int(row["step"]), name, value) for row in rows for name, value in row.items() if value]
        return sorted(value for value in values if value[1] not in ("step", "epoch"))


def assert_same(run, whole):
    assert run.batches("train") == whole.batches("train")
    assert run.batches("val") == whole.batches("val")
    mine, theirs = run.checkpoints(), whole.checkpoints()
    assert mine.keys() == theirs.keys()
    for name, content in theirs.items():
        for part in ("state_dict", "optimizer_states", "lr_schedulers"):
            a, b = tensors(mine[name][part]), tensors(content[part])
            assert a.keys() == b.keys() and all(th.equal(a[k], b[k]) for k in a), f"{part} of {name}"
        assert mine[name]["global_step"] == content["global_step"]
        assert mine[name]["DataModuleFromConfig"] == content["DataModuleFromConfig"]
    assert run.logged() == whole.logged()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(validation, limit): an uninterrupted run, made once."""
    made = {}

    def get(validation, limit, **how):
        key = (validation, limit, *how.items())
        if key not in made:
            made[key] = Run(tmp_path_factory.mktemp("whole") / "run", validation, limit, **how)
        return made[key]

    return get


def ended(place):
    hook, count = place
    if hook.startswith("SIG"):
        return {"target": f"{DRIVER}.SignalAt", "params": {"step": count, "name": hook}}
    return {"target": f"{DRIVER}.KillAt", "params": {"hook": hook, "count": count}}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("validation", [True, False], ids=["validated", "alone"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]}-{place[1]}")
def test_a_run_continues_exactly_from_every_position(tmp_path, whole, place, validation, limit):
    if "validation" in place[0] and not validation:
        pytest.skip("it has no validation")
    run = Run(tmp_path / "run", validation, limit, stop=ended(place))
    run.resume()
    assert_same(run, whole(validation, limit))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", ["epoch=000000.ckpt", "epoch=000001.ckpt"])
def test_a_kept_checkpoint_is_continued_exactly(tmp_path, whole, name, limit):
    run = Run(tmp_path / "run", True, limit)
    run.resume(name)
    assert_same(run, whole(True, limit))


def test_a_run_that_accumulates_and_validates_within_the_epoch(tmp_path):
    """Batches 1 to 3 are two updates; validations come after the first and the third batch."""
    changes = ["lightning.trainer.accumulate_grad_batches=2", "lightning.trainer.val_check_interval=1"]
    whole = Run(tmp_path / "whole", True, "max_epochs", changes=changes)
    assert [batch[1] for batch in whole.batches("train")] == [0, 0, 1, 2, 2, 3, 4, 4, 5]
    for step in (1, 2, 3):
        run = Run(tmp_path / f"{step}", True, "max_epochs", stop=ended(("SIGTERM", step)), changes=changes)
        run.resume()
        assert_same(run, whole)


def test_tensorboard_holds_every_step_once(tmp_path):
    logger = {"target": "pytorch_lightning.loggers.TensorBoardLogger"}
    run = Run(tmp_path / "run", False, "max_steps", stop=ended(("on_train_batch_start", 6)), logger=logger)
    run.resume()
    events = EventAccumulator(str(run.checkpoint("").parent / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss_step")] == list(range(8))
    assert [event.step for event in events.Scalars("train/loss_epoch")] == [2, 5, 7]


def test_a_finished_run_says_so(tmp_path, whole, caplog):
    run = Run(tmp_path / "run", False, "max_steps")
    caplog.set_level("INFO")
    run.resume()
    assert "finished at step 8; to go on, raise lightning.trainer.max_steps" in caplog.text
    assert_same(run, whole(False, "max_steps"))


BROKEN = {
    "state_dict": (3, None, {"weight": 3}),
    "loops": (3, {}, {"fit_loop": {}}),
    "optimizer_states": (None, [3], [{}], [{"state": {}, "param_groups": []}]),
    "lr_schedulers": (None, ["text"]),
    "callbacks": (3, None),
    "global_step": ("two",),
    "epoch": (None,),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("stopped") / "run", False, "max_steps", stop=ended(("SIGTERM", 1)))


@pytest.mark.parametrize("name", ["last.ckpt", "mine.ckpt"])
@pytest.mark.parametrize("part", [*BROKEN, "epoch_means", "callback_metrics", "DataModuleFromConfig"])
def test_a_checkpoint_that_lacks_a_part_or_has_another_type_there_is_one_line(stopped, part, name):
    path = stopped.checkpoint("last.ckpt")
    content = th.load(path, weights_only=True)
    for value in BROKEN.get(part, (3,)):
        broken = {k: v for k, v in content.items() if k != part} | (
            {part: value} if value is not None else {}
        )
        th.save(broken, path.with_name(name))
        with pytest.raises(UserError) as caught:
            main(["-r", str(path.with_name(name)), "-t", "lightning.callbacks.stop=null"])
        assert name in str(caught.value) and "\n" not in str(caught.value)
    th.save(content, path)


def test_a_resumed_run_learns_at_the_rate_that_is_given(tmp_path, caplog):
    """Its configuration says what its optimizer does."""
    run = Run(tmp_path / "run", False, "max_steps", stop=ended(("SIGTERM", 2)))
    caplog.set_level("INFO")
    run._main(
        "-r",
        str(run.checkpoint("last.ckpt")),
        "lightning.callbacks.stop=null",
        "model.base_learning_rate=0.3",
    )
    assert [batch[-1] for batch in Line.seen] == pytest.approx([0.6 / (1 + step) for step in range(3, 8)])
    assert "lr: 0.2 -> 0.6" in caplog.text


def test_a_second_training_in_a_folder_is_refused(tmp_path):
    run = Run(tmp_path / "run", False, "max_steps", stop=ended(("SIGTERM", 1)))
    folder = run.checkpoint("").parent
    for file in _locks.values():
        file.close()
    _locks.clear()
    hold = f"from guided_diffusion.checkpoint_util import lock_folder; lock_folder({str(folder)!r}); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="in use by another training"):
            main(["-r", str(folder), "-t"])
        other.kill()
    run.resume()
    assert len(run.batches("train")) == 8
