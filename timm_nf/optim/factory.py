"""The `agc` names in timm's optimizer registry, and our clipping behind timm's `--clip-mode agc`.

Examples:
    >>> unregister()
    []
    >>> "agcsgd" in timm.optim.list_optimizers()
    False
    >>> register()
    >>> "agcsgd" in timm.optim.list_optimizers()
    True
"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
# timm offers no other way to its registry, and re-exports without saying so.

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, cast

import timm.utils
import torch
from timm.optim import Lookahead, OptimInfo, param_groups_layer_decay, param_groups_weight_decay
from timm.optim import _optim_factory as factory
from torch import nn

from .._clip_defaults import CLIP_FACTOR
from .._wrappers import wrappers
from . import agc
from .exempt import SettledGroups, exemption_of, split_group, tensor, warn_caller
from .groups import network_of, undecayed_names
from .optimizer import AdaptiveClipping, agc_class, as_groups
from .units import unit_axes

__all__ = ["register", "unregister"]

_PREFIX = "agc"


class _Installed(NamedTuple):
    """An attribute of timm that is ours now."""

    owner: Any
    name: str
    original: Any  # None where the owner had none of its own
    ours: Any


_installed: list[_Installed] = []


def register() -> None:
    """Add the `agc` names to timm's optimizer registry, and our clip function to timm's clip mode. Safe to repeat."""
    # The one place that reaches into timm's private module: an optimizer class is handed parameter groups without
    # names or model, so who is clipped has to be settled where the factory still has the model.
    registry = factory.default_registry
    _wrap(registry, "get_optimizer_info", _get_optimizer_info)
    _wrap(registry, "get_optimizer_class", _get_optimizer_class)
    _wrap(registry, "create_optimizer", _create_optimizer)
    for name, info in list(registry._optimizers.items()):
        # timm's filters `fused*` and `bnb*`, of apex and bitsandbytes, would not match `agcfused...`.
        if not name.startswith(_PREFIX) and not isinstance(info.opt_class, str):
            registry._optimizers[_PREFIX + name] = registry.get_optimizer_info(_PREFIX + name)
    for module in (timm.utils, timm.utils.agc, timm.utils.clip_grad):
        _install(module, "adaptive_clip_grad", agc.adaptive_clip_grad_)
    _install(Lookahead, "clip_stats", property(_stats_of_the_inner_one))


def unregister() -> list[str]:
    """Undo what `register` did; optimizers that exist go on working.

    Returns:
        What stays, as somebody has put something else in its place since: `"module.name"` each. A warning says so too.
    """
    left: list[str] = []
    while _installed:
        owner, name, original, ours = _installed.pop()
        if cast(dict[str, Any], vars(owner)).get(name) is not ours:
            where = owner.__name__ if hasattr(owner, "__name__") else type(owner).__name__
            left.append(f"{where}.{name}")
        elif original is None:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
    optimizers = factory.default_registry._optimizers
    for name in [name for name in optimizers if _bare_name(name) is not None]:
        del optimizers[name]
    warn_of(left)
    return left


def warn_of(left: list[str]) -> None:
    """Name on the caller's line what stays in timm after undoing, if anything does."""
    if left:
        warn_caller(f"{', '.join(left)}: replaced by others since timm_nf was imported, so these stay as they are")


def _install(owner: Any, name: str, ours: Any) -> None:
    """Put an attribute of ours in an owner's place; nothing is done where somebody else has replaced ours since."""
    current: Any = cast(dict[str, Any], vars(owner)).get(name)
    before = next((record for record in _installed if record.owner is owner and record.name == name), None)
    if before is not None:
        if current is not before.original:  # ours, or somebody else's
            return
        _installed.remove(before)
    _installed.append(_Installed(owner, name, current, ours))
    setattr(owner, name, ours)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Put `wrapper(original, ...)` in front of an owner's method.

    Where somebody else has wrapped ours and we have been undone since, what is left of ours does nothing.
    """
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if any(record.ours is wrapped for record in _installed):
            return wrapper(original, *args, **kwargs)
        return original(*args, **kwargs)

    _install(owner, name, wrapped)


def _bare_name(name: str) -> str | None:
    """'agcsgd' -> 'sgd' if timm knows that one; None for every name that is not ours."""
    bare = name.lower().removeprefix(_PREFIX)
    known = factory.default_registry._optimizers
    return bare if name.lower().startswith(_PREFIX) and bare in known and not bare.startswith(_PREFIX) else None


def _get_optimizer_info(original: Callable[..., OptimInfo], name: str) -> OptimInfo:
    bare = _bare_name(name)
    if bare is None:
        return original(name)
    info = original(bare)
    opt_class = info.opt_class if isinstance(info.opt_class, str) else agc_class(cast(Any, info.opt_class))
    description = f"{info.description}, behind adaptive gradient clipping (AGC)"
    return replace(info, name=_PREFIX + info.name, opt_class=opt_class, description=description)


def _get_optimizer_class(
    original: Callable[..., Any], name_or_info: str | OptimInfo, bind_defaults: bool = True
) -> Any:
    info = name_or_info
    if isinstance(info, str):
        info = factory.default_registry.get_optimizer_info(info)
    if _bare_name(info.name) is not None and isinstance(info.opt_class, str):
        # timm imports the bare class, or says in its own words what is missing
        info = replace(info, opt_class=agc_class(original(info, bind_defaults=False)))
    return original(info, bind_defaults=bind_defaults)


def _create_optimizer(
    original: Callable[..., torch.optim.Optimizer], model_or_params: Any, opt: str, *args: Any, **kwargs: Any
) -> torch.optim.Optimizer:
    """Do what timm's factory does; for `agc` names and a model, exempt the classifier's weight and decay no gain.

    With plain parameters or groups instead of a model, the optimizer itself settles who is exempt.
    """
    if _bare_name(opt.split("_")[-1]) is None or not isinstance(model_or_params, nn.Module):
        return original(model_or_params, opt, *args, **kwargs)
    model = model_or_params
    clip_exempt = kwargs.pop("clip_exempt", None)
    call = inspect.signature(original).bind(model, opt, *args, **kwargs)
    call.apply_defaults()
    bare, groups = _groups(model, call.arguments)
    if not isinstance(groups, SettledGroups) or clip_exempt is not None:
        stated = any("clip_factor" in group for group in groups) or not agc.clips(
            kwargs.get("clip_factor", CLIP_FACTOR)
        )
        given = {id(tensor(entry)) for group in groups for entry in group["params"]}
        exemption = exemption_of(model, clip_exempt, given, warns=not stated)
        exempt = {id(p) for p in exemption.parameters()}
        groups = SettledGroups(_split(groups, exempt, unit_axes(model)), exemption)
    call.arguments["model_or_params"] = groups
    optimizer = original(*call.args, **call.kwargs)
    clipping = cast(Any, optimizer)._base_optimizer if isinstance(optimizer, Lookahead) else optimizer
    assert isinstance(clipping, AdaptiveClipping)
    names = {id(p): name for name, p in model.named_parameters()}
    clipping.remember(names, [[tensor(entry) for entry in group["params"]] for group in bare])
    return optimizer


def _stats_of_the_inner_one(lookahead: Any) -> Callable[[], list[agc.ClipStats] | None]:
    """`clip_stats` of the optimizer inside timm's Lookahead, which forwards no attributes; none if that has none."""
    return lookahead._base_optimizer.clip_stats


def _groups(model: nn.Module, options: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The parameter groups that timm makes for the bare optimizer, and those with gains spared the decay as well.

    Takes the factory's arguments and, like the factory, clears the decay that the groups now carry.
    """
    if options["param_group_fn"]:
        made = options["param_group_fn"](model)
        groups = as_groups(made)
        return groups, (SettledGroups(groups, made.exemption) if isinstance(made, SettledGroups) else groups)
    # Names, no_weight_decay() and group_matcher() belong to the network, but a wrapper may own parameters besides it.
    trainable = _trainable(model)
    candidates = [*wrappers(model), network_of(model)]
    owner = [module for module in candidates if _trainable(module) == trainable][-1]
    by_layer = options["layer_decay"] is not None
    build: Any = param_groups_layer_decay if by_layer else param_groups_weight_decay
    renamed = {"min_scale": "layer_decay_min_scale", "no_opt_scale": "layer_decay_no_opt_scale"}
    wanted = {name: renamed.get(name, name) for name in inspect.signature(build).parameters}
    accepted = {name: options[option] for name, option in wanted.items() if option in options}
    groups: list[dict[str, Any]] = build(owner, **accepted, no_weight_decay_list=undecayed_names(model, owner))
    # timm's factory asks the object it is given; layers it can only tell apart in the network itself
    given = owner if by_layer else model
    listed = getattr(given, "no_weight_decay", set[str])()
    bare: list[dict[str, Any]] = build(given, **accepted, no_weight_decay_list=listed)
    options["weight_decay"] = 0.0
    return bare, groups


def _split(groups: list[dict[str, Any]], exempt: set[int], axes: dict[int, Any]) -> list[dict[str, Any]]:
    """The groups with exempt weights in ones of their own, unclipped, right after those they were in.

    So that every other group has one axis of the units, those are split by it as well, unless they state one.
    """
    split: list[dict[str, Any]] = []
    for group in groups:
        keep_axis = "clip_axis" in group
        parts = split_group(group, lambda p, k=keep_axis: (id(p) in exempt, 0 if k else axes.get(id(p), 0)))
        exempted: list[Any] = []
        for (is_exempt, axis), part in parts:
            if is_exempt:
                exempted += part["params"]
            else:
                split.append(part if axis == 0 else {**part, "clip_axis": axis})
        if exempted:
            split.append({**group, "params": exempted, "clip_factor": None})
        if not parts:
            split.append(group)
    return split


def _trainable(model: nn.Module) -> set[int]:
    return {id(p) for p in model.parameters() if p.requires_grad}
