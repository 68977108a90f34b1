"""Checkpoints of latent diffusions as they are in the world: of earlier versions, in half, averages alone, nested."""

import shutil

import pytest
import torch as th
from omegaconf import OmegaConf

from guided_diffusion.errors import UserError
from guided_diffusion.seeding import PerSample
from ldm import inference
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.joint import FORMER, JointLatentDiffusion
from tests.compare import agree
from tests.ldm_models import PLAIN, maps, small, unet_config
from tests.test_main import TRAINER, assert_same_training, final, train  # noqa: F401
from tests.test_main import resume as go_on


def config_of(cls, **changes):
    return {"model": {"target": f"{cls.__module__}.{cls.__name__}", "params": {**PLAIN, **changes}}}


# ------------------------------------------------------------------------------------- joint models of before presence

LABEL = dict(modalities="label:U", unet_config=unet_config(num_classes=3), held_out=0)


@th.no_grad()
def test_an_older_joint_model_is_loaded_as_it_was(tmp_path):
    """Its configuration does not name what was not there: no presence, no standing codes, the peak of then."""
    older = small(JointLatentDiffusion, **LABEL, **FORMER)
    th.save({"state_dict": older.state_dict()}, tmp_path / "older.ckpt")
    loaded = inference.load_model(config_of(JointLatentDiffusion, **LABEL), tmp_path / "older.ckpt")
    state = older.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert not any(name.startswith("codes.") or ".presence." in name for name in state)
    assert [m.peak for m in loaded.modalities] == [m.peak for m in older.modalities]
    given = {"label": th.tensor([0, 2])}
    options = dict(steps=4, sampler="ddim", want=["image"])
    assert th.equal(*(m.sample_joint(2, given, **options)["image"] for m in (loaded, older)))


def test_a_newer_joint_model_is_loaded_with_what_its_checkpoint_has(tmp_path):
    """Also where its configuration was written by hand and leaves the defaults out."""
    newer = small(JointLatentDiffusion, **LABEL)
    th.save({"state_dict": newer.state_dict()}, tmp_path / "newer.ckpt")
    loaded = inference.load_model(config_of(JointLatentDiffusion, **LABEL), tmp_path / "newer.ckpt")
    assert loaded.state_dict().keys() == newer.state_dict().keys()
    assert any(".presence." in name for name in newer.state_dict())


def test_an_older_run_is_resumed_as_it_was(tmp_path, train):  # noqa: F811
    """The same training whether its configuration names the options of FORMER or, as then, does not."""
    ramps = {"target": "tests.ldm_training_driver.Labelled", "params": {"size": 4}}
    params = dict(
        modalities={"other": {"preset": "image"}, "what": {"preset": "label", "classes": 3, "embedded": True}}
    )
    shape = dict(
        unet_config=unet_config(in_channels=3, out_channels=3), channels=3, held_out=0, monitor="val/loss"
    )
    content = config_of(JointLatentDiffusion, **params, **shape, **FORMER)
    content["model"]["base_learning_rate"] = 1e-3
    content["data"] = {"target": "main.DataModuleFromConfig",
                       "params": {"batch_size": 2, "num_workers": 0, "train": ramps}}  # fmt: skip
    content["lightning"] = {"trainer": TRAINER | {"max_epochs": 1}, "callbacks": {"image_logger": None},
                            "modelcheckpoint": {"params": {"monitor": None, "save_top_k": 1}}}  # fmt: skip
    OmegaConf.save(OmegaConf.create(content), tmp_path / "older.yaml")
    told = train(tmp_path / "older.yaml")
    silent = tmp_path / "silent"
    shutil.copytree(told, silent)
    (path,) = (silent / "configs").glob("*-project.yaml")
    stored = OmegaConf.load(path)
    for name in FORMER:
        del stored.model.params[name]
    OmegaConf.save(stored, path)
    for folder in (told, silent):
        go_on(folder, "lightning.trainer.max_epochs=2")
    assert_same_training(final(told), final(silent))
    assert final(silent)["global_step"] == 4
    assert not any(name.startswith("codes.") for name in final(silent)["state_dict"])


# ------------------------------------------------------------------------------------------------ weights in any form


@pytest.fixture(scope="module")
def model():
    """One whose average is not its weights."""
    model = small()
    with th.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(1.1)
    return model


def averages(model):
    return {name: value for name, value in model.state_dict().items() if name.startswith("model_ema.")}


FORMS = {
    "half": lambda m: {"state_dict": {n: v.half() if v.is_floating_point() and "betas" not in n else v for n, v in m.state_dict().items()}},
    "nested": lambda m: {"model": {"state_dict": {f"module.{n}": v for n, v in m.state_dict().items()}}},
    "average": lambda m: {"state_dict": averages(m)},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@th.no_grad()
def test_weights_in_another_form_are_the_models(tmp_path, model, form):
    th.save(FORMS[form](model), tmp_path / "model.ckpt")
    loaded = inference.load_model(config_of(LatentDiffusion), tmp_path / "model.ckpt")
    assert all(p.dtype == th.float32 for p in loaded.parameters())
    z, t = maps(2).movedim(-1, 1), th.tensor([3, 30])
    with model.ema_scope():
        expected = model.apply_model(z, t)
    with loaded.ema_scope():
        agree(loaded.apply_model(z, t), expected, rtol=2e-3 if form == "half" else 1e-6)
    if form == "average":
        agree(loaded.apply_model(z, t), expected, rtol=1e-6)  # there are no others


@th.no_grad()
def test_a_joint_checkpoint_begins_a_single_task_model(tmp_path):
    """The channels of X are left out: what the joint model predicts where no modality is there."""
    hint = dict(
        cond_stage_config="__is_first_stage__", cond_stage_key="hint", unet_config=unet_config(in_channels=4)
    )
    joint = small(JointLatentDiffusion, modalities={"map": {"preset": "image", "variant": "X"}}, **hint)
    th.save({"state_dict": joint.state_dict()}, tmp_path / "joint.ckpt")
    alone = small(**hint, shake=False, ckpt_path=tmp_path / "joint.ckpt")
    random = PerSample([0, 1])
    z, cond, t = random.randn((2, 8, 8)), random.randn((2, 8, 8)), th.tensor([3, 30])
    expected, _ = joint.modalities.apply(joint.model, z, t, {}, {"c_concat": [cond]})
    agree(alone.apply_model(z, t, cond), expected, rtol=1e-5)


def test_channels_of_another_conditioning_are_not_left_out(tmp_path):
    wide = small(
        cond_stage_config="__is_first_stage__", cond_stage_key="hint", unet_config=unet_config(in_channels=4)
    )
    th.save({"state_dict": wide.state_dict()}, tmp_path / "wide.ckpt")
    with pytest.raises(UserError, match="have another shape.*input_blocks.0.0.weight"):
        small(shake=False, ckpt_path=tmp_path / "wide.ckpt")
