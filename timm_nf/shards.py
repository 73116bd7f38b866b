"""What one process holds of a parameter, whole or sharded, and what keeps its gradient from being clipped.

Parameters are sharded over several processes by `fully_shard` and tensor parallelism. Sharded tensors are told by their
`placements`, so that nothing of torch.distributed is imported without them.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Shard(NamedTuple):
    """The part of a parameter and of its gradient in this process; all of them for an ordinary parameter."""

    parameter: Tensor  # as the optimizer knows it
    weight: Tensor
    grad: Tensor
    single: bool  # the whole parameter is one unit
    spread_over: tuple[Any, ...]  # the process groups that hold other parts of the same units


def gradient_problem(p: Tensor, g: Tensor) -> str | None:
    """What keeps a gradient from being clipped in place, None if nothing does; called without gradient tracking."""
    if g.layout != torch.strided:
        return f"a gradient of layout {g.layout}; adaptive clipping needs dense ones, so no sparse=True"
    if g.device != p.device:
        return f"its gradient on {g.device} but itself lies on {p.device}; move one to the other"
    if g.shape != p.shape:
        return f"a gradient of shape {tuple(g.shape)}; clear the gradients when parameters change their shape"
    if p.dtype not in _DTYPES or g.dtype not in _DTYPES:
        return (
            f"dtype {p.dtype} and its gradient {g.dtype}; adaptive clipping takes float16, bfloat16, float32, float64"
        )
    grad = g
    if not (type(p) in _PLAIN and type(g) in _PLAIN and not hasattr(p, "_fsdp_flattened")):
        if problem := _placement_problem(p, g):
            return problem
        weight, grad = _local(p), _local(g)
        if grad.shape != weight.shape:
            return (
                f"a shard of shape {tuple(weight.shape)} here, its gradient {tuple(grad.shape)}; distribute both alike"
            )
    if not grad.is_contiguous() and _shares_memory(grad):
        return f"a gradient with entries that share memory (strides {grad.stride()}); expanded ones need a clone()"
    if not torch.compiler.is_compiling() and grad.is_inference() and not torch.is_inference_mode_enabled():
        return "a gradient made in inference mode, which torch lets nobody write to; give it a clone()"
    return None


def _shares_memory(x: Tensor) -> bool:
    """Whether entries may lie in the same place: from the innermost out, an axis does not step over those before it."""
    last = 0  # the farthest entry so far
    for stride, n in sorted((stride, n) for stride, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride <= last:
            return x.numel() > 0
        last += stride * (n - 1)
    return False


def memory(g: Tensor) -> object:
    """The same for gradients that begin in the same place of this process."""
    local = g if type(g) in _PLAIN else _local(g)
    if type(local) not in _PLAIN or local.layout != torch.strided or torch.compiler.is_compiling():
        return id(g)
    address = local.data_ptr()  # 0 without storage: empty, on the meta device, lazy
    return (local.device, address) if address else id(g)


def local_shard(p: Tensor, g: Tensor, single: bool) -> Shard:
    """The shard of a parameter that has no `gradient_problem`; to be called without gradient tracking."""
    placements = _placements(p)
    if not placements:
        return Shard(p, p, g, single, ())
    mesh = cast(Any, p).device_mesh
    # Sharded by rows, a process holds whole units; sharded otherwise, or if all of it is one unit, parts of them.
    dims = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    spread_over = tuple(mesh.get_group(i) for i in dims if single or placements[i].dim != 0)
    weight, grad = _local(p), _local(g)
    if spread_over and not grad.numel():  # takes part in the collective all the same, and zeros change no norm
        weight, grad = (t.new_zeros(1 if single else (len(t), *[1] * (t.ndim - 1))) for t in (weight, grad))
    return Shard(p, weight, grad, single, spread_over)


def reduce_norms(
    norms: Mapping[int, tuple[Tensor, Tensor]], chunks: Mapping[int, list[Shard]], norm_type: float
) -> dict[int, tuple[Tensor, Tensor]]:
    """Norms of whole units from those of their parts, with one all-reduce for all chunks spread over the same groups.

    Args:
        norms: (units,) of the weights and of the gradients, by chunk.
        chunks: The shards they belong to; each has only one `spread_over`.
        norm_type: Order of the norm, above 0.
    """
    by_groups: dict[tuple[Any, ...], list[int]] = {}
    for i, chunk in chunks.items():
        by_groups.setdefault(chunk[0].spread_over, []).append(i)
    reduced: dict[int, tuple[Tensor, Tensor]] = {}
    for groups, members in by_groups.items():
        parts = [part for i in members for part in norms[i]]
        total = torch.cat(parts)
        if math.isinf(norm_type):
            total.nan_to_num_(math.inf, math.inf)  # a maximum may lose NaN; units with either are left alone
            operation = torch.distributed.ReduceOp.MAX
        else:
            total.pow_(norm_type)
            operation = torch.distributed.ReduceOp.SUM
        for group in groups:
            torch.distributed.all_reduce(total, operation, group=group)  # pyright: ignore
        if not math.isinf(norm_type):
            total.pow_(1 / norm_type)
        pieces = iter(total.split_with_sizes([len(part) for part in parts]))
        reduced |= {i: (next(pieces).to(norms[i][0].dtype), next(pieces).to(norms[i][1].dtype)) for i in members}
    return reduced


def _placement_problem(p: Tensor, g: Tensor) -> str | None:
    """What keeps a parameter and its gradient from being clipped shard by shard; None if nothing does."""
    ours, theirs = _placements(p), _placements(g)
    if getattr(p, "_fsdp_flattened", False):
        return "been flattened by FullyShardedDataParallel, which hides its output units; use fully_shard instead"
    if ours != theirs or (ours and cast(Any, p).device_mesh != cast(Any, g).device_mesh):
        return f"placements {ours} but its gradient has {theirs}; redistribute the gradient to those of the parameter"
    if not all(placement.is_replicate() or hasattr(placement, "dim") for placement in ours):
        return f"placements {ours}; adaptive clipping needs Shard or Replicate, redistribute it first"
    return None


def _placements(x: Tensor) -> tuple[Any, ...]:
    return tuple(getattr(x, "placements", ()))


def _local(x: Tensor) -> Tensor:
    return cast(Any, x).to_local() if _placements(x) else x
