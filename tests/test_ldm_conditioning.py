"""Conditioning of latent diffusion: conditioners, and the ways into the U-Net; learning-rate schedules."""

import json
import math

import pytest
import torch as th
import torch.nn.functional as F

from guided_diffusion.errors import UserFileError, UserValueError
from guided_diffusion.seeding import PerSample
from ldm.lr_scheduler import (
    LambdaLinearScheduler,
    LambdaWarmUpCosineScheduler,
    LambdaWarmUpCosineScheduler2,
)
from ldm.models.diffusion.conditioning import select
from ldm.models.diffusion.ddpm import DiffusionWrapper
from ldm.modules.encoders.modules import (
    ClassEmbedder,
    FrozenCLIPEmbedder,
    FrozenOpenCLIPEmbedder,
    SpatialRescaler,
)
from ldm.util import instantiate_from_config
from tests.compare import agree
from tests.ldm_models import CLASSES, CONTEXT, KL, maps, small, unet_config

LABELLED = dict(
    cond_stage_config=CLASSES, cond_stage_key="class_label", conditioning_key="crossattn", unet_config=CONTEXT
)
WIDTH, WORDS = 32, ["a</w>", "cat</w>", "dog</w>"]


def latents(n=2, channels=2):
    return th.randn(n, channels, 8, 8, generator=th.Generator().manual_seed(4))


# -------------------------------------------------------------------------------------------------- into the U-Net


@pytest.mark.parametrize(
    "key, changes, given, expected",
    [
        (None, {}, {}, lambda z, c: (z, {})),
        ("concat", {"in_channels": 5}, {"c_concat": 2}, lambda z, c: (th.cat([z, *c["c_concat"]], 1), {})),
        (
            "crossattn",
            {"context": 1},
            {"c_crossattn": 2},
            lambda z, c: (z, {"context": th.cat(c["c_crossattn"], 1)}),
        ),
        (
            "hybrid",
            {"in_channels": 5, "context": 1},
            {"c_concat": 2, "c_crossattn": 1},
            lambda z, c: (th.cat([z, *c["c_concat"]], 1), {"context": c["c_crossattn"][0]}),
        ),
        ("adm", {"num_classes": 4}, {"y": 1}, lambda z, c: (z, {"y": c["c_crossattn"][0]})),
        (
            "crossattn-adm",
            {"num_classes": 4, "context": 1},
            {"c_crossattn": 1, "c_adm": 1},
            lambda z, c: (z, {"context": c["c_crossattn"][0], "y": c["c_adm"]}),
        ),
    ],
)
@th.no_grad()
def test_every_kind_of_conditioning_reaches_the_network(key, changes, given, expected):
    changes = dict(changes)
    if changes.pop("context", None):
        changes |= {"use_spatial_transformer": True, "context_dim": 6}
    config = unet_config(**changes)
    th.manual_seed(0)
    wrapper = DiffusionWrapper(config, key)
    for parameter in wrapper.parameters():
        parameter.add_(0.05 * th.randn(parameter.shape))
    cond = {}
    if "c_concat" in given:
        cond["c_concat"] = [latents(2, 1), latents(2, 2)]
    if "c_crossattn" in given:
        cond["c_crossattn"] = [th.randn(2, 3, 6) for _ in range(given["c_crossattn"])]
    if "y" in given:
        cond["c_crossattn"] = [th.tensor([1, 3])]
    if "c_adm" in given:
        cond["c_adm"] = th.tensor([1, 3])
    z, t = latents(), th.tensor([0, 30])
    x, options = expected(z, cond)
    out = wrapper(z, t, **cond)
    assert th.equal(out, wrapper.diffusion_model(x, t, **options))
    for name, value in cond.items():  # and matters
        other = [v.flip(0) for v in value] if isinstance(value, list) else value.flip(0)
        assert not th.allclose(wrapper(z, t, **{**cond, name: other}), out, atol=1e-4)
        with pytest.raises(UserValueError, match=f"needs {name}"):
            wrapper(z, t, **{k: v for k, v in cond.items() if k != name})


def test_conditioning_that_nothing_reads_is_refused():
    with pytest.raises(UserValueError, match="does not take c_crossattn"):
        DiffusionWrapper(unet_config(), None)(latents(), th.tensor([0, 0]), c_crossattn=[th.zeros(2, 1, 6)])


# ------------------------------------------------------------------------------------------------- from the batch


@th.no_grad()
def test_class_labels():
    model, labels = small(**LABELLED), th.tensor([1, 3])
    _, cond = model.get_input({"image": maps(2), "class_label": labels}, "image")
    assert th.equal(cond["c_crossattn"][0], model.cond_stage_model.embedding.weight[labels][:, None])
    with pytest.raises(UserValueError, match="0..3, got 1..4"):
        model.get_input({"image": maps(2), "class_label": th.tensor([1, 4])}, "image")
    with pytest.raises(UserValueError, match="no 'class_label'"):
        model.get_input({"image": maps(2)}, "image")


@th.no_grad()
def test_class_labels_into_the_timestep_embedding():
    options = dict(
        unet_config=unet_config(num_classes=4), cond_stage_key="class_label", conditioning_key="adm"
    )
    model, labels = small(**options), th.tensor([1, 3])
    z, cond = model.get_input({"image": maps(2), "class_label": labels}, "image")
    out = model.apply_model(z, th.tensor([0, 30]), cond)
    assert th.equal(out, model.model.diffusion_model(z, th.tensor([0, 30]), y=labels))


@th.no_grad()
def test_images_through_the_first_stage():
    """Concatenated, unscaled as upstream has them; cached ones are the same."""
    model = small(
        first_stage_config=KL, scale_factor=0.3, cond_stage_config="__is_first_stage__", cond_stage_key="label_map",
        unet_config=unet_config(in_channels=4),
    )  # fmt: skip
    hint = maps(2, 3, 16, seed=1)
    mean = model.encode_first_stage(hint.permute(0, 3, 1, 2).contiguous()).mean
    for batch in ({"label_map": hint}, {"label_map_latent": mean}):
        _, cond = model.get_input({"image": maps(2, 3, 16), **batch}, "image")
        assert th.allclose(cond["c_concat"][0], mean, atol=1e-5)
    assert "cond_stage_model.encoder.conv_in.weight" in model.state_dict()


@th.no_grad()
def test_hybrid_conditioning_has_maps_beside_the_context():
    """A mask is resized, an image encoded; in the order of concat_keys (inpainting)."""
    model = small(
        first_stage_config=KL,
        scale_factor=0.3,
        cond_stage_config=CLASSES,
        cond_stage_key="class_label",
        conditioning_key="hybrid",
        concat_keys=["mask", "masked_image"],
        unet_config=unet_config(use_spatial_transformer=True, context_dim=6, in_channels=5),
    )  # fmt: skip
    mask = (maps(2, 1, 16) > 0).float()
    batch = {
        "image": maps(2, 3, 16),
        "class_label": th.tensor([0, 1]),
        "mask": mask,
        "masked_image": maps(2, 3, 16),
    }
    z, cond = model.get_input(batch, "image")
    assert th.equal(cond["c_concat"][0], mask[:, ::2, ::2, 0][:, None])
    assert th.allclose(cond["c_concat"][1], z, atol=1e-5)
    assert model.apply_model(z, th.tensor([1, 2]), cond).shape == z.shape


def test_a_trained_conditioner_gets_gradients():
    model = small(**LABELLED, cond_stage_trainable=True)
    model.training_step({"image": maps(2), "class_label": th.tensor([1, 3])}, 0).backward()
    gradient = model.cond_stage_model.embedding.weight.grad.abs().sum(dim=1)
    assert gradient[1] > 0 and gradient[3] > 0 and gradient[0] == gradient[2] == 0
    assert any(p is model.cond_stage_model.embedding.weight for p in model.trained_parameters())
    frozen = small(**LABELLED)
    frozen.training_step({"image": maps(2), "class_label": th.tensor([1, 3])}, 0).backward()
    assert frozen.cond_stage_model.embedding.weight.grad is None


def test_conditioning_is_dropped_with_its_probability():
    """ucg_training: in training only, sample by sample, and the null input is that of guidance."""
    model = small(**LABELLED, ucg_training={"class_label": {"p": 0.25, "val": 3}})
    batch = {"class_label": th.zeros(2000, dtype=th.long)}
    raw = model.raw_conditioning(batch, PerSample(range(2000)))["class_label"]
    assert set(raw.tolist()) == {0, 3} and (raw == 3).float().mean() == pytest.approx(0.25, abs=0.03)
    assert th.equal(raw, model.raw_conditioning(batch, PerSample(range(2000)))["class_label"])
    assert model.raw_conditioning(batch)["class_label"].max() == 0
    free = model.get_unconditional_conditioning(2)["c_crossattn"][0]
    assert th.equal(free, model.cond_stage_model.embedding.weight[[3, 3]][:, None])
    model.ucg_training = {"class_label": {"p": 0.25, "val": ""}}
    captions = model.raw_conditioning({"class_label": ["a cat"] * 200}, PerSample(range(200)))
    assert set(captions) == {"a cat", ""}
    with pytest.raises(UserValueError, match="no null input"):
        small(**LABELLED).get_unconditional_conditioning(2)


def test_samples_of_conditioning_are_selected():
    values = {"c_concat": [th.arange(4)], "c_adm": th.arange(4), "text": list("abcd")}
    assert select(values, slice(1, 3))["text"] == ["b", "c"]
    picked = select(values, th.tensor([3, 0]))
    assert picked["c_concat"][0].tolist() == picked["c_adm"].tolist() == [3, 0] and picked["text"] == [
        "d",
        "a",
    ]


# -------------------------------------------------------------------------------------------------- conditioners


def test_class_embedder():
    embedder = ClassEmbedder(6, n_classes=3, key="cls")
    assert list(embedder.state_dict()) == ["embedding.weight"]
    assert embedder.encode({"cls": th.tensor([2, 0])}).shape == (2, 1, 6)
    assert th.equal(embedder({"other": th.tensor([2])}, key="other"), embedder({"cls": th.tensor([2])}))


def test_spatial_rescaler():
    x = maps(2, 3, 16).permute(0, 3, 1, 2)
    halved = SpatialRescaler(n_stages=2, multiplier=0.5)(x)
    expected = F.avg_pool2d(x, 2)  # bilinear by a half, as torch aligns it
    agree(halved, F.avg_pool2d(expected, 2), rtol=1e-5)
    mapped = SpatialRescaler(in_channels=3, out_channels=5, method="nearest")
    assert list(mapped.state_dict()) == ["channel_mapper.weight"]
    agree(mapped.encode(x), F.conv2d(x[..., ::2, ::2], mapped.channel_mapper.weight), rtol=1e-5)
    with pytest.raises(UserValueError, match="'area5'"):
        SpatialRescaler(method="area5")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a tiny CLIP text model, random weights, and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    tokens = ["!", *WORDS, "<|startoftext|>", "<|endoftext|>", *"acdgot", *(f"{c}</w>" for c in "cdgot")]
    (folder / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(dict.fromkeys(tokens))})
    )
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\nd o\ndo g</w>\n")
    vocabulary = json.loads((folder / "vocab.json").read_text())
    for part in ("ca", "do"):
        vocabulary.setdefault(part, len(vocabulary))
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    th.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=8, hidden_act="gelu", bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
    )  # fmt: skip
    model = transformers.CLIPTextModel(config)
    with th.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * th.randn(parameter.shape))
    model.save_pretrained(folder)
    transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


def blocks(weights, x, count):
    """OpenCLIP's transformer, written out: x [B, S, D] after `count` blocks."""
    mask = th.full((x.shape[1], x.shape[1]), -math.inf).triu(1)
    for i in range(count):
        w = {k.removeprefix(f"transformer.resblocks.{i}."): v for k, v in weights.items()}
        h = F.layer_norm(x, (WIDTH,), w["ln_1.weight"], w["ln_1.bias"])
        h, _ = F.multi_head_attention_forward(
            *[h.transpose(0, 1)] * 3, WIDTH, 2, w["attn.in_proj_weight"], w["attn.in_proj_bias"], None, None, False,
            0.0, w["attn.out_proj.weight"], w["attn.out_proj.bias"], attn_mask=mask,
        )  # fmt: skip
        x = x + h.transpose(0, 1)
        h = F.layer_norm(x, (WIDTH,), w["ln_2.weight"], w["ln_2.bias"])
        h = F.gelu(F.linear(h, w["mlp.c_fc.weight"], w["mlp.c_fc.bias"]))
        x = x + F.linear(h, w["mlp.c_proj.weight"], w["mlp.c_proj.bias"])
    return x


def open_clip_weights(vocabulary):
    shapes = {"token_embedding.weight": (vocabulary, WIDTH), "positional_embedding": (8, WIDTH)}
    for i in range(3):
        shapes |= {
            f"transformer.resblocks.{i}.{name}": shape
            for name, shape in {
                "ln_1.weight": (WIDTH,), "ln_1.bias": (WIDTH,), "ln_2.weight": (WIDTH,), "ln_2.bias": (WIDTH,),
                "attn.in_proj_weight": (3 * WIDTH, WIDTH), "attn.in_proj_bias": (3 * WIDTH,),
                "attn.out_proj.weight": (WIDTH, WIDTH), "attn.out_proj.bias": (WIDTH,),
                "mlp.c_fc.weight": (4 * WIDTH, WIDTH), "mlp.c_fc.bias": (4 * WIDTH,),
                "mlp.c_proj.weight": (WIDTH, 4 * WIDTH), "mlp.c_proj.bias": (WIDTH,),
            }.items()
        }  # fmt: skip
    shapes |= {
        "ln_final.weight": (WIDTH,),
        "ln_final.bias": (WIDTH,),
        "text_projection": (WIDTH, WIDTH),
        "logit_scale": (),
    }
    th.manual_seed(1)
    return {name: 0.2 * th.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("layer, depth", [("last", 3), ("penultimate", 2)])
@th.no_grad()
def test_open_clip_weights_of_a_stable_diffusion_2_checkpoint(tmp_path, clip, layer, depth):
    """They load under upstream's names, and mean what OpenCLIP's transformer computes."""
    text = {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
            "params": {"version": str(clip), "layer": layer, "max_length": 8}}  # fmt: skip
    options = dict(
        cond_stage_config=text, cond_stage_key="caption", conditioning_key="crossattn",
        unet_config=unet_config(use_spatial_transformer=True, context_dim=WIDTH),
    )  # fmt: skip
    model = small(**options)
    weights = open_clip_weights(len(model.cond_stage_model.tokenizer))
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("cond_stage_model")}
    th.save(state | {f"cond_stage_model.model.{k}": v for k, v in weights.items()}, tmp_path / "model.ckpt")
    model.init_from_ckpt(tmp_path / "model.ckpt")
    # What is saved has the names and the values of what was read.
    saved = {k: v for k, v in model.state_dict().items() if k.startswith("cond_stage_model.")}
    assert saved.keys() == {f"cond_stage_model.model.{k}" for k in weights}
    assert all(th.equal(saved[f"cond_stage_model.model.{k}"], v) for k, v in weights.items())
    tokens = model.cond_stage_model.tokens(["a cat", "dog"])
    begin, end = model.cond_stage_model.tokenizer.bos_token_id, model.cond_stage_model.tokenizer.eos_token_id
    assert tokens.tolist() == [[begin, 1, 2, end, 0, 0, 0, 0], [begin, 3, end, 0, 0, 0, 0, 0]]
    x = blocks(weights, weights["token_embedding.weight"][tokens] + weights["positional_embedding"], depth)
    expected = F.layer_norm(x, (WIDTH,), weights["ln_final.weight"], weights["ln_final.bias"])
    _, cond = model.get_input({"image": maps(2), "caption": ["a cat", "dog"]}, "image")
    assert th.allclose(cond["c_crossattn"][0], expected, atol=1e-4)


@th.no_grad()
def test_clip_text_encoder(clip):
    embedder = FrozenCLIPEmbedder(str(clip), max_length=8)
    names = list(embedder.state_dict())
    assert all(name.startswith("transformer.text_model.") for name in names)
    assert "transformer.text_model.encoder.layers.0.self_attn.q_proj.weight" in names
    assert not embedder.training and not any(p.requires_grad for p in embedder.parameters())
    out = embedder.encode(["a cat", "dog"])
    end = embedder.tokenizer.eos_token_id
    assert embedder.tokens("a cat").tolist()[0][3:] == [end] * 5
    assert embedder.tokens("dog " * 20).shape == (1, 8) and embedder.tokens("dog " * 20)[0, -1] == end
    assert out.shape == (2, 8, WIDTH) and th.allclose(embedder("dog")[0], out[1], atol=1e-5)
    hidden = FrozenCLIPEmbedder(str(clip), max_length=8, layer="hidden", layer_idx=-1)(["dog"])
    norm = embedder.state_dict()
    weight, bias = (norm[f"transformer.text_model.final_layer_norm.{k}"] for k in ("weight", "bias"))
    assert th.allclose(F.layer_norm(hidden, (WIDTH,), weight, bias), out[1:], atol=1e-5)
    pooled = FrozenCLIPEmbedder(str(clip), max_length=8, layer="pooled")(["dog"])
    assert th.allclose(pooled[0, 0], out[1, 2], atol=1e-5)  # at the end of the text
    assert "x.position_ids" not in embedder.adapt_weights({"x.position_ids": th.zeros(1)})


def test_text_encoders_that_are_not_there_are_named(tmp_path, monkeypatch, clip):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserFileError, match="no text encoder .*nothing"):
        FrozenCLIPEmbedder(str(tmp_path / "nothing"))
    with pytest.raises(UserValueError, match="'first'.*last, penultimate"):
        FrozenOpenCLIPEmbedder(version=str(clip), layer="first")
    with pytest.raises(UserValueError, match="layer_idx in -4..3"):
        FrozenCLIPEmbedder(str(clip), layer="hidden")


# ------------------------------------------------------------------------------------------------ learning rates


def test_learning_rates_of_one_cycle():
    schedule = LambdaWarmUpCosineScheduler(10, lr_min=0.1, lr_max=1.0, lr_start=0.2, max_decay_steps=110)
    assert [schedule(0), schedule(5), schedule(10)] == pytest.approx([0.2, 0.6, 1.0])
    assert [schedule(60), schedule(110), schedule(500)] == pytest.approx([0.55, 0.1, 0.1])
    assert schedule.schedule(35) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))


def test_learning_rates_of_several_cycles():
    cycles = dict(
        warm_up_steps=[10, 0], f_min=[0.0, 0.2], f_max=[1.0, 0.5], f_start=[0.5, 0.0], cycle_lengths=[50, 100]
    )
    cosine, linear = LambdaWarmUpCosineScheduler2(**cycles), LambdaLinearScheduler(**cycles)
    assert [cosine(0), cosine(10), cosine(30), cosine(50)] == pytest.approx([0.5, 1.0, 0.5, 0.0])
    assert [cosine(100), cosine(150), cosine(999)] == pytest.approx([0.35, 0.2, 0.2])
    # f_min + (f_max - f_min) (length - n) / length
    assert [linear(5), linear(30), linear(50), linear(100), linear(150)] == pytest.approx(
        [0.75, 0.4, 0.0, 0.35, 0.2]
    )
    released = LambdaLinearScheduler([10000], [1.0], [1.0], [1e-6], [10000000000000])
    assert [released(0), released(5000), released(10**6)] == pytest.approx([1e-6, 0.5, 1.0], abs=1e-4)


def test_wrong_learning_rate_schedules_are_named():
    with pytest.raises(UserValueError, match="one length"):
        LambdaLinearScheduler([10], [1.0], [1.0, 2.0], [0.0], [100])
    with pytest.raises(UserValueError, match="must end before"):
        LambdaWarmUpCosineScheduler(10, 0, 1, 0, max_decay_steps=10)
    target = {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": {"warm_up_steps": [1]}}
    with pytest.raises(UserValueError, match="missing"):
        instantiate_from_config(target)


@th.no_grad()
def test_stable_diffusion_2_without_the_block_that_it_does_not_read(clip, tmp_path, monkeypatch):
    """diffusers leaves the last block of the text encoder out: its last state is the whole one's penultimate."""
    transformers = pytest.importorskip("transformers")
    whole = transformers.CLIPTextModel.from_pretrained(clip)
    config = transformers.CLIPTextConfig.from_pretrained(clip, num_hidden_layers=2)
    cut = transformers.CLIPTextModel(config)
    cut.load_state_dict({k: v for k, v in whole.state_dict().items() if ".layers.2." not in k})
    cut.save_pretrained(tmp_path)
    transformers.CLIPTokenizer.from_pretrained(clip).save_pretrained(tmp_path)
    monkeypatch.setattr(FrozenOpenCLIPEmbedder, "BLOCKS", {"ViT-H-14": 3})
    by_whole, by_cut = (
        FrozenOpenCLIPEmbedder(version=str(folder), max_length=8, layer="penultimate")
        for folder in (clip, tmp_path)
    )
    agree(by_cut(["a cat"]), by_whole(["a cat"]), rtol=1e-5)
    # The cut one's weights fill the whole encoder: the block that is not read stays.
    filled = by_whole.adapt_weights(by_cut.state_dict())
    assert filled.keys() == by_whole.state_dict().keys()
    # What reads the last state has to have it.
    last = FrozenOpenCLIPEmbedder(version=str(clip), max_length=8, layer="last")
    assert last.adapt_weights(by_cut.state_dict()).keys() == by_cut.state_dict().keys()


@th.no_grad()
def test_checkpoints_with_the_names_of_transformers_still_load(clip):
    """Those that were written before the encoder had OpenCLIP's names."""
    transformers = pytest.importorskip("transformers")
    embedder = FrozenOpenCLIPEmbedder(version=str(clip), max_length=8)
    expected = embedder(["a cat"])
    whole = transformers.CLIPTextModel.from_pretrained(clip).state_dict()
    former = {f"transformer.text_model.{k.removeprefix('text_model.')}": v for k, v in whole.items()}
    for parameter in embedder.parameters():
        parameter.zero_()
    embedder.load_state_dict(embedder.adapt_weights(former))
    agree(embedder(["a cat"]), expected, rtol=1e-6)
    agree(
        expected,
        transformers.CLIPTextModel.from_pretrained(clip)(embedder.tokens("a cat")).last_hidden_state,
        rtol=1e-5,
    )
