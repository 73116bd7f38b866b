"""The `agc` names in timm's optimizer registry, and our clipping behind timm's `--clip-mode agc`."""

import functools
import inspect
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import timm.utils
import torch
from timm.optim import Lookahead, OptimInfo, param_groups_layer_decay, param_groups_weight_decay
from timm.optim import _optim_factory as factory
from torch import Tensor, nn

from .._wrappers import wrappers
from . import agc
from .groups import classifier_weights, undecayed_names
from .optimizer import agc_class

_PREFIX = "agc"
_CLIP_MODES = ("norm", "value", "agc")  # of timm 1.0.31; a test compares them with its source


def register() -> None:
    """Add the `agc` names to timm's optimizer registry, and our clip function to timm's clip mode. Safe to repeat."""
    # The one place that reaches into timm's private module: an optimizer class is handed parameter groups without
    # names or model, so who is clipped has to be settled where the factory still has the model.
    registry = factory.default_registry
    _wrap(registry, "get_optimizer_info", _get_optimizer_info)
    _wrap(registry, "get_optimizer_class", _get_optimizer_class)
    _wrap(registry, "create_optimizer", _create_optimizer)
    for name, info in list(registry._optimizers.items()):
        # apex and bitsandbytes are named by a string; timm lists them under patterns that our prefix would escape.
        if not name.startswith(_PREFIX) and not isinstance(info.opt_class, str):
            registry._optimizers[_PREFIX + name] = registry.get_optimizer_info(_PREFIX + name)
    for module in (timm.utils, timm.utils.agc, timm.utils.clip_grad):
        vars(module)["adaptive_clip_grad"] = agc.adaptive_clip_grad_
    before = timm.utils.clip_grad.dispatch_clip_grad
    _wrap(timm.utils.clip_grad, "dispatch_clip_grad", _dispatch_clip_grad)
    for module in (timm.utils, timm.utils.cuda):
        if module.dispatch_clip_grad is before:  # and not somebody else's by now
            vars(module)["dispatch_clip_grad"] = timm.utils.clip_grad.dispatch_clip_grad


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Put `wrapper(original, ...)` in front of an owner's function, in place of an earlier one of ours.

    Where somebody else has wrapped ours since, it stays inside, and nothing is done.
    """
    current = getattr(owner, name)
    original = getattr(current, "_timm_nf_original", current)
    if original is not current and current._timm_nf_wrapped() is not current:  # copied by functools.wraps
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped._timm_nf_original = original  # type: ignore[attr-defined]
    wrapped._timm_nf_wrapped = weakref.ref(wrapped)  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _dispatch_clip_grad(
    original: Callable[..., None], parameters: Any, value: float, mode: str = "norm", *args: Any, **kwargs: Any
) -> None:
    """Do what timm's function behind `--clip-mode` does; it only asserts, so not under -O, that it knows the mode."""
    if mode not in _CLIP_MODES:
        raise ValueError(f"unknown clip mode {mode!r}; timm's --clip-mode is one of {', '.join(_CLIP_MODES)}")
    original(parameters, value, mode, *args, **kwargs)


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
    opt_class = info.opt_class if isinstance(info.opt_class, str) else agc_class(info.opt_class)
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

    With plain parameters or groups instead of a model nothing is exempt: they carry no names.
    """
    if _bare_name(opt.split("_")[-1]) is None:
        return original(model_or_params, opt, *args, **kwargs)
    if not isinstance(model_or_params, nn.Module):
        return _with_stats(original(model_or_params, opt, *args, **kwargs))
    call = inspect.signature(original).bind(model_or_params, opt, *args, **kwargs)
    call.apply_defaults()
    bare, groups = _groups(model_or_params, call.arguments)
    call.arguments["model_or_params"] = _split_classifier(groups, classifier_weights(model_or_params))
    optimizer = original(*call.args, **call.kwargs)
    clipping: Any = optimizer._base_optimizer if isinstance(optimizer, Lookahead) else optimizer
    stepped = {p for group in clipping.param_groups for p in group["params"]}
    clipping._named = [(p, name) for name, p in model_or_params.named_parameters() if p in stepped]
    clipping._bare_layout = [[_tensor(p) for p in group["params"]] for group in bare]
    return _with_stats(optimizer)


def _with_stats(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimizer; Lookahead, which forwards no attributes of the one inside, gets its `clip_stats`."""
    if isinstance(optimizer, Lookahead):
        vars(optimizer)["clip_stats"] = vars(optimizer)["_base_optimizer"].clip_stats
    return optimizer


def _groups(model: nn.Module, options: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The parameter groups that timm makes for the bare optimizer, and those with gains spared the decay as well.

    Takes the factory's arguments and, like the factory, clears the decay that the groups now carry.
    """
    if options["param_group_fn"]:
        groups = _as_groups(options["param_group_fn"](model))
        return groups, groups
    # Names, no_weight_decay() and group_matcher() belong to the network, but a wrapper may own parameters besides it.
    trainable = _trainable(model)
    owner = [module for module in wrappers(model) if _trainable(module) == trainable][-1]
    by_layer = options["layer_decay"] is not None
    build: Any = param_groups_layer_decay if by_layer else param_groups_weight_decay
    renamed = {"min_scale": "layer_decay_min_scale", "no_opt_scale": "layer_decay_no_opt_scale"}
    wanted = {name: renamed.get(name, name) for name in inspect.signature(build).parameters}
    accepted = {name: options[option] for name, option in wanted.items() if option in options}
    groups = build(owner, **accepted, no_weight_decay_list=undecayed_names(model, named_in=owner))
    # timm's factory asks the object it is given; layers it can only tell apart in the network itself
    given = owner if by_layer else model
    bare = build(given, **accepted, no_weight_decay_list=getattr(given, "no_weight_decay", set)())
    options["weight_decay"] = 0.0
    return bare, groups


def _as_groups(groups: Any) -> list[dict[str, Any]]:
    """Any form of parameters that torch accepts, as new groups with a list under `params`."""
    groups = list(groups)
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    result = []
    for group in map(dict, groups):
        parameters = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        names = group.pop("param_names", None)
        result.append({**group, "params": list(zip(names, parameters, strict=True)) if names else parameters})
    return result


def _split_classifier(groups: list[dict[str, Any]], weights: list[nn.Parameter]) -> list[dict[str, Any]]:
    """The groups with the classifier's weights in one of their own, unclipped, right after the one they were in."""
    exempt = {id(weight) for weight in weights}
    split = []
    for group in groups:
        head = [p for p in group["params"] if id(_tensor(p)) in exempt]
        rest = [p for p in group["params"] if id(_tensor(p)) not in exempt]
        split += [{**group, "params": rest}] if rest or not head else []
        split += [{**group, "params": head, "clip_factor": None}] if head else []
    return split


def _tensor(entry: Tensor | tuple[str, Tensor]) -> Tensor:
    return entry[1] if isinstance(entry, tuple) else entry


def _trainable(model: nn.Module) -> set[int]:
    return {id(p) for p in model.parameters() if p.requires_grad}
