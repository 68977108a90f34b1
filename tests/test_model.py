"""From flags and files to a model, and from a run's files back to it."""

import shutil

import pytest
import torch as th

from guided_diffusion.errors import UserError, UserFileError
from guided_diffusion.flags import Parser, parse_flags
from guided_diffusion.mt.model import JointModel, mt_defaults, read_config, write_config
from guided_diffusion.mt.solvers import few_timesteps
from guided_diffusion.script_util import model_and_diffusion_defaults
from guided_diffusion.seeding import PerSample
from tests.mt_driver import digits, train

SMALL = dict(
    image_size=8, image_channels=1, num_channels=32, num_res_blocks=1, channel_mult="1,2",
    attention_resolutions="4", num_head_channels=32, diffusion_steps=40, noise_schedule="cosine",
    num_classes=10,
)  # fmt: skip


def small(**changes):
    return JointModel.from_flags({**mt_defaults(), **SMALL, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of two steps with two averages."""
    folder = tmp_path_factory.mktemp("trained")
    rates = ("--ema_rate", "0.9,0.5", "--ema_warmup", False)  # warm, both are the same after two steps
    train(digits(folder / "digits.npz"), folder, "--iterations", 2, *rates)
    return folder


def test_flags_are_adms_and_the_modalities():
    own = {"modalities", "aggregation", "single_task_probability", "detectability", "presence"}
    own |= {"unshifted_probability", "code_interval", "class_names", "label_from"}
    expected = {*model_and_diffusion_defaults(), *own} - {"class_cond"}
    assert set(mt_defaults()) == expected
    assert mt_defaults()["modalities"] == "masked:U,label:U" and mt_defaults()["aggregation"] == "bump"


@pytest.mark.parametrize(
    ("modalities", "channels", "classes", "heads"),
    [
        ("", 1, None, []),
        ("masked:U", 1, None, ["masked"]),
        ("masked:X", 2, None, ["masked"]),
        ("label:X", 1, 10, ["label"]),
        ("masked:X,label:U", 2, 10, ["masked", "label"]),
        (
            {"digit": {"preset": "label"}, "holes": {"preset": "masked", "variant": "X"}},
            2,
            10,
            ["digit", "holes"],
        ),
    ],
)
def test_network_has_the_inputs_and_heads_of_its_modalities(modalities, channels, classes, heads):
    model = small(modalities=modalities)
    assert list(model.modalities.names) == heads
    state = model.network.state_dict()
    assert state["input_blocks.0.0.weight"].shape[1] == channels
    assert {name.split(".")[1] for name in state if name.startswith("heads.")} == set(heads)
    assert state["label_emb.weight"].shape[0] == classes if classes else "label_emb.weight" not in state
    assert (model.diffusion.aggregation is None) == (not heads)


def test_fewer_steps_keep_the_marginals():
    model = small(modalities="masked:U,label:U")
    full, few = model.diffusion, model.respaced(7)
    kept = sorted(few.use_timesteps)
    assert few.num_timesteps == 7 and len(kept) == 7 and kept[0] == 0
    assert few.alphas_cumprod == pytest.approx(full.alphas_cumprod[kept])
    z, noise = th.zeros(1, 1, 8, 8), th.zeros(1, 1, 8, 8)
    ones = {"masked": th.ones(1, 1, 8, 8)}
    for index, step in enumerate(kept):
        # With a zero image and no noise the latent is the shift alone.
        shifts = [d.q_sample(z, th.tensor([t]), noise, ones) for d, t in ((few, index), (full, step))]
        assert th.allclose(*shifts, atol=1e-6)
    assert small().respaced("").num_timesteps == 40 and small().respaced("ddim5").num_timesteps == 5


def test_ancestral_sampling_keeps_even_timesteps():
    """Others take few_timesteps, which are dense at both ends."""
    seen, model = {}, small()
    model.network.register_forward_hook(lambda _, inputs, __: seen[sampler].append(int(inputs[1][0])))
    for sampler in ("ddpm", "dpm++sde"):
        seen[sampler] = []
        model.sample(PerSample([0]), 5, sampler=sampler)
    assert seen["ddpm"] == [39, 29, 20, 10, 0]
    assert seen["dpm++sde"] == few_timesteps(model.diffusion.alphas_cumprod, 5)[::-1] != seen["ddpm"]


@pytest.mark.parametrize("steps", ["0", "41", "many", "ddim41"])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(UserError):
        small().respaced(steps)


def test_model_is_loaded_from_every_file_of_a_run(trained):
    """A folder, its checkpoint with any average, ADM's files beside the configuration: the same weights."""
    name = "input_blocks.0.0.weight"
    files = {
        w: th.load(trained / f"{w}000002.pt", weights_only=True) for w in ("ema_0.9_", "ema_0.5_", "model")
    }
    assert len({float(weights[name].detach().sum()) for weights in files.values()}) == 3
    for path, weights, expected in (
        ("", "ema", "ema_0.9_"),
        ("", "0.5", "ema_0.5_"),
        ("", "model", "model"),
        ("checkpoint000000.pt", "0.9", None),
        ("checkpoint000002.pt", "0.9", "ema_0.9_"),
        ("ema_0.5_000002.pt", "ema", "ema_0.5_"),
        ("model000002.pt", "ema", "model"),
    ):
        model = JointModel.load(str(trained / path), weights)
        assert not model.network.training
        state = model.network.state_dict()
        assert model.flags["diffusion_steps"] == 40 and list(model.modalities.names) == ["masked", "label"]
        if expected:
            assert all(th.equal(state[key], value) for key, value in files[expected].items())


def test_files_that_hold_no_model_are_refused(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copy(trained / "model000002.pt", tmp_path / "model000002.pt")
    state = th.load(trained / "checkpoint000002.pt", weights_only=True)
    th.save({**state, "config": {"image_size": 8}}, tmp_path / "checkpoint000001.pt")
    th.save({**state, "model": []}, tmp_path / "checkpoint000002.pt")
    del state["optimizer"]
    th.save(state, tmp_path / "checkpoint000003.pt")
    (tmp_path / "noise.pt").write_bytes(b"no such thing")
    half = tmp_path / "half.pt"
    half.write_bytes((trained / "checkpoint000002.pt").read_bytes()[:100000])
    for path, weights, message in (
        (tmp_path / "absent.pt", "ema", "checkpoint not found"),
        (tmp_path / "empty", "ema", "no complete checkpoint"),
        (tmp_path / "model000002.pt", "ema", "no config.yaml beside it"),
        (tmp_path / "checkpoint000001.pt", "ema", "written by another script"),
        (tmp_path / "checkpoint000002.pt", "ema", "'model' is of type list"),
        (tmp_path / "checkpoint000003.pt", "ema", "it lacks 'optimizer'"),
        (tmp_path / "noise.pt", "ema", "is not a checkpoint"),
        (half, "ema", "is not a checkpoint"),
        (trained, "0.99", "no EMA '0.99'; it has 0.9, 0.5"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            JointModel.load(str(path), weights)
        assert "\n" not in str(caught.value)
    write_config({**mt_defaults(), **SMALL, "num_channels": 64}, tmp_path / "config.yaml")
    with pytest.raises(UserError, match="does not fit the model"):
        JointModel.load(str(tmp_path / "model000002.pt"))


def test_a_model_trained_in_half_precision_is_sampled_and_broken_weights_are_not(tmp_path):
    model = small(use_fp16=True)
    path = tmp_path / "model000001.pt"
    write_config(model.flags, tmp_path / "config.yaml")
    th.save(model.network.state_dict(), path)
    sample = JointModel.load(str(path)).sample(PerSample([1, 2], "cpu"), steps=2)
    assert sample.images.shape == (2, 1, 8, 8) and sample.images.isfinite().all()
    th.save({name: value * th.nan for name, value in model.network.state_dict().items()}, path)
    with pytest.raises(UserError, match="weights of .*model000001.pt are not finite"):
        JointModel.load(str(path))


def test_command_line_wins_over_the_file_over_the_defaults(tmp_path):
    defaults = dict(lr=1e-4, steps=10, flip=True, names="a,b", spec="")
    path = tmp_path / "config.yaml"
    path.write_text("lr: 1\nsteps: 20\nflip: false\nnames: [c, 2]\nspec: {x: {y: 1}}\n")

    def parse(*argv):
        return parse_flags(Parser().add_flags({"config": ""} | defaults), argv)

    flags = parse("--config", str(path), "--steps", "30")
    assert flags == dict(lr=1.0, steps=30, flip=False, names="c,2", spec={"x": {"y": 1}})
    assert isinstance(flags["lr"], float)
    assert parse() == defaults
    assert parse("--flip", "no", "--names", "")["flip"] is False


def test_configuration_is_written_and_read_back(tmp_path):
    config = dict(number=1, real=1e-4, text="0.9", flag=True, empty="", nested={"masked": {"variant": "X"}})
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config


def test_configuration_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(UserFileError, match="no configuration file"):
        read_config(tmp_path / "absent.yaml")
    for text, message in (
        ("a: [", "not valid YAML"),
        ("- 1", "not a mapping"),
        ("a: ${b}", "not valid YAML"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            read_config(tmp_path / "bad.yaml")
        assert "\n" not in str(caught.value)
