"""Adaptive gradient clipping in front of any timm optimizer: `agcsgd`, `agcadamw`, ... in timm's own registry.

timm already has `--clip-mode agc`; this file exists because that mode cuts the classifier off by position, leaves its
bias unclipped, decays gains, and runs outside the optimizer, where a loss scaler with a fused step or a closure never
meets it. `agc` plus any name in timm's registry is a real subclass of that optimizer which clips before it steps.
"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
# torch offers no public decorator that lets the base optimizer's step compile and ours not.

import functools
import inspect
import sys
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, cast

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
_Place = tuple[int, int]  # of a parameter: its group, its position in it


class AdaptiveClipping(torch.optim.Optimizer):
    """What every `agc` optimizer adds to its base: each step clips every parameter group by its own settings first.

    A group's `clip_factor`, `clip_eps` and `clip_axis` stand beside its `lr`; `clip_factor=None` exempts the group. The
    base class is the next one in the method resolution order.

    Parameters are remembered by their places, never held: whoever shards a network puts other ones there, and must be
    able to free those before.

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
    _measured: list[tuple[list[_Place], agc.Units]]  # of the last step, without the parameters
    _exemption: Exemption  # looked up when clipping; not part of pickles and copies
    # What pickles and copies take with them:
    _exempt_places: set[_Place]
    _stated: set[int]  # groups added with a clip factor of their own, which is the last word
    _shapes: list[list[tuple[int, ...]]]  # of the whole parameters of every group, when it was added
    _names: list[list[str]]  # of the parameters of the first groups, in the model that they came from
    _bare_layout: list[list[_Place]]  # the first groups as the bare optimizer would have them
    _remembered = ("_exempt_places", "_stated", "_shapes", "_names", "_bare_layout")

    @torch._disable_dynamo(recursive=False)  # the base optimizer's step may be compiled, this one breaks the graph
    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Clip, then do the base optimizer's step; with a closure, clip each time it has computed gradients."""
        base_step: Any = super().step
        if getattr(base_step, "hooked", False):
            # torch wraps `step` once per class to run the hooks; ours is wrapped already, so theirs must not run too.
            base_step = functools.partial(base_step.__wrapped__, self)
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
        return self.base_class is torch.optim.SGD

    @torch._disable_dynamo
    def _clip_gradients(self) -> None:
        """Clip all groups, those with equal settings in one go; nothing is written if any group has bad input."""
        exempt = {id(p) for p in self._looked_up()}
        places = self._recorded("_exempt_places", set[_Place]())
        stated = self._recorded("_stated", set[int]())
        settings: dict[Tensor, agc.Settings] = {}
        place_of: dict[int, _Place] = {}
        spared: list[Tensor] = []
        for i, group in enumerate(self.param_groups):
            parameters: list[Tensor] = group["params"]
            if group["clip_factor"] is None:
                spared += parameters
                continue
            self._refuse_flattened(i, parameters)
            given = _converted(group, known=self.defaults)
            shared = agc.Settings(given["clip_factor"], given["clip_eps"], given["clip_axis"])
            for j, p in enumerate(parameters):
                if (id(p) in exempt and i not in stated) or (i, j) in places:
                    spared.append(p)
                else:
                    settings[p], place_of[id(p)] = shared, (i, j)
        checked = check_gradients(settings, self._label, spared, lambda p: settings[p].axis)
        clone_gradients_(checked.needs_clone)
        by_settings: dict[agc.Settings, list[Tensor]] = {}
        for p in checked.parameters:
            by_settings.setdefault(settings[p], []).append(p)
        self._measured = [
            ([place_of[id(p)] for p in units.parameters], units._replace(parameters=[]))
            for units in agc.clip_checked_((ps, shared) for shared, ps in by_settings.items())
        ]

    def _recorded(self, name: str, default: Any) -> Any:
        """What is remembered under a name; the default in a pickle of an earlier version.

        Lightning's wrapper inherits from the class of what it wraps and forwards attributes that it does not have.
        """
        return getattr(self, name, default)

    def _kept(self, name: str, empty: Any) -> Any:
        """`_recorded`, to be changed in place: what is set on Lightning's wrapper does not reach the optimizer."""
        if not hasattr(self, name):
            setattr(self, name, empty)
        return getattr(self, name)

    def _looked_up(self) -> list[Any]:
        exemption: Exemption | None = self._recorded("_exemption", None)
        return [] if exemption is None else exemption.parameters()

    def _record_exempt(self) -> None:
        """Record the places of the parameters that are exempt now and lie in groups that are clipped."""
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
        """Refuse flat tensors in place of parameters with several axes, as far as they can be told.

        Raises:
            ValueError: Their number or shapes have changed, and what is there is flat.
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
        """Its place and its name, if the groups or the model given to timm's factory name it."""
        places = ((i, j, group) for i, group in enumerate(self.param_groups) for j in range(len(group["params"])))
        i, j, group = next((i, j, group) for i, j, group in places if group["params"][j] is parameter)
        remembered: list[list[str]] = self._recorded("_names", [])
        names = group.get("param_names") or (remembered[i] if i < len(remembered) else [])
        name = f" {names[j]}" if len(names) == len(group["params"]) and names[j] else ""
        return f"parameter group {i}, parameter {j}{name}"

    @contextmanager
    def _fused_where_equal(self) -> Generator[None]:
        """Let torch's SGD take its fused implementation in this step; on the CPU it never chooses it by itself.

        Groups that state no implementation take it for parameters where the result is the same to the bit. In groups
        that ask for it, sharded parameters take the default: torch's fused SGD cannot be sharded. The groups keep their
        `fused`, so state dicts stay those of the bare optimizer.
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

        A group that is exempt, has an infinite clip factor or had no gradients has no units. Of sharded parameters
        these are the units that this process holds or has a part of. Waits for the device; a step does not.
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
        """Add a group; clip settings that it does not state are the constructor's.

        Parameters of a classifier that the optimizer knows of are exempt, unless the group states a clip factor.

        Raises:
            ValueError: A clip setting is negative, NaN or unknown.
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
        """Load a checkpoint of this optimizer or of its bare form, which resumes with this one's clip settings.

        As torch has it, the settings in a checkpoint replace those of this optimizer; a warning names clip settings
        that differ. Set them in the groups afterwards to change them.
        """
        groups: list[dict[str, Any]] = state_dict["param_groups"]
        if not any("clip_factor" in group for group in groups):
            groups = self._regroup(groups)
        if len(groups) == len(self.param_groups):
            settled: list[dict[str, Any]] = []
            for i, (saved, ours) in enumerate(zip(groups, self.param_groups, strict=True)):
                own = _converted(ours, known=self.defaults)
                loaded = _converted({**own, **saved}, known={**self.defaults, **saved})
                settled.append({**saved, **loaded})
                for name, value in own.items():
                    if name in _CLIP_DEFAULTS and loaded[name] != value:
                        warn_caller(
                            f"the checkpoint's {name}={loaded[name]} replaces {value} in parameter group {i}; to "
                            f"change it, set optimizer.param_groups[{i}][{name!r}] after loading"
                        )
            groups = settled
        super().load_state_dict({**state_dict, "param_groups": groups})

    def _regroup(self, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Cut the saved groups of a bare optimizer to the groups of this one; return them unchanged if they do not fit.

        Only the ids in `params` tie a state dict's groups to its state, so the state itself can stay as it is.
        """
        layout: list[list[_Place]] = list(self._recorded("_bare_layout", []))
        placed = {i for places in layout for i, _ in places}
        later = (i for i, group in enumerate(self.param_groups) if i not in placed and (group["params"] or not layout))
        layout += [[(i, j) for j in range(len(self.param_groups[i]["params"]))] for i in later]
        if [len(group["params"]) for group in saved] != [len(places) for places in layout]:
            return saved
        pairs = [pair for group, places in zip(saved, layout, strict=True) for pair in _zipped(group, places)]
        origin = {place: group for place, group, _ in pairs}
        ids = {place: i for place, _, i in pairs}
        regrouped: list[dict[str, Any]] = []
        for i, ours in enumerate(self.param_groups):
            source = origin[i, 0] if ours["params"] else ours
            group = {**ours, **source, "params": [ids[i, j] for j in range(len(ours["params"]))]}
            if group["params"] != source["params"]:
                group.pop("param_names", None)  # those of the other grouping; torch puts ours back
                if not ours.get("weight_decay", True):
                    group["weight_decay"] = ours["weight_decay"]  # gains decayed there and have left that group
            regrouped.append(group)
        return regrouped

    def remember(self, names: Mapping[int, str], bare: Iterable[Iterable[Tensor]]) -> None:
        """Remember, by place, the names of parameters and the groups that the bare optimizer would have.

        Args:
            names: By the parameter's id.
            bare: The parameters of each of these groups.
        """
        groups = [group["params"] for group in self.param_groups]
        self._names = [[names.get(id(p), "") for p in parameters] for parameters in groups]
        place_of = {id(p): (i, j) for i, parameters in enumerate(groups) for j, p in enumerate(parameters)}
        self._bare_layout = [[place_of[id(p)] for p in parameters] for parameters in bare]

    def __getstate__(self) -> dict[str, Any]:
        """The base optimizer's state for pickle and deepcopy, and what is remembered beside it."""
        self._record_exempt()
        ours = {name: vars(self)[name] for name in self._remembered if name in vars(self)}
        return super().__getstate__() | ours

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Always False: a base with a fused step would unscale inside it, after the clipping. So the scaler does."""
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Ignored; the base constructors set it."""


def _zipped(group: dict[str, Any], places: list[_Place]) -> Iterator[tuple[_Place, dict[str, Any], int]]:
    for place, i in zip(places, group["params"], strict=True):
        yield place, group, i


def _converted(settings: Mapping[str, Any], known: Container[str]) -> dict[str, Any]:
    """The clip settings among these, checked, with numbers in place of text.

    Raises:
        ValueError: One is unknown or outside its range.
    """
    converted: dict[str, Any] = {}
    for name, value in settings.items():
        if name in _CLIP_DEFAULTS:
            if name == "clip_axis":
                converted[name] = checked_axis(value)
            elif not (name == "clip_factor" and value is None):
                converted[name] = agc.checked_setting(name, value)
            else:
                converted[name] = None
        elif name.startswith("clip_") and name not in known:
            raise ValueError(f"unknown clip setting {name!r}; adaptive clipping has {', '.join(_CLIP_DEFAULTS)}")
    return converted


def _settled(params: Any, clip_exempt: Exempt | None, clips: bool) -> tuple[Any, Exemption, list[list[Tensor]]]:
    """Split a constructor's parameters by who is exempt: the groups, whom to look up later, the groups before that."""
    if isinstance(params, SettledGroups) and clip_exempt is None:
        return params, params.exemption, []
    if isinstance(params, (Tensor, Mapping)) or not isinstance(params, Iterable):
        return cast(Any, params), Exemption(), []  # torch says what is wrong with that
    listed: list[Any] = list(cast(Iterable[Any], params))
    if clip_exempt is None:
        if clips and not any(isinstance(group, dict) and "clip_factor" in group for group in listed):
            warn_caller(
                "these parameters come without their model, so that all of them are clipped, the classifier's weight "
                f"too, while the paper exempts it. {HOW_TO_SAY_IT}"
            )
        return listed, Exemption(), []
    groups = as_groups(listed)
    exemption, ids = exempt_among(groups, clip_exempt)
    split: list[dict[str, Any]] = []
    for group in groups:
        parts = split_group(group, lambda p: id(p) in ids) or [(False, group)]
        split += [
            {**part, "clip_factor": None} if exempt else part for exempt, part in sorted(parts, key=lambda x: x[0])
        ]
    return split, exemption, [[tensor(entry) for entry in group["params"]] for group in groups]


def as_groups(given: Iterable[Any]) -> list[dict[str, Any]]:
    """Any form of parameters that torch accepts, as new groups with a list under `params`."""
    groups: list[Any] = list(given)
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    result: list[dict[str, Any]] = []
    for group in map(dict[str, Any], groups):
        parameters: list[Any] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        names = group.pop("param_names", None)
        result.append({**group, "params": list(zip(names, parameters, strict=True)) if names else parameters})
    return result


@functools.cache
def agc_class(base: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The subclass of an optimizer class that clips before every step, always the same one for the same base.

    It takes the base's arguments and `clip_factor=0.01, clip_eps=1e-3, clip_axis=0, clip_exempt=None`.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))  # one unit of norm 5
        >>> optimizer = agc_class(torch.optim.SGD)([weight], lr=1.0, clip_factor=0.1, clip_exempt=())
        >>> weight.grad = torch.tensor([[0.0, 1.0]])
        >>> optimizer.step()
        >>> weight.data
        tensor([[3.0000, 3.5000]])
    """
    signature = inspect.signature(base.__init__)
    parameters = list(signature.parameters.values())
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters[at:at] = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in (_CLIP_DEFAULTS | {"clip_exempt": None}).items()
    ]
    known = {p.name for p in parameters}
    first = parameters[1].name

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
            groups, self._exemption, bare = _settled(args[0], clip_exempt, clips)
            args = (groups, *args[1:])
        elif first in kwargs:
            kwargs[first], self._exemption, bare = _settled(kwargs[first], clip_exempt, clips)
        base.__init__(self, *args, **kwargs)
        if bare:
            self.remember({}, bare)

    cast(Any, __init__).__signature__ = signature.replace(parameters=parameters)

    # pickle finds a class by its name in this package, and several packages call theirs SGD or Adam.
    package = sys.modules[AdaptiveClipping.__module__]
    name = f"Agc{base.__name__}"
    if name in vars(package) and vars(package)[name].base_class is not base:
        name = f"Agc_{base.__module__.replace('.', '_')}_{base.__name__}"
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
