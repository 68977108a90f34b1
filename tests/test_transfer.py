"""Data derived from labelled images, and the matrix of what tasks do to each other."""

import importlib
import json

import numpy as np
import pytest

from tests.conftest import ROOT


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    return importlib.import_module


def test_the_map_parts_two_levels_of_brightness(module):
    brighter = module("derive_modalities").brighter
    truth = np.zeros((8, 8), bool)
    truth[2:5, 3:7] = True
    image = np.where(truth, 200, 40)[..., None].repeat(3, axis=2)
    image[..., 0] += np.random.RandomState(0).randint(0, 20, (8, 8))
    assert np.array_equal(brighter(image.astype(np.uint8)), truth)
    assert not brighter(np.full((8, 8, 3), 7, np.uint8)).any()  # one level has no foreground


def test_the_representation_is_uncorrelated_and_of_variance_one(module):
    """In the part it is fitted to; the first component goes along the widest spread."""
    derive = module("derive_modalities")
    rows = np.random.RandomState(0).randn(200, 5) * [10, 1, 3, 0.5, 2]
    fitted = np.arange(200) < 150
    vectors = derive.principal(rows, fitted, 3)
    assert vectors.shape == (200, 3) and vectors.dtype == np.float32
    moments = vectors[fitted].T.astype(float) @ vectors[fitted] / 150
    assert np.allclose(moments, np.eye(3), atol=1e-4)
    assert np.corrcoef(vectors[:, 0], rows[:, 0])[0, 1] > 0.99
    with pytest.raises(ValueError, match="--components 6: these images have 5"):
        derive.principal(rows, fitted, 6)


def test_blocks_are_averaged(module):
    images = np.zeros((1, 32, 32, 1), np.uint8)
    images[0, :2, :2] = [[[0], [100]], [[200], [255]]]
    found = module("derive_modalities").coarse(images)
    assert found.shape == (1, 256)
    assert np.allclose(found[0, :2], [555 / 4 / 127.5 - 1, -1])


def test_changes_are_those_of_the_same_seed(module, tmp_path):
    """The label alone 2 and 4, with the map 1 and 3: 50 and 25 % better; the map has no run alone."""
    losses = {
        "label-seed0": 2.0,
        "label-seed1": 4.0,
        "label_map-seed0": 1.0,
        "label_map-seed1": 3.0,
        "all-seed1": 5.0,
    }
    for name, value in losses.items():
        (tmp_path / f"score-{name}").mkdir()
        scores = {"KL_label": value, "KL_map": 9.0}
        (tmp_path / f"score-{name}" / "scores.json").write_text(json.dumps(scores))
    transfer = module("transfer_matrix")
    changes = transfer.matrix(transfer.read(tmp_path))
    assert changes == {("label", "map"): [50.0, 25.0], ("label", "all"): [-25.0]}
    assert "| label | – | – | – | +37.5 ± 17.7 | – | -25.0 |" in transfer.markdown(changes)
    transfer.draw(changes, tmp_path / "transfer.png")
    assert (tmp_path / "transfer.png").stat().st_size > 1000
