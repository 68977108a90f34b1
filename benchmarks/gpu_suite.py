"""What a GPU has to show, in one command: correctness, speed beside upstream's way of training, and a short real training.

    python benchmarks/gpu_suite.py --minutes 8 --out runs/gpu_suite --data CIFAR10
    python benchmarks/gpu_suite.py --minutes 1 --out runs/gpu_suite       # on a CPU: the same at toy size, on digits

--data: a folder with train/ and test/, a folder in them for every class. Writes OUT/gpu_suite.md (one table of each kind),
gpu_suite.json, and the samples and sheets of the training. Exit code 1 where a check failed.
"""

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch as th
import torch.distributed as dist
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from guided_diffusion.errors import UserFileError, UserValueError, exit_on_user_error
from guided_diffusion.flags import SAMPLERS, mt_defaults
from guided_diffusion.mt.modality_set import Batch
from guided_diffusion.mt.model import JointModel
from guided_diffusion.seeding import PerSample

ROOT = Path(__file__).resolve().parents[1]
# Largest difference to float32 on the CPU, relative to the largest number.
TOLERANCE = {th.float32: 1e-3, th.bfloat16: 5e-2, th.float16: 1e-2}
SAMPLER_STEPS = 10
PAIRS = 7  # of timings


@dataclass(frozen=True)
class Size:
    """Of everything that is run."""

    image: int
    channels: int
    batch: int
    warmup: int
    steps: int  # in one timing

    @property
    def flags(self) -> dict[str, object]:
        """Of the joint model."""
        return dict(
            image_size=self.image,
            num_channels=self.channels,
            num_res_blocks=2 if self.image > 8 else 1,
            num_head_channels=32,
            channel_mult="1,2,2" if self.image > 8 else "1,2",
            attention_resolutions="16,8" if self.image > 8 else "4",
            noise_schedule="cosine",
            modalities="masked:X,label:U",
            num_classes=10,
        )


SIZES = {"cuda": Size(32, 128, 64, 10, 10), "cpu": Size(8, 32, 4, 1, 1)}


@dataclass(frozen=True)
class Check:
    """What was looked at, whether it held (None: not run), and the number or the reason."""

    name: str
    holds: bool | None
    said: str


class Suite:
    """The checks and timings on `device`."""

    def __init__(self, device: str):
        self.device, self.size = th.device(device), SIZES[device]
        th.manual_seed(0)
        model = JointModel.from_flags({**mt_defaults(), **self.size.flags})
        for parameter in model.network.parameters():  # the layers that start at zero say something
            if not parameter.any():
                th.nn.init.normal_(parameter, std=0.02)
        self.cpu, self.model = model, self._on_device(model)

    def _on_device(self, model):
        copied = copy.deepcopy(model)
        copied.network.to(self.device)
        return copied

    def batch(self, device: th.device | str, count: int = 4) -> tuple[Batch, th.Tensor, th.Tensor]:
        """Random images with labels, timesteps and noise, the same on every device."""
        random = np.random.RandomState(0)
        shape = (count, *self.cpu.shape)
        images = th.from_numpy(random.uniform(-1, 1, shape).astype(np.float32))
        labels = th.nn.functional.one_hot(th.arange(count) % 10, 10).float()
        t = th.from_numpy(random.randint(0, 1000, count))
        noise = th.from_numpy(random.randn(*shape).astype(np.float32))
        keep = {"label": labels, "masked": images * (images > -0.5)}
        keep = {name: value.to(device) for name, value in keep.items() if name in self.cpu.modalities}
        return Batch(keep, images=images.to(device)), t.to(device), noise.to(device)

    def loss(self, model: JointModel, network=None) -> th.Tensor:
        """Equation 6 on that batch."""
        device = next(model.network.parameters()).device
        batch, t, noise = self.batch(device)
        random = PerSample.derived(0, range(len(t)))
        return model.losses(batch, t, network, noise=noise, random=random).terms["loss"].mean()

    # Correctness

    def checks(self) -> Iterator[Check]:
        """One after the other; an error is a check that failed."""
        cases: list[tuple[str, Callable[[], tuple[float, float] | bool | None]]] = []
        for dtype in TOLERANCE:
            name = str(dtype).removeprefix("torch.")
            cases.append((f"network in {name} as in float32 on the CPU", lambda d=dtype: self.network(d)))
        cases += [
            ("loss and gradients as on the CPU", self.gradients),
            ("compiled network as the eager one", self.compiled),
            ("one rank of DDP as the network alone", self.parallel),
            ("one rank of FSDP as the network alone", self.sharded),
            ("a training that was stopped and resumed ends with the same bits", self.resumed),
        ]
        cases += [
            (f"{SAMPLER_STEPS} steps of {sampler} as on the CPU", lambda s=sampler: self.sampler(s))
            for sampler in SAMPLERS
        ]
        for name, case in cases:
            try:
                said = case()
            except Exception as error:  # reported in the table
                yield Check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
                continue
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
            if isinstance(said, tuple):
                found, allowed = said
                yield Check(name, found <= allowed, f"differs by {found:.1e}, at most {allowed:g}")
            else:
                yield Check(name, said, {None: "not on this device", True: "same", False: "differs"}[said])

    def network(self, dtype):
        """(largest relative difference, allowed)."""
        if dtype is th.float16 and self.device.type == "cpu":
            return None
        batch, t, noise = self.batch("cpu")

        def run(model, device):
            inputs = (noise.to(device), t.to(device), {}, None)
            with th.no_grad():
                output, heads = model.modalities.apply(model.network.eval(), *inputs)
            return [output, *heads.values()]

        expected = run(self.cpu, "cpu")
        with th.autocast(self.device.type, dtype=dtype, enabled=dtype is not th.float32):
            found = run(self.model, self.device)
        return _difference(found, expected), TOLERANCE[dtype]

    def gradients(self):
        """(largest relative difference of the loss and of every gradient, allowed)."""
        return _difference(_gradients(self.model, self.loss), _gradients(self.cpu, self.loss)), 1e-3

    def compiled(self):
        """The same of torch.compile on this device."""
        network = th.compile(self.model.network)
        found = _gradients(self.model, lambda model: self.loss(model, network))
        return _difference(found, _gradients(self.model, self.loss)), 1e-3

    def parallel(self):
        """The same of DistributedDataParallel, over NCCL on a GPU."""
        self._group()
        network = DistributedDataParallel(self.model.network)
        found = _gradients(self.model, lambda model: self.loss(model, network))
        return _difference(found, _gradients(self.model, self.loss)), 1e-5

    def sharded(self):
        """The same of the loss under FSDP2; the backward pass has to run."""
        from torch.distributed.fsdp import fully_shard

        from guided_diffusion.unet import ResBlock

        self._group()
        expected = self.loss(self.model).detach()
        model = self._on_device(self.cpu)
        for block in model.network.modules():
            if isinstance(block, ResBlock):
                fully_shard(block)
        fully_shard(model.network)
        loss = self.loss(model)
        loss.backward()
        return _difference([loss.detach()], [expected]), 1e-5

    def _group(self):
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    def resumed(self):
        """Six steps against three and three more, by the command that users run."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            _write_random(folder / "data.npz", self.size.image)
            ends = []
            for run, parts in (("straight", (6,)), ("stopped", (3, 6))):
                for iterations in parts:
                    flags = dict(data_dir=folder / "data.npz", log_dir=folder / run, batch_size=2, seed=0)
                    flags |= dict(iterations=iterations, save_interval=3, progress=False, num_workers=0)
                    _script("mt_image_train", **self.size.flags, **flags)
                ends.append(th.load(folder / run / "checkpoint000006.pt", weights_only=True))
            return _same(*({key: end[key] for key in ("model", "ema", "optimizer")} for end in ends))

    def sampler(self, sampler):
        """(largest difference of a pixel in [-1, 1], allowed)."""
        found = []
        for model in (self.cpu, self.model):
            random = PerSample.derived(0, range(2))
            steps = str(SAMPLER_STEPS)
            found.append(model.sample(random, steps, sampler=sampler).images.cpu())
        return float((found[0] - found[1]).abs().max()), 1e-3

    # Speed

    def timings(self) -> dict[str, dict[str, float]]:
        """Seconds of a training step, medians of PAIRS timings that take turns: by name `median`, `spread` (quartiles'
        distance), `ratio` to upstream's way."""
        loops = {
            "upstream's way, float32": self._plain_step(),
            "this project, float32": self._step(th.float32),
            "this project, bf16": self._step(th.bfloat16),
            "this project, bf16, label and masked image": self._step(th.bfloat16, joint=True),
        }
        if self.device.type == "cuda":
            loops["this project, bf16, compiled"] = self._step(th.bfloat16, compiled=True)
        times: dict[str, list[float]] = {name: [] for name in loops}
        for step in loops.values():
            for _ in range(self.size.warmup):
                step()
        for _ in range(PAIRS):
            for name, step in loops.items():
                self._wait()
                started = time.perf_counter()
                for _ in range(self.size.steps):
                    step()
                self._wait()
                times[name].append((time.perf_counter() - started) / self.size.steps)
        first = statistics.median(next(iter(times.values())))
        found = {}
        for name, values in times.items():
            low, median, high = statistics.quantiles(values, n=4)
            found[name] = {"median": median, "spread": high - low, "ratio": median / first}
        return found

    def _wait(self):
        if self.device.type == "cuda":
            th.cuda.synchronize()

    def _single(self):
        flags = {**mt_defaults(), **self.size.flags, "modalities": ""}
        return self._on_device(JointModel.from_flags(flags))

    def _step(self, dtype, joint=False, compiled=False):
        """One as TrainLoop takes it: autocast, fused AdamW where there is one, average by foreach."""
        model = self._on_device(self.cpu) if joint else self._single()
        network = th.compile(model.network) if compiled else model.network
        fused = self.device.type == "cuda"
        parameters = list(model.network.parameters())
        optimizer = th.optim.AdamW(parameters, 1e-4, fused=fused, foreach=None if fused else True)
        average = [p.detach().clone() for p in parameters]
        batch, t, noise = self.batch(self.device, self.size.batch)
        batch = batch if joint else Batch({}, images=batch.images)
        random = PerSample.derived(0, range(len(t)))

        def step():
            optimizer.zero_grad()
            with th.autocast(self.device.type, dtype=dtype, enabled=dtype is not th.float32):
                terms = model.losses(batch, t, network, noise=noise, random=random).terms
            terms["loss"].mean().backward()
            optimizer.step()
            with th.no_grad():
                th._foreach_lerp_(average, parameters, 1e-4)

        return step

    def _plain_step(self):
        """One as guided-diffusion takes it: attention by explicit weights, norms of all weights and gradients read in
        every step, the optimizer and the average one tensor after the other."""
        model = self._single()
        parameters = list(model.network.parameters())
        optimizer = th.optim.AdamW(parameters, 1e-4, foreach=False)
        average = [p.detach().clone() for p in parameters]
        batch, t, noise = self.batch(self.device, self.size.batch)

        def step():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.zero_()
            with sdpa_kernel(SDPBackend.MATH):
                loss = model.diffusion.training_losses(model.network, batch.images, t, noise=noise)
                loss["loss"].mean().backward()
            sum(p.grad.norm(2).item() ** 2 for p in parameters if p.grad is not None)
            sum(p.detach().norm(2).item() ** 2 for p in parameters)
            optimizer.step()
            for mean, parameter in zip(average, parameters, strict=True):
                mean.mul_(0.9999).add_(parameter.detach(), alpha=1e-4)

        return step

    # A short training

    def train(self, data: Path | None, out: Path, seconds: float, step: float) -> dict[str, object]:
        """Train as long as that, sample, and judge the samples: its numbers. step: seconds that one is expected to take."""
        toy = data is None
        folder = _write_digits(out / "digits") if toy else data
        iterations = max(20, int(0.6 * seconds / step))
        flags = self.size.flags | dict(channel_mult="1,2" if toy else "1,2,2", log_interval=20, seed=0)
        flags |= dict(batch_size=self.size.batch, save_interval=iterations, iterations=iterations)
        started = time.perf_counter()
        flags |= dict(lr=1e-3 if toy else 2e-4, progress=False)
        _script("mt_image_train", data_dir=folder / "train", log_dir=out / "training", **flags)
        trained = time.perf_counter() - started
        count = 20 if toy else 2000
        sampling = dict(num_samples=count, batch_size=min(count, 250), steps=5 if toy else 20)
        _script("mt_image_sample", model_path=out / "training", log_dir=out / "samples", **sampling)
        judge, size = out / "judge.pt", ("--image_size", str(self.size.image))
        _run(
            "evaluations/judge.py", "train", folder / "train", judge, *size, *(["--epochs", 1] if toy else [])
        )
        samples = next((out / "samples").glob("samples_*.npz"))
        scores = out / "scores.json"
        _run("evaluations/judge.py", "score", judge, folder / "test", samples, *size, "--json", scores)
        rate = iterations * self.size.batch / trained
        return {"iterations": iterations, "images/s with start and saving": rate} | json.loads(
            scores.read_text()
        )


def _difference(found, expected):
    """The largest, relative to the largest expected number of each."""
    pairs = (
        (a.detach().float().cpu(), b.detach().float().cpu()) for a, b in zip(found, expected, strict=True)
    )
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in pairs)


def _gradients(model, loss):
    model.network.zero_grad()
    value = loss(model)
    value.backward()
    grads = th.cat([p.grad.flatten() for p in model.network.parameters() if p.grad is not None])
    return [value, grads]


def _same(a, b):
    if isinstance(a, th.Tensor):
        return bool(th.equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


def _script(name, **flags):
    _run(f"scripts/{name}.py", *(f"--{flag}={value}" for flag, value in flags.items()))


def _run(*words):
    """A command of this project; RuntimeError with its last line where it fails."""
    result = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{words[0]}: {(result.stderr.strip() or 'no message').splitlines()[-1]}")


def _write_random(path, size):
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (16, size, size, 3)).astype(np.uint8)
    np.savez(path, arr_0=images, arr_1=np.arange(16) % 10)


def _write_digits(folder):
    """scikit-learn's digits as train/CLASS/N.png and test/CLASS/N.png."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for n, (image, label) in enumerate(zip(digits.images[:600], digits.target[:600], strict=True)):
        path = folder / ("test" if n % 5 == 0 else "train") / str(label) / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image / 16 * 255).round().astype(np.uint8)).convert("RGB").save(path)
    return folder


def report(results: dict) -> str:
    """The results as Markdown."""
    lines = [f"# GPU suite, {results['date']}", "", f"`{results['command']}`", "", results["machine"], ""]
    lines += ["| check | holds | |", "|---|---|---|"]
    words = {True: "yes", False: "**no**", None: "not run"}
    lines += [f"| {c['name']} | {words[c['holds']]} | {c['said']} |" for c in results["checks"]]
    lines += ["", f"A training step, {PAIRS} timings of each that take turns; {results['sizes']}.", ""]
    lines += ["| loop | median, ms | quartiles' distance, ms | ratio |", "|---|---|---|---|"]
    for name, t in results["timings"].items():
        lines.append(f"| {name} | {1e3 * t['median']:.1f} | {1e3 * t['spread']:.1f} | {t['ratio']:.2f} |")
    lines += ["", "| the short training | |", "|---|---|"]
    lines += [f"| {name} | {value:.4g} |" for name, value in results["training"].items() if _number(value)]
    return "\n".join(lines) + "\n"


def _number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _machine(device):
    name = th.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return f"{name}, {platform.system()}, torch {th.__version__}, {th.get_num_threads()} threads"


@exit_on_user_error()
def main():
    """Run everything and write it down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all parts together, about")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--data", type=Path, help="folder with train/ and test/ (default: digits, toy size)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    args = parser.parse_args()
    if not 0 < args.minutes < 1e4:
        raise UserValueError(f"--minutes {args.minutes}: expected more than 0 and less than 10000")
    for part in ("train", "test") if args.data else ():
        if not (args.data / part).is_dir():
            raise UserFileError(f"--data {args.data}: there is no folder {args.data / part}")
    device = args.device or ("cuda" if th.cuda.is_available() else "cpu")
    if device == "cuda" and not th.cuda.is_available():
        raise UserValueError("--device cuda: torch sees no GPU")
    started = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    # Comparisons are of true float32.
    th.backends.cuda.matmul.allow_tf32 = th.backends.cudnn.allow_tf32 = False
    suite, checks = Suite(device), []
    for check in suite.checks():
        print(
            f"{'ok' if check.holds else 'not run' if check.holds is None else 'FAILED'}: {check.name}",
            flush=True,
        )
        checks.append(asdict(check))
    timings = suite.timings()
    left = 60 * args.minutes - (time.perf_counter() - started)
    step = timings["this project, bf16, label and masked image"]["median"]
    training = suite.train(args.data, args.out, max(left, 1), step)
    sizes = f"{suite.size.image} pixels, {suite.size.channels} channels, batch {suite.size.batch}"
    command = " ".join(["python benchmarks/gpu_suite.py", *sys.argv[1:]])
    results = {"date": str(date.today()), "machine": _machine(device), "command": command, "sizes": sizes}
    results |= {"checks": checks, "timings": timings, "training": training}
    (args.out / "gpu_suite.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "gpu_suite.md").write_text(report(results))
    print(f"\n{report(results)}\nWritten to {args.out}: gpu_suite.md, gpu_suite.json, samples/, training/")
    sys.exit(any(check["holds"] is False for check in checks))


if __name__ == "__main__":
    main()
