"""The decoder heads D_i: from the shared U-Net's features to a modality (paper sections 2.2.3, 2.2.4, E.3, E.4)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch as th
import torch.nn as nn

from ..gaussian_diffusion import GaussianDiffusion, ModelMeanType, _extract_into_tensor
from ..nn import conv_nd, normalization, zero_module
from ..script_util import create_classifier


class OutputHead(nn.Sequential):
    """The U-Net's output layer once more: norm, SiLU, 3x3 convolution that starts at zero."""

    def __init__(self, channels: int, out_channels: int, dims: int = 2):
        convolution = zero_module(conv_nd(dims, channels, out_channels, 3, padding=1))
        super().__init__(normalization(channels), nn.SiLU(), convolution)

    def forward(self, middle: th.Tensor, last: th.Tensor) -> th.Tensor:
        """[B, out_channels, H, W]."""
        return super().forward(last)


class MiddleHead(nn.Sequential):
    """M: one fully connected layer on the pooled middle block, or two with `hidden` ReLU units between, of
    which the last starts at zero (representations, whose mean is zero)."""

    def __init__(self, channels: int, out_features: int, hidden: int | None = None):
        if hidden is None:
            super().__init__(nn.Linear(channels, out_features))
        else:
            last = zero_module(nn.Linear(hidden, out_features))
            super().__init__(nn.Linear(channels, hidden), nn.ReLU(), last)

    def forward(self, middle: th.Tensor, last: th.Tensor) -> th.Tensor:
        """[B, out_features]."""
        return super().forward(middle.float().flatten(2).mean(dim=2))


class Heads(nn.ModuleDict):
    """One head per modality, by name.

    heads: a Gaussian one also carries, at each timestep, once measured, `variance` [bins], its squared error; `share`
    [bins], how many of its dimensions err independently; and `correlation` [bins, K] of its errors with those of the K
    Gaussian ones in order.
    Those that are neither an OutputHead nor a MiddleHead read the predicted image: `ModalitySet.apply` calls them.
    """

    def __init__(self, heads: Mapping[str, nn.Module], variance_bins: Mapping[str, int]):
        super().__init__(heads)
        for name, bins in variance_bins.items():
            self[name].register_buffer("variance", th.ones(bins))
            self[name].register_buffer("share", th.ones(bins))
            self[name].register_buffer("correlation", th.zeros(bins, len(variance_bins)))
        self.gaussian = tuple(variance_bins)
        # Checkpoints of before have none: each head by itself, as then.
        self.may_lack = [f"{name}.{kind}" for name in self.gaussian for kind in ("share", "correlation")]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        own = self.state_dict()
        if any(name.startswith(prefix) for name in state_dict):
            for name in self.may_lack:
                state_dict.setdefault(prefix + name, own[name])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, middle: th.Tensor, last: th.Tensor) -> dict[str, th.Tensor]:
        """The raw predictions: images [B, C, H, W], logits [B, classes], vectors [B, D].

        middle: the middle block's output [B, C_m, h, w]; last: what the U-Net's own output layer reads
        [B, C, H, W].
        """
        reading = (OutputHead, MiddleHead)
        return {name: head(middle, last) for name, head in self.items() if isinstance(head, reading)}


class Presence(nn.Module):
    """Tells the network whose shifts are in the latent: one vector per modality, zero at first, which is added
    to the timestep embedding where its modality is present. inputs: widths of values by name that the network sees
    in the same way, each by a matrix of its own."""

    def __init__(self, names: Iterable[str], width: int, inputs: Mapping[str, int] | None = None):
        super().__init__()
        self.vectors = nn.ParameterDict([(name, nn.Parameter(th.zeros(width))) for name in names])
        if inputs:
            # Of the size of label_emb's for a class, and for a vector of RMS 1.
            self.inputs = nn.ParameterDict({n: nn.Parameter(th.randn(d, width)) for n, d in inputs.items()})

    def forward(self, present: th.Tensor) -> th.Tensor:
        """present [B, N], in the modalities' order, and the values of `inputs` beside it -> [B, width]."""
        vectors = list(self.vectors.values())
        rows = [th.stack(vectors)] if vectors else []
        rows += getattr(self, "inputs", {}).values()
        vectors = th.cat(rows)
        return present.to(vectors.dtype) @ vectors


class Codes(nn.Module):
    """Encodings by the U-Net that stand still between two refreshes, by modality: buffers [K, C, H, W].

    They belong to the checkpoint: samples are drawn with the codes that the weights were trained with.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        super().__init__()
        for name, shape in shapes.items():
            self.register_buffer(name, th.zeros(shape))


@dataclass(frozen=True)
class ClassifierOptions:
    """The classifier of a label's head `classifier` (E): ADM's flags classifier_*, with the paper's depth.

    image_size, image_channels: of the image that it reads. detach: the label's loss stops at the predicted image,
    so that image and label are learned in sequence; otherwise it reaches the U-Net as well (`joint_gradient`).
    Conditioning on a given label differentiates through it in any case.
    """

    image_size: int = 64
    image_channels: int = 3
    width: int = 128
    depth: int = 4
    attention_resolutions: str = "32,16,8"
    use_scale_shift_norm: bool = True
    resblock_updown: bool = True
    pool: str = "attention"
    channel_mult: str = ""
    detach: bool = False

    @property
    def flags(self) -> dict:
        """As flags of classifier_train.py; num_classes is the modality's."""
        own = ("width", "depth", "attention_resolutions", "use_scale_shift_norm", "resblock_updown", "pool")
        return {
            "image_size": self.image_size,
            "image_channels": self.image_channels,
            **{f"classifier_{name}": getattr(self, name) for name in (*own, "channel_mult")},
        }

    def build(self, classes: int) -> nn.Module:
        """An EncoderUNetModel with fresh weights: (images, timesteps) -> logits. UserValueError for
        impossible options."""
        return create_classifier(**self.flags, classifier_use_fp16=False, num_classes=classes)


def joint_gradient(process: GaussianDiffusion, image: th.Tensor, t: th.Tensor) -> th.Tensor:
    """The predicted image [B, C, H, W], whose gradient into the network's output is at most that of the image.

    A gradient of x_0 is one of eps times sqrt(1 / abar_t - 1), which exceeds 100 where the image is all noise; here
    the factor is at most 1.
    """
    if process.model_mean_type is ModelMeanType.START_X:
        return image
    weight = _extract_into_tensor(1 / np.maximum(process.sqrt_recipm1_alphas_cumprod, 1), t, image.shape)
    still = image.detach()
    return still + weight * (image - still)


def predicted_image(process: GaussianDiffusion, output: th.Tensor, z: th.Tensor, t: th.Tensor) -> th.Tensor:
    """What E's classifier reads: the clean image that the network's output [B, C or 2C, H, W] says is in
    z_t, in [-1, 1]; t are indices of the full `process`.

    No modality's shift is subtracted, so this is a function of z_t alone. Subtracting the true one would tell
    the classifier the label: eps errs by what the network does not know of e_i, and in the moving frame that
    error is the true encoding minus the expected one. Without it the image carries the expected encoding,
    atil_t / sqrt(abar_t) E[e_i | z_t], which is what z_t knows of the label; it vanishes with t.
    """
    prediction = output[:, : z.shape[1]].float()
    if process.model_mean_type is not ModelMeanType.START_X:
        prediction = process._predict_xstart_from_eps(z, t, prediction)
    return prediction.clamp(-1, 1)
