"""What every kind of data beside the image can do (paper section 2.2): `Modality`, the base of kinds.py.

It says how a value is encoded, expected, scored, read from data and files and written, so that a new kind is one
class. Values travel as tensors: images [B, C, H, W] in [-1, 1], labels as probability vectors [B, classes], vectors
[B, D]. An all-zero value is the null input of every kind: a completely masked image, no label.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch as th
import torch.nn.functional as F

from ..errors import UserValueError
from ..nn import mean_flat
from ..seeding import PerSample

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

    def control(self, names: Sequence[str] = ()) -> dict[str, Any]:
        """How a page shows it (fields of page.Part): its size, classes, colours. names: of the classes."""
        return {}

    def classes(self, value: th.Tensor) -> th.Tensor | None:
        """The likeliest classes int64 [N] of values; None where they are none."""
        return None


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
