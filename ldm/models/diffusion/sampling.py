"""What latent-diffusion's samplers share: the network as their model, their timesteps, their options.

A sampler runs a function of guided_diffusion/mt/sampling.py over a respaced process. It ends at index 0, whose
step to abar = 1 is not taken: upstream's last step ends at alphas_cumprod[0].
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from guided_diffusion.errors import UserValueError
from guided_diffusion.seeding import PerSample
from ldm.models.diffusion.schedule import Denoiser, make_diffusion

Intermediates = dict[str, list[torch.Tensor]]


class GuidedModel:
    """A latent diffusion's network under fixed conditioning: (z, timesteps) -> noise or x_0.

    scale: of classifier-free guidance (Ho & Salimans 2022), towards `cond` and away from `unconditional`,
    dicts of the U-Net's inputs; what only `cond` has is in both. corrector: an object whose modify_score
    (model, eps, z, t, cond, **options) changes the prediction.
    """

    def __init__(
        self,
        model,
        cond: Mapping,
        unconditional: Mapping | None = None,
        scale: float = 1.0,
        corrector=None,
        options: Mapping | None = None,
    ):
        if corrector is not None and model.parameterization == "x0":
            raise UserValueError("a score_corrector changes predicted noise: this model predicts x0")
        self.latent_diffusion, self.denoiser = model, Denoiser(model)
        self.cond, self.scale = cond, 1.0 if unconditional is None else float(scale)
        self.corrector, self.options = corrector, dict(options or {})
        if self.scale != 1:
            self.both = joined({**cond, **unconditional}, cond)

    def parameters(self):
        """The network's."""
        return self.denoiser.parameters()

    def __call__(self, z, timesteps):
        if self.scale == 1:
            output = _first(self.denoiser(z, timesteps, **self.cond))
        else:
            twice = (torch.cat([value, value]) for value in (z, timesteps))
            free, guided = _first(self.denoiser(*twice, **self.both)).chunk(2)
            output = free + self.scale * (guided - free)
        if self.corrector is not None:
            output = self.corrector.modify_score(
                self.latent_diffusion, output, z, timesteps, self.cond, **self.options
            )
        return output


def _first(output):
    """Without the heads' predictions."""
    return output[0] if isinstance(output, tuple) else output


def joined(first: Mapping, second: Mapping) -> dict:
    """Two batches of conditioning as one, the samples of `first` before those of `second`."""
    if set(first) != set(second):
        raise UserValueError(
            f"the unconditional conditioning has {', '.join(first)}, the conditional one {', '.join(second)}"
        )
    both = {}
    for name, values in first.items():
        if isinstance(values, torch.Tensor):
            both[name] = torch.cat([values, second[name]])
        else:
            both[name] = [torch.cat(pair) for pair in zip(values, second[name], strict=True)]
    return both


class Sampler:
    """A sampler with latent-diffusion's interface, for `model`, a LatentDiffusion.

    schedule is accepted as upstream does and has no effect: the model knows its own.
    """

    function: Callable  # of guided_diffusion.mt.sampling
    stochastic = False  # does it have an eta?

    def __init__(self, model, schedule="linear", **kwargs):
        self.model = model
        self.ddpm_num_timesteps = model.num_timesteps

    def timesteps(self, steps: int, discretize: str) -> np.ndarray:
        """The timesteps at which the network is called, ascending."""
        raise NotImplementedError

    def make_schedule(self, ddim_num_steps, ddim_discretize="uniform", ddim_eta=0.0, verbose=True):
        """Choose the timesteps; sets `ddim_timesteps` and `diffusion`, the process over them."""
        if ddim_eta and not self.stochastic:
            raise UserValueError(f"{type(self).__name__} is deterministic: ddim_eta must be 0")
        steps = np.asarray(self.timesteps(ddim_num_steps, ddim_discretize))
        # Where timestep 0 itself is among them, the step from it to abar[0] changes nothing.
        self.ddim_timesteps = steps
        self.diffusion = make_diffusion(
            self.model.diffusion.betas,
            self.model.parameterization,
            getattr(self.model.diffusion, "aggregation", None),
            kept=sorted({0, *steps.tolist()}),
        )
        self.ddim_eta = ddim_eta

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
        guided=None,
        **kwargs,
    ) -> tuple[torch.Tensor, Intermediates]:
        """Latents [batch_size, *shape] in S steps, and what lay on the way to them.

        conditioning, unconditional_conditioning: learned conditioning, see Conditioning.as_conditioning;
        x_T: the noise to start from; eta: 0 deterministic, 1 as noisy as DDPM; mask [B, 1, h, w]: 1 where
        latents x0 are kept; quantize_x0: round predicted latents to the first stage's codebook; temperature,
        noise_dropout: of the noise of each step; callback(i), img_callback(pred_x0, i): called after step i;
        log_every_t: every so many indices `x_inter` and `pred_x0` are kept; random: one generator per sample,
        of all noise (the global one if None); guided: the model's own `guided_model(...)`, in place of
        conditioning, guidance and corrector. UserValueError for options that do not go together.
        """
        if normals_sequence is not None or kwargs:
            names = ", ".join(kwargs) or "normals_sequence"
            raise UserValueError(f"{type(self).__name__} does not know {names}")
        if (mask is None) != (x0 is None):
            raise UserValueError("mask and x0 are given together")
        cond, unconditional = self._conditioning(conditioning, unconditional_conditioning, batch_size)
        self.make_schedule(S, ddim_eta=eta, verbose=verbose)
        device = self.model.device
        if x_T is None:
            x_T = randn((batch_size, *shape), device, random)
        if guided is None:
            guided = self.model.guided_model(
                cond, unconditional, unconditional_guidance_scale, score_corrector, corrector_kwargs
            )
        elif cond or unconditional or score_corrector is not None:
            raise UserValueError(
                "conditioning and a score_corrector are part of `guided`: give one or the other"
            )
        return self._run(
            guided,
            x_T.to(device),
            self.diffusion.num_timesteps - 1,
            noise=gaussian_noise(random, temperature, noise_dropout),
            quantize=quantize_x0,
            keep=(mask, x0),
            callbacks=(callback, img_callback),
            log_every_t=log_every_t,
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
        self,
        guided,
        z,
        start,
        *,
        noise,
        progress,
        quantize=False,
        keep=(None, None),
        callbacks=(None, None),
        log_every_t=100,
    ):
        """From z at index `start` down to index 0."""
        edit = keep_known(self.diffusion, *keep, noise)
        steps = self.function(
            from_index(self.diffusion, start),
            guided,
            edit(z, start),
            noise,
            edit=edit,
            clip_denoised=False,
            denoised_fn=rounded(self.model) if quantize else None,
            **({"eta": self.ddim_eta} if self.stochastic else {}),
        )
        kept: Intermediates = {"x_inter": [z], "pred_x0": [z]}
        bar = tqdm(
            itertools.islice(steps, start), total=start, disable=not progress, desc=type(self).__name__
        )
        for i, out in enumerate(bar):
            index = start - i - 1
            z = out["sample"]
            if callbacks[0] is not None:
                callbacks[0](i)
            if callbacks[1] is not None:
                callbacks[1](out["pred_xstart"], i)
            if select_kept(index, log_every_t, start):
                kept["x_inter"].append(z)
                kept["pred_x0"].append(out["pred_xstart"])
        return z, kept


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


def from_index(diffusion, start: int):
    """The process `diffusion` as one whose samplers start at index `start`."""
    return _UpTo(diffusion, start)


class _UpTo:
    def __init__(self, diffusion, start):
        self._diffusion, self.num_timesteps = diffusion, start + 1

    def __getattr__(self, name):
        return getattr(self._diffusion, name)


def randn(shape: tuple[int, ...], device, random: PerSample | None) -> torch.Tensor:
    """Standard normal noise of `shape` [B, ...], from the generators `random` (None: the global one)."""
    return torch.randn(shape, device=device) if random is None else random.randn(shape[1:]).to(device)


def gaussian_noise(random: PerSample | None, temperature: float = 1.0, dropout: float = 0.0) -> Callable:
    """A function z -> noise shaped like it, from the generators `random` (None: the global one)."""

    def noise(z):
        drawn = torch.randn_like(z) if random is None else random.randn_like(z)
        drawn = temperature * drawn
        return F.dropout(drawn, p=dropout) if dropout else drawn

    return noise
