"""Who is not clipped: the classifier, found where people put the network, and what the caller names.

Source: arXiv:2102.06171, section 4: all weights are clipped but the classifier's.
"""

import difflib
import functools
import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

from timm.utils.model_ema import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .._wrappers import innermost, wrappers
from .units import is_single_unit, weights_behind

__all__ = ["classifier_weights"]

Exempt = str | Iterable[str | nn.Module | nn.Parameter]
_Find = Callable[[nn.Module], list[nn.Parameter]]

_AVERAGES = (ModelEmaV2, ModelEmaV3, AveragedModel)  # copies of a network, which nothing trains

HOW_TO_SAY_IT = (
    "Say which weights are not clipped with clip_exempt=('head',), modules or names, () for none, "
    "or put them into a parameter group with clip_factor=None"
)


class Classifier(NamedTuple):
    """The classifier of a model."""

    network: nn.Module | None  # its owner, which may get another classifier
    weights: list[nn.Parameter]
    problem: str | None  # why there is none


def classifier_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the classifier, found through the model: the only ones that adaptive clipping leaves alone.

    Looks inside DistributedDataParallel, torch.compile, timm's EMA, task and distillation wrappers (the student, never
    the teacher), and in every other module that holds the network, such as a LightningModule. The classifier is what
    timm's `get_classifier()` returns, a tuple of heads included; for models without that method it is what
    `pretrained_cfg["classifier"]` names. Where `get_classifier()` returns several layers as one head (MetaFormer's),
    that name also says which of them is the last.

    Returns:
        Every weight with at least two axes inside the classifier, and what is behind those that are normed or
        parametrized; empty if there is no classifier, or if there are several that are trained.

    Examples:
        >>> [tuple(weight.shape) for weight in classifier_weights(timm.create_model("test_vit", num_classes=10))]
        [(10, 64)]
    """
    return find_classifier(model).weights


def find_classifier(model: nn.Module, given: Container[int] | None = None) -> Classifier:
    """The classifier of a model, see `classifier_weights`.

    Args:
        model: Any module.
        given: The ids of the parameters that count; all of them by default.
    """
    network = innermost(model)
    if _has_classifier(network):
        return Classifier(network, _own_classifier(network), None)
    trained = {id(p) for p in model.parameters() if p.requires_grad and (given is None or id(p) in given)}
    found: dict[frozenset[int], tuple[str, nn.Module, list[nn.Parameter]]] = {}
    frozen: list[tuple[nn.Module, list[nn.Parameter]]] = []
    without: dict[str, nn.Module] = {}
    seen: list[str] = []
    for name, module in _named_modules(model):
        if isinstance(module, _AVERAGES):
            seen.append(name)
        if any(f"{name}.".startswith(f"{outer}.") for outer in seen) or not _has_classifier(module):
            continue
        weights = _own_classifier(module)
        if ids := trained.intersection(map(id, weights)):
            found.setdefault(frozenset(ids), (name, module, weights))
            seen.append(name)
        elif any(id(p) in trained for p in module.parameters()):  # nothing of a frozen teacher is trained
            if weights:
                frozen.append((module, weights))
            else:
                without[name] = module
    largest = max(found, key=len, default=frozenset[int]())
    if found and all(ids <= largest for ids in found):
        _, network, weights = found[largest]
        return Classifier(innermost(network), weights, None)
    if not found and len(frozen) == 1:
        return Classifier(*frozen[0], None)
    kind = type(model).__name__
    if found:
        names = _names_of(model, [p for _, _, weights in found.values() for p in weights])
        return Classifier(None, [], f"{kind} has {len(found)} classifiers ({', '.join(names)}), and none is exempt")
    networks = ", ".join(f"{name} ({type(module).__name__})" for name, module in without.items())
    inside = f"; {networks} has none" if networks else ""
    network = next(iter(without.values())) if len(without) == 1 else None
    return Classifier(network, [], f"no classifier was found in {kind}{inside}, so that all weights are clipped")


class Exemption:
    """Parameters that are not clipped. They are looked up each time: a network may get another classifier.

    The modules in which they are looked up are held weakly.
    """

    def __init__(self, sources: Iterable[tuple[nn.Module, _Find]] = ()):
        """Take modules, and what finds the parameters in each."""
        self._sources = [(weakref.ref(module), find) for module, find in sources]

    def parameters(self) -> list[nn.Parameter]:
        """Those of the modules that still exist."""
        found: list[nn.Parameter] = []
        for reference, find in self._sources:
            module = reference()
            if module is not None:
                found += find(module)
        return found


class SettledGroups(list[dict[str, Any]]):
    """Parameter groups that say who is clipped, and the exemption of what is added to them later."""

    def __init__(self, groups: Iterable[dict[str, Any]], exemption: Exemption):
        """Take groups that are already split by who is clipped."""
        super().__init__(groups)
        self.exemption = exemption


def exemption_of(
    model: nn.Module, clip_exempt: Exempt | None, given: Container[int] | None = None, warns: bool = True
) -> Exemption:
    """Who is exempt in a model.

    Args:
        model: Any module.
        clip_exempt: Modules, parameters, or names of either relative to the model (with commas between them in one
            text), beside the classifier; empty for none. None for the classifier alone, with a warning if there is
            none or more than one of them.
        given: The ids of the parameters that count; all of them by default.
        warns: Whether there is a warning; not where the groups say who is clipped, or nothing is.

    Raises:
        ValueError: Something in `clip_exempt` is not in the model, or has no weight.
    """
    entries = _entries(clip_exempt)
    if entries is not None and not entries:
        return Exemption()
    classifier = find_classifier(model, given)
    sources: list[tuple[nn.Module, _Find]] = []
    if classifier.network is not None:
        sources.append((classifier.network, _own_classifier))
    if entries is None and warns and classifier.problem is not None:
        warn_caller(f"{classifier.problem}. {HOW_TO_SAY_IT}")
    sources += [_source_in(model, entry) for entry in entries or ()]
    return Exemption(sources)


def exempt_among(groups: Sequence[dict[str, Any]], clip_exempt: Exempt) -> tuple[Exemption, set[int]]:
    """Who is exempt among parameters that came without their model, and the ids of these parameters.

    Args:
        groups: With tensors or with pairs of a name and a tensor under `params`.
        clip_exempt: Modules, parameters, or names of either, for which the parameters must have names.

    Raises:
        ValueError: None of the parameters belongs to an entry of `clip_exempt`.
    """
    listed: list[Any] = [entry for group in groups for entry in group["params"]]
    named: dict[str, nn.Parameter] = dict(cast("tuple[str, Any]", e) for e in listed if isinstance(e, tuple))
    present = {id(tensor(entry)) for entry in listed}
    ids: set[int] = set()
    sources: list[tuple[nn.Module, _Find]] = []
    for entry in _entries(clip_exempt) or ():
        if isinstance(entry, str):
            inside = [p for name, p in named.items() if name.startswith(f"{entry}.") and _is_weight(name, p)]
            found = {id(named[entry])} if entry in named else set(map(id, inside))
            if not found:
                hint = "" if named else "; these parameters have no names, so give modules or named_parameters()"
                raise ValueError(f"clip_exempt names {entry!r}, which is not among the parameters{hint}")
        else:
            weights = weights_in(entry) if isinstance(entry, nn.Module) else [entry]
            found = present.intersection(map(id, weights))
            if not found:
                raise ValueError(f"clip_exempt holds {_described(entry)}, which has no weight among the parameters")
            if isinstance(entry, nn.Module):
                sources.append((entry, weights_in))
        ids |= found
    return Exemption(sources), ids


def weights_in(module: nn.Module) -> list[nn.Parameter]:
    """The weights with at least two axes in a module, whatever their names: they are exempt where the module is.

    With them goes what a weight norm or a parametrization adds to them. Biases and gains are not exempt.
    """
    found: dict[int, nn.Parameter] = {}
    for inner in module.modules():
        behind = weights_behind(inner)
        if not any(p.ndim >= 2 for p in behind):
            behind = []
        behind += [p for name, p in inner.named_parameters(recurse=False) if _is_weight(name, p)]
        found |= {id(p): p for p in behind}
    return list(found.values())


def tensor(entry: Tensor | tuple[str, Tensor]) -> Tensor:
    """The tensor of an entry of a group's `params`, which may carry a name."""
    return entry[1] if isinstance(entry, tuple) else entry


def split_group(group: dict[str, Any], key: Callable[[Tensor], Any]) -> list[tuple[Any, dict[str, Any]]]:
    """The group in parts, one for every value of `key`, in the order of their first parameters."""
    parts: dict[Any, list[Any]] = {}
    for entry in group["params"]:
        parts.setdefault(key(tensor(entry)), []).append(entry)
    return [(value, {**group, "params": entries}) for value, entries in parts.items()]


def warn_caller(message: str) -> None:
    """Warn at the caller's line: the last one outside the code of optimizers and of their registration."""
    level, frame = 1, sys._getframe()  # pyright: ignore[reportPrivateUsage]
    inside = ("timm_nf.optim", "timm_nf.registration", "timm.optim", "torch.", "contextlib")
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(inside):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _entries(clip_exempt: Exempt | None) -> list[str | nn.Module | nn.Parameter] | None:
    if clip_exempt is None:
        return None
    if isinstance(clip_exempt, (nn.Module, Tensor)):
        return [cast("nn.Module | nn.Parameter", clip_exempt)]
    listed = [clip_exempt] if isinstance(clip_exempt, str) else list(clip_exempt)
    entries: list[str | nn.Module | nn.Parameter] = []
    for entry in cast("list[Any]", listed):
        if isinstance(entry, str):
            entries += [name.strip() for name in entry.split(",") if name.strip()]
        elif isinstance(entry, (nn.Module, Tensor)):
            entries.append(cast("nn.Module | nn.Parameter", entry))
        else:
            raise ValueError(f"clip_exempt takes modules, parameters and names, got {entry!r}")
    return entries


def _source_in(model: nn.Module, entry: str | nn.Module | nn.Parameter) -> tuple[nn.Module, _Find]:
    """Where in the model to look up an entry of `clip_exempt`."""
    if isinstance(entry, nn.Module):
        if all(module is not entry for module in model.modules()):
            raise ValueError(f"clip_exempt holds {_described(entry)}, which is not in {type(model).__name__}")
        if not weights_in(entry):
            raise ValueError(f"clip_exempt holds {_described(entry)}, which has no weight with at least two axes")
        return entry, weights_in
    if isinstance(entry, Tensor):
        names = _names_of(model, [entry])
        if not names:
            raise ValueError(f"clip_exempt holds {_described(entry)}, which is not in {type(model).__name__}")
        entry = names[0]
    path, _, last = entry.rpartition(".")
    for root in wrappers(model):
        parent = _submodule(root, path)
        if parent is None:
            continue
        find = functools.partial(_named_in, last)
        if find(parent):
            return parent, find
        if isinstance(getattr(parent, last, None), nn.Module):
            raise ValueError(f"clip_exempt names {entry!r}, which has no weight with at least two axes")
    known = [name for name, _ in _named_modules(model) if name] + [name for name, _ in model.named_parameters()]
    close = difflib.get_close_matches(entry, known, 3)
    hint = f"; similar names are {', '.join(close)}" if close else ""
    raise ValueError(f"clip_exempt names {entry!r}, which is not in {type(model).__name__}{hint}")


def _named_in(name: str, parent: nn.Module) -> list[nn.Parameter]:
    """The parameters that a name in a module stands for; none if there is no such name."""
    inner = getattr(parent, name, None)
    return weights_in(inner) if isinstance(inner, nn.Module) else weights_behind(parent, name)


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return cast("Iterator[tuple[str, nn.Module]]", model.named_modules())


def _described(entry: nn.Module | Tensor) -> str:
    return f"a {type(entry).__name__}" + (f" of shape {tuple(entry.shape)}" if isinstance(entry, Tensor) else "")


def _names_of(model: nn.Module, parameters: Iterable[Tensor]) -> list[str]:
    ids = set(map(id, parameters))
    return [name for name, p in model.named_parameters() if id(p) in ids]


def _is_weight(name: str, p: Tensor) -> bool:
    """Whether a name and a shape are those of a weight: `weight`, `in_proj_weight`, `prototypes`, not `gain`."""
    last = name.rpartition(".")[2]
    if last.startswith(("weight", "original")):
        return p.ndim >= 2
    return "bias" not in last and not is_single_unit(p.shape)


def _has_classifier(model: nn.Module) -> bool:
    """Whether a model says what its classifier is, be it none."""
    get_classifier = getattr(model, "get_classifier", None)
    if not callable(get_classifier):
        return bool(_named_classifier(model))
    try:
        inspect.signature(get_classifier).bind()
    except TypeError:  # somebody else's method of that name
        return False
    return True


def _own_classifier(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the classifier of a network that says what it is."""
    named = _named_classifier(model)
    get_classifier = getattr(model, "get_classifier", None)
    found: Any = get_classifier() if callable(get_classifier) else named
    last_layers = {id(p) for module in named for p in module.parameters()}
    weights: list[nn.Parameter] = []
    for head in cast(Iterable[Any], found) if isinstance(found, (tuple, list, nn.ModuleList)) else [found]:
        inside = weights_in(head) if isinstance(head, nn.Module) else []
        weights += [p for p in inside if id(p) in last_layers] or inside
    return weights


def _named_classifier(model: nn.Module) -> list[nn.Module]:
    config = getattr(model, "pretrained_cfg", None)
    names = cast(dict[str, Any], config).get("classifier") if isinstance(config, dict) else None
    modules = (_submodule(model, name) for name in ([names] if isinstance(names, str) else names or ()))
    return [module for module in modules if module is not None]
