"""What several modalities add to the U-Net: heads, soft labels, wider inputs."""

import pytest
import torch as th
import torch.nn.functional as F

from guided_diffusion.errors import UserError
from guided_diffusion.mt.modalities import LabelModality, VectorModality, parse_modalities
from guided_diffusion.mt.modality_set import ModalitySet
from guided_diffusion.unet import UNetModel
from tests.compare import agree

SHAPE = (2, 8, 8)
BOTH = parse_modalities("masked,label", SHAPE, 3)


def unet(modalities=(), in_channels=2, num_classes=3, **options):
    """A tiny network with every weight away from its initial zeros."""
    th.manual_seed(0)
    heads = ModalitySet(modalities, 2).make_heads(64, 32)
    model = UNetModel(
        8,
        in_channels,
        32,
        2,
        1,
        (),
        channel_mult=(1, 2),
        num_classes=num_classes,
        heads=heads,
        **options,
    )
    with th.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * th.randn(parameter.shape))
    return model.eval()


@pytest.fixture(scope="module")
def inputs():
    th.manual_seed(1)
    return th.randn(4, *SHAPE), th.tensor([0, 5, 500, 999])


def test_heads_leave_the_rest_alone(inputs):
    """Only `heads.` is added to the state dict, and the network's own output keeps its bits."""
    single, joint = unet(), unet(BOTH)
    added = set(joint.state_dict()) - set(single.state_dict())
    assert set(single.state_dict()) < set(joint.state_dict())
    assert added and all(name.startswith("heads.") for name in added)
    joint.load_state_dict(single.state_dict(), strict=False)
    y = th.tensor([0, 1, 2, 0])
    output, predictions = joint(*inputs, y=y)
    assert th.equal(output, single(*inputs, y=y))
    assert {name: tuple(p.shape) for name, p in predictions.items()} == {
        "masked": (4, 2, 8, 8),
        "label": (4, 3),
    }


def test_a_network_without_modalities_returns_a_tensor(inputs):
    assert isinstance(unet(num_classes=None)(*inputs), th.Tensor)


def test_output_head_is_a_second_output_layer(inputs):
    """With the output layer's weights it returns the network's output; fresh, it returns zeros, as that does."""
    model = unet(BOTH)
    model.heads["masked"].load_state_dict(model.out.state_dict(), strict=False)
    output, predictions = model(*inputs, y=th.zeros(4, 3))
    assert th.equal(output, predictions["masked"])
    fresh = UNetModel(
        8, 2, 32, 2, 1, (), channel_mult=(1, 2), heads=ModalitySet(BOTH[:1], 2).make_heads(64, 32)
    )
    assert fresh(*inputs)[1]["masked"].abs().max() == 0


def test_middle_heads():
    """One layer on the pooled middle block, or two with ReLU between."""
    vector = VectorModality("clip", (7,), encoder=lambda v: v, head="middle", hidden=16)
    heads = ModalitySet((BOTH[1], vector), 2).make_heads(middle_channels=64, last_channels=32)
    middle = th.randn(2, 64, 4, 4)
    predictions = heads(middle, th.randn(2, 32, 8, 8))
    state = dict(heads.state_dict())
    pooled = middle.mean((2, 3))
    th.testing.assert_close(
        predictions["label"], F.linear(pooled, state["label.0.weight"], state["label.0.bias"])
    )
    hidden = F.linear(pooled, state["clip.0.weight"], state["clip.0.bias"]).relu()
    assert hidden.shape == (2, 16)
    th.testing.assert_close(
        predictions["clip"], F.linear(hidden, state["clip.2.weight"], state["clip.2.bias"])
    )


def test_gaussian_heads_carry_their_variance():
    """As a buffer, so that checkpoints keep what was measured."""
    state = unet(BOTH).state_dict()
    assert state["heads.masked.variance"].tolist() == [1.0] * 32
    assert "heads.label.variance" not in state


def test_every_head_learns(inputs):
    model = unet(BOTH)
    output, predictions = model(*inputs, y=th.zeros(4, 3))
    (output.sum() + sum(p.square().sum() for p in predictions.values())).backward()
    for name, parameter in model.heads.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_soft_labels(inputs):
    """A probability vector mixes the class embeddings: one-hot is the class, zeros are no class."""
    model = unet(BOTH)
    y = th.tensor([2, 0, 1, 1])
    by_index, one_hot = model(*inputs, y=y)[0], model(*inputs, y=F.one_hot(y, 3).float())[0]
    agree(by_index, one_hot, rtol=1e-5)
    mixed = model(*inputs, y=th.full((4, 3), 1 / 3))[0]
    none = model(*inputs, y=th.zeros(4, 3))[0]
    assert (mixed - none).abs().max() > 1e-4 and (one_hot - none).abs().max() > 1e-4
    plain = unet(num_classes=None)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    agree(none, plain(*inputs), rtol=1e-5)
    probabilities = th.tensor([[0.5, 0.2, 0.3]]).repeat(4, 1)
    embedded = model._embed(inputs[1], probabilities) - model._embed(inputs[1], th.zeros(4, 3))
    expected = sum(p * model.label_emb.weight[k] for k, p in enumerate((0.5, 0.2, 0.3)))
    agree(embedded[0], expected)


def test_x_inputs(inputs):
    """X modalities widen the input by their channels; U modalities do not, and the null input is zeros."""
    x, t = inputs
    modalities = ModalitySet(parse_modalities("masked:X,label:X", SHAPE, 3), 2, num_classes=3)
    assert modalities.input_channels == 4
    assert ModalitySet(BOTH, 2, num_classes=3).input_channels == 2
    model = unet(tuple(modalities), in_channels=4)
    values = {"masked": th.randn(4, *SHAPE), "label": th.eye(4, 3)}
    shown, _ = modalities.apply(model, x, t, values)
    hidden, _ = modalities.apply(model, x, t, {})
    assert th.equal(shown, model(th.cat([x, values["masked"]], 1), t, y=values["label"])[0])
    assert th.equal(hidden, model(th.cat([x, th.zeros_like(x)], 1), t, y=th.zeros(4, 3))[0])
    assert (shown - hidden).abs().max() > 1e-3


def test_u_values_never_reach_the_input(inputs):
    modalities = ModalitySet(BOTH, 2, num_classes=3)
    model = unet(BOTH)
    values = {"masked": th.randn(4, *SHAPE), "label": th.eye(4, 3)}
    assert th.equal(modalities.apply(model, *inputs, values)[0], modalities.apply(model, *inputs, {})[0])


def test_half_precision_heads_return_the_inputs_type(inputs):
    model = unet(BOTH)
    full, _ = model(*inputs, y=th.zeros(4, 3))
    model.convert_to_fp16()
    output, predictions = model(*inputs, y=th.zeros(4, 3))
    assert {output.dtype, *(p.dtype for p in predictions.values())} == {th.float32}
    assert not th.equal(output, full)
    th.testing.assert_close(output, full, rtol=0.05, atol=0.05)


def test_refusals(inputs):
    with pytest.raises(
        ValueError, match="labels y must be given exactly when the model is class-conditional"
    ):
        unet(BOTH)(*inputs)
    with pytest.raises(
        ValueError, match="labels y must be given exactly when the model is class-conditional"
    ):
        unet(num_classes=None)(*inputs, y=th.zeros(4, dtype=th.long))
    with pytest.raises(UserError, match="modality names must differ: masked, masked"):
        ModalitySet([BOTH[0], BOTH[0]], 2)
    other = LabelModality("kind", (4,), encoder="unet", head="middle")
    with pytest.raises(
        UserError, match="the network has one class input: at most one modality can be a label"
    ):
        ModalitySet([BOTH[1], other], 2)
