"""Encode all images of a latent diffusion's data once, so that training does not run the first stage.

    python scripts/cache_latents.py --config configs/translation/camvid-small.yaml --ckpt first_stage.ckpt \
        --out runs/latents/train --flips data.params.train.params.images.params.root=camvid

The configuration is that of the model to be trained: its first stage and the dataset `--split` of its `data`; where
that is ldm.data.latents.CachedLatents already, the images under its `images`. They are cached without random
crops or flips. Stopped at any point, the same command continues and leaves the same files. Prints (and stores) the
scale of the latents, for scale_factor. name=value sets any other entry of the configuration.
"""

from guided_diffusion import flags
from guided_diffusion.errors import exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script."""
    own = flags.Parser(__doc__)
    own.add(
        "--config",
        required=True,
        action="append",
        group="model",
        path="source",
        help="configuration of the latent diffusion (.yaml); of several, later ones win",
    )
    own.add(
        "--ckpt",
        default="",
        group="model",
        path="source",
        unset="what the configuration names as ckpt_path",
        help="the first stage's weights",
    )
    own.add("--out", required=True, help="the folder of the cache")
    own.add(
        "--split",
        default="train",
        group="data",
        help="which entry of the configuration's data: train, validation, test",
    )
    own.add("--flips", action="store_true", group="data", help="store every image flipped left-right as well")
    own.add(
        "--representations",
        action="store_true",
        group="data",
        help="store what the model's extractors (model.params.extractors) make of every item's first image",
    )
    own.add(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        group="results",
        help="number format of the latents",
    )
    own.add(
        "--shard_size",
        default=1024,
        low=1,
        group="results",
        help="images in a file: what is lost at most when stopped",
    )
    own.add("--batch_size", default=8, help="images of a step of the first stage")
    own.add("--num_workers", default=0)
    own.add("--device")
    own.add("changes", nargs="*", metavar="name=value", help="entries of the configuration")
    return own


@exit_on_user_error()
def main():
    args = parser().parse_args()
    from guided_diffusion import dist_util
    from guided_diffusion.progress import tqdm
    from ldm import inference
    from ldm.data.cached_parts import open_extractors, open_first_stage
    from ldm.data.latent_cache import fill_cache
    from ldm.data.latents import open_images

    args.device = args.device or dist_util.dev()
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


if __name__ == "__main__":
    main()
