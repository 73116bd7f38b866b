"""Adaptive gradient clipping: the gradient of every output unit is held to a multiple of that unit's weight norm.

timm already has `timm.utils.agc`; this file exists because that one treats every entry of a gain as a unit of its own
(the paper: one unit), makes two full-size temporaries and a dozen operations per parameter, and leaves finding the
classifier to the position of the last two parameters.

Source: arXiv:2102.06171, section 4; deepmind-research nfnets/optim.py@f5de0ede.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
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

# Never acts on its own: a unit is only clipped above clip_factor * eps, 1e-5 by default. It bounds the division for
# callers who set both far lower, exactly as the authors' code does.
_DIV_EPS = 1e-6

_vector_norm = cast(Callable[..., Tensor], torch.linalg.vector_norm)  # pyright: ignore[reportUnknownMemberType]
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def unitwise_norm(x: Tensor, norm_type: float = 2.0, axis: Axis = 0) -> Tensor:
    """Norm of every output unit of a weight or of its gradient.

    Args:
        x: (O, I, K, K), (O, I) or any other shape. With at most one axis longer than 1 it is a single unit.
        norm_type: Order of the norm, `math.inf` included.
        axis: Where the output units lie; `(1, groups)` for transposed convolutions, (I, O / groups, K, K).

    Returns:
        (O, 1, 1, 1) or (O, 1): as many axes as `x`, to which it broadcasts. With groups (I, O / groups, 1, 1): for
        every input channel, the norms of the units that it belongs to. 0-d for a single unit. At least float32, on the
        device of `x`.

    Source: arXiv:2102.06171, section 4; deepmind-research nfnets/optim.py@f5de0ede.

    Examples:
        >>> unitwise_norm(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([[5.],
                [2.]])
    """
    layout = layout_of(x.shape, axis)
    view = layout.view(x)
    if not x.numel():  # torch has no infinity norm of nothing
        norms = x.new_zeros(() if layout.single else layout.sizes(view), dtype=_norm_dtype(x))
    else:
        dim = None if layout.single else layout.reduced(view.ndim)
        norms = _vector_norm(view, norm_type, dim=dim, keepdim=not layout.single, dtype=_norm_dtype(x))
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

    Every other gradient stays bit-identical, and so does every unit with an entry that is not finite: a loss scaler
    has to see it. If a unit's norm overflows float32, CPUs recompute it in float64. Accelerators, compiled code and
    sharded units do not, and leave that unit unchanged; so do all where it overflows float64.
    Parameters without a gradient are skipped, one given twice is clipped once. A gradient that shares memory with
    another one or within itself (`expand`), or was made in inference mode, is replaced by a clone first.

    Parameters sharded over several processes (`fully_shard`, tensor parallelism) are clipped as if they were whole,
    and no parameter is gathered: where a unit is spread over processes, its norm costs one all-reduce of one number.

    Args:
        parameters: One parameter or any number of them, on any devices, of any floating dtypes and shapes (see
            `unitwise_norm` for what is one unit). Leave the classifier's weight out: the paper does not clip it.
        clip_factor: Largest ratio of gradient norm to weight norm; `math.inf` clips nothing.
        eps: Weight norms below this count as this, so that a unit at zero can leave it.
        norm_type: Order of the norm, above 0; `math.inf` for the largest entry.
        axis: Where the output units of these parameters lie; `(1, groups)` for transposed convolutions.

    Returns:
        The fraction of units that were clipped: a 0-d tensor on the device of the first gradient, 0 without gradients.
        With sharded parameters it is that of the units this process holds or has a part of.

    Raises:
        ValueError: A setting outside its range, or a gradient that cannot be clipped, see `check_gradients`. Nothing
            has been written then.

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
    order: Any = norm_type
    if isinstance(order, bool) or not isinstance(order, Real) or not float(order) > 0:
        raise ValueError(f"norm_type must be above 0, got {norm_type!r}")
    checked = check_gradients(parameters, axis_of=lambda _: axis)
    clone_gradients_(checked.needs_clone)
    settings = Settings(clip_factor, eps, axis)
    clipped = [units.clipped for units in clip_checked_([(checked.parameters, settings)], norm_type)]
    device = _grad(checked.parameters[0]).device if checked.parameters else None
    waits = device is None or device.type == "cpu"  # a copy to the CPU must have arrived before it is read
    hits = sum((mask.sum().to(device, non_blocking=not waits) for mask in clipped), torch.zeros((), device=device))
    return hits / max(1, sum(mask.numel() for mask in clipped))


def checked_setting(name: str, value: Any) -> float:
    """The value as a number; numbers as text are numbers, as command lines give them.

    Raises:
        ValueError: It is no number, negative or NaN.
    """
    hint = "; inf clips nothing" if name == "clip_factor" else ""
    if isinstance(value, Tensor):
        raise ValueError(f"{name} must be a number, got a tensor: every step would wait for its value; use .item()")
    number = math.nan
    if not isinstance(value, bool) and isinstance(value, (str, Real)):
        with suppress(ValueError, OverflowError):
            number = float(value)
    if not number >= 0:  # false for NaN
        raise ValueError(f"{name} must be zero or positive, got {value!r}{hint}")
    return number


def clips(clip_factor: Any) -> bool:
    """Whether anything is clipped with this setting: not with None, nor with infinity."""
    return clip_factor is not None and not math.isinf(checked_setting("clip_factor", clip_factor))


class Settings(NamedTuple):
    """How some parameters are clipped."""

    clip_factor: float = CLIP_FACTOR
    eps: float = CLIP_EPS
    axis: Axis = 0


class Units(NamedTuple):
    """Unit norms of some parameters and their gradients, one value per unit, one parameter after the other: (units,).

    Of a sharded parameter these are the units that this process holds or has a part of.
    """

    parameters: list[Tensor]
    counts: list[int]  # units of each parameter
    weight_norm: Tensor  # at least eps
    grad_norm: Tensor  # before the clipping
    limit: Tensor  # of the gradient norm
    clipped: Tensor  # whether it exceeds the limit; never where the gradient is not finite

    @property
    def ratio(self) -> Tensor:
        """Gradient norm over weight norm; the clip factor is its limit."""
        return self.grad_norm / self.weight_norm

    def pieces(self) -> Iterator["Pieces"]:
        """Ratio, gradient norm and whether it is clipped, of the units of one parameter after the other."""
        values = (self.ratio, self.grad_norm, self.clipped)
        yield from cast("Iterator[Pieces]", zip(*(v.split_with_sizes(self.counts) for v in values), strict=True))


Pieces = tuple[Tensor, Tensor, Tensor]


class ClipStats(TypedDict):
    """What was clipped of the units of some parameters.

    `zero_grad_units` have a gradient of exactly zero, `non_finite_units` one that is infinite or NaN. `ratio_quantiles`
    are those of gradient norm over weight norm (at least eps), {0.05: ..., 0.99: ...}. Ratios that are not finite are
    left out.
    """

    units: int
    zero_grad_units: int
    non_finite_units: int
    clipped_fraction: float
    ratio_quantiles: dict[float, float]


Work = tuple[Sequence[Tensor], Settings]  # checked parameters


@torch.no_grad()
def clip_checked_(work: Iterable[Work], norm_type: float = 2.0) -> list[Units]:
    """`adaptive_clip_grad_` after its checks, for any number of settings with one all-reduce between them.

    Returns:
        What was measured, in no particular order; nothing where a clip factor is infinite.
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
    """What `clip_checked_` would see of checked parameters; nothing is written."""
    by_axis: dict[Axis, list[Tensor]] = {}
    for p in parameters:
        by_axis.setdefault(axes(p) if axes else 0, []).append(p)
    work = [(members, Settings(clip_factor, eps, axis)) for axis, members in by_axis.items()]
    return [units for _, units in _measure(work, 2.0)]


def summaries(measured: Iterable[Units], groups: Iterable[Iterable[Tensor]]) -> list[ClipStats]:
    """Statistics of the units of each group of parameters; waits for an accelerator.

    Returns:
        One row a group; without units in `measured` its values are 0, 0, 0, 0.0 and {}.
    """
    pieces: dict[int, Pieces] = {}
    for units in measured:
        pieces |= zip(map(id, units.parameters), units.pieces(), strict=True)
    return [summary([pieces[id(p)] for p in parameters if id(p) in pieces]) for parameters in groups]


def summary(found: Sequence["Pieces"]) -> ClipStats:
    """Statistics of the units of some parameters; the only place here that waits for an accelerator."""
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


def _measure(work: Iterable[Work], norm_type: float) -> Iterator[tuple[list[Shard], Units]]:
    """The unit norms, chunk by chunk: one device, one kind of unit, one dtype of parameters and of gradients each."""
    chunks: list[tuple[list[Shard], Settings]] = []
    for parameters, settings in work:
        groups: dict[tuple[object, ...], list[Shard]] = {}
        for p in parameters:
            shard = local_shard(p, _grad(p), settings.axis)
            kind = _by_kernel(shard), shard.layout.single
            key = (shard.grad.device, shard.grad.dtype, shard.weight.dtype, *kind, shard.spread_over)
            if shard.grad.numel() or shard.blocks is not None:
                groups.setdefault(key, []).append(shard)
        chunks += [(group, settings) for group in groups.values()]
    # Units in several processes first and together, so that all of them cost one collective.
    spread = {i: _norms(shards, norm_type) for i, (shards, _) in enumerate(chunks) if shards[0].spread_over}
    spread = reduce_norms(spread, {i: chunks[i][0] for i in spread}, norm_type)
    for i, (shards, settings) in enumerate(chunks):
        weight_norm, grad_norm = spread[i] if i in spread else _norms(shards, norm_type)
        counts = [_count(shard) for shard in shards]
        parameters = [shard.parameter for shard in shards]
        limit = weight_norm.clamp_(min=settings.eps) * settings.clip_factor
        clipped = (grad_norm > limit) & (grad_norm < math.inf)
        yield shards, Units(parameters, counts, weight_norm, grad_norm, limit, clipped)


def _by_kernel(shard: Shard) -> bool:
    return shard.blocks is None and takes_kernel(shard.weight, shard.grad, shard.layout)


def _count(shard: Shard) -> int:
    if shard.blocks is not None:
        return shard.layout.blocks * shard.grad.shape[1]
    return shard.layout.count(shard.grad)


def _norms(shards: list[Shard], norm_type: float) -> tuple[Tensor, Tensor]:
    """Norms of all units of shards that have device, dtypes and kind of unit in common: (units,) twice."""
    if norm_type == 2 and _by_kernel(shards[0]):
        return unit_norms([s.weight for s in shards], [s.grad for s in shards], [_count(s) for s in shards])
    weight_norm, grad_norm = (
        _unit_norms(tensors, shards, norm_type)
        for tensors in ([shard.weight for shard in shards], [shard.grad for shard in shards])
    )
    return weight_norm, grad_norm


def _unit_norms(tensors: list[Tensor], shards: list[Shard], norm_type: float) -> Tensor:
    norms = _norms_in(_norm_dtype(tensors[0]), tensors, shards, norm_type)
    # Squares of finite float32 values overflow above 1e19, where clipping is needed most.
    if not shards[0].spread_over and _reading_is_free(norms) and np.isinf(norms.numpy()).any():
        norms = _norms_in(torch.float64, tensors, shards, norm_type)
    return norms


def _norms_in(dtype: torch.dtype, tensors: list[Tensor], shards: list[Shard], norm_type: float) -> Tensor:
    if shards[0].layout.single:
        return torch.stack(torch._foreach_norm(tensors, norm_type, dtype=dtype))  # pyright: ignore
    return torch.cat([_row_norms(dtype, t, shard, norm_type) for t, shard in zip(tensors, shards, strict=True)])


def _row_norms(dtype: torch.dtype, x: Tensor, shard: Shard, norm_type: float) -> Tensor:
    """Norms of the units of one tensor, which has several: (units,)."""
    if shard.blocks is not None:
        return _block_norms(dtype, x, shard.blocks, shard.layout.blocks, norm_type)
    norms = _vector_norm(x, norm_type, dim=shard.layout.reduced(x.ndim), dtype=dtype)
    return norms.flatten() if norms.ndim > 1 else norms


def _block_norms(dtype: torch.dtype, x: Tensor, block_of_row: Tensor, blocks: int, norm_type: float) -> Tensor:
    """Norms of the parts that these rows are of all units: (blocks * O / groups,), 0 where no row belongs to a unit."""
    table = x.new_zeros((blocks, x.shape[1]), dtype=dtype)
    if len(x):
        flat = x.flatten(2)
        rows = _vector_norm(flat, norm_type, dim=2, dtype=dtype) if flat.shape[2] > 1 else flat[..., 0].abs().to(dtype)
        if math.isinf(norm_type):
            rows = rows.nan_to_num(math.inf, math.inf)  # a maximum may lose NaN, but not infinity
            table.scatter_reduce_(0, block_of_row[:, None].expand_as(rows), rows, "amax")
        else:
            table.index_add_(0, block_of_row, rows.pow(norm_type)).pow_(1 / norm_type)
    return table.flatten()


def _scale_gradients_(shards: list[Shard], units: Units) -> None:
    """Scale every unit that exceeds its limit down to it."""
    scale = units.grad_norm.clamp(min=_DIV_EPS)
    torch.div(units.limit, scale, out=scale).masked_fill_(~units.clipped, 1.0)
    if _by_kernel(shards[0]):
        scale_units_([shard.grad for shard in shards], units.counts, scale)
        return
    scales = list(scale.unbind() if shards[0].layout.single else scale.split_with_sizes(units.counts))
    if _reading_is_free(scale):  # skip gradients without a clipped unit: rewriting them costs time
        hit = np.logical_or.reduceat(units.clipped.numpy(), np.cumsum([0, *units.counts[:-1]]))
        shards, scales = list(compress(shards, hit)), list(compress(scales, hit))
    if shards and not shards[0].layout.single:
        scales = [_spread(values, shard) for values, shard in zip(scales, shards, strict=True)]
    if shards:
        torch._foreach_mul_([shard.grad for shard in shards], scales)  # pyright: ignore


def _spread(values: Tensor, shard: Shard) -> Tensor:
    """One value for every unit, shaped so that it broadcasts to the gradient."""
    if shard.blocks is not None:
        rows = values.view(shard.layout.blocks, -1)[shard.blocks]
        return rows.view(*rows.shape, *[1] * (shard.grad.ndim - 2))
    return values.view(shard.layout.sizes(shard.grad))


def _reading_is_free(x: Tensor) -> bool:
    """Whether a branch may depend on values: only on a CPU, where nothing waits, and of tensors that have values.

    A graph that is traced has none, and neither has a `FakeTensor`.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) is Tensor


def _norm_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad
