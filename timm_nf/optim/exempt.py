"""Finds the parameters that are not clipped: the classifier's weight, wherever the network is, and what callers name.

Source: arXiv:2102.06171, section 4: all weights are clipped, except for the classifier's.
"""

import difflib
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from timm.utils.model_ema import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .._wrappers import innermost, wrappers
from .units import is_single_unit, weights_behind

__all__ = ["classifier_weights"]

Exempt = str | Iterable[str | nn.Module | nn.Parameter]
_Find = Callable[[nn.Module], list[nn.Parameter]]

_AVERAGES = (ModelEmaV2, ModelEmaV3, AveragedModel)  # copies of a network that are not trained

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
    """The weights of the model's classifier. Adaptive clipping leaves only these alone.

    The classifier is what timm's `get_classifier()` returns: one head, or a tuple of heads. For models without that
    method it is what `pretrained_cfg["classifier"]` names. If a head has several layers, as MetaFormer's has, that name
    also says which one is the last.

    The network may lie inside other modules: DistributedDataParallel, torch.compile, timm's wrappers for EMA, tasks and
    distillation (the student, never the teacher), or any other module, such as a LightningModule.

    Returns:
        Every weight with at least two axes inside the classifier. If a weight is normed or parametrized, the parameters
        that it is computed from. Empty if there is no classifier, or if several are trained.

    Examples:
        >>> [tuple(weight.shape) for weight in classifier_weights(timm.create_model("test_vit", num_classes=10))]
        [(10, 64)]
    """
    return find_classifier(model).weights


def find_classifier(model: nn.Module, given: Container[int] | None = None) -> Classifier:
    """The classifier of a model, see `classifier_weights`.

    Args:
        model: Any module.
        given: The ids of the parameters that count. By default all count.
    """
    network = innermost(model)
    trained = {id(p) for p in model.parameters() if p.requires_grad and (given is None or id(p) in given)}
    if _has_classifier(network):
        weights = _own_classifier(network)
        if weights or trained <= set(map(id, network.parameters())):  # otherwise a head may stand beside the network
            return Classifier(_owner(network, weights), weights, None)
    inside = _networks_inside(model, trained)
    largest = max(inside.trained, key=len, default=frozenset[int]())
    if inside.trained and all(ids <= largest for ids in inside.trained):  # one, and parts of it
        network, weights = inside.trained[largest]
        return Classifier(_owner(network, weights), weights, None)
    if not inside.trained and len(inside.frozen) == 1:
        return Classifier(*inside.frozen[0], None)
    name = type(model).__name__
    if inside.trained:
        names = ", ".join(_names_of(model, [p for _, weights in inside.trained.values() for p in weights]))
        return Classifier(None, [], f"{name} has {len(inside.trained)} classifiers ({names}), and none is exempt")
    problem = f"no classifier was found in {name}"
    if inside.without:
        networks = ", ".join(f"{path} ({type(module).__name__})" for path, module in inside.without.items())
        problem += f"; {networks} has none"
    network = next(iter(inside.without.values())) if len(inside.without) == 1 else None
    return Classifier(network, [], f"{problem}, so that all weights are clipped")


class _NetworksInside(NamedTuple):
    """The modules inside a model that say what their classifier is, and that are trained.

    Attributes:
        trained: Those whose classifier is trained, with its weights, by the ids of the trained weights.
        frozen: Those whose classifier is not trained, with its weights.
        without: Those without a classifier, by name.
    """

    trained: dict[frozenset[int], tuple[nn.Module, list[nn.Parameter]]]
    frozen: list[tuple[nn.Module, list[nn.Parameter]]]
    without: dict[str, nn.Module]


def _networks_inside(model: nn.Module, trained: set[int]) -> _NetworksInside:
    """Find them in the order of the model. `trained` holds the ids of the trained parameters."""
    inside = _NetworksInside({}, [], {})
    done: list[str] = []  # names of modules that are not searched further
    for name, module in _named_modules(model):
        if isinstance(module, _AVERAGES):
            done.append(name)
        if any(f"{name}.".startswith(f"{outer}.") for outer in done) or not _has_classifier(module):
            continue
        weights = _own_classifier(module)
        ids = frozenset(trained.intersection(map(id, weights)))
        if ids:
            inside.trained.setdefault(ids, (module, weights))
            done.append(name)
        elif not any(id(p) in trained for p in module.parameters()):
            continue  # a frozen teacher
        elif weights:
            inside.frozen.append((module, weights))
        else:
            inside.without[name] = module
    return inside


class Exemption:
    """Parameters that are not clipped. They are looked up each time, since a network may get another classifier.

    The modules in which they are looked up are held by weak references.
    """

    def __init__(self, sources: Iterable[tuple[nn.Module, _Find]] = ()):
        """Take modules, and for each a function that finds the parameters in it."""
        self._sources = [(weakref.ref(module), find) for module, find in sources]

    def parameters(self) -> list[nn.Parameter]:
        """The parameters, as far as their modules still exist."""
        found: list[nn.Parameter] = []
        for reference, find in self._sources:
            module = reference()
            if module is not None:
                found += find(module)
        return found


class SettledGroups(list[dict[str, Any]]):
    """Parameter groups that say who is clipped. `exemption` holds for groups that are added later."""

    def __init__(self, groups: Iterable[dict[str, Any]], exemption: Exemption):
        """Take groups that are split by who is clipped."""
        super().__init__(groups)
        self.exemption = exemption


def exemption_of(
    model: nn.Module, clip_exempt: Exempt | None, given: Container[int] | None = None, warns: bool = True
) -> Exemption:
    """Who is exempt in a model.

    Args:
        model: Any module.
        clip_exempt: What is exempt besides the classifier: modules, parameters, or names relative to the model. Several
            names may stand in one text, with commas. Empty exempts nothing, not even the classifier. None exempts the
            classifier alone, and warns if there is not exactly one.
        given: The ids of the parameters that count. By default all count.
        warns: Whether to warn. No warning is due if the groups say who is clipped, or if nothing is clipped.

    Raises:
        ValueError: if something in `clip_exempt` is not in the model, or has no weight.
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
    """Who is exempt among parameters without their model, and the ids of these parameters.

    Args:
        groups: Groups with tensors, or pairs of a name and a tensor, under `params`.
        clip_exempt: Modules, parameters, or names. Names need parameters with names.

    Raises:
        ValueError: if an entry of `clip_exempt` has no weight among the parameters.
    """
    listed: list[Any] = [entry for group in groups for entry in group["params"]]
    named: dict[str, nn.Parameter] = dict(cast("tuple[str, Any]", e) for e in listed if isinstance(e, tuple))
    present = {id(tensor(entry)) for entry in listed}
    ids: set[int] = set()
    sources: list[tuple[nn.Module, _Find]] = []
    for entry in _entries(clip_exempt) or ():
        found = present.intersection(map(id, _weights_of(entry, named)))
        if not found and isinstance(entry, str):
            hint = "" if named else "; these parameters have no names, so give modules or named_parameters()"
            raise ValueError(f"clip_exempt names {entry!r}, which is not among the parameters{hint}")
        if not found:
            raise ValueError(f"clip_exempt holds {_described(entry)}, which has no weight among the parameters")
        if isinstance(entry, nn.Module):
            sources.append((entry, _weights_in))
        ids |= found
    return Exemption(sources), ids


def _weights_of(entry: str | nn.Module | nn.Parameter, named: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    """The weights that an entry of `clip_exempt` stands for. Names are looked up among `named`."""
    if isinstance(entry, nn.Module):
        return _weights_in(entry)
    if not isinstance(entry, str):
        return [entry]
    if entry in named:
        return [named[entry]]
    inside = {name: p for name, p in named.items() if name.startswith(f"{entry}.")}
    weights = [name for name, p in inside.items() if _is_weight(name, p)]
    layers = {name.rpartition(".")[0] for name in weights}
    weights += [name for name in inside.keys() - set(weights) if _is_behind(name) and name.rpartition(".")[0] in layers]
    return [inside[name] for name in weights]


def _weights_in(module: nn.Module) -> list[nn.Parameter]:
    """The weights with at least two axes in a module, whatever their names. They are exempt if the module is.

    The parameters of a weight norm or a parametrization go with their weight. Biases and gains are not exempt.
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
    """The tensor in an entry of a group's `params`: a tensor, or a name and a tensor."""
    return entry[1] if isinstance(entry, tuple) else entry


def split_group(group: dict[str, Any], key: Callable[[Tensor], Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Split a group by `key`. The parts are in the order of their first parameters."""
    parts: dict[Any, list[Any]] = {}
    for entry in group["params"]:
        parts.setdefault(key(tensor(entry)), []).append(entry)
    return [(value, {**group, "params": entries}) for value, entries in parts.items()]


def warn_caller(message: str) -> None:
    """Warn at the caller's line: the last line outside of optimizers and their registration."""
    inside = ("timm_nf.optim", "timm_nf.registration", "timm.optim", "torch.", "contextlib")
    level = 1
    frame = inspect.currentframe()
    while frame is not None and frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(inside):
        level += 1
        frame = frame.f_back
    warnings.warn(message, stacklevel=level)


def _entries(clip_exempt: Exempt | None) -> list[str | nn.Module | nn.Parameter] | None:
    if clip_exempt is None:
        return None
    if isinstance(clip_exempt, (nn.Module, Tensor)):
        return [cast("nn.Module | nn.Parameter", clip_exempt)]
    given: Any = clip_exempt
    if isinstance(given, str) or not hasattr(given, "__iter__"):
        given = [given]
    entries: list[str | nn.Module | nn.Parameter] = []
    for entry in cast(Iterable[Any], given):
        if isinstance(entry, str):
            entries += [name.strip() for name in entry.split(",") if name.strip()]
        elif isinstance(entry, (nn.Module, Tensor)):
            entries.append(cast("nn.Module | nn.Parameter", entry))
        else:
            raise ValueError(f"clip_exempt takes modules, parameters and names, got {entry!r}")
    return entries


def _source_in(model: nn.Module, entry: str | nn.Module | nn.Parameter) -> tuple[nn.Module, _Find]:
    """The module in which to look up an entry of `clip_exempt`, and the function that finds its parameters."""
    if isinstance(entry, nn.Module):
        if all(module is not entry for module in model.modules()):
            raise ValueError(f"clip_exempt holds {_described(entry)}, which is not in {type(model).__name__}")
        if not _weights_in(entry):
            raise ValueError(f"clip_exempt holds {_described(entry)}, which has no weight with at least two axes")
        return entry, _weights_in
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
    """The parameters of the submodule or weight with this name; none if there is no such name."""
    inner = getattr(parent, name, None)
    return _weights_in(inner) if isinstance(inner, nn.Module) else weights_behind(parent, name)


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return cast("Iterator[tuple[str, nn.Module]]", model.named_modules())


def _described(entry: str | nn.Module | Tensor) -> str:
    described = f"a {type(entry).__name__}"
    if isinstance(entry, Tensor):
        described += f" of shape {tuple(entry.shape)}"
    return described


def _names_of(model: nn.Module, parameters: Iterable[Tensor]) -> list[str]:
    ids = set(map(id, parameters))
    return [name for name, p in model.named_parameters() if id(p) in ids]


def _is_behind(name: str) -> bool:
    """Whether a parameter goes with a weight, by its name: `weight_g` of a weight norm may be a single number."""
    return name.rpartition(".")[2].startswith(("weight_", "original"))


def _is_weight(name: str, p: Tensor) -> bool:
    """Whether a parameter is a weight, by its name and shape: `weight`, `in_proj_weight`, `prototypes`, not `gain`."""
    last = name.rpartition(".")[2]
    if last.startswith(("weight", "original")):
        return p.ndim >= 2
    return "bias" not in last and not is_single_unit(p.shape)


def _has_classifier(model: nn.Module) -> bool:
    """Whether a model says what its classifier is. It may say that it has none."""
    return _heads(model) is not None


def _own_classifier(model: nn.Module) -> list[nn.Parameter]:
    """The classifier's weights of a network that says what its classifier is."""
    last_layers = {id(p) for module in _named_classifier(model) for p in module.parameters()}
    weights: list[nn.Parameter] = []
    for head in _heads(model) or ():
        inside = _weights_in(head) if isinstance(head, nn.Module) else [head]
        weights += [p for p in inside if id(p) in last_layers] or inside
    return weights


def _owner(model: nn.Module, weights: list[nn.Parameter]) -> nn.Module:
    """The innermost module with this classifier. Others around it only forward the question, and may be temporary."""
    owner, wanted = innermost(model), set(map(id, weights))
    for module in owner.modules() if wanted else ():  # from the outside to the inside
        if _has_classifier(module) and set(map(id, _own_classifier(module))) == wanted:
            owner = module
    return owner


def _heads(model: nn.Module) -> list[nn.Module | nn.Parameter] | None:
    """The heads of a network; none if it has no classes. None if it does not say what its classifier is."""
    get_classifier = getattr(model, "get_classifier", None)
    if not callable(get_classifier):
        return list(_named_classifier(model)) or None
    try:
        inspect.signature(get_classifier).bind()
    except TypeError:  # somebody else's method of that name
        return None
    try:
        return list(_flattened(get_classifier()))
    except (AttributeError, NotImplementedError, TypeError):  # its head was deleted, or it never had one
        return None


def _flattened(found: Any) -> Iterator[nn.Module | nn.Parameter]:
    """What `get_classifier()` has found, one head after the other.

    Raises:
        TypeError: if something in it is no head.
    """
    if isinstance(found, Mapping):
        found = list(cast("Mapping[Any, Any]", found).values())
    if isinstance(found, (tuple, list, nn.ModuleList)):
        for head in cast(Iterable[Any], found):
            yield from _flattened(head)
    elif isinstance(found, (nn.Module, nn.Parameter)):
        yield found
    elif found is not None:
        raise TypeError(f"no head: {found!r}")


def _named_classifier(model: nn.Module) -> list[nn.Module]:
    """The modules that the model's config names as its classifier."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict):
        return []
    names: Any = cast(dict[str, Any], config).get("classifier")
    if isinstance(names, str):
        names = [names]
    modules = (_submodule(model, name) for name in names or ())
    return [module for module in modules if module is not None]
