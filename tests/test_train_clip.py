"""train_clip.py: what it writes is a CLIP that finds images by their captions, as its metrics say."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from guided_diffusion.errors import UserValueError
from ldm.data.captions import CaptionFolder
from ldm.modules.encoders import small_clip
from ldm.modules.encoders.modules import (
    FrozenCLIPEmbedder,
    FrozenOpenCLIPEmbedder,
    FrozenOpenCLIPImageEmbedder,
)

transformers = pytest.importorskip("transformers")
COLOURS = {
    "red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240),
    "black": (15, 15, 15), "yellow": (230, 220, 40),
}  # fmt: skip
TINY = "--size 16 --width 32 --layers 1 --patch 8 --max_length 8 --batch_size 16 --held_out_every 4".split()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Twenty-four noisy images of six colours, whose two captions name the colour."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for i in range(24):
        name = list(COLOURS)[i % 6]
        pixels = np.array(COLOURS[name]) + rng.normal(0, 10, (20, 20, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"{i:02}.png")
        (root / f"{i:02}.txt").write_text(f"a {name} wall\nsomething in {name} .\n")
    return root


def test_retrieval_counts_what_comes_first():
    likeness = torch.tensor(
        [
            [0.9, 0.1, 0.8, 0.3],  # its captions 0 and 1: the first is best
            [0.2, 0.4, 0.3, 0.3],  # its captions 2 and 3: after 1, and one of them is as good as the other
        ]
    )
    found = small_clip.retrieval(likeness, torch.tensor([0, 0, 1, 1]))
    assert found["image_to_text"] == small_clip.Retrieval(0.5, 1.0, 1.5)  # places 1 and 2
    # Caption 0: first; 1: second; 2: second; 3: as good as the other image, which counts as found before.
    assert found["text_to_image"] == small_clip.Retrieval(0.25, 1.0, 2.0)
    many = torch.arange(10.0).repeat(10, 1)  # every image likes caption 9 best
    assert small_clip.retrieval(many, torch.arange(10))["image_to_text"] == small_clip.Retrieval(
        0.1, 0.5, 5.5
    )
    constant = small_clip.retrieval(torch.zeros(10, 10), torch.arange(10))
    assert constant["image_to_text"].recall_5 == constant["text_to_image"].recall_5 == 0


def test_chance_is_that_of_a_draw():
    found = small_clip.chance(torch.arange(30).repeat_interleave(3), 30)
    none_of_three = math.comb(87, 5) / math.comb(90, 5)
    assert found["image_to_text"].recall_1 == pytest.approx(1 / 30, abs=0.01)
    assert found["image_to_text"].recall_5 == pytest.approx(1 - none_of_three, abs=0.02)
    assert found["text_to_image"].recall_5 == pytest.approx(5 / 30, abs=0.02)
    assert found["text_to_image"].median_rank == pytest.approx(15.5, abs=0.5)


def test_every_text_can_be_tokenised(tmp_path):
    tokenizer = small_clip.train_tokenizer(["a dog runs", "a dog sits", "the dog ."] * 3, max_length=8)
    tokenizer.save_pretrained(tmp_path)
    read = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    for text in ("a dog", "zebra! 42", "日本 ümlaut", "the <|endoftext", ""):
        row = read(text)["input_ids"]
        assert row == tokenizer(text)["input_ids"] and row[0] == read.bos_token_id
        assert row.index(read.eos_token_id) == len(row) - 1  # no letter is unknown
        assert read.decode(row[1:-1]).replace(" ", "") == text.replace(" ", "")
    assert len(read("a dog")["input_ids"]) == 4 and read.convert_tokens_to_ids("!") == 0
    with pytest.raises(UserValueError, match="size 20 must be a multiple of patch 8"):
        small_clip.make_clip(tokenizer, 20, 32, 1, 8, 8, 0.0)


@torch.no_grad()
def embeddings(folder, images, captions):
    """Of images [B, 3, H, W] and captions, by the encoders that diffusion models use."""
    text = FrozenCLIPEmbedder(str(folder), max_length=8, layer="pooled")
    projection = transformers.CLIPModel.from_pretrained(folder).text_projection
    vectors = projection(text(captions)[:, 0])
    return FrozenOpenCLIPImageEmbedder(version=str(folder))(images), vectors


@pytest.mark.parametrize("iterations, lr", [(80, 3e-3), (12, 1e-2)])  # one that learns, one that just began
def test_a_training_keeps_what_it_measured(root, tmp_path, run_script, iterations, lr):
    words = ["train_clip", "--data_dir", root, *TINY, "--iterations", iterations, "--lr", lr]
    job = run_script(*words, "--out", tmp_path / "c")
    assert job.returncode == 0, job.stderr
    metrics = json.loads((tmp_path / "c/metrics.json").read_text())
    held_out = CaptionFolder(root, 16, part="held_out", held_out_every=4)
    images = np.stack([held_out[i]["jpg"] for i in range(6)])  # of red, yellow, black, red, yellow, black
    captions = [text for some in held_out.captions for text in some]
    images, texts = embeddings(tmp_path / "c", torch.from_numpy(images).permute(0, 3, 1, 2), captions)
    likeness = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    places = np.array([(likeness[:, i] >= likeness[i // 2, i]).sum().item() for i in range(12)])
    measured = metrics["held_out"]["text_to_image"]
    assert measured["recall_1"] == np.mean(places == 1) and measured["recall_5"] == np.mean(places <= 5)
    assert measured["median_rank"] == np.median(places)
    assert metrics["images"] == {"train": 18, "held_out": 6} and metrics["iteration"] <= iterations
    assert FrozenOpenCLIPEmbedder(version=str(tmp_path / "c"), max_length=8)(captions).shape == (12, 8, 32)
    if iterations == 80:
        # The image that fits a caption best is of its colour, nearly always: by chance a third of the time.
        colours = [text.split()[1 if text.startswith("a ") else 2] for text in captions]
        right = [colours[2 * likeness[:, i].argmax()] == colours[i] for i in range(12)]
        assert np.mean(right) > 0.7


def test_a_finished_training_is_left_alone(root, tmp_path, run_script):
    (tmp_path / "metrics.json").write_text("{}")
    job = run_script("train_clip", "--data_dir", root, "--out", tmp_path, *TINY)
    assert job.returncode == 2 and "has a CLIP already" in job.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_the_seed_decides(root, tmp_path, run_script):
    words = ["train_clip", "--data_dir", root, *TINY, "--iterations", "3"]
    weights = []
    for number, seed in enumerate((1, 1, 2)):
        job = run_script(*words, "--out", tmp_path / str(number), "--seed", seed)
        assert job.returncode == 0, job.stderr
        weights.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize(
    "change, message",
    [
        (["--batch_size", "19"], "has 18 images to train on, fewer than --batch_size"),
        (["--held_out_every", "1"], "--held_out_every must be at least 2, not 1"),
        (["--max_length", "2"], "--max_length must be at least 3"),
        (["--width", "33"], "width 33 one of 32"),
        (["--dropout", "1"], "must be from 0 to 0.9, not 1"),
    ],
)
def test_flags_that_cannot_be_are_named(root, tmp_path, run_script, change, message):
    job = run_script("train_clip", "--data_dir", root, "--out", tmp_path / "c", *TINY, *change)
    assert job.returncode == 2 and message in job.stderr and "Traceback" not in job.stderr
    assert not (tmp_path / "c").exists()
