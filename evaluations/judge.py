"""Scores by a classifier that is trained on the data themselves, for images that Inception does not suit: small ones,
or where its weights cannot be had. They compare models on one data set, and are not the literature's FID.

    python evaluations/judge.py train cifar10/train judge.pt --image_size 16
    python evaluations/judge.py score judge.pt cifar10/test samples.npz --image_size 16 --labels label --json scores.json

Images are folders, or .npz files with uint8 [N, H, W, 1 or 3] under arr_0. `train` needs their classes, leaves every tenth
image out and prints the accuracy there. `score` prints Frechet distance, precision and recall of the judge's 256
features, the Inception Score formula, and with --labels how often a generated label is the one that the judge sees.
"""

from pathlib import Path

from evaluations.arguments import add_json_option, add_label_option, add_size_option, write_json
from guided_diffusion.errors import UserValueError, exit_on_user_error
from guided_diffusion.flags import Parser, answer_early


def parser() -> Parser:
    """The flags of this program."""
    own = Parser(__doc__)
    commands = own.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a judge on labelled images")
    train.add("data", path="source", help="folder of images, or .npz with arr_0 and labels (or arr_1)")
    train.add("judge", kind=Path, path="file", help="the file to write")
    add_label_option(train)
    train.add("--epochs", default=6, low=1, high=100_000, group="optimisation", help="passes over the images")
    judge = commands.add_parser("score", help="judge samples")
    judge.add("judge", path="source", help="the file of `train`")
    judge.add("reference", path="source", help="folder of images, or .npz with arr_0")
    judge.add("samples", path="source", help=".npz with arr_0")
    judge.add(
        "--num_images",
        kind=int,
        low=1,
        group="data",
        unset="all",
        help="images of the reference to use, drawn by --seed",
    )
    judge.add("--labels", metavar="KEY", group="data", help="the array of the samples' generated labels")
    add_json_option(judge)
    for command in (train, judge):
        command.add("--device")
        add_size_option(command)
        command.add("--seed", default=0)
    return own


if __name__ == "__main__":
    answer_early(parser)  # before the slow imports


from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluations.distributed import choose_device
from evaluations.frechet import frechet_bias, frechet_distance
from evaluations.images import load_array
from evaluations.joint_metrics import label_agreement
from evaluations.make_reference import pick, select
from evaluations.precision_recall import precision_recall
from evaluations.scores import inception_score
from evaluations.weights import existing_file, sha256_of
from guided_diffusion import dist_util, image_files
from guided_diffusion.checkpoint_util import load_weights, save_atomic
from guided_diffusion.progress import tqdm

FEATURES = 256
BATCH_SIZE = 128
HELD_OUT = 10  # every tenth image
FORMAT = "mt-diffusion-judge-1"


class Judge(nn.Module):
    """A small convolutional classifier for uint8 RGB images of any size from 8 pixels on."""

    def __init__(self, classes: int, class_names: list[str] | None = None):
        super().__init__()
        self.class_names = class_names

        def block(width_in: int, width: int) -> nn.Sequential:
            convolution = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())

        pool = nn.MaxPool2d(2, ceil_mode=True)
        self.body = nn.Sequential(
            block(3, 32), block(32, 64), pool, block(64, 128), pool, block(128, FEATURES)
        )
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 3, H, W] -> (features [B, 256], logits [B, classes])."""
        features = self.body(images.float() / 127.5 - 1).mean(dim=(2, 3))
        return features, self.head(features)


@dataclass(frozen=True)
class Judgement:
    """The scores, and what they depend on. None: no labels were given."""

    frechet: float
    frechet_bias: float  # of it, because the sets are finite
    score: float
    precision: float
    recall: float
    label_agreement: float | None
    judge_accuracy: float  # on images that it was not trained on
    n_reference: int
    n_samples: int
    judge: str
    judge_sha256: str


def train_judge(
    images: np.ndarray,
    labels: np.ndarray,
    epochs: int = 6,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = False,
    class_names: list[str] | None = None,
) -> tuple[Judge, float]:
    """A judge of images uint8 [N, H, W, 3] with labels int [N], and its accuracy on every tenth, which it never saw.

    UserError for fewer than two classes or labels that are not 0..K-1.
    """
    classes = max(len(class_names or ()), int(labels.max(initial=-1)) + 1)
    if classes < 2 or labels.min() < 0 or labels.min() == labels.max():
        raise UserValueError(
            f"a judge needs labels from 0 on of at least two classes, got {np.unique(labels)[:5]}"
        )
    torch.manual_seed(seed)
    judge = Judge(classes, class_names).to(device)
    x, y = _tensor(images), torch.from_numpy(labels.astype(np.int64))
    held_out = torch.arange(len(x)) % HELD_OUT == 0
    rows = (~held_out).nonzero()[:, 0]
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=1e-2)
    steps = epochs * -(-len(rows) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    with tqdm(total=steps, unit="step", disable=not progress) as bar:
        for _ in range(epochs):
            for part in rows[torch.randperm(len(rows))].split(BATCH_SIZE):
                _, logits = judge(_augment(x[part]).to(device))
                loss = F.cross_entropy(logits, y[part].to(device), label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    _, probabilities = inspect(judge.eval(), images[held_out.numpy()], device)
    return judge, float((probabilities.argmax(1) == y[held_out]).double().mean())


def _tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _augment(x: Tensor) -> Tensor:
    """Each image moved by up to an eighth, its edge repeated, and half of them mirrored."""
    height, width = x.shape[2:]
    by = max(1, width // 8)
    padded = F.pad(x.float(), (by,) * 4, mode="replicate").to(x.dtype)
    top, left = (torch.randint(2 * by + 1, (len(x), 1)) for _ in range(2))
    columns = torch.arange(width).expand(len(x), -1)
    columns = torch.where(torch.rand(len(x), 1) < 0.5, columns, columns.flip(1)) + left
    rows = torch.arange(height).expand(len(x), -1) + top
    return padded[torch.arange(len(x))[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


@torch.no_grad()
def inspect(judge: Judge, images: np.ndarray, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """(features [N, 256], class probabilities [N, classes]) of images uint8 [N, H, W, 3], on the CPU."""
    outputs = [judge(part.to(device)) for part in _tensor(images).split(BATCH_SIZE)]
    return torch.cat([f.cpu() for f, _ in outputs]), torch.cat(
        [logits.softmax(1).cpu() for _, logits in outputs]
    )


def save_judge(judge: Judge, accuracy: float, path: str | Path) -> None:
    """Write a judge with its accuracy on held-out images."""
    classes = judge.head.out_features
    content = {"format": FORMAT, "classes": classes, "class_names": judge.class_names}
    save_atomic({**content, "accuracy": accuracy, "model": judge.state_dict()}, path)


def load_judge(path: str | Path) -> tuple[Judge, float]:
    """A judge that `save_judge` wrote, in evaluation mode, and its accuracy. UserError for other files."""
    path = existing_file(path, "judge")
    content = dist_util.load_state_dict(path)
    if not (isinstance(content, dict) and content.get("format") == FORMAT):
        raise UserValueError(f"{path} is not a judge: make one with `judge.py train`")
    kinds = {"classes": int, "class_names": list | None, "accuracy": float, "model": dict}
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind):
            raise UserValueError(
                f"{path} is not a sound judge: its {name} is a {type(content.get(name)).__name__}"
            )
    if not 2 <= content["classes"] <= image_files.MOST_CLASSES:
        raise UserValueError(f"{path} is not a sound judge: it has {content['classes']} classes")
    judge = Judge(content["classes"], content["class_names"])
    load_weights(judge, content["model"], path)
    return judge.eval(), content["accuracy"]


def score(
    path: str | Path,
    reference: np.ndarray,
    samples: np.ndarray,
    labels: np.ndarray | None,
    device: str = "cpu",
    class_names: list[str] | None = None,
) -> Judgement:
    """Judge samples uint8 [M, H, W, 3] against reference images [N, H, W, 3] with the judge in `path`.

    class_names: of the labels [M]; None where their numbers are the judge's.
    """
    judge, accuracy = load_judge(path)
    if labels is not None and judge.class_names:
        labels = image_files.renumber(labels, class_names, judge.class_names, "the samples' file")
    if reference.shape[1:] != samples.shape[1:]:
        raise UserValueError(f"reference images are {reference.shape[1:3]}, samples {samples.shape[1:3]}")
    expected, _ = inspect(judge.to(device), reference, device)
    features, probabilities = inspect(judge, samples, device)
    frechet = frechet_distance(expected, features)
    manifold = precision_recall(expected, features)
    agreement = None if labels is None else label_agreement(labels, probabilities.argmax(1).numpy())
    return Judgement(
        frechet,
        frechet_bias(expected, features, frechet),
        inception_score(probabilities),
        manifold.precision,
        manifold.recall,
        agreement,
        accuracy,
        len(reference),
        len(samples),
        str(path),
        sha256_of(path),
    )


def _images(
    source: str, size: int | None, number: int | None = None, seed: int = 0, label_from: str = "auto"
):
    """(images uint8 [N, H, W, 3], classes [N] or None, their names or None) of a folder or .npz, or `number` of them
    drawn by `seed`."""
    selection = select(source, size, label_from=label_from, grey=True)
    chosen = np.arange(selection.images.shape[0])
    if number and number < len(chosen):
        chosen = np.sort(np.random.default_rng(seed).choice(len(chosen), number, replace=False))
    labels = None if selection.labels is None else selection.labels[chosen]
    return pick(selection.images, chosen), labels, selection.class_names


def _labels(path: str, key: str) -> np.ndarray:
    """Integers [N]; of probabilities the likeliest, -1 where all are 0."""
    array = load_array(path, key)
    if array.ndim == 0:
        raise UserValueError(f"{key} of {path} must be labels [N], it is a single number")
    if array.ndim == 2 and np.issubdtype(array.dtype, np.floating):
        return np.where(array.sum(1) > 0, array.argmax(1), -1)
    return image_files.check_labels(array, len(array), f"{key} of {path}")


def main() -> None:
    with exit_on_user_error():
        args = parser().parse_args()
        device = str(choose_device(args.device))
        if args.command == "train":
            images, labels, names = _images(args.data, args.image_size, label_from=args.label_from)
            if labels is None:
                raise UserValueError(
                    f"{args.data} has no labels: labels in an .npz, file names CLASS_..., or folders"
                )
            judge, accuracy = train_judge(images, labels, args.epochs, args.seed, device, True, names)
            save_judge(judge.cpu(), accuracy, args.judge)
            print(f"accuracy on held-out images: {accuracy:.4f}")
            return
        labels = _labels(args.samples, args.labels) if args.labels else None
        reference, _, _ = _images(args.reference, args.image_size, args.num_images, args.seed)
        samples, _, names = _images(args.samples, None)
        result = score(args.judge, reference, samples, labels, device, names)
        for name in (
            "frechet",
            "frechet_bias",
            "score",
            "precision",
            "recall",
            "label_agreement",
            "judge_accuracy",
        ):
            if getattr(result, name) is not None:
                print(f"{name.replace('_', ' ')}: {getattr(result, name):.4f}")
        write_json(args.json, result)


if __name__ == "__main__":
    main()
