"""Reading images in pieces, and clear messages about those that cannot be evaluated."""

import threading

import numpy as np
import pytest
from PIL import Image

from evaluations.images import (
    ArrayImages,
    FolderImages,
    NpzImages,
    list_images,
    load_array,
    open_images,
    prefetch,
)
from guided_diffusion.errors import UserError
from guided_diffusion.image_files import center_crop_arr

from .conftest import sample_images


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_in_pieces(tmp_path, save):
    array = sample_images(11)
    save(tmp_path / "a.npz", arr_0=array, arr_1=np.arange(11))
    images = NpzImages(tmp_path / "a.npz")
    assert images.shape == (11, 16, 16, 3)
    assert [len(part) for part in images.batches(0, 11, 4)] == [4, 4, 3]
    assert np.array_equal(np.concatenate(list(images.batches(0, 11, 4))), array)
    assert np.array_equal(np.concatenate(list(images.batches(3, 10, 2))), array[3:10])


def test_npz_in_fortran_order(tmp_path):
    array = sample_images(5)
    np.savez(tmp_path / "a.npz", arr_0=np.asfortranarray(array))
    images = NpzImages(tmp_path / "a.npz")
    assert np.array_equal(np.concatenate(list(images.batches(1, 5, 2))), array[1:5])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((3, 8, 8, 3), np.float32),
            "float32, images must be uint8 0 to 255; from .* convert with",
        ),
        (np.full((3, 8, 8, 3), np.nan), "float64, .* 576 of its values are NaN or infinite"),
        (np.zeros((3, 8, 8), np.uint8), r"grey images \[3, 8, 8\]"),
        (np.zeros((3, 8, 8, 1), np.uint8), r"grey images \[3, 8, 8, 1\]"),
        (
            np.zeros((3, 3, 8, 8), np.uint8),
            r"\[3, 3, 8, 8\], expected \[N, H, W, 3\]: move the channels last",
        ),
        (np.zeros((3, 8, 8, 4), np.uint8), r"expected \[N, H, W, 3\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), "is empty"),
        (np.zeros((3, 8, 8, 3), np.int64), "int64, images must be uint8"),
    ],
)
def test_unusable_arrays_are_described(tmp_path, array, message):
    np.savez(tmp_path / "a.npz", arr_0=array)
    with pytest.raises(UserError, match=message):
        NpzImages(tmp_path / "a.npz")
    with pytest.raises(UserError, match=message):
        ArrayImages(array)


def test_unusable_files_are_described(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.npz does not exist"):
        open_images(tmp_path / "missing.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(UserError, match="text.npz is not a sound .npy or .npz file"):
        open_images(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", images=sample_images(2))
    with pytest.raises(UserError, match=r"has no array arr_0 \(it holds images\)"):
        open_images(tmp_path / "other.npz")
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}], dtype=object))
    with pytest.raises(
        UserError, match="objects.npz is not a sound .* file: it holds something else than numbers"
    ):
        load_array(tmp_path / "objects.npz", "arr_0")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images"):
        open_images(tmp_path / "empty")


def test_folder_is_read_in_the_order_of_its_paths(tmp_path):
    array = sample_images(7)
    for index, image in enumerate(array):
        path = tmp_path / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    images = open_images(tmp_path)
    assert images.shape == (7, 16, 16, 3)
    expected = array[[0, 2, 4, 6, 1, 3, 5]]
    assert np.array_equal(np.concatenate(list(images.batches(0, 7, 3))), expected)
    assert np.array_equal(np.concatenate(list(images.batches(2, 6, 3))), expected[2:6])


def test_grey_and_palette_files_become_rgb(tmp_path):
    grey = Image.fromarray(sample_images(1)[0]).convert("L")
    grey.save(tmp_path / "a.png")
    grey.convert("P").save(tmp_path / "b.png")
    batch = next(open_images(tmp_path).batches(0, 2, 2))
    assert batch.shape == (2, 16, 16, 3)
    assert np.array_equal(batch[0], np.repeat(np.asarray(grey)[..., None], 3, 2))


def test_files_of_several_sizes_need_a_size(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    Image.new("RGB", (24, 20)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="b.png is 24x20, others are 16x16.*--image_size"):
        list(open_images(tmp_path).batches(0, 2, 2))
    assert FolderImages(list_images(tmp_path), "x", size=8).shape == (2, 8, 8, 3)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(UserError, match="a.png cannot be read"):
        open_images(tmp_path)


def test_center_crop_takes_the_middle():
    # 40 wide, 20 high: halving gives 20x10, whose middle 10x10 is the image's middle half.
    array = np.zeros((20, 40, 3), np.uint8)
    array[:, 10:30] = 200
    cropped = center_crop_arr(Image.fromarray(array), 10)
    assert cropped.shape == (10, 10, 3)
    assert (cropped == 200).all()


def test_center_crop_averages_when_it_halves():
    checker = np.indices((16, 16)).sum(0) % 2 * 255
    image = Image.fromarray(np.repeat(checker[..., None], 3, 2).astype(np.uint8))
    assert abs(center_crop_arr(image, 8).astype(int) - 127.5).max() <= 1


def test_prefetch_keeps_order_and_reads_ahead():
    read = []

    def source():
        for number in range(10):
            read.append(number)
            yield number

    items = prefetch(source(), ahead=3)
    assert next(items) == 0
    waited = threading.Event()
    for _ in range(100):
        if len(read) >= 4:  # three wait, one is in hand
            break
        waited.wait(0.02)
    assert 4 <= len(read) <= 5
    assert list(items) == list(range(1, 10))


def test_prefetch_passes_errors_on():
    def source():
        yield 1
        raise UserError("broken")

    items = prefetch(source())
    assert next(items) == 1
    with pytest.raises(UserError, match="broken"):
        next(items)


def test_prefetch_ends_its_thread_when_it_is_abandoned():
    before = threading.active_count()
    items = prefetch(iter(range(1000)), ahead=2)
    next(items)
    items.close()
    for _ in range(100):
        if threading.active_count() <= before:
            return
        threading.Event().wait(0.02)
    pytest.fail("the reading thread is still there")
