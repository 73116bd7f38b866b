"""Adaptive gradient clipping: the gradient of every output unit is held to a multiple of that unit's weight norm.

timm already has `timm.utils.agc`; this file exists because that one treats every entry of a gain as a unit of its own
(the paper: one unit), makes two full-size temporaries and a dozen operations per parameter, and leaves finding the
classifier to the position of the last two parameters.

Source: arXiv:2102.06171, section 4; deepmind-research nfnets/optim.py@f5de0ede.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import compress
from numbers import Real
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from .gradients import parameters_with_gradient
from .sharded import Shard, local_shard, reduce_norms

# Never acts on its own: a unit is only clipped above clip_factor * eps, 1e-5 by default. It bounds the division for
# callers who set both far lower, exactly as the authors' code does.
_DIV_EPS = 1e-6

_vector_norm = cast(Callable[..., Tensor], torch.linalg.vector_norm)  # pyright: ignore[reportUnknownMemberType]
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def unitwise_norm(x: Tensor, norm_type: float = 2.0) -> Tensor:
    """Norm of every output unit of a weight or of its gradient.

    Args:
        x: (O, I, K, K), (O, I) or any other shape; with at most one axis longer than 1 it is a single unit.
        norm_type: Order of the norm, `math.inf` included.

    Returns:
        (O, 1, 1, 1) or (O, 1), as many axes as `x`; 0-d for a single unit. At least float32, same device as `x`.

    Source: arXiv:2102.06171, section 4; deepmind-research nfnets/optim.py@f5de0ede.
    """
    single = _is_single_unit(x)
    if not x.numel():  # torch has no infinity norm of nothing
        return x.new_zeros(() if single else (x.shape[0],) + (1,) * (x.ndim - 1), dtype=_norm_dtype(x))
    return _vector_norm(
        x, norm_type, dim=None if single else tuple(range(1, x.ndim)), keepdim=not single, dtype=_norm_dtype(x)
    )


def adaptive_clip_grad_(
    parameters: Tensor | Iterable[Tensor], clip_factor: float = 0.01, eps: float = 1e-3, norm_type: float = 2.0
) -> Tensor:
    """Scale down, in place, the gradient of every unit whose norm exceeds `clip_factor * max(weight norm, eps)`.

    Every other gradient stays bit-identical, and so does every unit with an entry that is not finite: a loss scaler
    has to see it. On accelerators, where nothing waits for the device, in a compiled function and for units spread over
    processes, this holds for units whose norm overflows float32 as well, and everywhere if it overflows float64.
    Parameters without a gradient are skipped, one given twice is clipped once.

    Parameters sharded over several processes (`fully_shard`, tensor parallelism) are clipped as if they were whole,
    and no parameter is gathered: where a unit is spread over processes, its norm costs one all-reduce of one number.

    Args:
        parameters: One parameter or any number of them, on any devices, of any floating dtypes and shapes (see
            `unitwise_norm` for what is one unit). Leave the classifier's weight out: the paper does not clip it.
        clip_factor: Largest ratio of gradient norm to weight norm; `math.inf` clips nothing.
        eps: Weight norms below this count as this, so that a unit at zero can leave it.
        norm_type: Order of the norm, above 0; `math.inf` for the largest entry.

    Returns:
        The fraction of units that were clipped: a 0-d tensor on the device of the first gradient, 0 without gradients.
        With sharded parameters it is that of the units this process holds or has a part of.

    Raises:
        ValueError: A setting outside its range, or a gradient that cannot be clipped in place, see
            `parameters_with_gradient`. Nothing has been written then.

    Source: arXiv:2102.06171, section 4; deepmind-research nfnets/optim.py@f5de0ede.
    """
    check_setting("clip_factor", clip_factor)
    check_setting("eps", eps)
    if not isinstance(norm_type, Real) or not norm_type > 0:
        raise ValueError(f"norm_type must be above 0, got {norm_type!r}")
    checked = parameters_with_gradient(parameters)
    clipped = [units.clipped for units in clip_checked_([(checked, clip_factor, eps)], norm_type)]
    device = _grad(checked[0]).device if checked else None
    waits = device is None or device.type == "cpu"  # for what comes from an accelerator
    hits = sum((mask.sum().to(device, non_blocking=not waits) for mask in clipped), torch.zeros((), device=device))
    return hits / max(1, sum(mask.numel() for mask in clipped))


def check_setting(name: str, value: float) -> None:
    """Raise a ValueError that names the setting if its value is not a number, negative or NaN."""
    if not isinstance(value, Real) or not value >= 0:  # false for NaN
        hint = "; math.inf clips nothing" if name == "clip_factor" else ""
        raise ValueError(f"{name} must be zero or positive, got {value!r}{hint}")


class Units(NamedTuple):
    """Unit norms of some parameters and their gradients, one value per unit, one parameter after the other: (units,).

    Of a sharded parameter these are the units that this process holds or has a part of.
    """

    parameters: list[Tensor]
    counts: list[int]  # units of each parameter
    weight_norm: Tensor  # at least eps
    grad_norm: Tensor  # before the clipping
    limit: Tensor  # of the gradient norm
    clipped: Tensor  # which exceed it; those with a gradient that is not finite do not

    @property
    def ratio(self) -> Tensor:
        """What the clip factor is the limit of."""
        return self.grad_norm / self.weight_norm


Settings = tuple[Sequence[Tensor], float, float]  # checked parameters, clip_factor, eps


@torch.no_grad()
def clip_checked_(settings: Iterable[Settings], norm_type: float = 2.0) -> list[Units]:
    """`adaptive_clip_grad_` after its checks, for any number of settings with one all-reduce between them.

    Returns:
        What was measured, in no particular order; nothing where a clip factor is infinite.
    """
    measured: list[Units] = []
    for shards, units in _measure([each for each in settings if not math.isinf(each[1])], norm_type):
        _scale_gradients_(shards, units)
        measured.append(units)
    return measured


@torch.no_grad()
def measure(parameters: Sequence[Tensor], clip_factor: float, eps: float = 1e-3) -> list[Units]:
    """What `clip_checked_` would see of checked parameters; nothing is written."""
    return [units for _, units in _measure([(parameters, clip_factor, eps)], 2.0)]


def summaries(measured: Iterable[Units], groups: Iterable[Iterable[Tensor]]) -> list[dict[str, Any]]:
    """Statistics of the units of each group of parameters; the only place here that waits for an accelerator.

    Returns:
        One dict a group: `units`; `zero_grad_units`, those with a gradient of exactly zero; `non_finite_units`, those
        where it is infinite or NaN; `clipped_fraction`; `ratio_quantiles` of gradient norm over weight norm (at least
        eps) of the others, {0.05: ..., 0.99: ...}. Without units in `measured` these are 0, 0, 0, 0.0 and {}.
    """
    of_parameter: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for units in measured:
        pieces = (values.split_with_sizes(units.counts) for values in (units.ratio, units.grad_norm, units.clipped))
        of_parameter |= {id(p): found for p, *found in zip(units.parameters, *pieces, strict=True)}  # pyright: ignore
    rows: list[dict[str, Any]] = []
    for parameters in groups:
        found = [of_parameter[id(p)] for p in parameters if id(p) in of_parameter]
        row: dict[str, Any] = {"units": 0, "zero_grad_units": 0, "non_finite_units": 0}
        row |= {"clipped_fraction": 0.0, "ratio_quantiles": {}}
        if found:
            ratio, norm, clipped = (torch.cat([piece.cpu() for piece in pieces]) for pieces in zip(*found, strict=True))
            finite = ratio[ratio.isfinite()]
            row["units"], row["zero_grad_units"] = norm.numel(), int((norm == 0).sum())
            row["non_finite_units"] = int((~norm.isfinite()).sum())
            row["clipped_fraction"] = clipped.float().mean().item()
            at = torch.tensor(_QUANTILES, dtype=ratio.dtype)
            values = finite.quantile(at) if finite.numel() else at[:0]
            row["ratio_quantiles"] = {q: value.item() for q, value in zip(_QUANTILES, values, strict=False)}
        rows.append(row)
    return rows


def _measure(settings: Iterable[Settings], norm_type: float) -> Iterator[tuple[list[Shard], Units]]:
    """The unit norms, chunk by chunk: one device, one kind of unit, one dtype of parameters and of gradients each."""
    chunks: list[tuple[list[Shard], float, float]] = []
    for parameters, clip_factor, eps in settings:
        groups: dict[tuple[object, ...], list[Shard]] = {}
        for p in parameters:
            shard = local_shard(p, _grad(p), _is_single_unit(p))
            key = (shard.grad.device, shard.grad.dtype, shard.weight.dtype, shard.single, shard.spread_over)
            if shard.grad.numel():
                groups.setdefault(key, []).append(shard)
        chunks += [(group, clip_factor, eps) for group in groups.values()]
    # Units in several processes first and together, so that all of them cost one collective.
    spread = {i: _norms(shards, norm_type) for i, (shards, _, _) in enumerate(chunks) if shards[0].spread_over}
    spread = reduce_norms(spread, {i: chunks[i][0] for i in spread}, norm_type)
    for i, (shards, clip_factor, eps) in enumerate(chunks):
        weight_norm, grad_norm = spread[i] if i in spread else _norms(shards, norm_type)
        counts = [1 if shard.single else len(shard.grad) for shard in shards]
        parameters = [shard.parameter for shard in shards]
        limit = weight_norm.clamp_(min=eps) * clip_factor
        clipped = (grad_norm > limit) & (grad_norm < math.inf)
        yield shards, Units(parameters, counts, weight_norm, grad_norm, limit, clipped)


def _norms(shards: list[Shard], norm_type: float) -> tuple[Tensor, Tensor]:
    """Norms of all units of shards that have device, dtypes and kind of unit in common: (units,) twice."""
    weight_norm, grad_norm = (
        _unit_norms(tensors, shards[0], norm_type)
        for tensors in ([shard.weight for shard in shards], [shard.grad for shard in shards])
    )
    return weight_norm, grad_norm


def _unit_norms(tensors: list[Tensor], like: Shard, norm_type: float) -> Tensor:
    norms = _norms_in(_norm_dtype(tensors[0]), tensors, like.single, norm_type)
    # Squares of finite float32 values overflow above 1e19, where clipping is needed most.
    if not like.spread_over and _reading_is_free(norms) and np.isinf(norms.numpy()).any():
        norms = _norms_in(torch.float64, tensors, like.single, norm_type)
    return norms


def _norms_in(dtype: torch.dtype, tensors: list[Tensor], single: bool, norm_type: float) -> Tensor:
    if single:
        return torch.stack(torch._foreach_norm(tensors, norm_type, dtype=dtype))  # pyright: ignore
    return torch.cat([_vector_norm(t, norm_type, dim=tuple(range(1, t.ndim)), dtype=dtype) for t in tensors])


def _scale_gradients_(shards: list[Shard], units: Units) -> None:
    """Scale every unit that exceeds its limit down to it."""
    grads = [shard.grad for shard in shards]
    scale = units.grad_norm.clamp(min=_DIV_EPS)
    torch.div(units.limit, scale, out=scale).masked_fill_(~units.clipped, 1.0)
    single = shards[0].single
    scales = list(scale.unbind() if single else scale.split_with_sizes(units.counts))
    if _reading_is_free(scale):  # and writing a gradient that stays the same is not
        hit = np.logical_or.reduceat(units.clipped.numpy(), np.cumsum([0, *units.counts[:-1]]))
        grads, scales = list(compress(grads, hit)), list(compress(scales, hit))
    if not single:
        scales = [rows.view(-1, *[1] * (g.ndim - 1)) for rows, g in zip(scales, grads, strict=True)]
    if grads:
        torch._foreach_mul_(grads, scales)  # pyright: ignore


def _reading_is_free(x: Tensor) -> bool:
    """Whether a branch may depend on values: nothing waits for a CPU, and a graph that is traced has none."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _is_single_unit(x: Tensor) -> bool:
    return sum(n > 1 for n in x.shape) <= 1


def _norm_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad
