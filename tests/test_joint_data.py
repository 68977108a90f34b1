"""Any modality from the command line: what the data are read from, that values are kept, and what is refused."""

import csv
import io
import json
import random
import re
import shutil
import struct
import tarfile
import wave
import zlib

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion.checkpoint_util import load_complete
from guided_diffusion.errors import UserError
from guided_diffusion.mt.bound import multitask_bound
from guided_diffusion.mt.cells import Cell, pixels_of
from guided_diffusion.mt.data import JointImages, borne, completed, find_source, label_names
from guided_diffusion.mt.losses import multitask_losses
from guided_diffusion.mt.modalities import MapModality, as_mapping, label_in, parse_modalities, resolve_target
from guided_diffusion.mt.modality_set import batch_of
from guided_diffusion.mt.model import JointModel, mt_defaults
from guided_diffusion.seeding import PerSample
from tests.mt_driver import in_process, refusal, same

COUNT, SIZE = 12, 8
WEATHER = ("rain", "sun")
PALETTE = "10 20 30 road\n200 0 0 car\n0 0 250 sky\n5 5 5 void\n"
COLORS = np.array([[10, 20, 30], [200, 0, 0], [0, 0, 250]], np.uint8)
SPEC = "kind=label,weather,depth,sound,seg=map"
MODEL = (
    "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --attention_resolutions 4 "
    "--num_head_channels 32 --diffusion_steps 40 --noise_schedule cosine"
).split()
TRAIN = (
    "--lr 1e-3 --ema_rate 0.9 --batch_size 3 --held_out 3 --num_workers 0 --log_interval 5 --progress False "
    "--sample_steps 0"
).split()


def rows(size=SIZE, seed=0):
    """What every source of these tests holds: uint8 images, 16-bit depth, class maps, vectors and two labels."""
    rng = np.random.RandomState(seed)
    return dict(
        image=rng.randint(0, 256, (COUNT, size, size, 3), dtype=np.uint8),
        depth=rng.randint(0, 65536, (COUNT, size, size)).astype(np.uint16),
        seg=rng.randint(0, 3, (COUNT, size, size)).astype(np.uint8),
        sound=rng.randn(COUNT, 5).round(3).astype(np.float32),
        kind=np.arange(COUNT) % 3,
        weather=np.arange(COUNT) % 2,
    )


def as_folders(root, data, table=True):
    for name in ("image", "depth", "seg"):
        (root / name).mkdir(parents=True)
        for k, array in enumerate(data[name]):
            Image.fromarray(array).save(root / name / f"{k:02}.png")
    if table:
        with open(root / "metadata.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file_name", "kind", "weather", "sound", "text"])
            for k in range(COUNT):
                sound = " ".join(map(str, data["sound"][k].tolist()))
                writer.writerow(
                    [f"{k:02}.png", data["kind"][k], WEATHER[data["weather"][k]], sound, "a caption"]
                )
    return root


def as_npz(root, data):
    path = root / "data.npz"
    np.savez(
        path, **{("arr_0" if k == "image" else k): v for k, v in data.items()}, weather_class_names=WEATHER
    )
    return path


def as_jsonl(root, data):
    as_folders(root, data, table=False)
    lines = [
        json.dumps(
            dict(
                image=f"image/{k:02}.png", depth=f"depth/{k:02}.png", seg=f"seg/{k:02}.png", kind=int(data["kind"][k]),
                weather=WEATHER[data["weather"][k]], sound=data["sound"][k].tolist(),
            )
        )
        for k in range(COUNT)
    ]  # fmt: skip
    (root / "rows.jsonl").write_text("\n".join(lines))
    return root / "rows.jsonl"


def as_tar(root, data):
    as_folders(root / "files", data, table=False)
    with tarfile.open(root / "shard-0.tar", "w") as tar:
        for k in range(COUNT):
            for name in ("image", "depth", "seg"):
                tar.add(root / "files" / name / f"{k:02}.png", f"{k:02}.{name}.png")
            sound = io.BytesIO()
            np.save(sound, data["sound"][k])
            more = {
                "kind.txt": str(data["kind"][k]),
                "json": json.dumps({"weather": WEATHER[data["weather"][k]]}),
            }
            for end, content in {"sound.npy": sound.getvalue(), **more}.items():
                content = content.encode() if isinstance(content, str) else content
                member = tarfile.TarInfo(f"{k:02}.{end}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return root / "shard-0.tar"


def as_hugging_face(root, data):
    sets = pytest.importorskip("datasets")
    images = {n: [Image.fromarray(array) for array in data[n]] for n in ("image", "depth", "seg")}
    kinds = {name: sets.Image() for name in images} | {"kind": sets.Value("int64")}
    kinds |= {"weather": sets.ClassLabel(names=list(WEATHER)), "sound": sets.Sequence(sets.Value("float32"))}
    columns = {**images, **{name: data[name].tolist() for name in ("kind", "weather", "sound")}}
    made = sets.Dataset.from_dict(columns, features=sets.Features(kinds))
    sets.DatasetDict(train=made).save_to_disk(str(root / "saved"))
    return root / "saved"


LAYOUTS = dict(folders=as_folders, npz=as_npz, jsonl=as_jsonl, tar=as_tar, hugging_face=as_hugging_face)


def opened(path, spec=SPEC, missing="error", **options):
    """The data set of a specification, as training opens it."""
    spec = as_mapping(spec)
    label = label_in(spec)
    source = find_source(str(path), borne(spec), missing, label)
    spec = completed(spec, source, label)
    names = label_names(source, label, spec[label]) if label else []
    members = parse_modalities(spec, (3, SIZE, SIZE), len(names) or None, embedded=True)
    members = [m for m in members if m.name in borne(spec)]
    options = {"random_flip": False, **options}
    return JointImages(source, members, SIZE, missing=missing, class_names=names, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return as_folders(tmp_path_factory.mktemp("data") / "rows", rows())


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    """The folder of a model of five modalities, after three steps."""
    folder = tmp_path_factory.mktemp("trained")
    in_process("mt_image_train", *MODEL, *TRAIN, "--data_dir", folders, "--modalities", SPEC, "--iterations", 3,
               "--save_interval", 100, "--log_dir", folder)  # fmt: skip
    return folder


def sample(model, folder, *flags):
    in_process("mt_image_sample", "--model_path", model, "--log_dir", folder, "--steps", 3, *flags)
    (path,) = folder.glob("samples_*.npz")
    with np.load(path) as arrays:
        return dict(arrays)


# ------------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_source_gives_the_same_rows_with_their_values_kept(layout, tmp_path):
    data = rows()
    dataset = opened(LAYOUTS[layout](tmp_path / "d" if layout == "folders" else made(tmp_path), data))
    assert len(dataset) == COUNT
    for k in range(COUNT):
        image, values = dataset[k]
        assert (np.rint((image + 1) * 127.5) == data["image"][k].transpose(2, 0, 1)).all()
        assert (np.rint((values["depth"][0].astype(float) + 1) * 32767.5) == data["depth"][k]).all()
        assert (values["seg"] == data["seg"][k]).all()
        assert np.allclose(values["sound"], data["sound"][k], atol=1e-6)
        assert (values["y"], values["weather"]) == (data["kind"][k], data["weather"][k])


def made(folder):
    folder.mkdir(exist_ok=True)
    return folder


def test_float_images_of_any_channels_take_a_declared_range(tmp_path):
    data = rows()
    flow = np.random.RandomState(1).uniform(-2, 6, (COUNT, SIZE, SIZE, 5)).astype(np.float32)
    np.savez(tmp_path / "a.npz", arr_0=data["image"], flow=flow)
    dataset = opened(tmp_path / "a.npz", {"flow": {"preset": "image", "range": [-2, 6]}})
    assert dataset.modalities[0].shape == (5, SIZE, SIZE)
    assert np.allclose(dataset[3][1]["flow"] * 4 + 2, flow[3].transpose(2, 0, 1), atol=1e-5)
    with pytest.raises(UserError, match=r"a.npz row 0 of flow holds floats: say their range, as in range"):
        opened(tmp_path / "a.npz", "flow")


def test_pairs_are_cropped_and_flipped_together(tmp_path):
    """Every image of a row holds its own coordinates: the pixels must still be those of the same places."""
    size = 3 * SIZE
    places = np.arange(size * size).reshape(1, size, size).repeat(COUNT, 0)
    data = rows(size)
    data |= dict(
        image=(places % size * 10)[..., None].repeat(3, -1).astype(np.uint8),
        seg=(places % size % 3).astype(np.uint8),
    )
    data["depth"] = (places % size * 10).astype(np.uint16)
    dataset = opened(as_folders(tmp_path / "d", data), "depth,seg=map", random_crop=True, random_flip=True)
    flipped = set()
    for k in range(COUNT):
        image, values = dataset.load(k, random.Random(k))
        assert image.dtype == np.uint8
        rises = image[0, 0, -1] > image[0, 0, 0]
        flipped.add(bool(rises))
        depth = (values["depth"][0] + 1) * 32767.5
        assert np.allclose(depth, image[0], atol=2.5)  # one rounded to 8 bits, the other not
        assert set(np.unique(values["seg"])) <= {0, 1, 2}
    assert flipped == {True, False}


def test_maps_of_colours_are_numbers_and_void_is_no_class(tmp_path):
    data = rows()
    (tmp_path / "own.txt").write_text(PALETTE)
    colours = COLORS[data["seg"]]
    colours[:, 0, 0] = 5  # void
    root = as_folders(tmp_path / "d", {**data, "seg": colours})
    dataset = opened(root, {"seg": {"preset": "map", "palette": str(tmp_path / "own.txt")}})
    found = dataset[1][1]["seg"]
    assert found[0, 0] == -1 and (found[1:] == data["seg"][1][1:]).all()
    (m,) = dataset.modalities
    value, _ = m.from_data(th.from_numpy(found)[None])
    assert value.shape == (1, 3, SIZE, SIZE) and float(value[0, :, 0, 0].sum()) == 0
    painted = opened(root, {"seg": {"preset": "image", "palette": str(tmp_path / "own.txt")}})[1][1]["seg"]
    assert (np.rint((painted + 1) * 127.5) == colours[1].transpose(2, 0, 1)).all()


def test_missing_values_add_neither_loss_nor_shift(tmp_path):
    data = rows()
    root = as_folders(tmp_path / "d", data)
    (root / "depth" / "03.png").unlink()
    text = (root / "metadata.csv").read_text().replace("04.png,1,rain", "04.png,1,")
    (root / "metadata.csv").write_text(text)
    dataset = opened(root, missing="value")
    items = [dataset[k][1] for k in (3, 4)]
    assert [bool(v["depth_present"]) for v in items] == [False, True]
    assert [bool(v["weather_present"]) for v in items] == [True, False] and items[1]["weather"] == -1
    model = JointModel.from_flags({**mt_defaults(), **TINY, "modalities": list(dataset.modalities)})
    cond = {key: th.from_numpy(np.stack([v[key] for v in items])) for key in items[0]}
    batch = batch_of(model.modalities, cond, th.zeros(2, 3, SIZE, SIZE))
    terms = model.losses(batch, th.tensor([3, 3])).terms
    assert (
        terms["KL_depth"][0] == 0 < terms["KL_depth"][1]
        and terms["KL_weather"][1] == 0 < terms["KL_weather"][0]
    )
    encoded = model.modalities.encode(model.network, batch, batch.images)
    assert encoded["depth"][0].abs().max() == 0 < encoded["depth"][1].abs().max()


TINY = dict(
    image_size=8, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="4",
    num_head_channels=32, diffusion_steps=40, noise_schedule="cosine",
)  # fmt: skip

# ----------------------------------------------------------------------------------------- from the command line alone


def test_five_modalities_resume_to_the_same_bits(folders, trained, tmp_path):
    flags = [*MODEL, *TRAIN, "--data_dir", folders, "--modalities", SPEC, "--log_dir", tmp_path]
    in_process("mt_image_train", *flags, "--iterations", 2)
    in_process("mt_image_train", *flags, "--iterations", 3)
    ends = [load_complete(str(folder / "checkpoint000003.pt")) for folder in (trained, tmp_path)]
    assert all(same(ends[0][key], ends[1][key]) for key in ("model", "ema", "opt") if key in ends[0])
    assert same(ends[0]["model"], ends[1]["model"])


def test_directions_of_five_modalities(folders, trained, tmp_path):
    data = rows()
    everything = sample(trained, tmp_path / "1", "--num_samples", 2)
    assert everything.pop("weather_class_names").tolist() == ["rain", "sun"]
    shapes = {name: (value.dtype.name, value.shape) for name, value in everything.items()}
    assert shapes == {
        "arr_0": ("uint8", (2, 8, 8, 3)), "kind": ("float32", (2, 3)), "weather": ("float32", (2, 2)),
        "depth": ("uint16", (2, 8, 8, 1)), "sound": ("float32", (2, 5)), "seg": ("uint8", (2, 8, 8)),
    }  # fmt: skip
    given = sample(trained, tmp_path / "2", "--given", f"depth={folders / 'depth'}", "--want", "image,seg")
    assert (given["depth"][..., 0] == data["depth"]).all() and given["seg"].max() < 3
    read = sample(
        trained,
        tmp_path / "3",
        "--given",
        f"image={folders / 'image' / '00.png'}",
        "--want",
        "kind,depth,sound",
    )
    assert (read["arr_0"][0] == data["image"][0]).all() and np.allclose(read["kind"].sum(1), 1, atol=1e-5)
    both = sample(
        trained, tmp_path / "4", "--given", "weather=sun", "--given", f"seg={folders / 'seg' / '02.png'}",
        "--given", "sound=0.1,0.2,0.3,0.4,0.5", "--given", "kind=2", "--want", "image,depth",
    )  # fmt: skip
    assert (
        (both["seg"][0] == data["seg"][2]).all()
        and both["weather"].argmax() == 1
        and both["kind"].argmax() == 2
    )
    assert np.allclose(both["sound"], [[0.1, 0.2, 0.3, 0.4, 0.5]], atol=1e-6)


def test_bound_by_term(folders, trained, tmp_path):
    in_process("mt_image_nll", "--model_path", trained, "--data_dir", folders, "--num_samples", 3, "--steps", 4,
               "--log_dir", tmp_path)  # fmt: skip
    with np.load(tmp_path / "nll.npz") as terms:
        names = {f"L2_{name}" for name in ("kind", "weather", "depth", "sound", "seg")}
        assert names < set(terms) and all(np.isfinite(value).all() for value in terms.values())
        total = terms["L0"] + terms["L1"].sum(1) + terms["L3"] + sum(terms[name].mean(1) for name in names)
        assert np.allclose(total, terms["total"], rtol=1e-4)


def test_what_is_given_is_read_as_training_reads_it(folders, trained):
    """Larger files too: scaled and cut to the middle, 16 bits kept, maps by the nearest pixel."""
    model, dataset = JointModel.load(str(trained)), opened(folders)
    for name in ("depth", "seg", "sound"):
        m = model.modalities[name]
        wanted = th.stack([th.from_numpy(dataset[k][1][name]) for k in range(COUNT)])
        if name == "sound":
            path = folders.parent / "sound.npy"
            np.save(path, rows()["sound"])
        else:
            path = folders / name
        assert th.equal(m.read(str(path), model.shape, ()), m.from_data(wanted)[0])


def test_larger_files_are_given_as_trained(tmp_path):
    data = rows(3 * SIZE + 1)
    dataset = opened(as_folders(tmp_path / "d", data), "depth,seg=map")
    for m in dataset.modalities:
        wanted = th.stack([th.from_numpy(dataset[k][1][m.name]) for k in range(COUNT)])
        assert th.equal(m.read(str(tmp_path / "d" / m.name), (3, SIZE, SIZE), ()), m.from_data(wanted)[0])


# ---------------------------------------------------------------------------------------------------------- kind: map


def test_a_map_is_encoded_exactly_in_the_mean():
    """Linear: the encoding of probabilities is the mean of the encodings of classes drawn by them."""
    m = MapModality("seg", (3, 4, 4))
    unet = type("U", (), dict(channels=3, dtype=th.float32))
    probabilities = th.rand(1, 3, 4, 4).softmax(1)
    classes = [th.eye(3)[k].reshape(1, 3, 1, 1).expand(1, 3, 4, 4) for k in range(3)]
    mean = sum(probabilities[:, [k]] * m.encode(classes[k], unet, None) for k in range(3))
    assert th.allclose(m.encode(probabilities, unet, None), mean, atol=1e-6)
    assert th.equal(m.encode(classes[1], unet, None)[0, :, 0, 0], m.class_codes(3)[1])


def test_a_map_is_scored_pixel_by_pixel():
    m = MapModality("seg", (3, 2, 2))
    logits, numbers = th.randn(1, 3, 2, 2), th.tensor([[[0, 2], [-1, 1]]])
    value, _ = m.from_data(numbers)
    log_p = logits.log_softmax(1)
    expected = log_p[0, 0, 0, 0] + log_p[0, 2, 0, 1] + log_p[0, 1, 1, 1]
    assert th.allclose(m.log_likelihood(logits, value), expected, atol=1e-6)
    assert th.allclose(m.loss(logits, value), -expected / 4, atol=1e-6)
    assert th.equal(m.to_data(value), numbers)


# -------------------------------------------------------------------------------------------------- what a step costs


class Counting(th.nn.Module):
    """A network that counts its forward passes."""

    def __init__(self, network):
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.network(*args, **kwargs)


def test_a_step_is_one_forward_pass_however_many_modalities(trained, folders):
    """In training, in sampling and in the bound, codes standing still."""
    model, dataset = JointModel.load(str(trained)), opened(folders)
    network = Counting(model.network)
    network.heads, network.codes = model.network.heads, model.network.codes
    images, values = zip(*(dataset[k] for k in range(2)), strict=True)
    cond = {key: th.from_numpy(np.stack([v[key] for v in values])) for key in values[0]}
    batch = batch_of(model.modalities, cond, th.from_numpy(np.stack(images)))
    assert len(batch.values) == 5
    multitask_losses(model.modalities, network, batch, th.tensor([3, 9]), encoder=network)
    assert network.calls == 1
    multitask_bound(model.respaced(4), model.modalities, network, batch, random=PerSample([0, 1]))
    assert network.calls == 1 + 4


# ------------------------------------------------------------------------------------------------- a class of your own


OWN = """
import wave
from dataclasses import dataclass
import numpy as np
from guided_diffusion.mt.modalities import VectorModality

@dataclass(frozen=True)
class Sound(VectorModality):
    shape: tuple = (4,)
    gain: float = 1.0

    def from_cell(self, cell):
        with wave.open(cell.file()) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), np.int16) / 32768
        bands = np.abs(np.fft.rfft(samples))[1:33].reshape(4, 8).sum(1)
        return np.log1p(self.gain * bands).astype(np.float32)

def os_system(*args):
    raise AssertionError("called")
"""


@pytest.fixture
def with_sounds(tmp_path, monkeypatch):
    root = as_folders(tmp_path / "d", rows())
    (root / "sound").mkdir()
    for k in range(COUNT):
        with wave.open(str(root / "sound" / f"{k:02}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes((np.sin(np.arange(256) * (k + 1) / 9) * 9000).astype(np.int16).tobytes())
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_modalities_of_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    return root


def test_a_class_of_ones_own_is_found_again_from_the_checkpoint(with_sounds, tmp_path):
    """Training, resuming, sampling, the bound and conversion: the checkpoint names it, and alone is needed."""
    spec = "{sound: {target: my_modalities_of_test.Sound, gain: 2.0}, depth: {preset: image}}"
    flags = [*MODEL, *TRAIN, "--data_dir", with_sounds, "--modalities", spec, "--log_dir", tmp_path / "run"]
    in_process("mt_image_train", *flags, "--iterations", 1)
    in_process("mt_image_train", *flags, "--iterations", 2)
    moved = tmp_path / "moved.pt"
    shutil.copy(tmp_path / "run" / "checkpoint000002.pt", moved)
    m = JointModel.load(str(moved)).modalities["sound"]
    assert type(m).__name__ == "Sound" and m.gain == 2.0 and m.shape == (4,)
    out = sample(
        moved, tmp_path / "s", "--given", f"sound={with_sounds / 'sound' / '03.wav'}", "--want", "image,depth"
    )
    assert out["sound"].shape == (1, 4) and out["depth"].dtype == np.uint16
    in_process("mt_image_nll", "--model_path", moved, "--data_dir", with_sounds, "--num_samples", 2, "--steps", 2,
               "--log_dir", tmp_path / "n")  # fmt: skip
    in_process("convert_checkpoint", moved, tmp_path / "c" / "m.safetensors", "--to", "joint")
    in_process(
        "convert_checkpoint", tmp_path / "c" / "m.safetensors", tmp_path / "c" / "m.pt", "--to", "joint"
    )
    again = sample(
        tmp_path / "c" / "m.pt", tmp_path / "s2", "--given", f"sound={with_sounds / 'sound' / '03.wav'}"
    )
    assert (again["arr_0"] == out["arr_0"]).all()


@pytest.mark.parametrize(
    "target, message",
    {
        "os.system": "no class of modalities",
        "my_modalities_of_test.os_system": "no class of modalities",
        "my_modalities_of_test.Lost": "not in its module",
        "nowhere_at_all.Sound": "there is no module nowhere_at_all; put its folder on PYTHONPATH",
        "Sound": "is not of the form package.module.Class",
        "guided_diffusion.mt.model.JointModel": "no class of modalities",
    }.items(),
)
def test_only_classes_of_modalities_are_called(with_sounds, target, message):
    with pytest.raises(UserError, match=message):
        resolve_target("sound", target)


# ---------------------------------------------------------------------------------------------------------- bad input


def damaged(root, how):
    """What is wrong with the data, and the specification to ask for."""
    if how == "size":
        Image.fromarray(np.zeros((9, 8), np.uint16)).save(root / "depth" / "05.png")
        return "depth"
    if how == "partner":
        (root / "depth" / "05.png").unlink()
        return "depth"
    if how == "number":
        Image.fromarray(np.full((8, 8), 9, np.uint8)).save(root / "seg" / "05.png")
        return "{seg: {preset: map, classes: 3}}"
    if how == "colour":
        (root / "own.txt").write_text(PALETTE)
        for k in range(COUNT):
            Image.fromarray(np.full((8, 8, 3), (10, 20, 31 if k == 5 else 30), np.uint8)).save(
                root / "seg" / f"{k:02}.png"
            )
        return f"{{seg: {{preset: map, palette: {root / 'own.txt'}}}}}"
    if how == "range":
        return "{depth: {preset: image, range: [0, 60000]}}"
    if how == "column":
        return "wether"
    if how == "palette":
        return "{weather: {preset: label, palette: camvid}}"
    text = (root / "metadata.csv").read_text()
    if how == "class":
        (root / "metadata.csv").write_text(text.replace("05.png,2,sun", "05.png,7,sun"))
        return "{kind: {preset: label, classes: 3}}"
    if how == "vector":
        (root / "metadata.csv").write_text(text.replace("05.png,2,sun,", "05.png,2,sun,1 "))
        return "sound"
    (root / "metadata.csv").write_text(text.replace("05.png,2,sun", "05.png,2,"))
    return "weather"


@pytest.mark.parametrize(
    "how, message",
    {
        "size": "05.png: its depth 8x9 is not of the image's size, 8x8",
        "partner": "05.png has no partner in",
        "number": "05.png: class 9 is not one of 0..2",
        "colour": r"05.png: colour \(10, 20, 31\) is not in palette own",
        "range": r"\d\d.png: 6\d\d\d\d is outside of the range 0 to 60000",
        "column": "has no wether, but kind, weather, sound, text, did you mean weather",
        "palette": "modality weather: unknown option palette",
        "class": "metadata.csv line 7, kind: '7' is no class",
        "vector": "metadata.csv line 7, sound: sound needs 5 numbers, not 6",
        "cell": "metadata.csv line 7, weather: there is no weather; --missing value trains without it",
    }.items(),
)
def test_bad_data_are_refused_in_one_line_before_training(how, message, tmp_path, capsys):
    root = as_folders(tmp_path / "d", rows())
    spec = damaged(root, how)
    said = refusal(capsys, "mt_image_train", *MODEL, *TRAIN, "--data_dir", root, "--modalities", spec, "--iterations", 1,
                   "--log_dir", tmp_path / "run")  # fmt: skip
    assert re.search(message, said), said
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_arrays_of_unequal_counts_are_refused(tmp_path):
    data = rows()
    np.savez(tmp_path / "a.npz", arr_0=data["image"], depth=data["depth"][:-1])
    with pytest.raises(UserError, match="a.npz: depth has 11 rows, arr_0 12"):
        opened(tmp_path / "a.npz", "depth")


def test_a_batch_of_another_shape_is_refused():
    m = MapModality("seg", (3, 4, 4))
    for value in (th.zeros(1, 3, 4, 5), th.full((1, 3, 4, 4), 0.5)):
        with pytest.raises(UserError, match="modality seg"):
            m.check(value)


def test_sixteen_bits_of_colour_are_never_cut_down_unseen(tmp_path):
    """Pillow would read them as 8 bits."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = zlib.compress(b"".join(b"\0" + bytes(48) for _ in range(8)))
    head = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    path = tmp_path / "deep.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    )
    with pytest.raises(UserError, match="deep.png: 16-bit colours of a PNG cannot be read in full"):
        pixels_of(Cell(path, str(path)))
