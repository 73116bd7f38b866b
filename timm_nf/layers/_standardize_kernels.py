"""Triton kernels of weight standardisation, forward and backward, and how they are launched.

This module is only imported if the device has Triton, see `standardize_triton`. A row holds the weights of one output
channel, in one piece of memory, in any order. A row of up to `MAX_COLUMNS` elements stays in registers, so a weight is
read once and written once. Longer rows are read three times.

Shapes: O output channels (rows), N fan-in.
"""

# Triton's language has no types.
# pyright: standard

# pyright: reportInvalidTypeForm=false
# Kernels annotate floats with Triton's float64, which is not a Python type. Without it Triton passes them as float32.

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_COLUMNS = 8192  # longest row that stays in registers: 16 elements for each thread and operand
_TILE = 1024  # number of elements of a program that takes several short rows
_CHUNK = 4096  # number of elements of a long row that a program reads at a time


@triton.jit
def _mean(x, fan_in):
    return tl.sum(x, 1, keep_dims=True) / fan_in


@triton.jit
def _inverse_norm(norm2, eps):
    return 1 / tl.sqrt(tl.maximum(norm2, eps))


@triton.jit
def _number(x, DTYPE: tl.constexpr):
    # Not `x.to(DTYPE)`: the interpreter passes Python floats, which have no method `to`.
    return tl.full((1, 1), x, tl.float64).to(DTYPE)


@triton.jit
def _centred(x, mask, fan_in):
    # The mean is subtracted twice, see `formula` in _standardize_formula.py.
    x = tl.where(mask, x - _mean(x, fan_in), 0.0)
    return tl.where(mask, x - _mean(x, fan_in), 0.0)


@triton.jit
def _place(rows, fan_in, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # 64 bits: a weight may have 2^31 elements
    column = tl.arange(0, COLUMNS)[None, :]
    return row, row * fan_in + column, (row < rows) & (column < fan_in)


@triton.jit
def forward(
    weight, gain, out, rows, fan_in, eps: tl.float64, scale: tl.float64,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Weight (O, N) and gain (O,) -> out (O, N). It computes in DTYPE. A program takes ROWS rows."""
    row, at, mask = _place(rows, fan_in, ROWS, COLUMNS)
    x = _centred(tl.load(weight + at, mask=mask, other=0.0).to(DTYPE), mask, fan_in)
    factor = tl.load(gain + row, mask=row < rows, other=0.0).to(DTYPE) * _number(scale, DTYPE)
    factor *= _inverse_norm(tl.sum(x * x, 1, keep_dims=True), _number(eps, DTYPE))
    tl.store(out + at, x * factor, mask=mask)


@triton.jit
def backward(
    grad, weight, gain, grad_weight, grad_gain, rows, fan_in, eps: tl.float64, scale: tl.float64,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grad (O, N), weight (O, N) and gain (O,) -> grad_weight (O, N) and grad_gain (O,)."""
    row, at, mask = _place(rows, fan_in, ROWS, COLUMNS)
    x = _centred(tl.load(weight + at, mask=mask, other=0.0).to(DTYPE), mask, fan_in)
    y = _centred(tl.load(grad + at, mask=mask, other=0.0).to(DTYPE), mask, fan_in)
    floor = _number(eps, DTYPE)
    norm2 = tl.sum(x * x, 1, keep_dims=True)
    inverse = _inverse_norm(norm2, floor)
    x *= inverse
    along = tl.sum(x * y, 1, keep_dims=True)
    tl.store(grad_gain + row, along * _number(scale, DTYPE), mask=row < rows)
    y -= tl.where(norm2 >= floor, along, 0.0) * x  # a norm below the floor is a constant
    factor = tl.load(gain + row, mask=row < rows, other=0.0).to(DTYPE) * _number(scale, DTYPE) * inverse
    tl.store(grad_weight + at, y * factor, mask=mask)


@triton.jit
def _load_less(row, at, fan_in, mean, DTYPE: tl.constexpr):
    return tl.where(at < fan_in, tl.load(row + at, mask=at < fan_in, other=0.0).to(DTYPE) - mean, 0.0)


@triton.jit
def _mean_of_row(row, fan_in, DTYPE: tl.constexpr, CHUNK: tl.constexpr):
    total = tl.zeros((1, CHUNK), DTYPE)
    for start in range(0, fan_in, CHUNK):
        total += _load_less(row, start + tl.arange(0, CHUNK)[None, :], fan_in, 0.0, DTYPE)
    return _mean(total, fan_in)


@triton.jit
def forward_long(
    weight, gain, out, fan_in, eps: tl.float64, scale: tl.float64, DTYPE: tl.constexpr, CHUNK: tl.constexpr
):
    """`forward` for long rows. A program takes one row."""
    row = tl.program_id(0).to(tl.int64)
    weight += row * fan_in
    out += row * fan_in
    mean = _mean_of_row(weight, fan_in, DTYPE, CHUNK)
    total = tl.zeros((1, CHUNK), DTYPE)
    squares = tl.zeros((1, CHUNK), DTYPE)
    for start in range(0, fan_in, CHUNK):
        x = _load_less(weight, start + tl.arange(0, CHUNK)[None, :], fan_in, mean, DTYPE)
        total += x
        squares += x * x
    rest = _mean(total, fan_in)  # the rounding error of the first mean
    norm2 = tl.sum(squares, 1, keep_dims=True) - rest * rest * fan_in
    factor = tl.load(gain + row).to(DTYPE) * _number(scale, DTYPE) * _inverse_norm(norm2, _number(eps, DTYPE))
    for start in range(0, fan_in, CHUNK):
        at = start + tl.arange(0, CHUNK)[None, :]
        x = _load_less(weight, at, fan_in, mean, DTYPE) - rest
        tl.store(out + at, x * factor, mask=at < fan_in)


@triton.jit
def backward_long(
    grad, weight, gain, grad_weight, grad_gain, fan_in, eps: tl.float64, scale: tl.float64,
    DTYPE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`backward` for long rows. A program takes one row."""
    row = tl.program_id(0).to(tl.int64)
    weight += row * fan_in
    grad += row * fan_in
    grad_weight += row * fan_in
    mean_x = _mean_of_row(weight, fan_in, DTYPE, CHUNK)
    mean_y = _mean_of_row(grad, fan_in, DTYPE, CHUNK)
    total_x = tl.zeros((1, CHUNK), DTYPE)
    total_y = tl.zeros((1, CHUNK), DTYPE)
    squares = tl.zeros((1, CHUNK), DTYPE)
    products = tl.zeros((1, CHUNK), DTYPE)
    for start in range(0, fan_in, CHUNK):
        at = start + tl.arange(0, CHUNK)[None, :]
        x = _load_less(weight, at, fan_in, mean_x, DTYPE)
        y = _load_less(grad, at, fan_in, mean_y, DTYPE)
        total_x += x
        total_y += y
        squares += x * x
        products += x * y
    rest_x = _mean(total_x, fan_in)
    rest_y = _mean(total_y, fan_in)
    floor = _number(eps, DTYPE)
    norm2 = tl.sum(squares, 1, keep_dims=True) - rest_x * rest_x * fan_in
    inverse = _inverse_norm(norm2, floor)
    along = (tl.sum(products, 1, keep_dims=True) - rest_x * rest_y * fan_in) * inverse
    tl.store(grad_gain + row + tl.zeros((1, 1), tl.int32), along * _number(scale, DTYPE))
    factor = tl.load(gain + row).to(DTYPE) * _number(scale, DTYPE) * inverse
    projected = tl.where(norm2 >= floor, along, 0.0) * inverse
    for start in range(0, fan_in, CHUNK):
        at = start + tl.arange(0, CHUNK)[None, :]
        x = _load_less(weight, at, fan_in, mean_x, DTYPE) - rest_x
        y = _load_less(grad, at, fan_in, mean_y, DTYPE) - rest_y
        tl.store(grad_weight + at, (y - x * projected) * factor, mask=at < fan_in)


FORWARD = forward, forward_long  # for rows that stay in registers, and for longer rows
BACKWARD = backward, backward_long


@cache
def tiling(fan_in: int) -> tuple[dict[str, int], int]:
    """The sizes with which Triton compiles the kernel for rows of this length, and the number of warps of a program."""
    if fan_in > MAX_COLUMNS:
        return {"CHUNK": _CHUNK}, 16
    columns = 1 << max(fan_in - 1, 0).bit_length()
    return {"ROWS": max(1, _TILE // columns), "COLUMNS": columns}, max(4, columns // 512)


def launch(
    kernels: tuple[Any, Any], tensors: tuple[Tensor, ...], weight: Tensor, eps: float, scale: float, dtype: torch.dtype
) -> None:
    """Start `FORWARD` or `BACKWARD`.

    Args:
        kernels: `FORWARD` or `BACKWARD`.
        tensors: The kernel's first arguments. Each is one piece of memory, (O, N) or (O,), whatever its shape.
        weight: The weight (O, ...) among them. It gives the number of rows and their length.
        eps: Smallest value of N * variance.
        scale: Constant factor on the result.
        dtype: float32 or float64, in which to compute.
    """
    rows = weight.shape[0]
    fan_in = weight.numel() // max(1, rows)
    sizes, warps = tiling(fan_in)
    numbers = (fan_in, eps, scale, tl.float64 if dtype is torch.float64 else tl.float32)
    short, long = kernels
    # Triton starts a kernel on the current device.
    with torch.cuda.device_of(weight) if weight.is_cuda else nullcontext():
        if fan_in > MAX_COLUMNS:
            long[(rows,)](*tensors, *numbers, **sizes, num_warps=warps)
        else:
            short[(-(-rows // sizes["ROWS"]),)](*tensors, rows, *numbers, **sizes, num_warps=warps)
