"""Adaptive gradient clipping: the gradient of every output unit is held to a multiple of that unit's weight norm.

timm's `timm.utils.agc` takes every entry of a gain as a unit of its own, where the paper has one unit. It makes two
full-size temporaries and a dozen operations per parameter, and takes the last two parameters for the classifier.

Source: arXiv:2102.06171, section 4; deepmind-research nfnets/optim.py@f5de0ede.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import compress
from numbers import Real
from typing import Any, NamedTuple, TypedDict, cast

import numpy as np
import torch
from torch import Tensor

from .._clip_defaults import CLIP_EPS, CLIP_FACTOR
from .gradients import check_gradients, clone_gradients_
from .sharded import Shard, local_shard, reduce_norms
from .unit_triton import scale_units_, takes_kernel, unit_norms
from .units import Axis, checked_axis, layout_of

__all__ = ["adaptive_clip_grad_", "unitwise_norm"]

# It bounds the division if callers set clip_factor and eps far lower, exactly as the authors' code does. By default it
# never acts: a unit is only clipped above clip_factor * eps, which is 1e-5.
_DIV_EPS = 1e-6

_vector_norm = cast(Callable[..., Tensor], torch.linalg.vector_norm)  # pyright: ignore[reportUnknownMemberType]
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def unitwise_norm(x: Tensor, norm_type: float = 2.0, axis: Axis = 0) -> Tensor:
    """Norm of every output unit of a weight or of its gradient.

    Args:
        x: (O, I, K, K), (O, I) or any other shape. With at most one axis longer than 1 it is a single unit.
        norm_type: Order of the norm. It may be `math.inf`.
        axis: The axis of the output units; `(1, groups)` for transposed convolutions, (I, O / groups, K, K).

    Returns:
        (O, 1, 1, 1) or (O, 1), which broadcasts to `x`; 0-d for a single unit. With groups it is (I, O / groups, 1, 1),
        the norms of the units that every input channel belongs to. At least float32, on the device of `x`.

    Source: arXiv:2102.06171, section 4; deepmind-research nfnets/optim.py@f5de0ede.

    Examples:
        >>> unitwise_norm(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([[5.],
                [2.]])
    """
    layout = layout_of(x.shape, axis)
    view = layout.view(x)
    if not x.numel():  # torch has no infinity norm of nothing
        norms = x.new_zeros(() if layout.is_single() else layout.sizes(view), dtype=_norm_dtype(x))
    else:
        dim = None if layout.is_single() else layout.reduced(view.ndim)
        norms = _vector_norm(view, norm_type, dim=dim, keepdim=not layout.is_single(), dtype=_norm_dtype(x))
    if layout.blocks:
        norms = norms.expand(-1, x.shape[0] // layout.blocks, *[-1] * (x.ndim - 1)).flatten(0, 1)
    return norms


def adaptive_clip_grad_(
    parameters: Tensor | Iterable[Tensor],
    clip_factor: float = CLIP_FACTOR,
    eps: float = CLIP_EPS,
    norm_type: float = 2.0,
    *,
    axis: Axis = 0,
) -> Tensor:
    """Scale down, in place, the gradient of every unit whose norm exceeds `clip_factor * max(weight norm, eps)`.

    All other gradients stay bit-identical. So does a unit with an infinite entry or NaN: a loss scaler has to see it.
    If a unit's norm overflows float32, CPUs recompute it in float64. Accelerators, compiled code and sharded units do
    not, and leave that unit unchanged. A norm that overflows float64 leaves it unchanged everywhere.

    Parameters without a gradient are skipped. A parameter that is given twice is clipped once. A gradient is first
    replaced by a clone if it shares memory with another one or within itself (`expand`), or if it was made in inference
    mode.

    Parameters sharded over several processes (`fully_shard`, tensor parallelism) are clipped as if they were whole. No
    parameter is gathered. If a unit is spread over processes, its norm costs one all-reduce of one number.

    Args:
        parameters: One parameter or several, on any devices, of any floating dtypes and shapes. `unitwise_norm` says
            what a unit is. Leave the classifier's weight out: the paper does not clip it.
        clip_factor: Largest ratio of gradient norm to weight norm. `math.inf` clips nothing.
        eps: Floor on the weight norm, so that a unit at zero can leave it.
        norm_type: Order of the norm, above 0. `math.inf` takes the largest entry.
        axis: The axis of the output units; `(1, groups)` for transposed convolutions.

    Returns:
        The fraction of units that were clipped, a 0-d tensor on the device of the first gradient; 0 without gradients.
        With sharded parameters, it counts the units of which this process holds a part.

    Raises:
        ValueError: if a setting is out of range, or if a gradient cannot be clipped: it is sparse, not of real floating
            point numbers, or of another shape, device or sharding than its parameter. Nothing is written then.

    Source: arXiv:2102.06171, section 4; deepmind-research nfnets/optim.py@f5de0ede.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))  # one unit of norm 5
        >>> weight.grad = torch.tensor([[0.0, 1.0]])
        >>> _ = adaptive_clip_grad_(weight, clip_factor=0.01)
        >>> weight.grad
        tensor([[0.0000, 0.0500]])
    """
    clip_factor, eps = checked_setting("clip_factor", clip_factor), checked_setting("eps", eps)
    axis = checked_axis(axis)
    order = _number("norm_type", norm_type)
    if not order > 0:  # false for NaN
        raise ValueError(f"norm_type must be above 0, got {norm_type!r}")
    checked = check_gradients(parameters, axis_of=lambda _: axis)
    clone_gradients_(checked.needs_clone)
    settings = Settings(clip_factor, eps, axis)
    clipped = [units.clipped for units in clip_checked_([(checked.parameters, settings)], order)]
    device = _grad(checked.parameters[0]).device if checked.parameters else None
    waits = device is None or device.type == "cpu"  # a copy to the CPU must have arrived before it is read
    hits = sum((mask.sum().to(device, non_blocking=not waits) for mask in clipped), torch.zeros((), device=device))
    return hits / max(1, sum(mask.numel() for mask in clipped))


def checked_setting(name: str, value: Any) -> float:
    """The value as a number. It may be text, as command lines give it.

    Raises:
        ValueError: if it is no number, negative or NaN.
    """
    hint = "; inf clips nothing" if name == "clip_factor" else ""
    number = _number(name, value)
    if not number >= 0:  # false for NaN
        raise ValueError(f"{name} must be zero or positive, got {value!r}{hint}")
    return number


def _number(name: str, value: Any) -> float:
    """The value as a number, NaN if it is none. It may be text, as command lines give it.

    Raises:
        ValueError: if it is a tensor.
    """
    if isinstance(value, Tensor):
        raise ValueError(f"{name} must be a number, got a tensor: every step would wait for its value; use .item()")
    if isinstance(value, bool) or not isinstance(value, (str, Real)):
        return math.nan
    try:  # torch 2.8 does not compile contextlib.suppress
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def clips(clip_factor: Any) -> bool:
    """Whether this setting clips anything. None and infinity clip nothing."""
    return clip_factor is not None and not math.isinf(checked_setting("clip_factor", clip_factor))


class Settings(NamedTuple):
    """How some parameters are clipped."""

    clip_factor: float = CLIP_FACTOR
    eps: float = CLIP_EPS
    axis: Axis = 0


class Units(NamedTuple):
    """Unit norms of some parameters and their gradients. All tensors are (units,), one parameter after the other.

    Of a sharded parameter, these are the units of which this process holds a part.

    Attributes:
        parameters: The parameters.
        counts: Number of units of each parameter.
        weight_norm: The weight norm, at least eps.
        grad_norm: The gradient norm before the clipping.
        limit: The largest gradient norm that is allowed.
        clipped: Whether the gradient norm exceeds the limit. It is False if the gradient is infinite or NaN.
    """

    parameters: list[Tensor]
    counts: list[int]
    weight_norm: Tensor
    grad_norm: Tensor
    limit: Tensor
    clipped: Tensor

    @property
    def ratio(self) -> Tensor:
        """Gradient norm over weight norm. Units above the clip factor are clipped."""
        return self.grad_norm / self.weight_norm

    def pieces(self) -> Iterator["Pieces"]:
        """For each parameter: ratio, gradient norm and `clipped` of its units."""
        values = (self.ratio, self.grad_norm, self.clipped)
        yield from cast("Iterator[Pieces]", zip(*(v.split_with_sizes(self.counts) for v in values), strict=True))


Pieces = tuple[Tensor, Tensor, Tensor]  # ratio, gradient norm and `clipped` of some units


class ClipStats(TypedDict):
    """What was clipped of the units of some parameters.

    Attributes:
        units: Number of units with a gradient.
        zero_grad_units: Number of units whose gradient is exactly zero.
        non_finite_units: Number of units whose gradient is infinite or NaN.
        clipped_fraction: Fraction of the units that was clipped.
        ratio_quantiles: Quantiles of gradient norm over weight norm (at least eps), as {0.05: ..., 0.99: ...}. They
            leave out ratios that are infinite or NaN.
    """

    units: int
    zero_grad_units: int
    non_finite_units: int
    clipped_fraction: float
    ratio_quantiles: dict[float, float]


_Work = tuple[Sequence[Tensor], Settings]  # checked parameters, and how they are clipped


@torch.no_grad()
def clip_checked_(work: Iterable[_Work], norm_type: float = 2.0) -> list[Units]:
    """`adaptive_clip_grad_` without its checks, for any number of settings. All of them share one all-reduce.

    Returns:
        What was measured, in no particular order. Parameters with an infinite clip factor are not measured.
    """
    measured: list[Units] = []
    for shards, units in _measure([each for each in work if not math.isinf(each[1].clip_factor)], norm_type):
        _scale_gradients_(shards, units)
        measured.append(units)
    return measured


@torch.no_grad()
def measure(
    parameters: Sequence[Tensor],
    clip_factor: float,
    eps: float = CLIP_EPS,
    axes: Callable[[Tensor], Axis] | None = None,
) -> list[Units]:
    """What `clip_checked_` would measure of checked parameters. Nothing is written."""
    by_axis: dict[Axis, list[Tensor]] = {}
    for p in parameters:
        by_axis.setdefault(axes(p) if axes else 0, []).append(p)
    work = [(members, Settings(clip_factor, eps, axis)) for axis, members in by_axis.items()]
    return [units for _, units in _measure(work, 2.0)]


def summaries(measured: Iterable[Units], groups: Iterable[Iterable[Tensor]]) -> list[ClipStats]:
    """Statistics of the units of each group of parameters. It waits for an accelerator.

    Returns:
        One row for each group. A group without units in `measured` has 0, 0, 0, 0.0 and {}.
    """
    pieces: dict[int, Pieces] = {}
    for units in measured:
        pieces |= zip(map(id, units.parameters), units.pieces(), strict=True)
    return [summary([pieces[id(p)] for p in parameters if id(p) in pieces]) for parameters in groups]


def summary(found: Sequence["Pieces"]) -> ClipStats:
    """Statistics of the units of some parameters. Only this function here waits for an accelerator."""
    if not found:
        return ClipStats(
            units=0, zero_grad_units=0, non_finite_units=0, clipped_fraction=0.0, ratio_quantiles=dict[float, float]()
        )
    ratio, norm, clipped = (torch.cat([piece.cpu() for piece in pieces]) for pieces in zip(*found, strict=True))
    finite = ratio[ratio.isfinite()]
    at = torch.tensor(_QUANTILES, dtype=ratio.dtype)
    values = finite.quantile(at) if finite.numel() else at[:0]
    return ClipStats(
        units=norm.numel(),
        zero_grad_units=int((norm == 0).sum()),
        non_finite_units=int((~norm.isfinite()).sum()),
        clipped_fraction=clipped.float().mean().item(),
        ratio_quantiles={q: value.item() for q, value in zip(_QUANTILES, values, strict=False)},
    )


def _measure(work: Iterable[_Work], norm_type: float) -> Iterator[tuple[list[Shard], Units]]:
    """The unit norms, chunk by chunk."""
    chunks = [(shards, settings) for parameters, settings in work for shards in _chunks(parameters, settings.axis)]
    # Units in several processes come first and together, so that all of them cost one collective.
    spread = {i: _norms(shards, norm_type) for i, (shards, _) in enumerate(chunks) if shards[0].spread_over}
    spread = reduce_norms(spread, {i: chunks[i][0] for i in spread}, norm_type)
    for i, (shards, settings) in enumerate(chunks):
        weight_norm, grad_norm = spread[i] if i in spread else _norms(shards, norm_type)
        counts = [_count(shard) for shard in shards]
        parameters = [shard.parameter for shard in shards]
        limit = weight_norm.clamp_(min=settings.eps) * settings.clip_factor
        clipped = (grad_norm > limit) & (grad_norm < math.inf)
        yield shards, Units(parameters, counts, weight_norm, grad_norm, limit, clipped)


def _chunks(parameters: Iterable[Tensor], axis: Axis) -> list[list[Shard]]:
    """The parameters in chunks that have device, dtypes, kind of unit and processes in common."""
    chunks: dict[tuple[object, ...], list[Shard]] = {}
    for p in parameters:
        shard = local_shard(p, _grad(p), axis)
        if shard.grad.numel() or shard.blocks is not None:
            dtypes = (shard.grad.dtype, shard.weight.dtype)
            key = (shard.grad.device, *dtypes, _by_kernel(shard), shard.layout.is_single(), shard.spread_over)
            chunks.setdefault(key, []).append(shard)
    return list(chunks.values())


def _by_kernel(shard: Shard) -> bool:
    return shard.blocks is None and takes_kernel(shard.weight, shard.grad, shard.layout)


def _count(shard: Shard) -> int:
    if shard.blocks is not None:
        return shard.layout.blocks * shard.grad.shape[1]
    return shard.layout.count(shard.grad)


def _norms(shards: list[Shard], norm_type: float) -> tuple[Tensor, Tensor]:
    """The weight norms and the gradient norms (units,) of a chunk."""
    weights = [shard.weight for shard in shards]
    grads = [shard.grad for shard in shards]
    if norm_type == 2 and _by_kernel(shards[0]):
        return unit_norms(weights, grads, [_count(shard) for shard in shards])
    return _unit_norms(weights, shards, norm_type), _unit_norms(grads, shards, norm_type)


def _unit_norms(tensors: list[Tensor], shards: list[Shard], norm_type: float) -> Tensor:
    norms = _norms_in(_norm_dtype(tensors[0]), tensors, shards, norm_type)
    # Squares of float32 values above 1e19 overflow. Such gradients need clipping most.
    if not shards[0].spread_over and _reading_is_free(norms) and np.isinf(norms.numpy()).any():
        norms = _norms_in(torch.float64, tensors, shards, norm_type)
    return norms


def _norms_in(dtype: torch.dtype, tensors: list[Tensor], shards: list[Shard], norm_type: float) -> Tensor:
    if shards[0].layout.is_single():
        return torch.stack(torch._foreach_norm(tensors, norm_type, dtype=dtype))  # pyright: ignore
    return torch.cat([_row_norms(dtype, t, shard, norm_type) for t, shard in zip(tensors, shards, strict=True)])


def _row_norms(dtype: torch.dtype, x: Tensor, shard: Shard, norm_type: float) -> Tensor:
    """Norms (units,) of the units of one tensor, which has several."""
    if shard.blocks is not None:
        return _block_norms(dtype, x, shard.blocks, shard.layout.blocks, norm_type)
    norms = _vector_norm(x, norm_type, dim=shard.layout.reduced(x.ndim), dtype=dtype)
    return norms.flatten() if norms.ndim > 1 else norms


def _block_norms(dtype: torch.dtype, x: Tensor, block_of_row: Tensor, blocks: int, norm_type: float) -> Tensor:
    """Norms (blocks * O / groups,) of those parts of all units that these rows hold; 0 for a unit without rows.

    Args:
        dtype: The dtype of the computation.
        x: (rows, O / groups, *K).
        block_of_row: (rows,).
        blocks: Number of blocks.
        norm_type: Order of the norm.
    """
    table = x.new_zeros((blocks, x.shape[1]), dtype=dtype)
    if len(x):
        rows = _kernel_norms(dtype, x.flatten(2), norm_type)
        if math.isinf(norm_type):
            rows = rows.nan_to_num(math.inf, math.inf)  # a maximum may lose NaN, but not infinity
            table.scatter_reduce_(0, block_of_row[:, None].expand_as(rows), rows, "amax")
        else:
            table.index_add_(0, block_of_row, rows.pow(norm_type)).pow_(1 / norm_type)
    return table.flatten()


def _kernel_norms(dtype: torch.dtype, x: Tensor, norm_type: float) -> Tensor:
    """Norms over the last axis of (rows, O / groups, K): (rows, O / groups)."""
    if x.shape[2] == 1:
        return x[..., 0].abs().to(dtype)
    return _vector_norm(x, norm_type, dim=2, dtype=dtype)


def _scale_gradients_(shards: list[Shard], units: Units) -> None:
    """Scale every unit above its limit down to the limit."""
    scale = units.grad_norm.clamp(min=_DIV_EPS)
    torch.div(units.limit, scale, out=scale).masked_fill_(~units.clipped, 1.0)
    if _by_kernel(shards[0]):
        scale_units_([shard.grad for shard in shards], units.counts, scale)
        return
    scales = list(scale.unbind() if shards[0].layout.is_single() else scale.split_with_sizes(units.counts))
    if _reading_is_free(scale):  # skip gradients without a clipped unit: rewriting them costs time
        hit = np.logical_or.reduceat(units.clipped.numpy(), np.cumsum([0, *units.counts[:-1]]))
        shards, scales = list(compress(shards, hit)), list(compress(scales, hit))
    if shards and not shards[0].layout.is_single():
        scales = [_spread(values, shard) for values, shard in zip(scales, shards, strict=True)]
    if shards:
        torch._foreach_mul_([shard.grad for shard in shards], scales)  # pyright: ignore


def _spread(values: Tensor, shard: Shard) -> Tensor:
    """The units' values (units,) in a shape that broadcasts to the gradient."""
    if shard.blocks is not None:
        rows = values.view(shard.layout.blocks, -1)[shard.blocks]
        return rows.view(*rows.shape, *[1] * (shard.grad.ndim - 2))
    return values.view(shard.layout.sizes(shard.grad))


def _reading_is_free(x: Tensor) -> bool:
    """Whether a branch may depend on values: on a CPU nothing waits for them.

    Tensors in a graph that is compiled, and fake tensors, have no values.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) is Tensor


def _norm_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad
