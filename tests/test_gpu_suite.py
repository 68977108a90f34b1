"""benchmarks/gpu_suite.py at toy size on the CPU."""

import json
import subprocess
import sys

import pytest
import torch as th

from benchmarks import gpu_suite
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def suite():
    return gpu_suite.Suite("cpu")


def test_a_network_with_other_weights_is_found(suite):
    """What the checks compare is the device's network with the CPU's."""
    assert suite.network(th.float32)[0] <= 1e-6 and suite.sampler("ddim")[0] <= 1e-6
    weight = next(suite.model.network.parameters())
    with th.no_grad():
        weight += 0.1
        difference, allowed = suite.network(th.float32)
        image = suite.sampler("ddim")
        weight -= 0.1
    assert difference > allowed and image[0] > image[1]


def test_a_check_that_raises_is_reported(suite, monkeypatch):
    def broken():
        raise ValueError("no\nsuch kernel")

    for name in ("network", "sampler"):
        monkeypatch.setattr(suite, name, lambda _: (2.0, 1.0))
    for name in ("gradients", "compiled", "parallel", "sharded"):
        monkeypatch.setattr(suite, name, broken)
    monkeypatch.setattr(suite, "resumed", lambda: True)
    found = {check.name: (check.holds, check.said) for check in suite.checks()}
    assert found["loss and gradients as on the CPU"] == (False, "ValueError: no such kernel")
    assert found["network in float32 as in float32 on the CPU"] == (False, "differs by 2.0e+00, at most 1")
    assert found["a training that was stopped and resumed ends with the same bits"] == (True, "same")


@pytest.mark.slow
def test_the_whole_suite(tmp_path):
    command = [
        sys.executable,
        ROOT / "benchmarks/gpu_suite.py",
        "--minutes",
        "0.1",
        "--out",
        tmp_path,
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert all(check["holds"] is not False for check in results["checks"])
    assert results["timings"]["upstream's way, float32"]["ratio"] == 1 and results["training"]["frechet"] > 0
    assert (tmp_path / "gpu_suite.md").read_text() == gpu_suite.report(results)
