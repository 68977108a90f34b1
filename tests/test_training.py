"""Training of several modalities from the command line: ranks, kills, resumption, files and configuration."""

import csv
import random
import signal
import time

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion import checkpoint_util
from guided_diffusion.checkpoint_util import find_complete_checkpoint, load_complete
from guided_diffusion.mt.modality_set import batch_of
from guided_diffusion.mt.model import JointModel, mt_defaults, read_config
from guided_diffusion.mt.training import measure_variance
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from tests.conftest import script_path
from tests.mt_driver import MODEL, TRAIN, Started, digits, in_process, refusal, run, same, train

STEPS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """96 digits, ten of them unlabelled."""
    return digits(tmp_path_factory.mktemp("data") / "digits.npz", unlabelled=10)


def flags_of(data, folder, batch_size=8):
    """The flags of a run whose weights can be compared.

    Adam turns gradients that are rounding errors alone into steps of full length: hence small steps, and two
    channels to a group of GroupNorm (with one, a bias before it has no gradient).
    """
    return (
        *MODEL, *TRAIN, "--data_dir", data, "--log_dir", folder, "--sample_steps", 0, "--iterations", STEPS,
        "--save_interval", 6, "--batch_size", batch_size, "--num_channels", 64, "--channel_mult", "1,1",
        "--lr", 3e-5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def one_rank(data, tmp_path_factory):
    """The folder of 20 steps of one plain process with batch 8."""
    folder = tmp_path_factory.mktemp("one")
    run(1, "mt_image_train", *flags_of(data, folder))
    return folder


@pytest.fixture(scope="module")
def two_ranks(data, tmp_path_factory):
    """The folder of the same with mpiexec -n 2 and batch 4."""
    folder = tmp_path_factory.mktemp("two")
    run(2, "mt_image_train", *flags_of(data, folder, batch_size=4))
    return folder


def final(folder):
    """The last checkpoint, without what the command lines of two folders differ in."""
    state = load_complete(str(folder / f"checkpoint{STEPS:06d}.pt"))
    del state["config"]
    return state


def weights(state):
    return {name: value for name, value in state.items() if not name.startswith("codes.")}


def distance(a, b):
    return max(float((a[name].detach() - b[name].detach()).abs().max()) for name in a)


# ------------------------------------------------------------------------------------------------------------
# - ranks


def test_two_ranks_are_one_rank_with_twice_the_batch(one_rank, two_ranks):
    one, two = final(one_rank), final(two_ranks)
    assert one["world_size"] == 1 and two["world_size"] == 2
    assert list(one["model"]) == list(two["model"])
    for ours, theirs in ((one["model"], two["model"]), (one["ema"]["0.9"], two["ema"]["0.9"])):
        # Which samples are compared for the share of independent dimensions depends on the ranks.
        alike = {name: value for name, value in weights(ours).items() if not name.endswith(".share")}
        assert distance(alike, theirs) < 1e-5
    # What is left of codes after centring, brought to unit RMS, enlarges the rounding of young weights.
    assert distance({"codes.label": one["model"]["codes.label"]}, two["model"]) < 1e-3
    fresh = th.load(one_rank / "model000000.pt", weights_only=True)
    told = (".share", ".correlation")  # measured: of one head these may stay as they are
    kept = [name for name in weights(fresh) if not name.endswith(told)]
    moved = {name: distance({name: fresh[name]}, one["model"]) for name in kept}
    # In variant U the network never sees the label, and the encoder has no gradient.
    assert moved.pop("label_emb.weight") == 0
    assert min(moved.values()) > 0 and np.median(list(moved.values())) > 1e-4


def test_torchrun_trains_as_mpiexec_does(launch, data, tmp_path, two_ranks):
    done = launch(
        "torchrun", script_path("mt_image_train"), *flags_of(data, tmp_path, batch_size=4),
        timeout=180, OMP_NUM_THREADS=1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert same(final(tmp_path), final(two_ranks))


# ------------------------------------------------------------------------------------------- kills and resumes


@pytest.mark.parametrize("ranks", [1, 2])
def test_run_killed_inside_a_checkpoint_resumes_to_the_same_bits(data, tmp_path, ranks, request):
    """SIGKILL while the second complete checkpoint is half written; the same command finishes the run."""
    straight = request.getfixturevalue("one_rank" if ranks == 1 else "two_ranks")
    folder = tmp_path / "run"
    flags = flags_of(data, folder, batch_size=8 // ranks)
    half = folder / "checkpoint000006.pt.tmp"
    with Started(tmp_path / "log", ranks, "mt_image_train", *flags, slow=0.3) as started:
        started.wait_until(half.exists)
        started.kill()
    assert half.exists() and not (folder / "checkpoint000006.pt").exists()
    before = find_complete_checkpoint(str(folder))
    assert before == str(folder / "checkpoint000000.pt")

    output = run(ranks, "mt_image_train", *flags)
    assert f"resuming exactly from {before}" in output
    assert not list(folder.glob("*.tmp"))
    assert same(final(folder), final(straight))
    for name in ("model", "ema_0.9_", "opt"):
        ours, theirs = (th.load(f / f"{name}{STEPS:06d}.pt", weights_only=True) for f in (folder, straight))
        assert same(ours, theirs)


def test_run_killed_at_a_random_moment_and_terminated_ends_with_the_same_bits(data, tmp_path, one_rank):
    folder = tmp_path / "run"
    flags = flags_of(data, folder)
    seed = int(time.time())
    with Started(tmp_path / "log", 1, "mt_image_train", *flags, slow=0.02) as started:
        started.wait_until((folder / "checkpoint000000.pt").exists)
        time.sleep(random.Random(seed).uniform(0, 1.5))
        if started.process.poll() is None:
            started.kill()
    with Started(tmp_path / "log", 1, "mt_image_train", *flags, "--log_interval", 1) as started:
        # Only a run whose loop has begun saves: it has told of a step.
        process = started.process

        def begun():
            return "| step" in started.output.read_text().rpartition("resuming")[2]

        started.wait_until(lambda: begun() or process.poll() is not None)
        if process.poll() is None:  # it may have been quicker than the signal
            started.signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, started.output.read_text()
    run(1, "mt_image_train", *flags)
    assert same(final(folder), final(one_rank)), f"killed with seed {seed}"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_run_killed_again_and_again_ends_with_the_same_bits(data, tmp_path, ranks, request):
    straight = request.getfixturevalue("one_rank" if ranks == 1 else "two_ranks")
    folder = tmp_path / "run"
    flags = flags_of(data, folder, batch_size=8 // ranks)
    seed = int(time.time())
    moments = random.Random(seed)
    for _ in range(6):
        with Started(tmp_path / "log", ranks, "mt_image_train", *flags, slow=0.1) as started:
            started.wait_until(lambda s=started: len(s.pids()) == ranks)
            time.sleep(moments.uniform(1, 6))
            if started.process.poll() is None:
                started.kill()
    run(ranks, "mt_image_train", *flags)
    assert same(final(folder), final(straight)), f"killed with seed {seed}"


def test_sigterm_saves_and_exits_with_0_on_two_ranks(data, tmp_path):
    """Sent to one of them; the run continues from there."""
    folder = tmp_path / "run"
    flags = (*flags_of(data, folder, batch_size=4), "--iterations", 100000, "--save_interval", 100000)
    with Started(tmp_path / "log", 2, "mt_image_train", *flags) as started:
        started.wait_until((folder / "checkpoint000000.pt").exists)
        started.signal(signal.SIGTERM, ranks=1)
        assert started.process.wait(timeout=60) == 0, started.output.read_text()
    state = load_complete(find_complete_checkpoint(str(folder)))
    assert 0 < state["step"] < 100000 and len(state["rng"]) == 2
    assert f"stopping after {state['step']} steps" in started.output.read_text()


# -----------------------------------------------------------------------------------------------------------
# files


def test_files_are_those_of_adm_and_single_task_weights_load_in_unet_model(data, tmp_path):
    train(data, tmp_path, "--modalities", "", "--iterations", 3, "--save_interval", 2)
    for name in ("model000002.pt", "ema_0.9_000002.pt"):
        weights = th.load(tmp_path / name, weights_only=True)
        assert type(weights).__name__ in ("dict", "OrderedDict")
        assert all(isinstance(value, th.Tensor) for value in weights.values())
    optimizer = th.load(tmp_path / "opt000002.pt", weights_only=True)
    assert set(optimizer) == {"state", "param_groups"}
    flags = {name.removeprefix("--"): value for name, value in zip(MODEL[::2], MODEL[1::2], strict=True)}
    defaults = model_and_diffusion_defaults()
    flags = {name: type(defaults[name])(value) for name, value in flags.items()}
    model, _ = create_model_and_diffusion(**{**defaults, **flags})
    model.load_state_dict(th.load(tmp_path / "ema_0.9_000002.pt", weights_only=True), strict=True)
    images = th.zeros(2, 1, 8, 8)
    output = model(images, th.tensor([3, 5]))
    joint = JointModel.load(str(tmp_path))  # the same weights, by the other way
    assert output.shape == (2, 1, 8, 8) and th.equal(output, joint.network(images, th.tensor([3, 5])))


def test_scalars_and_images_are_written_at_every_save(data, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("tests.mt_driver.ENVIRONMENT", {"OPENAI_LOG_FORMAT": "csv,tensorboard"})
    train(data, tmp_path, "--iterations", 6, "--save_interval", 4, "--sample_steps", 2, "--log_interval", 1)
    with open(tmp_path / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(6))
    for row in rows:
        parts = float(row["mse"]) + 0.1 * (float(row["KL_masked"]) + float(row["KL_label"]))
        assert float(row["loss"]) == pytest.approx(parts, rel=1e-4)  # equation 6 with lambda = 0.1
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert {"loss/loss", "head/KL_masked", "head/KL_label", "run/grad_norm"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Images("samples/joint")] == [0, 4, 6]
    for number in (0, 4, 6):
        # Two rows of twelve images of 64 pixels, each with a margin of 6.
        with Image.open(tmp_path / f"samples{number:06d}.png") as sheet:
            assert sheet.mode == "RGB" and sheet.width == 12 * (64 + 6) + 6


@pytest.mark.parametrize("kind", ["grey", "colour", "folder"])
def test_data_of_every_kind_train(tmp_path, class_folder, kind):
    if kind == "folder":
        source, channels = class_folder, 3
    else:
        channels = 3 if kind == "colour" else 1
        source = digits(tmp_path / "digits.npz", colour=kind == "colour")
    train(source, tmp_path / "run", "--image_channels", channels, "--iterations", 1)
    model = JointModel.load(str(tmp_path / "run"))
    assert model.flags["image_channels"] == channels
    assert model.modalities["masked"].shape == (channels, 8, 8)
    assert model.modalities["label"].shape == ((3,) if kind == "folder" else (10,))


def test_one_or_no_image_can_be_held_out(tmp_path):
    """Fewer than the heads' bins, or than ranks, are no reason to fail."""
    for count in (6, 12):
        train(
            digits(tmp_path / "few.npz", count), tmp_path / str(count), "--iterations", 1, "--batch_size", 4
        )
        variance = load_complete(find_complete_checkpoint(str(tmp_path / str(count))))["model"][
            "heads.masked.variance"
        ]
        assert bool((variance == 1).all()) == (count == 6)


# ------------------------------------------------------------------------------------------------------
# configuration


def test_flags_win_over_the_file_and_the_result_is_kept(data, tmp_path):
    config = tmp_path / "small.yaml"
    config.write_text(
        "lr: 1.0e-3\nema_rate: 0.5\niterations: 1\n"
        "modalities:\n  masked: {variant: X, null_probability: 0.3}\nnum_channels: 64\n"
    )
    train(data, tmp_path / "run", "--config", config, "--lr", "5e-4")
    merged = read_config(tmp_path / "run" / "config.yaml")
    state = load_complete(find_complete_checkpoint(str(tmp_path / "run")))
    assert merged == state["config"]
    assert merged["lr"] == 5e-4 and state["optimizer"]["param_groups"][0]["lr"] == 5e-4  # the flag
    assert merged["num_channels"] == 32  # a flag that `train` gives
    assert merged["iterations"] == 1 and merged["modalities"]["masked"]["null_probability"] == 0.3  # the file
    assert merged["weight_decay"] == 0.0 and merged["seed"] == 0  # the defaults
    assert set(mt_defaults()) < set(merged)
    assert JointModel.load(str(tmp_path / "run")).modalities["masked"].null_probability == 0.3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1\n", "unknown flag learning_rate"),
        ("num_chanels: 64\n", "unknown flag num_chanels, did you mean num_channels?"),
        ("lr: -1\n", "bad.yaml: lr must be at least 0 and finite, not -1"),
        ("lr: fast\n", "lr must be of type float, not 'fast'"),
        ("batch_size: true\n", "batch_size must be of type int, not True"),
        ("batch_size: 1.5\n", "batch_size must be of type int, not 1.5"),
        ("use_fp16: 1\n", "use_fp16 must be of type bool, not 1"),
        ("[1, 2]\n", "is not a mapping"),
        ("lr: [1\n", "is not valid YAML"),
        ("modalities: {masked: {patch: 3}}\n", "modality masked: unknown option patch"),
    ],
)
def test_files_that_cannot_be_used_are_refused_in_one_line(data, tmp_path, capsys, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    flags = ("--config", tmp_path / "bad.yaml", "--data_dir", data, "--log_dir", tmp_path / "run")
    assert message in refusal(capsys, "mt_image_train", *MODEL, *flags)


def test_flags_that_cannot_be_used_are_refused_in_one_line(data, tmp_path, capsys):
    unlabelled = digits(tmp_path / "unlabelled.npz", labelled=False)
    broken = tmp_path / "broken.npz"
    broken.write_bytes(data.read_bytes()[:3000])
    for flags, message in (
        (("--data_dir", tmp_path / "absent"), "absent"),
        (("--data_dir", ""), "give --data_dir"),
        (("--data_dir", unlabelled), "no labels"),
        (("--data_dir", broken), "is not a sound .npy or .npz file"),
        (("--config", tmp_path / "absent.yaml"), "--config not found"),
        (("--modalities", "maskd"), "has no maskd, but labels, did you mean masked?"),
        (("--modalities", "masked:Z"), "unknown variant 'Z'"),
        (("--modalities", "image"), "modality image"),
        (("--aggregation", "lump"), "lump"),
        (("--schedule_sampler", "best"), "must be one of uniform, loss-second-moment"),
        (("--compile", "yes"), "--compile must be one of auto, true, false"),
        (("--precision", "int4"), "--precision must be one of auto, fp32, bf16, fp16"),
        (("--aggregation", "paper", "--precision", "bf16"), "half precision rounds the noise away"),
        (("--num_classes", "3"), "the data have 10 classes, the model would have 3: give --num_classes 10"),
        (("--num_classes", "20"), "the data have 10 classes, the model would have 20: give --num_classes 10"),
        (
            ("--num_classes", "1000"),
            "the data have 10 classes, the model would have 1000: give --num_classes 10",
        ),
        (("--batch_size", "97"), "--batch_size 97 is more than the"),
        (("--num_chanels", "64"), "--num_chanels: unknown flag, did you mean --num_channels?"),
    ):
        line = refusal(
            capsys, "mt_image_train", *MODEL, *TRAIN, "--data_dir", data,
            "--log_dir", tmp_path / "run", *flags,
        )  # fmt: skip
        assert message in line
    assert not list((tmp_path / "run").glob("*.pt"))


def test_resuming_as_another_model_is_refused_and_loses_nothing(data, tmp_path, capsys):
    train(data, tmp_path, "--iterations", 3)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "log.txt"}
    flags = (*MODEL, *TRAIN, "--data_dir", data, "--log_dir", tmp_path, "--iterations", 6)
    for changed, was in (
        (("--num_channels", 64), "num_channels was 32 and is now 64"),
        (("--modalities", "masked:X,label:U"), "modalities was 'masked:U,label:U'"),
        (("--noise_schedule", "linear"), "noise_schedule was 'cosine'"),
        (("--seed", 1), "seed was 0 and is now 1"),
        (("--aggregation", "constant"), "aggregation was 'bump'"),
    ):
        line = refusal(capsys, "mt_image_train", *flags, *changed)
        assert was in line and "checkpoint000003.pt" in line
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "log.txt"} == kept


def test_saving_and_drawing_do_not_disturb_training(data, tmp_path):
    """Both run with the averaged weights, and give the network back as it was."""
    train(data, tmp_path / "often", "--iterations", 6, "--save_interval", 2, "--sample_steps", 2)
    train(data, tmp_path / "once", "--iterations", 6, "--save_interval", 100)
    often, once = (load_complete(str(tmp_path / name / "checkpoint000006.pt")) for name in ("often", "once"))
    for part in ("model", "ema", "optimizer"):
        assert same(often[part], once[part])


def test_nothing_changes_for_a_finished_run(data, tmp_path, monkeypatch):
    """But for the log, which says so, and the lock."""
    monkeypatch.setattr("tests.mt_driver.ENVIRONMENT", {"OPENAI_LOG_FORMAT": "log,csv,tensorboard"})

    def files():
        found = (path for path in tmp_path.rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in found if path.name not in ("log.txt", ".lock")}

    train(data, tmp_path, "--iterations", 3)
    before = files()
    train(data, tmp_path, "--iterations", 3)
    assert files() == before and any("tfevents" in path.name for path in before)
    assert "finished at step 3" in (tmp_path / "log.txt").read_text()


# ------------------------------------------------------------------------------------------------- the heads'
# variance


class Constant(th.nn.Module):
    """A network whose head for masked images is wrong by exactly `error` at every pixel."""

    def __init__(self, modalities, error):
        super().__init__()
        self.modalities, self.error = modalities, error
        self.heads = th.nn.ModuleDict({"masked": th.nn.Module()})
        self.heads["masked"].register_buffer("variance", th.zeros(modalities["masked"].variance_bins))

    def forward(self, z, timesteps, **kwargs):
        # Images of zeros have masked copies of zeros, whatever the mask.
        return th.zeros_like(z), {"masked": self.error(timesteps).reshape(-1, 1, 1, 1).expand_as(z)}


def joint(**changes):
    flags = {name.removeprefix("--"): value for name, value in zip(MODEL[::2], MODEL[1::2], strict=True)}
    defaults = mt_defaults()
    flags = {name: type(defaults[name])(value) for name, value in flags.items()}
    return JointModel.from_flags({**defaults, **flags, "num_classes": 10, **changes})


def test_variance_is_the_mean_squared_error_at_every_timestep():
    model = joint(modalities="masked:U", diffusion_steps=64)
    network = Constant(model.modalities, lambda t: 0.1 + t / 64)
    measure_variance(model.modalities, network, th.zeros(64, 1, 8, 8), {})
    variance = network.heads["masked"].variance
    # Bin k holds t = 2k and 2k + 1.
    low, high = ((0.1 + th.arange(start, 64, 2) / 64) ** 2 for start in (0, 1))
    assert len(variance) == 32 and bool(((variance >= low - 1e-6) & (variance <= high + 1e-6)).all())
    assert network.training


def test_bins_without_a_image_take_the_next_lower_ones_value():
    model = joint(modalities="masked:U", diffusion_steps=64)
    network = Constant(model.modalities, lambda t: 0.1 + t / 64)
    measure_variance(model.modalities, network, th.zeros(2, 1, 8, 8), {})
    variance = network.heads["masked"].variance.tolist()
    assert 2 <= len(set(variance)) <= 8  # two images, four passes
    assert variance == sorted(variance) and all(0.1**2 - 1e-6 <= v <= 1.1**2 for v in variance)


def test_variance_is_in_the_checkpoint_and_in_the_loaded_model(data, tmp_path):
    train(data, tmp_path, "--iterations", 2)
    state = load_complete(find_complete_checkpoint(str(tmp_path)))
    stored = state["model"]["heads.masked.variance"]
    assert bool((stored > 0).all()) and len(set(stored.tolist())) > 4
    for path, weights in ((tmp_path, "ema"), (tmp_path, "model"), (tmp_path / "ema_0.9_000002.pt", "ema")):
        model = JointModel.load(str(path), weights)
        assert th.equal(model.network.heads["masked"].variance, stored)
    # The heads after two steps explain little: nearly all of the second moment of a masked digit is left.
    with np.load(data) as arrays:
        moment = float(((arrays["arr_0"] / 127.5 - 1) ** 2).mean())
    assert 0.05 * moment < float(stored.mean()) < 2 * moment


def test_unlabelled_images_are_marked_absent():
    modalities = joint().modalities
    batch = batch_of(modalities, {"y": th.tensor([3, -1, 9]), "position": th.arange(3)})
    assert list(batch.values) == ["label"]
    assert batch.values["label"].argmax(dim=1)[[0, 2]].tolist() == [3, 9]
    assert batch.values["label"][1].tolist() == [0] * 10 and batch.present["label"].tolist() == [
        True,
        False,
        True,
    ]
    assert not batch_of(joint(modalities="masked:X").modalities, {}).values


def test_stray_half_written_files_are_no_checkpoints(one_rank):
    kept = [f"checkpoint{step:06d}.pt" for step in (0, 6, 12, 18, 20)]
    assert sorted(path.name for path in one_rank.glob("checkpoint*")) == kept
    assert checkpoint_util.complete_checkpoints(str(one_rank))[-1].endswith("checkpoint000020.pt")


# ------------------------------------------------------------------------------------- single-task steps, finetuning


def test_single_task_steps_alone_are_single_task_training(data, tmp_path):
    """With probability 1 the shared network has the weights of --modalities "", bit for bit."""
    flags = ("--iterations", 4, "--save_interval", 100)
    train(data, tmp_path / "alone", *flags, "--modalities", "")
    train(data, tmp_path / "joint", *flags, "--modalities", "masked:U", "--single_task_probability", 1)
    train(data, tmp_path / "never", *flags, "--modalities", "masked:U")
    alone, joined, never = (
        load_complete(str(tmp_path / name / "checkpoint000004.pt"))["model"]
        for name in ("alone", "joint", "never")
    )
    assert all(same(alone[name], joined[name]) for name in alone)
    assert not all(same(alone[name], never[name]) for name in alone)
    assert JointModel.load(str(tmp_path / "joint")).modalities.single_task
    assert not JointModel.load(str(tmp_path / "never")).modalities.single_task


def test_single_task_steps_are_drawn_for_each_sample(data, tmp_path):
    """The logged loss of the modality shrinks to the share of samples that have it."""
    shares = {}
    for probability in (0.0, 0.5):
        folder = tmp_path / str(probability)
        train(
            data, folder, "--iterations", 1, "--batch_size", 80, "--log_interval", 1, "--modalities", "masked:U",
            "--single_task_probability", probability,
        )  # fmt: skip
        with open(folder / "progress.csv") as file:
            shares[probability] = float(next(csv.DictReader(file))["KL_masked"])
    assert 0.3 < shares[0.5] / shares[0.0] < 0.7


def test_a_condition_trains_adms_class_conditional_network(data, tmp_path):
    """Encoder and head `none`: the weights are those of create_model with class_cond, under its names."""
    config = tmp_path / "adm.yaml"
    config.write_text("modalities: {label: {variant: X, encoder: none, head: none, null_probability: 0.0}}\n")
    train(data, tmp_path / "run", "--config", config, "--iterations", 6, "--sample_steps", 2)
    flags = {name.removeprefix("--"): value for name, value in zip(MODEL[::2], MODEL[1::2], strict=True)}
    defaults = model_and_diffusion_defaults()
    flags = {name: type(defaults[name])(value) for name, value in flags.items()}
    network, _ = create_model_and_diffusion(**{**defaults, **flags, "class_cond": True, "num_classes": 10})
    network.load_state_dict(th.load(tmp_path / "run" / "ema_0.9_000006.pt", weights_only=True), strict=True)
    fresh = th.load(tmp_path / "run" / "model000000.pt", weights_only=True)
    trained = th.load(tmp_path / "run" / "model000006.pt", weights_only=True)
    assert not same(fresh["label_emb.weight"], trained["label_emb.weight"])


def test_finetuning_begins_with_another_runs_weights(data, tmp_path):
    """The averaged weights; new heads are fresh, missing ones are named; a resumed run does not begin again."""
    train(data, tmp_path / "first", "--iterations", 3, "--modalities", "label:U")
    start = load_complete(str(tmp_path / "first" / "checkpoint000003.pt"))["ema"]["0.9"]
    flags = ("--init_from", tmp_path / "first", "--lr", 0, "--save_interval", 1)
    train(data, tmp_path / "alone", *flags, "--modalities", "", "--iterations", 1)
    alone = th.load(tmp_path / "alone" / "model000000.pt", weights_only=True)
    assert all(same(value, start[name]) for name, value in alone.items())
    log = (tmp_path / "alone" / "log.txt").read_text()
    assert "new: none; left out: heads.label, label_emb" in log or "left out: label_emb, heads.label" in log
    train(data, tmp_path / "more", *flags, "--modalities", "masked:X,label:U", "--iterations", 1)
    more = th.load(tmp_path / "more" / "model000000.pt", weights_only=True)
    assert "new: heads.masked, presence; left out: none" in (tmp_path / "more" / "log.txt").read_text()
    stem = "input_blocks.0.0.weight"
    assert all(
        same(value, more[name])
        for name, value in start.items()
        if name != stem and name.split(".")[0] != "codes"
    )
    # The network's new input begins without influence.
    assert same(more[stem][:, :1].contiguous(), start[stem]) and more[stem][:, 1:].abs().max() == 0
    # And back, without the flags of the network, which are the checkpoint's.
    in_process(
        "mt_image_train", *TRAIN, "--data_dir", data, "--log_dir", tmp_path / "less", "--sample_steps", 0, "--lr", 0,
        "--init_from", tmp_path / "more", "--modalities", "", "--iterations", 1,
    )  # fmt: skip
    less = th.load(tmp_path / "less" / "model000000.pt", weights_only=True)
    assert all(same(value, start[name]) for name, value in less.items() if name.split(".")[0] != "codes")
    assert "1 input channels" in (tmp_path / "less" / "log.txt").read_text()
    train(data, tmp_path / "more", *flags, "--modalities", "masked:X,label:U", "--iterations", 2)
    assert (tmp_path / "more" / "log.txt").read_text().count("weights of") == 1


def test_heads_are_trained_alone(data, tmp_path):
    train(data, tmp_path, "--iterations", 3, "--train", "heads", "--modalities", "masked:U,label:U")
    fresh, trained = (
        th.load(tmp_path / name, weights_only=True) for name in ("model000000.pt", "model000003.pt")
    )
    moved = {name for name in fresh if not same(fresh[name], trained[name])} - {"heads.masked.variance"}
    assert moved and all(name.startswith("heads.") for name in moved)


def test_finetuning_that_cannot_be_is_refused(data, tmp_path, capsys):
    train(data, tmp_path / "first", "--iterations", 1, "--num_channels", 64)
    flags = (*MODEL, *TRAIN, "--data_dir", data, "--log_dir", tmp_path / "run")
    for more, message in (
        (("--init_from", tmp_path / "absent.pt"), "absent.pt"),
        (("--init_from", tmp_path / "first"), "have another shape"),
        (("--train", "decoder"), "--train must be one of all, heads"),
        (("--train", "heads", "--modalities", ""), "this model has no heads"),
        (("--train", "heads", "--weight_decay", 0.1), "weight_decay would change the U-Net"),
        (("--single_task_probability", 1.5), "single_task_probability must be from 0 to 1"),
    ):
        assert message in refusal(capsys, "mt_image_train", *flags, *more)
