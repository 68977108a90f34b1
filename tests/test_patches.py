"""The change against upstream: undone it gives the single-task code, grafted it works on a fork, and the audit tells
what differs.

UPSTREAM_GUIDED_DIFFUSION and UPSTREAM_LATENT_DIFFUSION name checkouts of upstream: with them graft and audit are
tested on the real thing too.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.errors import UserError
from patches import audit, graft, refresh

ROOT = Path(__file__).resolve().parents[1]
CASES = ["unet.no_scale_shift_mult", "diffusion.cos_spaced50", "diffusion.lin_kl"]


def upstream(variable):
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} names no checkout of upstream")
    return Path(path)


def run(*command, cwd, path=None, timeout=600, **env):
    env = {**os.environ, "PYTHONPATH": str(path or cwd), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def git(folder, *words):
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    job = subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True)
    return job.stdout


# The series


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The project with the series undone. If this fails: see patches/README.md."""
    return refresh.single_task_tree(tmp_path_factory.mktemp("single"))


def test_the_series_is_small_inserts_only_and_names_its_equations():
    inserted = 0
    for patch in refresh.patches():
        header, _, diffs = patch.read_text().partition("diff --git ")
        assert header.splitlines()[1].startswith("Paper: ")
        lines = [line for line in diffs.splitlines() if not line.startswith(("+++", "---"))]
        assert not [line for line in lines if line.startswith("-")]
        inserted += sum(line.startswith("+") for line in lines)
    assert 0 < inserted < 60


def test_undone_it_gives_single_task_files(single):
    for patch in refresh.patches():
        for file in refresh.files_of(patch):
            found = re.findall(r"encodings|aggregation|joint|presence|\bheads=", (single / file).read_text())
            assert not found, f"{file} without the series still has {found}"


def test_single_task_code_needs_nothing_of_the_paper(single):
    code = "from guided_diffusion import script_util, train_util, gaussian_diffusion, unet, respace; import sys; "
    job = run(
        "-c", code + "print([m for m in sys.modules if m.startswith('guided_diffusion.mt')])", cwd=single
    )
    assert job.stdout == "[]\n", job.stderr


def test_the_single_task_code_passes_all_parity_cases(single):
    job = run("-m", "pytest", "-q", "-x", "tests/test_parity_adm.py", "tests/test_parity_ldm.py", cwd=single)
    assert job.returncode == 0, job.stdout[-2000:]


def test_latent_diffusion_trains_and_samples_without_the_series(single):
    facts, numbers = audit.probe(single, "ldm", ["numbers"], ["latent.eps"])
    assert not facts["failed"]
    theirs, ours = (facts, numbers), audit.probe(ROOT, "ldm", ["numbers"], ["latent.eps"], like=facts)
    found = audit.compare(theirs, ours)
    assert {"latent.eps/loss", "latent.eps/ddim", "latent.eps/plms guided"} <= {f.name for f in found}
    assert not [f for f in found if f.is_fault]


BASE = "def model(x):\n    a = x\n    b = a\n    return b\n\n\ndef loss(x):\n    y = x\n    return y\n"


@pytest.fixture
def toy(tmp_path):
    """A project of one file whose series inserts a line."""
    (tmp_path / "patches").mkdir()
    patch = tmp_path / "patches/0001-loss.patch"
    patch.write_text("Loss\nPaper: equation 6\n\ndiff --git a/a.py b/a.py\n")
    (tmp_path / "base").mkdir()
    (tmp_path / "base/a.py").write_text(BASE)
    (tmp_path / "a.py").write_text(BASE.replace("    return y", "    y = y + 1\n    return y"))
    refresh.refresh(tmp_path, base=tmp_path / "base")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "state")
    return tmp_path, patch


def without_series(project, tmp_path):
    (tmp_path / "undone").mkdir()
    (tmp_path / "undone/a.py").write_text((project / "a.py").read_text())
    refresh.undo(tmp_path / "undone", refresh.patches(project))
    return (tmp_path / "undone/a.py").read_text()


def edit(file, old, new):
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))


def test_refresh_keeps_the_header_and_undoes_to_the_base(toy, tmp_path_factory):
    project, patch = toy
    assert (
        patch.read_text().startswith("Loss\nPaper: equation 6\n\ndiff")
        and "+    y = y + 1" in patch.read_text()
    )
    assert without_series(project, tmp_path_factory.mktemp("x")) == BASE


def test_an_edit_of_the_single_task_code_goes_into_the_base(toy, tmp_path_factory):
    project, _ = toy
    edit(project / "a.py", "    a = x\n", "    a = 2 * x\n")
    refresh.refresh(project)
    assert without_series(project, tmp_path_factory.mktemp("x")) == BASE.replace("a = x", "a = 2 * x")


def test_an_edit_of_the_multi_modal_code_goes_into_the_series(toy, tmp_path_factory):
    project, patch = toy
    edit(project / "a.py", "y + 1\n", "y + 1\n    y = y * 2\n")
    with pytest.raises(UserError, match="touches lines of the series"):
        refresh.refresh(project)
    refresh.refresh(project, multi_modal=True)
    assert "+    y = y * 2" in patch.read_text()
    assert without_series(project, tmp_path_factory.mktemp("x")) == BASE


def test_a_changed_line_is_refused(toy):
    project, _ = toy
    edit(project / "a.py", "    a = x\n", "    a = 2 * x\n")
    with pytest.raises(UserError, match="0001-loss.patch would change lines"):
        refresh.refresh(project, multi_modal=True)


# The graft

FORK = Path(__file__).parent / "fork"  # upstream's class and function names, in a few lines
CHECK = """
import numpy as np, sys, torch as th
from guided_diffusion import gaussian_diffusion as gd, respace, unet
from guided_diffusion.mt.aggregation import Aggregation, JointOutput
betas = np.linspace(1e-3, 0.2, 12)
kinds = dict(model_mean_type=gd.ModelMeanType.EPSILON, model_var_type=gd.ModelVarType.FIXED_SMALL)
kinds |= dict(loss_type=gd.LossType.MSE, aggregation=Aggregation.named("late", betas, {"a": 0.5}))
diffusion = respace.SpacedDiffusion({0, 2, 5, 6, 9, 11}, betas=betas, **kinds)
th.manual_seed(0)
x, noise, code = th.randn(3, 2, 3, 4, 4)
t = th.tensor([4, 0])
def model(z, ts):
    return JointOutput((z + 0.01 * ts.float().reshape(-1, 1, 1, 1)).sin(), {"a": code}, {}, {})
def guide(y, ts):
    return 0.3 * y.cos()
out = {"q_sample": diffusion.q_sample(x, t, noise, {"a": code}), "plain": diffusion.q_sample(x, t, noise)}
out["posterior"] = diffusion.q_posterior_mean_variance(x, noise, t, {"a": code})[0]
said = diffusion.p_mean_variance(model, x, t)
out |= {"mean": said["mean"], "x_start": said["pred_xstart"]}
out["scored"] = diffusion.condition_score(guide, said, x, t, model_kwargs={})["mean"]
for name in ("p_sample", "ddim_sample"):
    step = getattr(diffusion, name)
    for kwargs in ({}, {"cond_fn": guide, "model_kwargs": {}}):
        drawn = step(model, x, t, randn_like=lambda z: th.ones_like(z), **kwargs)
        assert drawn["joint"].encodings["a"] is code
        out[f"{name} {len(kwargs)}"] = drawn["sample"]
    th.manual_seed(1)
    out[f"{name} plain"] = step(lambda z, ts: z.sin(), x, t)["sample"]
out["reversed"] = diffusion.ddim_reverse_sample(model, x, t)["sample"]
np.savez(sys.argv[1], **{k: v.numpy() for k, v in out.items()})
"""
NETWORK = """
import torch as th
from guided_diffusion.unet import UNetModel
class Presence(th.nn.Module):
    def forward(self, present):
        return present @ th.ones(1, 8)
net = UNetModel(4, 1, 2, 1, 1, [], num_classes=3)
x, t = th.randn(2, 1, 4, 4), th.tensor([1, 2])
before = net(x, t, th.tensor([2, 0]))
assert th.allclose(before, net(x, t, th.eye(3)[[2, 0]]), atol=1e-6)
net.presence = Presence()
assert th.equal(before, net(x, t, th.tensor([2, 0])))
assert th.equal(before, net(x, t, th.tensor([2, 0]), present=th.zeros(2, 1)))
assert not th.allclose(before, net(x, t, th.tensor([2, 0]), present=th.ones(2, 1)), atol=1e-4)
net.heads = lambda middle, last: {"a": (middle.mean(), last.mean())}
output, predictions = net(x, t, th.tensor([2, 0]))
assert th.equal(before, output) and set(predictions) == {"a"}
"""


@pytest.fixture
def fork(tmp_path):
    """A made-up fork of guided-diffusion under git."""
    package = tmp_path / "fork/guided_diffusion"
    package.mkdir(parents=True)
    for source in FORK.glob("*.txt"):
        (package / f"{source.stem}.py").write_text(source.read_text())
    (tmp_path / "fork/.gitignore").write_text("__pycache__/\n")
    git(tmp_path / "fork", "init", "-q")
    git(tmp_path / "fork", "add", "-A")
    git(tmp_path / "fork", "commit", "-qm", "fork")
    return tmp_path / "fork"


def test_a_grafted_fork_has_the_moving_frame(fork, tmp_path, capsys):
    """Every formula and step of equations 4 and 5, beside this project's."""
    graft.main([str(fork)])
    printed = capsys.readouterr().out
    assert "+        self.aggregation = aggregation  # mt-diffusion" in printed
    assert "new file guided_diffusion/mt/sampling.py" in printed
    assert not re.search(r"^-(?!--)", printed, re.MULTILINE), "more than insertions"
    for name, path in (("theirs", fork), ("ours", ROOT)):
        job = run("-c", CHECK, tmp_path / f"{name}.npz", cwd=tmp_path, path=path)
        assert job.returncode == 0, job.stderr
    theirs, ours = np.load(tmp_path / "theirs.npz"), np.load(tmp_path / "ours.npz")
    assert list(theirs) == list(ours)
    for name in ours:
        np.testing.assert_allclose(theirs[name], ours[name], atol=2e-5, err_msg=name)
    job = run("-c", NETWORK, cwd=tmp_path, path=fork)
    assert job.returncode == 0, job.stderr


def test_edits_of_the_fork_survive_graft_and_removal(fork):
    """Its own lines and names inside grafted functions, made before and after the graft."""
    edit(
        fork / "guided_diffusion/unet.py",
        "        hs = []\n",
        "        x = x * 1.0  # ours\n        hs = []\n",
    )
    edit(
        fork / "guided_diffusion/gaussian_diffusion.py",
        "noise = th.randn_like(x)  # of p_sample",
        "z = th.randn_like(x)",
    )
    edit(fork / "guided_diffusion/gaussian_diffusion.py", "* noise  # of p_sample\n", "* z\n")
    git(fork, "commit", "-qam", "edits")
    graft.main([str(fork)])
    assert (
        "            z = randn_like(x)  # mt-diffusion"
        in (fork / "guided_diffusion/gaussian_diffusion.py").read_text()
    )
    edit(fork / "guided_diffusion/unet.py", "x = x * 1.0  # ours", "x = x * 2.0  # ours")
    run("-c", "import guided_diffusion.mt.join", cwd=fork)
    graft.main([str(fork), "--remove"])
    assert git(fork, "status", "--porcelain", "--ignored=no") == " M guided_diffusion/unet.py\n"
    assert git(fork, "diff", "--shortstat").strip() == "1 file changed, 1 insertion(+), 1 deletion(-)"


def test_removal_leaves_a_clean_status_and_dry_run_changes_nothing(fork, capsys):
    graft.main([str(fork), "--dry_run"])
    assert "+++ b/guided_diffusion/respace.py" in capsys.readouterr().out
    assert git(fork, "status", "--porcelain") == ""
    graft.main([str(fork)])
    graft.main([str(fork), "--remove", "--dry_run"])
    assert (fork / "guided_diffusion/mt/losses.py").exists()
    graft.main([str(fork), "--remove"])
    assert git(fork, "status", "--porcelain") == "" and not (fork / "guided_diffusion/mt").exists()


@pytest.mark.parametrize(
    "file, old, new, message",
    [
        ("unet", "self.middle_block(h, emb)", "self.core(h, emb)", "UNetModel.forward: no statement like"),
        ("unet", "class UNetModel", "class UNet", "has no UNetModel.__init__"),
        (
            "respace",
            "super().__init__(**kwargs)",
            "super().__init__(**kwargs)\n        super().__init__(**kwargs)",
            "more than one",
        ),
        (
            "gaussian_diffusion",
            "rescale_timesteps=False,\n",
            "rescale_timesteps=False\n",
            "lines that end with a comma",
        ),
        ("script_util", "def create_classifier", "def (", "is not valid Python"),
    ],
)
def test_what_is_not_recognised_is_refused_in_one_line(fork, capsys, file, old, new, message):
    edit(fork / f"guided_diffusion/{file}.py", old, new)
    git(fork, "commit", "-qam", "edit")
    with pytest.raises(SystemExit) as stopped:
        graft.main([str(fork)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert git(fork, "status", "--porcelain") == ""


def test_twice_grafted_changed_copies_and_other_folders_are_refused(fork, tmp_path, capsys):
    graft.main([str(fork)])
    status = git(fork, "status", "--porcelain")
    copy = fork / "guided_diffusion/mt/losses.py"
    unet = fork / "guided_diffusion/unet.py"
    text, broken = unet.read_text(), "return self.out(h), self.heads("
    for command, before in (
        ([str(fork)], lambda: None),
        ([str(fork), "--remove"], lambda: edit(unet, broken, broken + "\n            ")),
        ([str(fork), "--remove"], lambda: (unet.write_text(text), copy.write_text("MINE = 1\n"))),
        ([str(tmp_path)], lambda: None),
        ([str(tmp_path), "--remove"], lambda: None),
    ):
        before()
        with pytest.raises(SystemExit):
            graft.main(command)
        assert capsys.readouterr().err.startswith("error: ")
    assert git(fork, "status", "--porcelain") == status and copy.read_text() == "MINE = 1\n"


def test_the_core_asks_the_base_only_for_what_upstream_has(fork):
    """Every relative import of what comes along is of what comes along, or of a name that the fork has."""
    graft.main([str(fork)])
    job = run("-c", "import guided_diffusion.mt.join, guided_diffusion.mt.bound", cwd=fork)
    assert job.returncode == 0, job.stderr


@pytest.mark.slow
def test_upstream_itself_grafted(tmp_path):
    """Its own training script runs, with and without modalities; joint training for 20 steps, and sampling, give this
    project's numbers; removal leaves nothing."""
    checkout = tmp_path / "checkout"
    git(tmp_path, "clone", "-q", str(upstream("UPSTREAM_GUIDED_DIFFUSION")), str(checkout))
    graft.main([str(checkout)])
    classifier = "{width: 64, depth: 1, attention_resolutions: '8', channel_mult: '1,2'}"
    by_classifier = f"{{label: {{head: classifier, classifier: {classifier}}}}}"
    for spec, terms in (("masked:X,label:U", 5), (by_classifier, 4)):
        for name, path in (("theirs", checkout), ("ours", ROOT)):
            job = run(ROOT / "tests/graft_driver.py", tmp_path / f"{name}.npz", spec, cwd=tmp_path, path=path)
            assert job.returncode == 0, job.stderr
        theirs, ours = np.load(tmp_path / "theirs.npz"), np.load(tmp_path / "ours.npz")
        assert set(theirs) == set(ours) and sum(name.startswith("step 19 ") for name in ours) == terms
        for name in ours:
            error = np.abs(theirs[name] - ours[name]).max() / max(np.abs(ours[name]).max(), 1e-12)
            assert error < 1e-4, f"{name}: {error}"
    (tmp_path / "pictures").mkdir()
    for k in range(4):
        pixels = np.random.RandomState(k).randint(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"pictures/{'ab'[k % 2]}_{k}.png")
    model = "--image_size 16 --channel_mult 1,2 --num_channels 32 --num_res_blocks 1 --num_heads 2".split()
    model += "--attention_resolutions 8 --diffusion_steps 20 --class_cond True --use_fp16 False".split()
    train = "--batch_size 2 --lr_anneal_steps 3 --log_interval 1".split()
    for run_name, flags in (("plain", []), ("joint", ["--modalities", "masked:X,label:U"])):
        log = tmp_path / run_name
        command = [
            checkout / "scripts/image_train.py",
            "--data_dir",
            tmp_path / "pictures",
            *model,
            *train,
            *flags,
        ]
        job = run(*command, cwd=tmp_path, path=checkout, OPENAI_LOGDIR=str(log))
        assert job.returncode == 0, job.stderr
        assert (log / "model000003.pt").exists()
        assert ("KL_label" in (log / "progress.csv").read_text()) == bool(flags)
    sample = "--num_samples 2 --batch_size 2 --timestep_respacing 4 --model_path".split()
    command = [
        checkout / "scripts/image_sample.py",
        *model,
        *flags,
        *sample,
        tmp_path / "joint/model000003.pt",
    ]
    job = run(*command, cwd=tmp_path, path=checkout, OPENAI_LOGDIR=str(tmp_path / "samples"))
    assert job.returncode == 0 and list((tmp_path / "samples").glob("samples_2x16x16x3.npz")), job.stderr
    graft.main([str(checkout), "--remove"])
    assert git(checkout, "status", "--porcelain") == ""


# The audit


@pytest.fixture(scope="module")
def theirs(single):
    """The single-task code stands for upstream, whose interface it has."""
    return audit.probe(single, "guided_diffusion", cases=CASES)


def test_beside_upstream_nothing_is_lost(theirs):
    found = audit.compare(theirs, audit.probe(ROOT, "guided_diffusion", cases=CASES, like=theirs[0]))
    assert [f for f in found if f.is_fault] == []
    by_name = {f.name: f for f in found}
    sample = by_name["guided_diffusion.gaussian_diffusion.GaussianDiffusion.q_sample"]
    assert (sample.verdict, sample.detail) == ("extended", "encodings=None")
    assert by_name["guided_diffusion.respace.space_timesteps"].verdict == "same"
    assert by_name["scripts/image_sample.py --use_ddim"].verdict == "same"
    assert by_name["imagenet512"].verdict == "equal"
    assert by_name["diffusion.cos_spaced50/p_sample_loop"].verdict == "equal"


GRAPH = """import tensorflow.compat.v1 as tf
from scann import *
from pytorch_lightning.utilities.distributed import rank_zero_only


class Net(tf.Module):
    @rank_zero_only
    def forward(self, x):
        return x
"""
ALTERED = {
    # a name that is gone here, another default, another formula, another layer
    "guided_diffusion/nn.py": ("class GroupNorm32", "def only_there():\n    pass\n\n\nclass GroupNorm32"),
    "guided_diffusion/resample.py": ("history_per_term=10", "history_per_term=11"),
    "guided_diffusion/gaussian_diffusion.py": (
        '"output": nats / math.log(2.0)',
        '"output": nats / math.log(2.1)',
    ),
    "guided_diffusion/unet.py": ("self.out = nn.Sequential(", "self.final = self.out = nn.Sequential("),
    "guided_diffusion/flags.py": ("num_samples=10000", "num_samples=50000"),
}


def test_every_difference_is_named_and_what_is_not_compared_is_a_fault(single, tmp_path):
    """As a command, beside an upstream that differs in several ways."""
    fake = tmp_path / "upstream"
    for package in ("guided_diffusion", "scripts"):
        for path in (single / package).rglob("*.py"):
            copy = fake / path.relative_to(single)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(path.read_text())
    for file, (old, new) in ALTERED.items():
        edit(fake / file, old, new)
    (fake / "guided_diffusion/extra.py").write_text("import no_such_package\n")
    (fake / "guided_diffusion/graph.py").write_text(GRAPH)
    command = [ROOT / "patches/audit.py", "--upstream", fake, "--json", tmp_path / "audit.json"]
    job = run(*command, "--cases", "diffusion.cos_spaced50", cwd=ROOT)
    assert job.returncode == 1, job.stderr
    found = json.loads((tmp_path / "audit.json").read_text())
    by_name = {f["name"]: (f["verdict"], f["detail"]) for f in found}
    assert by_name["guided_diffusion.nn.only_there"][0] == "missing"
    sampler = by_name["guided_diffusion.resample.LossSecondMomentResampler.__init__"]
    assert sampler == ("changed", "default of history_per_term: [11] there, [10] here")
    assert by_name["scripts/image_sample.py --num_samples"] == ("changed", "default 50000 there, 10000 here")
    assert by_name["imagenet64"][0] == "different" and "final.0.weight" in by_name["imagenet64"][1]
    assert by_name["diffusion.cos_spaced50/bound"][0] == "different"
    assert by_name["diffusion.cos_spaced50/posterior"][0] == "equal"
    assert by_name["guided_diffusion.extra"][0] == "not compared"
    assert "no_such_package" in by_name["guided_diffusion.extra"][1]
    # What is not installed has a stand-in, so that the module's own names are seen.
    assert by_name["guided_diffusion.graph.Net.forward"][0] == "missing"
    assert re.search(r"^verdict: \d+ faults", job.stdout.splitlines()[-1])


def test_a_folder_without_the_package_is_one_line(tmp_path):
    job = run(ROOT / "patches/audit.py", "--upstream", tmp_path, cwd=ROOT)
    assert job.returncode == 2
    assert job.stderr == f"error: {tmp_path} has no folder guided_diffusion: give a checkout of upstream\n"


@pytest.mark.slow
def test_the_audit_of_upstream_itself_is_good():
    paths = upstream("UPSTREAM_GUIDED_DIFFUSION"), upstream("UPSTREAM_LATENT_DIFFUSION")
    job = run(ROOT / "patches/audit.py", "--upstream", paths[0], "--ldm", paths[1], cwd=ROOT)
    assert job.returncode == 0, job.stdout + job.stderr
    assert job.stdout.endswith("verdict: good\n")


P, K = "POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY"


@pytest.mark.parametrize(
    "theirs, ours, verdict",
    [
        ([["a", P, []]], [["a", P, []]], "same"),
        ([["a", P, []]], [["a", P, []], ["b", P, [1]]], "extended"),
        ([["a", P, []]], [["a", P, []], ["b", P, []]], "changed"),
        ([["a", P, []], ["b", P, []]], [["b", P, []], ["a", P, []]], "changed"),
        ([["a", P, [1]]], [["a", P, [2]]], "changed"),
        ([["a", P, [1]]], [["a", P, []]], "changed"),
        ([["a", P, []]], [["a", P, [2]]], "same"),
        ([["a", P, [0]]], [["a", P, [0.0]]], "same"),
        ([["a", P, []]], [["a", K, []]], "changed"),
        ([["rest", "VAR_KEYWORD", []]], [["options", "VAR_KEYWORD", []]], "same"),
        ([["rest", "VAR_KEYWORD", []]], [], "changed"),
    ],
)
def test_signatures(theirs, ours, verdict):
    assert audit.signatures(theirs, ours)[0] == verdict
