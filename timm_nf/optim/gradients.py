"""Tells which gradients cannot be clipped, and why.

Examples:
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> weight.grad = torch.ones(2)
    >>> parameters_with_gradient([weight, torch.nn.Parameter(torch.ones(3))])
    [Parameter containing:
    tensor([1., 1.], requires_grad=True)]
    >>> gradient_problem(weight, weight.grad) is None
    True
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .._dtypes import FLOATS, dtype_name
from .sharded import PLAIN, local_part, placements_of
from .units import Axis, axis_problem

__all__ = ["gradient_problem", "parameters_with_gradient"]


def gradient_problem(p: Tensor, g: Tensor) -> str | None:
    """Why a gradient cannot be clipped in place, None if it can. To be called without gradient tracking."""
    if g.layout != torch.strided:
        return (
            f"a gradient of layout {g.layout}; adaptive clipping needs dense ones: take sparse=False, or leave the "
            "parameter out, in a group with clip_factor=None"
        )
    if g.device != p.device:
        return f"its gradient on {g.device} but itself lies on {p.device}; move one to the other"
    if g.shape != p.shape:
        return f"a gradient of shape {tuple(g.shape)}; clear the gradients when parameters change their shape"
    if p.dtype not in FLOATS or g.dtype not in FLOATS:
        known = ", ".join(map(dtype_name, FLOATS))
        return f"dtype {p.dtype} and its gradient {g.dtype}; adaptive clipping takes {known}"
    if not (type(p) in PLAIN and type(g) in PLAIN and not hasattr(p, "_fsdp_flattened")):
        if problem := _placement_problem(p, g):
            return problem
        weight, grad = local_part(p), local_part(g)
        if grad.shape != weight.shape:
            return (
                f"a shard of shape {tuple(weight.shape)} here, its gradient {tuple(grad.shape)}; distribute both alike"
            )
    return None


def _cannot_be_written(g: Tensor) -> bool:
    """Whether entries share memory, as in expanded gradients, or torch refuses to write to the gradient."""
    grad = local_part(g)
    if not grad.is_contiguous() and _shares_memory(grad):
        return True
    return not torch.compiler.is_compiling() and grad.is_inference() and not torch.is_inference_mode_enabled()


def _shares_memory(x: Tensor) -> bool:
    """Whether two entries may lie in one place. They do not if every axis steps past all entries of the inner axes."""
    last = 0  # the farthest entry so far
    for stride, n in sorted((stride, n) for stride, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride <= last:
            return x.numel() > 0
        last += stride * (n - 1)
    return False


class _Span(NamedTuple):
    """The memory of a gradient in this process: bytes of a device, or an object of its own."""

    place: object
    start: int
    end: int


def _span(g: Tensor) -> _Span:
    local = local_part(g)
    if type(local) not in PLAIN or local.layout != torch.strided or torch.compiler.is_compiling():
        return _Span(id(g), 0, 1)
    address = local.data_ptr()
    if not address:  # without storage: empty, on the meta device, lazy
        return _Span(id(g), 0, 1)
    if local.is_contiguous():  # nearly all are, and the sum takes longer
        return _Span(local.device, address, address + local.nbytes)
    last = sum(stride * (n - 1) for stride, n in zip(local.stride(), local.shape, strict=True))
    return _Span(local.device, address, address + (last + 1) * local.element_size())


def _overlapping(gradients: Iterable[Tensor]) -> set[int]:
    """The positions of the gradients that may share memory with another one."""
    by_place: dict[object, list[tuple[_Span, int]]] = {}
    for i, g in enumerate(gradients):
        span = _span(g)
        by_place.setdefault(span.place, []).append((span, i))
    found: set[int] = set()
    for spans in by_place.values():
        farthest: tuple[_Span, int] | None = None  # of those that begin before
        for span, i in sorted(spans, key=lambda each: each[0].start):
            if farthest is not None and span.start < farthest[0].end:
                found |= {i, farthest[1]}
            if farthest is None or span.end > farthest[0].end:
                farthest = span, i
    return found


def _placement_problem(p: Tensor, g: Tensor) -> str | None:
    """Why a parameter and its gradient cannot be clipped shard by shard, None if they can."""
    ours, theirs = placements_of(p), placements_of(g)
    if getattr(p, "_fsdp_flattened", False):
        return "been flattened by FullyShardedDataParallel, which hides its output units; use fully_shard instead"
    if ours != theirs or (ours and cast(Any, p).device_mesh != cast(Any, g).device_mesh):
        return f"placements {ours} but its gradient has {theirs}; redistribute the gradient to those of the parameter"
    if not all(placement.is_replicate() or hasattr(placement, "dim") for placement in ours):
        return f"placements {ours}; adaptive clipping needs Shard or Replicate, redistribute it first"
    return None


class Checked(NamedTuple):
    """The distinct parameters that have something to clip, in the given order.

    Attributes:
        parameters: The parameters.
        needs_clone: Those among them whose gradient cannot be changed in place.
    """

    parameters: list[Tensor]
    needs_clone: list[Tensor]


@torch.no_grad()
def check_gradients(
    parameters: Tensor | Iterable[Tensor],
    label: Callable[[int, Tensor], str] = lambda index, p: f"parameter {index}",
    spared: Iterable[Tensor] = (),
    axis_of: Callable[[Tensor], Axis] = lambda p: 0,
) -> Checked:
    """Find the parameters that have something to clip.

    Args:
        parameters: One parameter or several.
        label: Gives the name of a parameter in error messages, from its index and the parameter.
        spared: Parameters whose gradients are not clipped. A gradient that shares memory with one of them needs a
            clone.
        axis_of: Gives the axis of a parameter's output units.

    Raises:
        ValueError: if a gradient is sparse or not of real floating point numbers, if it is on the meta device while
            others are not, if its shape, device or sharding is not its parameter's, or if a parameter has no such axis.
    """
    distinct: dict[int, Tensor] = {}
    first: Tensor | None = None
    for index, p in enumerate([parameters] if isinstance(parameters, Tensor) else parameters):
        g = p.grad
        if g is None or id(p) in distinct:
            continue
        if first is None:
            first = g
        problem = gradient_problem(p, g)
        if g.is_meta != first.is_meta:
            problem = (
                f"its gradient on {g.device}, others on {first.device}: meta holds no numbers, use to_empty() first"
            )
        problem = problem or axis_problem(p.shape, axis_of(p))
        if problem:
            raise ValueError(f"{label(index, p)} of shape {tuple(p.shape)} has {problem}")
        if g.numel():
            distinct[id(p)] = p
    parameters = list(distinct.values())
    gradients = [cast(Tensor, p.grad) for p in parameters]
    shared = _overlapping([*gradients, *(p.grad for p in spared if p.grad is not None)])
    needs_clone = [
        p for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)) if i in shared or _cannot_be_written(g)
    ]
    return Checked(parameters, needs_clone)


def parameters_with_gradient(
    parameters: Tensor | Iterable[Tensor], label: Callable[[int, Tensor], str] = lambda index, p: f"parameter {index}"
) -> list[Tensor]:
    """The distinct parameters that have something to clip, in the given order.

    Args:
        parameters: One parameter or several.
        label: Gives the name of a parameter in error messages, from its index and the parameter.

    Raises:
        ValueError: if a gradient cannot be clipped, see `gradient_problem`.
    """
    return check_gradients(parameters, label).parameters


def clone_gradients_(parameters: Iterable[Tensor]) -> None:
    """Replace the gradient of every parameter by a clone, which can be changed in place."""
    for p in parameters:
        if p.grad is not None:
            with torch.set_grad_enabled(p.grad.requires_grad):  # second-order optimizers differentiate it again
                p.grad = p.grad.clone(memory_format=torch.contiguous_format)
