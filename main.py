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

from pytorch_lightning.callbacks import LearningRateMonitor

from guided_diffusion.errors import exit_on_user_error
from ldm.training.callbacks import CUDACallback, ImageLogger, SetupCallback
from ldm.training.cli import main
from ldm.training.data import DataModuleFromConfig, WrappedDataset

# Configurations name these as main.NAME.
__all__ = [
    "CUDACallback",
    "DataModuleFromConfig",
    "ImageLogger",
    "LearningRateMonitor",
    "SetupCallback",
    "WrappedDataset",
]

if __name__ == "__main__":
    with exit_on_user_error():
        main()
