"""Pseudo linear multistep sampling (Liu et al. 2022); interface: latent-diffusion,
ldm/models/diffusion/plms.py."""

from ldm.models.diffusion.sampling import Sampler


class PLMSSampler(Sampler):
    """See `Sampler`; deterministic (eta must be 0)."""

    name = "plms"
