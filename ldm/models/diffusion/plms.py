"""Pseudo linear multistep sampling (Liu et al. 2022); interface: latent-diffusion,
ldm/models/diffusion/plms.py."""

from guided_diffusion.mt import sampling
from ldm.models.diffusion.sampling import Sampler
from ldm.modules.diffusionmodules.util import make_ddim_timesteps


class PLMSSampler(Sampler):
    """See `Sampler`; deterministic (eta must be 0). The timesteps are DDIM's."""

    function = staticmethod(sampling.plms)

    def timesteps(self, steps, discretize):
        return make_ddim_timesteps(discretize, steps, self.ddpm_num_timesteps, verbose=False)
