"""Which parameters of a group torch's fused SGD may step.

On the CPU the fused SGD is faster, but torch never chooses it by itself. It differs from the default SGD in the last
bits of some tensors, is wrong for others, and cannot be sharded.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fused_parts"]

_MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last)
_CACHE_LINE = 64  # bytes


def fused_parts(group: dict[str, Any], state: Mapping[Tensor, Any]) -> list[dict[str, Any]]:
    """Split a group into parts. A part is `fused` if torch's fused SGD gives the same bits as the default SGD.

    A group that asks for the fused SGD gets it, except for sharded parameters. A group that asks for another
    implementation stays as it is.

    Args:
        group: A parameter group of torch's SGD.
        state: The optimizer's state.

    Examples:
        >>> weight = torch.nn.Parameter(torch.ones(16))
        >>> group = torch.optim.SGD([weight], lr=0.1, momentum=0.9).param_groups[0]
        >>> [part["fused"] for part in fused_parts(group, state={})]
        [True]
    """
    if group["fused"]:
        return _without_sharded(group)
    is_chosen = group["fused"] is not None or group["foreach"] is not None
    if is_chosen or not _options_allow(group):
        return [group]
    rest: list[Tensor] = []
    fused: list[Tensor] = []
    fused_first: list[Tensor] = []  # no momentum buffer yet: the fused SGD wants one for all or for none
    for p in group["params"]:
        buffer = state[p].get("momentum_buffer") if p in state else None
        tensors = [tensor for tensor in (p, p.grad, buffer) if tensor is not None]
        if not _is_equal(p, tensors, has_momentum=bool(group["momentum"])):
            rest.append(p)
        elif buffer is None:
            fused_first.append(p)
        else:
            fused.append(p)
    parts = ((rest, None), (fused, True), (fused_first, True))
    return [{**group, "params": parameters, "fused": choice} for parameters, choice in parts if parameters]


def _without_sharded(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A fused group. Its sharded parameters get the default SGD, in a part of their own."""
    sharded = [p for p in group["params"] if hasattr(p, "placements")]
    if not sharded:
        return [group]
    whole = [p for p in group["params"] if not hasattr(p, "placements")]
    return [{**group, "params": sharded, "fused": None}, {**group, "params": whole}]


def _options_allow(group: dict[str, Any]) -> bool:
    """Whether these options allow equality. With dampening and when maximizing, the fused SGD rounds differently."""
    excluded = group["dampening"] or group["maximize"] or group["differentiable"]
    return not excluded and not isinstance(group["lr"], Tensor)


def _is_equal(p: Tensor, tensors: list[Tensor], has_momentum: bool) -> bool:
    """Whether the fused SGD steps a parameter as the default SGD does, to the bit.

    It rounds differently in half precision, and with momentum behind the last whole cache line of a tensor. It reads
    all tensors of a parameter in the order they have in memory, which is wrong if that differs (torch 2.14.1 and 2.15).
    It does not know tensor subclasses.

    Args:
        p: The parameter.
        tensors: The parameter, its gradient and its momentum buffer, as far as they exist.
        has_momentum: Whether the group has momentum.
    """
    if not all(type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.layout == torch.strided for t in tensors):
        return False
    if p.dtype not in (torch.float32, torch.float64) or any(t.dtype != p.dtype for t in tensors):
        return False
    if has_momentum and p.nbytes % _CACHE_LINE:
        return False
    return any(all(t.is_contiguous(memory_format=f) for t in tensors) for f in _MEMORY_FORMATS)
