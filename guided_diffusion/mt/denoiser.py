"""The network as samplers and readers see it: any modalities given, the others estimated (paper section 4).

`JointDenoiser` is a sampler's model; `predict_modalities` reads the modalities off an image.
"""

from collections.abc import Mapping, Sequence

import torch as th

from ..errors import UserValueError
from ..gaussian_diffusion import GaussianDiffusion
from ..seeding import PerSample
from .aggregation import JointOutput
from .modality_set import Batch, MultiTask, Values


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
        """Encodings of `values`; those of given ones and constant codes are computed once."""
        for m in self.tasks:
            if m.encoder == "unet" and m.name in values and m.name not in self._codes:
                self._codes[m.name] = self.tasks.constant_codes(self.network, m, like)
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
