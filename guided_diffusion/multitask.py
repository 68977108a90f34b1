"""Several modalities in one diffusion: encode them, feed them, read them out (paper sections 3 and 4).

`MultiTask` knows the modalities; it holds no weights. `multitask_losses` is equation 6, `multitask_bound` the
bound behind it, `JointDenoiser` the network as the samplers see it: any modalities given, the others
estimated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch as th

from .aggregation import JointOutput
from .classifier_head import predicted_image
from .errors import UserValueError
from .gaussian_diffusion import GaussianDiffusion
from .modalities import Modality
from .seeding import PerSample

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
    num_classes: if the network takes `y`; steps: the length T of the full process, and rescaled: whether the
    network is called with t * 1000 / T (rescale_timesteps). ValueError for names that occur twice, or two
    modalities that both need the network's class input. Set afterwards, where they are needed: process, the
    full diffusion (for classifier heads, and for guidance in the moving frame); single_task, whether the
    network also learned images without any modality (M*, E*).
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
    ):
        self.modalities = {m.name: m for m in modalities}
        if len(self.modalities) != len(modalities):
            raise UserValueError(f"modality names must differ: {', '.join(m.name for m in modalities)}")
        if sum(m.kind == "label" for m in modalities) > 1:
            raise UserValueError("the network has one class input: at most one modality can be a label")
        self.image_channels = image_channels
        self.num_classes = num_classes
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
        was_training = network.training
        network.eval()
        with th.autocast(like.device.type, enabled=False):
            raw = th.cat([self._encode_rows(network, part, like) for part in rows.split(256)])
        network.train(was_training)
        if modality.centre == "null":
            codes = raw[:-1] - raw[-1:]
        else:
            codes = raw - raw.mean(dim=0, keepdim=True)
            codes = codes if classes is None else codes[classes]
        rms = codes.flatten(1).square().mean(dim=1).sqrt()
        # A fresh network's output layer is zero: then there is nothing to normalise.
        return codes / rms.clamp(min=1e-12).reshape(-1, *[1] * (codes.dim() - 1))

    def _encode_rows(self, network, rows, like):
        z = th.zeros(len(rows), self.input_channels, *like.shape[2:], device=like.device)
        output = network(z, th.zeros(len(rows), dtype=th.long, device=like.device), y=rows)
        output = output[0] if isinstance(output, tuple) else output
        return output[:, : self.image_channels].float()

    @th.no_grad()
    def encode(self, network, batch: Batch, like: th.Tensor, codes: Values | None = None) -> Values:
        """e_i of every value in the batch, shaped like the image `like` [B, C, ...], zero where missing.

        Always under stop-gradient. codes: class codes computed before, by name; a soft label is encoded as
        the mixture.
        """
        encodings = {}
        for name, value in batch.values.items():
            m = self[name]
            if m.encoder == "none":
                continue
            if m.encoder == "identity":
                encoding = value
            elif m.encoder == "unet":
                encoding = self._encode_label(network, m, value, like, (codes or {}).get(name))
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


class JointDenoiser:
    """The network as a sampler's model: (z_t, timesteps, **conditioning) -> JointOutput. One forward pass a
    step, two with guidance.

    given: the known modalities [B, ...]; the others are estimated. In variant U a given value conditions
    through the model's own head, by Bayes: its `score` is strength * grad log p(x_i | z_t); 1 is exact for
    the image (the estimates of further unknown modalities remain E[x_j | z_t]), 0 only holds the value fixed,
    which is no conditioning. In variant X the network sees the value.
    guidance: scale of classifier-free guidance (Ho & Salimans 2022), 1 for none: the noise without the given
    X modalities, and with `unconditional` in place of the conditioning's entries of those names, is
    extrapolated towards that with them. Where the network also learned images alone (tasks.single_task), it
    is the noise of the image alone, without the given modalities' shifts: that guides towards U ones too.
    absent: modalities that are left out, neither estimated nor in the latent, as in single-task steps.
    order: `posterior` encodes the estimates of this very pass (equation 5 is linear in e_i, so this is the
    exact mean); `paper` is Algorithm 1 to the letter: encode the estimates of the step before, starting from
    initial[name] [B, ...]. `estimates` and `encodings` hold the latest values and e_i.
    """

    def __init__(
        self,
        tasks: MultiTask,
        network,
        given: Values | None = None,
        strength: float | Mapping[str, float] = 1.0,
        order: str = "posterior",
        initial: Values | None = None,
        guidance: float = 1.0,
        unconditional: Mapping | None = None,
        absent: Sequence[str] = (),
    ):
        if order not in ("posterior", "paper"):
            raise UserValueError(f"unknown order {order!r}: choose posterior or paper")
        self.tasks, self.network, self.order = tasks, network, order
        self.given = dict(given or {})
        for name, value in self.given.items():
            if name not in tasks.modalities:
                raise UserValueError(
                    f"unknown modality {name!r}; this model has {', '.join(tasks.modalities) or 'none'}"
                )
            tasks[name].check(value)
        self.absent = frozenset(absent)
        for name in sorted(self.absent):
            if name not in tasks.modalities or name in self.given:
                raise UserValueError(f"{name} cannot be left out: it is given, or no modality of this model")
        if isinstance(strength, Mapping) and not set(strength) <= set(tasks.modalities):
            raise UserValueError(
                f"strength: the model has no {', '.join(set(strength) - set(tasks.modalities))}"
            )
        self.strength = {
            m.name: float(strength.get(m.name, 1.0) if isinstance(strength, Mapping) else strength)
            for m in tasks
        }
        self.estimates = {**(initial or {}), **self.given}
        self.encodings: Values = {}
        self.guidance, self.unconditional = float(guidance), dict(unconditional or {})
        guidable = [n for n in self.given if tasks[n].as_input or tasks.single_task]
        if self.guidance != 1 and not self.unconditional and not guidable:
            raise UserValueError(
                "classifier-free guidance needs something that the network sees: a given modality of variant X, "
                "or conditioning; for a given U modality there is the strength, and guidance only where the "
                "model was trained with --single_task_probability"
            )
        self._codes, self._fixed = {}, {}

    def parameters(self):
        """The network's, so that samplers find its device."""
        return self.network.parameters()

    def __call__(self, z: th.Tensor, timesteps: th.Tensor, **kwargs) -> JointOutput:
        tasks = self.tasks
        shown = {name: value for name, value in self.given.items() if tasks[name].as_input}
        guided = [n for n in self.given if not tasks[n].as_input and self.strength[n] != 0]
        before = {name: value for name, value in self.estimates.items() if name not in self.absent}
        with th.set_grad_enabled(bool(guided)):
            z_in = z.detach().requires_grad_(bool(guided))
            output, predictions = tasks.apply(self.network, z_in, timesteps, shown, kwargs)
            score = self._score(z_in, timesteps, predictions, guided) if guided else None
        if self.guidance != 1:
            output = self._extrapolate(output, z, timesteps, kwargs)
        predictions = {name: p.detach().float() for name, p in predictions.items()}
        expected = {n: tasks[n].expectation(p) for n, p in predictions.items() if n not in self.absent}
        self.estimates = expected | self.given
        self.encodings = self._encode(self.estimates if self.order == "posterior" else before, z)
        return JointOutput(output.detach(), self.encodings, predictions, score)

    @th.no_grad()
    def _extrapolate(self, output, z, timesteps, conditioning):
        """Classifier-free guidance of the prediction; a learned variance stays that of the conditional
        pass."""
        if self.tasks.single_task:
            z = z - self.tasks.shift(self._encode(self.given, z), timesteps)
        free, _ = self.tasks.apply(self.network, z, timesteps, {}, {**conditioning, **self.unconditional})
        channels = z.shape[1]
        mean = free[:, :channels] + self.guidance * (output[:, :channels] - free[:, :channels])
        return th.cat([mean, output[:, channels:]], dim=1)

    def _score(self, z, timesteps, predictions, guided):
        total = 0.0
        for name in guided:
            m = self.tasks[name]
            variance = (
                self.tasks.variance(self.network, name, timesteps) if m.likelihood == "gaussian" else None
            )
            log_p = m.log_likelihood(predictions[name].float(), self.given[name], variance)
            total = total + self.strength[name] * log_p.sum()
        return th.autograd.grad(total, z)[0].detach()

    def _encode(self, values, like):
        """Encodings of `values`; those of given ones and of classes are computed once."""
        for m in self.tasks:
            if m.encoder == "unet" and m.name in values and m.name not in self._codes:
                self._codes[m.name] = self.tasks.class_codes(self.network, m, like)
        known = {name: value for name, value in self.given.items() if name not in self._fixed}
        self._fixed |= self.tasks.encode(self.network, Batch(known), like, self._codes)
        unknown = {name: value for name, value in values.items() if name not in self.given}
        return {**self._fixed, **self.tasks.encode(self.network, Batch(unknown), like, self._codes)}


@th.no_grad()
def predict_modalities(
    diffusion: GaussianDiffusion,
    tasks: MultiTask,
    network,
    images: th.Tensor,
    given: Values | None = None,
    times: Sequence[int] = (0, 10, 20),
    random: PerSample | None = None,
    conditioning: Mapping | None = None,
) -> Values:
    """p(x_i | image, given): the heads' expectations on noised images [B, C, H, W], averaged over the
    diffusion indices `times`.

    The shift of an unknown modality is left out: at early times it is negligible. random: the noise's
    generators. ValueError for a respaced diffusion or a time outside it.
    """
    if diffusion.num_timesteps != tasks.steps:
        raise UserValueError(
            f"needs the full process of {tasks.steps} steps, not one of {diffusion.num_timesteps}"
        )
    given = dict(given or {})
    shown = {name: value for name, value in given.items() if tasks[name].as_input}
    encodings = tasks.encode(network, Batch(given), images)
    total: Values = {}
    for step in times:
        if not 0 <= step < diffusion.num_timesteps:
            raise UserValueError(f"time {step} is outside 0..{diffusion.num_timesteps - 1}")
        t = th.full((len(images),), step, device=images.device)
        noise = random.randn_like(images) if random is not None else th.randn_like(images)
        z = diffusion.q_sample(images, t, noise, encodings)
        _, predictions = tasks.apply(network, z, tasks.timesteps(t), shown, conditioning)
        for name, prediction in predictions.items():
            estimate = tasks[name].expectation(prediction.float()) / len(times)
            total[name] = total[name] + estimate if name in total else estimate
    return {**total, **given}


@dataclass(frozen=True)
class Bound:
    """The multi-task variational bound, in bits per dimension of the image.

    L0 [B]: prior, KL(q(z_T | X) || p(z_T)). L1 [B, T]: transitions, KL(q(z_{t-1} | z_t, X) || p(z_{t-1} |
    z_t)), column t; column 0 is not used. L2: by modality [B, T], code length of x_i given z_t. L3 [B]: the
    image given z_1's successor, -log p(x_0 | z_0 at t = 0).
    """

    L0: th.Tensor
    L1: th.Tensor
    L2: dict[str, th.Tensor]
    L3: th.Tensor

    @property
    def total(self) -> th.Tensor:
        """[B]: L0 + sum_t L1 + L3 + sum_i mean_t L2_i. Decoding x_i at any one t gives a bound of -log p(X),
        hence so does the mean; the paper's sum over t would count x_i T times."""
        return self.L0 + self.L1.sum(dim=1) + self.L3 + sum(v.mean(dim=1) for v in self.L2.values())


@th.no_grad()
def multitask_bound(
    diffusion: GaussianDiffusion,
    tasks: MultiTask,
    network,
    images: th.Tensor,
    batch: Batch,
    clip_denoised: bool = True,
    random: PerSample | None = None,
) -> Bound:
    """The whole bound on images [B, C, H, W] and their modalities (paper Theorem 1), the reverse process
    being the sampler's own.

    random: the noise's generators (the global one if None). A modality without a head is a condition: the
    bound is that of the rest given it.
    """
    conditions = {name: value for name, value in batch.values.items() if tasks[name].head == "none"}
    denoiser = JointDenoiser(tasks, network, conditions)
    encodings = tasks.encode(network, batch, images)
    bits = math.log(2.0) * images[0].numel()
    transitions, codes = [], {name: [] for name in batch.values if name not in conditions}
    for step in range(diffusion.num_timesteps):
        t = th.full((len(images),), step, device=images.device)
        noise = random.randn_like(images) if random is not None else th.randn_like(images)
        z_t = diffusion.q_sample(images, t, noise, encodings)
        seen: dict = {}

        def model(z, timesteps, seen=seen, **kwargs):
            seen["joint"], seen["timesteps"] = denoiser(z, timesteps), timesteps
            return seen["joint"]

        term = diffusion._vb_terms_bpd(model, images, z_t, t, clip_denoised, encodings=encodings)
        transitions.append(term["output"])
        for name in codes:
            m, value = tasks[name], batch.values[name]
            variance = (
                tasks.variance(network, name, seen["timesteps"]) if m.likelihood == "gaussian" else None
            )
            length = m.code_length(seen["joint"].predictions[name], value, variance) / bits
            mask = batch.mask(name, length)
            codes[name].append(length if mask is None else length * mask)
    by_step = th.stack(transitions, dim=1)
    L1 = by_step.clone()
    L1[:, 0] = 0
    L2 = {name: th.stack(columns, dim=1) for name, columns in codes.items()}
    return Bound(diffusion._prior_bpd(images, encodings), L1, L2, by_step[:, 0])
