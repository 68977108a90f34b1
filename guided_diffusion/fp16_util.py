"""Training in float16 with float32 master weights (interface: openai/guided-diffusion, fp16_util.py).

The master weights are two flat tensors, one of all biases and norms and one of all matrices, so that an
optimizer step is two kernels. The loss is scaled by 2**lg_loss_scale, which grows slowly and falls by one at
every overflow.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch as th
from torch import nn

from . import logger
from .errors import UserError

INITIAL_LOG_LOSS_SCALE = 20.0
# Gradients that overflow at a scale of 1e-4 are not finite whatever the scale.
MIN_LOG_LOSS_SCALE = -13.0

NamedTensors = list[tuple[str, th.Tensor]]
ParamGroups = list[
    tuple[NamedTensors, int | tuple[int, ...]]
]  # (its tensors, shape of their flat master tensor)


def convert_module_to_f16(l: nn.Module) -> None:  # noqa: E741 (upstream's name)
    """Cast the weight and bias of a convolution to float16; leave other modules alone. For `Module.apply`."""
    _cast_convolution(l, th.float16)


def convert_module_to_f32(l: nn.Module) -> None:  # noqa: E741
    """Undo `convert_module_to_f16`."""
    _cast_convolution(l, th.float32)


def get_param_groups_and_shapes(named_model_params: Iterable[tuple[str, th.Tensor]]) -> ParamGroups:
    """Split parameters into vectors, whose master is flat [n], and matrices, whose master is [1, n].

    The shapes differ so that an optimizer can tell the two apart, for weight decay say.
    """
    named = list(named_model_params)
    vectors = [(name, param) for name, param in named if param.ndim <= 1]
    matrices = [(name, param) for name, param in named if param.ndim > 1]
    return [(vectors, -1), (matrices, (1, -1))]


def make_master_params(param_groups_and_shapes: ParamGroups) -> list[nn.Parameter]:
    """One float32 parameter per group that holds all of the group's values."""
    return [
        nn.Parameter(_flatten([param.detach() for _, param in group]).view(shape))
        for group, shape in param_groups_and_shapes
    ]


def model_grads_to_master_grads(
    param_groups_and_shapes: ParamGroups, master_params: Sequence[th.Tensor]
) -> None:
    """Gather the gradients of the model's parameters into those of the master parameters."""
    for master, (group, shape) in zip(master_params, param_groups_and_shapes, strict=True):
        master.grad = _flatten([param_grad_or_zeros(param) for _, param in group]).view(shape)


def master_params_to_model_params(
    param_groups_and_shapes: ParamGroups, master_params: Sequence[th.Tensor]
) -> None:
    """Round the master parameters back into the model's."""
    with th.no_grad():
        for master, (group, _) in zip(master_params, param_groups_and_shapes, strict=True):
            for (_, param), value in zip(group, unflatten_master_params(group, master), strict=True):
                param.copy_(value)


def unflatten_master_params(param_group: NamedTensors, master_param: th.Tensor) -> tuple[th.Tensor, ...]:
    """Views of a master parameter, one in the shape of every tensor of its group."""
    pieces = master_param.view(-1).split([param.numel() for _, param in param_group])
    return tuple(piece.view(param.shape) for piece, (_, param) in zip(pieces, param_group, strict=True))


def master_params_to_state_dict(
    model: nn.Module,
    param_groups_and_shapes: ParamGroups | None,
    master_params: Sequence[th.Tensor],
    use_fp16: bool,
) -> dict[str, th.Tensor]:
    """The model's state dict with the master parameters' values, in float32, in place of its parameters."""
    state_dict = model.state_dict()
    if not use_fp16:
        names = [name for name, _ in model.named_parameters()]
        state_dict.update(zip(names, master_params, strict=True))
        return state_dict
    for master, (group, _) in zip(master_params, param_groups_and_shapes, strict=True):
        for (name, _), value in zip(group, unflatten_master_params(group, master.detach()), strict=True):
            if name not in state_dict:
                raise KeyError(f"the model has no parameter {name!r}")
            state_dict[name] = value
    return state_dict


def state_dict_to_master_params(
    model: nn.Module, state_dict: Mapping[str, th.Tensor], use_fp16: bool
) -> list[th.Tensor]:
    """The inverse of `master_params_to_state_dict`."""
    named = [(name, state_dict[name]) for name, _ in model.named_parameters()]
    if use_fp16:
        return list(make_master_params(get_param_groups_and_shapes(named)))
    return [value for _, value in named]


def zero_master_grads(master_params: Iterable[th.Tensor]) -> None:
    """Drop the gradients of the master parameters."""
    for param in master_params:
        param.grad = None


def zero_grad(model_params: Iterable[th.Tensor]) -> None:
    """Fill the gradients with zeros in place: they are views of DistributedDataParallel's buckets."""
    grads = [param.grad for param in model_params if param.grad is not None]
    if grads:
        with th.no_grad():
            th._foreach_zero_(grads)


def param_grad_or_zeros(param: th.Tensor) -> th.Tensor:
    """The gradient of a parameter, zeros where it took no part in the loss."""
    return th.zeros_like(param) if param.grad is None else param.grad.detach()


def check_overflow(value: float) -> bool:
    """Whether a value is infinite or not a number."""
    return not math.isfinite(value)


class MixedPrecisionTrainer:
    """Backward pass and optimizer step, in float16 with loss scaling or in the model's own precision.

    The optimizer is to be made on `master_params`. Each step logs the means of grad_norm and param_norm, and
    of lg_loss_scale where float16 is used.
    """

    def __init__(
        self,
        *,
        model: nn.Module,  # with convert_to_fp16() where use_fp16
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,  # added to lg_loss_scale after every good step
        initial_lg_loss_scale: float = INITIAL_LOG_LOSS_SCALE,
        skip_nonfinite: bool = False,  # without float16 too, skip a step whose gradient is not finite
    ):
        self.model = model
        self.use_fp16 = use_fp16
        self.fp16_scale_growth = fp16_scale_growth
        self.lg_loss_scale = initial_lg_loss_scale
        self.skip_nonfinite = skip_nonfinite

        self.model_params = list(model.parameters())
        self.master_params = self.model_params
        self.param_groups_and_shapes = None
        if use_fp16:
            self.param_groups_and_shapes = get_param_groups_and_shapes(model.named_parameters())
            self.master_params = make_master_params(self.param_groups_and_shapes)  # before they are rounded
            model.convert_to_fp16()

    def zero_grad(self) -> None:
        """Fill the model's gradients with zeros."""
        zero_grad(self.model_params)

    def backward(self, loss: th.Tensor) -> None:
        """Add the gradient of the scalar `loss`, scaled where float16 is used, to the model's."""
        (loss * 2**self.lg_loss_scale if self.use_fp16 else loss).backward()

    def optimize(self, opt: th.optim.Optimizer) -> bool:
        """Take one step. False where the gradient was not finite and nothing was changed.

        Without float16 that needs `skip_nonfinite`; otherwise the step is taken as upstream takes it. UserError where
        the loss scale has fallen to its floor and gradients still are not finite.
        """
        return self._optimize_fp16(opt) if self.use_fp16 else self._optimize_normal(opt)

    def master_params_to_state_dict(self, master_params: Sequence[th.Tensor]) -> dict[str, th.Tensor]:
        """The state dict of the model with these master parameters (its own, or an average of them)."""
        return master_params_to_state_dict(
            self.model, self.param_groups_and_shapes, master_params, self.use_fp16
        )

    def state_dict_to_master_params(self, state_dict: Mapping[str, th.Tensor]) -> list[th.Tensor]:
        """The inverse of `master_params_to_state_dict`."""
        return state_dict_to_master_params(self.model, state_dict, self.use_fp16)

    def _optimize_fp16(self, opt: th.optim.Optimizer) -> bool:
        logger.logkv_mean("lg_loss_scale", self.lg_loss_scale)
        model_grads_to_master_grads(self.param_groups_and_shapes, self.master_params)
        scale = 2**self.lg_loss_scale
        grad_norm, param_norm = self._compute_norms(grad_scale=scale)
        if check_overflow(grad_norm):
            if self.lg_loss_scale <= MIN_LOG_LOSS_SCALE:
                raise UserError(
                    f"the gradient is not finite in float16 even at a loss scale of 2**{self.lg_loss_scale:g}: look at the "
                    "data, lower lr, or use another precision"
                )
            self.lg_loss_scale -= 1
            logger.log(f"Found NaN, decreased lg_loss_scale to {self.lg_loss_scale}")
            zero_master_grads(self.master_params)
            return False

        self._log_norms(grad_norm, param_norm)
        th._foreach_mul_([param.grad for param in self.master_params], 1 / scale)
        opt.step()
        zero_master_grads(self.master_params)
        master_params_to_model_params(self.param_groups_and_shapes, self.master_params)
        self.lg_loss_scale += self.fp16_scale_growth
        return True

    def _optimize_normal(self, opt: th.optim.Optimizer) -> bool:
        grad_norm, param_norm = self._compute_norms()
        if self.skip_nonfinite and check_overflow(grad_norm):
            logger.log(f"Skipped a step: the norm of the gradient is {grad_norm}")
            return False
        self._log_norms(grad_norm, param_norm)
        opt.step()
        return True

    def _compute_norms(self, grad_scale: float = 1.0) -> tuple[float, float]:
        """The L2 norms of all gradients, unscaled, and of all parameters; the device is waited for once."""
        params = [param.detach().float() for param in self.master_params]
        grads = [param.grad.detach().float() for param in self.master_params if param.grad is not None]
        # The zero stands for the gradients where there are none.
        norms = [
            th.stack(th._foreach_norm(group)).norm() for group in (grads or [params[0].new_zeros(1)], params)
        ]
        grad_norm, param_norm = th.stack(norms).tolist()
        return grad_norm / grad_scale, param_norm

    @staticmethod
    def _log_norms(grad_norm: float, param_norm: float) -> None:
        logger.logkv_mean("grad_norm", grad_norm)
        logger.logkv_mean("param_norm", param_norm)


def _cast_convolution(module: nn.Module, dtype: th.dtype) -> None:
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        for param in (module.weight, module.bias):
            if param is not None:
                param.data = param.data.to(dtype)


def _flatten(tensors: Sequence[th.Tensor]) -> th.Tensor:
    return th.cat([tensor.float().reshape(-1) for tensor in tensors])
