"""LatentDiffusion: one diffusion of a first stage's latents, with conditioning; interface and state-dict keys:
latent-diffusion, ldm/models/diffusion/ddpm.py. DDPM, which it extends, is in image_diffusion.py.
"""

import inspect
import logging
import math
from collections.abc import Mapping

import torch
from torch import nn

from guided_diffusion.checkpoint_util import fit_channels
from guided_diffusion.errors import UserError, UserValueError, closest
from guided_diffusion.seeding import PerSample
from ldm.checkpoint import is_weightless
from ldm.models.diffusion import conditioning, sampling
from ldm.models.diffusion.conditioning import DiffusionWrapper, channels_first, from_batch, select
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.image_diffusion import DDPM
from ldm.models.diffusion.image_log import log_images, log_samples
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.solvers import DPMSolver3MSampler, DPMSolverSDESampler, HeunSampler, UniPCSampler
from ldm.modules.distributions.distributions import AbstractDistribution, draw
from ldm.modules.encoders.base import frozen
from ldm.util import instantiate_from_config

__all__ = ["DDPM", "DiffusionWrapper", "LatentDiffusion"]

_logger = logging.getLogger(__name__)

SAMPLERS = {
    "ddpm": sampling.DDPMSampler,
    "ddim": DDIMSampler,
    "plms": PLMSSampler,
    "heun": HeunSampler,
    "dpm++": DPMSolverSampler,
    "dpm++sde": DPMSolverSDESampler,
    "dpm++3m": DPMSolver3MSampler,
    "unipc": UniPCSampler,
}


class LatentDiffusion(DDPM):
    """Diffusion of a first stage's latents [B, C, h, w], with conditioning (Rombach et al. 2022).

    first_stage_config: of the autoencoder, which is frozen; cond_stage_config: of the conditioner, or
    `__is_first_stage__`, `__is_unconditional__`; cond_stage_key: what the conditioner reads of a batch;
    cond_stage_trainable: train it too; cond_stage_forward: its method to call; conditioning_key: see
    DiffusionWrapper, without one concat_mode chooses concat or crossattn; concat_keys: images and masks of
    the batch that are put beside the latent (conditioning_key hybrid); scale_factor: latents are multiplied
    by it; scale_by_std: measure it on the first batch. image_size and channels are the latent's; other
    arguments as in DDPM.
    """

    modality_channels = 0  # of the U-Net's input, between the latent and the conditioning
    configs: Mapping[
        str, Mapping | None
    ] = {}  # of further frozen parts, which subclasses set before they are made

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
        key = conditioning.resolve_key(cond_stage_config, conditioning_key, concat_mode)
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
        for name, config in self.configs.items():
            made = (
                None
                if config is None
                else frozen(instantiate_from_config(config, nn.Module, f"{name}'s config"))
            )
            setattr(self, name, made)
        if ckpt_path is not None and not is_weightless():
            self.init_from_ckpt(ckpt_path, ignore_keys, only_model=load_only_unet)

    def instantiate_first_stage(self, config: Mapping) -> None:
        """Make `first_stage_model`, frozen."""
        self.first_stage_model = frozen(instantiate_from_config(config, nn.Module, "first_stage_config"))

    def instantiate_cond_stage(self, config) -> None:
        """Make `cond_stage_model`: the first stage itself, None where unconditional, or what `config`
        says."""
        if config == conditioning.FIRST_STAGE:
            if self.cond_stage_trainable:
                raise UserValueError(
                    "the first stage as conditioner is frozen: cond_stage_trainable must be off"
                )
            self.cond_stage_model = self.first_stage_model
            return
        model = instantiate_from_config(config, nn.Module, "cond_stage_config")
        if model is None and self.cond_stage_trainable:
            raise UserValueError("there is no conditioner to train: cond_stage_trainable must be off")
        self.cond_stage_model = model if model is None or self.cond_stage_trainable else frozen(model)

    def train(self, mode=True):
        """Training mode for what is trained: the first stage and a frozen conditioner stay as they are."""
        super().train(mode)
        for part in (self.first_stage_model, *(getattr(self, name) for name in self.configs)):
            if part is not None:
                part.eval()
        if self.cond_stage_model is not None and not self.cond_stage_trainable:
            self.cond_stage_model.eval()
        return self

    # Images and latents

    @torch.no_grad()
    def encode_first_stage(self, x: torch.Tensor):
        """What the first stage's encoder returns for images [B, C, H, W] in [-1, 1]: latents, or their
        distribution."""
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(self, encoder_posterior, random: PerSample | None = None) -> torch.Tensor:
        """Scaled latents: a draw from the distribution by the generators `random` (None: the global one)."""
        return self.scale_factor * draw(encoder_posterior, random)

    @torch.no_grad()
    def decode_first_stage(self, z, predict_cids=False, force_not_quantize=False) -> torch.Tensor:
        """Images [B, C, H, W] of scaled latents; predict_cids: z are logits [B, K, h, w] over the first
        stage's codebook, or entries int64 [B, h, w] of it; force_not_quantize: see VQModelInterface."""
        return self.differentiable_decode_first_stage(z, predict_cids, force_not_quantize)

    def differentiable_decode_first_stage(self, z, predict_cids=False, force_not_quantize=False):
        """`decode_first_stage`, with gradients."""
        if predict_cids:
            entries = z.argmax(dim=1) if z.ndim == 4 else z
            z = self.first_stage_model.quantize.embedding(entries).movedim(-1, 1)
        options = {"force_not_quantize": True} if force_not_quantize else {}
        return self.first_stage_model.decode(z / self.scale_factor, **options)

    def encode_images(self, images: torch.Tensor, random: PerSample | None = None) -> torch.Tensor:
        """Scaled latents of images [B, C, H, W]: draws by `random`, or the most probable ones."""
        posterior = self.encode_first_stage(images)
        if random is None and isinstance(posterior, AbstractDistribution):
            return self.scale_factor * posterior.mode()
        return self.get_first_stage_encoding(posterior, random)

    def latents(self, batch: Mapping, key: str, random: PerSample | None = None) -> torch.Tensor:
        """Scaled latents of a batch's images `key` [B, H, W, C], or of `key`_latent, cached.

        Cached means [B, c, h, w] are unscaled, and with `key`_latent_std beside them a distribution. random:
        draws from it; None takes the most probable ones.
        """
        if f"{key}_latent" not in batch:
            images = channels_first(from_batch(batch, key, "images"))
            return self.encode_images(images.to(self.device), random)
        mean = batch[f"{key}_latent"].float()
        std = batch.get(f"{key}_latent_std")
        drawn = mean if std is None or random is None else mean + std.float() * random.randn_like(mean)
        return self.scale_factor * drawn

    def on_train_batch_start(self, batch, batch_idx, dataloader_idx=0):
        """Measures the scale before the first update, unless a checkpoint knew it."""
        if not self._scale_known and self.global_step == 0:
            self.scale_factor.fill_(1.0)
            self.measure_scale(self.latents(batch, self.first_stage_key, self.batch_random(batch, batch_idx)))
        self._scale_known = True

    @torch.no_grad()
    def measure_scale(self, latents: torch.Tensor) -> None:
        """Set scale_factor to 1 / the standard deviation of latents, of all ranks together."""
        flat = latents.flatten().double()
        moments = torch.stack([flat.mean(), flat.square().mean()])
        if self._trainer is not None:
            moments = self.all_gather(moments).reshape(-1, 2).mean(dim=0)
        std = float((moments[1] - moments[0] ** 2).sqrt())
        if not 0 < std < float("inf"):
            raise UserValueError(
                f"the first stage's latents have a standard deviation of {std}: scale_by_std cannot use them"
            )
        self.scale_factor.fill_(1 / std)
        _logger.info("scale_factor is %.6g, 1 / the standard deviation of the first batch", 1 / std)

    # Conditioning

    @property
    def conditioned_on_images(self) -> bool:
        """Is the first stage the conditioner?"""
        return self.cond_stage_model is not None and self.cond_stage_model is self.first_stage_model

    def raw_conditioning(self, batch: Mapping, random: PerSample | None = None, key: str | None = None):
        """What a batch says under `key` (default: cond_stage_key); see conditioning.raw_conditioning."""
        return conditioning.raw_conditioning(self, batch, key or self.cond_stage_key, random)

    def beside(self, batch: Mapping, random: PerSample | None = None) -> dict:
        """The U-Net's inputs beside the conditioner's, by name: here the maps of concat_keys."""
        maps = [self.concat_map(batch, name, random) for name in self.concat_keys]
        return {"c_concat": maps} if maps else {}

    def concat_map(self, batch: Mapping, name: str, random: PerSample | None = None) -> torch.Tensor:
        """What of batch[name] is put beside the latent; see conditioning.concat_map."""
        return conditioning.concat_map(self, batch, name, random)

    def get_learned_conditioning(self, c) -> dict[str, list[torch.Tensor]]:
        """The U-Net's inputs for raw conditioning, see conditioning.learned_conditioning."""
        return conditioning.learned_conditioning(self, c)

    def as_conditioning(self, cond) -> dict[str, list[torch.Tensor]]:
        """Conditioning of any accepted form, a dict, a list or one tensor, as a dict of the U-Net's inputs."""
        if cond is None or isinstance(cond, Mapping):
            return dict(cond or {})
        cond = list(cond) if isinstance(cond, (list, tuple)) else [cond]
        return {"c_concat" if self.model.conditioning_key == "concat" else "c_crossattn": cond}

    def get_unconditional_conditioning(self, batch_size: int, null_label=None):
        """The U-Net's inputs that say nothing, see conditioning.null_conditioning."""
        return conditioning.null_conditioning(self, batch_size, null_label)

    # Loss

    def get_input(
        self,
        batch,
        k,
        return_first_stage_outputs=False,
        force_c_encode=False,
        cond_key=None,
        return_original_cond=False,
        bs=None,
        random: PerSample | None = None,
    ) -> list:
        """[scaled latents, drawn by `random`, or the most probable ones; learned conditioning] of a batch.

        return_first_stage_outputs: further the images and what the first stage makes of them;
        force_c_encode: learned conditioning also where the conditioner is trained, which otherwise the loss
        encodes; cond_key: in place of cond_stage_key; return_original_cond: further the raw conditioning; bs:
        of the first bs samples only.
        """
        if bs is not None:
            batch = {n: select(value, slice(bs)) for n, value in batch.items() if hasattr(value, "__len__")}
        z = self.latents(batch, k, random)
        if tuple(z.shape[1:]) != self.latent_shape:
            raise UserValueError(
                f"the latents are {list(z.shape[1:])}, the configuration says {list(self.latent_shape)} "
                "(channels, image_size): check it, and the size of the images"
            )
        raw = self.raw_conditioning(batch, random, cond_key)
        encode = force_c_encode or not self.cond_stage_trainable
        out = [z, self.get_learned_conditioning(raw) if encode else raw]
        if return_first_stage_outputs:
            decoded = self.decode_first_stage(z)
            out += [channels_first(batch[k]).to(self.device) if k in batch else decoded, decoded]
        return [*out, raw] if return_original_cond else out

    def p_losses(self, x_start, cond, t, noise=None, random=None, batch=None):
        """(loss, terms to log) at timesteps t of latents x_0 under learned conditioning; see DDPM."""
        return super().p_losses(x_start, t, noise, random, batch, cond)

    def forward(self, x, c, *args, **kwargs):
        """See DDPM; c: conditioning, raw where the conditioner is trained."""
        cond = self.get_learned_conditioning(c) if self.cond_stage_trainable else c
        return super().forward(x, cond, *args, **kwargs)

    def shared_step(self, batch, random: PerSample | None = None, **kwargs):
        """(loss, terms to log) of a batch; all that is random comes from `random`."""
        x, c = self.get_input(batch, self.first_stage_key, random=random)
        return self(x, c, random=random, batch=batch, **kwargs)

    def trained_parameters(self):
        trained = super().trained_parameters()
        return [*trained, *self.cond_stage_model.parameters()] if self.cond_stage_trainable else trained

    # Sampling

    def p_mean_variance(
        self,
        x,
        c,
        t,
        clip_denoised: bool,
        return_codebook_ids=False,
        quantize_denoised=False,
        return_x0=False,
        score_corrector=None,
        corrector_kwargs=None,
    ):
        """(mean, variance, log variance) of p(x_{t-1} | x_t), and if asked for the predicted x_0;
        quantize_denoised: round that to the first stage's codebook; score_corrector: see GuidedModel."""
        _no_codebook_ids(return_codebook_ids)
        correct = (score_corrector, corrector_kwargs)
        out = self._step(self.diffusion.p_mean_variance, x, c, t, clip_denoised, quantize_denoised, *correct)
        said = out["mean"], out["variance"], out["log_variance"], out["pred_xstart"]
        return said if return_x0 else said[:3]

    @torch.no_grad()
    def p_sample(
        self,
        x,
        c,
        t,
        clip_denoised=False,
        repeat_noise=False,
        return_codebook_ids=False,
        quantize_denoised=False,
        return_x0=False,
        temperature=1.0,
        noise_dropout=0.0,
        score_corrector=None,
        corrector_kwargs=None,
    ):
        """x_{t-1} by one ancestral step, and if asked for the predicted x_0."""
        _no_codebook_ids(return_codebook_ids)
        noise = sampling.Noise(None, temperature, noise_dropout, repeat_noise).randn_like
        correct = (score_corrector, corrector_kwargs)
        out = self._step(
            self.diffusion.p_sample, x, c, t, clip_denoised, quantize_denoised, *correct, randn_like=noise
        )
        return (out["sample"], out["pred_xstart"]) if return_x0 else out["sample"]

    @torch.no_grad()
    def p_sample_loop(
        self,
        cond,
        shape,
        return_intermediates=False,
        x_T=None,
        verbose=True,
        callback=None,
        timesteps=None,
        quantize_denoised=False,
        mask=None,
        x0=None,
        img_callback=None,
        start_T=None,
        log_every_t=None,
        **options,
    ):
        """Latents of `shape` in all steps (the last `timesteps`, or from start_T on), from noise x_T if given;
        with return_intermediates also the list of those on the way. mask, x0: see `Sampler.sample`; options:
        of `sampling.ancestral`."""
        given = dict(locals())
        for name in ("self", "return_intermediates", "timesteps", "start_T", "options"):
            del given[name]
        begins = [count for count in (timesteps, start_T) if count is not None]
        out, kept = sampling.ancestral(self, start_T=min(begins, default=None), **given, **options)
        return (out, kept) if return_intermediates else out

    @torch.no_grad()
    def progressive_denoising(
        self,
        cond,
        shape,
        verbose=True,
        callback=None,
        quantize_denoised=False,
        img_callback=None,
        mask=None,
        x0=None,
        temperature=1.0,
        noise_dropout=0.0,
        score_corrector=None,
        corrector_kwargs=None,
        batch_size=None,
        x_T=None,
        start_T=None,
        log_every_t=None,
        random: PerSample | None = None,
    ):
        """(latents, the predicted x_0 on the way to them); `shape` is without the batch where batch_size is
        given."""
        given = dict(locals())
        del given["self"], given["batch_size"]
        given["shape"] = shape if batch_size is None else (batch_size, *shape)
        return sampling.ancestral(self, show="pred_x0", **given)

    @torch.no_grad()
    def sample(
        self,
        cond,
        batch_size=16,
        return_intermediates=False,
        x_T=None,
        verbose=True,
        timesteps=None,
        quantize_denoised=False,
        mask=None,
        x0=None,
        shape=None,
        **options,
    ):
        """`p_sample_loop` of batch_size samples under the first of `cond`; its other arguments under
        `options`."""
        cond = select(self.as_conditioning(cond), slice(batch_size))
        shape = (batch_size, *self.latent_shape) if shape is None else shape
        own = (return_intermediates, x_T, verbose)
        known = dict(quantize_denoised=quantize_denoised, mask=mask, x0=x0, timesteps=timesteps)
        return self.p_sample_loop(cond, shape, *own, **known, **options)

    @torch.no_grad()
    def sample_log(self, cond, batch_size, ddim, ddim_steps, **options):
        """(latents, intermediates) by DDIM in ddim_steps steps, options being DDIMSampler.sample's; without
        `ddim` by `sample`, with the options of that."""
        if not ddim:
            return self.sample(cond, batch_size, return_intermediates=True, verbose=False, **options)
        return DDIMSampler(self).sample(
            ddim_steps, batch_size, self.latent_shape, cond, verbose=False, **options
        )

    @torch.no_grad()
    def log_images(
        self,
        batch,
        N=8,
        n_row=4,
        sample=True,
        ddim_steps=200,
        ddim_eta=1.0,
        return_keys=None,
        quantize_denoised=True,
        inpaint=True,
        plot_denoise_rows=False,
        plot_progressive_rows=True,
        plot_diffusion_rows=True,
        **options,
    ):
        """Images that show how training goes; see image_log.log_images. UserValueError for unknown options."""
        known = inspect.signature(log_images).parameters
        if unknown := sorted(options.keys() - known.keys()):
            raise UserValueError(f"log_images has no parameter {unknown[0]!r}{closest(unknown[0], known)}")
        rows = (plot_denoise_rows, plot_progressive_rows, plot_diffusion_rows)
        how = (N, n_row, sample, ddim_steps, ddim_eta, return_keys, quantize_denoised, inpaint, *rows)
        return log_images(self, batch, *how, **options)

    def log_samples(self, batch, cond, n, steps, eta, scale, null_label, seed) -> dict[str, torch.Tensor]:
        """Samples for `log_images`; see image_log.log_samples."""
        return log_samples(self, cond, n, steps, eta, scale, null_label, seed)

    # Checkpoints

    def on_load_checkpoint(self, checkpoint):
        """Lightning calls this when it resumes."""
        self._scale_known = True

    def init_from_ckpt(self, path, ignore_keys=(), only_model=False):
        super().init_from_ckpt(path, ignore_keys, only_model)
        self._scale_known = not self.scale_by_std or bool(self.scale_factor != 1)

    def check_constants(self, weights, path, ignored=()):
        """See DDPM; also the number that latents are multiplied by."""
        super().check_constants(weights, path, ignored)
        if "scale_factor".startswith(ignored):
            return
        told = weights.get("scale_factor")
        if told is None and self.scale_by_std:
            raise UserError(
                f"{path} holds no scale_factor, and the configuration has scale_by_std, which measures one only in "
                "training: set scale_by_std to false and scale_factor to what the weights were trained with (1.0 where "
                "they knew none, 0.18215 for Stable Diffusion)"
            )
        if (
            told is not None
            and not self.scale_by_std
            and not math.isclose(told, self.scale_factor, rel_tol=1e-4)
        ):
            raise UserError(
                f"{path} was trained with scale_factor {float(told):.6g}, the configuration says "
                f"{self.scale_factor:.6g}: set scale_factor to {float(told):.6g}"
            )

    def adapt_weights(self, weights):
        """See DDPM; a conditioner may know other forms of its weights (`adapt_weights` of its own). The U-Net's first
        layer gets zeros for the channels of modalities that the file lacks, so that its prediction stays what it was;
        those of a joint model's file are left out where there are none."""
        for name, part in self.named_children():
            if hasattr(part, "adapt_weights"):
                prefix = f"{name}."
                own = {key.removeprefix(prefix): v for key, v in weights.items() if key.startswith(prefix)}
                others = {key: value for key, value in weights.items() if not key.startswith(prefix)}
                weights = others | {prefix + key: value for key, value in part.adapt_weights(own).items()}
        first, extra = "diffusion_model.input_blocks.0.0.weight", self.modality_channels
        own, joint = self.model.state_dict()[first], any("diffusion_model.heads." in name for name in weights)
        for name in (f"model.{first}", first, "model_ema." + first.replace(".", "")):
            given = weights[name].shape[1] if name in weights else None
            if given == own.shape[1] - extra or (joint and given and not extra):
                # The order is latent, modalities, conditioning (ModalitySet.apply, DiffusionWrapper).
                weights = fit_channels(weights, {name: own}, name, at=self.channels)
        return weights

    def optional_weights(self, weights, prefix):
        """Beside DDPM's: parts that come with weights of their own, if the file has nothing of them."""
        parts = [
            *self._pretrained,
            *(f"{name}." for name in self.configs),
            *([] if self.cond_stage_trainable else ["cond_stage_model."]),
        ]
        absent = (part for part in parts if not any(name.startswith(part) for name in weights))
        return (*super().optional_weights(weights, prefix), *absent)


def _no_codebook_ids(asked):
    if asked:
        raise UserValueError("return_codebook_ids is not supported: upstream dropped it too")


# Stable Diffusion 2's classes, which its configurations name here.
_OF_STABLE_DIFFUSION_2 = (
    "ImageEmbeddingConditionedLatentDiffusion",
    "LatentDepth2ImageDiffusion",
    "LatentFinetuneDiffusion",
    "LatentInpaintDiffusion",
    "LatentUpscaleDiffusion",
)


def __getattr__(name):
    if name not in _OF_STABLE_DIFFUSION_2:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ldm.models.diffusion import stable_diffusion_2

    return getattr(stable_diffusion_2, name)
