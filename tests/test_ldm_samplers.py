"""DDIM, PLMS and DPM-Solver++ under latent-diffusion's interface."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch as th

from guided_diffusion.errors import UserValueError
from guided_diffusion.seeding import PerSample
from ldm.models.diffusion import sampling
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import SAMPLERS
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from tests.compare import agree
from tests.ldm_models import CLASSES, CONTEXT, small

PARITY = Path(__file__).parent / "parity"
SHAPE = (2, 8, 8)


@pytest.fixture(scope="module")
def models():
    return {name: small(parameterization=name) for name in ("eps", "x0", "v")}


@pytest.fixture(scope="module")
def conditional():
    return small(
        cond_stage_config=CLASSES,
        cond_stage_key="class_label",
        conditioning_key="crossattn",
        unet_config=CONTEXT,
    )


def start(n=2):
    return th.randn(n, *SHAPE, generator=th.Generator().manual_seed(2))


def predictions(model, z, t):
    """(eps, x_0) that the network's output at timestep t stands for."""
    abar = float(np.cumprod(1 - np.linspace(1e-4**0.5, 2e-2**0.5, 40) ** 2)[t])
    out = model.model.diffusion_model(z, th.full((len(z),), t)).double()
    z = z.double()
    if model.parameterization == "v":
        return abar**0.5 * out + (1 - abar) ** 0.5 * z, abar**0.5 * z - (1 - abar) ** 0.5 * out
    if model.parameterization == "x0":
        return (z - abar**0.5 * out) / (1 - abar) ** 0.5, out
    return out, (z - (1 - abar) ** 0.5 * out) / abar**0.5


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
@th.no_grad()
def test_ddim_agrees_with_its_formula(models, parameterization):
    """Song et al. 2020, equation 12 at eta = 0, over upstream's timesteps down to alphas_cumprod[0]."""
    model = models[parameterization]
    abar = np.cumprod(1 - np.linspace(1e-4**0.5, 2e-2**0.5, 40) ** 2)
    timesteps = [1, 9, 17, 25, 33]  # every eighth, and one later
    z, x0s = start(), []
    for step in reversed(range(5)):
        before = abar[timesteps[step - 1]] if step else abar[0]
        eps, x0 = predictions(model, z.float(), timesteps[step])
        z = before**0.5 * x0 + (1 - before) ** 0.5 * eps
        x0s.append(x0)
    samples, kept = DDIMSampler(model).sample(5, 2, SHAPE, x_T=start(), verbose=False, log_every_t=1)
    assert th.allclose(samples, z.float(), atol=1e-3 if parameterization == "x0" else 1e-4)
    assert len(kept["x_inter"]) == len(kept["pred_x0"]) == 6
    assert th.equal(kept["x_inter"][-1], samples) and th.equal(kept["x_inter"][0], start())
    assert th.allclose(kept["pred_x0"][1], x0s[0].float(), atol=1e-3)


@pytest.mark.parametrize("steps", [10, 50, 200])
def test_the_process_has_upstreams_tables(steps):
    """The recorded DDIM tables: the sampler's process steps from abar to abar_prev with sigma."""
    case = json.loads((PARITY / "ldm" / "index.json").read_text())["schedules"]["sd"]
    args = case["args"]
    model = small(
        timesteps=args["n"],
        beta_schedule=args["schedule"],
        linear_start=args["start"],
        linear_end=args["end"],
    )
    sampler = DDIMSampler(model)
    sampler.make_schedule(steps, ddim_eta=0.5)
    expected, process = case[f"ddim{steps}"], sampler.diffusion
    assert sampler.ddim_timesteps.tolist() == expected["timesteps"]
    assert process.timestep_map == [0, *expected["timesteps"]]
    assert np.allclose(process.alphas_cumprod[1:], expected["alphas"], rtol=1e-9)
    assert np.allclose(process.alphas_cumprod_prev[1:], expected["alphas_prev"], rtol=1e-9)
    assert np.allclose(0.5 * np.sqrt(process.posterior_variance[1:]), expected["sigmas"], rtol=1e-6)


@th.no_grad()
def test_eta_is_the_noise_of_the_steps(models):
    """One step, from timestep 1 to 0: noise of standard deviation sigma, times the temperature."""
    model, sampler = models["eps"], DDIMSampler(models["eps"])
    many = start(1).expand(200, -1, -1, -1)
    options = dict(x_T=many, verbose=False, conditioning=None)
    still, _ = sampler.sample(1, 200, SHAPE, **options)
    assert sampler.ddim_timesteps.tolist() == [1]
    abar = model.alphas_cumprod.double()
    sigma = ((1 - abar[0]) / (1 - abar[1]) * (1 - abar[1] / abar[0])).sqrt()
    for eta, temperature in ((1.0, 1.0), (0.5, 2.0), (1.0, 0.5)):
        moved, _ = sampler.sample(1, 200, SHAPE, eta=eta, temperature=temperature, **options)
        assert moved.std(dim=0).mean() == pytest.approx(float(eta * temperature * sigma), rel=0.05)
    assert still.std(dim=0).max() < 1e-5
    dropped, _ = sampler.sample(1, 200, SHAPE, eta=1.0, noise_dropout=0.5, **options)
    at_rest = (dropped - dropped.mode(dim=0).values).abs() < 1e-6
    assert at_rest.float().mean() > 0.4


@th.no_grad()
def test_plms_agrees_with_its_formula(models):
    """Liu et al. 2022: Heun's method for the first step, then Adams-Bashforth of order 2, 3, 4."""
    model = models["eps"]
    abar = np.cumprod(1 - np.linspace(1e-4**0.5, 2e-2**0.5, 40) ** 2)
    timesteps, z, history = [1, 9, 17, 25, 33], start(), []

    def transfer(z, eps, now, then):
        x0 = (z - (1 - now) ** 0.5 * eps) / now**0.5
        return then**0.5 * x0 + (1 - then) ** 0.5 * eps

    for step in reversed(range(5)):
        now, then = abar[timesteps[step]], abar[timesteps[step - 1]] if step else abar[0]
        eps, _ = predictions(model, z.float(), timesteps[step])
        if not history:
            after, _ = predictions(model, transfer(z, eps, now, then).float(), timesteps[step - 1])
            slope = (eps + after) / 2
        else:
            table = {1: (3, -1), 2: (23, -16, 5), 3: (55, -59, 37, -9)}[len(history)]
            total = sum(c * e for c, e in zip(table, [eps, *reversed(history)], strict=True))
            slope = total / {1: 2, 2: 12, 3: 24}[len(history)]
        z = transfer(z, slope, now, then)
        history = [*history, eps][-3:]
    samples, _ = PLMSSampler(model).sample(5, 2, SHAPE, x_T=start(), verbose=False)
    assert th.allclose(samples, z.float(), atol=1e-4)


@th.no_grad()
def test_all_samplers_solve_one_equation(models):
    """With many steps DDIM, PLMS and DPM-Solver++ end at the same latents, with few the last two are closer."""
    model = models["eps"]

    def run(sampler, steps):
        return sampler(model).sample(steps, 2, SHAPE, x_T=start(), verbose=False)[0]

    exact = run(DDIMSampler, 40)
    assert (run(DPMSolverSampler, 39) - exact).square().mean() < 1e-3
    error = {s: (run(s, 8) - exact).square().mean() for s in (DDIMSampler, PLMSSampler, DPMSolverSampler)}
    assert error[PLMSSampler] < error[DDIMSampler] and error[DPMSolverSampler] < error[DDIMSampler]


@th.no_grad()
def test_guidance_without_a_classifier(conditional):
    """Each step goes along free + scale (conditional - free)."""
    model = conditional
    cond = model.get_learned_conditioning({"class_label": th.tensor([1, 2])})
    free = model.get_unconditional_conditioning(2, null_label=3)
    sampler = DDIMSampler(model)
    guided, _ = sampler.sample(
        1,
        2,
        SHAPE,
        cond,
        x_T=start(),
        verbose=False,
        unconditional_guidance_scale=3.0,
        unconditional_conditioning=free,
    )
    t, (now, then) = th.tensor([1, 1]), (model.alphas_cumprod[1], model.alphas_cumprod[0])
    eps_free, eps_cond = (model.apply_model(start(), t, c) for c in (free, cond))
    eps = eps_free + 3 * (eps_cond - eps_free)
    x0 = (start() - (1 - now).sqrt() * eps) / now.sqrt()
    assert th.allclose(guided, then.sqrt() * x0 + (1 - then).sqrt() * eps, atol=1e-5)
    plain, _ = sampler.sample(4, 2, SHAPE, cond, x_T=start(), verbose=False)
    same, _ = sampler.sample(4, 2, SHAPE, cond["c_crossattn"][0], x_T=start(), verbose=False,
                             unconditional_guidance_scale=1.0, unconditional_conditioning=free)  # fmt: skip
    assert th.equal(plain, same)


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler, DPMSolverSampler])
@th.no_grad()
def test_masked_latents_are_kept(models, sampler):
    x0, mask = th.ones(2, *SHAPE), th.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    samples, _ = sampler(models["eps"]).sample(20, 2, SHAPE, x_T=start(), mask=mask, x0=x0, verbose=False)
    free, _ = sampler(models["eps"]).sample(20, 2, SHAPE, x_T=start(), verbose=False)
    # The last step is not masked: it removes the noise of the one before.
    assert (samples - 1)[..., :4].abs().mean() < 0.3 * (free - 1)[..., :4].abs().mean()
    assert (samples - 1)[..., 4:].abs().mean() > (samples - 1)[..., :4].abs().mean()


@th.no_grad()
def test_callbacks_corrector_and_quantisation(models, monkeypatch):
    model, calls, images = models["eps"], [], []

    class Corrector:
        def modify_score(self, model, e_t, x, t, c, shift):
            return e_t + shift

    sampler = DDIMSampler(model)
    kwargs = dict(x_T=start(), verbose=False)
    plain, _ = sampler.sample(4, 2, SHAPE, **kwargs)
    sampler.sample(
        4, 2, SHAPE, callback=calls.append, img_callback=lambda p, i: images.append((i, p.shape)), **kwargs
    )
    assert calls == [0, 1, 2, 3] and images == [(i, (2, *SHAPE)) for i in range(4)]
    options = dict(score_corrector=Corrector(), **kwargs)
    assert th.equal(sampler.sample(4, 2, SHAPE, corrector_kwargs={"shift": 0.0}, **options)[0], plain)
    assert not th.allclose(sampler.sample(4, 2, SHAPE, corrector_kwargs={"shift": 0.1}, **options)[0], plain)
    monkeypatch.setattr(model.first_stage_model, "quantize", lambda z: (z.round(), None, None), raising=False)
    _, kept = sampler.sample(4, 2, SHAPE, quantize_x0=True, log_every_t=1, **kwargs)
    assert all(th.equal(x, x.round()) for x in kept["pred_x0"][1:])


@th.no_grad()
def test_a_sample_does_not_depend_on_its_batch(models):
    sampler, options = DDIMSampler(models["eps"]), dict(eta=1.0, verbose=False)
    four, _ = sampler.sample(4, 4, SHAPE, random=PerSample.derived(7, range(4)), **options)
    two, _ = sampler.sample(4, 2, SHAPE, random=PerSample.derived(7, [1, 3]), **options)
    assert th.allclose(four[[1, 3]], two, atol=1e-5) and not th.allclose(four[0], four[1])


@th.no_grad()
def test_noising_and_decoding_part_of_the_way(models):
    """decode from the last step is sampling; from early steps it stays near the latents."""
    sampler = DDIMSampler(models["eps"])
    whole, _ = sampler.sample(8, 2, SHAPE, x_T=start(), verbose=False)
    assert th.equal(sampler.decode(start(), None, 8, verbose=False), whole)
    x0 = start() / 2
    noised = sampler.stochastic_encode(x0, th.tensor([0, 3]), noise=th.ones_like(x0))
    abar = models["eps"].alphas_cumprod[sampler.ddim_timesteps[[0, 3]]].reshape(2, 1, 1, 1)
    agree(noised, abar.sqrt() * x0 + (1 - abar).sqrt(), rtol=1e-5)
    other = sampler.stochastic_encode(x0, th.tensor([0, 3]), use_original_steps=True, noise=th.zeros_like(x0))
    agree(other, models["eps"].alphas_cumprod[[0, 3]].sqrt().reshape(2, 1, 1, 1) * x0, rtol=1e-5)


@th.no_grad()
def test_ancestral_sampling(models):
    """`sample` is DDPM in all steps: with one seed and the noise it needs, always the same."""
    model = models["eps"]
    drawn = [model.sample(None, 2, verbose=False, random=PerSample.derived(s, range(2))) for s in (0, 0, 1)]
    assert th.equal(drawn[0], drawn[1]) and not th.equal(drawn[0], drawn[2])
    latents, _ = model.sample_log(None, 2, ddim=False, ddim_steps=None, random=PerSample.derived(0, range(2)))
    assert th.equal(latents, drawn[0])


def test_every_sampler_is_the_one_loop(models, monkeypatch):
    """They choose timesteps and call `joint_sample`."""
    model, calls = models["eps"], []
    one = sampling.joint_sample

    def counted(diffusion, **options):
        calls.append((options["sampler"], options["take"]))
        return one(diffusion, **options)

    monkeypatch.setattr(sampling, "joint_sample", counted)
    for sampler in SAMPLERS.values():
        sampler(model).sample(4, 2, SHAPE, verbose=False)
    model.p_sample_loop(None, (2, *SHAPE), verbose=False, start_T=3)
    model.progressive_denoising(None, (2, *SHAPE), verbose=False)
    sampler = DDIMSampler(model)
    sampler.make_schedule(8)
    sampler.decode(start(), None, 3, verbose=False)
    assert calls == [*((name, 4) for name in SAMPLERS), ("ddpm", 3), ("ddpm", 40), ("ddim", 3)]


def test_wrong_options_are_named(models, conditional):
    for sampler in (PLMSSampler, DPMSolverSampler):
        with pytest.raises(UserValueError, match="only DDIM has an eta"):
            sampler(models["eps"]).sample(4, 2, SHAPE, eta=0.5)
    ddim = DDIMSampler(models["eps"])
    with pytest.raises(UserValueError, match="41 sampling steps"):
        ddim.sample(41, 2, SHAPE)
    with pytest.raises(UserValueError, match="does not know dynamic_threshold"):
        ddim.sample(4, 2, SHAPE, dynamic_threshold=1)
    with pytest.raises(UserValueError, match="mask and x0"):
        ddim.sample(4, 2, SHAPE, mask=th.ones(2, 1, 8, 8))
    with pytest.raises(UserValueError, match="predicts x0"):
        DDIMSampler(models["x0"]).sample(4, 2, SHAPE, score_corrector=object())
    cond = conditional.get_learned_conditioning({"class_label": th.tensor([1, 2, 3])})
    with pytest.raises(UserValueError, match="c_crossattn has 3 samples, the batch 2"):
        DDIMSampler(conditional).sample(4, 2, SHAPE, cond)
    with pytest.raises(UserValueError, match="between 1 and 39"):
        DPMSolverSampler(models["eps"]).sample(40, 2, SHAPE)
