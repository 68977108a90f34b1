"""What latent diffusion's samplers share: the network as their model, their timesteps, and the one loop over a
sampler function of guided_diffusion/mt/sampling.py.

Fewer steps than the process has end at alphas_cumprod[0], as upstream's do: timestep 0 belongs to the respaced
process, and its own step, to the image, is not taken.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from guided_diffusion.errors import UserValueError
from guided_diffusion.mt import sampling
from guided_diffusion.seeding import PerSample
from ldm.models.diffusion.conditioning import joined
from ldm.models.diffusion.parameterization import Denoiser, make_diffusion
from ldm.modules.diffusionmodules.util import make_ddim_timesteps


class GuidedModel:
    """A latent diffusion's network as a sampler's model: (z, timesteps, **conditioning) -> noise or x_0.

    scale: of classifier-free guidance (Ho & Salimans 2022), towards the conditioning and away from
    `unconditional`, a dict of the U-Net's inputs; what only the conditioning has is in both. corrector: an
    object whose modify_score(model, eps, z, t, cond, **options) changes the prediction.
    """

    def __init__(
        self,
        model,
        unconditional: Mapping | None = None,
        scale: float = 1.0,
        corrector=None,
        options: Mapping | None = None,
    ):
        if corrector is not None and model.parameterization == "x0":
            raise UserValueError("a score_corrector changes predicted noise: this model predicts x0")
        self.latent_diffusion, self.denoiser = model, Denoiser(model)
        self.unconditional, self.scale = unconditional, 1.0 if unconditional is None else float(scale)
        self.corrector, self.options = corrector, dict(options or {})

    def start(self, diffusion, noise: torch.Tensor) -> torch.Tensor:
        """z_T of `diffusion`."""
        return noise

    def __call__(self, z, timesteps, **cond):
        if self.scale == 1:
            output = self.denoiser(z, timesteps, **cond)
        else:
            both = joined([{**cond, **self.unconditional}, cond])
            twice = (torch.cat([value, value]) for value in (z, timesteps))
            free, guided = self.denoiser(*twice, **both).chunk(2)
            output = free + self.scale * (guided - free)
        if self.corrector is not None:
            output = self.corrector.modify_score(
                self.latent_diffusion, output, z, timesteps, cond, **self.options
            )
        return output


def descend(
    model,
    function: Callable,
    diffusion,
    guided,
    z: torch.Tensor,
    start: int,
    noise: Callable,
    cond: Mapping,
    *,
    to_image: bool,
    quantize: bool = False,
    mask=None,
    x0=None,
    progress: bool = False,
    **options,
) -> Iterator[dict]:
    """The steps of a function of guided_diffusion.mt.sampling from z at index `start` of `diffusion` down to index
    0, and with to_image on to the image itself.

    model: a DDPM; guided: its `guided_model`; noise: see `gaussian_noise`; quantize: round predicted latents to the
    first stage's codebook; mask, x0: see `keep_known`; options: the function's own.
    """
    edit = keep_known(diffusion, mask, x0, noise)
    steps = function(
        _UpTo(diffusion, start),
        guided,
        edit(z, start),
        noise,
        edit=edit,
        denoised_fn=rounded(model) if quantize else None,
        model_kwargs=cond,
        **options,
    )
    count = start + to_image
    yield from tqdm(itertools.islice(steps, count), total=count, disable=not progress, desc=function.__name__)


def ancestral(
    model,
    cond,
    shape: tuple[int, ...],
    *,
    x_T=None,
    start: int | None = None,
    random: PerSample | None = None,
    unconditional_conditioning=None,
    unconditional_guidance_scale: float = 1.0,
    score_corrector=None,
    corrector_kwargs: Mapping | None = None,
    temperature: float = 1.0,
    noise_dropout: float = 0.0,
    callback: Callable | None = None,
    img_callback: Callable | None = None,
    log_every_t: int | None = None,
    show: str = "sample",
    **options,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """DDPM's whole run from index `start` - 1 down to the image: (samples of `shape`, a list of what a step gives
    under `show`, every log_every_t steps). callback(index), img_callback(sample, index); others as in
    `Sampler.sample` and `descend`."""
    start = min(model.num_timesteps if start is None else start, model.num_timesteps)
    every, noise = log_every_t or model.log_every_t, gaussian_noise(random, temperature, noise_dropout)
    free = None if unconditional_conditioning is None else model.as_conditioning(unconditional_conditioning)
    guided = model.guided_model(free, unconditional_guidance_scale, score_corrector, corrector_kwargs)
    z = randn(tuple(shape), model.device, random) if x_T is None else x_T.to(model.device)
    z = guided.start(model.diffusion, z)
    kept = [z] if show == "sample" else []
    steps = descend(
        model,
        sampling.ddpm,
        model.diffusion,
        guided,
        z,
        start - 1,
        noise,
        model.as_conditioning(cond),
        to_image=True,
        clip_denoised=model.clip_denoised,
        **options,
    )
    for index, out in zip(reversed(range(start)), steps, strict=True):
        z = out["sample"]
        if callback is not None:
            callback(index)
        if img_callback is not None:
            img_callback(z, index)
        if select_kept(index, every, start):
            kept.append(out[show])
    return z, kept


class Sampler:
    """A sampler with latent-diffusion's interface, for `model`, a LatentDiffusion.

    schedule is accepted as upstream does and has no effect: the model knows its own. The timesteps are DDIM's,
    upstream's: one later than every (T // S)-th.
    """

    function: Callable  # of guided_diffusion.mt.sampling
    stochastic = False  # does it have an eta?

    def __init__(self, model, schedule="linear", **kwargs):
        self.model = model
        self.ddpm_num_timesteps = model.num_timesteps

    def timesteps(self, steps: int, discretize: str) -> np.ndarray:
        """The timesteps at which the network is called, ascending."""
        return make_ddim_timesteps(discretize, steps, self.ddpm_num_timesteps, verbose=False)

    def make_schedule(self, ddim_num_steps, ddim_discretize="uniform", ddim_eta=0.0, verbose=True):
        """Choose the timesteps, None for the whole process; sets `ddim_timesteps` and `diffusion`, the process
        over them."""
        if ddim_eta and not self.stochastic:
            raise UserValueError(f"only DDIM has an eta: for {type(self).__name__} it must be 0")
        self.ddim_eta, self._to_image = ddim_eta, ddim_num_steps is None
        if self._to_image:
            self.ddim_timesteps, self.diffusion = np.arange(self.ddpm_num_timesteps), self.model.diffusion
            return
        self.ddim_timesteps = steps = np.asarray(self.timesteps(ddim_num_steps, ddim_discretize))
        # Where timestep 0 itself is among them, the step from it to abar[0] changes nothing.
        self.diffusion = make_diffusion(
            self.model.diffusion.betas,
            self.model.parameterization,
            getattr(self.model.diffusion, "aggregation", None),
            kept=sorted({0, *steps.tolist()}),
        )

    @torch.no_grad()
    def sample(
        self,
        S,
        batch_size,
        shape,
        conditioning=None,
        callback=None,
        normals_sequence=None,
        img_callback=None,
        quantize_x0=False,
        eta=0.0,
        mask=None,
        x0=None,
        temperature=1.0,
        noise_dropout=0.0,
        score_corrector=None,
        corrector_kwargs=None,
        verbose=True,
        x_T=None,
        log_every_t=100,
        unconditional_guidance_scale=1.0,
        unconditional_conditioning=None,
        random: PerSample | None = None,
        **directions,
    ) -> tuple[torch.Tensor, dict]:
        """Latents [batch_size, *shape] in S steps (None: the whole process, down to the image), and what lay on
        the way to them.

        conditioning, unconditional_conditioning: learned conditioning, see LatentDiffusion.as_conditioning;
        x_T: the noise to start from; eta: 0 deterministic, 1 as noisy as DDPM; mask [B, 1, h, w]: 1 where
        latents x0 are kept; quantize_x0: round predicted latents to the first stage's codebook; temperature,
        noise_dropout: of the noise of each step; callback(i), img_callback(pred_x0, i): called after step i;
        log_every_t: every so many indices `x_inter` and `pred_x0` are kept; random: one generator per sample,
        of all noise (the global one if None); directions: what else the model's `guided_model` takes. Of a
        joint model `values` has the modalities, by name. UserValueError for options that do not go together.
        """
        unknown = sorted(set(directions) - set(self.model.directions))
        if normals_sequence is not None or unknown:
            names = ", ".join(unknown) or "normals_sequence"
            raise UserValueError(f"{type(self).__name__} does not know {names}")
        if (mask is None) != (x0 is None):
            raise UserValueError("mask and x0 are given together")
        cond, free = self._conditioning(conditioning, unconditional_conditioning, batch_size)
        self.make_schedule(S, ddim_eta=eta, verbose=verbose)
        guided = self.model.guided_model(
            free, unconditional_guidance_scale, score_corrector, corrector_kwargs, **directions
        )
        z = randn((batch_size, *shape), self.model.device, random) if x_T is None else x_T
        return self._run(
            guided,
            guided.start(self.diffusion, z.to(self.model.device)),
            self.diffusion.num_timesteps - 1,
            gaussian_noise(random, temperature, noise_dropout),
            cond,
            callbacks=(callback, img_callback),
            log_every_t=log_every_t,
            quantize=quantize_x0,
            mask=mask,
            x0=x0,
            progress=verbose,
        )

    def _conditioning(self, conditioning, unconditional, batch_size):
        cond = self.model.as_conditioning(conditioning)
        for name, values in cond.items():
            for value in values if isinstance(values, Sequence) else [values]:
                if len(value) != batch_size:
                    raise UserValueError(f"{name} has {len(value)} samples, the batch {batch_size}")
        return cond, None if unconditional is None else self.model.as_conditioning(unconditional)

    def _run(
        self, guided, z, start, noise, cond, *, callbacks=(None, None), log_every_t=100, progress, **options
    ):
        """From z at index `start` down to index 0, or to the image."""
        if self.stochastic:
            options["eta"] = self.ddim_eta
        kept: dict = {"x_inter": [z], "pred_x0": [z]}
        steps = descend(
            self.model,
            self.function,
            self.diffusion,
            guided,
            z,
            start,
            noise,
            cond,
            to_image=self._to_image,
            clip_denoised=False,
            progress=progress,
            **options,
        )
        count = start + self._to_image
        for i, out in enumerate(steps):
            z = out["sample"]
            if callbacks[0] is not None:
                callbacks[0](i)
            if callbacks[1] is not None:
                callbacks[1](out["pred_xstart"], i)
            if select_kept(count - i - 1, log_every_t, count):
                kept["x_inter"].append(z)
                kept["pred_x0"].append(out["pred_xstart"])
            if "joint" in out:
                kept["values"] = dict(out["joint"].values)
        return z, kept


class DDPMSampler(Sampler):
    """Ancestral sampling (Ho et al. 2020); see `Sampler`."""

    function = staticmethod(sampling.ddpm)


def rounded(model) -> Callable:
    """A function that rounds latents to the codebook of the model's first stage."""

    def quantize(z):
        entries = model.first_stage_model.quantize(z)
        return entries[0] if isinstance(entries, tuple) else entries

    return quantize


def keep_known(diffusion, mask, x0, noise: Callable) -> Callable:
    """An edit for guided_diffusion's samplers that puts latents x0, noised, back where `mask` is 1 (None:
    nothing is); not after the last step."""

    def edit(z, i, encodings=None):
        if mask is None or i <= 0:
            return z
        t = torch.full((len(z),), i, device=z.device)
        return mask * diffusion.q_sample(x0, t, noise(z), encodings) + (1 - mask) * z

    return edit


def select_kept(index: int, every: int, count: int) -> bool:
    """Is the step at `index` of `count` one to keep? The first is, and those at multiples of `every`."""
    return index % every == 0 or index == count - 1


class _UpTo:
    """The process `diffusion` as one whose samplers start at index `start`."""

    def __init__(self, diffusion, start):
        self._diffusion, self.num_timesteps = diffusion, start + 1

    def __getattr__(self, name):
        return getattr(self._diffusion, name)


def randn(shape: tuple[int, ...], device, random: PerSample | None) -> torch.Tensor:
    """Standard normal noise of `shape` [B, ...], from the generators `random` (None: the global one)."""
    return torch.randn(shape, device=device) if random is None else random.randn(shape[1:]).to(device)


def gaussian_noise(
    random: PerSample | None, temperature: float = 1.0, dropout: float = 0.0, repeated: bool = False
) -> Callable:
    """A function z -> noise shaped like it, from the generators `random` (None: the global one); repeated: the
    same for all samples."""

    def noise(z):
        like = z[:1] if repeated else z
        drawn = temperature * (torch.randn_like(like) if random is None else random.randn_like(like))
        return (F.dropout(drawn, p=dropout) if dropout else drawn).expand_as(z)

    return noise
