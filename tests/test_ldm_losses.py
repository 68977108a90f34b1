"""The autoencoders' losses against their formulas."""

import math

import pytest
import torch as th
from torch import nn

from guided_diffusion.errors import UserValueError
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses import LPIPSWithDiscriminator
from ldm.modules.losses.adversarial import adopt_weight, hinge_d_loss, vanilla_d_loss
from ldm.modules.losses.vqperceptual import VQLPIPSWithDiscriminator, measure_perplexity
from tests.compare import agree
from tests.conftest import dev_data


class Distance(nn.Module):
    """A perceptual network of the test: mean squared difference per image, [B]."""

    def forward(self, a, b):
        return (a - b).square().mean(dim=(1, 2, 3))


PERCEPTUAL = {"target": "tests.test_ldm_losses.Distance"}


def kl_loss(**params):
    th.manual_seed(0)
    return LPIPSWithDiscriminator(**{"disc_start": 2, "perceptual_weight": 0, "disc_num_layers": 1, **params})


def vq_loss(**params):
    th.manual_seed(0)
    small = {"disc_start": 2, "perceptual_weight": 0, "disc_num_layers": 1, "disc_ndf": 8}
    return VQLPIPSWithDiscriminator(**{**small, **params})


@pytest.fixture
def case():
    """Images, their reconstructions by a last layer, the posterior of the latents."""
    th.manual_seed(1)
    inputs, features = th.rand(2, 3, 16, 16) * 2 - 1, th.rand(2, 4, 16, 16)
    last = nn.Conv2d(4, 3, 1)
    posterior = DiagonalGaussianDistribution(th.randn(2, 4, 4, 4))
    return inputs, last(features), posterior, last.weight


def test_discriminator_losses():
    real, fake = th.tensor([2.0, 0.5, -1.0]), th.tensor([-3.0, 0.0, 1.0])
    hinge = 0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3)
    assert hinge_d_loss(real, fake).item() == pytest.approx(hinge, rel=1e-5)
    vanilla = -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean()) / 2
    assert vanilla_d_loss(real, fake).item() == pytest.approx(vanilla.item(), rel=1e-5)
    assert [adopt_weight(0.7, step, threshold=3) for step in (2, 3, 4)] == [0.0, 0.7, 0.7]


def test_the_kl_loss_is_its_formula(case):
    """Sum over an image of |x - y| / s + log s with perceptual distance, KL in nats; before the
    discriminator."""
    inputs, output, posterior, last = case
    loss = kl_loss(kl_weight=0.1, logvar_init=0.5, perceptual_weight=0.3, perceptual_config=PERCEPTUAL)
    total, log = loss(inputs, output, posterior, 0, 1, last_layer=last)
    nll = 0.0
    for x, y in zip(inputs, output, strict=True):
        distance = 0.3 * (x - y).square().mean()
        nll += (((x - y).abs() + distance) / math.exp(0.5) + 0.5).sum() / 2
    mean, logvar = posterior.mean, posterior.logvar
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / 2
    assert th.allclose(total, nll + 0.1 * kl, rtol=1e-5)
    assert log["train/nll_loss"] == pytest.approx(nll.item(), rel=1e-5)
    assert log["train/kl_loss"] == pytest.approx(kl.item(), rel=1e-5)
    assert set(log) == {
        f"train/{key}"
        for key in "total_loss logvar kl_loss nll_loss rec_loss d_weight disc_factor g_loss".split()
    }
    weights = th.tensor([2.0, 0.0]).view(2, 1, 1, 1)
    weighted, _ = loss(inputs, output, posterior, 0, 1, last_layer=last, weights=weights)
    only_first, _ = loss(inputs[:1], output[:1], posterior, 0, 1, last_layer=last)
    kls = 0.1 * kl, 0.1 * 2 * kl  # of a batch of 1, the same posterior weighs twice
    agree(weighted - kls[0], only_first - kls[1], rtol=1e-5, floor=1e-6 * weighted.item())


def test_the_adversary_is_balanced_by_gradients(case):
    """d_weight = disc_weight * |grad nll| / (|grad g| + 1e-4) at the last layer, found here by
    differentiating each term by itself."""
    inputs, output, posterior, last = case
    loss = kl_loss(disc_weight=0.5, disc_factor=0.8, kl_weight=0.0)
    plain, _ = loss(inputs, output, posterior, 0, 1, last_layer=last)
    total, log = loss(inputs, output, posterior, 0, 2, last_layer=last)
    g_loss = -loss.discriminator(output).mean()
    norms = [th.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (plain, g_loss)]
    expected = 0.5 * norms[0] / (norms[1] + 1e-4)
    assert log["train/d_weight"] == pytest.approx(expected.item(), rel=1e-4)
    assert log["train/disc_factor"] == pytest.approx(0.8)
    assert th.allclose(total, plain + expected * 0.8 * g_loss, rtol=1e-5)
    with th.no_grad():  # validation: no gradient, no balance
        assert loss(inputs, output, posterior, 0, 2, last_layer=last, split="val")[1]["val/d_weight"] == 0


def test_the_discriminator_begins_at_its_step(case):
    inputs, output, posterior, last = case
    loss = kl_loss(disc_loss="vanilla", disc_factor=0.5)
    before, _ = loss(inputs, output, posterior, 1, 1)
    assert before == 0 and not loss.adversarial_at(1) and loss.adversarial_at(2)
    after, log = loss(inputs, output, posterior, 1, 2)
    real, fake = loss.discriminator(inputs), loss.discriminator(output)
    assert th.allclose(after, 0.5 * vanilla_d_loss(real, fake), rtol=1e-5)
    assert log["train/logits_real"] == pytest.approx(real.mean().item(), rel=1e-5)
    after.backward()
    assert last.grad is None and all(p.grad is not None for p in loss.discriminator.parameters())


def test_the_vq_loss_is_its_formula(case):
    """A mean over elements; l2; the codebook's loss; its use."""
    inputs, output, _, last = case
    loss = vq_loss(pixel_loss="l2", codebook_weight=0.4, n_classes=5, pixelloss_weight=2.0)
    indices = th.tensor([0, 0, 3, 3])
    total, log = loss(th.tensor(0.7), inputs, output, 0, 1, last_layer=last, predicted_indices=indices)
    nll = 2 * (inputs - output).square().mean()
    assert th.allclose(total, nll + 0.4 * 0.7, rtol=1e-5)
    assert log["train/quant_loss"] == pytest.approx(0.7) and log["train/p_loss"] == 0
    assert (log["train/perplexity"].item(), log["train/cluster_usage"]) == (pytest.approx(2.0, rel=1e-4), 2)
    assert measure_perplexity(th.arange(8), 8)[0] == pytest.approx(8.0, rel=1e-4)


def test_a_condition_is_seen_by_the_discriminator(case):
    inputs, output, posterior, _ = case
    loss = kl_loss(disc_conditional=True, disc_in_channels=4)
    cond = th.zeros(2, 1, 16, 16)
    first = loss(inputs, output, posterior, 1, 5, cond=cond)[0]
    assert loss(inputs, output, posterior, 1, 5, cond=cond + 1)[0] != first
    with pytest.raises(UserValueError, match="disc_conditional: true needs a condition"):
        loss(inputs, output, posterior, 1, 5)
    with pytest.raises(UserValueError, match="takes no condition"):
        kl_loss()(inputs, output, posterior, 1, 5, cond=cond)


def test_keys_are_those_of_released_checkpoints():
    """KL-f8's loss, as listed in its checkpoint (VGG-16's LPIPS, three layers of discriminator, ActNorm
    aside)."""
    state = kl_loss(disc_num_layers=3).state_dict()
    assert state["logvar"].shape == ()
    assert state["discriminator.main.0.weight"].shape == (64, 3, 4, 4)
    assert state["discriminator.main.3.running_var"].shape == (128,)
    assert state["discriminator.main.11.weight"].shape == (1, 512, 4, 4)
    assert "discriminator.main.3.loc" in kl_loss(use_actnorm=True, disc_num_layers=2).state_dict()


def test_lpips_with_given_weights(case):
    """Keys of the released files, the distance itself, frozen; SqueezeNet's weights."""
    path = str(dev_data("lpips_squeeze.pt"))
    config = {"target": "evaluations.lpips.load_lpips", "params": {"net": "squeeze", "weights": [path]}}
    loss = kl_loss(perceptual_weight=0.5, perceptual_config=config, kl_weight=0.0)
    names = loss.state_dict()
    assert names["perceptual_loss.scaling_layer.shift"].flatten().tolist() == pytest.approx(
        [-0.03, -0.088, -0.188]
    )
    assert "perceptual_loss.net.slice1.0.weight" in names and "perceptual_loss.lin0.model.1.weight" in names
    assert not any(p.requires_grad for p in loss.perceptual_loss.parameters())
    images = th.rand(2, 3, 32, 32)
    blurred = nn.functional.avg_pool2d(images, 3, 1, 1).requires_grad_()
    posterior = DiagonalGaussianDistribution(th.zeros(2, 4, 2, 2))
    total, log = loss(images, blurred, posterior, 0, 0)
    distance = loss.perceptual_loss(images, blurred)
    mean = (images - blurred).abs().mean() + 0.5 * distance.mean()
    assert distance.min() > 0 and log["train/rec_loss"] == pytest.approx(mean.item(), rel=1e-5)
    total.backward()
    assert blurred.grad.abs().sum() > 0


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserValueError, match="hinge, vanilla; got 'wgan'"):
        kl_loss(disc_loss="wgan")
    with pytest.raises(UserValueError, match="pixel_loss is l1 or l2, got 'l3'"):
        vq_loss(pixel_loss="l3")
    with pytest.raises(UserValueError, match="perceptual_loss is lpips"):
        vq_loss(perceptual_loss="clips")
    config = {"target": "evaluations.lpips.load_lpips", "params": {"weights": [str(tmp_path / "no.pt")]}}
    with pytest.raises(UserValueError, match=r"perceptual_config.*no.pt does not exist"):
        kl_loss(perceptual_weight=1.0, perceptual_config=config)
