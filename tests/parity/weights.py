"""Deterministic weights, so that reference outputs need no weight files.

Every tensor of a state dict is filled from its own name: NumPy's legacy
RandomState (a frozen stream) is seeded with crc32(name); matrices and
convolutions are scaled by 1/sqrt(fan_in), one-dimensional '.weight' tensors
(normalisation gains) are 1 + 0.1 n, every other tensor is 0.1 n.
"""

import zlib

import numpy as np


def named_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 array for the tensor `name` of `shape`."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) >= 2:
        value = noise / np.sqrt(np.prod(shape[1:]))
    elif name.endswith("weight"):
        value = 1 + 0.1 * noise
    else:
        value = 0.1 * noise
    return value.astype(np.float32)


def fill(module) -> None:
    """Overwrite every parameter and float buffer of a torch module in place."""
    import torch

    state = module.state_dict()
    module.load_state_dict(
        {
            name: torch.from_numpy(named_weight(name, tuple(t.shape))) if t.is_floating_point() else t
            for name, t in state.items()
        }
    )
