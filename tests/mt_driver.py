"""Runs of the scripts of several modalities that tests share: a tiny model of 8 x 8 digits."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch.distributed as dist

from guided_diffusion import logger
from tests.conftest import script_path

ROOT = Path(__file__).resolve().parents[1]
MODEL = (
    "--image_size 8 --image_channels 1 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 "
    "--attention_resolutions 4 --num_head_channels 32 --diffusion_steps 40 --noise_schedule cosine"
).split()
TRAIN = (
    "--lr 1e-3 --ema_rate 0.9 --batch_size 8 --held_out 8 --num_workers 0 --random_flip False "
    "--log_interval 5 --progress False --adm_files True --keep_checkpoints 99"
).split()
# One thread, so that sums are added up in one order; rank 0 writes what tests read.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OPENAI_LOG_FORMAT": "stdout,log,csv"}

# The script with its process's number told, and with slow checkpoints where asked: a process killed then
# leaves half a file.
_WATCHED = """
import os, runpy, sys, time
print(f"pid {os.getpid()}\\n", end="", flush=True)
script, slow = sys.argv[1], float(sys.argv[2])
sys.argv = [script, *sys.argv[3:]]
sys.path.insert(0, os.path.dirname(script))
from guided_diffusion import checkpoint_util
whole = checkpoint_util.write
def write(value, file):
    whole(value, file)
    if slow:
        file.flush()
        file.truncate(file.tell() // 2)
        time.sleep(slow)
        file.seek(0)
        whole(value, file)
checkpoint_util.write = write
runpy.run_path(script, run_name="__main__")
"""


def digits(path, count=96, labelled=True, colour=False, unlabelled=0):
    """An .npz of real digits; the labels of the first `unlabelled` are -1."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images[:count] / 16 * 255).round().astype(np.uint8)[..., None]
    if colour:
        images = np.concatenate([images, 255 - images, images // 2], axis=-1)
    labels = bunch.target[:count].astype(np.int64)
    labels[:unlabelled] = -1
    np.savez(path, arr_0=images, **({"labels": labels} if labelled else {}))
    return path


def in_process(name, *flags):
    """Run scripts/NAME.py in this process. SystemExit where the script ends so."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = [name, *map(str, flags)]
    script = script_path(name)
    sys.path.insert(0, str(script.parent))
    formats = os.environ.get("OPENAI_LOG_FORMAT")
    os.environ["OPENAI_LOG_FORMAT"] = ENVIRONMENT["OPENAI_LOG_FORMAT"]
    try:
        code = compile(script.read_text(), name, "exec")
        exec(code, {"__name__": "__main__", "__file__": str(script)})
    finally:
        sys.argv, sys.path[:] = argv, path
        os.environ.pop("OPENAI_LOG_FORMAT")
        if formats is not None:
            os.environ["OPENAI_LOG_FORMAT"] = formats
        # Leave neither a process group nor a logger behind.
        if dist.is_initialized():
            dist.destroy_process_group()
        logger.reset()
        # The default logger, which reset() makes, would write to this test's captured output ever after.
        logger.Logger.CURRENT = logger.Logger.DEFAULT = None


def refusal(capsys, name, *flags):
    """The one line with which the script refuses these flags."""
    try:
        in_process(name, *flags)
    except SystemExit as end:
        assert end.code == 2
    else:
        raise AssertionError("accepted")
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "".join(lines)
    assert lines[-1].startswith("error: ") or ": error: " in lines[-1], lines
    return lines[-1]


def train(data, folder, *flags):
    """mt_image_train in this process; without images of samples, which take time, unless `flags` ask for
    them."""
    in_process(
        "mt_image_train", *MODEL, *TRAIN, "--data_dir", data, "--log_dir", folder, "--sample_steps", 0, *flags
    )


def command(ranks, name, *flags, slow=0.0):
    """mpiexec -n RANKS python scripts/NAME.py FLAGS, or without mpiexec for one; tells the processes'
    numbers."""
    beside = Path(sys.executable).parent / "mpiexec"
    start = [str(beside if beside.exists() else "mpiexec"), "-n", str(ranks)] if ranks > 1 else []
    script = str(script_path(name))
    return [*start, sys.executable, "-c", _WATCHED, script, str(slow), *map(str, flags)]


def run(ranks, name, *flags):
    """A whole run in processes of its own; its output."""
    done = subprocess.run(
        command(ranks, name, *flags), env=ENVIRONMENT, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Started:
    """A run that a test watches, and ends; also when the test fails: use it in a with statement."""

    def __init__(self, output, ranks, name, *flags, slow=0.0):
        self.output, self.ranks = Path(output), ranks
        with open(output, "w") as file:
            self.process = subprocess.Popen(
                command(ranks, name, *flags, slow=slow),
                env=ENVIRONMENT,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.kill()
        self.process.wait(timeout=60)

    def wait_until(self, condition, timeout=120):
        """Wait for condition() to become true."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.output.read_text()
            assert self.process.poll() is None, f"the run ended early: {self.output.read_text()}"
            time.sleep(0.005)

    def pids(self):
        """The numbers of the ranks' processes, as far as they have started."""
        return [int(pid) for pid in re.findall(r"^pid (\d+)\n", self.output.read_text(), re.MULTILINE)]

    def signal(self, number, ranks=None):
        """Send a signal to some ranks (None: all)."""
        for pid in self.pids()[slice(ranks)]:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass  # it has ended by itself

    def kill(self):
        """SIGKILL to every rank."""
        self.wait_until(lambda: len(self.pids()) == self.ranks)
        self.signal(signal.SIGKILL)
        self.process.wait(timeout=60)


def same(a, b):
    """Whether two checkpoints (or parts of them) are the same, bit for bit."""
    import torch as th

    if isinstance(a, th.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
