"""Train a joint model of images, masked images and labels on scikit-learn's digits, use it in every
direction, and measure it.

A single-task model of equal training stands beside it. Everything goes through the commands that a user would
type; they are printed. Results: runs/quickstart/results.md (the table), results.json and sheet.png.
"""

from guided_diffusion import flags
from guided_diffusion.errors import UserError, exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script."""
    own = flags.Parser(__doc__)
    own.add("--out", default="runs/quickstart", path="")
    own.add(
        "--ranks", default=2, low=1, high=1024, group="machine", help="processes for training and sampling"
    )
    own.add(
        "--fresh",
        action="store_true",
        group="results",
        help="delete what an earlier quickstart left; otherwise continue",
    )
    return own


if __name__ == "__main__":
    flags.answer_early(parser)  # before the slow imports


import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch as th
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits

from evaluations.frechet import fit, frechet_distance
from guided_diffusion.figures import Row, contact_sheet
from guided_diffusion.mt.modalities import RandomPatches
from guided_diffusion.seeding import PerSample

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = 360  # of 1,797 digits
SAMPLES = 500  # for the Frechet distance
JUDGES = 3  # whose numbers are averaged
PER_CLASS = 20  # generated for each given label
STRENGTH = 2  # of conditioning on the label; 1 is Bayes' rule, more is surer
SHOWN = 20  # columns of the sheet


@exit_on_user_error()
def main():
    args = parser().parse_args()
    out = ROOT / args.out
    if args.fresh and out.exists():
        shutil.rmtree(out)
    started = time.time()
    images, labels = digits(out / "data")

    def script(name, **flags):
        words = ["mpiexec", "-n", str(args.ranks), sys.executable, f"scripts/{name}.py"]
        given = (f"--{flag}" if value is None else f"--{flag}={value}" for flag, value in flags.items())
        run([*words, *given])

    timing = {}
    for name, changes in (("joint", {}), ("single", {"modalities": ""})):
        before = time.time()
        script(
            "mt_image_train",
            config="configs/quickstart.yaml",
            data_dir=out / "data/train.npz",
            log_dir=out / name,
            **changes,
        )
        timing[name] = time.time() - before

    def sample(model, name, **flags):
        folder = out / "samples" / f"{model}_{name}"
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier quickstart
        script(
            "mt_image_sample", model_path=out / model, log_dir=folder, batch_size=256, sampler="ddpm", **flags
        )
        with np.load(next(folder.glob("samples_*.npz"))) as arrays:
            return dict(arrays)

    holes, digits_of = out / "data/masked.npz", ",".join(map(str, range(10)))
    made = {
        "joint": sample("joint", "all", num_samples=SAMPLES, steps=100),
        "single": sample("single", "all", num_samples=SAMPLES, steps=100),
        "given_label": sample(
            "joint",
            "label",
            given=f"label={digits_of}",
            num_samples=10 * PER_CLASS,
            steps=100,
            strength=STRENGTH,
        ),
        "labelled": sample("joint", "read", given=f"image={out / 'data/heldout.npz'}", want="label"),
        "restored": sample("joint", "restore", given=f"masked={holes}", steps=50, replace_known=None),
        "single_restored": sample("single", "restore", given=f"image={holes}", steps=50),
    }
    judged = [
        measure(judge(images["train"], labels["train"], seed), images, labels, made, out / "data")
        for seed in range(JUDGES)
    ]
    results = {name: sum(each[name] for each in judged) / JUDGES for name in judged[0]}
    results["frechet_by_judge"] = [
        [each[f"frechet_{model}"] for model in ("joint", "single")] for each in judged
    ]
    results["seconds"] = {
        **{f"train {k}": round(v) for k, v in timing.items()},
        "all": round(time.time() - started),
    }
    results["machine"] = f"{platform.machine()}, {args.ranks} ranks, torch {th.__version__}"
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "results.md").write_text(table(results))
    draw(images, labels, made, out)
    print(
        f"\n{table(results)}\nWritten to {out}: results.md, results.json, sheet.png, samples/, joint/, single/"
    )
    print(f"\nYour own images (any size; labels from class folders or file names):\n\n{own_command()}\n")


def run(words):
    """Run a command, shown as one would type it; UserError if it fails."""
    words = [str(word) for word in words]
    print("\n$ " + shlex.join(["python" if word == sys.executable else word for word in words]), flush=True)
    if subprocess.run(words, cwd=ROOT).returncode:
        raise UserError("that command failed; mend what it says and run quickstart.sh again: it continues")


def digits(folder: Path):
    """Write train.npz, heldout.npz and masked.npz; returns (uint8 [N, 8, 8, 1], int64 [N]) of (training, held
    out)."""
    data = load_digits()
    images = (data.images[..., None] / 16 * 255).round().astype(np.uint8)
    order = np.random.RandomState(0).permutation(len(images))
    parts = {"heldout": order[:HELD_OUT], "train": order[HELD_OUT:]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, index in parts.items():
        np.savez(folder / f"{name}.npz", arr_0=images[index], labels=data.target[index])
    held = images[parts["heldout"]]
    mask = RandomPatches(size=2).keep(8, 8, PerSample.derived(0, range(len(held))))[:, 0].numpy()
    np.savez(folder / "masked.npz", arr_0=np.where(mask[..., None], held, 0).astype(np.uint8), mask=mask)
    return (
        {name: images[index] for name, index in parts.items()},
        {name: th.from_numpy(data.target[index]) for name, index in parts.items()},
    )


def as_tensor(images):
    """uint8 [N, H, W, C] -> float32 [N, C, H, W] in [-1, 1]."""
    return th.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def judge(arrays, labels, seed: int) -> nn.Module:
    """A small classifier of digits, trained on the training part alone: an independent judge of what is
    generated. Distances in the features of one differ from those of another by about 3."""
    th.manual_seed(seed)
    network = nn.Sequential(
        *(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU()),
        nn.Linear(64, 10),
    )
    optimizer = th.optim.Adam(network.parameters(), 1e-3)
    images = as_tensor(arrays)
    for _ in range(25):
        for index in th.randperm(len(images)).split(64):
            noisy = images[index] + 0.1 * th.randn_like(images[index])
            optimizer.zero_grad()
            F.cross_entropy(network(noisy), labels[index]).backward()
            optimizer.step()
    return network.eval()


@th.no_grad()
def measure(network, stack, labels, made, data) -> dict:
    """The numbers of the table, where `network` judges what is generated."""

    def says(images):
        return network(as_tensor(images)).argmax(dim=1)

    def features(images):
        return fit(network[:-1](as_tensor(images)))

    def distance(images):
        return frechet_distance(features(images), reference)

    def right(guess, truth):
        return float((guess == truth).double().mean())

    reference = features(stack["train"])
    with np.load(data / "masked.npz") as arrays:
        hole = ~arrays["mask"][..., None]

    def hole_error(images):
        difference = (images.astype(np.float64) - stack["heldout"]) / 127.5
        return float((difference**2 * hole).sum() / hole.sum())

    restored = made["restored"]["arr_0"]
    outside = np.abs(restored.astype(int) - stack["heldout"]) * ~hole
    if outside.max() > 1:
        raise UserError(
            f"restoration changed known pixels by up to {outside.max()} of 255: this must not happen"
        )
    joint_labels = th.from_numpy(made["joint"]["label"]).argmax(dim=1)
    wanted = th.arange(10 * PER_CLASS) % 10
    return {
        "frechet_joint": distance(made["joint"]["arr_0"]),
        "frechet_single": distance(made["single"]["arr_0"]),
        "frechet_heldout": distance(stack["heldout"]),
        "joint_pairs_agree": right(says(made["joint"]["arr_0"]), joint_labels),
        "given_label_right": right(says(made["given_label"]["arr_0"]), wanted),
        "heldout_label_right": right(
            th.from_numpy(made["labelled"]["label"]).argmax(dim=1), labels["heldout"]
        ),
        "judge_right": right(says(stack["heldout"]), labels["heldout"]),
        "hole_error_joint": hole_error(restored),
        "hole_error_single": hole_error(made["single_restored"]["arr_0"]),
        "known_pixels_changed": int(outside.max()),
    }


def table(r: dict) -> str:
    """The results as Markdown."""
    rows = [
        (
            "Frechet distance to the training digits (held-out digits: {frechet_heldout:.1f})",
            "{frechet_joint:.1f}",
            "{frechet_single:.1f}",
        ),
        ("generated image and label agree", "{joint_pairs_agree:.1%}", "-"),
        (
            f"digit generated for a given label (strength {STRENGTH}) is that digit",
            "{given_label_right:.1%}",
            "-",
        ),
        (
            "label of a held-out digit is right (the judges: {judge_right:.1%})",
            "{heldout_label_right:.1%}",
            "-",
        ),
        (
            "squared error inside the holes of masked held-out digits",
            "{hole_error_joint:.3f}",
            "{hole_error_single:.3f}",
        ),
        ("largest change of a known pixel, of 255", "{known_pixels_changed:.0f}", "-"),
    ]
    lines = [
        "| on 8x8 digits, judged by three independent classifiers, mean | joint | single task |",
        "|---|---|---|",
    ]
    lines += [f"| {' | '.join(cell.format(**r) for cell in row)} |" for row in rows]
    seconds = ", ".join(f"{name} {value} s" for name, value in r["seconds"].items())
    return "\n".join(lines) + f"\n\n{r['machine']}; {seconds}.\n"


def draw(images, labels, made, out):
    """sheet.png: every direction, as a person would judge it."""
    with np.load(out / "data/masked.npz") as arrays:
        mask = arrays["mask"][:SHOWN, ..., None]
    held, labels = images["heldout"][:SHOWN], labels["heldout"]

    def names(probabilities):
        return [str(k) for k in probabilities[:SHOWN].argmax(axis=1)]

    holes = np.where(mask, held, 128).astype(np.uint8)
    rows = [
        Row(
            "joint samples: image, with the label it came with",
            made["joint"]["arr_0"][:SHOWN],
            names(made["joint"]["label"]),
            "generated",
        ),
        Row("... and the masked image it came with", made["joint"]["masked"][:SHOWN], mark="generated"),
        Row("single task", made["single"]["arr_0"][:SHOWN], mark="generated"),
        Row(
            "for the label below",
            made["given_label"]["arr_0"][:SHOWN],
            [str(k % 10) for k in range(SHOWN)],
            "generated",
        ),
        Row("held-out digits; the label is the model's", held, names(made["labelled"]["label"]), "given"),
        Row("the same; the label is the true one", held, [str(int(k)) for k in labels[:SHOWN]], "true"),
        Row("the same with holes (grey)", holes, mark="given"),
        Row("restored by the joint model", made["restored"]["arr_0"][:SHOWN], mark="generated"),
        Row("restored by the single-task model", made["single_restored"]["arr_0"][:SHOWN], mark="generated"),
    ]
    contact_sheet(rows, tile=48).save(out / "sheet.png")


def own_command() -> str:
    """How to train on a folder of images."""
    return (
        "mpiexec -n 2 .venv/bin/python scripts/mt_image_train.py --data_dir IMAGES --image_size 64 --num_channels 64 "
        "--noise_schedule cosine \\\n    --modalities masked:X,label:U --batch_size 16 --iterations 20000 "
        "--save_interval 1000 --log_dir runs/mine"
    )


if __name__ == "__main__":
    main()
