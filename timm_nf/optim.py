"""Adaptive gradient clipping in front of any timm optimizer: `agcsgd`, `agcadamw`, ... in timm's own registry.

timm already has `--clip-mode agc`; this file exists because that mode cuts the classifier off by position, leaves its
bias unclipped, decays gains, and runs outside the optimizer, where a loss scaler with a fused step or a closure never
meets it. `agc` plus any name in timm's registry is a real subclass of that optimizer which clips before it steps.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import timm.utils
import torch
from timm.optim import Lookahead, OptimInfo, param_groups_layer_decay, param_groups_weight_decay
from timm.optim import _optim_factory as factory
from torch import Tensor, nn

from timm_nf import agc
from timm_nf.fused_sgd import fused_parts

_PREFIX = "agc"
_CLIP_MODES = ("norm", "value", "agc")  # of timm 1.0.31; a test compares them with its source
_CLIP_DEFAULTS = {"clip_factor": 0.01, "clip_eps": 1e-3}  # arXiv:2102.06171, A.1


class AdaptiveClipping(torch.optim.Optimizer):
    """What every `agc` optimizer adds to its base: each step clips every parameter group by its own settings first.

    A group's `clip_factor` and `clip_eps` stand beside its `lr`; `clip_factor=None` exempts the group. The base class
    is the next one in the method resolution order.
    """

    _clip_settings: dict[str, float | None]
    _measured: list[agc.Units]
    _bare_layout: list[list[Tensor]]

    @torch._disable_dynamo(recursive=False)  # the base optimizer's step may be compiled, this one breaks the graph
    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Clip, then do the base optimizer's step; with a closure, clip each time it has computed gradients."""
        base_step = super().step
        if getattr(base_step, "hooked", False):
            # torch wraps `step` once per class to run the hooks; ours is wrapped already, so theirs must not run too.
            base_step = functools.partial(base_step.__wrapped__, self)  # type: ignore[attr-defined]
        if closure is None:
            self._clip_gradients()
            with self._fused_where_equal():
                return base_step(*args, **kwargs)

        def closure_then_clip() -> Any:
            loss = closure()
            self._clip_gradients()
            return loss

        if not self._is_sgd:
            return base_step(closure_then_clip, *args, **kwargs)
        with torch.enable_grad():  # once, as torch's SGD itself would
            loss = closure_then_clip()
        with self._fused_where_equal():
            base_step(*args, **kwargs)
        return loss

    @property
    def _is_sgd(self) -> bool:
        return type(self).__mro__[2] is torch.optim.SGD

    @torch._disable_dynamo
    def _clip_gradients(self) -> None:
        """Clip all groups, those with equal settings in one go; nothing is written if any group has bad input."""
        settings: dict[Tensor, tuple[float, float]] = {}
        for group in self.param_groups:
            if group["clip_factor"] is not None:
                _check_settings(group, known=self.defaults)
                settings |= dict.fromkeys(group["params"], (group["clip_factor"], group["clip_eps"]))
        spared = [p for group in self.param_groups for p in group["params"] if p not in settings]
        by_settings: dict[tuple[float, float], list[Tensor]] = {}
        for p in agc.parameters_with_gradient(settings, self._label, spared):
            by_settings.setdefault(settings[p], []).append(p)
        self._measured = agc.clip_checked_([(ps, *shared) for shared, ps in by_settings.items()])

    def _label(self, _: int, parameter: Tensor) -> str:
        """What to call it: its place and, if the groups or the model that timm's factory had name it, its name."""
        places = ((i, j, group) for i, group in enumerate(self.param_groups) for j in range(len(group["params"])))
        i, j, group = next((i, j, group) for i, j, group in places if group["params"][j] is parameter)
        named = [*zip(group["params"], group.get("param_names", ()), strict=False), *getattr(self, "_named", ())]
        name = next((f" {name}" for p, name in named if p is parameter), "")
        return f"parameter group {i}, parameter {j}{name}"

    @contextmanager
    def _fused_where_equal(self) -> Iterator[None]:
        """For this step, let torch's SGD take its fused implementation on the CPU, which it never chooses by itself.

        Where nobody asked for one, and only for parameters where the result is the same to the bit. Where one is asked
        for, sharded parameters take the default instead: torch's fused SGD cannot be sharded. The groups themselves
        keep their `fused`, so state dicts stay those of the bare optimizer.
        """
        groups = self.param_groups
        if self._is_sgd and not torch.compiler.is_compiling():
            self.param_groups = [part for group in groups for part in fused_parts(group, self.state)]
        try:
            yield
        finally:
            self.param_groups = groups

    def clip_stats(self) -> list[dict[str, Any]] | None:
        """What the last step clipped, one dict for every parameter group; None before the first step.

        `units`, `zero_grad_units`, `non_finite_units`, `clipped_fraction` and `ratio_quantiles` (gradient norm over
        weight norm, before the clipping, where it is finite). A group that is exempt, has an infinite clip factor or
        had no gradients has no units. Of sharded parameters these are the units that this process holds or has a part
        of. Waits for the device; a step does not.
        """
        measured: list[agc.Units] | None = getattr(self, "_measured", None)
        return None if measured is None else agc.summaries(measured, [group["params"] for group in self.param_groups])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; clip settings that it does not state are the constructor's.

        Raises:
            ValueError: A clip setting is negative, NaN or unknown.
        """
        for name, value in getattr(self, "_clip_settings", _CLIP_DEFAULTS).items():
            self.defaults.setdefault(name, value)
        _check_settings(param_group, known=self.defaults)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer or of its bare form, which resumes with this one's clip settings."""
        groups = state_dict["param_groups"]
        if not any("clip_factor" in group for group in groups):
            groups = self._regroup(groups)
        if len(groups) == len(self.param_groups):
            groups = [
                {**{key: ours[key] for key in _CLIP_DEFAULTS}, **saved}
                for saved, ours in zip(groups, self.param_groups, strict=True)
            ]
        super().load_state_dict({**state_dict, "param_groups": groups})

    def _regroup(self, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The saved groups of a bare optimizer, cut to this one's groups; as they are where that does not apply.

        Only the ids in `params` tie a state dict's groups to its state, so the state itself can stay as it is.
        """
        layout: list[list[Tensor]] = list(getattr(self, "_bare_layout", []))
        placed = {p for parameters in layout for p in parameters}
        layout += [group["params"] for group in self.param_groups if placed.isdisjoint(group["params"])]
        if [len(group["params"]) for group in saved] != [len(parameters) for parameters in layout]:
            return saved
        origin = {p: group for group, parameters in zip(saved, layout, strict=True) for p in parameters}
        ids = {p: i for group, ps in zip(saved, layout, strict=True) for p, i in zip(ps, group["params"], strict=True)}
        regrouped = []
        for ours in self.param_groups:
            source = origin[ours["params"][0]] if ours["params"] else ours
            group = {**ours, **source, "params": [ids[p] for p in ours["params"]]}
            if group["params"] != source["params"]:
                group.pop("param_names", None)  # those of the other grouping; torch puts ours back
                if not ours.get("weight_decay", True):
                    group["weight_decay"] = ours["weight_decay"]  # gains decayed there and have left that group
            regrouped.append(group)
        return regrouped

    def __getstate__(self) -> dict[str, Any]:
        """The base optimizer's state for pickle and deepcopy, the bare grouping and the names beside it."""
        ours = {name: vars(self)[name] for name in ("_bare_layout", "_named") if name in vars(self)}
        return super().__getstate__() | ours

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Always False: a base with a fused step would unscale inside it, after the clipping. So the scaler does."""
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Ignored; the base constructors set it."""


def _check_settings(settings: dict[str, Any], known: Container[str]) -> None:
    for name, value in settings.items():
        if name.startswith("clip_") and name not in known:
            raise ValueError(f"unknown clip setting {name!r}; adaptive clipping has {' and '.join(_CLIP_DEFAULTS)}")
        if name == "clip_eps" or (name == "clip_factor" and value is not None):
            agc.check_setting(name, value)


@functools.cache
def agc_class(base: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The subclass of an optimizer class that clips before every step, always the same one for the same base.

    It takes the base's arguments and `clip_factor=0.01, clip_eps=1e-3`.
    """
    signature = inspect.signature(base.__init__)
    parameters = list(signature.parameters.values())
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters[at:at] = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in _CLIP_DEFAULTS.items()
    ]
    known = {p.name for p in parameters}

    def __init__(self: Any, *args: Any, clip_factor: float | None = 0.01, clip_eps: float = 1e-3, **kwargs: Any):
        self._clip_settings = {"clip_factor": clip_factor, "clip_eps": clip_eps}
        _check_settings({**kwargs, **self._clip_settings}, known)
        base.__init__(self, *args, **kwargs)

    __init__.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]

    # pickle finds a class by its name in this module, and several packages call theirs SGD or Adam.
    name = f"Agc{base.__name__}"
    if name in globals() and globals()[name].__mro__[2] is not base:
        name = f"Agc_{base.__module__.replace('.', '_')}_{base.__name__}"
    members = {
        "__init__": __init__,
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{base.__name__} behind adaptive gradient clipping; its arguments and {', '.join(_CLIP_DEFAULTS)}.",
    }
    globals()[name] = type(name, (AdaptiveClipping, base), members)
    return globals()[name]


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
    call.arguments["model_or_params"] = _split_classifier(groups, agc.classifier_weights(model_or_params))
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
    owner = [module for module in agc.wrappers(model) if _trainable(module) == trainable][-1]
    by_layer = options["layer_decay"] is not None
    build: Any = param_groups_layer_decay if by_layer else param_groups_weight_decay
    renamed = {"min_scale": "layer_decay_min_scale", "no_opt_scale": "layer_decay_no_opt_scale"}
    wanted = {name: renamed.get(name, name) for name in inspect.signature(build).parameters}
    accepted = {name: options[option] for name, option in wanted.items() if option in options}
    groups = build(owner, **accepted, no_weight_decay_list=agc.undecayed_names(model, named_in=owner))
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
