"""A judge learns the classes of the data, and its scores tell good samples from bad ones."""

import json

import numpy as np
import pytest

from evaluations.judge import _augment, _images, _tensor, inspect, load_judge, save_judge, score, train_judge
from guided_diffusion.errors import UserError

from .conftest import sample_images


def coloured(count, seed=0, classes=3):
    """Images whose class is their strongest colour, and the classes."""
    labels = np.random.default_rng(seed).integers(0, classes, count)
    images = sample_images(count, seed).astype(np.float32) / 3
    images[np.arange(count), :, :, labels] += 150
    return images.clip(0, 255).astype(np.uint8), labels


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(path of a judge, its accuracy)."""
    path = tmp_path_factory.mktemp("judge") / "judge.pt"
    judge, accuracy = train_judge(*coloured(400), epochs=4)
    save_judge(judge, accuracy, path)
    return path, accuracy


def test_it_learns_the_classes_and_reports_images_it_never_saw(trained):
    path, accuracy = trained
    images, labels = coloured(200, seed=1)
    judge, stored = load_judge(path)
    assert stored == accuracy > 0.95
    assert (inspect(judge, images)[1].argmax(1).numpy() == labels).mean() > 0.95


def test_accuracy_is_that_of_held_out_images():
    """Every tenth image has a class that contradicts its colour: learned by heart it would be right."""
    images, labels = coloured(200)
    labels[::10] = (labels[::10] + 1) % 3
    assert train_judge(images, labels, epochs=4)[1] < 0.2


def test_scores_tell_good_samples_from_bad_ones(trained):
    reference, _ = coloured(150, seed=2)
    good, labels = coloured(150, seed=3)
    same = score(trained[0], reference, reference, None)
    assert same.frechet == pytest.approx(0, abs=1e-6) and same.precision == same.recall == 1
    assert same.label_agreement is None
    fair = score(trained[0], reference, good, labels)
    poor = score(trained[0], reference, 255 - good, (labels + 1) % 3)
    assert fair.label_agreement > 0.95
    assert poor.label_agreement < 0.5
    assert poor.frechet > 3 * fair.frechet
    one_class = score(trained[0], reference, good[labels == 0][:30], None)
    assert 1.2 * one_class.score < fair.score <= 3


def test_augmented_images_are_moved_or_mirrored_copies():
    images = _tensor(coloured(8)[0])
    moved = _augment(images)
    assert moved.shape == images.shape and moved.dtype == images.dtype
    centre = images[0, :, 6:10, 6:10]
    found = [
        (moved[0, :, top : top + 4, left : left + 4] == part).all()
        for part in (centre, centre.flip(2))
        for top in range(4, 9)
        for left in range(4, 9)
    ]
    assert sum(map(bool, found)) == 1


def test_from_the_command_line(trained, tmp_path, script):
    images, labels = coloured(60, seed=4)
    np.savez(tmp_path / "data.npz", arr_0=images, arr_1=labels)
    np.savez(tmp_path / "samples.npz", arr_0=images, label=np.eye(3, dtype=np.float32)[labels])
    result = script("judge.py", "train", tmp_path / "data.npz", tmp_path / "own.pt", "--epochs", 1)
    assert result.stdout.startswith("accuracy on held-out images: ")
    result = script(
        "judge.py",
        *("score", trained[0], tmp_path / "data.npz", tmp_path / "samples.npz"),
        *("--labels", "label", "--json", tmp_path / "scores.json"),
    )
    assert "label agreement: " in result.stdout
    assert json.loads((tmp_path / "scores.json").read_text())["label_agreement"] > 0.95


def test_refusals(trained, tmp_path):
    images, labels = coloured(20)
    with pytest.raises(UserError, match="at least two classes"):
        train_judge(images, labels * 0)
    with pytest.raises(UserError, match="is not a checkpoint that torch can read"):
        (tmp_path / "other.pt").write_bytes(b"something else")
        load_judge(tmp_path / "other.pt")
    with pytest.raises(UserError, match="does not exist"):
        load_judge(tmp_path / "absent.pt")
    with pytest.raises(UserError, match="reference images are .*, samples"):
        score(trained[0], images, images[:, :8, :8], None)


def test_data_as_training_takes_them_are_judged(tmp_path):
    """Grey images [N, H, W, 1] and `labels` in an .npz."""
    images, labels = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8, 1), np.array([0, 1, 0, 1])
    np.savez(tmp_path / "digits.npz", arr_0=images, labels=labels)
    found, classes, _ = _images(str(tmp_path / "digits.npz"), None)
    assert np.array_equal(found, images.repeat(3, axis=3)) and np.array_equal(classes, labels)
