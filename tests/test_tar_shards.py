"""Tar shards: every sample once per pass, exact resume, broken samples, mistakes."""

import io
import logging
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from PIL import Image

from guided_diffusion import dist_util
from guided_diffusion.errors import UserError, UserFileError, UserValueError, one_line
from ldm.data import tar_shards
from ldm.data.tar_files import read_shard
from ldm.data.tar_shards import Position, TarShards
from ldm.training.checkpoints import SaveLast, StoppedBySignal
from ldm.training.cli import main
from ldm.training.data import DataModuleFromConfig
from ldm.training.position import ExactResume
from ldm.training.shard_data import ShardDataModule
from tests.conftest import ROOT
from tests.test_main import TRAINER, assert_same_training, final, model, run_folder

RAMPS = {"target": "tests.ldm_training_driver.Ramps", "params": {"size": 2}}


def encoded(number, size=(8, 8), kind="png"):
    """An image, dark on the left and `number` in the brightest column."""
    columns = np.linspace(0, number, size[0]).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.broadcast_to(columns[None, :, None], (*size[::-1], 3)).copy()).save(file, kind)
    return file.getvalue()


def write(path, samples):
    """A tar file of {KEY: {ending: bytes}}."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for key, files in samples.items():
            for ending, content in files.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def samples(numbers):
    return {f"{n:05d}": {"png": encoded(n), "txt": f"image {n}".encode()} for n in numbers}


@pytest.fixture
def shards(tmp_path):
    """shards([3, 5]): a folder with tar files of so many samples, numbered through; captions "image N"."""

    def make(counts, name="shards"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        ends = np.cumsum(counts)
        for k, (count, end) in enumerate(zip(counts, ends, strict=True)):
            write(folder / f"{k:03d}.tar", samples(range(end - count, end)))
        return folder

    return make


def numbers(items):
    return [int(item["txt"].split()[-1]) for item in items]


def one_pass(data, lane=0, lanes=1, seed=3, passes=0):
    """The items of a lane's pass, in its order."""
    found = []
    for item, position in data.stream(seed, lane, lanes):
        if position.passes > passes:
            return found
        if position.passes == passes:
            found.append(item)


# ------------------------------------------------------------------------------------------------------
# items and their order


def test_items_are_images_with_captions(tmp_path):
    kinds = {"jpg": "jpeg", "JPEG": "jpeg", "webp": "webp", "png": "png"}
    content = {
        f"a/{k}": {kind: encoded(200, kind=pillow), "txt": f"Straße {k}\n".encode(), "json": b"{}"}
        for k, (kind, pillow) in enumerate(kinds.items())
    }
    path = write(tmp_path / "a.tar", content)
    data = TarShards(str(path), size=8, samples_per_epoch=4, shuffle=0)
    items = list(data)
    assert [item["txt"] for item in items] == [f"Straße {k}" for k in range(4)]
    assert [item["file_path_"] for item in items] == [f"{path}/a/{k}" for k in range(4)]
    expected = np.linspace(0, 200, 8).round() / 127.5 - 1
    for item, tolerance in zip(items, (0.05, 0.05, 0.05, 1e-6), strict=True):
        assert item["jpg"].shape == (8, 8, 3) and item["jpg"].dtype == np.float32
        assert abs(item["jpg"] - expected[None, :, None]).max() < tolerance


def test_keys_are_given(tmp_path):
    path = write(tmp_path / "a.tar", {"k": {"image": encoded(10), "alt": b"x"}})
    (item,) = TarShards(str(path), 8, 1, image_key="image", caption_key="alt")
    assert set(item) == {"image", "alt", "file_path_"} and item["alt"] == "x"


@pytest.mark.parametrize("block", [0, 4, 1000])
@pytest.mark.parametrize("lanes", [1, 2, 3, 5])
def test_the_lanes_cover_every_sample_once_per_pass(shards, lanes, block):
    data = TarShards(str(shards([3, 9, 1, 6, 4])), 8, 1, shuffle=block)
    passes = [[numbers(one_pass(data, k, lanes, passes=p)) for k in range(lanes)] for p in range(2)]
    for lists in passes:
        assert sorted(sum(lists, [])) == list(range(23))
    assert passes[0] != passes[1]
    nine = [n for n in sum(passes[0], []) if 3 <= n < 12]  # of one shard
    assert (nine != sorted(nine)) == (block > 0)


def test_blocks_bound_how_far_a_sample_moves(shards):
    data = TarShards(str(shards([12])), 8, 1, shuffle=4)
    order = numbers(one_pass(data))
    assert [sorted(order[k : k + 4]) for k in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_crops_depend_on_seed_pass_and_sample_alone(shards):
    data = TarShards(str(shards([4, 4, 4])), 6, 1, random_crop=True, random_flip=True, shuffle=3)

    def cut(lanes, seed=3, passes=0):
        items = sum((one_pass(data, k, lanes, seed, passes) for k in range(lanes)), [])
        return {item["txt"]: item["jpg"].tobytes() for item in items}

    assert cut(1) == cut(3) == cut(2)
    assert cut(1) != cut(1, passes=1) and cut(1) != cut(1, seed=4)


# ------------------------------------------------------------------------------------------------------
# the data module


class Recorder(pl.LightningModule):
    """Learns nothing; keeps the batches of training and the captions of validation."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        assert set(batch) == {"jpg", "txt", "file_path_"}
        self.seen.append((batch["jpg"].clone(), list(batch["txt"])))
        return self.weight * batch["jpg"].mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append(list(batch["txt"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def module(folder, batch_size=2, num_workers=0, samples=14, validation=None, seed=23, **params):
    params = {"shards": str(folder), "size": 6, "samples_per_epoch": samples, "shuffle": 4} | params
    train = {"target": "ldm.data.tar_shards.TarShards", "params": params}
    data = ShardDataModule(batch_size, train, validation, num_workers=num_workers)
    data.seed = seed
    data.setup()
    return data


def fit(data, folder, epochs=2, steps=-1, checkpoint=None):
    """(the recorder, the trainer) of so many epochs, or of fewer steps."""
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        max_steps=steps,
        logger=False,
        callbacks=[ExactResume(), SaveLast(folder)],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    recorder = Recorder()
    trainer.fit(recorder, data, ckpt_path=checkpoint)
    return recorder, trainer


def stopped(data, folder, steps, epochs=2):
    """The checkpoint of a run that was stopped after so many steps."""
    fit(data, folder, epochs, steps)
    return (folder / "last.ckpt").rename(folder / "stopped.ckpt")


def assert_same_batches(a, b):
    assert [texts for _, texts in a] == [texts for _, texts in b]
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(a, b, strict=True))


@pytest.mark.parametrize("ranks, workers", [(1, 0), (1, 1), (1, 2), (2, 0), (2, 2), (4, 1)])
def test_an_epoch_of_all_samples_covers_each_once(shards, monkeypatch, ranks, workers):
    folder, seen = shards([6] * 4), []
    monkeypatch.setattr(dist_util, "get_world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(dist_util, "get_rank", lambda rank=rank: rank)
        loader = module(folder, 3, workers, samples=24).train_dataloader()
        batches = [batch["txt"] for batch in loader]
        assert [len(texts) for texts in batches] == [3] * len(loader) == [3] * (8 // ranks)
        seen += sum(batches, [])
    assert sorted(seen) == sorted(f"image {n}" for n in range(24))


def test_epochs_of_part_of_the_data_go_on_where_the_last_one_stopped(shards, tmp_path):
    recorder, _ = fit(module(shards([5, 5, 5, 5]), samples=10), tmp_path)
    seen = sum((texts for _, texts in recorder.seen), [])
    assert sorted(seen) == sorted(f"image {n}" for n in range(20))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("steps", [1, 4, 7, 9])
def test_a_stopped_run_sees_the_batches_of_an_uninterrupted_one(shards, tmp_path, workers, steps):
    """In the middle of a block, a shard, an epoch (of 7 batches), and at its end; with skipped samples."""
    folder = shards([7, 5, 9])
    content = samples(range(20, 28))
    content["00022"]["png"] = content["00022"]["png"][:60]
    write(folder / "009.tar", content)
    how = dict(num_workers=workers, random_crop=True, random_flip=True)
    whole, trainer = fit(module(folder, **how), tmp_path, epochs=3)
    checkpoint = stopped(module(folder, **how), tmp_path, steps, epochs=3)
    resumed, continued = fit(module(folder, **how), tmp_path, epochs=3, checkpoint=checkpoint)
    assert len(whole.seen) == 21
    assert_same_batches(resumed.seen, whole.seen[steps:])
    states = [t.datamodule.state_dict() for t in (trainer, continued)]
    assert states[0] == states[1] and sum(lane[3] for lane in states[0]["lanes"][0]) > 0


def test_validation_sees_the_same_samples_every_time(shards, tmp_path):
    params = {"shards": str(shards([4, 4])), "size": 6, "samples_per_epoch": 4}
    validation = {"target": "ldm.data.tar_shards.TarShards", "params": params}
    for workers in (0, 2):
        data = module(shards([7, 5], "train"), num_workers=workers, validation=validation)
        recorder, _ = fit(data, tmp_path)
        rounds = [recorder.validated[k : k + 2] for k in (0, 2, 4)]  # the sanity check, two epochs
        assert len(recorder.validated) == 6 and rounds[0] == rounds[1] == rounds[2]


def test_an_ordinary_dataset_trains_as_in_the_plain_data_module(tmp_path):
    orders = []
    for kind in (DataModuleFromConfig, ShardDataModule):
        data = kind(1, {**RAMPS, "params": {"size": 6}}, num_workers=0)
        data.setup()
        orders.append([int(batch["index"]) for batch in data.train_dataloader()])
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(6))


def test_what_differs_in_the_middle_of_an_epoch_is_named(shards, tmp_path, monkeypatch):
    folder, other = shards([7, 5, 9]), shards([7, 5], "other")
    checkpoint = stopped(module(folder), tmp_path, steps=3)
    changes = {
        "batch_size 2 then and 4 now": dict(batch_size=4),
        "samples 14 then and 16 now": dict(samples=16),
        "data workers 1 then and 2 now": dict(num_workers=2),
        r"shards 3 \(checksum \w+\) then and 2 \(checksum \w+\) now, sizes of .* now": dict(folder=other),
        "shuffle 4 then and 0 now": dict(shuffle=0),
        "seed 23 then and 24 now": dict(seed=24),
    }
    for said, how in changes.items():
        with pytest.raises(UserError, match=f"in the middle of an epoch.*: {said}$"):
            fit(module(**({"folder": folder} | how)), tmp_path, checkpoint=checkpoint)
    monkeypatch.setattr(dist_util, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="processes 1 then and 2 now"):
        fit(module(folder), tmp_path, checkpoint=checkpoint)


def test_at_an_epochs_end_the_data_may_change(shards, tmp_path):
    folder, other = shards([7, 5, 9]), shards([8, 8], "other")
    write(folder / "009.tar", {"bad": {"txt": b"no image"}})
    checkpoint = stopped(module(folder, samples=24), tmp_path, steps=12)
    data = module(other, num_workers=2, samples=16)
    resumed, _ = fit(data, tmp_path, checkpoint=checkpoint)
    assert sorted(sum((texts for _, texts in resumed.seen), [])) == sorted(f"image {n}" for n in range(16))
    before = torch.load(checkpoint, weights_only=True)["ShardDataModule"]["lanes"]
    counts = [
        sum(lane[3] for rank in lanes for lane in rank) for lanes in (before, data.state_dict()["lanes"])
    ]
    assert counts[0] == counts[1] >= 1


# ------------------------------------------------------------------------------------------------------
# main.py


@pytest.fixture
def program(shards, tmp_path):
    """program(name): the configuration of a tiny autoencoder on four shards with two data workers."""
    folder = shards([7, 5, 9, 6])

    def write_config(name, stop=None, every=5, workers=2, **params):
        params = {"shards": str(folder), "size": 8, "samples_per_epoch": 16, "random_crop": True} | params
        train = {"target": "ldm.data.tar_shards.TarShards", "params": {**params, "shuffle": 3}}
        validation = {"target": "ldm.data.tar_shards.TarShards", "params": {**params, "samples_per_epoch": 2}}
        data = {"batch_size": 2, "num_workers": workers, "train": train, "validation": validation}
        content = {
            "model": model(image_key="jpg"),
            "data": {"target": "ldm.training.shard_data.ShardDataModule", "params": data},
            "lightning": {
                "trainer": TRAINER | {"max_epochs": 2},
                "callbacks": {"stop": {"target": "tests.ldm_training_driver.SignalAt", "params": stop}}
                if stop
                else {},
                "modelcheckpoint": {"params": {"every_n_train_steps": every}},
            },
        }
        OmegaConf.save(OmegaConf.create(content), tmp_path / f"{name}.yaml")
        return ["--base", str(tmp_path / f"{name}.yaml"), "-t", "-l", str(tmp_path / name)]

    return write_config


def assert_same_runs(a, b):
    """Two checkpoints agree bit for bit, with the positions in the data."""
    for state in (a, b):
        state["DataModuleFromConfig"] = state["ShardDataModule"]
    assert_same_training(a, b)


def resume_and_compare(tmp_path, steps):
    """A run that left a checkpoint after so many steps ends as the uninterrupted one did."""
    folder = run_folder(tmp_path, "stopped")
    assert final(folder)["global_step"] == steps
    main(["--resume", str(folder), "-t", "lightning.callbacks.stop=null"])
    assert_same_runs(final(folder), final(run_folder(tmp_path, "whole")))


def test_a_run_stopped_in_the_middle_of_an_epoch_continues_exactly(program, tmp_path):
    main(program("whole"))
    with pytest.raises(StoppedBySignal):
        main(program("stopped", {"step": 4, "name": "SIGTERM"}))
    resume_and_compare(tmp_path, steps=5)  # of 8 in an epoch


@pytest.mark.slow
def test_a_killed_run_continues_exactly_from_the_last_checkpoint(program, tmp_path):
    main(program("whole"))
    command = [sys.executable, str(ROOT / "main.py"), *program("stopped", {"step": 7, "name": "SIGKILL"})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr
    resume_and_compare(tmp_path, steps=5)


@pytest.mark.slow
def test_two_processes_continue_exactly(program, launch, tmp_path):
    """Each process goes on with its own positions, and both finish their epochs at the same time."""
    stop = {"step": 2, "name": "SIGTERM"}
    for arguments in (program("whole", workers=1), program("stopped", stop, workers=1)):
        job = launch("torchrun", ROOT / "main.py", *arguments, timeout=180)
        assert job.returncode == 0, job.stderr
    folder = run_folder(tmp_path, "stopped")
    assert final(folder)["global_step"] == 3 and len(final(folder)["ShardDataModule"]["lanes"]) == 2
    resume = ("--resume", folder, "-t", "lightning.callbacks.stop=null")
    job = launch("torchrun", ROOT / "main.py", *resume, timeout=180)
    assert job.returncode == 0, job.stderr
    whole = final(run_folder(tmp_path, "whole"))
    assert whole["global_step"] == 8
    assert_same_runs(final(folder), whole)


def test_a_data_workers_error_is_one_line(program, tmp_path):
    path = write(tmp_path / "bad.tar", {f"{n}": {"png": encoded(n)} for n in range(4)})
    arguments = program("bad", shards=str(path), max_bad=2)
    with pytest.raises(UserError) as caught:
        main(arguments)
    said = "3 samples are broken, more than max_bad=2, the last of them "
    assert one_line(caught.value).startswith(f"{said}{path}/")


# ------------------------------------------------------------------------------------------------------
# broken samples


@pytest.fixture
def broken(tmp_path):
    """A shard of seven samples of which only 0 and 6 can be used."""
    content = samples(range(7))
    content["00001"]["jpg"] = encoded(1, (64, 64), "jpeg")[:-200]
    del content["00002"]["txt"]
    del content["00003"]["png"]
    content["00004"]["png"] = b"no image at all"
    content["00005"]["txt"] = b"\xff\xfe"
    return write(tmp_path / "broken.tar", content)


def test_broken_samples_are_skipped_named_and_counted(broken, caplog):
    data = TarShards(str(broken), 8, 2, shuffle=0, max_bad=5)
    stream = data.stream(seed=0)
    (first, start), (last, position) = next(stream), next(stream)
    assert numbers([first, last]) == [0, 6] and start.broken == 0 and position.broken == 5
    for number, why in enumerate(
        ["cannot be read as an image", "no caption", "no image", "cannot be read as an image", "UTF-8"], 1
    ):
        message = caplog.messages[number - 1]
        assert f"{broken}/0000{number}" in message and why in message


def test_too_many_broken_samples_end_it(broken, tmp_path):
    with pytest.raises(
        UserError, match=r"4 samples are broken, more than max_bad=3.*broken\.tar/00004 cannot"
    ):
        list(TarShards(str(broken), 8, 2, shuffle=0, max_bad=3))


def test_the_limit_holds_for_the_lanes_of_a_process_together(tmp_path):
    for name in "ab":
        content = samples(range(4)) | {f"bad{n}": {"txt": b"x"} for n in range(2)}
        write(tmp_path / f"{name}.tar", content)
    fit(module(tmp_path, num_workers=2, samples=8, max_bad=8), tmp_path, epochs=2)
    with pytest.raises(UserError, match="samples are broken, more than max_bad=3"):
        fit(module(tmp_path, num_workers=2, samples=8, max_bad=3), tmp_path, epochs=2)


def test_small_images_are_left_out_and_counted(tmp_path, caplog, monkeypatch):
    content = {f"{n}": {"png": encoded(n, (8, 8 + n)), "txt": f"{n}".encode()} for n in range(4)}
    content |= {f"{n}": {"png": encoded(n, (20, 6 + n)), "txt": f"{n}".encode()} for n in range(4, 6)}
    content["6"] = {"png": encoded(6, (7, 20)), "txt": b"6"}
    write(tmp_path / "a.tar", content)
    data = module(tmp_path, samples=6, min_size=8, max_bad=0)
    with caplog.at_level(logging.INFO):
        recorder, _ = fit(data, tmp_path, epochs=2)
    assert {text for _, texts in recorder.seen for text in texts} == {"0", "1", "2", "3", "4", "5"}
    assert data.state_dict()["lanes"][0][0][4] in (1, 2)  # the one at the end may not have been met twice
    assert any("skipped so far: 0 broken samples" in message for message in caplog.messages)
    monkeypatch.setattr(tar_shards, "_PATIENCE", 30)
    with pytest.raises(UserError, match="30 samples in a row cannot be used.*min_size=99"):
        list(TarShards(str(tmp_path), 8, 1, min_size=99))


def test_a_shard_without_samples_counts_as_broken(shards):
    folder = shards([2])
    write(folder / "009.tar", {})
    stream = TarShards(str(folder), 8, 1, max_bad=2).stream(seed=0)
    assert {numbers([item])[0] for item, _ in (next(stream) for _ in range(4))} == {0, 1}
    with pytest.raises(UserError, match=r"009\.tar/\* has no image"):
        list(TarShards(str(folder), 8, 9, max_bad=1))


# ------------------------------------------------------------------------------------------------------
# shards that are there, and those that are not


def test_shards_are_found_by_braces_globs_folders_and_commands(shards):
    folder = shards([2, 2, 2])
    packed = write(folder / "packed.tar.gz", samples(range(6, 8)))
    for given in (
        f"{folder}/{{000..002}}.tar",
        f"{folder}/00?.tar",
        str(folder),
        [f"{folder}/000.tar", f"{folder}/00{{1,2}}.tar"],
        f"pipe:cat {folder}/{{000..002}}.tar",
        f"file:{folder}/{{000..002}}.tar",
    ):
        assert sorted(numbers(one_pass(TarShards(given, 8, 1, allow_pipes=True)))) == list(range(6))
    assert numbers(one_pass(TarShards(str(packed), 8, 1, shuffle=0))) == [6, 7]


def test_a_command_may_be_left_in_the_middle(shards):
    """A lane that ends closes the pipe before the command has written everything, which kills the command."""
    samples = read_shard(f"pipe:exec cat {shards([200])}/000.tar")
    assert next(samples).name.endswith("000.tar/00000")
    samples.close()


def test_a_cut_off_shard_is_named_wherever_it_is_cut(tmp_path):
    path = write(tmp_path / "a.tar", samples(range(3)))
    content = path.read_bytes()
    end = len(content.rstrip(b"\0"))
    for length in (0, 100, *range(512, end, 256)):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=f"the shard {path} cannot be read: .") as caught:
            one_pass(TarShards(str(path), 8, 1, max_bad=0))
        assert len(str(caught.value).splitlines()) == 1


def test_shards_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no archive " * 100)
    for given, said in {
        f"{tmp_path}/a.tar": "a.tar cannot be read: ",
        f"pipe:cat {tmp_path}/nowhere.tar": "nowhere.tar cannot be read: .*exit 1",
        "gopher://host/a.tar": "gopher://host/a.tar cannot be read: .*no gopen handler",
    }.items():
        with pytest.raises(UserError, match=said) as caught:
            list(TarShards(given, 8, 1, allow_pipes=True))
        assert len(str(caught.value).splitlines()) == 1


def test_missing_shards_and_senseless_values_are_named(shards, tmp_path):
    folder = str(shards([2]))
    (tmp_path / "empty").mkdir()
    for given, said in {
        str(tmp_path / "empty"): r"no shards .*empty/\*\.tar",
        f"{folder}/9*.tar": r"no shards .*/9\*\.tar",
        f"{folder}/{{000..001}}.tar": "no shards .*/001.tar",
        (): "the list is empty",
    }.items():
        with pytest.raises(UserFileError, match=said):
            TarShards(given, 8, 1)
    for params, said in {
        ("shards", f"{folder}/{{000"): "braces in .* cannot be expanded",
        ("shards", (folder, f"{folder}/000.tar")): "000.tar is named twice",
        ("shards", 7): "shards must be a path.*not 7",
        ("size", 0): "size must be",
        ("samples_per_epoch", 0): "samples_per_epoch must be a whole number from 1 on, not 0",
        ("shuffle", -1): "shuffle must be a whole number from 0 on, not -1",
        ("max_bad", 0.5): "max_bad must be a whole number from 0 on, not 0.5",
        ("interpolation", "cubic"): "interpolation must be one of .*'cubic'",
    }.items():
        with pytest.raises(UserValueError, match=said):
            TarShards(**({"shards": folder, "size": 8, "samples_per_epoch": 1} | dict([params])))


def test_workers_without_a_shard_are_not_started(shards, monkeypatch, caplog):
    folder = shards([6, 6])
    with caplog.at_level(logging.INFO):
        assert module(folder, num_workers=5).train_dataloader().num_workers == 2
    assert "2 data workers, as there are 2 shards" in caplog.text
    monkeypatch.setattr(dist_util, "get_world_size", lambda: 3)
    with pytest.raises(UserError, match="2 shards cannot be shared out between 3 processes"):
        module(folder).train_dataloader()


def test_the_wrong_data_module_is_named(shards):
    params = {"shards": str(shards([2])), "size": 8, "samples_per_epoch": 2}
    train = {"target": "ldm.data.tar_shards.TarShards", "params": params}
    with pytest.raises(UserError, match="data.train: .*TarShards.*shard_data.ShardDataModule"):
        DataModuleFromConfig(1, train).setup()
    with pytest.raises(UserError, match="data.train: `wrap` is for mere sequences"):
        ShardDataModule(1, train, wrap=True).setup()


def test_a_shard_of_another_size_is_another_shard(shards, tmp_path):
    """In the middle of an epoch it is refused; a checkpoint from before sizes were noted goes on."""
    folder = shards([3, 3])
    data = module(folder, samples=6)
    data.setup()
    state = {"epoch": 0, "batches": 1, **data._size(), "lanes": [[tuple(Position())]]}
    write(folder / "001.tar", samples(range(3, 200)))
    changed = module(folder, samples=6)
    changed.setup()
    with pytest.raises(UserError, match="sizes of shards checksum .* then and checksum .* now"):
        changed.load_state_dict(state)
    del state["sizes of shards"]
    changed.load_state_dict(state)
