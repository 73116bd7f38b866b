"""Words for what a route does to the classifier and to the decay of gains. It imports nothing: all packages can."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any


def clipped(weight: bool, bias: bool) -> str:
    """Which of the classifier's two parameters was clipped."""
    return f"weight {_clipped(weight)}, bias {_clipped(bias)}"


def _clipped(hit: bool) -> str:
    return "clipped" if hit else "not clipped"


def decayed(groups: Iterable[Mapping[str, Any]], parameters: Collection[object]) -> str:
    """How many of these parameters decay in an optimizer's groups."""
    ids = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    return f"{sum(id(p) in ids for p in parameters)} of {len(parameters)}"
