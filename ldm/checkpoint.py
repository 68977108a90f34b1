"""Weights in latent-diffusion's layout, from .ckpt or .safetensors files, or from diffusers' folders."""

import logging
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from guided_diffusion.errors import UserError, UserFileError
from ldm.diffusers_layout import load_folder

_logger = logging.getLogger(__name__)

# The only class that the released checkpoints name: it keys the state of Lightning's callbacks. Its code does
# not run.
_HARMLESS = [ModelCheckpoint]


def load_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, on the CPU.

    path: of a file, or of a folder in diffusers' layout. A pickle is read with weights_only: it cannot run
    code. `UserError` for a file that is missing, damaged, or holds anything but weights.
    """
    if Path(path).is_dir():
        return load_folder(path, load_state_dict)
    if not Path(path).is_file():
        raise UserFileError(f"there is no checkpoint {path}")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds something else than weights and is not read, since it could run code; save its "
            "tensors alone, as .safetensors for example"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise UserError(f"{path} is not a whole checkpoint: it cannot be read") from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} holds no weights (a dict of tensors by name, alone or under `state_dict`)")
    return dict(state)


def trained_steps(path: str | Path) -> int:
    """How many updates a checkpoint of a training run has seen; 0 for weights alone."""
    if Path(path).is_dir() or Path(path).suffix == ".safetensors":
        return 0
    with torch.serialization.safe_globals(_HARMLESS):
        content = torch.load(path, map_location="cpu", weights_only=True)
    return int(content.get("global_step", 0)) if isinstance(content, Mapping) else 0


def load_weights(
    module: nn.Module,
    weights: Mapping[str, torch.Tensor],
    source: str | Path,
    ignore_keys: Iterable[str] = (),
    optional: Iterable[str] = (),
) -> None:
    """Fill `module` from `weights`, which were read from `source`.

    ignore_keys: prefixes of names in the file to leave out; optional: prefixes of names in the module that
    the file may lack. What the module does not know is left out, and logged. `UserError` that names the first
    tensor which is missing or has another shape; the module is then as before.
    """
    ignored, optional = tuple(ignore_keys), tuple(optional)
    given = {name: value for name, value in weights.items() if not name.startswith(ignored)}
    own = module.state_dict()
    missing = [name for name in own if name not in given and not name.startswith((*ignored, *optional))]
    if missing:
        raise UserError(
            f"{source} does not fit {type(module).__name__}: {len(missing)} of {len(own)} tensors are "
            f"missing (first: {missing[0]})"
        )
    for name, value in own.items():
        if name in given and given[name].shape != value.shape:
            raise UserError(
                f"{source} does not fit {type(module).__name__}: {name} is {tuple(given[name].shape)} in the "
                f"file and {tuple(value.shape)} in the model; check the configuration"
            )
    unknown = [name for name in given if name not in own]
    if unknown:
        _logger.warning("%s: %d tensors are not used (first: %s)", source, len(unknown), unknown[0])
    module.load_state_dict(given, strict=False)
