"""LatentDiffusion: its losses, weights, latents, training."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch as th
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from guided_diffusion.errors import UserError, UserValueError
from ldm.checkpoint import trained_steps
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.modules.diffusionmodules.util import make_beta_schedule
from ldm.util import instantiate_from_config
from tests.compare import agree
from tests.conftest import ROOT
from tests.ldm_models import CLASSES, CONTEXT, IDENTITY, KL, maps, shaken, small, unet_config

PARITY = Path(__file__).parent / "parity"
TABLES = (
    "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
    "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance "
    "posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2"
).split()


def test_single_task_code_does_not_know_the_joint_models():
    """Nor do the encoders, the samplers or main.py, which the single task needs."""
    single = "ddpm ddim plms dpm_solver sampling conditioning image_diffusion image_log".split()
    names = [*(f"ldm.models.diffusion.{name}" for name in single), "ldm.modules.encoders.modules", "main"]
    code = f"import sys, {', '.join(names)}; print([m for m in sys.modules if m.startswith('ldm') and ('joint' in m or 'vectors' in m)])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# ------------------------------------------------------------------------------------------- layout of the weights


def test_the_state_dict_has_upstreams_layout():
    model = small(
        cond_stage_config=CLASSES,
        cond_stage_key="class_label",
        conditioning_key="crossattn",
        unet_config=CONTEXT,
        first_stage_config=KL,
        scale_by_std=True,
    )
    unet = list(instantiate_from_config(CONTEXT).state_dict())
    expected = [
        *TABLES,
        "scale_factor",
        *(f"model.diffusion_model.{name}" for name in unet),
        "model_ema.decay",
        "model_ema.num_updates",
        *("model_ema.diffusion_model" + name.replace(".", "") for name in unet),
        *(f"first_stage_model.{name}" for name in instantiate_from_config(KL).state_dict()),
        "cond_stage_model.embedding.weight",
    ]
    assert list(model.state_dict()) == expected
    assert "scale_factor" not in small().state_dict() and "logvar" in small(learn_logvar=True).state_dict()


@pytest.mark.parametrize("name", ["sd1_unet", "cin256_unet"])
def test_a_released_model_as_its_configuration_makes_it(name):
    """The parts have the released state dicts under upstream's prefixes."""
    index = json.loads((PARITY / "ldm" / "index.json").read_text())["keys"]
    first, text = ("kl_f8", True) if name == "sd1_unet" else ("vq_f4", False)
    stage = {"kl_f8": "AutoencoderKL", "vq_f4": "VQModelInterface"}[first]
    params = {**index[first]["params"], "lossconfig": {"target": "torch.nn.Identity"}}
    classes = {"target": CLASSES["target"], "params": {"embed_dim": 512, "n_classes": 1001}}
    with th.device("meta"):
        model = LatentDiffusion(
            first_stage_config={"target": f"ldm.models.autoencoder.{stage}", "params": params},
            cond_stage_config={"target": "torch.nn.Identity"} if text else classes,
            conditioning_key="crossattn",
            unet_config={**unet_config(), "params": index[name]["params"]},
            image_size=64,
            channels=4 if text else 3,
            linear_start=0.00085,
            linear_end=0.0120,
            use_ema=False,
        )
    expected = {t: [1000] for t in TABLES}
    expected |= {f"model.diffusion_model.{k}": v for k, v in index[name]["state"].items()}
    expected |= {f"first_stage_model.{k}": v for k, v in index[first]["state"].items()}
    expected |= {} if text else {"cond_stage_model.embedding.weight": [1001, 512]}
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == expected


def test_the_tables_are_those_of_the_schedule():
    model = small(beta_schedule="linear", linear_start=0.0015, linear_end=0.0195)
    betas = make_beta_schedule("linear", 40, 0.0015, 0.0195)
    abar = np.cumprod(1 - betas)
    before = np.append(1, abar[:-1])
    assert np.allclose(model.betas, betas) and np.allclose(model.alphas_cumprod_prev, before)
    variance = betas * (1 - before) / (1 - abar)
    assert np.allclose(model.posterior_log_variance_clipped, np.log(np.maximum(variance, 1e-20)))
    assert np.allclose(small(given_betas=betas.tolist()).betas, betas)


# ------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
@pytest.mark.parametrize("loss_type", ["l1", "l2"])
@th.no_grad()
def test_the_loss_agrees_with_its_formula(parameterization, loss_type):
    options = dict(original_elbo_weight=0.3, l_simple_weight=2.0, logvar_init=0.4)
    model = small(parameterization=parameterization, loss_type=loss_type, **options)
    x = maps().permute(0, 3, 1, 2)
    noise, t = th.randn(x.shape), th.tensor([0, 5, 20, 39])
    loss, log = model.p_losses(x, {}, t, noise)

    betas = np.linspace(1e-4**0.5, 2e-2**0.5, 40) ** 2
    abar = np.cumprod(1 - betas)
    a = th.tensor(abar, dtype=th.float32)[t].reshape(-1, 1, 1, 1)
    z = a.sqrt() * x + (1 - a).sqrt() * noise
    target = {"eps": noise, "x0": x, "v": a.sqrt() * noise - (1 - a).sqrt() * x}[parameterization]
    error = target - model.model.diffusion_model(z, t)
    error = (error.abs() if loss_type == "l1" else error**2).mean(dim=(1, 2, 3))
    if parameterization == "eps":
        sigma2 = betas * (1 - np.append(1, abar[:-1])) / (1 - abar)
        sigma2[0] = math.nan
        weights = betas**2 / (2 * sigma2 * (1 - betas) * (1 - abar))
    else:
        weights = 0.5 * np.sqrt(abar) / (2 - abar) if parameterization == "x0" else np.ones(40)
    weights[0] = weights[1]
    vlb = (th.tensor(weights, dtype=th.float32)[t] * error).mean()
    expected = 2.0 * (error / math.exp(0.4) + 0.4).mean() + 0.3 * vlb
    assert th.allclose(loss, expected, rtol=1e-5)
    assert th.allclose(log["val/loss_simple"], error.mean(), rtol=1e-5)
    assert th.allclose(log["val/loss_vlb"], vlb, rtol=1e-5) and log["val/loss"] == loss


def test_a_learned_log_variance_finds_the_error():
    """Its gradient is 0 where it is the logarithm of the squared error."""
    model = small(learn_logvar=True)
    x, t = maps().permute(0, 3, 1, 2), th.full((4,), 7)
    noise = th.randn(x.shape)
    error = model.loss_terms(x, {}, t, noise, None, None)["simple"].detach().mean()
    with th.no_grad():
        model.logvar[7] = error.log()
    model.p_losses(x, {}, t, noise)[0].backward()
    assert abs(model.logvar.grad[7]) < 1e-5 and model.logvar.grad.abs().sum() < 1e-4
    assert any(p is model.logvar for p in model.trained_parameters())


def test_ddpm_is_the_same_on_images():
    latent = small()
    th.manual_seed(0)
    pixel = shaken(DDPM(unet_config(), image_size=8, channels=2, timesteps=40)).eval()
    pixel.load_state_dict(latent.state_dict())
    batch = {"image": maps()}
    assert th.equal(pixel.training_step(batch, 3), latent.training_step(batch, 3))


def test_randomness_belongs_to_the_step_and_the_place():
    model, batch = small(), {"image": maps()}
    first = model.training_step(batch, 3)
    th.manual_seed(99)
    assert th.equal(first, model.training_step(batch, 3))
    assert not th.equal(first, model.training_step(batch, 4))
    model.seed = 5
    assert not th.equal(first, model.training_step(batch, 3))


# ---------------------------------------------------------------------------------------------------------- latents


@th.no_grad()
def test_latents_are_scaled_draws_of_the_first_stage():
    model = small(first_stage_config=KL, scale_factor=0.2)
    batch = {"image": maps(2, 3, 16)}
    images = batch["image"].permute(0, 3, 1, 2)
    posterior = model.encode_first_stage(images)
    agree(model.latents(batch, "image"), 0.2 * posterior.mean)
    drawn = model.latents(batch, "image", model.batch_random(batch, 0))
    noise = model.batch_random(batch, 0).randn_like(posterior.mean)
    agree(drawn, 0.2 * (posterior.mean + posterior.std * noise))
    decoded = model.decode_first_stage(model.latents(batch, "image"))
    agree(decoded, model.first_stage_model.decode(posterior.mean))
    th.manual_seed(3)
    own = model.get_first_stage_encoding(posterior)
    th.manual_seed(3)
    assert th.equal(own, 0.2 * posterior.sample())
    # Cached, the same.
    cached = {"image_latent": posterior.mean, "image_latent_std": posterior.std}
    agree(model.latents(cached, "image", model.batch_random(batch, 0)), drawn)
    agree(model.training_step(cached, 0), model.training_step(batch, 0))


def test_the_scale_is_measured_once():
    model = small(scale_by_std=True)
    batch = {"image": 3 * maps(16)}
    model.on_train_batch_start(batch, 0)
    assert model.scale_factor == pytest.approx(1 / batch["image"].std().item(), rel=1e-3)
    measured = model.scale_factor.clone()
    model.on_train_batch_start({"image": maps(16)}, 1)
    assert th.equal(model.scale_factor, measured)
    assert model.latents(batch, "image").std() == pytest.approx(1, rel=1e-3)


def test_frozen_parts_stay_in_evaluation_mode():
    model = small(first_stage_config=KL, cond_stage_config=CLASSES, cond_stage_key="class_label",
                  conditioning_key="crossattn", unet_config=CONTEXT).train()  # fmt: skip
    assert model.model.training and not model.first_stage_model.training
    assert not model.cond_stage_model.training
    frozen = [*model.first_stage_model.parameters(), *model.cond_stage_model.parameters()]
    assert not any(p.requires_grad for p in frozen)


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_checkpoint_comes_back(tmp_path, suffix):
    trained, path = small(scale_by_std=True), tmp_path / f"model.{suffix}"
    trained.scale_factor.fill_(0.3)
    shaken(trained)
    state = dict(trained.state_dict())
    if suffix == "ckpt":
        th.save({"state_dict": state, "global_step": 12}, path)
    else:
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    loaded = small(shake=False, scale_by_std=True, ckpt_path=path)
    assert list(loaded.state_dict()) == list(state)
    assert all(th.equal(value, state[name]) for name, value in loaded.state_dict().items())
    loaded.on_train_batch_start({"image": maps()}, 0)
    assert loaded.scale_factor == pytest.approx(0.3)  # not measured again
    assert trained_steps(path) == (12 if suffix == "ckpt" else 0)


def test_without_an_average_in_the_file_it_starts_at_the_weights(tmp_path):
    trained, path = shaken(small(), 0.2), tmp_path / "model.ckpt"
    th.save({k: v for k, v in trained.state_dict().items() if not k.startswith("model_ema")}, path)
    loaded = small()
    loaded.init_from_ckpt(path)
    x, t = maps().permute(0, 3, 1, 2), th.tensor([3] * 4)
    plain = loaded.apply_model(x, t)
    with loaded.ema_scope():
        assert th.equal(loaded.apply_model(x, t), plain)
    assert th.equal(plain, trained.apply_model(x, t))


def test_only_the_unet(tmp_path):
    trained, path = shaken(small(), 0.2), tmp_path / "model.ckpt"
    th.save({"state_dict": trained.state_dict()}, path)
    loaded = small(shake=False, beta_schedule="cosine", ckpt_path=path, load_only_unet=True)
    own, other = loaded.model.state_dict(), trained.model.state_dict()
    assert all(th.equal(own[name], other[name]) for name in own)
    assert not th.equal(loaded.betas, trained.betas)


def test_foreign_checkpoints_are_named(tmp_path):
    path = tmp_path / "model.ckpt"
    th.save({"state_dict": small().state_dict()}, path)
    with pytest.raises(UserError, match="another noise schedule"):
        small(linear_end=0.012, ckpt_path=path)
    with pytest.raises(UserError, match="does not fit .*LatentDiffusion: .*tensors are missing"):
        small(first_stage_config=KL, ckpt_path=path)


def test_the_average_is_used_inside_its_scope_only():
    model, x, t = small(), maps().permute(0, 3, 1, 2), th.tensor([3] * 4)
    before = model.apply_model(x, t)
    with th.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(1.1)
    after = model.apply_model(x, t)
    with model.ema_scope():
        with model.ema_scope():
            pass
        assert th.equal(model.apply_model(x, t), before)
    assert th.equal(model.apply_model(x, t), after) and not th.equal(before, after)


# ---------------------------------------------------------------------------------------------------------- training


class Maps(Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return {"image": maps(1, seed=i)[0]}


def fit(model, folder, steps, resume=None, batches=1, data=None, val=None, **options):
    model.learning_rate = 1e-3
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, enable_checkpointing=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    data = data or DataLoader(Maps(4 * batches), 4)
    trainer.fit(model, data, val, ckpt_path=resume, weights_only=True if resume else None)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_training_lowers_the_loss_and_resumes_exactly(tmp_path):
    schedule = {
        "target": "ldm.lr_scheduler.LambdaLinearScheduler",
        "params": dict(warm_up_steps=[2], cycle_lengths=[100], f_start=[0.1], f_max=[1.0], f_min=[0.5]),
    }
    whole = small(scheduler_config=schedule, scale_by_std=True)
    fit(whole, tmp_path, 12)
    assert 0 < whole.model_ema.num_updates <= 12
    first = small(scheduler_config=schedule, scale_by_std=True)
    fit(first, tmp_path, 6).save_checkpoint(tmp_path / "half.ckpt")
    rest = small(scheduler_config=schedule, scale_by_std=True)
    trainer = fit(rest, tmp_path, 12, resume=tmp_path / "half.ckpt")
    assert trainer.global_step == 12
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * (0.5 + 0.5 * (100 - 12) / 100))
    a, b = whole.state_dict(), rest.state_dict()
    assert all(th.equal(a[name], b[name]) for name in a)
    batch = {"image": th.stack([Maps(4)[i]["image"] for i in range(4)])}
    fresh = small(scale_by_std=True)
    fresh.scale_factor.copy_(rest.scale_factor)
    after, before = (m.shared_step(batch, m.batch_random(batch, 50))[0] for m in (rest, fresh))
    assert after < 0.8 * before


@pytest.mark.filterwarnings("ignore")
def test_the_average_follows_updates_not_batches(tmp_path):
    model = small()
    fit(model, tmp_path, 2, accumulate_grad_batches=3, batches=6)
    assert model.model_ema.num_updates == 2


def test_validation_reports_weights_and_average(monkeypatch):
    model, seen = small(), {}
    monkeypatch.setattr(model, "log_dict", lambda log, **_: seen.update(log))
    model.validation_step({"image": maps()}, 0)
    assert th.equal(seen["val/loss"], seen["val/loss_ema"])  # the same noise
    with th.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(1.1)
    model.validation_step({"image": maps()}, 0)
    assert not th.equal(seen["val/loss"], seen["val/loss_ema"])


PLAIN = dict(inpaint=False, plot_progressive_rows=False, plot_diffusion_rows=False)


def test_images_for_the_log():
    model = small(first_stage_config=KL, scale_factor=0.5)
    batch = {"image": maps(3, 3, 16), "name": ["a", "b", "c"]}
    images = model.log_images(batch, N=2, ddim_steps=2, **PLAIN)
    assert {name: tuple(p.shape) for name, p in images.items()} == dict.fromkeys(
        ("inputs", "reconstruction", "samples"), (2, 3, 16, 16)
    )
    assert th.allclose(images["inputs"], maps(3, 3, 16)[:2].permute(0, 3, 1, 2))
    assert all(p.abs().max() <= 1 for p in images.values())
    again = model.log_images(batch, N=2, ddim_steps=2, return_keys=["samples"], **PLAIN)
    assert list(again) == ["samples"] and th.equal(again["samples"], images["samples"])


@th.no_grad()
def test_rows_and_inpainting_for_the_log(monkeypatch):
    """Upstream's further images: noising, denoising, prediction, quantised samples, known parts."""
    model = small()
    monkeypatch.setattr(model.first_stage_model, "quantize", lambda z: (z.round(), None, None), raising=False)
    batch = {"image": maps(3) / 2}
    shown = model.log_images(batch, N=2, n_row=1, ddim_steps=20, plot_denoise_rows=True)
    x = batch["image"].permute(0, 3, 1, 2)
    # At timesteps 0 and 39: every hundredth, and the last.
    clean, noise = shown["diffusion_row"].split(8, dim=3)
    assert (clean - x[:1]).abs().max() < 0.1 and (noise - x[:1]).abs().mean() > 0.3
    assert th.allclose(shown["denoise_row"][..., -8:], shown["samples"], atol=1e-5)
    assert shown["progressive_row"].shape == (2, 2, 8, 2 * 8)
    th.manual_seed(9)  # the noise is the log's own, and training's stays
    before = th.get_rng_state()
    again = model.log_images(batch, N=2, n_row=1, ddim_steps=20)
    assert all(th.equal(shown[name], image) for name, image in again.items())
    assert th.equal(before, th.get_rng_state())
    assert not th.equal(shown["samples_x0_quantized"], shown["samples"])
    kept, mask = shown["mask"].bool().expand(-1, 2, -1, -1), shown["mask"]
    assert mask[0, 0, 0, 0] == 1 and mask[0, 0, 4, 4] == 0
    error = (shown["samples_inpainting"] - x[:2]).abs(), (shown["samples_outpainting"] - x[:2]).abs()
    assert error[0][kept].mean() < 0.5 * error[0][~kept].mean()
    assert error[1][~kept].mean() < 0.5 * error[1][kept].mean()


@th.no_grad()
def test_upstreams_ways_to_call_it():
    """get_input, forward, p_losses, decode_first_stage with the parameters that forks of upstream use."""
    model = small(first_stage_config=KL, scale_factor=0.5, cond_stage_config=CLASSES, cond_stage_trainable=True,
                  cond_stage_key="class_label", conditioning_key="crossattn", unet_config=CONTEXT)  # fmt: skip
    batch = {"image": maps(3, 3, 16), "class_label": th.tensor([1, 2, 3]), "other": th.tensor([0, 0, 0])}
    z, c, x, xrec, xc = model.get_input(
        batch, "image", return_first_stage_outputs=True, force_c_encode=True, return_original_cond=True, bs=2
    )
    assert z.shape == (2, 2, 8, 8) and th.equal(x, batch["image"][:2].permute(0, 3, 1, 2))
    assert th.equal(xrec, model.decode_first_stage(z)) and th.equal(xc["class_label"], th.tensor([1, 2]))
    assert th.equal(c["c_crossattn"][0], model.cond_stage_model.embedding.weight[[1, 2]][:, None])
    z, raw = model.get_input(batch, "image", cond_key="other")  # the loss encodes what is trained
    assert th.equal(raw["class_label"], batch["other"])
    th.manual_seed(0)
    loss, _ = model(z, raw)
    th.manual_seed(0)
    assert th.equal(model(z, raw)[0], loss)
    assert th.isfinite(model.p_losses(z, model.get_learned_conditioning(raw), th.tensor([0, 9, 39]))[0])
    first_stage = model.first_stage_model
    first_stage.quantize = th.nn.Module()
    first_stage.quantize.embedding = th.nn.Embedding(5, 2)
    logits = th.randn(2, 5, 8, 8)
    entries = first_stage.quantize.embedding(logits.argmax(1)).permute(0, 3, 1, 2)
    assert th.equal(model.decode_first_stage(logits, predict_cids=True), model.decode_first_stage(entries))


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(parameterization="noise"), "'noise'.*eps, x0, v"),
        (dict(loss_type="huber"), "'huber'.*l1 or l2"),
        (dict(num_timesteps_cond=10), "num_timesteps_cond"),
        (dict(v_posterior=0.5), "v_posterior"),
        (dict(scale_by_std=True, scale_factor=0.2), "scale_factor at 1"),
        (dict(cond_stage_trainable=True), "no conditioner to train"),
        (dict(cond_stage_config=IDENTITY, conditioning_key="film"), "'film'"),
        (dict(concat_keys=["mask"]), "hybrid"),
        (dict(beta_schedule="wavy"), "'wavy'"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(UserValueError, match=said):
        small(**options)


def test_wrong_batches_are_named():
    with pytest.raises(UserValueError, match="no 'image'.*'photo'"):
        small().training_step({"photo": maps()}, 0)
    with pytest.raises(UserValueError, match=r"\[2, 16, 16\].*\[2, 8, 8\]"):
        small().training_step({"image": maps(2, 2, 16)}, 0)
    with pytest.raises(UserValueError, match="learning_rate"):
        small().configure_optimizers()


def test_the_scale_of_the_latents_is_the_files(tmp_path):
    """What the file says and what the configuration says are one number, or named."""
    path, bare = tmp_path / "scaled.ckpt", tmp_path / "bare.ckpt"
    weights = small(scale_factor=0.5).state_dict()
    th.save({"state_dict": weights}, bare)
    th.save({"state_dict": weights | {"scale_factor": th.tensor(0.5)}}, path)
    assert float(small(scale_by_std=True, ckpt_path=path).scale_factor) == 0.5
    assert small(scale_factor=0.5, ckpt_path=path).scale_factor == 0.5
    assert small(scale_factor=0.7, ckpt_path=bare).scale_factor == 0.7
    with pytest.raises(
        UserError, match=r"scaled.ckpt was trained with scale_factor 0\.5, .* says 0\.18215: set"
    ):
        small(scale_factor=0.18215, ckpt_path=path)
    with pytest.raises(UserError, match=r"bare\.ckpt holds no scale_factor.*scale_by_std"):
        small(scale_by_std=True, ckpt_path=bare)
    # What is ignored is as if it were not there: the first batch decides.
    assert float(small(scale_by_std=True, ckpt_path=path, ignore_keys=["scale_factor"]).scale_factor) == 1
