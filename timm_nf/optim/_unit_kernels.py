"""Triton kernels over the units of many tensors, and how they are launched.

This module is only imported if the device has Triton, see `unit_triton`. A kernel gets its tensors as arguments, by the
addresses of their first elements. So nothing is copied to the device, nothing is kept between calls, and a CUDA graph
holds the addresses as it holds those of any other kernel.

A unit is a row in one piece of memory. Each unit has a program of its own.
"""

# Triton's language has no types: its constants stand for types, and its loops are unrolled.
# pyright: standard, reportArgumentType=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TENSORS = 64  # number of tensors of one launch: 2 of the 4 kB of arguments that every CUDA version allows
CHUNK = 1024  # number of elements of a row that a program reads at a time
_NEVER = 2**31 - 1  # stands for the first unit of a missing tensor

_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def _norm(address, at, length, DTYPE: tl.constexpr, NORM: tl.constexpr, CHUNK: tl.constexpr):
    row = address.to(tl.int64).to(tl.pointer_type(DTYPE)) + at  # Triton takes a low address as a number of 32 bits
    squares = tl.zeros((CHUNK,), NORM)
    for start in range(0, length, CHUNK):
        column = start + tl.arange(0, CHUNK)
        x = tl.load(row + column, mask=column < length, other=0.0).to(NORM)
        squares += x * x
    return tl.sqrt(tl.sum(squares, 0))


@triton.jit(do_not_specialize=["weights", "grads", "firsts", "lengths", "done"])
def norms(
    weights, grads, firsts, lengths, weight_norms, grad_norms, done, TENSORS: tl.constexpr, CHUNK: tl.constexpr,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, WEIGHT_NORM: tl.constexpr, GRAD_NORM: tl.constexpr,
):  # fmt: skip
    """Norms of the units of up to TENSORS weights and of their gradients. They are written from index `done` on."""
    unit = tl.program_id(0)
    weight, grad = weights[0], grads[0]
    first, length = firsts[0], lengths[0]
    for i in tl.static_range(1, TENSORS):
        at_least = unit >= firsts[i]
        weight = tl.where(at_least, weights[i], weight)
        grad = tl.where(at_least, grads[i], grad)
        first = tl.where(at_least, firsts[i], first)
        length = tl.where(at_least, lengths[i], length)
    at = (unit - first).to(tl.int64) * length
    tl.store(weight_norms + done + unit, _norm(weight, at, length, WEIGHT, WEIGHT_NORM, CHUNK))
    tl.store(grad_norms + done + unit, _norm(grad, at, length, GRAD, GRAD_NORM, CHUNK))


@triton.jit(do_not_specialize=["grads", "firsts", "lengths", "done"])
def scale(
    grads, firsts, lengths, scales, done, TENSORS: tl.constexpr, CHUNK: tl.constexpr, GRAD: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Multiply each unit of up to TENSORS gradients by its scale. Units with a scale of 1 are not written."""
    unit = tl.program_id(0)
    grad, first, length = grads[0], firsts[0], lengths[0]
    for i in tl.static_range(1, TENSORS):
        at_least = unit >= firsts[i]
        grad = tl.where(at_least, grads[i], grad)
        first = tl.where(at_least, firsts[i], first)
        length = tl.where(at_least, lengths[i], length)
    row = grad.to(tl.int64).to(tl.pointer_type(GRAD)) + (unit - first).to(tl.int64) * length
    factor = tl.load(scales + done + unit)
    if factor != 1:
        for start in range(0, length, CHUNK):
            column = start + tl.arange(0, CHUNK)
            x = tl.load(row + column, mask=column < length, other=0.0).to(NORM)
            tl.store(row + column, x * factor, mask=column < length)


def launch(kernel: Any, tensors: Sequence[Sequence[Tensor]], counts: Sequence[int], per_unit: Sequence[Tensor]) -> None:
    """Start a kernel, once for every `TENSORS` tensors.

    Args:
        kernel: `norms` or `scale`.
        tensors: The kernel's first arguments: lists of tensors, of equal length. A list has one dtype.
        counts: Number of units of each tensor.
        per_unit: What the kernel reads or writes for each unit, (units,) each, in floating point.
    """
    dtypes = [_DTYPES[t.dtype] for t in (*(ts[0] for ts in tensors), *per_unit)]
    done = 0
    # Triton starts a kernel on the current device.
    with torch.cuda.device_of(per_unit[0]) if per_unit[0].is_cuda else nullcontext():
        for begin in range(0, len(counts), TENSORS):
            end = begin + TENSORS
            *firsts, units = accumulate(counts[begin:end], initial=0)
            missing = TENSORS - len(firsts)
            lengths = [t.numel() // n for t, n in zip(tensors[0][begin:end], counts[begin:end], strict=True)]
            addresses = [[t.data_ptr() for t in ts[begin:end]] for ts in tensors]
            # Some address: Triton would take a zero as a 32 bit number, and compile another kernel.
            table = [tuple(a + a[-1:] * missing) for a in addresses]
            table += [(*firsts, *[_NEVER] * missing), (*lengths, *[0] * missing)]
            kernel[(units,)](*table, *per_unit, done, TENSORS, CHUNK, *dtypes, num_warps=4)
            done += units
