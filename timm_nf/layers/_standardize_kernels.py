"""Triton kernels of weight standardisation, forward and backward, and how they are launched.

Only a device that has Triton imports this module, see `standardize_triton`. A row is the fan-in of one output channel
and lies in memory in one piece, whatever the order of its elements. Up to `MAX_COLUMNS` elements stay in registers, so
that a weight is read once and written once; longer rows are read three times.

Shapes: O output channels (rows), N fan-in.
"""

# Triton's language has no types.
# pyright: standard

# pyright: reportInvalidTypeForm=false
# A kernel's annotations are Triton's types of its arguments, which are values: Python's floats would be float32.

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_COLUMNS = 8192  # of a row in registers: 16 elements a thread and operand
_TILE = 1024  # elements of a program of several short rows
_CHUNK = 4096  # elements of a long row at a time


@triton.jit
def _mean(x, fan_in):
    return tl.sum(x, 1, keep_dims=True) / fan_in


@triton.jit
def _inverse_norm(norm2, eps):
    return 1 / tl.sqrt(tl.maximum(norm2, eps))


@triton.jit
def _number(x, DTYPE: tl.constexpr):
    # The interpreter passes Python's floats, which have no method `to`.
    return tl.full((1, 1), x, tl.float64).to(DTYPE)


@triton.jit
def _centred(x, mask, fan_in):
    # Twice: the first mean is rounded at the scale of the mean, the second at the scale of the spread.
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
    """(O, N) weight and (O,) gain to (O, N) out, computed in DTYPE; a program takes ROWS rows."""
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
    """(O, N) grad, (O, N) weight and (O,) gain to (O, N) grad_weight and (O,) grad_gain."""
    row, at, mask = _place(rows, fan_in, ROWS, COLUMNS)
    x = _centred(tl.load(weight + at, mask=mask, other=0.0).to(DTYPE), mask, fan_in)
    y = _centred(tl.load(grad + at, mask=mask, other=0.0).to(DTYPE), mask, fan_in)
    floor = _number(eps, DTYPE)
    norm2 = tl.sum(x * x, 1, keep_dims=True)
    inverse = _inverse_norm(norm2, floor)
    x *= inverse
    along = tl.sum(x * y, 1, keep_dims=True)
    tl.store(grad_gain + row, along * _number(scale, DTYPE), mask=row < rows)
    y -= tl.where(norm2 >= floor, along, 0.0) * x  # under the floor the norm is a constant, nothing is projected out
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
    """`forward`, a program a row."""
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
    rest = _mean(total, fan_in)  # of the mean, which is rounded at its own scale
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
    """`backward`, a program a row."""
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


FORWARD = forward, forward_long  # for rows in registers and longer ones
BACKWARD = backward, backward_long


@cache
def tiling(fan_in: int) -> tuple[dict[str, int], int]:
    """Sizes that the kernel for such rows is compiled for, and the warps of a program."""
    if fan_in > MAX_COLUMNS:
        return {"CHUNK": _CHUNK}, 16
    columns = 1 << max(fan_in - 1, 0).bit_length()
    return {"ROWS": max(1, _TILE // columns), "COLUMNS": columns}, max(4, columns // 512)


def launch(
    kernels: tuple[Any, Any], tensors: tuple[Tensor, ...], weight: Tensor, eps: float, scale: float, dtype: torch.dtype
) -> None:
    """Start `FORWARD` or `BACKWARD`.

    Args:
        kernels: The one or the other.
        tensors: What its arguments begin with: (O, N) or (O,) in memory, in one piece, whatever their shapes.
        weight: (O, ...), the one among them that says how many rows of what length there are.
        eps: Floor on N * variance.
        scale: Constant factor.
        dtype: float32 or float64, of the computation.
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
