"""Train an autoencoder or a latent diffusion model (interface: CompVis/latent-diffusion, main.py).

    python main.py --base configs/autoencoder/kl-f4-small.yaml -t
    python main.py --base CONFIG... -t --devices 4 --precision bf16-mixed data.params.batch_size=8
    python main.py --resume logs/RUN -t                      # or a checkpoint in logs/RUN/checkpoints
    torchrun --nproc_per_node 4 main.py --base CONFIG -t --devices 4 --strategy ddp

A run lives in logs/<time>_<name>: configs/, checkpoints/ (last.ckpt, and the best by the model's `monitor`),
images/, tensorboard/ (in place of upstream's testtube, which is no longer maintained). `kill -USR1` saves,
SIGTERM, Ctrl-C and a closed terminal save and stop; a resumed run continues exactly: weights, optimizers, moving average, random
numbers, position in the data.
"""

import importlib
import sys

from guided_diffusion.errors import exit_on_user_error
from ldm.training.flags import parse

# Configurations name these as main.NAME.
_NAMES = {
    "CUDACallback": "ldm.training.callbacks",
    "DataModuleFromConfig": "ldm.training.data",
    "ImageLogger": "ldm.training.callbacks",
    "LearningRateMonitor": "pytorch_lightning.callbacks",
    "SetupCallback": "ldm.training.callbacks",
    "WrappedDataset": "ldm.training.data",
}


def __getattr__(name):
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_NAMES[name]), name)


if __name__ == "__main__":
    with exit_on_user_error():
        parse(sys.argv[1:])  # --help and mistakes need no Lightning, whose import takes seconds
        from ldm.training.cli import main

        main()
