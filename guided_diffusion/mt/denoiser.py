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
    """The network as a sampler's model: (z_t, timesteps, **conditioning) -> JointOutput; without modalities, to the
    network's plain output. Two passes with guidance.

    A given modality of variant X is shown to the network. One of variant U conditions through the model's own head,
    by Bayes: eps - strength sqrt(1 - abar_t) grad log p(x_i | z_t). Strength 1 is exact for the image where a head's
    errors are independent, 0 only holds it fixed; None: 1, and for images the measured share of
    independent dimensions. Several Gaussian ones condition through the measured covariance of their errors.
    Classifier-free guidance (Ho & Salimans 2022) extrapolates from the null inputs; in networks that also learned images
    alone (single_task), from no shift.
    """

    def __init__(
        self,
        modalities: ModalitySet,
        network,
        given: Values | None = None,  # known values [B, ...] by name; the others are estimated
        strength: float | Mapping[str, float] | None = None,  # of given U modalities, for all or by name
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
        self.strength = {m.name: strengths.get(m.name) for m in modalities}
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
            known = {n: self.given[n] for n in guided}
            pulls = _pulls(modalities, self.network, predictions, known, timesteps)
            score = self._score(z_in, timesteps, predictions, pulls) if guided else None
        output, predictions = output.detach(), {name: p.detach().float() for name, p in predictions.items()}
        predictions = _informed(modalities, self.network, predictions, known, pulls, timesteps)
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

    def _score(self, z, timesteps, predictions, pulls):
        total, modalities = 0.0, self.modalities
        together = {}
        for names, pull in pulls:
            if len(names) > 1:
                together |= dict(zip(names, pull.unbind(1), strict=True))
        for name in self._guided:
            said, strength = predictions[name].float(), self.strength[name]
            if strength is None:
                strength = 1.0
                if modalities[name].likelihood == "gaussian" and modalities[name].has_content_everywhere:
                    strength = modalities.share(self.network, name, timesteps)
            if name in together:
                log_p = (said * together[name]).flatten(1).sum(dim=1)
            else:
                variance = modalities.variance(self.network, name, timesteps)
                log_p = modalities[name].log_likelihood(said, self.given[name], variance)
            total = total + (strength * log_p).sum()
        return th.autograd.grad(total, z)[0].detach()

    def _encode(self, values, like):
        """Encodings of `values`; those of given ones, and constant codes, are computed once."""
        modalities = self.modalities
        if self._fixed is None:
            self._codes = modalities.settled_codes(self.network, like)
            self._fixed = modalities.encode(self.network, Batch(self.given), like, self._codes)
        unknown = {n: v for n, v in values.items() if n not in self.given and n not in self.absent}
        return {**self._fixed, **modalities.encode(self.network, Batch(unknown), like, self._codes)}


_SINGULAR = 1e-2  # eigenvalues of a correlation, beside the largest, that count as those of copies


@th.no_grad()
def _pulls(modalities, network, predictions, known: Values, timesteps) -> list[tuple[list[str], th.Tensor]]:
    """Of the Gaussian values that are known, in groups of the same shape: (their names, S^-1 r [B, N, ...]), S the
    covariance of the heads' errors, r = value - prediction."""
    groups, pulls = {}, []
    for name, value in known.items():
        if modalities[name].likelihood == "gaussian" and name in predictions:
            groups.setdefault(value.shape[1:], []).append(name)
    for names in groups.values():
        errors = th.stack([known[n] - predictions[n].float() for n in names], dim=1)
        covariance = modalities.covariance(network, names, timesteps)
        spread = covariance.diagonal(dim1=1, dim2=2).sqrt()
        scale = spread[:, :, None] * spread[:, None]
        inverse = th.linalg.pinv(covariance / scale, rtol=_SINGULAR, hermitian=True) / scale
        pulls.append((names, th.einsum("bij,bj...->bi...", inverse, errors)))
    return pulls


@th.no_grad()
def _informed(modalities, network, predictions: Values, known: Values, pulls, timesteps) -> Values:
    """The predictions with those of unknown Gaussian values as the errors of the known ones say (their `_pulls`): the
    mean of the joint Gaussian given these."""
    told = dict(predictions)
    for names, pull in pulls:
        for name, said in predictions.items():
            m = modalities[name]
            if name not in known and m.likelihood == "gaussian" and said.shape[1:] == pull.shape[2:]:
                covariance = modalities.covariance(network, [name, *names], timesteps)[:, 0, 1:]
                told[name] = told[name] + th.einsum("bj,bj...->b...", covariance, pull)
    return told


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
    encodings = modalities.encode(network, Batch(given), images, modalities.settled_codes(network, images))
    present = modalities.present_among(encodings, images)
    total: Values = {}
    for step in times:
        if not 0 <= step < process.num_timesteps:
            raise UserValueError(f"time {step} is outside 0..{process.num_timesteps - 1}")
        t = th.full((len(images),), step, device=images.device)
        noise = random.randn_like(images) if random is not None else th.randn_like(images)
        z = process.q_sample(images, t, noise, encodings)
        timesteps = modalities.timesteps(t)
        _, predictions = modalities.apply(network, z, timesteps, shown, conditioning, present)
        known = {name: value for name, value in given.items() if name not in shown}
        pulls = _pulls(modalities, network, predictions, known, timesteps)
        for name, prediction in _informed(modalities, network, predictions, known, pulls, timesteps).items():
            estimate = modalities[name].expectation(prediction.float()) / len(times)
            total[name] = total[name] + estimate if name in total else estimate
    return {**total, **given}
