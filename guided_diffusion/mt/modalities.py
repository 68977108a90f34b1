"""What is generated beside the image: one `Modality` each, in one place (paper section 3).

Values travel as tensors: images [B, C, H, W] in [-1, 1], labels as probability vectors [B, classes], vectors
[B, D]. An all-zero value is the null input of every kind: a completely masked image, no label.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch as th
import torch.nn.functional as F

from ..errors import UserValueError
from ..losses import discretized_gaussian_log_likelihood
from ..nn import mean_flat
from ..seeding import PerSample
from .classifier_head import ClassifierOptions

RESERVED = ("image", "arr_0", "y", "position")  # names with another meaning in batches and files


@dataclass(frozen=True)
class RandomPatches:
    """Masks an image with square patches: the paper's masked-image data (appendix E.2).

    Each image gets m ~ U{0..max_patches} patches of `size` x `size` pixels anywhere inside it; they may
    overlap. With probability `complete` everything is masked. Masked pixels are 0, the middle of the range.
    """

    max_patches: int = 10
    size: int = 16
    complete: float = 0.0

    def __post_init__(self):
        if self.max_patches < 0 or self.size < 1 or not 0 <= self.complete <= 1:
            raise UserValueError(
                f"masks need max_patches of at least 0, size of at least 1 and complete a probability, got {self}"
            )

    def keep(self, height: int, width: int, random: PerSample, patches: int | None = None) -> th.Tensor:
        """Which pixels stay: bool [B, 1, H, W]. `patches` fixes their number."""
        if self.size > min(height, width):
            raise UserValueError(f"patches of {self.size} pixels do not fit an image of {height} x {width}")
        most = self.max_patches if patches is None else patches
        count = random.randint(self.max_patches + 1) if patches is None else patches
        top, left = (
            random.randint(edge - self.size + 1, max(most, 1)) for edge in (height, width)
        )  # [B, most]
        rows, columns = (th.arange(edge, device=random.device) for edge in (height, width))
        inside_rows = (rows >= top[..., None]) & (rows < top[..., None] + self.size)  # [B, most, H]
        inside_columns = (columns >= left[..., None]) & (columns < left[..., None] + self.size)
        used = th.arange(max(most, 1), device=random.device) < th.as_tensor(count).reshape(-1, 1).to(
            random.device
        )
        covered = (inside_rows[..., :, None] & inside_columns[..., None, :] & used[..., None, None]).any(
            dim=1
        )
        covered |= (random.rand() < self.complete).reshape(-1, 1, 1)
        return ~covered[:, None]

    def __call__(self, images: th.Tensor, random: PerSample) -> th.Tensor:
        """Masked copies of images [B, C, H, W]."""
        return images * self.keep(*images.shape[2:], random).to(images)


@dataclass(frozen=True)
class Modality:
    """One kind of data beside the image.

    name: unique; kind and shape: `image` (C, H, W), `label` (classes,), `vector` (D,). encoder E_i:
    `identity` (the value lies in the diffusion space already), `unet` (the shared U-Net at z = 0, t = 0 fed
    the value through its conditioning, a label's class embedding or a vector's cross-attention; centred and of
    unit RMS, for a vector of the vector's own RMS), a callable value -> [B, C, H, W], or `none`
    (the value does not enter the latent). head D_i: `out`, `middle` (`hidden` units in it) or `classifier`
    (heads.py), or `none`: with neither it is a condition that the network sees, as in ADM. likelihood:
    `gaussian` or `categorical`. loss_weight: lambda of equation 6. peak: kappa, the largest atil. as_input: variant X, the network also
    sees the value, which is replaced by the null input with probability null_probability in training;
    otherwise variant U. centre: what `unet` encodings are taken relative to: the `mean` over classes, or the
    encoding of the `null` input (one forward pass less per class not in the batch). derive: makes the value
    from the image; None if the data bring it. bounded: an image's values lie in [-1, 1], predictions are
    clipped to that (latents are not bounded).
    """

    name: str
    kind: Literal["image", "label", "vector"]
    shape: tuple[int, ...]
    encoder: str | Callable[[th.Tensor], th.Tensor] = "identity"
    head: Literal["out", "middle", "classifier", "none"] = "out"
    likelihood: Literal["gaussian", "categorical"] = "gaussian"
    loss_weight: float = 0.1
    peak: float = 0.5
    as_input: bool = False
    null_probability: float = 0.1
    hidden: int | None = None
    centre: Literal["mean", "null"] = "mean"
    derive: Callable[[th.Tensor, PerSample], th.Tensor] | None = None
    classifier: ClassifierOptions = ClassifierOptions()
    variance_bins: int = 32
    bounded: bool = True

    def __post_init__(self):
        if not self.name.isidentifier() or hasattr(th.nn.ModuleDict, self.name) or self.name in RESERVED:
            self._refuse(
                "the name must be one word of letters, digits and underscores, no method of a module and none of "
                + ", ".join(RESERVED)
            )
        rank = {"image": 3, "label": 1, "vector": 1}.get(self.kind)
        if rank is None:
            self._refuse(f"unknown kind {self.kind!r}, choose image, label or vector")
        if len(self.shape) != rank or min(self.shape) < 1:
            self._refuse(f"a {self.kind} needs a shape of {rank} positive numbers, got {self.shape}")
        if self.encoder == "identity" and self.kind != "image":
            self._refuse(f"a {self.kind} is not in the diffusion space: the encoder cannot be identity")
        if self.encoder == "unet" and self.kind == "image":
            self._refuse(
                "the U-Net as encoder needs a conditioning input, which only a label or a vector has here"
            )
        if not callable(self.encoder) and self.encoder not in ("identity", "unet", "none"):
            self._refuse(f"unknown encoder {self.encoder!r}, choose identity, unet, none or a callable")
        if (self.likelihood == "categorical") != (self.kind == "label"):
            self._refuse(
                f"the likelihood of a {self.kind} is {'categorical' if self.kind == 'label' else 'gaussian'}"
            )
        heads = {"image": ("out",), "vector": ("middle",), "label": ("middle", "classifier")}[self.kind]
        if self.head not in (*heads, "none"):
            self._refuse(f"the head of a {self.kind} is {' or '.join(heads)}, or none, not {self.head!r}")
        if self.head == "none" and not self.as_input:
            self._refuse("without a head nothing tells the value: the network must see it (variant X)")
        if self.as_input and self.kind == "vector":
            self._refuse("this network has no input for a vector: use variant U")
        if not (self.loss_weight >= 0 and 0 <= self.null_probability <= 1):
            self._refuse("loss_weight must be at least 0 and null_probability a probability")

    @property
    def required(self) -> bool:
        """Whether the network never learns to do without the value: then sampling must be given one."""
        return self.as_input and self.null_probability == 0

    def _refuse(self, why):
        raise UserValueError(f"modality {self.name}: {why}")

    def check(self, value: th.Tensor) -> th.Tensor:
        """`value` itself if it is a batch of this modality; ValueError that says what is wrong otherwise."""
        if tuple(value.shape[1:]) != self.shape:
            self._refuse(
                f"expected values of shape [B, {', '.join(map(str, self.shape))}], got {list(value.shape)}"
            )
        if not bool(value.isfinite().all()):
            self._refuse("the values contain NaN or infinity")
        if self.kind == "label" and not bool(((value >= 0).all(1) & (value.sum(1) <= 1 + 1e-4)).all()):
            self._refuse("labels must be probability vectors")
        return value

    def expectation(self, prediction: th.Tensor) -> th.Tensor:
        """The head's output as a value: probabilities, a clipped image, the vector itself."""
        if self.likelihood == "categorical":
            return prediction.softmax(dim=1)
        return prediction.clamp(-1, 1) if self.kind == "image" and self.bounded else prediction

    def loss(self, prediction: th.Tensor, value: th.Tensor) -> th.Tensor:
        """KL(q(x_i) || p(x_i | z_t)) of equation 6 up to a constant: [B].

        Cross-entropy, or the mean squared error.
        """
        if self.likelihood == "categorical":
            return F.cross_entropy(prediction, value, reduction="none")
        return mean_flat((prediction - value) ** 2)

    def log_likelihood(
        self, prediction: th.Tensor, value: th.Tensor, variance: th.Tensor | None = None
    ) -> th.Tensor:
        """log p(x_i | z_t) in nats, summed over the value, up to a constant: [B].

        Gaussians need their variance [B].
        """
        if self.likelihood == "categorical":
            return (prediction.log_softmax(dim=1) * value).sum(dim=1)
        return -((prediction - value) ** 2).flatten(1).sum(dim=1) / (2 * variance)

    def code_length(
        self, prediction: th.Tensor, value: th.Tensor, variance: th.Tensor | None = None
    ) -> th.Tensor:
        """-log p(x_i | z_t) in nats with every constant: [B].

        Images are coded as 8-bit values, vectors by their density. The 0 of a masked pixel is a 257th value
        that shares its bin with its two neighbours: the length of a masked image may be up to one bit per
        pixel too short.
        """
        if self.likelihood == "categorical":
            return -self.log_likelihood(prediction, value)
        log_variance = variance.log().reshape(-1, *[1] * (value.dim() - 1)).expand_as(value)
        if self.kind == "image":
            nats = discretized_gaussian_log_likelihood(value, means=prediction, log_scales=0.5 * log_variance)
            return -nats.flatten(1).sum(dim=1)
        density = -0.5 * (
            (prediction - value) ** 2 / log_variance.exp() + log_variance + th.tensor(2 * th.pi).log()
        )
        return -density.flatten(1).sum(dim=1)


def one_hot(labels: th.Tensor, classes: int) -> th.Tensor:
    """int64 labels [B] as float32 probability vectors [B, classes]; -1 (unlabelled) gives zeros.

    ValueError outside -1..classes-1.
    """
    if len(labels) and not -1 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UserValueError(
            f"labels must lie in 0..{classes - 1} (or -1 for none), got {int(labels.min())}..{int(labels.max())}"
        )
    known = (labels >= 0).unsqueeze(1)
    return F.one_hot(labels.clamp(min=0), classes).float() * known


PRESETS = ("masked", "label", "image", "representation")


def preset(name: str, kind: str, image_shape: tuple[int, int, int], num_classes: int | None) -> Modality:
    """A modality of the paper: `masked` (image), `label`, a second `image` or the `representation` of a CLIP
    ViT-H, 1024 numbers, for images of `image_shape`.

    ValueError if `kind` is none of PRESETS, or a label is asked of data without labels.
    """
    if kind == "masked":
        # 16 pixels at 64, in proportion elsewhere.
        patches = RandomPatches(size=max(1, round(image_shape[1] / 4)))
        return Modality(name, "image", image_shape, derive=patches)
    if kind == "label":
        if not num_classes:
            raise UserValueError(
                f"modality {name}: the data have no labels; set --num_classes or give labelled data"
            )
        channels, size = image_shape[:2]
        classifier = ClassifierOptions(size, channels)
        return Modality(name, "label", (num_classes,), "unet", "middle", "categorical", classifier=classifier)
    if kind == "image":
        return Modality(name, "image", image_shape)
    if kind == "representation":
        return Modality(name, "vector", (1024,), "unet", "middle", hidden=1024)
    raise UserValueError(f"modality {name}: unknown kind {kind!r}, choose one of {', '.join(PRESETS)}")


def parse_modalities(
    spec: str | Mapping[str, Mapping], image_shape: tuple[int, int, int], num_classes: int | None = None
) -> tuple[Modality, ...]:
    """The modalities that a flag or a configuration file asks for.

    spec: "masked:X,label:U" (names of presets with their variant, U unless given), or a mapping from a name
    to a preset's name under `preset` and any fields of Modality to change; `variant: X` stands for as_input,
    `patches` for those of RandomPatches, `classifier` for those of ClassifierOptions. Unless a peak is given,
    it is 0.5 / N, where N of them enter the latent: the sum of their shifts stays at 0.5, above which several
    modalities cost image quality. ValueError for anything unknown.
    """
    spec = _as_mapping(spec)
    peak = 0.5 / max(sum(options.get("encoder") != "none" for options in spec.values()), 1)
    return tuple(
        _from_options(name, dict(options), image_shape, num_classes, peak) for name, options in spec.items()
    )


def wants_labels(spec: str | Mapping[str, Mapping]) -> bool:
    """Whether a specification as for `parse_modalities` has a label in it, which the data must bring."""
    return any(options.get("preset", name) == "label" for name, options in _as_mapping(spec).items())


def _as_mapping(spec):
    if isinstance(spec, str):
        parts = [part.strip().partition(":") for part in spec.split(",") if part.strip()]
        names = [name.strip() for name, _, _ in parts]
        if len(set(names)) != len(names):
            raise UserValueError(f"modality names must differ: {spec}")
        return {name.strip(): {"variant": variant.strip() or "U"} for name, _, variant in parts}
    for name, options in spec.items():
        if not isinstance(options, Mapping):
            raise UserValueError(
                f"modality {name}: expected options by name (such as variant: X), got {options!r}"
            )
    return spec


def _from_options(name, options, image_shape, num_classes, peak):
    base = preset(name, options.pop("preset", name), image_shape, num_classes)
    variant = str(options.pop("variant", "U")).upper()
    if variant not in ("U", "X"):
        raise UserValueError(f"modality {name}: unknown variant {variant!r}, choose U or X")
    changes = {"peak": peak, "as_input": variant == "X"}
    if "patches" in options:
        if not isinstance(base.derive, RandomPatches):
            raise UserValueError(f"modality {name}: only masked images have patches")
        changes["derive"] = replace(base.derive, **_known(name, options.pop("patches"), RandomPatches))
    if "classifier" in options:
        if options.get("head") != "classifier":
            raise UserValueError(f"modality {name}: options of the classifier need head: classifier")
        own = _known(name, options.pop("classifier"), ClassifierOptions)
        changes["classifier"] = replace(base.classifier, **own)
    changes |= _known(name, options, Modality)
    if base.kind == "vector" and "shape" in changes:
        changes.setdefault("hidden", changes["shape"][0])  # as wide as it is itself
    return replace(base, **changes)


def _known(name, options, cls):
    allowed = {f.name for f in fields(cls)} - {
        "name",
        "kind",
        "derive",
        "classifier",
        "image_size",
        "image_channels",
    }
    unknown = set(options) - allowed
    if unknown:
        raise UserValueError(
            f"modality {name}: unknown option {', '.join(sorted(unknown))}; known: {', '.join(sorted(allowed))}"
        )
    return {key: tuple(value) if key == "shape" else value for key, value in options.items()}
