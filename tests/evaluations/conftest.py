"""What the evaluator's tests share: the small network, images, and the scripts run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evaluations.inception import seeded_inception

from .seeded_files import write_graph

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def network():
    """The seeded network: 1/16 of the channels, random weights."""
    return seeded_inception()


@pytest.fixture(scope="session")
def graph_file(tmp_path_factory):
    """The same network as a TensorFlow graph file."""
    return write_graph(tmp_path_factory.mktemp("weights") / "classify_image_graph_def.pb")


def sample_images(count, seed=0, size=16, brightness=0):
    """Random uint8 images [count, size, size, 3] with some structure: a random colour each, and noise."""
    random = np.random.default_rng(seed)
    base = random.integers(40, 200, (count, 1, 1, 3))
    noise = random.normal(0, 25, (count, size, size, 3))
    return (base + noise + brightness).clip(0, 255).astype(np.uint8)


@pytest.fixture
def batches(tmp_path):
    """A reference of 24 images and 20 samples, as .npz files."""
    np.savez(tmp_path / "ref.npz", arr_0=sample_images(24))
    np.savez(tmp_path / "samples.npz", arr_0=sample_images(20, seed=1, brightness=20))
    return tmp_path / "ref.npz", tmp_path / "samples.npz"


@pytest.fixture
def script():
    """script("evaluator.py", arguments...): the finished process."""

    def run(name, *arguments, rc=0):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, f"evaluations/{name}", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == rc, f"{done.stdout}\n{done.stderr}"
        return done

    return run


def one_error_line(done):
    """The message of a script that failed as it should: one line on standard error, no traceback."""
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0] == lines[-1], done.stderr
    assert "Traceback" not in done.stderr
    return errors[0]
