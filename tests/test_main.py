"""main.py: what it writes, exact resume, several processes, mistakes."""

import subprocess
import sys

import numpy as np
import pytest
import torch as th
from omegaconf import OmegaConf
from PIL import Image

from guided_diffusion.errors import UserError
from ldm.models.autoencoder import AutoencoderKL
from ldm.training.cli import main
from tests.conftest import ROOT
from tests.ldm_training_driver import LookAtLast

DDCONFIG = dict(
    double_z=True,
    z_channels=2,
    resolution=8,
    in_channels=3,
    out_ch=3,
    ch=32,
    ch_mult=[1],
    num_res_blocks=1,
    attn_resolutions=[],
    dropout=0.1,
)
RAMPS = "tests.ldm_training_driver.Ramps"


def loss(**params):
    params = {"disc_start": 3, "perceptual_weight": 0, "disc_num_layers": 1, "kl_weight": 1e-6, **params}
    return {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": params}


def model(**params):
    params = {"ddconfig": DDCONFIG, "lossconfig": loss(), "embed_dim": 2, "monitor": "val/rec_loss", **params}
    return {"base_learning_rate": 1e-3, "target": "ldm.models.autoencoder.AutoencoderKL", "params": params}


def data(size=10, batch_size=2, **params):
    train, validation = ({"target": RAMPS, "params": {"size": n}} for n in (size, 2))
    params = {"batch_size": batch_size, "num_workers": 0, "train": train, "validation": validation, **params}
    return {"target": "main.DataModuleFromConfig", "params": params}


TRAINER = {
    "accelerator": "cpu",
    "max_epochs": 3,
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture
def config(tmp_path):
    """config(trainer={...}, section=...): a configuration file of a tiny autoencoder."""

    def write(trainer=None, callbacks=None, name="tiny", every=None, **sections):
        lightning = {"trainer": TRAINER | (trainer or {}), "callbacks": callbacks or {}}
        if every:
            lightning["modelcheckpoint"] = {"params": {"every_n_train_steps": every}}
        content = {"model": model(), "data": data(), "lightning": lightning, **sections}
        path = tmp_path / f"{name}.yaml"
        OmegaConf.save(OmegaConf.create(content), path)
        return path

    return write


@pytest.fixture
def train(tmp_path):
    """train(config, *arguments): the folder of the run that main.py made of it."""

    def run(config, *arguments, name="run"):
        logs = tmp_path / name
        main(["--base", str(config), "-t", "-l", str(logs), *map(str, arguments)])
        (folder,) = logs.iterdir()
        return folder

    return run


def resume(place, *arguments):
    main(["--resume", str(place), "-t", *map(str, arguments)])


def final(folder, name="last.ckpt"):
    return th.load(folder / "checkpoints" / name, weights_only=True)


def tensors(value, path=""):
    """Every tensor in nested dicts and lists, by its path."""
    if isinstance(value, th.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {k: v for key, inner in items for k, v in tensors(inner, f"{path}/{key}").items()}


def assert_same_training(a, b):
    """Two checkpoints agree bit for bit: weights, optimizers, schedules, position."""
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        left, right = tensors(a[part]), tensors(b[part])
        assert left.keys() == right.keys()
        different = [name for name in left if not th.equal(left[name], right[name])]
        assert not different, f"{part}: {different[:3]} of {len(different)}"
    assert a["global_step"] == b["global_step"]
    assert a["DataModuleFromConfig"] == b["DataModuleFromConfig"]


def interrupted(train, config, step, name="SIGTERM", **how):
    """The folder of a run that a signal stopped after `step` steps and one more."""
    stop = {"target": "tests.ldm_training_driver.SignalAt", "params": {"step": step, "name": name}}
    with pytest.raises(SystemExit) as caught:
        train(config(callbacks={"stop": stop}, name="stopped", **how), name="stopped")
    assert caught.value.code == 0


def run_folder(tmp_path, name):
    (folder,) = (tmp_path / name).iterdir()
    return folder


# ------------------------------------------------------------------------------------------------------
# what a run leaves


def test_a_run_leaves_configs_checkpoints_and_images(config, train):
    folder = train(config(name="mine"), "-f", "_x", "model.base_learning_rate=2.0e-3", "--scale_lr", "false")
    assert folder.name.endswith("_mine_x")
    project, lightning = (
        OmegaConf.load(next(folder.glob(f"configs/*-{kind}.yaml"))) for kind in ("project", "lightning")
    )
    assert project.model.base_learning_rate == 2e-3 and lightning.lightning.trainer.max_epochs == 3
    state = final(folder)
    assert state["global_step"] == 15  # the discriminator's steps are not counted
    assert [s["param_groups"][0]["lr"] for s in state["optimizer_states"]] == [2e-3, 2e-3]
    assert len(list(folder.glob("checkpoints/epoch=*.ckpt"))) == 3  # the three best
    assert list(folder.glob("tensorboard/events*"))
    steps = {int(p.name.split("gs-")[1][:6]) for p in (folder / "images/train").glob("inputs_*")}
    assert steps == {1, 2, 4, 8} and len(list(folder.glob("images/val/*.png"))) == 9


def test_grids_show_the_batch(config, train):
    """The grid of the first step holds the two images of the first batch, side by side in frames of 2
    pixels."""
    shown = {"image_logger": {"target": "main.ImageLogger", "params": {"max_images": 1}}}
    unshifted = data(validation={"target": RAMPS, "params": {"size": 2, "shift": 0}})
    folder = train(config(trainer={"max_epochs": 1}, callbacks=shown, data=unshifted))
    (path,) = folder.glob("images/val/inputs_*.png")
    pixels = np.asarray(Image.open(path)).astype(int)
    assert pixels.shape == (12, 12, 3) and pixels[:2].max() == pixels[:, -2:].max() == 0
    ramp = np.linspace(-1, 1, 8) / 2
    expected = (ramp[:, None, None] + np.zeros((8, 8, 1)) + 1) * 127.5
    assert abs(pixels[2:-2, 2:-2, :1] - expected).max() <= 1


# ------------------------------------------------------------------------------------------------------
# resume


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_stopped_run_continues_exactly(config, train, tmp_path, step):
    """In the middle of an epoch, at its end, and after the discriminator's start."""
    whole = final(train(config()))
    interrupted(train, config, step)
    folder = run_folder(tmp_path, "stopped")
    stopped = final(folder)
    assert stopped["global_step"] == step + 1
    resume(folder, "lightning.callbacks.stop=null")
    assert_same_training(final(folder), whole)


def test_a_longer_run_continues_a_finished_one(config, train):
    whole = final(train(config(trainer={"max_epochs": 4}), name="whole"))
    folder = train(config(trainer={"max_epochs": 2}), name="short")
    resume(folder, "lightning.trainer.max_epochs=4")
    assert_same_training(final(folder), whole)
    by_steps = train(config(trainer={"max_steps": 7, "max_epochs": -1}), name="steps")
    assert final(by_steps)["global_step"] == 7
    resume(by_steps, "lightning.trainer.max_steps=20")
    assert_same_training(final(by_steps), whole)


def test_accumulation_clipping_and_average_continue_exactly(config, train, tmp_path):
    vq_loss = {"target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"}
    vq_loss["params"] = {"disc_start": 2, "perceptual_weight": 0, "disc_num_layers": 1, "disc_ndf": 8}
    vq = {"base_learning_rate": 1e-3, "target": "ldm.models.autoencoder.VQModel"}
    ddconfig = {**DDCONFIG, "double_z": False}
    vq["params"] = {
        "ddconfig": ddconfig,
        "lossconfig": vq_loss,
        "n_embed": 5,
        "embed_dim": 2,
        "use_ema": True,
    }
    trainer = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    whole = final(train(config(model=vq, trainer=trainer)))
    assert whole["global_step"] == 9  # two pairs of batches and a single one, three times
    interrupted(train, config, 4, model=vq, trainer=trainer)
    folder = run_folder(tmp_path, "stopped")
    resume(folder, "lightning.callbacks.stop=null")
    assert_same_training(final(folder), whole)


def test_a_killed_run_continues_from_the_last_checkpoint(config, train, tmp_path):
    """SIGKILL, two steps after the last checkpoint; data workers; the program itself."""
    workers = data(num_workers=1)
    whole = final(train(config(data=workers)))
    kill = {"target": "tests.ldm_training_driver.SignalAt", "params": {"step": 9, "name": "SIGKILL"}}
    killed = config(callbacks={"stop": kill}, data=workers, every=7, name="killed")
    command = [sys.executable, ROOT / "main.py", "--base", killed, "-t", "-l", tmp_path / "killed"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == -9, done.stderr
    folder = run_folder(tmp_path, "killed")
    assert final(folder)["global_step"] == 7
    resume(folder / "checkpoints" / "last.ckpt", "lightning.callbacks.stop=null")
    assert_same_training(final(folder), whole)


def test_sigusr1_saves_and_goes_on(config, train):
    save = {"target": "tests.ldm_training_driver.SignalAt", "params": {"step": 1, "name": "SIGUSR1"}}
    look = {"target": "tests.ldm_training_driver.LookAtLast"}
    LookAtLast.seen.clear()
    folder = train(config(trainer={"max_epochs": 1}, callbacks={"save": save, "look": look}))
    assert LookAtLast.seen == {2: 2, 3: 2, 4: 2} and final(folder)["global_step"] == 5


# ------------------------------------------------------------------------------------------------------
# several processes


def test_two_processes_train_as_one_with_the_double_batch(config, train, launch, tmp_path):
    """No dropout, and a posterior without spread: the same gradients but for rounding.

    They are read from Adam's first moments after one step. Weights would tell less: Adam makes whole steps of the
    rounding error where the gradient should be 0, as for biases before a normalisation.
    """
    sharp = {**DDCONFIG, "dropout": 0.0}
    start = AutoencoderKL(sharp, {"target": "torch.nn.Identity"}, embed_dim=2)
    with th.no_grad():
        start.quant_conv.bias[2:] = -40.0  # log variances below the clamp
    th.save({"state_dict": start.state_dict()}, tmp_path / "start.ckpt")
    init = model(ddconfig=sharp, ckpt_path=str(tmp_path / "start.ckpt"), lossconfig=loss(disc_start=100))
    trainer = {"max_steps": 1, "max_epochs": -1}
    one = final(train(config(trainer=trainer, model=init, data=data(size=8, batch_size=4))))
    pair = config(trainer=trainer, model=init, data=data(size=8, batch_size=2), name="pair")
    job = launch("torchrun", ROOT / "main.py", "--base", pair, "-t", "-l", tmp_path / "pair", ranks=2)
    assert job.returncode == 0, job.stderr
    two = final(run_folder(tmp_path, "pair"))
    assert two["DataModuleFromConfig"]["processes"] == 2
    moments = [
        th.cat([p["exp_avg"].flatten() for p in state["optimizer_states"][0]["state"].values()])
        for state in (one, two)
    ]
    assert moments[0].abs().max() > 1
    assert (moments[1] - moments[0]).norm() < 1e-5 * moments[0].norm()


# ------------------------------------------------------------------------------------------------------
# mistakes


def refused(said, *arguments):
    with pytest.raises(UserError, match=said) as caught:
        main([str(argument) for argument in arguments])
    assert len(str(caught.value).splitlines()) == 1


def test_mistakes_on_the_command_line_are_named(config, tmp_path):
    good = config()
    refused("nothing to work on", "-t")
    refused("nothing to do: give -t", "--base", good)
    refused("--base not found: .*nowhere.yaml", "--base", tmp_path / "nowhere.yaml", "-t")
    refused("--gpu: unknown flag, did you mean --gpus", "--base", good, "-t", "--gpu")
    refused("--strategy.*'horovod'", "--base", good, "-t", "--strategy", "horovod")
    refused("devices is a number or a list.*'two'", "--base", good, "-t", "--devices", "two")
    refused("--name and --resume exclude", "--resume", tmp_path, "-n", "x", "-t")
    refused("--resume not found", "--resume", tmp_path / "nowhere", "-t")
    refused("has no checkpoint checkpoints/last.ckpt", "--resume", tmp_path, "-t")
    refused("fsdp trains diffusion models", "--base", good, "-t", "--strategy", "fsdp")


def test_other_launchers_are_named(config, monkeypatch):
    good = config()
    monkeypatch.setenv("PMI_SIZE", "2")
    refused("--devices or torchrun", "--base", good, "-t")
    monkeypatch.delenv("PMI_SIZE")
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    refused("torchrun started 4 processes.* asks for 3", "--base", good, "-t", "--devices", "3")


def test_mistakes_in_the_configuration_are_named(config, tmp_path):
    good = ("--base", config(), "-t", "-l", tmp_path / "logs")
    refused("unknown key learning_rate in .*`model`", *good, "model.learning_rate=1")
    refused("unknown key modl in .*top level", "--base", config(modl={"x": 1}, name="typo"), "-t")
    refused("unknown key max_epoch in .*`lightning.trainer`", *good, "lightning.trainer.max_epoch=1")
    refused("AutoencoderKL: got an unexpected keyword argument 'embed'", *good, "model.params.embed=1")
    refused("no module nowhere", *good, "model.target=nowhere.Model")
    refused("`data`.* needs the key `target`", "--base", config(data={"params": {}}, name="d"), "-t")
    refused("positive number, got 'fast'", *good, "model.base_learning_rate=fast")
    refused("there is no folder /nowhere", *good, "data.params.train.params.root=/nowhere")
    refused("the dataset is empty", *good, "data.params.train.params.size=0")
    refused("precision.*'64-true'", *good, "lightning.trainer.precision=64-true")
    frozen = "model.params.lossconfig={target: torch.nn.Identity}"
    refused("cannot be trained: its lossconfig .Identity", *good, frozen)
    refused("no 'photo'.*'image'|'photo'", *good, "model.params.image_key=photo")
    (tmp_path / "bad.yaml").write_text("model: [")
    refused("bad.yaml is not valid YAML", "--base", tmp_path / "bad.yaml", "-t")
    refused("cannot be merged.*nothing", *good, "model.params.embed_dim=${nothing}")


def test_checkpoints_that_cannot_be_continued_are_named(config, train, tmp_path):
    folder = train(config(trainer={"max_steps": 3, "max_epochs": -1}))
    last = folder / "checkpoints" / "last.ckpt"
    refused("not a checkpoint of this AutoencoderKL: it has another .*quant_conv", "-r", folder, "-t",
            "model.params.embed_dim=3")  # fmt: skip
    refused("in the middle of an epoch.*batch_size 2 then and 4 now", "-r", folder, "-t",
            "data.params.batch_size=4")  # fmt: skip
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    refused("last.ckpt.* damaged .it is truncated", "-r", folder, "-t")
    th.save({"state_dict": {}}, last)
    refused("holds no training state", "-r", last, "-t")
    last.rename(tmp_path / "elsewhere.ckpt")
    refused("does not lie in the folder `checkpoints`", "-r", tmp_path / "elsewhere.ckpt", "-t")


def test_the_program_reports_one_line():
    command = [sys.executable, ROOT / "main.py", "--base", "nowhere.yaml", "-t"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: --base not found: 'nowhere.yaml' does not exist\n"
