"""A classifier of noised latents, for guidance (interface and state-dict keys: latent-diffusion,
ldm/models/diffusion/classifier.py; Dhariwal & Nichol 2021, section 4)."""

from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch.optim.lr_scheduler import LambdaLR

from guided_diffusion.errors import UserFileError, UserValueError
from guided_diffusion.unet import EncoderUNetModel
from ldm.checkpoint import is_weightless, load_state_dict, load_weights
from ldm.models.diffusion.conditioning import channels_first, from_batch
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.base import frozen
from ldm.util import Schedule, instantiate_from_config, parameters

# What reads which labels: one for an image, or one for each position of the latent.
_NETWORKS = {"class_label": EncoderUNetModel, "segmentation": UNetModel}


class NoisyLatentImageClassifier(pl.LightningModule):
    """Labels of latents at any timestep of the diffusion that a run has trained.

    diffusion_path: folder of the run, whose newest configs/*-project.yaml holds the model; diffusion_ckpt_path: its
    weights, also of the first stage; num_classes: of label_key, class_label or segmentation (default: what the
    diffusion is conditioned on); ckpt_path: of this model's own; pool: of class labels, see EncoderUNetModel. Training
    needs the attribute `learning_rate`. UserFileError without a configuration, UserValueError for other labels.
    """

    def __init__(
        self,
        diffusion_path,
        num_classes,
        ckpt_path=None,
        pool="attention",
        label_key=None,
        diffusion_ckpt_path=None,
        scheduler_config=None,
        weight_decay=1e-2,
        log_steps=10,
        monitor="val/loss",
    ):
        super().__init__()
        configs = sorted(Path(diffusion_path).glob("configs/*-project.yaml"))
        if not configs:
            raise UserFileError(f"diffusion_path: {diffusion_path} has no configs/*-project.yaml")
        self.num_classes, self.monitor, self.log_steps = num_classes, monitor, log_steps
        self.scheduler_config, self.weight_decay = scheduler_config, weight_decay
        self.diffusion_config = OmegaConf.to_container(OmegaConf.load(configs[-1]).model, resolve=True)
        self.diffusion_config["params"]["ckpt_path"] = diffusion_ckpt_path
        self.diffusion_model = frozen(
            instantiate_from_config(self.diffusion_config, LatentDiffusion, "model")
        )
        self.label_key = label_key or self.diffusion_model.cond_stage_key
        if self.label_key not in _NETWORKS:
            raise UserValueError(
                f"label_key {self.label_key!r}: a classifier knows {' and '.join(_NETWORKS)}"
            )
        self.model = self._make_network(pool)
        if ckpt_path is not None and not is_weightless():
            self.init_from_ckpt(ckpt_path)

    def _make_network(self, pool):
        """The U-Net of the diffusion, or its encoder half, from latents to logits."""
        make, unet = _NETWORKS[self.label_key], self.diffusion_config["params"]["unet_config"]["params"]
        options = {**unet, "in_channels": unet["out_channels"], "out_channels": self.num_classes}
        if make is UNetModel:
            return make(**options)
        known = parameters(make)  # no context: transformers become attention
        return make(**{name: value for name, value in options.items() if name in known}, pool=pool)

    def train(self, mode=True):
        """Training mode for the classifier: the diffusion stays as it is."""
        super().train(mode)
        self.diffusion_model.eval()
        return self

    def init_from_ckpt(self, path, ignore_keys=(), only_model=False) -> None:
        """Take the weights of a file; only_model: of the network alone, by its own names."""
        module = self.model if only_model else self
        load_weights(module, load_state_dict(path), path, ignore_keys, optional=("diffusion_model.",))

    def get_x_noisy(self, x, t, noise=None):
        """x_t of latents x_0."""
        return self.diffusion_model.q_sample(x, t, noise)

    def forward(self, x_noisy, t, *args, **kwargs):
        """Logits [B, num_classes], or for each position of the latent [B, num_classes, h, w]."""
        return self.model(x_noisy, t)

    def get_input(self, batch, k):
        """batch[k], images [B, H, W, C], as [B, C, H, W]."""
        return channels_first(from_batch(batch, k, "images"))

    @torch.no_grad()
    def get_conditioning(self, batch, k=None):
        """Labels int64 [B], or a map [B, K, H, W] resized to the latent."""
        labels = from_batch(batch, k or self.label_key, "label_key").to(self.device)
        if self.label_key != "segmentation":
            return labels
        return F.interpolate(
            channels_first(labels), size=self.diffusion_model.latent_shape[1:], mode="nearest"
        )

    def compute_top_k(self, logits, labels, k, reduction="mean"):
        """Is the right class among the k likeliest? A share, or with the reduction `none` [B, ...] of 0 and 1."""
        right = (logits.topk(k, dim=1).indices == labels[:, None]).any(1).float()
        return right.mean().item() if reduction == "mean" else right

    def shared_step(self, batch, t=None):
        """(cross-entropy, logits, x_t, labels) of a batch at timestep t of all, else at random ones."""
        diffusion = self.diffusion_model
        x, *_ = diffusion.get_input(batch, diffusion.first_stage_key)
        labels = self.get_conditioning(batch)
        if labels.ndim == 4:
            labels = labels.argmax(1)
        steps = torch.randint(diffusion.num_timesteps, (len(x),), device=x.device)
        steps = steps if t is None else torch.full_like(steps, t)
        x_noisy = self.get_x_noisy(x, steps)
        logits = self(x_noisy, steps)
        return F.cross_entropy(logits, labels), logits, x_noisy, labels

    def _log_step(self, split, loss, logits, labels):
        log = {f"{split}/loss": loss.detach()}
        for k in {1, min(5, self.num_classes)}:
            log[f"{split}/acc@{k}"] = self.compute_top_k(logits.detach(), labels, k)
        self.log_dict(log, on_step=split == "train", on_epoch=True, batch_size=len(logits))

    def training_step(self, batch, batch_idx):
        loss, logits, _, labels = self.shared_step(batch)
        self._log_step("train", loss, logits, labels)
        return loss

    @torch.no_grad()
    def validation_step(self, batch, batch_idx):
        """Logs val/..., and the share that is right at every log_every_t-th timestep."""
        loss, logits, _, labels = self.shared_step(batch)
        self._log_step("val", loss, logits, labels)
        for t in range(0, self.diffusion_model.num_timesteps, self.diffusion_model.log_every_t):
            _, logits, _, labels = self.shared_step(batch, t)
            share = self.compute_top_k(logits, labels, 1)
            self.log(f"val/acc@1 at t={t}", share, on_step=False, on_epoch=True, batch_size=len(logits))
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        if self.scheduler_config is None:
            return optimizer
        schedule = instantiate_from_config(self.scheduler_config, Schedule, "scheduler_config").schedule
        return [optimizer], [{"scheduler": LambdaLR(optimizer, schedule), "interval": "step", "frequency": 1}]

    @torch.no_grad()
    def log_images(self, batch, N=8, *args, **kwargs):
        """The images [n, 3, H, W], n = min(N, B), as `inputs`."""
        return {"inputs": self.get_input(batch, self.diffusion_model.first_stage_key)[:N]}
