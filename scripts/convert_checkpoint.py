"""Checkpoints in and out: ADM's, joint models', diffusers' folders, .pt and .safetensors.

    python scripts/convert_checkpoint.py 64x64_diffusion.pt runs/from_adm/model000000.pt --to joint \\
        --modalities masked:X,label:X (and the flags that ADM's model was trained with)
    python scripts/convert_checkpoint.py runs/mine single.pt --to adm
    python scripts/convert_checkpoint.py runs/mine mine.safetensors --to joint
    python scripts/convert_checkpoint.py runs/mine folder --to diffusers        # a UNet2DModel
    python scripts/convert_checkpoint.py logs/RUN folder --to diffusers         # of main.py
    python scripts/convert_checkpoint.py v1.ckpt folder --to diffusers --config configs/stable-diffusion/v1-inference.yaml

The first has fresh heads, for mt_image_train.py --init_from. The second drops heads and X inputs, and writes ADM's
flags into single.flags. diffusers drops the heads too; a UNet2DModel's folder is also a source. If the source
already is what --to asks for, only the file format changes.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from guided_diffusion import flags
from guided_diffusion.errors import UserValueError, exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script; those of the model have no defaults, so that the source's own stay."""
    own = flags.Parser(__doc__)
    own.add(
        "source",
        path="source",
        help="a run folder, a checkpoint*.pt, a model*.pt or ema_*.pt, a .safetensors, a .ckpt, diffusers' folder",
    )
    own.add("target", help="a name that ends in .pt or .safetensors; for diffusers a folder")
    own.add(
        "--to", choices=("joint", "adm", "diffusers"), required=True, group="results", help="what to write"
    )
    own.add(
        "--config", default="", path="source", help="describes a latent diffusion model", unset="the run's"
    )
    own.add("--weights", default="ema")
    names = {**flags.model_and_diffusion_defaults(), **flags.mt_defaults()}
    others = {name: dict(unset="the source's") for name in names}
    others["class_cond"] = dict(help="--to adm: keep the classes", unset="if the source sees the label")
    own.add_flags(names, **others)
    for action in own._actions:
        if action.dest in names:
            action.default, action.help = argparse.SUPPRESS, action.flag.told(argparse.SUPPRESS)
    return own


def is_latent(source: str) -> bool:
    """Is it a run of main.py, or one of its checkpoints?"""
    run = Path(source) / "configs"
    return (
        source.endswith(".ckpt") or (Path(source) / "checkpoints").is_dir() or any(run.glob("*-project.yaml"))
    )


def write_latent(
    source: str, target: str, kind: str, weights: str, config: str, others: Mapping
) -> list[str]:
    """Write a latent diffusion model for diffusers; the names of the files."""
    from ldm import inference
    from ldm.diffusers_export import write_pipeline

    if kind != "diffusers":
        raise UserValueError(f"{source} is a latent diffusion model: it can be written --to diffusers only")
    if others:
        raise UserValueError(f"{source} is described by its configuration: leave out --{', --'.join(others)}")
    if weights not in ("ema", "model"):
        raise UserValueError(f"--weights {weights}: of a latent diffusion model ema or model")
    run, checkpoint = (None, source) if config else inference.locate(source)
    paths = [config] if config else inference.configurations(run)
    model = inference.load_model(inference.merged_config(paths), checkpoint)
    return write_pipeline(model, target, ema=weights == "ema")


@exit_on_user_error()
def main():
    args = vars(parser().parse_args())
    names = ("source", "target", "to", "weights", "config")
    source, target, kind, weights, config = (args.pop(name) for name in names)
    if config or is_latent(source):
        written = write_latent(source, target, kind, weights, config, args)
        print("written: " + ", ".join(written))
        return
    from guided_diffusion.mt import conversion

    package = conversion.read(source, weights)
    if package.task is None and kind == "joint" and "modalities" not in args:
        raise UserValueError(
            f"{source} does not say which modalities to add: give --modalities, as masked:X,label:U"
        )
    if kind == "diffusers":
        keep = args.pop("class_cond", None) if package.task == "joint" else None
        if package.task is not None and args:
            raise UserValueError(f"{source} describes itself: leave out --{', --'.join(args)}")
        package = conversion.to_diffusers(package, args, keep)
    elif package.task == kind:
        if args:
            raise UserValueError(f"{source} describes itself: leave out --{', --'.join(args)}")
    elif kind == "joint":
        package, fresh = conversion.from_adm(package, args)
        print(f"fresh, to be trained: {', '.join(fresh) or 'nothing'}")
    else:
        given = set(args) - {"class_cond"}
        if package.task is None or given:
            problem = f"--{', --'.join(given)} cannot change it" if given else "it describes no joint model"
            raise UserValueError(f"{source} cannot be written as ADM's: {problem}")
        package = conversion.to_adm(package, args.get("class_cond"))
        print(f"flags for ADM's scripts: {conversion.adm_words(package.flags)}")
        for obstacle in conversion.obstacles(package.flags):
            print(f"before upstream itself can load it: {obstacle}")
    print("written: " + ", ".join(conversion.write(package, target)))


if __name__ == "__main__":
    main()
