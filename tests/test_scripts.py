"""The scripts, with the flags of guided-diffusion, on a few small images."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from guided_diffusion import checkpoint_util, logger

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
MODEL = [
    *(
        "--image_size",
        "16",
        "--num_channels",
        "32",
        "--num_res_blocks",
        "1",
        "--channel_mult",
        "1,2",
        "--num_heads",
        "2",
    ),
    *(
        "--attention_resolutions",
        "8",
        "--diffusion_steps",
        "8",
        "--noise_schedule",
        "cosine",
        "--num_classes",
        "3",
    ),
]
CLASSIFIER = [
    *("--classifier_width", "64", "--classifier_depth", "1", "--classifier_channel_mult", "1,2"),
    *(
        "--classifier_attention_resolutions",
        "8",
    ),
]
CLASSIFIER_DIFFUSION = [
    "--image_size",
    "16",
    "--num_classes",
    "3",
    "--diffusion_steps",
    "8",
    "--noise_schedule",
    "cosine",
]
SR = [
    *(
        "--large_size",
        "16",
        "--small_size",
        "8",
        "--num_channels",
        "32",
        "--num_res_blocks",
        "1",
        "--channel_mult",
        "1,2",
    ),
    *(
        "--num_heads",
        "2",
        "--attention_resolutions",
        "8",
        "--diffusion_steps",
        "8",
        "--noise_schedule",
        "cosine",
    ),
]
TRAIN = ["--batch_size", "4", "--save_interval", "3", "--iterations", "5", "--num_workers", "0"]


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """30 images of three plain colours, named after their class."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.RandomState(0)
    for i in range(30):
        colour = np.eye(3)[i % 3] * 200 + random.randint(0, 50, (16, 16, 3))
        Image.fromarray(colour.astype(np.uint8)).save(folder / f"{'abc'[i % 3]}_{i}.png")
    return str(folder)


@pytest.fixture(autouse=True)
def alone():
    """Leave neither a process group nor a logger to the next test."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    logger.reset()


def script(monkeypatch, folder, name, *flags):
    """Run scripts/NAME.py in this process; its results are in `folder`."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, flags), "--log_dir", str(folder)])
    monkeypatch.syspath_prepend(str(SCRIPTS))
    code = compile((SCRIPTS / f"{name}.py").read_text(), name, "exec")
    exec(code, {"__name__": "__main__", "__file__": str(SCRIPTS / f"{name}.py")})


@pytest.fixture
def trained(monkeypatch, tmp_path, image_folder):
    """The folder of a class-conditional run of five steps."""
    script(
        monkeypatch,
        tmp_path / "trained",
        "image_train",
        *MODEL,
        *TRAIN,
        "--data_dir",
        image_folder,
        "--class_cond",
        "True",
    )
    return tmp_path / "trained"


def test_images_are_trained_resumed_sampled_and_scored(monkeypatch, tmp_path, image_folder, trained, capsys):
    assert {"model000000.pt", "model000003.pt", "ema_0.9999_000005.pt", "opt000005.pt"} <= set(
        os.listdir(trained)
    )
    flags = (*MODEL, "--class_cond", "True")
    script(
        monkeypatch, trained, "image_train", *flags, *TRAIN, "--data_dir", image_folder, "--iterations", 8,
        "--resume_checkpoint", trained,
    )  # fmt: skip
    model = trained / "model000008.pt"

    for use_ddim in (False, True):
        out = tmp_path / f"samples{use_ddim}"
        script(
            monkeypatch, out, "image_sample", *flags, "--model_path", model, "--num_samples", 5, "--batch_size", 2,
            "--use_ddim", use_ddim, "--seed", 1,
        )  # fmt: skip
        with np.load(out / "samples_5x16x16x3.npz") as samples:
            assert samples["arr_0"].shape == (5, 16, 16, 3) and samples["arr_0"].dtype == np.uint8
            assert samples["arr_1"].shape == (5,) and set(samples["arr_1"]) <= {0, 1, 2}
            assert samples["class_names"].tolist() == ["a", "b", "c"]

    script(
        monkeypatch, tmp_path / "nll", "image_nll", *flags, "--model_path", model, "--data_dir", image_folder,
        "--num_samples", 4, "--batch_size", 2,
    )  # fmt: skip
    bound = float(re.findall(r"done 4 samples: bpd=([\d.]+)", capsys.readouterr().out)[-1])
    with np.load(tmp_path / "nll" / "vb_terms.npz") as terms:
        assert terms["arr_0"].shape == (8,)
        assert terms["arr_0"].sum() == pytest.approx(
            bound, rel=0.2
        )  # the bound is their sum and a small prior term


def test_same_seed_gives_the_same_samples_and_others_do_not(monkeypatch, tmp_path, trained):
    samples = []
    for run, seed in enumerate((1, 1, 2)):
        script(
            monkeypatch, tmp_path / str(run), "image_sample", *MODEL, "--class_cond", "True",
            "--model_path", trained / "ema_0.9999_000005.pt", "--num_samples", 2, "--batch_size", 2, "--seed", seed,
        )  # fmt: skip
        samples.append(np.load(tmp_path / str(run) / "samples_2x16x16x3.npz")["arr_0"])
    assert (samples[0] == samples[1]).all() and (samples[0] != samples[2]).any()


def test_super_resolution_is_trained_and_sampled(monkeypatch, tmp_path, image_folder):
    script(monkeypatch, tmp_path, "super_res_train", *SR, *TRAIN, "--data_dir", image_folder)
    np.savez(tmp_path / "base.npz", np.random.RandomState(0).randint(0, 256, (3, 8, 8, 3), np.uint8))
    flags = (*SR, "--model_path", tmp_path / "ema_0.9999_000005.pt", "--num_samples", 5, "--batch_size", 2)
    script(monkeypatch, tmp_path, "super_res_sample", *flags, "--base_samples", tmp_path / "base.npz")
    with np.load(tmp_path / "samples_5x16x16x3.npz") as samples:
        assert list(samples) == ["arr_0"] and samples["arr_0"].dtype == np.uint8


def test_classifier_learns_and_guides(monkeypatch, tmp_path, image_folder, trained, capsys):
    """Sixty steps tell plain colours apart, also under noise; guidance then makes images of the colour asked for."""
    script(
        monkeypatch, tmp_path, "classifier_train", *CLASSIFIER_DIFFUSION, *CLASSIFIER, "--data_dir", image_folder,
        "--val_data_dir", image_folder, "--iterations", 60, "--save_interval", 20, "--lr", 1e-3, "--batch_size", 8,
        "--num_workers", 0, "--anneal_lr", "True", "--seed", 1,
    )  # fmt: skip
    names = set(os.listdir(tmp_path))
    assert {"model000020.pt", "opt000020.pt", "model000059.pt"} <= names and "model000000.pt" not in names
    accuracy = [float(a) for a in re.findall(r"\| val_acc@1 +\| ([\d.]+)", capsys.readouterr().out)]
    assert (
        len(accuracy) == 6 and np.mean(accuracy[-3:]) > 0.5
    )  # chance is 1/3, and some are nothing but noise

    agreement = {}
    for scale in (0, 30):
        script(
            monkeypatch, tmp_path / str(scale), "classifier_sample", *MODEL, *CLASSIFIER, "--class_cond", "True",
            "--model_path", trained / "model000005.pt", "--classifier_path", tmp_path / "model000059.pt",
            "--classifier_scale", scale, "--num_samples", 24, "--batch_size", 24, "--seed", 1,
        )  # fmt: skip
        with np.load(tmp_path / str(scale) / "samples_24x16x16x3.npz") as samples:
            images, labels = samples["arr_0"], samples["arr_1"]
            assert samples["class_names"].tolist() == ["a", "b", "c"]
        agreement[scale] = (images.mean(axis=(1, 2)).argmax(axis=-1) == labels).mean()
    assert agreement[30] > 0.9 > 0.7 > agreement[0]


def test_a_classifier_is_validated_by_the_names_of_its_classes(monkeypatch, tmp_path, image_folder, capsys):
    """A validation folder without the first class does not shift the others' numbers."""
    later = tmp_path / "later"
    for name in "bc":
        (later / name).mkdir(parents=True)
        for path in Path(image_folder).glob(f"{name}_*.png"):
            (later / name / path.name).symlink_to(path)
    flags = [
        *CLASSIFIER_DIFFUSION, *CLASSIFIER, "--noised", "False", "--data_dir", image_folder, "--val_data_dir", later,
        "--iterations", 40, "--eval_interval", 10, "--save_interval", 100, "--lr", 1e-3, "--batch_size", 8,
        "--num_workers", 0, "--seed", 1,
    ]  # fmt: skip
    script(monkeypatch, tmp_path / "log", "classifier_train", *flags)
    accuracy = [float(a) for a in re.findall(r"\| val_acc@1 +\| ([\d.]+)", capsys.readouterr().out)]
    assert accuracy[-1] == 1
    stored = checkpoint_util.load_complete(tmp_path / "log" / "checkpoint000039.pt")["config"]
    assert stored["class_names"] == ["a", "b", "c"] and stored["label_from"] == "prefix"
    for path in (later / "b").iterdir():
        path.rename(path.with_name(path.name.replace("b_", "x_")))
    (later / "b").rename(later / "x")
    with pytest.raises(SystemExit):
        script(monkeypatch, tmp_path / "log2", "classifier_train", *flags)
    assert "does not know: x; it knows a, b, c" in capsys.readouterr().err


def test_scripts_run_uninstalled_on_two_ranks(tmp_path, image_folder):
    """From the repository's root, with nothing on the path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(name, *flags):
        start = [
            "mpiexec",
            "-n",
            "2",
            sys.executable,
            f"scripts/{name}.py",
            *flags,
            "--log_dir",
            str(tmp_path),
        ]
        done = subprocess.run(start, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("classifier_train", *CLASSIFIER_DIFFUSION, *CLASSIFIER, *TRAIN, "--data_dir", image_folder)
    assert (tmp_path / "model000004.pt").exists()
    run("image_train", *MODEL, *TRAIN, "--data_dir", image_folder)
    model = str(tmp_path / "model000005.pt")
    run(
        "image_sample",
        *MODEL,
        "--model_path",
        model,
        "--num_samples",
        "4",
        "--batch_size",
        "2",
        "--seed",
        "1",
    )
    with np.load(tmp_path / "samples_4x16x16x3.npz") as samples:
        assert list(samples) == ["arr_0"]
        assert len(np.unique(samples["arr_0"].reshape(4, -1), axis=0)) == 4, (
            "the ranks must not draw the same noise"
        )


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("image_train", ["--data_dir", "/no/such"], "--data_dir not found: '/no/such' does not exist"),
        ("image_train", ["--attention_resolutions", "7"], "choose from 16, 8, 4, 2, 1"),
        (
            "image_train",
            ["--class_cond", "True", "--num_classes", "2"],
            "the data have 3 classes, the model would have 2: give --num_classes 3",
        ),
        (
            "image_train",
            ["--schedule_sampler", "best"],
            "--schedule_sampler must be one of uniform, loss-second-moment, not 'best'",
        ),
        ("image_sample", [], "give --model_path"),
        (
            "image_sample",
            ["--model_path", "/no/such.pt"],
            "--model_path not found: '/no/such.pt' does not exist",
        ),
    ],
)
def test_mistakes_end_with_one_line(monkeypatch, tmp_path, image_folder, capsys, name, flags, message):
    given = [] if "--data_dir" in flags or name != "image_train" else ["--data_dir", image_folder]
    with pytest.raises(SystemExit) as ended:
        script(monkeypatch, tmp_path, name, *MODEL, *given, *flags)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_models_of_other_flags_and_wrong_images_are_refused(monkeypatch, tmp_path, trained, capsys):
    model = trained / "model000005.pt"
    for name, flags, message in (
        ("image_sample", ["--model_path", model, "--num_channels", "64"], "does not fit"),
    ):
        with pytest.raises(SystemExit):
            script(monkeypatch, tmp_path, name, *MODEL, *flags)
        assert message in capsys.readouterr().err
    np.savez(tmp_path / "base.npz", np.zeros((3, 9, 9, 3), np.uint8))
    with pytest.raises(SystemExit):
        script(monkeypatch, tmp_path, "super_res_sample", *SR, "--base_samples", tmp_path / "base.npz")
    assert "it has uint8 [3, 9, 9, 3]" in capsys.readouterr().err


def test_flags_have_upstreams_defaults(monkeypatch):
    """A selection of those that are easily changed by accident."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import classifier_sample
    import classifier_train
    import image_nll
    import image_train
    import super_res_sample

    train = image_train.create_argparser().parse_args([])
    assert (train.lr, train.batch_size, train.microbatch, train.ema_rate) == (1e-4, 1, -1, "0.9999")
    assert (train.log_interval, train.save_interval, train.fp16_scale_growth) == (10, 10000, 1e-3)
    classifier = classifier_train.create_argparser().parse_args([])
    assert (classifier.iterations, classifier.lr, classifier.batch_size) == (150000, 3e-4, 4)
    assert (classifier.noised, classifier.eval_interval, classifier.anneal_lr) == (True, 5, False)
    guided = classifier_sample.create_argparser().parse_args([])
    assert (guided.classifier_scale, guided.num_samples, guided.batch_size, guided.image_size) == (
        1.0,
        10000,
        16,
        64,
    )
    nll = image_nll.create_argparser().parse_args([])
    assert (nll.num_samples, nll.batch_size, nll.clip_denoised) == (1000, 1, True)
    sr = super_res_sample.create_argparser().parse_args([])
    assert (sr.base_samples, sr.large_size, sr.small_size, sr.use_ddim) == ("", 256, 64, False)
