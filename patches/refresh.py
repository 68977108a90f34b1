"""The series, patches/*.patch: undo it, and write it anew after an edit.

    python patches/refresh.py                  the edits since the last commit belong to the single-task code
    python patches/refresh.py --multi_modal    they belong to the series
    python patches/refresh.py --base FOLDER    the single-task files are there

A patch keeps its header, and holds the files that it held. Lines may only be inserted.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from guided_diffusion.errors import UserError, exit_on_user_error  # noqa: E402
from guided_diffusion.flags import Parser  # noqa: E402

# In a copy of the project, so that the project itself, where it is installed, does not fill in what is missing.
_NOT_INSTALLED = """import sys

sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
"""


def patches(root: Path = ROOT) -> list[Path]:
    """The series, in order."""
    return sorted((root / "patches").glob("[0-9]*.patch"))


def files_of(patch: Path) -> list[str]:
    """What a patch changes."""
    return re.findall(r"^diff --git a/(\S+)", patch.read_text(), re.MULTILINE)


def undo(folder: Path, series: list[Path]) -> None:
    """Reverse-apply the series in `folder`. UserError that names the patch that does not fit."""
    # Otherwise git would take the folder for a part of a repository around it.
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    for patch in reversed(series):
        command = ["git", "apply", "-R", str(patch.resolve())]
        job = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        if job.returncode:
            raise UserError(
                f"{patch.name} does not fit the files any more ({job.stderr.strip().splitlines()[0]})"
            )


def single_task_tree(target: Path, root: Path = ROOT) -> Path:
    """A copy of the project at `target` with the series undone."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True
    )
    for file in filter(lambda name: (root / name).is_file(), listed.stdout.splitlines()):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / file, target / file)
    undo(target, patches(root))
    (target / "sitecustomize.py").write_text(_NOT_INSTALLED)
    return target


def refresh(root: Path = ROOT, multi_modal: bool = False, base: Path | None = None) -> None:
    """Write the series from the tree; see the flags. UserError if the edits do not tell what is single-task, or the
    difference is more than insertions."""
    series = patches(root)
    files = sorted({file for patch in series for file in files_of(patch)})
    tree = {file: (root / file).read_text() for file in files}
    with tempfile.TemporaryDirectory() as place:
        single = Path(place) / "a"
        if base is not None:
            _write(single, files, lambda file: (base / file).read_text())
        else:
            _write(single, files, lambda file: _committed(root, file))
            undo(single, series)
            if not multi_modal:
                _write(single, files, lambda file: _merged(tree[file], _committed(root, file), single / file))
        _write(Path(place) / "b", files, tree.__getitem__)
        for patch in series:
            header = patch.read_text().partition("diff --git ")[0]
            diffs = [_diff(place, file) for file in files_of(patch)]
            if re.search(r"^-(?!--)", "\n".join(diffs), re.MULTILINE):
                raise UserError(f"{patch.name} would change lines: the series may only insert them")
            patch.write_text(header + "".join(diffs))


def _write(folder, files, text: Callable[[str], str]):
    for file in files:
        content = text(file)
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(content)


def _committed(root, file):
    job = subprocess.run(["git", "show", f"HEAD:{file}"], cwd=root, capture_output=True, text=True)
    if job.returncode:
        raise UserError(f"the last commit has no {file}: give --base a folder with the single-task files")
    return job.stdout


def _merged(tree, committed, single):
    """The single-task form with the edit from `committed` to `tree`."""
    with tempfile.TemporaryDirectory() as place:
        paths = [Path(place) / name for name in ("tree", "committed")]
        for path, text in zip(paths, (tree, committed), strict=True):
            path.write_text(text)
        job = subprocess.run(
            ["git", "merge-file", "-p", str(paths[0]), str(paths[1]), str(single)],
            capture_output=True,
            text=True,
        )
    if job.returncode:
        raise UserError(f"{single.name}: an edit touches lines of the series: give --base, or --multi_modal")
    return job.stdout


def _diff(place, file):
    command = ["git", "diff", "--no-index", "--no-color", "--no-prefix", f"a/{file}", f"b/{file}"]
    text = subprocess.run(command, cwd=place, capture_output=True, text=True).stdout
    return re.sub(r"^index .*\n", "", text, flags=re.MULTILINE)


def flags() -> Parser:
    """The flags of this program."""
    own = Parser(__doc__)
    own.add("--multi_modal", action="store_true", help="the edits belong to the series", group="results")
    own.add(
        "--base",
        kind=Path,
        path="source",
        metavar="FOLDER",
        help="where the single-task files are",
        group="data",
    )
    return own


@exit_on_user_error()
def main(argv: list[str] | None = None) -> None:
    """Do what the flags say."""
    args = flags().parse_args(argv)
    refresh(ROOT, args.multi_modal, args.base)
    print("\n".join(f"{patch.name}: {', '.join(files_of(patch))}" for patch in patches()))


if __name__ == "__main__":
    main()
