"""DDPM: one diffusion of images, how it is trained, and its steps under upstream's names (latent-diffusion,
ldm/models/diffusion/ddpm.py). The process is guided_diffusion's.
"""

import contextlib
import logging
import os
from collections.abc import Mapping

import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from guided_diffusion.errors import UserError, UserValueError
from guided_diffusion.mt.denoiser import JointDenoiser
from guided_diffusion.mt.modality_set import ModalitySet
from guided_diffusion.nn import mean_flat
from guided_diffusion.seeding import PerSample, derive_seed
from ldm.checkpoint import is_weightless, load_state_dict, load_weights
from ldm.diffusers_layout import parameterization as told_parameterization
from ldm.models.diffusion import sampling
from ldm.models.diffusion.conditioning import DiffusionWrapper, channels_first, from_batch
from ldm.models.diffusion.image_log import log_pixel_images
from ldm.models.diffusion.sampling import (
    TABLES,
    elbo_weights,
    make_diffusion,
    min_snr_weights,
    noise_betas,
    tables,
)
from ldm.modules.diffusionmodules.util import extract_into_tensor
from ldm.modules.ema import LitEma
from ldm.sharding import gathered, shard
from ldm.util import Schedule, count_params, instantiate_from_config

_logger = logging.getLogger(__name__)

# Streams of random numbers.
_TRAINING, _VALIDATION = 0, 1


class DDPM(pl.LightningModule):
    """Gaussian diffusion of images [B, C, H, W]; timesteps are int64 [B].

    What is random in training belongs to (seed, number of the batch, place in it), so that resuming changes
    nothing; `seed` is that of Lightning's seed_everything, else 0. Training needs the attribute
    `learning_rate`. UserValueError for unknown or contradicting values.
    """

    directions: tuple[str, ...] = ()  # what `network` takes beyond guidance
    _averaged = False  # is the average in place of the weights?

    def __init__(
        self,
        unet_config,  # of the network
        timesteps=1000,
        beta_schedule="linear",
        loss_type="l2",  # or l1
        ckpt_path=None,  # weights to start from, without
        ignore_keys=(),  # these prefixes
        load_only_unet=False,
        monitor="val/loss",  # the metric by which checkpoints are kept
        use_ema=True,  # keep a moving average
        first_stage_key="image",
        image_size=256,
        channels=3,
        log_every_t=100,  # of the images kept while sampling
        clip_denoised=True,
        linear_start=1e-4,
        linear_end=2e-2,
        cosine_s=8e-3,
        given_betas=None,
        original_elbo_weight=0.0,  # of the bound's weighting of the squared error
        v_posterior=0.0,
        l_simple_weight=1.0,  # of the plain squared error
        conditioning_key=None,
        parameterization="eps",  # what the network predicts: eps, x0 or v
        scheduler_config=None,  # of the learning rate
        use_positional_encodings=False,
        learn_logvar=False,  # log variance of the error at each timestep, learned or fixed at
        logvar_init=0.0,
        ucg_training=None,  # {batch key: {p, val}}: conditioning replaced by `val` with probability p
        min_snr_gamma=None,  # weight the plain error by min-SNR (sampling.min_snr_weights), usually 5
    ):
        super().__init__()
        if loss_type not in ("l1", "l2"):
            raise UserValueError(f"unknown loss_type {loss_type!r}: choose l1 or l2")
        if v_posterior or use_positional_encodings:
            raise UserValueError("v_posterior other than 0 and use_positional_encodings are not supported")
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise UserValueError(f"min_snr_gamma must be positive, or null for none, not {min_snr_gamma}")
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self.parameterization, self.loss_type = parameterization, loss_type
        self.first_stage_key, self.channels = first_stage_key, channels
        self.image_size = image_size if isinstance(image_size, int) else tuple(image_size)
        self.log_every_t, self.clip_denoised = log_every_t, clip_denoised
        self.original_elbo_weight, self.l_simple_weight = original_elbo_weight, l_simple_weight
        self.scheduler_config, self.ucg_training = scheduler_config, dict(ucg_training or {})
        self.min_snr_gamma, self.learn_logvar, self.use_ema = min_snr_gamma, learn_logvar, use_ema
        if monitor is not None:
            self.monitor = monitor
        self.register_schedule(given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        logvar = torch.full((self.num_timesteps,), float(logvar_init))
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        count_params(self.model, verbose=True)
        if use_ema:
            self.model_ema = LitEma(self.model)
        if ckpt_path is not None and not is_weightless():
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
        betas = noise_betas(given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s)
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
        """x_t of x_0."""
        return self.diffusion.q_sample(x_start, t, noise)

    def q_mean_variance(self, x_start, t):
        """(mean, variance, log variance) of q(x_t | x_0)."""
        return self.diffusion.q_mean_variance(x_start, t)

    def predict_start_from_noise(self, x_t, t, noise):
        """x_0 of x_t and its noise."""
        return self.diffusion._predict_xstart_from_eps(x_t, t, noise)

    def q_posterior(self, x_start, x_t, t):
        """(mean, variance, clipped log variance) of q(x_{t-1} | x_t, x_0)."""
        return self.diffusion.q_posterior_mean_variance(x_start, x_t, t)

    def _rotated(self, first, second, t, sign):
        """sqrt(abar_t) first + sign sqrt(1 - abar_t) second."""
        signal = extract_into_tensor(self.sqrt_alphas_cumprod, t, first.shape)
        noise = extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, first.shape)
        return signal * first + sign * noise * second

    def get_v(self, x, noise, t):
        """v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0."""
        return self._rotated(noise, x, t, -1)

    def predict_start_from_z_and_v(self, x_t, t, v):
        """x_0 = sqrt(abar_t) z_t - sqrt(1 - abar_t) v."""
        return self._rotated(x_t, v, t, -1)

    def predict_eps_from_z_and_v(self, x_t, t, v):
        """eps = sqrt(abar_t) v + sqrt(1 - abar_t) z_t."""
        return self._rotated(v, x_t, t, 1)

    # Sampling

    def as_conditioning(self, cond) -> dict:
        """Conditioning as a dict of the U-Net's inputs."""
        return dict(cond or {})

    def network(self, unconditional=None, scale=1.0, corrector=None, options=None) -> dict:
        """What `joint_sample` is told of this model: its network, and no modalities; arguments as GuidedModel's."""
        guided = sampling.GuidedModel(self, unconditional, scale, corrector, options)
        return {"modalities": ModalitySet([], self.channels), "network": guided}

    def _step(
        self, step, x, cond, t, clip_denoised, quantize=False, corrector=None, corrector_kwargs=None, **kwargs
    ) -> dict:
        """What a step of guided_diffusion's gives."""
        network = self.network(corrector=corrector, options=corrector_kwargs)
        model = JointDenoiser(**network) if len(network["modalities"]) else network["network"]
        fn = sampling.rounded(self) if quantize else None
        return step(model, x, t, clip_denoised, fn, model_kwargs=self.as_conditioning(cond), **kwargs)

    def p_mean_variance(self, x, t, clip_denoised: bool):
        """(mean, variance, log variance) of p(x_{t-1} | x_t)."""
        out = self._step(self.diffusion.p_mean_variance, x, None, t, clip_denoised)
        return out["mean"], out["variance"], out["log_variance"]

    @torch.no_grad()
    def p_sample(self, x, t, clip_denoised=True, repeat_noise=False):
        """x_{t-1} by one ancestral step; repeat_noise: the same noise for all samples."""
        noise = sampling.Noise(repeated=repeat_noise).randn_like
        return self._step(self.diffusion.p_sample, x, None, t, clip_denoised, randn_like=noise)["sample"]

    @torch.no_grad()
    def p_sample_loop(self, shape, return_intermediates=False):
        """Samples of `shape` in all steps, and if asked for what lay on the way: a list, one every log_every_t
        steps."""
        out, kept = sampling.ancestral(self, None, shape)
        return (out, kept) if return_intermediates else out

    @torch.no_grad()
    def sample(self, batch_size=16, return_intermediates=False):
        """As `p_sample_loop`, of this model's shape."""
        return self.p_sample_loop((batch_size, *self.latent_shape), return_intermediates)

    def log_images(self, batch, N=8, n_row=2, sample=True, return_keys=None, **kwargs):
        """Images that show how training goes; see image_log.log_pixel_images."""
        return log_pixel_images(self, batch, N, n_row, sample, return_keys, **kwargs)

    # Loss

    def get_input(self, batch: Mapping, k: str):
        """What is diffused of a batch, [B, C, H, W]."""
        return channels_first(from_batch(batch, k, "first_stage_key"))

    def apply_model(self, x_noisy, t, cond=None, return_ids=False):
        """The network's output at x_t, conditioned on `cond` (see as_conditioning); return_ids: with what it
        returns beside that."""
        output = self.model(x_noisy, t, **self.as_conditioning(cond))
        return output[0] if isinstance(output, tuple) and not return_ids else output

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
        """`simple`, the error of the prediction [B], and terms to be added to the loss, each with its weight;
        here there are none. batch: the data, for what further terms need.
        """
        output = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        target = self.get_target(x_start, t, noise)
        return {"simple": mean_flat(self.get_loss(output.float(), target, mean=False))}

    def p_losses(self, x_start, t, noise=None, random=None, batch=None, cond=None):
        """(loss, terms to log) at timesteps t of x_0. random: further generators, see `forward`."""
        prefix = "train" if self.training else "val"
        noise = torch.randn_like(x_start) if noise is None else noise
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

    def forward(self, x, *args, random: PerSample | None = None, **kwargs):
        """p_losses of x at timesteps, and with noise, drawn by `random`, one generator per sample (those of a
        new seed of the global generator if None); further arguments as in p_losses."""
        if random is None:
            random = PerSample(torch.randint(2**62, (len(x),)).tolist(), x.device)
        t = random.randint(self.num_timesteps).to(x.device)
        return self.p_losses(x, *args, t, random.randn_like(x), random, **kwargs)

    def shared_step(self, batch: Mapping, random: PerSample | None = None):
        """(loss, terms to log) of a batch; all that is random comes from `random`."""
        return self(self.get_input(batch, self.first_stage_key), random=random, batch=batch)

    # Training

    def batch_random(self, batch, batch_idx: int, stream: int = _TRAINING) -> PerSample:
        """The generators of a batch's samples: one rank with the whole batch, which others share in turn, has the same."""
        size = len(next(value for value in batch.values() if isinstance(value, (torch.Tensor, list, tuple))))
        rank, ranks = (0, 1) if self._trainer is None else (self.global_rank, self.trainer.world_size)
        seeds = (derive_seed(self.seed, stream, batch_idx, rank + place * ranks) for place in range(size))
        return PerSample(seeds, self.device)

    def training_step(self, batch, batch_idx):
        number = batch_idx if self._trainer is None else self.trainer.fit_loop.total_batch_idx
        random = self.batch_random(batch, number)
        loss, log = self.shared_step(batch, random)
        self.log_dict(log, prog_bar=True, logger=True, on_step=True, on_epoch=True, batch_size=len(random))
        self.log("global_step", float(self.global_step), prog_bar=True, on_step=True, on_epoch=False)
        if self.scheduler_config is not None and self._trainer is not None:
            rate = self.optimizers().param_groups[0]["lr"]
            self.log("lr_abs", rate, prog_bar=True, logger=True, on_step=True, on_epoch=False)
        return loss

    @torch.no_grad()
    def validation_step(self, batch, batch_idx):
        random = self.batch_random(batch, batch_idx, _VALIDATION)
        with self.whole():
            _, log = self.shared_step(batch, random)
        if self.use_ema:
            with self.ema_scope():  # with the same noise
                _, average = self.shared_step(batch, self.batch_random(batch, batch_idx, _VALIDATION))
            log |= {f"{name}_ema": value for name, value in average.items()}
        self.log_dict(log, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(random))

    def optimizer_step(self, *args, **kwargs):
        """Lightning calls this at every update, which the moving average follows."""
        super().optimizer_step(*args, **kwargs)
        if self.use_ema:
            self.model_ema(self.model)

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimizer changes."""
        return [*self.model.parameters(), *([self.logvar] if self.learn_logvar else [])]

    def configure_optimizers(self):
        if getattr(self, "learning_rate", None) is None:
            raise UserValueError("set learning_rate before training (main.py does, from base_learning_rate)")
        optimizer = torch.optim.AdamW(self.trained_parameters(), lr=self.learning_rate)
        if self.scheduler_config is None:
            return optimizer
        schedule = instantiate_from_config(self.scheduler_config, Schedule, "scheduler_config").schedule
        scheduler = {"scheduler": LambdaLR(optimizer, schedule), "interval": "step", "frequency": 1}
        return [optimizer], [scheduler]

    @contextlib.contextmanager
    def ema_scope(self, context=None):
        """Inside, the network's weights are the moving average's (where there is one); may be nested.

        context: what for, to be logged.
        """
        if context is not None and self.use_ema:
            _logger.info("%s: with the moving average's weights", context)
        before, self._averaged = self._averaged, self.use_ema
        swap = self.use_ema and not before
        try:
            with self.model_ema.in_place_of(self.model) if swap else contextlib.nullcontext(), self.whole():
                yield
        finally:
            self._averaged = before

    # In shards

    def configure_model(self):
        """Lightning calls this with the devices of the strategy fsdp: what is trained, and its average, go into
        shards; the frozen parts are whole on every device."""
        if self._device_mesh is None or hasattr(self.model, "unshard"):
            return
        mesh = self._device_mesh["data_parallel"]
        # Vectors that the U-Net encodes take a further pass where a batch has any.
        often = any(m.needs_context for m in getattr(self, "modalities", ()))
        shard(self.model, mesh, reshard=not often)
        if getattr(self, "cond_stage_trainable", False):
            shard(self.cond_stage_model, mesh, calls=("encode", self.cond_stage_forward))
        if self.use_ema:
            self.model_ema.shard(self.model)

    def whole(self):
        """A context in which every rank has all weights; see sharding.gathered."""
        return gathered(self.model, getattr(self, "cond_stage_model", None))

    # Weights to start from

    def init_from_ckpt(self, path, ignore_keys=(), only_model=False) -> None:
        """Take the weights of a .ckpt or .safetensors file, but none whose name starts with one of
        `ignore_keys`; only_model: the U-Net's alone.

        The file may lack the moving average, which then starts at the weights, and the tables of the
        schedule. `path` may be a folder in diffusers' layout. UserError if it belongs to another model, another
        noise schedule or another parameterization.
        """
        told = told_parameterization(path)
        if told not in (None, self.parameterization):
            raise UserError(
                f"the network of {path} predicts {told}, the configuration says {self.parameterization}: set "
                "parameterization"
            )
        weights = self.adapt_weights(load_state_dict(path))
        if not only_model:
            self.check_constants(weights, path, tuple(ignore_keys))
        if "scale_factor" not in dict(self.named_buffers(recurse=False)):
            weights.pop("scale_factor", None)
        module, prefix = (self.model, "") if only_model else (self, "model.")
        if only_model:
            # In the file the network is `model.diffusion_model`, or alone.
            weights = {name.removeprefix("model."): value for name, value in weights.items()}
            weights = {name: value for name, value in weights.items() if name.startswith("diffusion_model.")}
        load_weights(module, weights, path, ignore_keys, self.optional_weights(weights, prefix))
        if self.use_ema and (only_model or not any(name.startswith("model_ema.") for name in weights)):
            self.model_ema = LitEma(self.model)

    def check_constants(self, weights: Mapping, path, ignored: tuple[str, ...] = ()) -> None:
        """UserError where the constants in a checkpoint's weights are not the configuration's; ignored: prefixes of
        names that are not to be read."""
        betas = None if "betas".startswith(ignored) else weights.get("betas")
        if betas is not None and not _same_table(betas, self.betas):
            raise UserError(f"{path} was trained with another noise schedule than the configuration says")

    def adapt_weights(self, weights: dict) -> dict:
        """A checkpoint's tensors by name, as this model has them."""
        return weights

    def optional_weights(self, weights: Mapping, prefix: str) -> tuple[str, ...]:
        """Prefixes of names that a checkpoint may lack; prefix: of the wrapped network's names."""
        return ("model_ema.", "logvar", *TABLES)


def _same_table(table, own):
    return table.shape == own.shape and torch.allclose(table.float().cpu(), own.cpu(), rtol=1e-3, atol=1e-7)
