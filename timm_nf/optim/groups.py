"""Parameter groups: who is clipped and who decays, by module and by name, never by position.

Source: arXiv:2102.06171, section 4 and A.1; deepmind-research nfnets/experiment_nfnets.py@f5de0ede.
"""

from fnmatch import fnmatch
from typing import Any

from torch import nn

from .._gain_names import is_gain
from .._wrappers import innermost
from .exempt import Exempt, SettledGroups, exemption_of, find_classifier
from .units import Axis, unit_axes

__all__ = ["param_groups_agc"]


def network_of(model: nn.Module) -> nn.Module:
    """The network inside a model: what a wrapper wraps, or what has the classifier."""
    network = find_classifier(model).network
    return innermost(model) if network is None else network


def undecayed_names(model: nn.Module, named_in: nn.Module) -> set[str]:
    """Names of the parameters that never decay: what `no_weight_decay()` lists, gains and skip gains.

    The network has such a list, and so may every module around it.

    Args:
        model: Any model, wrapped or not.
        named_in: The module in which the names count: the model, or a wrapper around it or inside it.
    """
    network = network_of(model)
    wanted = {id(p) for name, p in model.named_parameters() if is_gain(name)}
    for module in model.modules():
        if any(inside is network for inside in module.modules()):
            listed = getattr(module, "no_weight_decay", set[str])()
            wanted |= {id(p) for name, p in module.named_parameters() if any(fnmatch(name, each) for each in listed)}
    return {name for name, p in named_in.named_parameters() if id(p) in wanted}


def param_groups_agc(
    model: nn.Module, weight_decay: float = 2e-5, clip_exempt: Exempt | None = None
) -> list[dict[str, Any]]:
    """Parameter groups with the paper's policy, by name.

    Gains, biases, skip gains and all other parameters with at most one axis, and those that the model lists in
    `no_weight_decay()`, are clipped and do not decay. The classifier's weight decays and is not clipped. All others
    decay and are clipped. Frozen parameters are left out, and so are empty groups.

    Args:
        model: Any module, wrapped or not. `classifier_weights` says how the classifier is found.
        weight_decay: Weight decay of weights. The paper has 2e-5 for NFNets at any batch size.
        clip_exempt: What is not clipped besides the classifier's weight: modules, parameters, or names relative to
            `model`. Several names may stand in one text, with commas. `()` exempts nothing, not even the classifier.

    Returns:
        Groups with `params` and `weight_decay`. Groups that are not clipped have `clip_factor=None`. Groups whose
        output units do not lie on axis 0 have a `clip_axis`. An `agc` optimizer takes this list as the last word on who
        is clipped.

    Raises:
        ValueError: if something in `clip_exempt` is not in the model.

    Source: arXiv:2102.06171, section 4 and A.1; deepmind-research nfnets/experiment_nfnets.py@f5de0ede.

    Examples:
        >>> import timm, timm_nf
        >>> model = timm.create_model(
        ...     "nfnet_f0", depths=(1, 1, 1, 1), channels=(16, 16, 32, 32), group_size=8, num_classes=3
        ... )
        >>> groups = param_groups_agc(model, weight_decay=2e-5)
        >>> [(group["weight_decay"], group.get("clip_factor", "clipped")) for group in groups]
        [(0.0, 'clipped'), (2e-05, 'clipped'), (2e-05, None)]
    """
    exemption = exemption_of(model, clip_exempt)
    exempt = {id(p) for p in exemption.parameters()}
    undecayed = undecayed_names(model, named_in=model)
    axes = unit_axes(model)
    groups: dict[tuple[bool, bool, Axis], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decays = not (p.ndim <= 1 or _last_piece(name) == "bias" or name in undecayed)
        clipped = id(p) not in exempt
        axis = axes.get(id(p), 0) if clipped else 0
        key = (not clipped, decays, axis)
        group = groups.setdefault(key, {"params": [], "weight_decay": weight_decay if decays else 0.0})
        if not clipped:
            group["clip_factor"] = None
        if axis != 0:
            group["clip_axis"] = axis
        group["params"].append(p)
    ordered = sorted(groups, key=lambda key: (key[0], key[1], key[2] != 0))
    return SettledGroups([groups[key] for key in ordered], exemption)


def _last_piece(name: str) -> str:
    return name.rpartition(".")[2]
