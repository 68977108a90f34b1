"""Encoding, feeding and reading several modalities; equation 6; the bound; conditioning by Bayes."""

import math
from dataclasses import replace

import pytest
import torch as th

from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import ModelVarType
from guided_diffusion.mt.bound import multitask_bound, prior_bpd
from guided_diffusion.mt.denoiser import JointDenoiser, predict_modalities
from guided_diffusion.mt.losses import multitask_losses
from guided_diffusion.mt.modalities import (
    ImageModality,
    RandomPatches,
    VectorModality,
    one_hot,
    parse_modalities,
)
from guided_diffusion.mt.modality_set import Batch, ModalitySet, derive_values, peaks, with_peaks
from guided_diffusion.mt.model import JointModel, mt_defaults
from guided_diffusion.mt.training import code_interval
from guided_diffusion.seeding import PerSample
from guided_diffusion.unet import UNetModel
from tests.compare import agree
from tests.oracle import GaussianPair, LabelledMixture, process

SHAPE = (1, 8, 8)


def small_model(spec="masked:U,label:U", fresh=False, classes=3, **options):
    """(modalities, network) of a tiny U-Net whose every weight matters, unless fresh."""
    th.manual_seed(0)
    diffusion = process()
    parsed = with_peaks(parse_modalities(spec, SHAPE, classes), "bump", diffusion.betas, SHAPE)
    labelled = "label" in str(spec)
    diffusion = process(peaks=peaks(parsed))
    modalities = ModalitySet(parsed, 1, diffusion, num_classes=classes if labelled else None, **options)
    network = UNetModel(
        8,
        modalities.input_channels,
        32,
        1,
        1,
        (),
        channel_mult=(1, 2),
        num_classes=modalities.num_classes,
        heads=modalities.make_heads(64, 32),
        presence=modalities.make_presence(128),
    )
    if not fresh:
        with th.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * th.randn(parameter.shape))
    return modalities, network.eval()


class Recorder(th.nn.Module):
    """Remembers what it is shown, and predicts constants."""

    def __init__(self, **predictions):
        super().__init__()
        self.anchor = th.nn.Parameter(th.zeros(()))
        self.predictions, self.seen = predictions, []

    def forward(self, x, t, y=None):
        self.seen.append((x.detach().clone(), y))
        predictions = {k: v.expand(len(x), *v.shape[1:]) for k, v in self.predictions.items()}
        return x[:, :1] * 0.0 + self.anchor, predictions


# Encoders


def test_class_codes():
    """Centred over the classes, each of unit RMS; of the network as it is at z = 0, t = 0; without gradient, and left in its mode."""
    modalities, network = small_model()
    network.train()
    codes = modalities.constant_codes(network, th.zeros(2, *SHAPE))["label"]
    assert network.training and codes.shape == (3, *SHAPE) and not codes.requires_grad
    th.testing.assert_close(codes.square().mean((1, 2, 3)), th.ones(3))
    network.eval()
    raw, _ = network(th.zeros(3, *SHAPE), th.zeros(3), y=th.eye(3))
    centred = raw - raw.mean(0)
    th.testing.assert_close(
        codes, centred / centred.square().mean((1, 2, 3), keepdim=True).sqrt(), rtol=1e-3, atol=1e-3
    )


def test_class_codes_relative_to_the_null_input():
    """The encoding of no class is subtracted instead; then classes can be encoded a few at a time."""
    modalities, network = small_model({"label": {"centre": "null"}})
    like = th.zeros(2, *SHAPE)
    codes = modalities.constant_codes(network, like)["label"]
    raw, _ = network(th.zeros(4, *SHAPE), th.zeros(4), y=th.cat([th.eye(3), th.zeros(1, 3)]))
    centred = raw[:3] - raw[3:]
    th.testing.assert_close(
        codes, centred / centred.square().mean((1, 2, 3), keepdim=True).sqrt(), rtol=1e-3, atol=1e-3
    )
    values = th.tensor([[0.0, 0.2, 0.8], [0.0, 0.0, 0.0]])
    encoded = modalities.encode(network, Batch({"label": values}), like)["label"]
    agree(encoded[0], 0.2 * codes[1] + 0.8 * codes[2], rtol=1e-3)
    assert encoded[1].abs().max() == 0


def test_codes_of_a_fresh_network_are_zero():
    modalities, network = small_model(fresh=True)
    assert modalities.constant_codes(network, th.zeros(1, *SHAPE))["label"].abs().max() == 0


def test_encode():
    """Identity, mixtures of class codes, and callables; zeros where a value is missing; never a gradient."""
    modalities, network = small_model()
    image, label = th.randn(2, *SHAPE).requires_grad_(), th.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]])
    batch = Batch({"masked": image, "label": label}, {"masked": th.tensor([True, False])})
    codes = modalities.constant_codes(network, image)["label"]
    encodings = modalities.encode(network, batch, image)
    assert th.equal(encodings["masked"][0], image[0]) and encodings["masked"][1].abs().max() == 0
    th.testing.assert_close(encodings["label"][0], (codes[0] + codes[2]) / 2)
    th.testing.assert_close(encodings["label"][1], codes[1])
    assert not any(e.requires_grad for e in encodings.values())
    again = modalities.encode(network, batch, image, {"label": 2 * codes})
    th.testing.assert_close(again["label"], 2 * encodings["label"])


def test_an_encoder_must_reach_the_latent():
    clip = VectorModality("clip", (5,), encoder=lambda v: v, head="middle")
    with pytest.raises(
        UserError, match=r"modality clip: its encoding has shape \(2, 5\), the latent \(2, 1, 8, 8\)"
    ):
        ModalitySet([clip], 1).encode(None, Batch({"clip": th.zeros(2, 5)}), th.zeros(2, *SHAPE))


class Counting(th.nn.Module):
    """A network that counts the samples it is evaluated on."""

    def __init__(self, network):
        super().__init__()
        self.network, self.samples = network, 0

    def forward(self, x, *args, **kwargs):
        self.samples += len(x)
        return self.network(x, *args, **kwargs)


def test_codes_stand_still_until_they_are_refreshed():
    """They are buffers of the network, so checkpoints keep them; other weights leave them as they are."""
    modalities, network = small_model("label:U")
    like = th.zeros(2, *SHAPE)
    fresh = modalities.constant_codes(network, like)["label"]
    network.codes = modalities.make_codes(SHAPE)
    assert modalities.constant_codes(network, like)["label"].abs().max() == 0  # not known yet
    modalities.refresh_codes(network, like)
    assert th.equal(network.state_dict()["codes.label"], fresh)
    with th.no_grad():
        network.label_emb.weight.mul_(-3)
    assert th.equal(modalities.constant_codes(network, like)["label"], fresh)
    value = one_hot(th.tensor([1, 2]), 3)
    th.testing.assert_close(modalities.encode(network, Batch({"label": value}), like)["label"], fresh[1:])


def test_cost_of_a_thousand_labels():
    """At 1,000 classes and batch 10 encoding costs under 5 % of the step: three evaluations a sample, forward and
    backward. It is counted in evaluations of the U-Net over a period between two refreshes."""
    flags = dict(
        image_size=8, image_channels=1, num_channels=32, num_res_blocks=1, channel_mult="1", num_classes=1000,
        attention_resolutions="", modalities="label:U",
    )  # fmt: skip
    model = JointModel.from_flags({**mt_defaults(), **flags})
    interval = code_interval(model, 10)
    counting = Counting(model.network)
    counting.codes = model.network.codes
    model.modalities.refresh_codes(counting, th.zeros(1, *SHAPE))
    refresh, counting.samples = counting.samples, 0
    values = one_hot(th.arange(10), 1000)
    model.modalities.encode(counting, Batch({"label": values}), th.zeros(10, *SHAPE))
    assert refresh == 1000 and counting.samples == 0  # standing codes: a step evaluates nothing for them
    assert refresh / interval <= 0.05 * 3 * 10


def test_presence_tells_whose_shift_is_in_the_latent():
    """One vector per modality on the timestep embedding, zero at first; 1 where the shift is in, per sample."""
    modalities, network = small_model(presence=True, fresh=True)
    assert list(network.presence.state_dict()) == ["vectors.masked", "vectors.label"]
    batch = Batch({"masked": th.ones(2, *SHAPE), "label": th.eye(2, 3)}, {"label": th.tensor([True, False])})
    present = modalities.present_among(["masked", "label"], th.zeros(2, *SHAPE), batch)
    assert present.tolist() == [[1, 1], [1, 0]]
    z, t = th.randn(2, *SHAPE), th.tensor([5, 500])
    with th.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * th.randn(parameter.shape))
        nothing, _ = modalities.apply(network, z, t, {})
        told, _ = modalities.apply(network, z, t, {}, present=present)
        network.presence.vectors["label"].zero_()
        network.presence.vectors["masked"].zero_()
        th.testing.assert_close(modalities.apply(network, z, t, {}, present=present)[0], nothing)
    assert (told - nothing).abs().max() > 1e-4


def test_a_share_of_the_samples_is_not_shifted():
    """Its loss stays, its latent is that of the single task, and the network is told."""
    modalities, network = small_model("label:U", presence=True)
    images, t = th.rand(400, *SHAPE), th.full((400,), 400)
    batch = Batch({"label": one_hot(th.arange(400) % 3, 3)}, images=images)
    seen = {}

    def hook(module, args, kwargs):
        if "present" in kwargs:
            seen.update(z=args[0], present=kwargs["present"])

    network.register_forward_pre_hook(hook, with_kwargs=True)
    noise, random = th.randn(400, *SHAPE), PerSample.derived(0, range(400))
    losses, _ = multitask_losses(
        modalities, network, batch, t, noise=noise, random=random, unshifted_probability=0.25
    )
    plain = modalities.process.q_sample(images, t, noise)
    unshifted = seen["present"][:, 0] == 0
    assert unshifted.float().mean() == pytest.approx(0.25, abs=0.07) and losses["KL_label"].min() > 0
    assert th.equal(seen["z"][unshifted], plain[unshifted])
    assert (seen["z"] - plain)[~unshifted].abs().amax((1, 2, 3)).min() > 0.01


# Equation 6


def batch_for(images, present=None):
    label = one_hot(th.tensor([0, 2, 1, 1]), 3)
    return Batch({"masked": images.roll(1, -1), "label": label}, present or {})


def test_equation_6():
    """MSE(eps) + sum of lambda_i KL_i, at the z_t of equation 4."""
    modalities, network = small_model({"masked": {"loss_weight": 0.3}, "label": {"loss_weight": 2.0}})
    diffusion = modalities.process
    images, noise = th.rand(4, *SHAPE) * 2 - 1, th.randn(4, *SHAPE)
    t, batch = th.tensor([0, 100, 500, 999]), batch_for(images)
    terms = multitask_losses(modalities, network, replace(batch, images=images), t, noise=noise).terms
    # By hand
    abar = th.from_numpy(diffusion.alphas_cumprod)[t].float().reshape(4, 1, 1, 1)
    atil = th.from_numpy(diffusion.aggregation.coefficients)[:, t].float().reshape(2, 4, 1, 1, 1)
    e = modalities.encode(network, batch, images)
    z = abar.sqrt() * images + atil[0] * e["masked"] + atil[1] * e["label"] + (1 - abar).sqrt() * noise
    eps, predictions = network(z, t, y=th.zeros(4, 3))
    mse = (eps - noise).square().mean((1, 2, 3))
    kl_masked = (predictions["masked"] - batch.values["masked"]).square().mean((1, 2, 3))
    kl_label = -(predictions["label"].log_softmax(1) * batch.values["label"]).sum(1)
    for ours, expected in (
        (terms["mse"], mse),
        (terms["KL_masked"], kl_masked),
        (terms["KL_label"], kl_label),
        (terms["loss"], mse + 0.3 * kl_masked + 2 * kl_label),
    ):
        th.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_missing_values_concern_their_sample_alone():
    """No shift and no loss for that sample and modality; every other number stays."""
    modalities, network = small_model()
    images, noise, t = th.rand(4, *SHAPE) * 2 - 1, th.randn(4, *SHAPE), th.tensor([100, 200, 300, 400])
    whole = multitask_losses(
        modalities, network, replace(batch_for(images), images=images), t, noise=noise
    ).terms
    there = th.tensor([True, False, True, True])
    partly = multitask_losses(
        modalities, network, replace(batch_for(images, {"label": there}), images=images), t, noise=noise
    ).terms
    assert partly["KL_label"][1] == 0 and whole["KL_label"][1] > 0
    for key in whole:
        th.testing.assert_close(partly[key][there], whole[key][there])
    alone = Batch({"masked": images.roll(1, -1)})
    without = multitask_losses(modalities, network, replace(alone, images=images), t, noise=noise).terms
    for key in ("mse", "KL_masked", "loss"):
        th.testing.assert_close(partly[key][1], without[key][1])


def test_encodings_are_under_stop_gradient():
    """The class embedding reaches the loss through the encoder alone in variant U, hence gets no gradient."""
    modalities, network = small_model("label:U")
    images = th.rand(4, *SHAPE)
    batch = Batch({"label": one_hot(th.tensor([0, 1, 2, 0]), 3)})
    losses = multitask_losses(modalities, network, replace(batch, images=images), th.full((4,), 300)).terms
    losses["loss"].mean().backward()
    gradient = network.label_emb.weight.grad
    assert gradient is None or gradient.abs().max() == 0
    assert network.heads["label"][0].weight.grad.abs().max() > 0


def test_null_inputs_of_x_modalities():
    """In training an X value is replaced by zeros with its null probability, one draw per sample; its shift and loss stay."""
    twin = ImageModality("twin", SHAPE, as_input=True, null_probability=0.25)
    modalities = ModalitySet([twin], 1, process(peaks={"twin": 0.5}))
    network = Recorder(twin=th.zeros(1, *SHAPE))
    images = th.rand(2000, *SHAPE)
    batch = Batch({"twin": th.ones(2000, *SHAPE)})
    losses, _ = multitask_losses(
        modalities,
        network,
        replace(batch, images=images),
        th.zeros(2000, dtype=th.long),
        random=PerSample.derived(0, range(2000)),
    )
    shown = network.seen[-1][0][:, 1:].flatten(1)
    assert set(shown.mean(1).tolist()) == {0.0, 1.0}
    assert (shown[:, 0] == 0).float().mean() == pytest.approx(0.25, abs=0.03)
    assert (losses["KL_twin"] == 1).all()


def test_derived_values():
    """Masked copies are made from the images, unless the data bring them."""
    modalities = ModalitySet(parse_modalities("masked", SHAPE), 1)
    images = th.rand(3, *SHAPE) + 0.1
    made = derive_values(modalities, images, Batch({}), PerSample([1, 2, 3])).values["masked"]
    assert th.equal(made, RandomPatches(size=2)(images, PerSample([1, 2, 3])))
    own = derive_values(modalities, images, Batch({"masked": -images}), PerSample([1, 2, 3])).values["masked"]
    assert th.equal(own, -images)


# The network as samplers see it


def test_estimates_are_encoded_in_the_same_pass():
    """Order `posterior` encodes this pass's expectations; `paper` those of the step before, starting from the initial ones."""
    prediction, start = th.full((1, *SHAPE), 0.3), th.full((2, *SHAPE), 0.9)
    modalities = ModalitySet([ImageModality("twin", SHAPE)], 1)
    z, t = th.randn(2, *SHAPE), th.tensor([5, 5])
    network = Recorder(twin=prediction)
    assert th.equal(JointDenoiser(modalities, network)(z, t).encodings["twin"], prediction.expand(2, *SHAPE))
    literal = JointDenoiser(modalities, network, order="paper", initial={"twin": start})
    assert th.equal(literal(z, t).encodings["twin"], start)
    assert th.equal(literal(z, t).encodings["twin"], prediction.expand(2, *SHAPE))


def test_unknown_labels_enter_as_probabilities():
    """The expectation of the encoding, not that of the likeliest class; and no averaging over steps."""
    modalities, network = small_model("label")
    denoiser = JointDenoiser(modalities, network)
    for _ in range(2):
        out = denoiser(3 * th.randn(2, *SHAPE), th.tensor([400, 400]))
        codes = modalities.constant_codes(network, th.zeros(1, *SHAPE))["label"]
        expected = th.einsum("bk,kchw->bchw", out.predictions["label"].softmax(1), codes)
        th.testing.assert_close(out.encodings["label"], expected)
        th.testing.assert_close(out.values["label"], out.predictions["label"].softmax(1))


def test_given_x_values_are_shown_and_unknown_ones_are_not():
    """An unknown X modality keeps the null input at every step: predictions are never fed back."""
    modalities = ModalitySet(
        [ImageModality("twin", SHAPE, as_input=True), ImageModality("mask", SHAPE, as_input=True)], 1
    )
    network = Recorder(twin=th.ones(1, *SHAPE), mask=th.ones(1, *SHAPE))
    value = th.rand(2, *SHAPE)
    denoiser = JointDenoiser(modalities, network, {"mask": value})
    for _ in range(3):
        out = denoiser(th.randn(2, *SHAPE), th.tensor([5, 5]))
        shown = network.seen[-1][0]
        assert shown[:, 1].abs().max() == 0 and th.equal(shown[:, 2:], value)
        assert out.score is None  # the network's input needs no Bayes
        assert th.equal(out.encodings["mask"], value) and (out.encodings["twin"] == 1).all()


def test_given_values_are_encoded_once():
    """An encoding is computed only when its input changed."""
    calls = []

    def encode(value):
        calls.append(value)
        return value[:, :, None, None].expand(-1, -1, 8, 8)

    modalities = ModalitySet([VectorModality("clip", (1,), encoder=encode, head="middle")], 1)
    for given, expected in (({"clip": th.ones(2, 1)}, 1), (None, 3)):
        denoiser = JointDenoiser(modalities, Recorder(clip=th.zeros(1, 1)), given, strength=0.0)
        calls.clear()
        for _ in range(3):
            denoiser(th.randn(2, *SHAPE), th.tensor([5, 5]))
        assert len(calls) == expected


@pytest.mark.parametrize("strength", [1.0, 0.5, {"label": 3.0}])
def test_score_of_a_label(strength):
    """strength times grad_z log p(label | z_t) of the model's own head: here compared with finite differences."""
    network = LabelledMixture(process(peaks={"label": 0.5}))
    z, t = th.linspace(-1, 1, 9).reshape(-1, 1, 1, 1), th.full((9,), 300)
    given = {"label": one_hot(th.zeros(9, dtype=th.long), 2)}
    score = JointDenoiser(network.modalities(), network, given, strength)(z, t).score
    step = 1e-2
    up, down = (network(z + h, t)[1]["label"].log_softmax(1)[:, 0] for h in (step, -step))
    scale = strength if isinstance(strength, float) else 3.0
    th.testing.assert_close(score.flatten(), scale * (up - down) / (2 * step), rtol=2e-2, atol=2e-2)


def test_bayes_gives_the_conditional_noise():
    """eps - sqrt(1 - abar_t) score is E[eps | z_t, e], known in closed form for a Gaussian pair (given image, Gaussian head)."""
    diffusion = process(peaks={"e": 0.5})
    network = GaussianPair(diffusion)
    # A table of one entry per timestep: read without interpolation error.
    z, e = th.linspace(-1, 1, 7).reshape(-1, 1, 1, 1), 0.25
    given = {"e": th.full_like(z, e)}
    for step in (0, 30, 300, 900):
        t = th.full((7,), step)
        out = diffusion.p_mean_variance(
            JointDenoiser(network.modalities(), network, given), z, t, clip_denoised=False
        )
        a, s, b = (float(v[step]) for v in (network.signal, network.sigma, network.shift))
        mean, spread = network.x_given_e(e), network.spread_given_e
        y = z - b * e
        x_start = mean + a * spread**2 / (a**2 * spread**2 + s**2) * (y - a * mean)
        th.testing.assert_close(out["pred_xstart"], x_start.float(), rtol=2e-3, atol=2e-3)
        held = diffusion.p_mean_variance(
            JointDenoiser(network.modalities(), network, given, strength=0.0), z, t, clip_denoised=False
        )
        if step == 300:
            assert (held["pred_xstart"] - x_start).abs().max() > 0.05


def test_variance_is_interpolated_between_bins():
    """Bin b of B holds timesteps [b, b + 1) T / B; between their centres the logarithm is linear."""
    network = Recorder()
    network.heads = {"twin": th.nn.Module()}
    network.heads["twin"].register_buffer("variance", th.tensor([0.01, 1.0, 4.0, 4.0]))
    modalities = ModalitySet([ImageModality("twin", SHAPE)], 1, process(steps=400, total=400))
    read = modalities.variance(network, "twin", th.tensor([0, 50, 100, 150, 250, 399]))
    assert read.tolist() == pytest.approx([0.01, 0.01, 0.1, 1.0, 4.0, 4.0], rel=1e-4)
    rescaled = ModalitySet(
        [ImageModality("twin", SHAPE)], 1, process(steps=400, total=400, rescale_timesteps=True)
    )
    again = rescaled.variance(network, "twin", rescaled.timesteps(th.tensor([0, 50, 100, 150, 250, 399])))
    th.testing.assert_close(again, read)


def test_refusals():
    modalities, network = small_model()
    with pytest.raises(UserError, match="unknown order 'random': choose posterior or paper"):
        JointDenoiser(modalities, network, order="random")
    with pytest.raises(UserError, match="unknown modality 'depth'; this model has masked, label"):
        JointDenoiser(modalities, network, {"depth": th.zeros(1, *SHAPE)})
    with pytest.raises(UserError, match="unknown modality 'depth'; this model has none"):
        JointDenoiser(ModalitySet([], 1), network, {"depth": th.zeros(1, *SHAPE)})
    with pytest.raises(UserError, match=r"modality masked: expected values of shape \[B, 1, 8, 8\]"):
        JointDenoiser(modalities, network, {"masked": th.zeros(1, 3, 8, 8)})
    images = th.zeros(1, *SHAPE)
    with pytest.raises(UserError, match=r"time 1000 is outside 0\.\.999"):
        predict_modalities(modalities, network, images, times=(1000,))


def test_prediction_from_an_image():
    """p(label | image) of an exact network is the exact posterior; given values come back as they are."""
    diffusion = process(peaks={"label": 0.5})
    network = LabelledMixture(diffusion, means=(-0.2, 0.2), spread=0.3)
    x = th.linspace(-0.5, 0.5, 11).reshape(-1, 1, 1, 1)
    predicted = predict_modalities(
        network.modalities(), network, x, times=(0, 1), random=PerSample(range(11))
    )
    density = network.prior * (-((x.reshape(-1, 1) - network.means) ** 2) / (2 * 0.3**2)).exp()
    th.testing.assert_close(predicted["label"], density / density.sum(1, keepdim=True), rtol=0, atol=0.03)
    given = {"label": one_hot(th.zeros(11, dtype=th.long), 2)}
    assert predict_modalities(network.modalities(), network, x, given)["label"] is given["label"]


# The bound


def eight_bit(values):
    return ((values + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def pair_bound(kappa):
    """(bound, exact bits of x, of e given x) on 8-bit samples of a Gaussian pair, with its exact network."""
    diffusion = process(peaks={"e": kappa}, model_var_type=ModelVarType.LEARNED)
    network = GaussianPair(diffusion, learned=True)
    th.manual_seed(0)
    x = eight_bit(network.mean + network.spread * th.randn(8, *SHAPE))
    e = eight_bit(0.5 * x - 0.1 + 0.15 * th.randn(8, *SHAPE))
    random = PerSample.derived(1, range(8))
    bound = multitask_bound(
        diffusion, network.modalities(SHAPE), network, Batch({"e": e}, images=x), False, random
    )
    width = math.log(2 / 255)
    bits_x = -(th.distributions.Normal(network.mean, network.spread).log_prob(x) + width) / math.log(2)
    bits_e = -(th.distributions.Normal(0.5 * x - 0.1, 0.15).log_prob(e) + width) / math.log(2)
    return bound, bits_x.mean(), bits_e.mean()


def test_bound_is_tight_for_an_exact_network():
    """Without a shift: prior, transitions and decoder add up to -log p(x), and decoding e from z_0 costs -log p(e | x)."""
    bound, bits_x, bits_e = pair_bound(kappa=0.0)
    image = bound.L0 + bound.L1.sum(1) + bound.L3
    assert float(image.mean()) == pytest.approx(float(bits_x), abs=0.1)
    assert float(bound.L2["e"][:, 0].mean()) == pytest.approx(float(bits_e), abs=0.05)
    # From pure noise it costs as much as without the image.
    network = GaussianPair(process(peaks={"e": 0.0}))
    entropy = 0.5 * math.log2(2 * math.pi * math.e * float(network.heads["e"].variance[-1])) - math.log2(
        2 / 255
    )
    assert float(bound.L2["e"][:, -1].mean()) == pytest.approx(entropy, abs=0.1)


@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_bound_is_a_bound(kappa):
    """Finite in every term, and no less than the exact negative log likelihood, however e is decoded."""
    bound, bits_x, bits_e = pair_bound(kappa)
    assert bound.L1.shape == bound.L2["e"].shape == (8, 1000) and bound.L0.shape == bound.L3.shape == (8,)
    for term in (bound.L0, bound.L1, bound.L2["e"], bound.L3):
        assert term.isfinite().all()
    assert bound.L0.min() >= 0 and bound.L1.min() >= -1e-6 and (bound.L1[:, 0] == 0).all()
    image = (bound.L0 + bound.L1.sum(1) + bound.L3).mean()
    exact = float(bits_x + bits_e)
    assert float(bound.total.mean()) > exact - 0.02
    assert float((image + bound.L2["e"].mean(0)).min()) > exact - 0.02
    th.testing.assert_close(
        bound.total, bound.L0 + bound.L1.sum(1) + bound.L3 + bound.L2["e"].mean(1), rtol=1e-5, atol=1e-5
    )


def test_bound_of_a_worse_network_is_larger():
    diffusion = process(steps=50, peaks={"label": 0.5})
    bounds = []
    for bias in (0.0, 0.3):
        network = LabelledMixture(process(peaks={"label": 0.5}), bias=bias)
        x, k = network.sample(200, th.Generator().manual_seed(0))
        batch = Batch({"label": one_hot(k, 2)})
        x = eight_bit(x.reshape(-1, 1, 1, 1))
        random = PerSample.derived(0, range(200))
        bounds.append(
            multitask_bound(diffusion, network.modalities(), network, replace(batch, images=x), random=random)
        )
    good, bad = bounds
    assert bad.L2["label"].mean() > good.L2["label"].mean() and bad.L1.mean() > good.L1.mean()


def test_bound_of_missing_values():
    """A missing value costs nothing."""
    modalities, network = small_model()
    diffusion = process(steps=4, peaks=peaks(modalities))
    images = eight_bit(th.rand(4, *SHAPE) * 2 - 1)
    batch = batch_for(images, {"label": th.tensor([True, False, True, True])})
    bound = multitask_bound(diffusion, modalities, network, replace(batch, images=images))
    assert bound.L2["label"][1].abs().max() == 0 and bound.L2["label"][0].min() > 0
    assert set(bound.L2) == {"masked", "label"} and bound.total.shape == (4,)


def test_prior_counts_the_shift_that_is_left_at_the_end():
    """L0 is KL(N(sqrt(abar_T) x + atil_T e, 1 - abar_T) || N(0, 1)): large where the schedule does not return to zero."""
    diffusion = process(aggregation="constant", peaks={"e": 0.5})
    abar, atil = diffusion.alphas_cumprod[-1], diffusion.aggregation.coefficients[0, -1]
    x, e = th.full((1, *SHAPE), 0.3), th.full((1, *SHAPE), 0.8)
    mean, variance = math.sqrt(abar) * 0.3 + atil * 0.8, 1 - abar
    nats = 0.5 * (mean**2 + variance - 1 - math.log(variance))
    assert float(prior_bpd(diffusion, x, {"e": e})) == pytest.approx(nats / math.log(2), rel=1e-3)
    assert nats > 10 * float(diffusion._prior_bpd(x))


# Single-task steps, conditions, guidance


def test_a_condition_alone_is_adms_class_conditional_model():
    """Encoder and head `none`: the losses are training_losses with y, the samples' noise the network's with y, bit for bit."""
    spec = {"label": {"variant": "X", "encoder": "none", "head": "none", "null_probability": 0.0}}
    modalities, network = small_model(spec)
    assert network.heads is None
    labels = th.tensor([0, 2, 1, 1])
    images, noise = th.rand(4, *SHAPE) * 2 - 1, th.randn(4, *SHAPE)
    t, batch = th.tensor([0, 100, 500, 999]), Batch({"label": one_hot(labels, 3)})
    diffusion = process()
    ours = multitask_losses(
        modalities, network, replace(batch, images=images), t, noise=noise, random=PerSample(range(4))
    ).terms

    def adm(x, timesteps, y):
        output = network(x, timesteps, y=y)
        return output[0] if isinstance(output, tuple) else output

    theirs = diffusion.training_losses(adm, images, t, model_kwargs={"y": labels}, noise=noise)
    assert set(ours) == set(theirs) and all(th.equal(ours[key], theirs[key]) for key in theirs)
    out = JointDenoiser(modalities, network, batch.values)(images, t)
    assert th.equal(out.output, adm(images, t, labels)) and not out.encodings


def test_only_makes_the_other_samples_modalities_missing():
    images = th.rand(4, *SHAPE)
    where = th.tensor([True, False, True, False])
    kept = batch_for(images, {"label": th.tensor([True, True, False, False])}).only(where)
    assert kept.present["masked"].tolist() == [True, False, True, False]
    assert kept.present["label"].tolist() == [True, False, False, False]


def test_guidance_towards_a_given_u_modality():
    """free + s (given - free), where free is the noise of the image alone: without the given modality's shift."""
    modalities, network = small_model("label:U", single_task=True)
    z, t = th.randn(2, *SHAPE), th.tensor([400, 400])
    given = {"label": one_hot(th.tensor([0, 2]), 3)}
    shift = modalities.process.aggregation.shift(modalities.encode(network, Batch(given), z), t)
    assert shift.abs().max() > 0.1
    eps, _ = modalities.apply(network, z, t, {})
    free, _ = modalities.apply(network, z - shift, t, {})
    for scale in (0.0, 1.0, 3.0):
        out = JointDenoiser(modalities, network, given, strength=0.0, guidance=scale)(z, t)
        th.testing.assert_close(out.output, free + scale * (eps - free))
    modalities, network = small_model("label:U")
    with pytest.raises(UserError, match="trained with --single_task_probability"):
        JointDenoiser(modalities, network, given, guidance=2.0)


def test_guidance_towards_a_given_x_modality():
    """The same, where free is the noise at the null input."""
    modalities, network = small_model("label:X")
    z, t = th.randn(2, *SHAPE), th.tensor([400, 400])
    given = {"label": one_hot(th.tensor([0, 2]), 3)}
    eps, _ = modalities.apply(network, z, t, given)
    free, _ = modalities.apply(network, z, t, {})
    assert (eps - free).abs().max() > 1e-3
    for scale in (0.0, 1.0, 3.0):
        out = JointDenoiser(modalities, network, given, guidance=scale)(z, t)
        th.testing.assert_close(out.output, free + scale * (eps - free))


def test_absent_modalities_are_neither_estimated_nor_in_the_latent():
    modalities, network = small_model("masked:U,label:U")
    z, t = th.randn(2, *SHAPE), th.tensor([400, 400])
    denoiser = JointDenoiser(modalities, network, absent=["label"])
    out = denoiser(z, t)
    assert list(out.encodings) == ["masked"] and list(out.values) == ["masked"]
    for names, given in ((["depth"], None), (["label"], {"label": th.zeros(2, 3)})):
        with pytest.raises(UserError, match="cannot be left out"):
            JointDenoiser(modalities, network, given, absent=names)


def test_indices_undo_timesteps():
    for steps in (40, 1000, 4000):
        for rescaled in (False, True):
            modalities = ModalitySet([], 1, process(steps=steps, total=steps, rescale_timesteps=rescaled))
            t = th.arange(steps)
            assert th.equal(modalities.indices(modalities.timesteps(t)), t)
