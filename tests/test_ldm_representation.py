"""A vector (a CLIP representation) as a modality of a latent diffusion with text conditioning."""

import pytest
import torch as th
from omegaconf import OmegaConf
from PIL import Image

from guided_diffusion.errors import UserError, UserValueError
from guided_diffusion.mt.modalities import VectorModality
from guided_diffusion.mt.modality_set import Batch, ModalitySet, UNetEncoder
from guided_diffusion.seeding import PerSample
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.joint import FORMER, JointLatentDiffusion
from ldm.models.diffusion.sampling import Denoiser
from ldm.modules.encoders.vectors import Standard
from tests.compare import agree
from tests.ldm_models import CLASSES, CONTEXT, IDENTITY, maps, small, unet_config
from tests.test_ldm_conditioning import WIDTH as TEXT_WIDTH
from tests.test_ldm_conditioning import clip  # noqa: F401 (a fixture)
from tests.test_main import (
    TRAINER,
    assert_same_training,
    final,
    resume,
    run_folder,
    train,  # noqa: F401 (a fixture)
)
from tests.test_tar_shards import shards  # noqa: F401 (a fixture)

WIDTH = 9  # more than the context's 6: two tokens, the second filled up
TEXT = dict(
    cond_stage_config=CLASSES,
    cond_stage_key="class_label",
    conditioning_key="crossattn",
    unet_config=CONTEXT,
    ucg_training={"class_label": {"p": 0.1, "val": 3}},
)
EXTRACTOR = {"target": "tests.test_ldm_representation.Extractor"}
LABELS = th.tensor([0, 1, 2, 3])


class Extractor(th.nn.Module):
    """Reads WIDTH numbers off images [B, 2, 8, 8]: means over bands."""

    width = WIDTH

    def forward(self, images):
        bands = images.flatten(1).unfold(1, 14, 14).mean(dim=2)[:, :WIDTH]
        return 5 + 2 * bands * th.arange(1, WIDTH + 1)


def representation(**changes):
    modalities = {"representation": {"preset": "representation", "shape": [WIDTH]}}
    options = {"modalities": modalities, "extractors": {"representation": EXTRACTOR}, **TEXT, **FORMER}
    return small(JointLatentDiffusion, **{**options, **changes})


@pytest.fixture(scope="module")
def model():
    made = representation()
    made.measure_standards([{"image": maps(64, seed=7)}], 64)
    return made


@pytest.fixture
def batch():
    return {"image": maps(), "class_label": LABELS}


def code_of(model, vectors):
    """e of vectors in standard form, by the formula: the U-Net's outputs less that of zeros, brought to the
    vectors' RMS."""
    tokens = th.cat([vectors, th.zeros(len(vectors), 3)], dim=1).reshape(-1, 2, 6)
    size = (vectors**2).mean(dim=1).sqrt()
    z, t = th.zeros(len(vectors), *model.latent_shape), th.zeros(len(vectors), dtype=th.long)
    unet = model.model.diffusion_model
    raw = unet(z, t, context=tokens / size[:, None, None])[0] - unet(z, t, context=0 * tokens)[0]
    return raw / (raw**2).mean(dim=(1, 2, 3), keepdim=True).sqrt() * size[:, None, None, None]


# --------------------------------------------------------------------------------------------------------- the modality


def test_the_preset_is_the_papers():
    model = small(JointLatentDiffusion, modalities={"representation": {"preset": "representation"}}, **TEXT)
    first, relu, last = model.model.heads["representation"]
    assert (first.in_features, first.out_features, last.out_features) == (64, 1024, 1024)
    assert isinstance(relu, th.nn.ReLU) and model.modalities["representation"].likelihood == "gaussian"
    assert model.modalities["representation"].loss_weight == 0.1


@pytest.mark.parametrize("width, tokens", [(6, 1), (5, 1), (12, 2), (13, 3)])
def test_a_vector_of_any_width_becomes_tokens(width, tokens):
    vector = VectorModality("clip", (width,), "unet", "middle")
    context = UNetEncoder(ModalitySet([vector], 2, context_dim=6), None, th.zeros(1, 2, 8, 8)).tokens(
        th.arange(2.0 * width).reshape(2, width)
    )
    assert context.shape == (2, tokens, 6)
    assert th.equal(context.flatten(1)[:, :width].flatten(), th.arange(2.0 * width))
    assert not context.flatten(1)[:, width:].any()


@th.no_grad()
def test_it_is_encoded_through_the_cross_attention(model):
    vectors = th.randn(3, WIDTH) * th.tensor([[1.0], [0.1], [2.0]])
    encoded = model.modalities.encode(Denoiser(model), Batch({"representation": vectors}), maps_like(3))[
        "representation"
    ]
    # eps at t = 0 is the U-Net's output.
    agree(encoded, code_of(model, vectors))
    size = (encoded**2).mean(dim=(1, 2, 3)).sqrt()
    assert th.allclose(size, (vectors**2).mean(dim=1).sqrt(), rtol=1e-4)
    # The mean, which is the null input, does not enter the latent.
    nothing = model.modalities.encode(Denoiser(model), Batch({"representation": 0 * vectors}), maps_like(3))[
        "representation"
    ]
    assert not nothing.any()


def maps_like(count):
    return th.zeros(count, 2, 8, 8)


@th.no_grad()
def test_the_loss_agrees_with_equation_6(model, batch):
    t, noise = th.tensor([2, 20, 30, 39]), th.randn(4, 2, 8, 8)
    x, cond = model.get_input(batch, "image")
    loss, log = model.p_losses(x, cond, t, noise, PerSample(range(4)), batch)
    vectors = (Extractor()(x) - model.standards["representation"].mean) / model.standards[
        "representation"
    ].scale
    abar = model.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    atil = 0.5 * 1.5 * 3**0.5 * abar.sqrt() * (1 - abar)  # bump
    z = abar.sqrt() * x + atil * code_of(model, vectors) + (1 - abar).sqrt() * noise
    out, heads = model.model.diffusion_model(z, t, context=cond["c_crossattn"][0])
    kl = (heads["representation"] - vectors).square().mean(dim=1)
    assert th.allclose(log["val/loss_simple"], (out - noise).square().mean(), rtol=1e-3)
    assert th.allclose(log["val/KL_representation"], kl.mean(), rtol=1e-4)
    assert th.allclose(loss, (out - noise).square().mean() + 0.1 * kl.mean(), rtol=1e-3)


def test_the_loss_trains_u_net_and_head_alone(model, batch):
    model.zero_grad()
    model.shared_step(batch, model.batch_random(batch, 0))[0].backward()
    assert model.model.heads["representation"][2].weight.grad.any()
    assert model.model.diffusion_model.input_blocks[0][0].weight.grad.any()
    model.zero_grad()
    trained = {id(p) for p in model.trained_parameters()}
    assert not any(id(p) in trained for p in model.extractors.parameters())


def test_activation_checkpointing_changes_nothing(model, batch):
    unet = unet_config(use_spatial_transformer=True, context_dim=6, use_checkpoint=True)
    other = representation(unet_config=unet)
    other.load_state_dict(model.state_dict())
    results = []
    for one in (model, other):
        one.zero_grad()
        one.shared_step(batch, one.batch_random(batch, 0))[0].backward()
        gradient = one.model.diffusion_model.input_blocks[0][0].weight.grad.clone()
        one.zero_grad()
        # Through which a given vector conditions too.
        cond = one.get_learned_conditioning({"class_label": LABELS[:2]})
        given = {"representation": th.ones(2, WIDTH)}
        drawn = one.sample_joint(2, given, steps=3, sampler="ddim", conditioning=cond)["image"]
        results.append((gradient, drawn))
    for plain, checkpointed in zip(*results, strict=True):
        assert th.allclose(plain, checkpointed, atol=1e-5)


# ------------------------------------------------------------------------------------------------- where it comes from


def test_standard_form(model):
    vectors = Extractor()(maps(64, seed=7).permute(0, 3, 1, 2))
    standard = model.standards["representation"]
    form = standard(vectors)
    assert th.allclose(form.mean(dim=0), th.zeros(WIDTH), atol=1e-5)
    assert (form**2).mean().sqrt() == pytest.approx(1, abs=1e-5)
    assert th.allclose(standard.restore(form), vectors, atol=1e-4)
    fresh = Standard(WIDTH)
    assert th.equal(fresh(vectors), vectors)
    with pytest.raises(UserError, match="5 vectors of the data are all the same"):
        fresh.measure(th.ones(5, WIDTH))


def test_it_is_measured_once_and_comes_back_with_the_weights(model, tmp_path):
    before = model.standards["representation"].mean.clone()
    model.measure_standards([{"image": maps(8, seed=3)}], 8)
    assert th.equal(model.standards["representation"].mean, before)
    th.save({"state_dict": model.state_dict()}, tmp_path / "model.ckpt")
    again = representation(ckpt_path=tmp_path / "model.ckpt")
    assert (
        th.equal(again.standards["representation"].mean, before) and again.standards["representation"].known
    )


def test_missing_vectors_are_not_measured():
    made, known = representation(extractors={}), th.randn(8, WIDTH)
    present = th.tensor([True] * 8 + [False] * 4)
    vectors = th.cat([known, th.full((4, WIDTH), 100.0)])
    made.measure_standards([{"representation": vectors, "representation_present": present}], 12)
    assert th.allclose(made.standards["representation"].mean, known.mean(dim=0), atol=1e-5)


@th.no_grad()
def test_vectors_of_the_data_go_before_the_extractor(model, batch):
    own = th.randn(4, WIDTH)
    read = model.modality_batch(batch | {"representation": own})
    standard = model.standards["representation"]
    assert th.allclose(read.values["representation"], (own - standard.mean) / standard.scale)
    with pytest.raises(UserValueError, match="the batch has no 'representation'"):
        representation(extractors={}).modality_batch(batch)


@th.no_grad()
def test_a_image_may_be_given_for_its_vector(model):
    images = maps(2, seed=5).permute(0, 3, 1, 2)
    cond = model.get_learned_conditioning({"class_label": LABELS[:2]})
    options = dict(steps=3, sampler="ddim", conditioning=cond)
    by_image = model.sample_joint(2, {"representation": images}, **options)["image"]
    by_vector = model.sample_joint(2, {"representation": Extractor()(images)}, **options)["image"]
    assert th.allclose(by_image, by_vector, atol=1e-5)
    other = model.sample_joint(2, {"representation": Extractor()(images.flip(0))}, **options)["image"]
    assert (by_vector - other).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------- from Stable Diffusion


@pytest.mark.parametrize("parameterization", ["eps", "v"])
@th.no_grad()
def test_it_starts_as_stable_diffusion(tmp_path, parameterization):
    """With a new head, a checkpoint of text to image predicts and draws what it did, to the bit."""
    options = {**TEXT, "parameterization": parameterization}
    alone, path = small(**options), tmp_path / "model.ckpt"
    th.save({"state_dict": alone.state_dict()}, path)
    model = representation(shake=False, ckpt_path=path, parameterization=parameterization)
    z, t = th.randn(4, 2, 8, 8), th.tensor([3, 10, 30, 39])
    cond = alone.get_learned_conditioning({"class_label": LABELS})
    out, heads = model.apply_model(z, t, cond, return_ids=True)
    assert th.equal(out, alone.apply_model(z, t, cond)) and not heads["representation"].any()
    free = alone.get_unconditional_conditioning(4)
    expected, _ = DDIMSampler(alone).sample(
        5, 4, (2, 8, 8), cond, unconditional_guidance_scale=3.0, unconditional_conditioning=free,
        random=noise_of(4), verbose=False,
    )  # fmt: skip
    drawn, way = DDIMSampler(model).sample(
        5, 4, (2, 8, 8), cond, unconditional_guidance_scale=3.0, unconditional_conditioning=free,
        random=noise_of(4), verbose=False,
    )  # fmt: skip
    assert th.allclose(drawn, expected, atol=1e-5)
    # It knows nothing yet: the mean.
    estimate = model.decoded(way["values"])["representation"]
    assert th.equal(estimate, model.standards["representation"].mean.expand(4, -1))


@th.no_grad()
def test_left_out_it_is_the_plain_sampler(model):
    """`absent` draws as LatentDiffusion does with the same weights."""
    alone = small(**TEXT)
    alone.load_state_dict(model.state_dict(), strict=False)
    cond = model.get_learned_conditioning({"class_label": LABELS})
    options = dict(verbose=False)
    expected, _ = DDIMSampler(alone).sample(5, 4, (2, 8, 8), cond, random=noise_of(4), **options)
    without = dict(absent=["representation"], random=noise_of(4), **options)
    drawn, _ = DDIMSampler(model).sample(5, 4, (2, 8, 8), cond, **without)
    assert th.allclose(drawn, expected, atol=1e-5)
    joint, _ = DDIMSampler(model).sample(5, 4, (2, 8, 8), cond, random=noise_of(4), **options)
    assert (joint - drawn).abs().max() > 1e-3
    with pytest.raises(UserValueError, match="does not know absent"):
        DDIMSampler(alone).sample(5, 4, (2, 8, 8), cond, **without)


def noise_of(count):
    return PerSample.derived(0, range(count))


@th.no_grad()
def test_steps_without_the_modality(batch):
    """single_task_probability 1 is LatentDiffusion's loss; in between, some samples are."""
    random = [representation().batch_random(batch, 0) for _ in range(2)]
    alone = small(LatentDiffusion, **TEXT)
    never, always = representation(), representation(single_task_probability=1.0)
    alone.load_state_dict(never.state_dict(), strict=False)
    x, cond = alone.get_input(batch, "image")
    t, noise = th.tensor([2, 20, 30, 39]), th.randn(4, 2, 8, 8)
    expected, _ = alone.p_losses(x, cond, t, noise)
    assert th.allclose(always.p_losses(x, cond, t, noise, random[0], batch)[0], expected, rtol=1e-5)
    assert not th.allclose(never.p_losses(x, cond, t, noise, random[1], batch)[0], expected, rtol=1e-3)
    assert always.modalities.single_task and not never.modalities.single_task


# ------------------------------------------------------------------------------------------------------------ min-SNR


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
@th.no_grad()
def test_min_snr_weights_the_error_of_x0(parameterization):
    """In terms of x_0 every parameterization's weighted error is min(SNR, gamma) |x_0 - prediction|^2."""
    model = small(parameterization=parameterization, min_snr_gamma=5.0)
    x, noise, t = th.randn(3, 2, 8, 8), th.randn(3, 2, 8, 8), th.tensor([1, 15, 39])
    abar = model.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    z = abar.sqrt() * x + (1 - abar).sqrt() * noise
    out = model.apply_model(z, t)
    if parameterization == "eps":
        predicted = (z - (1 - abar).sqrt() * out) / abar.sqrt()
    else:
        predicted = out if parameterization == "x0" else abar.sqrt() * z - (1 - abar).sqrt() * out
    snr = abar / (1 - abar)
    expected = (snr.clamp(max=5) * (x - predicted) ** 2).mean()
    loss, log = model.p_losses(x, {}, t, noise)
    assert th.allclose(loss, expected, rtol=1e-3)
    plain, plain_log = small(parameterization=parameterization).p_losses(x, {}, t, noise)
    assert not th.allclose(plain, expected, rtol=1e-2)
    assert log["val/loss_simple"] == plain_log["val/loss_simple"]  # what is logged stays comparable


# ----------------------------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_named(model):
    with pytest.raises(UserValueError, match="extractors.depth: the vector modalities are representation"):
        representation(extractors={"depth": EXTRACTOR})
    wrong = {"representation": {"preset": "representation", "shape": [4]}}
    with pytest.raises(UserValueError, match="gives 9 numbers, modality representation has 4: set its shape"):
        representation(modalities=wrong)
    with pytest.raises(UserValueError, match="no cross-attention"):
        small(JointLatentDiffusion, modalities={"representation": {"preset": "representation"}})
    with pytest.raises(UserValueError, match="no extractors.representation to read it off images"):
        representation(extractors={}).sample_joint(1, {"representation": th.zeros(1, 2, 8, 8)})
    with pytest.raises(UserValueError, match=r"expected values of shape \[B, 9\]"):
        model.sample_joint(1, {"representation": th.zeros(1, 3)})
    with pytest.raises(UserValueError, match="min_snr_gamma must be positive"):
        small(min_snr_gamma=-1.0)


# ----------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def recipe(tmp_path, clip):  # noqa: F811
    """recipe(**trainer): a configuration of main.py: captioned images, a tiny CLIP's text encoder, colours as the
    representation."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(12):
        colour = tuple((number * step) % 256 for step in (20, 45, 90))
        Image.new("RGB", (8, 8), colour).save(photos / f"{number:02}.png")
        (photos / f"{number:02}.txt").write_text(f"{'cat' if number % 2 else 'dog'}\n")
    text = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
            "params": {"version": str(clip), "max_length": 8}}  # fmt: skip
    params = dict(
        first_stage_config=IDENTITY,
        first_stage_key="jpg",
        cond_stage_config=text,
        cond_stage_key="txt",
        conditioning_key="crossattn",
        ucg_training={"txt": {"p": 0.2, "val": ""}},
        unet_config=unet_config(
            in_channels=3, out_channels=3, use_spatial_transformer=True, context_dim=TEXT_WIDTH
        ),
        image_size=8,
        channels=3,
        timesteps=40,
        modalities={"representation": {"preset": "representation", "shape": [3]}},
        extractors={"representation": {"target": "tests.test_ldm_scripts_sample.Reader"}},
        standardise=10,
        single_task_probability=0.2,
        min_snr_gamma=5.0,
    )

    def folder(part):
        params = {
            "root": str(photos),
            "size": 8,
            "random_flip": part == "train",
            "part": part,
            "held_out_every": 6,
        }
        return {"target": "ldm.data.captions.CaptionFolder", "params": params}

    def write(name="joint", callbacks=None, data=None, **trainer):
        model = {
            "base_learning_rate": 1e-3,
            "target": "ldm.models.diffusion.joint.JointLatentDiffusion",
            "params": params,
        }
        photos = {
            "batch_size": 2,
            "num_workers": 0,
            "train": folder("train"),
            "validation": folder("held_out"),
        }
        content = {
            "model": model,
            "data": data or {"target": "main.DataModuleFromConfig", "params": photos},
            "lightning": {
                "trainer": TRAINER | {"max_epochs": 2} | trainer,
                "callbacks": {"image_logger": None, **(callbacks or {})},
            },
        }
        OmegaConf.save(OmegaConf.create(content), tmp_path / f"{name}.yaml")
        return tmp_path / f"{name}.yaml"

    return write


def test_training_with_accumulation_and_bf16(recipe, train):  # noqa: F811
    folder = train(recipe(accumulate_grad_batches=2, precision="bf16-mixed"), "--scale_lr", "False")
    state = final(folder)
    weights = state["state_dict"]
    assert (
        state["global_step"] == 2 * 3
    )  # 10 images, batches of 2, of which two make an update, the last alone
    assert weights["standards.representation.known"]
    # The mean colour of the ten training images: numbers 0 and 6 are held out.
    kept = [n for n in range(12) if n % 6]
    red = sum((n * 20) % 256 for n in kept) / len(kept) / 127.5 - 1
    assert weights["standards.representation.mean"][0] == pytest.approx(red, abs=0.02)
    assert weights["model.diffusion_model.heads.representation.2.weight"].any()
    assert not (weights["model.diffusion_model.heads.representation.variance"] == 1).all()
    assert any(name.startswith("model_ema.") for name in weights)


def test_a_stopped_training_continues_exactly(recipe, train, tmp_path):  # noqa: F811
    whole = final(train(recipe("whole"), name="whole"))
    stop = {"target": "tests.ldm_training_driver.SignalAt", "params": {"step": 3, "name": "SIGTERM"}}
    with pytest.raises(SystemExit):
        train(recipe("stopped", callbacks={"stop": stop}), name="stopped")
    folder = run_folder(tmp_path, "stopped")
    assert final(folder)["global_step"] < whole["global_step"]
    resume(folder, "lightning.callbacks.stop=null")
    assert_same_training(final(folder), whole)


def test_training_on_tar_shards_continues_in_the_middle_of_one(recipe, train, shards, tmp_path):  # noqa: F811
    """Measuring the standard form reads the stream's beginning, which the training then sees all the same."""
    stream = {"shards": str(shards([5, 7])), "size": 8, "samples_per_epoch": 12, "random_flip": True}
    params = {"batch_size": 2, "num_workers": 2}
    params["train"] = {"target": "ldm.data.tar_shards.TarShards", "params": stream}
    data = {"target": "ldm.training.shard_data.ShardDataModule", "params": params}
    whole = final(train(recipe("whole", data=data, max_epochs=1), name="whole"))
    stop = {"target": "tests.ldm_training_driver.SignalAt", "params": {"step": 2, "name": "SIGTERM"}}
    with pytest.raises(SystemExit):
        train(recipe("stopped", {"stop": stop}, data, max_epochs=1), name="stopped")
    folder = run_folder(tmp_path, "stopped")
    assert final(folder)["global_step"] < whole["global_step"] == 6
    resume(folder, "lightning.callbacks.stop=null")
    again = final(folder)
    assert whole["state_dict"]["standards.representation.known"]
    different = [n for n, v in whole["state_dict"].items() if not th.equal(v, again["state_dict"][n])]
    assert not different
    assert again["ShardDataModule"]["lanes"] == whole["ShardDataModule"]["lanes"]
