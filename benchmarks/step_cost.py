"""What a training step keeps and computes, counted on torch's meta device, where tensors have shapes and no
memory."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

FULL, HALF = torch.float32, torch.bfloat16
BYTES = {FULL: 4, HALF: 2}
# What autocast computes in its own type, and in float32, of the functions that these networks call.
_LOWERED, _KEPT = ("linear", "conv1d", "conv2d"), ("layer_norm", "group_norm")


@contextlib.contextmanager
def as_on_cuda(dtype: torch.dtype) -> Iterator[None]:
    """Inside, torch.nn.functional uses the types and kernels of CUDA on the meta device.

    Attention is fused. With bfloat16, products are computed in it and normalisations in float32, as by
    torch.autocast, which does not know the meta device; a weight is cast once, as by autocast's cache.
    """
    copies: dict[nn.Parameter, torch.Tensor] = {}

    def cast(value, to):
        if not isinstance(value, torch.Tensor) or value.dtype not in BYTES or value.dtype == to:
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(to)
        if value not in copies:
            copies[value] = value.to(to)
        return copies[value]

    def in_type(function, to):
        def run(*args, **kwargs):
            args = (cast(value, to) for value in args)
            return function(*args, **{name: cast(value, to) for name, value in kwargs.items()})

        return run

    changed = {"scaled_dot_product_attention": in_type(_fused_attention, dtype)}
    if dtype == HALF:
        changed |= {name: in_type(getattr(F, name), HALF) for name in _LOWERED}
        changed |= {name: in_type(getattr(F, name), FULL) for name in _KEPT}
    # Replaced, not intercepted by a mode of torch: that would be off while checkpoints are recomputed.
    with mock.patch.multiple(F, **changed):
        yield


def _fused_attention(q, k, v, attn_mask=None, **options):
    """CUDA's kernels, which keep no matrix of weights. A mask changes neither FLOPs nor what is kept."""
    if q.dtype == HALF:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]


class Saved:
    """Bytes that autograd keeps for the backward pass of `module`: each storage once, and none of its own.

    blocks: modules in it, not in each other, whose shares are counted too.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[nn.Module] = ()):
        self._own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
        self._storages = {}
        self.blocks = [0] * len(blocks)
        self._inside = None
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, i=i: self._enter(i))
            block.register_forward_hook(lambda *_: self._enter(None))

    @property
    def total(self) -> int:
        """Of everything."""
        return sum(storage.nbytes() for storage in self._storages.values())

    def counting(self) -> torch.autograd.graph.saved_tensors_hooks:
        """The context in which the forward pass is to run."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _enter(self, block):
        self._inside = block

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own and storage._cdata not in self._storages:
            self._storages[storage._cdata] = storage  # held, so that no other gets its address
            if self._inside is not None:
                self.blocks[self._inside] += storage.nbytes()
        return tensor


@dataclass(frozen=True)
class Work:
    """FLOPs, by what computes them; a multiplication and an addition are two."""

    convolution: float = 0
    matrix: float = 0

    @classmethod
    def of(cls, run: Callable[[], object]) -> "Work":
        """What `run` does."""
        with FlopCounterMode(display=False) as counter:
            run()
        by_kernel = counter.get_flop_counts()["Global"]
        convolution = sum(flops for kernel, flops in by_kernel.items() if "convolution" in str(kernel))
        return cls(convolution, counter.get_total_flops() - convolution)

    @property
    def total(self) -> float:
        """Both."""
        return self.convolution + self.matrix

    def __add__(self, other: "Work") -> "Work":
        return Work(self.convolution + other.convolution, self.matrix + other.matrix)

    def __mul__(self, times: float) -> "Work":
        return Work(self.convolution * times, self.matrix * times)


@dataclass(frozen=True)
class Kept:
    """Bytes for each sample, and whatever their number: weights in another type."""

    per_sample: int
    fixed: int

    @classmethod
    def between(cls, one: int, two: int) -> "Kept":
        """From the bytes for one sample and for two."""
        return cls(two - one, 2 * one - two)

    def of(self, samples: int) -> int:
        """Bytes for so many samples."""
        return samples * self.per_sample + self.fixed


@dataclass(frozen=True)
class Step:
    """A forward and backward pass: what is kept in between, in all and in every block, and the FLOPs for one
    sample."""

    kept: Kept
    blocks: list[Kept]
    forward: Work
    backward: Work

    def largest_block(self, samples: int) -> int:
        """Bytes of the block that keeps most for so many samples."""
        return max((block.of(samples) for block in self.blocks), default=0)


def count_step(
    make: Callable[[], nn.Module],
    inputs: Callable[[int], Sequence[torch.Tensor]],
    dtype: torch.dtype,
    kinds: tuple[type, ...] = (),
) -> Step:
    """Count a step of make() on inputs(number of samples), for one and for two. kinds: of its blocks."""
    (one, forward, backward), (two, _, _) = (_run(make(), inputs(n), dtype, kinds) for n in (1, 2))
    blocks = [Kept.between(*pair) for pair in zip(one.blocks, two.blocks, strict=True)]
    return Step(Kept.between(one.total, two.total), blocks, forward, backward)


def _run(module, inputs, dtype, kinds):
    """(what was saved, forward, backward)."""
    saved = Saved(module, [part for part in module.modules() if isinstance(part, kinds)])
    outputs = []

    def forward():
        with saved.counting():
            outputs.extend(_tensors(module(*inputs)))

    def backward():
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

    with as_on_cuda(dtype):
        return saved, Work.of(forward), Work.of(backward)


def _tensors(result):
    """Of a network: its output, or (output, others by name)."""
    if isinstance(result, torch.Tensor):
        return [result]
    output, others = result
    assert isinstance(others, Mapping)
    return [output, *others.values()]


@torch.no_grad()
def inference(module: Callable, *inputs: torch.Tensor) -> Work:
    """The FLOPs of module(*inputs) alone."""
    with as_on_cuda(FULL):
        return Work.of(lambda: module(*inputs))
