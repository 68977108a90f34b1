"""What is generated beside the image: one class per kind of data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch as th
import torch.nn.functional as F

from ..errors import UserValueError
from ..losses import discretized_gaussian_log_likelihood
from ..seeding import PerSample
from .heads import ClassifierOptions, MiddleHead, OutputHead
from .modality import Modality, channel_mean, gaussian_length, of_unit_rms, one_hot


def are_probabilities(value: th.Tensor) -> bool:
    """Whether [B, K, ...] are probabilities of K classes, or all zero where there is none."""
    return bool(((value >= 0).all(1) & (value.sum(1) <= 1 + 1e-4)).all())


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

    def control(self, names=()):
        """See Modality; one that is made from the image may have holes."""
        channels, height, width = self.shape
        return dict(channels=channels, height=height, width=width, holes=self.derive is not None)

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
        if not are_probabilities(value):
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

    def control(self, names=()):
        """See Modality."""
        return dict(classes=names or self.class_names or tuple(map(str, range(self.shape[0]))))

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
        if not are_probabilities(value):
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

    def control(self, names=()):
        """See Modality: drawn in the classes' colours."""
        classes, height, width = self.shape
        names = tuple(map(str, range(classes))) if self.palette is None else tuple(self.palette.classes)
        own = dict(classes=names, colors=self.colors().tolist(), numbered=self.palette is None)
        return own | dict(channels=3, height=height, width=width)


KINDS = {cls.kind: cls for cls in (ImageModality, LabelModality, VectorModality, MapModality)}
