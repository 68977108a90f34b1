"""Contact sheets that a person can judge."""

import numpy as np
import pytest
import torch as th

from guided_diffusion.figures import Row, contact_sheet, to_uint8


def plain(value, count=3, size=8, channels=3):
    return np.full((count, size, size, channels), value, dtype=np.uint8)


def test_uint8_covers_the_range_and_moves_channels_last():
    images = th.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).reshape(1, 5, 1, 1).expand(1, 5, 2, 3)
    pixels = to_uint8(images)
    assert pixels.shape == (1, 2, 3, 5) and pixels.dtype == np.uint8
    assert pixels[0, 0, 0].tolist() == [0, 0, 127, 255, 255]  # ADM truncates


def test_given_pixels_come_back_exactly_and_sampled_ones_as_adm_stores_them():
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    images = th.from_numpy(values.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
    known = th.arange(16) < 8
    pixels = to_uint8(images, known.expand(1, 1, 16, 16))
    assert (pixels[:, :, :8] == values[:, :, :8]).all()
    assert (pixels[:, :, 8:] == to_uint8(images)[:, :, 8:]).all() and (pixels != values).any()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_stand_in_a_row_enlarged_without_smoothing(channels):
    images = plain(0, channels=channels)
    images[:, ::2, ::2, : min(channels, 3)] = 200
    if channels == 4:
        images[..., 3] = 255
    sheet = np.asarray(contact_sheet([Row("", images)]))
    left, top = 6, 6 + 13 + 5
    assert sheet.shape == (top + 64 + 6, 6 + 3 * 70, 3)
    for k in range(3):
        tile = sheet[top : top + 64, left + 70 * k : left + 70 * k + 64]
        assert (
            tile
            == np.kron(images[k, ..., :3] if channels > 1 else images[k].repeat(3, -1), np.ones((8, 8, 1)))
        ).all()
        assert (sheet[top : top + 64, left + 70 * k + 64 : left + 70 * k + 70] == 255).all()


def test_transparent_pixels_are_white_and_large_images_keep_their_size():
    images = plain(10, channels=4, size=100)
    images[:, :50, :, 3] = 0
    images[:, 50:, :, 3] = 255
    sheet = np.asarray(contact_sheet([Row("", images)]))[6 + 18 :, 6:]
    assert (sheet[:50, :100] == 255).all() and (sheet[50:100, :100] == 10).all()


def test_rows_stand_below_each_other_with_titles_and_captions():
    bare = np.asarray(contact_sheet([Row("", plain(255))]))
    titled = np.asarray(contact_sheet([Row("image (generated)", plain(255))]))
    captioned = np.asarray(contact_sheet([Row("", plain(255), ("3", "1", "4"))]))
    assert (bare == 255).all()
    assert (titled[:24] < 128).any() and (titled[24:] == 255).all()
    below = captioned[24 + 64 :]
    for k in range(3):
        assert (below[:, 6 + 70 * k : 6 + 70 * k + 64] < 128).any()
    both = contact_sheet([Row("", plain(255)), Row("", plain(255), ("3", "1", "4"))])
    assert both.height == bare.shape[0] + captioned.shape[0] - 6  # one margin is shared


def test_a_long_title_is_not_cut():
    sheet = np.asarray(
        contact_sheet([Row("a title much longer than one image is wide", plain(255, count=1))])
    )
    dark = (sheet < 128).any(axis=(0, 2)).nonzero()[0]
    assert dark.max() > 200 and dark.max() < sheet.shape[1] - 6


def test_empty_rows_are_left_out_and_a_sheet_of_nothing_refused():
    one = contact_sheet([Row("", plain(0))])
    assert contact_sheet([Row("", plain(0)), Row("none", plain(0, count=0))]).size == one.size
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([Row("none", plain(0, count=0))])
