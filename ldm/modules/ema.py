"""Moving average of a network's weights (interface and state-dict keys: latent-diffusion,
ldm/modules/ema.py)."""

import contextlib

import torch
from torch import nn

from guided_diffusion.nn import update_ema
from ldm.sharding import like_shards, local


class LitEma(nn.Module):
    """A copy of the trainable parameters of `model` that follows them slowly; call it after every update.

    decay in [0, 1]; use_num_upates (upstream's name): begin with a smaller decay, (1 + n) / (10 + n) after n
    updates. A parameter's copy is the buffer of its name without dots, as checkpoints have it.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_upates: bool = True):
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        # -1: updates are not counted.
        self.register_buffer("num_updates", torch.tensor(0 if use_num_upates else -1, dtype=torch.int))
        self.m_name2s_name = {
            name: name.replace(".", "") for name, p in model.named_parameters() if p.requires_grad
        }
        own = dict(model.named_parameters())
        for name, shadow in self.m_name2s_name.items():
            self.register_buffer(shadow, own[name].detach().clone())
        self.collected_params: list[torch.Tensor] = []

    def _pairs(self, model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(the copies, the parameters of `model`), in the same order; of those in shards this rank's shares."""
        own, shadows = dict(model.named_parameters()), dict(self.named_buffers())
        names = self.m_name2s_name.items()
        return local(shadows[shadow] for _, shadow in names), local(own[name] for name, _ in names)

    def shard(self, model: nn.Module) -> None:
        """Put the copies in shards, as the parameters of `model` are."""
        own = dict(model.named_parameters())
        for name, shadow in self.m_name2s_name.items():
            setattr(self, shadow, like_shards(getattr(self, shadow), own[name]))

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """copy = decay * copy + (1 - decay) * parameter."""
        shadows, parameters = self._pairs(model)
        counts = self.num_updates >= 0  # stays on the device, as all of this: no step waits for a number
        self.num_updates += counts
        n = self.num_updates
        decay = torch.where(counts, torch.minimum(self.decay, (1 + n) / (10 + n)), self.decay)
        update_ema(shadows, parameters, rate=decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the parameters of `model` by their averages."""
        shadows, parameters = self._pairs(model)
        torch._foreach_copy_(parameters, shadows)

    def store(self, parameters) -> None:
        """Keep `parameters`, for `restore`."""
        self.collected_params = [parameter.clone() for parameter in local(parameters)]

    @torch.no_grad()
    def restore(self, parameters) -> None:
        """Give `parameters` the values that `store` kept."""
        torch._foreach_copy_(local(parameters), self.collected_params)
        self.collected_params = []

    @contextlib.contextmanager
    def in_place_of(self, model: nn.Module):
        """Inside, the parameters of `model` are their averages. May be nested."""
        own = [parameter.clone() for parameter in local(model.parameters())]
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(local(model.parameters()), own)
