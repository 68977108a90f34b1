"""The process step by step, under the names of upstream's methods (latent-diffusion,
ldm/models/diffusion/ddpm.py); the mathematics are guided_diffusion's.

Latents are [B, C, h, w], timesteps int64 [B].
"""

from collections.abc import Callable

import torch
from tqdm.auto import tqdm

from guided_diffusion.mt import sampling
from ldm.models.diffusion.sampling import (
    GuidedModel,
    from_index,
    gaussian_noise,
    keep_known,
    rounded,
    select_kept,
)


class Process:
    """Steps of a DDPM; `LatentProcess` has them with conditioning."""

    def q_mean_variance(self, x_start, t):
        """(mean, variance, log variance) of q(x_t | x_0)."""
        return self.diffusion.q_mean_variance(x_start, t)

    def predict_start_from_noise(self, x_t, t, noise):
        """x_0 of x_t and its noise."""
        return self.diffusion._predict_xstart_from_eps(x_t, t, noise)

    def q_posterior(self, x_start, x_t, t):
        """(mean, variance, clipped log variance) of q(x_{t-1} | x_t, x_0)."""
        return self.diffusion.q_posterior_mean_variance(x_start, x_t, t)

    def p_mean_variance(self, x, t, clip_denoised: bool):
        """(mean, variance, log variance) of p(x_{t-1} | x_t)."""
        return self._p(x, None, t, clip_denoised)[:3]

    @torch.no_grad()
    def p_sample(self, x, t, clip_denoised=True, repeat_noise=False):
        """x_{t-1} by one ancestral step; repeat_noise: the same noise for all samples."""
        return self._ancestral(x, None, t, clip_denoised, repeat_noise)[0]

    @torch.no_grad()
    def p_sample_loop(self, shape, return_intermediates=False):
        """Samples of `shape` in all steps, and if asked for what lay on the way: a list, one every log_every_t
        steps."""
        out, kept = self._loop(None, shape, clip_denoised=self.clip_denoised)
        return (out, kept) if return_intermediates else out

    @torch.no_grad()
    def sample(self, batch_size=16, return_intermediates=False):
        """As `p_sample_loop`, of this model's shape."""
        return self.p_sample_loop((batch_size, *self.latent_shape), return_intermediates)

    def _p(self, x, cond, t, clip_denoised, quantize=False):
        """(mean, variance, log variance, predicted x_0) of p(x_{t-1} | x_t)."""
        out = self.diffusion.p_mean_variance(
            self._conditioned(cond), x, t, clip_denoised, rounded(self) if quantize else None
        )
        return out["mean"], out["variance"], out["log_variance"], out["pred_xstart"]

    def _ancestral(
        self, x, cond, t, clip_denoised, repeat_noise, quantize=False, temperature=1.0, dropout=0.0
    ):
        """(x_{t-1}, predicted x_0)."""
        draw = gaussian_noise(None, temperature, dropout)
        out = self.diffusion.p_sample(
            self._conditioned(cond),
            x,
            t,
            clip_denoised,
            rounded(self) if quantize else None,
            randn_like=(lambda z: draw(z[:1]).expand_as(z)) if repeat_noise else draw,
        )
        return out["sample"], out["pred_xstart"]

    def _conditioned(self, cond) -> GuidedModel:
        return GuidedModel(self, cond or {})

    def _loop(
        self,
        cond,
        shape,
        *,
        clip_denoised: bool,
        x_T=None,
        start: int | None = None,
        quantize: bool = False,
        mask=None,
        x0=None,
        callbacks: tuple[Callable | None, Callable | None] = (None, None),
        temperature: float = 1.0,
        dropout: float = 0.0,
        log_every_t: int | None = None,
        show: str = "sample",
        verbose: bool = False,
    ):
        """(the last sample, a list of what a step gives under `show`, every log_every_t steps)."""
        start = self.num_timesteps if start is None else min(start, self.num_timesteps)
        log_every_t = log_every_t or self.log_every_t
        z = torch.randn(tuple(shape), device=self.device) if x_T is None else x_T.to(self.device)
        noise = gaussian_noise(None, temperature, dropout)
        guided = self._conditioned(cond)
        steps = sampling.ddpm(
            from_index(self.diffusion, start - 1),
            guided,
            z,
            noise,
            edit=keep_known(self.diffusion, mask, x0, noise),
            clip_denoised=clip_denoised,
            denoised_fn=rounded(self) if quantize else None,
        )
        kept = [z] if show == "sample" else []
        for index, out in zip(
            reversed(range(start)), tqdm(steps, total=start, disable=not verbose, desc="ddpm"), strict=True
        ):
            z = out["sample"]
            for call, argument in zip(callbacks, ((index,), (z, index)), strict=True):
                if call is not None:
                    call(*argument)
            if select_kept(index, log_every_t, start):
                kept.append(out[show])
        return z, kept


class LatentProcess(Process):
    """Process with conditioning `c`, as get_learned_conditioning gives it."""

    def _conditioned(self, cond):
        return self.guided_model(self.as_conditioning(cond))

    def p_mean_variance(self, x, c, t, clip_denoised: bool, quantize_denoised=False, return_x0=False):
        """(mean, variance, log variance) of p(x_{t-1} | x_t), and if asked for the predicted x_0;
        quantize_denoised: round that to the first stage's codebook."""
        out = self._p(x, c, t, clip_denoised, quantize_denoised)
        return out if return_x0 else out[:3]

    @torch.no_grad()
    def p_sample(
        self,
        x,
        c,
        t,
        clip_denoised=False,
        repeat_noise=False,
        quantize_denoised=False,
        return_x0=False,
        temperature=1.0,
        noise_dropout=0.0,
    ):
        """x_{t-1} by one ancestral step, and if asked for the predicted x_0."""
        out = self._ancestral(
            x, c, t, clip_denoised, repeat_noise, quantize_denoised, temperature, noise_dropout
        )
        return out if return_x0 else out[0]

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
    ):
        """Latents of `shape` in all steps (the last `timesteps`, or from start_T on), from noise x_T if given;
        with return_intermediates also the list of those on the way. mask, x0, callbacks: see
        `Sampler.sample`."""
        begins = [count for count in (timesteps, start_T) if count is not None]
        out, kept = self._loop(
            cond,
            shape,
            clip_denoised=self.clip_denoised,
            x_T=x_T,
            start=min(begins, default=None),
            quantize=quantize_denoised,
            mask=mask,
            x0=x0,
            callbacks=(callback, img_callback),
            log_every_t=log_every_t,
            verbose=verbose,
        )
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
        batch_size=None,
        x_T=None,
        start_T=None,
        log_every_t=None,
    ):
        """(latents, the predicted x_0 on the way to them); `shape` is without the batch where batch_size is
        given."""
        return self._loop(
            cond,
            shape if batch_size is None else (batch_size, *shape),
            clip_denoised=self.clip_denoised,
            x_T=x_T,
            start=start_T,
            quantize=quantize_denoised,
            mask=mask,
            x0=x0,
            callbacks=(callback, img_callback),
            temperature=temperature,
            dropout=noise_dropout,
            log_every_t=log_every_t,
            show="pred_xstart",
            verbose=verbose,
        )
