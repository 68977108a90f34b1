"""One dataclass per modality: masks, losses, code lengths, and what users may ask for."""

import math

import numpy as np
import pytest
import torch as th

from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import get_named_beta_schedule
from guided_diffusion.mt.aggregation import Aggregation
from guided_diffusion.mt.masks import RandomPatches
from guided_diffusion.mt.modalities import (
    ImageModality,
    LabelModality,
    VectorModality,
    one_hot,
    parse_modalities,
    preset,
)
from guided_diffusion.mt.modality_set import with_peaks
from guided_diffusion.seeding import PerSample
from tests.compare import agree

IMAGE = ImageModality("twin", (1, 4, 4))
LABEL = LabelModality("label", (3,), encoder=lambda v: v, head="middle")
VECTOR = VectorModality("clip", (5,), encoder=lambda v: v, head="middle")


# Masks


def test_number_and_size_of_patches():
    """m ~ U{0..10} patches of `size` pixels, their corner anywhere, clipped at the right and lower edge."""
    count = 3000
    keep = RandomPatches(size=1).keep(250, 250, PerSample.derived(0, range(300)))
    # Patches of one pixel on a large image hardly ever meet: the masked pixels count them.
    numbers = th.bincount((~keep).flatten(1).sum(1), minlength=11)
    assert len(numbers) == 11 and numbers.min() > 10 and numbers.max() < 50
    single = ~RandomPatches(size=5).keep(8, 13, PerSample.derived(1, range(count)), patches=1)[:, 0]
    # Every corner is equally likely.
    top, left = single.any(2).float().argmax(1), single.any(1).float().argmax(1)
    for place, places, extent in ((top, 8, single.any(2).sum(1)), (left, 13, single.any(1).sum(1))):
        assert (th.bincount(place, minlength=places) / count - 1 / places).abs().max() < 0.04
        assert th.equal(extent, (places - place).clamp(max=5))


def test_masked_area_is_the_papers():
    """At 64 pixels 10 patches of 16 mask 38.0 % of the image, and the last pixel in 47 % of images."""
    masked = ~RandomPatches().keep(64, 64, PerSample.derived(7, range(4000)), patches=10)
    assert masked.float().mean() == pytest.approx(0.380, abs=0.01)
    assert masked[:, 0, -1, -1].float().mean() == pytest.approx(1 - (1 - (16 / 64) ** 2) ** 10, abs=0.03)


def test_halves():
    for half, kept in (("left", (slice(None), slice(4, 8))), ("bottom", (slice(0, 4), slice(None)))):
        keep = RandomPatches(size=2, half=half).keep(8, 8, PerSample([0, 1]))
        assert keep.shape == (2, 1, 8, 8) and keep[0, 0][kept].all() and keep.float().mean() == 0.5
    with pytest.raises(UserError, match="unknown half 'middle': choose one of left, right, top, bottom"):
        RandomPatches(half="middle")


def test_patches_may_overlap():
    masked = (
        (~RandomPatches(size=8).keep(16, 16, PerSample.derived(2, range(50)), patches=10)).flatten(1).sum(1)
    )
    assert masked.max() <= 256 and len(masked.unique()) > 10


def test_patches_are_in_proportion():
    """16 pixels at 64, a quarter of the edge elsewhere."""
    for edge, size in ((64, 16), (32, 8), (8, 2), (256, 64)):
        assert preset("m", "masked", (3, edge, edge), None).derive == RandomPatches(10, size, 0.0)


def test_complete_masks():
    random = PerSample.derived(3, range(2000))
    keep = RandomPatches(max_patches=1, size=2, complete=0.2).keep(8, 8, random)
    assert (keep.sum((1, 2, 3)) == 0).float().mean() == pytest.approx(0.2, abs=0.04)
    assert not RandomPatches(complete=1.0).keep(64, 64, PerSample([0])).any()
    assert RandomPatches(max_patches=0).keep(64, 64, PerSample([0])).all()
    assert RandomPatches().keep(64, 64, PerSample([0]), patches=0).all()


def test_a_mask_belongs_to_its_sample():
    patches = RandomPatches(size=3, complete=0.3)
    whole = patches.keep(12, 12, PerSample.derived(4, range(8)))
    alone = th.cat([patches.keep(12, 12, PerSample.derived(4, [i])) for i in range(8)])
    assert th.equal(whole, alone) and len(whole.unique(dim=0)) > 4


def test_masked_copies():
    """Masked pixels are 0 in every channel, the others untouched."""
    images = th.rand(6, 3, 16, 16) + 0.1
    masked = RandomPatches(size=4)(images, PerSample.derived(5, range(6)))
    kept = RandomPatches(size=4).keep(16, 16, PerSample.derived(5, range(6))).expand_as(images)
    assert th.equal(masked[kept], images[kept]) and masked[~kept].abs().max() == 0


def test_patches_that_cannot_be():
    with pytest.raises(UserError, match="patches of 9 pixels do not fit an image of 8 x 20"):
        RandomPatches(size=9).keep(8, 20, PerSample([0]))
    for wrong in (dict(size=0), dict(max_patches=-1), dict(complete=1.5)):
        with pytest.raises(UserError, match="masks need max_patches of at least 0"):
            RandomPatches(**wrong)


# Likelihoods


def test_losses():
    """Mean squared error, and the cross-entropy, also of soft labels; one number per sample."""
    value, prediction = th.rand(2, 1, 4, 4), th.rand(2, 1, 4, 4)
    th.testing.assert_close(IMAGE.loss(prediction, value), ((prediction - value) ** 2).mean((1, 2, 3)))
    logits, soft = th.tensor([[1.0, 2.0, -1.0]]), th.tensor([[0.2, 0.5, 0.3]])
    norm = math.log(sum(math.exp(v) for v in (1, 2, -1)))
    expected = -(0.2 * (1 - norm) + 0.5 * (2 - norm) + 0.3 * (-1 - norm))
    agree(LABEL.loss(logits, soft), [expected], rtol=1e-5)
    agree(LABEL.log_likelihood(logits, soft), [-expected], rtol=1e-5)


def test_expectations():
    """Probabilities, not the likeliest class; images inside their range; vectors as they are."""
    th.testing.assert_close(
        LABEL.expectation(th.tensor([[0.0, 0.0, math.log(2.0)]])), th.tensor([[0.25, 0.25, 0.5]])
    )
    assert IMAGE.expectation(th.tensor([-3.0, 0.5, 3.0])).tolist() == [-1.0, 0.5, 1.0]
    assert VECTOR.expectation(th.tensor([5.0])).tolist() == [5.0]


def test_gaussian_likelihood_has_the_score_of_its_variance():
    """d/dm log N(x; m, v) = (x - m) / v, summed over the value."""
    mean = th.zeros(2, 5, requires_grad=True)
    variance = th.tensor([0.5, 2.0])
    VECTOR.log_likelihood(mean, th.ones(2, 5), variance).sum().backward()
    th.testing.assert_close(mean.grad, th.tensor([[2.0], [0.5]]).expand(2, 5))


@pytest.mark.parametrize("mean, variance", [(0.0, 0.01), (0.9, 0.3), (-3.0, 1.0)])
def test_code_length_of_images_is_a_probability(mean, variance):
    """2^-length of the 256 values of a pixel sums to one."""
    pixel = ImageModality("p", (1, 1, 1))
    values = (th.arange(256).float() / 127.5 - 1).reshape(-1, 1, 1, 1)
    nats = pixel.code_length(th.full_like(values, mean), values, th.full((256,), variance))
    assert float((-nats).exp().double().sum()) == pytest.approx(1, abs=1e-4)


def test_code_length_of_labels_and_vectors():
    logits = th.randn(1, 3)
    lengths = [LABEL.code_length(logits, one_hot(th.tensor([k]), 3)) for k in range(3)]
    assert float(sum((-v).exp() for v in lengths)) == pytest.approx(1, abs=1e-5)
    mean, value, variance = th.randn(2, 5), th.randn(2, 5), th.tensor([0.3, 1.7])
    density = th.distributions.Normal(mean, variance.sqrt()[:, None]).log_prob(value).sum(1)
    agree(VECTOR.code_length(mean, value, variance), -density, rtol=1e-5)


def test_one_hot():
    assert one_hot(th.tensor([2, -1, 0]), 3).tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert one_hot(th.tensor([], dtype=th.long), 3).shape == (0, 3)
    for labels in ([3], [-2]):
        with pytest.raises(UserError, match=r"labels must lie in 0\.\.2 \(or -1 for none\)"):
            one_hot(th.tensor(labels), 3)


# What users may ask for


def test_parsing_a_flag():
    masked, label = parse_modalities(" masked:X , label:u ", (3, 32, 32), 10)
    assert (masked.name, masked.kind, masked.shape, masked.as_input) == ("masked", "image", (3, 32, 32), True)
    assert (masked.encoder, masked.head, masked.likelihood) == ("identity", "out", "gaussian")
    assert (masked.null_probability, masked.loss_weight) == (0.1, 0.1)
    assert (label.kind, label.shape, label.as_input) == ("label", (10,), False)
    assert (label.encoder, label.head, label.likelihood) == ("unet", "middle", "categorical")
    assert parse_modalities("", (3, 32, 32)) == ()


def peaks(spec, shape=(1, 8, 8), classes=None, **options):
    betas = get_named_beta_schedule("cosine", 1000)
    return [
        m.peak for m in with_peaks(parse_modalities(spec, shape, classes), "bump", betas, shape, **options)
    ]


def test_peaks_of_images_are_shared():
    """Their sum is 0.5; a given one stays."""
    three = {f"m{i}": {"preset": "image"} for i in range(3)}
    assert peaks("masked") == [0.5] and peaks({"masked": {"peak": 0.2}}) == [0.2]
    assert peaks("masked,label", classes=2) == [0.25, 0.25]
    assert peaks(three) == pytest.approx([1 / 6] * 3)


@pytest.mark.parametrize("size", [8, 64])
def test_peaks_of_labels_are_set_by_how_far_they_stand_out(size):
    """The largest d_t = atil_t sqrt(D) / sqrt(1 - abar_t) is what was asked for, at every resolution."""
    masked, label = peaks("masked,label", (3, size, size), 2, detectability=4.0)
    betas = get_named_beta_schedule("cosine", 1000)
    abar = np.cumprod(1 - betas)
    atil = Aggregation.named("bump", betas, {"label": label}).coefficients[0]
    assert masked == 0.25 and (atil * np.sqrt(3 * size**2 / (1 - abar))).max() == pytest.approx(4.0)


def test_parsing_a_mapping():
    spec = {
        "holes": {"preset": "masked", "variant": "X", "patches": {"size": 3, "complete": 0.1}, "peak": 0.2},
        "depth": {"preset": "image", "shape": [1, 8, 8], "loss_weight": 1},
        "label": {"centre": "null", "hidden": 64},
    }
    holes, depth, label = parse_modalities(spec, (1, 8, 8), 4)
    assert holes.derive == RandomPatches(10, 3, 0.1) and holes.as_input and holes.peak == 0.2
    assert depth.shape == (1, 8, 8) and depth.loss_weight == 1 and not depth.as_input
    assert (label.centre, label.hidden) == ("null", 64)


REFUSED = [
    ("audio", "modality audio: unknown kind 'audio', choose one of masked, label, image"),
    ("masked:Z", "modality masked: unknown variant 'Z', choose U or X"),
    ("label", "modality label: the data have no labels; set --num_classes or give labelled data"),
    ("masked,masked:X", "modality names must differ: masked,masked:X"),
    ({"masked": "X"}, r"modality masked: expected options by name \(such as variant: X\), got 'X'"),
    (
        {"masked": {"colour": 1}},
        "modality masked: unknown option colour; known: as_input, bounded, dtype, encoder, ",
    ),
    ({"masked": {"patches": {"edge": 2}}}, "unknown option edge; known: complete, half, max_patches, size"),
    ({"twin": {"preset": "image", "patches": {"size": 2}}}, "modality twin: only masked images have patches"),
    ({"masked": {"patches": {"size": 0}}}, "masks need max_patches of at least 0"),
    ({"two words": {"preset": "image"}}, "modality two words: the name must be one word"),
    ({"keys": {"preset": "image"}}, "modality keys: the name must be one word .* no method"),
    (
        {"twin": {"preset": "image", "loss_weight": -1}},
        "loss_weight must be at least 0 and null_probability a probability",
    ),
    (
        {"twin": {"preset": "image", "null_probability": 1.1}},
        "loss_weight must be at least 0 and null_probability a probability",
    ),
    (
        {"twin": {"preset": "image", "shape": [3, 8]}},
        r"kind image needs a shape of 3 positive numbers, got \(3, 8\)",
    ),
    (
        {"twin": {"preset": "image", "encoder": "unet"}},
        "unknown encoder 'unet' for kind image: choose identity, none or a callable",
    ),
    (
        {"twin": {"preset": "image", "encoder": "clip"}},
        "unknown encoder 'clip' for kind image: choose identity, none or a callable",
    ),
    (
        {"twin": {"preset": "image", "head": "middle"}},
        "unknown head 'middle' for kind image: choose out, none",
    ),
    ({"twin": {"preset": "image", "likelihood": "categorical"}}, "unknown option likelihood"),
]


@pytest.mark.parametrize("spec, message", REFUSED, ids=[str(spec) for spec, _ in REFUSED])
def test_refused(spec, message):
    """One clear line for the user, never a traceback's worth."""
    with pytest.raises(UserError, match=message) as caught:
        parse_modalities(spec, (3, 8, 8))
    assert "\n" not in str(caught.value) and isinstance(caught.value, ValueError)


def test_impossible_modalities():
    with pytest.raises(UserError, match="unknown encoder 'identity' for kind label: choose unet, none or a"):
        LabelModality("label", (3,), encoder="identity")
    with pytest.raises(
        UserError, match="modality clip: this network has no input for a vector: use variant U"
    ):
        VectorModality("clip", (5,), encoder=lambda v: v, head="middle", as_input=True)


def test_values_are_checked():
    with pytest.raises(
        UserError, match=r"modality twin: expected values of shape \[B, 1, 4, 4\], got \[2, 1, 4, 5\]"
    ):
        IMAGE.check(th.zeros(2, 1, 4, 5))
    with pytest.raises(UserError, match="modality twin: the values contain NaN or infinity"):
        IMAGE.check(th.full((1, 1, 4, 4), float("nan")))
    for wrong in ([[0.7, 0.7, 0.0]], [[-0.1, 0.5, 0.6]]):
        with pytest.raises(UserError, match="labels must be probability vectors"):
            LABEL.check(th.tensor(wrong))
    nothing = th.zeros(1, 3)
    assert LABEL.check(nothing) is nothing
