"""Jobs of one and several ranks: how they start, agree, load checkpoints, and end."""

import socket
import subprocess
import sys
import time

import pytest
import torch as th

from guided_diffusion import dist_util
from guided_diffusion.errors import UserError, UserFileError, exit_on_user_error, one_line
from tests.conftest import ROOT

REPORT = """
import sys
import torch as th, torch.distributed as dist
from guided_diffusion import dist_util
dist_util.setup_dist()
dist_util.setup_dist()  # as where a fork calls it twice
rank = dist.get_rank()
plain = th.full((3,), float(rank + 1))
numbers = th.arange(24.0).view(1, 2, 3, 4)
mixed = numbers * (rank + 1)
if rank == 0:  # in another order in memory than on rank 1
    mixed = mixed.contiguous(memory_format=th.channels_last)
param = th.nn.Parameter(th.arange(4.0) * (rank + 1))
dist_util.sync_params([plain, mixed, param])
total = th.tensor([rank + 1.0])
dist.all_reduce(total)
values = [plain.sum().item(), float(th.equal(mixed, numbers)), param.sum().item(), total.item()]
words = ["REPORT", rank, dist.get_world_size(), dist_util.dev(), th.get_num_threads(), *values]
sys.stdout.write(" ".join(map(str, words)) + "\\n")  # at once: the ranks share the terminal
"""

FAIL = """
import sys, time
from guided_diffusion import dist_util, logger
from guided_diffusion.errors import UserError, exit_on_user_error
where, who = sys.argv[1:]
failing = who == "all" or int(who) == logger.get_rank_without_mpi_import()
with exit_on_user_error():
    if where == "before" and failing:
        raise UserError("no such folder\\nsecond line")
    dist_util.setup_dist()
    if where == "after" and failing:
        raise UserError("no such folder\\nsecond line")
    if where == "crash" and failing:
        raise KeyError("a bug")
    time.sleep(60)
"""


@pytest.fixture
def script(tmp_path):
    def write(text):
        path = tmp_path / "script.py"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_two_ranks_meet_and_get_the_values_of_rank_zero(launch, script, launcher):
    job = launch(launcher, script(REPORT))
    assert job.returncode == 0, job.stderr
    reports = sorted(line.split()[1:] for line in job.stdout.splitlines() if line.startswith("REPORT"))
    assert [report[:2] for report in reports] == [["0", "2"], ["1", "2"]]
    for report in reports:
        assert [float(value) for value in report[4:]] == [3.0, 1.0, 6.0, 3.0]
    if launcher == "mpiexec":
        assert job.stderr == ""


@pytest.mark.parametrize("told", [None, dist_util._cores()])
def test_ranks_share_the_cores_unless_told_otherwise(launch, script, told):
    job = launch("mpiexec", script(REPORT), OMP_NUM_THREADS=told)
    threads = [line.split()[4] for line in job.stdout.splitlines() if line.startswith("REPORT")]
    assert threads == [str(told or max(1, dist_util._cores() // 2))] * 2, job.stderr


def test_plain_python_needs_no_mpi(launch, script, tmp_path):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("raise RuntimeError('cannot load MPI library')")
    job = launch("python", script(REPORT), PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert job.returncode == 0, job.stderr
    assert job.stdout.split()[1:3] == ["0", "1"]
    assert job.stderr == ""


def test_mpiexec_without_mpi4py_says_what_is_missing(launch, script, tmp_path):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("raise RuntimeError('cannot load MPI library')")
    job = launch("mpiexec", script(FAIL), "after", "0", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert job.returncode == 2
    assert "error: mpiexec started 2 ranks, but mpi4py cannot be loaded" in job.stderr
    assert "Traceback" not in job.stderr


@pytest.mark.parametrize("where, who", [("before", "all"), ("before", "1"), ("after", "all"), ("after", "1")])
def test_a_mistake_on_any_rank_ends_all_with_one_line(launch, script, where, who):
    start = time.monotonic()
    job = launch("mpiexec", script(FAIL), where, who)
    assert job.returncode == 2
    assert job.stderr == "error: no such folder second line\n"
    assert time.monotonic() - start < 30


def test_a_mistake_ends_torchrun_too(launch, script):
    job = launch("torchrun", script(FAIL), "after", "1")
    assert job.returncode != 0
    assert job.stderr.count("error: no such folder second line\n") == 1


def test_a_crash_of_one_rank_shows_its_traceback_and_ends_the_others(launch, script):
    start = time.monotonic()
    job = launch("mpiexec", script(FAIL), "crash", "1")
    assert job.returncode == 1
    assert job.stderr.rstrip().endswith("KeyError: 'a bug'")
    assert time.monotonic() - start < 30


def test_a_mistake_of_a_single_process_gives_exit_code_2(capsys):
    @exit_on_user_error()
    def main():
        raise UserFileError("data not found: 'x'")

    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: data not found: 'x'\n"
    assert issubclass(UserFileError, FileNotFoundError)


def test_a_bug_is_not_taken_for_a_mistake():
    with pytest.raises(KeyError), exit_on_user_error():
        raise KeyError("bug")


def test_the_message_of_a_data_worker_is_found_in_its_traceback():
    trace = "Original Traceback:\n  File x\npkg.UserError: bad image: y\n"
    text = f"Caught UserError in DataLoader worker process 0.\n{trace}"
    assert one_line(UserError(text)) == "bad image: y"


def test_a_checkpoint_is_read_where_it_was_asked_for(tmp_path):
    path = tmp_path / "model000010.pt"
    th.save({"a.weight": th.arange(6.0).view(2, 3), "step": 10}, path)
    state = dist_util.load_state_dict(str(path), map_location="cpu")
    assert state["step"] == 10
    assert th.equal(state["a.weight"], th.arange(6.0).view(2, 3))


def test_rank_zero_alone_may_load_a_checkpoint(launch, script, tmp_path):
    th.save({"w": th.ones(100_000)}, tmp_path / "model.pt")
    job = launch(
        "mpiexec",
        script(
            "import sys, torch as th, torch.distributed as dist\n"
            "from guided_diffusion import dist_util\n"
            "dist_util.setup_dist()\n"
            "w = th.zeros(100_000)\n"
            "if dist.get_rank() == 0:\n"
            "    w = dist_util.load_state_dict(sys.argv[1], map_location='cpu')['w']\n"
            "dist_util.sync_params([w])\n"
            "sys.stdout.write(f'{w.sum().item()}\\n')\n"
        ),
        tmp_path / "model.pt",
    )
    assert job.returncode == 0, job.stderr
    assert job.stdout.split() == ["100000.0"] * 2


def test_an_unusable_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint not found.*missing.pt"):
        dist_util.load_state_dict(str(tmp_path / "missing.pt"))
    with pytest.raises(UserError, match="is a folder"):
        dist_util.load_state_dict(str(tmp_path))

    whole = tmp_path / "whole.pt"
    th.save({"w": th.zeros(1000)}, whole)
    for name, content in {
        "truncated.pt": whole.read_bytes()[:2000],
        "empty.pt": b"",
        "text.pt": b"<html>404 not found</html>",
        "image.pt": b"\x89PNG\r\n\x1a\n" + bytes(100),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.*is not a checkpoint"):
            dist_util.load_state_dict(str(tmp_path / name))


class Payload:
    pass


def test_a_checkpoint_with_code_is_refused_unless_trusted(tmp_path):
    path = str(tmp_path / "model.pt")
    th.save({"w": th.zeros(2), "extra": Payload()}, path)
    with pytest.raises(
        UserError, match=r"names tests\.test_dist_util\.Payload, which could run code.*Convert"
    ):
        dist_util.load_state_dict(path)
    assert isinstance(dist_util.load_state_dict(path, weights_only=False)["extra"], Payload)


def test_a_sound_checkpoint_with_wrong_arguments_is_not_blamed(tmp_path):
    path = str(tmp_path / "model.pt")
    th.save({"w": th.zeros(2)}, path)
    with pytest.raises(RuntimeError) as error:
        dist_util.load_state_dict(path, map_location="no_such_device")
    assert not isinstance(error.value, UserError)


def test_a_found_port_is_free():
    port = dist_util._find_free_port()
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
    assert 0 < port < 65536


def test_importing_the_package_starts_no_mpi():
    code = (
        "import sys, guided_diffusion.image_datasets, guided_diffusion.logger; print('mpi4py' in sys.modules)"
    )
    job = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert job.stdout == "False\n"
