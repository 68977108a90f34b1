"""JointLatentDiffusion: several modalities in one latent diffusion."""

import pytest
import torch as th
from torch.utils.data import DataLoader

from guided_diffusion.errors import UserValueError
from guided_diffusion.mt.heads import OutputHead
from guided_diffusion.mt.modality_set import Batch
from guided_diffusion.mt.sampling import SAMPLERS, joint_sample
from guided_diffusion.seeding import PerSample
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.joint import (
    FORMER,
    JointLatentDiffusion,
    latent_modalities,
    with_defaults,
    with_former_defaults,
)
from ldm.models.diffusion.sampling import Denoiser
from tests.compare import agree
from tests.ldm_models import CLASSES, CONTEXT, KL, maps, shaken, small, unet_config
from tests.test_ldm_diffusion import fit

SHAPE = (2, 8, 8)


def joint(variant="U", modalities=None, **changes):
    if modalities is None:
        modalities = {"label_map": {"preset": "image", "variant": variant}}
    return small(JointLatentDiffusion, modalities=modalities, **changes)


@pytest.fixture(scope="module")
def models():
    return {variant: joint(variant) for variant in "UX"}


@pytest.fixture
def batch():
    return {"image": maps(), "label_map": maps(seed=1)}


def bump(model):
    """atil of the default aggregation with one modality: kappa c sqrt(abar) (1 - abar)."""
    abar = model.alphas_cumprod
    return 0.5 * 1.5 * 3**0.5 * abar.sqrt() * (1 - abar)


CLASSES_OF_MAP = {"classes": ["road", "sky", "car"], "colors": [[10, 20, 30], [0, 0, 250], [200, 0, 0]]}


@pytest.mark.parametrize("first_stage", [None, KL])
def test_a_map_of_classes_at_the_size_of_the_latents(first_stage):
    """It comes and goes in its colours, is trained by cross-entropy, and mixes classes where a latent covers several
    pixels; its shift is linear in them."""
    spec = {"label_map": {"preset": "map", "palette": CLASSES_OF_MAP}}
    model = joint(modalities=spec, **({"first_stage_config": first_stage} if first_stage else {}))
    m, size = model.modalities["label_map"], 8 if first_stage is None else 16
    numbers = th.randint(3, (4, size, size))
    colours = m.class_codes(3)[numbers]  # [B, H, W, 3]
    channels = 2 if first_stage is None else 3
    batch = {"image": maps(4, channels, size), "label_map": colours}
    value = model.modality_batch(batch).values["label_map"]
    assert value.shape == (4, 3, 8, 8) and th.allclose(value.sum(1), th.ones(4, 8, 8))
    share = (numbers == 1).float().unflatten(1, (8, -1)).unflatten(3, (8, -1)).mean((2, 4))
    assert th.allclose(value[:, 1], share)
    loss, log = model.shared_step(batch, model.batch_random(batch, 0))
    loss.backward()
    assert model.model.diffusion_model.heads["label_map"][2].weight.grad.abs().max() > 0
    given = colours.permute(0, 3, 1, 2).contiguous()
    drawn = model.sample_joint(4, {"label_map": given}, ["image"], steps=2, sampler="ddim")
    assert drawn["image"].shape == (4, channels, size, size)
    read = model.sample_joint(2, None, None, steps=2, sampler="ddim")["label_map"]
    assert read.shape == (2, 3, size, size)
    own = m.class_codes(3)
    assert bool(((read.permute(0, 2, 3, 1)[..., None, :] - own).abs().amax(-1).amin(-1) < 1e-6).all())


# ------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_without_modalities_it_is_latent_diffusion(parameterization):
    options = dict(parameterization=parameterization, original_elbo_weight=0.2, learn_logvar=True)
    alone, none = small(LatentDiffusion, **options), joint(modalities={}, **options)
    assert list(none.state_dict()) == list(alone.state_dict())
    none.load_state_dict(alone.state_dict())
    batch = {"image": maps(16)}
    gradients = []
    for model in (alone, none):
        loss = model.training_step(batch, 0)
        loss.backward()
        gradients.append((loss, model.model.diffusion_model.out[2].weight.grad))
    for first, second in zip(*gradients, strict=True):
        if parameterization == "v":  # by way of the noise
            agree(first, second)
        else:
            assert th.equal(first, second)


@pytest.mark.parametrize("parameterization", ["eps", "v"])
@pytest.mark.parametrize("variant", ["U", "X"])
@th.no_grad()
def test_the_loss_agrees_with_equation_6(variant, parameterization):
    options = dict(parameterization=parameterization, first_stage_config=KL, scale_factor=0.7)
    model = joint(variant, **options, **FORMER)
    batch = {"image": maps(3, 3, 16), "label_map": maps(3, 3, 16, seed=1)}
    x, e = (
        0.7 * model.encode_first_stage(batch[name].permute(0, 3, 1, 2).contiguous()).mean
        for name in ("image", "label_map")
    )
    # Without spread the draws are the means.
    for name, mean in (("image", x), ("label_map", e)):
        batch |= {f"{name}_latent": mean / 0.7, f"{name}_latent_std": th.zeros_like(mean)}
    t, noise = th.tensor([2, 20, 39]), th.randn(3, *SHAPE)
    random = PerSample(range(3, 6))
    keep = PerSample(range(3, 6))
    keep.randn(SHAPE)  # the draw of the latent
    keep = (keep.rand() >= 0.1).float().reshape(-1, 1, 1, 1)
    loss, log = model.p_losses(x, {}, t, noise, random, batch)

    abar = model.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    z = abar.sqrt() * x + bump(model)[t].reshape(-1, 1, 1, 1) * e + (1 - abar).sqrt() * noise
    seen = z if variant == "U" else th.cat([z, keep * e], dim=1)
    out, heads = model.model.diffusion_model(seen, t)
    if parameterization == "v":
        out = abar.sqrt() * out + (1 - abar).sqrt() * z
    error = (out - noise).square().mean(dim=(1, 2, 3))
    error = error / abar.flatten() if parameterization == "v" else error
    kl = (heads["label_map"] - e).square().mean(dim=(1, 2, 3))
    assert th.allclose(loss, error.mean() + 0.1 * kl.mean(), rtol=1e-4)
    assert th.allclose(log["val/KL_label_map"], kl.mean(), rtol=1e-4)
    assert th.allclose(log["val/loss_simple"], error.mean(), rtol=1e-4)


@th.no_grad()
def test_a_missing_modality_adds_neither_loss_nor_shift(models, batch):
    model = models["U"]
    nothing = batch | {"label_map_present": th.zeros(4, dtype=th.bool)}
    alone = joint(modalities={})
    alone.load_state_dict(model.state_dict(), strict=False)
    random = [m.batch_random(batch, 0) for m in (model, alone)]
    assert th.equal(model.shared_step(nothing, random[0])[0], alone.shared_step(batch, random[1])[0])


@th.no_grad()
def test_labels_beside_images():
    spec = {"label_map": {"preset": "image"}, "class_label": {"preset": "label"}}
    model = joint(modalities=spec, unet_config=unet_config(num_classes=4))
    batch = {"image": maps(), "label_map": maps(seed=1), "class_label": th.tensor([0, 3, -1, 2])}
    read = model.modality_batch(batch)
    assert read.present["class_label"].tolist() == [True, True, False, True]
    _, log = model.shared_step(batch, model.batch_random(batch, 0))
    assert {"val/KL_label_map", "val/KL_class_label"} < set(log)
    samples = model.sample_joint(2, steps=3, sampler="ddim")
    assert samples["class_label"].shape == (2, 4) and th.allclose(samples["class_label"].sum(1), th.ones(2))


def test_latents_have_no_bounds():
    (free,) = latent_modalities({"label_map": {"preset": "image"}}, SHAPE)
    (bounded,) = latent_modalities({"label_map": {"preset": "image", "bounded": True}}, SHAPE)
    (by_name,) = latent_modalities("masked:X", SHAPE)
    value = th.full((1, *SHAPE), 3.0)
    assert (
        free.expectation(value).max() == 3 and bounded.expectation(value).max() == 1 and not by_name.bounded
    )


# ----------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("variant", ["U", "X"])
@th.no_grad()
def test_it_starts_as_the_single_task_model(tmp_path, variant):
    """New heads and inputs do not change the prediction of a checkpoint of LatentDiffusion."""
    options = dict(
        cond_stage_config="__is_first_stage__", cond_stage_key="hint", unet_config=unet_config(in_channels=4)
    )
    alone, path = small(**options), tmp_path / "model.ckpt"
    th.save({"state_dict": alone.state_dict()}, path)
    model = joint(variant, **options, shake=False, ckpt_path=path)
    z, t, hint = th.randn(2, *SHAPE), th.tensor([3, 30]), th.randn(2, *SHAPE)
    shown = {"label_map": th.randn(2, *SHAPE)}
    with model.ema_scope():
        out, _ = model.modalities.apply(Denoiser(model), z, t, shown, {"c_concat": [hint]})
    assert th.allclose(out, alone.apply_model(z, t, hint), atol=1e-5)


def test_a_joint_checkpoint_comes_back(tmp_path, models):
    th.save({"state_dict": models["X"].state_dict()}, tmp_path / "model.ckpt")
    loaded = joint("X", shake=False, ckpt_path=tmp_path / "model.ckpt")
    state = models["X"].state_dict()
    assert all(th.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert "model.diffusion_model.heads.label_map.variance" in state


# ---------------------------------------------------------------------------------------------------------- variance


def test_the_heads_variance_is_their_error(models, batch):
    """A head that always says c has the squared distance to c as its variance, at every t."""
    model = joint()
    with th.no_grad():
        for parameter in model.model.heads["label_map"][2].parameters():
            parameter.zero_()
        model.model.heads["label_map"][2].bias.fill_(0.25)
        model.model_ema.forward(model.model)
        for name, shadow in model.model_ema.m_name2s_name.items():
            dict(model.model_ema.named_buffers())[shadow].copy_(dict(model.model.named_parameters())[name])
    model.hold_out([batch, {name: value + 0.1 for name, value in batch.items()}])
    model.measure_heads()
    maps_seen = th.cat([batch["label_map"], batch["label_map"] + 0.1])
    errors = (maps_seen - 0.25).square().mean(dim=(1, 2, 3))
    variance = model.model.heads["label_map"].variance
    assert errors.min() * 0.999 <= variance.min() and variance.max() <= errors.max() * 1.001
    assert variance.mean() == pytest.approx(float(errors.mean()), rel=0.3)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_training_holds_its_own_variance(tmp_path):
    class Pairs(th.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return {"image": maps(1, seed=i)[0], "label_map": 2 * maps(1, seed=100 + i)[0]}

    model = joint()
    loader = th.utils.data.DataLoader(Pairs(), 4)
    trainer = fit(model, tmp_path, 4, val=loader, data=loader)
    measured = model.model.heads["label_map"].variance.clone()
    assert 0.5 < measured.mean() < 3  # data of variance 4 / 3
    with th.no_grad():
        model.model_ema.num_updates += 1000
    model._measured_at = -1
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    saved = th.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    assert th.equal(saved["model.diffusion_model.heads.label_map.variance"], measured)


def test_conditioning_reaches_the_measurement(batch):
    options = dict(cond_stage_config=CLASSES, cond_stage_key="class_label", conditioning_key="crossattn")
    model = joint(unet_config=CONTEXT, **options)
    model.hold_out([batch | {"class_label": th.tensor([0, 1, 2, 3])}])
    model.measure_heads()
    assert model.model.heads["label_map"].variance.max() != 1


# ---------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_have_their_shapes(models, sampler):
    model = joint(first_stage_config=KL, scale_factor=0.5)
    samples = model.sample_joint(2, steps=4, sampler=sampler)
    assert {name: tuple(v.shape) for name, v in samples.items()} == {
        "image": (2, 3, 16, 16),
        "label_map": (2, 3, 16, 16),
    }
    assert list(models["X"].sample_joint(2, want=["label_map"], steps=2, sampler=sampler)) == ["label_map"]


@pytest.mark.parametrize("variant", ["U", "X"])
def test_what_is_given_conditions(models, variant):
    """In U through the head and its variance, in X as input; strength 0 leaves only the shift."""
    model = models[variant]
    first, second = (maps(2, seed=s).permute(0, 3, 1, 2) for s in (5, 6))
    model.model.heads["label_map"].variance.fill_(0.5)

    def image(given, **options):
        return model.sample_joint(2, {"label_map": given}, steps=5, sampler="ddim", **options)["image"]

    assert th.equal(image(first), image(first)) and not th.allclose(image(first), image(second), atol=1e-3)
    if variant == "U":
        held = image(first, strength=0.0)
        assert not th.allclose(held, image(first), atol=1e-3)
        model.model.heads["label_map"].variance.fill_(1e6)  # a head that knows nothing does not steer
        assert th.allclose(held, image(first), atol=1e-3)


def test_a_head_pulls_the_image_to_what_is_given():
    """A model whose head says "the map is x_t itself": given a map the image moves towards it."""
    model = joint()
    given = th.ones(4, *SHAPE)
    network = model.model.diffusion_model

    class Copies(OutputHead):
        def forward(self, middle, last):
            return model.seen[:, :2]

    network.heads["label_map"] = Copies(32, 2)
    network.heads["label_map"].register_buffer("variance", th.full((32,), 0.5))
    model.use_ema = False
    network.register_forward_pre_hook(lambda module, args: setattr(model, "seen", args[0]))
    samples = [
        model.sample_joint(4, {"label_map": given}, steps=20, sampler="ddim", strength=s)["image"]
        for s in (0, 1)
    ]
    assert (samples[1] - 1).square().mean() < 0.9 * (samples[0] - 1).square().mean()


def test_a_sample_does_not_depend_on_its_batch(models):
    options = dict(steps=4, sampler="ddpm", seed=3)
    whole, part = (
        models["U"].sample_joint(4, **options),
        models["U"].sample_joint(2, indices=[1, 3], **options),
    )
    assert th.allclose(whole["image"][[1, 3]], part["image"], atol=1e-4)


def test_latents_can_be_given_in_place_of_images():
    model = joint("X", first_stage_config=KL, scale_factor=0.5)
    images = maps(2, 3, 16).permute(0, 3, 1, 2).contiguous()
    latents = model.encode_first_stage(images).mean
    a, b = (
        model.sample_joint(2, {name: value}, steps=3, sampler="ddim")["image"]
        for name, value in (("label_map", images), ("label_map_latent", latents))
    )
    assert th.allclose(a, b, atol=1e-5)


def test_modalities_of_a_given_image(models):
    """Predicted at early times, where the noise is small; the same through sample_joint."""
    model, images = models["U"], maps(2).permute(0, 3, 1, 2)
    predicted = model.predict(images, times=[0])
    noise = PerSample.derived(0, range(2)).randn(SHAPE)
    abar = model.alphas_cumprod[0]
    with th.no_grad():
        _, heads = model.model.diffusion_model(
            abar.sqrt() * images + (1 - abar).sqrt() * noise, th.tensor([0, 0])
        )
    assert list(predicted) == ["label_map"]
    agree(predicted["label_map"], heads["label_map"])
    assert th.equal(model.sample_joint(2, {"image": images})["label_map"], model.predict(images)["label_map"])


def test_the_sampler_faces_estimate_the_modalities(models):
    """DDIMSampler on a joint model is joint sampling; in fewer steps both end at abar[0], as upstream's do."""
    model = models["U"]
    for steps in (None, 7):
        noise = PerSample.derived(0, range(2)).randn(SHAPE)
        face, way = DDIMSampler(model).sample(steps, 2, SHAPE, x_T=noise, verbose=False)
        whole = model.sample_joint(2, sampler="ddim", steps=steps, seed=0)
        assert th.equal(face, whole["image"]) and th.equal(way["values"]["label_map"], whole["label_map"])


@th.no_grad()
def test_the_whole_process_is_that_of_guided_diffusion(models):
    """In all steps a latent diffusion draws what `joint_sample` does."""
    model = models["U"]
    for sampler in SAMPLERS:
        drawn = joint_sample(
            model.diffusion, model.modalities, Denoiser(model), (2, *SHAPE), PerSample.derived(0, range(2)),
            sampler=sampler, clip_denoised=False,
        )  # fmt: skip
        whole = model.sample_joint(2, sampler=sampler)
        assert th.equal(whole["image"], drawn.images)
        assert th.equal(whole["label_map"], drawn.values["label_map"])


def test_guidance_by_conditioning(batch):
    options = dict(cond_stage_config=CLASSES, cond_stage_key="class_label", conditioning_key="crossattn")
    model = joint(unet_config=CONTEXT, **options)
    cond = model.get_learned_conditioning({"class_label": th.tensor([1, 2])})
    free = model.get_unconditional_conditioning(2, null_label=3)
    draw = dict(steps=3, sampler="ddim", conditioning=cond, unconditional=free)
    plain, guided = (model.sample_joint(2, **draw, guidance=g)["image"] for g in (1.0, 4.0))
    same = model.sample_joint(2, **{**draw, "unconditional": cond}, guidance=4.0)["image"]
    assert th.allclose(plain, same, atol=1e-4) and not th.allclose(plain, guided, atol=1e-3)


def test_images_for_the_log(batch):
    images = joint().log_images({name: th.cat([v, v[..., :1]], dim=-1)[..., :2] for name, v in batch.items()},
                                  N=2, ddim_steps=2)  # fmt: skip
    assert {"samples", "samples_label_map", "image_from_label_map", "label_map_from_image"} < set(images)
    drawn = {name: p for name, p in images.items() if name.startswith(("samples", "image_from", "label_map"))}
    assert all(p.shape == (2, *SHAPE) and p.abs().max() <= 1 for p in drawn.values())


def test_mistakes_are_named(models, batch):
    model = models["U"]
    with pytest.raises(UserValueError, match="given depth.*image, label_map"):
        model.sample_joint(2, {"depth": th.zeros(2, *SHAPE)})
    with pytest.raises(UserValueError, match="3 samples, expected 2"):
        model.sample_joint(2, {"label_map": th.zeros(3, *SHAPE)})
    with pytest.raises(UserValueError, match="given already"):
        model.sample_joint(2, {"label_map": th.zeros(2, *SHAPE)}, ["label_map"])
    with pytest.raises(UserValueError, match="nothing is left"):
        model.sample_joint(2, {"label_map": th.zeros(2, *SHAPE), "image": th.zeros(2, *SHAPE)})
    with pytest.raises(UserValueError, match="size of the images"):
        model.sample_joint(2, {"label_map": th.zeros(2, 2, 9, 9)})
    with pytest.raises(UserValueError, match="unknown sampler 'euler'"):
        model.sample_joint(2, sampler="euler")
    with pytest.raises(UserValueError, match="steps 'fast'"):
        model.sample_joint(2, steps="fast")
    with pytest.raises(UserValueError, match="no 'label_map', a modality"):
        model.training_step({"image": batch["image"]}, 0)
    with pytest.raises(UserValueError, match="l2"):
        joint(loss_type="l1")


def test_the_average_is_what_is_sampled():
    model = joint()
    before = model.sample_joint(2, steps=3, sampler="ddim")["image"]
    raw = model.sample_joint(2, steps=3, sampler="ddim", use_ema=False)["image"]
    assert th.equal(before, raw)
    average = {k: v.clone() for k, v in model.model_ema.state_dict().items()}
    shaken(model, 0.1)
    model.model_ema.load_state_dict(average)
    assert th.equal(model.sample_joint(2, steps=3, sampler="ddim")["image"], before)
    assert not th.equal(model.sample_joint(2, steps=3, sampler="ddim", use_ema=False)["image"], before)


# -------------------------------------------------------------- presence, standing codes, encoders of the user's own


def labelled(**changes):
    unet = unet_config(num_classes=3)
    return joint(modalities="label:U", unet_config=unet, **changes)


def test_presence_and_codes_are_on_unless_a_stored_configuration_is_older():
    """What main.py stores names every option; what it stored before there were any means the former ones."""
    made = labelled()
    assert (made.unshifted_probability, made.modalities.presence, made.codes is not None) == (
        0.33,
        True,
        True,
    )
    config = {
        "model": {
            "target": "ldm.models.diffusion.joint.JointLatentDiffusion",
            "params": {"modalities": "label:U"},
        }
    }
    stored = with_defaults(config)["model"]["params"]
    assert stored["presence"] is True and stored["detectability"] == 4.0 and stored["code_interval"] == 0
    assert with_former_defaults(config)["model"]["params"] == {**FORMER, "modalities": "label:U"}
    assert with_former_defaults(with_defaults(config)) == with_defaults(config)
    before = labelled(**FORMER)
    assert before.codes is None and not any("presence" in name for name in before.state_dict())
    peak = {m.name: m.peak for m in made.modalities}["label"]
    assert peak < {m.name: m.peak for m in before.modalities}["label"]  # set by detectability


@pytest.mark.filterwarnings("ignore")
def test_codes_stand_still_in_training_and_in_checkpoints(tmp_path):
    """Refreshed at steps 0, 1, 2, 4, ..., they are those of the weights at that step, and come with the checkpoint."""
    model = labelled(code_interval=100)
    samples = [{"image": image, "label": i % 3} for i, image in enumerate(maps(16))]
    fit(model, tmp_path, 4, data=DataLoader(samples, 4))  # the last refresh was before the third update
    kept = model.codes.label.clone()
    assert kept.any()
    fresh = labelled(code_interval=1)
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("codes.")})
    now = fresh.modalities.constant_codes(Denoiser(fresh), th.zeros(1, *SHAPE))["label"]
    assert not th.allclose(kept, now)
    again = labelled(code_interval=100)
    again.load_state_dict(model.state_dict())
    assert th.equal(again.standing_codes.label, kept)
    th.save({"state_dict": fresh.state_dict()}, tmp_path / "older.ckpt")
    again.init_from_ckpt(tmp_path / "older.ckpt")
    assert again.standing_codes is None  # the file has none: they are computed
    found = again.modalities.constant_codes(Denoiser(again), th.zeros(1, *SHAPE))["label"]
    agree(found, now)


class Painter(th.nn.Module):
    """A label as a flat map of its own."""

    def __init__(self, scale):
        super().__init__()
        self.table = th.nn.Parameter(scale * th.arange(6.0).view(3, 2))

    def forward(self, value):
        return (value @ self.table)[:, :, None, None].expand(-1, -1, 8, 8)


def test_an_encoder_by_target_puts_values_into_the_latent():
    encoder = {"target": f"{__name__}.Painter", "params": {"scale": 0.5}}
    model = labelled_with(encoder)
    assert not any(p.requires_grad for p in model.encoders.parameters())
    value = th.eye(3)
    e = model.modalities.encode(Denoiser(model), Batch({"label": value}), th.zeros(3, *SHAPE))["label"]
    assert e[:, :, 0, 0].tolist() == [[0.0, 0.5], [1.0, 1.5], [2.0, 2.5]]
    assert model.training_step({"image": maps(3), "label": th.tensor([0, 1, 2])}, 0).isfinite()
    with pytest.raises(UserValueError, match="modalities.label.encoder"):
        labelled_with({"target": "os.getcwd"})
    with pytest.raises(UserValueError, match="scale"):
        labelled_with({"target": f"{__name__}.Painter", "params": {"scal": 1}})


def labelled_with(encoder):
    return joint(modalities={"label": {"encoder": encoder}}, unet_config=unet_config(num_classes=3))


def test_a_pretrained_generator_encodes_labels_by_what_it_draws(tmp_path):
    """Always from the same noise, once for each class; a soft label is the mixture."""
    options = dict(cond_stage_config=CLASSES, cond_stage_key="class_label", conditioning_key="crossattn")
    drawing = small(LatentDiffusion, unet_config=CONTEXT, **options)
    th.save({"state_dict": drawing.state_dict()}, tmp_path / "drawing.ckpt")
    params = dict(options, first_stage_config={"target": "ldm.models.autoencoder.IdentityFirstStage"})
    params |= dict(unet_config=CONTEXT, image_size=8, channels=2, timesteps=40)
    config = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}
    params = dict(config=config, ckpt_path=str(tmp_path / "drawing.ckpt"), steps=4, classes=3)
    model = labelled_with({"target": "ldm.modules.encoders.generators.PretrainedGenerator", "params": params})
    first, second, mixed = (
        model.encoders["label"](th.tensor([v])) for v in ([1.0, 0, 0], [0, 1.0, 0], [0.5, 0.5, 0])
    )
    assert not th.allclose(first, second)
    agree(mixed, (first + second) / 2)
    noise = PerSample([0]).randn(SHAPE)
    cond = drawing.get_learned_conditioning({"class_label": th.tensor([1])})
    agree(second, DDIMSampler(drawing).sample(4, 1, SHAPE, cond, eta=0.0, x_T=noise, verbose=False)[0])
