"""Kill training again and again, and see that it ends with the same bits as a run that nobody disturbed.

    python benchmarks/kill_test.py --kills 30 --ranks 2               # scripts/mt_image_train.py
    python benchmarks/kill_test.py --kills 30 --ranks 2 --latent      # main.py

A tiny model is trained by the script that users run. Every second SIGKILL comes at a random moment, the others in the
middle of a checkpoint's write; then the same command goes on. After each kill every checkpoint in the folder must be
whole. At the end weights, averages, optimizer, random state and position are compared with the undisturbed run.
Prints one line; exit code 1 where anything differed.
"""

import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch as th
from omegaconf import OmegaConf
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

from guided_diffusion.errors import exit_on_user_error
from guided_diffusion.flags import Parser

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 40, 4  # of a run, and between two checkpoints
SLOW = 0.05  # seconds that a checkpoint's write stays half done
SPAN = 0.5  # seconds after a step in which a kill comes
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
}
# What must be the same in the last checkpoint.
PIXEL = ("step", "seed", "model", "ema", "optimizer", "rng", "schedule_sampler", "lg_loss_scale", "extra")
LATENT = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "DataModuleFromConfig")


def parser() -> Parser:
    """The flags of this program."""
    own = Parser(__doc__)
    own.add("--kills", default=30, low=1, high=100_000, group="results", help="how often to kill")
    own.add("--ranks", default=1, low=1, high=1024, group="machine", help="processes of a run")
    own.add("--latent", action="store_true", group="model", help="train a latent diffusion model by main.py")
    own.add("--seed", default=0, help="seed of the moments")
    return own


@exit_on_user_error()
def main() -> None:
    args = parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        test = KillTest(Path(folder), args.ranks, args.latent, args.seed)
        failed = test.run(args.kills)
    sys.exit(failed)


class KillTest:
    """Runs in `folder` of `ranks` processes, and what became of them."""

    def __init__(self, folder: Path, ranks: int, latent: bool, seed: int):
        self.folder, self.ranks, self.latent = folder, ranks, latent
        self.random = random.Random(seed)
        self.kills = self.in_write = self.torn = self.runs = self.different = 0
        write_data(folder)

    def run(self, kills: int) -> bool:
        """Kill so many times; print what was found. True where a file was torn or a run differed."""
        straight = self.folder / "straight"
        if not self._attempt(straight, kill=False):
            raise SystemExit("the undisturbed run failed")
        expected = self._result(straight)
        while self.kills < kills:
            run = self.folder / f"run{self.runs}"
            while not self._attempt(run, kill=self.kills < kills):
                self.torn += self._torn(run)
            self.runs += 1
            self.different += not same(self._result(run), expected)
            shutil.rmtree(run)
        print(
            f"{'latent' if self.latent else 'pixel'}, {self.ranks} ranks: {self.kills} kills, {self.in_write} of them in the "
            f"middle of a write; {self.torn} torn files; {self.runs - self.different} of {self.runs} runs ended with the bits "
            "of the undisturbed one"
        )
        return bool(self.torn or self.different)

    def _attempt(self, run: Path, kill: bool) -> bool:
        """Train until the end (True) or until a kill (False)."""
        launcher = ["mpiexec", "-n"] if not self.latent else ["torchrun", "--nproc_per_node"]
        start = [*launcher, str(self.ranks)] if self.ranks > 1 else []
        start += [sys.executable] if self.ranks == 1 or not self.latent else []
        command = [*start, __file__, "--worker", *self._training(run)]
        process = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        job = Job(process)
        in_write = kill and self.kills % 2
        moment = self.random.uniform(0, SLOW if in_write else SPAN)
        if kill and job.wait(lambda: job.steps and (not in_write or any(run.rglob("*.pt.tmp")))):
            time.sleep(moment)
            if job.kill():
                self.kills += 1
                self.in_write += any(run.rglob("*.pt.tmp"))
                return False
        code = job.end()
        if code:
            raise SystemExit(f"{' '.join(command)} failed:\n{job.errors[-3000:]}")
        return True

    def _training(self, run: Path) -> list[str]:
        """The script and its flags; the same ones go on with the run."""
        if not self.latent:
            return [
                str(ROOT / "scripts" / "mt_image_train.py"),
                *f"--data_dir {self.folder}/data.npz --log_dir {run} --modalities masked:X,label:U --image_size 8".split(),
                *"--image_channels 1 --num_channels 32 --num_res_blocks 1 --channel_mult 1 --num_heads 1".split(),
                *"--attention_resolutions 8 --diffusion_steps 40 --ema_rate 0.9,0.99 --batch_size 4".split(),
                *"--schedule_sampler loss-second-moment --held_out 0 --sample_steps 0 --num_workers 0".split(),
                *f"--iterations {STEPS} --save_interval {EVERY} --log_interval 1000 --progress False".split(),
            ]
        begun = sorted(run.glob("*/checkpoints/last.ckpt"))
        how = ["--resume", str(begun[0])] if begun else ["--base", self._config(run), "--logdir", str(run)]
        if not begun:
            shutil.rmtree(run, ignore_errors=True)  # it has no checkpoint yet: begin anew
        ranks = ["--devices", str(self.ranks), "--strategy", "ddp"] if self.ranks > 1 else []
        return [str(ROOT / "main.py"), "--train", "--seed", "3", *how, *ranks]

    def _config(self, run: Path) -> str:
        network = dict(image_size=8, in_channels=3, out_channels=3, model_channels=32, num_res_blocks=1)
        network |= dict(attention_resolutions=[1], channel_mult=[1], num_heads=1, dropout=0.1)
        model = {
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": network,
            },
            "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
            "cond_stage_config": "__is_unconditional__",
            **dict(image_size=8, channels=3, timesteps=40, first_stage_key="image"),
        }
        images = {
            "target": "ldm.data.folders.ImageFolder",
            "params": {"root": f"{self.folder}/images", "size": 8},
        }
        images["params"]["random_flip"] = True
        trainer = dict(max_steps=STEPS, accelerator="cpu", enable_progress_bar=False, log_every_n_steps=1000)
        config = {
            "model": {
                "base_learning_rate": 1e-3,
                "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
                "params": model,
            },
            "data": {
                "target": "main.DataModuleFromConfig",
                "params": {"batch_size": 2, "num_workers": 0, "train": images},
            },
            "lightning": {
                "trainer": trainer,
                "modelcheckpoint": {"params": {"every_n_train_steps": EVERY}},
                "callbacks": {"image_logger": {"params": {"disabled": True}}},
            },
        }
        path = self.folder / "config.yaml"
        OmegaConf.save(OmegaConf.create(config), path)
        return str(path)

    def _result(self, run: Path) -> dict:
        found = sorted(run.rglob("last.ckpt" if self.latent else "checkpoint*.pt"))
        content = th.load(found[-1], map_location="cpu", weights_only=True)
        return {part: content.get(part) for part in (LATENT if self.latent else PIXEL)}

    def _torn(self, run: Path) -> int:
        from guided_diffusion import checkpoint_util
        from guided_diffusion.errors import UserError

        torn = 0
        for path in (*run.rglob("*.pt"), *run.rglob("*.ckpt")):
            try:
                checkpoint_util.read(path)
            except UserError:
                torn += 1
        return torn


class Job:
    """A started training, whose processes tell their numbers and steps on standard output."""

    def __init__(self, process: subprocess.Popen):
        self.process, self.steps, self.pids, self.errors = process, 0, set(), ""
        self._readers = [
            threading.Thread(target=read, daemon=True) for read in (self._read, self._read_errors)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.steps += line == "step\n"
            if found := re.fullmatch(r"pid (\d+)\n", line):
                self.pids.add(int(found[1]))

    def _read_errors(self):
        for line in self.process.stderr:
            self.errors += line

    def wait(self, condition) -> bool:
        """Whether the condition came true before the job ended."""
        while self.process.poll() is None:
            if condition():
                return True
            time.sleep(0.001)
        return False

    def kill(self) -> bool:
        """SIGKILL to every process of the job; False where it had ended."""
        if self.process.poll() is not None:
            return False
        for pid in (*self.pids, self.process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.end()
        return True

    def end(self) -> int:
        code = self.process.wait()
        for reader in self._readers:
            reader.join()
        return code


def write_data(folder: Path) -> None:
    """24 random images, as an .npz with labels and as a folder of colour images."""
    drawn = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "data.npz", drawn[..., :1], np.arange(24) % 4)
    (folder / "images").mkdir()
    for number, image in enumerate(drawn):
        Image.fromarray(image).save(folder / "images" / f"{number:02}.png")


def same(a, b) -> bool:
    """Whether two checkpoints, or parts of them, are the same bit for bit."""
    if isinstance(a, th.Tensor):
        return isinstance(b, th.Tensor) and a.dtype == b.dtype and th.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def work(script: str, *arguments: str) -> None:
    """Run a training script whose checkpoints' writes stay half done for a moment, and which tells its steps."""
    from guided_diffusion import checkpoint_util

    whole = checkpoint_util.write

    def write(value, file):
        whole(value, file)
        file.flush()
        file.truncate(file.tell() // 2)
        time.sleep(SLOW)
        file.seek(0)
        whole(value, file)

    def tell(line):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    checkpoint_util.write = write
    register_optimizer_step_post_hook(lambda *_: tell("step"))
    tell(f"pid {os.getpid()}")
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    else:
        main()
