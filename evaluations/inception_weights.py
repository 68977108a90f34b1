"""The convolutions of the 2015-12-05 Inception network, and where their weights come from.

Read from TensorFlow's own `classify_image_graph_def.pb`, from the .tgz around it, or from the .pth port that FID tools
share. `seeded_weights` draws random ones for tests.
"""

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from evaluations.weights import PublishedFile
from guided_diffusion import dist_util
from guided_diffusion.errors import UserValueError

GRAPH = PublishedFile(
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/classify_image_graph_def.pb",
    "009d6814d1bc560d4e7b236e170e9b2d5ca6f4b57bd8037f6db05776204415c6",
)
PORT = PublishedFile(
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
GRAPH_IN_TGZ = "classify_image_graph_def.pb"  # inside inception-2015-12-05.tgz
PORT_EPSILON = 1e-3  # of the port's batch norms; the graph states its own


class ConvSpec(NamedTuple):
    """One convolution: its name in TensorFlow's graph and in the .pth port, its channels and kernel."""

    name: str
    port_name: str
    inputs: int
    channels: int
    kernel: tuple[int, int]
    stride: int = 1
    same_padding: bool = True


@dataclass(frozen=True)
class BatchNorm:
    """Stored statistics of one batch norm; `gamma` is None where the graph does not apply it."""

    beta: np.ndarray
    gamma: np.ndarray | None
    mean: np.ndarray
    variance: np.ndarray
    epsilon: float


@dataclass(frozen=True)
class InceptionWeights:
    """Everything learned: per convolution its kernel [out, in, h, w] and batch norm, and the classifier."""

    convolutions: dict[str, tuple[np.ndarray, BatchNorm]]  # by TensorFlow's name
    softmax: np.ndarray  # [features, classes]; its bias is left out, as ADM's Inception Score leaves it out


def _stem() -> list[ConvSpec]:
    return [
        ConvSpec("conv", "Conv2d_1a_3x3", 3, 32, (3, 3), 2, False),
        ConvSpec("conv_1", "Conv2d_2a_3x3", 32, 32, (3, 3), 1, False),
        ConvSpec("conv_2", "Conv2d_2b_3x3", 32, 64, (3, 3)),
        ConvSpec("conv_3", "Conv2d_3b_1x1", 64, 80, (1, 1), 1, False),
        ConvSpec("conv_4", "Conv2d_4a_3x3", 80, 192, (3, 3), 1, False),
    ]


def _block_35(name: str, port: str, inputs: int, pooled: int) -> list[ConvSpec]:
    return [
        ConvSpec(f"{name}/conv", f"{port}.branch1x1", inputs, 64, (1, 1)),
        ConvSpec(f"{name}/tower/conv", f"{port}.branch5x5_1", inputs, 48, (1, 1)),
        ConvSpec(f"{name}/tower/conv_1", f"{port}.branch5x5_2", 48, 64, (5, 5)),
        ConvSpec(f"{name}/tower_1/conv", f"{port}.branch3x3dbl_1", inputs, 64, (1, 1)),
        ConvSpec(f"{name}/tower_1/conv_1", f"{port}.branch3x3dbl_2", 64, 96, (3, 3)),
        ConvSpec(f"{name}/tower_1/conv_2", f"{port}.branch3x3dbl_3", 96, 96, (3, 3)),
        ConvSpec(f"{name}/tower_2/conv", f"{port}.branch_pool", inputs, pooled, (1, 1)),
    ]


def _block_35_to_17(name: str, port: str, inputs: int) -> list[ConvSpec]:
    return [
        ConvSpec(f"{name}/conv", f"{port}.branch3x3", inputs, 384, (3, 3), 2, False),
        ConvSpec(f"{name}/tower/conv", f"{port}.branch3x3dbl_1", inputs, 64, (1, 1)),
        ConvSpec(f"{name}/tower/conv_1", f"{port}.branch3x3dbl_2", 64, 96, (3, 3)),
        ConvSpec(f"{name}/tower/conv_2", f"{port}.branch3x3dbl_3", 96, 96, (3, 3), 2, False),
    ]


def _block_17(name: str, port: str, inner: int) -> list[ConvSpec]:
    return [
        ConvSpec(f"{name}/conv", f"{port}.branch1x1", 768, 192, (1, 1)),
        ConvSpec(f"{name}/tower/conv", f"{port}.branch7x7_1", 768, inner, (1, 1)),
        ConvSpec(f"{name}/tower/conv_1", f"{port}.branch7x7_2", inner, inner, (1, 7)),
        ConvSpec(f"{name}/tower/conv_2", f"{port}.branch7x7_3", inner, 192, (7, 1)),
        ConvSpec(f"{name}/tower_1/conv", f"{port}.branch7x7dbl_1", 768, inner, (1, 1)),
        ConvSpec(f"{name}/tower_1/conv_1", f"{port}.branch7x7dbl_2", inner, inner, (7, 1)),
        ConvSpec(f"{name}/tower_1/conv_2", f"{port}.branch7x7dbl_3", inner, inner, (1, 7)),
        ConvSpec(f"{name}/tower_1/conv_3", f"{port}.branch7x7dbl_4", inner, inner, (7, 1)),
        ConvSpec(f"{name}/tower_1/conv_4", f"{port}.branch7x7dbl_5", inner, 192, (1, 7)),
        ConvSpec(f"{name}/tower_2/conv", f"{port}.branch_pool", 768, 192, (1, 1)),
    ]


def _block_17_to_8(name: str, port: str) -> list[ConvSpec]:
    return [
        ConvSpec(f"{name}/tower/conv", f"{port}.branch3x3_1", 768, 192, (1, 1)),
        ConvSpec(f"{name}/tower/conv_1", f"{port}.branch3x3_2", 192, 320, (3, 3), 2, False),
        ConvSpec(f"{name}/tower_1/conv", f"{port}.branch7x7x3_1", 768, 192, (1, 1)),
        ConvSpec(f"{name}/tower_1/conv_1", f"{port}.branch7x7x3_2", 192, 192, (1, 7)),
        ConvSpec(f"{name}/tower_1/conv_2", f"{port}.branch7x7x3_3", 192, 192, (7, 1)),
        ConvSpec(f"{name}/tower_1/conv_3", f"{port}.branch7x7x3_4", 192, 192, (3, 3), 2, False),
    ]


def _block_8(name: str, port: str, inputs: int) -> list[ConvSpec]:
    return [
        ConvSpec(f"{name}/conv", f"{port}.branch1x1", inputs, 320, (1, 1)),
        ConvSpec(f"{name}/tower/conv", f"{port}.branch3x3_1", inputs, 384, (1, 1)),
        ConvSpec(f"{name}/tower/mixed/conv", f"{port}.branch3x3_2a", 384, 384, (1, 3)),
        ConvSpec(f"{name}/tower/mixed/conv_1", f"{port}.branch3x3_2b", 384, 384, (3, 1)),
        ConvSpec(f"{name}/tower_1/conv", f"{port}.branch3x3dbl_1", inputs, 448, (1, 1)),
        ConvSpec(f"{name}/tower_1/conv_1", f"{port}.branch3x3dbl_2", 448, 384, (3, 3)),
        ConvSpec(f"{name}/tower_1/mixed/conv", f"{port}.branch3x3dbl_3a", 384, 384, (1, 3)),
        ConvSpec(f"{name}/tower_1/mixed/conv_1", f"{port}.branch3x3dbl_3b", 384, 384, (3, 1)),
        ConvSpec(f"{name}/tower_2/conv", f"{port}.branch_pool", inputs, 192, (1, 1)),
    ]


ARCHITECTURE: list[ConvSpec] = [
    *_stem(),
    *_block_35("mixed", "Mixed_5b", 192, 32),
    *_block_35("mixed_1", "Mixed_5c", 256, 64),
    *_block_35("mixed_2", "Mixed_5d", 288, 64),
    *_block_35_to_17("mixed_3", "Mixed_6a", 288),
    *_block_17("mixed_4", "Mixed_6b", 128),
    *_block_17("mixed_5", "Mixed_6c", 160),
    *_block_17("mixed_6", "Mixed_6d", 160),
    *_block_17("mixed_7", "Mixed_6e", 192),
    *_block_17_to_8("mixed_8", "Mixed_7a"),
    *_block_8("mixed_9", "Mixed_7b", 1280),
    *_block_8("mixed_10", "Mixed_7c", 2048),
]
FEATURES, CLASSES = 2048, 1008


def read_weights(path: Path) -> InceptionWeights:
    """The weights in a .pb, .tgz or .pth file. Raises UserError for a file of any other content."""
    readers = {".pb": _read_graph, ".tgz": _read_tgz, ".gz": _read_tgz, ".pth": _read_port, ".pt": _read_port}
    if path.suffix not in readers:
        raise UserValueError(f"Inception weights {path}: expected a .pb, .tgz or .pth file")
    return readers[path.suffix](path)


def seeded_weights(seed: int = 0, divisor: int = 16) -> InceptionWeights:
    """Random weights at 1/`divisor` (a divisor of 16) of the channels, scaled so that activations keep their size."""
    random = np.random.default_rng(seed)
    convolutions = {}
    for index, spec in enumerate(ARCHITECTURE):
        inputs = 3 if spec.name == "conv" else spec.inputs // divisor
        width = spec.channels // divisor
        fan_in = inputs * spec.kernel[0] * spec.kernel[1]
        kernel = random.normal(size=(width, inputs, *spec.kernel)) * (2 / fan_in) ** 0.5
        norm = BatchNorm(
            beta=random.normal(size=width).astype(np.float32) / 10,
            # Both kinds occur in the graph: with gamma and without.
            gamma=random.uniform(0.8, 1.2, width).astype(np.float32) if index % 3 else None,
            mean=random.normal(size=width).astype(np.float32) / 10,
            variance=random.uniform(0.5, 1.5, width).astype(np.float32),
            epsilon=PORT_EPSILON,
        )
        convolutions[spec.name] = (kernel.astype(np.float32), norm)
    softmax = random.normal(size=(FEATURES // divisor, CLASSES // divisor)) * 2 / (FEATURES // divisor) ** 0.5
    return InceptionWeights(convolutions, softmax.astype(np.float32))


def _read_graph(path: Path) -> InceptionWeights:
    return _parse_graph(path.read_bytes(), path)


def _read_tgz(path: Path) -> InceptionWeights:
    try:
        with tarfile.open(path) as archive:
            return _parse_graph(archive.extractfile(GRAPH_IN_TGZ).read(), path)
    except (tarfile.TarError, KeyError) as error:
        raise UserValueError(f"{path} holds no {GRAPH_IN_TGZ} ({error})") from error


def _parse_graph(data: bytes, path: Path) -> InceptionWeights:
    # TensorBoard ships TensorFlow's protocol buffers; importing them takes a second, so only where needed.
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    from tensorboard.util.tensor_util import make_ndarray

    graph = GraphDef()
    try:
        graph.ParseFromString(data)
    except DecodeError as error:
        raise UserValueError(f"{path} is not a TensorFlow graph ({error})") from error
    nodes = {node.name: node for node in graph.node}

    def constant(name: str) -> np.ndarray:
        if name not in nodes or nodes[name].op != "Const":
            raise UserValueError(f"{path} is not the 2015-12-05 Inception network: it has no constant {name}")
        return make_ndarray(nodes[name].attr["value"].tensor)

    convolutions = {}
    for spec in ARCHITECTURE:
        kernel = constant(f"{spec.name}/conv2d_params").transpose(
            3, 2, 0, 1
        )  # [h, w, in, out] to [out, in, h, w]
        prefix = f"{spec.name}/batchnorm"
        beta, gamma, mean, variance = (
            constant(f"{prefix}/{part}") for part in ("beta", "gamma", "moving_mean", "moving_variance")
        )
        options = nodes[prefix].attr
        if not options["scale_after_normalization"].b:
            gamma = None
        convolutions[spec.name] = (
            kernel,
            BatchNorm(beta, gamma, mean, variance, options["variance_epsilon"].f),
        )
    return InceptionWeights(convolutions, constant("softmax/weights"))


def _read_port(path: Path) -> InceptionWeights:
    state = dist_util.load_state_dict(path)

    def tensor(name: str) -> np.ndarray:
        if not isinstance(state, dict) or name not in state:
            raise UserValueError(
                f"{path} is not the port of the 2015-12-05 Inception network: it has no {name}"
            )
        return state[name].float().numpy()

    convolutions = {}
    for spec in ARCHITECTURE:
        norm = BatchNorm(
            beta=tensor(f"{spec.port_name}.bn.bias"),
            gamma=tensor(f"{spec.port_name}.bn.weight"),
            mean=tensor(f"{spec.port_name}.bn.running_mean"),
            variance=tensor(f"{spec.port_name}.bn.running_var"),
            epsilon=PORT_EPSILON,
        )
        convolutions[spec.name] = (tensor(f"{spec.port_name}.conv.weight"), norm)
    return InceptionWeights(convolutions, tensor("fc.weight").T)
