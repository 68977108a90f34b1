"""The latent diffusions of Stable Diffusion 2 with further conditions (interface and state-dict keys:
Stability-AI/stablediffusion, ldm/models/diffusion/ddpm.py)."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from guided_diffusion.checkpoint_util import fit_channels
from guided_diffusion.errors import UserValueError
from guided_diffusion.seeding import PerSample
from ldm.models.diffusion.conditioning import channels_first, from_batch
from ldm.models.diffusion.ddpm import LatentDiffusion

_STEM = ("model.diffusion_model.input_blocks.0.0.weight", "model_ema.diffusion_modelinput_blocks00weight")


class LatentFinetuneDiffusion(LatentDiffusion):
    """LatentDiffusion that sees maps beside the latent, begun with one that does not.

    finetune_keys: tensors of the checkpoint ckpt_path whose input channels after the first keep_finetune_dims are
    new, and zero at first; None where nothing is new. Other arguments as in LatentDiffusion.
    """

    def __init__(
        self,
        concat_keys: Sequence[str],
        finetune_keys: Sequence[str] | None = _STEM,
        keep_finetune_dims: int = 4,
        *args,
        ckpt_path=None,
        **kwargs,
    ):
        if finetune_keys and ckpt_path is None:
            raise UserValueError(
                "finetune_keys need a checkpoint to begin with: give ckpt_path, or finetune_keys: null"
            )
        self.finetune_keys, self.keep_dims = tuple(finetune_keys or ()), keep_finetune_dims
        super().__init__(*args, concat_keys=concat_keys, ckpt_path=ckpt_path, **kwargs)

    def adapt_weights(self, weights):
        """See LatentDiffusion; the tensors of finetune_keys get zeros for the channels that they lack."""
        weights, own = super().adapt_weights(weights), self.state_dict()
        for name in self.finetune_keys:
            if name in weights and name in own and weights[name].shape[1] < own[name].shape[1]:
                weights = fit_channels(weights, {name: own[name]}, name, at=self.keep_dims)
        return weights


class LatentInpaintDiffusion(LatentFinetuneDiffusion):
    """Beside the latent are a mask, 1 where something is to be painted, and the image's latent without that."""

    def __init__(
        self, concat_keys=("mask", "masked_image"), masked_image_key="masked_image", *args, **kwargs
    ):
        super().__init__(concat_keys, *args, **kwargs)
        if masked_image_key not in concat_keys:
            raise UserValueError(f"masked_image_key {masked_image_key} is not among concat_keys")
        self.masked_image_key = masked_image_key


class LatentDepth2ImageDiffusion(LatentFinetuneDiffusion):
    """Beside the latent is the depth, in [-1, 1], that `depth_model` reads off batch[concat_keys[0]].

    depth_stage_config: of a module from what the batch has, usually [B, 3, 384, 384], to [B, 1, H, W].
    """

    def __init__(self, depth_stage_config, concat_keys=("midas_in",), *args, **kwargs):
        if len(concat_keys) != 1:
            raise UserValueError("a model of depth has one of concat_keys")
        self.configs = {"depth_model": depth_stage_config}
        super().__init__(concat_keys, *args, **kwargs)
        self.depth_stage_key = self.concat_keys[0]

    @torch.no_grad()
    def concat_map(self, batch: Mapping, name: str, random: PerSample | None = None):
        """The depth, resized to the latent and stretched to [-1, 1]."""
        depth = self.depth_model(from_batch(batch, name, "concat_keys").to(self.device))
        depth = F.interpolate(depth, size=self.latent_shape[1:], mode="bicubic", align_corners=False)
        low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
        return 2 * (depth - low) / (high - low + 1e-3) - 1


class LatentUpscaleDiffusion(LatentDiffusion):
    """Beside the latent is a small image batch[low_scale_key], noised; the class input is its noise level.

    low_scale_config: of what noises it (modules/diffusionmodules/upscaling.py).
    """

    def __init__(self, *args, low_scale_config, low_scale_key="LR", noise_level_key=None, **kwargs):
        if noise_level_key is not None:
            raise UserValueError("noise_level_key is not supported, as upstream: levels are drawn")
        self.configs = {"low_scale_model": low_scale_config}
        super().__init__(*args, **kwargs)
        self.low_scale_key = low_scale_key

    @torch.no_grad()
    def beside(self, batch, random=None):
        """The noised image, and its level."""
        low = channels_first(from_batch(batch, self.low_scale_key, "low_scale_key")).to(self.device)
        noised, level = self.low_scale_model(low, random=random)
        return {"c_concat": [noised], "c_adm": level}


class ImageEmbeddingConditionedLatentDiffusion(LatentDiffusion):
    """unCLIP (Ramesh et al. 2022): the class input is the embedding of the image batch[embedding_key].

    embedder_config: of the module images [B, 3, H, W] -> [B, D], frozen with freeze_embedder; noise_aug_config: of what
    noises embeddings, if any (CLIPEmbeddingNoiseAugmentation); embedding_dropout: share of the training samples whose
    class input is zero.
    """

    def __init__(
        self,
        embedder_config,
        embedding_key="jpg",
        embedding_dropout=0.5,
        freeze_embedder=True,
        noise_aug_config=None,
        *args,
        **kwargs,
    ):
        self.configs = {"embedder": embedder_config, "noise_augmentor": noise_aug_config}
        super().__init__(*args, **kwargs)
        if not freeze_embedder:
            self.embedder.requires_grad_(True)
        self.embedding_key, self.embedding_dropout = embedding_key, embedding_dropout

    @torch.no_grad()
    def beside(self, batch, random=None):
        """The class input [B, D], or with noise [B, D + timestep_dim]."""
        images = channels_first(from_batch(batch, self.embedding_key, "embedding_key")).to(self.device)
        embedding = self.embedder(images)
        if self.noise_augmentor is not None:
            embedding = torch.cat(self.noise_augmentor(embedding, random=random), dim=1)
        if self.training:
            draws = torch.rand(len(embedding)) if random is None else random.rand()
            embedding = embedding * (draws.to(embedding) >= self.embedding_dropout)[:, None]
        return {**super().beside(batch, random), "c_adm": embedding}
