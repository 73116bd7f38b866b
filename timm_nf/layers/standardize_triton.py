"""Scaled weight standardisation on accelerators: one kernel forward and one backward, both of them our own.

`standardize.py` has the formula as tensor operations, which a compiler fuses and a file can hold. This file exists for
tensors that nobody compiles: two kernels a convolution, 5 times its weight's bytes (`python -m benchmarks.counts`).

The two kernels are operations of torch's dispatcher, with an implementation for meta tensors, and exist without Triton
as well. A device that has no Triton takes `_Plain` instead. Operations are registered with `Library.impl` and called by
an autograd.Function, which takes the least time on the host of what gives forward mode too (LOG.md has the others).

Shapes: O output channels, I input channels per group, K kernel size, N = I * K * K. Source: arXiv:2101.08692,
section 4.2.

Examples:
    >>> weight, gain = torch.randn(8, 4, 3, 3), torch.ones(8, 1, 1, 1)
    >>> takes_kernel(weight)  # a tensor on the CPU
    False
    >>> standardize(weight, gain).square().sum((1, 2, 3)).sqrt()[:2]  # the norms of the first two units
    tensor([1.0000, 1.0000])
"""

# Triton and torch's autograd functions have no types.
# pyright: standard

import math
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .._triton import has_triton
from ._eager import is_eager
from ._standardize_formula import STD_EPS, as_rows, check_gain, jvp, statistics_dtype, vjp

__all__ = ["standardize", "takes_kernel"]

_NO_PROJECTION = 1e9  # its square is lost in float64


@torch.jit.unused
def takes_kernel(weight: Tensor) -> bool:
    """Whether `standardize` is the way for this weight: eager, and on a device other than the CPU.

    Meta tensors, and fake ones of such a device, go the way of the device that they stand for. What traces, compiles or
    exports sees the formula, and so do subclasses of tensors, which may not hold their elements in one piece.
    """
    return is_eager(weight) and weight.device.type != "cpu"


def standardize(
    weight: Tensor, gain: Tensor, eps: float = STD_EPS, out_dtype: torch.dtype | None = None, scale: float = 1.0
) -> Tensor:
    """Weight with zero mean and norm `gain * scale` over the fan-in of every output channel.

    `w_hat = (w - mean(w)) * gain * scale / sqrt(max(N * var(w), eps))` with the population variance. It is computed in
    at least float32 and rounded once, to `out_dtype`. No value is read on the host. CPU tensors take the kernels where
    TRITON_INTERPRET=1 is set, for tests, and the plain path otherwise.

    Args:
        weight: (O, I, K, K), say (256, 128, 3, 3), or any other shape with the output channels first.
        gain: One element an output channel, say (256, 1, 1, 1).
        eps: Floor on N * var, below which the scale is constant.
        out_dtype: Of the result, say that of the convolution under autocast; the weight's by default. Gradients have
            the dtypes of `weight` and `gain`.
        scale: Constant factor.

    Returns:
        (O, I, K, K), in the memory format of the weight.

    Raises:
        ValueError: if there is not exactly one gain for every output channel, or it is on another device.
        TypeError: if the weight or `out_dtype` are not of floating point numbers.
    """
    check_gain(weight, gain)
    if gain.device != weight.device:
        raise ValueError(f"expected weight and gain on one device, got {weight.device} and {gain.device}")
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise TypeError(f"expected an out_dtype of floating point numbers, got {out_dtype}")
    if not weight.numel():  # no kernel starts without elements, and batch_norm's backward pass divides by their number
        return (weight * gain.view(-1, *[1] * (weight.ndim - 1))).to(out_dtype or weight.dtype)
    if has_triton(weight.device.type):
        function = _Kernel if torch._C._are_functorch_transforms_active() else _EagerKernel
        return function.apply(weight, gain, eps, out_dtype or weight.dtype, scale)
    return _Plain.apply(weight, gain, eps, out_dtype or weight.dtype, scale)[0]


@cache
def _kernels() -> ModuleType:
    from . import _standardize_kernels

    return _standardize_kernels


def _memory_format(weight: Tensor) -> torch.memory_format:
    """One in which every row of `weight` is one piece of memory; that of the weight, if it has such a one."""
    if not weight.is_contiguous():
        if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if weight.ndim == 5 and weight.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


# --- the two operations ---

_LIBRARY = torch.library.Library("timm_nf", "FRAGMENT")
_LIBRARY.define("standardize(Tensor weight, Tensor gain, float eps, ScalarType dtype, float scale) -> Tensor")
_LIBRARY.define(
    "standardize_backward(Tensor grad, Tensor weight, Tensor gain, float eps, float scale) -> (Tensor, Tensor)"
)
_forward = torch.ops.timm_nf.standardize.default
_backward = torch.ops.timm_nf.standardize_backward.default


def _forward_meta(weight: Tensor, gain: Tensor, eps: float, dtype: torch.dtype, scale: float) -> Tensor:
    return torch.empty_like(weight, dtype=dtype)


def _backward_meta(grad: Tensor, weight: Tensor, gain: Tensor, eps: float, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(gain)


def _forward_triton(weight: Tensor, gain: Tensor, eps: float, dtype: torch.dtype, scale: float) -> Tensor:
    out = _forward_meta(weight, gain, eps, dtype, scale)
    kernels = _kernels()
    kernels.launch(kernels.FORWARD, (weight, gain, out), weight, eps, scale, statistics_dtype(weight, gain))
    return out


def _backward_triton(grad: Tensor, weight: Tensor, gain: Tensor, eps: float, scale: float) -> tuple[Tensor, Tensor]:
    grads = _backward_meta(grad, weight, gain, eps, scale)
    kernels = _kernels()
    kernels.launch(kernels.BACKWARD, (grad, weight, gain, *grads), weight, eps, scale, statistics_dtype(weight, gain))
    return grads


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("standardize", _forward_triton, _key)
    _LIBRARY.impl("standardize_backward", _backward_triton, _key)
_LIBRARY.impl("standardize", _forward_meta, "Meta")
_LIBRARY.impl("standardize_backward", _backward_meta, "Meta")


# --- the way of a device with Triton ---


class _Kernel(torch.autograd.Function):
    """Through the two operations; the inputs are all that is saved."""

    @staticmethod
    def forward(weight: Tensor, gain: Tensor, eps: float, dtype: torch.dtype, scale: float) -> Tensor:
        weight = weight.contiguous(memory_format=_memory_format(weight))
        return _forward(weight, gain.contiguous(), eps, dtype, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, gain, ctx.eps, ctx.dtype, ctx.scale = inputs
        ctx.save_for_backward(weight, gain)
        ctx.save_for_forward(weight, gain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (weight, gain) = grads, ctx.saved_tensors
        if torch.is_grad_enabled():
            return *vjp(grad, weight, gain, ctx.eps, ctx.scale), None, None, None
        memory_format = _memory_format(weight)
        grad, weight = (x.contiguous(memory_format=memory_format) for x in (grad, weight))
        return *_backward(grad, weight, gain.contiguous(), ctx.eps, ctx.scale), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        weight, gain = ctx.saved_for_forward
        return jvp(weight, gain, tangents[0], tangents[1], ctx.eps, ctx.scale).to(ctx.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        out = _Kernel.apply(*as_rows(info, in_dims, *args[:2]), *args[2:])
        return out.unflatten(0, (info.batch_size, -1)), 0


class _EagerKernel(_Kernel):
    """The same outside of torch.func: torch takes twice as long to call a function that has a `setup_context`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        out = _Kernel.forward(*args)
        _Kernel.setup_context(ctx, args, out)
        return out

    setup_context = torch.autograd.Function.setup_context


# --- devices without Triton ---


def _rows(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """(O, N) view of a tensor of this memory format."""
    x = x if memory_format is torch.contiguous_format else x.movedim(1, -1)
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _unrows(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_rows`, in the strides of `like`, which has one of these memory formats."""
    return rows.as_strided(like.shape, like.stride())


def _constants(weight: Tensor, eps: float, dtype: torch.dtype, scale: float) -> tuple[float, float]:
    """Floor on the standard deviation, and scale over sqrt(N); the floor as `dtype` has it, which equals itself."""
    fan_in = max(1, math.prod(weight.shape[1:]))
    floor = (eps / fan_in) ** 0.5
    return floor if dtype is torch.float64 else float(np.float32(floor)), scale * fan_in**-0.5


class _Plain(torch.autograd.Function):
    """In tensor operations, as few as there are: 16 of them, 11 times the weight's bytes forward and backward."""

    @staticmethod
    def forward(weight: Tensor, gain: Tensor, eps: float, dtype: torch.dtype, scale: float) -> tuple[Tensor, ...]:
        memory_format, stats_dtype = _memory_format(weight), statistics_dtype(weight, gain)
        floor, constant = _constants(weight, eps, stats_dtype, scale)
        weight = weight.contiguous(memory_format=memory_format)
        rows = _rows(weight, memory_format)
        mean = rows.mean(1, keepdim=True, dtype=stats_dtype)
        rows = rows - mean
        # Two centrings: the first mean is rounded at the scale of the mean, the second at the scale of the spread.
        std, rest = torch.std_mean(rows, 1, correction=0, keepdim=True)
        std = std.clamp(min=floor)
        factor = gain.view(-1, 1) / std
        # Into memory of its own: a view of `rows` could not be changed in place by whoever gets it.
        out = torch.empty_like(weight, dtype=stats_dtype)
        torch.addcmul(rest * factor * -constant, rows, factor, value=constant, out=_rows(out, memory_format))
        return out.to(dtype), mean, rest, std

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        weight, gain, ctx.eps, ctx.dtype, ctx.scale = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # or the statistics' would be zeros, three kernels to make them
        ctx.save_for_backward(weight, gain, *output[1:])
        ctx.save_for_forward(weight, gain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, (weight, gain, mean, rest, std) = grads[0], ctx.saved_tensors
        if grad is None:
            return (None,) * 5
        if torch.is_grad_enabled():
            return *vjp(grad, weight, gain, ctx.eps, ctx.scale), None, None, None
        memory_format = _memory_format(weight)
        floor, constant = _constants(weight, ctx.eps, mean.dtype, ctx.scale)
        grad, weight = (x.contiguous(memory_format=memory_format) for x in (grad, weight))
        rows = _rows(weight, memory_format) - mean
        grad = _rows(grad, memory_format).to(mean.dtype)
        # The backward pass of batch_norm is this one, for rows above the floor. Under it the norm is a constant and
        # nothing is projected out: a row that is said to be spread 1e9 times wider has no projection left.
        spread = F.threshold(std, floor, _NO_PROJECTION * floor)
        factor = spread / std * constant
        grad_rows, grad_gain, _ = torch.ops.aten.native_batch_norm_backward(
            grad[None], rows[None], (gain.view(-1, 1) * factor).view(-1), None, None,
            rest.view(-1), spread.reciprocal().view(-1), True, 0.0, [True, True, False],
        )  # fmt: skip
        grad_weight = _unrows(grad_rows[0], weight).to(weight.dtype)
        return grad_weight, (grad_gain * factor.view(-1)).view_as(gain).to(gain.dtype), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        weight, gain = ctx.saved_for_forward
        return jvp(weight, gain, tangents[0], tangents[1], ctx.eps, ctx.scale).to(ctx.dtype), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        outputs = _Plain.apply(*as_rows(info, in_dims, *args[:2]), *args[2:])
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0,) * len(outputs)
