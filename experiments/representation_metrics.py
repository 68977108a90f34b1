"""How well a joint model of images and representations works, on captioned images that it was not trained on.

    python experiments/representation_metrics.py --resume logs/RUN --data_dir captioned/ --out results/

Measures, by the model's own extractor:
- encoding: what the U-Net makes of representations;
- read: p(representation | image), also by timestep (cosine.png);
- variations: images for given representations, at each of --strengths (variations.png);
- drawn: images and representations for captions, beside the plain sampler's (drawn.png).

Writes OUT/metrics.json; docs/evaluation.md says what its numbers are.
"""

from guided_diffusion import flags
from guided_diffusion.errors import UserValueError, exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script."""
    own = flags.Parser(__doc__)
    own.add(
        "--resume",
        required=True,
        metavar="LOGDIR_OR_CKPT",
        group="model",
        path="source",
        help="a run of main.py, or its checkpoint",
    )
    own.add("--data_dir", required=True, help="captioned images, see ldm/data/captions.py")
    own.add(
        "--part",
        default="held_out",
        choices=("held_out", "train", "all"),
        group="data",
        help="which of the images",
    )
    own.add("--held_out_every", default=10, low=2, group="data", help="one image in so many, as in training")
    own.add("--images", default=32, low=1, group="sampling", help="that many, for variations and drawn")
    own.add("--each", default=2, low=1, group="sampling", help="variations of each image")
    own.add(
        "--strengths",
        default="0,0.3,1",
        kind=flags.numbers,
        low=0,
        group="sampling",
        help="strengths of the conditioning on a given representation",
    )
    own.add("--times", default="0,100,200,300,400,500,600,700,800,900", help="timesteps of cosine.png")
    own.add("--steps", default=25, low=1, high=100_000, help="sampling steps (DPM-Solver++)")
    own.add("--scale", default=3.0, help="strength of classifier-free guidance by captions; 1 is none")
    own.add("--clip", default="", path="source", group="model", help="the whole CLIP, for its text encoder")
    own.add("--batch_size", default=32)
    own.add("--seed", default=0)
    own.add("--out", required=True)
    return own


if __name__ == "__main__":
    flags.answer_early(parser)  # before the slow imports


import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from guided_diffusion import dist_util, logger
from guided_diffusion.figures import Curve, Plot, Row, contact_sheet, save_plots, to_uint8
from guided_diffusion.mt import directions
from guided_diffusion.mt.modality_set import UNetEncoder
from ldm import inference
from ldm.data.captions import CaptionFolder
from ldm.models.diffusion.joint import JointLatentDiffusion
from ldm.models.diffusion.sampling import Denoiser
from ldm.modules.encoders.base import import_transformers, load_pretrained, reading

SHEET = 10  # images in a row


@exit_on_user_error()
def main():
    args = parser().parse_args()
    dist_util.setup_dist()
    model, name = load(args.resume)
    data = held_out(args, model)
    logger.configure(dir=args.out, format_strs=["stdout"])
    chosen = data.first(args.images)
    results = {"images": len(data.images), "chosen": len(chosen.images)}
    with model.ema_scope():
        bench = Bench(model, name, args)
        results["encoding"] = bench.encoding(chosen)
        results["read"] = bench.read(data)
        results["variations"] = bench.variations(chosen, args.strengths)
        results["drawn"] = bench.drawn(chosen)
    path = Path(args.out) / "metrics.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def load(resume: str) -> tuple[JointLatentDiffusion, str]:
    """The model of a run, and the name of its vector modality with an extractor."""
    run, checkpoint = inference.locate(resume)
    model = inference.load_model(inference.merged_config(inference.configurations(run)), checkpoint)
    names = list(model.extractors) if isinstance(model, JointLatentDiffusion) else []
    if not names:
        raise UserValueError(f"{resume} has no vector modality with an extractor")
    return model, names[0]


@dataclass(frozen=True)
class Captioned:
    """Images [N, 3, H, W] in [-1, 1] and a caption of each."""

    images: torch.Tensor
    captions: Sequence[str]

    def first(self, count: int) -> "Captioned":
        """The first of them."""
        return Captioned(self.images[:count], self.captions[:count])


def held_out(args, model) -> Captioned:
    """The images to measure on, at the model's size."""
    how = {"part": args.part, "held_out_every": args.held_out_every, "caption": "first"}
    data = CaptionFolder(args.data_dir, inference.image_size(model), **how)
    items = [data[k] for k in range(len(data))]
    images = torch.from_numpy(np.stack([item["jpg"] for item in items])).permute(0, 3, 1, 2)
    return Captioned(images.contiguous(), [item["txt"] for item in items])


class Bench:
    """The measurements, of the modality `name` of a model."""

    def __init__(self, model: JointLatentDiffusion, name: str, args):
        self.model, self.name, self.args = model, name, args

    # What is measured

    @torch.no_grad()
    def encoding(self, data: Captioned) -> dict:
        """What the U-Net makes of representations at z = 0, t = 0."""
        vectors = self.standard(self.extract(data.images))
        rows = vectors / vectors.square().mean(dim=1, keepdim=True).sqrt()
        raw, codes = self.raw_codes(rows)
        with torch.autocast(self.model.device.type, dtype=torch.bfloat16):
            _, half = self.raw_codes(rows)
        agreement = F.cosine_similarity(codes, half)
        likenesses = torch.stack([pairwise_cosines(codes), pairwise_cosines(vectors)])
        return {
            "rms": float(raw.square().mean().sqrt()),
            "spread": float(codes.square().mean().sqrt()),
            "bf16_cosine": {"mean": float(agreement.mean()), "least": float(agreement.min())},
            "likeness_correlation": float(torch.corrcoef(likenesses)[0, 1]),
            "head_error": self.model.model.heads[self.name].variance.tolist(),
        }

    def raw_codes(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The U-Net's outputs for vectors [N, D], and what they differ by from that of the null input, [N, C h w]."""
        rows = torch.cat([rows, torch.zeros_like(rows[:1])]).to(self.model.device)
        z = rows.new_zeros(len(rows), *self.model.latent_shape)
        t = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
        tokens = UNetEncoder(self.model.modalities, None, z).tokens(rows)
        output, _ = Denoiser(self.model)(z, t, context=tokens)
        output = output.float().flatten(1).cpu()
        return output[:-1], output[:-1] - output[-1:]

    @torch.no_grad()
    def read(self, data: Captioned) -> dict:
        """p(representation | image), with the empty caption and with the image's own."""
        truth = self.extract(data.images)
        mean = self.model.standards[self.name].mean.cpu()
        curve = [self.cosine(self.predicted(data.images, None, (t,)), truth) for t in self.args.times]
        title = "Cosine of the representation read from the noised image"
        lines = [Curve("empty caption", self.args.times, curve)]
        save_plots(
            [Plot(lines, "timestep t", "cosine", title, chance=0.0)], Path(self.args.out) / "cosine.png"
        )
        found = {}
        for kind, captions in (("empty_caption", None), ("own_caption", data.captions)):
            read = self.predicted(data.images, captions)
            found[kind] = {
                "cosine": self.cosine(read, truth),
                "plain_cosine": float(F.cosine_similarity(read, truth).mean()),
                **self.retrieval(read, truth),
            }
        found["mean_vector"] = {
            "cosine": 0.0,
            "plain_cosine": float(F.cosine_similarity(mean[None], truth).mean()),
        }
        found["by_time"] = dict(zip(map(str, self.args.times), curve, strict=True))
        return found

    @torch.no_grad()
    def variations(self, data: Captioned, strengths: Sequence[float]) -> dict:
        """Images for the representations of `data`, and of which of them they are."""
        given = self.extract(data.images)
        rebuilt = self.extract(self.rebuilt(data.images))
        found = {
            "chance": {"top1": 1 / len(given), "top5": min(5 / len(given), 1.0)},
            "through_the_first_stage": {
                "cosine": self.cosine(rebuilt, given),
                **self.retrieval(rebuilt, given),
            },
            "by_strength": [],
        }
        rows = [Row("the representation of", to_uint8(data.images[:SHEET]), mark="given")]
        owners = torch.arange(len(given)).repeat(self.args.each)
        for strength in strengths:
            images = self.draw([""] * len(owners), given[owners], strength=strength, scale=1.0)["image"]
            drawn = self.extract(images)
            found["by_strength"].append(
                {
                    "strength": strength,
                    "cosine": self.cosine(drawn, given[owners]),
                    **self.retrieval(drawn, given, owners),
                }
            )
            rows.append(Row(f"variations, strength {strength:g}", to_uint8(images[:SHEET]), mark="generated"))
        contact_sheet(rows).save(Path(self.args.out) / "variations.png")
        return found

    @torch.no_grad()
    def drawn(self, data: Captioned) -> dict:
        """Images and representations for captions, and images of the plain sampler."""
        joint = self.draw(data.captions, scale=self.args.scale)
        plain = self.draw(data.captions, scale=self.args.scale, absent=[self.name])
        seen = self.extract(joint["image"])
        others = torch.roll(seen, 1, dims=0)
        found = {
            "cosine_of_image_and_representation": self.cosine(joint[self.name], seen),
            "cosine_of_other_pairs": self.cosine(joint[self.name], others),
            **self.retrieval(joint[self.name], seen),
        }
        if self.args.clip:
            texts = text_embeddings(self.args.clip, data.captions, self.model.cond_stage_model.max_length)
            found["caption_found"] = {
                "chance": {"top1": 1 / len(texts), "top5": min(5 / len(texts), 1.0)},
                "real_images": nearest(self.extract(data.images), texts),
                "joint": nearest(seen, texts),
                "plain_sampler": nearest(self.extract(plain["image"]), texts),
            }
        rows = [
            Row("with these captions", to_uint8(data.images[:SHEET]), mark="true"),
            Row("MT-Diffusion, by the captions", to_uint8(joint["image"][:SHEET]), mark="generated"),
            Row("the plain sampler, same seeds", to_uint8(plain["image"][:SHEET]), mark="generated"),
        ]
        contact_sheet(rows).save(Path(self.args.out) / "drawn.png")
        return found

    # What that needs

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        """Representations [N, D] of images."""
        extractor, device = self.model.extractors[self.name], self.model.device
        return torch.cat([extractor(part.clamp(-1, 1).to(device)).cpu() for part in images.split(64)])

    def rebuilt(self, images: torch.Tensor) -> torch.Tensor:
        """Images as the first stage gives them back: the best that a model of its latents can draw."""
        parts = (self.model.encode_images(part.to(self.model.device)) for part in images.split(64))
        return torch.cat([self.model.decode_first_stage(z).cpu() for z in parts])

    def predicted(self, images, captions, times=(0, 10, 20)) -> torch.Tensor:
        """The head's reading of images at `times`, averaged: [N, D]."""
        rows = []
        for numbers in directions.batches(range(len(images)), self.args.batch_size):
            cond = self.conditioning([captions[n] if captions else "" for n in numbers])
            read = self.model.predict(
                images[numbers], conditioning=cond, times=times, seed=self.args.seed, indices=numbers
            )
            rows.append(read[self.name].cpu())
        return torch.cat(rows)

    def draw(self, captions, given=None, strength=1.0, scale=1.0, absent=()) -> dict[str, torch.Tensor]:
        """`image` [N, 3, H, W] for captions [N] and given representations [N, D], and the representation where it
        is not given; sample k has seed k."""
        image, parts = self.model.first_stage_key, []
        for numbers in directions.batches(range(len(captions)), self.args.batch_size):
            drawn = self.model.sample_joint(
                len(numbers),
                None if given is None else {self.name: given[numbers]},
                sampler="dpm++",
                steps=self.args.steps,
                seed=self.args.seed,
                indices=numbers,
                conditioning=self.conditioning([captions[n] for n in numbers]),
                unconditional=self.conditioning([""] * len(numbers)) if scale != 1 else None,
                guidance=scale,
                strength=strength,
                absent=absent,
                use_ema=False,  # it is in place already
            )
            parts.append(drawn)
        joined = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
        return {"image": joined.pop(image), **joined}

    def conditioning(self, captions: list[str]):
        """Learned conditioning by captions."""
        return self.model.get_learned_conditioning(captions)

    def standard(self, vectors: torch.Tensor) -> torch.Tensor:
        """Representations in standard form."""
        return self.model.standards[self.name](vectors.to(self.model.device)).cpu()

    def cosine(self, first: torch.Tensor, second: torch.Tensor) -> float:
        """The mean cosine of pairs of representations, in standard form."""
        return float(F.cosine_similarity(self.standard(first), self.standard(second)).mean())

    def retrieval(self, found: torch.Tensor, among: torch.Tensor, owners: torch.Tensor | None = None) -> dict:
        """`nearest`, in standard form."""
        return nearest(self.standard(found), self.standard(among), owners)


def pairwise_cosines(vectors: torch.Tensor) -> torch.Tensor:
    """Of all pairs of different vectors [N, D]: [N (N - 1)]."""
    unit = F.normalize(vectors, dim=1)
    return (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]


def nearest(
    found: torch.Tensor, among: torch.Tensor, owners: torch.Tensor | None = None
) -> Mapping[str, float]:
    """How often the own one of `among` [M, D] is the closest to a vector of `found` [N, D], or among the five
    closest, by cosine. owners: int64 [N], by default the vector of the same number."""
    likeness = F.normalize(found, dim=1) @ F.normalize(among, dim=1).T
    owners = torch.arange(len(found)) if owners is None else owners
    own = likeness.gather(1, owners[:, None])
    rank = (likeness >= own).sum(dim=1)  # what is equally close counts as closer
    return {"top1": float((rank <= 1).float().mean()), "top5": float((rank <= 5).float().mean())}


def text_embeddings(source: str, captions: Sequence[str], max_length: int) -> torch.Tensor:
    """Captions in the space of a CLIP's representations, [N, D]."""
    transformers = import_transformers("a text encoder")
    with reading(source, "tokenizer"):
        tokenizer = transformers.CLIPTokenizer.from_pretrained(source)
    model = load_pretrained(transformers.CLIPTextModelWithProjection, source, "", "text encoder")
    tokens = tokenizer(
        list(captions), truncation=True, max_length=max_length, padding=True, return_tensors="pt"
    )
    return model(**tokens).text_embeds


if __name__ == "__main__":
    main()
