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
# timm's registry is private, and timm re-exports names without saying so.

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, cast

import timm.utils
import torch
from timm.optim import Lookahead, OptimInfo, param_groups_layer_decay, param_groups_weight_decay
from timm.optim._optim_factory import default_registry
from torch import nn

from .._clip_defaults import CLIP_FACTOR
from .._wrappers import wrappers
from . import agc
from .exempt import Exempt, SettledGroups, exemption_of, split_group, tensor, warn_caller
from .groups import network_of, undecayed_names
from .optimizer import AdaptiveClipping, agc_class, as_groups
from .units import Axis, unit_axes

__all__ = ["register", "unregister"]

_PREFIX = "agc"


class _Installed(NamedTuple):
    """An attribute of timm that we have replaced."""

    owner: Any
    name: str
    original: Any  # None where the owner had none of its own
    ours: Any


_installed: list[_Installed] = []


def register() -> None:
    """Add the `agc` names to timm's optimizer registry, and our clip function to timm's clip mode. Safe to repeat."""
    # An optimizer class gets parameter groups without names or model. Who is clipped must be settled before, where
    # timm's factory still has the model. The registry is the only way to it, and timm keeps it private.
    _wrap(default_registry, "get_optimizer_info", _get_optimizer_info)
    _wrap(default_registry, "get_optimizer_class", _get_optimizer_class)
    _wrap(default_registry, "create_optimizer", _create_optimizer)
    for name, info in list(default_registry._optimizers.items()):
        # Names of apex and bitsandbytes: timm's filters `fused*` and `bnb*` would not match `agcfused...`.
        if not name.startswith(_PREFIX) and not isinstance(info.opt_class, str):
            default_registry._optimizers[_PREFIX + name] = default_registry.get_optimizer_info(_PREFIX + name)
    for module in (timm.utils, timm.utils.agc, timm.utils.clip_grad):
        _install(module, "adaptive_clip_grad", agc.adaptive_clip_grad_)
    _install(Lookahead, "clip_stats", property(_stats_of_the_inner_one))


def unregister() -> list[str]:
    """Undo what `register` did. Optimizers that exist go on working.

    Returns:
        The attributes, `"module.name"`, that somebody else has replaced since. They stay. A warning names them too.
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
    optimizers = default_registry._optimizers
    for name in [name for name in optimizers if _bare_name(name) is not None]:
        del optimizers[name]
    warn_of(left)
    return left


def warn_of(left: list[str]) -> None:
    """Warn at the caller's line of attributes that stay in timm, if there are any."""
    if left:
        warn_caller(f"{', '.join(left)}: replaced by others since timm_nf was imported, so these stay as they are")


def _install(owner: Any, name: str, ours: Any) -> None:
    """Replace an attribute of an owner by ours, unless somebody else has replaced ours since."""
    current: Any = cast(dict[str, Any], vars(owner)).get(name)
    before = next((record for record in _installed if record.owner is owner and record.name == name), None)
    if before is not None:
        if current is not before.original:  # ours, or somebody else's
            return
        _installed.remove(before)
    _installed.append(_Installed(owner, name, current, ours))
    setattr(owner, name, ours)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace an owner's method by `wrapper(original, ...)`.

    Somebody else may have wrapped our method and still call it after `unregister`. It then only calls the original.
    """
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if any(record.ours is wrapped for record in _installed):
            return wrapper(original, *args, **kwargs)
        return original(*args, **kwargs)

    _install(owner, name, wrapped)


def _bare_name(name: str) -> str | None:
    """'agcsgd' -> 'sgd', if timm has that optimizer; None for every name that is not ours."""
    lower = name.lower()
    if not lower.startswith(_PREFIX):
        return None
    bare = lower.removeprefix(_PREFIX)
    is_known = bare in default_registry._optimizers and not bare.startswith(_PREFIX)
    return bare if is_known else None


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
        info = default_registry.get_optimizer_info(info)
    if _bare_name(info.name) is not None and isinstance(info.opt_class, str):
        # timm imports the bare class, or says in its own words what is missing
        info = replace(info, opt_class=agc_class(original(info, bind_defaults=False)))
    return original(info, bind_defaults=bind_defaults)


def _create_optimizer(
    original: Callable[..., torch.optim.Optimizer], model_or_params: Any, opt: str, *args: Any, **kwargs: Any
) -> torch.optim.Optimizer:
    """Do what timm's factory does. For `agc` names and a model, exempt the classifier's weight and decay no gain.

    With plain parameters or groups in place of a model, the optimizer itself settles who is exempt.
    """
    if _bare_name(opt.split("_")[-1]) is None or not isinstance(model_or_params, nn.Module):
        return original(model_or_params, opt, *args, **kwargs)
    model = model_or_params
    clip_exempt = kwargs.pop("clip_exempt", None)
    call = inspect.signature(original).bind(model, opt, *args, **kwargs)
    call.apply_defaults()
    bare, groups = _groups(model, call.arguments)
    if not isinstance(groups, SettledGroups) or clip_exempt is not None:
        groups = _settled_groups(model, groups, clip_exempt, kwargs.get("clip_factor", CLIP_FACTOR))
    call.arguments["model_or_params"] = groups
    optimizer = original(*call.args, **call.kwargs)
    clipping = cast(Any, optimizer)._base_optimizer if isinstance(optimizer, Lookahead) else optimizer
    assert isinstance(clipping, AdaptiveClipping)
    names = {id(p): name for name, p in model.named_parameters()}
    clipping.remember(names, [[tensor(entry) for entry in group["params"]] for group in bare])
    return optimizer


def _settled_groups(
    model: nn.Module, groups: list[dict[str, Any]], clip_exempt: Exempt | None, clip_factor: Any
) -> SettledGroups:
    """The groups split by who is clipped. It warns of a missing classifier, unless the groups say who is clipped."""
    is_stated = any("clip_factor" in group for group in groups)
    given = {id(tensor(entry)) for group in groups for entry in group["params"]}
    exemption = exemption_of(model, clip_exempt, given, warns=not is_stated and agc.clips(clip_factor))
    exempt = {id(p) for p in exemption.parameters()}
    return SettledGroups(_split(groups, exempt, unit_axes(model)), exemption)


def _stats_of_the_inner_one(lookahead: Any) -> Callable[[], list[agc.ClipStats] | None]:
    """`clip_stats` of the optimizer inside timm's Lookahead. Lookahead itself forwards no attributes.

    Raises:
        AttributeError: if the inner optimizer does not clip.
    """
    return lookahead._base_optimizer.clip_stats


def _groups(model: nn.Module, options: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The parameter groups that timm makes for the bare optimizer, and those in which gains do not decay either.

    Args:
        model: The model, wrapped or not.
        options: The factory's arguments. Its decay is set to 0, as the factory does: the groups carry it now.
    """
    if options["param_group_fn"]:
        made = options["param_group_fn"](model)
        groups = as_groups(made)
        if isinstance(made, SettledGroups):
            return groups, SettledGroups(groups, made.exemption)
        return groups, groups
    owner = _owner(model)
    by_layer = options["layer_decay"] is not None
    build: Any = param_groups_layer_decay if by_layer else param_groups_weight_decay
    renamed = {"min_scale": "layer_decay_min_scale", "no_opt_scale": "layer_decay_no_opt_scale"}
    wanted = {name: renamed.get(name, name) for name in inspect.signature(build).parameters}
    accepted = {name: options[option] for name, option in wanted.items() if option in options}
    groups: list[dict[str, Any]] = build(owner, **accepted, no_weight_decay_list=undecayed_names(model, owner))
    # timm's factory asks the given object for no_weight_decay(). Only the network itself can tell its layers apart.
    given = owner if by_layer else model
    listed = getattr(given, "no_weight_decay", set[str])()
    bare: list[dict[str, Any]] = build(given, **accepted, no_weight_decay_list=listed)
    options["weight_decay"] = 0.0
    return bare, groups


def _owner(model: nn.Module) -> nn.Module:
    """The innermost module that owns all trainable parameters of the model.

    Names, `no_weight_decay()` and `group_matcher()` belong to the network. A wrapper may own parameters besides it.
    """
    trainable = _trainable(model)
    candidates = [*wrappers(model), network_of(model)]
    return [module for module in candidates if _trainable(module) == trainable][-1]


def _split(groups: list[dict[str, Any]], exempt: set[int], axes: dict[int, Axis]) -> list[dict[str, Any]]:
    """Split groups by who is exempt and by the axis of the units.

    The exempt weights of a group follow it in an unclipped group. A group that states its axis keeps it.
    """
    split: list[dict[str, Any]] = []
    for group in groups:
        known_axes = {} if "clip_axis" in group else axes
        parts = split_group(group, lambda p, known=known_axes: (id(p) in exempt, known.get(id(p), 0)))
        exempted: list[Any] = []
        for (is_exempt, axis), part in parts:
            if is_exempt:
                exempted += part["params"]
                continue
            if axis != 0:
                part["clip_axis"] = axis
            split.append(part)
        if exempted:
            split.append({**group, "params": exempted, "clip_factor": None})
        if not parts:
            split.append(group)
    return split


def _trainable(model: nn.Module) -> set[int]:
    return {id(p) for p in model.parameters() if p.requires_grad}
