"""Weights of timesteps and tasks, against their formulas, and from the command line."""

import itertools
import math

import pytest
import torch as th

from guided_diffusion.checkpoint_util import load_complete
from guided_diffusion.mt.modality_set import Batch
from guided_diffusion.mt.model import JointModel, mt_defaults
from guided_diffusion.mt.weighting import Surgery, Weighting, timestep_weights, without_conflicts
from guided_diffusion.seeding import PerSample
from tests.mt_driver import MODEL, TRAIN, digits, refusal, run, same, train

FLAGS = dict(
    image_size=8, image_channels=1, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="4",
    num_head_channels=32, diffusion_steps=40, noise_schedule="cosine", num_classes=10,
)  # fmt: skip
WEIGHTING = dict(
    loss_weighting="none", p2_k=1.0, p2_gamma=1.0, min_snr_gamma=5.0, task_weighting="fixed", image_weight=1.0, task_intervals=1
)  # fmt: skip


def close(actual, expected, tolerance):
    return th.allclose(actual, expected, rtol=tolerance, atol=tolerance)


def joint(**changes):
    th.manual_seed(0)
    return JointModel.from_flags({**mt_defaults(), **FLAGS, **changes})


def batch(model, count=6):
    images = th.rand(count, 1, 8, 8, generator=th.Generator().manual_seed(1)) * 2 - 1
    labels = th.eye(10)[th.arange(count)]
    return model.derived(images, Batch({"label": labels}), PerSample(range(count)))


@pytest.mark.parametrize("predicts", ["noise", "image"])
def test_weights_of_timesteps_are_those_of_the_papers(predicts):
    """P2: 1 / (k + SNR)^gamma of the noise's error; min-SNR: min(SNR, 5) / SNR. The image's counts SNR times as much."""
    diffusion = joint(predict_xstart=predicts == "image").diffusion
    p2 = timestep_weights(diffusion, "p2", p2_k=2.0, p2_gamma=0.5)
    min_snr = timestep_weights(diffusion, "min_snr")
    reached = set()
    for t in range(40):
        abar = float(diffusion.alphas_cumprod[t])
        snr = abar / (1 - abar)
        reached.add(snr > 5)
        unit = snr if predicts == "image" else 1.0
        assert math.isclose(float(p2[t]), unit / math.sqrt(2 + snr), rel_tol=1e-5)
        assert math.isclose(float(min_snr[t]), unit * min(snr, 5) / snr, rel_tol=1e-5)
    assert reached == {True, False}
    assert th.equal(timestep_weights(diffusion, "none"), th.ones(40))


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_the_weight_multiplies_the_squared_error_alone(learn_sigma):
    model = joint(learn_sigma=learn_sigma)
    terms = model.losses(
        batch(model), t := th.tensor([0, 3, 10, 20, 30, 39]), noise=th.zeros(6, 1, 8, 8)
    ).terms
    weighting = Weighting(model.modalities, model.diffusion, {**WEIGHTING, "loss_weighting": "p2"})
    snr = th.from_numpy(model.diffusion.alphas_cumprod / (1 - model.diffusion.alphas_cumprod))[t].float()
    expected = terms["loss"] - terms["mse"] + terms["mse"] / (1 + snr)
    assert close(sum(weighting(terms, t)), expected, 1e-5)
    plain = Weighting(model.modalities, model.diffusion, WEIGHTING)
    assert close(sum(plain(terms, t)), terms["loss"], 1e-5)
    alone = Weighting(model.modalities, model.diffusion, {**WEIGHTING, "image_weight": 0.0})
    assert close(sum(alone(terms, t)), 0.1 * (terms["KL_masked"] + terms["KL_label"]), 1e-5)


def test_log_variances_begin_with_lambda_and_end_at_the_logarithm_of_the_losses():
    """exp(-s) L + s is least at s = log L; a missing value's loss of 0 does not count."""
    model = joint()
    flags = {**WEIGHTING, "task_weighting": "uncertainty", "task_intervals": 2}
    weighting = Weighting(model.modalities, model.diffusion, flags)
    assert list(weighting.lambdas) == ["image.0", "image.1", "masked", "label"]
    assert close(weighting.log_variances.exp(), th.tensor([1.0, 1.0, 10.0, 10.0]), 1e-5)
    mse = th.tensor([0.5, 0.5, 2.0, 2.0])
    terms = dict(loss=mse, mse=mse, KL_masked=th.full((4,), 0.2), KL_label=th.tensor([2.3, 0.0, 2.3, 2.3]))
    t = th.tensor([0, 19, 20, 39])
    for _ in range(3000):
        losses = weighting(terms, t)
        weighting.learn()
    assert close(weighting.log_variances, th.tensor([0.5, 2.0, 0.2, 2.3]).log(), 1e-3)
    assert close(losses[1], th.tensor([0.0, 0.0, 1.0, 1.0]), 1e-2)


def test_conflicts_of_gradients_are_removed():
    """(1, 0) and (-1, 1): each loses its part along the other, (.5, .5) and (0, 1); without a conflict nothing changes."""
    order = th.Generator().manual_seed(0)
    gradients = th.tensor([[1.0, 0.0], [-1.0, 1.0]])
    assert close(without_conflicts(gradients @ gradients.T, order) @ gradients, th.tensor([0.5, 1.5]), 1e-6)
    assert th.equal(without_conflicts(th.ones(3, 3) + th.eye(3), order), th.ones(3))


def test_three_gradients_are_projected_one_after_another():
    """As the paper's algorithm has it, in one of the orders that can be drawn."""
    g = th.randn(3, 4, generator=th.Generator().manual_seed(2))
    found = without_conflicts(g @ g.T, th.Generator().manual_seed(0)) @ g
    sums = []
    for orders in itertools.product(itertools.permutations(range(3)), repeat=3):
        total = th.zeros(4)
        for i, order in enumerate(orders):
            own = g[i].clone()
            for j in order:
                if j != i and (dot := own @ g[j]) < 0:
                    own = own - dot / (g[j] @ g[j]) * g[j]
            total += own
        sums.append(total)
    assert not close(found, g.sum(dim=0), 1e-3)
    assert any(close(found, total, 1e-4) for total in sums)


def test_heads_keep_their_own_gradient_and_what_no_task_reaches_has_none():
    network = th.nn.ModuleDict(
        {"heads": th.nn.Linear(2, 1, bias=False), "body": th.nn.Linear(2, 2, bias=False)}
    )
    network["idle"] = th.nn.Linear(1, 1, bias=False)
    surgery = Surgery(network)
    features = network["body"](th.tensor([1.0, 2.0]))
    surgery.add([features.sum(), -features.sum() + network["heads"](features).sum()])
    own = network["heads"].weight.detach()[0]
    g = th.stack([th.ones(2), own - 1])[:, :, None] * th.tensor([1.0, 2.0])
    flat = g.flatten(1)
    surgery.finish(0)
    assert close(network["heads"].weight.grad[0], features.detach(), 1e-6)
    expected = without_conflicts(flat @ flat.T, th.Generator()) @ flat
    assert float(flat[0] @ flat[1]) < 0 and close(network["body"].weight.grad.flatten(), expected, 1e-5)
    assert network["idle"].weight.grad is None


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return digits(tmp_path_factory.mktemp("data") / "digits.npz", unlabelled=10)


@pytest.mark.parametrize("kind", ["uncertainty", "pcgrad"])
def test_a_resumed_run_is_the_straight_one_to_the_bit(data, tmp_path, kind):
    own = (
        "--task_weighting",
        kind,
        "--task_intervals",
        2,
        "--loss_weighting",
        "min_snr",
        "--save_interval",
        2,
    )
    train(data, tmp_path / "straight", "--iterations", 4, *own)
    train(data, tmp_path / "resumed", "--iterations", 2, *own)
    train(data, tmp_path / "resumed", "--iterations", 4, *own)
    ends = [load_complete(str(tmp_path / name / "checkpoint000004.pt")) for name in ("straight", "resumed")]
    for end in ends:
        del end["config"]
    assert same(*ends)
    if kind == "uncertainty":
        learned = ends[0]["extra"]["log_variances"]
        assert list(learned) == ["image.0", "image.1", "masked", "label"]
        assert learned["masked"] not in (0.0, -math.log(0.1))


@pytest.mark.parametrize("kind", ["uncertainty", "pcgrad"])
def test_two_ranks_are_one_with_twice_the_batch(data, tmp_path, kind):
    ends = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        run(
            ranks, "mt_image_train", *MODEL, *TRAIN, "--data_dir", data, "--log_dir", folder, "--sample_steps", 0,
            "--num_channels", 64, "--channel_mult", "1,1", "--lr", 3e-5, "--batch_size", 8 // ranks,
            "--iterations", 3, "--task_weighting", kind,
        )  # fmt: skip
        ends.append(load_complete(str(folder / "checkpoint000003.pt")))
    one, two = ends
    weights = [name for name in one["model"] if not name.startswith("codes.") and not name.endswith(".share")]
    assert max(float((one["model"][n] - two["model"][n]).abs().max()) for n in weights) < 1e-5
    for name, value in one["extra"].get("log_variances", {}).items():
        assert abs(value - two["extra"]["log_variances"][name]) < 1e-5


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--loss_weighting", "p3"), "--loss_weighting must be one of none, p2, min_snr"),
        (("--min_snr_gamma", 0), "--min_snr_gamma must be above 0"),
        (("--loss_weighting", "p2", "--use_kl", True), "cannot be used with --use_kl"),
        (("--task_intervals", 2), "--task_intervals needs --task_weighting"),
        (("--task_weighting", "pcgrad", "--precision", "fp16"), "not with --precision fp16"),
        (("--task_weighting", "pcgrad", "--compile", "true"), "not with --compile true"),
        (("--task_weighting", "uncertainty", "--modalities", ""), "needs two tasks"),
        (("--image_weight", 0, "--modalities", ""), "no other loss"),
    ],
)
def test_what_cannot_be_weighted_is_refused(data, tmp_path, capsys, flags, message):
    command = (*MODEL, *TRAIN, "--data_dir", data, "--log_dir", tmp_path, *flags)
    assert message in refusal(capsys, "mt_image_train", *command)
