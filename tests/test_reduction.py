"""Without modalities everything is the single-task code, bit for bit; with them, the single-task code in the moving frame."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch as th

from guided_diffusion import script_util
from guided_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from guided_diffusion.losses import normal_kl
from guided_diffusion.mt.aggregation import JointOutput
from guided_diffusion.mt.bound import multitask_bound
from guided_diffusion.mt.denoiser import JointDenoiser
from guided_diffusion.mt.losses import multitask_losses
from guided_diffusion.mt.modalities import ImageModality
from guided_diffusion.mt.modality_set import Batch, ModalitySet
from guided_diffusion.mt.sampling import SAMPLERS, joint_sample
from guided_diffusion.seeding import PerSample
from tests.compare import agree
from tests.oracle import process
from tests.test_parity_adm import INDEX, arrays, toy_model

SHAPE = (3, 8, 8)
MEANS = list(ModelMeanType)
VARIANCES = list(ModelVarType)


class Toy(th.nn.Module):
    """A cheap network of any number of modalities."""

    def __init__(self, learn_sigma=False, names=()):
        super().__init__()
        self.weight = th.nn.Parameter(th.tensor(0.7))
        self.model, self.names = toy_model(learn_sigma), names

    def forward(self, x, t, **_):
        output = self.model(self.weight * x, t)
        if not self.names:
            return output
        return output, {name: th.sin(2 * x) for name in self.names}


def image_modalities(diffusion, *names):
    return ModalitySet([ImageModality(name, SHAPE) for name in names], 3, diffusion)


def diffusion_and_data(name):
    flags = INDEX["diffusion"][name]["flags"]
    return (
        script_util.create_gaussian_diffusion(**flags),
        toy_model(flags.get("learn_sigma", False)),
        arrays(name),
    )


@pytest.mark.parametrize("name", INDEX["diffusion"])
def test_no_modality_matches_the_recorded_single_task(name):
    """A joint model of no modalities gives the numbers recorded from upstream, and the bits of the plain model."""
    diffusion, model, data = diffusion_and_data(name)
    joint = JointDenoiser(ModalitySet([], data["x0"].shape[1]), model)
    x_t = diffusion.q_sample(data["x0"], data["t"], data["noise"], encodings={})
    agree(x_t, data["q_sample"], "q_sample")
    for clip in (False, True):
        plain, ours = (
            diffusion.p_mean_variance(m, x_t, data["t"], clip_denoised=clip) for m in (model, joint)
        )
        agree(ours["mean"], data[f"p_mean_clip{int(clip)}"], "mean")
        assert all(th.equal(plain[key], ours[key]) for key in plain) and set(plain) == set(ours)
    if "p_sample_loop_seed7" not in data:
        return
    shape = tuple(data["x0"].shape)
    for loop, key in (
        (diffusion.p_sample_loop, "p_sample_loop_seed7"),
        (diffusion.ddim_sample_loop, "ddim_loop_seed7"),
    ):
        th.manual_seed(7)
        agree(loop(joint, shape, device="cpu"), data[key], key)


@pytest.mark.parametrize("sampler, loop", [("ddpm", "p_sample_loop"), ("ddim", "ddim_sample_loop")])
@pytest.mark.parametrize("peaks", [None, {}])
def test_sampling_with_no_modality_has_the_same_bits(sampler, loop, peaks):
    diffusion, network = process("cosine", 20, peaks=peaks), Toy()
    noise = th.randn(2, *SHAPE)
    th.manual_seed(3)
    plain = getattr(diffusion, loop)(network, noise.shape, noise=noise)
    th.manual_seed(3)
    with th.no_grad():
        *_, last = SAMPLERS[sampler](
            diffusion, JointDenoiser(ModalitySet([], 3), network), noise, th.randn_like, clip_denoised=True
        )
    assert th.equal(last["sample"], plain) and set(last) == {"sample", "pred_xstart"}


def test_joint_sample_with_no_modality_has_the_same_bits():
    diffusion, network = process(steps=12), Toy()
    joint = joint_sample(diffusion, ModalitySet([], 3), network, (2, *SHAPE), PerSample([5, 6]))
    random = PerSample([5, 6])
    noise = random.randn(SHAPE)
    plain = diffusion.p_sample_loop(network, noise.shape, noise=noise, randn_like=random.randn_like)
    assert th.equal(joint.images, plain.clamp(-1, 1)) and joint.values == {}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_with_given_zeros_has_the_same_bits(sampler):
    """An encoding of zeros (no value) shifts nothing."""
    diffusion, network, noise = process(steps=12, peaks={"e": 0.5}), Toy(names=("e",)), th.randn(2, *SHAPE)
    plain = process(steps=12)
    given = JointDenoiser(image_modalities(diffusion, "e"), network, {"e": th.zeros(2, *SHAPE)}, strength=0.0)
    results = []
    for process_, model in ((diffusion, given), (plain, lambda x, t: network(x, t)[0])):
        th.manual_seed(4)
        with th.no_grad():
            *_, last = SAMPLERS[sampler](process_, model, noise, th.randn_like, clip_denoised=True)
        results.append(last["sample"])
    assert th.equal(*results)


@pytest.mark.parametrize("variance", VARIANCES)
def test_losses_without_values_have_the_same_bits(variance):
    """With no modality, none in the batch, or all values missing: the single-task loss."""
    learned = variance in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)
    x, noise, t = th.rand(3, *SHAPE) * 2 - 1, th.randn(3, *SHAPE), th.tensor([0, 400, 999])

    def losses(diffusion, network, batch, *names):
        modalities = image_modalities(diffusion, *names)
        return multitask_losses(modalities, network, batch, t, noise=noise).terms

    plain = process(model_var_type=variance).training_losses(Toy(learned), x, t, noise=noise)
    nothing = losses(process(model_var_type=variance), Toy(learned), Batch({}, images=x))
    diffusion, network = process(model_var_type=variance, peaks={"e": 0.5}), Toy(learned, ("e",))
    absent = losses(diffusion, network, Batch({}, images=x), "e")
    missing = Batch({"e": th.zeros(3, *SHAPE)}, {"e": th.zeros(3, dtype=th.bool)}, x)
    missing = losses(diffusion, network, missing, "e")
    assert missing.pop("KL_e").abs().max() == 0
    for terms in (nothing, absent, missing):
        assert set(terms) == set(plain)
        assert all(th.equal(terms[key], plain[key]) for key in plain)


def test_bound_with_no_modality_has_the_single_task_terms():
    diffusion, network, x = process(steps=20), Toy(), th.rand(2, *SHAPE) * 2 - 1
    zeros = SimpleNamespace(randn_like=th.zeros_like)
    bound = multitask_bound(diffusion, ModalitySet([], 3), network, Batch({}, images=x), random=zeros)
    terms = [
        diffusion._vb_terms_bpd(network, x, diffusion.q_sample(x, t, th.zeros_like(x)), t)["output"]
        for t in th.arange(20)[:, None].expand(20, 2)
    ]
    assert th.equal(bound.L0, diffusion._prior_bpd(x)) and bound.L2 == {}
    assert th.equal(bound.L3, terms[0]) and th.equal(bound.L1[:, 1:], th.stack(terms[1:], 1))
    assert (bound.L1[:, 0] == 0).all()


# The moving frame


def shifted(network, diffusion, encodings):
    """The same network as one of y_t: it sees z_t = y_t + shift_t."""

    def model(y, t):
        return network(y + diffusion.aggregation.shift(encodings, t), t)

    return model


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("loss", LossType)
def test_losses_are_those_of_the_shifted_problem(mean, variance, loss):
    """Equation 6's image part is the single-task loss of the network that sees y_t + shift_t."""
    options = dict(model_mean_type=mean, model_var_type=variance, loss_type=loss)
    joint, plain = process(peaks={"a": 0.5, "b": 0.3}, **options), process(**options)
    network = toy_model(variance in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE))
    x, noise, t = th.rand(4, *SHAPE) * 2 - 1, th.randn(4, *SHAPE), th.tensor([0, 1, 300, 800])
    encodings = {name: th.randn(4, *SHAPE) for name in "ab"}
    batch = Batch(encodings, images=x)
    ours, _ = multitask_losses(image_modalities(joint, *"ab"), network, batch, t, noise=noise)
    theirs = plain.training_losses(shifted(network, joint, encodings), x, t, noise=noise)
    assert set(ours) == set(theirs)
    for key in ours:
        th.testing.assert_close(ours[key], theirs[key], rtol=2e-4, atol=1e-5)
    unshifted = plain.training_losses(network, x, t, noise=noise)
    assert not th.allclose(ours["loss"], unshifted["loss"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("variance", VARIANCES)
def test_bound_is_that_of_the_moving_frame(mean, variance):
    """KL(q(z_{t-1} | z_t, X) || p) equals KL(q(y_{t-1} | y_t, x_0) || p): both means move by shift_{t-1}, the variances stay."""
    options = dict(model_mean_type=mean, model_var_type=variance)
    joint, plain = process("cosine", peaks={"e": 0.5}, **options), process("cosine", **options)
    network = toy_model(variance in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE))
    x, noise, t = th.rand(4, *SHAPE) * 2 - 1, th.randn(4, *SHAPE), th.tensor([1, 50, 300, 800])
    e = {"e": th.randn(4, *SHAPE)}
    z, y = joint.q_sample(x, t, noise, e), plain.q_sample(x, t, noise)
    told = JointOutput(network(z, t), e)  # the network's output at z_t, which both see
    frame_only = told._replace(encodings={"e": 0 * e["e"]})
    ours = joint._vb_terms_bpd(lambda *_: frame_only, x, y, t)
    theirs = plain._vb_terms_bpd(shifted(network, joint, e), x, y, t)
    th.testing.assert_close(ours["output"], theirs["output"], rtol=2e-4, atol=1e-6)
    # Spelled out with equation 5's posterior and the model's own mean in the z frame.
    q_mean, _, q_log = joint.q_posterior_mean_variance(x, z, t, e)
    p = joint.p_mean_variance(lambda *_: told, z, t)
    nats = normal_kl(q_mean, q_log, p["mean"], p["log_variance"]).mean((1, 2, 3))
    th.testing.assert_close(ours["output"], nats / np.log(2), rtol=1e-3, atol=1e-6)
    before = joint.aggregation.shift(e, t - 1)
    frame = plain.p_mean_variance(shifted(network, joint, e), y, t)
    th.testing.assert_close(p["mean"], frame["mean"] + before, rtol=1e-4, atol=1e-4)
    th.testing.assert_close(p["log_variance"], frame["log_variance"])


def test_a_perfect_model_has_no_transition_loss():
    """Knowing noise and encodings, KL(q(z_{t-1} | z_t, X) || p(z_{t-1} | z_t)) is zero at every t > 0."""
    diffusion = process("cosine", peaks={"e": 0.5})
    x, noise, e = th.rand(5, *SHAPE) * 2 - 1, th.randn(5, *SHAPE), {"e": th.randn(5, *SHAPE)}
    t = th.tensor([1, 2, 100, 700, 900])
    z = diffusion.q_sample(x, t, noise, e)
    true_mean, _, true_log_variance = diffusion.q_posterior_mean_variance(x, z, t, e)
    nats = []
    for encodings in (e, None):
        p = diffusion.p_mean_variance(lambda *_, e=encodings: JointOutput(noise, e), z, t)
        nats.append(normal_kl(true_mean, true_log_variance, p["mean"], p["log_variance"]).mean((1, 2, 3)))
    assert nats[0].abs().max() < 1e-4 and nats[1].min() > 10 * nats[0].max()


def test_ddim_goes_up_and_down_in_the_moving_frame():
    """The reverse step from z_t lands where DDIM with the same prediction comes from."""
    diffusion = process(steps=50, peaks={"e": 0.5})
    encodings = {"e": th.randn(2, *SHAPE)}
    x, t = th.rand(2, *SHAPE) * 2 - 1, th.tensor([10, 30])

    def perfect(z, timesteps):
        index = th.tensor([diffusion.timestep_map.index(int(s)) for s in timesteps])
        y = diffusion.aggregation.to_frame(z, index, encodings)
        return JointOutput(diffusion._predict_eps_from_xstart(y, index, x), encodings)

    z = diffusion.q_sample(x, t, encodings=encodings)
    up = diffusion.ddim_reverse_sample(perfect, z, t)["sample"]
    down = diffusion.ddim_sample(perfect, up, t + 1)["sample"]
    th.testing.assert_close(down, z, rtol=1e-4, atol=1e-4)
