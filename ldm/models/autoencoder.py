"""The first stages: autoencoders between images and latents (interface and state-dict keys:
latent-diffusion, ldm/models/autoencoder.py).

Images are [B, C, H, W] in [-1, 1], latents [B, embed_dim, H / f, W / f].
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from guided_diffusion.errors import UserValueError
from ldm.checkpoint import is_weightless, load_state_dict, load_weights
from ldm.models.first_stage_training import FirstStageTraining
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.modules.quantize import VectorQuantizer2
from ldm.util import instantiate_from_config, parameters, refuse_unknown


class _FirstStage(FirstStageTraining):
    """What the autoencoders share: encoder, decoder, loss, their data and checkpoints.

    ddconfig: arguments of Encoder and Decoder; lossconfig: target and params of the training loss; image_key:
    of the images in a batch; colorize_nlabels: so many channels are shown as random colours; monitor: the
    metric by which checkpoints are kept.
    """

    def __init__(self, ddconfig, lossconfig, image_key, colorize_nlabels, monitor):
        super().__init__()
        self.image_key = image_key
        refuse_unknown("ddconfig", ddconfig, parameters(Encoder, Decoder))
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.loss = instantiate_from_config(lossconfig, nn.Module, "lossconfig")
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))
        if monitor is not None:
            self.monitor = monitor

    def init_from_ckpt(self, path, ignore_keys: Sequence[str] = ()) -> None:
        """Take the weights of a .ckpt or .safetensors file, but none whose name starts with one of
        `ignore_keys`.

        The file may lack the loss and the moving average. `UserError` if it belongs to another model.
        """
        weights = load_state_dict(path)
        load_weights(self, weights, path, ignore_keys, optional=("loss.", "model_ema.", "colorize"))

    def get_input(self, batch: Mapping[str, torch.Tensor], k: str) -> torch.Tensor:
        """batch[k], images [B, H, W, C] or [B, H, W], as float32 [B, C, H, W]."""
        if k not in batch:
            raise UserValueError(f"the batch has no {k!r} (image_key): it has {', '.join(map(repr, batch))}")
        x = batch[k]
        if x.ndim == 3:
            x = x[..., None]
        return x.permute(0, 3, 1, 2).contiguous().float()

    def get_last_layer(self) -> nn.Parameter:
        """The weight on which a discriminator's strength is balanced."""
        return self.decoder.last_layer

    @torch.no_grad()
    def to_rgb(self, x: torch.Tensor) -> torch.Tensor:
        """A map of colorize_nlabels channels as random colours [B, 3, H, W], stretched to [-1, 1]."""
        x = F.conv2d(x, self.colorize)
        return 2 * (x - x.min()) / (x.max() - x.min()) - 1

    def _as_rgb(self, images):
        """`images` by name, in colours where they have more than three channels and `to_rgb` can."""
        if not hasattr(self, "colorize"):
            return images
        return {name: self.to_rgb(x) if x.shape[1] > 3 else x for name, x in images.items()}


class AutoencoderKL(_FirstStage):
    """The autoencoder with Gaussian latents, close to N(0, I) (Rombach et al. 2022).

    embed_dim: channels of the latent; ddconfig needs double_z (`UserValueError`); scheduler_config: as in
    `VQModel` (upstream has it only there); other arguments as in `_FirstStage`.
    """

    def __init__(
        self,
        ddconfig,
        lossconfig,
        embed_dim,
        ckpt_path=None,
        ignore_keys=(),
        image_key="image",
        colorize_nlabels=None,
        monitor=None,
        scheduler_config=None,
    ):
        if not ddconfig.get("double_z", True):
            raise UserValueError(
                "AutoencoderKL needs ddconfig.double_z: its encoder gives means and variances"
            )
        super().__init__(ddconfig, lossconfig, image_key, colorize_nlabels, monitor)
        self.embed_dim = embed_dim
        self.scheduler_config = scheduler_config
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        if ckpt_path is not None and not is_weightless():
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def loss_arguments(self, x):
        """(images, reconstructions, posterior)."""
        reconstructions, posterior = self(x)
        return (x, reconstructions, posterior), {}

    @torch.no_grad()
    def log_images(self, batch, only_inputs=False, **kwargs) -> dict[str, torch.Tensor]:
        """Images [B, 3, H, W] by name: inputs, reconstructions, and samples decoded from N(0, I)."""
        x = self.get_input(batch, self.image_key)
        log = {"inputs": x}
        if not only_inputs:
            log["reconstructions"], posterior = self(x)
            log["samples"] = self.decode(torch.randn_like(posterior.mean))
        return self._as_rgb(log)

    def encode(self, x) -> DiagonalGaussianDistribution:
        """The posterior q(z | x) of images [B, C, H, W]."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z) -> torch.Tensor:
        """Latents [B, embed_dim, h, w] -> images."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, input, sample_posterior=True):
        """(images as reconstructed from a draw of the posterior, or from its mode; the posterior)."""
        posterior = self.encode(input)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior


class VQModel(_FirstStage):
    """The autoencoder whose latents are entries of a learned codebook (VQGAN; Esser et al. 2021).

    n_embed, embed_dim: number and width of the entries; remap: file with the indices of the entries in use;
    sane_index_shape: indices [B, h, w] instead of flat; batch_resize_range: (low, high), training images
    are resized to a random size in between, in steps of 16; use_ema: keep a moving average; scheduler_config:
    learning-rate schedule; lr_g_factor: of the generator's rate; other arguments as in `_FirstStage`.
    """

    def __init__(
        self,
        ddconfig,
        lossconfig,
        n_embed,
        embed_dim,
        ckpt_path=None,
        ignore_keys=(),
        image_key="image",
        colorize_nlabels=None,
        monitor=None,
        batch_resize_range=None,
        scheduler_config=None,
        lr_g_factor=1.0,
        remap=None,
        sane_index_shape=False,
        use_ema=False,
    ):
        super().__init__(ddconfig, lossconfig, image_key, colorize_nlabels, monitor)
        self.embed_dim = embed_dim
        self.n_embed = n_embed
        self.batch_resize_range = batch_resize_range
        self.scheduler_config = scheduler_config
        self.lr_g_factor = lr_g_factor
        self.quantize = VectorQuantizer2(
            n_embed, embed_dim, beta=0.25, remap=remap, sane_index_shape=sane_index_shape
        )
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self)
        if ckpt_path is not None and not is_weightless():
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def loss_arguments(self, x):
        """(codebook's loss, images, reconstructions), and which entries were used."""
        reconstructions, codebook_loss, indices = self(x, return_pred_indices=True)
        return (codebook_loss, x, reconstructions), {"predicted_indices": indices}

    def generator_modules(self):
        """As in `FirstStageTraining`, and the codebook."""
        return [*super().generator_modules(), self.quantize]

    @torch.no_grad()
    def log_images(self, batch, only_inputs=False, plot_ema=False, **kwargs) -> dict[str, torch.Tensor]:
        """Images [B, 3, H, W] by name: inputs, reconstructions, and with plot_ema the average's too."""
        x = self.get_input(batch, self.image_key)
        log = {"inputs": x}
        if not only_inputs:
            log["reconstructions"] = self(x)[0]
            if plot_ema:
                with self.ema_scope():
                    log["reconstructions_ema"] = self(x)[0]
        return self._as_rgb(log)

    def get_input(self, batch, k):
        """As in `_FirstStage`, resized to a random size of batch_resize_range; the largest first, so that
        memory is known to suffice."""
        x = super().get_input(batch, k)
        if self.batch_resize_range is None:
            return x
        low, high = self.batch_resize_range
        size = high if self.global_step <= 4 else int(np.random.choice(np.arange(low, high + 16, 16)))
        return x if size == x.shape[2] else F.interpolate(x, size=size, mode="bicubic")

    def encode(self, x):
        """Images -> (codebook entries [B, embed_dim, h, w], loss of the codebook, (None, None,
        indices))."""
        return self.quantize(self.encode_to_prequant(x))

    def encode_to_prequant(self, x) -> torch.Tensor:
        """Images -> latents [B, embed_dim, h, w] before they are rounded to the codebook."""
        return self.quant_conv(self.encoder(x))

    def decode(self, quant) -> torch.Tensor:
        """Codebook entries [B, embed_dim, h, w] -> images."""
        return self.decoder(self.post_quant_conv(quant))

    def decode_code(self, code_b) -> torch.Tensor:
        """Indices, int64 [B, h, w], -> images."""
        entries = self.quantize.get_codebook_entry(code_b.reshape(-1), (*code_b.shape, self.embed_dim))
        return self.decode(entries)

    def forward(self, input, return_pred_indices=False):
        """(reconstructed images, loss of the codebook), and the indices if asked for."""
        quant, codebook_loss, (_, _, indices) = self.encode(input)
        outputs = (self.decode(quant), codebook_loss)
        return (*outputs, indices) if return_pred_indices else outputs


class VQModelInterface(VQModel):
    """VQModel as a first stage: the latent is not yet rounded, the decoder does that first."""

    def __init__(self, embed_dim, *args, **kwargs):
        super().__init__(*args, embed_dim=embed_dim, **kwargs)

    def encode(self, x) -> torch.Tensor:
        """Images -> latents [B, embed_dim, h, w] before they are rounded to the codebook."""
        return self.encode_to_prequant(x)

    def decode(self, h, force_not_quantize=False) -> torch.Tensor:
        """Latents -> images; force_not_quantize: do not round `h` to the codebook."""
        return super().decode(h if force_not_quantize else self.quantize(h)[0])


class IdentityFirstStage(nn.Module):
    """A first stage that changes nothing: diffusion on the images themselves.

    vq_interface: `quantize` returns what VQModel's does. Other arguments are accepted and ignored.
    """

    def __init__(self, *args, vq_interface=False, **kwargs):
        super().__init__()
        self.vq_interface = vq_interface

    def forward(self, x, *args, **kwargs):
        """`x` itself, as from `encode` and `decode`."""
        return x

    encode = decode = forward

    def quantize(self, x, *args, **kwargs):
        """`x` itself, with vq_interface as (x, no loss, no indices)."""
        return (x, None, (None, None, None)) if self.vq_interface else x
