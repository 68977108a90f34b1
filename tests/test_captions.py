"""Captioned images: every caption stays with its image, and mistakes are named."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from torch.utils.data import DataLoader

from guided_diffusion.errors import UserError, UserFileError, UserValueError
from ldm.data.base import FirstStageImages
from ldm.data.captions import CaptionFolder, read_captions, read_prompts
from ldm.data.folders import ImageFolder
from tests.conftest import sample_image

COUNT = 7


@pytest.fixture
def root(tmp_path):
    """Seven images in two folders, p0 to p6, without captions."""
    for i in range(COUNT):
        path = tmp_path / "set" / ("x", "y/z")[i % 2] / f"p{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sample_image(10 * i).save(path)
    return tmp_path / "set"


def write_table(root, kind, per_image=2):
    """Captions `p3, a` and `p3, b` of the image p3, as one of the three forms."""
    rows = [(f"p{i}.png", f"p{i}, {'ab'[k]}") for k in range(per_image) for i in range(COUNT)]
    if kind == "beside":
        for path in root.rglob("*.png"):
            path.with_suffix(".txt").write_text(
                "\n".join(text for name, text in rows if name == path.name) + "\n\n"
            )
    elif kind == "metadata.jsonl":
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
        (root / kind).write_text("\n".join(lines) + "\n")
    else:
        lines = [f'{name},"{text}"' for name, text in rows]
        (root / "captions.csv").write_text("\n".join([kind, *lines]))


@pytest.mark.parametrize("kind", ["image,caption", "file_name,text", "metadata.jsonl", "beside"])
def test_every_caption_stays_with_its_image(root, kind):
    write_table(root, kind)
    data, plain = CaptionFolder(root, 8), ImageFolder(root, 8)
    pixels = {item["file_path_"]: item["image"] for item in (plain[i] for i in range(COUNT))}
    seen = Counter()
    for item in (data[i] for _ in range(20) for i in range(COUNT)):
        name = item["file_path_"].split("/")[-1].removesuffix(".png")
        assert item["txt"] in (f"{name}, a", f"{name}, b")
        assert item["jpg"].dtype == np.float32 and np.array_equal(item["jpg"], pixels[item["file_path_"]])
        seen[item["txt"]] += 1
    assert len(data) == COUNT and len(seen) == 2 * COUNT  # each caption is drawn at some time
    first = CaptionFolder(root, 8, caption="first", image_key="image", caption_key="caption")
    assert {first[0]["caption"] for _ in range(9)} == {"p0, a"} and set(first[0]) == {
        "image",
        "caption",
        "file_path_",
    }


def test_captions_are_drawn_by_the_seed(root):
    write_table(root, "beside")
    data = CaptionFolder(root, 8, random_crop=True, random_flip=True)

    def draw(seed):
        random.seed(seed)
        return [data[0]["txt"] for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)


def test_images_are_held_out_with_all_their_captions(root):
    write_table(root, "image,caption")
    captions = {}
    for part in ("all", "train", "held_out"):
        data = CaptionFolder(root, 8, part=part, held_out_every=3)
        captions[part] = {text for some in data.captions for text in some}
    # By name x/p0 x/p2 x/p4 x/p6 y/z/p1 ...: the first, fourth and seventh.
    assert captions["held_out"] == {f"p{i}, {k}" for i in (0, 6, 5) for k in "ab"}
    assert captions["train"] == captions["all"] - captions["held_out"] and len(captions["all"]) == 2 * COUNT


def test_names_below_the_root(root):
    sample_image(99).save(root / "x/p1.png")  # the second p1
    write_table(root, "image,caption", per_image=1)
    with pytest.raises(UserFileError, match=r"captions\.csv line 3 .*'p1\.png', but several images have"):
        CaptionFolder(root, 8)
    table = root / "captions.csv"
    table.write_text(table.read_text().replace("p1.png", "y/z/p1.png") + "\nx/p1.png,the other\n")
    data = CaptionFolder(root, 8)
    assert {p: c for p, c in zip(data.paths, data.captions, strict=True)}[str(root / "x/p1.png")] == (
        "the other",
    )


@pytest.mark.parametrize(
    "content, message",
    [
        ("image,caption\nnone.png,a\n", r"captions\.csv line 2 .*'none\.png', but there is no such image"),
        ("image,caption\np0.png,a\n", r"p2\.png has no caption \(6 of 7 images"),
        (
            "file,caption\np0.png,a\n",
            r"no columns image,caption or file_name,text, only 'file,caption'",
        ),
        ("", "no columns"),
        ("image,caption\np0.png\n", "line 2 does not name an image and its caption"),
        ("image,caption\np0.png, \n", "line 2 does not name an image and its caption"),
        ('image,caption\np0.png,"open', r"captions\.csv cannot be read after line 1"),
        (b"image,caption\np0.png,\xff\xfe\n", "is not text in UTF-8"),
        (
            "image,caption\n\np0.png,a cat, a dog\n",
            r"line 3 has 3 columns, its header 2: .*'p0\.png,a cat, a dog'",
        ),
    ],
)
def test_wrong_tables_are_named(root, content, message):
    (root / "captions.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as raised:
        CaptionFolder(root, 8)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["captions.csv", "metadata.jsonl", "beside"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_table_may_have_a_byte_order_mark_and_blank_lines(tmp_path, kind, end):
    caption = "a caf\u00e9\u2028of two lines, \u732b"
    for i in range(2):
        sample_image(i).save(tmp_path / f"p{i}.png")
    rows = {
        "captions.csv": ["", "image,caption", "", *(f'p{i}.png,"{caption}"' for i in range(2)), "  ,"],
        "metadata.jsonl": [
            "",
            *(json.dumps({"file_name": f"p{i}.png", "text": caption}) for i in range(2)),
            " ",
        ],
        "beside": ["", caption, " "],
    }[kind]
    files = [tmp_path / f"p{i}.txt" for i in range(2)] if kind == "beside" else [tmp_path / kind]
    for file in files:
        file.write_bytes(b"\xef\xbb\xbf" + end.join(rows).encode())
    assert set(read_captions(tmp_path).values()) == {(caption,)}


def test_prompts_are_text_or_the_lines_of_a_file(tmp_path):
    file = tmp_path / "prompts"
    file.write_bytes(b"\xef\xbb\xbfa fox\r\n\r\n  a caf\xc3\xa9 \r\n")
    assert read_prompts(str(file)) == ["a fox", "a caf\u00e9"]
    for prompt in ("a fox, in the style of a.txt", "fox", "black/white", "x" * 300, " ", "", "a\0b"):
        assert read_prompts(prompt) == [prompt]
    for missing in ("nothing.txt", str(tmp_path / "nothing"), "./nothing"):
        with pytest.raises(UserFileError, match="nothing.* cannot be read: No such file"):
            read_prompts(missing)
    with pytest.raises(UserFileError, match="Is a directory"):
        read_prompts(str(tmp_path))
    for content, message in ((b"caf\xe9\n", "is not text in UTF-8.*iconv"), (b"\n \n", "holds no prompt")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_prompts(str(file))


def test_wrong_lines_of_json_are_named(root):
    table = root / "metadata.jsonl"
    table.write_text('{"file_name": "p0.png", "text": "a"}\n{"file_name"\n')
    with pytest.raises(UserError, match=r"metadata\.jsonl line 2 is not JSON"):
        CaptionFolder(root, 8)
    for row in ('["p0.png", "a"]', '{"file_name": "p0.png"}', '{"file_name": "p0.png", "text": 3}'):
        table.write_text(row)
        with pytest.raises(UserError, match="line 1 does not name an image and its caption"):
            CaptionFolder(root, 8)
    (root / "captions.csv").write_text("image,caption\n")
    with pytest.raises(UserError, match="both captions.csv and metadata.jsonl"):
        CaptionFolder(root, 8)


def test_wrong_choices_are_named(root):
    with pytest.raises(UserError, match="has no caption .7 of 7"):
        CaptionFolder(root, 8)
    write_table(root, "beside")
    for wrong in ({"part": "test"}, {"caption": "last"}, {"part": "train", "held_out_every": 1}):
        with pytest.raises(
            UserValueError, match=next(iter(wrong.values())) if len(wrong) == 1 else "from 2 on"
        ):
            CaptionFolder(root, 8, **wrong)
    with pytest.raises(UserFileError, match="does not exist"):
        CaptionFolder(root / "nowhere", 8)


def test_workers_and_first_stages_read_them(root):
    write_table(root, "beside")
    data = CaptionFolder(root, 8)
    batch = next(iter(DataLoader(data, batch_size=COUNT, num_workers=1)))
    assert batch["jpg"].shape == (COUNT, 8, 8, 3) and len(batch["txt"]) == COUNT
    assert FirstStageImages(data)[2]["image"].shape == (8, 8, 3)


def test_photos_with_captions_of_people(unpacked_dev_data):
    """Real photos, five captions each (captions.csv)."""
    found = read_captions(unpacked_dev_data("flickr900.tar") / "flickr900")
    assert len(found) > 100 and {len(some) for some in found.values()} == {5}
