"""Several modalities in one latent diffusion (paper sections 2.2 and E.1): everything that they add to
LatentDiffusion.

Image modalities come as images under their own names and pass the same first stage as the image: one U-Net
diffuses the image's latents, shifted by theirs, and predicts both. Maps of classes come as images in their
palette's colours, and are mixtures of classes at the latents' size. Vectors come in standard form (encoders/vectors.py).
"""

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from guided_diffusion.errors import UserValueError
from guided_diffusion.mt.aggregation import Aggregation
from guided_diffusion.mt.denoiser import predict_modalities
from guided_diffusion.mt.losses import multitask_losses
from guided_diffusion.mt.modalities import ImageModality, MapModality, Modality, parse_modalities
from guided_diffusion.mt.modality_set import Batch, ModalitySet, batch_of, derive_values, peaks, with_peaks
from guided_diffusion.mt.training import affordable_interval, is_refresh_step, measure_variance
from guided_diffusion.seeding import PerSample
from ldm.checkpoint import is_weightless
from ldm.models.diffusion.conditioning import channels_first, from_batch, joined, select
from ldm.models.diffusion.ddpm import SAMPLERS, LatentDiffusion
from ldm.models.diffusion.sampling import Denoiser, make_diffusion, noise_betas
from ldm.modules.encoders.base import frozen
from ldm.modules.encoders.vectors import make_extractors, make_standards, measure_standards, read_again
from ldm.util import instantiate_from_config, resolve

_logger = logging.getLogger(__name__)

_SCHEDULE = ("given_betas", "beta_schedule", "timesteps", "linear_start", "linear_end", "cosine_s")


# What models had before these options were there.
FORMER = dict(unshifted_probability=0.0, detectability=0.0, presence=False, code_interval=1)


class JointLatentDiffusion(LatentDiffusion):
    """LatentDiffusion of an image, named first_stage_key, and `modalities`.

    modalities: as for guided_diffusion.mt.modalities.parse_modalities, in latent space: `{depth: {preset: image}}`
    is a second image, and an encoder may be {target, params} of your own; variant X widens the U-Net's input
    beyond unet_config's in_channels. extractors: {name: configuration} of what reads vectors off the images. held_out, standardise:
    how many validation samples the heads' variance, and how many training samples the vectors' standard form,
    is measured on (0 for none). Others: flags of mt_image_train.py (as FORMER where not stored), or LatentDiffusion.

    A batch holds images [B, H, W, C] (or cached latents, see `latents`), labels [B] and vectors [B, D] under the
    modalities' names, and where some are missing `<name>_present`, bool [B].
    """

    directions = ("given", "strength", "absent")

    def __init__(
        self,
        *args,
        unet_config,
        modalities: str | Mapping = (),
        aggregation: str = "bump",
        held_out: int = 256,
        extractors: Mapping[str, Mapping] | None = None,
        standardise: int = 1024,
        single_task_probability: float = 0.0,
        unshifted_probability: float = 0.33,
        detectability: float = 4.0,
        presence: bool = True,
        code_interval: int = 0,
        first_stage_key: str = "image",
        image_size=256,
        channels=3,
        parameterization="eps",
        ckpt_path=None,
        ignore_keys=(),
        load_only_unet=False,
        **kwargs,
    ):
        if kwargs.get("loss_type", "l2") != "l2":
            raise UserValueError("the joint loss (equation 6) is a squared error: loss_type must be l2")
        unet_config = _plain(unet_config)
        params = unet_config.setdefault("params", {})
        shape = (channels, *((image_size, image_size) if isinstance(image_size, int) else image_size))
        betas = noise_betas(**{name: kwargs.pop(name) for name in _SCHEDULE if name in kwargs})
        modalities, encoders = make_encoders(modalities)
        members = latent_modalities(modalities, shape, params.get("num_classes"))
        members = with_peaks(members, aggregation, betas, shape, detectability)
        shifts = Aggregation.named(aggregation, betas, peaks(members)) if members else None
        made = ModalitySet(
            members,
            channels,
            make_diffusion(betas, parameterization, shifts),
            num_classes=params.get("num_classes") if any(m.data_key == "y" for m in members) else None,
            context_dim=params.get("context_dim"),
            presence=presence,
            single_task=single_task_probability > 0,
            image_name=first_stage_key,
        )
        if members:
            width, mult = params["model_channels"], params.get("channel_mult", (1, 2, 4, 8))
            params["in_channels"] += made.input_channels - channels
            params["heads"] = made.make_heads(int(mult[-1] * width), int(mult[0] * width))
            params["presence"] = made.make_presence(4 * width)
        shared = dict(
            first_stage_key=first_stage_key,
            image_size=image_size,
            channels=channels,
            parameterization=parameterization,
        )
        super().__init__(*args, unet_config=unet_config, given_betas=betas, **shared, **kwargs)
        self.modalities, self.diffusion = made, made.process
        self.held_out, self.standardise = held_out, standardise
        self.single_task_probability = single_task_probability
        self.unshifted_probability = unshifted_probability
        self.code_interval, self._refreshed_at = code_interval, -1
        self.codes = made.make_codes(shape) if code_interval != 1 else None
        self._codes_known = False
        if encoders:
            self.encoders = encoders
        self.standards = make_standards(members)
        self.extractors = make_extractors(extractors or {}, self.standards)
        if members and shifts.names:
            _logger.info("%s", shifts.report(self.diffusion.alphas_cumprod))
        self._held_out: list[dict] | None = None  # latents, modalities, conditioning
        self._measured_at = -1
        if ckpt_path is not None and not is_weightless():
            self.init_from_ckpt(ckpt_path, ignore_keys, only_model=load_only_unet)

    @property
    def names(self) -> list[str]:
        """The image's name and the modalities'."""
        return [self.first_stage_key, *self.modalities.names]

    @property
    def map_names(self) -> list[str]:
        """Of the modalities that are maps of classes."""
        return [m.name for m in self.modalities if isinstance(m, MapModality)]

    @property
    def image_names(self) -> list[str]:
        """Of all that come and go as images: the image's, those of modalities that are images, and of maps."""
        return [self.first_stage_key, *(m.name for m in self.modalities if m.has_content_everywhere)]

    def train(self, mode=True):
        """See LatentDiffusion; extractors and encoders stay as they are."""
        super().train(mode)
        for name in ("extractors", "encoders"):
            getattr(self, name, nn.Module()).eval()
        return self

    @property
    def modality_channels(self) -> int:
        """Of the U-Net's input."""
        return self.modalities.input_channels - self.channels

    # From data to the diffusion's terms (scaled latents, class probabilities, vectors in standard form) and back

    def modality_batch(self, batch: Mapping, random: PerSample | None = None) -> Batch:
        """The modalities of a batch of data: images as scaled latents, drawn by `random`; vectors in
        standard form."""
        values, present = {}, {}
        for m in self.modalities:
            if m.name in self.map_names and m.name in batch:
                images = channels_first(from_batch(batch, m.name, "a map")).to(self.device)
                values[m.name] = m.of_colors(images)
            elif m.name in self.image_names and (m.name in batch or f"{m.name}_latent" in batch):
                values[m.name] = self.latents(batch, m.name, random)
            elif m.name in self.standards:
                values[m.name] = self.standards[m.name](self.vectors(batch, m.name))
            elif m.name in batch:
                values[m.data_key] = batch[m.name].to(self.device)
            elif m.derive is None:
                raise UserValueError(
                    f"the batch has no {m.name!r}, a modality: it has {', '.join(map(repr, batch))}"
                )
            if f"{m.name}_present" in batch:
                present[m.name] = batch[f"{m.name}_present"].to(self.device)
        read = batch_of(self.modalities, values)
        return Batch(read.values, {**read.present, **present})

    @torch.no_grad()
    def vectors(self, batch: Mapping, name: str) -> torch.Tensor:
        """A batch's vectors [B, D] as they are: its own, or those of its images."""
        if name in batch:
            return batch[name].to(self.device).float()
        if name not in self.extractors:
            raise UserValueError(
                f"the batch has no {name!r}, and the model no extractors.{name} to read it off"
            )
        images = channels_first(from_batch(batch, self.first_stage_key, f"for extractors.{name}"))
        return self.extractors[name](images.to(self.device)).float()

    def given_values(
        self, given: Mapping[str, torch.Tensor], n: int, shape: tuple[int, int, int] | None = None
    ) -> dict[str, torch.Tensor]:
        """What is given (see `sample_joint`), as the diffusion knows it; shape: of the latents (default:
        latent_shape)."""
        values, shape = {}, tuple(shape or self.latent_shape)
        for key, value in given.items():
            name = key.removesuffix("_latent") if key not in self.names else key
            if name not in self.names:
                raise UserValueError(f"given {key}: this model has {', '.join(self.names)}")
            if len(value) != n:
                raise UserValueError(f"given {key}: {len(value)} samples, expected {n}")
            value = value.to(self.device)
            if name in self.standards:
                value = self.standards[name](self._as_vectors(name, value))
            elif key in self.map_names:
                value = self.modalities[name].of_colors(value)
            elif name not in self.image_names:
                value, _ = self.modalities[name].from_data(value)
            else:
                value = self.encode_images(value) if key == name else self.scale_factor * value
                if tuple(value.shape[1:]) != shape:
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

    def decoded(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Values in the diffusion's terms, by name, as data: images, probabilities, vectors."""
        return {name: self._decoded(name, value) for name, value in values.items()}

    def _decoded(self, name, value):
        if name in self.map_names:
            latent = torch.zeros(1, self.channels, *value.shape[2:], device=self.device)
            factor = self.decode_first_stage(latent).shape[2] // value.shape[2]
            return self.modalities[name].painted(value, factor)
        if name in self.image_names:
            return self.decode_first_stage(value)
        return self.standards[name].restore(value) if name in self.standards else value

    # The loss

    def loss_terms(self, x_start, cond, t, noise, random, batch):
        """Equation 6: the error of the prediction [B], and KL_name [B] with its lambda for every modality."""
        read = derive_values(self.modalities, x_start, self.modality_batch(batch, random), random)
        if self.single_task_probability:
            read = read.only(random.rand().to(x_start.device) >= self.single_task_probability)
        terms, _ = multitask_losses(
            self.modalities,
            Denoiser(self),
            read,
            t,
            noise=noise,
            random=random,
            conditioning=cond,
            unshifted_probability=self.unshifted_probability,
        )
        simple = terms["mse"]
        if self.parameterization == "v":
            # Denoiser gives eps = sqrt(abar) v + ..., so an error of v is one of eps, divided by sqrt(abar).
            simple = simple / self.alphas_cumprod[t]
        weighted = {f"KL_{m.name}": m.loss_weight for m in self.modalities if f"KL_{m.name}" in terms}
        return {"simple": simple} | {name: (terms[name], weight) for name, weight in weighted.items()}

    # Codes of labels, which stand still between two refreshes and belong to the checkpoint

    @property
    def standing_codes(self):
        """The codes of the weights as they were at the last refresh; None before the first one."""
        return self.codes if self._codes_known else None

    @torch.no_grad()
    def refresh_codes(self) -> None:
        """Bring the codes up to date with the weights; called on every rank."""
        if self.codes is not None:
            self._codes_known = True
            like = torch.zeros(1, *self.latent_shape, device=self.device)
            with self.whole():
                self.modalities.refresh_codes(Denoiser(self), like)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """See torch; a file without codes leaves them to be computed."""
        found = super().load_state_dict(state_dict, *args, **kwargs)
        self._codes_known = any(name.startswith("codes.") for name in state_dict)
        return found

    def on_train_batch_start(self, batch, batch_idx, dataloader_idx=0):
        """See LatentDiffusion; refreshes the codes at steps 0, 1, 2, 4, ... and every code_interval."""
        super().on_train_batch_start(batch, batch_idx, dataloader_idx)
        step = self.global_step
        if self.codes is None or self._refreshed_at == step:
            return
        samples = len(self.batch_random(batch, batch_idx)) * self.trainer.world_size
        interval = self.code_interval or affordable_interval(self.modalities, samples)
        if not self._codes_known or is_refresh_step(step, interval):
            self.refresh_codes()
            self._refreshed_at = step

    # What is measured beside training: the vectors' standard form, and the variance of the Gaussian heads, with
    # which a given modality conditions

    def measure_standards(self, batches: Iterable[Mapping], count: int) -> None:
        """See vectors.measure_standards."""
        measure_standards(self.standards, self.vectors, batches, count)

    def on_train_start(self):
        """Measures the vectors' standard form, unless a checkpoint knew it."""
        if self.standardise:
            self.measure_standards(read_again(self.trainer.train_dataloader), self.standardise)
        super().on_train_start()

    def on_fit_start(self):
        if self._measured and not self.trainer.enable_validation:
            _logger.warning(
                "there are no validation data: the variance of the modalities' heads is not measured, and "
                "generating from a given modality is not calibrated"
            )
        super().on_fit_start()

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.measure_heads()

    @property
    def _measured(self) -> bool:
        """Is there a head to measure?"""
        return any(m.likelihood == "gaussian" and m.head != "none" for m in self.modalities)

    @torch.no_grad()
    def hold_out(self, batches: Iterable[Mapping]) -> None:
        """Keep the first held_out samples of `batches` that have every modality for `measure_heads`: latents,
        modalities and conditioning."""
        parts, kept = [], 0
        for batch in batches:
            batch = self.transfer_batch_to_device(batch, self.device, 0)
            z, cond = self.get_input(batch, self.first_stage_key, force_c_encode=True)
            read = self.modality_batch(batch)
            complete = torch.ones(len(z), dtype=torch.bool, device=z.device)
            for mask in read.present.values():
                complete &= mask
            where = complete.nonzero().squeeze(1)[: self.held_out - kept]
            values = {
                self.modalities[name].data_key: value
                if name in self.map_names
                else self.modalities[name].to_data(value)
                for name, value in read.values.items()
            }
            parts.append(tuple(select(part, where) for part in ({"z": z}, values, cond)))
            kept += len(where)
            if kept >= self.held_out:
                break
        self._held_out = [joined(batches) for batches in zip(*parts, strict=True)]

    def measure_heads(self) -> None:
        """Measure the Gaussian heads' squared error, by the moving average, on the first samples of the
        validation data (`hold_out`). Every rank takes its share."""
        if self._held_out is None:
            loaders = None if self._trainer is None else self.trainer.val_dataloaders
            if loaders is None or not self._measured:
                return
            with self.whole():
                self.hold_out(loaders[0] if isinstance(loaders, (list, tuple)) else loaders)
        if not self._held_out:
            return
        latents, values, cond = self._held_out
        with self.ema_scope():
            measure_variance(self.modalities, Denoiser(self), latents["z"], values, self.seed, cond)
        self._measured_at = self.global_step

    def on_save_checkpoint(self, checkpoint):
        """A checkpoint's variances belong to its weights, and it has codes."""
        if self.codes is not None and not self._codes_known:
            self.refresh_codes()
            checkpoint["state_dict"].update(
                {f"codes.{name}": v for name, v in self.codes.state_dict().items()}
            )
        if self._measured and self._measured_at != self.global_step:
            self.measure_heads()
            for name, value in self.state_dict().items():
                if (
                    name.endswith((".variance", ".share", ".correlation"))
                    and name in checkpoint["state_dict"]
                ):
                    checkpoint["state_dict"][name] = value

    # Sampling

    def network(
        self,
        unconditional=None,
        scale=1.0,
        corrector=None,
        options=None,
        given: Mapping[str, torch.Tensor] | None = None,
        strength: float | Mapping[str, float] | None = None,
        absent: Sequence[str] = (),
    ) -> dict:
        """What `joint_sample` is told: modalities that are neither `given` (in the terms of `given_values`) nor
        `absent` are estimated; others as in LatentDiffusion."""
        if corrector is not None:
            raise UserValueError("a score_corrector does not work on a model of several modalities")
        own = {"modalities": self.modalities, "network": Denoiser(self), "unconditional": unconditional}
        own |= {"given": given, "strength": strength, "absent": absent}
        return own | {"guidance": 1.0 if unconditional is None else scale}

    @torch.no_grad()
    def sample_joint(
        self,
        n: int,
        given: Mapping[str, torch.Tensor] | None = None,
        want: Sequence[str] | None = None,
        *,
        sampler: str = "ddpm",
        steps: int | None = None,
        eta: float = 0.0,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        conditioning=None,
        unconditional=None,
        guidance: float = 1.0,
        strength: float | Mapping[str, float] | None = None,
        absent: Sequence[str] = (),
        shape: tuple[int, int, int] | None = None,
        use_ema: bool = True,
        progress: bool = False,
        watch: Callable | None = None,
    ) -> dict[str, torch.Tensor]:
        """n samples of what is wanted (default: everything that is not given), by name: images [n, C, H, W]
        (not clipped), class probabilities, vectors.

        given: by name images [n, C, H, W] in [-1, 1], or under `<name>_latent` unscaled latents [n, c, h, w], labels
        int64 [n] or probabilities, vectors [n, D] or images [n, 3, H, W] to read them off. If the image is given, see
        `predict`. sampler, steps, eta: see `Sampler.sample`; seed, indices: sample k is number indices[k] (default
        k) of the seed, whatever n; conditioning, unconditional: learned, and what guidance leads away from; guidance,
        strength, absent: see JointDenoiser; shape: of the latents; watch: see Sampler.sample. UserValueError for unknown names.
        """
        if sampler not in SAMPLERS:
            raise UserValueError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
        if steps is not None and not isinstance(steps, int):
            raise UserValueError(f"steps {steps!r}: expected a whole number, or None for the whole process")
        values = self.given_values(given or {}, n, shape)
        wanted = self._wanted(want, {**values, **dict.fromkeys(absent)})
        random = PerSample.derived(seed, range(n) if indices is None else indices, self.device)
        with self.ema_scope() if use_ema else torch.no_grad():
            if self.first_stage_key in values:
                out = self._predict(values, conditioning, random)
            else:
                latents, way = SAMPLERS[sampler](self).sample(
                    steps,
                    n,
                    shape or self.latent_shape,
                    conditioning,
                    eta=eta,
                    verbose=progress,
                    unconditional_guidance_scale=guidance,
                    unconditional_conditioning=unconditional,
                    random=random,
                    given=values,
                    strength=strength,
                    absent=absent,
                    watch=watch,
                )
                out = {self.first_stage_key: latents, **way.get("values", {})}
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
    ) -> dict[str, torch.Tensor]:
        """The modalities' expectations for images [n, C, H, W] in [-1, 1], read at the diffusion indices
        `times`, by name; arguments as in `sample_joint`."""
        n = len(images)
        values = self.given_values({self.first_stage_key: images, **(given or {})}, n)
        wanted = self._wanted(None, values)
        random = PerSample.derived(seed, range(n) if indices is None else indices, self.device)
        with self.ema_scope() if use_ema else torch.no_grad():
            out = self._predict(values, conditioning, random, times)
        return self.decoded({name: out[name] for name in wanted})

    def _predict(self, values, conditioning, random, times=(0, 10, 20)):
        image, cond = values.pop(self.first_stage_key), self.as_conditioning(conditioning)
        return predict_modalities(self.modalities, Denoiser(self), image, values, times, random, cond)

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

    def log_samples(self, batch, cond, n, steps, eta, scale, null_label, seed):
        """Samples for `log_images` by the weights in use: image and modalities from nothing (`samples`, `samples_<name>`), the image
        given each modality that is an image or a vector (`image_from_<name>`), and each image given the
        image (`<name>_from_image`)."""
        image, *images = self.image_names
        options = {"steps": steps, "seed": seed, "conditioning": cond, "use_ema": False}
        options |= {"sampler": "ddpm"} if steps is None else {"sampler": "ddim", "eta": eta}
        if scale != 1:
            options |= {
                "guidance": scale,
                "unconditional": self.get_unconditional_conditioning(n, null_label),
            }
        drawn = self.sample_joint(n, None, [image, *images], **options)
        shown = {"samples": drawn.pop(image), **{f"samples_{name}": value for name, value in drawn.items()}}
        values = self.modality_batch(batch).values
        for name in (name for name in (*images, *self.standards) if name in values):
            source = self.decoded({name: values[name]})
            if name in images:
                shown |= source
            if name in images and name not in self.map_names:
                source = {f"{name}_latent": values[name] / self.scale_factor}
            shown[f"image_from_{name}"] = self.sample_joint(n, source, [image], **options)[image]
        if images:
            source = {f"{image}_latent": self.latents(batch, image) / self.scale_factor}
            read = self.sample_joint(n, source, images, seed=seed, conditioning=cond, use_ema=False)
            shown |= {f"{name}_from_image": value for name, value in read.items()}
        return shown

    # Checkpoints

    def init_from_ckpt(self, path, ignore_keys=(), only_model=False):
        """See DDPM; codes that the file lacks are computed when they are needed."""
        self._codes_known = False
        super().init_from_ckpt(path, ignore_keys, only_model)

    def optional_weights(self, weights, prefix):
        """Beside LatentDiffusion's: the heads and what reads and scales vectors, where the file has nothing of
        them."""
        unet = f"{prefix}diffusion_model."
        parts = (f"{unet}heads.", f"{unet}presence.", "extractors.", "encoders.", "standards.", "codes.")
        absent = (part for part in parts if not any(name.startswith(part) for name in weights))
        return (*super().optional_weights(weights, prefix), *absent)


def make_encoders(spec: str | Mapping) -> tuple[str | Mapping, nn.ModuleDict]:
    """A specification of modalities whose `encoder: {target, params}` are made, and these frozen modules by name: from
    values [B, ...] to latents [B, C, h, w]. UserValueError for a target that is no module."""
    made = nn.ModuleDict()
    if isinstance(spec, str) or not spec:
        return spec, made
    spec = _plain(spec)
    for name, options in spec.items():
        if isinstance(options, Mapping) and isinstance(options.get("encoder"), Mapping):
            config = options["encoder"]
            made[name] = frozen(instantiate_from_config(config, nn.Module, f"modalities.{name}.encoder"))
            spec[name] = {**options, "encoder": made[name]}
    return spec, made


def latent_modalities(
    spec: str | Mapping, latent_shape: tuple[int, int, int], num_classes: int | None = None
) -> tuple[Modality, ...]:
    """The modalities of `parse_modalities` for latents of `latent_shape`: unlike images they have no
    bounds."""
    spec = _plain(spec) if spec else {}
    members = parse_modalities(spec, latent_shape, num_classes)
    return tuple(
        replace(m, bounded=False) if isinstance(m, ImageModality) and not _sets_bounds(spec, m.name) else m
        for m in members
    )


def _sets_bounds(spec, name):
    return isinstance(spec, Mapping) and "bounded" in spec[name]


def _plain(config):
    """A configuration as plain values, a copy."""
    if isinstance(config, str):
        return config
    if isinstance(config, DictConfig):
        return OmegaConf.to_container(config, resolve=True)
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}


def with_former_defaults(config: Mapping) -> dict:
    """A stored configuration (`model` and more), whose joint model has FORMER for the options that it does not name."""
    model = config["model"]
    if not _is_joint(model):
        return dict(config)
    return {**config, "model": {**model, "params": {**FORMER, **model["params"]}}}


def with_defaults(config: Mapping) -> dict:
    """A configuration of a run to begin, whose joint model names the options of FORMER, so that it can be stored."""
    model = config["model"]
    if not _is_joint(model):
        return dict(config)
    known = inspect.signature(JointLatentDiffusion.__init__).parameters
    return {
        **config,
        "model": {**model, "params": {**{name: known[name].default for name in FORMER}, **model["params"]}},
    }


def _is_joint(model):
    if not isinstance(model, Mapping) or not isinstance(model.get("params"), Mapping):
        return False
    made = resolve(model, key="model")
    return inspect.isclass(made) and issubclass(made, JointLatentDiffusion)
