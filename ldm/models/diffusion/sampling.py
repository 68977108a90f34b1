"""Latent diffusion's process and its samplers: what the network predicts, the noise (eps), the latent (x0) or the
velocity v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022; Stable Diffusion 2.1-v), with the process, its
tables and its loss weights for each; and upstream's samplers, which choose timesteps and call `joint_sample`.

Fewer steps than the process has end at alphas_cumprod[0], as upstream's do: timestep 0 belongs to the respaced
process, and its own step, to the image, is not taken.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from guided_diffusion.errors import UserValueError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from guided_diffusion.mt.sampling import joint_sample
from guided_diffusion.respace import SpacedDiffusion
from guided_diffusion.seeding import PerSample
from ldm.models.diffusion.conditioning import joined
from ldm.modules.diffusionmodules.util import make_beta_schedule, make_ddim_timesteps

PARAMETERIZATIONS = ("eps", "x0", "v")

# Buffers that checkpoints hold, in their order; GaussianDiffusion has them under the same names.
TABLES = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


def noise_betas(
    given_betas=None,
    beta_schedule="linear",
    timesteps=1000,
    linear_start=1e-4,
    linear_end=2e-2,
    cosine_s=8e-3,
) -> np.ndarray:
    """The betas that a configuration's parameters mean, float64 [T]."""
    if given_betas is not None:
        return np.asarray(given_betas, dtype=np.float64)
    return make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)


def make_diffusion(
    betas: np.ndarray,
    parameterization: str,
    aggregation=None,
    kept: Iterable[int] | None = None,
) -> GaussianDiffusion:
    """The process of `betas` [T], or with the same marginals over the timesteps `kept`; aggregation: of the
    modalities in it, if any.

    A network that predicts v is seen as one of eps (`Denoiser`). UserValueError for an unknown
    parameterization.
    """
    if parameterization not in PARAMETERIZATIONS:
        raise UserValueError(
            f"unknown parameterization {parameterization!r}: choose one of {', '.join(PARAMETERIZATIONS)}"
        )
    mean_type = ModelMeanType.START_X if parameterization == "x0" else ModelMeanType.EPSILON
    options = dict(
        betas=betas,
        model_mean_type=mean_type,
        model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=LossType.MSE,
    )
    if aggregation is not None:
        options["aggregation"] = aggregation
    return GaussianDiffusion(**options) if kept is None else SpacedDiffusion(kept, **options)


def tables(diffusion: GaussianDiffusion) -> dict[str, torch.Tensor]:
    """The buffers that a checkpoint holds, float32 [T], by name in their order."""
    arrays = {name: getattr(diffusion, name) for name in TABLES}
    # Here the logarithm at t = 0, where the variance is 0, has a floor of its own.
    arrays["posterior_log_variance_clipped"] = np.log(diffusion.posterior_variance.clip(min=1e-20))
    return {name: torch.tensor(table, dtype=torch.float32) for name, table in arrays.items()}


def elbo_weights(diffusion: GaussianDiffusion, parameterization: str) -> torch.Tensor:
    """How the squared error counts in the variational bound at each timestep, float32 [T].

    eps: beta^2 / (2 sigma^2 alpha (1 - abar)) (Ho et al. 2020, equation 12), t = 0 taking the next one's; x0:
    upstream's sqrt(abar) / (2 (2 - abar)); v: 1.
    """
    abar, betas = diffusion.alphas_cumprod, diffusion.betas
    if parameterization == "v":
        weights = np.ones_like(betas)
    elif parameterization == "x0":
        weights = 0.5 * np.sqrt(abar) / (2 - abar)
    else:
        variance = np.append(np.nan, diffusion.posterior_variance[1:])
        weights = betas**2 / (2 * variance * (1 - betas) * (1 - abar))
    if len(weights) > 1:
        weights[0] = weights[1]
    return torch.tensor(np.nan_to_num(weights), dtype=torch.float32)


def min_snr_weights(diffusion: GaussianDiffusion, parameterization: str, gamma: float) -> torch.Tensor:
    """How the squared error counts at each timestep so that the error of x_0 counts min(SNR, gamma), float32
    [T] (Hang et al. 2023, section 3.4); SNR = abar / (1 - abar).

    eps: min(SNR, gamma) / SNR; x0: min(SNR, gamma); v: min(SNR, gamma) / (SNR + 1).
    """
    snr = diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod)
    per_error = {"eps": snr, "x0": np.ones_like(snr), "v": snr + 1}[parameterization]
    return torch.tensor(np.minimum(snr, gamma) / per_error, dtype=torch.float32)


class Denoiser:
    """A latent diffusion's network as guided_diffusion calls it: (z, timesteps, **conditioning) -> noise, or
    x_0, with the heads' predictions where it has heads.

    model: a LatentDiffusion; timesteps are those of the full process. A velocity becomes the noise
    sqrt(abar_t) v + sqrt(1 - abar_t) z_t, in float32.
    """

    def __init__(self, model):
        self.model, self.wrapper = model, model.model

    def __call__(self, z: torch.Tensor, timesteps: torch.Tensor, **conditioning):
        output = self.wrapper(z, timesteps, **conditioning)
        if self.model.parameterization != "v":
            return output
        v, predictions = output if isinstance(output, tuple) else (output, None)
        latent = z[:, : v.shape[1]].float()  # beside it there may be modalities, as further channels
        eps = self.model.predict_eps_from_z_and_v(latent, timesteps, v.float())
        return eps if predictions is None else (eps, predictions)

    @property
    def codes(self):
        """The codes that stand still, once there are any; see JointLatentDiffusion."""
        return getattr(self.model, "standing_codes", None)

    @property
    def heads(self):
        """The heads of the modalities, by name."""
        return self.wrapper.heads

    @property
    def training(self) -> bool:
        """Is the network in training mode?"""
        return self.wrapper.training

    def parameters(self):
        """The network's."""
        return self.wrapper.parameters()

    def eval(self):
        """Put the network into evaluation mode."""
        return self.train(False)

    def train(self, mode: bool = True):
        """Put the network into training mode, or out of it."""
        self.wrapper.train(mode)
        return self


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

    def parameters(self):
        """The network's."""
        return self.denoiser.parameters()

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


class Sampler:
    """A sampler with latent-diffusion's interface, for `model`, a LatentDiffusion.

    schedule is accepted as upstream does and has no effect: the model knows its own. The timesteps are DDIM's,
    upstream's: one later than every (T // S)-th.
    """

    name: str  # in guided_diffusion.mt.sampling.SAMPLERS
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
        watch: Callable | None = None,
        **directions,
    ) -> tuple[torch.Tensor, dict]:
        """Latents [batch_size, *shape] in S steps (None: the whole process, down to the image), and what lay on
        the way to them.

        conditioning, unconditional_conditioning: see LatentDiffusion.as_conditioning; x_T: the noise to start from;
        eta: 0 deterministic, 1 as noisy as DDPM; mask [B, 1, h, w]: 1 where latents x0 are kept; quantize_x0: round
        predicted latents to the codebook; temperature, noise_dropout: of each step's noise; callback(i),
        img_callback(pred_x0, i): called after step i; log_every_t: every so many indices `x_inter` and `pred_x0` are
        kept; random: one generator per sample (None: the global one); watch: `Watch` of mt/run.py, of latents; directions: what else the model's `network`
        takes. Of a joint model `values` has the modalities. UserValueError for options that do not go together.
        """
        unknown = sorted(set(directions) - set(self.model.directions))
        if normals_sequence is not None or unknown:
            names = ", ".join(unknown) or "normals_sequence"
            raise UserValueError(f"{type(self).__name__} does not know {names}")
        if (mask is None) != (x0 is None):
            raise UserValueError("mask and x0 are given together")
        cond, free = self._conditioning(conditioning, unconditional_conditioning, batch_size)
        self.make_schedule(S, ddim_eta=eta, verbose=verbose)
        network = self.model.network(
            free, unconditional_guidance_scale, score_corrector, corrector_kwargs, **directions
        )

        def on_step(i, out):
            if callback is not None:
                callback(i)
            if img_callback is not None:
                img_callback(out["pred_xstart"], i)
            if watch is not None:
                joint = out.get("joint")
                watch(i + 1, last + self._to_image, out["pred_xstart"], dict(joint.values) if joint else {})

        noise, last = Noise(random, temperature, noise_dropout), self.diffusion.num_timesteps - 1
        z = noise.randn((batch_size, *shape), self.model.device) if x_T is None else x_T.to(self.model.device)
        kept = dict(quantize=quantize_x0, mask=mask, x0=x0)
        return self._run(network, z, last, noise, cond, on_step, log_every_t, progress=verbose, **kept)

    def _conditioning(self, conditioning, unconditional, batch_size):
        cond = self.model.as_conditioning(conditioning)
        for name, values in cond.items():
            for value in values if isinstance(values, Sequence) else [values]:
                if len(value) != batch_size:
                    raise UserValueError(f"{name} has {len(value)} samples, the batch {batch_size}")
        return cond, None if unconditional is None else self.model.as_conditioning(unconditional)

    def _run(
        self,
        network: Mapping,
        z,
        start: int,
        noise: "Noise",
        cond: Mapping,
        on_step: Callable = lambda i, out: None,
        log_every_t=100,
        quantize=False,
        mask=None,
        x0=None,
        **options,
    ) -> tuple[torch.Tensor, dict]:
        """`joint_sample` of `network` (see DDPM.network) from z at index `start` down to index 0, or to the image, and
        what lay on the way. on_step(i, step) is told of every step; options: of `joint_sample`."""
        kept: dict = {"x_inter": [], "pred_x0": []}
        count = start + self._to_image

        def tell(i, out):
            if i >= 0:
                on_step(i, out)
            if i < 0 or select_kept(count - i - 1, log_every_t, count):
                kept["x_inter"].append(out["sample"])
                kept["pred_x0"].append(out.get("pred_xstart", out["sample"]))

        def keep_known(z, i, encodings):
            if i <= 0:  # not after the last step
                return z
            t = torch.full((len(z),), i, device=z.device)
            return mask * self.diffusion.q_sample(x0, t, noise.randn_like(z), encodings) + (1 - mask) * z

        out = joint_sample(
            _UpTo(self.diffusion, start),
            shape=tuple(z.shape),
            random=noise,
            sampler=self.name,
            model_kwargs=cond,
            noise=z,
            edit=None if mask is None else keep_known,
            take=count,
            on_step=tell,
            denoised_fn=rounded(self.model) if quantize else None,
            **({"eta": self.ddim_eta} if self.stochastic else {}),
            **network,
            **{"clip_denoised": False, **options},
        )
        return out.images, kept | ({"values": out.values} if out.values else {})


class DDPMSampler(Sampler):
    """Ancestral sampling (Ho et al. 2020); see `Sampler`."""

    name = "ddpm"


def ancestral(
    model,
    cond,
    shape: tuple[int, ...],
    *,
    x_T=None,
    start_T: int | None = None,
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
    show: str = "x_inter",
    verbose: bool = False,
    quantize_denoised: bool = False,
    mask=None,
    x0=None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """DDPM's whole run from index `start_T` - 1 down to the image: (samples of `shape`, what lay on the way under
    `show`, every log_every_t steps). callback(index), img_callback(sample, index); others as in `Sampler.sample`."""
    sampler, count = DDPMSampler(model), model.num_timesteps
    start = count if start_T is None else min(start_T, count)
    sampler.make_schedule(None)
    free = None if unconditional_conditioning is None else model.as_conditioning(unconditional_conditioning)

    def on_step(i, out):
        if callback is not None:
            callback(start - 1 - i)
        if img_callback is not None:
            img_callback(out["sample"], start - 1 - i)

    noise, every = Noise(random, temperature, noise_dropout), log_every_t or model.log_every_t
    z = noise.randn(shape, model.device) if x_T is None else x_T.to(model.device)
    network = model.network(free, unconditional_guidance_scale, score_corrector, corrector_kwargs)
    out, kept = sampler._run(
        network,
        z,
        start - 1,
        noise,
        model.as_conditioning(cond),
        on_step,
        every,
        quantize_denoised,
        mask,
        x0,
        clip_denoised=model.clip_denoised,
        progress=verbose,
    )
    return out, kept[show][show == "pred_x0" :]  # a prediction there is not at the start


def rounded(model) -> Callable:
    """A function that rounds latents to the codebook of the model's first stage."""

    def quantize(z):
        entries = model.first_stage_model.quantize(z)
        return entries[0] if isinstance(entries, tuple) else entries

    return quantize


def select_kept(index: int, every: int, count: int) -> bool:
    """Is the step at `index` of `count` one to keep? The first is, and those at multiples of `every`."""
    return index % every == 0 or index == count - 1


class _UpTo:
    """The process `diffusion` as one whose samplers start at index `start`."""

    def __init__(self, diffusion, start):
        self._diffusion, self.num_timesteps = diffusion, start + 1

    def __getattr__(self, name):
        return getattr(self._diffusion, name)


@dataclass(frozen=True)
class Noise:
    """Standard normal noise from the generators `random`, one per sample (None: the global one); that of the steps times
    `temperature`, with `dropout`, and with `repeated` the same for all samples."""

    random: PerSample | None = None
    temperature: float = 1.0
    dropout: float = 0.0
    repeated: bool = False

    def randn(self, shape: tuple[int, ...], device) -> torch.Tensor:
        """To start from: [B, ...] = shape."""
        if self.random is None:
            return torch.randn(tuple(shape), device=device)
        return self.random.randn(shape[1:]).to(device)

    def randn_like(self, z: torch.Tensor) -> torch.Tensor:
        """Of a step to z [B, ...]."""
        like = z[:1] if self.repeated else z
        drawn = torch.randn_like(like) if self.random is None else self.random.randn_like(like)
        drawn = self.temperature * drawn
        return (F.dropout(drawn, p=self.dropout) if self.dropout else drawn).expand_as(z)
