"""Small latent diffusion models, for the tests."""

import torch as th

from ldm.models.diffusion.ddpm import LatentDiffusion

UNET = dict(
    image_size=8,
    in_channels=2,
    out_channels=2,
    model_channels=32,
    attention_resolutions=[2],
    num_res_blocks=1,
    channel_mult=[1, 2],
    num_heads=2,
)
DDCONFIG = dict(
    double_z=True,
    z_channels=2,
    resolution=16,
    in_channels=3,
    out_ch=3,
    ch=32,
    ch_mult=[1, 2],
    num_res_blocks=1,
    attn_resolutions=[],
    dropout=0.0,
)
KL = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {"embed_dim": 2, "ddconfig": DDCONFIG, "lossconfig": {"target": "torch.nn.Identity"}},
}
IDENTITY = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
CLASSES = {
    "target": "ldm.modules.encoders.modules.ClassEmbedder",
    "params": {"embed_dim": 6, "n_classes": 4, "key": "class_label"},
}


def unet_config(**changes):
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": {**UNET, **changes}}


PLAIN = dict(
    first_stage_config=IDENTITY,
    cond_stage_config="__is_unconditional__",
    unet_config=unet_config(),
    image_size=8,
    channels=2,
    timesteps=40,
)
CONTEXT = unet_config(use_spatial_transformer=True, context_dim=6)


def small(cls=LatentDiffusion, shake=True, **changes):
    """A model of 2 x 8 x 8 latents (the images themselves, unless first_stage_config is changed) in 40
    steps; unless `shake` is off, every weight of its network is away from its initial zeros."""
    th.manual_seed(0)
    model = cls(**{**PLAIN, **changes}).eval()
    return shaken(model) if shake else model


def shaken(model, scale=0.05):
    """`model` with noise on its network, the heads last, and a moving average equal to it."""
    generator = th.Generator().manual_seed(1)
    with th.no_grad():
        for name, parameter in model.model.named_parameters():
            if "heads" not in name:
                parameter.add_(scale * th.randn(parameter.shape, generator=generator))
        for name, parameter in model.model.named_parameters():
            if "heads" in name:
                parameter.add_(scale * th.randn(parameter.shape, generator=generator))
        if model.use_ema:
            average = dict(model.model_ema.named_buffers())
            for name, shadow in model.model_ema.m_name2s_name.items():
                average[shadow].copy_(dict(model.model.named_parameters())[name])
    return model


def maps(count=4, channels=2, size=8, seed=0):
    """Images [B, H, W, C] in [-1, 1], as a batch has them."""
    generator = th.Generator().manual_seed(seed)
    return th.rand(count, size, size, channels, generator=generator) * 2 - 1
