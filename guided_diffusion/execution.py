"""How a network runs on this machine when it samples: number format, compiler, memory layout."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch as th
from torch import nn

from .errors import UserError

_TYPES = {"bf16": th.bfloat16, "fp16": th.float16}


@dataclass(frozen=True)
class Execution:
    """precision: fp32, or bf16 or fp16 by autocast; compile: torch.compile the networks; channels_last: their memory
    format."""

    precision: str = "fp32"
    compile: bool = False
    channels_last: bool = False
    device: str = "cpu"

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any], device: th.device, full: bool = False) -> "Execution":
        """Of the flags precision, compile and channels_last. `auto` is bf16, true and true on a GPU (that has bf16),
        else fp32, false and false. full: the network needs float32, so auto is that. UserError for a GPU without bf16."""
        on_gpu = device.type == "cuda"
        precision = flags["precision"]
        if precision in ("autocast", "full"):  # upstream's words
            precision = "fp16" if on_gpu and precision == "autocast" else "fp32"
        elif precision == "auto":
            precision = "bf16" if on_gpu and not full and th.cuda.is_bf16_supported() else "fp32"
        elif precision == "bf16" and on_gpu and not th.cuda.is_bf16_supported():
            raise UserError("this GPU has no bfloat16: use --precision fp16 or fp32")
        chosen = {name: flags[name] == "true" or (flags[name] == "auto" and on_gpu) for name in _SWITCHES}
        return cls(precision, device=device.type, **chosen)

    def prepare(self, network: nn.Module) -> nn.Module:
        """`network`, which is on its device already, made ready in place."""
        if self.channels_last:
            network.to(memory_format=th.channels_last)
        if self.compile:
            network.compile()
        return network

    def running(self) -> contextlib.AbstractContextManager:
        """The context in which networks run."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return th.autocast(self.device, dtype=_TYPES[self.precision])


_SWITCHES = ("compile", "channels_last")
