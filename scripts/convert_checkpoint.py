"""Checkpoints in and out: ADM's into a joint model, a joint model into ADM's, .pt into .safetensors and
back.

    python scripts/convert_checkpoint.py 64x64_diffusion.pt runs/from_adm/model000000.pt --to joint \\
        --modalities masked:X,label:X (and the flags that ADM's model was trained with)
    python scripts/convert_checkpoint.py runs/mine single.pt --to adm
    python scripts/convert_checkpoint.py runs/mine mine.safetensors --to joint

The first begins with ADM's weights and fresh heads; mt_image_train.py --init_from goes on from it. The
second drops the heads and the input channels of X modalities, and writes the flags for ADM's scripts into
single.flags. A source that is already what --to asks for changes its file format alone. safetensors files
carry the model's flags.
"""

import argparse

from guided_diffusion import flags
from guided_diffusion.errors import UserValueError, exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script; those of the model have no defaults, so that the source's own stay."""
    own = flags.Parser(__doc__)
    own.add(
        "source",
        path="source",
        help="a run folder, a checkpoint*.pt, a model*.pt or ema_*.pt, a .safetensors",
    )
    own.add("target", help="a name that ends in .pt or .safetensors")
    own.add("--to", choices=("joint", "adm"), required=True, group="results", help="what to write")
    own.add("--weights", default="ema")
    names = {**flags.model_and_diffusion_defaults(), **flags.mt_defaults()}
    others = {name: dict(unset="the source's") for name in names}
    others["class_cond"] = dict(help="--to adm: keep the classes", unset="if the source sees the label")
    own.add_flags(names, **others)
    for action in own._actions:
        if action.dest in names:
            action.default, action.help = argparse.SUPPRESS, action.flag.told(argparse.SUPPRESS)
    return own


@exit_on_user_error()
def main():
    args = vars(parser().parse_args())
    from guided_diffusion.mt import conversion

    source, target, kind, weights = (args.pop(name) for name in ("source", "target", "to", "weights"))
    package = conversion.read(source, weights)
    if package.task is None and kind == "joint" and "modalities" not in args:
        raise UserValueError(
            f"{source} does not say which modalities to add: give --modalities, as masked:X,label:U"
        )
    if package.task == kind:
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
