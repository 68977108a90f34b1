"""The decoder heads D_i: from the shared U-Net's features to a modality (paper section 3.3, appendix E)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch as th
import torch.nn as nn

from ..errors import UserValueError
from ..nn import conv_nd, normalization, zero_module

if TYPE_CHECKING:
    from .modalities import Modality


class Features(NamedTuple):
    """What the shared U-Net offers its heads."""

    middle: th.Tensor  # the middle block's output [B, C_m, h, w]
    last: th.Tensor  # what the U-Net's own output layer reads [B, C, H, W]


class OutputHead(nn.Sequential):
    """The U-Net's output layer once more: norm, SiLU, 3x3 convolution that starts at zero."""

    def __init__(self, channels: int, out_channels: int, dims: int = 2):
        convolution = zero_module(conv_nd(dims, channels, out_channels, 3, padding=1))
        super().__init__(normalization(channels), nn.SiLU(), convolution)

    def forward(self, features: Features) -> th.Tensor:
        """[B, out_channels, H, W]."""
        return super().forward(features.last)


class MiddleHead(nn.Sequential):
    """M: one fully connected layer on the pooled middle block, or two with `hidden` ReLU units between, of
    which the last starts at zero (representations, whose mean is zero)."""

    def __init__(self, channels: int, out_features: int, hidden: int | None = None):
        if hidden is None:
            super().__init__(nn.Linear(channels, out_features))
        else:
            last = zero_module(nn.Linear(hidden, out_features))
            super().__init__(nn.Linear(channels, hidden), nn.ReLU(), last)

    def forward(self, features: Features) -> th.Tensor:
        """[B, out_features]."""
        return super().forward(features.middle.float().flatten(2).mean(dim=2))


class Heads(nn.ModuleDict):
    """One head per modality, by name; none where its head is `none`.

    Classifier heads read no features but the predicted image: `MultiTask.apply` calls them. Gaussian heads
    carry `variance`: their squared error at each timestep, once measured.
    """

    def __init__(
        self, modalities: Sequence["Modality"], middle_channels: int, last_channels: int, dims: int = 2
    ):
        modalities = [m for m in modalities if m.head != "none"]
        super().__init__({m.name: self._make(m, middle_channels, last_channels, dims) for m in modalities})
        for modality in modalities:
            if modality.likelihood == "gaussian":
                self[modality.name].register_buffer("variance", th.ones(modality.variance_bins))

    @staticmethod
    def _make(modality, middle_channels, last_channels, dims):
        if modality.head == "out":
            return OutputHead(last_channels, modality.shape[0], dims)
        if modality.head == "middle":
            return MiddleHead(middle_channels, modality.shape[0], modality.hidden)
        if modality.head == "classifier":
            return modality.classifier.build(modality.shape[0])
        raise UserValueError(
            f"modality {modality.name}: unknown head {modality.head!r}, choose out, middle or classifier"
        )

    def forward(self, features: Features) -> dict[str, th.Tensor]:
        """The raw predictions: images [B, C, H, W], logits [B, classes], vectors [B, D]."""
        feature_heads = (OutputHead, MiddleHead)
        return {name: head(features) for name, head in self.items() if isinstance(head, feature_heads)}
