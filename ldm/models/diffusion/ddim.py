"""DDIM (Song et al. 2020); interface: latent-diffusion, ldm/models/diffusion/ddim.py."""

import torch

from guided_diffusion.seeding import PerSample
from ldm.models.diffusion.sampling import Noise, Sampler


class DDIMSampler(Sampler):
    """See `Sampler`; eta is its noise."""

    name = "ddim"
    stochastic = True

    @torch.no_grad()
    def stochastic_encode(self, x0, t, use_original_steps=False, noise=None):
        """Latents x0 noised to step t int64 [B] of `make_schedule` (of the whole process with
        use_original_steps)."""
        if use_original_steps:
            return self.model.q_sample(x0, t, noise)
        return self.diffusion.q_sample(x0, t + self._offset, noise)

    @torch.no_grad()
    def decode(
        self,
        x_latent,
        cond,
        t_start,
        unconditional_guidance_scale=1.0,
        unconditional_conditioning=None,
        random: PerSample | None = None,
        verbose=True,
    ):
        """Sample from latents at the first t_start steps of `make_schedule`, noised by
        `stochastic_encode(..., t_start - 1)`."""
        cond, free = self._conditioning(cond, unconditional_conditioning, len(x_latent))
        network, start = self.model.network(free, unconditional_guidance_scale), t_start - 1 + self._offset
        return self._run(network, x_latent, start, Noise(random), cond, progress=verbose)[0]

    @property
    def _offset(self):
        """Index, in the process, of the first step: 1 where timestep 0 was added below it."""
        return int(self.ddim_timesteps[0] != 0)
