"""The 2015-12-05 Inception network, as ADM's evaluator runs it, in PyTorch.

Measured against TensorFlow on the same graph file: pool_3 and the spatial features agree to 2e-6.

Four things make this network differ from torchvision's Inception v3, and each moves the features visibly:
images are enlarged as TensorFlow 1 did it (source pixel = i * in / 299, no half-pixel centres, no antialiasing) and
scaled by (x - 128) / 128; average pools do not count the padding; the last block pools with a maximum; batch norm uses
gamma only where the graph says so.
"""

import contextlib
import functools
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluations.distributed import choose_device
from evaluations.inception_weights import (
    ARCHITECTURE,
    CLASSES,
    FEATURES,
    GRAPH,
    PORT,
    BatchNorm,
    ConvSpec,
    InceptionWeights,
    read_weights,
    seeded_weights,
)
from evaluations.weights import existing_file, fetch, sha256_of
from guided_diffusion.errors import UserValueError

INPUT_SIZE = 299  # pixels
RESIZE_MODE = "tensorflow1-bilinear-299"
SPATIAL_CHANNELS = 7  # of mixed_6/conv: 7 x 17 x 17 = 2023 numbers, about as many as pool_3 has
CPU_CHUNK = 2  # images per thread, but at least 4: activations stay in the processor's cache, far faster than 32 at once


class InceptionOutput(NamedTuple):
    """Features of B images."""

    pool: Tensor  # [B, 2048] pool_3
    spatial: Tensor  # [B, 2023] first 7 channels of mixed_6/conv, flattened as [height, width, channel]


class Convolution(nn.Module):
    """Convolution, batch norm and ReLU as one step: the batch norm is folded into weight and bias."""

    def __init__(self, spec: ConvSpec, kernel: np.ndarray, norm: BatchNorm):
        super().__init__()
        # y = gamma (conv(x) - mean) / sqrt(variance + epsilon) + beta, in float64 and rounded once
        scale = (norm.variance.astype(np.float64) + norm.epsilon) ** -0.5
        if norm.gamma is not None:
            scale = scale * norm.gamma
        weight = torch.from_numpy(kernel * scale[:, None, None, None]).float()
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", torch.from_numpy(norm.beta - norm.mean * scale).float())
        self.stride = spec.stride
        self.padding = tuple(k // 2 for k in kernel.shape[2:]) if spec.same_padding else (0, 0)
        self._packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and packed_convolution_works():
            if self._packed is None:
                self._packed = _pack(self.weight, self.padding, self.stride, x)
            return _packed_convolution(x, self._packed, self.bias, self.padding, self.stride)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding).relu_()


def _pack(weight: Tensor, padding: tuple[int, int], stride: int, x: Tensor) -> Tensor:
    pack = torch.ops.mkldnn._reorder_convolution_weight
    return pack(weight.contiguous(), list(padding), [stride] * 2, [1, 1], 1, list(x.shape))


def _packed_convolution(
    x: Tensor, packed: Tensor, bias: Tensor, padding: tuple[int, int], stride: int
) -> Tensor:
    """Convolution and ReLU."""
    convolve = torch.ops.mkldnn._convolution_pointwise
    return convolve(x, packed, bias, list(padding), [stride] * 2, [1, 1], 1, "relu", [], "")


@functools.cache
def packed_convolution_works() -> bool:
    """Whether this torch has the operators that TorchInductor uses for CPU inference, and they do as expected.

    They keep the weights in oneDNN's own order instead of reordering them in every call: a quarter faster. They are
    no public interface, hence the trial; `conv2d` stands in for them.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    x = torch.linspace(-1, 1, 2 * 4 * 5 * 5).view(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.linspace(-1, 1, 3 * 4 * 9).view(3, 4, 3, 3), torch.tensor([0.1, -0.2, 0.3])
    try:
        result = _packed_convolution(x, _pack(weight, (1, 1), 2, x), bias, (1, 1), 2)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(result, F.conv2d(x, weight, bias, 2, 1).relu(), atol=1e-5)


class Inception(nn.Module):
    """The network, from images to the features that ADM's evaluator uses.

    Its widths are those of the weights: the same topology with a few channels serves as a fast stand-in in tests.
    `source` names the weights, `sha256` is the checksum of their file.
    """

    def __init__(self, weights: InceptionWeights, source: str, sha256: str):
        super().__init__()
        self.source, self.sha256 = source, sha256
        self.convolutions = nn.ModuleDict()
        for spec in ARCHITECTURE:
            kernel, norm = weights.convolutions[spec.name]
            if kernel.shape[2:] != spec.kernel:
                raise UserValueError(
                    f"{source} is not the 2015-12-05 Inception network: the kernel of {spec.name} is "
                    f"{tuple(kernel.shape[2:])}, expected {spec.kernel}"
                )
            self.convolutions[spec.name] = Convolution(spec, kernel, norm)
        features, classes = weights.softmax.shape
        if features * CLASSES != FEATURES * classes:  # torchvision's own Inception v3 has the same names
            raise UserValueError(
                f"{source} is not the 2015-12-05 Inception network: {classes} classes for {features} features, "
                f"expected {CLASSES} for {FEATURES}"
            )
        self.register_buffer("softmax", torch.from_numpy(np.array(weights.softmax, np.float64)))
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.softmax.device

    @torch.inference_mode()
    def forward(self, images: Tensor) -> InceptionOutput:
        """Features of `images` [B, H, W, 3], 0 to 255, uint8 or float32, of any size."""
        on_cpu = self.device.type == "cpu"
        chunk = max(4, CPU_CHUNK * torch.get_num_threads()) if on_cpu else len(images)
        with _full_float32():
            parts = [self._features(part.to(self.device)) for part in images.split(chunk)]
        return InceptionOutput(*(torch.cat(column) for column in zip(*parts, strict=True)))

    @torch.inference_mode()
    def probabilities(self, pool: Tensor) -> Tensor:
        """Class probabilities [B, 1008], float64, of pool_3 features [B, 2048]: softmax without the bias."""
        return (pool.to(self.softmax) @ self.softmax).softmax(1)

    def _features(self, images: Tensor) -> InceptionOutput:
        x = preprocess(images)
        x = self._chain(x, "conv", "conv_1", "conv_2")  # [B, 64, 147, 147]
        x = self._chain(F.max_pool2d(x, 3, 2), "conv_3", "conv_4")  # [B, 192, 71, 71]
        x = F.max_pool2d(x, 3, 2)  # [B, 192, 35, 35]
        for name in ("mixed", "mixed_1", "mixed_2"):
            x = torch.cat(self._towers_35(x, name), 1)  # [B, 256 and 288, 35, 35]
        x = self._reduce_to_17(x, "mixed_3")  # [B, 768, 17, 17]
        for name in ("mixed_4", "mixed_5", "mixed_6", "mixed_7"):
            towers = self._towers_17(x, name)
            if name == "mixed_6":
                spatial = towers[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
            x = torch.cat(towers, 1)
        x = self._reduce_to_8(x, "mixed_8")  # [B, 1280, 8, 8]
        x = torch.cat(self._towers_8(x, "mixed_9", _average_pool(x)), 1)
        x = torch.cat(self._towers_8(x, "mixed_10", F.max_pool2d(x, 3, 1, 1)), 1)  # [B, 2048, 8, 8]
        return InceptionOutput(x.mean((2, 3)), spatial)

    def _chain(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = self.convolutions[name](x)
        return x

    def _tower(self, x: Tensor, tower: str, length: int) -> Tensor:
        """The convolutions conv, conv_1, ... of one tower, one after the other."""
        return self._chain(x, *(f"{tower}/conv{f'_{i}' if i else ''}" for i in range(length)))

    def _towers_35(self, x: Tensor, name: str) -> list[Tensor]:
        return [
            self._tower(x, name, 1),
            self._tower(x, f"{name}/tower", 2),
            self._tower(x, f"{name}/tower_1", 3),
            self._tower(_average_pool(x), f"{name}/tower_2", 1),
        ]

    def _reduce_to_17(self, x: Tensor, name: str) -> Tensor:
        towers = [self._tower(x, name, 1), self._tower(x, f"{name}/tower", 3), F.max_pool2d(x, 3, 2)]
        return torch.cat(towers, 1)

    def _towers_17(self, x: Tensor, name: str) -> list[Tensor]:
        return [
            self._tower(x, name, 1),
            self._tower(x, f"{name}/tower", 3),
            self._tower(x, f"{name}/tower_1", 5),
            self._tower(_average_pool(x), f"{name}/tower_2", 1),
        ]

    def _reduce_to_8(self, x: Tensor, name: str) -> Tensor:
        towers = [
            self._tower(x, f"{name}/tower", 2),
            self._tower(x, f"{name}/tower_1", 4),
            F.max_pool2d(x, 3, 2),
        ]
        return torch.cat(towers, 1)

    def _towers_8(self, x: Tensor, name: str, pooled: Tensor) -> list[Tensor]:
        wide = self._tower(x, f"{name}/tower", 1)
        deep = self._tower(x, f"{name}/tower_1", 2)
        return [
            self._tower(x, name, 1),
            self._chain(wide, f"{name}/tower/mixed/conv"),
            self._chain(wide, f"{name}/tower/mixed/conv_1"),
            self._chain(deep, f"{name}/tower_1/mixed/conv"),
            self._chain(deep, f"{name}/tower_1/mixed/conv_1"),
            self._tower(pooled, f"{name}/tower_2", 1),
        ]


def preprocess(images: Tensor) -> Tensor:
    """Images [B, H, W, 3], 0 to 255, to the network's input [B, 3, 299, 299] in channels-last order."""
    x = resize_bilinear(images.float(), INPUT_SIZE)
    return ((x - 128) / 128).permute(0, 3, 1, 2)


def resize_bilinear(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1's `ResizeBilinear` without align_corners: [B, H, W, C] to [B, size, size, C].

    Output pixel i lies at source position i * in / size; there are no half-pixel centres and no antialiasing.
    """
    for axis in (2, 1):  # along the width first, as TensorFlow's kernel does
        length = images.shape[axis]
        position = torch.arange(size, device=images.device) * (length / size)
        left = position.long()
        right = (left + 1).clamp(max=length - 1)
        fraction = (position - left).view([-1 if a == axis else 1 for a in range(4)])
        start = images.index_select(axis, left)
        images = start + (images.index_select(axis, right) - start) * fraction
    return images


def _average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """Keep NVIDIA's TF32 out of the convolutions: its 10-bit mantissa would move the features by about 1e-3."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def load_inception(path: str | Path | None = None, device: str | torch.device | None = None) -> Inception:
    """The network with weights from `path`: the .pb graph, the .tgz around it, or the .pth port.

    Without `path` the official graph is taken from the cache folder or downloaded (or, failing that, the port).
    `device` defaults to the GPU where there is one. Raises UserError for a file of any other content.
    """
    path = existing_file(path, "Inception weights") if path else fetch([GRAPH, PORT], "--inception FILE")
    return Inception(read_weights(path), path.name, sha256_of(path)).to(choose_device(device))


def seeded_inception(seed: int = 0, divisor: int = 16) -> Inception:
    """The same topology with 1/`divisor` of the channels and random weights: for tests, not for scores."""
    return Inception(seeded_weights(seed, divisor), f"seeded-{seed}-{divisor}", "")
