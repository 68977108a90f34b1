"""Checkpoints as they come into the world: every form loads, and what is damaged or something else is named."""

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch as th
from safetensors.torch import save_file

from evaluations.judge import Judge, load_judge, save_judge
from guided_diffusion import checkpoint_util, cli, dist_util, flags, logger
from guided_diffusion.checkpoint_util import fit_channels, load_weights, read, read_weights, save_atomic
from guided_diffusion.errors import UserError, exit_on_user_error
from guided_diffusion.mt import conversion
from guided_diffusion.mt.guidance import classifier_flags, load_classifier
from guided_diffusion.script_util import create_classifier
from ldm.checkpoint import load_state_dict
from ldm.checkpoint import load_weights as load_ldm_weights

WEIGHTS = {"a.weight": th.arange(6.0).view(2, 3), "a.bias": th.ones(2)}


def same(found):
    return list(found) == list(WEIGHTS) and all(th.equal(found[k].float(), v) for k, v in WEIGHTS.items())


class Linear(th.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = th.nn.Linear(3, 2)


class Anything:
    """Something that a pickle names."""


class RunsCode:
    def __reduce__(self):
        return (os.system, ("touch /tmp/never",))


def named(path, **members):
    """A class that a pickle calls `path`."""
    module, _, name = path.rpartition(".")
    return type(name, (), {"__module__": module, "__qualname__": name, **members})


# ---------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"state_dict": WEIGHTS, "global_step": 3},
        {"model": WEIGHTS, "epoch": 3},
        {"ema": WEIGHTS},
        {f"module.{k}": v for k, v in WEIGHTS.items()},
        {f"module._orig_mod.{k}": v for k, v in WEIGHTS.items()},
        {"state_dict": {f"_orig_mod.{k}": v.half() for k, v in WEIGHTS.items()}},
    ],
)
def test_every_form_of_a_checkpoint_gives_its_weights_in_the_models_precision(tmp_path, content):
    path = tmp_path / "model.pt"
    th.save(content, path)
    assert same(read_weights(path))
    module = Linear()
    load_weights(module, read_weights(path), path)
    assert same(module.state_dict()) and module.a.weight.dtype == th.float32


def test_safetensors_are_read_everywhere_whatever_they_are_called(tmp_path):
    for name in ("model.safetensors", "model.pt"):
        save_file(WEIGHTS, tmp_path / name)
        for reader in (read, read_weights, load_state_dict, dist_util.load_state_dict):
            assert same(dict(sorted(reader(str(tmp_path / name)).items(), reverse=True)))
        assert same(cli.load_model(Linear(), str(tmp_path / name), "model_path").state_dict())
        assert same(dict(sorted(conversion.read(str(tmp_path / name)).weights.items(), reverse=True)))


@pytest.fixture
def released(tmp_path, monkeypatch):
    """released(module of Lightning, of numpy): a file like the released Stable Diffusion 1 checkpoints."""

    def make(lightning, core):
        modules = {f"{lightning}.callbacks.model_checkpoint": None}
        callback = named(f"{next(iter(modules))}.ModelCheckpoint")
        path = tmp_path / "model.ckpt"
        fake = type(sys)(callback.__module__)
        fake.ModelCheckpoint = callback
        parts = callback.__module__.split(".")
        for i in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), type(sys)(".".join(parts[:i])))
        monkeypatch.setitem(sys.modules, callback.__module__, fake)
        content = {
            "epoch": 2,
            "global_step": 840000,
            "callbacks": {callback: {"best_model_score": np.float64(0.25), "best": np.int64(3)}},
            "state_dict": WEIGHTS,
        }
        th.save(content, path)
        monkeypatch.undo()
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries.items():
                if name.endswith("data.pkl"):
                    data = data.replace(b"cnumpy._core.multiarray\n", f"c{core}.multiarray\n".encode())
                    data = data.replace(b"cnumpy.core.multiarray\n", f"c{core}.multiarray\n".encode())
                    assert f"c{core}.multiarray".encode() in data and callback.__module__.encode() in data
                archive.writestr(name, data)
        return path

    return make


@pytest.mark.parametrize("lightning", ["pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_released_stable_diffusion_checkpoints_load(released, lightning, core):
    path = released(lightning, core)
    assert same(load_state_dict(path))
    content = read(path)
    (callback,) = content["callbacks"].values()
    assert callback == {"best_model_score": 0.25, "best": 3}
    assert content["global_step"] == 840000


def test_any_other_global_is_named_and_does_not_run(tmp_path):
    path = str(tmp_path / "model.pt")
    for content, name in (
        ({"w": th.ones(1), "args": Anything()}, r"tests\.test_checkpoint_util\.Anything"),
        ({"w": th.ones(1), "code": RunsCode()}, r"posix\.system"),
        ({"w": np.ones(3)}, r"numpy\._?core\.multiarray\._reconstruct"),
    ):
        th.save(content, path)
        for reader in (read, load_state_dict, lambda p: cli.load_model(Linear(), p, "model_path")):
            with pytest.raises(UserError, match=f"names {name}, which could run code.*Convert") as caught:
                reader(path)
            assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)
    assert not os.path.exists("/tmp/never")
    before = th.serialization.get_safe_globals()
    assert not any(getattr(f, "__module__", "").startswith("numpy") for f in before)  # only while it reads


def test_downloads_that_went_wrong_are_named_for_what_they_are(tmp_path):
    path = tmp_path / "model.pt"
    archive = tmp_path / "samples.npz"
    np.savez(archive, np.ones(3))
    for content, what in (
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (b"\n <html><body>404</body></html>", "a web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "a pointer of Git LFS.*git lfs pull",
        ),
        (archive.read_bytes(), "another zip archive"),
    ):
        path.write_bytes(content)
        for reader in (read, load_state_dict, load_judge):
            with pytest.raises(UserError, match=f"not a checkpoint but {what}"):
                reader(str(path))


def test_weights_that_are_not_there_are_told_with_what_is(tmp_path):
    for content in ({"net": WEIGHTS, "epoch": 3}, [1, 2], {}, th.ones(2)):
        th.save(content, tmp_path / "model.pt")
        with pytest.raises(UserError, match="holds no weights"):
            read_weights(tmp_path / "model.pt")
    th.save({"net": WEIGHTS, "epoch": 3}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="it has net, epoch"):
        read_weights(tmp_path / "model.pt")


def test_averages_alone_fill_a_latent_model(tmp_path):
    module = th.nn.ModuleDict({"model": Linear()})
    load_ldm_weights(
        module, {"model_ema.aweight": WEIGHTS["a.weight"], "model_ema.abias": WEIGHTS["a.bias"]}, "file"
    )
    assert same(module["model"].state_dict())


def test_weights_that_are_not_finite_are_refused_and_infinite_masks_are_not(tmp_path):
    module = Linear()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    broken = {**WEIGHTS, "a.bias": th.tensor([1.0, th.nan])}
    th.save(broken, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model.pt are not finite \(first: a.bias\)"):
        cli.load_model(module, str(tmp_path / "model.pt"), "model_path")
    with pytest.raises(UserError, match="file are not finite"):
        load_ldm_weights(module, broken, "file")
    assert all(th.equal(before[k], v) for k, v in module.state_dict().items())
    module.register_buffer("mask", th.tensor([0.0, -th.inf]))
    load_weights(module, {**WEIGHTS, "mask": th.tensor([-th.inf, 0.0])}, "file")
    assert module.mask[0] == -th.inf


# ------------------------------------------------------------------------------------------------- damage and disks


def flipped(path, position, bit):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_each_of_60_flipped_bits_is_noticed(tmp_path):
    whole = tmp_path / "whole.pt"
    save_atomic({"model": WEIGHTS, "step": 3, "many": [th.randn(40) for _ in range(20)]}, whole)
    assert read(whole)["step"] == 3
    drawn = random.Random(5)
    for _ in range(60):
        (tmp_path / "broken.pt").write_bytes(whole.read_bytes())
        flipped(tmp_path / "broken.pt", drawn.randrange(whole.stat().st_size), drawn.randrange(8))
        with pytest.raises(UserError, match="checkpoint"):
            read(tmp_path / "broken.pt")


def test_a_flipped_bit_in_a_foreign_checkpoints_weights_is_noticed(tmp_path):
    path = tmp_path / "model.pt"
    th.save(WEIGHTS, path)
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data/0"))
        data = archive.read(name)
    flipped(path, path.read_bytes().index(data) + 7, 6)
    with pytest.raises(UserError, match="damaged .the checksum of .*data/0 differs"):
        read(path)


def test_files_of_older_and_unsummed_torch_load(tmp_path):
    path = tmp_path / "model.pt"
    th.save(WEIGHTS, path, _use_new_zipfile_serialization=False)
    assert same(read(path))
    before = th.serialization.get_crc32_options()
    th.serialization.set_crc32_options(False)
    try:
        th.save(WEIGHTS, path)
    finally:
        th.serialization.set_crc32_options(before)
    assert same(read(path))


def test_the_former_checkpoint_is_offered(tmp_path):
    for step in (5, 10, 15):
        save_atomic(WEIGHTS, tmp_path / f"checkpoint{step:06d}.pt")
    flipped(tmp_path / "checkpoint000010.pt", 300, 2)
    with pytest.raises(UserError, match=r"damaged .*: delete it and go on from .*checkpoint000005.pt"):
        read(tmp_path / "checkpoint000010.pt")
    for name in ("epoch=3.ckpt", "last.ckpt"):
        save_atomic({"state_dict": WEIGHTS}, tmp_path / name)
    flipped(tmp_path / "last.ckpt", 300, 2)
    with pytest.raises(UserError, match=r"go on from .*epoch=3.ckpt"):
        load_state_dict(tmp_path / "last.ckpt")


def test_our_files_are_read_by_torch_itself(tmp_path):
    save_atomic(WEIGHTS, tmp_path / "model.pt")
    assert same(th.load(tmp_path / "model.pt", weights_only=True))
    assert same(th.load(tmp_path / "model.pt", weights_only=True, mmap=True))


FULL = """
import resource, signal, sys, torch as th
from guided_diffusion.checkpoint_util import save_atomic
from guided_diffusion.errors import exit_on_user_error
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
with exit_on_user_error():
    save_atomic({"w": th.rand(1_000_000)}, sys.argv[1])
"""


def test_no_space_left_is_one_line_with_folder_and_need_and_leaves_no_file(tmp_path):
    save_atomic(WEIGHTS, tmp_path / "model.pt")
    job = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path / "model.pt"], capture_output=True, text=True, timeout=60
    )
    assert job.returncode == 2
    assert job.stderr.startswith(f"error: model.pt cannot be written to {tmp_path}: ")
    assert "it needs 4.0 MB" in job.stderr and job.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    assert same(read(tmp_path / "model.pt"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_for_every_format(tmp_path, monkeypatch, number):
    def fail(*args, **kwargs):
        open(args[1] if isinstance(args[1], str) else args[1].name, "ab").close()
        raise RuntimeError("unexpected pos") from OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint_util, "write", fail)
    monkeypatch.setattr(checkpoint_util, "save_file", fail)
    for save in (save_atomic, checkpoint_util.save_safetensors):
        with pytest.raises(UserError, match="cannot be written to .*MB are free"):
            save(WEIGHTS, tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def test_what_the_machine_lacks_is_one_line(capsys):
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 3, limit[1]))
    try:
        with pytest.raises(SystemExit) as ended, exit_on_user_error():
            for _ in range(100):
                opened.append(open(os.devnull))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        for file in opened:
            file.close()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: too few file handles: raise the limit (ulimit -n)")


def test_a_folder_is_locked_until_the_process_ends_however_it_ends(tmp_path):
    hold = (
        "import sys, time\nfrom guided_diffusion.checkpoint_util import lock_folder\n"
        "lock_folder(sys.argv[1]); print('locked', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", hold, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=f"in use by another training .process {process.pid} on"):
        checkpoint_util.lock_folder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    checkpoint_util.lock_folder(tmp_path)
    checkpoint_util.lock_folder(tmp_path)  # a second training of one process waits for the first anyway


# ------------------------------------------------------------------------------------------------ flags and channels


def test_the_networks_flags_are_found_in_and_beside_the_weights(tmp_path):
    defaults = {"num_channels": 128, "channel_mult": "", "use_fp16": False, "learn_sigma": False}
    asked = {**defaults, "learn_sigma": True}

    def found(path):
        with logger.scoped_configure(dir=str(tmp_path / "log"), format_strs=[]):
            return checkpoint_util.with_flags_of(path, asked, defaults)

    assert found(tmp_path / "none.pt") == asked
    save_atomic(WEIGHTS, tmp_path / "alone.pt")
    assert found(tmp_path / "alone.pt") == asked
    expected = {"num_channels": 32, "channel_mult": "1,2", "use_fp16": False, "learn_sigma": True}
    (tmp_path / "alone.flags").write_text("--num_channels=32 --channel_mult=1,2 --use_fp16=True\n")
    assert found(tmp_path / "alone.pt") == expected
    flags = {"num_channels": 32, "channel_mult": "1,2", "use_fp16": True, "learn_sigma": False}
    about = {checkpoint_util.METADATA: {"kind": "adm", "flags": flags}}
    checkpoint_util.save_safetensors(WEIGHTS, tmp_path / "told.safetensors", about)
    assert found(tmp_path / "told.safetensors") == expected
    (tmp_path / "run").mkdir()
    state = {"format": checkpoint_util.FORMAT, "config": flags}
    save_atomic(state, tmp_path / "run" / "checkpoint000002.pt")
    save_atomic(WEIGHTS, tmp_path / "run" / "ema_0.9_000002.pt")
    for path in ("run", "run/checkpoint000002.pt", "run/ema_0.9_000002.pt"):
        assert found(tmp_path / path) == expected


def test_flags_that_were_typed_hold_or_are_refused(tmp_path):
    defaults = {"num_channels": 128, "channel_mult": "", "noise_schedule": "linear"}
    parser = flags.Parser().add_flags(defaults)
    (tmp_path / "w.flags").write_text("--num_channels=32 --channel_mult=1,2 --noise_schedule=cosine\n")
    save_atomic(WEIGHTS, tmp_path / "w.pt")

    def found(*words, strict=True):
        args = parser.parse_args(words)
        with logger.scoped_configure(dir=str(tmp_path / "log"), format_strs=[]):
            return checkpoint_util.with_flags_of(tmp_path / "w.pt", vars(args), defaults, args.typed, strict)

    trained = {"num_channels": 32, "channel_mult": "1,2", "noise_schedule": "cosine"}
    assert found() == found("--num_channels", "32", "--channel_mult=1,2") == trained
    # Also where what is typed is the default.
    with pytest.raises(
        UserError, match=r"trained with num_channels 32, not 128; noise_schedule cosine, not linear\. Leave"
    ):
        found("--noise_schedule=linear", "--num_channels", "128")
    assert found("--noise_schedule=linear", strict=False) == trained | {"noise_schedule": "linear"}
    assert set(vars(parser.parse_args([]))) == set(defaults)


def test_a_classifier_is_made_as_its_run_says(tmp_path):
    flags = {
        "classifier_width": 32,
        "classifier_depth": 1,
        "classifier_attention_resolutions": "4",
        "classifier_use_scale_shift_norm": False,
        "classifier_resblock_updown": False,
        "classifier_pool": "adaptive",
    }
    made = create_classifier(image_size=8, image_channels=1, num_classes=3, **{**classifier_flags(), **flags})
    checkpoint_util.save_safetensors(
        made.state_dict(), tmp_path / "c.safetensors", {checkpoint_util.METADATA: {"flags": flags}}
    )
    loaded = load_classifier(str(tmp_path / "c.safetensors"), classifier_flags(), 8, 1, 3)
    assert all(th.equal(v, loaded.state_dict()[k].cpu()) for k, v in made.state_dict().items())


@pytest.mark.parametrize("metadata", ["[1]", "7", '"text"', "no json", '{"kind": 3}', '{"flags": [1]}'])
def test_safetensors_metadata_of_another_type_is_one_line(tmp_path, metadata):
    save_file(WEIGHTS, tmp_path / "model.safetensors", metadata={checkpoint_util.METADATA: metadata})
    with pytest.raises(
        UserError, match="model.safetensors.* (is not a file of this program|describes itself)"
    ):
        conversion.read(str(tmp_path / "model.safetensors"))


def test_input_channels_widen_with_zeros_and_narrow():
    name = checkpoint_util.STEM
    conv = {n: {name: th.arange(2.0 * n).view(2, n, 1, 1) + 1} for n in (3, 5)}
    wide = fit_channels(conv[3], conv[5])[name]
    assert th.equal(wide[:, :3], conv[3][name]) and not wide[:, 3:].any()
    assert th.equal(fit_channels(conv[5], conv[3])[name], conv[5][name][:, :3])
    between = fit_channels(conv[3], conv[5], at=2)[name]  # latent, modalities, conditioning
    assert th.equal(between[:, :2], conv[3][name][:, :2]) and th.equal(between[:, 4:], conv[3][name][:, 2:])
    assert not between[:, 2:4].any()
    back = fit_channels({name: between}, conv[3], at=2)
    assert th.equal(back[name], conv[3][name])


# ------------------------------------------------------------------------------------------------------- judges


def test_a_judge_is_read_by_the_same_reader(tmp_path):
    judge = Judge(3)
    save_judge(judge, 0.5, tmp_path / "judge.pt")
    assert load_judge(tmp_path / "judge.pt")[1] == 0.5
