"""Memory and compute of one training step of the full-size Stable Diffusion 2 joint model, on paper.

    python benchmarks/memory_sd2.py                    the tables of docs/memory.md, in Markdown
    python benchmarks/memory_sd2.py --micro_batch 16   with 16 samples on a GPU at a time

The model is that of configs/stable-diffusion/v2-inference.yaml with the modality `representation`, the 1024
numbers of CLIP ViT-H. It is made on torch's meta device: no GPU is needed, and nothing is measured.
docs/memory.md says how every number is obtained.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: look for modules in the repository, not in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import yaml
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks.step_cost import BYTES, FULL, HALF, Step, Work, count_step, inference
from guided_diffusion.mt.modalities import VectorModality
from guided_diffusion.mt.modality_set import ModalitySet
from guided_diffusion.unet import ResBlock
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import count_params, instantiate_from_config

CONFIG = Path(__file__).resolve().parents[1] / "configs/stable-diffusion/v2-inference.yaml"
NAMES = {FULL: "float32", HALF: "bf16 autocast"}
TOKENS = 77  # of a caption
BATCH = 2048  # of the paper
# TFLOP/s of the SXM cards without sparsity, from NVIDIA's data sheets: by torch's default float32 is TF32 in
# convolutions, and itself elsewhere.
PEAKS = {
    "A100": {FULL: (156, 19.5), HALF: (312, 312)},
    "H100": {FULL: (494.5, 67), HALF: (989, 989)},
}


# The models


def make_unet(use_checkpoint: bool) -> UNetModel:
    """The joint model's U-Net on the meta device."""
    member = VectorModality("representation", (1024,), encoder="unet", head="middle", hidden=1024)
    params = yaml.safe_load(CONFIG.read_text())["model"]["params"]["unet_config"]["params"]
    with torch.device("meta"):
        heads = ModalitySet([member], 4, context_dim=1024).make_heads(1280, 320)
        return UNetModel(**(params | {"use_checkpoint": use_checkpoint}), heads=heads)


def unet_inputs(samples: int, tokens: int) -> list[torch.Tensor]:
    """Latents, timesteps and context."""
    shapes = ((samples, 4, 64, 64), (samples,), (samples, tokens, 1024))
    return [torch.empty(shape, device="meta") for shape in shapes]


def make_frozen() -> dict[str, nn.Module]:
    """What is only read, on the meta device: the autoencoder, and both halves of CLIP ViT-H."""
    params = yaml.safe_load(CONFIG.read_text())["model"]["params"]
    text = CLIPTextConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        hidden_act="gelu",
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14,
        image_size=224, projection_dim=1024, hidden_act="gelu",
    )  # fmt: skip
    with torch.device("meta"):
        return {
            "autoencoder": instantiate_from_config(params["first_stage_config"]).eval(),
            "text encoder": CLIPTextModel(text).eval(),
            "image encoder": CLIPVisionModelWithProjection(vision).eval(),
        }


def frozen_work(models: Mapping[str, nn.Module]) -> dict[str, Work]:
    """One reading of an image of 512 x 512 pixels and its caption."""
    image, small = (torch.empty(1, 3, size, size, device="meta") for size in (512, 224))
    caption = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    return {
        "first stage's encoder": inference(models["autoencoder"].encode, image),
        "text encoder": inference(models["text encoder"], caption),
        "image encoder": inference(models["image encoder"], small),
    }


def unet_steps() -> dict[tuple[torch.dtype, bool], Step]:
    """A training step by precision and whether there is checkpointing."""
    kinds = (ResBlock, BasicTransformerBlock)  # those that are checkpointed
    return {
        (dtype, on): count_step(
            lambda on=on: make_unet(on), lambda n: unet_inputs(n, TOKENS), dtype, () if on else kinds
        )
        for dtype in (FULL, HALF)
        for on in (False, True)
    }


# Strategies


@dataclass(frozen=True)
class Strategy:
    """How a step is spread over GPUs."""

    name: str
    gpus: int
    dtype: torch.dtype

    @property
    def sharded(self) -> bool:
        """Does each GPU keep only its share of the weights?"""
        return self.name == "FSDP"

    def memory(
        self, trained: int, frozen: int, step: Step, largest_block: int, samples: int
    ) -> dict[str, float]:
        """Bytes on a GPU by purpose, at the beginning of a backward pass.

        trained, frozen: numbers of parameters; largest_block: bytes that are recomputed at once; samples: on
        the GPU at a time.
        """
        share = self.gpus if self.sharded else 1
        kept = step.kept.of(samples)
        communication = 4 * trained if self.name == "DDP" else 0  # buckets beside the gradients
        if self.sharded:
            # One unit: all weights are gathered, in the step's type, and have gradients until these are
            # scattered.
            communication = 2 * BYTES[self.dtype] * (trained + frozen)
            kept -= step.kept.fixed
        return {
            "weights": 4 * (trained + frozen) / share,
            "gradients": 4 * trained / share,
            "AdamW": 8 * trained / share,
            "communication": communication,
            "activations": kept + largest_block,
        }

    def average(self, trained: int) -> int | None:
        """Bytes of the moving average; None where it is refused (ldm/training/setup.py)."""
        return None if self.sharded else 4 * trained


STRATEGIES = [
    Strategy(name, gpus, dtype)
    for dtype in (FULL, HALF)
    for name, gpus in (("one GPU", 1), ("DDP", 8), ("DDP", 64), ("FSDP", 8), ("FSDP", 64))
]


def seconds(work: Work, gpu: str, dtype: torch.dtype, utilisation: float) -> float:
    """On one GPU of PEAKS at a share of its peak rate."""
    convolution, matrix = PEAKS[gpu][dtype]
    return (work.convolution / convolution + work.matrix / matrix) / (utilisation * 1e12)


# Tables


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.2f}"


def parameter_table(trained: Mapping[str, int], frozen: Mapping[str, int]) -> str:
    """Every part's parameters, and their bytes."""
    rows = [
        [name, state, f"{number:,}", gib(4 * number)]
        for state, group in (("trained", trained), ("frozen", frozen))
        for name, number in group.items()
    ]
    return table(["part", "state", "parameters", "GiB in float32"], rows)


def activation_table(steps: Mapping, samples: int) -> str:
    """What the backward pass needs, by precision and checkpointing."""
    rows = []
    for (dtype, on), step in steps.items():
        block = steps[dtype, False].largest_block(samples) if on else 0
        values = map(gib, (step.kept.per_sample, step.kept.fixed, block))
        rows.append([NAMES[dtype], "on" if on else "off", *values])
    head = ["precision", "checkpointing", "kept for each sample, GiB", "weights in bf16, GiB"]
    return table([*head, f"recomputed at once for {samples}, GiB"], rows)


def work_table(works: Mapping[str, Work]) -> str:
    """FLOPs of every part of a step for one sample."""
    values = {name: (work.total / 1e12, work.convolution / 1e12) for name, work in works.items()}
    rows = [[name, *(f"{value:.3f}" for value in pair)] for name, pair in values.items()]
    return table(["for one sample", "TFLOP", "of which convolutions"], rows)


def memory_table(trained: int, frozen: int, steps: Mapping, samples: int) -> str:
    """Bytes on each GPU by strategy, with checkpointing."""
    rows = []
    for strategy in STRATEGIES:
        step, whole = steps[strategy.dtype, True], steps[strategy.dtype, False]
        parts = strategy.memory(trained, frozen, step, whole.largest_block(samples), samples)
        total, average = sum(parts.values()), strategy.average(trained)
        with_average = "refused" if average is None else gib(total + average)
        described = [strategy.name, strategy.gpus, NAMES[strategy.dtype]]
        accumulated = f"{BATCH / (samples * strategy.gpus):g}"
        rows.append([*described, *map(gib, parts.values()), gib(total), with_average, accumulated])
    return table(["strategy", "GPUs", "precision", *parts, "sum", "with EMA", "accumulated batches"], rows)


def time_table(steps: Mapping, encoding: Work, reading: Work, samples: int, utilisation: float) -> str:
    """Seconds for an update by strategy. The encodings are in float32 always, as ModalitySet has them."""
    rows = []
    encodings = encoding * (BATCH + BATCH / samples)  # of every sample, and once in a batch of the null input
    for strategy in STRATEGIES:
        step, times = steps[strategy.dtype, True], []
        rest = (step.forward + step.backward + reading) * BATCH
        for gpu in PEAKS:
            encode = seconds(encodings, gpu, FULL, utilisation) / strategy.gpus
            total = seconds(rest, gpu, strategy.dtype, utilisation) / strategy.gpus + encode
            times += [f"{total:.1f}", f"{encode:.1f}"]
        rows.append([strategy.name, strategy.gpus, NAMES[strategy.dtype], *times])
    columns = [text for gpu in PEAKS for text in (f"{gpu}, s", "of which encoding, s")]
    return table(["strategy", "GPUs", "precision", *columns], rows)


def report(samples: int, utilisation: float) -> str:
    """All tables. samples: on a GPU at a time; utilisation: share of the peak rate."""
    unet, models, steps = make_unet(False), make_frozen(), unet_steps()
    heads = count_params(unet.heads)
    trained = {"U-Net": count_params(unet) - heads, "head": heads}
    frozen = {name: count_params(model) for name, model in models.items()}
    encoding, reading = inference(unet, *unet_inputs(1, 1)), frozen_work(models)
    works = {
        "forward": steps[FULL, False].forward,
        "backward": steps[FULL, False].backward,
        "backward with checkpointing": steps[FULL, True].backward,
        "encoding of the representation": encoding,
        **reading,
    }
    sums = sum(trained.values()), sum(frozen.values())
    read = sum(reading.values(), Work())
    tables = {
        "Parameters": parameter_table(trained, frozen),
        "Activations": activation_table(steps, samples),
        "FLOPs": work_table(works),
        f"Memory of a GPU in GiB, {samples} samples at a time": memory_table(*sums, steps, samples),
        f"Time of an update of {BATCH} samples at {utilisation:.0%} of the peak rate": time_table(
            steps, encoding, read, samples, utilisation
        ),
    }
    return "\n".join(f"## {title}\n\n{text}" for title, text in tables.items())


def main():
    """Print the tables."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--micro_batch", type=int, default=8, help="samples on a GPU at a time")
    flags.add_argument("--utilisation", type=float, default=0.4, help="share of the peak rate")
    args = flags.parse_args()
    if args.micro_batch < 1 or not 0 < args.utilisation <= 1:
        flags.error("micro_batch must be at least 1, utilisation in (0, 1]")
    print(report(args.micro_batch, args.utilisation), end="")


if __name__ == "__main__":
    main()
