"""Train a small CLIP, an encoder of images and one of captions, on a folder of captioned images.

    python experiments/train_clip.py --data_dir flickr900 --out clip64

For work on real images and captions where the released weights cannot be had, or are too large. The folder is one of
ldm.data.captions.CaptionFolder; every tenth image (--held_out_every) is left out. On these a running mean of the
weights is measured while it is trained, and the best is kept: what metrics.json says is therefore somewhat hopeful.
OUT can be read by transformers, and by ldm's FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder and
FrozenOpenCLIPImageEmbedder (version: OUT, max_length: --max_length). The same seed gives the same weights.
"""

from pathlib import Path

from guided_diffusion import flags
from guided_diffusion.errors import UserError, UserValueError, exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script."""
    own = flags.Parser(__doc__)
    share = dict(low=0, high=0.9, group="optimisation")
    own.add("--data_dir", required=True, help="images and their captions (see ldm/data/captions.py)")
    own.add("--out", required=True, kind=Path, help="the folder to write")
    own.add(
        "--size",
        default=64,
        low=1,
        high=4096,
        group="model",
        help="pixels of the images that the encoder sees",
    )
    own.add(
        "--width",
        default=128,
        low=1,
        high=16384,
        group="model",
        help="channels of both encoders, and of their embeddings",
    )
    own.add("--layers", default=3, low=1, high=1000, group="model", help="layers of each encoder")
    own.add(
        "--patch",
        default=16,
        low=1,
        high=4096,
        group="model",
        help="pixels along an edge of the squares into which images are cut",
    )
    own.add("--max_length", default=32, low=1, high=100_000, group="model", help="tokens of a caption")
    own.add("--iterations", default=400, low=1)
    own.add("--batch_size", default=128)
    own.add("--lr", default=1e-3, high=1)
    own.add("--weight_decay", default=0.1, high=10)
    own.add("--dropout", default=0.1, help="share of attention that is dropped", below=False, **share)
    own.add("--word_dropout", default=0.1, help="share of a caption's tokens that is dropped", **share)
    own.add("--label_smoothing", default=0.1, help="label smoothing of the targets", **share)
    own.add("--seed", default=0)
    own.add(
        "--held_out_every", default=10, low=2, group="data", help="one image in so many is not trained on"
    )
    own.add("--device")
    own.add("--progress", action="store_true", help="show a bar, and every measurement")
    return own


if __name__ == "__main__":
    flags.answer_early(parser)  # before the slow imports


import dataclasses
import json
import math
import random
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTokenizer

from guided_diffusion.image_files import stored_pixels
from guided_diffusion.progress import tqdm
from ldm.data.captions import CaptionFolder
from ldm.modules.encoders.small_clip import (
    Retrieval,
    chance,
    embed,
    make_clip,
    retrieval,
    save_clip,
    train_tokenizer,
)

MARGIN = 1.25  # images are kept this much larger than they are trained on
SMALLEST = 0.6  # part of a kept image's side that is cut out
EVALUATIONS = 20  # in a training
AVERAGED = 0.99  # decay of the mean of the weights
SHARPEST = math.log(100)  # of the scale of likenesses, as in CLIP


@exit_on_user_error()
def main():
    args = parser().parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if (args.out / "metrics.json").exists():
        raise UserError(f"{args.out} has a CLIP already: delete it, or name another folder")
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    where = dict(root=args.data_dir, held_out_every=args.held_out_every)
    train = CaptionFolder(size=round(MARGIN * args.size), part="train", **where)
    held_out = CaptionFolder(size=args.size, part="held_out", **where)
    if args.max_length < 3:
        raise UserValueError(
            "--max_length must be at least 3: a token, and where the caption begins and ends"
        )
    if len(train) < args.batch_size:
        raise UserValueError(f"{args.data_dir} has {len(train)} images to train on, fewer than --batch_size")
    tokenizer = train_tokenizer((text for some in train.captions for text in some), args.max_length)
    shape = (args.size, args.width, args.layers, args.patch, args.max_length, args.dropout)
    model = make_clip(tokenizer, *shape).to(args.device)
    best, iteration = fit(model, tokenizer, train, Judge(held_out, tokenizer, args.max_length), args)
    args.out.mkdir(parents=True, exist_ok=True)
    save_clip(model, tokenizer, args.out)
    report(best, iteration, train, held_out, args)


def fit(model, tokenizer, train, judge, args) -> tuple[dict[str, Retrieval], int]:
    """Train, and leave in `model` the mean of the weights that was best. (Its retrieval, its iteration.)"""
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGED))
    optimizer = torch.optim.AdamW(
        model.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.iterations, pct_start=0.1)
    every = max(1, args.iterations // EVALUATIONS)
    stream = batches(train, tokenizer, args)
    best = weights = None
    for iteration in tqdm(range(1, args.iterations + 1), disable=not args.progress, dynamic_ncols=True):
        loss = contrast(model.train(), *next(stream), args.label_smoothing)
        if not loss.isfinite():
            raise UserError(f"the training diverged at iteration {iteration}: lower --lr")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=SHARPEST)
        mean.update_parameters(model)
        if iteration % every and iteration < args.iterations:
            continue
        found = judge(mean.module.eval())
        if args.progress:
            told = "; ".join(f"{way}: {result}" for way, result in found.items())
            tqdm.write(f"{iteration}: loss {loss.item():.3f}; {told}")
        if best is None or score(found) > score(best[0]):
            best = found, iteration
            weights = {name: value.clone() for name, value in mean.module.state_dict().items()}
    model.load_state_dict(weights)
    return best


def score(found: dict[str, Retrieval]) -> float:
    """One number of several recalls, to choose by."""
    return sum(result.recall_1 + result.recall_5 for result in found.values())


def contrast(model: nn.Module, tokens: Tensor, pixels: Tensor, smoothing: float) -> Tensor:
    """CLIP's loss of captions int64 [B, L] and their images in [0, 1], float [B, 3, H, W]."""
    logits = model.logit_scale.exp() * embed(model, tokens=tokens) @ embed(model, pixels=pixels).T
    own = torch.arange(len(logits), device=logits.device)
    return sum(F.cross_entropy(each, own, label_smoothing=smoothing) for each in (logits, logits.T)) / 2


def batches(data: CaptionFolder, tokenizer: CLIPTokenizer, args) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (tokens [B, L], pixels [B, 3, H, W]) of images in random order, changed at random."""
    images = pixels_of(data)
    while True:
        order = torch.randperm(len(data)).tolist()
        for first in range(0, len(order) - args.batch_size + 1, args.batch_size):
            rows = order[first : first + args.batch_size]
            captions = [data.draw_caption(row) for row in rows]
            tokens = tokens_of(tokenizer, captions, args.max_length, args.word_dropout)
            yield tokens.to(args.device), augmented(images[rows].to(args.device), args.size)


def pixels_of(data: CaptionFolder) -> Tensor:
    """All images, uint8 [N, 3, H, W]."""
    arrays = [stored_pixels(data[i][data.keys[0]]) for i in range(len(data))]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def augmented(images: Tensor, size: int) -> Tensor:
    """A random part of every image uint8 [B, 3, S, S], half of them flipped, in other light: [B, 3, size, size] in
    [0, 1]."""
    count = len(images)
    zoom = torch.empty(count).uniform_(SMALLEST, 1)
    flip = torch.randint(0, 2, (count,)) * 2 - 1
    place = (torch.rand(2, count) * 2 - 1) * (1 - zoom)
    zero = torch.zeros(count)
    rows = [torch.stack([zoom * flip, zero, place[0]], 1), torch.stack([zero, zoom, place[1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [count, 3, size, size], align_corners=False)
    x = F.grid_sample(
        images.float() / 255, grid.to(images.device), padding_mode="border", align_corners=False
    )
    contrast, light = torch.empty(2, count, 1, 1, 1).uniform_(-0.2, 0.2).to(x.device)
    middle = x.mean((1, 2, 3), keepdim=True)
    return ((x - middle) * (1 + contrast) + middle + light).clamp(0, 1)


def tokens_of(tokenizer: CLIPTokenizer, captions: list[str], length: int, dropout: float = 0.0) -> Tensor:
    """Captions as int64 [B, length], as ldm's encoders write them; each token between begin and end is left out with
    the probability `dropout`."""
    rows = tokenizer(captions, truncation=True, max_length=length)["input_ids"]
    kept = [[row[0], *(t for t in row[1:-1] if random.random() >= dropout), row[-1]] for row in rows]
    return torch.tensor([row + [tokenizer.eos_token_id] * (length - len(row)) for row in kept])


class Judge:
    """Measures a model's retrieval on images that it is not trained on."""

    def __init__(self, data: CaptionFolder, tokenizer: CLIPTokenizer, length: int):
        self.pixels = pixels_of(data).float() / 255
        self.owners = torch.tensor([i for i, some in enumerate(data.captions) for _ in some])
        self.tokens = tokens_of(tokenizer, [text for some in data.captions for text in some], length)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, Retrieval]:
        device = next(model.parameters()).device
        texts = torch.cat([embed(model, tokens=part.to(device)).cpu() for part in self.tokens.split(256)])
        images = torch.cat([embed(model, pixels=part.to(device)).cpu() for part in self.pixels.split(256)])
        return retrieval(images @ texts.T, self.owners)


def report(best, iteration, train, held_out, args) -> None:
    """Print the retrieval, and write metrics.json, which says that OUT is finished."""
    owners = torch.tensor([i for i, some in enumerate(held_out.captions) for _ in some])
    beside = chance(owners, len(held_out))
    for way, result in best.items():
        print(f"{way}: {result} (by chance: {beside[way]})")
    flags = {name: value for name, value in vars(args).items() if name not in ("out", "progress", "device")}
    content = {
        "flags": flags,
        "images": {"train": len(train), "held_out": len(held_out)},
        "captions": {"held_out": len(owners)},
        "iteration": iteration,  # of the weights that were kept: the best of those measured
        "held_out": {way: dataclasses.asdict(result) for way, result in best.items()},
        "chance": {way: dataclasses.asdict(result) for way, result in beside.items()},
    }
    (args.out / "metrics.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
