"""Adaptive gradient clipping in front of any timm optimizer: `agcsgd`, `agcadamw`, ... in timm's own registry.

timm already has `--clip-mode agc`; this file exists because that mode cuts the classifier off by position, leaves its
bias unclipped, decays gains, and runs outside the optimizer, where a loss scaler with a fused step or a closure never
meets it. `agc` plus any name in timm's registry is a real subclass of that optimizer which clips before it steps.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import agc
from .fused_sgd import fused_parts
from .gradients import parameters_with_gradient

_CLIP_DEFAULTS = {"clip_factor": 0.01, "clip_eps": 1e-3}  # arXiv:2102.06171, A.1


class AdaptiveClipping(torch.optim.Optimizer):
    """What every `agc` optimizer adds to its base: each step clips every parameter group by its own settings first.

    A group's `clip_factor` and `clip_eps` stand beside its `lr`; `clip_factor=None` exempts the group. The base class
    is the next one in the method resolution order.
    """

    __module__ = "timm_nf.optim"  # where pickles look for all classes of this kind

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
        for p in parameters_with_gradient(settings, self._label, spared):
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

    # pickle finds a class by its name in this package, and several packages call theirs SGD or Adam.
    package = sys.modules[AdaptiveClipping.__module__]
    name = f"Agc{base.__name__}"
    if name in vars(package) and vars(package)[name].__mro__[2] is not base:
        name = f"Agc_{base.__module__.replace('.', '_')}_{base.__name__}"
    members = {
        "__init__": __init__,
        "__module__": AdaptiveClipping.__module__,
        "__qualname__": name,
        "__doc__": f"{base.__name__} behind adaptive gradient clipping; its arguments and {', '.join(_CLIP_DEFAULTS)}.",
    }
    made = type(name, (AdaptiveClipping, base), members)
    setattr(package, name, made)
    return made
