"""Several modalities in one latent diffusion (MT-Diffusion, sections 3 and 4): everything that they add to
LatentDiffusion.

Image modalities come as images under their own names and pass the same first stage as the image: one U-Net
diffuses the image's latents, shifted by theirs, and predicts both.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from omegaconf import DictConfig, OmegaConf

from guided_diffusion.checkpoint_util import fit_channels
from guided_diffusion.errors import UserValueError
from guided_diffusion.mt.aggregation import Aggregation
from guided_diffusion.mt.losses import multitask_losses
from guided_diffusion.mt.modalities import Modality, parse_modalities
from guided_diffusion.mt.modality_set import Batch, ModalitySet, batch_of, derive_values, peaks, with_peaks
from guided_diffusion.mt.training import measure_variance
from guided_diffusion.seeding import PerSample
from ldm.models.diffusion.conditioning import select
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.joint_sampling import JointSampling
from ldm.models.diffusion.schedule import Denoiser, make_diffusion
from ldm.models.diffusion.vectors import VectorModalities, read_again
from ldm.modules.ema import LitEma

_logger = logging.getLogger(__name__)


class JointLatentDiffusion(VectorModalities, JointSampling, LatentDiffusion):
    """LatentDiffusion of an image and `modalities`.

    modalities: as for guided_diffusion.mt.modalities.parse_modalities, in latent space: `{label_map: {preset:
    image}}` is a second image; variant X widens the U-Net's input beyond unet_config's in_channels;
    aggregation: how they enter the latent (Aggregation.named); held_out: how many validation samples the
    heads' variance is measured on; extractors: {name: configuration} of what reads vector modalities off the
    images (VectorModalities); standardise: how many training samples the vectors' mean and scale are
    measured on, 0 for none; single_task_probability: with it a sample's modalities all count as missing, so
    that the model also learns to draw without them. A batch holds images [B, H, W, C] (or cached latents,
    see FirstStageCoding.latents), labels [B] and vectors [B, D] under the modalities' names, and where some
    are missing `<name>_present`, bool [B]. Other arguments as in LatentDiffusion.
    """

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
        unshifted_probability: float = 0.0,
        detectability: float = 0.0,
        presence: bool = False,
        image_size=256,
        channels=3,
        ckpt_path=None,
        ignore_keys=(),
        load_only_unet=False,
        **kwargs,
    ):
        if kwargs.get("loss_type", "l2") != "l2":
            raise UserValueError("the joint loss (equation 6) is a squared error: loss_type must be l2")
        unet_config = _plain(unet_config)
        params = unet_config.setdefault("params", {})
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        members = latent_modalities(modalities, (channels, *size), params.get("num_classes"))
        labelled = any(m.data_key == "y" for m in members)
        self._extra_channels = sum(m.input_channels for m in members)
        params["in_channels"] += self._extra_channels
        super().__init__(*args, unet_config=unet_config, image_size=image_size, channels=channels, **kwargs)
        betas = self.diffusion.betas
        members = with_peaks(members, aggregation, betas, (channels, *size), detectability)
        self.aggregation = Aggregation.named(aggregation, betas, peaks(members)) if members else None
        self.diffusion = make_diffusion(betas, self.parameterization, self.aggregation)
        self.modalities = ModalitySet(
            members,
            channels,
            self.diffusion,
            num_classes=params.get("num_classes") if labelled else None,
            context_dim=params.get("context_dim"),
            presence=presence,
            single_task=single_task_probability > 0,
        )
        unet = self.model.diffusion_model
        width, mult = unet.model_channels, unet.channel_mult
        unet.heads = self.modalities.make_heads(int(mult[-1] * width), int(mult[0] * width))
        unet.presence = self.modalities.make_presence(unet.time_embed_dim)
        if self.use_ema:
            self.model_ema = LitEma(self.model)  # of the heads too
        self.held_out, self.standardise = held_out, standardise
        self.single_task_probability, self.unshifted_probability = (
            single_task_probability,
            unshifted_probability,
        )
        self.make_vectors(extractors or {})
        if self.aggregation is not None and self.aggregation.names:
            _logger.info("%s", self.aggregation.report(self.diffusion.alphas_cumprod))
        self._held_out: list[dict] | None = None
        self._measured_at = -1
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, only_model=load_only_unet)

    # The loss

    def modality_batch(self, batch: Mapping, random: PerSample | None = None) -> Batch:
        """The modalities of a batch of data: images as scaled latents, drawn by `random`; vectors in
        standard form."""
        values, present = {}, {}
        for m in self.modalities:
            if m.kind == "image" and (m.name in batch or f"{m.name}_latent" in batch):
                values[m.name] = self.latents(batch, m.name, random)
            elif m.kind == "vector":
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

    # The variance of the Gaussian heads, with which a given modality conditions

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.measure_heads()

    def measure_heads(self) -> None:
        """Measure the Gaussian heads' squared error, by the moving average, on the first samples of the
        validation data (`hold_out`). Every rank takes its share."""
        if self._held_out is None:
            loaders = None if self._trainer is None else self.trainer.val_dataloaders
            if loaders is None or not self._measured:
                return
            self.hold_out(loaders[0] if isinstance(loaders, (list, tuple)) else loaders)
        if not self._held_out:
            return
        images = torch.cat([part["images"] for part in self._held_out])
        values = _concatenated([part["values"] for part in self._held_out])
        cond = _concatenated([part["cond"] for part in self._held_out])
        with self.ema_scope():
            measure_variance(self.modalities, Denoiser(self), images, values, self.seed, cond)
        self._measured_at = self.global_step

    @torch.no_grad()
    def hold_out(self, batches: Iterable[Mapping]) -> None:
        """Keep the first held_out samples of `batches` for `measure_heads`."""
        self._held_out, kept = [], 0
        for batch in batches:
            batch = self.transfer_batch_to_device(batch, self.device, 0)
            self._held_out.append(self._to_measure(batch, self.held_out - kept))
            kept += len(self._held_out[-1]["images"])
            if kept >= self.held_out:
                break

    @property
    def _measured(self) -> bool:
        """Is there a head to measure?"""
        return any(m.likelihood == "gaussian" and m.head != "none" for m in self.modalities)

    def on_save_checkpoint(self, checkpoint):
        """A checkpoint's variances belong to its weights."""
        if self._measured and self._measured_at != self.global_step:
            self.measure_heads()
            for name, value in self.state_dict().items():
                if name.endswith(".variance") and name in checkpoint["state_dict"]:
                    checkpoint["state_dict"][name] = value

    def on_fit_start(self):
        if self._measured and not self.trainer.enable_validation:
            _logger.warning(
                "there are no validation data: the variance of the modalities' heads is not measured, and "
                "generating from a given modality is not calibrated"
            )
        super().on_fit_start()

    def on_train_start(self):
        """Measures the vectors' standard form, unless a checkpoint knew it."""
        if self.standardise:
            self.measure_standards(read_again(self.trainer.train_dataloader), self.standardise)
        super().on_train_start()

    def train(self, mode=True):
        """See LatentDiffusion; extractors stay as they are."""
        super().train(mode)
        for extractor in getattr(self, "extractors", {}).values():
            extractor.eval()
        return self

    def _to_measure(self, batch, most):
        """Latents, modalities and conditioning of at most `most` samples that have every modality."""
        z, cond = self.get_input(batch, self.first_stage_key)
        read = self.modality_batch(batch)
        complete = torch.ones(len(z), dtype=torch.bool, device=z.device)
        for mask in read.present.values():
            complete &= mask
        where = complete.nonzero().squeeze(1)[:most]
        values = {
            self.modalities[name].data_key: self.modalities[name].to_data(value)
            for name, value in read.values.items()
        }
        return {"images": z[where], "values": select(values, where), "cond": select(cond, where)}

    # Checkpoints

    def adapt_weights(self, weights):
        """A single-task checkpoint serves too: the U-Net's first layer gets zeros for the channels of the
        modalities, so that its prediction stays what it was."""
        weights = dict(super().adapt_weights(weights))
        first = "diffusion_model.input_blocks.0.0.weight"
        own = self.model.state_dict()[first]
        for name in (f"model.{first}", first, "model_ema." + first.replace(".", "")):
            if name in weights and weights[name].shape[1] == own.shape[1] - self._extra_channels:
                # The order is latent, modalities, conditioning (ModalitySet.apply, DiffusionWrapper).
                weights = fit_channels(weights, {name: own}, name, at=self.channels)
        return weights

    def optional_weights(self, weights, prefix):
        """Beside LatentDiffusion's: the heads and what reads and scales vectors, where the file has nothing of
        them."""
        parts = (f"{prefix}diffusion_model.heads.", "extractors.", "standards.")
        absent = (part for part in parts if not any(name.startswith(part) for name in weights))
        return (*super().optional_weights(weights, prefix), *absent)


def latent_modalities(
    spec: str | Mapping, latent_shape: tuple[int, int, int], num_classes: int | None = None
) -> tuple[Modality, ...]:
    """The modalities of `parse_modalities` for latents of `latent_shape`: unlike images they have no
    bounds."""
    spec = _plain(spec) if spec else {}
    members = parse_modalities(spec, latent_shape, num_classes)
    return tuple(
        replace(m, bounded=False) if m.kind == "image" and not _sets_bounds(spec, m.name) else m
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


def _concatenated(parts: Sequence[Mapping]) -> dict:
    """Batches of tensors, or lists of tensors, by name, one after the other."""
    return {
        name: torch.cat([part[name] for part in parts])
        if isinstance(first, torch.Tensor)
        else [torch.cat(pieces) for pieces in zip(*(part[name] for part in parts), strict=True)]
        for name, first in parts[0].items()
    }
