"""Images of every kind come out right, labels mean something, bad files are named, streams are resumed."""

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion import image_datasets, logger
from guided_diffusion.errors import UserError, UserValueError
from guided_diffusion.image_datasets import (
    ArrayDataset,
    ImageDataset,
    ResumableBatches,
    hold_out,
    list_labelled_images,
    load_data,
    load_stream,
    open_dataset,
)
from guided_diffusion.train_util import TrainLoop
from tests.compare import agree
from tests.conftest import sample_image


@pytest.fixture(autouse=True)
def own_logger(tmp_path):
    with logger.scoped_configure(dir=str(tmp_path / "log"), format_strs=["log"]):
        yield


@pytest.fixture
def digits():
    """Forty images whose every pixel is the image's number, and labels of which some are missing."""
    images = np.repeat(np.arange(40, dtype=np.uint8), 8 * 8).reshape(40, 8, 8, 1)
    return ArrayDataset(images, np.arange(40) % 5 - 1)


def number(batch):
    """The numbers of the images of `digits` in a batch."""
    pixels = batch[:, 0, 0, 0]
    return (pixels if pixels.dtype == th.uint8 else (pixels + 1) * 127.5).round().int().tolist()


def take(stream, count):
    return list(itertools.islice(stream, count))


# ----------------------------------------------------------------------------------------------------- pixels


def test_a_batch_is_float_in_minus_one_to_one_channels_first(prefix_folder):
    batch, cond = next(load_data(data_dir=str(prefix_folder), batch_size=4, image_size=8, num_workers=0))
    assert batch.shape == (4, 3, 8, 8) and batch.dtype == th.float32
    assert cond == {}
    assert -1 <= batch.min() < 0 < batch.max() <= 1


def test_pixels_keep_their_values_and_places(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    arr, out = ImageDataset(6, [str(tmp_path / "a.png")], classes=[3], random_flip=False)[0]
    assert np.allclose(arr, pixels.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    assert out["y"] == 3 and out["y"].dtype == np.int64


def test_center_crop_averages_by_twos_and_takes_the_middle():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    arr = image_datasets.center_crop_arr(Image.fromarray(pixels), 8)
    means = pixels.reshape(8, 4, 12, 4, 3).mean(axis=(1, 3))[:, 2:10]  # 48 / 4 = 12, of which the middle 8
    assert arr.shape == (8, 8, 3)
    assert np.abs(arr - means).max() <= 2  # rounded in every direction of both halvings


@pytest.mark.parametrize("size", [(5, 5), (7, 30), (300, 9), (64, 64), (101, 67)])
def test_images_of_any_size_become_squares(size):
    image = sample_image(size=size)
    assert image_datasets.center_crop_arr(image, 16).shape == (16, 16, 3)
    for seed in range(5):
        arr = image_datasets.random_crop_arr(image, 16, rng=random.Random(seed))
        assert arr.shape == (16, 16, 3)


def test_random_crop_reaches_every_place_and_scale_and_follows_its_seed():
    ramp = Image.fromarray(np.tile(np.arange(100, dtype=np.uint8), (100, 1)))
    crops = [image_datasets.random_crop_arr(ramp, 50, rng=random.Random(seed)) for seed in range(60)]
    widths = [int(crop[25, -1]) - int(crop[25, 0]) for crop in crops]
    assert min(widths) < 82 and max(widths) > 95  # 80 % to 100 % of the image
    starts = [int(crop[25, 0]) for crop in crops]
    assert min(starts) <= 1 and max(starts) >= 15
    random.seed(7)
    assert np.array_equal(
        image_datasets.random_crop_arr(ramp, 50),
        image_datasets.random_crop_arr(ramp, 50, rng=random.Random(7)),
    )


def test_half_of_the_images_are_flipped_where_asked(tmp_path):
    sample_image().save(tmp_path / "a.png")
    path = [str(tmp_path / "a.png")]
    plain = ImageDataset(8, path, random_flip=False)[0][0]
    flipping = ImageDataset(8, path)
    random.seed(0)
    flipped = [not np.array_equal(flipping[0][0], plain) for _ in range(100)]
    assert 30 < sum(flipped) < 70
    other = next(arr for arr, _ in iter(lambda: flipping[0], None) if not np.array_equal(arr, plain))
    assert np.array_equal(other, plain[:, :, ::-1])


@pytest.mark.parametrize(
    "mode, suffix",
    [
        ("L", "png"),
        ("1", "png"),
        ("P", "gif"),
        ("LA", "png"),
        ("RGBA", "png"),
        ("CMYK", "jpg"),
        ("RGB", "JPEG"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_any_mode_becomes_the_channels_asked_for(tmp_path, mode, suffix, channels):
    path = tmp_path / f"a.{suffix}"
    image = sample_image(mode=mode)
    image.save(path)
    (arr, _) = ImageDataset(8, [str(path)], random_flip=False, image_channels=channels)[0]
    assert arr.shape == (channels, 8, 8)
    middle = np.array(image.convert("L" if channels == 1 else "RGB"))[:, 1:9]
    expected = middle.reshape(8, 8, channels).transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(arr - expected).mean() < (0.1 if mode in ("CMYK", "RGB") else 1e-6)  # JPEG loses some


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16)).save(tmp_path / "a.png")
    arr, _ = ImageDataset(8, [str(tmp_path / "a.png")])[0]
    assert np.allclose(arr, 128 / 127.5 - 1, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- labels


def test_labels_are_numbered_by_sorted_prefix(prefix_folder):
    found = list_labelled_images(str(prefix_folder))
    assert found.class_names == ["cat", "dog", "owl"]
    assert [path.rsplit("/", 1)[1] for path in found.paths[:5]] == [
        "cat_0.png",
        "cat_1.png",
        "cat_2.png",
        "cat_3.png",
        "dog_0.png",
    ]
    assert found.labels == [0] * 4 + [1] * 4 + [2] * 4
    _, cond = next(
        load_data(
            data_dir=str(prefix_folder), batch_size=12, image_size=8, class_cond=True, deterministic=True
        )
    )
    assert cond["y"].tolist() == found.labels and cond["y"].dtype == th.int64


def test_class_folders_give_labels_where_prefixes_have_no_meaning(class_folder):
    found = list_labelled_images(str(class_folder))
    assert found.class_names == ["cat", "dog", "owl"] and found.labels == [0] * 4 + [1] * 4 + [2] * 4
    for path in list(class_folder.rglob("*.png")):  # one prefix for all
        path.rename(path.with_name(f"img_{path.name}"))
    assert list_labelled_images(str(class_folder)).class_names == ["cat", "dog", "owl"]
    for path in list(class_folder.rglob("*.png")):  # one innermost folder for all
        (path.parent / "images").mkdir(exist_ok=True)
        path.rename(path.parent / "images" / path.name)
    assert list_labelled_images(str(class_folder)).class_names == ["cat", "dog", "owl"]
    assert open_dataset(str(class_folder), 8, class_cond=True).class_names == ["cat", "dog", "owl"]


def test_prefixes_win_over_folders_and_the_other_choice_is_named(class_folder, caplog):
    for path in list(class_folder.rglob("*.png")):
        path.rename(path.with_name(f"{2020 + int(path.stem) % 2}_{path.name}"))
    assert list_labelled_images(str(class_folder)).class_names == ["2020", "2021"]
    assert "--label_from folder" in caplog.text
    assert list_labelled_images(str(class_folder), "folder").class_names == ["cat", "dog", "owl"]
    with pytest.raises(UserValueError, match="auto, prefix or folder"):
        list_labelled_images(str(class_folder), "directory")


@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "b.png", "c.png", "d.png"],  # every image a class of its own
        ["a_1.png", "b_1.png", "c_1.png", "d_1.png"],
        ["cat_1.png", "cat_2.png", "cat_3.png"],  # one class
        ["one/1.png", "one/2.png", "one/3.png"],
        ["1.png", "cat/2.png", "cat/3.png", "dog/4.png", "dog/5.png"],  # not all in class folders
        [*(f"{i}_x.png" for i in range(10)), "9_y.png"],  # next to all on their own
    ],
)
def test_labels_without_a_meaning_are_refused(tmp_path, names):
    folder = tmp_path / "data"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        sample_image().save(folder / name)
    with pytest.raises(UserValueError, match="no labels with a meaning.*CLASS_anything.png"):
        load_data(data_dir=str(folder), batch_size=1, image_size=8, class_cond=True)
    assert next(load_data(data_dir=str(folder), batch_size=2, image_size=8, num_workers=0))[1] == {}


def test_only_images_are_listed_in_order(tmp_path):
    for name in ("b.PNG", "a.jpeg", "z/c.gif", "m/d.jpg", "notes.txt", "png", ".hidden"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).touch()
    found = image_datasets._list_image_files_recursively(str(tmp_path / "d"))
    assert [path[len(str(tmp_path)) + 3 :] for path in found] == ["a.jpeg", "b.PNG", "m/d.jpg", "z/c.gif"]


def test_missing_data_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    for path, error, match in (
        ("", ValueError, "unspecified data directory"),
        (str(tmp_path / "nowhere"), FileNotFoundError, "nowhere.*does not exist"),
        (str(tmp_path / "empty"), FileNotFoundError, "no images.*empty"),
        (str(tmp_path / "file.txt"), FileNotFoundError, "neither a folder"),
        (str(tmp_path / "nowhere.npz"), FileNotFoundError, "nowhere.npz.*does not exist"),
    ):
        with pytest.raises(error, match=match) as raised:
            load_data(data_dir=path, batch_size=1, image_size=8)
        assert isinstance(raised.value, UserError)


def test_too_large_a_batch_is_refused_at_once(prefix_folder):
    with pytest.raises(UserValueError, match="12 images.*fewer than batch_size 13"):
        load_data(data_dir=str(prefix_folder), batch_size=13, image_size=8)


# ------------------------------------------------------------------------------------------------- .npz files


def test_an_npz_file_stands_for_a_folder(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    for key in ("arr_1", "labels"):
        np.savez(tmp_path / "a.npz", arr_0=images, **{key: np.array([0, 1, 2, 0, 1, 2])})
        options = dict(data_dir=str(tmp_path / "a.npz"), batch_size=6, image_size=8, random_flip=False)
        batch, cond = next(load_data(**options, class_cond=True, deterministic=True, num_workers=0))
        assert np.allclose(batch, images.transpose(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)
        assert cond["y"].tolist() == [0, 1, 2, 0, 1, 2]
        assert open_dataset(str(tmp_path / "a.npz"), 4, class_cond=True).class_names == ["0", "1", "2"]
    assert open_dataset(str(tmp_path / "a.npz"), 4, image_channels=1)[0][0].shape == (1, 4, 4)


def test_unlabelled_images_are_for_those_who_allow_them(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((4, 8, 8), dtype=np.uint8), labels=[0, 1, -1, 1])
    options = dict(
        data_dir=str(tmp_path / "a.npz"), batch_size=4, image_size=8, deterministic=True, num_workers=0
    )
    with pytest.raises(UserValueError, match="unlabelled"):
        load_data(**options, class_cond=True)
    assert next(load_data(**options, class_cond=True, allow_unlabelled=True))[1]["y"].tolist() == [
        0,
        1,
        -1,
        1,
    ]
    assert open_dataset(str(tmp_path / "a.npz"), 8, class_cond=True).class_names == ["0", "1"]


@pytest.mark.parametrize(
    "arrays, match",
    [
        (dict(other=np.zeros(3)), "no array arr_0.*other"),
        (dict(arr_0=np.zeros((2, 8, 8, 3)), labels=[0, 1]), "must be uint8.*float64"),
        (dict(arr_0=np.zeros((2, 8), dtype=np.uint8), labels=[0, 1]), "must be images.*\\[2, 8\\]"),
        (dict(arr_0=np.zeros((2, 8, 8, 3), dtype=np.uint8)), "has no labels"),
        (dict(arr_0=np.zeros((2, 8, 8, 3), dtype=np.uint8), labels=[1]), "2 integers"),
        (dict(arr_0=np.zeros((2, 8, 8, 3), dtype=np.uint8), labels=[1, -2]), "from -1"),
        (dict(arr_0=np.zeros((2, 8, 8, 3), dtype=np.uint8), labels=[0.5, 1]), "2 integers"),
        (dict(arr_0=np.zeros((2, 9, 9, 5), dtype=np.uint8), labels=[0, 1]), "5 channels"),
    ],
)
def test_an_unusable_npz_file_is_explained(tmp_path, arrays, match):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserValueError, match=match):
        open_dataset(str(tmp_path / "a.npz"), 8, class_cond=True)


def test_a_broken_npz_file_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((50, 8, 8, 3), dtype=np.uint8))
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:5000])
    with pytest.raises(UserValueError, match="b.npz is not a sound .npy or .npz file"):
        open_dataset(str(tmp_path / "b.npz"), 8)


# ----------------------------------------------------------------------------------------------- bad images


def spoil(path, how):
    data = path.read_bytes()
    path.write_bytes(
        {"truncated": data[: len(data) // 2], "empty": b"", "html": b"<html>not found</html>"}[how]
    )


@pytest.mark.parametrize("how", ["truncated", "empty", "html"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_is_named_once_and_the_next_takes_its_place(prefix_folder, tmp_path, how, num_workers):
    spoil(prefix_folder / "dog_1.png", how)
    stream = load_data(
        data_dir=str(prefix_folder),
        batch_size=12,
        image_size=8,
        class_cond=True,
        deterministic=True,
        random_flip=False,
        num_workers=num_workers,
    )
    for batch, cond in take(stream, 2):
        assert cond["y"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert th.equal(batch[5], batch[6])
    log = (tmp_path / "log" / "log.txt").read_text()
    assert log.count("dog_1.png") == 1 and "1 of at most 10" in log


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_bad_images_stop_the_training_with_a_name(prefix_folder, num_workers):
    for name in ("cat_0.png", "dog_1.png", "dog_2.png"):
        spoil(prefix_folder / name, "truncated")
    options = dict(data_dir=str(prefix_folder), batch_size=6, image_size=8, deterministic=True)
    assert len(take(load_data(**options, max_bad=3, num_workers=num_workers), 4)) == 4
    with pytest.raises(UserError, match="more than max_bad=2 .*dog_2.png") as raised:
        take(load_data(**options, max_bad=2, num_workers=num_workers), 4)
    assert "Traceback" not in str(raised.value)
    dataset = open_dataset(str(prefix_folder), 8, max_bad=0)
    with pytest.raises(UserError, match="max_bad=0"):
        take(load_stream(dataset, 6, seed=0, num_workers=num_workers), 4)


def test_nothing_but_bad_images_ends(prefix_folder):
    for path in prefix_folder.iterdir():
        spoil(path, "html")
    with pytest.raises(UserError, match="none of the images can be read"):
        next(load_data(data_dir=str(prefix_folder), batch_size=2, image_size=8, max_bad=100, num_workers=0))


def test_a_fork_that_indexes_the_dataset_itself_is_warned(prefix_folder):
    spoil(prefix_folder / "cat_0.png", "truncated")
    dataset = open_dataset(str(prefix_folder), 8, random_flip=False, max_bad=1)
    with pytest.warns(UserWarning, match="cat_0.png"):
        assert np.array_equal(dataset[0][0], dataset[1][0])
    spoil(prefix_folder / "dog_0.png", "truncated")
    with pytest.raises(UserError, match="dog_0.png"):
        dataset[4]


# ----------------------------------------------------------------------------------------------------- stream


def test_every_epoch_shows_every_image_once_in_another_order(digits):
    batches = take(load_stream(digits, 8, seed=3, num_workers=0), 15)
    seen = [n for batch, _ in batches for n in number(batch)]
    epochs = [seen[start : start + 40] for start in (0, 40, 80)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in (*epochs, range(40))}) == 4
    assert [p for _, cond in batches for p in cond["position"].tolist()] == list(range(120))
    for batch, cond in batches:
        assert cond["y"].tolist() == [n % 5 - 1 for n in number(batch)]
    other = [n for batch, _ in take(load_stream(digits, 8, seed=4, num_workers=0), 5) for n in number(batch)]
    assert other != epochs[0]


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(
        th.equal(a, b) and c.keys() == d.keys() and all(th.equal(c[key], d[key]) for key in c)
        for (a, c), (b, d) in zip(ours, theirs, strict=True)
    )


def test_a_stream_continues_at_any_step_with_any_number_of_workers(prefix_folder):
    dataset = open_dataset(str(prefix_folder), 8, class_cond=True, random_crop=True)
    whole = take(load_stream(dataset, 5, seed=1, num_workers=0), 12)
    for start, num_workers in ((0, 1), (1, 0), (7, 2), (11, 0)):
        rest = take(load_stream(dataset, 5, 1, start_step=start, num_workers=num_workers), 12 - start)
        assert equal(rest, whole[start:])
    assert not equal(take(load_stream(dataset, 5, seed=2, num_workers=0), 12), whole)


def test_workers_outlive_the_signals_that_a_whole_job_gets(prefix_folder):
    """Ctrl-C and SIGTERM reach them too, but it is for the training process to end them."""
    dataset = open_dataset(str(prefix_folder), 8)
    whole = take(load_stream(dataset, 5, seed=1, num_workers=0), 9)
    before = set(multiprocessing.active_children())
    stream = load_stream(dataset, 5, seed=1, num_workers=2)
    first = take(stream, 3)
    workers = [child for child in multiprocessing.active_children() if child not in before]
    assert len(workers) == 2
    for number in (signal.SIGTERM, signal.SIGINT):
        for worker in workers:
            os.kill(worker.pid, number)
    assert equal(first + take(stream, 6), whole)
    assert all(worker.is_alive() for worker in workers)
    with contextlib.suppress(RuntimeError):  # torch tells of a dead worker wherever this process stands
        for _ in range(100):  # the next one, once the first has been seen
            workers[0].terminate()
            workers[0].join(timeout=0.2)
    assert not workers[0].is_alive()
    stream.close()
    workers[1].join(timeout=10)
    assert not workers[1].is_alive()


def test_bytes_leave_the_workers_and_become_the_same_floats_later(prefix_folder, monkeypatch):
    """A float image is four times as long on its way; from_uint8 gives what load_data and the data set give."""
    sent = []
    collate = image_datasets._collate
    monkeypatch.setattr(
        image_datasets, "_collate", lambda items: sent.append(collate(items)[0]) or collate(items)
    )
    options = dict(random_flip=False)
    dataset = open_dataset(str(prefix_folder), 8, **options)
    batch, cond = next(load_stream(dataset, 12, seed=0, num_workers=0))
    order = image_datasets.epoch_order(12, 0, 0)
    given = np.stack([dataset[i][0] for i in order])
    assert batch.dtype == th.uint8 and given.dtype == np.float32
    assert np.array_equal(given, batch.numpy().astype(np.float32) / 127.5 - 1)
    assert np.array_equal(TrainLoop._on_device(batch).cpu().numpy(), given)
    whole = dict(data_dir=str(prefix_folder), batch_size=12, image_size=8, deterministic=True, num_workers=0)
    floats, _ = next(load_data(**whole, **options))
    assert np.array_equal(floats.numpy()[order], given)
    assert [part.dtype for part in sent] == 2 * [th.uint8]


def test_augmentation_is_drawn_anew_at_every_position():
    noise = np.random.default_rng(0).integers(0, 256, (1, 200, 200, 3), dtype=np.uint8)
    one = ArrayDataset(noise, resolution=16, random_crop=True)  # position n is its n-th epoch
    batch, _ = next(load_stream(one, 60, seed=0, num_workers=0))
    assert len(th.unique(batch.flatten(1), dim=0)) > 20


def test_two_ranks_see_the_global_batch_of_one(prefix_folder):
    dataset = open_dataset(str(prefix_folder), 8, class_cond=True, random_crop=True)
    one = take(load_stream(dataset, 6, seed=1, num_workers=0), 5)
    halves = [
        take(load_stream(dataset, 3, seed=1, rank=rank, world_size=2, num_workers=0), 5) for rank in (0, 1)
    ]
    together = [
        (th.cat([a, b]), {key: th.cat([c[key], d[key]]) for key in c})
        for (a, c), (b, d) in zip(*halves, strict=True)
    ]
    assert equal(together, one)


def test_a_stream_leaves_the_global_generators_alone(digits):
    random.seed(0), np.random.seed(0), th.manual_seed(0)
    take(load_stream(digits, 8, seed=3, num_workers=1), 2)
    drawn = (random.random(), np.random.rand(), th.rand(1).item())
    random.seed(0), np.random.seed(0), th.manual_seed(0)
    assert drawn == (random.random(), np.random.rand(), th.rand(1).item())


def test_a_late_start_costs_nothing():
    batches = iter(ResumableBatches(1000, 4, seed=0, start_step=10**9, rank=1, world_size=2))
    assert [position for position, _ in next(batches)] == [8 * 10**9 + 4 + i for i in range(4)]


def test_the_order_of_an_epoch_never_changes():
    """A run resumed with a later version must go on in the same order."""
    assert image_datasets.epoch_order(10, 1, 2).tolist() == [8, 3, 6, 0, 2, 1, 5, 7, 9, 4]
    assert sorted(image_datasets.epoch_order(10, -5, 0).tolist()) == list(range(10))


@pytest.mark.parametrize(
    "options", [dict(batch_size=0), dict(rank=2, world_size=2), dict(start_step=-1), dict(size=0)]
)
def test_impossible_batches_are_refused(options):
    with pytest.raises(UserValueError, match="no batches of"):
        ResumableBatches(**{"size": 5, "batch_size": 2, "seed": 0, **options})


def test_held_out_images_are_random_whole_and_not_trained_on(digits):
    digits.random_flip = digits.random_crop = True
    rest, (images, cond) = hold_out(digits, 10, seed=5)
    held = number(images)
    assert images.shape == (10, 1, 8, 8) and len(set(held)) == 10 and held != sorted(held)
    assert cond["y"].tolist() == [n % 5 - 1 for n in held]
    seen = [n for batch, _ in take(load_stream(rest, 6, seed=0, num_workers=0), 5) for n in number(batch)]
    assert sorted(seen + held) == list(range(40))
    assert rest.random_crop and len(digits) == 40
    assert number(hold_out(digits, 10, seed=5)[1][0]) == held != number(hold_out(digits, 10, seed=6)[1][0])
    nothing_left_out, (none, cond) = hold_out(digits, 0, seed=5)
    assert len(nothing_left_out) == 40 and none.shape == (0, 1, 8, 8) and cond["y"].shape == (0,)


def test_held_out_images_are_readable_ones(prefix_folder):
    dataset = open_dataset(str(prefix_folder), 8, class_cond=True)
    for name in ("cat_0.png", "cat_1.png", "dog_0.png", "owl_3.png"):
        spoil(prefix_folder / name, "truncated")
    rest, (images, cond) = hold_out(dataset, 8, seed=0)
    assert len(images) == 8 and sorted(cond["y"].tolist()) == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [path.rsplit("/", 1)[1] for path in rest.local_images] == [
        "cat_0.png",
        "cat_1.png",
        "dog_0.png",
        "owl_3.png",
    ]
    with pytest.raises(UserValueError, match="9 images.*only 8"):
        hold_out(dataset, 9, seed=0)


SHARES = """
import itertools, json, sys
import torch.distributed as dist
from guided_diffusion import dist_util, image_datasets
dist_util.setup_dist()
folder = sys.argv[1]
if dist.get_rank():
    image_datasets.list_images = None  # the first rank lists for all
options = dict(image_size=8, deterministic=True, random_flip=False)
data = image_datasets.load_data(data_dir=folder, batch_size=6, **options)
dataset = image_datasets.open_dataset(folder, 8)
stream = image_datasets.load_stream(dataset, 3, seed=0)
sums = next(data)[0].sum(dim=(1, 2, 3)).tolist()
positions = [cond["position"].tolist() for _, cond in itertools.islice(stream, 2)]
sys.stdout.write(json.dumps([dist.get_rank(), sums, positions]) + "\\n")
"""


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_real_ranks_share_the_data(launch, prefix_folder, tmp_path, launcher):
    (tmp_path / "script.py").write_text(SHARES)
    job = launch(launcher, tmp_path / "script.py", prefix_folder)
    assert job.returncode == 0, job.stderr
    (_, sums0, positions0), (_, sums1, positions1) = sorted(map(json.loads, job.stdout.splitlines()))
    assert positions0 == [[0, 1, 2], [6, 7, 8]] and positions1 == [[3, 4, 5], [9, 10, 11]]
    single = next(
        load_data(
            data_dir=str(prefix_folder), batch_size=12, image_size=8, deterministic=True, random_flip=False
        )
    )[0].sum(dim=(1, 2, 3))
    agree(sums0, single[0::2], rtol=1e-5)
    agree(sums1, single[1::2], rtol=1e-5)


# -------------------------------------------------------------------------------------------------- real data


def test_real_images_with_prefix_labels(unpacked_dev_data, tmp_path):
    source = unpacked_dev_data("tiny_imagenet20.tar") / "tiny_imagenet20"
    folder = tmp_path / "some"
    for wnid in sorted(path for path in source.iterdir() if path.is_dir())[:3]:
        (folder / wnid.name).mkdir(parents=True)
        for path in sorted(wnid.iterdir())[:40]:
            shutil.copy(path, folder / wnid.name)
    dataset = open_dataset(str(folder), 64, class_cond=True)
    assert len(dataset) == 120 and len(dataset.class_names) == 3
    assert all(name.startswith("n0") for name in dataset.class_names)
    batch, cond = next(load_stream(dataset, 120, seed=0))
    assert batch.shape == (120, 3, 64, 64) and sorted(cond["y"].tolist()) == [0] * 40 + [1] * 40 + [2] * 40
    assert 90 < batch.double().mean() < 165 and 40 < batch.double().std() < 100


def test_an_uncompressed_file_is_mapped_and_a_compressed_one_read(tmp_path):
    images = np.random.RandomState(0).randint(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "plain.npz", images)
    np.savez_compressed(tmp_path / "small.npz", images)
    plain, small = (open_dataset(str(tmp_path / f"{name}.npz"), 8) for name in ("plain", "small"))
    assert not plain.local_images.flags.writeable and not plain.local_images.flags.owndata
    assert np.array_equal(plain.local_images, small.local_images)
    assert np.array_equal(plain.load(3, random.Random(0))[0], small.load(3, random.Random(0))[0])
