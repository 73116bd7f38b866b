"""What one process holds of a parameter.

`fully_shard` and tensor parallelism shard parameters over several processes. Such parameters have `placements`.
torch.distributed is not imported for others.

Examples:
    >>> shard = local_shard(torch.ones(4, 3), torch.ones(4, 3), axis=0)
    >>> isinstance(shard, Shard), shard.weight.shape, shard.spread_over  # all of it, as nothing is sharded here
    (True, torch.Size([4, 3]), ())
    >>> norms = {0: (torch.ones(4), torch.ones(4))}
    >>> reduce_norms(norms, {0: [shard]}, norm_type=2.0)[0][0]  # between no processes
    tensor([1., 1., 1., 1.])
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .units import Axis, Layout, layout_of

__all__ = ["Shard", "local_shard", "reduce_norms"]

PLAIN = (Tensor, nn.Parameter)


class Shard(NamedTuple):
    """The part of a parameter and of its gradient in this process. An ordinary parameter has one whole part.

    Attributes:
        parameter: The parameter, as the optimizer knows it.
        weight: Its part, as the layout views it.
        grad: The part of its gradient, as the layout views it.
        layout: How it is divided into units.
        spread_over: The process groups that hold other parts of the same units.
        blocks: (rows,), the block of each row if the layout's blocks are cut between processes.
    """

    parameter: Tensor
    weight: Tensor
    grad: Tensor
    layout: Layout
    spread_over: tuple[Any, ...]
    blocks: Tensor | None = None


def local_shard(p: Tensor, g: Tensor, axis: Axis) -> Shard:
    """The shard of a parameter without a `gradient_problem`. To be called without gradient tracking."""
    layout = layout_of(p.shape, axis)
    placements = placements_of(p)
    if not placements:
        return Shard(p, layout.view(p), layout.view(g), layout, ())
    mesh = cast(Any, p).device_mesh
    dims = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    weight, grad = local_part(p), local_part(g)
    blocks = None
    if layout.blocks:
        if any(placements[i].dim == 0 for i in dims):
            blocks = _blocks_of_rows(p, layout.blocks, grad)
        else:
            weight, grad = layout.view(weight), layout.view(grad)
    # If a parameter is sharded along the axis of its units, a process holds whole units. If it is sharded along another
    # axis, or is a single unit, a process holds parts of units.
    whole = 1 if layout.blocks else (*layout.kept, None)[0]
    spread_over = tuple(mesh.get_group(i) for i in dims if placements[i].dim != whole)
    if spread_over and blocks is None and not grad.numel():
        # Every process takes part in the collective; zeros change no norm.
        weight, grad = (t.new_zeros(1 if layout.is_single() else layout.sizes(t)) for t in (weight, grad))
    return Shard(p, weight, grad, layout, spread_over, blocks)


def _blocks_of_rows(p: Tensor, blocks: int, local: Tensor) -> Tensor:
    """The block of every local row (rows,), for a parameter that is sharded along its first axis."""
    chunks: list[Any] = []
    if len(local):
        chunks = cast(Any, p).__create_chunk_list__()  # torch's protocol for checkpoints
    rows = [torch.arange(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]) for chunk in chunks]
    return (torch.cat([torch.empty(0, dtype=torch.int64), *rows]) // (p.shape[0] // blocks)).to(local.device)


def reduce_norms(
    norms: Mapping[int, tuple[Tensor, Tensor]], chunks: Mapping[int, list[Shard]], norm_type: float
) -> dict[int, tuple[Tensor, Tensor]]:
    """Norms of whole units, from the norms of their parts. Chunks over the same process groups share an all-reduce.

    Args:
        norms: For each chunk, the weight norms and the gradient norms, (units,) each.
        chunks: For each chunk, its shards. All have the same `spread_over`.
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
            total.nan_to_num_(math.inf, math.inf)  # a maximum may lose NaN; a unit with either stays unchanged
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


def placements_of(x: Tensor) -> tuple[Any, ...]:
    """How a tensor is distributed over each axis of its mesh. An ordinary tensor has no placements."""
    return tuple(getattr(x, "placements", ()))


def local_part(x: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return cast(Any, x).to_local() if placements_of(x) else x
