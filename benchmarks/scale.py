"""What the paper's settings cost at its size: parameters, FLOPs, memory, network, disk and time, on paper.

    python benchmarks/scale.py > docs/scale.md

Every model is made of its configuration on torch's meta device, where tensors have shapes and no memory: no GPU is needed, and
nothing is measured. The page that this writes says how every number is obtained.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks.step_cost import FULL, HALF, Step, Work, count_step, inference
from guided_diffusion.errors import exit_on_user_error
from guided_diffusion.flags import Parser, mt_training_defaults, read_config
from guided_diffusion.mt.losses import ENCODED
from guided_diffusion.mt.modalities import Modality
from guided_diffusion.mt.model import JointModel
from guided_diffusion.mt.training import code_interval
from guided_diffusion.unet import AttentionBlock, ResBlock
from ldm.modules.attention import BasicTransformerBlock
from ldm.util import count_params, instantiate_from_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BLOCKS = (ResBlock, AttentionBlock, BasicTransformerBlock)  # what checkpointing recomputes, and FSDP gathers
RANKS = 8  # the paper's GPUs
GPUS = (1, 8, 64, 512)
# An H100 (SXM): TFLOP/s without sparsity, by NVIDIA's data sheet; float32 is TF32 in convolutions, and itself elsewhere.
PEAK = {FULL: (494.5, 67.0), HALF: (989.0, 989.0)}
UTILISATION = 0.4
LINK = 50e9  # bytes per second of a GPU to others: 400 Gbit/s
TOKENS = 77  # of a caption
# Setting, its rows (title, configuration), the first of which is the single task that the others are compared with.
SETTINGS = {
    "Table 2, ImageNet 64 x 64 (E.2, E.3)": {
        "ADM": "table2/adm-unconditional",
        "ADM, class-conditional": "table2/adm-class-conditional",
        "MT-U": "table2/mt-u",
        "MT-X": "table2/mt-x",
        "M": "table2/m",
        "E": "table2/e",
    },
    "Table 3, ImageNet 128 x 128": {"ADM": "table3/adm", "MT": "table3/mt-x", "MTf": "table3/mt-x-finetuned"},
    "Table 4, 256 x 256 (E.1)": {
        "single task": "translation/cityscapes-baseline",
        "MT-Diffusion": "translation/cityscapes",
    },
    "Stable Diffusion 2, 768 x 768 (E.4)": {
        "text to image": "representation/sd2 alone",
        "with the representation": "representation/sd2",
    },
}
# Title: configuration, samples of a GPU at a time, of an update, pixels of the data, bytes of a stored image.
SCALED = {
    "ADM-64, MT-X": ("table2/mt-x", 80, 640, 64, 3 * 64**2),
    "ADM-128, MT": ("table3/mt-x", 10, 640, 128, 3 * 128**2),
    "Stable Diffusion 2 with the representation": ("representation/sd2", 8, 2048, 768, 150e3),
}
IMAGES = {"ImageNet": 1.28e6, "LAION-5B": 5.85e9}


@dataclass(frozen=True)
class Cost:
    """A setting's cost: of a step with checkpointing, and of one without (`whole`), and FLOPs for one sample of the
    modalities' codes, and of what is only read (frozen: its parameters)."""

    parameters: int
    step: Step
    whole: Step
    encoding: Work
    frozen: int = 0
    reading: Work = Work()

    @property
    def work(self) -> Work:
        """FLOPs of a training step for one sample, without recomputation."""
        return self.whole.forward + self.whole.backward + self.encoding

    @property
    def seconds(self) -> float:
        """For one sample on an H100, with what checkpointing repeats; vectors are encoded in float32."""
        encoding = seconds(self.encoding, FULL if self.frozen else HALF)
        return seconds(self.step.forward + self.step.backward + self.reading) + encoding

    def memory(self, gpus: int, samples: int, shared: bool) -> float:
        """Bytes of a GPU that has `samples` at once: weights, gradients, AdamW and average, DDP's buckets or (shared, by
        FSDP) one block's weights, and activations."""
        states, block = 20 * self.parameters, self.whole.largest_block(samples)
        gathered = 4 * self.parameters if gpus > 1 else 0
        if shared and gpus > 1:
            states, gathered = states / gpus, gathered / len(self.whole.blocks)
        return states + gathered + 4 * self.frozen + self.step.kept.of(samples) + block


class TrainingStep(nn.Module):
    """The network with its modalities, as equation 6 calls it: (latents, timesteps, others by name) -> predictions."""

    def __init__(self, modalities, network, names: Sequence[str]):
        super().__init__()
        self.modalities, self.network, self.names = modalities, network, names

    def forward(self, z, t, *inputs):
        """See ModalitySet.apply."""
        named = dict(zip(self.names, inputs, strict=True))
        shown = {m.name: named.pop(m.name) for m in self.modalities if m.name in named}
        return self.modalities.apply(self.network, z, t, shown, named, training=True)


def made(path: str, saves: bool) -> tuple[Callable, Callable, Callable]:
    """Of a configuration ("NAME alone": without its modalities): what makes its TrainingStep on the meta device, its inputs for n samples, and how many
    codes are encoded for a sample. saves: with checkpointing."""
    name, _, alone = path.partition(" ")
    config = read_config(CONFIGS / f"{name}.yaml")
    if alone:
        config["model"]["params"]["modalities"] = {}
    return (_latent if "model" in config else _pixel)(config, saves)


def _pixel(config, saves):
    flags = {**mt_training_defaults(), **config, "num_classes": 1000, "use_checkpoint": saves}
    flags = {name: value for name, value in flags.items() if name in mt_training_defaults()}
    flags["modalities"] = flags["modalities"] or ""

    def make():
        with torch.device("meta"):
            joint = JointModel.from_flags(flags)
        return TrainingStep(joint.modalities, joint.network, list(_shown(joint.modalities)))

    with torch.device("meta"):
        joint = JointModel.from_flags(flags)
    batch = RANKS * flags["batch_size"]
    rows = sum(m.encoded_rows for m in joint.modalities) / code_interval(joint, batch) / batch
    shape, values = joint.shape, _shown(joint.modalities)

    def inputs(n):
        shapes = [(n, *shape), (n,), *((n, *value) for value in values.values())]
        return [torch.empty(size, device="meta") for size in shapes]

    return make, inputs, rows


def _latent(config, saves):
    model = config["model"]
    params = {**model["params"], "ckpt_path": None, "use_ema": False, "scale_by_std": False}
    context = "context_dim" in params["unet_config"]["params"]
    params["unet_config"]["params"]["use_checkpoint"] = saves
    params |= {"extractors": {}} if "extractors" in params else {}
    params["first_stage_config"] = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    params["cond_stage_config"] = "__is_unconditional__"
    modalities = params.get("modalities", {})
    params.pop("conditioning_key", None)
    target = {"target": "ldm.models.diffusion.joint.JointLatentDiffusion", "params": params}
    size = params["image_size"]
    channels = params["unet_config"]["params"]["in_channels"] if not modalities else params["channels"]
    names = ["context"] if context else []

    def make():
        with torch.device("meta"):
            ldm = instantiate_from_config(target)
        return TrainingStep(ldm.modalities, ldm.model.diffusion_model, names)

    def inputs(n):
        shapes = [(n, channels, size, size), (n,), *([(n, TOKENS, 1024)] if context else [])]
        return [torch.empty(shape, device="meta") for shape in shapes]

    vectors = any(m.get("preset") == "representation" for m in modalities.values())
    return make, inputs, ENCODED * vectors


def _shown(modalities: Sequence[Modality]) -> dict[str, tuple[int, ...]]:
    """Shapes of the values that the network sees beside the latent."""
    return {m.name: m.shape for m in modalities if m.as_input}


@cache
def cost(path: str) -> Cost:
    """Count a configuration."""
    (make, inputs, rows), (make_saving, _, _) = made(path, False), made(path, True)
    whole = count_step(make, inputs, HALF, BLOCKS)
    step = count_step(make_saving, inputs, HALF)
    encoding = inference(make(), *inputs(1)) * rows if rows else Work()
    trained = count_params(make())
    if not path.startswith("representation"):
        return Cost(trained, step, whole, encoding)
    models = _frozen()
    image, small = (torch.empty(1, 3, size, size, device="meta") for size in (768, 224))
    caption = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    reading = inference(models[0].encode, image) + inference(models[1], caption)
    reading += inference(models[2], small) * rows
    return Cost(trained, step, whole, encoding, sum(map(count_params, models)), reading)


def _frozen() -> list[nn.Module]:
    """What Stable Diffusion 2 and its representation only read: the autoencoder, and both halves of CLIP ViT-H."""
    params = read_config(CONFIGS / "stable-diffusion/v2-inference.yaml")["model"]["params"]
    shared = dict(intermediate_size=4096, num_attention_heads=16, hidden_act="gelu")
    text = CLIPTextConfig(hidden_size=1024, num_hidden_layers=24, **shared)
    shared |= dict(intermediate_size=5120, image_size=224, projection_dim=1024)
    vision = CLIPVisionConfig(hidden_size=1280, num_hidden_layers=32, patch_size=14, **shared)
    with torch.device("meta"):
        first = instantiate_from_config(params["first_stage_config"])
        return [m.eval() for m in (first, CLIPTextModel(text), CLIPVisionModelWithProjection(vision))]


def seconds(work: Work, dtype: torch.dtype = HALF, utilisation: float = UTILISATION) -> float:
    """On an H100 at a share of its peak rate."""
    convolution, matrix = PEAK[dtype]
    return (work.convolution / convolution + work.matrix / matrix) / (utilisation * 1e12)


# Tables


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def flops_table() -> str:
    """Every row of the paper's tables: a training step's FLOPs for one sample, and what its modalities add."""
    lines = []
    for setting, rows in SETTINGS.items():
        single = cost(next(iter(rows.values()))).work.total
        for title, path in rows.items():
            c = cost(path)
            share = "" if path == next(iter(rows.values())) else f"{c.work.total / single - 1:+.1%}"
            work = (c.whole.forward.total, c.whole.backward.total, c.encoding.total)
            lines.append(
                [setting, title, f"{c.parameters / 1e6:.1f}", *(f"{w / 1e9:,.1f}" for w in work), share]
            )
            setting = ""
    head = ["setting", "row", "parameters, M", "forward, GFLOP", "backward, GFLOP", "encoding, GFLOP"]
    return table([*head, "to the single task"], lines)


def scale_table(title: str) -> str:
    """One model on 1 to 512 GPUs."""
    path, samples, batch, _, stored = SCALED[title]
    c, lines = cost(path), []
    for gpus in GPUS:
        own = math.ceil(batch / gpus)
        passes = math.ceil(own / samples)
        memory = (c.memory(gpus, math.ceil(own / passes), shared) for shared in (False, True))
        moved = 2 * (gpus - 1) / gpus * 4 * c.parameters
        computing, moving = own * c.seconds, moved / LINK
        rate = own * gpus / max(computing, moving)
        numbers = [f"{moved / 1e9:.2f}", f"{computing:.3g}", f"{moving:.2g}", f"{rate:,.0f}"]
        gib = [f"{size / 2**30:.1f}" for size in memory]
        lines.append([gpus, own, passes, *gib, *numbers, f"{rate * stored / 1e6:,.0f}"])
    head = ["GPUs", "samples of each", "passes", "DDP, GiB", "FSDP, GiB", "moved, GB", "computing, s"]
    return table([*head, "moving, s", "images/s", "read, MB/s"], lines)


def data_table() -> str:
    """Disk, and the time of one pass over the data with 8 and 512 GPUs."""
    lines = []
    for title, (path, _, batch, pixels, stored) in SCALED.items():
        c, name = cost(path), "LAION-5B" if pixels == 768 else "ImageNet"
        hours = [f"{IMAGES[name] * c.seconds / gpus / 3600:,.2f}" for gpus in (8, 512)]
        sizes = [f"{16 * c.parameters / 1e9:.1f}", name, f"{IMAGES[name] * stored / 1e12:,.2f}"]
        lines.append([title, *sizes, *hours, f"{IMAGES[name] / batch:,.0f}"])
    head = ["model", "a checkpoint, GB", "data", "stored, TB", "a pass on 8 GPUs, hours", "on 512, hours"]
    return table([*head, "updates in a pass"], lines)


PAGE = """# Memory, compute and scale

**Every number here is computed, none is measured.** `python benchmarks/scale.py > docs/scale.md` writes this page.

| number | how it is obtained |
| --- | --- |
| parameters | counted on torch's meta device, from the configurations of this project |
| FLOPs | torch's `FlopCounterMode`, for one sample; a multiplication and an addition are two |
| encoding | labels: a forward pass for every class at each refresh of their codes, shared among 8 GPUs and all samples until the next; a vector: a pass, in float32, for the share of the samples whose vectors are in the latent |
| memory | weights, gradients, AdamW and the moving average, 20 bytes for a parameter, and 4 for one that is frozen (the autoencoder and CLIP of Stable Diffusion 2); DDP's buckets, 4; the activations that autograd keeps in bf16 with checkpointing of blocks, and the largest block again. FSDP (main.py --strategy fsdp, FSDP2 by block): what is trained, and its average, by the number of GPUs, and one block's weights; to validate and to sample all weights are gathered, and with vectors that the U-Net encodes they stay until the backward pass, which is not counted here. Lower bounds: the allocator's rounding and workspaces are not in them |
| moved | a ring's share of the gradients in float32, 2 (n - 1) / n times 4 bytes for a parameter and update |
| computing | FLOPs, with those that checkpointing repeats and those of what is frozen, at {utilisation:.0%} of an H100's peak rate (bf16 {bf16:.0f} TFLOP/s) |
| moving | at {link:.0f} GB/s for each GPU; it overlaps the backward pass, so the longer of both counts |
| images/s, read | of all GPUs together; ImageNet as packed bytes (scripts/pack_images.py), LAION as JPEG files of 150 kB |
| a checkpoint | weights, moving average and AdamW: 16 bytes for a parameter |

The batch of an update is the paper's: 80 a GPU (its 8 GPUs make 640), and 2048 for Stable Diffusion 2; where the GPUs do not divide it, it
is a little larger. Time to read the data, normalisations and the optimizer are left out.

## FLOPs of a training step, by row

The paper says that its modalities cost about 10 % of an iteration (E.5).

{flops}
## Scale

{scales}
## Data and disk

{data}"""


def page() -> str:
    """docs/scale.md."""
    scales = "\n".join(f"{title}, {SCALED[title][3]} pixels:\n\n{scale_table(title)}" for title in SCALED)
    rates = dict(utilisation=UTILISATION, bf16=PEAK[HALF][0], link=LINK / 1e9)
    return PAGE.format(flops=flops_table(), scales=scales, data=data_table(), **rates)


@exit_on_user_error()
def main():
    """Print the page."""
    Parser(__doc__).parse_args()
    print(page(), end="")


if __name__ == "__main__":
    main()
