"""Training: the same result however it is split, stopped, killed or resumed, and the files that ADM's users know."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch as th

from guided_diffusion import checkpoint_util, logger, train_util
from guided_diffusion.errors import UserError
from guided_diffusion.train_util import (
    find_complete_checkpoint,
    find_ema_checkpoint,
    log_loss_dict,
    parse_resume_step_from_filename,
)
from tests.train_driver import loop, sample_images, small_model

DRIVER = Path(__file__).with_name("train_driver.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def logged(tmp_path):
    """Everything is written to a folder of this test."""
    with logger.scoped_configure(dir=str(tmp_path / "run"), format_strs=["json"]):
        yield tmp_path / "run"


def same(a, b):
    """Whether two checkpoints (or parts of them) are the same, bit for bit."""
    if isinstance(a, th.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def final(folder, step=20):
    return th.load(Path(folder) / f"checkpoint{step:06d}.pt", weights_only=True)


def command(ranks, folder, *flags):
    start = ["mpiexec", "-n", str(ranks)] if ranks > 1 else []
    return [*start, sys.executable, str(DRIVER), str(folder), *map(str, flags)]


def run(ranks, folder, *flags):
    """A whole run in processes of its own."""
    subprocess.run(
        command(ranks, folder, *flags), check=True, env=ENVIRONMENT, capture_output=True, timeout=120
    )


class Started:
    """A run that a test watches, and ends."""

    def __init__(self, ranks, folder, *flags):
        self.process = subprocess.Popen(
            command(ranks, folder, *flags),
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            text=True,
            stderr=subprocess.PIPE,
        )
        self.pids = []
        while len(self.pids) < ranks:
            self.pids.append(int(self._wait_for("pid").split()[1]))

    def _wait_for(self, word):
        for line in self.process.stdout:
            if line.startswith(word):
                return line
        raise AssertionError(f"the run ended early: {self.process.stderr.read()}")

    def wait_for_steps(self, count):
        for _ in range(count):
            self._wait_for("step")

    def kill(self):
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        self.process.communicate(timeout=60)

    def terminate(self, rank):
        os.kill(self.pids[rank], signal.SIGTERM)
        output, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, errors
        return output


# ------------------------------------------------------------------------------------------------ ranks and microbatches


def test_two_ranks_are_one_rank_with_twice_the_batch(tmp_path):
    """20 steps, one of which every rank skips because one image of one rank is not finite."""
    run(2, tmp_path / "two", "--batch_size", 2, "--broken", 21)
    run(1, tmp_path / "one", "--batch_size", 4, "--broken", 21)
    two, one = final(tmp_path / "two"), final(tmp_path / "one")
    assert two["nonfinite_steps"] == one["nonfinite_steps"] == 1
    fresh = small_model().state_dict()
    for part in ("model", "ema"):
        ours, theirs = (state["model"] if part == "model" else state["ema"]["0.9"] for state in (two, one))
        assert max(float((ours[k] - theirs[k]).detach().abs().max()) for k in ours) < 1e-5
        assert min(float((ours[k] - fresh[k]).detach().abs().max()) for k in ours) > 1e-4  # it did learn


def test_microbatches_give_the_gradient_of_the_batch():
    gradients = []
    for microbatch in (-1, 2):  # 2 + 2 + 1 of 5
        training = loop(5, microbatch=microbatch)
        batch, cond = next(sample_images(5))
        training._seed_step(5)
        training.forward_backward(batch, cond)
        gradients.append(th.cat([p.grad.flatten() for p in training.model.parameters()]))
    assert float((gradients[0] - gradients[1]).abs().max()) < 1e-5 * float(gradients[0].abs().max())


# ----------------------------------------------------------------------------------------------------- stop and resume


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_run_ends_with_the_same_bits(tmp_path, ranks):
    """SIGKILL at a random moment, SIGTERM to one rank, SIGKILL inside a checkpoint; the same command resumes each time."""
    flags = ("--batch_size", 2, "--sampler", "loss-second-moment", "--save_interval", 4)
    run(ranks, tmp_path / "straight", *flags)
    folder = tmp_path / "killed"
    again = (*flags, "--resume", folder)

    seed = int(time.time())
    started = Started(ranks, folder, *again, "--slow", 0.02)
    started.wait_for_steps(ranks * 3)
    time.sleep(random.Random(seed).uniform(0, 0.4))
    started.kill()

    started = Started(ranks, folder, *again, "--pause", 0.1)
    started.wait_for_steps(ranks)
    assert "stopped" in started.terminate(rank=ranks - 1)
    stopped = find_complete_checkpoint(str(folder))
    assert checkpoint_util.load_complete(stopped)["step"] < 20

    started = Started(ranks, folder, *again, "--slow", 30)
    written = folder / "checkpoint.none"
    deadline = time.monotonic() + 60
    while not written.exists():
        written = next(folder.glob("*.pt.tmp"), written)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.kill()
    assert list(folder.glob("*.pt.tmp")), "the run was to be killed while it wrote"
    assert find_complete_checkpoint(str(folder)) == stopped

    run(ranks, folder, *again)
    assert not list(folder.glob("*.tmp"))
    assert same(final(folder), final(tmp_path / "straight")), f"killed with seed {seed}"


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("sampler", ["uniform", "loss-second-moment"])
def test_resumed_run_is_the_run_that_never_stopped(logged, seed, sampler):
    """Within one process, with annealing, with and without seeds: the generators' states are in the checkpoint."""

    def train(iterations, resume=""):
        th.manual_seed(1), np.random.seed(1), random.seed(1)
        training = loop(
            sampler=sampler,
            seed=seed,
            iterations=iterations,
            lr_anneal_steps=40,
            resume_checkpoint=resume,
            keep_checkpoints=9,
        )
        training.run_loop()
        return training.state_dict()

    straight = train(12)
    for file in logged.glob("*.pt"):
        file.unlink()
    train(7)
    first = str(logged / "checkpoint000007.pt")
    th.rand(3), np.random.rand(3)  # another process would stand elsewhere
    assert same(train(12, resume=first), straight)
    # ADM's name for the same step finds the complete checkpoint beside it.
    assert same(train(12, resume=first.replace("checkpoint", "model")), straight)


def test_callback_at_saves_does_not_disturb_training():
    def draw(training):
        th.rand(3), np.random.rand(3)

    states = []
    for on_save in (None, draw):
        th.manual_seed(1), np.random.seed(1)
        training = loop(seed=None, iterations=6, save_interval=2, on_save=on_save)
        training.run_loop()
        states.append(training.state_dict())
    assert same(*states)


def test_only_whole_checkpoints_are_found_and_the_last_two_kept(logged):
    loop(iterations=12).run_loop()
    assert sorted(p.name for p in logged.glob("checkpoint*")) == [
        "checkpoint000010.pt",
        "checkpoint000012.pt",
    ]
    assert len(list(logged.glob("model*.pt"))) == 4  # 0, 5, 10, 12: ADM's files stay
    newest = logged / "checkpoint000012.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert find_complete_checkpoint(str(logged)) == str(logged / "checkpoint000010.pt")
    assert find_complete_checkpoint(str(logged / "absent")) is None


def test_steps_are_the_same_with_another_batch_order_only_if_the_data_can_seek(logged):
    """An iterator, a function of the step, an object with seek, one with iter_from."""

    class Seekable:
        def __init__(self):
            self.start = 0

        def seek(self, step):
            self.start = step

        def __iter__(self):
            return sample_images(2, self.start)

    class Stream:
        def iter_from(self, step):
            return sample_images(2, step)

    loop(iterations=3).run_loop()
    first = str(logged / "checkpoint000003.pt")
    states = []
    for data in (lambda step: sample_images(2, step), Seekable(), Stream(), sample_images(2)):
        training = loop(iterations=6, data=data, resume_checkpoint=first)
        training.run_loop()
        states.append(training.state_dict())
    assert same(states[0], states[1]) and same(states[0], states[2])
    assert not same(states[0]["model"], states[3]["model"])


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_step_with_a_non_finite_loss_changes_nothing():
    training = loop(2, sampler="loss-second-moment", data=lambda start: sample_images(2, start, broken=[5]))
    batches = training._open_data()
    for step in range(4):
        before = training.state_dict()
        kept = [
            p.clone()
            for p in (*training.model.parameters(), *training.ema_params[0], *training.ema_params[1])
        ]
        training.run_step(*next(batches))
        changed = not all(map(th.equal, kept, (*training.model.parameters(), *sum(training.ema_params, []))))
        assert changed == (step != 2)
        assert training.nonfinite_steps == before["nonfinite_steps"] + (step == 2)
        training.step += 1
    assert np.isfinite(training.schedule_sampler._loss_history).all()


def test_the_host_reads_the_device_once_per_log_interval(monkeypatch):
    """Whatever a step needs to know of its numbers it decides on the device."""
    training = loop(2, microbatch=1, data=lambda start: sample_images(2, start, broken=[5]))
    batches, reads = training._open_data(), []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "nonzero"):
        read = getattr(th.Tensor, name)
        monkeypatch.setattr(
            th.Tensor, name, lambda *args, _name=name, _read=read: (reads.append(_name), _read(*args))[1]
        )
    for training.step in range(4):
        training.run_step(*next(batches))
    assert reads == []
    training.log_losses = lambda losses, t, weights: None  # of tensors on the host
    training.log_steps()
    assert reads == ["tolist"]
    monkeypatch.undo()
    assert training.nonfinite_steps == 1


def test_a_save_is_a_snapshot_and_its_fault_ends_training(logged, monkeypatch):
    """Written while training goes on, from weights as they were; a full disk is told at the end at the latest."""
    entered, go = threading.Event(), threading.Event()
    save = train_util.save_atomic

    def slow(value, path):
        entered.set()
        go.wait(10)
        save(value, path)

    monkeypatch.setattr(train_util, "save_atomic", slow)
    training = loop(2, adm_files="none")
    training.save()
    assert entered.wait(10) and not list(logged.glob("*.pt"))
    kept = [p.detach().clone() for p in training.model.parameters()]
    training.run_step(*next(sample_images(2)))
    go.set()
    training._finish_writing()
    assert [path.name for path in logged.glob("*.pt")] == ["checkpoint000000.pt"]
    written = final(logged, 0)["model"]
    assert all(map(th.equal, kept, (written[name] for name, _ in training.model.named_parameters())))

    def full(value, path):
        raise UserError("the disk is full")

    monkeypatch.setattr(train_util, "save_atomic", full)
    with pytest.raises(UserError, match="the disk is full"):
        loop(2, iterations=3, save_interval=2).run_loop()


def test_sigterm_in_the_middle_of_a_write_is_exact(logged, monkeypatch):
    straight = loop(iterations=12)
    straight.run_loop()
    for path in logged.glob("*.pt"):
        path.unlink()
    whole, seen = checkpoint_util.write, []

    def write(value, file):
        if value.get("step") == 6:
            file.write(b"half")
            file.flush()
            seen.extend(path.name for path in logged.glob("*.pt.tmp"))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            file.seek(0)
        whole(value, file)

    monkeypatch.setattr(checkpoint_util, "write", write)
    data = lambda start: ((time.sleep(0.02), batch)[1] for batch in sample_images(2, start))  # noqa: E731
    stopped = loop(iterations=12, data=data)
    stopped.run_loop()
    assert seen == ["checkpoint000005.pt.tmp"] and 6 <= stopped.steps_done < 12
    assert not list(logged.glob("*.pt.tmp"))
    resumed = loop(iterations=12, resume_checkpoint=str(logged))
    assert resumed.step == stopped.steps_done
    resumed.run_loop()
    assert same(resumed.state_dict(), straight.state_dict())


def test_a_write_that_fails_in_the_background_ends_the_run_with_one_line_and_loses_nothing(tmp_path):
    """Files may have 20 kB, as on a disk that is full."""
    folder = tmp_path / "run"
    run(1, folder, "--iterations", 6)
    before = {path.name: path.read_bytes() for path in folder.glob("*.pt")}
    limited = ["bash", "-c", 'ulimit -f 20; exec "$0" "$@"', *command(1, folder, "--resume", folder)]
    job = subprocess.run(limited, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert job.returncode == 2 and job.stderr.count("\n") == 1, job.stderr
    assert "cannot be written to" in job.stderr and "larger than the limit" in job.stderr
    assert before == {path.name: path.read_bytes() for path in folder.glob("*.pt*")}


def test_files_of_all_kinds_are_pruned_where_asked(logged):
    for kinds, expected in (
        (
            "all",
            {
                "model000000.pt",
                "model000008.pt",
                "opt000000.pt",
                "checkpoint000006.pt",
                "checkpoint000008.pt",
            },
        ),
        ("pruned", {"model000006.pt", "model000008.pt", "opt000006.pt", "checkpoint000006.pt"}),
        ("none", {"checkpoint000006.pt", "checkpoint000008.pt"}),
    ):
        for path in logged.glob("*.pt"):
            path.unlink()
        loop(2, iterations=8, save_interval=2, adm_files=kinds).run_loop()
        found = {path.name for path in logged.glob("*.pt")}
        assert expected <= found and len(found) == {"all": 4 * 5 + 2, "pruned": 2 * 5, "none": 2}[kinds]
        assert len([name for name in found if name.startswith("checkpoint")]) == 2


def test_gradients_that_are_not_finite_are_skipped_too():
    """The square root of zero: a finite loss with an infinite gradient."""
    training = loop(2)

    def compute_losses(micro, cond):
        first = next(training.model.parameters())
        return (
            {"loss": ((first * 0).abs().sum().sqrt() + th.zeros(len(micro)))},
            th.zeros(2).long(),
            th.ones(2),
        )

    training.compute_losses = compute_losses
    kept = [p.clone() for p in training.model.parameters()]
    training.run_step(*next(sample_images(2)))
    assert training.nonfinite_steps == 1
    assert all(map(th.equal, kept, training.model.parameters()))


def test_run_ends_with_a_message_when_losses_stay_non_finite(logged, monkeypatch):
    whole = checkpoint_util.write
    monkeypatch.setattr(checkpoint_util, "write", lambda *args: (time.sleep(0.1), whole(*args)))
    data = lambda start: sample_images(2, start, broken=range(4, 1000))  # noqa: E731
    with pytest.raises(UserError, match=r"max_nonfinite = 3.* last finite checkpoint is .*000006\.pt"):
        loop(2, data=data, max_nonfinite=3).run_loop()
    state = checkpoint_util.load_complete(find_complete_checkpoint(str(logged)))
    assert state["nonfinite_steps"] == 4 and state["step"] == 6
    assert all(bool(th.isfinite(value).all()) for value in state["model"].values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume_checkpoint": "no/such/model000010.pt"}, "no such checkpoint: no/such/model000010.pt"),
        ({"precision": "fp8"}, "unknown precision 'fp8': choose one of fp32, bf16, fp16"),
        ({"ema_rate": "0.9,big"}, "ema_rate '0.9,big' must be numbers"),
    ],
)
def test_impossible_flags_are_named(changes, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        loop(**changes)


def test_checkpoints_that_do_not_fit_are_refused_in_one_line(logged, tmp_path):
    other = th.nn.Linear(2, 2)
    th.save(other.state_dict(), tmp_path / "model000001.pt")
    with pytest.raises(
        UserError, match="does not fit the model that the flags describe, UNetModel: .* are missing"
    ) as caught:
        loop(resume_checkpoint=str(tmp_path / "model000001.pt"))
    assert "\n" not in str(caught.value)
    th.save({"format": "something"}, tmp_path / "checkpoint000001.pt")
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        loop(resume_checkpoint=str(tmp_path / "checkpoint000001.pt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint"):
        loop(resume_checkpoint=str(tmp_path / "empty"))
    with pytest.raises(UserError, match="the data ended after 1 step"):
        loop(data=iter([next(sample_images(2))])).run_loop()


# ---------------------------------------------------------------------------------------------------- as upstream does


def test_upstream_files_and_logged_values(logged):
    loop(lr_anneal_steps=12).run_loop()
    for step in (0, 5, 10, 12):
        for name in ("model", "ema_0.9_", "ema_0.99_", "opt"):
            assert (logged / f"{name}{step:06d}.pt").is_file()
    weights = th.load(logged / "model000012.pt", weights_only=True)
    assert list(weights) == list(small_model().state_dict())
    rows = [json.loads(line) for line in (logged / "progress.json").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 5, 10]
    assert [row["samples"] for row in rows] == [2, 12, 22]
    assert {"loss", "mse", "grad_norm", "param_norm"} <= set(rows[1])


def test_resuming_from_adm_files_loads_weights_averages_and_optimizer(logged):
    """A folder that ADM wrote: no complete checkpoint in it."""
    first = loop(iterations=7)
    first.run_loop()
    (logged / "checkpoint000007.pt").unlink()
    second = loop(resume_checkpoint=str(logged / "model000007.pt"), iterations=9)
    assert (second.step, second.resume_step) == (0, 7)
    assert same(second.model.state_dict(), first.model.state_dict())
    assert all(map(same, second.ema_params, first.ema_params))
    assert same(second.opt.state_dict()["state"], first.opt.state_dict()["state"])
    second.run_loop()
    assert (logged / "model000009.pt").is_file()
    (logged / "checkpoint000007.pt").unlink()
    (logged / "ema_0.9_000007.pt").unlink()  # an average that was not kept starts at the weights
    third = loop(resume_checkpoint=str(logged / "model000007.pt"))
    assert all(map(th.equal, third.ema_params[0], third.model.parameters()))


def test_integration_switch_ends_at_the_second_save(logged, monkeypatch):
    monkeypatch.setenv("DIFFUSION_TRAINING_TEST", "1")
    loop().run_loop()
    assert (logged / "model000005.pt").exists() and not (logged / "model000010.pt").exists()


def test_averages_follow_the_weights():
    """ema = rate ema + (1 - rate) weights after every step, from the initial weights on."""
    training = loop(2, ema_rate="0.9")
    expected = [p.detach().clone() for p in training.model.parameters()]
    for batch, cond in (next(sample_images(2, start)) for start in range(3)):
        training.run_step(batch, cond)
        expected = [
            0.9 * e + 0.1 * p.detach() for e, p in zip(expected, training.model.parameters(), strict=True)
        ]
        training.step += 1
    assert all(th.allclose(e, p, atol=1e-6) for e, p in zip(expected, training.ema_params[0], strict=True))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains_like_float32(precision):
    losses = {}
    for name in ("fp32", precision):
        training = loop(8, precision=name, lr=1e-3)
        batches = training._open_data()
        for _ in range(15):
            training.run_step(*next(batches))
            training.step += 1
        training.log_steps()
        means = logger.dumpkvs()
        losses[name] = means["loss"]
        assert all(p.dtype == th.float32 for p in training.ema_params[0])
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.05)


def test_annealing_brings_the_rate_to_zero():
    training = loop(lr=1.0, lr_anneal_steps=4)
    rates = []
    for training.step in range(5):
        training._anneal_lr()
        rates.append(training.opt.param_groups[0]["lr"])
    assert rates == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_step_is_read_from_file_names():
    assert parse_resume_step_from_filename("runs/model_a/model012345.pt") == 12345
    assert parse_resume_step_from_filename("model000000.pt") == 0
    assert parse_resume_step_from_filename("ema_0.9_000100.pt") == 0
    assert parse_resume_step_from_filename("model_best.pt") == 0


def test_averages_are_found_beside_the_model(tmp_path):
    (tmp_path / "ema_0.9999_000010.pt").touch()
    assert find_ema_checkpoint(str(tmp_path / "model000010.pt"), 10, 0.9999) == str(
        tmp_path / "ema_0.9999_000010.pt"
    )
    assert find_ema_checkpoint(str(tmp_path / "model000010.pt"), 10, 0.5) is None
    assert find_ema_checkpoint(None, 10, 0.9999) is None


def test_losses_are_logged_by_quarter():
    class Diffusion:
        num_timesteps = 8

    log_loss_dict(Diffusion, th.tensor([0, 1, 2, 7]), {"loss": th.tensor([1.0, 3.0, 5.0, 7.0])})
    values = logger.dumpkvs()
    assert values == {"loss": 4.0, "loss_q0": 2.0, "loss_q1": 5.0, "loss_q3": 7.0}


def test_fork_may_replace_where_checkpoints_go(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(train_util, "get_blob_logdir", lambda: str(tmp_path / "elsewhere"))
    loop(iterations=1).run_loop()
    assert (tmp_path / "elsewhere" / "model000000.pt").exists()


# --------------------------------------------------------------------------------- flags, locks and logs of a resumed run


def test_a_resumed_run_uses_the_flags_that_are_given_and_tells_what_changed(logged, capsys):
    first = loop(iterations=3, config={"lr": 3e-4, "weight_decay": 0.0, "seed": 3, "ema_rate": "0.9,0.99"})
    first.run_loop()
    changed = {"lr": 1e-3, "weight_decay": 0.1, "seed": 3, "ema_rate": "0.9,0.99"}
    with logger.scoped_configure(dir=str(logged), format_strs=["stdout"]):
        second = loop(iterations=5, lr=1e-3, weight_decay=0.1, config=changed, resume_checkpoint=str(logged))
        second.run_loop()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "->" in line] == ["lr: 0.0003 -> 0.001", "weight_decay: 0.0 -> 0.1"]
    state = final(logged, 5)
    (group,) = state["optimizer"]["param_groups"]
    assert (group["lr"], group["weight_decay"]) == (state["config"]["lr"], state["config"]["weight_decay"])
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.1)
    assert state["optimizer"]["state"][0]["step"] == 5  # its moments went on


def test_a_finished_run_says_so_and_changes_nothing(logged, capsys):
    loop(iterations=3).run_loop()
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in logged.iterdir()}
    with logger.scoped_configure(dir=str(logged), format_strs=["stdout"]):
        loop(iterations=3, lr=1.0, resume_checkpoint=str(logged), data=None).run_loop()
    assert "finished at step 3" in capsys.readouterr().out
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in logged.iterdir()}


def test_a_second_training_in_a_folder_is_refused_and_the_first_goes_on(tmp_path):
    folder = tmp_path / "shared"
    first = Started(1, folder, "--pause", 0.2, "--iterations", 1000)
    first.wait_for_steps(2)
    job = subprocess.run(command(1, folder), env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert job.returncode == 2 and "is in use by another training" in job.stderr
    assert job.stderr.count("\n") == 1
    output = first.terminate(rank=0)
    assert "stopped" in output
    run(1, folder, "--resume", folder)  # the lock is gone with the process


def test_a_lone_truncated_checkpoint_does_not_start_a_fresh_run(logged):
    loop(iterations=2, save_interval=100).run_loop()
    for path in sorted(logged.glob("checkpoint*.pt"))[:-1]:
        path.unlink()
    (last,) = logged.glob("checkpoint*.pt")
    last.write_bytes(last.read_bytes()[:-50])
    with pytest.raises(UserError, match=f"{last.name} is truncated, and .* has no other complete checkpoint"):
        loop(iterations=4, resume_checkpoint=str(logged))


def test_logs_hold_every_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "logs"

    def train(iterations, save):
        with logger.scoped_configure(dir=str(folder), format_strs=["csv", "json", "tensorboard"]):
            training = loop(
                iterations=iterations, log_interval=1, save_interval=3, resume_checkpoint=str(folder)
            )
            if not save:
                training._save_last = lambda: None  # as if it had been killed
            training.run_loop()

    folder.mkdir()
    train(6, save=False)  # the last checkpoint is that of 4 steps
    assert find_complete_checkpoint(str(folder)).endswith("checkpoint000003.pt")
    time.sleep(1.1)  # TensorBoard's files are in the order of their seconds
    train(8, save=True)
    rows = (folder / "progress.csv").read_text().splitlines()
    column = rows[0].split(",").index("step")
    assert [int(row.split(",")[column]) for row in rows[1:]] == list(range(8))
    lines = (folder / "progress.json").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(8))
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/loss")] == list(range(8))


def test_a_closed_terminal_saves_and_stops_like_sigterm(tmp_path):
    """The run has a terminal of its own; closing it sends SIGHUP, and what is written to it fails from then on."""
    folder = tmp_path / "run"
    pid, terminal = os.forkpty()
    if pid == 0:
        os.execve(sys.executable, command(1, folder, "--pause", 0.1), {**ENVIRONMENT})
    seen = b""
    while seen.count(b"step") < 3:
        seen += os.read(terminal, 4096)
    os.close(terminal)
    deadline = time.monotonic() + 60
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    step = checkpoint_util.load_complete(find_complete_checkpoint(str(folder)))["step"]
    assert 3 <= step < 20


def test_nohup_stays_in_force(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        training = loop(iterations=3)
        with training._stop_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert not training._signalled
    finally:
        signal.signal(signal.SIGHUP, before)


# -------------------------------------------------------------------------------------------------- numbers and averages


def test_a_run_with_broken_weights_leaves_the_last_finite_checkpoint_as_the_newest(logged):
    """Weights that become infinite without a bad loss are not saved either."""
    training = loop(iterations=20)

    def break_weights(step):
        for batch in sample_images(2, step):
            if training.step == 7:
                next(training.model.parameters()).data.fill_(th.inf)
            yield batch

    training.data = break_weights
    with pytest.raises(UserError, match="checkpoint000005.pt"):
        training.run_loop()
    newest = find_complete_checkpoint(str(logged))
    assert newest.endswith("checkpoint000005.pt")
    assert all(
        bool(th.isfinite(value).all()) for value in checkpoint_util.load_complete(newest)["model"].values()
    )
    assert len(list(logged.glob("model*.pt"))) == 2


def test_half_precision_gives_up_on_gradients_that_stay_broken(logged):
    """The loss scale has a floor; the checkpoint of before stays the newest."""
    training = loop(use_fp16=True, iterations=100, save_interval=1000)
    forward = training.compute_losses

    def broken(micro, cond):
        losses, t, weights = forward(micro, cond)
        if training.step > 2:
            for parameter in training.model.parameters():
                parameter.register_hook(lambda grad: grad * th.nan)
        return losses, t, weights

    training.compute_losses = broken
    with pytest.raises(UserError, match=r"not finite in float16 even at a loss scale of 2\*\*-13"):
        training.run_loop()
    assert training.step < 50
    assert find_complete_checkpoint(str(logged)).endswith("checkpoint000000.pt")


def test_warm_averages_follow_the_rule_and_resume_exactly(logged):
    training = loop(2, ema_rate="0.5,0.9999", ema_warmup=True)
    expected = [[p.detach().clone() for p in training.model.parameters()] for _ in range(2)]
    for step, (batch, cond) in enumerate(next(sample_images(2, start)) for start in range(12)):
        training.run_step(batch, cond)
        for i, limit in enumerate((0.5, 0.9999)):
            rate = min(limit, (1 + step) / (10 + step))
            expected[i] = [
                rate * e + (1 - rate) * p.detach()
                for e, p in zip(expected[i], training.model.parameters(), strict=True)
            ]
        training.step += 1
    for wanted, found in zip(expected, training.ema_params, strict=True):
        assert all(th.allclose(e, p, atol=1e-6) for e, p in zip(wanted, found, strict=True))
    straight = loop(iterations=7, ema_warmup=True)
    straight.run_loop()
    for path in logged.glob("*.pt"):
        path.unlink()
    loop(iterations=4, ema_warmup=True).run_loop()
    resumed = loop(iterations=7, ema_warmup=True, resume_checkpoint=str(logged))
    resumed.run_loop()
    assert same(resumed.state_dict(), straight.state_dict()) and resumed.state_dict()["ema_warmup"]


@pytest.mark.parametrize(
    ("rate", "warm", "told"), [("0.99", False, True), ("0.99", True, False), ("0.5", False, False)]
)
def test_a_young_average_is_warned_of_when_it_is_read(logged, capsys, rate, warm, told):
    loop(iterations=4, ema_rate=rate, ema_warmup=warm, config={"ema_warmup": warm}).run_loop()
    with logger.scoped_configure(dir=str(logged), format_strs=["stdout"]):
        for name in ("checkpoint000004.pt", f"ema_{rate}_000004.pt"):
            capsys.readouterr()
            checkpoint_util.read_weights(logged / name)
            assert ("reaches over 100 steps, the run has made 4: 96 %" in capsys.readouterr().out) == told
            checkpoint_util.read_weights(logged / "model000004.pt")
            assert "average" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- checkpoints of another content


@pytest.mark.parametrize("part", sorted(checkpoint_util._PARTS))
def test_a_checkpoint_that_lacks_a_part_or_has_another_type_there_is_one_line(tmp_path, part):
    state = loop().state_dict()
    for broken, message in (
        ({k: v for k, v in state.items() if k != part}, f"it lacks {part!r}"),
        ({**state, part: th.ones(2)}, f"{part!r} is of type Tensor"),
    ):
        for name in ("checkpoint000001.pt", "mine.pt"):
            th.save(broken, tmp_path / name)
            with pytest.raises(UserError, match=message) as caught:
                loop(resume_checkpoint=str(tmp_path / name))
            assert "\n" not in str(caught.value)


def test_a_complete_checkpoint_of_any_name_is_continued_exactly(logged, tmp_path):
    straight = loop(iterations=7)
    straight.run_loop()
    (logged / "checkpoint000005.pt").rename(tmp_path / "mine.pt")
    resumed = loop(iterations=7, resume_checkpoint=str(tmp_path / "mine.pt"))
    assert resumed.step == 6
    resumed.run_loop()
    assert same(resumed.state_dict(), straight.state_dict())
    whole = (tmp_path / "mine.pt").read_bytes()
    (tmp_path / "mine.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="it is truncated"):
        loop(resume_checkpoint=str(tmp_path / "mine.pt"))


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("optimizer", {}),
        ("optimizer", {"state": {}, "param_groups": []}),
        ("optimizer", {"state": {0: {"exp_avg": th.ones(3)}}}),
        ("ema", {"0.9": {}}),
        ("model", {"weight": 3}),
        ("rng", [{"torch": 3}]),
        ("rng", ["text"]),
        ("schedule_sampler", {"losses": "text"}),
    ],
)
def test_parts_of_another_form_are_one_line(logged, part, value):
    training = loop(sampler="loss-second-moment")
    training.run_step(*next(sample_images(2)))
    state = training.state_dict()
    if part == "optimizer" and value.get("state"):
        value = {**value, "param_groups": state["optimizer"]["param_groups"]}
    th.save({**state, part: value}, logged / "checkpoint000001.pt")
    with pytest.raises(UserError) as caught:
        loop(
            iterations=2, sampler="loss-second-moment", resume_checkpoint=str(logged / "checkpoint000001.pt")
        ).run_loop()
    assert "\n" not in str(caught.value)
