"""The modalities of one network: encoded, fed and read out together (paper sections 2.2.2 to 2.2.4).

`ModalitySet` holds no weights. Equation 6 is in losses.py, the bound behind it in bound.py, the network as the
samplers see it in denoiser.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch as th
import torch.distributed as dist

from ..errors import UserValueError
from ..gaussian_diffusion import GaussianDiffusion
from ..seeding import PerSample
from .aggregation import detectable_peak
from .heads import Codes, Heads, Presence, joint_gradient, predicted_image
from .modalities import KINDS, Modality

Values = dict[str, th.Tensor]

_ALONE = 256  # rows that every rank encodes by itself: they come out the same to the bit


@dataclass(frozen=True)
class Batch:
    """Values of the modalities for B samples, which of them are there, and the images they belong to.

    values: name -> tensor (modalities.py), zeros where missing; present: name -> bool [B], a name left out
    means all; images: [B, C, H, W], where they are known.
    """

    values: Values
    present: dict[str, th.Tensor] = field(default_factory=dict)
    images: th.Tensor | None = None

    def only(self, where: th.Tensor | Mapping[str, th.Tensor]) -> "Batch":
        """The batch with every modality missing except `where`, bool [B], or by name."""
        kept = {name: where[name] if isinstance(where, Mapping) else where for name in self.values}
        present = {name: self.present.get(name, kept[name]) & kept[name] for name in self.values}
        return replace(self, present=present)

    def mask(self, name: str, like: th.Tensor) -> th.Tensor | None:
        """1 where present, 0 elsewhere, shaped to multiply `like` [B, ...]; None if all are."""
        present = self.present.get(name)
        return None if present is None else present.to(like).reshape(-1, *[1] * (like.dim() - 1))


class UNetEncoder:
    """The shared U-Net as an encoder (paper section 2.2.4, encoder 3): its output at z = 0, t = 0 for values fed
    through its conditioning, without gradient, in evaluation mode.

    like: a latent [B, C, H, W]; its device and dtype are those of encodings; shared: every rank asks for the same
    values, and computes its part of them. float32; labels in bfloat16 on a GPU (cosine .9995 to float32, a vector's
    .93).
    """

    def __init__(self, modalities: "ModalitySet", network, like: th.Tensor, shared: bool = False):
        self.modalities, self.network = modalities, network
        self.size, self.device, self.dtype = like.shape[2:], like.device, like.dtype
        self.channels = like.shape[1]  # of an encoding
        self.shared = shared and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    @th.no_grad()
    def __call__(self, **inputs: th.Tensor) -> th.Tensor:
        """The network's output [K, C, H, W] for inputs [K, ...], by their names in its forward."""
        count = len(next(iter(inputs.values())))
        shared = self.shared and count > _ALONE
        own = range(dist.get_rank(), count, dist.get_world_size()) if shared else range(count)
        codes = th.zeros(count, self.modalities.image_channels, *self.size, device=self.device)
        half = self.device.type == "cuda" and th.cuda.is_bf16_supported() and set(inputs) == {"y"}
        was_training = self.network.training
        self.network.eval()
        with th.autocast(self.device.type, dtype=th.bfloat16, enabled=half):
            for first in range(0, len(own), 256):
                part = th.tensor(own[first : first + 256], device=self.device)
                codes[part] = self._part(**{name: rows[part] for name, rows in inputs.items()})
        self.network.train(was_training)
        if shared:
            dist.all_reduce(codes)
        return codes

    def _part(self, **inputs):
        modalities, count = self.modalities, len(next(iter(inputs.values())))
        z = th.zeros(count, modalities.input_channels, *self.size, device=self.device)
        if modalities.num_classes is not None:
            inputs.setdefault("y", z.new_zeros(count, modalities.num_classes))
        output = self.network(z, th.zeros(count, dtype=th.long, device=self.device), **inputs)
        output = output[0] if isinstance(output, tuple) else output
        return output[:, : modalities.image_channels].float()

    def columns(self, name: str, value: th.Tensor) -> th.Tensor:
        """`present` of the network for values [K, D] of an embedded modality, without anything else."""
        return self.modalities.told(value, None, {name: value.float()})

    def tokens(self, value: th.Tensor) -> th.Tensor:
        """A vector [B, D] as a context [B, S, context_dim]: cut into S tokens, the last filled up with zeros."""
        width = self.modalities.context_dim
        count = -(-value.shape[1] // width)
        padded = th.nn.functional.pad(value, (0, count * width - value.shape[1]))
        return padded.unflatten(1, (count, width))


class ModalitySet:
    """The modalities of one network.

    modalities: in the order of the network's input channels; image_channels: those of the image itself; process:
    the full diffusion; num_classes: if the network takes `y`; context_dim: the width of its `context`, if it has
    cross-attention; presence: whether it is told which modalities are in the latent; single_task: whether it also
    learned images without any modality (M*, E*); image_name: of the image. UserValueError for names that occur
    twice, two modalities that take the network's one class input, or a vector that the U-Net is to encode without
    cross-attention.
    """

    def __init__(
        self,
        modalities: Sequence[Modality],
        image_channels: int,
        process: GaussianDiffusion | None = None,
        *,
        num_classes: int | None = None,
        context_dim: int | None = None,
        presence: bool = False,
        single_task: bool = False,
        image_name: str = "image",
    ):
        self._by_name = {m.name: m for m in modalities}
        if image_name in self._by_name:
            raise UserValueError(f"a modality cannot be called {image_name}, as the image is")
        if len(self._by_name) != len(modalities):
            raise UserValueError(f"modality names must differ: {', '.join(m.name for m in modalities)}")
        if sum(m.data_key == "y" for m in modalities) > 1:
            raise UserValueError("the network has one class input: at most one modality can be a label")
        for m in modalities:
            if m.needs_context and context_dim is None:
                raise UserValueError(
                    f"modality {m.name}: the U-Net has no cross-attention (context_dim) to encode a vector by"
                )
        self.image_channels, self.process = image_channels, process
        self.num_classes, self.context_dim = num_classes, context_dim
        self.presence, self.single_task = presence and bool(self.aggregated), single_task
        self._settled = None

    def __iter__(self):
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Modality:
        return self._by_name[name]

    @property
    def names(self) -> list[str]:
        """Of all, in order."""
        return list(self._by_name)

    @property
    def aggregated(self) -> list[str]:
        """Names of those that enter the latent."""
        return [m.name for m in self if m.aggregated]

    def first(self, kind: str) -> Modality | None:
        """The first modality of a kind (modalities.KINDS), None where there is none."""
        return next((m for m in self if isinstance(m, KINDS[kind])), None)

    @property
    def input_channels(self) -> int:
        """Channels of the network's input: the latent's, and those of the X modalities that are images."""
        return self.image_channels + sum(m.input_channels for m in self)

    # Parts of the network

    def make_heads(self, middle_channels: int, last_channels: int, dims: int = 2) -> Heads | None:
        """The heads of all modalities, fresh; None if none has one."""
        headed = [m for m in self if m.head != "none"]
        made = {m.name: m.make_head(middle_channels, last_channels, dims) for m in headed}
        bins = {m.name: m.variance_bins for m in headed if m.likelihood == "gaussian"}
        return Heads(made, bins) if made else None

    def make_presence(self, width: int) -> Presence | None:
        """What tells the network which modalities are in the latent, and the values that are embedded; None for
        neither."""
        if not self.presence and not self.embedded:
            return None
        return Presence(self.aggregated if self.presence else (), width, self.embedded)

    def make_codes(self, latent_shape: tuple[int, ...]) -> Codes | None:
        """Where the codes of labels that the U-Net encodes stand still; None if there are none."""
        shapes = {m.name: m.standing_code(latent_shape) for m in self}
        shapes = {name: shape for name, shape in shapes.items() if shape is not None}
        return Codes(shapes) if shapes else None

    # The network with its modalities

    def apply(
        self,
        network,
        z: th.Tensor,
        timesteps: th.Tensor,
        shown: Values,
        conditioning: Mapping | None = None,
        present: th.Tensor | None = None,
        training: bool = False,
    ):
        """network(z, timesteps) with the X modalities of `shown`; those not shown get the null input.

        conditioning: what else the network is called with, such as `context`; present: see `present_among`, None
        for none. training: classifier heads pass gradients back as they say (ClassifierOptions.detach). Returns
        (output, predictions by name).
        """
        channels, inputs = [z], dict(conditioning or {})
        for m in self:
            if m.as_input:
                m.feed(shown.get(m.name), z, channels, inputs)
        if self.num_classes is not None:
            inputs.setdefault("y", z.new_zeros(len(z), self.num_classes))
        embedded = inputs.pop("embedded", {})
        if self.presence or self.embedded:
            inputs["present"] = self.told(z, present, embedded)
        output = network(th.cat(channels, dim=1) if len(channels) > 1 else z, timesteps, **inputs)
        output, predictions = output if isinstance(output, tuple) else (output, {})
        return output, {**predictions, **self._classify(network, output, z, timesteps, training)}

    def _classify(self, network, output, z, timesteps, training):
        """The logits of the classifier heads, read off the predicted image."""
        logits = {}
        for m in self:
            if m.head == "classifier":
                process, t = self._need_process(), self.indices(timesteps)
                image = predicted_image(process, output, z, t)
                if training:
                    image = image.detach() if m.classifier.detach else joint_gradient(process, image, t)
                # A network wrapped for training keeps its heads inside.
                logits[m.name] = getattr(network, "module", network).heads[m.name](image, timesteps)
        return logits

    def _need_process(self):
        if self.process is None:
            raise UserValueError("this needs the full diffusion: give ModalitySet its process")
        return self.process

    @property
    def embedded(self) -> dict[str, int]:
        """The widths of the modalities that the network sees by a matrix of their own, by name."""
        return {m.name: m.shape[0] for m in self if m.embedded and (m.as_input or m.encoder == "unet")}

    def told(self, like: th.Tensor, present: th.Tensor | None, values: Values) -> th.Tensor:
        """The network's `present` for B samples: who is in the latent, and the embedded `values` beside it, zeros for
        those that are left out."""
        columns = []
        if self.presence:
            columns.append(like.new_zeros(len(like), len(self.aggregated)) if present is None else present)
        for name, width in self.embedded.items():
            value = values.get(name)
            columns.append(like.new_zeros(len(like), width) if value is None else value.to(like))
        return th.cat(columns, dim=1) if len(columns) > 1 else columns[0]

    def present_among(self, names, like: th.Tensor, batch: Batch | None = None) -> th.Tensor | None:
        """Which modalities' shifts are in latents [B, ...], as the network is told: [B, N] of 0 and 1; None
        without `presence`. names: of those that are; batch: for which samples."""
        if not self.presence:
            return None
        columns = []
        for name in self.aggregated:
            there = None if batch is None else batch.present.get(name)
            column = like.new_full((len(like),), float(name in names))
            columns.append(column if there is None else column * there.to(column))
        return th.stack(columns, dim=1)

    # Encoders

    @th.no_grad()
    def constant_codes(self, network, like: th.Tensor, names=None) -> Values:
        """What encoding needs whatever the values, by name: for a label the codes of its classes, for a vector the
        code of its null input. Codes that the network keeps (heads.Codes) are taken as they are."""
        kept, unet = _codes_of(network), UNetEncoder(self, network, like)
        found = {}
        for m in self:
            if names is None or m.name in names:
                code = kept[m.name] if m.name in kept else m.constant_code(unet)
                if code is not None:
                    found[m.name] = code
        return found

    @th.no_grad()
    def settled_codes(self, network, like: th.Tensor) -> Values:
        """`constant_codes` of all for a network that is not being trained: computed once, and anew where its weights
        or the latent's size are others."""
        if not self.aggregated or not hasattr(network, "parameters"):
            return self.constant_codes(network, like)  # a plain function may be another one each time
        norms = th.stack(th._foreach_norm(list(network.parameters()))).tolist()
        state = (id(next(network.parameters())), like.shape[1:], like.device, like.dtype, norms)
        if self._settled is None or self._settled[0] != state:
            self._settled = state, self.constant_codes(network, like)
        return self._settled[1]

    @th.no_grad()
    def refresh_codes(self, network, like: th.Tensor) -> None:
        """Bring the codes that the network keeps up to date with its weights; called on every rank."""
        unet = UNetEncoder(self, network, like, shared=True)
        for name, code in _codes_of(network).items():
            code.copy_(self[name].constant_code(unet))

    @th.no_grad()
    def encode(self, network, batch: Batch, like: th.Tensor, codes: Values | None = None) -> Values:
        """e_i of every value in the batch, shaped like the image `like` [B, C, ...], zero where missing.

        Always under stop-gradient. codes: `constant_codes` computed before, by name.
        """
        names = [name for name in batch.values if self[name].aggregated]
        codes = {**_codes_of(network), **(codes or {})}
        unet, encodings = UNetEncoder(self, network, like), {}
        for name in names:
            value, there = batch.values[name], batch.present.get(name)
            if self[name].needs_context and there is not None:  # what is not there costs no pass
                encoding = like.new_zeros(like.shape)
                if there.any():
                    encoding[there] = self[name].encode(value[there], unet, codes.get(name))
            else:
                encoding = self[name].encode(value, unet, codes.get(name))
            if encoding.shape != like.shape:
                raise UserValueError(
                    f"modality {name}: its encoding has shape {tuple(encoding.shape)}, the latent {tuple(like.shape)}"
                )
            mask = batch.mask(name, encoding)
            encodings[name] = encoding if mask is None else encoding * mask
        return encodings

    # Timesteps

    @property
    def steps(self) -> int:
        """T of the full process."""
        return 1000 if self.process is None else self.process.num_timesteps

    @property
    def _rescaled(self):
        return self.process is not None and self.process.rescale_timesteps

    def timesteps(self, t: th.Tensor) -> th.Tensor:
        """What the network is called with at indices t of the full process."""
        return t.float() * (1000.0 / self.steps) if self._rescaled else t

    def indices(self, timesteps: th.Tensor) -> th.Tensor:
        """The inverse of `timesteps`: int64."""
        return (timesteps * (self.steps / 1000.0)).round().long() if self._rescaled else timesteps.long()

    def shift(self, encodings: Values, timesteps: th.Tensor) -> th.Tensor | float:
        """What the encodings add to the latent at the network's timesteps: sum_i atil_t^i e_i, or 0."""
        return (
            self._need_process().aggregation.shift(encodings, self.indices(timesteps)) if encodings else 0.0
        )

    # Gaussian heads

    def variance(self, network, name: str, timesteps: th.Tensor) -> th.Tensor | None:
        """The measured variance of a Gaussian head at the network's timesteps [B], interpolated between its
        bins: [B]; None for other heads."""
        if self[name].likelihood != "gaussian":
            return None
        return self._at(network.heads[name].variance.log(), timesteps).exp()

    def share(self, network, name: str, timesteps: th.Tensor) -> th.Tensor:
        """The measured share of a Gaussian head's dimensions that err independently, n_eff / n: [B]."""
        table = getattr(network.heads[name], "share", None)
        return th.ones_like(timesteps, dtype=th.float) if table is None else self._at(table, timesteps)

    def covariance(self, network, names: Sequence[str], timesteps: th.Tensor) -> th.Tensor:
        """The measured covariance of the errors of Gaussian heads, of the same place in each: [B, N, N]."""
        order = list(network.heads.gaussian) if hasattr(network.heads, "gaussian") else []
        matrix = th.eye(len(names), device=timesteps.device).repeat(len(timesteps), 1, 1)
        for i, one in enumerate(names):
            for j, other in enumerate(names[:i]):
                table = getattr(network.heads[one], "correlation", None)
                if table is not None and other in order and self[one].shape == self[other].shape:
                    matrix[:, i, j] = matrix[:, j, i] = self._at(table[:, order.index(other)], timesteps)
        spread = th.stack([self.variance(network, name, timesteps).sqrt() for name in names], dim=1)
        return matrix * spread[:, :, None] * spread[:, None]

    def _at(self, table, timesteps):
        """A table [bins] at the network's timesteps [B], interpolated between its bins."""
        span = 1000 if self._rescaled else self.steps
        position = (timesteps.float() / span * len(table) - 0.5).clamp(0, len(table) - 1)
        low = position.floor().long()
        high = (low + 1).clamp(max=len(table) - 1)
        return th.lerp(table[low], table[high], position - low)


def _codes_of(network) -> Values:
    codes = getattr(network, "codes", None)
    return dict(codes.named_buffers()) if isinstance(codes, Codes) else {}


def network_timesteps(diffusion: GaussianDiffusion, t: th.Tensor) -> th.Tensor:
    """What a network is called with at indices t of a diffusion, respaced or not."""
    timesteps = diffusion._scale_timesteps(t)
    if not hasattr(diffusion, "_wrap_model"):
        return timesteps
    return diffusion._wrap_model(lambda _, original: original)(None, timesteps)


def with_peaks(
    modalities: Sequence[Modality],
    schedule: str,
    betas: np.ndarray,
    latent_shape: tuple[int, ...],
    detectability: float = 0.0,
) -> tuple[Modality, ...]:
    """The modalities with the peaks that were left open.

    Images share 0.5: above that several modalities cost image quality. The peak of an abstract code (label, vector)
    is set by how far it stands out of the noise at this resolution, its largest d_t (Aggregation.detectability);
    detectability 0 treats it like an image.
    """
    share = 0.5 / max(sum(m.aggregated for m in modalities), 1)
    size = int(np.prod(latent_shape))

    def peak(m):
        if m.has_content_everywhere or not detectability or schedule == "paper":
            return share
        return detectable_peak(schedule, betas, size, detectability)

    return tuple(m if m.peak is not None else replace(m, peak=peak(m)) for m in modalities)


def peaks(modalities: Sequence[Modality]) -> dict[str, float]:
    """kappa of those that enter the latent, by name, for `Aggregation.named`."""
    return {m.name: m.peak for m in modalities if m.aggregated}


def derive_values(modalities: ModalitySet, images: th.Tensor, batch: Batch, random: PerSample) -> Batch:
    """`batch` with the modalities that are made from the images [B, C, H, W], such as masked copies."""
    derived = {
        m.name: m.derive(images, random)
        for m in modalities
        if m.derive is not None and m.name not in batch.values
    }
    return replace(batch, values={**batch.values, **derived}, images=images)


def batch_of(
    modalities: ModalitySet, cond: Mapping[str, th.Tensor], images: th.Tensor | None = None
) -> Batch:
    """The modalities' values that the data bring: a label under `y` (int64, -1 for none), others under their
    names; bool [B] under NAME_present where some are missing."""
    values, present = {}, {}
    for m in modalities:
        if m.data_key in cond:
            values[m.name], there = m.from_data(cond[m.data_key])
            told = cond.get(f"{m.name}_present")
            there = told if there is None else there if told is None else there & told
            if there is not None:
                present[m.name] = there
    return Batch(values, present, images)
