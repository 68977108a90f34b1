"""The sampler catalogue, and sampling in any direction (paper Algorithm 1).

A sampler is a function (diffusion, model, z, randn_like, ...) -> generator of step dicts, from t = T-1 down
to 0: `sample` is z_{t-1}, `pred_xstart` the predicted image, `joint` the network's JointOutput where there
are modalities. All work in the moving frame y_t = z_t - shift_t, which is a plain DDPM; fewer steps come from
a respaced diffusion. A new sampler is a new function in SAMPLERS.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch as th

from ..errors import UserValueError
from ..gaussian_diffusion import GaussianDiffusion
from ..progress import tqdm
from ..seeding import PerSample
from .aggregation import encodings_of, from_frame, to_frame
from .denoiser import JointDenoiser
from .modality_set import ModalitySet, Values
from .solvers import State, half_log_snr, multistep, usable

Edit = Callable[[th.Tensor, int, object], th.Tensor]
_ORDER = 3  # of the exponential multistep methods


def _steps(diffusion, z):
    for i in reversed(range(diffusion.num_timesteps)):
        yield i, th.full((len(z),), i, device=z.device)


def _keep(z, i, encodings):
    return z


def ddpm(
    diffusion: GaussianDiffusion, model, z, randn_like, edit: Edit = _keep, repeats: int = 1, **kwargs
) -> Iterator[dict]:
    """Ancestral sampling (Ho et al. 2020).

    edit(z, i, encodings): changes z_i after the step to it, i = -1 being the image; encodings: the modalities' of
    that step, None without.
    repeats > 1 goes back one step and down again that often (RePaint's resampling, Lugmayr et al. 2022), so
    that an edit harmonises.
    """
    for i, t in _steps(diffusion, z):
        for again in reversed(range(repeats if i else 1)):
            out = diffusion.p_sample(model, z, t, randn_like=randn_like, **kwargs)
            out["sample"] = edit(out["sample"], i - 1, encodings_of(out))
            if again:
                # q(y_t | y_{t-1}), in the moving frame.
                encodings = encodings_of(out)
                y = to_frame(diffusion, out["sample"], t - 1, encodings)
                beta = float(diffusion.betas[i])
                y = (1 - beta) ** 0.5 * y + beta**0.5 * randn_like(y)
                z = from_frame(diffusion, y, t, encodings)
        yield out
        z = out["sample"]


def ddim(
    diffusion: GaussianDiffusion, model, z, randn_like, edit: Edit = _keep, eta: float = 0.0, **kwargs
) -> Iterator[dict]:
    """DDIM (Song et al. 2020), deterministic at eta = 0."""
    for i, t in _steps(diffusion, z):
        out = diffusion.ddim_sample(model, z, t, eta=eta, randn_like=randn_like, **kwargs)
        out["sample"] = edit(out["sample"], i - 1, encodings_of(out))
        yield out
        z = out["sample"]


def _predict(diffusion, model, z, t, cond_fn=None, **kwargs):
    """p_mean_variance with guidance in the score, and the encodings of the moving frame."""
    out = diffusion.p_mean_variance(model, z, t, **kwargs)
    if cond_fn is not None:
        out = diffusion.condition_score(cond_fn, out, z, t, model_kwargs=kwargs.get("model_kwargs"))
    return out, encodings_of(out)


def _combine(weights, states):
    """The weighted sum of (prediction, encodings) pairs: a multistep method extrapolates both, or it is of
    first order in the modalities."""
    predictions, encodings = zip(*states, strict=True)
    total = sum(w * p for w, p in zip(weights, predictions, strict=True))
    if not encodings[0]:
        return total, None
    return total, {
        name: sum(w * e[name] for w, e in zip(weights, encodings, strict=True)) for name in encodings[0]
    }


def _along_noise(diffusion, z, i, t, noise, encodings, clip):
    """z_{i-1}: the deterministic DDIM step along `noise` in the frame of `encodings`. clip: its image, since near
    abar = 0 that of an extrapolated noise may be far off."""
    abar, abar_prev = diffusion.alphas_cumprod[i], diffusion.alphas_cumprod_prev[i]
    y = to_frame(diffusion, z, t, encodings)
    x_start = (y - (1 - abar) ** 0.5 * noise) / abar**0.5
    if clip:
        x_start = x_start.clamp(-1, 1)
        noise = (y - abar**0.5 * x_start) / (1 - abar) ** 0.5
    return from_frame(diffusion, abar_prev**0.5 * x_start + (1 - abar_prev) ** 0.5 * noise, t - 1, encodings)


def _noise_of(diffusion, model, z, t, **kwargs):
    """The model's step dict at z_t, and its (noise, encodings)."""
    out, encodings = _predict(diffusion, model, z, t, **kwargs)
    y = to_frame(diffusion, z, t, encodings)
    return out, (diffusion._predict_eps_from_xstart(y, t, out["pred_xstart"]), encodings)


def heun(
    diffusion: GaussianDiffusion, model, z, randn_like, edit: Edit = _keep, clip_denoised=True, **kwargs
) -> Iterator[dict]:
    """Heun's method (Karras et al. 2022, Algorithm 1 without churn): second order, two passes of the network a
    step but the last. Deterministic."""
    kwargs["clip_denoised"] = clip_denoised
    for i, t in _steps(diffusion, z):
        out, slope = _noise_of(diffusion, model, z, t, **kwargs)
        if i:
            ahead = _along_noise(diffusion, z, i, t, *slope, clip_denoised)
            _, after = _noise_of(diffusion, model, ahead, t - 1, **kwargs)
            slope = _combine((1 / 2, 1 / 2), (slope, after))
        z = _along_noise(diffusion, z, i, t, *slope, clip_denoised)
        out["sample"] = z = edit(z, i - 1, encodings_of(out))
        yield out


def plms(
    diffusion: GaussianDiffusion, model, z, randn_like, edit: Edit = _keep, clip_denoised=True, **kwargs
) -> Iterator[dict]:
    """Pseudo linear multistep (Liu et al. 2022): Adams-Bashforth on the noise, Heun's method for the first
    step.

    Deterministic. The extrapolated image is clipped like a predicted one.
    """
    kwargs["clip_denoised"] = clip_denoised
    history: list[tuple] = []
    for i, t in _steps(diffusion, z):
        out, now = _noise_of(diffusion, model, z, t, **kwargs)
        if i == 0:
            slope = now  # the last step ends at the predicted image itself
        elif not history:
            ahead = _along_noise(diffusion, z, i, t, *now, clip_denoised)
            _, after = _noise_of(diffusion, model, ahead, t - 1, **kwargs)
            slope = _combine((1 / 2, 1 / 2), (now, after))
        else:
            weights = {
                1: (3 / 2, -1 / 2),
                2: (23 / 12, -16 / 12, 5 / 12),
                3: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
            }
            slope = _combine(weights[len(history)], (now, *reversed(history)))
        history = [*history, now][-3:]
        out["sample"] = edit(
            _along_noise(diffusion, z, i, t, *slope, clip_denoised), i - 1, encodings_of(out)
        )
        yield out
        z = out["sample"]


def dpm_solver_pp(
    diffusion: GaussianDiffusion, model, z, randn_like, edit: Edit = _keep, eta: float = 0.0, **kwargs
) -> Iterator[dict]:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): second order in the predicted image. Deterministic at eta = 0; at
    1 the same for the reverse stochastic equation (SDE-DPM-Solver++(2M), equation 19 there)."""
    abar, abar_prev = diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev
    log_snr = half_log_snr(abar)
    previous = None
    for i, t in _steps(diffusion, z):
        out, encodings = _predict(diffusion, model, z, t, **kwargs)
        now = out["pred_xstart"], encodings
        if i == 0:
            z = now[0]  # lambda is infinite at the image: the first-order step
        else:
            h = log_snr[i - 1] - log_snr[i]
            x_start, encodings = now
            if previous is not None:
                # Even timesteps grow in lambda towards the image: never extrapolate further than half the
                # last step.
                r = max((log_snr[i] - log_snr[i + 1]) / h, 1.0)
                x_start, encodings = _combine((1 + 1 / (2 * r), -1 / (2 * r)), (now, previous))
            kept = ((1 - abar_prev[i]) / (1 - abar[i])) ** 0.5 * np.exp(-eta * h)
            y = (
                kept * to_frame(diffusion, z, t, encodings)
                - abar_prev[i] ** 0.5 * np.expm1(-(1 + eta) * h) * x_start
            )
            if eta:
                y = y + ((1 - abar_prev[i]) * -np.expm1(-2 * eta * h)) ** 0.5 * randn_like(z)
            z = from_frame(diffusion, y, t - 1, encodings)
        previous = now
        out["sample"] = z = edit(z, i - 1, encodings_of(out))
        yield out


def dpm_solver_pp_sde(
    diffusion: GaussianDiffusion, model, z, randn_like, edit: Edit = _keep, **kwargs
) -> Iterator[dict]:
    """SDE-DPM-Solver++(2M): fresh noise in every step corrects errors of the steps before, as ancestral sampling does."""
    yield from dpm_solver_pp(diffusion, model, z, randn_like, edit, eta=1.0, **kwargs)


def dpm_solver_pp_3m(
    diffusion: GaussianDiffusion, model, z, randn_like, edit: Edit = _keep, **kwargs
) -> Iterator[dict]:
    """DPM-Solver++(3M) (Lu et al. 2022, section 4): third order in the predicted image and the modalities.
    Deterministic."""
    yield from _exponential(diffusion, model, z, edit, False, kwargs)


def unipc(diffusion: GaussianDiffusion, model, z, randn_like, edit: Edit = _keep, **kwargs) -> Iterator[dict]:
    """UniPC-3 (Zhao et al. 2023): each pass of the network also corrects the step before it. Deterministic."""
    yield from _exponential(diffusion, model, z, edit, True, kwargs)


def _exponential(diffusion, model, z, edit, correct, kwargs):
    lambdas, history, before = half_log_snr(diffusion.alphas_cumprod), [], None
    for i, t in _steps(diffusion, z):
        out, encodings = _predict(diffusion, model, z, t, **kwargs)
        now = State(i, out["pred_xstart"], encodings)
        if i == 0:
            z = now.x_start  # lambda is infinite at the image: the first-order step
        else:
            if correct and before is not None:
                start, states, predicted = before
                # A difference, so that what `edit` put in stays.
                z = z + (multistep(diffusion, start, i + 1, [now, *states]) - predicted)
            states = usable(lambdas, i, [now, *history], _ORDER)
            before = z, states, multistep(diffusion, z, i, states)
            z = before[2]
        history = [now, *history][: _ORDER - 1]
        out["sample"] = z = edit(z, i - 1, encodings_of(out))
        yield out


SAMPLERS = {
    "ddpm": ddpm,
    "ddim": ddim,
    "plms": plms,
    "heun": heun,
    "dpm++": dpm_solver_pp,
    "dpm++sde": dpm_solver_pp_sde,
    "dpm++3m": dpm_solver_pp_3m,
    "unipc": unipc,
}
EVENLY_SPACED = ("ddpm",)  # better at few timesteps that are even than at those of `few_timesteps`


@dataclass(frozen=True)
class Known:
    """Pixels of the image that are given: values [B, C, H, W] in [-1, 1] and where, bool [B, 1, H, W].

    They are pasted at the end. every_step also replaces them, noised, at each step (RePaint), `repeats` times
    with resampling (ddpm only).
    """

    values: th.Tensor
    where: th.Tensor
    every_step: bool = False
    repeats: int = 1

    def __post_init__(self):
        if self.where.dtype != th.bool or self.where.shape != (len(self.values), 1, *self.values.shape[2:]):
            raise UserValueError(
                f"known pixels are marked by bool [B, 1, H, W] for values {list(self.values.shape)}, "
                f"not {self.where.dtype} {list(self.where.shape)}"
            )
        if self.repeats < 1 or (self.repeats > 1 and not self.every_step):
            raise UserValueError("resampling repeats steps at least once, and needs every_step")


@dataclass(frozen=True)
class JointSample:
    """images [B, C, H, W] in [-1, 1] (clipped if asked), and the modalities' values by name, given ones
    included."""

    images: th.Tensor
    values: Values


def joint_sample(
    diffusion: GaussianDiffusion,
    modalities: ModalitySet,
    network,
    shape: tuple[int, ...],
    random: PerSample,
    *,
    given: Values | None = None,
    strength: float | dict[str, float] | None = None,
    known: Known | None = None,
    sampler: str = "ddpm",
    order: str = "posterior",
    clip_denoised: bool = True,
    cond_fn=None,
    guidance: float = 1.0,
    model_kwargs: dict | None = None,
    unconditional: dict | None = None,
    absent: Sequence[str] = (),
    noise: th.Tensor | None = None,
    edit: Edit | None = None,
    take: int | None = None,
    on_step: Callable[[int, dict], None] | None = None,
    progress: bool = False,
    **options,
) -> JointSample:
    """Images of `shape` [B, C, H, W] and the modalities that are not given, by any sampler of SAMPLERS.

    random: one generator per sample, so that a sample does not depend on the batch. given, strength, order,
    guidance, unconditional, absent: see JointDenoiser. model_kwargs: the network's conditioning (`context`), which
    cond_fn gets too. cond_fn: as ADM's, called in the moving frame: it sees the noised image alone. known: pixels to
    restore around. noise: to start from; edit(z, i, encodings): changes the start and every step; take: steps taken,
    if not all; on_step(k, step): called with the start as k = -1, and after every step; options: the sampler's own.
    UserValueError for an unknown sampler or shapes that do not fit.
    """
    if sampler not in SAMPLERS:
        raise UserValueError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    if known is not None and known.values.shape != tuple(shape):
        raise UserValueError(f"known pixels are {list(known.values.shape)}, the samples {list(shape)}")
    device = next(network.parameters()).device
    if noise is None:
        if len(random) != shape[0]:
            raise UserValueError(f"{len(random)} generators for {shape[0]} samples")
        noise = random.randn(shape[1:])
    # Algorithm 1 to the letter starts from random modalities; otherwise they are first estimated.
    initial = {m.name: m.start(random, device) for m in modalities} if order == "paper" else {}
    denoiser = JointDenoiser(
        modalities, network, given, strength, order, initial, guidance, unconditional, absent
    )
    z, total = denoiser.start(diffusion, noise.to(device)), diffusion.num_timesteps
    if on_step is not None:
        on_step(-1, {"sample": z})
    if edit is not None:
        z, options["edit"] = edit(z, total - 1, None), edit
    elif known is not None and known.every_step:
        options["edit"] = _replace_known(diffusion, known, random)
    if known is not None and known.repeats > 1:
        if sampler != "ddpm":
            raise UserValueError(f"resampling goes back by random steps: it works with ddpm, not {sampler}")
        options["repeats"] = known.repeats
    images, said, count = z, None, total if take is None else take
    with th.no_grad():
        steps = SAMPLERS[sampler](
            diffusion,
            denoiser,
            z,
            random.randn_like,
            clip_denoised=clip_denoised,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs or {},
            **options,
        )
        for k, out in enumerate(tqdm(islice(steps, count), total=count, disable=not progress, desc=sampler)):
            images, said = out["sample"], out.get("joint")
            if on_step is not None:
                on_step(k, out)
    if clip_denoised:
        images = images.clamp(-1, 1)
    if known is not None:
        images = th.where(known.where, known.values, images)
    return JointSample(images, dict(said.values) if said is not None else {})


def random_labels(modalities: ModalitySet, random: PerSample, names: Collection[str] | None = None) -> Values:
    """Uniformly drawn classes, one-hot [B, classes], of the labels `names`: by default of those that have
    to be given, since the network cannot do without them or nothing tells them."""
    return {m.name: m.draw(random) for m in modalities if (m.drawable if names is None else m.name in names)}


def _replace_known(diffusion, known, random):
    """An edit that puts the known pixels, noised to step i, into z_i."""

    def edit(z, i, encodings):
        target = known.values
        if i >= 0:
            t = th.full((len(z),), i, device=z.device)
            target = diffusion.q_sample(known.values, t, random.randn_like(z), encodings)
        return th.where(known.where, target, z)

    return edit
