"""Which files are images, what their classes are, and what their pixels are: the same for every reader."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch as th
from PIL import Image, ImageOps

from evaluations import judge, make_reference
from evaluations.images import NpzImages, decode_image, open_images
from evaluations.joint import read_partner
from guided_diffusion import image_files
from guided_diffusion.errors import UserError, UserValueError
from guided_diffusion.image_datasets import ImageDataset, classes_of, open_dataset
from guided_diffusion.image_files import (
    class_number,
    list_images,
    list_labelled_images,
    renumber,
    stored_pixels,
    to_uint8,
)
from guided_diffusion.mt import files
from ldm.data import folders
from ldm.data.paired import ParallelFolders


@pytest.fixture(autouse=True)
def told(caplog):
    """What was told since the test began."""
    image_files._told.clear()
    image_files._turned[0] = 0
    return caplog


def photo(height=8, width=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def saved(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, **options)
    return path


def classes(folder, *names, count=2):
    """`count` images for each path like cat/{}.png."""
    for name in names:
        for i in range(count):
            saved(photo(seed=i), folder / name.format(i))
    return str(folder)


# -------------------------------------------------------------------------------------------------------------- lists


def test_every_lister_passes_over_hidden_files_and_folders_and_tells_once(tmp_path, told):
    data = classes(
        tmp_path / "data", "cat/{}.png", "dog/{}.TIFF", ".ipynb_checkpoints/{}.png", "__MACOSX/{}.png"
    )
    saved(photo(), tmp_path / "data/cat/._0.png")
    (tmp_path / "data/.DS_Store").write_text("")
    (tmp_path / "data/cat/notes.txt").write_text("")
    names = ["cat/0.png", "cat/1.png", "dog/0.TIFF", "dog/1.TIFF"]
    assert [os.path.relpath(path, data) for path in list_images(data)] == names
    assert list_labelled_images(data).class_names == ["cat", "dog"]
    assert open_dataset(data, 8, class_cond=True).class_names == ["cat", "dog"]
    assert open_images(data).shape == (4, 8, 8, 3)
    assert make_reference.select(data).class_names == ["cat", "dog"]
    assert len(folders.ImageFolder(data, 8)) == len(files.read_images(data, 3, 8).values) == 4
    messages = [m for m in told.messages if "passed over" in m]
    assert messages == [f"{data}: 4 images; passed over 4 hidden, 1 *.txt"]


def test_linked_folders_are_entered_loops_end_and_dangling_links_are_counted(tmp_path, told):
    classes(tmp_path / "far", "{}.png")
    data = classes(tmp_path / "data", "cat/{}.png")
    (tmp_path / "data/dog").symlink_to(tmp_path / "far")
    (tmp_path / "data/cat/again").symlink_to(tmp_path / "data")
    (tmp_path / "data/cat/gone.png").symlink_to(tmp_path / "nowhere.png")
    assert [os.path.relpath(path, data) for path in list_images(data)] == [
        "cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"
    ]  # fmt: skip
    assert open_images(data).shape[0] == 4
    assert "1 links to a folder above" in told.text and "1 dangling links" in told.text


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "gif", "bmp", "webp", "tif", "TIFF"])
def test_one_list_of_suffixes(tmp_path, suffix):
    saved(photo(), tmp_path / f"a.{suffix}")
    assert len(list_images(tmp_path)) == len(open_dataset(str(tmp_path), 8)) == 1
    assert open_images(tmp_path).shape[0] == len(folders.ImageFolder(tmp_path, 8)) == 1


# ------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("names", "expected", "rule"),
    [
        (["x/cat_{}.png", "y/dog_{}.png"], ["cat", "dog"], "prefix"),  # upstream's rule comes first
        (["cat/{}.png", "dog/{}.png"], ["cat", "dog"], "folder"),
        (["n01/images/{}.JPEG", "n02/images/{}.JPEG"], ["n01", "n02"], "folder"),
        (["train/n01/images/{}.png", "train/n02/images/{}.png"], ["n01", "n02"], "folder"),
        (["cat/2024/{}.png", "dog/2024/{}.png"], ["cat", "dog"], "folder"),
    ],
)
def test_training_and_evaluation_take_the_same_classes(tmp_path, names, expected, rule):
    data = classes(tmp_path, *names)
    trained = open_dataset(data, 8, class_cond=True, random_flip=False)
    selection = make_reference.select(data)
    assert trained.class_names == selection.class_names == expected
    assert trained.label_from == rule
    assert selection.labels.tolist() == trained.local_classes == [0, 0, 1, 1]


def test_label_from_decides_in_training_and_evaluation(tmp_path):
    data = classes(tmp_path, "x/cat_{}.png", "x/dog_{}.png", "y/cat_{}.png", "y/dog_{}.png")
    for label_from, expected in (
        ("auto", ["cat", "dog"]),
        ("prefix", ["cat", "dog"]),
        ("folder", ["x", "y"]),
    ):
        assert open_dataset(data, 8, class_cond=True, label_from=label_from).class_names == expected
        assert make_reference.select(data, label_from=label_from).class_names == expected


def test_numbers_stay_what_they_say_below_num_classes(tmp_path, told):
    data = classes(tmp_path / "some", *(f"{n}/{{}}.png" for n in (0, 1, 2, 10, 11)))
    kept = list_labelled_images(data, num_classes=12)
    assert kept.class_names == [str(i) for i in range(12)]
    assert kept.labels == [0, 0, 1, 1, 10, 10, 11, 11, 2, 2]
    assert "no images of 7 of 12 classes: 3, 4, 5, 6, 7, 8, 9" in told.text
    ordered = list_labelled_images(data)
    assert ordered.class_names == ["0", "1", "2", "10", "11"]
    assert "class 10 gets number 3" in told.text and "--num_classes 12 keeps" in told.text
    # As a former version numbered them, for its models.
    assert list_labelled_images(data, class_names=()).class_names == ["0", "1", "10", "11", "2"]
    flowers = classes(tmp_path / "flowers", *(f"{n:02}/{{}}.png" for n in (1, 2, 3)))
    assert list_labelled_images(flowers, num_classes=3).class_names == ["01", "02", "03"]


def test_a_later_folder_is_mapped_by_name(tmp_path, told):
    trained = open_dataset(
        classes(tmp_path / "train", "a/{}.png", "b/{}.png", "c/{}.png"), 8, class_cond=True
    )
    config = {"class_names": trained.class_names, "label_from": trained.label_from, "num_classes": 3}
    known = classes_of(config)
    later = open_dataset(classes(tmp_path / "val", "b/{}.png", "c/{}.png"), 8, class_cond=True, **known)
    assert later.class_names == ["a", "b", "c"] and later.local_classes == [1, 1, 2, 2]
    assert "no images of 1 of 3 classes: a" in told.text
    # One class alone, and names that stand elsewhere than in the training.
    assert open_dataset(classes(tmp_path / "one", "c/{}.png"), 8, class_cond=True, **known).local_classes == [
        2,
        2,
    ]
    other = classes(tmp_path / "other", "b_{}.png", "c_{}.png")
    assert open_dataset(other, 8, class_cond=True, **known).local_classes == [1, 1, 2, 2]
    strange = classes(tmp_path / "strange", "b/{}.png", "owl/{}.png", "yak/{}.png")
    with pytest.raises(UserValueError, match="does not know: owl, yak; it knows a, b, c"):
        open_dataset(strange, 8, class_cond=True, **known)


def test_imagenet_is_trained_by_prefix_and_validated_by_folder(tmp_path):
    trained = list_labelled_images(classes(tmp_path / "train", "n01/n01_{}.JPEG", "n02/n02_{}.JPEG"))
    assert trained.label_from == "prefix"
    val = classes(tmp_path / "val", "n02/ILSVRC2012_val_{}.JPEG")
    found = list_labelled_images(val, trained.label_from, trained.class_names)
    assert found.labels == [1, 1] and found.label_from == "folder"


def test_models_without_names_or_labels(tmp_path):
    assert classes_of({"num_classes": 3}) == {"class_names": (), "label_from": "auto"}  # of a former version
    assert classes_of({"num_classes": 0, "class_names": ""})["class_names"] is None
    assert classes_of({"label_from": "folder"})["label_from"] == "folder"
    assert classes_of({"label_from": "folder"}, "prefix")["label_from"] == "prefix"


def test_arrays_bring_the_names_of_their_numbers(tmp_path):
    images = np.zeros((3, 8, 8, 3), np.uint8)
    np.savez(
        tmp_path / "a.npz", arr_0=images, arr_1=np.array([0, 1, -1]), class_names=np.array(["dog", "cat"])
    )
    own = open_dataset(str(tmp_path / "a.npz"), 8, class_cond=True)
    assert own.class_names == ["dog", "cat"] and own.local_classes.tolist() == [0, 1, -1]
    known = open_dataset(str(tmp_path / "a.npz"), 8, class_cond=True, class_names=["cat", "dog"])
    assert known.class_names == ["cat", "dog"] and known.local_classes.tolist() == [1, 0, -1]
    with pytest.raises(UserValueError, match="not known: dog; known are cat, owl"):
        renumber(np.array([0]), ["dog"], ["cat", "owl"], "x")
    with pytest.raises(UserValueError, match="label 2, but there are 2 classes"):
        renumber(np.array([2]), None, ["cat", "owl"], "x")


def test_a_class_is_called_by_its_name_or_number():
    assert [class_number(text, ["cat", "dog"], 2) for text in ("dog", "cat", "1")] == [1, 0, 1]
    assert class_number("10", ["0", "1", "2", "10"], 4) == 3  # the name comes first
    for text, names, message in (
        ("3", ["0", "1", "10"], "the classes are 0, 1, 10"),
        ("cow", ["cat", "dog"], "the classes are cat, dog, and class numbers must be 0..3"),
        ("cow", [], "has no names"),
        ("4", [], "must be 0..3"),
    ):
        with pytest.raises(UserValueError, match=message):
            class_number(text, names, 4)


def test_given_labels_are_read_by_name(tmp_path):
    from guided_diffusion.mt.modalities import LabelModality

    label = LabelModality("label", (3,))
    names = ["cat", "dog", "owl"]
    assert files.read_labels("owl,cat, 1", label, names).argmax(dim=1).tolist() == [2, 0, 1]
    np.savez(tmp_path / "a.npz", label=np.array([0, 1]), class_names=np.array(["owl", "dog"]))
    assert files.read_labels(str(tmp_path / "a.npz"), label, names).argmax(dim=1).tolist() == [2, 1]
    with pytest.raises(UserValueError, match="label=cow: 'cow' is no class: the classes are cat, dog, owl"):
        files.read_labels("cow", label, names)


def test_a_judge_knows_classes_by_name(tmp_path):
    images = np.stack([np.full((16, 16, 3), 40 + 170 * (i % 2), np.uint8) for i in range(60)])
    labels = np.arange(60) % 2
    trained, accuracy = judge.train_judge(images, labels, epochs=2, class_names=["dark", "light"])
    judge.save_judge(trained, accuracy, tmp_path / "judge.pt")
    assert judge.load_judge(tmp_path / "judge.pt")[0].class_names == ["dark", "light"]

    def agreement(labels, names):
        return judge.score(tmp_path / "judge.pt", images, images, labels, class_names=names).label_agreement

    assert agreement(labels, None) == agreement(1 - labels, ["light", "dark"]) == 1
    assert agreement(labels, ["light", "dark"]) == 0
    with pytest.raises(UserError, match="not known: grey; known are dark, light"):
        agreement(labels, ["light", "grey"])


# ------------------------------------------------------------------------------------------------------------- pixels


def read_by_all(path, size=8):
    """The pixels uint8 [size, size, 3] that each part of the project reads from an image."""
    trained, _ = ImageDataset(size, [str(path)], random_flip=False)[0]
    latent = folders.ImageFolder(path.parent, size)[0]["image"]
    given = files.read_images(str(path), 3, size).values[0].permute(1, 2, 0)
    return [
        stored_pixels(trained.transpose(1, 2, 0)),
        stored_pixels(latent),
        stored_pixels(given.numpy()),
        decode_image(path, size),
    ]


def modes():
    colour, grey = photo(), photo()[..., 0]
    sixteen = (grey.astype(np.uint16) << 8) + 77
    rgba = np.dstack([colour, np.full((8, 8), 255, np.uint8)])
    palette = Image.fromarray(grey).quantize(16)
    three = np.repeat(grey[..., None], 3, 2)
    return {
        "sixteen.png": (Image.fromarray(sixteen), three),
        "sixteen.tif": (Image.fromarray(sixteen), three),
        "grey.png": (Image.fromarray(grey), three),
        "palette.png": (palette, np.asarray(palette.convert("RGB"))),
        "rgba.png": (Image.fromarray(rgba, "RGBA"), colour),
        "la.png": (Image.fromarray(grey).convert("LA"), three),
        "cmyk.tif": (Image.fromarray(colour).convert("CMYK"), colour),
    }


@pytest.mark.parametrize("name", modes())
def test_every_reader_reads_the_same_pixels(tmp_path, name):
    image, expected = modes()[name]
    for pixels in read_by_all(saved(image, tmp_path / name)):
        assert np.array_equal(pixels, expected)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_reader_sets_images_upright_as_exif_says(tmp_path, orientation, told):
    path = saved(photo(8, 12), tmp_path / "a.png", exif=turned(orientation))
    shown = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    assert image_files.image_size(path) == shown.shape[1::-1]
    middle = shown[2:10] if shown.shape[0] > 8 else shown[:, 2:10]
    for pixels in read_by_all(path):
        assert np.array_equal(pixels, middle)
    named = [m for m in told.messages if "a.png is stored turned or mirrored" in m]
    assert len(named) == (orientation > 1)


def test_a_turned_photo_fits_its_upright_label_map(tmp_path):
    drawn = np.zeros((8, 12, 3), np.uint8)
    drawn[:4] = 200  # the upper half
    rotated = Image.fromarray(drawn).transpose(Image.Transpose.ROTATE_90)
    saved(rotated, tmp_path / "photos/a.png", exif=turned(6))
    saved(drawn, tmp_path / "maps/a.png")
    item = ParallelFolders(tmp_path / "photos", tmp_path / "maps", [8, 12])[0]
    assert np.array_equal(item["image"], item["label_map"])
    saved(rotated, tmp_path / "maps/a.png")  # a map of the pixels as they are stored
    with pytest.raises(UserValueError, match=r"of one size \(upright\).* 12x8, .* 8x12"):
        ParallelFolders(tmp_path / "photos", tmp_path / "maps", [8, 12])


def enormous(path):
    """A PNG whose head says 30,000 x 30,000 pixels."""
    saved(photo(), path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 30_000, 30_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def test_what_cannot_be_read_names_itself_in_one_line(tmp_path):
    path = tmp_path / "a.png"
    whole = saved(photo(64, 64), path).read_bytes()
    for content, message in (
        (whole[:3000], "truncated|cannot be read"),
        (b"no image", "its contents are none"),
    ):
        path.write_bytes(content)
        refused_by_all(path, message)
    enormous(path)
    refused_by_all(path, "exceeds limit")
    saved(Image.fromarray(np.ones((8, 8), np.float32)), tmp_path / "b.tif")
    refused_by_all(tmp_path / "b.tif", "floats")


def refused_by_all(path, message):
    for read in (
        lambda: ImageDataset(8, [str(path)]).load(0),
        lambda: folders.read_images(path, 8),
        lambda: files.read_images(str(path), 3, 8),
        lambda: decode_image(path),
    ):
        with pytest.raises(
            UserError, match=rf"{path.name} cannot be read as an image: .*({message})"
        ) as refused:
            read()
        assert "\n" not in str(refused.value)


def test_damaged_exif_data_say_nothing(tmp_path):
    saved(photo(), tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff nonsense")
    assert image_files.read_pixels(tmp_path / "a.jpg").size == (8, 8)


def test_samples_are_stored_as_adm_stores_them_and_data_exactly():
    x = th.linspace(-1.1, 1.1, 1000).reshape(1, 1, 20, 50)
    expected = ((x + 1) * 127.5).clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1)
    assert th.equal(to_uint8(x), expected)
    assert int(to_uint8(th.full((1, 1, 1, 1), 0.0))) == 127  # not 128
    values = np.arange(256, dtype=np.uint8)
    assert np.array_equal(stored_pixels(values.astype(np.float32) / 127.5 - 1), values)


# ------------------------------------------------------------------------------------------------------------- arrays


def flipped_bit(path):
    """The file with one bit of its first array's data changed: its checksum is then wrong."""
    content = bytearray(path.read_bytes())
    content[400] ^= 1
    path.write_bytes(content)


def test_a_bad_checksum_in_an_npz_is_one_line(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    flipped_bit(path)
    for read in (
        lambda: open_dataset(str(path), 8),
        lambda: list(NpzImages(path).batches(0, 4, 4)),
        lambda: files.read_images(str(path), 3, 8),
    ):
        with pytest.raises(UserError, match="a.npz .*Bad CRC-32"):
            read()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array(["cat", "dog", "owl"]), "labels must be 3 integers .* not <U3"),
        (np.array([0, 2**31 - 1, 1]), "label 2147483647 is no class number"),
        (np.array([0, 1, -2]), "label -2 is no class number"),
        (np.array([0.0, 1.0, 2.0]), "labels must be 3 integers .* not float64"),
        (np.array([0, 1]), r"labels must be 3 integers .* \[2\]"),
    ],
)
def test_labels_that_are_none_are_one_line(tmp_path, labels, message):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=np.zeros((3, 8, 8, 3), np.uint8), arr_1=labels)
    with pytest.raises(UserValueError, match=message):
        open_dataset(str(path), 8, class_cond=True)
    with pytest.raises(UserError, match=message):
        make_reference.select(path)
    if labels.ndim == 1 and labels.dtype.kind == "i" and len(labels) == 3:
        with pytest.raises(UserError, match=message):
            read_partner(path, "arr_1")


def test_folders_of_the_project_are_listed_by_one_function():
    """No second list of suffixes, and no second reader, grows beside this module."""
    root = Path(__file__).resolve().parents[1]
    for folder in ("guided_diffusion", "ldm", "evaluations", "scripts", "experiments"):
        for path in (root / folder).rglob("*.py"):
            text = path.read_text()
            if path.name != "image_files.py" and path.name != "inference.py":
                assert '"jpeg"' not in text or path.name == "tar_shards.py", path
                assert "Image.open(" not in text, path
