"""Upstream's methods for single steps and whole runs of the process."""

import numpy as np
import pytest
import torch as th

from ldm.models.diffusion.ddpm import DDPM
from tests.ldm_models import CLASSES, CONTEXT, maps, shaken, small, unet_config


@pytest.fixture(scope="module")
def model():
    return small(
        conditioning_key="crossattn",
        cond_stage_config=CLASSES,
        cond_stage_key="class_label",
        unet_config=CONTEXT,
    )


@pytest.fixture
def batch(model):
    """(latents, conditioning, timesteps)."""
    th.manual_seed(3)
    cond = model.get_learned_conditioning({"class_label": th.tensor([0, 3, 1])})
    return th.randn(3, 2, 8, 8), cond, th.tensor([0, 7, 39])


def at(model, table, t):
    return th.tensor(np.asarray(table)[t.numpy()], dtype=th.float32).reshape(-1, 1, 1, 1)


def by_hand(model, x, cond, t):
    """(mean, variance, x_0) of p(x_{t-1} | x_t), from the betas alone (Ho et al. 2020, equation 7)."""
    betas = np.asarray(model.betas, dtype=np.float64)
    abar = np.cumprod(1 - betas)
    before = np.append(1.0, abar[:-1])
    eps = model.apply_model(x, t, cond)
    x_start = (x - at(model, 1 - abar, t).sqrt() * eps) / at(model, abar, t).sqrt()
    mean = at(model, np.sqrt(before) * betas / (1 - abar), t) * x_start
    mean = mean + at(model, np.sqrt(1 - betas) * (1 - before) / (1 - abar), t) * x
    return mean, at(model, betas * (1 - before) / (1 - abar), t), x_start


@th.no_grad()
def test_a_step_is_that_of_the_formulas(model, batch):
    x, cond, t = batch
    mean, variance, x_start = by_hand(model, x, cond, t)
    ours = model.p_mean_variance(x, cond, t, clip_denoised=False, return_x0=True)
    # The betas are float32 buffers here, float64 in the model: their last digits differ.
    th.testing.assert_close(ours[0], mean, rtol=2e-3, atol=2e-3)
    th.testing.assert_close(ours[1], variance.expand_as(x), rtol=2e-3, atol=1e-6)
    th.testing.assert_close(ours[3], x_start, rtol=5e-3, atol=5e-3)
    th.manual_seed(5)
    step, predicted = model.p_sample(x, cond, t, return_x0=True, temperature=0.5)
    th.manual_seed(5)
    noise = th.randn_like(x)
    expected = ours[0] + (t > 0).float().reshape(-1, 1, 1, 1) * 0.5 * ours[1].sqrt() * noise
    th.testing.assert_close(step, expected, rtol=1e-4, atol=1e-4)
    th.testing.assert_close(predicted, ours[3])


def test_noise_may_be_repeated(model):
    x, t = th.randn(1, 2, 8, 8).expand(3, -1, -1, -1), th.full((3,), 20)
    cond = model.get_learned_conditioning({"class_label": th.tensor([2, 2, 2])})
    same, other = (model.p_sample(x, cond, t, repeat_noise=repeat) for repeat in (True, False))
    th.testing.assert_close(same[0], same[2])
    assert (other[0] - other[2]).abs().max() > 0.01


def test_the_forward_process_and_its_inversions(model, batch):
    x, _, t = batch
    noise = th.randn_like(x)
    x_t = model.q_sample(x, t, noise)
    th.testing.assert_close(model.predict_start_from_noise(x_t, t, noise), x, rtol=1e-3, atol=1e-3)
    mean, variance, _ = model.q_mean_variance(x, t)
    th.testing.assert_close(x_t, mean + variance.sqrt() * noise)
    # At t = 0 the posterior is the image itself.
    th.testing.assert_close(model.q_posterior(x, x_t, t)[0][0], x[0], rtol=1e-4, atol=1e-4)


def test_a_whole_run_keeps_what_lies_on_the_way(model, batch):
    _, cond, _ = batch
    start = th.randn(3, 2, 8, 8)
    th.manual_seed(1)
    out, kept = model.p_sample_loop(cond, (3, 2, 8, 8), True, x_T=start, verbose=False, log_every_t=10)
    assert len(kept) == 1 + 5 and th.equal(kept[0], start) and th.equal(kept[-1], out)  # 39, 30, 20, 10, 0
    th.manual_seed(1)
    again, predicted = model.progressive_denoising(
        cond, (2, 8, 8), verbose=False, batch_size=3, x_T=start, log_every_t=10
    )
    assert th.equal(again, out) and len(predicted) == 5
    th.testing.assert_close(predicted[-1], out)  # the last step ends at the predicted latent
    th.manual_seed(1)
    assert th.equal(model.sample(cond, 3, x_T=start, verbose=False), out)


def test_a_run_may_start_late_and_keep_known_latents(model, batch):
    _, cond, _ = batch
    seen = []
    x0, mask = th.full((3, 2, 8, 8), 0.3), th.zeros(3, 1, 8, 8)
    mask[..., :4] = 1
    model.p_sample_loop(cond, (3, 2, 8, 8), verbose=False, start_T=5, callback=seen.append)
    assert seen == [4, 3, 2, 1, 0]
    out = model.p_sample_loop(cond, (3, 2, 8, 8), verbose=False, mask=mask, x0=x0)
    known, free = (out[..., :4] - 0.3).abs().mean(), (out[..., 4:] - 0.3).abs().mean()
    assert known < 0.5 * free


def test_a_model_of_images_samples_them():
    model = shaken(DDPM(unet_config(), timesteps=12, image_size=8, channels=2, log_every_t=4).eval())
    out, kept = model.p_sample_loop((2, 2, 8, 8), return_intermediates=True)
    assert len(kept) == 5 and out.abs().max() <= 1  # clipped: noise, 11, 8, 4, 0
    assert model.sample(3).shape == (3, 2, 8, 8)
    t = th.tensor([0, 11])
    assert model.p_sample(th.randn(2, 2, 8, 8), t).shape == (2, 2, 8, 8)


def test_images_of_a_model_of_images_for_the_log():
    model = shaken(DDPM(unet_config(), timesteps=12, image_size=8, channels=2, log_every_t=4).eval())
    batch = {"image": maps(3)}
    shown = model.log_images(batch, N=2, n_row=1)
    assert th.equal(shown["inputs"], batch["image"][:2].permute(0, 3, 1, 2))
    assert shown["diffusion_row"].shape == (1, 2, 8, 4 * 8)  # at timesteps 0, 4, 8 and 11
    assert th.equal(shown["denoise_row"][..., -8:], shown["samples"]) and len(shown["samples"]) == 2
    again = model.log_images(batch, N=2, return_keys=["samples"])
    assert list(again) == ["samples"] and th.equal(again["samples"], shown["samples"])
    assert not th.equal(model.log_images(batch, N=2, split="val")["samples"], shown["samples"])


def test_decoding_passes_gradients_where_asked(model):
    z = th.randn(1, 2, 8, 8, requires_grad=True)
    model.differentiable_decode_first_stage(z).sum().backward()
    assert z.grad.abs().min() > 0
    assert not model.decode_first_stage(z).requires_grad
