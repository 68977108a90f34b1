"""Where in the diffusion does the model know the class? Accuracy of p(label | noised image) by timestep.

    python experiments/label_accuracy.py --model_path runs/e --data_dir held_out/ --times 0,100,200,400 --out plot.png

Draws top-1 accuracy against t to plot.png; plot.csv has the numbers and plot.json their summary, with the
accuracy of the average of p(label | image) over --average. --classifier_path adds a classifier of
classifier_train.py, on the same noised images, for comparison. Nothing of the label is in the latent.
With the training's own --data_dir and --seed, and --num_samples up to its --held_out, these are images that
the training did not see.
"""

from guided_diffusion import flags
from guided_diffusion.errors import UserValueError, exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script."""
    own = flags.Parser(__doc__)
    own.add("--model_path", required=True, help="a run folder or a checkpoint, as of mt_image_sample.py")
    own.add("--weights", default="ema")
    own.add("--data_dir", required=True, help="labelled images: a folder or an .npz file")
    own.add("--label_from", default="auto", help="what gives the classes; auto: as in training")
    own.add(
        "--times", default="0,10,20,50,100,200,300,400,500,600,700,800,900", help="timesteps of the curve"
    )
    own.add(
        "--average",
        default="0,10,20",
        kind=flags.integers,
        low=0,
        group="sampling",
        help="the timesteps that are averaged",
    )
    own.add("--num_samples", default=1000, help="images, drawn at random")
    own.add("--batch_size", default=100)
    own.add("--seed", default=0)
    own.add("--classifier_path", default="", help="a classifier of noised images to compare with")
    own.add("--title", default="Accuracy of the label read from the noised image")
    own.add("--out", default="label_accuracy.png", path="image", help="the plot")
    return own.add_flags(flags.classifier_flags())


if __name__ == "__main__":
    flags.answer_early(parser)  # before the slow imports


import csv
import json
import os

import numpy as np
import torch as th

from guided_diffusion import cli, dist_util
from guided_diffusion.figures import Curve, Plot, save_plots
from guided_diffusion.image_datasets import classes_of, hold_out, open_dataset
from guided_diffusion.mt.guidance import load_classifier
from guided_diffusion.mt.model import JointModel
from guided_diffusion.seeding import PerSample


@exit_on_user_error()
def main():
    args = parser().parse_args()
    dist_util.setup_dist()
    model = JointModel.load(args.model_path, args.weights)
    model.network.to(dist_util.dev())
    label = model.modalities.first("label")
    label = label if label is not None and label.head != "none" else None
    if label is None:
        raise UserValueError(f"{args.model_path} predicts no label")
    size, channels, classes = model.flags["image_size"], model.flags["image_channels"], label.shape[0]
    dataset = open_dataset(
        args.data_dir,
        size,
        class_cond=True,
        random_flip=False,
        image_channels=channels,
        **classes_of(model.flags, args.label_from),
    )
    cli.check_classes(dataset.class_names, classes, fixed=True)
    _, (images, cond) = hold_out(dataset, min(args.num_samples, len(dataset)), args.seed)
    known = cond["y"] >= 0
    images, labels = images[known], cond["y"][known]
    if not len(images):
        raise UserValueError(f"{args.data_dir} has no labelled images")

    def of_model(part, times, random):
        read = model.predict(part, times=times, random=random)
        return read[label.name]

    readers = {"model": of_model}
    if args.classifier_path:
        classifier = load_classifier(args.classifier_path, vars(args), size, channels, classes)

        def of_classifier(part, times, random):
            total = 0.0
            for step in times:
                t = th.full((len(part),), step, device=part.device)
                noised = model.diffusion.q_sample(part, t, random.randn_like(part))
                total = total + classifier(noised, model.modalities.timesteps(t)).softmax(dim=1)
            return total

        readers["classifier"] = of_classifier
    by_time = {
        name: [accuracy(read, images, labels, (t,), args) for t in args.times]
        for name, read in readers.items()
    }
    averaged = {
        name: accuracy(read, images, labels, tuple(args.average), args) for name, read in readers.items()
    }
    write(args, by_time, averaged, len(images), label.shape[0])


@th.no_grad()
def accuracy(read, images: th.Tensor, labels: th.Tensor, times: tuple[int, ...], args) -> float:
    """The share of images [N, C, H, W] whose label [N] read(images, times, random) -> scores [b, classes]
    puts first; an image's noise is the same in every call."""
    right = 0
    for first in range(0, len(images), args.batch_size):
        part = images[first : first + args.batch_size].to(dist_util.dev())
        random = PerSample.derived(args.seed, range(first, first + len(part)), dist_util.dev())
        best = read(part, times, random).argmax(dim=1).cpu()
        right += int((best == labels[first : first + len(part)]).sum())
    return right / len(images)


def write(args, curves: dict[str, list[float]], averaged: dict[str, float], count: int, classes: int) -> None:
    """The plot, the table, and the summary."""
    names = {"model": "MT-Diffusion", "classifier": "classifier on noised images"}
    lines = [
        Curve(names[name], args.times, [100 * value for value in values]) for name, values in curves.items()
    ]
    chance = 100 / classes if classes else None
    save_plots([Plot(lines, "timestep t", "top-1 accuracy in %", args.title, chance)], args.out)
    stem = os.path.splitext(args.out)[0]
    with open(stem + ".csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["t", *curves])
        writer.writerows(zip(args.times, *curves.values(), strict=True))
    summary = {"accuracy": averaged["model"], "times": args.average, "images": count}
    if "classifier" in averaged:
        summary["classifier_accuracy"] = averaged["classifier"]
    summary["by_time"] = {
        name: dict(zip(map(str, args.times), values, strict=True)) for name, values in curves.items()
    }
    with open(stem + ".json", "w") as file:
        json.dump(summary, file, indent=1)
    for name, share in averaged.items():
        error = np.sqrt(share * (1 - share) / count)
        print(f"{names[name]}, averaged over t = {args.average}: {share:.2%} +- {error:.2%} right ({count})")


if __name__ == "__main__":
    main()
