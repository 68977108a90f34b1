"""Datasets of ldm.data: pairs belong together, label colours survive, mistakes are named."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader

from guided_diffusion.config_file import load_with_bases
from guided_diffusion.errors import UserError, UserFileError, UserValueError
from guided_diffusion.image_datasets import center_crop_arr, random_crop_arr
from guided_diffusion.palettes import load_palette, to_indices
from ldm.data.base import Concatenated, FirstStageImages
from ldm.data.cityscapes import Cityscapes
from ldm.data.folders import ImageFolder, read_images
from ldm.data.images import reading_of
from ldm.data.paired import CamVid, Night2Day, ParallelFolders, SideBySide
from ldm.training.data import SeededDataset
from ldm.util import instantiate_from_config
from tests.conftest import sample_image

CAMVID = load_palette("camvid")
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def saved(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def scene(number, height=24, width=32):
    """(photo, class numbers): blocks of classes, each painted in the photo with the grey 20 * class."""
    rng = np.random.default_rng(number)
    classes = rng.integers(0, 12, (height // 4, width // 4)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
    return np.repeat(20 * classes[..., None], 3, 2), classes


@pytest.fixture
def camvid(tmp_path):
    for split, count in (("train", 6), ("val", 2)):
        for i in range(count):
            photo, classes = scene(i)
            saved(photo, tmp_path / f"camvid/{split}/f{i}.png")
            saved(classes, tmp_path / f"camvid/{split}annot/f{i}.png")
    return tmp_path / "camvid"


def to_pixels(x):
    return ((x + 1) * 127.5).round().astype(np.uint8)


def classes_of(item, palette="camvid"):
    return to_indices(to_pixels(item["label_map"]), load_palette(palette))


def test_photo_and_label_map_get_the_same_place_and_flip(camvid):
    # The photo's grey tells the class, so both must agree in every pixel, wherever the cut is.
    data = CamVid(camvid, "train", 16, random_crop=True, random_flip=True, interpolation="nearest")
    seen = set()
    for _ in range(4):
        for i in range(len(data)):
            item = data[i]
            assert item["image"].shape == (16, 16, 3) and item["image"].dtype == np.float32
            assert np.array_equal(to_pixels(item["image"])[..., 0], 20 * classes_of(item))
            seen.add(item["image"].tobytes())
    assert len(seen) > 12  # it does vary


def test_flips_are_flips_of_the_whole_pair(camvid):
    random.seed(0)
    plain = CamVid(camvid, "train", [24, 32])
    flipping = CamVid(camvid, "train", [24, 32], random_flip=True)
    flips = 0
    for i in range(6):
        item, other = plain[i], flipping[i]
        flipped = not np.array_equal(item["image"], other["image"])
        flips += flipped
        for key in ("image", "label_map"):
            assert np.array_equal(other[key], item[key][:, ::-1] if flipped else item[key])
    assert 0 < flips < 6


def test_augmentation_depends_on_seed_epoch_and_index_alone(camvid):
    def draw(seed, epoch, order, workers=0):
        data = CamVid(camvid, "train", 16, random_crop=True, random_flip=True)
        keys = [(epoch, i) for i in order]
        loader = DataLoader(SeededDataset(data, seed), batch_size=2, sampler=keys, num_workers=workers)
        items = torch.cat([batch["image"] for batch in loader])
        return {i: items[k] for k, i in enumerate(order)}

    one, other = draw(3, 5, range(6)), draw(3, 5, [4, 2, 0, 5], workers=1)
    assert all(torch.equal(one[i], other[i]) for i in other)
    for different in (draw(4, 5, range(6)), draw(3, 6, range(6))):
        assert any(not torch.equal(one[i], different[i]) for i in range(6))


def test_label_colours_survive_resizing_exactly(camvid):
    for size in (8, [13, 17], 50):
        item = CamVid(camvid, "train", size)[0]
        colours = {tuple(c) for c in to_pixels(item["label_map"]).reshape(-1, 3)}
        assert colours <= {tuple(c) for c in np.concatenate([CAMVID.colors, CAMVID.void_colors])}
        assert len(colours) > 1


def test_both_readers_of_a_palette_file_agree():
    for name, void in (("cityscapes", 19), ("camvid", 11)):
        numbers = np.arange(void + 1)[None]
        assert (to_indices(load_palette(name).paint(numbers), load_palette(name)) == numbers).all()


@pytest.mark.parametrize("size", [(40, 31), (31, 40), (9, 8), (100, 35)])
def test_squares_are_cut_as_adm_cuts_them(tmp_path, size):
    image = sample_image(3, size)
    image.save(tmp_path / "a.png")
    item = ImageFolder(tmp_path, 8)[0]
    assert np.array_equal(to_pixels(item["image"]), center_crop_arr(image, 8))
    random.seed(2)
    item = ImageFolder(tmp_path, 8, random_crop=True)[0]
    assert np.array_equal(to_pixels(item["image"]), random_crop_arr(image, 8, rng=random.Random(2)))


def test_several_roots(tmp_path):
    for name in "ab":
        saved(np.full((8, 8, 3), ord(name), np.uint8), tmp_path / name / "x.png")
    data = ImageFolder(roots=[tmp_path / "a", tmp_path / "b"], size=8)
    assert [to_pixels(data[i]["image"])[0, 0, 0] for i in range(2)] == [ord("a"), ord("b")]
    with pytest.raises(UserValueError, match="one of `root` and `roots`"):
        ImageFolder(size=8)


def test_a_missing_partner_is_named(camvid):
    (camvid / "trainannot/f3.png").unlink()
    with pytest.raises(UserFileError, match=r"train/f3\.png has no partner in .*trainannot \(1 of 6"):
        CamVid(camvid, "train", 8)
    saved(scene(0)[1], camvid / "valannot/extra.png")
    with pytest.raises(UserFileError, match=r"valannot/extra\.png has no partner in .*val "):
        CamVid(camvid, "val", 8)
    with pytest.raises(UserFileError, match="no split .*test; .* has train, trainannot, val, valannot"):
        CamVid(camvid, "test", 8)


def test_pairs_of_different_sizes_are_named(camvid):
    saved(scene(1, 24, 40)[1], camvid / "trainannot/f1.png")
    with pytest.raises(UserValueError, match=r"f1\.png is 32x24, .*f1\.png is 40x24"):
        CamVid(camvid, "train", 8)


def test_a_truncated_image_is_named(camvid):
    path = camvid / "train/f2.png"
    path.write_bytes(path.read_bytes()[:60])  # the head is whole
    data = CamVid(camvid, "train", 8)
    with pytest.raises(UserError, match=r"train/f2\.png cannot be read"):
        data[2]


def test_a_number_that_is_no_class_is_named(camvid):
    saved(np.full((24, 32), 12, np.uint8), camvid / "trainannot/f0.png")
    with pytest.raises(UserValueError, match=r"trainannot/f0\.png: class 12 is not in palette camvid"):
        CamVid(camvid, "train", 8)[0]


def test_numbers_without_a_palette_are_refused_and_colours_taken_as_they_are(tmp_path):
    photo, classes = scene(0)
    saved(photo, tmp_path / "a/x.png")
    saved(classes, tmp_path / "b/x.png")
    with pytest.raises(UserValueError, match="x.png: it holds class numbers: say with `palette`"):
        ParallelFolders(tmp_path / "a", tmp_path / "b", 8)[0]
    saved(CAMVID.paint(classes), tmp_path / "b/x.png")
    item = ParallelFolders(tmp_path / "a", tmp_path / "b", [24, 32])[0]
    assert np.array_equal(classes_of(item), classes)


def test_ids_of_sixteen_bits_do_not_wrap_around(tmp_path):
    """31000 modulo 256 is 24, a person."""
    name = "a_000000_000019"
    saved(np.zeros((8, 8, 3), np.uint8), tmp_path / f"leftImg8bit/train/a/{name}_leftImg8bit.png")
    for number, message in ((31000, "class 31000 is no number of a class"), (24, None)):
        ids = np.full((8, 8), number, np.uint16)
        saved(ids, tmp_path / f"gtFine/train/a/{name}_gtFine_labelIds.png")
        data = Cityscapes(tmp_path, "train", 8, annotation="labelIds")
        if message:
            with pytest.raises(UserValueError, match=rf"labelIds\.png: {message}"):
                data[0]
        else:
            assert (classes_of(data[0], "cityscapes") == 11).all()
    saved(np.full((8, 8), 31000, np.uint16), tmp_path / f"gtFine/train/a/{name}_gtFine_labelTrainIds.png")
    with pytest.raises(UserValueError, match=r"TrainIds\.png: class 31000 is not in palette cityscapes"):
        Cityscapes(tmp_path, "train", 8, annotation="labelTrainIds")[0]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_class_numbers_in_three_channels_are_refused_and_colours_read(tmp_path, mode):
    _, classes = scene(0)
    saved(np.zeros((24, 32, 3), np.uint8), tmp_path / "a/x.png")
    path = tmp_path / "b/x.png"
    path.parent.mkdir()
    Image.fromarray(classes).convert(mode).save(path)
    data = ParallelFolders(tmp_path / "a", tmp_path / "b", [24, 32], palette="camvid")
    with pytest.raises(
        UserValueError, match=r"b/x\.png: colour \(\d+, .*not in palette camvid; class numbers are"
    ):
        data[0]
    Image.fromarray(CAMVID.paint(classes)).convert(mode.replace("LA", "RGB")).save(path)
    assert np.array_equal(classes_of(data[0]), classes)


def test_a_colour_of_no_palette_is_named(tmp_path):
    saved(np.zeros((24, 32, 3), np.uint8), tmp_path / "a/x.png")
    painted = CAMVID.paint(scene(0)[1])
    painted[3, 4] = 1, 2, 3
    saved(painted, tmp_path / "b/x.png")
    with pytest.raises(UserValueError, match=r"b/x\.png: colour \(1, 2, 3\) is not in palette camvid"):
        ParallelFolders(tmp_path / "a", tmp_path / "b", 8, palette="camvid")[0]


def test_a_map_is_never_smoothed_whatever_its_key(tmp_path):
    """What is painted is a map: its key need not be listed."""
    photo, classes = scene(0)
    saved(photo, tmp_path / "a/x.png")
    saved(classes, tmp_path / "b/x.png")
    keys = ("photo", "segmentation")
    for size in (8, 13, 50):
        item = ParallelFolders(tmp_path / "a", tmp_path / "b", size, keys, palette="camvid")[0]
        named = ParallelFolders(tmp_path / "a", tmp_path / "b", size, palette="camvid")[0]
        assert np.array_equal(item["segmentation"], named["label_map"])
        assert np.array_equal(item["photo"], named["image"])
    first = ParallelFolders(tmp_path / "b", tmp_path / "a", 8, keys, maps=["photo"], palette="camvid")[0]
    assert CAMVID.check_colors(to_pixels(first["photo"])) is not None
    for wrong, message in (
        (dict(maps=[], palette="camvid"), "palette camvid has nothing to paint"),
        (dict(maps=["label_map"]), "no key 'label_map' among photo, segmentation"),
    ):
        with pytest.raises(UserValueError, match=message):
            ParallelFolders(tmp_path / "a", tmp_path / "b", 8, keys, **wrong)


def test_label_maps_under_a_key_that_is_read_as_a_photo_are_refused(tmp_path):
    seg = np.zeros((64, 64, 3), np.uint8)
    photo = np.random.default_rng(0).integers(0, 256, seg.shape).astype(np.uint8)
    seg[:, 20:], seg[40:] = (9, 200, 3), (255, 0, 0)
    saved(photo, tmp_path / "a/x.png")
    both = Image.fromarray(np.concatenate([photo, seg], axis=1))
    for folder, image in (
        ("colours", Image.fromarray(seg)),
        ("palette", Image.fromarray(seg).quantize(8)),
        ("side", both),
    ):
        (tmp_path / folder).mkdir()
        image.save(tmp_path / folder / "x.png")
    keys = ["photo", "seg"]
    for make in (
        lambda size, **how: ParallelFolders(tmp_path / "a", tmp_path / "colours", size, keys, **how),
        lambda size, **how: ParallelFolders(tmp_path / "a", tmp_path / "palette", size, keys, **how),
        lambda size, **how: SideBySide(tmp_path / "side", size, keys, **how),
    ):
        with pytest.raises(UserValueError, match=r"x\.png looks like a label map, .*say maps: \[seg\]"):
            make(24)
        with pytest.raises(UserValueError, match=r"say maps: \[seg\]"):
            make(64, random_crop=True)
        assert (
            len(make(64)) == len(make(24, maps=[])) == 1
        )  # nothing is scaled; the user has said that these are photos
        drawn = to_pixels(make(24, maps=["seg"])[0]["seg"])
        assert {tuple(c) for c in drawn.reshape(-1, 3)} <= {tuple(c) for c in seg.reshape(-1, 3)}
    Image.fromarray(seg).save(tmp_path / "a/x.jpg")
    (tmp_path / "a/x.png").unlink()
    ParallelFolders(
        tmp_path / "a", tmp_path / "a", 24, keys
    )  # JPEG keeps no map's colours: no photo is taken for one


def given_folders(camvid, tmp_path):
    """Data sets whose maps hold numbers, with where these lie, their configuration and the map's key."""
    root = str(camvid)
    parallel = dict(image_root=f"{root}/val", other_root=f"{root}/valannot", palette="camvid")
    for target, params, key in (
        ("CamVid", dict(root=root, split="val"), "label_map"),
        ("ParallelFolders", parallel | dict(keys=["photo", "drawn"]), "drawn"),
    ):
        yield {"target": f"ldm.data.paired.{target}", "params": {**params, "size": [10, 14]}}, key


def test_given_maps_are_read_as_the_training_reads_them(camvid, tmp_path):
    for config, key in given_folders(camvid, tmp_path):
        data = instantiate_from_config(config)
        cached = {"target": "ldm.data.latents.CachedLatents", "params": {"root": "gone", "images": config}}
        for section in (config, cached, {"target": "FirstStageImages", "params": {"parts": [config]}}):
            reading = reading_of(key, {"params": {"batch_size": 1, "train": section}})
            given = read_images(camvid / "valannot", [10, 14], reading)
            assert len(given) == len(data) == 2
            for k in range(2):
                assert np.array_equal(given[k].permute(1, 2, 0), data[k][key])
    # Without a configuration of data a label map is no photo either.
    with pytest.raises(UserValueError, match="holds class numbers: say with `palette`"):
        read_images(camvid / "valannot", [10, 14], reading_of("label_map", None))
    photo = {"target": "ldm.data.folders.ImageFolder", "params": {"root": "x", "interpolation": "nearest"}}
    assert reading_of("image", {"train": photo}).interpolation == "nearest"


def test_side_by_side_halves(tmp_path):
    left, right = np.full((8, 8, 3), 10, np.uint8), np.full((8, 8, 3), 200, np.uint8)
    saved(np.concatenate([left, right], 1), tmp_path / "n/train/a.png")
    item = SideBySide(tmp_path / "n/train", 8, keys=("photo", "drawing"))[0]
    assert (to_pixels(item["photo"]) == 10).all() and (to_pixels(item["drawing"]) == 200).all()
    item = Night2Day(tmp_path / "n", "train", 8)[0]
    assert (to_pixels(item["night"]) == 10).all() and (to_pixels(item["day"]) == 200).all()
    saved(np.zeros((8, 9, 3), np.uint8), tmp_path / "n/train/b.png")
    with pytest.raises(UserValueError, match=r"b\.png is 9 pixels wide"):
        SideBySide(tmp_path / "n/train", 8)


@pytest.mark.parametrize("annotation", ["color", "labelIds", "labelTrainIds"])
def test_cityscapes_in_its_distributed_layout(tmp_path, annotation):
    palette = load_palette("cityscapes")
    train_ids = np.array([[0, 13], [10, 255]], np.uint8).repeat(4, 0).repeat(4, 1)
    ids = np.array([[7, 26], [23, 4]], np.uint8).repeat(4, 0).repeat(4, 1)
    annotations = {"color": palette.paint(train_ids), "labelIds": ids, "labelTrainIds": train_ids}
    for city in ("aachen", "ulm"):
        stem = f"{city}_000000_000019"
        saved(np.zeros((8, 8, 3), np.uint8), tmp_path / f"leftImg8bit/train/{city}/{stem}_leftImg8bit.png")
        for name, array in annotations.items():
            saved(array, tmp_path / f"gtFine/train/{city}/{stem}_gtFine_{name}.png")
    data = Cityscapes(tmp_path, "train", 8, annotation=annotation)
    assert len(data) == 2 and data[1]["file_path_"].endswith("ulm_000000_000019_leftImg8bit.png")
    assert np.array_equal(classes_of(data[0], "cityscapes"), np.where(train_ids == 255, 19, train_ids))


def test_an_autoencoder_sees_photos_and_label_maps(camvid):
    config = {"target": "ldm.data.paired.CamVid", "params": {"root": str(camvid), "split": "val", "size": 8}}
    pairs = CamVid(camvid, "val", 8)
    shown = FirstStageImages(config)
    assert len(shown) == 4
    for i in range(4):
        assert np.array_equal(shown[i]["image"], pairs[i // 2][("image", "label_map")[i % 2]])
    maps = FirstStageImages(config, keys=["label_map"])
    both = Concatenated([config, {"target": "ldm.data.base.FirstStageImages", "params": {"data": config}}])
    assert len(both) == 6 and np.array_equal(both[3]["image"], maps[0]["image"])
    with pytest.raises(IndexError):
        both[6]
    with pytest.raises(UserValueError, match="no 'depth': their keys are image, label_map"):
        FirstStageImages(config, keys=["depth"])


def test_real_pairs(unpacked_dev_data):
    data = CamVid(unpacked_dev_data("camvid.tar") / "camvid", "train", [96, 128])
    item = data[0]
    assert len(data) == 367 and item["image"].shape == item["label_map"].shape == (96, 128, 3)
    road = classes_of(item) == 3
    assert road[-24:].mean() > 0.3 and road[:24].mean() < 0.01  # the road is below


@pytest.mark.parametrize("name", ["camvid-small", "camvid-small-baseline"])
def test_the_small_models_take_the_first_stage_that_the_small_autoencoder_trains(name):
    trained, used = (
        OmegaConf.to_container(load_with_bases(CONFIGS / file))
        for file in ("autoencoder/kl-f4-small.yaml", f"translation/{name}.yaml")
    )
    own, other = trained["model"]["params"], used["model"]["params"]["first_stage_config"]["params"]
    assert own["ddconfig"] == other["ddconfig"] and own["embed_dim"] == other["embed_dim"]
    factor = 2 ** (len(own["ddconfig"]["ch_mult"]) - 1)
    size = used["data"]["params"]["train"]["params"]["images"]["params"]["size"]
    assert [factor * side for side in used["model"]["params"]["image_size"]] == size


def test_exported_images_are_the_held_out_ones_and_a_sheet_shows_them(camvid, tmp_path, run_script):
    images = {
        "target": "ldm.data.paired.CamVid",
        "params": {"root": "nowhere", "split": "val", "size": [12, 16]},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": {"params": {"validation": images}}}))
    root = f"data.params.validation.params.root={camvid}"
    job = run_script("export_images", "--config", tmp_path / "c.yaml", "--out", tmp_path / "out", root)
    assert job.returncode == 0, job.stderr
    data = CamVid(camvid, "val", [12, 16])
    for key in ("image", "label_map"):
        assert sorted(p.name for p in (tmp_path / "out" / key).iterdir()) == ["000000.png", "000001.png"]
        again = read_images(tmp_path / "out" / key, (12, 16))
        assert torch.equal(again[1], torch.from_numpy(data[1][key]).permute(2, 0, 1))
    rows = [f"{key}={tmp_path / 'out' / key}" for key in ("image", "label_map")]
    job = run_script("sheet", *rows, "--out", tmp_path / "sheet.png")
    assert job.returncode == 0, job.stderr
    shown = {tuple(c) for c in np.asarray(Image.open(tmp_path / "sheet.png")).reshape(-1, 3)}
    assert {tuple(c) for c in to_pixels(data[0]["label_map"]).reshape(-1, 3)} <= shown
    (tmp_path / "none").mkdir()
    job = run_script("sheet", f"nothing={tmp_path / 'none'}", "--out", tmp_path / "sheet.png")
    assert job.returncode == 2 and "no images in" in job.stderr
