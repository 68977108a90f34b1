"""Files of a training run that are whole or not there, and everything that an exact resume needs.

A complete checkpoint, `checkpoint{step:06d}.pt`, is one dict of plain values and tensors (it loads with
weights_only=True): see `TrainLoop.state_dict`. Local files are written beside their place and moved there once they are on
disk, so a process killed at any moment leaves the old file or the new one, never a part of one.
"""

import os
import random
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import blobfile as bf
import numpy as np
import torch as th

from . import dist_util
from .errors import UserError

FORMAT = "mt-diffusion-checkpoint"
VERSION = 1
_COMPLETE = re.compile(r"checkpoint(\d{6,})\.pt")
_TEMPORARY = ".pt.tmp"


def is_remote(path: str) -> bool:
    """Whether `path` names an object store (gs://, az://, https://) and not a local file."""
    return "://" in str(path)


def save_atomic(value, path: str) -> None:
    """torch.save `value` to `path`, completely or not at all."""
    if is_remote(path):  # an object store shows a file only once it is closed
        with bf.BlobFile(path, "wb") as file:
            th.save(value, file)
        return
    temporary = os.path.splitext(path)[0] + _TEMPORARY
    with open(temporary, "wb") as file:
        write(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    # The new name is safe against a power cut only once the folder is on disk too.
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write(value, file) -> None:
    """The bytes of one file; apart so that a test can make it slow."""
    th.save(value, file)


def complete_checkpoints(folder: str) -> list[str]:
    """The complete checkpoints in a local `folder`, by step, newest last; truncated copies do not count."""
    found = {}
    for path in Path(folder).iterdir() if os.path.isdir(folder) else ():
        match = _COMPLETE.fullmatch(path.name)
        if match and zipfile.is_zipfile(path):  # reads the directory at the file's end
            found[int(match[1])] = str(path)
    return [found[step] for step in sorted(found)]


def find_complete_checkpoint(logdir: str) -> str | None:
    """The newest complete checkpoint in the run folder `logdir`, or None."""
    found = complete_checkpoints(logdir)
    return found[-1] if found else None


def prune_checkpoints(folder: str, keep: int, newest: str) -> None:
    """Delete all but the last `keep` complete checkpoints of a local folder; `newest` stays in any case."""
    for path in complete_checkpoints(folder)[: -max(keep, 1)]:
        if os.path.basename(path) != os.path.basename(newest):
            os.remove(path)


def remove_stray_files(folder: str) -> None:
    """Delete what a killed process left half written in a local folder."""
    for path in Path(folder).glob(f"*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


def load_complete(path: str) -> dict:
    """Read a complete checkpoint to the CPU; `UserError` if it is missing, damaged, or something else."""
    state = dist_util.load_state_dict(path, map_location="cpu")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a complete checkpoint of this program (a checkpoint*.pt file)")
    if state["version"] > VERSION:
        raise UserError(f"{path} was written by a newer version of this program (format {state['version']})")
    return state


def load_weights(module: th.nn.Module, weights: Mapping[str, th.Tensor], source: str) -> None:
    """module.load_state_dict, with one line instead of a list where `weights` (from `source`) belong to another network.

    Raises `UserError` that counts what is missing and unknown and names the first tensor of each kind.
    """
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    if not isinstance(weights, Mapping) or not all(
        isinstance(value, th.Tensor) for value in weights.values()
    ):
        raise UserError(f"{source} holds no weights (a dict of tensors by name)")
    given = {name: tuple(value.shape) for name, value in weights.items()}
    problems = []
    for what, names in (
        ("are missing", [name for name in own if name not in given]),
        ("are unknown", [name for name in given if name not in own]),
        ("have another shape", [name for name in own if name in given and own[name] != given[name]]),
    ):
        if names:
            first = names[0]
            shapes = f": {given[first]} in the file, {own[first]} in the model" if "shape" in what else ""
            problems.append(f"{len(names)} of {len(own)} tensors {what} (first: {first}{shapes})")
    if problems:
        raise UserError(
            f"{source} does not fit the model that the flags describe: {'; '.join(problems)}. "
            "Give the flags that the weights were trained with"
        )
    module.load_state_dict(weights)


# ---------------------------------------------------------------------------------------------------- random numbers


def seed_everything(seed: int) -> None:
    """Seed torch (every device), NumPy and random."""
    th.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def rng_state() -> dict:
    """The state of every generator of this process, in plain values and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": th.get_rng_state(),
        "cuda": th.cuda.get_rng_state_all() if th.cuda.is_available() else [],
        "numpy": (name, th.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def set_rng_state(state: dict) -> None:
    """Continue from `rng_state()`; generators of devices that this machine lacks are left out."""
    th.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == th.cuda.device_count():
        th.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
