"""scripts/pack_images.py: the file gives the batches that the folder gives."""

import itertools
import sys

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion import logger
from guided_diffusion.image_datasets import load_data, load_stream, open_dataset
from tests.conftest import ROOT, sample_image

SIZE = 8


@pytest.fixture
def folder(tmp_path):
    """Twelve images of three classes, none of them square, of which one cannot be read."""
    for i in range(12):
        path = tmp_path / "photos" / ("cat", "dog", "owl")[i % 3] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sample_image(20 * i, (30, 20 + i)).save(path)
    (tmp_path / "photos" / "dog" / "04.png").write_bytes(b"no image")
    with logger.scoped_configure(dir=str(tmp_path / "log"), format_strs=["log"]):
        yield tmp_path / "photos"


@pytest.fixture
def pack(monkeypatch, tmp_path):
    """pack(source, *flags): the path of the file."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import pack_images

    def call(source, *flags):
        target = tmp_path / "packed.npz"
        argv = ["pack_images", source, target, "--image_size", SIZE, "--num_workers", 0, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        pack_images.main()
        return target

    return call


def same(ours, theirs):
    for (a, c), (b, d) in zip(ours, theirs, strict=True):
        assert th.equal(a, b) and c.keys() == d.keys() and all(th.equal(c[key], d[key]) for key in c)


@pytest.mark.parametrize("flip", [False, True])
def test_the_file_gives_the_batches_of_the_folder(folder, pack, flip):
    packed = open_dataset(str(pack(folder)), SIZE, class_cond=True, random_flip=flip)
    dataset = open_dataset(str(folder), SIZE, class_cond=True, random_flip=flip)
    assert packed.class_names == dataset.class_names == ["cat", "dog", "owl"]
    assert not packed.local_images.flags.owndata  # mapped
    streams = (load_stream(data, 5, seed=1, num_workers=0) for data in (dataset, packed))
    same(*(list(itertools.islice(stream, 6)) for stream in streams))
    options = dict(batch_size=12, image_size=SIZE, class_cond=True, deterministic=True, random_flip=False)
    same(*([next(load_data(data_dir=str(d), num_workers=0, **options))] for d in (folder, pack(folder))))


def test_a_folder_without_classes_is_packed_without(folder, pack, tmp_path):
    for i, path in enumerate(sorted(folder.glob("*/*"))):
        (tmp_path / "flat").mkdir(exist_ok=True)
        path.rename(tmp_path / "flat" / f"{i}.png")
    with np.load(pack(tmp_path / "flat", "--image_channels", 1)) as arrays:
        assert arrays.files == ["arr_0"] and arrays["arr_0"].shape == (12, SIZE, SIZE, 1)


def test_numbers_stay_the_names_of_classes(tmp_path, pack):
    for name in ("0", "2", "10"):
        for i in range(2):
            (tmp_path / "numbers" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9)).save(tmp_path / "numbers" / name / f"{i}.png")
    with np.load(pack(tmp_path / "numbers", "--num_classes", 12)) as arrays:
        assert arrays["labels"].tolist() == [0, 0, 10, 10, 2, 2] and len(arrays["class_names"]) == 11


def test_too_many_bad_images_leave_no_file(folder, pack, tmp_path, capsys):
    with pytest.raises(SystemExit):
        pack(folder, "--max_bad", 0)
    assert "04.png" in capsys.readouterr().err and not list(tmp_path.glob("*.npz*"))
