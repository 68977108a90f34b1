"""The first stages: interfaces, checkpoints, mistakes."""

import logging

import pytest
import torch as th
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import save_file

from guided_diffusion.errors import UserError, UserFileError, UserValueError
from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel, VQModelInterface
from ldm.modules.diffusionmodules.model import AttnBlock, Decoder, Encoder, ResnetBlock, make_attn
from tests.compare import agree

DDCONFIG = dict(
    double_z=True,
    z_channels=4,
    resolution=16,
    in_channels=3,
    out_ch=3,
    ch=32,
    ch_mult=[1, 1],
    num_res_blocks=1,
    attn_resolutions=[],
    dropout=0.0,
)
NO_LOSS = {"target": "torch.nn.Identity"}


def kl(**options):
    th.manual_seed(0)
    return AutoencoderKL(DDCONFIG, NO_LOSS, embed_dim=2, **options).eval()


@pytest.fixture
def vq():
    """vq(cls, **options): a small VQ model."""

    def make(cls=VQModel, **options):
        th.manual_seed(0)
        config = {**DDCONFIG, "double_z": False}
        return cls(ddconfig=config, lossconfig=NO_LOSS, n_embed=5, embed_dim=2, **options).eval()

    return make


@pytest.fixture
def images():
    th.manual_seed(1)
    return th.rand(2, 3, 16, 16) * 2 - 1


# ------------------------------------------------------------------------------------------------------
# interfaces


def test_kl_gives_a_posterior_and_a_reconstruction(images):
    model = kl()
    reconstruction, posterior = model(images, sample_posterior=False)
    assert posterior.mean.shape == (2, 2, 8, 8) and reconstruction.shape == images.shape
    assert th.equal(reconstruction, model.decode(posterior.mode()))
    th.manual_seed(2)
    drawn = model(images)[0]
    th.manual_seed(2)
    assert th.equal(drawn, model.decode(posterior.sample()))
    assert not th.equal(drawn, reconstruction)


def test_any_size_that_the_factor_divides():
    assert kl().encode(th.zeros(1, 3, 24, 10)).mean.shape == (1, 2, 12, 5)


def test_vq_rounds_to_its_codebook(vq, images):
    model = vq()
    quant, loss, (_, _, indices) = model.encode(images)
    before = model.encode_to_prequant(images)
    codebook = model.quantize.embedding.weight
    nearest = th.cdist(before.permute(0, 2, 3, 1).reshape(-1, 2), codebook).argmin(dim=1)
    assert th.equal(indices, nearest) and loss.ndim == 0
    assert th.allclose(quant.permute(0, 2, 3, 1).reshape(-1, 2), codebook[nearest], atol=1e-6)
    out, same_loss, same_indices = model(images, return_pred_indices=True)
    assert th.equal(same_indices, indices) and same_loss == loss and len(model(images)) == 2
    agree(model.decode_code(indices.reshape(2, 8, 8)), out)
    assert vq(sane_index_shape=True).encode(images)[2][2].shape == (2, 8, 8)


def test_vq_interface_rounds_when_it_decodes(vq, images):
    plain, first_stage = vq(), vq(VQModelInterface)
    latent = first_stage.encode(images)
    assert th.equal(latent, plain.encode_to_prequant(images))
    assert th.equal(first_stage.decode(latent), plain(images)[0])
    assert th.equal(first_stage.decode(latent, force_not_quantize=True), plain.decode(latent))
    assert list(first_stage.state_dict()) == list(plain.state_dict())


def test_vq_keeps_a_moving_average(vq):
    model = vq(use_ema=True)
    assert "model_ema.decoderconv_outweight" in model.state_dict()
    weight = model.decoder.conv_out.weight
    before = weight.detach().clone()
    with th.no_grad():
        weight.add_(1)
    model.after_update()  # decay 2/11 after the first update
    with model.ema_scope():
        assert th.allclose(weight, before + 9 / 11, atol=1e-6)
    assert th.allclose(weight, before + 1)


def test_vq_training_images_vary_in_size(vq, monkeypatch):
    model = vq(batch_resize_range=(16, 48))
    batch = {"image": th.zeros(1, 16, 16, 3)}
    assert model.get_input(batch, "image").shape == (1, 3, 48, 48)  # the largest first
    monkeypatch.setattr(VQModel, "global_step", 5)
    sizes = {model.get_input(batch, "image").shape[-1] for _ in range(60)}
    assert sizes == {16, 32, 48}


def test_identity_first_stage():
    x = th.randn(1, 3, 4, 4)
    plain, vq_like = IdentityFirstStage(embed_dim=3), IdentityFirstStage(vq_interface=True)
    assert plain.encode(x) is plain.decode(x) is plain.quantize(x) is plain(x) is x
    assert vq_like.quantize(x)[0] is x and len(vq_like.quantize(x)[2]) == 3


def test_images_of_a_batch():
    model = kl()
    x = model.get_input({"image": th.arange(12, dtype=th.uint8).reshape(1, 2, 2, 3)}, "image")
    assert x.shape == (1, 3, 2, 2) and x.dtype == th.float32
    assert x[0, :, 0, 1].tolist() == [3, 4, 5]
    assert model.get_input({"depth": th.zeros(1, 2, 5)}, "depth").shape == (1, 1, 2, 5)
    with pytest.raises(UserValueError, match="'image'.*'jpg'"):
        model.get_input({"jpg": x}, "image")


def test_maps_are_shown_in_colours():
    model = kl(colorize_nlabels=5, monitor="val/rec_loss")
    assert model.state_dict()["colorize"].shape == (3, 5, 1, 1) and model.monitor == "val/rec_loss"
    shown = model.to_rgb(th.rand(2, 5, 4, 4))
    assert shown.shape == (2, 3, 4, 4)
    assert (shown.min(), shown.max()) == (-1, 1)


def test_the_last_layer_moves_the_image(images):
    model = kl()
    model(images)[0].sum().backward()
    assert model.get_last_layer() is model.decoder.conv_out.weight
    assert model.get_last_layer().grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------------------------
# layers


def test_attention_agrees_with_its_formula():
    layer = AttnBlock(32)
    x = th.randn(2, 32, 3, 4)
    h = layer.norm(x)
    q, k, v = (conv(h).flatten(2) for conv in (layer.q, layer.k, layer.v))
    weights = th.einsum("bci,bcj->bij", q, k).div(32**0.5).softmax(dim=-1)
    mixed = th.einsum("bij,bcj->bci", weights, v).reshape(x.shape)
    assert th.allclose(layer(x), x + layer.proj_out(mixed), atol=1e-5)


@pytest.mark.parametrize("attn_type, keys", [("linear", 3), ("none", 0)])
def test_other_kinds_of_attention(attn_type, keys):
    encoder = Encoder(**{**DDCONFIG, "attn_resolutions": [8], "attn_type": attn_type})
    assert len([k for k in encoder.state_dict() if k.startswith("mid.attn_1.")]) == keys
    assert encoder(th.zeros(1, 3, 16, 16)).shape == (1, 8, 8, 8)
    with pytest.raises(UserValueError, match="'exact'.*vanilla"):
        make_attn(32, "exact")


def test_a_residual_block_is_steered_by_an_embedding():
    block = ResnetBlock(in_channels=32, out_channels=64, conv_shortcut=True, dropout=0.0, temb_channels=8)
    assert block.conv_shortcut.weight.shape == (64, 32, 3, 3)
    x, temb = th.randn(2, 32, 4, 4), th.randn(2, 8)
    assert block(x, temb).shape == (2, 64, 4, 4)
    assert not th.allclose(block(x, temb), block(x, -temb))


def test_resizing_without_convolution():
    config = {**DDCONFIG, "resamp_with_conv": False}
    encoder, decoder = Encoder(**config), Decoder(**config)
    assert not any("sample" in name for name in (*encoder.state_dict(), *decoder.state_dict()))
    assert decoder(encoder(th.zeros(1, 3, 16, 16))[:, :4]).shape == (1, 3, 16, 16)


def test_what_the_decoder_ends_with():
    z = 50 * th.randn(1, 4, 8, 8)
    bounded, features = Decoder(**DDCONFIG, tanh_out=True), Decoder(**DDCONFIG, give_pre_end=True)
    features.load_state_dict(bounded.state_dict())
    assert features(z).shape == (1, 32, 16, 16)
    expected = bounded.conv_out(th.nn.functional.silu(bounded.norm_out(features(z)))).tanh()
    assert th.allclose(bounded(z), expected, atol=1e-6)


# ----------------------------------------------------------------------------------------------------
# checkpoints


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_weights_come_back(tmp_path, suffix, images, caplog):
    """As the released files have them: Lightning's other content, and the loss's weights, do no harm."""
    trained, path = kl(), tmp_path / f"model.{suffix}"
    with th.no_grad():
        trained.encoder.conv_in.weight.add_(1)
    state = {**trained.state_dict(), "loss.discriminator.main.0.weight": th.zeros(1)}
    if suffix == "ckpt":
        callbacks = {ModelCheckpoint: {"best_model_score": th.tensor(0.1), "best_model_path": "a.ckpt"}}
        th.save({"state_dict": state, "global_step": 7, "callbacks": callbacks}, path)
    else:
        save_file(state, path)
    with caplog.at_level(logging.WARNING):
        loaded = kl(ckpt_path=path)
    assert "1 tensors are not used (first: loss.discriminator.main.0.weight)" in caplog.text
    assert th.equal(loaded(images, sample_posterior=False)[0], trained(images, sample_posterior=False)[0])


def test_ignored_keys_keep_their_values(tmp_path):
    trained, path = kl(), tmp_path / "model.ckpt"
    with th.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    state = {name: value for name, value in trained.state_dict().items() if name != "encoder.conv_in.bias"}
    th.save({"state_dict": state}, path)
    loaded, fresh = kl(ckpt_path=path, ignore_keys=["encoder."]), kl()
    assert th.equal(loaded.encoder.conv_in.weight, fresh.encoder.conv_in.weight)
    assert th.equal(loaded.decoder.conv_in.weight, trained.decoder.conv_in.weight)


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file ran')",))


def test_wrong_checkpoints_are_named(tmp_path):
    path = tmp_path / "model.ckpt"
    with pytest.raises(UserFileError, match="checkpoint not found: .*nothing.ckpt"):
        kl(ckpt_path=tmp_path / "nothing.ckpt")

    def refused(content, said, name="model.ckpt"):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            th.save(content, tmp_path / name)
        with pytest.raises(UserError, match=said) as caught:
            kl(ckpt_path=tmp_path / name)
        assert "\n" not in str(caught.value)

    state = kl().state_dict()
    refused({"state_dict": state, "code": Malicious()}, "could run code")
    refused(path.read_bytes()[:2000], "damaged .it is truncated")
    refused(b"", "not a checkpoint that torch can read")
    refused(b"not a checkpoint", "model.ckpt")
    refused(b"not a checkpoint", "not a whole safetensors", name="model.safetensors")
    refused([state], "holds no weights")
    refused({"state_dict": {"name": "text"}}, "holds no weights")
    refused(
        {name: v for name, v in state.items() if "conv_in" not in name},
        "4 of .* missing .first: encoder.conv_in",
    )
    refused({**state, "quant_conv.bias": th.zeros(6)}, r"quant_conv.bias: \(6,\) in the file, \(4,\) in")


# --------------------------------------------------------------------------------------------------------
# mistakes


def test_wrong_configurations_and_sizes_are_named(vq):
    with pytest.raises(UserValueError, match="double_z"):
        AutoencoderKL({**DDCONFIG, "double_z": False}, NO_LOSS, embed_dim=2)
    with pytest.raises(UserValueError, match="48 channels.*multiple of 32"):
        AutoencoderKL({**DDCONFIG, "ch": 48}, NO_LOSS, embed_dim=2)
    for shape in ((1, 4, 16, 16), (1, 3, 16, 15), (3, 16, 16)):
        with pytest.raises(UserValueError, match=r"\[B, 3, H, W\].*multiples of 2"):
            kl().encode(th.zeros(shape))
    with pytest.raises(UserValueError, match=r"\[B, 4, h, w\]"):
        kl().decoder(th.zeros(1, 3, 8, 8))
