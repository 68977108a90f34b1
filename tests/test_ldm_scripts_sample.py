"""txt2img.py and sample_diffusion.py: from a checkpoint to files."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from omegaconf import OmegaConf
from PIL import Image

from guided_diffusion import dist_util
from ldm.models.diffusion.joint import JointLatentDiffusion
from tests.conftest import ROOT, picture
from tests.ldm_models import CLASSES, KL, small, unet_config
from tests.test_ldm_conditioning import WIDTH, clip  # noqa: F401 (a fixture)

SCRIPTS = ROOT / "scripts"
CROSS = dict(use_spatial_transformer=True)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(script, *arguments): (exit code, stdout, stderr) of a script in this process."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
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
    from guided_diffusion.seeding import PerSample
    from ldm.models.diffusion.ddim import DDIMSampler

    random = PerSample.derived(0, range(3))
    latents, _ = DDIMSampler(model).sample(4, 3, model.latent_shape, random=random, verbose=False)
    expected = ((model.decode_first_stage(latents).clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)
    drawn = np.stack([pixels(out / "img" / f"{i:06}.png") for i in range(3)])
    assert np.abs(drawn - expected.numpy()).max() <= 1


@pytest.mark.parametrize("options", [("-v",), ("--sampler", "dpm++"), ("--sampler", "plms"), ("-e", "0.5")])
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
        picture(40 * i, (16, 16)).save(given / f"{i}.png")

    def sample(*options):
        code, _, err = run("sample_diffusion", "-r", folder, "-l", tmp_path / "out", "-c", 4, *options)
        assert code == 0, err
        out = newest(tmp_path / "out")
        found = {p.parent.name: 0 for p in out.glob("*/*.png")}
        pictures = {name: np.stack([pixels(p) for p in sorted((out / name).glob("*.png"))]) for name in found}
        out.rename(tmp_path / f"done{len(list(tmp_path.glob('done*')))}")
        return pictures

    free = sample("-n", 2)
    assert {name: p.shape for name, p in free.items()} == dict.fromkeys(("img", "label_map"), (2, 16, 16, 3))
    photos = sample("--given", f"label_map={given}", "--want", "image")
    assert list(photos) == ["img"] and photos["img"].shape == (3, 16, 16, 3)
    one = sample("--given", f"label_map={given / '0.png'}", "-n", 3)
    assert (one["img"][0] == photos["img"][0]).all() and (one["img"][1] != photos["img"][1]).any()
    label_maps = sample("--given", f"image={given}", "--batch_size", 2)
    assert list(label_maps) == ["label_map"] and len(label_maps["label_map"]) == 3


def test_a_model_conditioned_on_pictures(run, tmp_path):
    """The single-task baseline: pictures under cond_stage_key steer the samples."""
    options = dict(cond_stage_config="__is_first_stage__", cond_stage_key="label_map")
    folder, _ = write_run(tmp_path / "run", **options, unet_config=unet_config(in_channels=4))
    given = tmp_path / "given"
    given.mkdir()
    for i in range(2):
        picture(90 * i, (16, 16)).save(given / f"{i}.png")
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


class Ranks:
    """torch.distributed for ranks that run one after the other."""

    @staticmethod
    def broadcast_object_list(values):
        values[:] = ["together"]

    @staticmethod
    def all_gather_object(ranks, own):
        ranks[:] = [own, {}]

    @staticmethod
    def barrier():
        pass


def test_the_number_of_ranks_changes_nothing(run, joint_run, tmp_path, monkeypatch):
    options = ("-r", joint_run[0], "-n", 3, "-c", 3, "--sampler", "ddpm", "--batch_size", 2)
    assert run("sample_diffusion", *options, "-l", tmp_path / "one")[0] == 0
    import sample_diffusion

    monkeypatch.setattr(sample_diffusion, "dist", Ranks)
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
        (["-r", "nothing"], "no folder or checkpoint nothing"),
        (["-r", "{tmp}"], "has no checkpoints/last.ckpt"),
        (["-r", "{run}", "--given", "depth=a.png"], "this model takes image, label_map"),
        (["-r", "{run}", "--given", "label_map"], "expected NAME=FILE_OR_FOLDER"),
        (["-r", "{run}", "--given", "label_map=missing.png"], "no such file or folder: missing.png"),
        (["-r", "{run}", "--want", "depth"], "this model has image, label_map"),
        (["-r", "{run}", "-n", "0", "--batch_size", "0"], "batch size must be at least 1"),
        (["-r", "{run}", "-n", "1", "-e", "1"], "deterministic"),
        (["-r", "{run}", "--colour"], "unknown argument '--colour'"),
    ],
)
def test_mistakes_are_one_line(run, joint_run, tmp_path, arguments, said):
    arguments = [a.format(tmp=tmp_path, run=joint_run[0]) for a in arguments]
    code, _, err = run("sample_diffusion", *arguments, "-l", tmp_path / "out")
    assert code == 2 and said in err and err.count("\n") == 1


# --------------------------------------------------------------------------------------------------------- txt2img


@pytest.fixture(scope="module")
def text_model(tmp_path_factory, clip):  # noqa: F811
    text = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
            "params": {"version": str(clip), "max_length": 8}}  # fmt: skip
    folder, _ = write_run(
        tmp_path_factory.mktemp("text") / "run",
        cond_stage_config=text,
        cond_stage_key="caption",
        conditioning_key="crossattn",
        unet_config=unet_config(**CROSS, context_dim=WIDTH),
    )
    return ["--config", folder / "configs" / "2024-project.yaml", "--ckpt", folder / "checkpoints" / "last.ckpt",
            "--C", 2, "--f", 2, "--H", 16, "--W", 24, "--ddim_steps", 3]  # fmt: skip


def test_prompts_become_pictures(run, text_model, tmp_path):
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


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--from-file", "missing.txt"], "no file missing.txt"),
        (["--C", 4], "have 2 channels"),
        (["--H", 17], "multiples of f"),
        (["--ckpt", "missing.ckpt"], "no checkpoint missing.ckpt"),
        (["--config", "missing.yaml"], "no such configuration file: missing.yaml"),
    ],
)
def test_mistakes_in_txt2img_are_one_line(run, text_model, tmp_path, arguments, said):
    code, _, err = run("txt2img", *text_model, "--outdir", tmp_path, *arguments)
    assert code == 2 and said in err and err.count("\n") == 1
    assert not list(Path(tmp_path).glob("samples/*"))
