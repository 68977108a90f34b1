"""Take the classifier out of a model of mt_image_train.py (head `classifier`) as a file of ADM's own scripts.

    python scripts/export_classifier.py --model_path runs/e --out classifier.pt
    python scripts/classifier_train.py --resume_checkpoint classifier.pt --data_dir ... FLAGS

The second command finetunes it on noised images; FLAGS, which describe its network, are printed by the first
and stand in classifier.yaml beside the file. It guides as any classifier: --classifier_path classifier.pt.
"""

import argparse
import os

from guided_diffusion.checkpoint_util import save_atomic
from guided_diffusion.errors import UserValueError, exit_on_user_error
from guided_diffusion.mt.model import JointModel, write_config


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flags.add_argument("--model_path", required=True, help="as of mt_image_sample.py")
    flags.add_argument("--weights", default="ema", help="ema, a rate such as 0.9999, or model")
    flags.add_argument("--out", required=True, help="the file to write, such as classifier.pt")
    return flags


@exit_on_user_error()
def main():
    args = parser().parse_args()
    model = JointModel.load(args.model_path, args.weights)
    label = next((m for m in model.modalities if m.head == "classifier"), None)
    if label is None:
        raise UserValueError(f"{args.model_path} has no classifier: its modalities have no head: classifier")
    if os.path.basename(args.out).startswith("checkpoint") or not args.out.endswith(".pt"):
        raise UserValueError("--out must end in .pt and not begin with checkpoint: it holds weights alone")
    flags = {**label.classifier.flags, "num_classes": label.shape[0]}
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    save_atomic(model.network.heads[label.name].state_dict(), args.out)
    write_config(flags, os.path.splitext(args.out)[0] + ".yaml")
    given = {name: value for name, value in flags.items() if value != ""}
    print(" ".join(f"--{name} {value}" for name, value in given.items()))


if __name__ == "__main__":
    main()
