"""Contact sheets that a person can judge."""

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion.figures import MARKS, Row, contact_sheet, is_frame, save_film, to_uint8


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


def test_a_wide_sheet_goes_on_below_with_all_its_rows():
    rows = [Row("image", plain(10, count=40)), Row("masked", plain(90, count=40), mark="given")]
    sheet = contact_sheet(rows, width=800)
    assert sheet.width <= 800
    pixels = np.asarray(sheet)
    # All tiles are there, those of both rows in turn.
    for value in (10, 90):
        assert (pixels == value).all(axis=-1).sum() == 40 * 64 * 64
    down = [int(v) for v in pixels[:, 6 + 32, 0] if v in (10, 90)]
    assert [v for k, v in enumerate(down) if not k or down[k - 1] != v] == [10, 90] * 4


def test_marks_have_their_colours_and_long_captions_do_not_collide():
    given, true = (np.asarray(contact_sheet([Row("x", plain(255), mark=m)])) for m in ("given", "true"))
    for sheet, mark in ((given, "given"), (true, "true")):
        assert (np.abs(sheet.astype(int) - MARKS[mark]).max(axis=-1) < 40).any()
    wide = contact_sheet([Row("", plain(255), ["a rather long class name"] * 3)])
    ink = (np.asarray(wide)[24 + 64 :] < 128).any(axis=(0, 2))
    gaps = [len(run) for run in "".join("x" if dark else " " for dark in ink).strip().split("x")]
    assert wide.width > 400 and sum(gap >= 6 for gap in gaps) >= 2


@pytest.mark.parametrize("total", [1, 7, 48, 49, 1000])
def test_a_film_has_few_frames_and_the_last_step(total, tmp_path):
    shown = [k for k in range(1, total + 1) if is_frame(k, total)]
    assert (
        shown[-1] == total and len(shown) == min(total, len(shown)) <= 48 and len(shown) > min(total, 24) - 1
    )
    frames = [contact_sheet([Row("", plain(k % 256, count=1))]) for k in shown]
    save_film(frames, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == len(frames) and film.size == frames[0].size
