"""A small CLIP of transformers, its tokenizer, and how well it finds an image's captions."""

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from guided_diffusion.errors import UserValueError

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 1500  # of the tokenizer: more would be words that stand in one caption only
HEAD = 32  # channels of an attention head
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's images, in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Retrieval:
    """Where the right one stands among all, by falling likeness: shares of 1 and of 5 first, and the median place."""

    recall_1: float
    recall_5: float
    median_rank: float

    @classmethod
    def of_ranks(cls, ranks: Tensor) -> "Retrieval":
        """ranks: int64 [K], 1 is the first."""
        share = [(ranks <= k).double().mean().item() for k in (1, 5)]
        return cls(*share, ranks.double().quantile(0.5).item())

    def __str__(self) -> str:
        return f"recall@1 {self.recall_1:.3f}, @5 {self.recall_5:.3f}, median rank {self.median_rank:g}"


def retrieval(likeness: Tensor, owners: Tensor) -> dict[str, Retrieval]:
    """How well images find a caption of their own, and captions their image.

    likeness: float [N, M] of N images and M captions; owners: int64 [M], the image of every caption. What is
    equally alike counts as found before.
    """
    own = owners == torch.arange(len(likeness))[:, None]
    best = likeness.masked_fill(~own, -math.inf).amax(1, keepdim=True)
    to_text = 1 + ((likeness >= best) & ~own).sum(1)
    to_image = (likeness >= likeness.gather(0, owners[None])).sum(0)
    return {"image_to_text": Retrieval.of_ranks(to_text), "text_to_image": Retrieval.of_ranks(to_image)}


def chance(owners: Tensor, images: int, draws: int = 100) -> dict[str, Retrieval]:
    """What `retrieval` gives for likenesses by chance: the mean of `draws`."""
    generator = torch.Generator().manual_seed(0)
    results = [retrieval(torch.rand(images, len(owners), generator=generator), owners) for _ in range(draws)]

    def mean(way):
        columns = zip(*(dataclasses.astuple(result[way]) for result in results), strict=True)
        return Retrieval(*(sum(column) / draws for column in columns))

    return {way: mean(way) for way in results[0]}


def train_tokenizer(captions: Iterable[str], max_length: int) -> CLIPTokenizer:
    """CLIP's tokenizer, its pairs of letters merged as these captions suggest. Every text can be written in it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = CLIPTokenizer(vocab={END: 0, BEGIN: 1}).backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(letters) + MERGES, min_frequency=3, show_progress=False, end_of_word_suffix="</w>",
        special_tokens=[BEGIN, END], initial_alphabet=letters,
    )  # fmt: skip
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    # In CLIP's order: the letters, the letters that end a word, what was merged, begin and end.
    words = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *("".join(pair) for pair in merges),
        BEGIN,
        END,
    ]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def make_clip(
    tokenizer: CLIPTokenizer, size: int, width: int, layers: int, patch: int, max_length: int, dropout: float
) -> CLIPModel:
    """A CLIP with fresh weights for images size x size in patches patch x patch. UserValueError for sizes that do
    not divide."""
    if size % patch or width % HEAD:
        raise UserValueError(
            f"size {size} must be a multiple of patch {patch}, and width {width} one of {HEAD}"
        )
    both = dict(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, projection_dim=width,
        num_attention_heads=width // HEAD, attention_dropout=dropout,
    )  # fmt: skip
    text = dict(
        vocab_size=len(tokenizer), max_position_embeddings=max_length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPModel(
        CLIPConfig(
            text_config=both | text,
            vision_config=both | dict(image_size=size, patch_size=patch),
            projection_dim=width,
        )
    )


def embed(model: CLIPModel, tokens: Tensor | None = None, pixels: Tensor | None = None) -> Tensor:
    """Normalised embeddings [B, D] of captions, int64 [B, L], or of images in [0, 1], float [B, 3, H, W]."""
    if tokens is not None:
        return F.normalize(model.get_text_features(input_ids=tokens).pooler_output, dim=1)
    mean, std = (torch.tensor(value, device=pixels.device)[:, None, None] for value in (MEAN, STD))
    return F.normalize(model.get_image_features(pixel_values=(pixels - mean) / std).pooler_output, dim=1)


def save_clip(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a model as transformers reads it: config.json, model.safetensors, tokenizer, preprocessor_config.json."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = model.config.vision_config.image_size
    processing = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processing, indent=2) + "\n")
