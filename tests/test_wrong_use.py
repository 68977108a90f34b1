"""Wrong command lines: each ends with exit code 2 and exactly one line, which says what is wrong; and what --help says."""

import importlib
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion import flags
from guided_diffusion.errors import UserError
from tests.conftest import ROOT, sample_image, script_path
from tests.mt_driver import MODEL, TRAIN, digits, in_process
from tests.mt_driver import train as train_joint

SMALL = "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --attention_resolutions 4 --diffusion_steps 8 --noise_schedule cosine"
TRAINING = f"{SMALL} --data_dir {{images}} --batch_size 2 --iterations 1"
SAMPLING = f"{SMALL} --model_path {{weights}} --num_samples 1 --batch_size 1"
JOINT = " ".join(("--data_dir {digits} --iterations 1", *MODEL, *TRAIN))

# What every number, choice and path refuses, wherever its flag is.
NUMBERS = {
    "lr": "-1 nan inf fast",
    "weight_decay": "-1 nan",
    "batch_size": "0 -3 1000000 1.5 many",
    "microbatch": "0 -2",
    "log_interval": "0 -1",
    "save_interval": "0 -1",
    "num_workers": "-1 99999",
    "seed": "-1 1e20 100000000000000000000",
    "iterations": "-1 99999999999999999999",
    "lr_anneal_steps": "-1",
    "max_nonfinite": "-1",
    "image_size": "0 -8 100000",
    "num_channels": "0 33",
    "num_res_blocks": "0",
    "dropout": "1 -0.1 nan",
    "diffusion_steps": "0 1000000000",
    "noise_schedule": "linaer",
    "schedule_sampler": "best",
    "precision": "fp8",
    "data_dir": "/nowhere {empty}",
    "log_dir": "{file} /dev/null/run",
    "resume_checkpoint": "/nowhere.pt",
    "use_fp16": "maybe",
    "timestep_respacing": "99 many ddim99 0",
    "channel_mult": "1,x 0 1,2,2,2,2",
    "attention_resolutions": "7 x",
}
JOINT_ONLY = {
    "max_bad": "-1",
    "keep_checkpoints": "0 -1",
    "held_out": "-1",
    "sample_steps": "-1",
    "num_classes": "3 -1",
    "single_task_probability": "2 nan",
    "unshifted_probability": "-0.5",
    "detectability": "-1 inf",
    "code_interval": "-1",
    "aggregation": "lump",
    "compile": "yes",
    "train": "head",
    "label_from": "name",
    "init_from": "/nowhere",
    "config": "/nowhere.yaml {file}",
    "modalities": "maskd masked:Z masked,masked depth:X",
}
CLASSIFIER = {
    "classifier_width": "0 33",
    "classifier_depth": "0",
    "classifier_pool": "mean",
    "eval_interval": "0",
    "val_data_dir": "/nowhere",
}
DRAWING = {
    "num_samples": "0 -1 x",
    "batch_size": "0 1000000",
    "seed": "-1 1e20",
    "use_ddim": "maybe",
    "model_path": "/nowhere {file} {run}",
}
JOINT_DRAWING = {
    "num_samples": "0 -5 1e3",
    "batch_size": "0",
    "strength": "nan inf -1",
    "guidance_scale": "nan",
    "classifier_scale": "nan -1",
    "resample": "0 100000",
    "times": "40 1000 -1 x 0,40",
    "steps": "0 41 many",
    "sampler": "eulr",
    "order": "first",
    "want": "lable image,depth",
    "without": "mask",
    "given": "label label=10 label=x lable=3 label= image=/nowhere masked=random",
    "weights": "0.5",
    "model_path": "/nowhere {empty} {file}",
    "classifier_path": "/nowhere",
    "log_dir": "{file}",
    "seed": "-1",
}
LATENT = {
    "H": "0 -8 12 18",
    "W": "18 0 100000",
    "C": "0",
    "f": "0",
    "seed": "-1",
    "n_samples": "0",
    "n_iter": "0",
    "ddim_steps": "0 -1",
    "ddim_eta": "nan 2",
    "scale": "nan",
    "strength": "nan",
    "precision": "half",
    "from-file": "/nowhere.txt {empty_file}",
    "config": "/nowhere.yaml",
    "ckpt": "/nowhere.ckpt",
    "outdir": "{file}",
}
RUN = {
    "n_samples": "0 -1 x",
    "custom_steps": "0",
    "batch_size": "0",
    "eta": "nan -1",
    "scale": "inf",
    "strength": "nan",
    "sampler": "dpm",
    "null_label": "-1",
    "seed": "-1",
    "resume": "/nowhere {empty}",
}
EVALUATING = {
    "batch_size": "0 x",
    "bootstrap": "-1",
    "seed": "-1",
    "json": "{file}/x.json {empty}",
    "inception": "/no.pb",
}
COMMANDS = {
    "image_train": (TRAINING, NUMBERS | {"image_channels": "0 2"}),
    "super_res_train": (
        TRAINING.replace("--image_size", "--large_size") + " --small_size 4",
        {"small_size": "0 16", "large_size": "0 100000 9"},
    ),
    "classifier_train": (f"{TRAINING.split(' --num_channels')[0]} --data_dir {{images}}", CLASSIFIER),
    "image_sample": (SAMPLING, DRAWING),
    "image_nll": (
        f"{SAMPLING} --data_dir {{images}}",
        {"num_samples": "0 -1", "data_dir": "/nowhere"},
    ),
    "super_res_sample": (SAMPLING.replace("--image_size", "--large_size"), {"base_samples": "/no {file}"}),
    "classifier_sample": (SAMPLING, {"classifier_scale": "nan -1", "classifier_path": "/nowhere"}),
    "mt_image_train": (JOINT, NUMBERS | JOINT_ONLY),
    "mt_image_sample": ("--model_path {run} --steps 2 --num_samples 1", JOINT_DRAWING),
    "mt_image_nll": (
        "--model_path {run} --data_dir {digits} --num_samples 1",
        {"num_samples": "0", "batch_size": "0", "steps": "0 41", "seed": "-1", "data_dir": "/no {empty}"},
    ),
    "export_classifier": ("--model_path {run} --out {tmp}/c.pt", {"out": "{tmp}/c.txt", "model_path": "/no"}),
    "convert_checkpoint": ("{run} {tmp}/c.pt --to adm", {"to": "ADM", "image_size": "0"}),
    "cache_latents": (
        "--config {file} --out {tmp}/cache",
        {"shard_size": "0", "batch_size": "0", "config": "/no"},
    ),
    "txt2img": ("--config {sd} --ckpt {weights} --outdir {tmp}/out", LATENT),
    "sample_diffusion": ("-r {run}", RUN),
    "label_accuracy": ("--model_path {run} --data_dir {digits}", {"times": "x -1", "num_samples": "0"}),
    "quickstart": ("", {"ranks": "0 -1"}),
    "sheet": ("a={empty} --out {tmp}/s.png", {"columns": "0", "out": "{empty}"}),
    "figure6": ("--runs a={empty}", {"prefix": "test", "out": "{empty}"}),
    "evaluator": ("{digits} {digits}", EVALUATING),
    "make_reference": ("{digits} {tmp}/r.npz", {"num_images": "0", "image_size": "0", "seed": "-1"}),
    "segmentation": ("{digits} {digits}", {"json": "{file}/x.json", "palette": "nothing"}),
    "main": (
        "-t --base {sd}",
        {"seed": "-1 1e20", "strategy": "horovod", "base": "/nowhere.yaml", "train": "no way"},
    ),
}
CASES = [
    pytest.param(name, flag, value, id=f"{name} --{flag} {value}")
    for name, (_, table) in COMMANDS.items()
    for flag, values in table.items()
    for value in values.split()
] + [
    pytest.param(name, flag, "1", id=f"{name} --{flag}")
    for name in COMMANDS
    for flag in ("batchsize", "sed", "no_such_flag")
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What the command lines name: images in folders of their class, real digits, a trained joint model, ..."""
    tmp = tmp_path_factory.mktemp("wrong")
    for name in ("images/cat", "images/dog", "empty"):
        (tmp / name).mkdir(parents=True)
    for i in range(6):
        sample_image(10 * i).save(tmp / "images" / ("cat", "dog")[i % 2] / f"{i}.png")
    (tmp / "file.txt").write_text("neither YAML nor a checkpoint: [")
    (tmp / "empty.txt").write_text("\n")
    (tmp / "sd.yaml").write_text("model: {params: {unet_config: {params: {channel_mult: [1, 2]}}}}\n")
    th.save({}, tmp / "weights.pt")
    digits(tmp / "digits.npz")
    train_joint(tmp / "digits.npz", tmp / "run", "--iterations", 1)
    return dict(
        tmp=tmp, images=tmp / "images", empty=tmp / "empty", file=tmp / "file.txt", empty_file=tmp / "empty.txt",
        sd=tmp / "sd.yaml", weights=tmp / "weights.pt", digits=tmp / "digits.npz", run=tmp / "run",
    )  # fmt: skip


@pytest.mark.parametrize(("name", "flag", "value"), CASES)
def test_wrong_command_lines_end_with_one_line(places, capfd, monkeypatch, name, flag, value):
    monkeypatch.setenv("OPENAI_LOGDIR", str(places["tmp"] / "log"))
    words = [*COMMANDS[name][0].split(), f"--{flag}", value]
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        in_process(name, *(word.format(**places) for word in words))
    lines = capfd.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines


def test_the_nearest_name_is_suggested():
    parser = flags.Parser().add_flags({"num_channels": 1, "lr": 0.1, "noise_schedule": "linear"})
    for words, said in (
        (["--num_chanels", "3"], "--num_chanels: unknown flag, did you mean --num_channels?"),
        (["--num_chanels=3"], "--num_chanels: unknown flag, did you mean --num_channels?"),
        (["--zzz"], "--zzz: unknown flag"),
        (["--lr", "-1"], "--lr must be at least 0 and finite, not -1"),
        (["--lr"], "--lr: expected one argument"),
        (["--noise_schedule", "cosin"], "--noise_schedule must be one of linear, cosine, not 'cosin', did you mean cosine?"),
        (["word"], "unexpected argument 'word' (see --help)"),
    ):  # fmt: skip
        with pytest.raises(UserError) as refused:
            parser.parse_args(words)
        assert str(refused.value) == said


# ------------------------------------------------------------------------------------------------------ broken files

ARRAYS = "zero cut text crc other float nan flat none scalar object complex empty_images dir link loop member".split()
LABELS = "huge text_label float_label short negative_label".split()
IMAGES = "cut_png zero_png text_png bomb float_tif".split()
WEIGHTS = "zero cut_pt bit text html lfs dir link int list nested foreign pickle".split()
CONFIGS = "list_yaml text tab binary unknown nan_lr list_lr null_lr bool_batch base interpolation tag deep dir link".split()
STATES = "no_config bad_config no_model bad_model no_version bad_version no_optimizer bad_optimizer newer steps size names".split()
SINGLE = SAMPLING.replace("{weights}", "{%s}")
# Of a program: what it is called with, and the broken things that stand at %s in turn.
BROKEN = (
    ("mt_image_train", JOINT.replace("{digits}", "{%s}"), [*ARRAYS, *LABELS]),
    ("mt_image_train", f"{JOINT} --modalities masked:U --held_out 0 --data_dir {{%s}}", IMAGES),
    ("mt_image_train", f"{JOINT} --config {{%s}}", CONFIGS),
    ("mt_image_train", f"{JOINT} --resume_checkpoint {{%s}}", ["zero", "cut_pt", "bit", "text", "dir"]),
    ("mt_image_sample", "--model_path {%s} --steps 2 --num_samples 1", [*WEIGHTS, *STATES]),
    (
        "mt_image_sample",
        "--model_path {run} --steps 2 --num_samples 1 --given image={%s}",
        [*ARRAYS, *IMAGES],
    ),
    ("image_sample", SINGLE, WEIGHTS),
    (
        "super_res_sample",
        SINGLE.replace("--image_size", "--large_size") % "foreign" + " --small_size 4 --base_samples {%s}",
        ARRAYS,
    ),
    ("judge", "train {%s} {tmp}/judge.pt --epochs 1", [*ARRAYS, *LABELS]),
    ("judge", "score {%s} {digits} {digits}", WEIGHTS),
    ("segmentation", "{%s} {%s}", [*ARRAYS, "float_tif", "bomb"]),
    ("restoration", "mask {%s} {tmp}/holes", [*ARRAYS, "zero_png", "bomb"]),
    ("reproduce", "{%s} --dry_run", ["list_yaml", "text", "binary", "dir", "link"]),
    ("figure6", "--out {tmp}/f.png --runs a={%s}", ["empty", "table"]),
    ("sheet", "--out {tmp}/s.xyz a={images}%s", [""]),
    ("kill_test", "--kills %s", ["0", "-1", "x"]),
    ("kill_test", "--ranks %s", ["0", "nan"]),
    ("bench_evaluator", "--threads %s", ["0", "-1", "x"]),
    ("bench_evaluator", "--batch_size %s", ["0", "1e3"]),
    ("bench_representation", "--repetitions %s", ["0", "x"]),
    ("audit", "%s", ["", "--upstream /nowhere", "--upstream {empty}", "--parts x"]),
    ("graft", "%s", ["", "/nowhere", "{empty}", "{file}"]),
    ("refresh", "--base %s", ["/nowhere", "{file}"]),
)
BROKEN_CASES = [
    pytest.param(name, words.replace("%s", one), id=f"{name} {words[-28:]} {one}")
    for name, words, some in BROKEN
    for one in some
]


@pytest.fixture(scope="module")
def broken(places):
    """Files and folders of which each is broken in one way, by name."""
    tmp = places["tmp"] / "broken"
    tmp.mkdir()
    made = dict(places)

    def path(name, ending):
        made[name] = tmp / f"{name}{ending}"
        return made[name]

    good = dict(np.load(places["digits"]))
    images, labels = good["arr_0"], good["labels"]
    raw = places["digits"].read_bytes()
    flipped = bytearray(raw)
    flipped[len(raw) // 3] ^= 255
    for name, content in {
        "zero": b"",
        "cut": raw[: len(raw) // 2],
        "text": b"hello",
        "crc": bytes(flipped),
    }.items():
        path(name, ".npz").write_bytes(content)
    floats = images / np.float32(255)
    for name, arrays in {
        "other": dict(images=images), "float": dict(arr_0=floats), "nan": dict(arr_0=floats * np.nan), "flat": dict(arr_0=labels),
        "none": dict(arr_0=images[:0], labels=labels[:0]), "scalar": dict(arr_0=np.uint8(3)), "complex": dict(arr_0=images * 1j),
        "object": dict(arr_0=np.array([{}, 1], dtype=object)), "empty_images": dict(arr_0=np.zeros((9, 0, 8, 3), np.uint8)),
    }.items():  # fmt: skip
        np.savez(path(name, ".npz"), **{"labels": labels, **arrays})
    for name, wrong in {
        "huge": np.where(labels == 3, 2**31 - 1, labels), "text_label": labels.astype(str), "float_label": labels * 1.0,
        "short": labels[:5], "negative_label": labels - 5,
    }.items():  # fmt: skip
        np.savez(path(name, ".npz"), arr_0=images, labels=wrong, arr_1=wrong)
    path("dir", ".npz").mkdir()
    path("link", ".npz").symlink_to("/nowhere.npz")
    path("loop", ".npz").symlink_to(made["loop"])
    with zipfile.ZipFile(path("member", ".npz"), "w") as archive:
        archive.writestr("arr_0.npy", "no array")

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    png = next(places["images"].rglob("*.png")).read_bytes()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))  # 900 megapixels
    bomb = png[:8] + head + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    for name, content in {
        "cut_png": png[:60],
        "zero_png": b"",
        "text_png": b"hello",
        "bomb": bomb,
        "float_tif": None,
    }.items():
        path(name, "").mkdir()
        for i in range(3):
            if content is None:
                Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(made[name] / f"{i}.tif")
            else:
                (made[name] / f"{i}.png").write_bytes(content)
    whole = sorted(places["run"].glob("checkpoint*.pt"))[-1]
    state, raw = th.load(whole, weights_only=True), whole.read_bytes()
    flipped = bytearray(raw)
    flipped[len(raw) // 3] ^= 1
    files = {
        "cut_pt": raw[: len(raw) // 2],
        "bit": bytes(flipped),
        "html": b"<!DOCTYPE html>",
        "lfs": b"version https://git-lfs",
    }
    for name, content in files.items():
        path(name, ".pt").write_bytes(content)
    path("pickle", ".pt").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    values = {
        "int": 3,
        "list": [1],
        "nested": {"state_dict": 3},
        "foreign": {"a": th.zeros(2)},
        "newer": {**state, "version": 99},
    }
    for part in ("config", "model", "version", "optimizer"):
        values[f"no_{part}"] = {name: value for name, value in state.items() if name != part}
        values[f"bad_{part}"] = {**state, part: "text"}
    for name, flag, value in (
        ("steps", "diffusion_steps", 10**9),
        ("size", "image_size", "8"),
        ("names", "class_names", 3),
    ):
        values[name] = {**state, "config": {**state["config"], flag: value}}
    for name, value in values.items():
        th.save(value, path(name, ".pt"))
    for name, text in {
        "list_yaml": "- 1", "tab": "a:\n\t- b", "unknown": "zzz: 3", "nan_lr": "lr: .nan", "list_lr": "lr: [1]", "null_lr": "lr: null",
        "bool_batch": "batch_size: true", "base": "base: /nowhere.yaml", "interpolation": "lr: ${nope}", "binary": "\0\1",
        "tag": "lr: !!python/object/apply:os.system [true]", "deep": "modalities: {label: {variant: U, zzz: 3}}",
    }.items():  # fmt: skip
        path(name, ".yaml").write_text(text)
    path("table", "").mkdir()
    (made["table"] / "progress.csv").write_bytes(b"\xff\xfe,\0\n")
    return made


@pytest.mark.parametrize(("name", "words"), BROKEN_CASES)
def test_broken_files_end_with_one_error_line(broken, capfd, monkeypatch, name, words):
    monkeypatch.setenv("OPENAI_LOGDIR", str(broken["tmp"] / "log"))
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        in_process(name, *words.format(**broken).split())
    lines = capfd.readouterr().err.splitlines()
    assert ended.value.code == 2
    # What was passed over or warned of may stand before it.
    assert lines[-1].startswith("error: ") and sum(line.startswith("error: ") for line in lines) == 1, lines
    assert "Traceback" not in "".join(lines) and len(lines) <= 4


# ------------------------------------------------------------------------------------------------------------- help


def parsers():
    """(program, parser) of every program, subcommands too."""
    names = [
        f"{folder}.{p.stem}"
        for folder in ("scripts", "experiments")
        for p in sorted((ROOT / folder).glob("*.py"))
    ]
    names += [*(f"evaluations.{name}" for name in EVALUATIONS), "ldm.training.flags"]
    sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "experiments")]
    try:
        for name in names:
            module = importlib.import_module(name.removeprefix("scripts.").removeprefix("experiments."))
            make = getattr(module, "create_argparser", None) or getattr(module, "parser", None)
            if make is not None:
                yield name, make()
                subs = make()._subparsers
                for action in subs._group_actions if subs else ():
                    yield from ((f"{name} {word}", one) for word, one in action.choices.items())
    finally:
        del sys.path[:2]


def test_every_flag_of_every_program_has_help_and_default():
    seen = 0
    for name, parser in parsers():
        if not isinstance(parser, flags.Parser):
            pytest.fail(f"{name} has another parser")
        for action in parser._actions:
            if action.dest in ("help", "command"):
                continue
            seen += 1
            flag, told = action.flag, action.help
            assert flag.help, f"{name}: {action.dest} has no help"
            assert flag.group in flags.GROUPS, f"{name}: {action.dest} is in no group"
            if action.option_strings:
                assert action.required or "default: " in told, f"{name}: {action.dest} has no default"
                assert flag.group != "options" or action.dest == "config", (
                    f"{name}: {action.dest} has no group"
                )
            kind = type(action.declared)
            if kind in (int, float) and action.option_strings:
                assert flag.range() or flag.low is not None, f"{name}: {action.dest} has no range"
            if action.type is None:  # a text: `--scale small` shares its name with a number of other programs
                assert flag.low is None and flag.high is None, f"{name}: {action.dest} has a number's range"
    assert seen > 500


EVALUATIONS = "evaluator joint judge make_reference restoration segmentation".split()
QUICK = [
    *(
        p.stem
        for folder in ("scripts", "experiments")
        for p in sorted((ROOT / folder).glob("*.py"))
        if p.stem != "tables"
    ),
    *EVALUATIONS,
    "main",
]


@pytest.mark.parametrize("name", QUICK)
def test_help_imports_no_torch(name):
    """Torch takes seconds to import, so it comes after the flags."""
    path = script_path(name)
    code = (
        f"import runpy, sys\nsys.argv = ['x', '--help']\nsys.path.insert(0, {str(path.parent)!r})\n"
        f"try: runpy.run_path({str(path)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'numpy', 'omegaconf', 'PIL', 'doit'} & set(sys.modules), 'imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout and ("default: " in done.stdout or "{" in done.stdout)


def test_choices_are_those_of_the_code():
    from guided_diffusion.mt.aggregation import SCHEDULES
    from guided_diffusion.mt.conversion import KINDS
    from guided_diffusion.mt.sampling import SAMPLERS
    from ldm import inference
    from ldm.data.latent_cache import DTYPES

    made = dict(parsers())

    def choices(program, flag):
        return set(made[program]._option_string_actions[flag].flag.choices)

    assert set(flags.SAMPLERS) == set(SAMPLERS) and set(flags.AGGREGATIONS) == set(SCHEDULES)
    assert choices("scripts.convert_checkpoint", "--to") == {*KINDS, "diffusers"}
    assert choices("scripts.cache_latents", "--dtype") == set(DTYPES)
    assert choices("scripts.sample_diffusion", "--sampler") == {*inference.SAMPLERS, "ddpm"}
