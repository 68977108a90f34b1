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

from guided_diffusion.errors import UserValueError, exit_on_user_error
from guided_diffusion.mt import conversion
from guided_diffusion.mt.model import mt_defaults
from guided_diffusion.script_util import add_dict_to_argparser, model_and_diffusion_defaults, str2bool


def parser() -> argparse.ArgumentParser:
    """The flags of this script; those of the model have no defaults, so that the source's own stay."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flags.add_argument(
        "source", help="a run folder, a checkpoint*.pt, a model*.pt or ema_*.pt, a .safetensors"
    )
    flags.add_argument("target", help="a name that ends in .pt or .safetensors")
    flags.add_argument("--to", choices=conversion.KINDS, required=True)
    flags.add_argument("--weights", default="ema", help="of a complete checkpoint: ema, a rate, or model")
    model = flags.add_argument_group("the model, where the source does not describe it")
    names = {
        k: v for k, v in {**model_and_diffusion_defaults(), **mt_defaults()}.items() if k != "class_cond"
    }
    add_dict_to_argparser(model, names)
    model.add_argument(
        "--class_cond", type=str2bool, help="--to adm: keep the classes (default: if it saw the label)"
    )
    for action in flags._actions:
        if action.dest in names or action.dest == "class_cond":
            action.default = argparse.SUPPRESS
    return flags


@exit_on_user_error()
def main():
    args = vars(parser().parse_args())
    source, target, kind, weights = (args.pop(name) for name in ("source", "target", "to", "weights"))
    package = conversion.read(source, weights)
    if package.kind is None and kind == "joint" and "modalities" not in args:
        raise UserValueError(
            f"{source} does not say which modalities to add: give --modalities, as masked:X,label:U"
        )
    if package.kind == kind:
        if args:
            raise UserValueError(f"{source} describes itself: leave out --{', --'.join(args)}")
    elif kind == "joint":
        package, fresh = conversion.from_adm(package, args)
        print(f"fresh, to be trained: {', '.join(fresh) or 'nothing'}")
    else:
        given = set(args) - {"class_cond"}
        if package.kind is None or given:
            problem = f"--{', --'.join(given)} cannot change it" if given else "it describes no joint model"
            raise UserValueError(f"{source} cannot be written as ADM's: {problem}")
        package = conversion.to_adm(package, args.get("class_cond"))
        print(f"flags for ADM's scripts: {conversion.adm_words(package.flags)}")
        for obstacle in conversion.obstacles(package.flags):
            print(f"before upstream itself can load it: {obstacle}")
    print("written: " + ", ".join(conversion.write(package, target)))


if __name__ == "__main__":
    main()
