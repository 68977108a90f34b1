"""What a user gives as a file becomes a modality's value, or one line of explanation."""

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion.errors import UserError
from guided_diffusion.mt.files import read_images, read_labels, read_vectors
from guided_diffusion.mt.modalities import VectorModality, preset

LABEL = preset("label", "label", (3, 8, 8), 10)
VECTOR = VectorModality("clip", (4,), encoder=lambda value: value, head="middle")


def noise(count=2, size=8, channels=3, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (count, size, size, channels), dtype=np.uint8)


def values_of(pixels):
    """uint8 [N, H, W, C] -> [-1, 1] [N, C, H, W]"""
    return th.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------------------
# images


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_the_models_size_are_read_as_they_are(tmp_path, channels):
    pixels = noise(channels=channels)
    for k, one in enumerate(pixels):
        Image.fromarray(one.squeeze(-1) if channels == 1 else one).save(tmp_path / f"{k}.png")
    (tmp_path / "notes.txt").write_text("no image")
    given = read_images(str(tmp_path), channels, 8)
    assert given.known is None and th.allclose(given.values, values_of(pixels), atol=1e-6)
    one = read_images(str(tmp_path / "1.png"), channels, 8)
    assert one.values.shape == (1, channels, 8, 8) and th.allclose(
        one.values, values_of(pixels[1:]), atol=1e-6
    )


def test_arrays_are_read_as_they_are(tmp_path):
    pixels, mask = noise(), noise(channels=1)[..., 0] > 100
    np.savez(tmp_path / "a.npz", arr_0=pixels)
    np.savez(tmp_path / "b.npz", arr_0=pixels, mask=mask)
    np.savez(tmp_path / "c.npz", arr_0=pixels, mask=np.ones_like(mask))
    for name in "ac":
        given = read_images(str(tmp_path / f"{name}.npz"), 3, 8)
        assert given.known is None and th.allclose(given.values, values_of(pixels), atol=1e-6)
    given = read_images(str(tmp_path / "b.npz"), 3, 8)
    assert given.known.dtype == th.bool and given.known.shape == (2, 1, 8, 8)
    assert (given.known[:, 0].numpy() == mask).all()
    where = given.known.expand_as(given.values)
    assert th.allclose(given.values[where], values_of(pixels)[where], atol=1e-6)
    assert bool((given.values[~where] == 0).all())  # missing pixels are the middle of the range


@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_pixels_are_missing(tmp_path, channels):
    pixels = noise(1, channels=1).repeat(3, axis=-1)[0]
    alpha = np.full((8, 8, 1), 255, np.uint8)
    alpha[2:5, 3:6] = 0
    alpha[0, 0] = 7  # anything but 0 is there
    Image.fromarray(np.concatenate([pixels, alpha], axis=-1)).save(tmp_path / "holes.png")
    given = read_images(str(tmp_path / "holes.png"), channels, 8)
    assert (given.known[0, 0].numpy() == (alpha[..., 0] > 0)).all()
    expected = values_of(pixels[None])[:, :channels] * given.known
    assert th.allclose(given.values, expected, atol=1e-6)


def test_whole_images_of_other_sizes_and_modes_are_converted(tmp_path):
    wide = np.zeros((16, 32, 3), np.uint8)
    wide[:, 8:24] = (200, 100, 50)  # the middle square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert th.allclose(
        read_images(str(tmp_path / "wide.png"), 3, 8).values,
        values_of(np.full((1, 8, 8, 3), (200, 100, 50), np.uint8)),
        atol=1e-6,
    )
    deep = (np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / "deep.png")  # 16 bits
    expected = values_of((deep >> 8).astype(np.uint8)[None, ..., None])
    assert th.allclose(read_images(str(tmp_path / "deep.png"), 1, 8).values, expected, atol=1e-6)


def test_images_that_cannot_be_used_are_named(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(noise(1, 64)[0]).save(whole)
    (tmp_path / "torn.png").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no image")
    holes = np.zeros((16, 16, 4), np.uint8)
    Image.fromarray(holes).save(tmp_path / "holes16.png")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "float.npz", arr_0=np.full((1, 8, 8, 3), np.nan))
    np.savez(tmp_path / "size.npz", arr_0=noise(1, 16))
    np.savez(tmp_path / "grey.npz", arr_0=noise(1, channels=1))
    np.savez(tmp_path / "name.npz", images=noise())
    np.savez(tmp_path / "mask.npz", arr_0=noise(), mask=np.ones((2, 4, 4), bool))
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}]))
    (tmp_path / "torn.npz").write_bytes((tmp_path / "size.npz").read_bytes()[:300])
    (tmp_path / "text.npz").write_text("no arrays")
    for name, message in (
        ("absent.png", "no such file or folder"),
        ("torn.png", "torn.png cannot be read as an image"),
        ("text.png", "text.png cannot be read as an image"),
        ("holes16.png", "must have the model's size, 8x8"),
        ("empty", "no images in"),
        ("float.npz", "must be uint8 .*, not float64"),
        ("size.npz", "the images are 16x16x3, the model's 8x8x3"),
        ("grey.npz", "the images are 8x8x1, the model's 8x8x3"),
        ("name.npz", "has no array arr_0"),
        ("mask.npz", r"mask is \[2, 4, 4\]"),
        ("objects.npz", "not a sound"),
        ("torn.npz", "not a sound"),
        ("text.npz", "not a sound"),
    ):
        with pytest.raises(UserError, match=message):
            read_images(str(tmp_path / name), 3, 8)
    with pytest.raises(UserError, match="give them as an .npz"):
        read_images(str(whole), 2, 64)


# ------------------------------------------------------------------------------------------------- labels and
# vectors


def test_labels_are_read_from_text_and_files(tmp_path):
    numbers = np.array([3, 0, 9])
    np.save(tmp_path / "a.npy", numbers)
    for name in ("label", "labels", "arr_1", "arr_0"):
        np.savez(tmp_path / f"{name}.npz", **{name: numbers})
    np.savez(tmp_path / "both.npz", arr_0=noise(3), labels=numbers)  # as data are stored
    for source in ("3,0,9", *(tmp_path / f"{n}.npz" for n in ("label", "labels", "arr_1", "arr_0", "both"))):
        values = read_labels(str(source), LABEL)
        assert values.shape == (3, 10) and values.dtype == th.float32
        assert values.argmax(dim=1).tolist() == [3, 0, 9] and bool((values.sum(dim=1) == 1).all())
    assert th.equal(read_labels(str(tmp_path / "a.npy"), LABEL), read_labels("3,0,9", LABEL))
    soft = np.full((2, 10), 0.1)
    np.save(tmp_path / "soft.npy", soft)
    assert np.allclose(read_labels(str(tmp_path / "soft.npy"), LABEL), soft)


def test_labels_that_cannot_be_used_are_refused(tmp_path):
    np.save(tmp_path / "real.npy", np.array([1.0, 2.0]))
    np.save(tmp_path / "nan.npy", np.full((2, 10), np.nan))
    np.save(tmp_path / "sum.npy", np.full((2, 10), 0.5))
    np.save(tmp_path / "wide.npy", np.full((2, 5), 0.2))
    np.savez(tmp_path / "name.npz", classes=np.array([1]))
    (tmp_path / "torn.npy").write_bytes((tmp_path / "nan.npy").read_bytes()[:90])
    (tmp_path / "torn.npz").write_bytes((tmp_path / "name.npz").read_bytes()[:90])
    for source, message in (
        ("10", r"class numbers must be 0..9"),
        ("-1", r"class numbers must be 0..9"),
        ("cat", "has no names"),
        ("1.5", "class numbers must be"),
        ("", "class numbers must be"),
        (tmp_path / "absent.npy", "absent.npy does not exist"),
        (tmp_path / "real.npy", "must be integers"),
        (tmp_path / "nan.npy", "NaN or infinity"),
        (tmp_path / "sum.npy", "probability vectors"),
        (tmp_path / "wide.npy", r"expected values of shape \[B, 10\]"),
        (tmp_path / "name.npz", "none of the arrays label"),
        (tmp_path / "torn.npy", "not a sound"),
        (tmp_path / "torn.npz", "not a sound"),
    ):
        with pytest.raises(UserError, match=message):
            read_labels(str(source), LABEL)


def test_vectors_are_read_from_files(tmp_path):
    vectors = np.random.RandomState(0).randn(3, 4)
    np.save(tmp_path / "a.npy", vectors)
    np.savez(tmp_path / "b.npz", clip=vectors, arr_0=noise())
    for name in ("a.npy", "b.npz"):
        values = read_vectors(str(tmp_path / name), VECTOR)
        assert values.dtype == th.float32 and np.allclose(values, vectors)
    np.save(tmp_path / "wide.npy", np.zeros((3, 5)))
    np.save(tmp_path / "nan.npy", vectors * np.nan)
    np.save(tmp_path / "words.npy", np.array([["a"] * 4]))
    for name, message in (
        ("absent.npy", "absent.npy does not exist"),
        ("wide.npy", r"expected values of shape \[B, 4\]"),
        ("nan.npy", "NaN or infinity"),
        ("words.npy", "must be numbers"),
    ):
        with pytest.raises(UserError, match=message):
            read_vectors(str(tmp_path / name), VECTOR)
