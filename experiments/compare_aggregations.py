"""What the schedules of the shift do to samples: one short training on scikit-learn's digits for each,
and the Frechet distance of its samples to the training digits. Seven minutes on one core.

Writes aggregations.md and aggregations.png into --out; docs/walkthrough.md shows what it measured.
"""

from guided_diffusion import flags
from guided_diffusion.errors import UserValueError, exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script."""
    own = flags.Parser(__doc__)
    own.add("--out", default="runs/aggregations", path="", help="where the runs and the table go")
    own.add("--iterations", default=600, low=1, help="steps of training, for each")
    own.add("--modalities", default="masked:U,label:U")
    return own


if __name__ == "__main__":
    flags.answer_early(parser)  # before the slow imports


import sys
import time

import numpy as np
import quickstart

from evaluations.frechet import fit, frechet_distance
from guided_diffusion.figures import Row, contact_sheet
from guided_diffusion.mt.aggregation import SCHEDULES
from guided_diffusion.mt.modalities import parse_modalities

SAMPLES = 500
SHOWN = 16
FLAGS = dict(  # over configs/quickstart.yaml
    num_res_blocks=1,
    num_classes=10,
    save_interval=100000,
    held_out=64,
    sample_steps=0,
    progress=False,
    precision="fp32",
)


@exit_on_user_error()
def main():
    args = parser().parse_args()
    parse_modalities(args.modalities, (1, 8, 8), 10)  # a mistake is told before the judge is trained
    out = quickstart.ROOT / args.out
    if out.exists() and any(out.iterdir()):
        raise UserValueError(f"{out} is not empty: name another --out, or remove it")
    arrays, labels = quickstart.digits(out / "data")
    network = quickstart.judge(arrays["train"], labels["train"], seed=0)[:-1]

    def features(images):
        return fit(network(quickstart.as_tensor(images)).detach())

    reference = features(arrays["train"])
    sheet = [Row("digits", arrays["train"][:SHOWN], mark="true")]
    rows = [("held-out digits", frechet_distance(features(arrays["heldout"]), reference), 0.0)]
    for name in ("single task", *SCHEDULES):
        started = time.time()
        joint = {} if name == "single task" else {"aggregation": name}
        images = train_and_sample(out, args, joint)
        sheet.append(Row(name, images[:SHOWN], mark="generated"))
        rows.append((name, frechet_distance(features(images), reference), time.time() - started))
    table = "| aggregation | Frechet distance | seconds |\n|---|---|---|\n"
    table += "".join(f"| {name} | {distance:.1f} | {seconds:.0f} |\n" for name, distance, seconds in rows)
    (out / "aggregations.md").write_text(table)
    contact_sheet(sheet, tile=48).save(out / "aggregations.png")
    print(f"\n{table}\nWritten to {out / 'aggregations.md'}")


def train_and_sample(out, args, joint: dict) -> np.ndarray:
    """Train a model with (or without) modalities; its images uint8 [N, H, W, C]."""
    folder = out / joint.get("aggregation", "single")
    flags = dict(
        config="configs/quickstart.yaml",
        data_dir=out / "data/train.npz",
        log_dir=folder,
        lr_anneal_steps=args.iterations,
        modalities=args.modalities if joint else "",
        **FLAGS,
        **joint,
    )
    command("mt_image_train", flags)
    made = folder / "samples"
    command(
        "mt_image_sample",
        dict(
            model_path=folder, num_samples=SAMPLES, batch_size=SAMPLES, sampler="ddpm", steps=50, log_dir=made
        ),
    )
    with np.load(next(made.glob("samples_*.npz"))) as arrays:
        return arrays["arr_0"]


def command(name, flags):
    """Run a script with these flags."""
    quickstart.run([sys.executable, f"scripts/{name}.py", *(f"--{k}={v}" for k, v in flags.items())])


if __name__ == "__main__":
    main()
