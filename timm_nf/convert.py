"""The authors' parameter trees to timm state dicts and back, bit for bit.

timm publishes converted weights, not the conversion. Here the names are one table, read in both directions.

A tree is `{module: {name: array}}` as haiku makes it: convolutions HWIO, linear layers IO, gains and biases (O,), skip
gains (). Source of the names: deepmind-research nfnets/{nfnet,nf_resnet,nf_regnet}.py at f5de0ede.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CONV = {"w": "weight", "gain": "gain", "bias": "bias"}
_LINEAR = {"w": "weight", "b": "bias"}
# haiku module of a block -> timm module, parameters; {se} is attn in NF-RegNet, attn_last elsewhere
_BLOCK = {
    "conv0": ("conv1", _CONV),
    "conv1": ("conv2", _CONV),
    "conv1b": ("conv2b", _CONV),
    "conv2": ("conv3", _CONV),
    "conv_shortcut": ("downsample.conv", _CONV),
    "squeeze_excite/~/linear": ("{se}.fc1", _LINEAR),
    "squeeze_excite/~/linear_1": ("{se}.fc2", _LINEAR),
}
_OUTSIDE = {"final_conv": ("final_conv", _CONV), "linear": ("head.fc", _LINEAR)}
_STEM4 = {f"stem_conv{i}": (f"stem.conv{i + 1}", _CONV) for i in range(4)}
_STEM1 = {"initial_conv": ("stem.conv", _CONV)}
# root module -> (block module, timm's name of squeeze-excite, modules outside of the blocks)
_FAMILIES = {
    "NFNet": ("nf_block", "attn_last", _STEM4 | _OUTSIDE),
    "NF_ResNet": ("nf_res_block", "attn_last", _STEM1 | _OUTSIDE),
    "NF_RegNet": ("nf_block", "attn", _STEM1 | _OUTSIDE),
}


def _names(family: str, depths: list[int]) -> dict[tuple[str, str], str]:
    """(haiku module, name) -> timm name, of everything a network of these depths can have."""
    block, attn, outside = _FAMILIES[family]
    modules = {f"{family}/~/{module}": target for module, target in outside.items()}
    names = {}
    places = ((stage, index) for stage, depth in enumerate(depths) for index in range(depth))
    for number, (stage, index) in enumerate(places):
        haiku, timm = f"{family}/~/{block}" + (f"_{number}" if number else ""), f"stages.{stage}.{index}"
        names[haiku, "skip_gain"] = f"{timm}.skipinit_gain"
        for module, (target, parameters) in _BLOCK.items():
            modules[f"{haiku}/~/{module}"] = f"{timm}.{target.format(se=attn)}", parameters
    for module, (target, parameters) in modules.items():
        names |= {(module, name): f"{target}.{parameter}" for name, parameter in parameters.items()}
    return names


def _is_squeeze_excite(name: str) -> bool:
    return name.endswith((".fc1.weight", ".fc2.weight"))


def _refuse(unmatched: list[str], family: str) -> None:
    if unmatched:
        raise ValueError(
            f"expected the parameters of one {family}, got {len(unmatched)} that it does not have: "
            + ", ".join(sorted(unmatched))
        )


def haiku_to_timm(params: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """State dict of a timm_nf network from the authors' parameter tree, of any depths and widths.

    Args:
        params: `{module: {name: array}}`; the arrays' dtype is kept.

    Returns:
        `{name: tensor}`: convolutions (O, I, K, K), the classifier (O, I), gains (O, 1, 1, 1), biases (O,), skip
        gains (1,). No memory is shared with the arrays.

    Raises:
        ValueError: naming every parameter that no network of the authors has.
    """
    families = {module.partition("/")[0] for module in params}
    if len(families) != 1 or not families <= _FAMILIES.keys():
        raise ValueError(
            f"expected a parameter tree with one root of {', '.join(_FAMILIES)}, got {sorted(families)}; "
            "is this the authors' checkpoint of one network?"
        )
    (family,) = families
    block = f"{family}/~/{_FAMILIES[family][0]}"
    depths: list[int] = []
    while (haiku := block + (f"_{sum(depths)}" if depths else "")) in params:
        if not depths or f"{haiku}/~/conv_shortcut" in params:  # every stage begins with a shortcut convolution
            depths.append(0)
        depths[-1] += 1

    names = _names(family, depths)
    state_dict, unmatched = {}, []
    for module, entries in params.items():
        for name, array in entries.items():
            target = names.get((module, name))
            if target is None:
                unmatched.append(f"{module}/{name}")
                continue
            value = torch.from_numpy(np.array(array))  # a copy; 0-d arrays too
            if name == "w":
                value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
                value = value[:, :, None, None] if _is_squeeze_excite(target) else value
            elif name == "gain":
                value = value.view(-1, 1, 1, 1)
            elif name == "skip_gain":
                value = value.view(1)
            state_dict[target] = value.contiguous()
    _refuse(unmatched, family)
    return state_dict


def timm_to_haiku(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, np.ndarray]]:
    """The authors' parameter tree from a state dict of a timm_nf network, the inverse of `haiku_to_timm`.

    Args:
        state_dict: Of any variant and any depths and widths, also of timm's `dm_nfnet_f*`.

    Returns:
        `{module: {name: array}}` in the tensors' dtype; no memory is shared with them.

    Raises:
        ValueError: naming every parameter that no network of the authors has.
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
    depths: list[int] = []
    while f"stages.{len(depths)}.0.skipinit_gain" in state_dict:
        depth = 1
        while f"stages.{len(depths)}.{depth}.skipinit_gain" in state_dict:
            depth += 1
        depths.append(depth)

    sources = {timm: haiku for haiku, timm in _names(family, depths).items()}
    params: dict[str, dict[str, np.ndarray]] = {}
    for target, tensor in state_dict.items():
        if target not in sources:
            continue
        module, name = sources[target]
        value = tensor.detach().cpu()
        if name == "w":
            value = value[:, :, 0, 0] if _is_squeeze_excite(target) else value
            value = value.permute(2, 3, 1, 0) if value.ndim == 4 else value.T
        else:
            value = value.reshape(()) if name == "skip_gain" else value.reshape(-1)
        params.setdefault(module, {})[name] = np.array(value.numpy(), order="C")
    _refuse([target for target in state_dict if target not in sources], family)
    return params
