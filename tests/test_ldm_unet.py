"""Latent diffusion's U-Net and its layers, beyond the recorded references."""

import pytest
import torch as th
import torch.nn.functional as F

from guided_diffusion import unet as adm
from guided_diffusion.errors import UserValueError
from guided_diffusion.mt.modalities import parse_modalities
from guided_diffusion.mt.modality_set import ModalitySet
from ldm.modules.attention import BasicTransformerBlock, CrossAttention, FeedForward, LinearAttention
from ldm.modules.diffusionmodules.openaimodel import SpatialTransformer, UNetModel
from tests.compare import agree

SMALL = dict(
    image_size=8,
    in_channels=4,
    model_channels=32,
    out_channels=4,
    num_res_blocks=1,
    attention_resolutions=[1, 2],
    channel_mult=[1, 2],
)
TEXT = dict(num_heads=2, use_spatial_transformer=True, context_dim=6)


def unet(**options):
    """A tiny network with every weight away from its initial zeros."""
    th.manual_seed(0)
    model = UNetModel(**SMALL, **options)
    with th.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * th.randn(parameter.shape))
    return model.eval()


@pytest.fixture(scope="module")
def inputs():
    th.manual_seed(1)
    return th.randn(2, 4, 8, 8), th.tensor([0, 999])


def test_it_is_the_projects_one_network(inputs):
    """Without transformers, state dict and output are guided_diffusion's, bit for bit."""
    ours = unet(num_heads=2, num_classes=3)
    theirs = adm.UNetModel(**SMALL, num_heads=2, num_classes=3).eval()
    theirs.load_state_dict(ours.state_dict())
    y = th.tensor([0, 2])
    assert isinstance(ours, adm.UNetModel)
    assert th.equal(ours(*inputs, y=y), theirs(*inputs, y=y))


def test_context_and_label_both_steer(inputs):
    model = unet(**TEXT, num_classes=3)
    first, second = th.randn(2, 5, 6), th.randn(2, 5, 6)
    y = th.tensor([0, 2])
    out = model(*inputs, first, y)
    assert out.shape == (2, 4, 8, 8)
    assert not th.allclose(out, model(*inputs, second, y), atol=1e-4)
    assert not th.allclose(out, model(*inputs, first, y - y), atol=1e-4)
    # The context is a set: its order does not matter.
    agree(out, model(*inputs, context=first.flip(1), y=y))


def test_modalities_have_heads_beside_the_context(inputs):
    heads = ModalitySet(parse_modalities("masked,label", (4, 8, 8), 3), 4).make_heads(64, 32)
    joint, single = unet(**TEXT, heads=heads), unet(**TEXT)
    joint.load_state_dict(single.state_dict(), strict=False)
    context = th.randn(2, 5, 6)
    out, predictions = joint(*inputs, context)
    assert th.equal(out, single(*inputs, context))
    assert {name: tuple(p.shape) for name, p in predictions.items()} == {
        "masked": (2, 4, 8, 8),
        "label": (2, 3),
    }


def test_checkpointing_changes_no_gradient(inputs):
    x, t = inputs
    context = th.randn(2, 5, 6)
    gradients = []
    for flag in (False, True):
        model = unet(**TEXT, use_checkpoint=flag)
        model(x, t, context).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    floor = 1e-6 * max(float(a.abs().max()) for a in gradients[0])
    for a, b in zip(*gradients, strict=True):
        agree(a, b, floor=floor)


def test_codebook_logits(inputs):
    model = unet(num_heads=2, n_embed=7)
    assert model.predict_codebook_ids and not unet(num_heads=2).predict_codebook_ids
    assert model(*inputs).shape == (2, 7, 8, 8)
    assert {"out.2.weight", "id_predictor.1.weight"} <= set(model.state_dict())


def heads(model):
    """The number of heads of every attention layer, in order."""
    found = []
    for module in model.modules():
        if isinstance(module, adm.AttentionBlock):
            found.append(module.num_heads)
        if isinstance(module, SpatialTransformer):
            found.append(module.transformer_blocks[0].attn2.heads)
    return found


@pytest.mark.parametrize(
    "options, expected",
    [
        # Encoder 32 and 64 channels, middle 64, decoder 64, 64, 32, 32.
        (dict(num_heads=2), [2] * 7),
        (dict(num_heads=2, num_heads_upsample=4), [2, 2, 2, 4, 4, 4, 4]),
        (dict(num_heads=2, num_heads_upsample=4, legacy=False), [2] * 7),
        (dict(num_head_channels=16), [2, 4, 4, 4, 4, 2, 2]),
        (dict(num_head_channels=16, legacy=False), [2, 4, 4, 4, 4, 2, 2]),
        (TEXT, [2] * 7),
        (dict(TEXT, num_heads=-1, num_head_channels=8), [4, 8, 8, 8, 8, 4, 4]),
        (dict(TEXT, num_heads_upsample=4), [2] * 7),
    ],
)
def test_head_counts(options, expected):
    with th.device("meta"):
        assert heads(UNetModel(**SMALL, **options)) == expected


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "num_heads or num_head_channels"),
        (dict(num_heads=2, use_spatial_transformer=True), "context_dim"),
        (dict(num_heads=2, context_dim=6), "use_spatial_transformer"),
        (dict(TEXT, num_heads=-1, num_head_channels=128), "32 channels cannot be split"),
        (dict(num_head_channels=128, legacy=False), "32 channels cannot be split"),
    ],
)
def test_contradicting_options_are_named(options, said):
    with th.device("meta"), pytest.raises(UserValueError, match=said):
        UNetModel(**SMALL, **options)


@pytest.mark.parametrize("context", [None, th.zeros(2, 5, 7), th.zeros(2, 6)])
def test_a_wrong_context_is_named(inputs, context):
    with pytest.raises(UserValueError, match=r"\[B, S, 6\]"):
        unet(**TEXT)(*inputs, context)


def test_a_context_that_nothing_reads_is_refused(inputs):
    with pytest.raises(UserValueError, match="takes no context"):
        unet(num_heads=2)(*inputs, th.zeros(2, 5, 6))


def test_half_precision(inputs):
    """use_fp16 of upstream's configurations leaves the network usable; autocast decides."""
    model, context = unet(**TEXT, use_fp16=True), th.randn(2, 5, 6)
    exact = model(*inputs, context)
    with th.autocast("cpu", dtype=th.bfloat16):
        rounded = model(*inputs, context)
    assert exact.dtype == th.float32
    assert th.allclose(rounded.float(), exact, atol=0.05 * exact.abs().max().item())
    with pytest.raises(UserValueError, match="autocast"):
        model.convert_to_fp16()


# ---------------------------------------------------------------------------------------------------------
# layers


def test_cross_attention_agrees_with_its_formula():
    """softmax(q k / sqrt(d)) v by hand, head by head; a mask hides part of the context."""
    th.manual_seed(0)
    layer = CrossAttention(8, 6, heads=2, dim_head=3).eval()
    x, context = th.randn(2, 4, 8), th.randn(2, 5, 6)
    mask = th.tensor([[True] * 5, [True, False, True, False, False]])
    for keep in (None, mask):
        parts = []
        for head in range(2):
            rows = slice(3 * head, 3 * head + 3)
            q, k, v = (
                F.linear(tokens, to.weight[rows])
                for tokens, to in ((x, layer.to_q), (context, layer.to_k), (context, layer.to_v))
            )
            scores = q @ k.transpose(1, 2) / 3**0.5
            if keep is not None:
                scores = scores.masked_fill(~keep[:, None], -th.inf)
            parts.append(scores.softmax(-1) @ v)
        assert th.allclose(layer(x, context, keep), layer.to_out(th.cat(parts, -1)), atol=1e-5)


def test_without_a_context_a_block_attends_to_itself():
    block = BasicTransformerBlock(8, 2, 4, checkpoint=False).eval()
    x = th.randn(1, 5, 8)
    y = x + block.attn1(block.norm1(x))
    y = y + block.attn2(block.norm2(y))
    agree(block(x), y + block.ff(block.norm3(y)), rtol=1e-5)


def test_self_attention_can_be_disabled():
    """Then the positions do not see each other: each one's output depends on itself and the context."""
    block = BasicTransformerBlock(8, 2, 4, context_dim=6, disable_self_attn=True).eval()
    x, context = th.randn(1, 5, 8), th.randn(1, 3, 6)
    agree(block(x, context)[:, :1], block(x[:, :1], context), rtol=1e-5)


def test_feed_forward():
    x = th.randn(3, 8)
    plain, gated = FeedForward(8, dim_out=5, mult=2), FeedForward(8, glu=True)
    first, _, last = plain.net
    assert plain(x).shape == (3, 5)
    agree(plain(x), last(F.gelu(first[0](x))), rtol=1e-5)
    proj, _, last = gated.net
    value, gate = proj.proj(x).split(32, dim=-1)
    agree(gated(x), last(value * F.gelu(gate)), rtol=1e-5)


def test_linear_attention_agrees_with_its_formula():
    layer = LinearAttention(8, heads=2, dim_head=3)
    x = th.randn(2, 8, 4, 5)
    q, k, v = layer.to_qkv(x).flatten(2).chunk(3, dim=1)
    mixed = []
    for rows in (slice(0, 3), slice(3, 6)):
        weights = k[:, rows].softmax(dim=-1)
        summary = th.einsum("bct,bdt->bcd", weights, v[:, rows])
        mixed.append(th.einsum("bcd,bct->bdt", summary, q[:, rows]))
    expected = layer.to_out(th.cat(mixed, dim=1).reshape(2, 6, 4, 5))
    agree(layer(x), expected, rtol=1e-5)


@pytest.mark.parametrize("use_linear", [False, True])
def test_a_new_transformer_is_the_identity(use_linear):
    layer = SpatialTransformer(32, 2, 8, context_dim=6, use_linear=use_linear)
    x = th.randn(2, 32, 4, 5)
    assert th.equal(layer(x, th.randn(2, 3, 6)), x)
