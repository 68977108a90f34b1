"""Segmentation scores counted by hand."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from evaluations.segmentation import CITYSCAPES, main, segmentation_scores
from guided_diffusion.errors import UserError
from guided_diffusion.palettes import load_palette, to_indices

VOID = 255
THREE = "200 0 0 red thing\n0 200 0 green thing\n0 0 200 blue thing\n0 0 0 void\n"


@pytest.fixture
def palette(tmp_path):
    (tmp_path / "three.txt").write_text(THREE)
    return load_palette(tmp_path / "three.txt")


def test_scores_counted_by_hand(palette):
    truth = np.array([[0, 0, 0, 0], [1, 1, 1, VOID]])
    prediction = np.array([[0, 0, 0, 1], [1, 1, 0, 2]])
    scores = segmentation_scores([truth], [prediction], palette)
    assert scores.pixel_accuracy == pytest.approx(5 / 7)
    assert scores.accuracy_by_class == {
        "red thing": pytest.approx(3 / 4),
        "green thing": pytest.approx(2 / 3),
        "blue thing": None,  # predicted only where the truth is void
    }
    assert scores.iou_by_class["red thing"] == pytest.approx(3 / 5)
    assert scores.iou_by_class["green thing"] == pytest.approx(2 / 4)
    assert scores.class_accuracy == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert scores.class_iou == pytest.approx((3 / 5 + 2 / 4) / 2)
    assert (scores.n, scores.pixels) == (1, 7)


def test_a_class_that_is_only_predicted_lowers_iou(palette):
    scores = segmentation_scores([np.array([[0, 0]])], [np.array([[0, 2]])], palette)
    assert scores.accuracy_by_class["blue thing"] is None
    assert scores.iou_by_class["blue thing"] == 0
    assert scores.class_iou == pytest.approx((1 / 2 + 0) / 2)


def test_predicted_void_is_a_miss_and_nothing_else(palette):
    scores = segmentation_scores([np.array([[0, 0, 1, 1]])], [np.array([[0, VOID, 1, 1]])], palette)
    assert scores.pixel_accuracy == 3 / 4
    assert scores.iou_by_class == {"red thing": 1 / 2, "green thing": 1, "blue thing": None}


def test_counts_add_up_over_images(palette):
    truth = [np.array([[0, 0]]), np.array([[0, 1]])]
    prediction = [np.array([[0, 1]]), np.array([[0, 1]])]
    scores = segmentation_scores(truth, prediction, palette)
    # Over all pixels, not the mean of each image's scores.
    assert scores.iou_by_class["red thing"] == pytest.approx(2 / 3)
    assert scores.iou_by_class["green thing"] == pytest.approx(1 / 2)
    assert scores.n == 2


def test_colors_count_as_the_nearest_of_the_palette(palette):
    colors = np.array([[[190, 20, 10], [30, 180, 0], [5, 5, 5], [90, 0, 110]]], np.uint8)
    assert to_indices(colors, palette).tolist() == [[0, 1, 3, 2]]


def test_every_cityscapes_color_is_found_through_noise():
    random = np.random.default_rng(0)
    noise = random.integers(-9, 10, (40, 19, 3))
    noisy = (CITYSCAPES.colors.astype(int) + noise).clip(0, 255).astype(np.uint8)
    assert (to_indices(noisy, CITYSCAPES) == np.arange(19)).all()
    rare = np.array(
        [[[0, 0, 90], [0, 0, 110], [111, 74, 0], [0, 0, 0]]], np.uint8
    )  # caravan, trailer, dynamic, black
    assert (to_indices(rare, CITYSCAPES) == 19).all()


def test_cityscapes_has_its_19_classes_in_train_id_order():
    assert len(CITYSCAPES) == 19
    assert [CITYSCAPES.classes[i] for i in (0, 1, 10, 13, 18)] == [
        "road",
        "sidewalk",
        "sky",
        "car",
        "bicycle",
    ]
    assert CITYSCAPES.colors[[0, 13]].tolist() == [[128, 64, 128], [0, 0, 142]]


def test_palette_files_may_be_gimps(tmp_path):
    (tmp_path / "p.gpl").write_text(
        "GIMP Palette\nName: streets\nColumns: 2\n# comment\n 10  20  30\troad\n0,0,0 void\n"
    )
    palette = load_palette(tmp_path / "p.gpl")
    assert palette.classes == ("road",)
    assert palette.colors.tolist() == [[10, 20, 30]]
    assert palette.void_colors.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 red\n", "line 1 of .* is not `R G B name`"),
        ("1 2 3 a\n1 2 300 b\n", "line 2 of"),
        ("0 0 0 void\n", "at least one class"),
        ("1 2 3 a\n3 2 1 a\n", "every name only once"),
    ],
)
def test_unusable_palettes_are_described(tmp_path, text, message):
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        load_palette(tmp_path / "p.txt")


def test_unusable_maps_are_described(palette):
    with pytest.raises(UserError, match="class 7 is not in palette three"):
        to_indices(np.array([[0, 7]]), palette)
    with pytest.raises(UserError, match="float64"):
        to_indices(np.zeros((2, 2)), palette)
    with pytest.raises(UserError, match=r"truth is \[1, 2, 2\], prediction \[1, 3, 3\]"):
        segmentation_scores([np.zeros((2, 2), int)], [np.zeros((3, 3), int)], palette)
    with pytest.raises(UserError, match="void everywhere"):
        segmentation_scores([np.full((2, 2), VOID)], [np.zeros((2, 2), int)], palette)


def test_the_index_after_the_last_class_is_void_as_in_camvid(palette):
    assert segmentation_scores([np.array([[0, 3]])], [np.array([[0, 0]])], palette).pixels == 1


def run(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return [float(line.split(": ")[1]) for line in capsys.readouterr().out.splitlines()]


def test_command_compares_folders_and_npz(capsys, palette, tmp_path):
    truth = np.random.default_rng(0).integers(0, 4, (3, 6, 8))
    prediction = np.where(np.random.default_rng(1).random(truth.shape) < 0.7, truth, 1)
    colors = np.concatenate([palette.colors, palette.void_colors])
    for index in range(3):
        for folder in ("truth", "prediction"):
            (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(truth[index].astype(np.uint8)).save(tmp_path / "truth" / f"{index}.png")
        Image.fromarray(colors[prediction[index]]).save(tmp_path / "prediction" / f"{index}.png")
    np.savez(tmp_path / "truth.npz", arr_0=truth.astype(np.int16))
    np.savez(tmp_path / "prediction.npz", arr_0=colors[prediction])
    options = ("--palette", tmp_path / "three.txt", "--json", tmp_path / "out.json")
    from_folders = run(capsys, tmp_path / "truth", tmp_path / "prediction", *options)
    assert run(capsys, tmp_path / "truth.npz", tmp_path / "prediction.npz", *options) == from_folders
    scores = segmentation_scores(truth, prediction, palette)
    assert from_folders == [scores.pixel_accuracy, scores.class_accuracy, scores.class_iou]
    assert json.loads((tmp_path / "out.json").read_text())["n"] == 3


def test_cityscapes_files_pair_by_place_and_raw_ids_are_translated(capsys, tmp_path):
    for folder in ("truth/ulm", "prediction/ulm"):
        (tmp_path / folder).mkdir(parents=True)
    ids = np.array([[7, 26], [23, 0]], np.uint8)  # road, car, sky, unlabeled
    Image.fromarray(ids).save(tmp_path / "truth/ulm/ulm_000_gtFine_labelIds.png")
    painted = CITYSCAPES.colors[np.array([[0, 13], [10, 10]])]
    Image.fromarray(painted).save(tmp_path / "prediction/ulm/ulm_000_leftImg8bit.png")
    assert run(capsys, tmp_path / "truth", tmp_path / "prediction") == [1, 1, 1]


@pytest.mark.parametrize(
    ("array", "name", "message"),
    [
        (np.full((4, 4), 31000, np.uint16), "a.png", "class 31000 is not in palette three"),
        (np.full((4, 4), 31000, np.uint16), "a_gtFine_labelIds.png", "class 31000 is no number of a class"),
        (np.full((4, 4, 3), 2, np.uint8), "a.png", r"colour \(2, 2, 2\) is not in palette three"),
    ],
)
def test_maps_of_wrong_numbers_are_named(capsys, palette, tmp_path, array, name, message):
    for folder in ("truth", "found"):
        (tmp_path / folder).mkdir()
        Image.fromarray(array).save(tmp_path / folder / name)
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "truth"), str(tmp_path / "found"), "--palette", str(tmp_path / "three.txt")])
    line = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(rf"{name}: {message}", line) and line.count("\n") == 1


def test_maps_that_do_not_pair_are_named(capsys, palette, tmp_path):
    for folder, name in (("a", "1"), ("b", "2")):
        (tmp_path / folder).mkdir()
        Image.new("L", (4, 4)).save(tmp_path / folder / f"{name}.png")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert "2 do not pair, such as 1" in capsys.readouterr().err


def test_camvid_files_are_read_as_they_are(unpacked_dev_data, tmp_path):
    folder = unpacked_dev_data("camvid.tar") / "camvid" / "valannot"
    names = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()
    (tmp_path / "camvid.txt").write_text("".join(f"{i} {i} {i} {name}\n" for i, name in enumerate(names)))
    palette = load_palette(tmp_path / "camvid.txt")
    truth = [np.asarray(Image.open(file)) for file in sorted(folder.iterdir())[:20]]
    road = names.index("road")
    scores = segmentation_scores(truth, [np.full_like(one, road) for one in truth], palette)
    counted = np.concatenate([one[one < 11] for one in truth])  # 11 is void
    share = (counted == road).mean()
    present = len(np.unique(counted))
    assert scores.pixel_accuracy == pytest.approx(share)
    assert scores.class_accuracy == pytest.approx(1 / present)
    assert scores.class_iou == pytest.approx(share / present)
