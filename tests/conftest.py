"""What several test modules share: images to train on, development data, and jobs of several processes."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("scripts", "experiments", "evaluations", "benchmarks", "patches", ".")  # of programs

# Started by the tests, the ranks of a job find the package without an installation.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def dev_data(name):
    """The path of a development data file; skips the test where there is none.

    The data lie beside the repository in shared/data, or where $MT_DIFFUSION_DEV_DATA says.
    """
    folder = Path(os.environ.get("MT_DIFFUSION_DEV_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / name).exists():
        pytest.skip(f"no development data {name} in {folder}")
    return folder / name


def script_path(name):
    """scripts/NAME.py, or the one of another folder of programs."""
    return next(p for p in (ROOT / d / f"{name}.py" for d in FOLDERS) if p.exists())


@pytest.fixture(scope="session")
def unpacked_dev_data(tmp_path_factory):
    """unpacked_dev_data("camvid.tar"): the folder with an archive's content, unpacked once for all tests."""
    folders = {}

    def unpack(name):
        archive = dev_data(name)
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name.split(".")[0])
            shutil.unpack_archive(archive, folders[name])
        return folders[name]

    return unpack


@pytest.fixture(scope="session")
def launch():
    """launch("mpiexec" or "torchrun" or "python", script, *arguments): the finished job of (two) processes.

    Environment variables are given as keywords; None removes one.
    """

    def run(launcher, script, *arguments, ranks=2, timeout=60, **environment):
        if launcher == "mpiexec" and not _working_mpi():
            pytest.skip("no working mpiexec and mpi4py")
        command = {
            "mpiexec": [_beside_python("mpiexec"), "-n", str(ranks), sys.executable],
            "torchrun": [
                sys.executable,
                *"-m torch.distributed.run --standalone --nproc_per_node".split(),
                str(ranks),
            ],
            "python": [sys.executable],
        }[launcher]
        env = {**os.environ, **environment}
        command += [str(script), *map(str, arguments)]
        job = subprocess.Popen(
            command,
            env={key: str(value) for key, value in env.items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            stdout, stderr = job.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            job.terminate()  # the launcher ends its ranks
            stdout, stderr = job.communicate()
            pytest.fail(f"not done after {timeout} s: {' '.join(command)}\n{stdout}\n{stderr}")
        return subprocess.CompletedProcess(command, job.returncode, stdout, stderr)

    return run


@pytest.fixture
def run_script(monkeypatch, capfd):
    """run_script("reproduce", "--flag", ...): the finished job of experiments/reproduce.py, run in this process, which has
    its slow imports already."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            path = script_path(name)
            monkeypatch.syspath_prepend(str(path.parent))
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    return run


def _beside_python(program):
    """The program of this Python's environment, which belongs to its mpi4py, else the one on the path."""
    beside = Path(sys.executable).parent / program
    return str(beside) if beside.exists() else shutil.which(program)


def _working_mpi():
    try:
        import mpi4py  # noqa: F401
    except ImportError:
        return False
    return _beside_python("mpiexec") is not None


def sample_image(value=0, size=(10, 8), mode="RGB"):
    """An image of (width, height) whose content tells its number: a gradient to the right, plus `value`."""
    width, height = size
    ramp = np.tile(np.linspace(0, 100, width), (height, 1)) + value
    rgb = np.stack([ramp, ramp / 2, 255 - ramp], axis=-1).clip(0, 255).astype(np.uint8)
    return Image.fromarray(rgb).convert(mode)


@pytest.fixture
def prefix_folder(tmp_path):
    """Twelve images named as upstream wants them: cat_0.png, ..., dog_0.png, ..., owl_0.png, ..."""
    folder = tmp_path / "prefix"
    folder.mkdir()
    for i in range(12):
        sample_image(10 * i).save(folder / f"{('cat', 'dog', 'owl')[i % 3]}_{i // 3}.png")
    return folder


@pytest.fixture
def class_folder(tmp_path):
    """Twelve images in folders of their class: cat/0.png, ..., dog/0.png, ..., owl/0.png, ..."""
    folder = tmp_path / "classes"
    for i in range(12):
        path = folder / ("cat", "dog", "owl")[i % 3] / f"{i // 3}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sample_image(10 * i).save(path)
    return folder
