"""The patch series as data: topics, blocks of changed lines, and the way back to the single-task code.

Reverse-applying the series (`git apply -R`, last patch first) to a copy of the project and removing the
files of NEW_FILES gives the single-task code. `base.sha256` says what its changed files then are, byte
for byte.
"""

import ast
import difflib
import fnmatch
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from guided_diffusion.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "patches"
_LEFT_OUT = (".git", ".venv", "__pycache__", "runs", "*.egg-info", ".pytest_cache", ".ruff_cache", "build")
_NOT_EDITABLE = """import sys

sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
"""


@dataclass(frozen=True)
class Rule:
    """Which blocks of `file` belong to a topic: all, or those whose scope or text matches."""

    file: str
    scope: str | None = None
    text: str | None = None

    @property
    def is_specific(self) -> bool:
        return self.scope is not None or self.text is not None

    def matches(self, file: str, block: "Block") -> bool:
        if file != self.file or (self.scope is not None and not re.fullmatch(self.scope, block.scope)):
            return False
        return self.text is None or re.search(self.text, "".join(block.removed + block.added)) is not None


@dataclass(frozen=True)
class Topic:
    """One patch of the series; without rules it has no lines in upstream's files and so no patch."""

    number: int
    name: str
    title: str
    paper: str
    text: str
    rules: tuple[Rule, ...]
    new: tuple[str, ...]  # patterns of wholly new files

    @property
    def stem(self) -> str:
        return f"{self.number:04d}-{self.name}"


@dataclass(frozen=True)
class Plan:
    """The content of topics.yaml."""

    topics: tuple[Topic, ...]
    upstream: tuple[str, ...]
    house: tuple[str, ...]  # files that are in no topic whatever its patterns
    tests: tuple[str, ...]  # of the single-task code
    not_tests: tuple[str, ...]  # those among them that ask for modalities

    @property
    def files(self) -> list[str]:
        """The upstream files that the series may change."""
        return sorted({rule.file for topic in self.topics for rule in topic.rules})


@dataclass(frozen=True)
class Block:
    """Neighbouring lines that differ: base[old] became tree[new], inside the definition `scope` (""
    outside).
    """

    old: slice
    new: slice
    scope: str
    removed: list[str]
    added: list[str]


def read_plan(root: Path = ROOT) -> Plan:
    """topics.yaml of a project. UserError if it is not what is described there."""
    path = root / FOLDER / "topics.yaml"
    try:
        content = yaml.safe_load(path.read_text())
        topics = tuple(
            Topic(
                number=number,
                name=entry["name"],
                title=entry["title"],
                paper=entry["paper"],
                text=entry["text"],
                rules=tuple(Rule(r["file"], r.get("in"), r.get("text")) for r in entry["rules"]),
                new=tuple(entry.get("new", ())),
            )
            for number, entry in enumerate(content["topics"], 1)
        )
        upstream, house = (
            tuple(name for pattern in content[key] for name in _expand_braces(pattern))
            for key in ("upstream", "house")
        )
        tests = content["single_task"]
        return Plan(topics, upstream, house, tuple(tests["tests"]), tuple(tests["but_not"]))
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be used: {' '.join(repr(error).split())}") from error


def _expand_braces(pattern):
    match = re.fullmatch(r"(.*)\{(.*)\}(.*)", pattern)
    return [match[1] + word + match[3] for word in match[2].split(",")] if match else [pattern]


def project_files(root: Path) -> list[str]:
    """The files of the project: those that git knows or would take, or all but what is built."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True
    )
    if (root / ".git").exists() and listed.returncode == 0:
        return sorted(name for name in set(listed.stdout.splitlines()) if (root / name).is_file())
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not any(fnmatch.fnmatch(f, pattern) for pattern in _LEFT_OUT)]
        found += [str((Path(folder) / name).relative_to(root)) for name in files]
    return sorted(found)


def new_files(plan: Plan, files: Iterable[str]) -> dict[str, list[str]]:
    """The wholly new files among `files`, by topic (its stem)."""
    patterns = {pattern: topic.stem for topic in plan.topics for pattern in topic.new}
    found = {topic.stem: [] for topic in plan.topics}
    for file in sorted(set(files) - {*plan.house, *plan.files}):
        fitting = [pattern for pattern in patterns if fnmatch.fnmatchcase(file, pattern)]
        if fitting:
            found[patterns[max(fitting, key=len)]].append(file)
    return found


# Blocks and patches


def changed_blocks(base: str, tree: str) -> list[Block]:
    """What changed from one text of a Python file to another."""
    old, new = base.splitlines(keepends=True), tree.splitlines(keepends=True)
    scopes = {"old": _definitions(base), "new": _definitions(tree)}
    blocks = []
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag != "equal":
            where = ("new", j1, j2) if j2 > j1 else ("old", i1, i2)
            scope = _innermost(scopes[where[0]], where[1] + 1, where[2])
            blocks.append(Block(slice(i1, i2), slice(j1, j2), scope, old[i1:i2], new[j1:j2]))
    return blocks


def _definitions(source):
    """(first line, last line, dotted name) of every class and function."""
    found = []

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                name = f"{prefix}{child.name}"
                found.append((child.lineno, child.end_lineno, name))
                visit(child, f"{name}.")
            else:
                visit(child, prefix)

    visit(ast.parse(source), "")
    return found


def _innermost(definitions, first, last):
    around = [(b - a, name) for a, b, name in definitions if a <= first and last <= b]
    return min(around)[1] if around else ""


def topic_of(plan: Plan, file: str, block: Block) -> Topic:
    """The topic of a block; UserError if no rule takes it."""
    for specific in (True, False):
        for topic in plan.topics:
            if any(r.matches(file, block) for r in topic.rules if r.is_specific == specific):
                return topic
    raise UserError(
        f"no topic takes the change in {file}, {block.scope or 'module level'}: add a rule to "
        "patches/topics.yaml"
    )


def make_patches(plan: Plan, base: Mapping[str, str], tree: Mapping[str, str]) -> dict[str, str]:
    """The series: file name of a patch -> its text, in order; topics without lines are left out."""
    blocks = {file: changed_blocks(base[file], tree[file]) for file in plan.files}
    owner = {
        (file, k): topic_of(plan, file, block).number
        for file, some in blocks.items()
        for k, block in enumerate(some)
    }
    patches = {}
    for topic in plan.topics:
        diffs = []
        for file, some in blocks.items():
            before, after = (
                _mix(base[file], some, lambda k, last=last, file=file: owner[file, k] <= last)
                for last in (topic.number - 1, topic.number)
            )
            if before != after:
                hunks = difflib.unified_diff(before, after, f"a/{file}", f"b/{file}")
                diffs.append(f"diff --git a/{file} b/{file}\n" + "".join(hunks))
        if diffs:
            patches[f"{topic.stem}.patch"] = _header(topic, len(plan.topics)) + "".join(diffs)
    return patches


def _mix(base, blocks, taken: Callable[[int], bool]) -> list[str]:
    """The base's lines with those blocks applied that are `taken`."""
    lines, place, result = base.splitlines(keepends=True), 0, []
    for k, block in enumerate(blocks):
        result += lines[place : block.old.start] + (block.added if taken(k) else block.removed)
        place = block.old.stop
    return result + lines[place:]


def _header(topic, count):
    files = "".join(f"  {pattern}\n" for pattern in topic.new if not pattern.startswith("tests/"))
    beside = f"\nWholly new files beside it:\n{files}" if files else ""
    return f"[{topic.number}/{count}] {topic.title}\nPaper: {topic.paper}\n\n{topic.text.strip()}\n{beside}\n"


def count_lines(patch: str) -> tuple[int, int]:
    """(added, removed) lines of a patch."""
    body = [line for line in patch.splitlines() if not line.startswith(("+++", "---"))]
    body = body[next((k for k, line in enumerate(body) if line.startswith("@@")), len(body)) :]
    return sum(line.startswith("+") for line in body), sum(line.startswith("-") for line in body)


# The way back


def series(root: Path) -> list[str]:
    """The patches of a project in order; UserError if there are none."""
    path = root / FOLDER / "series"
    if not path.is_file():
        raise UserError(f"there is no {path}: python patches/audit.py --refresh --base REF writes it")
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def reverse(folder: Path, patches: Sequence[Path]) -> None:
    """Undo the patches in `folder`, last first. UserError that names the one that does not fit."""
    # Otherwise git would take the folder for a part of a repository around it.
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    for patch in reversed(patches):
        job = subprocess.run(
            ["git", "apply", "-R", str(patch.resolve())], cwd=folder, env=env, capture_output=True, text=True
        )
        if job.returncode:
            first = job.stderr.strip().splitlines()[0]
            raise UserError(f"{patch.name} does not fit the files any more ({first})")


def single_task_tree(root: Path, target: Path) -> Path:
    """A copy of the project at `target` without the multi-modal part. UserError if the series does not
    fit.
    """
    plan = read_plan(root)
    files = project_files(root)
    new = {file for some in new_files(plan, files).values() for file in some}
    for file in files:
        if file not in new:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / file, target / file)
    reverse(target, [root / FOLDER / name for name in series(root)])
    # An editable installation of the project would fill in what is removed here, also in processes that
    # tests start.
    (target / "sitecustomize.py").write_text(_NOT_EDITABLE)
    return target


def sha256(text: str) -> str:
    """The checksum in base.sha256."""
    return hashlib.sha256(text.encode()).hexdigest()


def base_sums(root: Path) -> dict[str, str]:
    """File -> checksum of its single-task form."""
    lines = (root / FOLDER / "base.sha256").read_text().splitlines()
    return {file: total for total, file in (line.split(maxsplit=1) for line in lines)}
