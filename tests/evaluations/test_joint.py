"""Metrics of generated pairs: on pairs whose answer is known, and through the command."""

import json

import numpy as np
import pytest
import torch

from evaluations.joint import main, read_partner
from evaluations.joint_metrics import (
    fit_classifier,
    joint_frechet,
    label_agreement,
    map_pair_miou,
    masked_pair_miou,
    partner_scale,
    regrouped_frechet,
)
from evaluations.segmentation import CITYSCAPES
from guided_diffusion.errors import UserError

from .conftest import sample_images


def paired(n, seed=0, noise=0.3):
    """Features whose partners are the same features and some noise."""
    random = torch.Generator().manual_seed(seed)
    pool = torch.randn(n, 6, generator=random)
    return pool, pool[:, :3] * 0.01 + noise * 0.01 * torch.randn(n, 3, generator=random)


def test_joint_frechet_sees_wrong_partners_where_frechet_cannot():
    real, samples = paired(800), paired(800, seed=1)
    scale = partner_scale(*real)
    shuffled = samples[0], samples[1].flip(0)
    right, wrong = joint_frechet(real, samples, scale), joint_frechet(real, shuffled, scale)
    assert wrong > 20 * right
    # Each half by itself is as good as before.
    assert joint_frechet((real[1],) * 2, (shuffled[1],) * 2, 1.0) < wrong / 20


def test_partner_scale_makes_both_halves_equally_long():
    pool, partner = paired(50)
    scale = partner_scale(pool, partner)
    assert (partner * scale).norm(dim=1).mean() == pytest.approx(pool.norm(dim=1).mean().item(), rel=1e-5)
    assert partner_scale(pool, torch.zeros(50, 2)) == 1.0


def test_joint_frechet_of_known_gaussians():
    mean_a, mean_b = torch.zeros(2), torch.tensor([3.0, 0.0])
    spread = torch.tensor([[1.0], [-1.0]]).double()
    a, b = (mean_a[:1] + spread, mean_a[1:] + spread), (mean_b[:1] + spread, mean_b[1:] + spread)
    assert joint_frechet(a, b, 2.0) == pytest.approx(9.0)


def test_regrouping_tells_one_distribution_from_two():
    same = joint_frechet(paired(400), paired(400, seed=1), 100.0)
    assert same == pytest.approx(regrouped_frechet(paired(400), paired(400, seed=1), 100.0), rel=0.8)
    other = paired(400, seed=1, noise=2.0)
    assert joint_frechet(paired(400), other, 100.0) > 3 * regrouped_frechet(paired(400), other, 100.0)


def test_label_agreement_leaves_unknown_labels_out():
    assert label_agreement(np.array([0, 1, 2, -1]), np.array([0, 1, 0, 0])) == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="3 generated labels, but 2 found"):
        label_agreement(np.zeros(3, int), np.zeros(2, int))
    with pytest.raises(UserError, match="no generated label is known"):
        label_agreement(np.full(3, -1), np.zeros(3, int))


def test_classifier_finds_classes_and_knows_how_well():
    random = torch.Generator().manual_seed(0)
    labels = np.arange(300) % 3 * 5  # classes 0, 5, 10
    centers = torch.randn(3, 8, generator=random) * 2
    features = centers[torch.from_numpy(labels // 5)] + torch.randn(300, 8, generator=random)
    fresh = centers[torch.from_numpy(labels // 5)] + torch.randn(300, 8, generator=random)
    classifier = fit_classifier(features, labels)
    accuracy = label_agreement(labels, classifier.predict(fresh))
    assert accuracy > 0.9
    assert classifier.accuracy == pytest.approx(accuracy, abs=0.1)
    meaningless = fit_classifier(torch.randn(300, 8, generator=random), labels)
    assert meaningless.accuracy < 0.6
    with pytest.raises(UserError, match="at least two classes"):
        fit_classifier(features, np.zeros(300, int))


def test_masked_copies_that_fit_and_that_do_not():
    image = np.full((1, 8, 8, 3), 200, np.uint8)
    copy = image.copy()
    copy[:, :4] = 128
    assert masked_pair_miou(image, copy) == 1
    noisy = (copy.astype(int) + np.random.default_rng(0).integers(-5, 6, copy.shape)).astype(np.uint8)
    assert masked_pair_miou(image, noisy) == 1
    # Below the mask the copy shows another image in 8 of the 32 pixels, which are neither masked nor alike.
    other = copy.copy()
    other[:, 4] = 20
    assert masked_pair_miou(image, other) == pytest.approx((32 / 40 + 24 / 32) / 2)
    assert masked_pair_miou(image, image) == 1  # nothing masked, nothing different


def test_pixels_that_are_grey_themselves_tell_nothing():
    image = np.full((1, 4, 4, 3), 128, np.uint8)
    image[:, :2] = 20
    copy = image.copy()
    copy[:, 0] = 128
    assert masked_pair_miou(image, copy) == 1


def test_generated_maps_against_found_ones():
    found = np.zeros((2, 4, 4), int)
    generated = found.copy()
    generated[0, :2] = 1
    # Of 32 road pixels 24 are right, and 8 are sidewalk where there is none.
    assert map_pair_miou(generated, found, CITYSCAPES) == pytest.approx((24 / 32 + 0) / 2)


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (np.arange(4), "labels"),
        (np.eye(4, dtype=np.float32), "labels"),
        (np.zeros((4, 8, 8), np.uint8), "maps"),
        (np.zeros((4, 8, 8, 3), np.uint8), "images"),
        (np.linspace(-1, 1, 12).reshape(4, 3), "vectors"),
    ],
)
def test_the_other_half_is_told_by_its_type_and_shape(tmp_path, array, kind):
    np.savez(tmp_path / "a.npz", x=array)
    assert read_partner(tmp_path / "a.npz", "x").holds == kind


def test_probabilities_become_labels(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([[0.1, 0.9], [0.7, 0.3], [0, 0]], np.float32))
    assert read_partner(tmp_path / "a.npz", "x").data.tolist() == [1, 0, -1]


@pytest.mark.parametrize(
    "array", [np.zeros((4, 8, 8, 3), np.float32), np.full((4, 3), np.nan), np.array(["a"])]
)
def test_other_data_are_refused(tmp_path, array):
    np.savez(tmp_path / "a.npz", x=array)
    with pytest.raises(UserError, match="x of .*a.npz (is|holds NaN)"):
        read_partner(tmp_path / "a.npz", "x")


def run(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return dict(line.split(": ") for line in capsys.readouterr().out.splitlines())


def bright_and_dark(n, seed, wrong=0):
    """Images of two classes, bright and dark; the first `wrong` carry the other's label."""
    labels = np.arange(n) % 2
    array = sample_images(n, seed=seed) // 2 + (labels * 110).astype(np.uint8)[:, None, None, None]
    labels[:wrong] = 1 - labels[:wrong]
    return {"arr_0": array, "arr_1": labels}


def test_command_on_labels_joint_and_conditional(capsys, graph_file, tmp_path):
    np.savez(tmp_path / "ref.npz", **bright_and_dark(60, 0))
    joint, conditional = bright_and_dark(40, 1, wrong=10), bright_and_dark(30, 2)
    np.savez(tmp_path / "joint.npz", arr_0=joint["arr_0"], label=np.eye(2, dtype=np.float32)[joint["arr_1"]])
    np.savez(tmp_path / "cond.npz", arr_0=conditional["arr_0"], label=conditional["arr_1"])
    arguments = [
        tmp_path / "ref.npz",
        tmp_path / "joint.npz",
        "--modality",
        "label",
        "--ref_modality",
        "arr_1",
    ]
    arguments += [
        "--conditional",
        tmp_path / "cond.npz",
        "--inception",
        graph_file,
        "--json",
        tmp_path / "o.json",
    ]
    printed = run(capsys, *arguments)
    assert float(printed["Classifier accuracy on held-out references"]) > 0.9
    assert float(printed["Label agreement"]) == pytest.approx(0.75, abs=0.08)
    assert float(printed["Label agreement, conditional"]) > 0.9
    result = json.loads((tmp_path / "o.json").read_text())
    assert (result["kind"], result["n_reference"], result["n_samples"]) == ("labels", 60, 40)
    assert result["consistency"]["n_conditional"] == 30
    assert result["joint_frechet"] == float(printed["Joint Frechet distance"])


def test_command_takes_labels_that_another_classifier_found(capsys, graph_file, tmp_path):
    np.savez(tmp_path / "ref.npz", **bright_and_dark(20, 0))
    np.savez(tmp_path / "s.npz", **bright_and_dark(20, 1))
    np.savez(tmp_path / "found.npz", arr_0=np.zeros(20, int))
    printed = run(
        capsys,
        tmp_path / "ref.npz",
        tmp_path / "s.npz",
        "--predicted",
        tmp_path / "found.npz",
        "--inception",
        graph_file,
    )
    assert float(printed["Label agreement"]) == 0.5
    assert "Classifier accuracy on held-out references" not in printed


def test_labels_of_every_file_are_compared_by_the_names_of_their_classes(capsys, graph_file, tmp_path):
    arrays = bright_and_dark(20, 1)
    swapped = {"label": 1 - arrays["arr_1"], "class_names": ["bright", "dark"]}
    reference = bright_and_dark(20, 0)
    np.savez(
        tmp_path / "ref.npz",
        arr_0=reference["arr_0"],
        label=reference["arr_1"],
        class_names=["dark", "bright"],
    )
    np.savez(tmp_path / "s.npz", arr_0=arrays["arr_0"], **swapped)
    np.savez(tmp_path / "found.npz", arr_0=swapped["label"], class_names=swapped["class_names"])
    np.savez(tmp_path / "numbered.npz", arr_0=arrays["arr_1"])  # as the reference numbers them
    np.savez(tmp_path / "other.npz", arr_0=arrays["arr_1"], class_names=["dark", "grey"])
    words = [tmp_path / "ref.npz", tmp_path / "s.npz", "--modality", "label", "--inception", graph_file]
    for found in ("found", "numbered"):
        assert float(run(capsys, *words, "--predicted", tmp_path / f"{found}.npz")["Label agreement"]) == 1
    with pytest.raises(SystemExit):
        main([*map(str, words), "--predicted", str(tmp_path / "other.npz")])
    assert "classes that are not known: grey; known are dark, bright" in capsys.readouterr().err


def test_command_on_masked_copies_maps_and_vectors(capsys, graph_file, tmp_path):
    (tmp_path / "two.txt").write_text("200 0 0 red\n0 200 0 green\n0 0 0 void\n")
    for seed, name in enumerate(("ref", "s")):
        array = sample_images(12, seed=seed)
        masked = array.copy()
        masked[:, :8] = 128
        maps = (array[..., 0] > 100).astype(np.uint8)
        np.savez(
            tmp_path / f"{name}.npz", arr_0=array, masked=masked, maps=maps, vec=array.mean((1, 2)) - 100
        )
    np.savez(tmp_path / "found.npz", arr_0=maps)
    files = [tmp_path / "ref.npz", tmp_path / "s.npz", "--inception", graph_file]
    assert float(run(capsys, *files, "--modality", "masked")["Pair mIoU"]) > 0.9
    options = ["--palette", tmp_path / "two.txt", "--predicted", tmp_path / "found.npz"]
    assert float(run(capsys, *files, "--modality", "maps", *options)["Pair mIoU"]) == 1
    assert "Pair mIoU" not in run(capsys, *files, "--modality", "vec")


def test_mistakes_are_one_clear_line(capsys, graph_file, tmp_path):
    np.savez(tmp_path / "labels.npz", **bright_and_dark(12, 0))
    np.savez(tmp_path / "maps.npz", arr_0=sample_images(12), arr_1=np.zeros((12, 4, 4), np.uint8))
    np.savez(tmp_path / "short.npz", arr_0=sample_images(12), arr_1=np.zeros(5, int))

    def fails(*names, options=()):
        with pytest.raises(SystemExit) as stopped:
            main(
                [*(str(tmp_path / f"{name}.npz") for name in names), "--inception", str(graph_file), *options]
            )
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "not of one kind" in fails("labels", "maps")
    assert "12 images, but arr_1 of" in fails("labels", "short")
    assert "has no array nothing" in fails("labels", "labels", options=("--modality", "nothing"))
    assert "--palette says which" in fails("maps", "maps")
