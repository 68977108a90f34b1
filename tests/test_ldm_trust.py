"""What configurations may name: only classes that belong where they stand, with values that these can take."""

import copy
import os
import re

import pytest
from omegaconf import OmegaConf

from guided_diffusion.errors import UserError
from ldm import inference
from ldm.data.tar_shards import list_shards
from ldm.models.diffusion.joint import make_encoders
from ldm.training.cli import main
from ldm.util import Indexed, instantiate_from_config, resolve
from tests.ldm_models import DDCONFIG, IDENTITY, unet_config
from tests.ldm_training_driver import Marker, called
from tests.test_main import RAMPS, TRAINER

LOSS = {
    "target": "ldm.modules.losses.LPIPSWithDiscriminator",
    "params": {"disc_start": 3, "perceptual_weight": 0, "disc_num_layers": 1},
}


def autoencoder():
    return {
        "model": {
            "base_learning_rate": 1e-3,
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {"embed_dim": 2, "ddconfig": dict(DDCONFIG), "lossconfig": copy.deepcopy(LOSS)},
        },
        "data": {
            "target": "main.DataModuleFromConfig",
            "params": {
                "batch_size": 2,
                "num_workers": 0,
                "train": {"target": RAMPS, "params": {"size": 4}},
            },
        },
        "lightning": {"trainer": TRAINER | {"max_steps": 1}, "callbacks": {}},
    }


def diffusion():
    params = {
        "first_stage_config": IDENTITY,
        "cond_stage_config": "__is_unconditional__",
        "unet_config": unet_config(),
        "image_size": 8,
        "channels": 2,
        "timesteps": 40,
    }
    return {
        **autoencoder(),
        "model": {
            "base_learning_rate": 1e-3,
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": params,
        },
    }


def changed(config, place, value):
    config = OmegaConf.create(config)
    OmegaConf.update(config, place, value, merge=False, force_add=True)
    return config


def refused(tmp_path, config):
    """What main.py says of a configuration."""
    OmegaConf.save(config, tmp_path / "c.yaml")
    with pytest.raises(UserError) as caught:
        main(["-b", str(tmp_path / "c.yaml"), "-t", "-l", str(tmp_path / "logs")])
    assert "\n" not in str(caught.value)
    return str(caught.value)


PLACES = [
    (autoencoder, "model", "LightningModule"),
    (autoencoder, "model.params.lossconfig", "Module"),
    (autoencoder, "model.params.lossconfig.params.perceptual_config", "Module"),
    (autoencoder, "data", "LightningDataModule"),
    (autoencoder, "data.params.train", "Dataset"),
    (autoencoder, "lightning.logger", "Logger"),
    (autoencoder, "lightning.callbacks.mine", "Callback"),
    (autoencoder, "lightning.modelcheckpoint", "ModelCheckpoint"),
    (diffusion, "model.params.unet_config", "Module"),
    (diffusion, "model.params.first_stage_config", "Module"),
    (diffusion, "model.params.cond_stage_config", "Module"),
    (diffusion, "model.params.scheduler_config", "Schedule"),
]


TARGETS = ["os.system", "builtins.eval", "subprocess.Popen", "tests.ldm_training_driver.Marker"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("make, place, belongs", PLACES, ids=lambda value: getattr(value, "__name__", value))
def test_nothing_is_called_that_does_not_belong_there(tmp_path, make, place, belongs, target):
    config = make()
    if place.endswith("perceptual_config"):
        config["model"]["params"]["lossconfig"]["params"]["perceptual_weight"] = 1
    params = (
        {"args": f"touch {tmp_path}/ran", "shell": True}
        if "Popen" in target
        else {"command": f"touch {tmp_path}/ran"}
    )
    given = {"target": target, "params": params}
    if place == "model":
        given["base_learning_rate"] = 1
    called.clear()
    said = refused(tmp_path, changed(config, place, given))
    what = "another class" if target[-1] in "nr" else "no class"
    assert f"target {target} is {what}: here belongs a subclass of" in said and said.endswith(belongs)
    assert not called and not (tmp_path / "ran").exists()
    Marker(command="")
    assert called  # it would have been seen


@pytest.mark.parametrize("target", TARGETS)
def test_the_encoder_of_a_modality_is_a_module(target):
    called.clear()
    spec = {"label": {"encoder": {"target": target, "params": {"args": "true"}}}}
    with pytest.raises(UserError, match=r"modalities\.label\.encoder: target .* here belongs .*Module"):
        make_encoders(spec)
    assert not called


@pytest.mark.parametrize("target", ["numpy.memmap", "shelve.DbfilenameShelf", "builtins.list"])
def test_data_are_no_arrays_or_tables_that_could_be_written(tmp_path, target):
    """Neither as a wrapped dataset, where anything with a length and items will do."""
    config = changed(
        autoencoder(), "data.params.train", {"target": target, "params": {"filename": f"{tmp_path}/ran"}}
    )
    for wrap in (False, True):
        assert "is another class" in refused(tmp_path, changed(config, "data.params.wrap", wrap))
    assert not list(tmp_path.glob("ran*"))
    assert issubclass(type("Own", (), {"__len__": len, "__getitem__": len}), Indexed)


def test_an_annotation_that_cannot_be_read_is_no_class(tmp_path, monkeypatch):
    (tmp_path / "annotated.py").write_text("def make() -> 'Nowhere': open('ran', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="annotated.make is no class"):
        resolve({"target": "annotated.make"}, Indexed)


@pytest.mark.parametrize("target", TARGETS)
def test_a_run_folder_calls_nothing_when_it_is_sampled_or_resumed(tmp_path, target):
    run = tmp_path / "run"
    for folder in ("checkpoints", "configs"):
        (run / folder).mkdir(parents=True)
    (run / "checkpoints/last.ckpt").write_bytes(b"")
    called.clear()
    config = {
        "target": target,
        "params": {"args": f"touch {tmp_path}/ran", "shell": True},
        "base_learning_rate": 1,
    }
    OmegaConf.save(OmegaConf.create({**autoencoder(), "model": config}), run / "configs/x-project.yaml")
    with pytest.raises(UserError, match=f"{target} is .* class: here belongs .*LightningModule"):
        main(["--resume", str(run), "-t"])
    merged = inference.merged_config(inference.configurations(run))
    with pytest.raises(UserError, match=f"{target} is .* class: here belongs .*LatentDiffusion"):
        inference.load_model(merged, run / "checkpoints/last.ckpt")
    assert not called and not (tmp_path / "ran").exists()


def test_commands_in_place_of_shards_need_a_flag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipe:true .tar").write_bytes(b"")  # found by a pattern, it would be run as well
    for given in ("pipe:cat a.tar", "PIPE:cat a.tar", "*.tar"):
        with pytest.raises(UserError, match="is a command to be run.*allow_pipes: true"):
            list_shards(given)
    assert list_shards("pipe:cat a.tar", allow_pipes=True) == ["pipe:cat a.tar"]


@pytest.mark.parametrize(
    "make, place, value, said",
    [
        (autoencoder, "model", ["a"], "`model`.* not a mapping"),
        (autoencoder, "model.params", [1], "`model.params`.* not a mapping"),
        (autoencoder, "data.params", [1], "`data.params`.* not a mapping"),
        (autoencoder, "lightning.trainer", [1], "`lightning.trainer`.* not a mapping"),
        (autoencoder, "lightning.callbacks", ["main.ImageLogger"], "`lightning.callbacks`.* not a mapping"),
        (autoencoder, "lightning.callbacks.mine", [1], "`lightning.callbacks.mine`.* not a mapping"),
        (autoencoder, "lightning.modelcheckpoint", 3, "`lightning.modelcheckpoint`.* not a mapping"),
        (
            autoencoder,
            "lightning.modelcheckpoint.params",
            [3],
            "`lightning.modelcheckpoint.params`.* not a map",
        ),
        (autoencoder, "model.params.ddconfig", [1], "AutoencoderKL: ddconfig must be a mapping"),
        (autoencoder, "data.params.train", ["x"], r"data.train.* needs the key `target`.*\['x'\]"),
        (autoencoder, "data.params.train.params", ["x"], "params of .*Ramps must be a mapping"),
        (diffusion, "model.params.unet_config", ["x"], "unet_config must be a mapping"),
        (autoencoder, "model.target", 5, "target 5 is not of the form"),
        (autoencoder, "data.params.train.target", 5, "target 5 is not of the form"),
        (autoencoder, "model.target", "ldm..models", "target 'ldm..models' is not of the form"),
        (autoencoder, "data.params.train.parms", {"size": 3}, "data.train: unknown key 'parms'.*'params'"),
        (autoencoder, "lightning.trainer.max_epoch", 1, "unknown key max_epoch .*; do you mean 'max_epochs'"),
        (autoencoder, "lightning.trainer.max_steps", "many", "lightning.trainer"),
        (
            autoencoder,
            "model.base_learning_rate",
            float("inf"),
            "base_learning_rate must be a positive number",
        ),
        (autoencoder, "lightning.trainer.max_steps", -5, "max_steps"),
        (autoencoder, "data.params.batch_size", 0, "batch_size must be a whole number from 1 on, not 0"),
        (autoencoder, "data.params.batch_size", "two", "batch_size must be a whole number from 1 on"),
        (autoencoder, "data.params.num_workers", -1, "num_workers must be a whole number from 0 on, not -1"),
        (autoencoder, "data.params.batchsize", 2, "'batchsize'; do you mean 'batch_size'"),
        (autoencoder, "model.params.embed_dim", 0, "embed_dim must be a whole number from 1 on, not 0"),
        (
            autoencoder,
            "model.params.ddconfig.ch",
            33,
            "ddconfig: ch must be a positive multiple of 32, not 33",
        ),
        (
            autoencoder,
            "model.params.ddconfig.dropout",
            1.5,
            "ddconfig: dropout must be from 0 to less than 1",
        ),
        (
            autoencoder,
            "model.params.ddconfig.ch_mlt",
            [1],
            "ddconfig: unknown 'ch_mlt'; do you mean 'ch_mult'",
        ),
        (
            autoencoder,
            "model.params.lossconfig.params.disk_start",
            1,
            "'disk_start'; do you mean 'disc_start'",
        ),
        (diffusion, "model.params.timesteps", 0, "timesteps must be a whole number from 1 on, not 0"),
        (diffusion, "model.params.timesteps", 10.5, "timesteps must be a whole number from 1 on"),
        (diffusion, "model.params.linear_end", 2, "linear_end must be between 0 and 1, not 2"),
        (diffusion, "model.params.scale_factor", 0, "scale_factor must be a positive number, not 0"),
        (diffusion, "model.params.chanels", 4, "'chanels'; do you mean 'channels'"),
        (diffusion, "model.params.timestep", 4, "'timestep'; do you mean 'timesteps'"),
        (
            diffusion,
            "model.params.unet_config.params.model_channels",
            33,
            "UNetModel: model_channels must be a positive multiple of 32, not 33",
        ),
        (diffusion, "model.params.unet_config.params.channel_mult", [1, 0], "channel_mult must be a whole"),
        (diffusion, "model.params.unet_config.params.num_res_block", 1, "do you mean 'num_res_blocks'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_in_the_configuration_names_its_key(tmp_path, make, place, value, said):
    message = refused(tmp_path, changed(make(), place, value))
    assert re.search(said, message), message


def test_users_of_the_library_may_make_what_they_like():
    """Without `expected` any callable is called, as upstream does."""
    assert instantiate_from_config({"target": "os.path.join", "params": {"a": "b"}}) == os.path.join("b")
