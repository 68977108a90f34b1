"""What is measured of the heads' errors on held-out data, and what encoding costs, counted in passes of the U-Net."""

import pytest
import torch as th
import torch.nn as nn

from guided_diffusion.mt.denoiser import JointDenoiser
from guided_diffusion.mt.heads import Heads
from guided_diffusion.mt.modalities import ImageModality
from guided_diffusion.mt.modality_set import Batch, ModalitySet
from guided_diffusion.mt.training import measure_variance
from guided_diffusion.seeding import PerSample
from ldm.models.diffusion.sampling import Denoiser
from tests.ldm_models import maps
from tests.oracle import process
from tests.test_ldm_representation import representation
from tests.test_sampling import SHAPE, joint_sample, model, one_hot  # noqa: F401 (model is a fixture)

NAMES = ("rows", "copy", "mixed", "wide")


class Wrong(nn.Module):
    """Heads whose errors are known, of values that are all zero: the same along each row of 8 pixels; twice that; half of it and
    half noise; noise of another shape."""

    def __init__(self):
        super().__init__()
        self.heads = Heads({name: nn.Module() for name in NAMES}, dict.fromkeys(NAMES, 16))
        self.anchor = nn.Parameter(th.zeros(()))
        self.generator = th.Generator().manual_seed(0)

    def draw(self, *shape):
        return th.randn(shape, generator=self.generator)

    def forward(self, z, t):
        size = 0.1 + t.float()[:, None, None, None] / 1000  # as errors grow with the noise
        rows = self.draw(len(z), 1, 8, 1).expand(-1, 1, 8, 8) * size
        mixed = (rows + self.draw(len(z), 1, 8, 1).expand(-1, 1, 8, 8) * size) / 2**0.5
        wide = self.draw(len(z), 2, 8, 8) * size
        return 0 * z, {"rows": rows, "copy": 2 * rows, "mixed": mixed, "wide": wide}


@pytest.fixture(scope="module")
def measured():
    peaks = dict.fromkeys(NAMES, 0.1)
    members = [ImageModality(name, (1 + (name == "wide"), 8, 8), variance_bins=16) for name in NAMES]
    members[-1] = ImageModality("wide", (2, 8, 8), encoder=narrow, variance_bins=16)
    modalities, network = ModalitySet(members, 1, process(peaks=peaks)), Wrong()
    values = {m.name: th.zeros(1024, *m.shape) for m in members}
    measure_variance(modalities, network, th.zeros(1024, 1, 8, 8), values)
    return modalities, network


def narrow(value):
    return value[:, :1]


def test_correlations_of_errors(measured):
    modalities, network = measured
    t = th.tensor([100, 500, 900])
    size = 0.1 + t / 1000
    covariance = modalities.covariance(network, NAMES, t) / (size**2)[:, None, None]
    half = 0.5**0.5
    expected = [[1, 2, half, 0], [2, 4, 2 * half, 0], [half, 2 * half, 1, 0], [0, 0, 0, 1]]
    assert (covariance - th.tensor(expected)).abs().max() < 0.6
    scale = covariance.diagonal(dim1=1, dim2=2).sqrt()
    correlation = covariance / scale[:, :, None] / scale[:, None]
    assert (correlation[:, 0, 1] - 1).abs().max() < 1e-3 and correlation[:, 3, :3].abs().max() == 0
    assert (correlation[:, 0, 2] - half).abs().max() < 0.08


def test_effective_dimensions(measured):
    """8 rows of 8 equal errors are 8 dimensions of 64; independent ones are all 128."""
    modalities, network = measured
    t = th.tensor([100, 500, 900])
    for name, share, within in (
        ("rows", 1 / 8, 0.02),
        ("copy", 1 / 8, 0.02),
        ("mixed", 1 / 8, 0.02),
        ("wide", 1, 0.15),
    ):
        assert (modalities.share(network, name, t) - share).abs().max() < within, name


def test_the_default_strength_is_the_share_of_independent_dimensions(measured):
    modalities, network = measured
    z, t, value = th.randn(3, 1, 8, 8), th.full((3,), 500), th.ones(3, 1, 8, 8)

    class Smooth(nn.Module):
        heads, codes = network.heads, None

        def forward(self, z, t):
            return 0 * z, {"rows": 0.3 * z, "copy": 0 * z, "mixed": 0 * z, "wide": 0 * z.repeat(1, 2, 1, 1)}

        def parameters(self, recurse=True):
            return network.parameters()

    def score(strength):
        return JointDenoiser(modalities, Smooth(), {"rows": value}, strength)(z, t).score

    share = modalities.share(network, "rows", t)[0]
    assert th.allclose(score(None), share * score(1.0), rtol=1e-4) and share < 0.2
    assert th.allclose(score(0.5), 0.5 * score(1.0), rtol=1e-4)


def test_heads_of_before_load(measured):
    """A checkpoint without shares and correlations: each head by itself, with the strength 1."""
    _, network = measured
    state = {k: v for k, v in network.state_dict().items() if not k.endswith(("share", "correlation"))}
    fresh = Wrong()
    fresh.load_state_dict(state)
    assert th.equal(fresh.heads["rows"].variance, network.heads["rows"].variance)
    assert bool((fresh.heads["rows"].share == 1).all()) and not fresh.heads["rows"].correlation.any()


def rows_of(module, call):
    """How many samples pass through a module in a call."""
    seen = []
    hook = module.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    call()
    hook.remove()
    return sum(seen), len(seen)


@pytest.mark.parametrize("size", [10, 20, 40])
def test_encoding_vectors_costs_a_tenth_of_a_step(size):
    """A step is three forward passes of the batch; vectors and their null input take at most .3 of one, in a single pass."""
    made = representation(presence=True)
    batch = {"image": maps(size, seed=3), "class_label": th.arange(size) % 4}
    x, cond = made.get_input(batch, "image")
    t, random = th.randint(0, 40, (size,)), PerSample(range(size))
    network = made.model.diffusion_model
    rows, passes = rows_of(network, lambda: made.p_losses(x, cond, t, th.randn_like(x), random, batch))
    assert size < rows <= size + 0.3 * size and passes == 2


def test_the_share_that_is_encoded_rotates():
    """Every sample's turn comes."""
    made, seen = representation(presence=True), th.zeros(10)
    batch = {"image": maps(10, seed=3), "class_label": th.arange(10) % 4}
    x, cond = made.get_input(batch, "image")
    network, shifted = made.model.diffusion_model, []
    hook = network.register_forward_hook(
        lambda _, inputs, kwargs, __: (
            shifted.append(kwargs["present"][:, 0])
            if kwargs.get("present") is not None and len(inputs[0]) == 10
            else None
        ),
        with_kwargs=True,
    )
    for step in range(12):
        random = PerSample(range(100 * step, 100 * step + 10))
        made.p_losses(x, cond, th.randint(0, 40, (10,)), th.randn_like(x), random, batch)
    hook.remove()
    seen = th.stack(shifted).sum(0)
    assert len(shifted) == 12 and seen.sum() == 12 * 2 and (seen > 0).sum() >= 7


@pytest.mark.parametrize(
    "given, guidance, passes", [((), 1, 1), (("label",), 1, 1), (("masked",), 1, 1), (("masked",), 2, 2)]
)
def test_passes_of_each_direction(model, given, guidance, passes):  # noqa: F811
    """One pass a step, whatever conditions by the heads, two with classifier-free guidance; the labels' codes are encoded once for
    all batches, and anew for other weights."""
    modalities, network, diffusion = model
    values = {"label": one_hot(th.tensor([0, 2]), 3), "masked": th.zeros(2, *SHAPE)}

    def sample():
        joint_sample(
            diffusion, modalities, network, (2, *SHAPE), PerSample([1, 2]), guidance=guidance,
            given={name: values[name] for name in given}, sampler="dpm++",
        )  # fmt: skip

    sample()
    steps = diffusion.num_timesteps
    assert rows_of(network, sample) == (2 * steps * passes, steps * passes)
    with th.no_grad():
        next(network.parameters()).add_(1e-3)
    assert rows_of(network, sample) == (2 * steps * passes + 3, steps * passes + 1)


def test_a_given_vector_is_encoded_once():
    made = representation()
    made.measure_standards([{"image": maps(64, seed=7)}], 64)
    options = dict(steps=5, sampler="unipc", conditioning={"class_label": th.tensor([1, 2])}, use_ema=False)
    options["conditioning"] = made.get_learned_conditioning(options["conditioning"])
    vectors = th.randn(2, 9)
    network = made.model.diffusion_model

    def sample():
        made.sample_joint(2, {"representation": vectors}, ["image"], **options)

    sample()
    assert rows_of(network, sample) == (5 * 2 + 2, 6)


def test_what_is_missing_is_not_encoded():
    made = representation()
    values, there = th.randn(4, 9), th.tensor([True, False, False, True])
    network = made.model.diffusion_model

    def encode(present):
        batch = Batch({"representation": values}, present)
        return made.modalities.encode(Denoiser(made), batch, th.zeros(4, 2, 8, 8))["representation"]

    whole, some = encode({}), encode({"representation": there})
    assert th.allclose(some[there], whole[there], atol=2e-3) and not some[~there].any()
    assert rows_of(network, lambda: encode({"representation": there})) == (3, 1)
