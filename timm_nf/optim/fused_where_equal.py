"""Which parameters of a group torch's fused SGD may step.

On the CPU it is the faster one, but torch never chooses it by itself; it differs from the default in the last bits of
some tensors, is wrong for others, and cannot be sharded.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fused_parts"]

_MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last)


def fused_parts(group: dict[str, Any], state: Mapping[Tensor, Any]) -> list[dict[str, Any]]:
    """The group in parts, `fused` where torch's fused SGD does to the bit what the default one does.

    With momentum it rounds differently behind the last whole cache line of a tensor, and everywhere in half precision,
    with dampening and when maximizing. It reads all tensors of a parameter in the order they lie in memory, wrongly
    where that differs (torch 2.14.1 and 2.15), and knows neither tensor subclasses nor momentum that only some have.

    Examples:
        >>> weight = torch.nn.Parameter(torch.ones(16))
        >>> group = torch.optim.SGD([weight], lr=0.1, momentum=0.9).param_groups[0]
        >>> [part["fused"] for part in fused_parts(group, state={})]
        [True]
    """
    if group["fused"]:
        sharded = [p for p in group["params"] if hasattr(p, "placements")]
        whole = [p for p in group["params"] if not hasattr(p, "placements")]
        return [{**group, "params": sharded, "fused": None}, {**group, "params": whole}] if sharded else [group]
    if any(group[flag] is not None for flag in ("fused", "foreach")):
        return [group]
    if any(group[option] for option in ("dampening", "maximize", "differentiable")) or isinstance(group["lr"], Tensor):
        return [group]
    rest: list[Tensor] = []
    fused: list[Tensor] = []
    fused_first: list[Tensor] = []  # no momentum buffer yet
    for p in group["params"]:
        buffer = state[p].get("momentum_buffer") if p in state else None
        tensors = [t for t in (p, p.grad, buffer) if t is not None]
        plain = all(type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.layout == torch.strided for t in tensors)
        equal = (
            plain
            and p.dtype in (torch.float32, torch.float64)
            and all(t.dtype == p.dtype for t in tensors)
            and not (group["momentum"] and p.nbytes % 64)
            and any(all(t.is_contiguous(memory_format=f) for t in tensors) for f in _MEMORY_FORMATS)
        )
        (rest if not equal else fused if buffer is not None else fused_first).append(p)
    parts = ((rest, None), (fused, True), (fused_first, True))
    return [{**group, "params": parameters, "fused": choice} for parameters, choice in parts if parameters]
