"""E: the label read off the predicted image by ADM's classifier."""

from dataclasses import replace

import pytest
import torch as th

from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import ModelMeanType
from guided_diffusion.mt.denoiser import JointDenoiser
from guided_diffusion.mt.heads import joint_gradient, predicted_image
from guided_diffusion.mt.modalities import one_hot, parse_modalities
from guided_diffusion.mt.modality_set import Batch
from guided_diffusion.mt.model import JointModel, mt_defaults
from guided_diffusion.script_util import create_classifier
from guided_diffusion.seeding import PerSample
from tests.mt_driver import in_process
from tests.oracle import process

SHAPE, CLASSES = (1, 8, 8), 3
SMALL = {"width": 64, "depth": 1, "attention_resolutions": "4", "channel_mult": "1"}


def joint(variant="U", detach=True, rescale=False, loss_weight=0.1):
    """A model with head E whose every weight matters."""
    th.manual_seed(0)
    label = {"variant": variant, "head": "classifier", "classifier": {**SMALL, "detach": detach}}
    flags = dict(
        image_size=8, image_channels=1, num_channels=32, num_res_blocks=1, channel_mult="1,2",
        attention_resolutions="", num_head_channels=32, num_classes=CLASSES, noise_schedule="cosine",
        rescale_timesteps=rescale, modalities={"label": {**label, "loss_weight": loss_weight}},
    )  # fmt: skip
    model = JointModel.from_flags({**mt_defaults(), **flags})
    with th.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.03 * th.randn(parameter.shape))
    model.network.eval()
    model.modalities.refresh_codes(model.network, th.zeros(1, *model.shape))
    return model


def labelled(count=4):
    th.manual_seed(1)
    images = th.rand(count, *SHAPE) * 2 - 1
    return images, Batch({"label": one_hot(th.arange(count) % CLASSES, CLASSES)}), th.randn(count, *SHAPE)


def test_head_is_adms_classifier_under_its_names():
    """Its state dict is EncoderUNetModel's; a classifier's weights load into it and give its logits."""
    model = joint()
    head = model.network.heads["label"]
    flags = {
        **model.modalities["label"].classifier.flags,
        "classifier_use_fp16": False,
        "num_classes": CLASSES,
    }
    classifier = create_classifier(**flags).eval()
    with th.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(0.03 * th.randn(parameter.shape))
    prefix = "heads.label."
    names = [n.removeprefix(prefix) for n in model.network.state_dict() if n.startswith(prefix)]
    assert names == list(classifier.state_dict())
    head.load_state_dict(classifier.state_dict())
    images, t = th.rand(2, *SHAPE), th.tensor([3, 700])
    assert th.equal(head(images, t), classifier(images, t))


def test_paper_defaults():
    (label,) = parse_modalities({"label": {"head": "classifier"}}, (3, 64, 64), 1000)
    flags = label.classifier.flags
    assert (flags["classifier_depth"], flags["classifier_attention_resolutions"]) == (4, "32,16,8")
    assert flags["classifier_pool"] == "attention" and flags["image_size"] == 64
    assert flags["classifier_use_scale_shift_norm"] and flags["classifier_resblock_updown"]
    assert label.loss_weight == 0.1 and not label.classifier.detach


@pytest.mark.parametrize("step", [0, 300, 999])
def test_predicted_image(step):
    """(z - sqrt(1 - abar) eps) / sqrt(abar), clipped, the variance's channels left out; or the output itself."""
    diffusion = process()
    z, output = th.randn(2, *SHAPE), th.randn(2, 2, 8, 8)
    abar = float(diffusion.alphas_cumprod[step])
    expected = ((z - (1 - abar) ** 0.5 * output[:, :1]) / abar**0.5).clamp(-1, 1)
    got = predicted_image(diffusion, output, z, th.full((2,), step))
    # At t = T-1 abar is 1e-9: float32 knows the sign of what is clipped, and little of the rest.
    assert ((got - expected).abs() < 1e-3).float().mean() > 0.98
    diffusion.model_mean_type = ModelMeanType.START_X
    assert th.equal(predicted_image(diffusion, output, z, th.full((2,), step)), output[:, :1].clamp(-1, 1))


@pytest.mark.parametrize("rescale", [False, True])
def test_loss_is_the_cross_entropy_of_the_predicted_image(rescale):
    """Read off z_t alone: no shift is subtracted, so that the true label cannot be seen in what the noise
    prediction gets wrong."""
    model = joint(rescale=rescale)
    images, batch, noise = labelled()
    t = th.tensor([0, 200, 500, 800])
    terms = model.losses(replace(batch, images=images), t, noise=noise, unshifted_probability=0.0).terms
    z = model.diffusion.q_sample(images, t, noise, model.modalities.encode(model.network, batch, images))
    timesteps = t.float() if rescale else t  # 1000 steps: the same numbers
    eps, _ = model.network(z, timesteps, y=th.zeros(4, CLASSES))
    abar = th.from_numpy(model.diffusion.alphas_cumprod)[t].float().reshape(4, 1, 1, 1)
    image = ((z - (1 - abar).sqrt() * eps) / abar.sqrt()).clamp(-1, 1)
    logits = model.network.heads["label"](image, timesteps)
    expected = -(logits.log_softmax(1) * batch.values["label"]).sum(1)
    th.testing.assert_close(terms["KL_label"], expected, rtol=1e-3, atol=1e-4)
    th.testing.assert_close(terms["loss"], terms["mse"] + 0.1 * terms["KL_label"])
    # Sampling reads the same, whether a label is given or not.
    for given in (None, batch.values):
        out = JointDenoiser(model.modalities, model.network, given, strength=0.0)(z, timesteps)
        th.testing.assert_close(out.predictions["label"], logits, rtol=1e-3, atol=1e-3)


def gradients(detach, loss_weight=0.1):
    model = joint(detach=detach, loss_weight=loss_weight)
    images, batch, noise = labelled()
    t = th.tensor([20, 200, 400, 600])
    terms = model.losses(replace(batch, images=images), t, noise=noise, unshifted_probability=0.0).terms
    terms["loss"].mean().backward()
    named = model.network.named_parameters()
    return {name: th.zeros_like(p) if p.grad is None else p.grad for name, p in named}


def test_gradients_reach_what_they_should():
    """Detached, the label trains its classifier and leaves the U-Net's gradient as it was; else both."""
    without, detached, through = gradients(True, 0.0), gradients(True), gradients(False)
    heads = {name for name in without if name.startswith("heads.")}
    assert all(without[name].abs().max() == 0 for name in heads)
    assert sum(float(detached[name].abs().max()) > 0 for name in heads) > 0.9 * len(heads)
    unet = {n for n in set(without) - heads if not n.startswith(("label_emb.", "presence."))}
    assert all(th.equal(without[name], detached[name]) for name in unet)
    assert sum(not th.equal(without[name], through[name]) for name in unet) > 0.9 * len(unet)
    assert all(th.equal(detached[name], through[name]) for name in heads)


def test_the_way_back_into_the_network_does_not_multiply():
    """d eps of the label's loss is that of the image at most: sqrt(1 / abar_t - 1) is divided out where above 1."""
    diffusion = process()
    eps, t = th.zeros(3, *SHAPE, requires_grad=True), th.tensor([10, 500, 950])
    z = 0.001 * th.randn(3, *SHAPE)  # so that nothing is clipped
    image = predicted_image(diffusion, eps, z, t)
    plain = th.autograd.grad(image.sum(), eps, retain_graph=True)[0].abs().amax((1, 2, 3))
    joint = th.autograd.grad(joint_gradient(diffusion, image, t).sum(), eps)[0].abs().amax((1, 2, 3))
    assert plain[2] > 10 and joint.tolist() == pytest.approx([float(plain[0]), 1.0, 1.0], rel=1e-4)
    th.testing.assert_close(joint_gradient(diffusion, image, t), image)


def test_given_label_conditions_through_the_predicted_image():
    """grad_z log p(label | z_t) differentiates the U-Net too, though the loss does not: finite differences."""
    model = joint(detach=True)
    images, batch, noise = labelled(2)
    t = th.full((2,), 300)
    z = model.diffusion.q_sample(images, t, noise)
    score = JointDenoiser(model.modalities, model.network, batch.values, 2.0)(z, t).score

    def log_p(z):
        with th.no_grad():
            _, predictions = model.modalities.apply(model.network, z, t, {})
        return (predictions["label"].double().log_softmax(1) * batch.values["label"]).sum()

    direction = score / score.norm()  # the slope along it is its length
    h = 1e-2
    slope = float(log_p(z + h * direction) - log_p(z - h * direction)) / (2 * h)
    assert 2 * slope == pytest.approx(float(score.norm()), rel=0.05) and score.abs().max() > 0


def test_network_may_see_the_label_too():
    """Variant X: a given label changes the noise and, through the image, what E reads; sampling works."""
    model = joint("X")
    images, batch, noise = labelled()
    t = th.full((4,), 300)
    z = model.diffusion.q_sample(images, t, noise)
    shown, _ = model.modalities.apply(model.network, z, t, batch.values)
    hidden, _ = model.modalities.apply(model.network, z, t, {})
    assert (shown - hidden).abs().max() > 1e-3
    assert JointDenoiser(model.modalities, model.network, batch.values)(z, t).score is None
    for given in (None, batch.values):
        sample = model.sample(PerSample(range(4)), 3, given=given)
        assert sample.images.isfinite().all()
        assert th.allclose(sample.values["label"].sum(1), th.ones(4), atol=1e-5)


def test_prediction_from_an_image_averages_the_times():
    model = joint()
    images, _, _ = labelled()
    one, two, both = (
        model.predict(images, times=times, random=PerSample(range(4)))["label"]
        for times in ((0,), (0, 0), (0, 300))
    )  # fmt: skip
    assert one.shape == (4, CLASSES) and th.allclose(one.sum(1), th.ones(4), atol=1e-5)
    th.testing.assert_close(one, two, rtol=0, atol=0.02)  # hardly any noise at t = 0
    assert not th.allclose(one, both, atol=1e-4)


def test_refusals():
    model = joint()
    model.modalities.process = None
    with pytest.raises(UserError, match="give ModalitySet its process"):
        model.modalities.apply(model.network, th.zeros(1, *SHAPE), th.zeros(1).long(), {})
    for options, message in (
        ({"classifier": {"width": 64}}, "options of the classifier need head: classifier"),
        ({"head": "classifier", "classifier": {"pools": 1}}, "unknown option pools; known: attention_res"),
        ({"head": "classifier", "encoder": "clip"}, "choose unet, none or a callable"),
        ({"head": "none"}, "the network must see it"),
    ):
        with pytest.raises(UserError, match=message):
            parse_modalities({"label": options}, SHAPE, CLASSES)


def test_export(tmp_path, capsys):
    """The file has the averaged head's weights and the flags with which classifier_train.py continues."""
    from tests.mt_driver import digits, train

    data = digits(tmp_path / "digits.npz", 64)
    config = tmp_path / "e.yaml"
    config.write_text(
        "modalities: {label: {head: classifier, classifier: {width: 64, depth: 1, "
        'attention_resolutions: "4", channel_mult: "1"}}}\n'
    )
    train(data, tmp_path / "run", "--config", config, "--iterations", 2)
    out = tmp_path / "out" / "classifier.pt"
    capsys.readouterr()
    in_process("export_classifier", "--model_path", tmp_path / "run", "--out", out)
    printed = capsys.readouterr().out.split()
    state = th.load(out, weights_only=True)
    head = JointModel.load(str(tmp_path / "run")).network.heads["label"]
    assert list(state) == list(head.state_dict())
    assert all(th.equal(state[name], value) for name, value in head.state_dict().items())
    flags = (
        "--resume_checkpoint", out, "--data_dir", data, "--log_dir", tmp_path / "fine", "--lr", 0,
        "--iterations", 1, "--batch_size", 4, "--seed", 0, "--num_workers", 0,
    )  # fmt: skip
    in_process("classifier_train", *printed, *flags)
    (last,) = (tmp_path / "fine").glob("model*.pt")
    finetuned = th.load(last, weights_only=True)  # with a learning rate of 0: what it began with
    assert all(th.equal(finetuned[name], state[name]) for name in state)
