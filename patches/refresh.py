"""Keeping the series true to the tree: is it stale, and how to write it anew."""

import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from guided_diffusion.errors import UserError
from patches.patchset import (
    FOLDER,
    Plan,
    base_sums,
    count_lines,
    make_patches,
    new_files,
    project_files,
    read_plan,
    reverse,
    series,
    sha256,
)

_COMMITS = 200  # how far back to look for one where the series was fresh


def problems(root: Path) -> list[str]:
    """Why the series is stale, one line each; empty if it is fresh. Needs no git history."""
    plan, found = read_plan(root), []
    try:
        base = undone(lambda name: (root / name).read_text(), series(root))
    except UserError as error:
        return [str(error)]
    sums = base_sums(root)
    for file in sorted(sums.keys() | set(plan.files)):
        if file not in sums:
            found.append(f"{file} is named in topics.yaml, and not in base.sha256")
        elif sha256(base[file]) != sums[file]:
            found.append(f"{file} without the series is not what {FOLDER}/base.sha256 says")
    if found:
        return found
    tree = {file: (root / file).read_text() for file in plan.files}
    wanted = make_patches(plan, base, tree)
    if {name: (root / FOLDER / name).read_text() for name in series(root)} != wanted:
        found.append("the patches are not cut as topics.yaml says")
    for name, text in listings(root, plan, wanted).items():
        path = root / FOLDER / name
        if not path.is_file() or path.read_text() != text:
            found.append(f"{FOLDER}/{name} is out of date")
    return found


def undone(read: Callable[[str], str], patches: Sequence[str]) -> dict[str, str]:
    """The single-task form of the series' files, where read(path) gives a file of some state of the
    project.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tree, store = place / "tree", place / "store"
        store.mkdir()
        files = [
            line.split(maxsplit=1)[1] for line in read(f"{FOLDER}/base.sha256").splitlines() if line.strip()
        ]
        for file in files:
            (tree / file).parent.mkdir(parents=True, exist_ok=True)
            (tree / file).write_text(read(file))
        for name in patches:
            (store / name).write_text(read(f"{FOLDER}/{name}"))
        reverse(tree, [store / name for name in patches])
        return {file: (tree / file).read_text() for file in files}


# Where the single-task form comes from


def find_base(root: Path, given: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """(single-task form, the tree that it was taken from) of every file that the topics name.

    given: a git revision or a folder that holds the single-task files themselves. Otherwise the series as
    it stands is reverse-applied to the newest commit where it was fresh. UserError if there is none.
    """
    files = read_plan(root).files
    if given and Path(given).is_dir():
        texts = {file: _read_file(Path(given) / file) for file in files}
        return texts, {file: (root / file).read_text() for file in files}
    if given:
        texts = {file: _show(root, given, file) for file in files}
        return texts, {file: (root / file).read_text() for file in files}
    if (root / FOLDER / "base.sha256").is_file():
        try:
            if (base := _fresh_base(lambda name: _read_file(root / name), files)) is not None:
                return base, {file: (root / file).read_text() for file in files}
        except UserError:
            pass  # stale, or files missing: that is what the history is for
    log = subprocess.run(
        ["git", "log", f"-{_COMMITS}", "--format=%H"], cwd=root, capture_output=True, text=True
    )
    for commit in log.stdout.split():
        try:
            base = _fresh_base(lambda name, at=commit: _show(root, at, name), files)
        except UserError:
            continue  # no series there yet, or a stale one
        if base is not None:
            return base, {file: _show(root, commit, file) for file in files}
    raise UserError(
        "no commit is known where the series was fresh: give --base, a revision or a folder with the "
        "single-task files"
    )


def _fresh_base(read, files):
    """The single-task files by a state's own series; None if that does not give its own checksums."""
    names = [line for line in read(f"{FOLDER}/series").splitlines() if line and not line.startswith("#")]
    base = undone(read, names)
    sums = dict(reversed(line.split(maxsplit=1)) for line in read(f"{FOLDER}/base.sha256").splitlines())
    if any(sha256(base[file]) != total for file, total in sums.items()):
        return None
    # A file that topics.yaml names for the first time has been single-task until then.
    return {file: base[file] if file in base else read(file) for file in files}


def _show(root, revision, file):
    job = subprocess.run(
        ["git", "show", f"{revision}:{file}"], cwd=root, capture_output=True, text=True, check=False
    )
    if job.returncode:
        raise UserError(f"git has no {file} at {revision!r}; give --base a folder that holds it")
    return job.stdout


def _read_file(path):
    try:
        return path.read_text()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def merged(base: str, before: str, after: str, file: str) -> str:
    """`base` with the edit from `before` to `after`: an edit of the single-task code. UserError on a
    conflict.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("base", "before", "after")]
        for path, text in zip(paths, (base, before, after), strict=True):
            path.write_text(text)
        job = subprocess.run(["git", "merge-file", "-p", *map(str, paths)], capture_output=True, text=True)
    if job.returncode:
        raise UserError(
            f"{file}: the edit touches lines of the series, so it is not clear which part is single-task; "
            "write the single-task file and give its folder as --base"
        )
    return job.stdout


# Writing


def refresh(root: Path, base: str | None = None, into_base: Sequence[str] = ()) -> list[str]:
    """Rewrite the series from the tree; the names of the files written.

    base: see `find_base`. into_base: files whose edits since then belong to the single-task code.
    """
    plan = read_plan(root)
    single, before = find_base(root, base)
    tree = {file: (root / file).read_text() for file in plan.files}
    for file in into_base:
        if file not in single:
            raise UserError(f"{file} is none of the files that patches/topics.yaml names")
        single[file] = merged(single[file], before[file], tree[file], file)
    patches = make_patches(plan, single, tree)
    sums = "".join(f"{sha256(text)}  {file}\n" for file, text in sorted(single.items()))
    folder = root / FOLDER
    for old in folder.glob("[0-9]*.patch"):
        old.unlink()
    written = patches | {"base.sha256": sums} | listings(root, plan, patches)
    for name, text in written.items():
        (folder / name).write_text(text)
    # New files of this folder are listed too.
    again = listings(root, plan, patches)
    for name, text in again.items():
        (folder / name).write_text(text)
    return sorted(written)


def listings(root: Path, plan: Plan, patches: dict[str, str]) -> dict[str, str]:
    """series, NEW_FILES and README.md as they should be."""
    new = new_files(plan, project_files(root))
    order = ["# The order in which the patches apply; they are reverse-applied from the last to the first."]
    listed = ["# Wholly new files, by topic: remove them after reverse-applying the series."]
    for topic in plan.topics:
        has_patch = f"{topic.stem}.patch" in patches
        order.append(
            f"{topic.stem}.patch"
            if has_patch
            else f"# {topic.stem}: no line of upstream's files, see NEW_FILES"
        )
        listed += [f"# {topic.stem}", *new[topic.stem]]
    return {
        "series": "\n".join(order) + "\n",
        "NEW_FILES": "\n".join(listed) + "\n",
        "README.md": _README.format(table=_table(plan, patches, new)),
    }


def _table(plan, patches, new):
    lines = ["| topic | in the paper | lines in upstream's files | wholly new |", "|---|---|---|---|"]
    for topic in plan.topics:
        name = f"{topic.stem}.patch"
        if name in patches:
            added, removed = count_lines(patches[name])
            where = f"[{topic.stem}]({name})"
            change = f"+{added} -{removed}"
        else:
            where, change = topic.stem, "none: upstream's are untouched"
        files = [f"`{file}`" for file in new[topic.stem] if not file.startswith("tests/")]
        lines.append(f"| {where}: {topic.title} | {topic.paper} | {change} | {', '.join(files) or '-'} |")
    return "\n".join(lines)


_README = """# The change, as patches

What makes several modalities out of the single-task code, as a series of unified diffs over the files that
exist in guided-diffusion and latent-diffusion too. Files that are wholly new are listed in `NEW_FILES`, not
diffed.

{table}

The single-task code: copy the project, remove what `NEW_FILES` lists, and undo the patches from the last to
the first.

    grep -v '^#' patches/NEW_FILES | xargs rm
    grep -v '^#' patches/series | tac | while read -r name; do git apply -R "patches/$name"; done
    sha256sum --check patches/base.sha256

`tests/test_patches.py` does that on a copy and runs the single-task tests there.

    python patches/audit.py                  # lines changed per upstream file; is the series fresh?
    python patches/audit.py --upstream GUIDED_DIFFUSION --ldm LATENT_DIFFUSION --json audit.json
    python patches/audit.py --refresh        # after an edit of the multi-modal part
    python patches/audit.py --refresh --into-base guided_diffusion/unet.py  # after one of the single-task part

`--upstream` compares public names, signatures, defaults, flags, state-dict keys and numbers with a checkout
of upstream; what is missing or different on purpose stands with its reason in `differences.yaml`. How a
changed line finds its topic is declared in `topics.yaml`. This page, `series`, `NEW_FILES`, `base.sha256`
and the patches are written by `--refresh`.
"""
