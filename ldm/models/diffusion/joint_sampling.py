"""Sampling of a latent diffusion of several modalities: these are given, those are wanted."""

from collections.abc import Mapping, Sequence

import torch

from guided_diffusion.errors import UserValueError
from guided_diffusion.mt.denoiser import JointDenoiser, predict_modalities
from guided_diffusion.mt.modalities import one_hot
from guided_diffusion.mt.sampling import joint_sample
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.seeding import PerSample
from ldm.models.diffusion.schedule import Denoiser, make_diffusion

Images = dict[str, torch.Tensor]


class ConditionedDenoiser:
    """A JointDenoiser under fixed conditioning: (z, timesteps) -> JointOutput."""

    def __init__(self, denoiser: JointDenoiser, cond: Mapping):
        self.denoiser, self.cond = denoiser, cond

    def __call__(self, z, timesteps):
        self.said = self.denoiser(z, timesteps, **self.cond)
        return self.said

    def parameters(self):
        """The network's."""
        return self.denoiser.parameters()

    @property
    def estimates(self):
        """The modalities' latest values, by name, given ones included."""
        return self.said.values


class JointSampling:
    """`sample_joint` and `predict`, for a JointLatentDiffusion. The image is named first_stage_key."""

    def joint(self):
        """(modalities, network), as guided_diffusion's functions take them; the weights in use are
        those at the time of a call (see ema_scope)."""
        return self.modalities, Denoiser(self)

    def guided_model(
        self,
        cond,
        unconditional=None,
        scale=1.0,
        corrector=None,
        options=None,
        given: Mapping[str, torch.Tensor] | None = None,
        strength: float | Mapping[str, float] = 1.0,
        absent: Sequence[str] = (),
    ) -> ConditionedDenoiser:
        """The network as the sampler faces (DDIMSampler, ...) see it: modalities that are neither `given` (in the
        terms of `given_values`) nor `absent` are estimated."""
        if corrector is not None:
            raise UserValueError("a score_corrector does not work on a model of several modalities")
        free = {} if unconditional is None else self.as_conditioning(unconditional)
        denoiser = JointDenoiser(
            self.modalities,
            Denoiser(self),
            given,
            strength,
            guidance=scale if free else 1.0,
            unconditional=free,
            absent=absent,
        )
        return ConditionedDenoiser(denoiser, self.as_conditioning(cond))

    def respaced(self, steps: int | str = "") -> SpacedDiffusion:
        """The process over fewer steps ("" for all, a number, "ddim50", "10,15,20"), with the same
        marginals."""
        kept = range(self.num_timesteps)
        if steps != "":
            try:
                kept = space_timesteps(self.num_timesteps, str(steps))
            except ValueError as error:
                raise UserValueError(f"steps {steps!r}: {error}") from None
        return make_diffusion(self.diffusion.betas, self.parameterization, self.aggregation, kept)

    @torch.no_grad()
    def sample_joint(
        self,
        n: int,
        given: Mapping[str, torch.Tensor] | None = None,
        want: Sequence[str] | None = None,
        *,
        sampler: str = "ddpm",
        steps: int | str = "",
        seed: int = 0,
        indices: Sequence[int] | None = None,
        conditioning=None,
        unconditional=None,
        guidance: float = 1.0,
        strength: float | Mapping[str, float] = 1.0,
        absent: Sequence[str] = (),
        shape: tuple[int, int, int] | None = None,
        use_ema: bool = True,
        progress: bool = False,
    ) -> Images:
        """n samples of what is wanted (default: everything that is not given), by name: images [n, C, H, W]
        (not clipped), class probabilities, vectors.

        given: by name images [n, C, H, W] in [-1, 1], or under `<name>_latent` unscaled latents
        [n, c, h, w], labels int64 [n] or probabilities, vectors [n, D] or, where the model has an extractor,
        images [n, 3, H, W] to read them off. If the image is given, see `predict`. sampler, steps:
        guided_diffusion.mt.sampling.SAMPLERS, `respaced`; seed, indices: sample k is number indices[k] (default
        k) of the seed, whatever n; conditioning, unconditional: learned conditioning and what guidance leads away from;
        guidance, strength, absent: see JointDenoiser; shape: of the latents, if not the configuration's.
        UserValueError for unknown names.
        """
        values = self.given_values(given or {}, n, shape)
        wanted = self._wanted(want, {**values, **dict.fromkeys(absent)})
        random = PerSample.derived(seed, range(n) if indices is None else indices, self.device)
        with self.ema_scope() if use_ema else torch.no_grad():
            if self.first_stage_key in values:
                image = values.pop(self.first_stage_key)
                out = self._predict(image, values, conditioning, random)
            else:
                diffusion, modalities, network = self.respaced(steps), self.modalities, Denoiser(self)
                sample = joint_sample(
                    diffusion,
                    modalities,
                    network,
                    (n, *(shape or self.latent_shape)),
                    random,
                    given=values,
                    strength=strength,
                    sampler=sampler,
                    clip_denoised=False,
                    guidance=guidance,
                    model_kwargs=self.as_conditioning(conditioning),
                    unconditional=None if unconditional is None else self.as_conditioning(unconditional),
                    absent=absent,
                    progress=progress,
                )
                out = {self.first_stage_key: sample.images, **sample.values}
        return self.decoded({name: out[name] for name in wanted})

    def predict(
        self,
        images: torch.Tensor,
        given: Mapping[str, torch.Tensor] | None = None,
        *,
        conditioning=None,
        times: Sequence[int] = (0, 10, 20),
        seed: int = 0,
        indices: Sequence[int] | None = None,
        use_ema: bool = True,
    ) -> Images:
        """The modalities' expectations for images [n, C, H, W] in [-1, 1], read at the diffusion indices
        `times`, by name; arguments as in `sample_joint`."""
        n = len(images)
        values = self.given_values({self.first_stage_key: images, **(given or {})}, n)
        wanted = self._wanted(None, values)
        image = values.pop(self.first_stage_key)
        random = PerSample.derived(seed, range(n) if indices is None else indices, self.device)
        with self.ema_scope() if use_ema else torch.no_grad():
            out = self._predict(image, values, conditioning, random, times)
        return self.decoded({name: out[name] for name in wanted})

    def _predict(self, image, values, conditioning, random, times=(0, 10, 20)):
        cond = self.as_conditioning(conditioning)
        return predict_modalities(*self.joint(), image, values, times, random, cond)

    def given_values(
        self, given: Mapping[str, torch.Tensor], n: int, shape: tuple[int, int, int] | None = None
    ) -> dict[str, torch.Tensor]:
        """What is given, as the diffusion knows it: scaled latents of `shape` (default: latent_shape), class
        probabilities, vectors in standard form."""
        values, shape = {}, tuple(shape or self.latent_shape)
        for key, value in given.items():
            name = key.removesuffix("_latent") if key not in self.names else key
            if name not in self.names:
                raise UserValueError(f"given {key}: this model has {', '.join(self.names)}")
            if len(value) != n:
                raise UserValueError(f"given {key}: {len(value)} samples, expected {n}")
            value = value.to(self.device)
            is_image = name == self.first_stage_key or self.modalities[name].kind == "image"
            if is_image and key != name:
                value = self.scale_factor * value
            elif is_image:
                value = self.encode_images(value)
            elif self.modalities[name].kind == "label" and not value.is_floating_point():
                value = one_hot(value, self.modalities[name].shape[0])
            elif self.modalities[name].kind == "vector":
                value = self.standards[name](self._as_vectors(name, value))
            if is_image and tuple(value.shape[1:]) != shape:
                raise UserValueError(
                    f"given {key}: its latents are {list(value.shape[1:])}, the model's {list(shape)}: "
                    "check the size of the images"
                )
            values[name] = value
        return values

    def _as_vectors(self, name, value):
        if value.ndim != 4:
            return self.modalities[name].check(value)
        if name not in self.extractors:
            raise UserValueError(
                f"given {name}: this model has no extractors.{name} to read it off images, give the vectors"
            )
        return self.vectors({self.first_stage_key: value.permute(0, 2, 3, 1)}, name)

    @property
    def names(self) -> list[str]:
        """The image's name and the modalities'."""
        return [self.first_stage_key, *self.modalities.names]

    def _wanted(self, want, given):
        wanted = [name for name in self.names if name not in given] if want is None else list(want)
        for name in wanted:
            if name not in self.names:
                raise UserValueError(f"wanted {name}: this model has {', '.join(self.names)}")
            if name in given:
                raise UserValueError(f"wanted {name}: that is given already")
        if not wanted:
            raise UserValueError("everything is given: nothing is left to sample")
        return wanted

    def decoded(self, values: Mapping[str, torch.Tensor]) -> Images:
        """Values in the diffusion's terms, by name, as data: images, probabilities, vectors."""
        return {name: self._decoded(name, value) for name, value in values.items()}

    def _decoded(self, name, value):
        if name == self.first_stage_key or self.modalities[name].kind == "image":
            return self.decode_first_stage(value)
        return self.standards[name].restore(value) if self.modalities[name].kind == "vector" else value

    def log_samples(self, batch, cond, n, steps, eta, scale, seed) -> Images:
        """Samples for `log_images`: image and modalities from nothing (`samples`, `samples_<name>`), the image
        given each modality that is an image or a vector (`image_from_<name>`), and each image given the
        image (`<name>_from_image`)."""
        options = {
            "sampler": "ddim",
            "steps": min(steps, self.num_timesteps),
            "seed": seed,
            "conditioning": cond,
        }
        if scale != 1:
            options |= {"guidance": scale, "unconditional": self.get_unconditional_conditioning(n)}
        images = [m.name for m in self.modalities if m.kind == "image"]
        image = self.first_stage_key
        drawn = self.sample_joint(n, None, [image, *images], **options)
        shown = {"samples": drawn.pop(image), **{f"samples_{name}": value for name, value in drawn.items()}}
        values = self.modality_batch(batch).values
        for name in (name for name in images if name in values):
            source = {f"{name}_latent": values[name] / self.scale_factor}
            shown[name] = self.decode_first_stage(values[name])
            shown[f"image_from_{name}"] = self.sample_joint(n, source, [image], **options)[image]
        for name in self.standards:
            source = {name: self.standards[name].restore(values[name])}
            shown[f"image_from_{name}"] = self.sample_joint(n, source, [image], **options)[image]
        z = self.latents(batch, image)
        predicted = (
            self.sample_joint(
                n, {f"{image}_latent": z / self.scale_factor}, images, seed=seed, conditioning=cond
            )
            if images
            else {}
        )
        return shown | {f"{name}_from_image": value for name, value in predicted.items()}
