"""experiments/representation_metrics.py: what it measures, on a model whose representation is an image's mean colour."""

import json

import numpy as np
import pytest
import torch as th
from PIL import Image

from tests.test_ldm_conditioning import clip  # noqa: F401 (a fixture)
from tests.test_ldm_scripts_sample import run, write_colour_run, write_run  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Twelve captioned images, each of one colour, of which four are held out."""
    folder = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for number in range(12):
        Image.new("RGB", (16, 16), tuple(generator.integers(0, 256, 3).tolist())).save(
            folder / f"{number:02}.png"
        )
        (folder / f"{number:02}.txt").write_text("a cat\n" if number % 2 else "dog\n")
    return folder


@pytest.fixture(scope="module")
def colour_run(tmp_path_factory, clip):  # noqa: F811
    return write_colour_run(tmp_path_factory.mktemp("colour") / "run", clip)


def test_nearest(run):  # noqa: F811
    from representation_metrics import nearest  # which `run` finds

    among = th.eye(8)
    assert nearest(3 * among, among) == {"top1": 1.0, "top5": 1.0}
    # The second is the third's, and only behind its own; the first two are their own.
    found = th.stack([among[0], among[1], 0.9 * among[2] + among[1]])
    assert nearest(found, among) == {"top1": pytest.approx(2 / 3), "top5": 1.0}
    assert nearest(among[[0, 0]], among, th.tensor([0, 7])) == {"top1": 0.5, "top5": 0.5}
    # What says nothing finds nothing.
    assert nearest(th.zeros(3, 8), among) == {"top1": 0.0, "top5": 0.0}


def test_what_is_measured(run, colour_run, colours, tmp_path):  # noqa: F811
    options = ["--held_out_every", 3, "--images", 3, "--each", 2, "--strengths", "0,1", "--steps", 2,
               "--times", "0,20", "--batch_size", 4, "--out", tmp_path / "out"]  # fmt: skip
    code, _, err = run("representation_metrics", "--resume", colour_run, "--data_dir", colours, *options)
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (found["images"], found["chosen"]) == (4, 3)
    # The standard form is unknown here, so the mean is 0, and of no direction.
    assert found["read"]["mean_vector"] == {"cosine": 0.0, "plain_cosine": 0.0}
    encoding = found["encoding"]
    assert 0 < encoding["spread"] and 0 < encoding["rms"] and len(encoding["head_error"]) == 32
    assert 0 < encoding["bf16_cosine"]["least"] <= encoding["bf16_cosine"]["mean"] < 1
    assert set(found["read"]["by_time"]) == {"0", "20"}
    assert [part["strength"] for part in found["variations"]["by_strength"]] == [0, 1]
    assert found["variations"]["chance"] == {"top1": pytest.approx(1 / 3), "top5": 1.0}
    assert -1 <= found["drawn"]["cosine_of_image_and_representation"] <= 1
    for name in ("cosine", "variations", "drawn"):
        assert Image.open(tmp_path / "out" / f"{name}.png").width > 60


def test_mistakes_are_one_line(run, colour_run, colours, tmp_path):  # noqa: F811
    plain = write_run(tmp_path / "plain")[0]
    for arguments, said in (
        (["--resume", plain, "--data_dir", colours], "has no vector modality with an extractor"),
        (["--resume", colour_run, "--data_dir", tmp_path / "none"], "none"),
        (["--resume", colour_run, "--data_dir", colours, "--images", "0"], "must be at least 1"),
    ):
        code, _, err = run("representation_metrics", *arguments, "--out", tmp_path / "out")
        assert code == 2 and said in err and err.count("\n") == 1
