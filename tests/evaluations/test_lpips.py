"""LPIPS against numbers of the lpips package."""

import numpy as np
import pytest
import torch

from evaluations.lpips import BACKBONES, LPIPS, load_lpips, lpips_distances
from guided_diffusion.errors import UserError
from tests.compare import agree

from ..conftest import dev_data
from .conftest import sample_images

# Measured with lpips 0.1.4 on the weights of `filled` and the images of `waves`.
GOLDEN = {"alex": [0.006505, 0.007523], "vgg": [0.007931, 0.005486], "squeeze": [0.022283, 0.023785]}


def filled(net):
    """LPIPS with weights that need no random generator, all linear weights positive."""
    model = LPIPS(net)
    for index, (name, tensor) in enumerate(sorted(model.state_dict().items())):
        wave = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) * 0.37 + index).view(tensor.shape)
        fan_in = tensor[0].numel() if tensor.ndim > 1 else 100
        tensor.copy_(wave.abs() * 0.1 if name.startswith("lin") else wave * (3 / fan_in) ** 0.5)
    return model


def waves(size=64):
    """Two pairs of images [2, 3, size, size] in [-1, 1]."""
    a = torch.sin(torch.arange(2 * 3 * size * size, dtype=torch.float64) * 0.013).view(2, 3, size, size)
    return a.float(), (a * torch.linspace(0.2, 1, size)).float()


@pytest.mark.parametrize("net", BACKBONES)
def test_distance_is_that_of_the_lpips_package(net):
    a, b = waves()
    assert filled(net)(a, b).tolist() == pytest.approx(GOLDEN[net], rel=1e-4)


def test_squeezenet_with_the_published_weights():
    model = load_lpips("squeeze", [dev_data("lpips_squeeze.pt")], "cpu")
    pairs = np.load(dev_data("lpips_pairs.npz"))
    assert lpips_distances(model, pairs["a"], pairs["b"]) == pytest.approx(pairs["distance"], rel=1e-5)


@pytest.mark.parametrize("net", BACKBONES)
def test_a_image_has_no_distance_to_itself_and_both_orders_agree(net):
    model = filled(net)
    a, b = sample_images(3, size=32), sample_images(3, size=32, seed=1)
    assert lpips_distances(model, a, a).tolist() == [0, 0, 0]
    agree(lpips_distances(model, a, b), lpips_distances(model, b, a), rtol=1e-5)
    assert (lpips_distances(model, a, b) > 0).all()
    assert lpips_distances(model, a, b, batch_size=2) == pytest.approx(lpips_distances(model, a, b), rel=1e-5)


@pytest.mark.parametrize("net", BACKBONES)
def test_weights_come_in_one_file_or_as_published_in_two(net, tmp_path):
    model = filled(net)
    state = model.state_dict()
    torch.save({"scaling_layer.shift": torch.zeros(1), **state}, tmp_path / "all.pt")
    torchvision = {
        f"features.{name.split('.', 2)[2]}": value for name, value in state.items() if name.startswith("net.")
    }
    torch.save({**torchvision, "classifier.1.weight": torch.zeros(2)}, tmp_path / "backbone.pth")
    torch.save(
        {name: value for name, value in state.items() if name.startswith("lin")}, tmp_path / "linear.pth"
    )
    a, b = waves()
    for files in (["all.pt"], ["backbone.pth", "linear.pth"]):
        loaded = load_lpips(net, [tmp_path / file for file in files], "cpu")
        assert torch.equal(loaded(a, b), model(a, b))
        assert set(loaded.sha256) == set(files)
    with pytest.raises(UserError, match=r"is not LPIPS \w+ v0.1: lin0.model.1.weight .* is missing"):
        load_lpips(net, [tmp_path / "backbone.pth"], "cpu")


def test_gradients_flow_to_the_images():
    a, b = waves()
    filled("squeeze")(a.requires_grad_(), b).sum().backward()
    assert a.grad.abs().sum() > 0


def test_mistakes_are_named(tmp_path):
    model = filled("alex")
    with pytest.raises(UserError, match="equal-sized"):
        lpips_distances(model, sample_images(2, size=32), sample_images(3, size=32))
    with pytest.raises(UserError, match="equal-sized .* float64"):
        lpips_distances(model, sample_images(2, size=32), sample_images(2, size=32) / 255)
    with pytest.raises(UserError, match="32 pixels or more"):
        lpips_distances(model, sample_images(2), sample_images(2))
    with pytest.raises(UserError, match="unknown LPIPS network resnet: choose alex, vgg, squeeze"):
        LPIPS("resnet")
    with pytest.raises(UserError, match="no.pt does not exist"):
        load_lpips("alex", [tmp_path / "no.pt"])
