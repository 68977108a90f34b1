"""Training of one diffusion, on images (DDPM) or on latents (LatentDiffusion); interface and state-dict
keys: latent-diffusion, ldm/models/diffusion/ddpm.py.

The process is guided_diffusion's (schedule.py); conditioning.py, first_stage.py and log_images.py hold what
else upstream has in this class.
"""

import logging
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from guided_diffusion.errors import UserValueError
from guided_diffusion.nn import mean_flat
from guided_diffusion.seeding import PerSample
from ldm.models.diffusion.conditioning import Conditioning, resolve_key
from ldm.models.diffusion.first_stage import FirstStageCoding, channels_first, from_batch
from ldm.models.diffusion.log_images import ImageLogging
from ldm.models.diffusion.process import LatentProcess, Process
from ldm.models.diffusion.schedule import Velocity, elbo_weights, make_diffusion, min_snr_weights, tables
from ldm.models.diffusion.training import DiffusionTraining
from ldm.models.diffusion.weights import StartingWeights
from ldm.models.diffusion.wrapper import DiffusionWrapper
from ldm.modules.diffusionmodules.util import make_beta_schedule
from ldm.modules.ema import LitEma
from ldm.util import count_params

__all__ = ["DDPM", "DiffusionWrapper", "LatentDiffusion"]

_logger = logging.getLogger(__name__)


class DDPM(Process, Velocity, StartingWeights, DiffusionTraining):
    """Gaussian diffusion of images.

    unet_config: of the network; timesteps, beta_schedule, linear_start, linear_end, cosine_s, given_betas:
    the noise schedule; parameterization: what the network predicts, eps, x0 or v; loss_type: l2 or l1;
    l_simple_weight, original_elbo_weight: of the plain and of the bound's weighting of the squared error;
    min_snr_gamma: weight the plain error by min-SNR (schedule.min_snr_weights) with this gamma, usually 5;
    learn_logvar, logvar_init: log variance of the error at each timestep, learned or fixed; use_ema: keep a
    moving average; ucg_training: {batch key: {p, val}}, conditioning that is replaced by `val` with
    probability p; scheduler_config: of the learning rate; monitor: the metric by which checkpoints are kept;
    ckpt_path, ignore_keys, load_only_unet: weights to start from; log_every_t: of the images kept while
    sampling. Training needs the attribute `learning_rate`. UserValueError for unknown or contradicting values.
    """

    def __init__(
        self,
        unet_config,
        timesteps=1000,
        beta_schedule="linear",
        loss_type="l2",
        ckpt_path=None,
        ignore_keys=(),
        load_only_unet=False,
        monitor="val/loss",
        use_ema=True,
        first_stage_key="image",
        image_size=256,
        channels=3,
        log_every_t=100,
        clip_denoised=True,
        linear_start=1e-4,
        linear_end=2e-2,
        cosine_s=8e-3,
        given_betas=None,
        original_elbo_weight=0.0,
        v_posterior=0.0,
        l_simple_weight=1.0,
        conditioning_key=None,
        parameterization="eps",
        scheduler_config=None,
        use_positional_encodings=False,
        learn_logvar=False,
        logvar_init=0.0,
        ucg_training=None,
        min_snr_gamma=None,
    ):
        super().__init__()
        if loss_type not in ("l1", "l2"):
            raise UserValueError(f"unknown loss_type {loss_type!r}: choose l1 or l2")
        if v_posterior or use_positional_encodings:
            raise UserValueError("v_posterior other than 0 and use_positional_encodings are not supported")
        self.parameterization, self.loss_type = parameterization, loss_type
        self.first_stage_key, self.channels = first_stage_key, channels
        self.image_size = image_size if isinstance(image_size, int) else tuple(image_size)
        self.log_every_t, self.clip_denoised = log_every_t, clip_denoised
        self.original_elbo_weight, self.l_simple_weight = original_elbo_weight, l_simple_weight
        self.scheduler_config, self.ucg_training = scheduler_config, dict(ucg_training or {})
        if monitor is not None:
            self.monitor = monitor
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise UserValueError(f"min_snr_gamma must be positive, or null for none, not {min_snr_gamma}")
        self.min_snr_gamma = min_snr_gamma
        self.register_schedule(given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        logvar = torch.full((self.num_timesteps,), float(logvar_init))
        self.learn_logvar = learn_logvar
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        count_params(self.model, verbose=True)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self.model)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, only_model=load_only_unet)

    # The process

    def register_schedule(
        self,
        given_betas=None,
        beta_schedule="linear",
        timesteps=1000,
        linear_start=1e-4,
        linear_end=2e-2,
        cosine_s=8e-3,
    ):
        """Make `diffusion`, and its tables as buffers under upstream's names."""
        if given_betas is None:
            betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        else:
            betas = np.asarray(given_betas, dtype=np.float64)
        self.diffusion = make_diffusion(betas, self.parameterization)
        self.num_timesteps = self.diffusion.num_timesteps
        for name, table in tables(self.diffusion).items():
            self.register_buffer(name, table)
        weights = elbo_weights(self.diffusion, self.parameterization)
        self.register_buffer("lvlb_weights", weights, persistent=False)
        simple = torch.ones_like(weights)
        if self.min_snr_gamma is not None:
            simple = min_snr_weights(self.diffusion, self.parameterization, self.min_snr_gamma)
        self.register_buffer("simple_weights", simple, persistent=False)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what is diffused."""
        size = self.image_size
        return (self.channels, *(size if isinstance(size, tuple) else (size, size)))

    def q_sample(self, x_start, t, noise=None):
        """x_t of x_0 [B, C, H, W] at t int64 [B]."""
        return self.diffusion.q_sample(x_start, t, noise)

    def apply_model(self, x_noisy, t, cond=None):
        """The network's output at x_t, conditioned on `cond` (see Conditioning.as_conditioning)."""
        return self.model(x_noisy, t, **dict(cond or {}))

    # Loss

    def get_loss(self, pred, target, mean=True):
        """The squared or absolute error; its mean, or elementwise."""
        error = (target - pred).abs() if self.loss_type == "l1" else (target - pred) ** 2
        return error.mean() if mean else error

    def get_target(self, x_start, t, noise):
        """What the network is to predict: noise, x_0 or v."""
        if self.parameterization == "v":
            return self.get_v(x_start, noise, t)
        return noise if self.parameterization == "eps" else x_start

    def loss_terms(self, x_start, cond, t, noise, random, batch) -> dict[str, torch.Tensor]:
        """`simple`, the error of the prediction [B], and terms to be added to the loss; here there are none.

        batch: the data, for what further terms need.
        """
        output = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        target = self.get_target(x_start, t, noise)
        return {"simple": mean_flat(self.get_loss(output.float(), target, mean=False))}

    def p_losses(self, x_start, cond, t, noise, random=None, batch=None):
        """(loss, terms to log) at timesteps t int64 [B] of x_0 [B, C, H, W]."""
        prefix = "train" if self.training else "val"
        terms = self.loss_terms(x_start, cond, t, noise, random, batch)
        simple = terms.pop("simple")
        log = {f"{prefix}/loss_simple": simple.mean()}
        logvar = self.logvar[t]
        loss = self.simple_weights[t] * simple / logvar.exp() + logvar
        if self.learn_logvar:
            log |= {f"{prefix}/loss_gamma": loss.mean(), "logvar": self.logvar.mean()}
        loss = self.l_simple_weight * loss.mean()
        vlb = (self.lvlb_weights[t] * simple).mean()
        log[f"{prefix}/loss_vlb"] = vlb
        loss = loss + self.original_elbo_weight * vlb
        for name, (value, weight) in terms.items():
            log[f"{prefix}/{name}"] = value.mean()
            loss = loss + weight * value.mean()
        log[f"{prefix}/loss"] = loss
        return loss, {name: value.detach() for name, value in log.items()}

    def get_input(self, batch: Mapping, k: str, random: PerSample | None = None):
        """(what is diffused, [B, C, H, W]; conditioning) of a batch."""
        return channels_first(from_batch(batch, k, "first_stage_key")), {}

    def shared_step(self, batch: Mapping, random: PerSample):
        """(loss, terms to log) of a batch; all that is random comes from `random`."""
        x, cond = self.get_input(batch, self.first_stage_key, random)
        t = random.randint(self.num_timesteps).to(x.device)
        return self.p_losses(x, cond, t, random.randn_like(x), random, batch)


class LatentDiffusion(ImageLogging, LatentProcess, Conditioning, FirstStageCoding, DDPM):
    """Diffusion of a first stage's latents, with conditioning (Rombach et al. 2022).

    first_stage_config: of the autoencoder, which is frozen; cond_stage_config: of the conditioner, or
    `__is_first_stage__`, `__is_unconditional__`; cond_stage_key: what the conditioner reads of a batch;
    cond_stage_trainable: train it too; cond_stage_forward: its method to call; conditioning_key: see
    DiffusionWrapper, without one concat_mode chooses concat or crossattn; concat_keys: images and masks of
    the batch that are put beside the latent (conditioning_key hybrid); scale_factor: latents are multiplied
    by it; scale_by_std: measure it on the first batch. image_size and channels are the latent's; other
    arguments as in DDPM.
    """

    def __init__(
        self,
        first_stage_config,
        cond_stage_config,
        num_timesteps_cond=None,
        cond_stage_key="image",
        cond_stage_trainable=False,
        concat_mode=True,
        cond_stage_forward=None,
        conditioning_key=None,
        scale_factor=1.0,
        scale_by_std=False,
        concat_keys=(),
        *args,
        ckpt_path=None,
        ignore_keys=(),
        load_only_unet=False,
        **kwargs,
    ):
        key = resolve_key(cond_stage_config, conditioning_key, concat_mode)
        super().__init__(*args, conditioning_key=key, **kwargs)
        if num_timesteps_cond not in (None, 1):
            raise UserValueError("noise on the conditioning (num_timesteps_cond above 1) is not supported")
        if scale_by_std and scale_factor != 1:
            raise UserValueError("scale_by_std measures the scale: leave scale_factor at 1")
        if concat_keys and key not in ("hybrid", "hybrid-adm"):
            raise UserValueError(f"concat_keys need the conditioning_key hybrid, not {key}")
        self.clip_denoised = False  # latents are not bounded
        self.cond_stage_key, self.concat_keys = cond_stage_key, tuple(concat_keys)
        self.cond_stage_trainable, self.cond_stage_forward = cond_stage_trainable, cond_stage_forward
        self.scale_by_std, self._scale_known = scale_by_std, not scale_by_std
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(1.0))
        else:
            self.scale_factor = scale_factor
        self._pretrained = [
            name
            for name, config in (
                ("first_stage_model.", first_stage_config),
                ("cond_stage_model.", cond_stage_config),
            )
            if isinstance(config, Mapping) and "ckpt_path" in (config.get("params") or {})
        ]
        self.instantiate_first_stage(first_stage_config)
        self.instantiate_cond_stage(cond_stage_config)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, only_model=load_only_unet)

    def train(self, mode=True):
        """Training mode for what is trained: the first stage and a frozen conditioner stay as they are."""
        super().train(mode)
        self.first_stage_model.eval()
        if self.cond_stage_model is not None and not self.cond_stage_trainable:
            self.cond_stage_model.eval()
        return self

    def get_input(self, batch, k, random=None):
        """(scaled latents [B, c, h, w], drawn by `random`; learned conditioning) of a batch."""
        z = self.latents(batch, k, random)
        if tuple(z.shape[1:]) != self.latent_shape:
            raise UserValueError(
                f"the latents are {list(z.shape[1:])}, the configuration says {list(self.latent_shape)} "
                "(channels, image_size): check it, and the size of the images"
            )
        return z, self.get_learned_conditioning(self.raw_conditioning(batch, random))

    def apply_model(self, x_noisy, t, cond=None):
        return self.model(x_noisy, t, **self.as_conditioning(cond))

    def on_train_batch_start(self, batch, batch_idx):
        """Measures the scale before the first update, unless a checkpoint knew it."""
        if not self._scale_known and self.global_step == 0:
            random = self.batch_random(batch, batch_idx)
            self.scale_factor.fill_(1.0)
            self.measure_scale(self.latents(batch, self.first_stage_key, random))
        self._scale_known = True

    def on_load_checkpoint(self, checkpoint):
        """Lightning calls this when it resumes."""
        self._scale_known = True

    def init_from_ckpt(self, path, ignore_keys=(), only_model=False):
        super().init_from_ckpt(path, ignore_keys, only_model)
        self._scale_known = not self.scale_by_std or bool(self.scale_factor != 1)

    def adapt_weights(self, weights):
        """See DDPM; a conditioner may know other forms of its weights (`adapt_weights` of its own)."""
        adapt = getattr(self.cond_stage_model, "adapt_weights", None)
        if adapt is None:
            return weights
        prefix = "cond_stage_model."
        own = {name.removeprefix(prefix): v for name, v in weights.items() if name.startswith(prefix)}
        others = {name: value for name, value in weights.items() if not name.startswith(prefix)}
        return others | {prefix + name: value for name, value in adapt(own).items()}

    def optional_weights(self, weights, prefix):
        """Beside DDPM's: parts that come with weights of their own, if the file has nothing of them."""
        parts = [*self._pretrained, *([] if self.cond_stage_trainable else ["cond_stage_model."])]
        absent = (part for part in parts if not any(name.startswith(part) for name in weights))
        return (*super().optional_weights(weights, prefix), *absent)

    def trained_parameters(self):
        trained = super().trained_parameters()
        return [*trained, *self.cond_stage_model.parameters()] if self.cond_stage_trainable else trained
