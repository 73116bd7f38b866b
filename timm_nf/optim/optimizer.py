"""Adaptive gradient clipping in front of any optimizer. `agc` and a name in timm's registry name such a class.

Each class is a subclass of its optimizer and clips before it steps. timm's `--clip-mode agc` finds the classifier by
position, leaves its bias unclipped and decays gains. It also runs outside of the optimizer, where closures and loss
scalers with a fused step do not see it.
"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
# torch has no public decorator that lets the base optimizer's step compile, but not ours.

import functools
import inspect
import sys
from collections.abc import Callable, Container, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from .._clip_defaults import CLIP_EPS, CLIP_FACTOR
from . import agc
from .exempt import HOW_TO_SAY_IT, Exempt, Exemption, SettledGroups, exempt_among, split_group, tensor, warn_caller
from .fused_where_equal import fused_parts
from .gradients import check_gradients, clone_gradients_
from .units import Axis, checked_axis, is_single_unit

__all__ = ["AdaptiveClipping", "agc_class"]

_CLIP_DEFAULTS: dict[str, Any] = {"clip_factor": CLIP_FACTOR, "clip_eps": CLIP_EPS, "clip_axis": 0}
_Place = tuple[int, int]  # a parameter's group, and its position in the group


class _Clipped(NamedTuple):
    """How a parameter is clipped, and where it stands."""

    settings: agc.Settings
    place: _Place


class AdaptiveClipping(torch.optim.Optimizer):
    """The common base of all `agc` optimizers. Each step first clips every parameter group by the group's settings.

    A group has `clip_factor`, `clip_eps` and `clip_axis` beside its `lr`. `clip_factor=None` exempts the group.

    The optimizer remembers parameters by their places and holds no other reference. Tools that shard a network replace
    the parameters, and must be able to free the old ones.

    Examples:
        >>> layer = torch.nn.Linear(4, 3)
        >>> optimizer = timm.optim.create_optimizer_v2(layer, "agcsgd", lr=0.1, clip_exempt=())
        >>> layer(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> isinstance(optimizer, AdaptiveClipping), sum(row["units"] for row in optimizer.clip_stats())
        (True, 4)
    """

    __module__ = "timm_nf.optim"  # where pickles look for all classes of this kind

    base_class: ClassVar[type[torch.optim.Optimizer]]
    _clip_settings: dict[str, Any]
    _measured: list[tuple[list[_Place], agc.Units]]  # the last step's units, without their parameters
    _exemption: Exemption  # looked up at every step; not part of pickles and copies
    # These are part of pickles and copies:
    _exempt_places: set[_Place]
    _stated: set[int]  # groups that were added with their own clip factor, which is the last word
    _shapes: list[list[tuple[int, ...]]]  # shapes of each group's whole parameters when the group was added
    _names: list[list[str]]  # names of the first groups' parameters in their model
    _bare_layout: list[list[_Place]]  # the first groups as the bare optimizer would have them
    _remembered = ("_exempt_places", "_stated", "_shapes", "_names", "_bare_layout")

    @torch._disable_dynamo(recursive=False)  # the base optimizer's step may be compiled, this one breaks the graph
    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Clip, then do the base optimizer's step. With a closure, clip each time it has computed gradients."""
        base_step: Any = super().step
        if getattr(base_step, "hooked", False):
            # torch wraps the `step` of each class to run the hooks. Ours runs them, so the base's must not.
            base_step = functools.partial(base_step.__wrapped__, self)
        if closure is None:
            self._clip_gradients()
            with self._fused_where_equal():
                return base_step(*args, **kwargs)

        def closure_then_clip() -> Any:
            with torch.enable_grad():  # timm's Adahessian below 1.0.31 does not do it
                loss = closure()
            self._clip_gradients()
            return loss

        if not self._is_sgd:
            return base_step(closure_then_clip, *args, **kwargs)
        loss = closure_then_clip()  # once, as torch's SGD itself would
        with self._fused_where_equal():
            base_step(*args, **kwargs)
        return loss

    @property
    def _is_sgd(self) -> bool:
        return self.base_class is torch.optim.SGD

    @torch._disable_dynamo
    def _clip_gradients(self) -> None:
        """Clip all groups. Groups with equal settings are clipped in one go. Bad input in any group changes nothing."""
        clipped, spared = self._clipped_and_spared()
        checked = check_gradients(clipped, self._label, spared, lambda p: clipped[p].settings.axis)
        clone_gradients_(checked.needs_clone)
        by_settings: dict[agc.Settings, list[Tensor]] = {}
        for p in checked.parameters:
            by_settings.setdefault(clipped[p].settings, []).append(p)
        work = [(parameters, settings) for settings, parameters in by_settings.items()]
        self._measured = [
            ([clipped[p].place for p in units.parameters], units._replace(parameters=[]))
            for units in agc.clip_checked_(work)
        ]

    def _clipped_and_spared(self) -> tuple[dict[Tensor, _Clipped], list[Tensor]]:
        """The parameters to clip, and those that are exempt."""
        exempt = {id(p) for p in self._looked_up()}
        exempt_places = self._recorded("_exempt_places", set[_Place]())
        stated = self._recorded("_stated", set[int]())
        clipped: dict[Tensor, _Clipped] = {}
        spared: list[Tensor] = []
        for i, group in enumerate(self.param_groups):
            parameters: list[Tensor] = group["params"]
            if not agc.clips(group["clip_factor"]):
                spared += parameters
                continue
            self._refuse_flattened(i, parameters)
            given = _converted(group, known=self.defaults)
            settings = agc.Settings(given["clip_factor"], given["clip_eps"], given["clip_axis"])
            for j, p in enumerate(parameters):
                if (id(p) in exempt and i not in stated) or (i, j) in exempt_places:
                    spared.append(p)
                else:
                    clipped[p] = _Clipped(settings, (i, j))
        return clipped, spared

    def _recorded(self, name: str, default: Any) -> Any:
        """A remembered attribute, or the default if a pickle of an earlier version lacks it.

        Lightning's wrapper has the class of the optimizer, and forwards attributes that it does not have itself.
        """
        return getattr(self, name, default)

    def _kept(self, name: str, empty: Any) -> Any:
        """A remembered attribute, to be changed in place. Setting it on Lightning's wrapper would not reach us."""
        if not hasattr(self, name):
            setattr(self, name, empty)
        return getattr(self, name)

    def _looked_up(self) -> list[Any]:
        exemption: Exemption | None = self._recorded("_exemption", None)
        return [] if exemption is None else exemption.parameters()

    def _record_exempt(self) -> None:
        """Record the places of the parameters that are exempt now, in groups without their own clip factor."""
        exempt = {id(p) for p in self._looked_up()}
        stated: set[int] = self._recorded("_stated", set[int]())
        self._kept("_exempt_places", set[_Place]()).update(
            (i, j)
            for i, group in enumerate(self.param_groups)
            if i not in stated
            for j, p in enumerate(group["params"])
            if id(p) in exempt
        )

    def _refuse_flattened(self, i: int, parameters: list[Tensor]) -> None:
        """Refuse flat tensors that have taken the place of parameters with several axes.

        Raises:
            ValueError: if the group's parameters are flat, and their number or shapes have changed.
        """
        shapes: list[list[tuple[int, ...]]] = self._recorded("_shapes", [])
        if i >= len(shapes) or not parameters or any(p.ndim > 1 for p in parameters):
            return
        now, before = [tuple(p.shape) for p in parameters], shapes[i]
        if len(now) == len(before) and all(map(is_single_unit, before)):
            return
        if not set(now) <= set(before):
            raise ValueError(
                f"parameter group {i} had {len(before)} parameters and now has {len(now)}, all of them flat, as under "
                "DeepSpeed ZeRO, which hides their output units; use fully_shard instead"
            )

    def _label(self, _: int, parameter: Tensor) -> str:
        """A parameter's place, and its name if the groups or the model of timm's factory name it."""
        groups = [group["params"] for group in self.param_groups]
        i, j = next((i, j) for i, group in enumerate(groups) for j, p in enumerate(group) if p is parameter)
        names: list[str] = self.param_groups[i].get("param_names") or []
        remembered: list[list[str]] = self._recorded("_names", [])
        if not names and i < len(remembered):
            names = remembered[i]
        label = f"parameter group {i}, parameter {j}"
        if len(names) == len(groups[i]) and names[j]:
            label += f" {names[j]}"
        return label

    @contextmanager
    def _fused_where_equal(self) -> Generator[None]:
        """Let torch's SGD use its fused implementation in this step, for the parameters where it gives the same bits.

        `fused_parts` splits the groups for the step. Afterwards the groups are the old ones, so state dicts are those
        of the bare optimizer.
        """
        groups = self.param_groups
        if self._is_sgd and not torch.compiler.is_compiling():
            self.param_groups = [part for group in groups for part in fused_parts(group, self.state)]
        try:
            yield
        finally:
            self.param_groups = groups

    def clip_stats(self) -> list[agc.ClipStats] | None:
        """What the last step clipped, one row for every parameter group; None before the first step.

        A group has no units if it is exempt, has an infinite clip factor or had no gradients. Units of sharded
        parameters count in every process that holds a part of them. Unlike a step, this waits for the device.
        """
        measured: list[tuple[list[_Place], agc.Units]] | None = self._recorded("_measured", None)
        if measured is None:
            return None
        pieces: list[list[agc.Pieces]] = [[] for _ in self.param_groups]
        for places, units in measured:
            for (i, _), piece in zip(places, units.pieces(), strict=True):
                pieces[i].append(piece)
        return [agc.summary(found) for found in pieces]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Clip settings that it does not state are the constructor's.

        Parameters of a classifier that the optimizer knows are exempt, unless the group states a clip factor.

        Raises:
            ValueError: if a clip setting is negative, NaN or unknown.
        """
        for name, value in self._recorded("_clip_settings", _CLIP_DEFAULTS).items():
            self.defaults.setdefault(name, value)
        converted = _converted(param_group, known=self.defaults)
        if any(param_group[name] is not value for name, value in converted.items()):
            param_group = param_group | converted
        stated = "clip_factor" in param_group
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        self._kept("_shapes", []).append([tuple(p.shape) for p in self.param_groups[index]["params"]])
        if stated:
            self._kept("_stated", set[int]()).add(index)
        self._record_exempt()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, or one of the bare optimizer, which is the same one without clipping.

        A bare checkpoint resumes with this optimizer's clip settings. Otherwise the checkpoint's settings replace those
        of this optimizer, as torch does for all settings. A warning names clip settings that differ. To change them,
        set them in the groups afterwards.
        """
        groups: list[dict[str, Any]] = state_dict["param_groups"]
        if not any("clip_factor" in group for group in groups):
            groups = self._regroup(groups)
        if len(groups) == len(self.param_groups):
            groups = [self._with_clip_settings(i, saved) for i, saved in enumerate(groups)]
        super().load_state_dict({**state_dict, "param_groups": groups})

    def _with_clip_settings(self, i: int, saved: dict[str, Any]) -> dict[str, Any]:
        """A saved group with all clip settings: those that it lacks are this optimizer's. Warn of those that differ."""
        own = _converted(self.param_groups[i], known=self.defaults)
        loaded = _converted({**own, **saved}, known={**self.defaults, **saved})
        for name, value in own.items():
            if loaded[name] != value:
                warn_caller(
                    f"the checkpoint's {name}={loaded[name]} replaces {value} in parameter group {i}; to "
                    f"change it, set optimizer.param_groups[{i}][{name!r}] after loading"
                )
        return {**saved, **loaded}

    def _regroup(self, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Cut the saved groups of a bare optimizer into the groups of this one. If they do not fit, return them as is.

        Only the ids in `params` tie a state dict's groups to its state. So the state itself can stay as it is.
        """
        layout = self._layout_of_the_bare_optimizer()
        if [len(group["params"]) for group in saved] != [len(places) for places in layout]:
            return saved
        origin: dict[_Place, dict[str, Any]] = {}
        ids: dict[_Place, int] = {}
        for group, places in zip(saved, layout, strict=True):
            for place, i in zip(places, group["params"], strict=True):
                origin[place] = group
                ids[place] = i
        regrouped: list[dict[str, Any]] = []
        for i, ours in enumerate(self.param_groups):
            source = origin[i, 0] if ours["params"] else ours
            group = {**ours, **source, "params": [ids[i, j] for j in range(len(ours["params"]))]}
            if group["params"] != source["params"]:
                group.pop("param_names", None)  # they belong to the old grouping; torch puts ours back
                if not ours.get("weight_decay", True):
                    group["weight_decay"] = ours["weight_decay"]  # gains, which decayed in the bare optimizer
            regrouped.append(group)
        return regrouped

    def _layout_of_the_bare_optimizer(self) -> list[list[_Place]]:
        """The groups that the bare optimizer would have: those from before the split, and those that were added."""
        layout: list[list[_Place]] = list(self._recorded("_bare_layout", []))
        was_split = bool(layout)
        placed = {i for places in layout for i, _ in places}
        for i, group in enumerate(self.param_groups):
            is_empty_part = was_split and not group["params"]
            if i not in placed and not is_empty_part:
                layout.append([(i, j) for j in range(len(group["params"]))])
        return layout

    def remember(self, names: Mapping[int, str], bare: Iterable[Iterable[Tensor]]) -> None:
        """Remember the names of parameters, and the groups that the bare optimizer would have.

        Args:
            names: The name of each parameter, by the parameter's id.
            bare: The parameters of each group of the bare optimizer.
        """
        groups = [group["params"] for group in self.param_groups]
        self._names = [[names.get(id(p), "") for p in parameters] for parameters in groups]
        place_of = {id(p): (i, j) for i, parameters in enumerate(groups) for j, p in enumerate(parameters)}
        self._bare_layout = [[place_of[id(p)] for p in parameters] for parameters in bare]

    def __getstate__(self) -> dict[str, Any]:
        """The base optimizer's state for pickle and deepcopy, and what we remember beside it."""
        self._record_exempt()
        ours = {name: vars(self)[name] for name in self._remembered if name in vars(self)}
        return super().__getstate__() | ours

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Always False, so that the loss scaler unscales before the step. A fused step would do so after clipping."""
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Ignore the value that a base constructor sets."""


def _converted(settings: Mapping[str, Any], known: Container[str]) -> dict[str, Any]:
    """The clip settings among the settings of a group, checked, and with numbers in place of text.

    Args:
        settings: All settings of a group.
        known: Names of settings that the base optimizer has.

    Raises:
        ValueError: if a clip setting is unknown or out of range.
    """
    converted: dict[str, Any] = {}
    for name, value in settings.items():
        if name in _CLIP_DEFAULTS:
            converted[name] = _converted_value(name, value)
        elif name.startswith("clip_") and name not in known:
            raise ValueError(f"unknown clip setting {name!r}; adaptive clipping has {', '.join(_CLIP_DEFAULTS)}")
    return converted


def _converted_value(name: str, value: Any) -> Any:
    if name == "clip_axis":
        return checked_axis(value)
    if name == "clip_factor" and value is None:
        return None
    return agc.checked_setting(name, value)


class _Split(NamedTuple):
    """A constructor's parameters, split by who is exempt.

    Attributes:
        params: The groups, or whatever the caller gave if it says nothing about exemption.
        exemption: Who is exempt in later steps.
        bare: The parameters of each group before the split, if there was a split.
    """

    params: Any
    exemption: Exemption
    bare: list[list[Tensor]]


def _split_by_exemption(params: Any, clip_exempt: Exempt | None, clips: bool) -> _Split:
    """Split a constructor's parameters by who is exempt.

    Args:
        params: The constructor's first argument.
        clip_exempt: Who is exempt; None if the caller has not said it.
        clips: Whether anything is clipped. If so, parameters without their model get a warning.
    """
    if isinstance(params, SettledGroups) and clip_exempt is None:
        return _Split(params, params.exemption, [])
    if isinstance(params, (Tensor, Mapping)) or not isinstance(params, Iterable):
        return _Split(cast(Any, params), Exemption(), [])  # torch says what is wrong with it
    listed: list[Any] = list(cast(Iterable[Any], params))
    if clip_exempt is None:
        if clips and not any(isinstance(group, dict) and "clip_factor" in group for group in listed):
            warn_caller(
                "these parameters come without their model, so that all of them are clipped, the classifier's weight "
                f"too, while the paper exempts it. {HOW_TO_SAY_IT}"
            )
        return _Split(listed, Exemption(), [])
    groups = as_groups(listed)
    exemption, ids = exempt_among(groups, clip_exempt)
    split: list[dict[str, Any]] = []
    for group in groups:
        parts = dict(split_group(group, lambda p: id(p) in ids)) or {False: group}
        if False in parts:
            split.append(parts[False])
        if True in parts:
            split.append({**parts[True], "clip_factor": None})
    return _Split(split, exemption, [[tensor(entry) for entry in group["params"]] for group in groups])


def as_groups(given: Iterable[Any]) -> list[dict[str, Any]]:
    """Any form of parameters that torch accepts, as new groups with a list under `params`."""
    groups: list[Any] = list(given)
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    return [_as_group(group) for group in groups]


def _as_group(given: Mapping[str, Any]) -> dict[str, Any]:
    """A new group with a list under `params`: of parameters, or of pairs of a name and a parameter."""
    group = dict(given)
    params: Any = group["params"]
    group["params"] = [params] if isinstance(params, Tensor) else list(params)
    names = group.pop("param_names", None)
    if names:
        group["params"] = list(zip(names, group["params"], strict=True))
    return group


@functools.cache
def agc_class(base: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The subclass of an optimizer class that clips before every step. It is the same one in every call.

    It takes the base's arguments and `clip_factor=0.01, clip_eps=1e-3, clip_axis=0, clip_exempt=None`.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))  # one unit of norm 5
        >>> optimizer = agc_class(torch.optim.SGD)([weight], lr=1.0, clip_factor=0.1, clip_exempt=())
        >>> weight.grad = torch.tensor([[0.0, 1.0]])
        >>> optimizer.step()
        >>> weight.data
        tensor([[3.0000, 3.5000]])
    """
    signature = _with_clip_settings(inspect.signature(base.__init__))
    known = set(signature.parameters)
    _, first, *_ = signature.parameters  # after self

    def __init__(
        self: Any,
        *args: Any,
        clip_factor: float | None = CLIP_FACTOR,
        clip_eps: float = CLIP_EPS,
        clip_axis: Axis = 0,
        clip_exempt: Exempt | None = None,
        **kwargs: Any,
    ):
        given = {"clip_factor": clip_factor, "clip_eps": clip_eps, "clip_axis": clip_axis}
        self._clip_settings = _converted({**kwargs, **given}, known)
        clips = agc.clips(self._clip_settings["clip_factor"])
        bare: list[list[Tensor]] = []
        if args:
            groups, self._exemption, bare = _split_by_exemption(args[0], clip_exempt, clips)
            args = (groups, *args[1:])
        elif first in kwargs:
            kwargs[first], self._exemption, bare = _split_by_exemption(kwargs[first], clip_exempt, clips)
        base.__init__(self, *args, **kwargs)
        if bare:
            self.remember({}, bare)

    cast(Any, __init__).__signature__ = signature

    package = sys.modules[AdaptiveClipping.__module__]
    name = _class_name(base, vars(package))
    members = {
        "__init__": __init__,
        "__module__": AdaptiveClipping.__module__,
        "__qualname__": name,
        "__doc__": f"{base.__name__} behind adaptive gradient clipping; its arguments and {', '.join(_CLIP_DEFAULTS)}.",
        "base_class": base,
    }
    made = type(name, (AdaptiveClipping, base), members)
    setattr(package, name, made)
    return made


def _with_clip_settings(signature: inspect.Signature) -> inspect.Signature:
    """A constructor's signature with the clip settings after its own parameters, but before `**kwargs`."""
    own = list(signature.parameters.values())
    rest: list[inspect.Parameter] = []
    if own[-1].kind is inspect.Parameter.VAR_KEYWORD:
        rest = [own.pop()]
    settings = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in (_CLIP_DEFAULTS | {"clip_exempt": None}).items()
    ]
    return signature.replace(parameters=[*own, *settings, *rest])


def _class_name(base: type[torch.optim.Optimizer], taken: Mapping[str, Any]) -> str:
    """A name that no other class has: pickle finds a class by it, and several packages have an SGD or an Adam."""
    name = f"Agc{base.__name__}"
    if name in taken and taken[name].base_class is not base:
        name = f"Agc_{base.__module__.replace('.', '_')}_{base.__name__}"
    return name
