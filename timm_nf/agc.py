"""Adaptive gradient clipping: the gradient of every output unit is held to a multiple of that unit's weight norm.

timm already has `timm.utils.agc`; this file exists because that one treats every entry of a gain as a unit of its own
(the paper: one unit), makes two full-size temporaries and a dozen operations per parameter, and leaves finding the
classifier to the position of the last two parameters.

Source: arXiv:2102.06171, section 4; deepmind-research nfnets/optim.py@f5de0ede.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from itertools import compress
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

# Never acts on its own: a unit is only clipped above clip_factor * eps, 1e-5 by default. It bounds the division for
# callers who set both far lower, exactly as the authors' code does.
_DIV_EPS = 1e-6

# A gradient that was just read for its norm is still in the CPU's last-level cache when it is scaled, if no more than
# this was read in between. NFNet-F0 on two cores with 32 MiB of it: 30 to 32 ms with 8 or 16 MiB, 35 ms without
# a limit; less than that only adds operations.
_CPU_CHUNK_BYTES = 16 * 2**20

_vector_norm = cast(Callable[..., Tensor], torch.linalg.vector_norm)  # pyright: ignore[reportUnknownMemberType]
_GAINS = ("gain", "skipinit_gain")


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

    Every other gradient stays bit-identical, and so does every unit whose gradient norm is not finite: a loss scaler
    has to see it. Parameters without a gradient are skipped, one given twice is clipped once. On accelerators nothing
    waits for the device.

    Args:
        parameters: One parameter or any number of them, on any devices, of any floating dtypes and shapes (see
            `unitwise_norm` for what is one unit). Leave the classifier's weight out: the paper does not clip it.
        clip_factor: Largest ratio of gradient norm to weight norm; `math.inf` clips nothing.
        eps: Weight norms below this count as this, so that a unit at zero can leave it.
        norm_type: Order of the norm.

    Returns:
        The fraction of units that were clipped: a 0-d tensor on the device of the first gradient, 0 without gradients.

    Raises:
        ValueError: A negative or NaN factor or eps, or a gradient that is sparse, complex or on another device than
            its parameter. Nothing has been written then.

    Source: arXiv:2102.06171, section 4; deepmind-research nfnets/optim.py@f5de0ede.
    """
    check_setting("clip_factor", clip_factor)
    check_setting("eps", eps)
    return clip_checked_(parameters_with_gradient(parameters), clip_factor, eps, norm_type)


def check_setting(name: str, value: float) -> None:
    """Raise a ValueError that names the setting if its value is negative or NaN."""
    if not value >= 0:  # also true for NaN
        raise ValueError(f"{name} must be zero or positive, got {value}; a clip factor of math.inf clips nothing")


def parameters_with_gradient(parameters: Tensor | Iterable[Tensor], where: str = "") -> list[Tensor]:
    """The distinct parameters that have something to clip, in the order given; `where` opens the error messages.

    Raises:
        ValueError: A gradient is sparse, complex or on another device than its parameter.
    """
    distinct: dict[int, Tensor] = {}
    for index, p in enumerate([parameters] if isinstance(parameters, Tensor) else parameters):
        g = p.grad
        if g is None:
            continue
        problem = None
        if g.layout != torch.strided:
            problem = f"a sparse gradient ({g.layout}); adaptive clipping needs dense ones, use sparse=False"
        elif g.is_complex():
            problem = f"a complex gradient ({g.dtype}); adaptive clipping is defined for real parameters only"
        elif g.device != p.device:
            problem = f"its gradient on {g.device} but itself lies on {p.device}; move one to the other"
        if problem:
            raise ValueError(f"{where}parameter {index} of shape {tuple(p.shape)} has {problem}")
        if g.numel():
            distinct[id(p)] = p
    return list(distinct.values())


@torch.no_grad()
def clip_checked_(parameters: Sequence[Tensor], clip_factor: float, eps: float, norm_type: float = 2.0) -> Tensor:
    """`adaptive_clip_grad_` after its checks, so that a caller with several settings can check all before writing."""
    if not parameters or math.isinf(clip_factor):
        return torch.zeros((), device=_grad(parameters[0]).device if parameters else None)
    groups: dict[tuple[object, ...], list[Tensor]] = {}
    for p in parameters:
        g = _grad(p)
        groups.setdefault((g.device, g.dtype, p.dtype, _is_single_unit(p)), []).append(p)
    chunks = [chunk for group in groups.values() for chunk in _chunks(group)]
    device = _grad(parameters[0]).device
    clipped, units = torch.zeros((), device=device), 0
    for chunk in chunks:
        mask = _clip_chunk_(chunk, clip_factor, eps, norm_type)
        clipped += mask.sum().to(device, non_blocking=True)
        units += mask.numel()
    return clipped / units


def _clip_chunk_(parameters: list[Tensor], clip_factor: float, eps: float, norm_type: float) -> Tensor:
    """Clip gradients of one device, one dtype and one kind of unit; returns which units were clipped, (units,)."""
    grads = [_grad(p) for p in parameters]
    limit = _unit_norms(parameters, norm_type).clamp_(min=eps).mul_(clip_factor)
    norm = _unit_norms(grads, norm_type)
    mask = (norm > limit) & (norm < math.inf)  # the first comparison is already false for NaN
    scale = torch.where(mask, limit / norm.clamp_(min=_DIV_EPS), 1.0)
    single = _is_single_unit(parameters[0])
    sizes = [1 if single else len(g) for g in grads]
    scales = list(scale.unbind() if single else scale.split_with_sizes(sizes))
    if scale.device.type == "cpu":  # where reading a value is free, and writing a gradient that stays the same is not
        hit = np.logical_or.reduceat(mask.numpy(), np.cumsum([0, *sizes[:-1]]))
        grads, scales = list(compress(grads, hit)), list(compress(scales, hit))
    if not single:
        scales = [rows.view(-1, *[1] * (g.ndim - 1)) for rows, g in zip(scales, grads, strict=True)]
    if grads:
        torch._foreach_mul_(grads, scales)  # pyright: ignore
    return mask


def _unit_norms(tensors: list[Tensor], norm_type: float) -> Tensor:
    """Norms of all units of tensors that share device, dtype and kind of unit, one after the other: (units,)."""
    dtype = _norm_dtype(tensors[0])
    if _is_single_unit(tensors[0]):
        return torch.stack(torch._foreach_norm(tensors, norm_type, dtype=dtype))  # pyright: ignore
    return torch.cat([_vector_norm(t, norm_type, dim=tuple(range(1, t.ndim)), dtype=dtype) for t in tensors])


def _chunks(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters in runs of at most `_CPU_CHUNK_BYTES` of gradients (at least one); on accelerators one run."""
    chunk: list[Tensor] = []
    size = 0
    for p in parameters:
        size += p.nbytes
        if chunk and size > _CPU_CHUNK_BYTES and p.device.type == "cpu":
            yield chunk
            chunk, size = [], p.nbytes
        chunk.append(p)
    yield chunk


def classifier_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the classifier, found through the model: the only ones that adaptive clipping leaves alone.

    Looks inside DistributedDataParallel, torch.compile, timm's EMA, task and distillation wrappers (the student, never
    the teacher). The classifier is what timm's `get_classifier()` returns, a tuple of heads included; for models
    without that method it is what `pretrained_cfg["classifier"]` names. Where `get_classifier()` returns several layers
    as one head (MetaFormer's), that name also says which of them is the last.

    Returns:
        Every parameter called `weight`, with at least two axes, inside the classifier; empty if there is none.
    """
    model = innermost(model)
    named = _named_classifier(model)
    get_classifier = getattr(model, "get_classifier", None)
    found: Any = get_classifier() if callable(get_classifier) else named
    last_layers = {id(p) for module in named for p in module.parameters()}
    weights: list[nn.Parameter] = []
    for head in cast(Iterable[Any], found) if isinstance(found, (tuple, list, nn.ModuleList)) else [found]:
        inside = head.named_parameters() if isinstance(head, nn.Module) else ()
        inside = [p for name, p in inside if _last_piece(name) == "weight" and p.ndim >= 2]
        weights += [p for p in inside if id(p) in last_layers] or inside
    return weights


def undecayed_names(model: nn.Module, named_in: nn.Module) -> set[str]:
    """Names of the parameters that never decay: what `no_weight_decay()` lists, gains and skip gains.

    Args:
        model: Any model, wrapped or not.
        named_in: The module whose names are wanted: the model itself, or a wrapper around it or inside it.
    """
    inner = innermost(model)
    listed = getattr(inner, "no_weight_decay", set[str])()
    wanted = {
        id(p)
        for name, p in inner.named_parameters()
        if _last_piece(name) in _GAINS or any(fnmatch(name, pattern) for pattern in listed)
    }
    return {name for name, p in named_in.named_parameters() if id(p) in wanted}


def param_groups_agc(model: nn.Module, weight_decay: float = 2e-5) -> list[dict[str, Any]]:
    """Parameter groups with the paper's policy, by name.

    Gains, biases, skip gains and all other parameters with at most one axis, and those that the model lists in
    `no_weight_decay()`, are clipped and do not decay. The classifier's weight decays and is not clipped. All others
    decay and are clipped. Frozen parameters are left out, and so are empty groups.

    Args:
        model: Any model, wrapped or not; see `classifier_weights` for how the classifier is found.
        weight_decay: The paper's 2e-5 for NFNets at any batch size.

    Returns:
        Groups with `params` and `weight_decay`; `clip_factor=None` marks those that are not clipped.

    Source: arXiv:2102.06171, section 4 and A.1; deepmind-research nfnets/experiment_nfnets.py@f5de0ede.
    """
    exempt = {id(p) for p in classifier_weights(model)}
    undecayed = undecayed_names(model, named_in=model)
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decays = not (p.ndim <= 1 or _last_piece(name) == "bias" or name in undecayed)
        clipped = id(p) not in exempt
        group = groups.setdefault((decays, clipped), {"params": [], "weight_decay": weight_decay if decays else 0.0})
        if not clipped:
            group["clip_factor"] = None
        group["params"].append(p)
    return [groups[key] for key in sorted(groups, key=lambda key: (not key[1], key[0]))]


def innermost(model: nn.Module) -> nn.Module:
    """The model inside DDP, torch.compile, EMA, timm task and distillation wrappers, in any order."""
    return list(wrappers(model))[-1]


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """The model as given, then what it wraps, down to the network itself."""
    yield model
    # A compiled module forwards every attribute to the one inside, so that one goes first.
    compiled = getattr(model, "_orig_mod", None)
    if compiled is not None:
        yield from wrappers(compiled)
    elif not hasattr(model, "get_classifier"):
        # timm's tasks, its distillation student, and what DDP, DataParallel, FSDP1 and ModelEmaV2/V3 call theirs.
        for attribute in ("trainable_module", "student", "module"):
            inner = getattr(model, attribute, None)
            if isinstance(inner, nn.Module):
                yield from wrappers(inner)
                return


def _named_classifier(model: nn.Module) -> list[nn.Module]:
    config = getattr(model, "pretrained_cfg", None)
    names = cast(dict[str, Any], config).get("classifier") if isinstance(config, dict) else None
    modules = {name: module for name, module in cast("Iterator[tuple[str, nn.Module]]", model.named_modules())}
    return [modules[name] for name in ([names] if isinstance(names, str) else names or ()) if name in modules]


def _last_piece(name: str) -> str:
    return name.rpartition(".")[2]


def _is_single_unit(x: Tensor) -> bool:
    return sum(n > 1 for n in x.shape) <= 1


def _norm_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad
