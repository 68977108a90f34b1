"""Each sampler against the exact answer, conditioning, and restoration."""

import contextlib

import numpy as np
import pytest
import torch as th

from guided_diffusion.errors import UserError
from guided_diffusion.mt.denoiser import JointDenoiser
from guided_diffusion.mt.modalities import one_hot, parse_modalities
from guided_diffusion.mt.modality_set import ModalitySet, peaks, with_peaks
from guided_diffusion.mt.sampling import SAMPLERS, Known, joint_sample
from guided_diffusion.mt.solvers import few_timesteps, half_log_snr
from guided_diffusion.seeding import PerSample
from guided_diffusion.unet import UNetModel
from tests.oracle import GaussianPair, GaussianSeveral, LabelledMixture, T, process

SHAPE = (1, 8, 8)
PEAK = {"e": 0.5}
every = pytest.mark.parametrize("sampler", SAMPLERS)
deterministic = pytest.mark.parametrize(
    "sampler", [name for name in SAMPLERS if name not in ("ddpm", "dpm++sde")]
)


def run(sampler, diffusion, model, z, **options):
    """All step dicts of a sampler."""
    options = {"clip_denoised": False, **options}
    with th.no_grad():
        return list(SAMPLERS[sampler](diffusion, model, z, th.randn_like, **options))


# Against closed forms


@every
@pytest.mark.parametrize("given", [None, 0.3])
@pytest.mark.parametrize("betas", ["linear", "cosine"])
def test_samples_have_the_right_distribution(sampler, given, betas):
    """Image and modality of a Gaussian pair, jointly, and the image given the modality (by Bayes, strength 1)."""
    th.manual_seed(0)
    # Ancestral sampling with the small variance is too narrow by O(1 / steps).
    steps = 500 if sampler == "ddpm" else 200
    diffusion, network = process(betas, steps, peaks=PEAK), GaussianPair(process(betas, peaks=PEAK))
    modalities, values = network.modalities((1, 64, 64)), None
    mean, spread = network.mean, network.spread
    if given is not None:
        values = {"e": th.full((2, 1, 64, 64), given)}
        mean, spread = network.x_given_e(given), network.spread_given_e
    denoiser = JointDenoiser(modalities, network, values)
    # Multistep noise extrapolation needs the clipping where abar_T is nearly 0.
    out = run(sampler, diffusion, denoiser, th.randn(2, 1, 64, 64), clip_denoised=sampler == "plms")[-1]
    assert float(out["sample"].mean()) == pytest.approx(mean, abs=0.015)
    assert float(out["sample"].std()) == pytest.approx(spread, rel=0.06)
    if given is None:
        # The estimate belongs to the image: E[e | x].
        estimate = out["joint"].values["e"]
        assert float((estimate - (0.5 * out["sample"] - 0.1)).abs().max()) < 0.03


def error(sampler, steps, betas="linear", given=None, **options):
    """The largest distance from the exact probability flow, at the last kept timestep (0), over starts in [-2, 2]."""
    full = process(betas, peaks=PEAK)
    diffusion, network = process(betas, steps, peaks=PEAK), GaussianPair(full)
    start, flow = th.linspace(-2, 2, 64).reshape(-1, 1, 1, 1), network.flow
    values = None
    if given is not None:
        # Exactly independent image and modality: given, the modality only shifts.
        values = {"e": th.full_like(start, given)}
        network.forward = lambda z, t: (known_eps(network, z, t, given), {"e": 0 * z})
        flow = known_flow(network, given)
    out = run(sampler, diffusion, JointDenoiser(network.modalities(), network, values, 0.0), start, **options)
    return float((out[-2]["sample"] - flow(start, 999, 0)).abs().max())


def known_eps(network, z, t, given):
    a, b, s = (network.pick(v, t, z) for v in (network.signal, network.shift, network.sigma))
    return s * (z - b * given - a * network.mean) / (a**2 * network.spread**2 + s**2)


def known_flow(network, given):
    mean = network.signal * network.mean + network.shift * given
    var = network.signal**2 * network.spread**2 + network.sigma**2
    return lambda z, start, end: mean[end] + np.sqrt(var[end] / var[start]) * (z - mean[start])


@pytest.mark.parametrize("given", [None, 0.3])
@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("plms", 2), ("heun", 2), ("dpm++", 2)])
def test_convergence(sampler, order, given):
    """Twice the steps: half the error of DDIM, less than a third of that of the others, also with a modality that is only estimated."""
    errors = [error(sampler, steps, given=given) for steps in (20, 40, 80)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        if order == 1:
            assert coarse / fine == pytest.approx(2, rel=0.1)
        elif fine > 2e-3:  # below, rounding in float32 and the uneven last steps
            assert coarse / fine > 3
    assert errors[-1] < (0.04 if order == 1 else 2e-3)


def fine_errors(sampler, peak, spread, counts):
    """As `error`, in double precision over even steps of lambda, from 20,000 timesteps: nothing but the order is left."""
    with double():
        full = process(steps=20_000, total=20_000, peaks={"e": peak})
        network, found = GaussianPair(full, spread=spread), []
        lambdas, last = half_log_snr(full.alphas_cumprod), int((full.alphas_cumprod >= 1e-3).sum()) - 1
        for count in counts:
            wanted = np.linspace(lambdas[0], lambdas[last], count)
            kept = np.interp(-wanted, -lambdas, np.arange(20_000)).round().astype(int)
            diffusion = process(total=20_000, kept=kept, peaks={"e": peak})
            start = th.linspace(-2, 2, 16).reshape(-1, 1, 1, 1)
            out = run(sampler, diffusion, JointDenoiser(network.modalities(), network), start)[-2]["sample"]
            found.append(float((out - network.flow(start, kept[-1], kept[0])).abs().max()))
    return found


@contextlib.contextmanager
def double():
    th.set_default_dtype(th.float64)
    try:
        yield
    finally:
        th.set_default_dtype(th.float32)


@pytest.mark.parametrize("peak", [1e-9, 0.5])
@pytest.mark.parametrize(
    "sampler, order, steps, left",
    [("heun", 2, 10, 0.01), ("dpm++", 2, 20, 1e-3), ("dpm++3m", 3, 10, 3e-4), ("unipc", 3, 10, 2e-4)],
)
def test_order_in_log_snr(sampler, order, steps, left, peak):
    """Four times the steps of an order k: 4^k less error, without a modality and with one that is estimated."""
    errors = fine_errors(sampler, peak, 0.3, (steps, 4 * steps))
    assert errors[0] / errors[-1] > 0.8 * 4**order and errors[-1] < left


def test_the_estimates_are_integrated_to_third_order():
    """Where the shift carries much of the latent, the modality's polynomial has its own integral: with the image's weights the
    error of 80 steps would be that of a second-order method, 1e-3."""
    for sampler in ("dpm++3m", "unipc"):
        assert fine_errors(sampler, 0.5, 0.8, (80,))[0] < 1e-4


@pytest.mark.parametrize("betas", ["linear", "cosine"])
@pytest.mark.parametrize("count", [1, 2, 10, 20, 50, 250, 995, 1000])
def test_few_timesteps(betas, count):
    """So many, all different, from timestep 0 to where the image is still seen: abar is nowhere near 0 unless more are asked for."""
    abar = process(betas).alphas_cumprod
    kept = few_timesteps(abar, count)
    assert len(kept) == count and kept == sorted(set(kept)) and kept[-1] < T
    if count <= 250:
        assert 1e-3 <= abar[kept[-1]] < 1.2e-3
    if 1 < count:
        assert kept[0] == 0
    if count == 20:
        lambdas = half_log_snr(abar)
        shares = np.diff(kept) / kept[-1] - np.diff(lambdas[kept]) / (lambdas[0] - lambdas[kept[-1]])
        assert shares[2:] == pytest.approx(2 / 19, abs=0.01)  # before them timesteps are too few
    if count == T:
        assert kept == list(range(T))


def test_few_timesteps_outside_the_process():
    for count in (0, T + 1):
        with pytest.raises(UserError, match=f"{count} steps: choose between 1 and the 1000"):
            few_timesteps(process().alphas_cumprod, count)


def test_second_order_in_the_modality():
    """Where the shift carries much of the latent, DPM-Solver++ extrapolates the estimates too: held for a step they leave 0.012."""
    diffusion = process(steps=20, peaks=PEAK)
    network = GaussianPair(process(peaks=PEAK), spread=0.8)
    start = th.linspace(-2, 2, 64).reshape(-1, 1, 1, 1)
    out = run("dpm++", diffusion, JointDenoiser(network.modalities(), network), start)[-1]["sample"]
    assert (out - network.flow(start, 999, None)).abs().max() < 0.008


@pytest.mark.parametrize("betas", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [10, 20, 40])
@pytest.mark.parametrize("sampler", ["plms", "dpm++", "dpm++3m", "unipc"])
def test_few_steps_beat_ddim(sampler, steps, betas):
    clip = sampler == "plms"
    assert error(sampler, steps, betas, clip_denoised=clip) < 0.8 * error("ddim", steps, betas)


@pytest.mark.parametrize("betas", ["linear", "cosine"])
@every
def test_clipping_holds_the_image_in_range(sampler, betas):
    """Far starts at few steps: with clipping every latent stays of the size of noise."""
    diffusion, network = process(betas, 6, peaks=PEAK), GaussianPair(process(betas, peaks=PEAK))
    start = th.linspace(-5, 5, 64).reshape(-1, 1, 1, 1)
    for out in run(
        sampler, diffusion, JointDenoiser(network.modalities(), network), start, clip_denoised=True
    ):
        assert out["sample"].abs().max() < 8
    assert out["sample"].abs().max() <= 1 + 1e-5


@deterministic
def test_deterministic_samplers(sampler):
    diffusion, network = process(steps=8, peaks=PEAK), GaussianPair(process(peaks=PEAK))
    z = th.randn(4, 1, 1, 1)
    first, second = (
        run(sampler, diffusion, JointDenoiser(network.modalities(), network), z)[-1]["sample"]
        for _ in range(2)
    )
    assert th.equal(first, second)


@every
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_are_network_passes(sampler, steps):
    """One forward pass a step (the first of PLMS takes one more, and Heun's all but the last)."""
    diffusion, network = process(steps=steps, peaks=PEAK), GaussianPair(process(peaks=PEAK))
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    out = run(sampler, diffusion, JointDenoiser(network.modalities(), network), th.randn(2, 1, 1, 1))
    assert len(out) == steps
    assert len(calls) == steps + {"plms": min(1, steps - 1), "heun": steps - 1}.get(sampler, 0)


def test_guidance_on_top():
    """A classifier guide moves every sampler towards its class."""
    diffusion, network = (
        process(steps=50, peaks={"label": 0.5}),
        LabelledMixture(process(peaks={"label": 0.5})),
    )
    z = th.randn(500, 1, 1, 1, generator=th.Generator().manual_seed(0))

    def guide(x, t):
        return th.full_like(x, 4.0)

    for sampler in SAMPLERS:
        plain, guided = (
            run(
                sampler,
                diffusion,
                JointDenoiser(network.modalities(), network),
                z,
                cond_fn=fn,
                clip_denoised=True,
            )[-1]
            for fn in (None, guide)
        )
        assert guided["sample"].mean() > plain["sample"].mean() + 0.1, sampler


# What is given conditions


def mixture_samples(
    sampler="ddpm",
    given=None,
    strength=1.0,
    steps=100,
    schedule="bump",
    order="posterior",
    bias=0.0,
    betas="linear",
):
    """(Wasserstein distance to the exact samples, share in the given class) of 3000 samples of the toy mixture."""
    th.manual_seed(1)
    peaks, count = {"label": 0.5}, 3000
    network = LabelledMixture(process(betas, aggregation=schedule, peaks=peaks), bias=bias)
    diffusion = process(betas, steps, aggregation=schedule, peaks=peaks)
    values = None if given is None else {"label": one_hot(th.full((count,), given), 2)}
    first = th.rand(count, 1)
    initial = {"label": th.cat([first, 1 - first], 1)}
    denoiser = JointDenoiser(network.modalities(), network, values, strength, order, initial)
    x = run(sampler, diffusion, denoiser, th.randn(count, 1, 1, 1), clip_denoised=True)[-1][
        "sample"
    ].flatten()
    exact, _ = network.sample(count, th.Generator().manual_seed(2))
    share = None
    if given is not None:
        exact = network.means[given] + network.spread * th.randn(count)
        share = ((x[:, None] - network.means).abs().argmin(1) == given).float().mean().item()
    distance = (x.sort()[0] - exact.sort()[0]).abs().mean().item()
    return distance, share


@every
def test_nothing_given_samples_the_mixture(sampler):
    assert mixture_samples(sampler)[0] < 0.04


@every
@pytest.mark.parametrize("given", [0, 1])
def test_given_means_conditioned(sampler, given):
    """With the score of the model's own head samples follow p(x | label); holding the label fixed alone does not do that."""
    distance, share = mixture_samples(sampler, given)
    assert distance < 0.025 and share > 0.99
    if given == 0:  # the rarer class
        held, held_share = mixture_samples(sampler, given, strength=0.0)
        assert held > 5 * distance and held_share < 0.9


# An image of variance .1136 and modalities with a correlation of .456 with it: one given leaves N(.4, .3^2).
IMAGE, CODE, BOTH, SEEN = 0.1136, 0.09, 0.04607, 0.7814


@pytest.mark.parametrize("correlation", [1.0, 0.7, BOTH**2 / IMAGE / CODE])
@pytest.mark.parametrize("given", [("a", "b"), ("a",)])
@pytest.mark.parametrize("sampler", ["ddpm", "unipc"])
def test_several_given(sampler, given, correlation):
    """Copies, modalities that share their noise, and modalities that are independent given the image: all given, or one of which
    the other is unknown."""
    th.manual_seed(0)
    covariance = [[IMAGE, BOTH, BOTH], [BOTH, CODE, CODE * correlation], [BOTH, CODE * correlation, CODE]]
    peaks, steps = {"a": 0.5, "b": 0.5}, 500 if sampler == "ddpm" else 100
    network = GaussianSeveral(process("cosine", peaks=peaks), covariance)
    values = {name: th.full((2, 1, 64, 64), SEEN) for name in given}
    denoiser = JointDenoiser(network.modalities((1, 64, 64)), network, values)
    out = run(sampler, process("cosine", steps, peaks=peaks), denoiser, th.randn(2, 1, 64, 64))[-1]
    alike = len(given) if correlation < 1 else 1
    explained = BOTH / CODE * alike / (1 + correlation * (alike - 1))  # of the image by each given value
    assert float(out["sample"].mean()) == pytest.approx(explained * SEEN, abs=0.015)
    assert float(out["sample"].std()) == pytest.approx((IMAGE - explained * BOTH) ** 0.5, rel=0.04)
    if "b" not in given:  # E[b | image, a], on average E[b | a]
        assert float(out["joint"].values["b"].mean()) == pytest.approx(correlation * SEEN, abs=0.015)


def test_without_measured_correlations_each_counts_alone():
    """Heads of older checkpoints: copies count twice, as they did."""
    covariance = [[IMAGE, BOTH, BOTH], [BOTH, CODE, CODE], [BOTH, CODE, CODE]]
    network = GaussianSeveral(process("cosine", peaks={"a": 0.5, "b": 0.5}), covariance)
    z, t, value = th.randn(3, 1, 1, 1), th.full((3,), 300), th.full((3, 1, 1, 1), SEEN)
    scores = []
    for given in (("a",), ("a", "b")):
        scores.append(JointDenoiser(network.modalities(), network, dict.fromkeys(given, value))(z, t).score)
    assert th.allclose(*scores, rtol=1e-3, atol=1e-4)
    for head in network.heads.values():
        head.correlation.zero_()
    twice = JointDenoiser(network.modalities(), network, dict.fromkeys("ab", value))(z, t).score
    assert th.allclose(twice, 2 * scores[0], rtol=1e-3, atol=1e-4)


def test_strength_goes_beyond_the_exact():
    """Twice the score is no longer p(x | label): the samples move away from the other class and get narrower."""
    exact, _ = mixture_samples("dpm++", 0)
    twice, share = mixture_samples("dpm++", 0, strength=2.0)
    assert twice > 3 * exact and share > 0.99


@pytest.mark.parametrize("betas", ["linear", "cosine"])
def test_what_the_literal_weights_do(betas):
    """Even with an exact network the literal weights miss the distribution (z_T is nowhere near N(0, I)), and a small error of the
    predicted modality, which the default shrugs off, is multiplied."""
    default, literal = (mixture_samples(schedule=s, betas=betas)[0] for s in ("bump", "paper"))
    assert literal > 5 * default
    default, literal = (mixture_samples(schedule=s, betas=betas, bias=0.02)[0] for s in ("bump", "paper"))
    assert default < 0.04 and literal > 2 * default


def test_what_the_literal_order_does():
    """Encoding the estimate of the step before, at first a random one, costs accuracy: little with the default, much with literal weights."""
    for schedule, gap in (("bump", 0.003), ("paper", 0.02)):
        posterior, literal = (mixture_samples(schedule=schedule, order=o)[0] for o in ("posterior", "paper"))
        assert literal > posterior + gap


# Joint sampling with a real network


@pytest.fixture(scope="module")
def model():
    """(modalities, network, diffusion) of a tiny U-Net with a masked image (X) and a label (U)."""
    th.manual_seed(0)
    full = process("cosine")
    parsed = with_peaks(parse_modalities("masked:X,label:U", SHAPE, 3), "bump", full.betas, SHAPE)
    modalities = ModalitySet(parsed, 1, process("cosine", peaks=peaks(parsed)), num_classes=3, presence=True)
    network = UNetModel(
        8, 2, 32, 1, 1, (), channel_mult=(1, 2), num_classes=3,
        heads=modalities.make_heads(64, 32), presence=modalities.make_presence(128),
    )  # fmt: skip
    with th.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * th.randn(parameter.shape))
    return modalities, network.eval(), process("cosine", 8, peaks=peaks(modalities))


@every
@pytest.mark.parametrize("order", ["posterior", "paper"])
def test_a_sample_does_not_depend_on_its_batch(model, sampler, order):
    """The same image alone, in pairs and in a batch of five: within 1/255; given a label too."""
    modalities, network, diffusion = model
    label = one_hot(th.tensor([0, 1, 2, 0, 1]), 3)

    def sample(indices):
        return joint_sample(
            diffusion,
            modalities,
            network,
            (len(indices), *SHAPE),
            PerSample.derived(7, indices),
            given={"label": label[indices]},
            sampler=sampler,
            order=order,
        )

    whole, parts = sample([0, 1, 2, 3, 4]), [sample(i) for i in ([3], [1, 0], [4, 2])]
    images = th.cat([p.images for p in parts])
    assert (images - whole.images[[3, 1, 0, 4, 2]]).abs().max() < 1 / 255
    masked = th.cat([p.values["masked"] for p in parts])
    assert (masked - whole.values["masked"][[3, 1, 0, 4, 2]]).abs().max() < 1 / 255
    assert (whole.images[0] - whole.images[3]).abs().max() > 0.1  # another sample, another image
    assert th.equal(whole.values["label"], label) and set(whole.values) == {"masked", "label"}
    assert whole.images.abs().max() <= 1


@pytest.mark.parametrize(
    "sampler, every_step, repeats",
    [*((name, step, 1) for name in SAMPLERS for step in (False, True)), ("ddpm", True, 3)],
)
def test_known_pixels_come_back_exactly(model, sampler, every_step, repeats):
    modalities, network, diffusion = model
    values, where = th.rand(3, *SHAPE) * 2 - 1, th.rand(3, 1, 8, 8) < 0.5
    known = Known(values, where, every_step, repeats)
    options = dict(sampler=sampler, given={"masked": values * where})
    sample = joint_sample(
        diffusion, modalities, network, values.shape, PerSample([1, 2, 3]), known=known, **options
    )
    free = joint_sample(diffusion, modalities, network, values.shape, PerSample([1, 2, 3]), **options)
    assert th.equal(sample.images[where], values[where])
    assert (sample.images[~where] - values[~where]).abs().max() > 0.1
    # Pasted at the end alone, the rest is what it would have been; replaced at each step, the rest knows of it.
    assert th.equal(sample.images[~where], free.images[~where]) != every_step


@pytest.mark.parametrize("repeats", [1, 3])
def test_known_pixels_are_noised_in_the_moving_frame(repeats):
    """Replaced at each step, they enter the network with the mean and variance of equation 4."""
    diffusion, network = process("cosine", 20, peaks=PEAK), GaussianPair(process("cosine", peaks=PEAK))
    modalities, shape, e = network.modalities((1, 32, 32)), (4, 1, 32, 32), 0.6
    seen = {}
    network.register_forward_hook(
        lambda _, inputs, __: seen.setdefault(int(inputs[1][0]), []).append(inputs[0])
    )
    where = th.ones(4, 1, 32, 32, dtype=th.bool)
    known = Known(th.full(shape, 0.4), where, every_step=True, repeats=repeats)
    joint_sample(
        diffusion,
        modalities,
        network,
        shape,
        PerSample(range(4)),
        given={"e": th.full(shape, e)},
        strength=0.0,
        known=known,
    )
    for t in diffusion.timestep_map[:-1]:
        assert len(seen[t]) == (repeats if t else 1)
        for z in seen[t]:
            mean = 0.4 * network.signal[t] + e * network.shift[t]
            assert float(z.mean()) == pytest.approx(mean, abs=5 * network.sigma[t] / 64)
            assert float(z.var()) == pytest.approx(network.sigma[t] ** 2, rel=0.12)


def test_resampling_keeps_the_marginals():
    """Going back a step and down again leaves the distribution alone: at every pass the latents are those of q(z_t | e)."""
    th.manual_seed(0)
    diffusion, network = process("cosine", 150, peaks=PEAK), GaussianPair(process("cosine", peaks=PEAK))
    e, seen = 0.6, {}
    network.register_forward_hook(
        lambda _, inputs, __: seen.setdefault(int(inputs[1][0]), []).append(inputs[0].detach())
    )
    denoiser = JointDenoiser(network.modalities((1, 64, 64)), network, {"e": th.full((2, 1, 64, 64), e)})
    out = run("ddpm", diffusion, denoiser, th.randn(2, 1, 64, 64), repeats=2)[-1]["sample"]
    mean, spread = network.x_given_e(e), network.spread_given_e
    assert float(out.mean()) == pytest.approx(mean, abs=0.02)
    assert float(out.std()) == pytest.approx(spread, rel=0.1)
    for t, passes in seen.items():
        assert len(passes) == (2 if t else 1)
        for z in passes:
            expected = network.signal[t] * mean + network.shift[t] * e
            assert float(z.mean()) == pytest.approx(expected, abs=0.06)
            variance = network.signal[t] ** 2 * spread**2 + network.sigma[t] ** 2
            assert float(z.var()) == pytest.approx(variance, rel=0.2)


def test_start_includes_a_known_shift():
    """Where atil_T is not negligible z_T starts around the shift of what is given, elsewhere from N(0, I)."""
    for schedule, centre in (("constant", None), ("bump", 0.0)):
        network = GaussianPair(process(aggregation=schedule, peaks=PEAK))
        diffusion = process(steps=4, aggregation=schedule, peaks=PEAK)
        seen, shape = [], (2, 1, 64, 64)
        network.register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(inputs[0].detach()))
        given = {"e": th.full(shape, 1.0)}
        joint_sample(diffusion, network.modalities(shape[1:]), network, shape, PerSample([0, 1]), given=given)
        expected = network.shift[-1] if centre is None else centre
        assert float(seen[0].mean()) == pytest.approx(expected, abs=0.05)
        assert float(seen[0].std()) == pytest.approx(1, abs=0.04)


def test_refusals(model):
    modalities, network, diffusion = model
    shape = (1, *SHAPE)
    known = Known(th.zeros(shape), th.ones(shape, dtype=th.bool), every_step=True, repeats=2)
    with pytest.raises(
        UserError, match=r"unknown sampler 'euler': choose one of ddpm, ddim, plms, heun, dpm\+\+"
    ):
        joint_sample(diffusion, modalities, network, shape, PerSample([0]), sampler="euler")
    with pytest.raises(UserError, match="resampling goes back by random steps: it works with ddpm, not ddim"):
        joint_sample(diffusion, modalities, network, shape, PerSample([0]), sampler="ddim", known=known)
    with pytest.raises(UserError, match="unknown order 'literal'"):
        joint_sample(diffusion, modalities, network, shape, PerSample([0]), order="literal")
