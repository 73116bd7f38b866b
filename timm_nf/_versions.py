"""The oldest torch and timm that work, and everything that depends on timm's version.

docs/compatibility.md says what each release lacks.
"""

# timm's model builder has no types.
# pyright: standard, reportPrivateImportUsage=false

from pathlib import Path
from types import ModuleType
from typing import Any, cast

import timm.models
import torch
from torch import nn
from torch.torch_version import TorchVersion

__all__ = [
    "OLDEST",
    "build_network",
    "input_channels",
    "make_head",
    "require_versions",
    "reset_head",
    "saved_arguments",
]

# Below 1.0.27 timm's factory makes other parameter groups than later where nothing decays, or everything does.
# Below 1.0.26 timm reads a folder's safetensors file by `torch.load`, which torch 2.6 cannot do.
OLDEST = {"torch": "2.6", "timm": "1.0.27"}

# Since 1.0.31 timm's factory records a network's arguments, and its loader asks the network which stem to convert.
_TIMM_RECORDS = hasattr(timm.models, "get_model_args")
_NO_ARGUMENTS = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only", "out_indices", "feature_cls"}
_NO_ARGUMENTS |= {"device", "dtype"}  # arguments that are not part of a saved network


def require_versions() -> None:
    """Refuse a torch or timm that is too old. It may not be the one that pip installed and checked.

    `python train.py` in a clone of timm's repository imports the clone.

    Raises:
        ImportError: if one is too old.
    """
    for package in (torch, timm):
        _require(package)


def _require(package: ModuleType) -> None:
    name, found, needed = package.__name__, str(package.__version__), OLDEST[package.__name__]
    if TorchVersion(found) < needed:
        folder = Path(str(package.__file__)).parent
        raise ImportError(
            f"timm_nf needs {name} {needed} or newer, but {name} {found} was imported from {folder}: upgrade it with "
            f"`pip install --upgrade {name}`, or, if that is a clone of its repository, update the clone"
        )


def build_network(
    network: type[nn.Module], name: str, pretrained: bool, *, asked: dict[str, Any], **kwargs: Any
) -> Any:
    """Build a network by timm's builder. Its arguments are recorded, and only its own filter converts its stem.

    timm below 1.0.31 converts the stem that the config names to other numbers of input channels. It does so after our
    filter, which has converted it already, and draws a random stem if the weights do not have 3 channels. Therefore the
    config names no stem until the network is built.

    Args:
        network: The network's class.
        name: The name in timm's registry.
        pretrained: Whether to load weights.
        asked: The caller's keywords, for the builder and the network.
        **kwargs: Our keywords for the builder.
    """
    options = dict(asked)
    if not _TIMM_RECORDS:
        options["pretrained_cfg_overlay"] = {**(asked.get("pretrained_cfg_overlay") or {}), "first_conv": None}
    made = cast(Any, timm.models.build_model_with_cfg(network, name, pretrained, **kwargs, **options))
    if not _TIMM_RECORDS:
        cfg: Any = timm.models.get_pretrained_cfg(name)
        made.pretrained_cfg["first_conv"] = cfg.first_conv
        if isinstance(made, network):
            cast(Any, made)._model_args = {key: value for key, value in asked.items() if key not in _NO_ARGUMENTS}
    return made


def make_head(in_features: int, num_classes: int, pool_type: str, drop_rate: float, device: Any, dtype: Any) -> Any:
    """A `ClassifierHead` of timm."""
    head_class = timm.layers.ClassifierHead
    return head_class(in_features, num_classes, pool_type, drop_rate, device=device, dtype=dtype)


def reset_head(head: Any, num_classes: int, pool_type: str | None, device: Any, dtype: Any) -> None:
    """Replace the classifier of timm's head. Its `reset` takes device and dtype since 1.0.31."""
    if _TIMM_RECORDS:
        head.reset(num_classes, pool_type, device=device, dtype=dtype)
    else:
        head.reset(num_classes, pool_type)
        head.to(device=device, dtype=dtype).train(head.training)


def input_channels(model: Any) -> int:
    """The channels that any timm model takes. Most name them; the others' first convolution has them."""
    stated: int | None = getattr(model, "in_chans", None)
    if stated is not None:
        return stated
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    first = cfg.get("first_conv") or ""
    convs = [first] if isinstance(first, str) else list(first)
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") in convs and parameter.ndim == 4:
            return parameter.shape[1]
    return cfg.get("input_size", (3,))[0]


def saved_arguments(model: nn.Module) -> dict[str, Any]:
    """Arguments for timm's writer of configs. It has to be told the network's arguments if its factory records none."""
    if _TIMM_RECORDS:
        return {}
    return {"model_args": dict(getattr(model, "_model_args", {}))}
