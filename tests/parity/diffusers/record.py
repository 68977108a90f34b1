"""Record what diffusers and transformers compute, for tests/test_diffusers_layout.py.

    python -m tests.parity.diffusers.record        writes index.json, sd1.npz and sd2.npz beside this file

It needs diffusers, which the project does not. Weights are filled from their names in the files
(tests/parity/weights.py), so none are kept.
"""

import json
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.parity.weights import named_weight

HERE = Path(__file__).parent
CAPTIONS = ["a cat", "dog"]
VOCABULARY = ["!", "a</w>", "cat</w>", "dog</w>", "<|startoftext|>", "<|endoftext|>", *"acdgot"]
VOCABULARY += [*(f"{letter}</w>" for letter in "cdgot"), "ca", "do"]
MERGES = ["c a", "ca t</w>", "d o", "do g</w>"]
LENGTH = 8  # tokens of a caption
VAE = dict(
    in_channels=3, out_channels=3, latent_channels=4, block_out_channels=[32, 64, 64], layers_per_block=1,
    down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, sample_size=32,
)  # fmt: skip
TEXT = dict(
    vocab_size=len(VOCABULARY), intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=LENGTH, bos_token_id=4, eos_token_id=5,
)  # fmt: skip
SCHEDULER = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
CASES = {
    "sd1": {  # convolutions around the transformers, one number of heads, the older names of attention
        "unet": dict(
            in_channels=4, out_channels=4, sample_size=16, layers_per_block=1, block_out_channels=[32, 64],
            down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], cross_attention_dim=24,
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"], attention_head_dim=4,
        ),
        "text": dict(hidden_size=24, hidden_act="quick_gelu", **TEXT),
        "padding": 5,
        "older_vae": True,
        "prediction": "epsilon",
    },
    "sd2": {  # linear layers around them, heads of one width
        "unet": dict(
            in_channels=4, out_channels=4, sample_size=16, layers_per_block=2,
            block_out_channels=[32, 64, 64],
            down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"], cross_attention_dim=32,
            attention_head_dim=[2, 4, 4], use_linear_projection=True,
        ),
        "text": dict(hidden_size=32, hidden_act="gelu", **TEXT),
        "padding": 0,
        "older_vae": False,
        "prediction": "v_prediction",
    },
}  # fmt: skip
JSON = {"model_index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def listing(folder: Path) -> list[str]:
    """The files in a folder and below it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def older_name(name: str) -> str:
    """A tensor of an autoencoder as diffusers named it before 0.18."""
    for new, old in OLDER.items():
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return name


def refill(path: Path, rename=lambda name: name) -> dict[str, list[int]]:
    """Fill a file of weights from the names in it, renamed before; returns names and shapes."""
    shapes = {rename(name): list(value.shape) for name, value in load_file(path).items()}
    weights = {name: torch.from_numpy(named_weight(name, tuple(shape))) for name, shape in shapes.items()}
    save_file(weights, path, metadata={"format": "pt"})
    return shapes


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer with a few words."""
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(VOCABULARY)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)


def token_ids(tokenizer: CLIPTokenizer, padding: int) -> torch.Tensor:
    """The captions as int64 [B, LENGTH]."""
    rows = tokenizer(CAPTIONS)["input_ids"]
    return torch.tensor([row + [padding] * (LENGTH - len(row)) for row in rows])


@torch.no_grad()
def record(name: str, case: dict, folder: Path) -> dict:
    """Save one pipeline, fill it, read it back with diffusers, run its parts; what the index says of it."""
    tokenizer = make_tokenizer(folder)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE), text_encoder=CLIPTextModel(CLIPTextConfig(**case["text"])),
        tokenizer=tokenizer, unet=UNet2DConditionModel(**case["unet"]),
        scheduler=DDIMScheduler(**SCHEDULER, prediction_type=case["prediction"]), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "saved")
    saved = folder / "saved"
    state = {
        "unet": refill(saved / "unet/diffusion_pytorch_model.safetensors"),
        "vae": refill(
            saved / "vae/diffusion_pytorch_model.safetensors", older_name if case["older_vae"] else str
        ),
        "text_encoder": refill(saved / "text_encoder/model.safetensors"),
    }
    read = StableDiffusionPipeline.from_pretrained(saved, safety_checker=None)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 16, 16, generator=random)
    context = torch.randn(2, 5, case["unet"]["cross_attention_dim"], generator=random)
    picture = torch.rand(1, 3, 32, 32, generator=random) * 2 - 1
    z = torch.randn(1, 4, 8, 8, generator=random)
    t = torch.tensor([10, 700])
    ids = token_ids(tokenizer, case["padding"])
    posterior = read.vae.encode(picture).latent_dist
    arrays = {
        "x": x, "t": t, "context": context, "picture": picture, "z": z, "ids": ids,
        "noise": read.unet(x, t, context).sample, "mean": posterior.mean, "logvar": posterior.logvar,
        "decoded": read.vae.decode(z).sample, "text": read.text_encoder(ids).last_hidden_state,
        "betas": read.scheduler.betas,
    }  # fmt: skip
    np.savez_compressed(HERE / f"{name}.npz", **{key: value.numpy() for key, value in arrays.items()})
    described = {key: json.loads((saved / path).read_text()) for key, path in JSON.items()}
    return {"state": state, "files": listing(saved), "text": case["text"], **described}


def other_forms(folder: Path) -> dict[str, list[str]]:
    """The names of the files that each part has when it is saved in another form."""
    unet, text = (
        UNet2DConditionModel(**CASES["sd1"]["unet"]),
        CLIPTextModel(CLIPTextConfig(**CASES["sd1"]["text"])),
    )
    forms = {
        "unet_sharded": (unet, dict(max_shard_size="1MB")),
        "unet_half": (unet, dict(variant="fp16")),
        "unet_half_sharded": (unet, dict(variant="fp16", max_shard_size="1MB")),
        "unet_pickled": (unet, dict(safe_serialization=False)),
        "text_encoder_sharded": (text, dict(max_shard_size="20KB")),
        "text_encoder_half": (text, dict(variant="fp16")),
        "text_encoder_half_sharded": (text, dict(variant="fp16", max_shard_size="20KB")),
    }  # fmt: skip
    for form, (model, options) in forms.items():
        model.save_pretrained(folder / form, **options)
    return {form: listing(folder / form) for form in forms}


def main():
    """Write the fixture."""
    versions = {package.__name__: package.__version__ for package in (diffusers, transformers, torch)}
    index = {"versions": versions, "captions": CAPTIONS, "vocabulary": VOCABULARY, "merges": MERGES}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            index[name] = record(name, case, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        index["forms"] = other_forms(Path(folder))
    (HERE / "index.json").write_text(json.dumps(index) + "\n")


if __name__ == "__main__":
    main()
