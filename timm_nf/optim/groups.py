"""Who is clipped and who decays, by module and by name, never by position.

Source: arXiv:2102.06171, section 4 and A.1; deepmind-research nfnets/experiment_nfnets.py@f5de0ede.
"""

from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from typing import Any, cast

from torch import nn

from .._gain_names import is_gain
from .._wrappers import innermost


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
        if is_gain(name) or any(fnmatch(name, pattern) for pattern in listed)
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


def _named_classifier(model: nn.Module) -> list[nn.Module]:
    config = getattr(model, "pretrained_cfg", None)
    names = cast(dict[str, Any], config).get("classifier") if isinstance(config, dict) else None
    modules = {name: module for name, module in cast("Iterator[tuple[str, nn.Module]]", model.named_modules())}
    return [modules[name] for name in ([names] if isinstance(names, str) else names or ()) if name in modules]


def _last_piece(name: str) -> str:
    return name.rpartition(".")[2]
