"""Checkpoints in and out: ADM's, joint ones, safetensors."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch as th
from safetensors.torch import save_file

from guided_diffusion.errors import UserError
from guided_diffusion.mt import conversion
from guided_diffusion.mt.modality_set import ModalitySet, peaks
from guided_diffusion.mt.model import JointModel, mt_defaults, read_config
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from tests.compare import agree
from tests.parity.weights import fill

ROOT = Path(__file__).resolve().parents[1]
ADM = dict(
    image_size=8, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="4",
    num_head_channels=32, num_classes=5, learn_sigma=True,
)  # fmt: skip


def adm_model(class_cond, **flags):
    model, _ = create_model_and_diffusion(
        **{**model_and_diffusion_defaults(), **ADM, **flags, "class_cond": class_cond}
    )
    fill(model)
    return model.eval()


def joint(modalities, **flags):
    model = JointModel.from_flags({**mt_defaults(), **ADM, "modalities": modalities, **flags})
    fill(model.network)
    return model


def package(model):
    return conversion.Package(model.network.state_dict(), "joint", model.flags, "it")


@pytest.fixture
def inputs():
    th.manual_seed(0)
    return th.randn(2, 3, 8, 8), th.tensor([3, 700]), th.tensor([4, 1])


@pytest.mark.parametrize("modalities", ["masked:U", "masked:X,label:X", "label:U"])
@pytest.mark.parametrize("class_cond", [False, True])
@th.no_grad()
def test_adm_in(tmp_path, inputs, modalities, class_cond):
    """Without modalities the joint network predicts ADM's noise; with a label in X, that of ADM's class."""
    z, t, y = inputs
    if class_cond and "label" not in modalities:
        with pytest.raises(UserError, match=r"is class-conditional \(5 classes\).*--modalities label:X"):
            adm_in(tmp_path, class_cond, modalities)
        return
    single, model, fresh = adm_in(tmp_path, class_cond, modalities)
    names = [m.name for m in model.modalities]
    assert fresh == [
        *([] if class_cond or "label" not in names else ["label_emb"]),
        *(f"heads.{n}" for n in names),
        "presence",
    ]
    shown = {}
    if modalities.endswith("label:X") and class_cond:
        shown["label"] = th.nn.functional.one_hot(y, 5).float()
    if class_cond and not shown:
        return  # ADM's network is never without a class
    out, predictions = model.modalities.apply(model.network, z, t, shown)
    agree(out, single(z, t, **({"y": y} if shown else {})), rtol=1e-5)
    assert set(predictions) == set(names)


def adm_in(tmp_path, class_cond, modalities):
    single = adm_model(class_cond)
    th.save(single.state_dict(), tmp_path / "adm.pt")
    source = conversion.read(str(tmp_path / "adm.pt"))
    assert source.task is None
    made, fresh = conversion.from_adm(source, {**ADM, "modalities": modalities})
    return single, conversion.joint_model(made), fresh


@pytest.mark.parametrize(
    "modalities, class_cond", [("masked:X,label:X", True), ("masked:X,label:U", False), ("", False)]
)
@th.no_grad()
def test_adm_out(inputs, modalities, class_cond):
    """What ADM's factory loads predicts the joint network's noise for the null input, or for a class."""
    z, t, y = inputs
    model = joint(modalities)
    made = conversion.to_adm(package(model))
    assert made.flags["class_cond"] is class_cond
    single, _ = create_model_and_diffusion(**made.flags)
    single.load_state_dict(made.weights)
    shown = {"label": th.nn.functional.one_hot(y, 5).float()} if class_cond else {}
    model.network.eval()
    expected, _ = model.modalities.apply(model.network, z, t, shown)
    agree(single.eval()(z, t, **({"y": y} if class_cond else {})), expected, rtol=1e-5)


def test_the_classes_of_a_u_label_are_kept_if_asked():
    assert "label_emb.weight" in conversion.to_adm(package(joint("label:U")), class_cond=True).weights
    with pytest.raises(UserError, match="knows no classes"):
        conversion.to_adm(package(joint("masked:U")), class_cond=True)


@pytest.mark.parametrize("class_cond", [False, True])
def test_there_and_back(tmp_path, class_cond):
    """ADM's weights come back bit for bit."""
    single, model, _ = adm_in(tmp_path, class_cond, "masked:X,label:X")
    back = conversion.to_adm(package(model), class_cond)
    own = single.state_dict()
    assert list(back.weights) == list(own)
    assert all(th.equal(back.weights[name], value) for name, value in own.items())
    wanted = {**model_and_diffusion_defaults(), **ADM, "class_cond": class_cond}
    assert {**back.flags, "num_classes": 5} == wanted


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("modalities", ["masked:X,label:U", {"holes": {"preset": "masked", "peak": 0.2}}])
def test_a_file_describes_its_model(tmp_path, suffix, modalities):
    model = joint(modalities)
    path = str(tmp_path / f"model{suffix}")
    conversion.write(package(model), path)
    again = conversion.read(path)
    assert again.task == "joint" and again.flags == model.flags
    loaded = conversion.joint_model(again)
    assert isinstance(loaded.modalities, ModalitySet) and peaks(loaded.modalities) == peaks(model.modalities)
    own = model.network.state_dict()
    assert all(th.equal(value, own[name]) for name, value in loaded.network.state_dict().items())


def test_single_task_safetensors_describe_themselves(tmp_path):
    made = conversion.to_adm(package(joint("masked:X,label:X")))
    conversion.write(made, str(tmp_path / "adm.safetensors"))
    again = conversion.read(str(tmp_path / "adm.safetensors"))
    assert (again.task, again.flags) == ("adm", made.flags)
    back, _ = conversion.from_adm(again, {"modalities": "label:X"})
    assert back.flags["num_classes"] == 5 and back.flags["image_size"] == 8


def test_config_of_another_model_is_not_overwritten(tmp_path):
    conversion.write(package(joint("masked:X")), str(tmp_path / "one.pt"))
    with pytest.raises(UserError, match="config.yaml describes another model"):
        conversion.write(package(joint("masked:U")), str(tmp_path / "two.pt"))
    assert read_config(tmp_path / "config.yaml")["modalities"] == "masked:X"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: path.write_bytes(b"no weights"), "not a whole safetensors file"),
        (lambda path: None, "checkpoint not found"),
        (
            lambda path: save_file({"other": th.ones(2)}, path),
            "does not fit the model that the flags describe",
        ),
    ],
)
def test_unusable_sources_are_one_line(tmp_path, make, message):
    path = tmp_path / "source.safetensors"
    make(path)
    with pytest.raises(UserError, match=message) as error:
        conversion.from_adm(conversion.read(str(path)), {**ADM, "modalities": "masked:X"})
    assert "\n" not in str(error.value)


def test_constants_of_upstream_are_named():
    flags = conversion.to_adm(package(joint("label:X", image_channels=1))).flags
    assert len(conversion.obstacles(flags)) == 2 and "here 5" in conversion.obstacles(flags)[0]
    assert conversion.obstacles({**flags, "image_channels": 3, "class_cond": False}) == []


# As a command


def convert(*words):
    command = [sys.executable, "scripts/convert_checkpoint.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_command_there_and_back(tmp_path):
    single = adm_model(True)
    th.save(single.state_dict(), tmp_path / "adm.pt")
    words = [f"--{name}={value}" for name, value in ADM.items()]
    run = tmp_path / "run"
    job = convert(
        tmp_path / "adm.pt", run / "model000000.pt", "--to=joint", "--modalities=masked:X,label:X", *words
    )
    assert job.returncode == 0, job.stderr
    assert "fresh, to be trained: heads.masked, heads.label" in job.stdout
    assert JointModel.load(str(run / "model000000.pt")).flags == read_config(run / "config.yaml")
    job = convert(run / "model000000.pt", tmp_path / "back.pt", "--to=adm")
    assert job.returncode == 0, job.stderr
    state = th.load(tmp_path / "back.pt", weights_only=True)
    assert all(th.equal(state[name], value) for name, value in single.state_dict().items())
    # The words are what ADM's scripts take.
    given = dict(
        word.removeprefix("--").split("=") for word in shlex.split((tmp_path / "back.flags").read_text())
    )
    assert given == {name: str(value) for name, value in ADM.items() if name != "num_res_blocks"} | {
        "num_res_blocks": "1",
        "class_cond": "True",
    }


def test_the_command_refuses_in_one_line(tmp_path):
    th.save(adm_model(False).state_dict(), tmp_path / "adm.pt")
    job = convert(
        tmp_path / "adm.pt", tmp_path / "x/model.pt", "--to=joint", "--modalities=masked:X", "--image_size=8"
    )
    assert job.returncode == 2 and job.stderr.count("\n") == 1
    assert "does not fit the model that the flags describe" in job.stderr
    assert not (tmp_path / "x").exists()


# For diffusers

SHAPES = {
    "scale-shift": {},
    "added": dict(use_scale_shift_norm=False, learn_sigma=False),
    "resampling blocks": dict(
        resblock_updown=True, use_new_attention_order=True, attention_resolutions="8,4"
    ),
    "one head": dict(num_heads=1, num_head_channels=-1, channel_mult="1,1", num_res_blocks=2),
}


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.mark.parametrize("class_cond", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@th.no_grad()
def test_diffusers_predicts_the_same(diffusers, tmp_path, inputs, shape, class_cond):
    """A UNet2DModel of the folder, and what is read back from it, are ADM's network."""
    z, t, y = inputs
    flags = {**ADM, **SHAPES[shape], "class_cond": class_cond}
    single = adm_model(class_cond, **SHAPES[shape])
    conversion.write(
        conversion.to_diffusers(conversion.Package(single.state_dict(), None, {}, "it"), flags),
        str(tmp_path / "d"),
    )
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "d").eval()
    expected = single(z, t, **({"y": y} if class_cond else {}))
    agree(theirs(z, t, **({"class_labels": y} if class_cond else {})).sample, expected, rtol=1e-5)
    back = conversion.read(str(tmp_path / "d"))
    again, _ = create_model_and_diffusion(**back.flags)
    again.load_state_dict(back.weights)
    agree(again.eval()(z, t, **({"y": y} if class_cond else {})), expected, rtol=1e-5)
    # What diffusers saves itself is read too.
    theirs.save_pretrained(tmp_path / "saved")
    saved = conversion.read(str(tmp_path / "saved"))
    assert all(th.equal(saved.weights[name], value) for name, value in back.weights.items())


@pytest.mark.parametrize("flags", [dict(learn_sigma=True), dict(learn_sigma=False, noise_schedule="cosine")])
@th.no_grad()
def test_a_pipeline_of_diffusers_draws_the_same(diffusers, tmp_path, flags):
    model = joint("masked:X", diffusion_steps=40, **flags)
    conversion.write(conversion.to_diffusers(package(model), {}), str(tmp_path / "d"))
    made = conversion.to_adm(package(model))
    single, process = create_model_and_diffusion(**made.flags)
    single.load_state_dict(made.weights)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "d")
    pipeline.set_progress_bar_config(disable=True)
    th.manual_seed(3)
    theirs = pipeline(batch_size=2, num_inference_steps=40, output_type="np").images
    th.manual_seed(3)
    ours = process.p_sample_loop(single.eval(), (2, 3, 8, 8))
    agree(th.from_numpy(theirs).permute(0, 3, 1, 2), (ours / 2 + 0.5).clamp(0, 1), rtol=1e-4)


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            dict(num_head_channels=-1, num_heads=2),
            "attention heads have one width at all levels, here 16, 32",
        ),
        (
            dict(channel_mult="2,2"),
            "channel_mult 2,2: its timestep embedding is as wide as the first level, 64",
        ),
        (dict(rescale_timesteps=True, diffusion_steps=100), "rescale_timesteps with diffusion_steps 100"),
    ],
)
def test_what_diffusers_cannot_express_is_named(flags, message):
    flags = {**ADM, "attention_resolutions": "8,4", **flags}
    single = adm_model(False, **flags)
    with pytest.raises(UserError, match=f"diffusers cannot express .*{message}"):
        conversion.to_diffusers(conversion.Package(single.state_dict(), None, {}, "it"), flags)


def test_folders_of_diffusers_that_adm_has_no_network_for_are_named(diffusers, tmp_path):
    sizes = dict(
        block_out_channels=(32, 32), down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2
    )
    other = diffusers.UNet2DModel(sample_size=8, layers_per_block=1, flip_sin_to_cos=False, **sizes)
    other.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="ADM has no network with flip_sin_to_cos False, only True"):
        conversion.read(str(tmp_path))


def test_channel_multipliers_are_written_where_upstream_has_none():
    single = conversion.to_adm(package(joint("masked:X", channel_mult="", image_size=32)))
    assert "--channel_mult=1,2,2,2" in conversion.adm_words(single.flags)
    assert "channel_mult" not in conversion.adm_words(
        conversion.to_adm(package(joint("", channel_mult="", image_size=64))).flags
    )


# By upstream

LOADED_BY_UPSTREAM = """
import sys
import torch as th
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults

given = dict(word.removeprefix("--").split("=") for word in open(sys.argv[2]).read().split())
flags = model_and_diffusion_defaults()
for name, value in given.items():
    default = flags[name]
    flags[name] = value == "True" if isinstance(default, bool) else type(default)(value)
model, _ = create_model_and_diffusion(**flags)
model.load_state_dict(th.load(sys.argv[1], weights_only=True))
z, t = th.load(sys.argv[3], weights_only=True)
with th.no_grad():
    th.save(model.eval()(z, t), sys.argv[4])
"""


@pytest.mark.parametrize("size", [32, 64])
@th.no_grad()
def test_upstream_loads_what_is_written_for_it(tmp_path, size):
    """Strictly, by its own create_model, with the flags that are printed: also at a size that it does not know."""
    upstream = os.environ.get("UPSTREAM_GUIDED_DIFFUSION", "")
    if not os.path.isdir(upstream):
        pytest.skip("UPSTREAM_GUIDED_DIFFUSION names no checkout of upstream")
    model = joint("masked:X", image_size=size, channel_mult="", attention_resolutions="8")
    conversion.write(conversion.to_adm(package(model)), str(tmp_path / "adm.pt"))
    z, t = th.randn(2, 3, size, size), th.tensor([3, 700])
    th.save((z, t), tmp_path / "inputs.pt")
    files = [str(tmp_path / name) for name in ("adm.pt", "adm.flags", "inputs.pt", "out.pt")]
    job = subprocess.run(
        [sys.executable, "-c", LOADED_BY_UPSTREAM, *files], cwd=upstream, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": upstream},
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    expected, _ = model.modalities.apply(model.network.eval(), z, t, {})
    agree(th.load(tmp_path / "out.pt", weights_only=True), expected, rtol=1e-5)
