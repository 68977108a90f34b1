"""Reference batches: from folders, .npz files and class lists, under ADM's keys."""

import json

import numpy as np
import pytest
from PIL import Image

from evaluations import evaluator
from evaluations.evaluator import activations, given_statistics
from evaluations.images import open_images
from evaluations.inception_weights import seeded_weights
from evaluations.make_reference import main, pick, read_classes, select
from tests.compare import agree

from .conftest import ROOT, sample_images
from .seeded_files import write_graph

CLASSES = ("cat", "dog", "owl")


@pytest.fixture
def folder(tmp_path):
    """Twelve images in folders of three classes."""
    for index, image in enumerate(sample_images(12)):
        path = tmp_path / "photos" / CLASSES[index % 3] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "photos"


def test_reference_has_adms_keys_and_the_statistics_of_all_images(
    script, folder, graph_file, network, tmp_path
):
    out = tmp_path / "ref.npz"
    script("make_reference.py", folder, out, "--inception", graph_file, "--num_images", 5, "--seed", 3)
    arrays = np.load(out)
    assert {"arr_0", "mu", "sigma", "mu_s", "sigma_s"} <= set(arrays)
    assert arrays["arr_0"].shape == (5, 16, 16, 3) and arrays["arr_0"].dtype == np.uint8
    everything = activations(open_images(folder), network, progress=False)
    pool, spatial = everything.pool.double().numpy(), everything.spatial.double().numpy()
    agree(arrays["mu"], pool.mean(0), rtol=1e-5)
    agree(arrays["sigma"], np.cov(pool, rowvar=False), rtol=1e-5)
    agree(arrays["mu_s"], spatial.mean(0), rtol=1e-5)
    agree(arrays["sigma_s"], np.cov(spatial, rowvar=False), rtol=1e-5)
    meta = json.loads(str(arrays["meta"]))
    assert (meta["n_statistics"], meta["n_images"], meta["seed"]) == (12, 5, 3)
    assert len(meta["weights_sha256"]) == 64
    assert not list(tmp_path.glob("*.unfinished"))


def test_evaluator_accepts_what_make_reference_writes(capsys, batches, graph_file, tmp_path):
    main([str(batches[0]), str(tmp_path / "made.npz"), "--inception", str(graph_file)])
    capsys.readouterr()
    scores = []
    for reference in (batches[0], tmp_path / "made.npz"):
        evaluator.main([str(reference), str(batches[1]), "--inception", str(graph_file)])
        lines = capsys.readouterr().out.splitlines()
        scores.append([float(line.split(": ")[1]) for line in lines if ": " in line])
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)


def test_class_list_selects_and_labels_follow_the_alphabet(folder, tmp_path):
    (tmp_path / "classes.txt").write_text("# birds\nowl  Strix aluco\n\ncat\n")
    classes = read_classes(tmp_path / "classes.txt")
    assert classes == ["owl", "cat"]
    selection = select(folder, classes=classes)
    assert selection.images.shape[0] == 8
    assert selection.labels.tolist() == [0] * 4 + [2] * 4  # cat, owl among cat, dog, owl


def test_a_flat_folder_has_its_classes_in_the_file_names(tmp_path):
    for index, image in enumerate(sample_images(6)):
        Image.fromarray(image).save(tmp_path / f"{CLASSES[index % 3]}_{index}.png")
    assert select(tmp_path).labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert select(tmp_path, classes=["dog"]).images.shape[0] == 2


def test_npz_classes_are_numbers(tmp_path):
    array = sample_images(6)
    np.savez(tmp_path / "a.npz", arr_0=array, arr_1=np.array([3, 1, 3, 0, 1, 3]))
    selection = select(tmp_path / "a.npz", classes=["3", "0"])
    assert selection.labels.tolist() == [3, 3, 0, 3]
    assert np.array_equal(selection.images.array, array[[0, 2, 3, 5]])


def test_labels_are_written_for_the_kept_images(folder, graph_file, tmp_path):
    out = tmp_path / "ref.npz"
    main([str(folder), str(out), "--inception", str(graph_file), "--labels", "--num_images", "7"])
    arrays = np.load(out)
    assert arrays["arr_1"].shape == (7,)
    by_label = {label: {p.tobytes() for p in next(select(folder, classes=[name]).images.batches(0, 4, 4))}
                for label, name in enumerate(CLASSES)}  # fmt: skip
    for image, label in zip(arrays["arr_0"], arrays["arr_1"], strict=True):
        assert image.tobytes() in by_label[label]


def test_pick_takes_images_by_number(tmp_path):
    array = sample_images(10)
    np.savez(tmp_path / "a.npz", arr_0=array)
    indices = np.array([1, 4, 5, 9])
    assert np.array_equal(pick(open_images(tmp_path / "a.npz"), indices, batch_size=3), array[indices])


@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_two_ranks_write_what_one_writes(launch, batches, graph_file, tmp_path, launcher):
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    main([str(batches[0]), str(one), "--inception", str(graph_file)])
    program = ROOT / "evaluations/make_reference.py"
    job = launch(launcher, program, batches[0], two, "--inception", graph_file, timeout=120)
    assert job.returncode == 0, job.stderr
    for a, b in zip(given_statistics(one), given_statistics(two), strict=True):
        agree(a.mu, b.mu, rtol=1e-5)
        agree(a.sigma, b.sigma, rtol=1e-5)


def test_statistics_of_other_weights_are_noticed(capsys, batches, graph_file, tmp_path):
    main([str(batches[0]), str(tmp_path / "ref.npz"), "--inception", str(graph_file)])
    other = write_graph(tmp_path / "other.pb", seeded_weights(seed=1))
    evaluator.main([str(tmp_path / "ref.npz"), str(batches[1]), "--inception", str(graph_file)])
    assert "other Inception weights" not in capsys.readouterr().err
    evaluator.main([str(tmp_path / "ref.npz"), str(batches[1]), "--inception", str(other)])
    assert "other Inception weights" in capsys.readouterr().err


def test_mistakes_are_one_clear_line(capsys, folder, graph_file, tmp_path):
    def fails(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments), "--inception", str(graph_file)])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    (tmp_path / "list.txt").write_text("cat\nunicorn\n")
    assert "has no images of class unicorn" in fails(
        folder, tmp_path / "r.npz", "--classes", tmp_path / "list.txt"
    )
    assert "is a file, not a folder" in fails(folder, tmp_path / "list.txt/r.npz")
    assert "is an .npz file" in fails(folder, tmp_path / "r.pt")
    assert "does not exist" in fails(tmp_path / "nothing", tmp_path / "r.npz")
    np.savez(tmp_path / "plain.npz", arr_0=sample_images(4))
    assert "has no labels" in fails(tmp_path / "plain.npz", tmp_path / "r.npz", "--labels")
    assert not (tmp_path / "r.npz").exists()
