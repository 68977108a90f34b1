"""Several modalities in one diffusion: encode them, feed them, read them out (paper sections 3 and 4).

`MultiTask` knows the modalities; it holds no weights. `multitask_losses` is equation 6. The bound behind it is
in bound.py, the network as the samplers see it in denoiser.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch as th

from ..errors import UserValueError
from ..gaussian_diffusion import GaussianDiffusion
from ..seeding import PerSample
from .classifier_head import predicted_image
from .modalities import Modality

Values = dict[str, th.Tensor]


@dataclass(frozen=True)
class Batch:
    """Values of the modalities for B samples, and which of them are there.

    values: name -> tensor (modalities.py), zeros where missing; present: name -> bool [B], a name left out
    means all.
    """

    values: Values
    present: dict[str, th.Tensor] = field(default_factory=dict)

    def only(self, where: th.Tensor) -> "Batch":
        """The batch with every modality missing except `where`, bool [B]."""
        return Batch(self.values, {name: self.present.get(name, where) & where for name in self.values})

    def mask(self, name: str, like: th.Tensor) -> th.Tensor | None:
        """1 where present, 0 elsewhere, shaped to multiply `like` [B, ...]; None if all are."""
        present = self.present.get(name)
        return None if present is None else present.to(like).reshape(-1, *[1] * (like.dim() - 1))


class MultiTask:
    """The modalities of one network.

    modalities: in the order of the network's input channels; image_channels: those of the image itself;
    num_classes: if the network takes `y`; context_dim: the width of its `context`, if it has cross-attention;
    steps: the length T of the full process, and rescaled: whether the network is called with t * 1000 / T
    (rescale_timesteps). ValueError for names that occur twice, two modalities that both need the network's
    class input, or a vector that the U-Net is to encode without cross-attention. Set afterwards, where they
    are needed: process, the full diffusion (for classifier heads, and for guidance in the moving frame);
    single_task, whether the network also learned images without any modality (M*, E*).
    """

    process: GaussianDiffusion | None = None
    single_task = False

    def __init__(
        self,
        modalities: Sequence[Modality],
        image_channels: int,
        num_classes: int | None = None,
        steps: int = 1000,
        rescaled: bool = False,
        context_dim: int | None = None,
    ):
        self.modalities = {m.name: m for m in modalities}
        if len(self.modalities) != len(modalities):
            raise UserValueError(f"modality names must differ: {', '.join(m.name for m in modalities)}")
        if sum(m.kind == "label" for m in modalities) > 1:
            raise UserValueError("the network has one class input: at most one modality can be a label")
        for m in modalities:
            if m.kind == "vector" and m.encoder == "unet" and context_dim is None:
                raise UserValueError(
                    f"modality {m.name}: the U-Net has no cross-attention (context_dim) to encode a vector by"
                )
        self.image_channels = image_channels
        self.num_classes, self.context_dim = num_classes, context_dim
        self.steps, self.rescaled = steps, rescaled

    def __iter__(self):
        return iter(self.modalities.values())

    def __getitem__(self, name: str) -> Modality:
        return self.modalities[name]

    @property
    def input_channels(self) -> int:
        """Channels of the network's input: the latent's, and those of the X modalities that are images."""
        return self.image_channels + sum(m.shape[0] for m in self if m.as_input and m.kind == "image")

    @property
    def peaks(self) -> dict[str, float]:
        """kappa of those that enter the latent, by name, for `Aggregation.named`."""
        return {m.name: m.peak for m in self if m.encoder != "none"}

    def apply(
        self,
        network,
        z: th.Tensor,
        timesteps: th.Tensor,
        shown: Values,
        conditioning: Mapping | None = None,
        training: bool = False,
    ):
        """network(z, timesteps) with the X modalities of `shown`; those not shown get the null input.

        conditioning: what else the network is called with, such as `context`. training: losses of classifier
        heads stop at the predicted image where they say so. Returns (output, predictions).
        """
        channels, conditioning = [z], dict(conditioning or {})
        if self.num_classes is not None:
            conditioning.setdefault("y", z.new_zeros(len(z), self.num_classes))
        for m in self:
            if not m.as_input:
                continue
            value = shown.get(m.name)
            if m.kind == "image":
                channels.append(z.new_zeros(len(z), *m.shape) if value is None else value)
            elif value is not None:
                conditioning["y"] = value
        output = network(th.cat(channels, dim=1) if len(channels) > 1 else z, timesteps, **conditioning)
        output, predictions = output if isinstance(output, tuple) else (output, {})
        return output, {**predictions, **self._classify(network, output, z, timesteps, training)}

    def _classify(self, network, output, z, timesteps, training):
        """The logits of the classifier heads, read off the predicted image."""
        logits = {}
        for m in self:
            if m.head == "classifier":
                image = predicted_image(self._need_process(), output, z, self.indices(timesteps))
                image = image.detach() if training and m.classifier.detach else image
                # A network wrapped for training keeps its heads inside.
                logits[m.name] = getattr(network, "module", network).heads[m.name](image, timesteps)
        return logits

    def _need_process(self):
        if self.process is None:
            raise UserValueError("this needs the full diffusion: set MultiTask.process")
        return self.process

    # Encoders

    @th.no_grad()
    def class_codes(
        self, network, modality: Modality, like: th.Tensor, classes: th.Tensor | None = None
    ) -> th.Tensor:
        """The encodings of whole classes, [K, *like.shape[1:]]: of all, or of the indices `classes` [K]
        (centre `null` only).

        The U-Net's output at z = 0, t = 0, which is nearly the same for every class, is centred and brought
        to unit RMS; without that the class cannot be seen in the latent. In float32 always: the differences
        are small.
        """
        if modality.centre == "mean" or classes is None:
            rows = th.eye(modality.shape[0], device=like.device)
        else:
            rows = th.nn.functional.one_hot(classes, modality.shape[0]).float()
        if modality.centre == "null":
            rows = th.cat([rows, rows.new_zeros(1, rows.shape[1])])
        raw = self._raw_codes(network, modality, rows, like)
        if modality.centre == "null":
            codes = raw[:-1] - raw[-1:]
        else:
            codes = raw - raw.mean(dim=0, keepdim=True)
            codes = codes if classes is None else codes[classes]
        return _of_unit_rms(codes)

    @th.no_grad()
    def constant_codes(self, network, modality: Modality, like: th.Tensor) -> th.Tensor:
        """What encoding a modality by the U-Net needs whatever its value: a label's `class_codes`, for a vector
        the raw code of its null input [1, *like.shape[1:]]."""
        if modality.kind == "label":
            return self.class_codes(network, modality, like)
        return self._raw_codes(network, modality, th.zeros(1, *modality.shape, device=like.device), like)

    def tokens(self, value: th.Tensor) -> th.Tensor:
        """A vector [B, D] as a context [B, S, context_dim]: cut into S tokens, the last filled up with zeros."""
        count = -(-value.shape[1] // self.context_dim)
        padded = th.nn.functional.pad(value, (0, count * self.context_dim - value.shape[1]))
        return padded.unflatten(1, (count, self.context_dim))

    def _raw_codes(self, network, modality, rows, like):
        """The U-Net's output at z = 0, t = 0 for values [K, ...] of a modality."""
        was_training = network.training
        network.eval()
        with th.autocast(like.device.type, enabled=False):
            raw = th.cat([self._encode_rows(network, modality, part, like) for part in rows.split(256)])
        network.train(was_training)
        return raw

    def _encode_rows(self, network, modality, rows, like):
        z = th.zeros(len(rows), self.input_channels, *like.shape[2:], device=like.device)
        inputs = {"y": rows} if modality.kind == "label" else {"context": self.tokens(rows)}
        if self.num_classes is not None:
            inputs.setdefault("y", rows.new_zeros(len(rows), self.num_classes))
        output = network(z, th.zeros(len(rows), dtype=th.long, device=like.device), **inputs)
        output = output[0] if isinstance(output, tuple) else output
        return output[:, : self.image_channels].float()

    @th.no_grad()
    def encode(self, network, batch: Batch, like: th.Tensor, codes: Values | None = None) -> Values:
        """e_i of every value in the batch, shaped like the image `like` [B, C, ...], zero where missing.

        Always under stop-gradient. codes: `constant_codes` computed before, by name. A soft label is encoded
        as the mixture; a vector by its direction, times its RMS: an uncertain estimate, which lies near the
        mean 0, moves the latent little.
        """
        encodings = {}
        for name, value in batch.values.items():
            m = self[name]
            if m.encoder == "none":
                continue
            if m.encoder == "identity":
                encoding = value
            elif m.encoder == "unet":
                encode = self._encode_label if m.kind == "label" else self._encode_vector
                encoding = encode(network, m, value, like, (codes or {}).get(name))
            else:
                encoding = m.encoder(value)
            if encoding.shape != like.shape:
                raise UserValueError(
                    f"modality {name}: its encoding has shape {tuple(encoding.shape)}, the latent {tuple(like.shape)}"
                )
            mask = batch.mask(name, encoding)
            encodings[name] = encoding if mask is None else encoding * mask
        return encodings

    def _encode_label(self, network, modality, value, like, codes):
        if codes is None and modality.centre == "mean":
            codes = self.class_codes(network, modality, like)
        elif codes is None:
            used = value.sum(dim=0).nonzero().squeeze(1)
            if not len(used):
                return th.zeros_like(like)
            codes, value = self.class_codes(network, modality, like, used), value[:, used]
        return th.einsum("bk,kchw->bchw", value.to(codes), codes).to(like)

    def _encode_vector(self, network, modality, value, like, null):
        rms = value.float().square().mean(dim=1, keepdim=True).sqrt()
        rows = value.float() / rms.clamp(min=1e-12)
        if null is None:
            raw = self._raw_codes(network, modality, th.cat([rows, th.zeros_like(rows[:1])]), like)
            raw, null = raw[:-1], raw[-1:]
        else:
            raw = self._raw_codes(network, modality, rows, like)
        return (_of_unit_rms(raw - null) * rms.reshape(-1, *[1] * (raw.dim() - 1))).to(like)

    def timesteps(self, t: th.Tensor) -> th.Tensor:
        """What the network is called with at indices t of the full process."""
        return t.float() * (1000.0 / self.steps) if self.rescaled else t

    def indices(self, timesteps: th.Tensor) -> th.Tensor:
        """The inverse of `timesteps`: int64."""
        return (timesteps * (self.steps / 1000.0)).round().long() if self.rescaled else timesteps.long()

    def shift(self, encodings: Values, timesteps: th.Tensor) -> th.Tensor | float:
        """What the encodings add to the latent at the network's timesteps: sum_i atil_t^i e_i, or 0."""
        if not encodings:
            return 0.0
        return self._need_process().aggregation.shift(encodings, self.indices(timesteps))

    # Gaussian heads

    def variance(self, network, name: str, timesteps: th.Tensor) -> th.Tensor:
        """The measured variance of a Gaussian head at the network's timesteps [B], interpolated between its
        bins: [B]."""
        table = network.heads[name].variance
        position = (timesteps.float() / (1000 if self.rescaled else self.steps) * len(table) - 0.5).clamp(
            0, len(table) - 1
        )
        low = position.floor().long()
        high = (low + 1).clamp(max=len(table) - 1)
        return th.lerp(table[low].log(), table[high].log(), position - low).exp()


def _of_unit_rms(codes: th.Tensor) -> th.Tensor:
    """Codes [K, ...], each of RMS 1; a fresh network's, whose output layer is zero, stay zero."""
    rms = codes.flatten(1).square().mean(dim=1).sqrt()
    return codes / rms.clamp(min=1e-12).reshape(-1, *[1] * (codes.dim() - 1))


def derive_values(tasks: MultiTask, images: th.Tensor, batch: Batch, random: PerSample) -> Batch:
    """`batch` with the modalities that are made from the images [B, C, H, W], such as masked copies."""
    derived = {
        m.name: m.derive(images, random) for m in tasks if m.derive is not None and m.name not in batch.values
    }
    return Batch({**batch.values, **derived}, batch.present)


def multitask_losses(
    diffusion: GaussianDiffusion,
    tasks: MultiTask,
    network,
    images: th.Tensor,
    batch: Batch,
    t: th.Tensor,
    noise: th.Tensor | None = None,
    random: PerSample | None = None,
    encoder=None,
    conditioning: Mapping | None = None,
) -> dict[str, th.Tensor]:
    """Equation 6 at timesteps t [B]: the diffusion's own terms, and `KL_name` for every modality; all [B].

    `loss` is the sum: MSE(eps) + sum_i lambda_i KL_i. A missing value adds neither shift nor loss. random:
    decides which X inputs are replaced by the null input (none if None); encoder: the network that encodes,
    where `network` is wrapped for training; conditioning: what else the network is called with (`context`).
    """
    encodings = tasks.encode(network if encoder is None else encoder, batch, images)
    shown = _shown(tasks, batch, random)
    predictions = {}

    def noise_network(z, timesteps):
        output, heads = tasks.apply(network, z, timesteps, shown, conditioning, training=True)
        predictions.update(heads)
        return output

    terms = diffusion.training_losses(noise_network, images, t, noise=noise, encodings=encodings)
    for name, value in batch.values.items():
        if name not in predictions:
            continue  # no head: a condition only
        loss = tasks[name].loss(predictions[name].float(), value)
        mask = batch.mask(name, loss)
        terms[f"KL_{name}"] = loss if mask is None else loss * mask
        terms["loss"] = terms["loss"] + tasks[name].loss_weight * terms[f"KL_{name}"]
    return terms


def _shown(tasks, batch, random):
    """The network's X inputs in training: with their null probability, or where missing, zeros."""
    shown = {}
    for m in tasks:
        if m.as_input and m.name in batch.values:
            value = batch.values[m.name]
            if random is not None:
                keep = (random.rand() >= m.null_probability).to(value)
                value = value * keep.reshape(-1, *[1] * (value.dim() - 1))
            mask = batch.mask(m.name, value)
            shown[m.name] = value if mask is None else value * mask
    return shown
