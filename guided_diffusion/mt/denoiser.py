"""The network as samplers and readers see it: any modalities given, the others estimated (Algorithm 1).

`JointDenoiser` is a sampler's model; `predict_modalities` reads the modalities off an image.
"""

from collections.abc import Mapping, Sequence

import torch as th

from ..errors import UserValueError
from ..gaussian_diffusion import GaussianDiffusion, ModelMeanType, _extract_into_tensor
from ..seeding import PerSample
from .aggregation import JointOutput, from_frame
from .modality_set import Batch, ModalitySet, Values


class JointDenoiser:
    """The network as a sampler's model: (z_t, timesteps, **conditioning) -> JointOutput. One forward pass a
    step, two with guidance. Without modalities it returns the network's plain output.

    A given modality of variant X is shown to the network. One of variant U conditions through the model's own head,
    by Bayes: eps - strength sqrt(1 - abar_t) grad log p(x_i | z_t). Strength 1 is exact for the image; 0 only holds
    the value fixed, which does not condition the image on it. Classifier-free guidance (Ho & Salimans 2022)
    extrapolates the noise from that at the null inputs; where the network also learned images alone (single_task),
    from that of the image without any shift, which guides towards U modalities too.
    """

    def __init__(
        self,
        modalities: ModalitySet,
        network,
        given: Values | None = None,  # known values [B, ...] by name; the others are estimated
        strength: float | Mapping[str, float] = 1.0,  # of given U modalities, for all or by name
        order: str = "posterior",  # encode this pass's estimates: the exact mean, as equation 5 is linear in e_i;
        # or `paper`, Algorithm 1 to the letter: encode those of the step before, starting from
        initial: Values | None = None,  # these [B, ...]
        guidance: float = 1.0,  # scale of classifier-free guidance, 1 for none
        unconditional: Mapping | None = None,  # conditioning by name, in place of the call's in the free pass
        absent: Sequence[str] = (),  # left out: neither estimated nor in the latent, as in single-task steps
    ):
        if order not in ("posterior", "paper"):
            raise UserValueError(f"unknown order {order!r}: choose posterior or paper")
        self.modalities, self.network, self.order = modalities, network, order
        self.given = dict(given or {})
        for name, value in self.given.items():
            if name not in modalities:
                raise UserValueError(
                    f"unknown modality {name!r}; this model has {', '.join(modalities.names) or 'none'}"
                )
            modalities[name].check(value)
        self.absent = frozenset(absent)
        for name in sorted(self.absent):
            if name not in modalities or name in self.given:
                raise UserValueError(f"{name} cannot be left out: it is given, or no modality of this model")
        strengths = strength if isinstance(strength, Mapping) else dict.fromkeys(modalities.names, strength)
        if unknown := set(strengths) - set(modalities.names):
            raise UserValueError(f"strength: the model has no {', '.join(sorted(unknown))}")
        self.strength = {m.name: float(strengths.get(m.name, 1.0)) for m in modalities}
        self.guidance, self.unconditional = float(guidance), dict(unconditional or {})
        guidable = [n for n in self.given if modalities[n].as_input or modalities.single_task]
        if self.guidance != 1 and not self.unconditional and not guidable:
            raise UserValueError(
                "classifier-free guidance needs something that the network sees: a given modality of variant X, "
                "or conditioning; for a given U modality there is the strength, and guidance only where the "
                "model was trained with --single_task_probability"
            )
        self._shown = {name: value for name, value in self.given.items() if modalities[name].as_input}
        self._guided = [n for n in self.given if not modalities[n].as_input and self.strength[n] != 0]
        self._before = {**(initial or {}), **self.given}  # of the step before: for the order `paper`
        self._codes, self._fixed = None, None

    def parameters(self):
        """The network's, so that samplers find its device."""
        return self.network.parameters()

    def start(self, diffusion: GaussianDiffusion, noise: th.Tensor) -> th.Tensor:
        """z_T of `diffusion`: where atil_T is not negligible, the shift of what is given is part of it."""
        last = th.full((len(noise),), diffusion.num_timesteps - 1, device=noise.device)
        return from_frame(diffusion, noise, last, self._encode(self.given, noise))

    def __call__(self, z: th.Tensor, timesteps: th.Tensor, **conditioning) -> JointOutput | th.Tensor:
        modalities, guided = self.modalities, self._guided
        names = {*self.given, *modalities.names} - self.absent
        present = modalities.present_among(names, z)
        with th.set_grad_enabled(bool(guided)):
            z_in = z.detach().requires_grad_(bool(guided))
            output, predictions = modalities.apply(
                self.network, z_in, timesteps, self._shown, conditioning, present
            )
            score = self._score(z_in, timesteps, predictions) if guided else None
        output, predictions = output.detach(), {name: p.detach().float() for name, p in predictions.items()}
        expected = {n: modalities[n].expectation(p) for n, p in predictions.items() if n not in self.absent}
        values = {**expected, **self.given}
        encodings = self._encode(values if self.order == "posterior" else self._before, z)
        self._before = values
        if self.guidance != 1:
            output = self._extrapolate(output, z, timesteps, conditioning, encodings)
        if score is not None:
            output = self._conditioned(output, z, timesteps, score)
        return JointOutput(output, encodings, predictions, values, score) if len(modalities) else output

    def _conditioned(self, output, z, timesteps, score):
        """Bayes: eps - sqrt(1 - abar_t) score, or the same in terms of x_0; a learned variance stays."""
        process, t = self.modalities._need_process(), self.modalities.indices(timesteps)
        gain = -process.sqrt_one_minus_alphas_cumprod
        if process.model_mean_type is ModelMeanType.START_X:
            gain = process.sqrt_recipm1_alphas_cumprod * process.sqrt_one_minus_alphas_cumprod
        elif process.model_mean_type is not ModelMeanType.EPSILON:
            raise UserValueError("a given U modality needs a network that predicts the noise or the image")
        channels = z.shape[1]
        mean = output[:, :channels] + _extract_into_tensor(gain, t, z.shape) * score
        return th.cat([mean, output[:, channels:]], dim=1)

    @th.no_grad()
    def _extrapolate(self, output, z, timesteps, conditioning, encodings):
        """Classifier-free guidance of the prediction; a learned variance stays that of the conditional
        pass."""
        present = None
        if self.modalities.single_task:
            z = z - self.modalities.shift(encodings, timesteps)
        else:
            present = self.modalities.present_among(encodings, z)
        conditioning = {**conditioning, **self.unconditional}
        free, _ = self.modalities.apply(self.network, z, timesteps, {}, conditioning, present)
        channels = z.shape[1]
        mean = free[:, :channels] + self.guidance * (output[:, :channels] - free[:, :channels])
        return th.cat([mean, output[:, channels:]], dim=1)

    def _score(self, z, timesteps, predictions):
        total = 0.0
        for name in self._guided:
            variance = self.modalities.variance(self.network, name, timesteps)
            log_p = self.modalities[name].log_likelihood(
                predictions[name].float(), self.given[name], variance
            )
            total = total + self.strength[name] * log_p.sum()
        return th.autograd.grad(total, z)[0].detach()

    def _encode(self, values, like):
        """Encodings of `values`; those of given ones, and constant codes, are computed once."""
        modalities = self.modalities
        if self._fixed is None:
            self._codes = modalities.constant_codes(self.network, like)
            self._fixed = modalities.encode(self.network, Batch(self.given), like, self._codes)
        unknown = {n: v for n, v in values.items() if n not in self.given and n not in self.absent}
        return {**self._fixed, **modalities.encode(self.network, Batch(unknown), like, self._codes)}


@th.no_grad()
def predict_modalities(
    modalities: ModalitySet,
    network,
    images: th.Tensor,
    given: Values | None = None,
    times: Sequence[int] = (0, 10, 20),
    random: PerSample | None = None,
    conditioning: Mapping | None = None,
) -> Values:
    """p(x_i | image, given): the heads' expectations on noised images [B, C, H, W], averaged over the
    diffusion indices `times`.

    The shift of an unknown modality is left out. random: the noise's generators. UserValueError for a time outside
    the process.
    """
    process: GaussianDiffusion = modalities._need_process()
    given = dict(given or {})
    shown = {name: value for name, value in given.items() if modalities[name].as_input}
    encodings = modalities.encode(network, Batch(given), images)
    present = modalities.present_among(encodings, images)
    total: Values = {}
    for step in times:
        if not 0 <= step < process.num_timesteps:
            raise UserValueError(f"time {step} is outside 0..{process.num_timesteps - 1}")
        t = th.full((len(images),), step, device=images.device)
        noise = random.randn_like(images) if random is not None else th.randn_like(images)
        z = process.q_sample(images, t, noise, encodings)
        _, predictions = modalities.apply(network, z, modalities.timesteps(t), shown, conditioning, present)
        for name, prediction in predictions.items():
            estimate = modalities[name].expectation(prediction.float()) / len(times)
            total[name] = total[name] + estimate if name in total else estimate
    return {**total, **given}
