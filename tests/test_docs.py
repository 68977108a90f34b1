"""The documents: their commands exist and run, their links lead somewhere.

`bash scripts/docs.sh` checks the links of the whole site.
"""

import argparse
import ast
import contextlib
import inspect
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch as th
import yaml
from PIL import Image

from guided_diffusion import flags
from tests.conftest import ROOT, sample_image

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "patches/README.md",
]
FENCE = re.compile(r"(?:<!-- run(?:: (?P<needs>\w+))? -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)```", re.DOTALL)
COMMAND = re.compile(
    r"(?:python|torchrun)(?! -m pytest)\s[^|#;]*?\b(?<!tests/)"
    r"((?:scripts|experiments|patches|evaluations)/\w+\.py|main\.py)\b([^|#;&\n]*)"
)


def blocks(*kinds, run=None):
    """(text, what it needs) of the fenced blocks of these kinds; run: only those marked, or not marked,
    so.
    """
    found = []
    for page in PAGES:
        for match in FENCE.finditer(page.read_text()):
            marked = match[0].startswith("<!-- run")
            if match["kind"] in kinds and (run is None or run == marked):
                line = page.read_text()[: match.start()].count("\n") + 1
                found.append(pytest.param(match["text"], match["needs"], id=f"{page.name}:{line}"))
    return found


def commands():
    """Every command that a page shows, in fenced blocks, indented ones and in the text: (script, words)."""
    found = {}
    for page in PAGES:
        for script, words in COMMAND.findall(page.read_text().replace("\\\n", " ").replace("`", "\n")):
            if page.parent.name == "patches" and "--modalities" in words:
                continue  # upstream's scripts, in a grafted checkout
            found.setdefault((script, words.strip()), f"{page.name}: {script} {words.strip()[:40]}")
    return [pytest.param(*key, id=name) for key, name in found.items()]


class Parsed(Exception):
    """The words were understood."""


@pytest.mark.parametrize("script, words", commands())
def test_commands_have_the_flags_that_they_show(script, words, monkeypatch, tmp_path):
    """Each word is understood by the script's own parser, which is then stopped."""

    def stop(parse):
        def parse_and_stop(self, *args, **kwargs):
            with monkeypatch.context() as inner:
                inner.setattr(argparse.ArgumentParser, "parse_known_args", original)
                parse(self, *args, **kwargs)
            raise Parsed

        return parse_and_stop

    assert (ROOT / script).exists()
    words = re.sub(
        r"\(.*?\)|\$\(.*?\)|\.\.\.| FLAGS\b|'$", "", words
    )  # prose in brackets, what a reader or a shell fills in
    given = [re.sub(r"\$\w+", "1", word) for word in shlex.split(words)]
    if "--help" in given:
        given = []
    original = argparse.ArgumentParser.parse_known_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop(original))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop(argparse.ArgumentParser.parse_args))
    monkeypatch.setattr(flags.Flag, "check_path", lambda *_: None)  # readers have the files
    monkeypatch.setattr(sys, "argv", [script, *given])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    monkeypatch.chdir(tmp_path)
    for word in given:  # results may only go where there is a folder
        if "/" in word and not word.startswith(("-", "/")):
            Path(word).parent.mkdir(parents=True, exist_ok=True)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises((Parsed, SystemExit)) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    # Without words a script may ask for those that it needs.
    asks = end.type is SystemExit and not given and said.getvalue().startswith("error: give ")
    assert end.type is Parsed or asks, said.getvalue()


@pytest.fixture
def workplace(tmp_path):
    """A folder like the root of the repository, where commands may leave what they make."""
    for path in ROOT.iterdir():
        if path.name not in ("runs", "logs") and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


MODULE = re.compile(r"<!-- module: my_modalities -->\n```python\n(?P<text>.*?)```", re.DOTALL)


def make_scenes(folder, count=8):
    """What the recipe shows: images, 16-bit depth, maps of numbers, and a table."""
    lines = ["file_name,weather,season,sound"]
    for name in ("image", "depth", "seg"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        file = f"{i:04}.png"
        sample_image(10 * i, (8, 8)).save(folder / "image" / file)
        Image.fromarray(np.full((8, 8), 4000 + 1000 * i, np.uint16)).save(folder / "depth" / file)
        Image.fromarray(np.full((8, 8), i % 3, np.uint8)).save(folder / "seg" / file)
        lines.append(f'{file},{("rain", "sun")[i % 2]},{("winter", "summer")[i // 4]},"0.3 -1.2 0.8 {i}"')
    (folder / "metadata.csv").write_text("\n".join(lines))


def make_sounds(folder, count=8):
    for name in ("image", "sound"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        sample_image(10 * i, (8, 8)).save(folder / "image" / f"{i}.png")
        with wave.open(str(folder / "sound" / f"{i}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes((np.sin(np.arange(512) * (i + 1) / 9) * 9000).astype(np.int16).tobytes())


@pytest.mark.parametrize("text, needs", blocks("bash", run=True))
def test_marked_commands_run(workplace, text, needs):
    if needs == "photos":
        for i in range(8):
            folder = workplace / "photos" / ("cat", "dog")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            sample_image(10 * i).save(folder / f"{i}.png")
    if needs == "scenes":
        make_scenes(workplace / "scenes")
    if needs == "sounds":
        make_sounds(workplace / "heard")
        (module,) = (m["text"] for page in PAGES for m in MODULE.finditer(page.read_text()))
        (workplace / "my_modalities.py").write_text(module)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "OPENAI_LOGDIR": str(workplace / "log")}
    job = subprocess.run(
        ["bash", "-e", "-c", text], cwd=workplace, env=env, capture_output=True, text=True, timeout=120
    )
    assert job.returncode == 0, job.stderr[-2000:]
    if "runs/mine/ones" in text:
        with np.load(next((workplace / "runs/mine/ones").glob("samples_2x8x8x3.npz"))) as arrays:
            assert arrays["label"].argmax(axis=1).tolist() == [1, 1]


@pytest.mark.parametrize("text, needs", blocks("python", run=True))
def test_marked_python_runs(text, needs):
    th.manual_seed(0)
    scope = {}
    exec(compile(text, "documentation", "exec"), scope)
    if "colour" in scope:
        assert th.equal(scope["sample"].values["colour"], scope["given"]["colour"])
        assert bool(scope["losses"]["KL_colour"].isfinite().all())


@pytest.mark.parametrize("text, needs", blocks("python"))
def test_python_imports_what_exists(text, needs):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            exec(compile(ast.Module([node], []), "documentation", "exec"), {})


@pytest.mark.parametrize("text, needs", blocks("yaml"))
def test_targets_of_configurations_exist(text, needs):
    from ldm.util import get_obj_from_str

    def check(node):
        if isinstance(node, dict):
            if "target" in node:
                made = get_obj_from_str(node["target"])
                names = {name for c in made.__mro__ for name in parameters(vars(c).get("__init__"))}
                assert set(node.get("params", {})) <= names, node["target"]
            for value in node.values():
                check(value)

    check(yaml.safe_load(text))


def parameters(function):
    return inspect.signature(function).parameters if inspect.isfunction(function) else ()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Also [`Class.method`](../file.py): the file defines it."""
    text = page.read_text()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith("    "))
    anchors = set(re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE))
    anchors = {re.sub(r"[^\w\- ]", "", a).strip().lower().replace(" ", "-") for a in anchors}
    for label, target in re.findall(r"\[([^\]\[]*)\]\(([^)\s]+)\)", prose):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file) if file else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor and not file:
            assert anchor in anchors, target
        name = re.fullmatch(r"`([\w.]+)`", label)
        if name and path.suffix == ".py":
            assert name[1] in defined(path), f"{path.name} defines no {name[1]}"


def defined(path):
    """Functions, classes, and their methods, also inherited ones of the same file."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if hasattr(node, "name"):
            found.add(node.name)
            found |= {f"{node.name}.{m.name}" for m in getattr(node, "body", []) if hasattr(m, "name")}
    return found


def test_the_plot_of_the_schedules(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    script = runpy.run_path(str(ROOT / "experiments/draw_aggregation.py"))
    curves = {curve.name: np.asarray(curve.y) for curve in script["curves"]("linear")}
    assert {"bump", "paper-normalized", "constant", "paper (up to 4547)"} < set(curves)
    for name in ("bump", "paper-normalized", "constant"):
        assert np.nanmax(curves[name]) == pytest.approx(0.5, abs=1e-4)
    assert curves["bump"][0] < 1e-3 and curves["bump"][-1] < 1e-2
    monkeypatch.setattr(sys, "argv", ["draw", "--out", str(tmp_path / "plot.png")])
    script["main"]()
    with Image.open(tmp_path / "plot.png") as made, Image.open(ROOT / "docs/images/aggregation.png") as shown:
        assert made.size == shown.size
