"""DPM-Solver++(2M) (Lu et al. 2022); interface: Stable Diffusion's ldm/models/diffusion/dpm_solver."""

import numpy as np

from guided_diffusion.errors import UserValueError
from ldm.models.diffusion.sampling import Sampler


class DPMSolverSampler(Sampler):
    """See `Sampler`; deterministic (eta must be 0).

    The timesteps are evenly spaced from the last one to the first, rounded to those of training.
    """

    name = "dpm++"

    def timesteps(self, steps, discretize):
        if discretize != "uniform":
            raise UserValueError(f"DPMSolverSampler spaces its steps uniformly, not {discretize!r}")
        if not 1 <= steps < self.ddpm_num_timesteps:
            raise UserValueError(
                f"{steps} sampling steps: choose between 1 and {self.ddpm_num_timesteps - 1}"
            )
        return np.linspace(0, self.ddpm_num_timesteps - 1, steps + 1).round().astype(np.int64)[1:]
