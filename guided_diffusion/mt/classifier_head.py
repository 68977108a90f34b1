"""E: the label is read off the predicted clean image by ADM's classifier (paper appendix E.3)."""

from dataclasses import dataclass

import torch as th
import torch.nn as nn

from ..gaussian_diffusion import GaussianDiffusion, ModelMeanType


@dataclass(frozen=True)
class ClassifierOptions:
    """The classifier of a label's head `classifier`: ADM's flags classifier_*, with the paper's depth.

    image_size, image_channels: of the image that it reads. detach: whether the label's loss stops at the
    predicted image. It does by default: image and label are learned in sequence, and the way back into the
    U-Net multiplies the gradient by sqrt(1 / abar_t - 1), which exceeds 100 where the image is all noise.
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
    detach: bool = True

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
        # Here: the U-Net's module imports the heads.
        from ..script_util import ClassifierConfig

        return ClassifierConfig.from_flags(
            **self.flags, classifier_use_fp16=False, num_classes=classes
        ).build()


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
