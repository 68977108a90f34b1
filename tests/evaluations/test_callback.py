"""Scores inside a training loop."""

import json

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evaluations.callback import RECORD, EvaluationCallback
from guided_diffusion.errors import UserError

from .conftest import sample_images


@pytest.fixture
def callback(batches, network, tmp_path):
    def make(sample, **options):
        options = {"every": 10, "num_samples": 12, "log_dir": tmp_path / "log", "network": network} | options
        return EvaluationCallback(batches[0], sample, **options)

    return make


def noise(count, seed):
    """The k-th image from seed + k; uses the global random state, as samplers do."""
    torch.rand(3)
    return np.concatenate([sample_images(1, seed=seed + k) for k in range(count)])


def test_scores_are_computed_at_their_steps_and_recorded(callback, tmp_path):
    evaluation = callback(noise, seed=5)
    results = {step: evaluation(step) for step in (0, 1, 10, 15, 20)}
    assert [step for step, result in results.items() if result] == [10, 20]
    assert results[10] == results[20]  # the same samples
    assert (results[10].n_samples, results[10].n_reference, results[10].seed) == (12, 24, 5)
    lines = [json.loads(line) for line in (tmp_path / "log" / RECORD).read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20]
    assert lines[0]["fid"] == results[10].fid
    events = EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    assert [event.step for event in events.Scalars("evaluation/fid")] == [10, 20]
    assert events.Scalars("evaluation/recall")[0].value == pytest.approx(results[10].recall)


def test_training_goes_on_as_if_there_had_been_no_evaluation(callback):
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    callback(noise)(10)
    assert torch.equal(torch.rand(4), expected)


def test_tensors_are_taken_as_well_as_arrays(callback):
    from_array = callback(noise)(10)
    assert callback(lambda count, seed: torch.from_numpy(noise(count, seed)))(10) == from_array


def test_what_the_sampler_gets_wrong_is_named(callback):
    with pytest.raises(UserError, match="the sampler's result is float32, images must be uint8"):
        callback(lambda count, seed: torch.zeros(count, 16, 16, 3))(10)
    with pytest.raises(UserError, match="returned 12 images, 13 were asked for"):
        callback(lambda count, seed: sample_images(12), num_samples=13)(10)


def test_a_missing_reference_is_found_before_training(network, tmp_path):
    with pytest.raises(FileNotFoundError):
        EvaluationCallback(
            tmp_path / "no.npz", noise, every=1, num_samples=8, log_dir=tmp_path, network=network
        )


def test_two_ranks_draw_what_one_draws(callback, launch, batches, graph_file, tmp_path):
    alone = callback(noise)(10)
    program = tmp_path / "train.py"
    program.write_text(f"""
import torch.distributed as dist
from evaluations.callback import EvaluationCallback
from evaluations.inception import load_inception
from tests.evaluations.test_callback import noise

dist.init_process_group("gloo")
evaluation = EvaluationCallback({str(batches[0])!r}, noise, every=10, num_samples=12, log_dir={str(tmp_path / "two")!r},
                                network=load_inception({str(graph_file)!r}, "cpu"))
result = evaluation(10)
assert (result is None) == (dist.get_rank() > 0)
dist.destroy_process_group()
""")
    job = launch("torchrun", program, timeout=120)
    assert job.returncode == 0, job.stderr
    together = json.loads((tmp_path / "two" / RECORD).read_text())
    assert together["fid"] == pytest.approx(alone.fid, rel=1e-5)
    assert together["n_samples"] == 12
