"""Scaled weight standardisation on accelerators: one Triton kernel forward and one backward.

`standardize.py` has the formula as tensor operations, which compilers fuse and exporters write. This file is for
eager tensors. A convolution takes two kernels, which move 5 times the bytes of its weight (`python -m
benchmarks.counts`).

The kernels are operations of torch's dispatcher, with an implementation for meta tensors. The operations exist without
Triton, too, but a device without Triton uses `_Plain`. They are registered with `Library.impl` and called by an
autograd.Function. Of the ways with forward mode, this one takes the least time on the host (LOG.md has the others).

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

_NO_PROJECTION = 1e9  # 1 / 1e18, the projection's share, is below the resolution of float64


@torch.jit.unused
def takes_kernel(weight: Tensor) -> bool:
    """Whether `standardize` computes this weight: an eager tensor on another device than the CPU.

    A meta tensor, or a fake tensor of an accelerator, stands for a tensor on an accelerator, so it counts. Tracing,
    compiling and exporting take the plain formula. So do subclasses of Tensor, which may lie in several pieces.
    """
    return is_eager(weight) and weight.device.type != "cpu"


def standardize(
    weight: Tensor, gain: Tensor, eps: float = STD_EPS, out_dtype: torch.dtype | None = None, scale: float = 1.0
) -> Tensor:
    """Weight with zero mean and norm `gain * scale` over the fan-in of every output channel.

    `w_hat = (w - mean(w)) * gain * scale / sqrt(max(N * var(w), eps))` with the population variance. It is computed in
    at least float32 and rounded once, to `out_dtype`. No value is read on the host. For CPU tensors it computes plain
    operations, or, for tests, interprets the kernels if TRITON_INTERPRET=1 is set.

    Args:
        weight: (O, I, K, K), for example (256, 128, 3, 3), or any other shape with the output channels first.
        gain: One element for each output channel, for example (256, 1, 1, 1).
        eps: Smallest value of N * var. Below it the divisor is constant.
        out_dtype: Dtype of the result, by default that of the weight. Under autocast it is the dtype in which the
            convolution computes. Gradients have the dtypes of `weight` and `gain`.
        scale: Constant factor on the result.

    Returns:
        The standardised weight (O, I, K, K), in the memory format of `weight`.

    Raises:
        ValueError: if there is not exactly one gain for every output channel, or it is on another device.
        TypeError: if the weight or `out_dtype` are not of floating point numbers.
    """
    check_gain(weight, gain)
    if gain.device != weight.device:
        raise ValueError(f"expected weight and gain on one device, got {weight.device} and {gain.device}")
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise TypeError(f"expected an out_dtype of floating point numbers, got {out_dtype}")
    if not weight.numel():  # a kernel cannot start without elements, and batch_norm divides by their number
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
    """The weight's memory format, if every row is one piece of memory in it. Otherwise the contiguous format."""
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


# --- devices with Triton ---


class _Kernel(torch.autograd.Function):
    """The formula by the two operations. It saves nothing but its inputs."""

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
    """The same for calls outside torch.func. torch takes twice as long to call a Function with a `setup_context`."""

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
    """The inverse of `_rows`, with the strides of `like`, which has the memory format of `_rows`."""
    return rows.as_strided(like.shape, like.stride())


def _constants(weight: Tensor, eps: float, dtype: torch.dtype, scale: float) -> tuple[float, float]:
    """The smallest standard deviation, rounded to `dtype` so that comparisons are exact, and scale / sqrt(N)."""
    fan_in = max(1, math.prod(weight.shape[1:]))
    floor = (eps / fan_in) ** 0.5
    return floor if dtype is torch.float64 else float(np.float32(floor)), scale * fan_in**-0.5


class _Plain(torch.autograd.Function):
    """The formula in as few tensor operations as possible: 16, which move 11 times the weight's bytes in all."""

    @staticmethod
    def forward(weight: Tensor, gain: Tensor, eps: float, dtype: torch.dtype, scale: float) -> tuple[Tensor, ...]:
        memory_format, stats_dtype = _memory_format(weight), statistics_dtype(weight, gain)
        floor, constant = _constants(weight, eps, stats_dtype, scale)
        weight = weight.contiguous(memory_format=memory_format)
        rows = _rows(weight, memory_format)
        mean = rows.mean(1, keepdim=True, dtype=stats_dtype)
        rows = rows - mean
        # The mean is subtracted twice, see `formula`.
        std, rest = torch.std_mean(rows, 1, correction=0, keepdim=True)
        std = std.clamp(min=floor)
        factor = gain.view(-1, 1) / std
        # The result has memory of its own. If it were a view of `rows`, callers could not change it in place.
        out = torch.empty_like(weight, dtype=stats_dtype)
        torch.addcmul(rest * factor * -constant, rows, factor, value=constant, out=_rows(out, memory_format))
        return out.to(dtype), mean, rest, std

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        weight, gain, ctx.eps, ctx.dtype, ctx.scale = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # otherwise three kernels fill zeros for the statistics
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
        # For rows above the floor, batch_norm has the same backward pass. Below the floor the norm is a constant and
        # nothing may be projected out. batch_norm then gets a 1e9 times larger spread, which makes the projection 0.
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
