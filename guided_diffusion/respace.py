"""Diffusions that use only some of the timesteps (upstream: guided_diffusion/respace.py)."""

import numpy as np
import torch as th

from .gaussian_diffusion import GaussianDiffusion


def space_timesteps(num_timesteps, section_counts):
    """The set of original timesteps to keep out of `num_timesteps`.

    section_counts: numbers, or a string of comma-separated numbers: the process is cut into that many
    sections of (nearly) equal length, and so many evenly spaced steps are kept of each. "ddimN" keeps N steps
    at one integer stride from 0, as in the DDIM paper. Raises ValueError where that is impossible.
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _ddim_steps(num_timesteps, section_counts.removeprefix("ddim"))
        section_counts = [_whole_number(part, section_counts) for part in section_counts.split(",")]
    quotient, longer = divmod(num_timesteps, len(section_counts))
    kept, start = set(), 0
    for index, count in enumerate(section_counts):
        length = quotient + (index < longer)
        if not 1 <= count <= length:
            raise ValueError(
                f"cannot take {count} steps from a section of {length} steps (of {num_timesteps} in all)"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1
        # Steps are summed up, not multiplied: rounding must fall as in upstream.
        position = 0.0
        for _ in range(count):
            kept.add(start + round(position))
            position += stride
        start += length
    return kept


def _whole_number(text, whole):
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"timestep_respacing {whole!r} is neither 'ddimN' nor numbers separated by commas"
        ) from None


def _ddim_steps(num_timesteps, text):
    wanted = _whole_number(text, f"ddim{text}")
    for stride in range(1, num_timesteps):
        steps = range(0, num_timesteps, stride)
        if len(steps) == wanted:
            return set(steps)
    raise ValueError(f"no integer stride through {num_timesteps} steps makes exactly {wanted}")


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion over the timesteps `use_timesteps` of the process that `kwargs` describe
    (GaussianDiffusion's arguments).

    The marginals at the kept steps are those of the full process; the model is called with the original step
    numbers.
    """

    def __init__(self, use_timesteps, **kwargs):
        kept = set(use_timesteps)
        alphas_cumprod = np.cumprod(1.0 - np.asarray(kwargs["betas"], dtype=np.float64))
        self.original_num_steps = len(alphas_cumprod)
        self.use_timesteps = kept
        self.timestep_map = [step for step in range(self.original_num_steps) if step in kept]
        kept_alphas = alphas_cumprod[self.timestep_map]
        previous = np.concatenate([[1.0], kept_alphas[:-1]])
        kwargs["betas"] = 1.0 - kept_alphas / previous
        if kwargs.get("aggregation") is not None:
            kwargs["aggregation"] = kwargs["aggregation"].respaced(self.timestep_map, 1.0 - kwargs["betas"])
        super().__init__(**kwargs)

    def _wrap_model(self, model):
        if isinstance(model, _WrappedModel):
            return model
        return _WrappedModel(model, self.timestep_map, self.rescale_timesteps, self.original_num_steps)

    # Everything that calls a network or a guide does so through the wrapper.

    def training_losses(self, model, *args, **kwargs):
        return super().training_losses(self._wrap_model(model), *args, **kwargs)

    def p_mean_variance(self, model, *args, **kwargs):
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def condition_score(self, cond_fn, *args, **kwargs):
        return super().condition_score(self._wrap_model(cond_fn), *args, **kwargs)

    def condition_mean(self, cond_fn, *args, **kwargs):
        return super().condition_mean(self._wrap_model(cond_fn), *args, **kwargs)

    def _scale_timesteps(self, t):
        return t  # the wrapper maps and scales


class _WrappedModel:
    """Calls a model with original timesteps in place of respaced ones."""

    def __init__(self, model, timestep_map, rescale_timesteps, original_num_steps):
        self.model, self.timestep_map = model, timestep_map
        self.rescale_timesteps, self.original_num_steps = rescale_timesteps, original_num_steps

    def __call__(self, x, ts, **kwargs):
        original = th.tensor(self.timestep_map, device=ts.device, dtype=ts.dtype)[ts]
        if self.rescale_timesteps:
            original = original.float() * (1000.0 / self.original_num_steps)
        return self.model(x, original, **kwargs)
