"""A classifier of noised images beside a model: guidance with ADM's scaling, and its own accuracy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch as th
import torch.nn as nn

from .. import checkpoint_util, dist_util
from ..errors import UserValueError
from ..flags import classifier_flags
from ..script_util import create_classifier
from .modalities import LabelModality
from .model import JointModel


def load_classifier(
    path: str, flags: Mapping, image_size: int, image_channels: int, num_classes: int
) -> nn.Module:
    """A classifier of classifier_train.py (a model*.pt, or an exported head) in evaluation mode on this
    rank's device.

    flags: those of `classifier_flags`. UserError if the file is missing or does not fit them.
    """
    if num_classes < 1:
        raise UserValueError("the model has no classes: give --num_classes, those of the classifier")
    own = {name: flags[name] for name in classifier_flags()}
    own = checkpoint_util.with_flags_of(path, own, classifier_flags())
    classifier = create_classifier(
        image_size=image_size, image_channels=image_channels, num_classes=num_classes, **own
    )
    checkpoint_util.load_weights(classifier, checkpoint_util.read_weights(path), path)
    classifier.to(dist_util.dev())
    if own["classifier_use_fp16"]:
        classifier.convert_to_fp16()
    return classifier.eval()


def classifier_guide(classifier: nn.Module, classes: th.Tensor, scale: float) -> Callable:
    """A cond_fn: scale * grad log p(classes | y_t) (Dhariwal & Nichol 2021). classes: int64 [B]."""

    def guide(noised, timesteps, **_conditioning):
        with th.enable_grad():
            noised = noised.detach().requires_grad_()
            log_p = classifier(noised, timesteps).float().log_softmax(dim=1)
            total = log_p.gather(1, classes[:, None]).sum()
            return th.autograd.grad(total, noised)[0] * scale

    return guide


@dataclass(frozen=True)
class ClassGuidance:
    """Guidance of samples towards classes. target: the label, the model's own or (its `name` then being none
    of the model's) the classifier's alone; classifier: None for the model's own head."""

    target: LabelModality
    classifier: nn.Module | None
    scale: float

    @classmethod
    def from_flags(cls, flags: Mapping, model: JointModel) -> "ClassGuidance | None":
        """What --classifier_path, --classifier_scale and the classifier's flags ask for; None for none.

        `own` is conditioning by the head, as on a given label, with the scale as its strength.
        """
        path = flags["classifier_path"]
        if not path:
            return None
        label = model.modalities.first("label")
        if path == "own":
            if label is None or label.head == "none":
                raise UserValueError("--classifier_path own: this model has no head for a label")
            if label.as_input:
                raise UserValueError(
                    "--classifier_path own: this network sees the label; give it, with --guidance_scale"
                )
            return cls(label, None, flags["classifier_scale"])
        classes = flags["num_classes"] or (label.shape[0] if label else 0)
        size, channels = model.flags["image_size"], model.flags["image_channels"]
        classifier = load_classifier(path, flags, size, channels, classes)
        if label is None:
            # What the model does not know of, the network need not see: it is only read and drawn.
            label = LabelModality("label", (classes,), "none", "none", as_input=True)
        elif label.shape[0] != classes:
            raise UserValueError(f"the model has {label.shape[0]} classes, the classifier {classes}")
        return cls(label, classifier, flags["classifier_scale"])

    def choose(self, given: dict[str, th.Tensor], random) -> th.Tensor:
        """The labels to guide to, [B, classes]: the given ones, or drawn by `random` (PerSample)."""
        if self.target.name in given:
            return given[self.target.name]
        return self.target.draw(random)
