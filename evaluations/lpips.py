"""LPIPS (Zhang et al. 2018), version 0.1: perceptual distance of two images. AlexNet, VGG-16 and SqueezeNet 1.1.

The activations of a network trained on ImageNet are normalised to unit length at every position; the squared
differences are weighted per channel by the learned linear layers, averaged over positions and summed over layers.
Parameter names are those of richzhang/PerceptualSimilarity.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from evaluations.distributed import choose_device
from evaluations.weights import PublishedFile, existing_file, fetch, sha256_of
from guided_diffusion import dist_util
from guided_diffusion.errors import UserValueError

# Inputs in [-1, 1] are brought to ImageNet's mean and standard deviation, here in that scale.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-10
SMALLEST = 32  # pixels; AlexNet's pools leave nothing of smaller images
_TORCHVISION = "https://download.pytorch.org/models/"
_PERCEPTUAL_SIMILARITY = (
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/"
    "082bb24f84c091ea94de2867d34c4544f68e0963/lpips/weights/v0.1/"
)


@dataclass(frozen=True)
class Backbone:
    """One of the three networks: where its slices end among torchvision's `features`, and the published weights."""

    ends: tuple[int, ...]
    channels: tuple[int, ...]  # after each slice
    network: PublishedFile
    linear: PublishedFile


BACKBONES = {
    "alex": Backbone(
        (2, 5, 8, 10, 12),
        (64, 192, 384, 256, 256),
        PublishedFile(
            _TORCHVISION + "alexnet-owt-7be5be79.pth",
            "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        ),
        PublishedFile(
            _PERCEPTUAL_SIMILARITY + "alex.pth",
            "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
        ),
    ),
    "vgg": Backbone(
        (4, 9, 16, 23, 30),
        (64, 128, 256, 512, 512),
        PublishedFile(
            _TORCHVISION + "vgg16-397923af.pth",
            "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        ),
        PublishedFile(
            _PERCEPTUAL_SIMILARITY + "vgg.pth",
            "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
        ),
    ),
    "squeeze": Backbone(
        (2, 5, 8, 10, 11, 12, 13),
        (64, 128, 256, 384, 384, 512, 512),
        PublishedFile(
            _TORCHVISION + "squeezenet1_1-b8a52dc0.pth",
            "b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b",
        ),
        PublishedFile(
            _PERCEPTUAL_SIMILARITY + "squeeze.pth",
            "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76",
        ),
    ),
}


class LPIPS(nn.Module):
    """The distance, with weights yet to be loaded (`load_lpips` does both)."""

    def __init__(self, net: str = "alex"):
        super().__init__()
        if net not in BACKBONES:
            raise UserValueError(f"unknown LPIPS network {net}: choose {', '.join(BACKBONES)}")
        self.net_name, backbone = net, BACKBONES[net]
        self.sha256: dict[str, str] = {}  # checksum by file name of the weights in use
        layers = {"alex": _alexnet, "vgg": _vgg16, "squeeze": _squeezenet}[net]()
        self.net = nn.Module()
        start = 0
        for number, end in enumerate(backbone.ends, 1):
            # Every layer keeps its number in `features`, so that published weights fit.
            part = nn.Sequential()
            for index in range(start, end):
                part.add_module(str(index), layers[index])
            self.net.add_module(f"slice{number}", part)
            start = end
        for number, channels in enumerate(backbone.channels):
            # richzhang's linear layers are a dropout (number 0, without weights) and a 1x1 convolution.
            layer = nn.Module()
            layer.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))
            self.add_module(f"lin{number}", layer)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance [B] of images `a` and `b` [B, 3, H, W] in [-1, 1]. Differentiable in both."""
        total = a.new_zeros(len(a))
        x, y = (a - self.shift) / self.scale, (b - self.shift) / self.scale
        for number in range(len(BACKBONES[self.net_name].ends)):
            part = getattr(self.net, f"slice{number + 1}")
            x, y = part(x), part(y)
            weight = getattr(self, f"lin{number}").model
            total = total + weight((_unit(x) - _unit(y)) ** 2).mean((1, 2, 3))
        return total


def load_lpips(
    net: str = "alex",
    weights: list[str | Path] | None = None,
    device: str | torch.device | None = None,
) -> LPIPS:
    """LPIPS with its weights: from local files, or downloaded from their official addresses.

    `weights`: one file with everything under richzhang's names, or two, torchvision's network and the linear layers.
    Raises UserError for files that lack a weight.
    """
    model = LPIPS(net)
    backbone = BACKBONES[net]
    if weights:
        files = [existing_file(file, "LPIPS weights") for file in weights]
    else:
        files = [fetch([part], "--lpips_weights FILE") for part in (backbone.network, backbone.linear)]
    found: dict[str, Tensor] = {}
    for file in files:
        state = dist_util.load_state_dict(file)
        found |= {_our_name(name, backbone.ends): tensor for name, tensor in state.items()}
        model.sha256[file.name] = sha256_of(file)
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        if name not in found or found[name].shape != tensor.shape:
            raise UserValueError(
                f"{', '.join(str(file) for file in files)} is not LPIPS {net} v0.1: {name} {list(tensor.shape)} is missing"
            )
    model.load_state_dict({name: found[name] for name in wanted})
    return model.to(choose_device(device))


@torch.inference_mode()
def lpips_distances(model: LPIPS, a: np.ndarray, b: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """LPIPS [N] of two arrays of images, uint8 [N, H, W, 3]. Raises UserError where they do not pair."""
    if a.shape != b.shape or a.ndim != 4 or a.shape[-1] != 3 or (a.dtype, b.dtype) != (np.uint8, np.uint8):
        raise UserValueError(
            f"LPIPS compares two equal-sized sets of uint8 images [N, H, W, 3], "
            f"these are {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        )
    if min(a.shape[1:3]) < SMALLEST:
        raise UserValueError(
            f"LPIPS needs images of {SMALLEST} pixels or more, these are {list(a.shape[1:3])}"
        )
    distances = [np.empty(0, np.float32)]
    for start in range(0, len(a), batch_size):
        pair = (_to_unit_range(x[start : start + batch_size], model.shift.device) for x in (a, b))
        distances.append(model(*pair).cpu().numpy())
    return np.concatenate(distances)


def _to_unit_range(images: np.ndarray, device: torch.device) -> Tensor:
    x = torch.from_numpy(np.ascontiguousarray(images)).to(device)
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + EPSILON)


def _our_name(name: str, ends: tuple[int, ...]) -> str:
    """Name of a torchvision weight (`features.3.bias`) among ours (`net.slice2.3.bias`); others stay."""
    if not name.startswith("features."):
        return name
    index, rest = name.removeprefix("features.").split(".", 1)
    number = next((n for n, end in enumerate(ends, 1) if int(index) < end), 0)
    return f"net.slice{number}.{index}.{rest}"


def _alexnet() -> list[nn.Module]:
    return [
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    ]


def _vgg16() -> list[nn.Module]:
    layers: list[nn.Module] = []
    inputs = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2, 2))
    return layers[:-1]  # LPIPS ends before the last pool


class Fire(nn.Module):
    """SqueezeNet's block: a 1x1 convolution to few channels, then 1x1 and 3x3 side by side."""

    def __init__(self, inputs: int, squeezed: int, expanded: int):
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], 1).relu()


def _squeezenet() -> list[nn.Module]:
    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    stem = [nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(), pool()]
    early = [Fire(64, 16, 64), Fire(128, 16, 64), pool(), Fire(128, 32, 128), Fire(256, 32, 128), pool()]
    late = [Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256)]
    return [*stem, *early, *late]
