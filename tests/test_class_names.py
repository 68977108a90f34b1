"""Classes have names, from the training's folder to every later one."""

import numpy as np
import pytest
import torch as th
import yaml
from PIL import Image

from guided_diffusion import checkpoint_util
from guided_diffusion.figures import label_captions
from guided_diffusion.mt.model import JointModel
from tests.mt_driver import MODEL, TRAIN, in_process, refusal, train

GREY = {"cat": 40, "dog": 130, "owl": 220, "yak": 90}


def folder(path, names, count=8):
    """Grey images of 8x8 in a folder for each class."""
    random = np.random.default_rng(0)
    for name in names:
        (path / name).mkdir(parents=True)
        for i in range(count):
            pixels = (GREY[name] + random.integers(0, 9, (8, 8))).astype(np.uint8)
            Image.fromarray(pixels).save(path / name / f"{i}.png")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(a run that was trained on cats, dogs and owls, its data)"""
    made = tmp_path_factory.mktemp("named")
    data = folder(made / "data", ["cat", "dog", "owl"])
    train(data, made / "run", "--iterations", 2, "--save_interval", 2)
    return made / "run", data


def config(folder):
    """Of the newest checkpoint of a run."""
    return checkpoint_util.load_complete(checkpoint_util.find_complete_checkpoint(folder))["config"]


def bound(run, data, out, *flags):
    in_process(
        "mt_image_nll", "--model_path", run, "--data_dir", data, "--log_dir", out, "--steps", 3, *flags
    )
    with np.load(out / "nll.npz") as terms:
        return terms["L2_label"]


def test_they_are_kept_with_the_model(run):
    written = yaml.safe_load((run[0] / "config.yaml").read_text())
    for kept in (written, config(run[0]), JointModel.load(str(run[0])).flags):
        assert kept["class_names"] == ["cat", "dog", "owl"]
        assert kept["label_from"] == "folder" and kept["num_classes"] == 3


def test_a_folder_without_the_first_class_keeps_the_numbers(run, tmp_path):
    later = folder(tmp_path / "later", ["dog", "owl"], count=3)
    images = np.stack([np.asarray(Image.open(p)) for p in sorted(later.rglob("*.png"))])
    for name, labels in (("right", [1, 1, 1, 2, 2, 2]), ("shifted", [0, 0, 0, 1, 1, 1])):
        np.savez(tmp_path / f"{name}.npz", arr_0=images, arr_1=np.array(labels))
    measured = bound(run[0], later, tmp_path / "later_out")
    assert np.allclose(measured, bound(run[0], tmp_path / "right.npz", tmp_path / "right_out"), rtol=1e-5)
    assert not np.allclose(measured, bound(run[0], tmp_path / "shifted.npz", tmp_path / "out"), rtol=1e-3)


def test_a_run_goes_on_with_a_part_of_its_classes_and_refuses_others(run, tmp_path, capsys):
    part = folder(tmp_path / "part", ["dog", "owl"])
    strange = folder(tmp_path / "strange", ["dog", "yak"])
    first = folder(tmp_path / "first", ["cat", "dog", "owl"])
    train(first, tmp_path / "run", "--iterations", 1)
    train(part, tmp_path / "run", "--iterations", 2)
    stored = config(tmp_path / "run")
    assert stored["class_names"] == ["cat", "dog", "owl"] and stored["num_classes"] == 3
    flags = [*MODEL, *TRAIN, "--data_dir", strange, "--sample_steps", 0, "--iterations", 3]
    message = "does not know: yak; it knows cat, dog, owl"
    assert message in refusal(capsys, "mt_image_train", *flags, "--log_dir", tmp_path / "run")
    begun = (*flags, "--log_dir", tmp_path / "new", "--init_from", run[0])
    assert message in refusal(capsys, "mt_image_train", *begun)
    assert message in refusal(
        capsys, "mt_image_nll", "--model_path", run[0], "--data_dir", strange, "--log_dir", tmp_path / "nll"
    )
    train(part, tmp_path / "begun", "--iterations", 1, "--init_from", run[0])
    stored = config(tmp_path / "begun")
    assert stored["class_names"] == ["cat", "dog", "owl"]


def test_labels_are_given_by_name_and_samples_say_them(run, tmp_path, capsys):
    def sample(given, out):
        in_process(
            "mt_image_sample", "--model_path", run[0], "--log_dir", tmp_path / out, "--steps", 2, "--given", given
        )  # fmt: skip
        with np.load(next((tmp_path / out).glob("samples_*.npz"))) as arrays:
            return dict(arrays)

    by_name, by_number = sample("label=owl,cat", "name"), sample("label=2,0", "number")
    assert by_name["label"].argmax(axis=1).tolist() == [2, 0]
    assert np.array_equal(by_name["arr_0"], by_number["arr_0"])
    assert by_name["class_names"].tolist() == ["cat", "dog", "owl"]
    wrong = ("mt_image_sample", "--model_path", run[0], "--log_dir", tmp_path / "no", "--given", "label=cow")
    assert "'cow' is no class: the classes are cat, dog, owl" in refusal(capsys, *wrong)


def test_captions_are_names():
    assert label_captions([[2, 0]], ["cat", "dog", "owl"]) == ["owl", "cat"]
    assert label_captions([[2, 0], [1, 1]]) == ["2 1", "0 1"]


def test_the_user_may_number_the_classes(tmp_path):
    data = folder(tmp_path / "data", ["dog", "owl"])
    train(data, tmp_path / "run", "--iterations", 1, "--class_names", "owl,cat,dog")
    again = ("--config", tmp_path / "run/config.yaml")  # a list there
    train(data, tmp_path / "again", "--iterations", 1, *again)
    for name in ("run", "again"):
        stored = config(tmp_path / name)
        assert stored["class_names"] == ["owl", "cat", "dog"] and stored["num_classes"] == 3


def test_a_run_of_a_former_version_goes_on_with_numbers(run, tmp_path):
    data = folder(tmp_path / "data", ["cat", "dog", "owl"])
    train(data, tmp_path / "run", "--iterations", 1)
    path = checkpoint_util.find_complete_checkpoint(tmp_path / "run")
    content = checkpoint_util.load_complete(path)
    for name in ("class_names", "label_from"):
        del content["config"][name]
    th.save(content, path)
    assert JointModel.load(str(path)).class_names == ()
    assert len(bound(path, data, tmp_path / "nll")) == 24
    train(data, tmp_path / "run", "--iterations", 2)
    stored = config(tmp_path / "run")
    assert stored["class_names"] == ["cat", "dog", "owl"]
