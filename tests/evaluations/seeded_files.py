"""Files that hold the small seeded network in the forms that the evaluator reads, written independently of its readers."""

import numpy as np
import torch
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.types_pb2 import DT_FLOAT

from evaluations.inception_weights import ARCHITECTURE, seeded_weights


def write_graph(path, weights=None):
    """A TensorFlow graph file with the nodes that hold weights."""
    weights = weights or seeded_weights()
    graph = GraphDef()
    for name, (kernel, norm) in weights.convolutions.items():
        _constant(graph, f"{name}/conv2d_params", kernel.transpose(2, 3, 1, 0))
        # Where the flag says that gamma does not apply, the graph holds one all the same.
        gamma = np.full_like(norm.beta, 1e6) if norm.gamma is None else norm.gamma
        parts = {
            "beta": norm.beta,
            "gamma": gamma,
            "moving_mean": norm.mean,
            "moving_variance": norm.variance,
        }
        for part, value in parts.items():
            _constant(graph, f"{name}/batchnorm/{part}", value)
        node = graph.node.add(name=f"{name}/batchnorm", op="BatchNormWithGlobalNormalization")
        node.attr["scale_after_normalization"].b = norm.gamma is not None
        node.attr["variance_epsilon"].f = norm.epsilon
    _constant(graph, "softmax/weights", weights.softmax)
    path.write_bytes(graph.SerializeToString())
    return path


def _constant(graph, name, value):
    node = graph.node.add(name=name, op="Const")
    node.attr["dtype"].type = DT_FLOAT
    tensor = node.attr["value"].tensor
    tensor.dtype = DT_FLOAT
    for size in value.shape:
        tensor.tensor_shape.dim.add(size=size)
    tensor.tensor_content = np.ascontiguousarray(value, np.float32).tobytes()


def port_state(weights=None):
    """The state dict of the .pth port."""
    weights = weights or seeded_weights()
    state = {"fc.weight": weights.softmax.T, "fc.bias": np.ones(weights.softmax.shape[1])}
    for spec in ARCHITECTURE:
        kernel, norm = weights.convolutions[spec.name]
        state[f"{spec.port_name}.conv.weight"] = kernel
        state[f"{spec.port_name}.bn.weight"] = np.ones_like(norm.beta) if norm.gamma is None else norm.gamma
        state[f"{spec.port_name}.bn.bias"] = norm.beta
        state[f"{spec.port_name}.bn.running_mean"] = norm.mean
        state[f"{spec.port_name}.bn.running_var"] = norm.variance
    return {
        name: torch.tensor(np.ascontiguousarray(value), dtype=torch.float32) for name, value in state.items()
    }


def write_port(path, state=None):
    """The .pth port."""
    torch.save(state or port_state(), path)
    return path
