"""What upstream's configurations name: built without weights, with upstream's state-dict keys and numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

from guided_diffusion.config_file import load_with_bases
from guided_diffusion.errors import UserError, UserFileError, UserValueError
from ldm.models.autoencoder import VQModel
from ldm.models.diffusion.classifier import NoisyLatentImageClassifier
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.modules import (
    BERTEmbedder,
    BERTTokenizer,
    CLIPEmbeddingNoiseAugmentation,
    FrozenClipImageEmbedder,
)
from ldm.modules.losses.discriminator import NLayerDiscriminator
from ldm.modules.quantize import VectorQuantizer2
from ldm.modules.x_transformer import Encoder, TransformerWrapper
from ldm.util import get_obj_from_str, instantiate_from_config
from tests.compare import agree
from tests.ldm_models import CLASSES, DDCONFIG, UNET, maps, small, unet_config
from tests.parity.weights import fill

DDPM = "ldm.models.diffusion.ddpm"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]


class Depth(nn.Module):
    """The mean over channels, as if it were the depth."""

    def forward(self, x):
        return x.mean(1, keepdim=True)


class Embedding(nn.Module):
    """The first three means of an image."""

    def forward(self, x):
        return x.mean((2, 3))


# ------------------------------------------------------------------------------------------------- without weights


def test_on_the_meta_device_no_weights_are_read():
    """Neither hub names nor files need to exist."""
    for target, params in (
        ("FrozenCLIPEmbedder", {}),
        ("FrozenOpenCLIPEmbedder", {"layer": "penultimate"}),
        ("FrozenClipImageEmbedder", {"model": "ViT-L/14"}),
        ("BERTEmbedder", {"n_embed": 64, "n_layer": 1}),
    ):
        with th.device("meta"):
            made = instantiate_from_config(
                {"target": f"ldm.modules.encoders.modules.{target}", "params": params}
            )
        assert all(p.is_meta for p in made.parameters())
    with th.device("meta"):
        loss = {
            "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
            "params": {"disc_start": 0},
        }
        model = VQModel(DDCONFIG, loss, n_embed=8, embed_dim=2, ckpt_path="nowhere.ckpt")
    assert "loss.perceptual_loss.net.slice1.0.weight" in model.state_dict()


def test_a_name_that_is_not_there_is_refused_in_one_line():
    with pytest.raises(UserValueError, match="no module ldm.modules.midas"):
        instantiate_from_config({"target": "ldm.modules.midas.api.MiDaSInference"})
    with pytest.raises(UserValueError, match="got the keys type, hparams"):
        instantiate_from_config({"type": "prior", "hparams": {}})


def test_names_of_taming_transformers_are_here():
    assert get_obj_from_str("taming.modules.vqvae.quantize.VectorQuantizer2") is VectorQuantizer2


# ---------------------------------------------------------------------------------------------------- text, images


@th.no_grad()
def test_the_transformer_computes_what_upstreams_does():
    """Upstream's own numbers, for weights that are filled by their names."""
    model = TransformerWrapper(num_tokens=11, max_seq_len=6, attn_layers=Encoder(dim=32, depth=2)).eval()
    fill(model)
    tokens = th.tensor([[1, 5, 2, 10], [0, 3, 3, 7]])
    agree(
        model(tokens, return_embeddings=True)[:, -1, :4],
        th.tensor(
            [[-0.3575412, 0.6950743, 0.3492005, -0.0917128], [-0.0985368, -1.8490081, 0.1221020, -0.0447835]]
        ),
    )
    agree(model(tokens)[0, 1, :4], th.tensor([2.2799039, -0.2356181, 1.5849862, 0.4608825]))
    with pytest.raises(UserValueError, match="at most 6"):
        model(th.zeros(1, 7, dtype=th.long))
    with pytest.raises(UserValueError, match=r"0\.\.10, got 0\.\.11"):
        model(th.tensor([[0, 11]]))


def test_bert_reads_captions_or_tokens(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    tokens = BERTTokenizer(vq_interface=False, max_length=5, version=str(tmp_path))(["a cat", "a a a a a"])
    assert tokens.tolist() == [[2, 5, 6, 3, 0], [2, 5, 5, 5, 3]]
    told = BERTEmbedder(32, 1, len(WORDS), 5, tokenizer=str(tmp_path)).eval()
    plain = BERTEmbedder(32, 1, len(WORDS), 5, use_tokenizer=False).eval()
    plain.load_state_dict(told.state_dict())
    with th.no_grad():
        assert th.equal(told.encode(["a cat"]), plain.encode(tokens[:1]))
    assert not list(told.state_dict())[0].startswith("tknz")
    with pytest.raises(UserFileError, match="no tokenizer"):
        BERTTokenizer(version=str(tmp_path / "nowhere"))


def test_images_are_prepared_as_upstream_does(tmp_path):
    """Stretched by bicubic interpolation with the corners kept, colours normalised."""
    pytest.importorskip("kornia")
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=20,
        patch_size=10,
    )
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    encoder = FrozenClipImageEmbedder(str(tmp_path))
    images = maps(2, 3, 12).movedim(-1, 1)[:, :, :9]
    stretched = F.interpolate(images, (20, 20), mode="bicubic", align_corners=True)
    agree(encoder.preprocess(images), ((stretched + 1) / 2 - encoder.mean) / encoder.std)
    assert encoder(images).shape == (2, encoder.width)


# -------------------------------------------------------------------------------------------------- the first stage


def test_the_codebook_takes_the_nearest_entry_and_learns(tmp_path):
    quantiser = VectorQuantizer2(5, 3, beta=0.25)
    assert list(quantiser.state_dict()) == ["embedding.weight"]
    z = th.randn(2, 3, 4, 4, requires_grad=True)
    entries, loss, (_, _, indices) = quantiser(z)
    table = quantiser.embedding.weight
    nearest = th.cdist(z.movedim(1, -1).reshape(-1, 3), table).argmin(1)
    assert th.equal(indices, nearest)
    agree(entries, table[nearest].view(2, 4, 4, 3).movedim(-1, 1))
    error = (table[nearest].view(2, 4, 4, 3).movedim(-1, 1) - z).square().mean()
    agree(loss, 1.25 * error)
    entries.sum().backward()
    assert th.equal(z.grad, th.ones_like(z))  # the rounding is passed by
    agree(quantiser.get_codebook_entry(indices, (2, 4, 4, 3)), entries)

    np.save(tmp_path / "used.npy", np.array([4, 1]))
    some = VectorQuantizer2(5, 3, 0.25, remap=str(tmp_path / "used.npy"), unknown_index="extra")
    assert some.remap_to_used(th.tensor([[1, 4, 0]])).tolist() == [[1, 0, 2]]
    assert some.unmap_to_all(th.tensor([[1, 0, 2]])).tolist() == [[1, 4, 4]]
    with pytest.raises(UserFileError, match="remap"):
        VectorQuantizer2(5, 3, 0.25, remap=str(tmp_path / "no.npy"))


def test_the_discriminator_judges_patches():
    model = NLayerDiscriminator(3, 8, 2)
    assert model(th.randn(2, 3, 32, 32)).shape == (2, 1, 6, 6)
    assert {k: list(v.shape) for k, v in model.state_dict().items() if k.endswith("weight")} == {
        "main.0.weight": [8, 3, 4, 4],
        "main.2.weight": [16, 8, 4, 4],
        "main.3.weight": [16],
        "main.5.weight": [32, 16, 4, 4],
        "main.6.weight": [32],
        "main.8.weight": [1, 32, 4, 4],
    }
    steered = NLayerDiscriminator(3, 8, 2, use_actnorm=True)
    steered(th.randn(4, 3, 32, 32))
    assert steered.main[3].initialized and "main.3.loc" in steered.state_dict()


# ------------------------------------------------------------------------------------------------------- the U-Net


@th.no_grad()
def test_options_of_stable_diffusion_2s_network():
    """Vectors or numbers as the class, transformers without self-attention, bfloat16."""
    x, t, context = th.randn(2, 2, 8, 8), th.tensor([1, 2]), th.randn(2, 3, 6)
    options = dict(UNET, use_spatial_transformer=True, context_dim=6, attention_resolutions=[1, 2])
    made = UNetModel(
        **options, num_classes="sequential", adm_in_channels=5,
        disable_self_attentions=[True, False], disable_middle_self_attn=True,
    )  # fmt: skip
    widths = {k: v.shape[1] for k, v in made.state_dict().items() if k.endswith("attn1.to_k.weight")}
    alone = {k.rsplit(".", 5)[0] for k, width in widths.items() if width == 6}
    assert alone == {"input_blocks.1.1", "middle_block.1", "output_blocks.2.1", "output_blocks.3.1"}
    for parameter in made.parameters():
        parameter.add_(0.05 * th.randn(parameter.shape))
    first, second = (made(x, t, context, y=th.randn(2, 5)) for _ in range(2))
    assert not th.equal(first, second)
    half = UNetModel(**UNET, use_bf16=True)
    half.load_state_dict(UNetModel(**UNET).state_dict())
    assert half(x, t).dtype == th.float32
    assert UNetModel(**UNET, num_classes="continuous").label_emb.weight.shape[1] == 1
    with pytest.raises(UserValueError, match="adm_in_channels"):
        UNetModel(**UNET, num_classes="sequential")
    with pytest.raises(UserValueError, match="one value for each level"):
        UNetModel(**options, disable_self_attentions=[True])


# ----------------------------------------------------------------------------- Stable Diffusion 2's latent diffusions

LABELLED = dict(cond_stage_config=CLASSES, cond_stage_key="class_label")
LABEL = {"class_label": th.tensor([1, 3])}


def of(name, **options):
    return small(get_obj_from_str(f"{DDPM}.{name}"), **{**LABELLED, **options})


def context_unet(**changes):
    return unet_config(use_spatial_transformer=True, context_dim=6, **changes)


def test_inpainting_sees_the_mask_and_the_image_without_it(tmp_path):
    options = dict(conditioning_key="hybrid", unet_config=context_unet(in_channels=5))
    model = of("LatentInpaintDiffusion", finetune_keys=None, **options)
    batch = {"image": maps(2), "mask": maps(2, 1, 16), "masked_image": maps(2, seed=1), **LABEL}
    _, cond = model.get_input(batch, "image")
    mask, masked = cond["c_concat"]
    assert th.equal(mask, F.interpolate(batch["mask"].movedim(-1, 1), size=(8, 8)))
    assert th.equal(masked, batch["masked_image"].movedim(-1, 1))
    assert model.training_step(batch, 0).isfinite()
    # What its configuration passes to log_images.
    told = dict(
        inpaint=False, plot_progressive_rows=False, plot_diffusion_rows=False, N=4, ddim_steps=4, ddim_eta=0.0
    )
    guided = dict(told, unconditional_guidance_scale=5.0)
    first, second = (model.log_images(batch, **guided, unconditional_guidance_label=[k]) for k in (0, 2))
    assert not th.equal(first["samples_cfg"], second["samples_cfg"])
    assert th.equal(first["samples"], second["samples"])
    with th.no_grad():
        model.model.diffusion_model.out[-1].weight.mul_(3)  # and the average stays
    own, average = (model.log_images(batch, use_ema_scope=use, **told)["samples"] for use in (False, True))
    assert th.equal(average, first["samples"]) and not th.equal(own, average)
    with pytest.raises(UserValueError, match="ddim_stepz.*did you mean ddim_steps"):
        model.log_images(batch, ddim_stepz=3)
    with pytest.raises(UserValueError, match="give ckpt_path"):
        of("LatentInpaintDiffusion", **options)
    plain = small(**LABELLED, conditioning_key="crossattn", unet_config=context_unet())
    th.save({"state_dict": plain.state_dict()}, tmp_path / "plain.ckpt")
    begun = of(
        "LatentInpaintDiffusion",
        keep_finetune_dims=2,
        ckpt_path=str(tmp_path / "plain.ckpt"),
        shake=False,
        **options,
    )
    stem = begun.model.diffusion_model.input_blocks[0][0].weight
    assert th.equal(stem[:, :2], plain.model.diffusion_model.input_blocks[0][0].weight)
    assert not stem[:, 2:].any()


def test_depth_is_stretched_and_put_beside_the_latent():
    depth = {"target": f"{__name__}.Depth"}
    unet = context_unet(in_channels=3)
    model = of(
        "LatentDepth2ImageDiffusion",
        depth_stage_config=depth,
        finetune_keys=None,
        conditioning_key="hybrid",
        unet_config=unet,
    )
    seen = maps(2, 3, 16).movedim(-1, 1)
    _, cond = model.get_input({"image": maps(2), "midas_in": seen, **LABEL}, "image")
    (found,) = cond["c_concat"]
    expected = F.interpolate(seen.mean(1, keepdim=True), (8, 8), mode="bicubic")
    low, high = (getattr(expected, f)((1, 2, 3), keepdim=True) for f in ("amin", "amax"))
    agree(found, 2 * (expected - low) / (high - low + 1e-3) - 1)


def test_upscaling_noises_the_small_image_and_tells_the_level():
    low = {"target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation"}
    low["params"] = {"noise_schedule_config": {"timesteps": 50}, "max_noise_level": 20}
    unet = context_unet(in_channels=5, num_classes=50)
    model = of(
        "LatentUpscaleDiffusion",
        low_scale_config=low,
        low_scale_key="lr",
        conditioning_key="hybrid-adm",
        unet_config=unet,
    )
    batch = {"image": maps(2), "lr": maps(2, 3), **LABEL}
    _, cond = model.get_input(batch, "image")
    assert cond["c_adm"].shape == (2,) and int(cond["c_adm"].max()) < 20
    assert not th.equal(cond["c_concat"][0], batch["lr"].movedim(-1, 1))
    still, level = model.low_scale_model(th.ones(1, 3, 4, 4), th.tensor([0]))
    assert (still - 1).abs().max() < 0.1 and level.tolist() == [0]
    assert model.training_step(batch, 0).isfinite()


def test_unclip_is_told_the_embedding_of_the_image(tmp_path):
    th.save((th.full((3,), 0.1), th.full((3,), 0.5)), tmp_path / "stats.th")
    noise = {"target": "ldm.modules.encoders.modules.CLIPEmbeddingNoiseAugmentation"}
    noise["params"] = dict(timestep_dim=4, clip_stats_path=str(tmp_path / "stats.th"))
    noise["params"]["noise_schedule_config"] = {"timesteps": 50, "beta_schedule": "squaredcos_cap_v2"}
    noise["params"]["max_noise_level"] = 50
    unet = context_unet(num_classes="sequential", adm_in_channels=7)
    model = of(
        "ImageEmbeddingConditionedLatentDiffusion", embedder_config={"target": f"{__name__}.Embedding"},
        noise_aug_config=noise, embedding_key="jpg", embedding_dropout=1.0, conditioning_key="crossattn-adm", unet_config=unet,
    )  # fmt: skip
    batch = {"image": maps(2), "jpg": maps(2, 3), **LABEL}
    assert model.get_input(batch, "image")[1]["c_adm"].shape == (2, 7)
    assert model.training_step(batch, 0).isfinite()
    model.train()
    assert not model.get_input(batch, "image")[1]["c_adm"].any()  # all are left out
    augment = CLIPEmbeddingNoiseAugmentation(**noise["params"])
    x = th.randn(2, 3)
    agree(augment.unscale(augment.scale(x)), x)
    agree(augment(x, th.tensor([0, 0]))[0], x, floor=0.2)


# ------------------------------------------------------------------------------------------- a classifier on latents


@pytest.mark.parametrize("key", ["class_label", "segmentation"])
def test_a_classifier_learns_the_labels_of_noised_latents(tmp_path, key):
    (tmp_path / "configs").mkdir()
    unet = unet_config(num_head_channels=16, num_heads=-1)
    model = dict(
        first_stage_config={"target": "ldm.models.autoencoder.IdentityFirstStage"}, unet_config=unet,
        cond_stage_config="__is_unconditional__", image_size=8, channels=2, timesteps=40, log_every_t=20,
    )  # fmt: skip
    config = {"model": {"target": f"{DDPM}.LatentDiffusion", "params": model}}
    OmegaConf.save(OmegaConf.create(config), tmp_path / "configs" / "2026-project.yaml")
    classifier = NoisyLatentImageClassifier(str(tmp_path), 3, label_key=key)
    labels = th.tensor([0, 2]) if key == "class_label" else maps(2, 3, 16)
    loss, logits, x_t, told = classifier.shared_step({"image": maps(2), key: labels}, t=5)
    assert logits.shape == ((2, 3) if key == "class_label" else (2, 3, 8, 8))
    loss.backward()
    assert all(p.grad is None for p in classifier.diffusion_model.parameters())
    assert any(p.grad is not None and p.grad.any() for p in classifier.model.parameters())
    if key == "segmentation":
        assert th.equal(told, F.interpolate(labels.movedim(-1, 1), (8, 8)).argmax(1))
    exact = F.one_hot(told, 3).movedim(-1, 1).float()
    assert classifier.compute_top_k(exact, told, 1) == 1
    with pytest.raises(UserError, match="project.yaml"):
        NoisyLatentImageClassifier(str(tmp_path / "configs"), 3)


def test_the_projects_own_counterparts_build():
    """configs/latent-diffusion: each file of upstream's names, over a shared base."""
    folder = Path(__file__).parents[1] / "configs" / "latent-diffusion"
    found = {}
    for file in sorted(folder.glob("*.yaml")):
        if not file.name.startswith("base"):
            config = OmegaConf.to_container(OmegaConf.create(load_with_bases(file)), resolve=True)
            with th.device("meta"):
                found[file.stem] = len(instantiate_from_config(config["model"]).state_dict())
    assert found == {  # what upstream's have
        "celebahq-ldm-vq-4": 955,
        "cin-ldm-vq-f8": 1566,
        "cin256-v2": 906,
        "ffhq-ldm-vq-4": 955,
        "lsun_bedrooms-ldm-vq-4": 955,
        "lsun_churches-ldm-kl-8": 1303,
        "txt2img-1p4B-eval": 1368,
    }
