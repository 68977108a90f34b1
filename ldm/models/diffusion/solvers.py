"""Samplers that latent-diffusion does not have, with its interface: Heun, SDE-DPM-Solver++(2M), DPM-Solver++(3M) and UniPC."""

import numpy as np

from guided_diffusion.errors import UserValueError
from guided_diffusion.mt.solvers import few_timesteps
from ldm.models.diffusion.sampling import Sampler


class _FewSteps(Sampler):
    def timesteps(self, steps, discretize):
        if discretize != "uniform":
            raise UserValueError(f"{type(self).__name__} places its timesteps itself, not {discretize!r}")
        if not 1 <= steps < self.ddpm_num_timesteps:
            raise UserValueError(
                f"{steps} sampling steps: choose between 1 and {self.ddpm_num_timesteps - 1}"
            )
        # One more: the step from timestep 0, to the image, is not taken.
        return np.array(few_timesteps(self.model.diffusion.alphas_cumprod, steps + 1)[1:])


class HeunSampler(_FewSteps):
    """Heun's method (Karras et al. 2022), two passes of the network a step; deterministic (eta must be 0)."""

    name = "heun"


class DPMSolverSDESampler(_FewSteps):
    """SDE-DPM-Solver++(2M) (Lu et al. 2022), stochastic without an eta (it must be 0)."""

    name = "dpm++sde"


class DPMSolver3MSampler(_FewSteps):
    """DPM-Solver++(3M) (Lu et al. 2022); deterministic (eta must be 0)."""

    name = "dpm++3m"


class UniPCSampler(_FewSteps):
    """UniPC-3 (Zhao et al. 2023); deterministic (eta must be 0)."""

    name = "unipc"
