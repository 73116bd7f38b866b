"""Converts the authors' parameter trees to timm state dicts and back, bit for bit.

timm publishes converted weights but not the code that converted them. Here one table of names serves both directions.

A tree is `{module: {name: array}}`, as haiku makes it. Shapes: convolutions HWIO, linear layers IO, gains and biases
(O,), skip gains ().

Source of the names: deepmind-research nfnets/{nfnet,nf_resnet,nf_regnet}.py at f5de0ede.

Examples:
    >>> model = timm.create_model(
    ...     "nfnet_f0", depths=(1, 1, 1, 1), channels=(16, 16, 32, 32), group_size=8, num_classes=3
    ... )
    >>> tree = timm_to_haiku(model.state_dict())
    >>> sorted(tree["NFNet/~/stem_conv0"])
    ['bias', 'gain', 'w']
    >>> haiku_to_timm(tree).keys() == model.state_dict().keys()
    True
    >>> layout(tree)[:2]
    ('NFNet', [1, 1, 1, 1])
"""

# torch's types of from_numpy are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["FAMILIES", "haiku_to_timm", "layout", "timm_to_haiku"]

# haiku name -> (timm name, number of axes in haiku, number of axes in timm); timm's additional axes have length 1
_CONV = {"w": ("weight", 4, 4), "gain": ("gain", 1, 4), "bias": ("bias", 1, 1)}
_LINEAR = {"w": ("weight", 2, 2), "b": ("bias", 1, 1)}
_LINEAR_1X1 = {"w": ("weight", 2, 4), "b": ("bias", 1, 1)}
# haiku module of a block -> (timm module, parameters); {se} stands for `attn` in NF-RegNets, else for `attn_last`
_BLOCK = {
    "conv0": ("conv1", _CONV),
    "conv1": ("conv2", _CONV),
    "conv1b": ("conv2b", _CONV),
    "conv2": ("conv3", _CONV),
    "conv_shortcut": ("downsample.conv", _CONV),
    "squeeze_excite/~/linear": ("{se}.fc1", _LINEAR_1X1),
    "squeeze_excite/~/linear_1": ("{se}.fc2", _LINEAR_1X1),
}
_OUTSIDE = {"final_conv": ("final_conv", _CONV), "linear": ("head.fc", _LINEAR)}
_STEM4 = {f"stem_conv{i}": (f"stem.conv{i + 1}", _CONV) for i in range(4)}
_STEM1 = {"initial_conv": ("stem.conv", _CONV)}
# root module -> (block module, timm's name of squeeze-excite, modules outside the blocks, stem_type)
FAMILIES = {
    "NFNet": ("nf_block", "attn_last", _STEM4 | _OUTSIDE, "deep_quad"),
    "NF_ResNet": ("nf_res_block", "attn_last", _STEM1 | _OUTSIDE, "7x7_pool"),
    "NF_RegNet": ("nf_block", "attn", _STEM1 | _OUTSIDE, "3x3"),
}
"""For each of the authors' classes: block module, timm's name of squeeze-excite, other modules, stem type."""
# A network may lack these. Of those in blocks, either all blocks have one or none has.
_OPTIONAL = {"final_conv", "linear", "conv1b", "squeeze_excite"}

_Names = dict[tuple[str, str], tuple[str, int, int]]


def _names(family: str, depths: list[int]) -> _Names:
    """All parameters of a network of these depths: (haiku module, name) -> (timm name, axes in haiku, axes in timm)."""
    block, attn, outside, _ = FAMILIES[family]
    modules = {f"{family}/~/{module}": target for module, target in outside.items()}
    names: _Names = {}
    places = ((stage, index) for stage, depth in enumerate(depths) for index in range(depth))
    for number, (stage, index) in enumerate(places):
        haiku, timm = f"{family}/~/{block}" + (f"_{number}" if number else ""), f"stages.{stage}.{index}"
        names[haiku, "skip_gain"] = (f"{timm}.skipinit_gain", 0, 1)
        for module, (target, parameters) in _BLOCK.items():
            if module != "conv_shortcut" or index == 0:
                modules[f"{haiku}/~/{module}"] = f"{timm}.{target.format(se=attn)}", parameters
    for module, (target, parameters) in modules.items():
        names |= {(module, name): (f"{target}.{timm}", haiku, ours) for name, (timm, haiku, ours) in parameters.items()}
    return names


def _missing(family: str, names: _Names, present: Collection[tuple[str, str]]) -> list[tuple[str, str]]:
    """The parameters that are not in `present` and that its network must have."""
    first_block = f"{family}/~/{FAMILIES[family][0]}"
    modules = {module for module, _ in present}

    def without_block(module: str) -> str:
        """NFNet/~/nf_block_3/~/conv1 -> conv1, NFNet/~/linear -> linear."""
        return module.split("/~/")[1:3][-1]

    found = {without_block(module) for module in modules}

    def is_required(module: str) -> bool:
        if module in modules:  # all parameters of a module, or none
            return True
        if module == f"{first_block}/~/conv_shortcut":  # the network's first block may have no shortcut convolution
            return False
        return without_block(module) not in _OPTIONAL or without_block(module) in found

    return [key for key in names if key not in present and is_required(key[0])]


def _refuse(family: str, unknown: list[str], missing: list[str], misshapen: list[str]) -> None:
    problems = [
        f"{len(found)} {what}: {', '.join(sorted(found))}"
        for found, what in (
            (unknown, "that it does not have"),
            (missing, "missing"),
            (misshapen, "with another number of axes"),
        )
        if found
    ]
    if problems:
        raise ValueError(f"expected the parameters of one {family}, got {'; '.join(problems)}")


def layout(params: Mapping[str, Mapping[str, Any]]) -> tuple[str, list[int], _Names]:
    """Family, depths and names of a tree.

    Raises:
        ValueError: if the tree does not have exactly the parameters of one network.
    """
    families = {module.partition("/")[0] for module in params}
    if len(families) != 1 or not families <= FAMILIES.keys():
        raise ValueError(
            f"expected a parameter tree with one root of {', '.join(FAMILIES)}, got {sorted(families)[:10]}; "
            "is this the authors' checkpoint of one network?"
        )
    (family,) = families
    block = f"{family}/~/{FAMILIES[family][0]}"
    blocks = {"/~/".join(module.split("/~/")[:2]) for module in params if module.startswith(block)}
    depths: list[int] = []
    for number in range(len(blocks)):  # a shortcut convolution begins every stage after the first
        if not depths or f"{block}_{number}/~/conv_shortcut" in params:
            depths.append(0)
        depths[-1] += 1

    names = _names(family, depths)
    present = {(module, name): array for module, entries in params.items() for name, array in entries.items()}
    _refuse(
        family,
        [f"{module}/{name}" for module, name in present.keys() - names.keys()],
        [f"{module}/{name}" for module, name in _missing(family, names, present.keys())],
        [
            f"{module}/{name} {np.shape(array)}"
            for (module, name), array in present.items()
            if (module, name) in names and np.ndim(array) != names[module, name][1]
        ],
    )
    return family, depths, names


def haiku_to_timm(params: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Convert the authors' parameter tree to the state dict of a timm_nf network. All depths and widths work.

    Args:
        params: `{module: {name: array}}`.

    Returns:
        `{name: tensor}` in the arrays' dtype: convolutions (O, I, K, K), the classifier (O, I), gains (O, 1, 1, 1),
        biases (O,), skip gains (1,). The tensors share no memory with the arrays.

    Raises:
        ValueError: if parameters are missing, unknown or have another number of axes, with all their names; or if torch
            does not have an array's dtype.
    """
    _, _, names = layout(params)
    state_dict = {}
    for module, entries in params.items():
        for name, array in entries.items():
            target, _, axes = names[module, name]
            copy = np.array(array)
            try:
                value = torch.from_numpy(copy)
            except (TypeError, ValueError):  # a ValueError for another byte order
                raise ValueError(
                    f"expected arrays of a dtype that torch has, got {copy.dtype} for {module}/{name}; convert them "
                    "first, array.astype(np.float32)"
                ) from None
            if value.ndim == 4:  # HWIO
                value = value.permute(3, 2, 0, 1)
            elif value.ndim == 2:  # IO
                value = value.mT
            state_dict[target] = value.reshape(*value.shape, *[1] * (axes - value.ndim)).contiguous()
    return state_dict


def timm_to_haiku(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, np.ndarray]]:
    """Convert the state dict of a timm_nf network to the authors' parameter tree, the inverse of `haiku_to_timm`.

    Args:
        state_dict: All variants, depths and widths work, and so do timm's `dm_nfnet_f*`.

    Returns:
        `{module: {name: array}}` in the tensors' dtype. The arrays share no memory with the tensors.

    Raises:
        ValueError: if parameters are missing, unknown or have another number of axes, with all their names; or if numpy
            does not have a tensor's dtype.
    """
    if "stem.conv1.weight" in state_dict:
        family = "NFNet"
    elif "stem.conv.weight" in state_dict:
        family = "NF_ResNet" if state_dict["stem.conv.weight"].shape[-1] == 7 else "NF_RegNet"
    else:
        raise ValueError(
            "expected the state dict of a timm_nf network with stem.conv1.weight or stem.conv.weight, got "
            f"{len(state_dict)} names without either: {', '.join(sorted(state_dict)[:3])}, ..."
        )
    blocks = {tuple(name.split(".")[1:3]) for name in state_dict if name.startswith("stages.")}
    depths: list[int] = []
    while depth := sum(stage == str(len(depths)) for stage, *_ in blocks):
        depths.append(depth)

    names = _names(family, depths)
    sources = {timm: (haiku, axes) for haiku, (timm, axes, _) in names.items()}
    present = {sources[target][0] for target in state_dict if target in sources}
    _refuse(
        family,
        [target for target in state_dict if target not in sources],
        [names[key][0] for key in _missing(family, names, present)],
        [
            f"{target} {tuple(tensor.shape)}"
            for target, tensor in state_dict.items()
            if target in sources
            and (tensor.ndim < sources[target][1] or math.prod(tensor.shape[sources[target][1] :]) != 1)
        ],
    )
    params: dict[str, dict[str, np.ndarray]] = {}
    for target, tensor in state_dict.items():
        (module, name), axes = sources[target]
        value = tensor.detach().cpu().reshape(tensor.shape[:axes])
        if axes == 4:
            value = value.permute(2, 3, 1, 0)
        elif axes == 2:
            value = value.mT
        try:
            params.setdefault(module, {})[name] = np.array(value.numpy(), order="C")
        except TypeError:
            raise ValueError(
                f"expected tensors of a dtype that numpy has, got {tensor.dtype} for {target}; convert them first, "
                "tensor.float()"
            ) from None
    return params
