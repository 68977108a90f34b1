"""What is generated beside the image: one class per kind of data (paper section 2.2).

Each kind says how it is encoded, expected, scored, read from data and files and written, so that a new kind is
one class here. Values travel as tensors: images [B, C, H, W] in [-1, 1], labels as probability vectors
[B, classes], vectors [B, D]. An all-zero value is the null input of every kind: a completely masked image, no
label.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

import torch as th
import torch.nn.functional as F

from ..errors import UserValueError, closest
from ..losses import discretized_gaussian_log_likelihood
from ..nn import mean_flat
from ..seeding import PerSample
from .heads import ClassifierOptions, MiddleHead, OutputHead
from .masks import RandomPatches

RESERVED = ("image", "arr_0", "y", "position")  # names with another meaning in batches and files


@dataclass(frozen=True)
class Modality(ABC):
    """One kind of data beside the image.

    name: unique. encoder E_i: `identity`, `unet`, `none` (the value does not enter the latent), or a callable
    value -> [B, C, H, W]. head D_i: see the kinds, or `none`: with neither it is a condition that the network
    sees, as in ADM. loss_weight: lambda of equation 6. peak: kappa, the largest atil; None leaves it to
    `with_peaks`. as_input: variant X, the network also sees the value, replaced by the null input with probability
    null_probability in training; otherwise variant U.
    """

    name: str
    shape: tuple[int, ...]
    encoder: str | Callable[[th.Tensor], th.Tensor] = "identity"
    head: str = "out"
    loss_weight: float = 0.1
    peak: float | None = None
    as_input: bool = False
    null_probability: float = 0.1

    kind: ClassVar[str]
    rank: ClassVar[int]  # of one value's shape
    likelihood: ClassVar[Literal["gaussian", "categorical"]] = "gaussian"
    encoders: ClassVar[tuple[str, ...]]
    heads: ClassVar[tuple[str, ...]]
    derive: ClassVar[Callable[[th.Tensor, PerSample], th.Tensor] | None] = None
    input_channels: ClassVar[int] = 0  # of the network's input, beside the latent's
    has_content_everywhere: ClassVar[bool] = False  # like an image, and unlike an abstract code

    def __post_init__(self):
        if not self.name.isidentifier() or hasattr(th.nn.ModuleDict, self.name) or self.name in RESERVED:
            self._refuse(
                "the name must be one word of letters, digits and underscores, no method of a module and none of "
                + ", ".join(RESERVED)
            )
        if len(self.shape) != self.rank or min(self.shape) < 1:
            self._refuse(f"kind {self.kind} needs a shape of {self.rank} positive numbers, got {self.shape}")
        if not callable(self.encoder) and self.encoder not in (*self.encoders, "none"):
            known = ", ".join((*self.encoders, "none"))
            self._refuse(
                f"unknown encoder {self.encoder!r} for kind {self.kind}: choose {known} or a callable"
            )
        if self.head not in (*self.heads, "none"):
            known = ", ".join((*self.heads, "none"))
            self._refuse(f"unknown head {self.head!r} for kind {self.kind}: choose {known}")
        if self.head == "none" and not self.as_input:
            self._refuse("without a head nothing tells the value: the network must see it (variant X)")
        if not (self.loss_weight >= 0 and 0 <= self.null_probability <= 1):
            self._refuse("loss_weight must be at least 0 and null_probability a probability")

    def _refuse(self, why):
        raise UserValueError(f"modality {self.name}: {why}")

    @property
    def required(self) -> bool:
        """Whether the network never learns to do without the value: then sampling must be given one."""
        return self.as_input and self.null_probability == 0

    @property
    def drawable(self) -> bool:
        """Whether `draw` can make a value that the network or the user has to be given."""
        return False

    @property
    def aggregated(self) -> bool:
        """Whether it enters the latent."""
        return self.encoder != "none"

    def check(self, value: th.Tensor) -> th.Tensor:
        """`value` itself if it is a batch of this modality; UserValueError that says what is wrong otherwise."""
        if tuple(value.shape[1:]) != self.shape:
            self._refuse(
                f"expected values of shape [B, {', '.join(map(str, self.shape))}], got {list(value.shape)}"
            )
        if not bool(value.isfinite().all()):
            self._refuse("the values contain NaN or infinity")
        return value

    # In the network

    @abstractmethod
    def make_head(self, middle_channels: int, last_channels: int, dims: int) -> th.nn.Module:
        """The module of `head`, fresh."""

    def feed(self, value: th.Tensor | None, z: th.Tensor, channels: list, inputs: dict) -> None:
        """Put the value (None: the null input) where the network sees it: variant X. channels: beside the
        latent z [B, C, H, W]; inputs: further arguments of the network."""
        self._refuse("this network has no input for it: use variant U")

    # E_i

    @property
    def needs_context(self) -> bool:
        """Whether it is encoded through cross-attention."""
        return False

    def standing_code(self, latent_shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of a `constant_code` that may stand still between two refreshes; None if there is none."""
        return None

    @property
    def encoded_rows(self) -> int:
        """Forward passes of one sample that a `standing_code` takes."""
        return 0

    def constant_code(self, unet) -> th.Tensor | None:
        """What its encoding by the U-Net needs whatever the value [K, C, H, W]; None if nothing.

        unet: `UNetEncoder` of modality_set.py.
        """
        return None

    def encode(self, value: th.Tensor, unet, code: th.Tensor | None) -> th.Tensor:
        """e_i of a batch of values. code: `constant_code`, where it is there already."""
        return value if self.encoder == "identity" else self.encoder(value)

    # D_i and the likelihood

    def expectation(self, prediction: th.Tensor) -> th.Tensor:
        """The head's output as a value."""
        return prediction

    def loss(self, prediction: th.Tensor, value: th.Tensor) -> th.Tensor:
        """KL(q(x_i) || p(x_i | z_t)) of equation 6 up to a constant: [B]."""
        return mean_flat((prediction - value) ** 2)

    def log_likelihood(
        self, prediction: th.Tensor, value: th.Tensor, variance: th.Tensor | None = None
    ) -> th.Tensor:
        """log p(x_i | z_t) in nats, summed over the value, up to a constant: [B]. Gaussians need their
        variance [B]."""
        return -((prediction - value) ** 2).flatten(1).sum(dim=1) / (2 * variance)

    @abstractmethod
    def code_length(
        self, prediction: th.Tensor, value: th.Tensor, variance: th.Tensor | None = None
    ) -> th.Tensor:
        """-log p(x_i | z_t) in nats with every constant: [B]."""

    # In data

    @property
    def data_key(self) -> str:
        """Its name in the batches that data sets make."""
        return self.name

    def from_data(self, raw: th.Tensor) -> tuple[th.Tensor, th.Tensor | None]:
        """(values, which are there, bool [B], None for all) of a batch of data."""
        return self.check(raw), None

    def to_data(self, value: th.Tensor) -> th.Tensor:
        """The inverse of `from_data`, where everything is there."""
        return value

    def start(self, random: PerSample, device) -> th.Tensor:
        """A random value from which Algorithm 1 starts, [B, *shape]."""
        return random.randn(self.shape).to(device)

    def draw(self, random: PerSample) -> th.Tensor:
        """A value drawn as the data have it, where that needs no model."""
        self._refuse("only a label of the model can be drawn at random")

    # In files and on sheets

    @abstractmethod
    def read(self, source: str, image_shape: tuple[int, int, int], class_names: Sequence[str]):
        """Values [N, ...] from a file (files.py), or GivenImages, for images of `image_shape`."""

    def pixels(self, value: th.Tensor, known: th.Tensor | None = None):
        """The values [N, ...] as images uint8 [N, H, W, C]; None where they are none. known: bool [N, 1, H, W],
        pixels that were given and come back exactly."""
        return None

    def classes(self, value: th.Tensor) -> th.Tensor | None:
        """The likeliest classes int64 [N] of values; None where they are none."""
        return None


@dataclass(frozen=True)
class ImageModality(Modality):
    """A second image [C, H, W] of the same size, such as a masked copy, a depth map, the scene at night.

    encoder: `identity` (it lies in the diffusion space already). head: `out`, the U-Net's output layer once more.
    Gaussian. derive: makes the value from the image; None if the data bring it. bounded: values lie in [-1, 1],
    predictions are clipped to that (latents are not bounded).
    """

    derive: Callable[[th.Tensor, PerSample], th.Tensor] | None = None
    bounded: bool = True
    variance_bins: int = 32

    kind = "image"
    rank = 3
    encoders = ("identity",)
    heads = ("out",)
    has_content_everywhere = True

    @property
    def input_channels(self) -> int:
        """See Modality."""
        return self.shape[0] if self.as_input else 0

    def make_head(self, middle_channels, last_channels, dims):
        """See Modality."""
        return OutputHead(last_channels, self.shape[0], dims)

    def feed(self, value, z, channels, inputs):
        """See Modality."""
        channels.append(z.new_zeros(len(z), *self.shape) if value is None else value)

    def expectation(self, prediction):
        """The image, clipped where it is bounded."""
        return prediction.clamp(-1, 1) if self.bounded else prediction

    def read(self, source, image_shape, class_names):
        """See Modality."""
        from .files import read_images  # here: models need no files

        return read_images(source, *image_shape[:2])

    def pixels(self, value, known=None):
        """See Modality."""
        from ..figures import to_uint8

        return to_uint8(value, known)

    def code_length(self, prediction, value, variance=None):
        """In 8-bit values. The 0 of a masked pixel is a 257th value that shares its bin with its two
        neighbours: the length of a masked image may be up to one bit per pixel too short."""
        log_scales = (0.5 * variance.log()).reshape(-1, *[1] * (value.dim() - 1)).expand_as(value)
        nats = discretized_gaussian_log_likelihood(value, means=prediction, log_scales=log_scales)
        return -nats.flatten(1).sum(dim=1)


@dataclass(frozen=True)
class LabelModality(Modality):
    """A class of `shape` = (classes,), as probabilities.

    encoder: `unet`, the shared U-Net at z = 0, t = 0 fed the class embedding, centred and of unit RMS; a soft label
    is the mixture of the classes' codes. centre: on the `mean` over classes, or on the encoding of the `null` input.
    head: `middle` (M: one fully connected layer, `hidden` units between where given) or `classifier` (E: ADM's
    classifier on the predicted image, `classifier`). Categorical.
    """

    encoder: str | Callable[[th.Tensor], th.Tensor] = "unet"
    head: str = "middle"
    centre: Literal["mean", "null"] = "mean"
    hidden: int | None = None
    classifier: ClassifierOptions = ClassifierOptions()

    kind = "label"
    rank = 1
    likelihood = "categorical"
    encoders = ("unet",)
    heads = ("middle", "classifier")

    def __post_init__(self):
        super().__post_init__()
        if self.centre not in ("mean", "null"):
            self._refuse(f"unknown centre {self.centre!r}: choose mean or null")

    def check(self, value):
        """See Modality; also that they are probabilities (all zero: no label)."""
        super().check(value)
        if not bool(((value >= 0).all(1) & (value.sum(1) <= 1 + 1e-4)).all()):
            self._refuse("labels must be probability vectors")
        return value

    def make_head(self, middle_channels, last_channels, dims):
        """See Modality."""
        if self.head == "classifier":
            return self.classifier.build(self.shape[0])
        return MiddleHead(middle_channels, self.shape[0], self.hidden)

    def feed(self, value, z, channels, inputs):
        """See Modality."""
        if value is not None:
            inputs["y"] = value

    @property
    def drawable(self):
        """See Modality: where the network cannot do without it, or nothing tells it."""
        return self.required or self.head == "none"

    def standing_code(self, latent_shape):
        """See Modality."""
        return (self.shape[0], *latent_shape) if self.encoder == "unet" else None

    @property
    def encoded_rows(self):
        """See Modality."""
        return self.shape[0] + (self.centre == "null") if self.encoder == "unet" else 0

    def constant_code(self, unet):
        """The codes of all classes. The U-Net's output is nearly the same for every class: without the centre
        taken off, the class cannot be seen in the latent. In float32: the differences are small."""
        if self.encoder != "unet":
            return None
        rows = th.eye(self.shape[0], device=unet.device)
        if self.centre == "null":
            rows = th.cat([rows, rows.new_zeros(1, rows.shape[1])])
            raw = unet(y=rows)
            return of_unit_rms(raw[:-1] - raw[-1:])
        raw = unet(y=rows)
        return of_unit_rms(raw - raw.mean(dim=0, keepdim=True))

    def encode(self, value, unet, code):
        """See Modality."""
        if self.encoder != "unet":
            return self.encoder(value)
        code = self.constant_code(unet) if code is None else code
        return th.einsum("bk,kchw->bchw", value.to(code), code).to(unet.dtype)

    def expectation(self, prediction):
        """The probabilities, not the likeliest class: equation 5 is linear in the code."""
        return prediction.softmax(dim=1)

    def loss(self, prediction, value):
        """The cross-entropy."""
        return F.cross_entropy(prediction, value, reduction="none")

    def log_likelihood(self, prediction, value, variance=None):
        """See Modality."""
        return (prediction.log_softmax(dim=1) * value).sum(dim=1)

    def code_length(self, prediction, value, variance=None):
        """See Modality."""
        return -self.log_likelihood(prediction, value)

    @property
    def data_key(self):
        """ADM's name for classes."""
        return "y"

    def from_data(self, raw):
        """int64 classes [B], -1 for none; or probabilities [B, classes]."""
        if raw.is_floating_point():
            return self.check(raw), None
        return one_hot(raw, self.shape[0]), raw >= 0

    def to_data(self, value):
        """See Modality."""
        return value.argmax(dim=1)

    def read(self, source, image_shape, class_names):
        """See Modality."""
        from .files import read_labels

        return read_labels(source, self, class_names)

    def classes(self, value):
        """See Modality."""
        return value.argmax(dim=1)

    def start(self, random, device):
        """See Modality."""
        return super().start(random, device).softmax(dim=1)

    def draw(self, random):
        """A uniform class, one-hot [B, classes]."""
        return one_hot(random.randint(self.shape[0]), self.shape[0])


@dataclass(frozen=True)
class VectorModality(Modality):
    """D numbers, such as the CLIP representation of the image.

    encoder: `unet`, the shared U-Net at z = 0, t = 0 fed the vector through its cross-attention, relative to the
    null input. The direction is encoded, times the vector's RMS: an uncertain estimate, which lies near the mean
    0, moves the latent little. head: `middle`, two layers with `hidden` ReLU units between. Gaussian. Variant U.
    """

    encoder: str | Callable[[th.Tensor], th.Tensor] = "unet"
    head: str = "middle"
    hidden: int | None = None
    variance_bins: int = 32

    kind = "vector"
    rank = 1
    encoders = ("unet",)
    heads = ("middle",)

    def __post_init__(self):
        super().__post_init__()
        if self.as_input:
            self._refuse("this network has no input for a vector: use variant U")

    def make_head(self, middle_channels, last_channels, dims):
        """See Modality."""
        return MiddleHead(middle_channels, self.shape[0], self.hidden)

    @property
    def needs_context(self):
        """See Modality."""
        return self.encoder == "unet"

    def constant_code(self, unet):
        """The raw code of the null input [1, C, H, W]."""
        if self.encoder != "unet":
            return None
        return unet(context=unet.tokens(th.zeros(1, *self.shape, device=unet.device)))

    def encode(self, value, unet, code):
        """See Modality."""
        if self.encoder != "unet":
            return self.encoder(value)
        rms = value.float().square().mean(dim=1, keepdim=True).sqrt()
        rows = value.float() / rms.clamp(min=1e-12)
        null = self.constant_code(unet) if code is None else code
        raw = unet(context=unet.tokens(rows))
        return (of_unit_rms(raw - null) * rms.reshape(-1, *[1] * (raw.dim() - 1))).to(unet.dtype)

    def read(self, source, image_shape, class_names):
        """See Modality."""
        from .files import read_vectors

        return read_vectors(source, self)

    def code_length(self, prediction, value, variance=None):
        """By the density: a vector is not 8 bits deep."""
        variance = variance[:, None]
        nats = 0.5 * ((prediction - value) ** 2 / variance + (2 * th.pi * variance).log())
        return nats.flatten(1).sum(dim=1)


KINDS = {cls.kind: cls for cls in (ImageModality, LabelModality, VectorModality)}


def of_unit_rms(codes: th.Tensor) -> th.Tensor:
    """Codes [K, ...], each of RMS 1; a fresh network's, whose output layer is zero, stay zero."""
    rms = codes.flatten(1).square().mean(dim=1).sqrt()
    return codes / rms.clamp(min=1e-12).reshape(-1, *[1] * (codes.dim() - 1))


def one_hot(labels: th.Tensor, classes: int) -> th.Tensor:
    """int64 labels [B] as float32 probability vectors [B, classes]; -1 (unlabelled) gives zeros.

    UserValueError outside -1..classes-1.
    """
    if len(labels) and not -1 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UserValueError(
            f"labels must lie in 0..{classes - 1} (or -1 for none), got {int(labels.min())}..{int(labels.max())}"
        )
    known = (labels >= 0).unsqueeze(1)
    return F.one_hot(labels.clamp(min=0), classes).float() * known


# What a flag or a configuration file asks for

PRESETS = ("masked", "label", "image", "representation")


def preset(name: str, kind: str, image_shape: tuple[int, int, int], num_classes: int | None) -> Modality:
    """A modality of the paper: `masked` (image), `label`, a second `image` or the `representation` of a CLIP
    ViT-H, 1024 numbers, for images of `image_shape`.

    UserValueError if `kind` is none of PRESETS, or a label is asked of data without labels.
    """
    if kind == "masked":
        # 16 pixels at 64, in proportion elsewhere.
        return ImageModality(name, image_shape, derive=RandomPatches(size=max(1, round(image_shape[1] / 4))))
    if kind == "image":
        return ImageModality(name, image_shape)
    if kind == "representation":
        return VectorModality(name, (1024,), hidden=1024)
    if kind != "label":
        raise UserValueError(
            f"modality {name}: unknown kind {kind!r}, choose one of {', '.join(PRESETS)}{closest(kind, PRESETS)}"
        )
    if not num_classes:
        raise UserValueError(
            f"modality {name}: the data have no labels; set --num_classes or give labelled data"
        )
    channels, size = image_shape[:2]
    return LabelModality(name, (num_classes,), classifier=ClassifierOptions(size, channels))


def parse_modalities(
    spec: str | Mapping[str, Mapping] | Sequence[Modality],
    image_shape: tuple[int, int, int],
    num_classes: int | None = None,
) -> tuple[Modality, ...]:
    """The modalities that a flag or a configuration file asks for.

    spec: "masked:X,label:U" (names of presets with their variant, U unless given), or a mapping from a name
    to a preset's name under `preset` and any fields of its class to change; `variant: X` stands for as_input,
    `patches` for those of RandomPatches, `classifier` for those of ClassifierOptions; or modalities that are made
    already. UserValueError for anything unknown.
    """
    if not isinstance(spec, str | Mapping):
        return tuple(spec)
    return tuple(
        _from_options(name, dict(options), image_shape, num_classes)
        for name, options in _as_mapping(spec).items()
    )


def wants_labels(spec: str | Mapping[str, Mapping]) -> bool:
    """Whether a specification as for `parse_modalities` has a label in it, which the data must bring."""
    if not isinstance(spec, str | Mapping):
        return any(m.data_key == "y" for m in spec)
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


def _from_options(name, options, image_shape, num_classes):
    base = preset(name, options.pop("preset", name), image_shape, num_classes)
    variant = str(options.pop("variant", "U")).upper()
    if variant not in ("U", "X"):
        raise UserValueError(f"modality {name}: unknown variant {variant!r}, choose U or X")
    changes: dict = {"as_input": variant == "X"}
    if "patches" in options:
        if not isinstance(base.derive, RandomPatches):
            raise UserValueError(f"modality {name}: only masked images have patches")
        changes["derive"] = replace(base.derive, **_known(name, options.pop("patches"), RandomPatches))
    if "classifier" in options:
        if options.get("head") != "classifier":
            raise UserValueError(f"modality {name}: options of the classifier need head: classifier")
        own = _known(name, options.pop("classifier"), ClassifierOptions)
        changes["classifier"] = replace(base.classifier, **own)
    changes |= _known(name, options, type(base))
    if isinstance(base, VectorModality) and "shape" in changes:
        changes.setdefault("hidden", changes["shape"][0])  # as wide as it is itself
    return replace(base, **changes)


def _known(name, options, cls):
    allowed = {f.name for f in fields(cls)} - {"name", "derive", "classifier", "image_size", "image_channels"}
    if unknown := sorted(set(options) - allowed):
        raise UserValueError(
            f"modality {name}: unknown option {', '.join(unknown)}; known: {', '.join(sorted(allowed))}{closest(unknown[0], allowed)}"
        )
    return {key: tuple(value) if key == "shape" else value for key, value in options.items()}
