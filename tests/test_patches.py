"""The change against upstream: the series gives the single-task code back, and the audit tells what
differs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from guided_diffusion.errors import UserError
from patches import patchset, refresh
from patches.compare import compare, compare_signatures, probe, read_differences

ROOT = Path(__file__).resolve().parents[1]
PLAN = patchset.read_plan()
CASES = ["unet.no_scale_shift_mult", "diffusion.cos_spaced50", "diffusion.lin_kl"]
IMPORT_EVERYTHING = """
import importlib, pkgutil, runpy, sys
from pathlib import Path
sys.path.insert(0, "scripts")
for package in ("guided_diffusion", "ldm", "evaluations"):
    folder = importlib.import_module(package).__path__
    assert Path(folder[0]).parent == Path.cwd(), folder
    for module in pkgutil.walk_packages(folder, package + "."):
        importlib.import_module(module.name)
parsers = 0
for script in sorted(Path("scripts").glob("*.py")):
    flags = runpy.run_path(str(script)).get("create_argparser")
    parsers += flags is not None and bool(flags()._actions)
print(parsers, "scripts with upstream's flags")
"""


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The project without its multi-modal part."""
    return patchset.single_task_tree(ROOT, tmp_path_factory.mktemp("single"))


def run(*command, cwd, timeout=600):
    env = {**os.environ, "PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
    )


# The series


def test_the_series_is_fresh():
    """If this fails: python patches/audit.py --refresh (see patches/README.md)."""
    assert refresh.problems(ROOT) == []


def test_every_patch_names_its_equation_and_the_whole_is_small():
    total = 0
    for name in patchset.series(ROOT):
        text = (ROOT / "patches" / name).read_text()
        assert text.splitlines()[1].startswith("Paper: ")
        total += sum(patchset.count_lines(text))
    assert 0 < total < 300


def test_reverse_applied_it_gives_the_single_task_files(single):
    for file, total in patchset.base_sums(ROOT).items():
        text = (single / file).read_text()
        assert patchset.sha256(text) == total
        assert "encodings" not in text and "modalities" not in text
    listed = [line for line in (ROOT / "patches/NEW_FILES").read_text().splitlines() if line[:1] != "#"]
    assert "guided_diffusion/mt/aggregation.py" in listed
    assert not [file for file in listed if (single / file).exists()]


def test_nothing_that_is_left_needs_what_is_removed(single):
    job = run("-c", IMPORT_EVERYTHING, cwd=single)
    assert job.returncode == 0, f"a new file that is not listed in patches/topics.yaml?\n{job.stderr}"
    assert job.stdout == "7 scripts with upstream's flags\n"


def test_the_single_task_code_passes_all_parity_cases(single):
    job = run("-m", "pytest", "-q", "tests/test_parity_adm.py", "tests/test_parity_ldm.py", cwd=single)
    assert job.returncode == 0, job.stdout[-2000:]


@pytest.mark.slow
def test_the_single_task_code_passes_the_single_task_suite(single):
    left_out = [f"--deselect={test}" for test in PLAN.not_tests]
    job = run("-m", "pytest", "-q", *PLAN.tests, *left_out, cwd=single, timeout=3600)
    assert job.returncode == 0, job.stdout[-3000:]


# Making the series


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A project of one file with history: its single-task form, then the multi-modal one with a series."""
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "test")
        monkeypatch.setenv(f"{name}_EMAIL", "test@example.org")
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches/topics.yaml").write_text(
        "topics:\n"
        "- {name: model, title: A, paper: eq. 1, text: t, rules: [{file: a.py}]}\n"
        "- {name: loss, title: B, paper: eq. 2, text: t, rules: [{file: a.py, in: loss}], new: [new.py]}\n"
        "- {name: rest, title: C, paper: eq. 3, text: t, rules: []}\n"
        "upstream: [a.py]\nhouse: []\nsingle_task: {tests: [], but_not: []}\n"
    )
    (tmp_path / "new.py").write_text("NEW = 1\n")
    other = "def other(x):\n    y = x\n    z = y\n    return z\n"
    base = f"def model(x):\n    return x\n\n\n{other}\n\ndef loss(x):\n    return x\n"
    git(tmp_path, "init", "-q")
    commit(tmp_path, base)
    (tmp_path / "a.py").write_text(base.replace("model(x)", "model(x, e)").replace("loss(x)", "loss(x, e)"))
    refresh.refresh(tmp_path, base="HEAD")
    commit(tmp_path)
    return tmp_path, base


def git(folder, *words):
    subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)


def commit(folder, text=None):
    if text is not None:
        (folder / "a.py").write_text(text)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "state")


def edit(folder, old, new):
    text = (folder / "a.py").read_text()
    assert old in text
    (folder / "a.py").write_text(text.replace(old, new))


def without_series(folder):
    return refresh.undone(lambda name: (folder / name).read_text(), patchset.series(folder))["a.py"]


def test_topics_take_their_blocks(toy):
    folder, base = toy
    assert patchset.series(folder) == ["0001-model.patch", "0002-loss.patch"]
    first, second = ((folder / "patches" / name).read_text() for name in patchset.series(folder))
    assert "+def model(x, e):" in first and "+def loss" not in first
    assert "+def loss(x, e):" in second and "eq. 2" in second
    assert "new.py" in (folder / "patches/NEW_FILES").read_text()
    assert "# 0003-rest" in (folder / "patches/series").read_text()
    assert without_series(folder) == base
    assert refresh.problems(folder) == []


def test_an_edit_makes_the_series_stale_and_refresh_takes_it_in(toy):
    folder, base = toy
    edit(folder, "loss(x, e):", "loss(x, e, w=1):")
    assert refresh.problems(folder)
    refresh.refresh(folder)
    assert refresh.problems(folder) == [] and without_series(folder) == base
    assert "w=1" in (folder / "patches/0002-loss.patch").read_text()
    commit(folder)
    edit(folder, "return x\n", "return x + 0\n")  # outside the patches' hunks
    refresh.refresh(folder)
    assert without_series(folder) == base


def test_an_edit_of_the_single_task_part_goes_into_the_base(toy):
    folder, base = toy
    edit(folder, "z = y", "z = 2 * y")
    assert "a.py without the series is not what" in refresh.problems(folder)[0]
    patches = [(folder / "patches" / name).read_text() for name in patchset.series(folder)]
    refresh.refresh(folder, into_base=["a.py"])
    assert without_series(folder) == base.replace("z = y", "z = 2 * y")
    assert [(folder / "patches" / name).read_text() for name in patchset.series(folder)] == patches
    with pytest.raises(UserError, match="none of the files"):
        refresh.refresh(folder, into_base=["b.py"])


def test_a_new_file_makes_the_listing_stale(toy):
    folder, _ = toy
    (folder / "new.py").rename(folder / "newer.py")
    assert refresh.problems(folder) == [
        "patches/NEW_FILES is out of date",
        "patches/README.md is out of date",
    ]


def test_a_change_that_no_topic_takes_is_named(toy):
    folder, _ = toy
    topics = folder / "patches/topics.yaml"
    topics.write_text(topics.read_text().replace("{file: a.py}", "{file: a.py, in: model}"))
    edit(folder, "z = y", "z = 2 * y")
    with pytest.raises(UserError, match="no topic takes the change in a.py, other"):
        refresh.refresh(folder)


# The comparison with upstream


@pytest.fixture(scope="module")
def ours(upstream):
    return probe(ROOT, "guided_diffusion", cases=CASES, like=upstream)


@pytest.fixture(scope="module")
def upstream(single):
    """The single-task code stands for upstream, whose interface it has."""
    return probe(single, "guided_diffusion", cases=CASES)


def test_beside_upstream_nothing_is_lost(upstream, ours):
    result = compare(upstream, ours, "guided_diffusion", read_differences())
    assert result.faults == []
    found = {f.name: f for f in result.findings}
    loss = found["guided_diffusion.gaussian_diffusion.GaussianDiffusion.training_losses"]
    assert (loss.verdict, loss.detail) == ("extended", "encodings=None")
    assert found["guided_diffusion.respace.space_timesteps"].verdict == "same"
    assert found["scripts.image_sample.use_ddim"].verdict == "same"
    assert found["imagenet512"].verdict == "equal"
    numbers = {f.name for f in result.findings if f.part == "numbers"}
    assert {"unet.no_scale_shift_mult/gradient", "diffusion.cos_spaced50/p_sample_loop"} <= numbers
    assert "guided_diffusion.mt.aggregation.Aggregation" in result.only_here


ONLY_THERE = "def only_there():\n    pass\n"
GRAPH = """import tensorflow.compat.v1 as tf
from scann import *
from pytorch_lightning.utilities.distributed import rank_zero_only


class Net(tf.Module):
    @rank_zero_only
    def forward(self, x):
        return x
"""
ALTERED = {
    # a name that is gone here, another default, another formula, another layer, another flag
    "guided_diffusion/nn.py": ("class GroupNorm32", f"{ONLY_THERE}\n\nclass GroupNorm32"),
    "guided_diffusion/resample.py": ("history_per_term=10", "history_per_term=11"),
    "guided_diffusion/gaussian_diffusion.py": (
        '"output": nats / math.log(2.0)',
        '"output": nats / math.log(2.1)',
    ),
    "guided_diffusion/unet.py": ("self.out = nn.Sequential(", "self.final = self.out = nn.Sequential("),
    "scripts/_common.py": ("num_samples=10000", "num_samples=50000"),
}


def test_every_difference_is_named(single, tmp_path):
    """As a command, beside an upstream that differs in six ways."""
    fake = tmp_path / "upstream"
    for package in ("guided_diffusion", "scripts"):
        for path in (single / package).rglob("*.py"):
            copy = fake / path.relative_to(single)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(path.read_text())
    for file, (old, new) in ALTERED.items():
        text = (fake / file).read_text()
        assert old in text, f"{file} changed: mend this test"
        (fake / file).write_text(text.replace(old, new))
    renamed = fake / "guided_diffusion/script_util.py"
    head, definition, body = renamed.read_text().partition("def str2bool(")
    renamed.write_text(head + definition + body.replace("v)", "word)").replace("v,", "word,"))
    (fake / "guided_diffusion/extra.py").write_text("import no_such_package\n")
    (fake / "guided_diffusion/graph.py").write_text(GRAPH)
    command = [
        str(ROOT / "patches/audit.py"),
        "--upstream",
        str(fake),
        "--json",
        str(tmp_path / "audit.json"),
    ]
    job = run(*command, "--cases", "diffusion.cos_spaced50", cwd=ROOT)
    assert job.returncode == 1, job.stderr
    assert "extra does not load here: ModuleNotFoundError: No module named 'no_such_package'" in job.stdout
    report = json.loads((tmp_path / "audit.json").read_text())
    faults = {
        f["name"]: (f["verdict"], f["detail"])
        for f in report["packages"]["guided_diffusion"]["findings"]
        if f["verdict"] in ("missing", "changed", "different")
    }
    module = "guided_diffusion"
    assert faults[f"{module}.script_util.str2bool"] == ("changed", "parameter word is missing")
    assert faults[f"{module}.nn.only_there"] == ("missing", "no such name")
    sampler = faults[f"{module}.resample.LossSecondMomentResampler.__init__"]
    assert sampler == ("changed", "default of history_per_term: 11 there, 10 here")
    assert faults["scripts.image_sample.num_samples"] == ("changed", "default 50000 there, 10000 here")
    assert faults["imagenet64"][0] == "different" and "final.0.weight" in faults["imagenet64"][1]
    assert faults["diffusion.cos_spaced50/bound"][0] == "different"
    assert "diffusion.cos_spaced50/posterior" not in faults
    # What is not installed has a stand-in, so that the module's own names are seen.
    assert faults[f"{module}.graph.Net.forward"] == ("missing", "there is no such module")
    assert report["packages"]["guided_diffusion"]["stand_ins"]
    assert f"{len(report['faults'])} faults" in job.stdout.splitlines()[-1]


def test_a_folder_without_the_package_is_one_line(tmp_path):
    job = run(str(ROOT / "patches/audit.py"), "--upstream", str(tmp_path), cwd=ROOT)
    assert job.returncode == 2
    assert job.stderr == f"error: {tmp_path} has no folder guided_diffusion: give a checkout of upstream\n"


def parameter(name, kind="POSITIONAL_OR_KEYWORD", **default):
    return {"name": name, "kind": kind, **default}


@pytest.mark.parametrize(
    "theirs, ours, verdict",
    [
        ([parameter("a")], [parameter("a")], "same"),
        ([parameter("a")], [parameter("a"), parameter("b", default=1)], "extended"),
        ([parameter("a")], [parameter("a"), parameter("b")], "changed"),
        ([parameter("a"), parameter("b")], [parameter("b"), parameter("a")], "changed"),
        ([parameter("a", default=1)], [parameter("a", default=2)], "changed"),
        ([parameter("a", default=0)], [parameter("a", default=0.0)], "same"),
        ([parameter("a")], [parameter("a", "KEYWORD_ONLY")], "changed"),
        ([parameter("rest", "VAR_KEYWORD")], [parameter("options", "VAR_KEYWORD")], "same"),
        ([parameter("rest", "VAR_KEYWORD")], [], "changed"),
    ],
)
def test_signatures(theirs, ours, verdict):
    assert compare_signatures(theirs, ours)[0] == verdict
