"""Take the classifier out of a model of mt_image_train.py (head `classifier`) as a file of ADM's own scripts.

    python scripts/export_classifier.py --model_path runs/e --out classifier.pt
    python scripts/classifier_train.py --resume_checkpoint classifier.pt --data_dir ... FLAGS

The second command finetunes it on noised images; FLAGS, which describe its network, are printed by the first
and stand in classifier.yaml beside the file. It guides as any classifier: --classifier_path classifier.pt.
"""

import os

from guided_diffusion import flags
from guided_diffusion.errors import UserValueError, exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script."""
    own = flags.Parser(__doc__)
    own.add("--model_path", required=True, help="a run folder or a checkpoint, as of mt_image_sample.py")
    own.add("--weights", default="ema")
    own.add("--out", required=True, path="file", help="the file to write, such as classifier.pt")
    return own


@exit_on_user_error()
def main():
    args = parser().parse_args()
    if os.path.basename(args.out).startswith("checkpoint") or not args.out.endswith(".pt"):
        raise UserValueError("--out must end in .pt and not begin with checkpoint: it holds weights alone")
    from guided_diffusion.checkpoint_util import save_atomic
    from guided_diffusion.mt.model import JointModel, write_config

    model = JointModel.load(args.model_path, args.weights)
    label = next((m for m in model.modalities if m.head == "classifier"), None)
    if label is None:
        raise UserValueError(f"{args.model_path} has no classifier: its modalities have no head: classifier")
    network = {**label.classifier.flags, "num_classes": label.shape[0]}
    save_atomic(model.network.heads[label.name].state_dict(), args.out)
    write_config(network, os.path.splitext(args.out)[0] + ".yaml")
    given = {name: value for name, value in network.items() if value != ""}
    print(" ".join(f"--{name} {value}" for name, value in given.items()))


if __name__ == "__main__":
    main()
