"""txt2img.py and sample_diffusion.py: from a checkpoint to files."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from omegaconf import OmegaConf
from PIL import Image

from guided_diffusion import dist_util, sample_shards
from guided_diffusion.sample_shards import Shards
from guided_diffusion.seeding import PerSample
from ldm import inference, sample_diffusion
from ldm.data.paired import CamVid
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.joint import JointLatentDiffusion
from tests.conftest import ROOT, sample_image
from tests.ldm_models import CLASSES, KL, small, unet_config
from tests.test_ldm_conditioning import WIDTH, clip  # noqa: F401 (a fixture)

CROSS = dict(use_spatial_transformer=True)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(script, *arguments): (exit code, stdout, stderr) of a script in this process."""
    for folder in ("scripts", "experiments"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    monkeypatch.setattr(dist_util, "setup_dist", lambda: None)

    def call(script, *arguments):
        module = __import__(script)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        code = 0
        try:
            module.main()
        except SystemExit as error:
            code = error.code
        return (code, *capsys.readouterr())

    return call


def write_run(folder, cls="ddpm.LatentDiffusion", **changes):
    """A run of main.py: configs/*-project.yaml and checkpoints/last.ckpt. Returns (folder, the model)."""
    params = (
        dict(
            first_stage_config=KL,
            cond_stage_config="__is_unconditional__",
            unet_config=unet_config(),
            image_size=8,
            channels=2,
            timesteps=40,
            scale_factor=0.5,
        )
        | changes
    )
    (folder / "configs").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    config = {
        "model": {"base_learning_rate": 1e-4, "target": f"ldm.models.diffusion.{cls}", "params": params}
    }
    OmegaConf.save(OmegaConf.create(config), folder / "configs" / "2024-project.yaml")
    joint = cls.startswith("joint")
    model = small(JointLatentDiffusion, **params) if joint else small(**params)
    th.save({"state_dict": model.state_dict(), "global_step": 7}, folder / "checkpoints" / "last.ckpt")
    return folder, model


@pytest.fixture(scope="module")
def joint_run(tmp_path_factory):
    spec = {"label_map": {"preset": "image", "variant": "X"}}
    return write_run(tmp_path_factory.mktemp("joint") / "run", "joint.JointLatentDiffusion", modalities=spec)


def newest(folder):
    return max((folder / "samples").glob("*/*"))


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@th.no_grad()
def test_samples_of_a_run(run, tmp_path):
    folder, model = write_run(tmp_path / "run")
    code, _, err = run("sample_diffusion", "-r", folder, "-n", 3, "-c", 4, "-e", 0, "--batch_size", 2)
    assert code == 0, err
    out = newest(folder)
    assert out.parent.name == "00000007"
    assert sorted(p.name for p in (out / "img").iterdir()) == [f"{i:06}.png" for i in range(3)]
    with np.load(out / "numpy" / "3x16x16x3-samples.npz") as data:
        assert (
            data["arr_0"].dtype == np.uint8 and (data["arr_0"][2] == pixels(out / "img" / "000002.png")).all()
        )
    assert Image.open(out / "samples.png").width > 3 * 16
    # They are what the model draws by DDIM from the seeds' noise.
    random = PerSample.derived(0, range(3))
    latents, _ = DDIMSampler(model).sample(4, 3, model.latent_shape, random=random, verbose=False)
    drawn = np.stack([pixels(out / "img" / f"{i:06}.png") for i in range(3)])
    assert np.abs(drawn - as_pixels(model.decode_first_stage(latents))).max() <= 1


@pytest.mark.parametrize(
    "options", [("-v",), ("--sampler", "dpm++"), ("--sampler", "plms"), ("--sampler", "unipc"), ("-e", "0.5")]
)
def test_other_samplers(run, tmp_path, options):
    folder, _ = write_run(tmp_path / "run")
    code, _, err = run(
        "sample_diffusion", "-r", folder / "checkpoints" / "last.ckpt", "-n", 1, "-c", 4, *options
    )
    assert code == 0, err
    assert pixels(newest(folder) / "img" / "000000.png").std() > 0


def test_joint_samples_and_both_directions(run, joint_run, tmp_path):
    folder, model = joint_run
    given = tmp_path / "given"
    given.mkdir()
    for i in range(3):
        sample_image(40 * i, (16, 16)).save(given / f"{i}.png")

    def sample(*options):
        code, _, err = run("sample_diffusion", "-r", folder, "-l", tmp_path / "out", "-c", 4, *options)
        assert code == 0, err
        out = newest(tmp_path / "out")
        found = {p.parent.name: 0 for p in out.glob("*/*.png")}
        images = {name: np.stack([pixels(p) for p in sorted((out / name).glob("*.png"))]) for name in found}
        out.rename(tmp_path / f"done{len(list(tmp_path.glob('done*')))}")
        return images

    free = sample("-n", 2)
    assert {name: p.shape for name, p in free.items()} == dict.fromkeys(("img", "label_map"), (2, 16, 16, 3))
    photos = sample("--given", f"label_map={given}", "--want", "image")
    assert list(photos) == ["img"] and photos["img"].shape == (3, 16, 16, 3)
    one = sample("--given", f"label_map={given / '0.png'}", "-n", 3)
    assert (one["img"][0] == photos["img"][0]).all() and (one["img"][1] != photos["img"][1]).any()
    label_maps = sample("--given", f"image={given}", "--batch_size", 2)
    assert list(label_maps) == ["label_map"] and len(label_maps["label_map"]) == 3


def test_a_modality_may_be_called_image(run, tmp_path):
    """Table 4: label maps are sampled, image by image, for photos that are given."""
    spec = {"image": {"preset": "image", "variant": "X"}}
    names = dict(first_stage_key="label_map", modalities=spec)
    folder, _ = write_run(tmp_path / "run", "joint.JointLatentDiffusion", **names)
    (tmp_path / "photos").mkdir()
    for i in range(2):
        sample_image(90 * i, (16, 16)).save(tmp_path / "photos" / f"{i}.png")
    options = ("-r", folder, "-l", tmp_path, "-c", 4, "--want", "label_map")
    assert run("sample_diffusion", *options, "--given", f"image={tmp_path / 'photos'}")[0] == 0
    found = sorted(newest(tmp_path).glob("*/*.png"))
    assert [p.parent.name for p in found] == ["img", "img"]


@pytest.mark.parametrize("baseline", [False, True])
def test_given_label_maps_are_those_of_the_training(run, tmp_path, monkeypatch, baseline):
    """Class numbers are painted and cut as the run's own data set does it, for joint and conditional models."""
    numbers = np.random.default_rng(0).integers(0, 12, (3, 5, 7)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    for split in ("train", "trainannot"):
        (tmp_path / "camvid" / split).mkdir(parents=True)
        for i, array in enumerate(numbers):
            image = Image.fromarray(array) if split == "trainannot" else sample_image(40 * i, (56, 40))
            image.save(tmp_path / "camvid" / split / f"{i}.png")
    params = {"root": str(tmp_path / "camvid"), "split": "train", "size": 16}
    data = {"target": "x", "params": {"train": {"target": "ldm.data.paired.CamVid", "params": params}}}
    if baseline:
        options = dict(cond_stage_config="__is_first_stage__", cond_stage_key="label_map")
        folder, _ = write_run(tmp_path / "run", **options, unet_config=unet_config(in_channels=4))
    else:
        spec = {"label_map": {"preset": "image", "variant": "X"}}
        folder, _ = write_run(tmp_path / "run", "joint.JointLatentDiffusion", modalities=spec)
    project = folder / "configs" / "2024-project.yaml"
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(project), {"data": data}), project)
    read = []
    whole = inference.read_given
    monkeypatch.setattr(inference, "read_given", lambda *a, **b: read.append(whole(*a, **b)) or read[-1])
    given = ("--given", f"label_map={tmp_path / 'camvid' / 'trainannot'}", "--want", "image")
    code, _, err = run("sample_diffusion", "-r", folder, "-c", 2, *given)
    assert code == 0, err
    trained = CamVid(**params)
    for k, value in enumerate(read[0]["label_map"]):
        assert np.array_equal(value.permute(1, 2, 0), trained[k]["label_map"])


def test_a_model_conditioned_on_images(run, tmp_path):
    """The single-task baseline: images under cond_stage_key steer the samples."""
    options = dict(cond_stage_config="__is_first_stage__", cond_stage_key="label_map")
    folder, _ = write_run(tmp_path / "run", **options, unet_config=unet_config(in_channels=4))
    given = tmp_path / "given"
    given.mkdir()
    for i in range(2):
        sample_image(90 * i, (16, 16)).save(given / f"{i}.png")
    code, _, err = run("sample_diffusion", "-r", folder, "-c", 4, "-e", 0, "--given", f"label_map={given}")
    assert code == 0, err
    assert len(list((newest(folder) / "img").iterdir())) == 2
    code, _, err = run("sample_diffusion", "-r", folder, "-n", 2)
    assert code == 2 and "conditioned on label_map: give --given label_map=" in err


def test_classes_and_guidance(run, tmp_path):
    options = dict(cond_stage_config=CLASSES, cond_stage_key="class_label", conditioning_key="crossattn")
    folder, _ = write_run(tmp_path / "run", **options, unet_config=unet_config(**CROSS, context_dim=6))
    drawn = []
    for scale in (1, 5):
        given = (
            "--given",
            "class_label=1,2",
            "--scale",
            scale,
            "--null_label",
            3,
            "-l",
            tmp_path / str(scale),
        )
        code, _, err = run("sample_diffusion", "-r", folder, "-c", 3, "-e", 0, *given)
        assert code == 0, err
        drawn.append(pixels(newest(tmp_path / str(scale)) / "img" / "000001.png"))
    assert (drawn[0] != drawn[1]).any()
    code, _, err = run("sample_diffusion", "-r", folder, "--given", "class_label=1", "--scale", 5)
    assert code == 2 and "no null input" in err
    # By name, where the configuration has names.
    project = folder / "configs" / "2024-project.yaml"
    names = {"class_names": ["ant", "bee", "cow", "nothing"]}
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(project), names), project)
    options = ("-c", 3, "-e", 0, "--scale", 5, "--null_label", 3, "-l", tmp_path / "named")
    code, _, err = run("sample_diffusion", "-r", folder, *options, "--given", "class_label=bee,cow")
    assert code == 0, err
    assert np.array_equal(pixels(newest(tmp_path / "named") / "img" / "000001.png"), drawn[1])
    code, _, err = run("sample_diffusion", "-r", folder, *options, "--given", "class_label=dog")
    assert code == 2 and "'dog' is no class: the classes are ant, bee, cow" in err


def test_the_number_of_ranks_changes_nothing(run, joint_run, tmp_path, monkeypatch):
    options = ("-r", joint_run[0], "-n", 3, "-c", 3, "--sampler", "ddpm", "--batch_size", 2)
    assert run("sample_diffusion", *options, "-l", tmp_path / "one")[0] == 0
    # Ranks that run one after the other.
    monkeypatch.setattr(sample_diffusion, "results_folder", lambda parent, about: parent / "together")
    monkeypatch.setattr(sample_shards.Shards, "_begin", lambda self, text: None)
    monkeypatch.setattr(dist_util, "from_rank_zero", lambda make: make())
    monkeypatch.setattr(dist_util, "barrier", lambda: None)
    monkeypatch.setattr(dist_util, "get_world_size", lambda: 2)
    for rank, made in ((1, 1), (0, 3)):  # rank 0 ends with the sheet
        monkeypatch.setattr(dist_util, "get_rank", lambda rank=rank: rank)
        assert run("sample_diffusion", *options, "-l", tmp_path / "two")[0] == 0
        assert len(list((tmp_path / "two/samples/00000007/together/img").iterdir())) == made
    for name in ("img", "label_map"):
        for i in range(3):
            one, two = (pixels(newest(tmp_path / n) / name / f"{i:06}.png") for n in ("one", "two"))
            assert np.abs(one - two).max() <= 1


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["-r", "nothing"], "--resume not found: 'nothing' does not exist"),
        (["-r", "{tmp}"], "has no checkpoints/last.ckpt"),
        (["-r", "{run}", "--given", "depth=a.png"], "the model has no 'depth', but image, label_map"),
        (["-r", "{run}", "--given", "label_map"], "expected NAME=FILE_OR_FOLDER"),
        (["-r", "{run}", "--given", "label_map=missing.png"], "no such file or folder: missing.png"),
        (["-r", "{run}", "--want", "depth"], "the model has no 'depth', but image, label_map"),
        (["-r", "{run}", "-n", "0", "--batch_size", "0"], "--n_samples must be at least 1, not 0"),
        (["-r", "{run}", "-n", "1", "-e", "1", "--sampler", "plms"], "only DDIM has an eta"),
        (["-r", "{run}", "--colour"], "--colour: unknown flag"),
    ],
)
def test_mistakes_are_one_line(run, joint_run, tmp_path, arguments, said):
    arguments = [a.format(tmp=tmp_path, run=joint_run[0]) for a in arguments]
    code, _, err = run("sample_diffusion", *arguments, "-l", tmp_path / "out")
    assert code == 2 and said in err and err.count("\n") == 1


# --------------------------------------------------------------------------------------------------------- txt2img


def with_text(clip):  # noqa: F811
    """The parameters of a small model that a tiny CLIP's text encoder conditions."""
    text = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
            "params": {"version": str(clip), "max_length": 8}}  # fmt: skip
    return dict(
        cond_stage_config=text,
        cond_stage_key="caption",
        conditioning_key="crossattn",
        unet_config=unet_config(**CROSS, context_dim=WIDTH),
    )


def write_colour_run(folder, clip, **changes):  # noqa: F811
    """A run of a model of text to image, and the colour of the image beside it."""
    colour = {
        "modalities": {"colour": {"preset": "representation", "shape": [3]}},
        "extractors": {"colour": READER},
    }
    return write_run(folder, "joint.JointLatentDiffusion", **colour, **with_text(clip), **changes)[0]


def write_text_run(folder, clip):  # noqa: F811
    """A run of a model of text to image."""
    return write_run(folder, **with_text(clip))[0]


def flags_of(folder, *others):
    """txt2img's flags for a run whose latents have 2 channels."""
    return ["--config", folder / "configs" / "2024-project.yaml", "--ckpt", folder / "checkpoints" / "last.ckpt",
            "--C", 2, "--f", 2, "--H", 16, *others]  # fmt: skip


@pytest.fixture(scope="module")
def text_model(tmp_path_factory, clip):  # noqa: F811
    folder = write_text_run(tmp_path_factory.mktemp("text") / "run", clip)
    return flags_of(folder, "--W", 24, "--ddim_steps", 3)


def test_prompts_become_images(run, text_model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\ndog\n")

    def draw(name, *options):
        code, _, err = run("txt2img", *text_model, "--outdir", tmp_path / name, *options)
        assert code == 0, err
        return [pixels(p) for p in sorted((tmp_path / name / "samples").glob("*.png"))]

    both = draw("a", "--from-file", prompts, "--n_samples", 2, "--n_iter", 2)
    assert len(both) == 8 and both[0].shape == (16, 24, 3)
    assert (tmp_path / "a" / "grid-0000.png").exists()
    # Sample for sample the same in other batches; another scale, prompt or sampler makes others.
    cat = draw("b", "--prompt", "a cat", "--n_samples", 3, "--n_iter", 1, "--skip_grid")
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(both, cat, strict=False))
    assert not (tmp_path / "b" / "grid-0000.png").exists()
    one = ("--prompt", "a cat", "--n_samples", 1, "--n_iter", 1)
    for name, options in {
        "scale": (*one, "--scale", 1),
        "prompt": ("--prompt", "dog", *one[2:]),
        "plms": (*one, "--plms"),
        "dpm": (*one, "--dpm_solver"),
        "seed": (*one, "--seed", 1),
        "eta": (*one, "--ddim_eta", 1),
    }.items():
        assert np.abs(draw(name, *options)[0] - cat[0]).max() > 1, name
    fixed = draw("fixed", *one[:2], "--n_samples", 1, "--n_iter", 2, "--fixed_code")
    assert np.abs(fixed[0] - fixed[1]).max() <= 1
    assert draw("grid", *one, "--skip_save") == [] and (tmp_path / "grid" / "grid-0000.png").exists()


READER = {"target": "tests.test_ldm_scripts_sample.Reader"}


class Reader(th.nn.Module):
    """Reads the mean colour off images [B, 3, H, W]."""

    width = 3

    def forward(self, images):
        return images.mean(dim=(2, 3))


@pytest.fixture(scope="module")
def colour_model(tmp_path_factory, clip):  # noqa: F811
    folder = write_colour_run(tmp_path_factory.mktemp("colour") / "run", clip)
    return flags_of(folder, "--W", 16, "--ddim_steps", 3, "--n_iter", 1, "--scale", 1)


def test_txt2img_in_every_direction(run, colour_model, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, colour in (("a", (255, 0, 0)), ("b", (0, 0, 255))):
        Image.new("RGB", (16, 16), colour).save(photos / f"{name}.png")
    np.save(tmp_path / "red.npy", np.array([[1.0, -1.0, -1.0]], dtype=np.float32))

    def draw(name, *options):
        code, _, err = run("txt2img", *colour_model, "--outdir", tmp_path / name, *options)
        assert code == 0, err
        return [pixels(p) for p in sorted((tmp_path / name / "samples").glob("*.png"))]

    # Text to both; for each sample the same as with both wanted one by one.
    both = draw("both", "--prompt", "a cat", "--n_samples", 2)
    colours = np.load(tmp_path / "both" / "colour.npy")
    assert len(both) == 2 and colours.shape == (2, 3) and np.isfinite(colours).all()
    alone = draw("alone", "--prompt", "a cat", "--n_samples", 2, "--want", "image")
    assert all((a == b).all() for a, b in zip(both, alone, strict=True))
    assert not (tmp_path / "alone" / "colour.npy").exists()
    # An image stands for its vector, and conditions.
    one = ("--prompt", "a cat", "--n_samples", 1)
    by_image = draw("image", *one, "--given", f"colour={photos / 'a.png'}")
    by_vector = draw("vector", *one, "--given", f"colour={tmp_path / 'red.npy'}")
    assert np.abs(by_image[0] - by_vector[0]).max() <= 1
    assert np.abs(by_image[0] - both[0]).max() > 1
    text_too = draw("text", "--prompt", "dog", "--n_samples", 1, "--given", f"colour={photos / 'a.png'}")
    assert np.abs(by_image[0] - text_too[0]).max() > 1
    # Of several given values, one after the other.
    turns = draw("turns", "--prompt", "a cat", "--n_samples", 3, "--given", f"colour={photos}")
    assert np.abs(turns[0] - by_image[0]).max() <= 1
    # Read off images, in the order of their names.
    assert draw("read", "--prompt", "", "--given", f"image={photos}", "--want", "colour") == []
    assert np.load(tmp_path / "read" / "colour.npy").shape == (2, 3)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm++", "dpm++3m", "heun"])
@th.no_grad()
def test_one_seed_is_one_image_in_every_script(run, clip, tmp_path, joint, sampler):  # noqa: F811
    """txt2img.py, sample_diffusion.py and the library's own calls draw the same, with guidance too."""
    write = write_colour_run if joint else write_text_run
    folder = write(tmp_path / "run", clip)
    own = {"ddim": ("--ddim_eta", 0.5), "plms": ("--plms",), "dpm++": ("--dpm_solver",)}
    chosen = own.get(sampler, ("--sampler", sampler))
    flags = flags_of(folder, "--W", 16, "--ddim_steps", 7, "--n_iter", 1, "--n_samples", 2, "--scale", 3)
    flags += ["--outdir", tmp_path / "a", "--prompt", "dog", "--seed", 5, *chosen]
    code, _, err = run("txt2img", *flags)
    assert code == 0, err
    eta = ("-e", 0.5) if sampler == "ddim" else ()
    sampled = ("-r", folder, "--given", "caption=dog", "-n", 2, "-c", 7, "--scale", 3, "--seed", 5, *eta)
    code, _, err = run("sample_diffusion", *sampled, "--sampler", sampler, "-l", tmp_path / "b")
    assert code == 0, err
    first = np.stack([pixels(tmp_path / "a" / "samples" / f"{i:05}.png") for i in range(2)])
    second = np.stack([pixels(newest(tmp_path / "b") / "img" / f"{i:06}.png") for i in range(2)])
    assert (first == second).all() and first.std() > 1

    config, checkpoint = folder / "configs" / "2024-project.yaml", folder / "checkpoints" / "last.ckpt"
    model = inference.load_model(inference.merged_config([config]), checkpoint)
    cond, free = model.get_learned_conditioning(["dog", "dog"]), model.get_unconditional_conditioning(2)
    with model.ema_scope():
        latents, way = inference.SAMPLERS[sampler](model).sample(
            7, 2, model.latent_shape, cond, eta=0.5 if eta else 0.0, random=PerSample.derived(5, range(2)),
            unconditional_guidance_scale=3.0, unconditional_conditioning=free, verbose=False,
        )  # fmt: skip
    images = model.decode_first_stage(latents)
    assert np.abs(as_pixels(images) - first).max() <= 1
    if joint:
        options = dict(seed=5, sampler=sampler, steps=7, eta=0.5 if eta else 0.0, conditioning=cond)
        drawn = model.sample_joint(2, **options, unconditional=free, guidance=3.0)
        assert th.equal(drawn["image"], images)
        colours = model.decoded(way["values"])["colour"]
        assert th.equal(drawn["colour"], colours)
        for found in (tmp_path / "a" / "colour.npy", newest(tmp_path / "b") / "colour.npy"):
            assert np.allclose(np.load(found), colours, atol=1e-5)


def as_pixels(images):
    return ((images.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()


def test_the_image_is_called_image_whatever_its_key(run, clip, tmp_path):  # noqa: F811
    """As in Stable Diffusion 2, whose batches have it under `jpg`."""
    folder = write_colour_run(tmp_path / "run", clip, first_stage_key="jpg")
    Image.new("RGB", (16, 16), (255, 0, 0)).save(tmp_path / "a.png")
    flags = flags_of(folder, "--W", 16, "--ddim_steps", 3, "--n_iter", 1, "--n_samples", 1, "--scale", 1)
    both = run("txt2img", *flags, "--outdir", tmp_path / "both", "--prompt", "dog", "--want", "image,colour")
    assert both[0] == 0, both[2]
    assert (tmp_path / "both/samples/00000.png").exists() and (tmp_path / "both/colour.npy").exists()
    given = ("--given", f"image={tmp_path / 'a.png'}", "--want", "colour")
    assert run("txt2img", *flags, "--outdir", tmp_path / "read", "--prompt", "", *given)[0] == 0
    sampled = ("-r", folder, "--given", "caption=dog", *given, "-c", 3, "-l", tmp_path / "sampled")
    assert run("sample_diffusion", *sampled)[0] == 0
    assert np.load(newest(tmp_path / "sampled") / "colour.npy").shape == (1, 3)


def test_txt2img_beside_a_baseline(run, colour_model, text_model, tmp_path):
    def draw(name, *options, model=colour_model):
        code, _, err = run("txt2img", *model, "--outdir", tmp_path / name, "--prompt", "a cat", *options)
        assert code == 0, err
        return [pixels(tmp_path / name / part / "00000.png") for part in ("samples", "baseline")
                if (tmp_path / name / part).exists()]  # fmt: skip

    without = draw("without", "--n_samples", 1, "--without", "colour")
    joint, plain = draw("same", "--n_samples", 2, "--baseline", "same")
    assert np.abs(without[0] - plain).max() <= 1 and np.abs(joint - plain).max() > 1
    sheet = Image.open(tmp_path / "same" / "grid-0000.png")
    assert sheet.height > Image.open(tmp_path / "without" / "grid-0000.png").height
    # Another model, with the same seeds.
    other = dict(zip(text_model[::2], text_model[1::2], strict=True))
    _, another = draw(
        "other", "--n_samples", 1, "--baseline", other["--ckpt"], "--baseline_config", other["--config"]
    )
    (alone,) = draw("alone", *text_model[4:], "--W", 16, "--n_samples", 1, "--scale", 1, model=text_model)
    assert np.abs(another - alone).max() <= 1


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--given", "depth=a.png"], "the model has no 'depth', but image, colour"),
        (["--want", "colour"], "without a given image it is drawn"),
        (["--without", "depth"], "the model has no 'depth', but colour"),
        (["--given", "colour=missing.png"], "no such file or folder: missing.png"),
        (["--baseline", "missing.ckpt"], "--baseline not found: 'missing.ckpt'"),
        (["--given", "image={image}", "--baseline", "same"], "leave it out where they are given"),
    ],
)
def test_mistakes_about_directions_are_one_line(run, colour_model, tmp_path, arguments, said):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    arguments = [argument.replace("{image}", str(tmp_path / "a.png")) for argument in arguments]
    code, _, err = run("txt2img", *colour_model, "--outdir", tmp_path, "--prompt", "", *arguments)
    assert code == 2 and said in err and err.count("\n") == 1


def test_text_to_image_alone_has_no_directions(run, text_model, tmp_path):
    code, _, err = run("txt2img", *text_model, "--outdir", tmp_path, "--baseline", "same")
    assert code == 2 and "no modalities to leave out" in err
    code, _, err = run("txt2img", *text_model, "--outdir", tmp_path, "--given", "colour=a.npy")
    assert code == 2 and "the model has no 'colour'" in err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--from-file", "missing.txt"], "--from-file not found: 'missing.txt'"),
        (["--C", 4], "have 2 channels"),
        (["--H", 17], "--H must be a multiple of"),
        (["--ckpt", "missing.ckpt"], "--ckpt not found: 'missing.ckpt'"),
        (["--config", "missing.yaml"], "--config not found: 'missing.yaml'"),
    ],
)
def test_mistakes_in_txt2img_are_one_line(run, text_model, tmp_path, arguments, said):
    code, _, err = run("txt2img", *text_model, "--outdir", tmp_path, *arguments)
    assert code == 2 and said in err and err.count("\n") == 1
    assert not list(Path(tmp_path).glob("samples/*"))


class Killed(BaseException):
    """In place of SIGKILL, at a moment that a test chooses."""


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("script", ["sample_diffusion", "txt2img"])
def test_a_killed_command_goes_on_to_the_same_files(
    run, joint_run, colour_model, tmp_path, monkeypatch, script
):
    """It ends after the images of the third batch, the last one torn, and before their shard."""
    drawn, add = [], Shards.add

    def torn(self, numbers, *arrays):
        drawn.append(numbers)
        if len(drawn) == 3 and not killed:
            last = max(tmp_path.rglob("*.png"), key=lambda path: path.stat().st_mtime_ns)
            last.write_bytes(last.read_bytes()[:20])
            killed.append(last)
            raise Killed
        add(self, numbers, *arrays)

    def draw(folder):
        if script == "txt2img":
            colours = ("--want", "image,colour", "--n_samples", 1, "--n_iter", 5)
            arguments = (*colour_model, *colours, "--prompt", "a cat", "--outdir", folder)
        else:
            arguments = ("-r", joint_run[0], "-n", 5, "-c", 3, "--batch_size", 1, "-l", folder)
        code, out, err = run(script, *arguments)
        assert code == 0, err
        return files(folder if script == "txt2img" else newest(folder)), out

    killed = [None]
    monkeypatch.setattr(Shards, "add", torn)
    expected, _ = draw(tmp_path / "straight")
    assert len(drawn) == 5
    drawn.clear(), killed.clear()
    with pytest.raises(Killed):
        draw(tmp_path / "killed")
    assert killed and not list((tmp_path / "killed").rglob("*.npy"))
    found, printed = draw(tmp_path / "killed")
    assert "going on" in printed and [list(numbers) for numbers in drawn] == [[0], [1], [2], [2], [3], [4]]
    assert found == expected and len(expected) > 10 - 4 * (script == "txt2img")
