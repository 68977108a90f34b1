"""What is generated beside the image: one class per kind of data (paper section 2.2).

Each kind says how it is encoded, expected, scored, read from data and files and written, so that a new kind is
one class here. Values travel as tensors: images [B, C, H, W] in [-1, 1], labels as probability vectors
[B, classes], vectors [B, D]. An all-zero value is the null input of every kind: a completely masked image, no
label.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch as th
import torch.nn.functional as F

from ..errors import UserValueError, closest
from ..losses import discretized_gaussian_log_likelihood
from ..nn import mean_flat
from ..seeding import PerSample
from .heads import ClassifierOptions, MiddleHead, OutputHead
from .masks import RandomPatches

RESERVED = ("arr_0", "y", "position")  # names with another meaning in batches and files


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
    nearest: ClassVar[bool] = False  # pixels are picked, not averaged, where a value is resized
    embedded: ClassVar[bool] = False  # the network sees it by a matrix of its own on the timestep embedding

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
        latent z [B, C, H, W]; inputs: further arguments of the network; under `embedded` the embedded values."""
        if not self.embedded:
            self._refuse("this network has no input for it: use variant U")
        if value is not None:
            inputs.setdefault("embedded", {})[self.name] = value

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

    def _mixed(self, value, unet, code):
        """The sum of the codes [D, C, H, W] of D directions, weighted by a value [B, D]."""
        code = self.constant_code(unet) if code is None else code
        return th.einsum("bk,kchw->bchw", value.to(code), code).to(unet.dtype)

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

    @classmethod
    def completed(cls, name: str, options: dict, column) -> dict:
        """`options` of a specification with what the data say: `column` (data.py) has the values."""
        return options

    def from_cell(self, cell) -> np.ndarray:
        """One value as it is stored (cells.Cell), as an array: [H, W] or [H, W, C] where it lies on the image's
        pixels and is cut with them, `shape` otherwise. UserError that names the value for one that cannot be used."""
        found = cell.numbers().astype(np.float32)
        if found.size != np.prod(self.shape):
            raise cell.refuse(
                f"{self.name} needs {' x '.join(map(str, self.shape))} numbers, not {found.size}"
            )
        if not np.isfinite(found).all():
            raise cell.refuse("it holds NaN or infinity")
        return found.reshape(self.shape)

    def finish(self, array: np.ndarray) -> np.ndarray:
        """What `from_cell` gave, once it is cut, as `from_data` takes it (without the batch's dimension)."""
        return array

    def empty(self) -> np.ndarray:
        """What stands for a missing value beside those of `finish`."""
        return np.zeros(self.shape, np.float32)

    def read(self, source: str, image_shape: tuple[int, int, int], class_names: Sequence[str]):
        """Values [N, ...] from a file, folder or array, as training reads them, for images of `image_shape`; or
        GivenImages (files.py)."""
        from .files import read_values

        return read_values(source, self, image_shape)

    def stored(self, value: th.Tensor, known: th.Tensor | None = None) -> np.ndarray:
        """Values [N, ...] as files of samples hold them. known: as of `pixels`."""
        pixels = self.pixels(value, known)
        return value.float().cpu().numpy() if pixels is None else pixels

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

    encoder: `identity` (it lies in the diffusion space already; other numbers of channels are repeated or averaged).
    head: `out`, the U-Net's output layer once more. Gaussian. derive: makes the value from the image; None if the
    data bring it. bounded: values lie in [-1, 1], predictions are clipped to that (latents are not bounded). range:
    the stored numbers that become -1 and 1; dtype: theirs, uint8, uint16 or float32. palette: it is a label map in
    these colours, read as one.
    """

    derive: Callable[[th.Tensor, PerSample], th.Tensor] | None = None
    bounded: bool = True
    variance_bins: int = 32
    range: tuple[float, float] = (0, 255)
    dtype: str = "uint8"
    palette: Any = None

    kind = "image"
    rank = 3
    encoders = ("identity",)
    heads = ("out",)
    has_content_everywhere = True

    def __post_init__(self):
        super().__post_init__()
        if self.dtype not in ("uint8", "uint16", "float32") or len(self.range) != 2:
            self._refuse("dtype is one of uint8, uint16, float32, and range two numbers")
        if not -float("inf") < self.range[0] < self.range[1] < float("inf"):
            self._refuse(f"range must rise from a number to another, not {list(self.range)}")
        if self.palette is not None and self.shape[0] != 3:
            self._refuse("a palette paints images of 3 channels")

    @property
    def nearest(self) -> bool:
        """See Modality."""
        return self.palette is not None

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

    def encode(self, value, unet, code):
        """See Modality. Linear, so that expectations are encoded exactly."""
        if self.encoder != "identity" or value.shape[1] == unet.channels:
            return super().encode(value, unet, code)
        return th.einsum("ck,bkhw->bchw", channel_mean(unet.channels, value.shape[1]).to(value), value)

    @classmethod
    def completed(cls, name, options, column):
        """See Modality: channels, type and range of the first image."""
        from .cells import as_palette, palette_mapping, pixels_of

        if "palette" in options:
            return {**options, "palette": palette_mapping(as_palette(options["palette"])), "channels": 3}
        if "channels" in options and "dtype" in options:
            return options
        first = column.first()
        found = pixels_of(first, options.get("channels"))
        options = {"channels": found.shape[2], "dtype": found.dtype.name, **options}
        if "range" not in options:
            if found.dtype.kind == "f":
                raise UserValueError(
                    f"modality {name}: {first.where} holds floats: say their range, as in range: [0, 10]"
                )
            options["range"] = [0, int(np.iinfo(found.dtype).max)]
        return options

    def from_cell(self, cell):
        """See Modality."""
        from .cells import in_range, numbers_of, pixels_of

        if self.palette is None:
            found = pixels_of(cell, self.shape[0])
            if found.dtype.name == "uint8" and tuple(self.range) == (0, 255):
                return found
            return in_range(found, *self.range, cell)
        numbers = numbers_of(cell, len(self.palette), self.palette)
        return self.palette.paint(numbers)

    def finish(self, array):
        """See Modality."""
        from .cells import scaled

        return scaled(array, *self.range)

    def expectation(self, prediction):
        """The image, clipped where it is bounded."""
        return prediction.clamp(-1, 1) if self.bounded else prediction

    def read(self, source, image_shape, class_names):
        """See Modality; what is made from the image may have holes."""
        from .files import read_images, read_values  # here: models need no files

        return (
            read_images(source, *image_shape[:2]) if self.derive else read_values(source, self, image_shape)
        )

    def pixels(self, value, known=None):
        """See Modality."""
        from ..figures import to_uint8

        return to_uint8(value, known)

    def stored(self, value, known=None):
        """See Modality: 8 bits as ADM stores samples, others in their own range and type."""
        from .cells import restored

        if self.dtype == "uint8" and tuple(self.range) == (0, 255):
            return self.pixels(value, known)
        return restored(value.permute(0, 2, 3, 1).float().cpu().numpy(), *self.range, self.dtype)

    def code_length(self, prediction, value, variance=None):
        """In 8-bit values; 16-bit and float ones by the density, the former times their bins' width. The 0 of a
        masked pixel is a 257th value that shares its bin with its two neighbours: the length of a masked image may
        be up to one bit per pixel too short."""
        if self.dtype != "uint8":
            bins = (self.range[1] - self.range[0]) / 2 if self.dtype == "uint16" else 1.0
            return gaussian_length(prediction, value, variance) + value[0].numel() * float(np.log(bins))
        log_scales = (0.5 * variance.log()).reshape(-1, *[1] * (value.dim() - 1)).expand_as(value)
        nats = discretized_gaussian_log_likelihood(value, means=prediction, log_scales=log_scales)
        return -nats.flatten(1).sum(dim=1)


@dataclass(frozen=True)
class LabelModality(Modality):
    """A class of `shape` = (classes,), as probabilities.

    encoder: `unet`, the shared U-Net at z = 0, t = 0 fed the class embedding, centred and of unit RMS; a soft label
    is the mixture of the classes' codes. centre: on the `mean` over classes, or on the encoding of the `null` input.
    head: `middle` (M: one fully connected layer, `hidden` units between where given) or `classifier` (E: ADM's
    classifier on the predicted image, `classifier`). Categorical. embedded: it is not the network's `y`, which is
    one label's, but has an embedding of its own. class_names: its own, where it is not `y`.
    """

    encoder: str | Callable[[th.Tensor], th.Tensor] = "unet"
    head: str = "middle"
    centre: Literal["mean", "null"] = "mean"
    hidden: int | None = None
    classifier: ClassifierOptions = ClassifierOptions()
    embedded: bool = False
    class_names: tuple[str, ...] = ()

    kind = "label"
    rank = 1
    likelihood = "categorical"
    encoders = ("unet",)
    heads = ("middle", "classifier")

    def __post_init__(self):
        super().__post_init__()
        if self.centre not in ("mean", "null"):
            self._refuse(f"unknown centre {self.centre!r}: choose mean or null")
        if self.class_names and len(self.class_names) != self.shape[0]:
            self._refuse(f"{len(self.class_names)} class_names for {self.shape[0]} classes")

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
        if self.embedded:
            super().feed(value, z, channels, inputs)
        elif value is not None:
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
            raw = self._through(unet, rows)
            return of_unit_rms(raw[:-1] - raw[-1:])
        raw = self._through(unet, rows)
        return of_unit_rms(raw - raw.mean(dim=0, keepdim=True))

    def encode(self, value, unet, code):
        """See Modality."""
        return self._mixed(value, unet, code) if self.encoder == "unet" else self.encoder(value)

    def _through(self, unet, rows):
        return unet(present=unet.columns(self.name, rows)) if self.embedded else unet(y=rows)

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
        """ADM's name for classes, or its own."""
        return self.name if self.embedded else "y"

    @classmethod
    def completed(cls, name, options, column):
        """See Modality: the classes that there are."""
        if "classes" in options or "class_names" in options:
            known = options.get("class_names") or range(options["classes"])
            return {**options, "classes": len(known), "class_names": [str(k) for k in known]}
        names = column.classes()
        return {**options, "classes": len(names), "class_names": names}

    def from_cell(self, cell):
        """See Modality: int64 []."""
        from .cells import label_of

        return np.array(label_of(cell, self.class_names, self.shape[0]), dtype=np.int64)

    def empty(self):
        """See Modality."""
        return np.array(-1, dtype=np.int64)

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

        return read_labels(source, self, self.class_names or class_names)

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
    0, moves the latent little. embedded, where there is no cross-attention: the U-Net is fed each of the D directions
    through a matrix of the vector's own, and the value mixes their codes, which stand still. head: `middle`, two
    layers with `hidden` ReLU units between. Gaussian. range: numbers that become -1 and 1; None: as they are.
    """

    encoder: str | Callable[[th.Tensor], th.Tensor] = "unet"
    head: str = "middle"
    hidden: int | None = None
    variance_bins: int = 32
    embedded: bool = False
    range: tuple[float, float] | None = None

    kind = "vector"
    rank = 1
    encoders = ("unet",)
    heads = ("middle",)

    def __post_init__(self):
        super().__post_init__()
        if self.as_input and not self.embedded:
            self._refuse("this network has no input for a vector: use variant U")

    def make_head(self, middle_channels, last_channels, dims):
        """See Modality."""
        return MiddleHead(middle_channels, self.shape[0], self.hidden)

    @property
    def needs_context(self):
        """See Modality."""
        return self.encoder == "unet" and not self.embedded

    def standing_code(self, latent_shape):
        """See Modality."""
        return (self.shape[0], *latent_shape) if self.encoder == "unet" and self.embedded else None

    @property
    def encoded_rows(self):
        """See Modality."""
        return 2 * self.shape[0] if self.encoder == "unet" and self.embedded else 0

    def constant_code(self, unet):
        """The raw code of the null input [1, C, H, W]; embedded: codes of the directions [D, C, H, W], each against
        its opposite."""
        if self.encoder != "unet":
            return None
        if self.embedded:
            rows = th.eye(self.shape[0], device=unet.device)
            raw = unet(present=unet.columns(self.name, th.cat([rows, -rows])))
            return of_unit_rms(raw[: len(rows)] - raw[len(rows) :])
        return unet(context=unet.tokens(th.zeros(1, *self.shape, device=unet.device)))

    def encode(self, value, unet, code):
        """See Modality."""
        if self.encoder != "unet":
            return self.encoder(value)
        if self.embedded:
            return self._mixed(value / self.shape[0] ** 0.5, unet, code)
        rms = value.float().square().mean(dim=1, keepdim=True).sqrt()
        rows = value.float() / rms.clamp(min=1e-12)
        if code is None:  # one pass for both
            raw = unet(context=unet.tokens(th.cat([rows, rows.new_zeros(1, rows.shape[1])])))
            raw, code = raw[:-1], raw[-1:]
        else:
            raw = unet(context=unet.tokens(rows))
        return (of_unit_rms(raw - code) * rms.reshape(-1, *[1] * (raw.dim() - 1))).to(unet.dtype)

    @classmethod
    def completed(cls, name, options, column):
        """See Modality: as many numbers as the first value has."""
        if "shape" in options or hasattr(cls, "shape"):
            return options
        return {**options, "shape": [int(column.first().numbers().size)]}

    def from_cell(self, cell):
        """See Modality."""
        found = super().from_cell(cell)
        if self.range is None:
            return found
        from .cells import in_range

        low, high = self.range
        return (in_range(found, low, high, cell) - low) / ((high - low) / 2) - 1

    def read(self, source, image_shape, class_names):
        """See Modality; also numbers, as in "0.5,-1"."""
        from .files import read_vectors

        return read_vectors(source, self)

    def stored(self, value, known=None):
        """See Modality, in its own range."""
        found = super().stored(value, known)
        return (
            found
            if self.range is None
            else (found + 1) * ((self.range[1] - self.range[0]) / 2) + self.range[0]
        )

    def code_length(self, prediction, value, variance=None):
        """By the density: a vector is not 8 bits deep."""
        return gaussian_length(prediction, value, variance)


@dataclass(frozen=True)
class MapModality(Modality):
    """A class for each pixel, as probabilities [K, H, W], all 0 where a pixel has none (void).

    encoder: `palette`, the mixture of the classes' colours: linear, so expectations are encoded exactly. palette
    (palettes.Palette): colours and names, and how files of colours are read; None: files hold numbers. head: `out`
    with K channels. Categorical, for each pixel.
    """

    encoder: str | Callable[[th.Tensor], th.Tensor] = "palette"
    palette: Any = None

    kind = "map"
    rank = 3
    likelihood = "categorical"
    encoders = ("palette",)
    heads = ("out",)
    has_content_everywhere = True
    nearest = True

    def __post_init__(self):
        super().__post_init__()
        if self.palette is not None and len(self.palette) != self.shape[0]:
            self._refuse(f"palette {self.palette.name} has {len(self.palette)} classes, not {self.shape[0]}")

    @property
    def input_channels(self) -> int:
        """See Modality."""
        return self.shape[0] if self.as_input else 0

    def check(self, value):
        """See Modality; also that every pixel has probabilities (all zero: void)."""
        super().check(value)
        if not bool(((value >= 0).all(1) & (value.sum(1) <= 1 + 1e-4)).all()):
            self._refuse("every pixel must have probabilities of its classes")
        return value

    def make_head(self, middle_channels, last_channels, dims):
        """See Modality."""
        return OutputHead(last_channels, self.shape[0], dims)

    def feed(self, value, z, channels, inputs):
        """See Modality."""
        channels.append(z.new_zeros(len(z), *self.shape) if value is None else value)

    def colors(self) -> np.ndarray:
        """Of the classes, uint8 [K, 3]."""
        from .cells import even_colors

        return even_colors(self.shape[0]) if self.palette is None else self.palette.colors

    def class_codes(self, channels: int) -> th.Tensor:
        """What stands for each class in an image of so many channels: [K, channels] in [-1, 1]. The colours; even
        levels of grey; else fixed random directions of RMS 1 (latents)."""
        if channels == 3:
            return th.from_numpy(self.colors().astype(np.float32)) / 127.5 - 1
        if channels == 1:
            return th.linspace(-1, 1, self.shape[0])[:, None]
        return of_unit_rms(th.randn(self.shape[0], channels, generator=th.Generator().manual_seed(0)))

    def encode(self, value, unet, code):
        """See Modality."""
        if self.encoder != "palette":
            return self.encoder(value)
        return th.einsum("bkhw,kc->bchw", value, self.class_codes(unet.channels).to(value)).to(unet.dtype)

    def expectation(self, prediction):
        """The probabilities of every pixel."""
        return prediction.softmax(dim=1)

    def loss(self, prediction, value):
        """The cross-entropy, a mean over the pixels; those without a class add nothing."""
        return -(prediction.log_softmax(dim=1) * value).sum(dim=1).flatten(1).mean(dim=1)

    def log_likelihood(self, prediction, value, variance=None):
        """See Modality."""
        return (prediction.log_softmax(dim=1) * value).flatten(1).sum(dim=1)

    def code_length(self, prediction, value, variance=None):
        """See Modality."""
        return -self.log_likelihood(prediction, value)

    @classmethod
    def completed(cls, name, options, column):
        """See Modality: the palette's classes, or the numbers that occur."""
        from .cells import as_palette, numbers_of, palette_mapping

        if "palette" in options:
            palette = as_palette(options["palette"])
            return {"classes": len(palette), **options, "palette": palette_mapping(palette)}
        if "classes" in options:
            return options
        return {
            **options,
            "classes": 1 + max(int(numbers_of(cell, 255, None).max()) for cell in column.values()),
        }

    def from_cell(self, cell):
        """See Modality: int64 [H, W]."""
        from .cells import numbers_of

        return numbers_of(cell, self.shape[0], self.palette)

    def finish(self, array):
        """See Modality."""
        return np.ascontiguousarray(array, dtype=np.int64)

    def empty(self):
        """See Modality."""
        return np.full(self.shape[1:], -1, np.int64)

    def from_data(self, raw):
        """int64 classes [B, H, W], -1 for none; or probabilities [B, K, H, W]."""
        if raw.is_floating_point():
            return self.check(raw), None
        return one_hot(raw.flatten(), self.shape[0]).unflatten(0, raw.shape).permute(
            0, 3, 1, 2
        ).contiguous(), None

    def to_data(self, value):
        """See Modality."""
        return th.where(value.sum(dim=1) > 0, value.argmax(dim=1), -1)

    def of_colors(self, images: th.Tensor) -> th.Tensor:
        """Values [B, *shape] of label maps painted in the classes' colours, [B, 3, H, W] in [-1, 1], of any multiple of
        the size: where a value covers several pixels, their mixture. Other colours are no class. UserValueError for
        another size."""
        factor = images.shape[-1] // self.shape[2] or 1
        if images.shape[1] != 3 or tuple(images.shape[2:]) != tuple(factor * side for side in self.shape[1:]):
            self._refuse(f"maps of {list(images.shape[1:])} do not fit values of {list(self.shape)}")
        away = images[:, None] - self.class_codes(3).to(images)[:, :, None, None]
        value = (away.abs().amax(dim=2) < 1 / 127.5).to(images)
        return F.avg_pool2d(value, factor) if factor > 1 else value

    def painted(self, value: th.Tensor, factor: int = 1) -> th.Tensor:
        """The likeliest classes' colours [B, 3, factor H, factor W] in [-1, 1]."""
        images = self.class_codes(3).to(value)[value.argmax(dim=1)].permute(0, 3, 1, 2)
        return images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)

    def start(self, random, device):
        """See Modality."""
        return super().start(random, device).softmax(dim=1)

    def stored(self, value, known=None):
        """See Modality: numbers of the likeliest classes [N, H, W], 255 where there is none."""
        numbers = self.to_data(value).cpu().numpy()
        return np.where(numbers < 0, 255, numbers).astype(np.uint8 if self.shape[0] <= 255 else np.uint16)

    def pixels(self, value, known=None):
        """See Modality: painted in the classes' colours, black where there is none."""
        colors = np.concatenate([self.colors(), np.zeros((1, 3), np.uint8)])
        return colors[self.to_data(value).cpu().numpy()]


KINDS = {cls.kind: cls for cls in (ImageModality, LabelModality, VectorModality, MapModality)}


def of_unit_rms(codes: th.Tensor) -> th.Tensor:
    """Codes [K, ...], each of RMS 1; a fresh network's, whose output layer is zero, stay zero."""
    rms = codes.flatten(1).square().mean(dim=1).sqrt()
    return codes / rms.clamp(min=1e-12).reshape(-1, *[1] * (codes.dim() - 1))


def channel_mean(channels: int, own: int) -> th.Tensor:
    """The matrix [channels, own] that repeats channels in turn, or averages every so-many-th."""
    there, here = th.arange(channels)[:, None], th.arange(own)[None]
    where = (there % min(channels, own) == here % min(channels, own)).float()
    return where / where.sum(dim=1, keepdim=True)


def gaussian_length(mean: th.Tensor, value: th.Tensor, variance: th.Tensor) -> th.Tensor:
    """-log of the density of values [B, ...] in nats, variance [B]: [B]."""
    variance = variance.reshape(-1, *[1] * (value.dim() - 1))
    return (0.5 * ((mean - value) ** 2 / variance + (2 * th.pi * variance).log())).flatten(1).sum(dim=1)


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

PRESETS = {"masked": "image", "label": "label", "image": "image", "representation": "vector", "map": "map"}
DERIVED = ("masked",)  # presets whose values are made from the image


def preset(name: str, kind: str, image_shape: tuple[int, int, int], num_classes: int | None) -> Modality:
    """A modality of the paper: `masked` (image), `label`, a second `image`, the `representation` of a CLIP
    ViT-H, 1024 numbers, or a `map` of classes, for images of `image_shape`.

    UserValueError if `kind` is none of PRESETS, or a label is asked of data without labels.
    """
    if kind == "masked":
        # 16 pixels at 64, in proportion elsewhere.
        return ImageModality(name, image_shape, derive=RandomPatches(size=max(1, round(image_shape[1] / 4))))
    if kind == "image":
        return ImageModality(name, image_shape)
    if kind == "representation":
        return VectorModality(name, (1024,), hidden=1024)
    if kind not in PRESETS:
        raise UserValueError(
            f"modality {name}: unknown kind {kind!r}, choose one of {', '.join(PRESETS)}{closest(kind, PRESETS)}"
        )
    if not num_classes and kind == "map":
        raise UserValueError(f"modality {name}: a map needs classes or a palette, as in classes: 5")
    if not num_classes:
        raise UserValueError(
            f"modality {name}: the data have no labels; set --num_classes or give labelled data"
        )
    if kind == "map":
        return MapModality(name, (num_classes, *image_shape[1:]))
    channels, size = image_shape[:2]
    return LabelModality(name, (num_classes,), classifier=ClassifierOptions(size, channels))


def parse_modalities(
    spec: str | Mapping[str, Mapping] | Sequence[Modality],
    image_shape: tuple[int, int, int],
    num_classes: int | None = None,
    embedded: bool = False,
) -> tuple[Modality, ...]:
    """The modalities that a flag or a configuration file asks for.

    spec: "masked:X,label:U" (names of presets with their variant, U unless given; depth=image:U under another name),
    or a mapping, also as YAML in braces, from a name to a preset's name under `preset`, or to a class of your own
    under `target` (package.module.Class), and any fields of its class to change; `variant: X` stands for as_input,
    `channels` and `classes` for a shape, `patches` for those of RandomPatches, `classifier` for those of
    ClassifierOptions; or modalities that are made already. The first label is the network's y; others, and with
    `embedded` vectors, are embedded. UserValueError for anything unknown.
    """
    if not isinstance(spec, str | Mapping):
        return tuple(spec)
    found = []
    for name, options in as_mapping(spec).items():
        m = _from_options(name, dict(options), image_shape, num_classes, embedded)
        if isinstance(m, LabelModality) and not m.embedded and any(other.data_key == "y" for other in found):
            m = replace(m, embedded=True)
        found.append(m)
    return tuple(found)


def wants_labels(spec: str | Mapping[str, Mapping] | Sequence[Modality]) -> bool:
    """Whether a specification as for `parse_modalities` has a label in it, which the data must bring."""
    if not isinstance(spec, str | Mapping):
        return any(m.data_key == "y" for m in spec)
    return label_in(spec) is not None


def label_in(spec: str | Mapping[str, Mapping]) -> str | None:
    """The name of the first label of a specification: the network's y."""
    kinds = ((name, kind_of(name, options)) for name, options in as_mapping(spec).items())
    return next((name for name, cls in kinds if cls and issubclass(cls, LabelModality)), None)


def kind_of(name: str, options: Mapping) -> type[Modality] | None:
    """The class that a modality's options ask for; None where they leave it to the data."""
    if "target" in options:
        return resolve_target(name, options["target"])
    return KINDS.get(PRESETS.get(options.get("preset", name), ""))


def resolve_target(name: str, target: object) -> type[Modality]:
    """The subclass of Modality at package.module.Class. Its module is imported, which runs it: from PYTHONPATH, or from
    the folder one is in; nothing of it is called before it is known to be such a class. UserValueError otherwise."""
    import importlib
    import sys

    at = f"modality {name}: target {target}"
    module_name, _, attribute = target.rpartition(".") if isinstance(target, str) else ("", "", "")
    if not module_name or not all(part.isidentifier() for part in target.split(".")):
        raise UserValueError(f"{at} is not of the form package.module.Class")
    path = list(sys.path)
    sys.path.append("")  # as of `python -m`, after everything that is installed
    try:
        found = getattr(importlib.import_module(module_name), attribute, None)
    except ModuleNotFoundError as error:
        raise UserValueError(f"{at}: there is no module {error.name}; put its folder on PYTHONPATH") from None
    except Exception as error:
        raise UserValueError(f"{at} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path[:] = path
    if not (isinstance(found, type) and issubclass(found, Modality)):
        raise UserValueError(
            f"{at} is {'no class of modalities' if found is not None else 'not in its module'}"
        )
    return found


def as_mapping(spec: str | Mapping) -> dict[str, dict]:
    """A specification as a mapping from names to options. UserValueError for one that is none."""
    if isinstance(spec, str) and spec.strip().startswith("{"):
        spec = _yaml(spec)
    if isinstance(spec, str):
        parts = [part.strip().partition(":") for part in spec.split(",") if part.strip()]
        found = {}
        for name, _, variant in parts:
            name, renamed, kind = (word.strip() for word in name.partition("="))
            if name in found:
                raise UserValueError(f"modality names must differ: {spec}")
            found[name] = {**({"preset": kind} if renamed else {}), "variant": variant.strip() or "U"}
        return found
    for name, options in spec.items():
        if not (options is None or isinstance(options, Mapping)):
            raise UserValueError(
                f"modality {name}: expected options by name (such as variant: X), got {options!r}"
            )
    return {str(name): dict(options or {}) for name, options in spec.items()}


def _yaml(text):
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserValueError(
            f"modalities {text!r} are not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(found, Mapping):
        raise UserValueError(f"modalities {text!r} are no mapping from names to options")
    return found


def _from_options(name, options, image_shape, num_classes, embedded):
    variant = str(options.pop("variant", "U")).upper()
    if variant not in ("U", "X"):
        raise UserValueError(f"modality {name}: unknown variant {variant!r}, choose U or X")
    changes: dict = {"as_input": variant == "X"}
    cls = kind_of(name, options)
    if options.get("palette") is not None and hasattr(cls, "palette"):
        from .cells import as_palette

        options["palette"] = as_palette(options["palette"])
        is_map = issubclass(cls, MapModality)
        options.setdefault("classes" if is_map else "channels", len(options["palette"]) if is_map else 3)
    for word, kinds in (("classes", LabelModality | MapModality), ("channels", ImageModality)):
        if word in options and cls is not None and issubclass(cls, kinds):
            count = options.pop(word)
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise UserValueError(
                    f"modality {name}: {word} must be a whole number from 1 on, not {count!r}"
                )
            options["shape"] = (count, *(image_shape[1:] if cls.rank == 3 else ()))
    if isinstance(options.get("class_names"), list | tuple):
        options["class_names"] = tuple(map(str, options["class_names"]))
        options.setdefault("shape", (len(options["class_names"]),))
    if "target" in options:
        return _own(name, cls, options, changes, image_shape, embedded)
    classes = options["shape"][0] if "shape" in options else num_classes
    base = preset(name, options.pop("preset", name), image_shape, classes)
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
    if isinstance(base, VectorModality):
        if "shape" in changes:
            changes.setdefault("hidden", changes["shape"][0])  # as wide as it is itself
        changes.setdefault("embedded", embedded)
    return replace(base, **changes)


def _own(name, cls, options, changes, image_shape, embedded):
    """A modality of a class of the user's; where neither it nor the options have a shape, the image's."""
    del options["target"]
    changes |= _known(name, options, cls)
    defaults = {f.name for f in fields(cls) if f.default is not MISSING}
    if "shape" not in changes and "shape" not in defaults and cls.rank == 3:
        changes["shape"] = image_shape
    if issubclass(cls, VectorModality):
        changes.setdefault("embedded", embedded)
    try:
        return cls(name, **changes)
    except TypeError as error:
        raise UserValueError(f"modality {name}: {cls.__name__}: {error}") from None


def _known(name, options, cls):
    hidden = {"name", "derive", "classifier", "image_size", "image_channels"}
    allowed = {f.name for f in fields(cls)} - hidden
    if unknown := sorted(set(options) - allowed):
        raise UserValueError(
            f"modality {name}: unknown option {', '.join(unknown)}; known: {', '.join(sorted(allowed))}{closest(unknown[0], allowed)}"
        )
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
