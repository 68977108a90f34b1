"""Encode all images of a latent diffusion's data once, so that training does not run the first stage.

    python scripts/cache_latents.py --config configs/translation/camvid-small.yaml --ckpt first_stage.ckpt \
        --out runs/latents/train --flips data.params.train.params.images.params.root=camvid

The configuration is that of the model to be trained: its first stage and the dataset `--split` of its `data`; where
that is ldm.data.latents.CachedLatents already, the images under its `images`. They are cached without random
crops or flips; --flips stores every image flipped as well. --representations stores, beside the latents, what the
encoders of the configuration's model.params.extractors (by name: target, params) make of every item's first image.
Stopped at any point, the same command continues and leaves the same files. Prints (and stores) the scale of the
latents, for scale_factor. name=value sets any other entry of the configuration.
"""

import argparse

import torch
from tqdm import tqdm

from guided_diffusion.errors import UserValueError, exit_on_user_error
from ldm import inference
from ldm.checkpoint import load_weights
from ldm.data.latent_cache import DTYPES, fill_cache
from ldm.data.latents import first_stage_weights, open_images
from ldm.util import instantiate_from_config


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = flags.add_argument
    add(
        "--config",
        required=True,
        action="append",
        help="of the latent diffusion (.yaml); of several, later ones win",
    )
    add(
        "--ckpt",
        default="",
        help="the first stage's weights (default: what the configuration names as ckpt_path)",
    )
    add("--out", required=True, help="the folder of the cache")
    add("--split", default="train", help="train, validation or test: which entry of the configuration's data")
    add("--flips", action="store_true", help="store every image flipped left-right as well")
    add(
        "--representations",
        action="store_true",
        help="store what the model's extractors make of the images",
    )
    add("--dtype", choices=list(DTYPES), default="float32")
    add("--shard_size", type=int, default=1024, help="images in a file: what is lost at most when stopped")
    add("--batch_size", type=int, default=8)
    add("--num_workers", type=int, default=0, help="processes that read images")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("changes", nargs="*", metavar="name=value", help="entries of the configuration")
    return flags


@exit_on_user_error()
def main():
    args = parser().parse_args()
    config = inference.merged_config(args.config, args.changes)
    first_stage = open_first_stage(config, args.ckpt).to(args.device)
    extractors = open_extractors(config) if args.representations else {}
    images = open_images(config, args.split)
    index = fill_cache(
        images,
        first_stage,
        args.out,
        args.flips,
        args.dtype,
        args.shard_size,
        args.batch_size,
        args.num_workers,
        lambda shards: tqdm(shards, desc="shards", dynamic_ncols=True),
        {name: encoder.to(args.device) for name, encoder in extractors.items()},
    )
    told = ", ".join(f"{key} {scale:.6g}" for key, scale in index.scale_factor.items())
    beside = f" with {', '.join(index.representations)}" if index.representations else ""
    print(f"{len(index.items)} items{beside} in {args.out}; scale_factor (1 / standard deviation): {told}")


def open_first_stage(config: dict, ckpt: str) -> torch.nn.Module:
    """The first stage of a configuration with its weights. UserError where one of the two is missing."""
    try:
        params = dict(config["model"]["params"]["first_stage_config"])
    except (KeyError, TypeError):
        raise UserValueError("the configuration has no model.params.first_stage_config") from None
    if ckpt:
        params["params"] = {k: v for k, v in params.get("params", {}).items() if k != "ckpt_path"}
    first_stage = instantiate_from_config(params, torch.nn.Module, "first_stage_config")
    if ckpt:
        optional = ("loss.", "model_ema.", "colorize")
        load_weights(first_stage, first_stage_weights(ckpt), ckpt, optional=optional)
    elif list(first_stage.parameters()) and not params.get("params", {}).get("ckpt_path"):
        raise UserValueError("which weights does the first stage have? Give --ckpt")
    return first_stage.eval().requires_grad_(False)


def open_extractors(config: dict) -> dict[str, torch.nn.Module]:
    """The encoders of representations of a configuration, by name. UserError where there are none."""
    found = config["model"]["params"].get("extractors")
    if not isinstance(found, dict) or not found:
        raise UserValueError("the configuration has no model.params.extractors, which make representations")
    return {
        name: instantiate_from_config(given, torch.nn.Module, f"extractors.{name}")
        .eval()
        .requires_grad_(False)
        for name, given in found.items()
    }


if __name__ == "__main__":
    main()
