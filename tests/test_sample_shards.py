"""Samples in shards: written while they are made, continued after a kill, joined into the file that np.savez would write."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th

from guided_diffusion import cli, logger
from guided_diffusion.array_files import Rows, mapped_npz, write_npz
from guided_diffusion.errors import UserError
from guided_diffusion.execution import Execution
from guided_diffusion.sample_shards import Shards, fingerprint
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from tests.mt_driver import ENVIRONMENT, ROOT, digits, train

ADM = dict(image_size=8, image_channels=1, num_channels=32, num_res_blocks=1, channel_mult="1", num_heads=1)
ADM |= dict(
    attention_resolutions="8", diffusion_steps=30, noise_schedule="cosine", class_cond=True, num_classes=3
)


def command(script, folder, flags):
    words = [
        sys.executable,
        str(ROOT / "scripts" / f"{script}.py"),
        "--log_dir",
        str(folder),
        *map(str, flags),
    ]
    return dict(
        args=words,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run(script, folder, flags):
    done = subprocess.run(**command(script, folder, flags), text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    return done.stdout, {path.name: path.read_bytes() for path in folder.glob("samples_*.npz")}


def kill_after(shards, script, folder, flags):
    """Start a command and kill it once it has written so many shards."""
    job = subprocess.Popen(**command(script, folder, flags))
    while job.poll() is None and len(list(folder.glob("shards/*.npz"))) < shards:
        time.sleep(0.005)
    assert job.poll() is None, job.stdout.read().decode()
    os.kill(job.pid, signal.SIGKILL)
    job.communicate()


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """(script, flags) of a joint model and of an ADM model, 16 samples in 16 batches."""
    folder = tmp_path_factory.mktemp("models")
    train(digits(folder / "digits.npz"), folder / "joint", "--iterations", 1)
    th.manual_seed(0)
    model, _ = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **ADM})
    th.save(
        {name: value + 0.01 * th.randn_like(value) for name, value in model.state_dict().items()},
        folder / "adm.pt",
    )
    both = ["--num_samples", 16, "--batch_size", 1, "--seed", 5]
    return {
        "mt_image_sample": ["--model_path", folder / "joint", "--steps", 20, *both],
        "image_sample": ["--model_path", folder / "adm.pt", *both, *(f"--{k}={v}" for k, v in ADM.items())],
    }


@pytest.mark.parametrize("script", ["mt_image_sample", "image_sample"])
def test_a_killed_command_goes_on_to_the_same_file(commands, script, tmp_path):
    _, expected = run(script, tmp_path / "straight", commands[script])
    kill_after(3, script, tmp_path / "killed", commands[script])
    assert not list((tmp_path / "killed").glob("samples_*"))
    printed, found = run(script, tmp_path / "killed", commands[script])
    assert "going on" in printed
    assert found == expected and len(found) == 1
    assert not (tmp_path / "killed" / "shards").exists()


def test_samples_of_another_command_are_not_mixed_in(commands, tmp_path):
    other = [*commands["image_sample"], "--seed", 6]
    _, expected = run("image_sample", tmp_path / "straight", other)
    kill_after(2, "image_sample", tmp_path / "killed", commands["image_sample"])
    printed, found = run("image_sample", tmp_path / "killed", other)
    assert "another command, which are removed" in printed
    assert found == expected


def test_shards_join_into_what_savez_writes(tmp_path):
    random = np.random.RandomState(0)
    images, labels = random.randint(0, 256, (7, 4, 4, 3)).astype(np.uint8), np.arange(7)
    shards = Shards(tmp_path, {"seed": 1})
    for numbers in ([4, 5, 6], [0, 2], [1, 3]):
        shards.add(numbers, {"arr_0": images[numbers], "arr_1": labels[numbers]})
    again = Shards(tmp_path, {"seed": 1})
    assert again.missing(range(9)) == [7, 8]
    names = {"class_names": np.array(["a", "b"])}
    views = again.join(6, lambda shape: tmp_path / f"{shape[0]}.npz", names)
    np.savez(tmp_path / "expected.npz", arr_0=images[:6], arr_1=labels[:6], **names)
    assert (tmp_path / "6.npz").read_bytes() == (tmp_path / "expected.npz").read_bytes()
    assert np.array_equal(views["arr_0"], images[:6]) and not views["arr_0"].flags.writeable
    with pytest.raises(UserError, match="2 of 9 samples are not in"):
        again.join(9, lambda shape: tmp_path / "9.npz")


def test_a_torn_shard_counts_as_missing(tmp_path):
    shards = Shards(tmp_path, {})
    shards.add([0], {"arr_0": np.zeros((1, 2))})
    shards.add([1], {"arr_0": np.ones((1, 2))})
    path = tmp_path / "shards" / "000000001.npz"
    path.write_bytes(path.read_bytes()[:100])
    assert Shards(tmp_path, {}).missing([0, 1]) == [1]


def test_rows_are_never_together_in_memory(tmp_path):
    made = (np.full((3,), k, np.int32) for k in range(5))
    write_npz(tmp_path / "rows.npz", {"a": Rows((5, 3), np.int32, made), "b": np.array(["x"])})
    found = mapped_npz(tmp_path / "rows.npz")
    assert found["a"].tolist() == [[k] * 3 for k in range(5)] and found["b"].tolist() == ["x"]


def test_fingerprints_tell_weights_apart():
    linear = th.nn.Linear(3, 3)
    before = fingerprint(linear)
    assert fingerprint(linear) == before
    linear.weight.data[0, 0] += 1e-3
    assert fingerprint(linear) != before


def test_execution_follows_flags_and_device():
    flags = dict(precision="auto", compile="auto", channels_last="auto")
    assert Execution.from_flags(flags, th.device("cpu")) == Execution("fp32", False, False, "cpu")
    chosen = Execution.from_flags(
        dict(precision="bf16", compile="true", channels_last="true"), th.device("cpu")
    )
    assert chosen == Execution("bf16", True, True, "cpu")
    network = Execution("bf16", channels_last=True).prepare(th.nn.Conv2d(4, 4, 3))
    assert network.weight.is_contiguous(memory_format=th.channels_last)
    with chosen.running():
        assert network(th.zeros(1, 4, 5, 5)).dtype == th.bfloat16


def test_the_random_numbers_of_rounds_do_not_depend_on_an_interruption(tmp_path, monkeypatch):
    args = SimpleNamespace(num_samples=6, batch_size=2, seed=None)
    monkeypatch.setattr(logger, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(logger, "log", lambda *_: None)

    def draw(k, stop=None):
        if k == stop:
            raise KeyboardInterrupt
        return [th.rand(2, 3)]

    th.manual_seed(1)
    expected = th.rand(6, 3).numpy()
    th.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        cli.sample(args, lambda k: draw(k, 2), Execution())
    th.manual_seed(99)
    cli.sample(args, draw, Execution())
    assert np.array_equal(np.load(tmp_path / "samples_6x3.npz")["arr_0"], expected)
