"""Reads files of weights, and builds networks that hold exactly these weights.

No code in a file runs.

Examples:
    >>> import argparse
    >>> from pathlib import Path
    >>> arguments = {"depths": (1,), "channels": (16,), "group_size": 8, "num_classes": 3}
    >>> model = timm.create_model("nfnet_f0", **arguments)
    >>> args = argparse.Namespace(model="nfnet_f0", num_classes=3, model_kwargs=arguments)
    >>> torch.save({"args": args, "state_dict": model.state_dict()}, "last.pth.tar")  # as train.py does
    >>> checkpoint = read("last.pth.tar")
    >>> isinstance(checkpoint, Checkpoint), checkpoint.origin
    (True, 'last.pth.tar, state_dict')
    >>> build("nfnet_f0", checkpoint).num_classes, fill("nfnet_f0", checkpoint).training
    (3, False)

    A network without memory for its parameters gets those of a file:

    >>> written = timm_nf.hub.write_folder(model, "net", card=None)
    >>> tensors = load_tensors(Path("net", "model.safetensors"))
    >>> network = skeleton("nfnet_f0", **arguments)
    >>> assign(network, fitted(tensors, network.state_dict()), "net")
    >>> torch.equal(network.stem.conv1.weight, model.stem.conv1.weight)
    True
"""

# timm, onnx and onnxruntime have no types or partial ones.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportMissingTypeStubs=false

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from ._dtypes import FLOATS
from ._text import reason
from ._versions import input_channels
from ._weights_file import load_tensors, pick_weights, read_content

__all__ = ["FLOATS", "Checkpoint", "assign", "build", "fill", "fitted", "load_tensors", "read", "skeleton"]

# Arguments of timm.create_model that load weights from elsewhere.
_SOURCES = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a file, and what the file says about their training.

    Attributes:
        state_dict: The weights, by names without the prefixes of wrappers.
        origin: The file, and the entry in it that holds the weights.
        args: train.py's arguments, empty if the file has none.
        epoch: The epoch of the training, counted from 0.
        metric: What train.py measured with these weights on its validation split. None if it measured other weights, or
            only the training loss.
    """

    state_dict: dict[str, Tensor]
    origin: str
    args: dict[str, Any] = field(default_factory=dict[str, Any])
    epoch: int | None = None
    metric: float | None = None


def read(file: str | Path, use_ema: bool = False) -> Checkpoint:
    """Read a file of weights.

    It may be a checkpoint of train.py, Lightning or DeepSpeed, a plain or nested state dict, safetensors, an index of
    several such files, or one of the authors' checkpoints.

    Args:
        file: Its content says what it is. Only the authors' `.npz` and an index in `.json` are told by their suffix.
        use_ema: Take the averaged weights of a training. By default those of the last step, from which train.py
            resumes.

    Raises:
        FileNotFoundError: if there is no such file, or a file of an index is missing.
        ValueError: if the file is none of these, needs code to be run, or does not have exactly one such set.
    """
    file = Path(file)
    content = read_content(file)
    weights = pick_weights(file, content, use_ema)
    entries = cast(Mapping[Any, Any], content)
    args = _arguments(entries)
    epoch = entries.get("epoch")
    metric: float | None = None
    if _is_measured(args, weights.averaged, has_average=entries.get("state_dict_ema") is not None):
        metric = _number(entries.get("metric"))
    return Checkpoint(
        weights.tensors,
        ", ".join([str(file), *weights.entry]),
        args,
        epoch if type(epoch) is int else None,
        metric,
    )


def _arguments(entries: Mapping[Any, Any]) -> dict[str, Any]:
    """The arguments that train.py stored."""
    stored = entries.get("args")
    if not isinstance(stored, argparse.Namespace):
        return {}
    return vars(stored)


def _is_measured(args: Mapping[str, Any], averaged: bool, has_average: bool) -> bool:
    """Whether the file's metric is that of these weights.

    train.py validates the average if it keeps one, unless the average is on the CPU. Otherwise it validates the weights
    of the last step. Without a validation split it validates nothing.
    """
    average_is_validated = has_average and not args.get("model_ema_force_cpu", False)
    return bool(args.get("val_split")) and averaged == average_is_validated


def _number(value: object) -> float | None:
    """The value as a float, None if it is not a number, NaN or infinite."""
    if type(value) not in (int, float):
        return None
    number = cast(float, value)
    return float(number) if abs(number) < 1e9 else None


def skeleton(name: str, **kwargs: Any) -> nn.Module:
    """The network without memory for its parameters. `assign` gives it weights.

    Some networks compute buffers when they are built, which no state dict holds. Those are built in memory.

    Args:
        name: A name for `timm.create_model`.
        **kwargs: Arguments of `timm.create_model`.
    """
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    if buffers - model.state_dict().keys():
        return timm.create_model(name, **kwargs)
    return model


def build(
    name: str, checkpoint: Checkpoint, num_classes: int | None = None, labels: Sequence[str] | None = None
) -> nn.Module:
    """The trained network in evaluation mode, with the preprocessing it was trained with.

    Args:
        name: The name of a registered model.
        checkpoint: The weights, from `read`. Its arguments of train.py set the model and its preprocessing.
        num_classes: Number of classes. By default train.py's, or that of the classifier in the file, or the model's.
        labels: Names of the classes.

    Raises:
        ValueError: if timm has no such model, if the weights belong to another network, or if the labels do not fit.
    """
    if not timm.is_model(name):
        raise ValueError(f"timm knows no model {name!r}; timm.list_models() has the names")
    return fill(name, checkpoint, num_classes, labels)


def fill(
    name: str, checkpoint: Checkpoint, num_classes: int | None = None, labels: Sequence[str] | None = None
) -> nn.Module:
    """As `build`. `name` may also be `hf-hub:user/repo` or `local-dir:folder`, whose config describes the network.

    Raises:
        ValueError: if the weights belong to another network, or there is not one label for each class.
    """
    model = _structure(name, checkpoint, num_classes)
    assign(model, checkpoint.state_dict, checkpoint.origin)
    if labels is not None and len(labels) != model.num_classes:
        raise ValueError(f"expected {model.num_classes} labels, one for each class, got {len(labels)}")
    _follow_preprocessing(model, checkpoint.args, checkpoint.origin)
    if labels is not None:
        model.pretrained_cfg["label_names"] = list(labels)
    return model.eval()


def _structure(name: str, checkpoint: Checkpoint, num_classes: int | None) -> Any:
    """The network that was trained, without weights."""
    try:
        return skeleton(name, **_model_arguments(name, checkpoint, num_classes))
    except Exception as error:  # arguments from a file can make timm raise anything
        raise ValueError(
            f"{name} cannot be built with the arguments of {checkpoint.origin} ({reason(error)}): are its weights "
            "another model's?"
        ) from error


def _model_arguments(name: str, checkpoint: Checkpoint, num_classes: int | None) -> dict[str, Any]:
    """The arguments with which the network was built, as far as they are known.

    Raises:
        ValueError: if one of them would load other weights.
    """
    args = checkpoint.args
    if num_classes is None:
        num_classes = args.get("num_classes")
    if num_classes is None:
        num_classes = _other_classes(name, checkpoint)
    recorded = dict(args.get("model_kwargs") or {})
    if files := _SOURCES & recorded.keys():
        raise ValueError(f"{', '.join(sorted(files))} would load other weights")
    stated = {"num_classes": num_classes, "in_chans": args.get("in_chans"), "global_pool": args.get("gp")}
    return recorded | {key: value for key, value in stated.items() if value is not None}


def _other_classes(name: str, checkpoint: Checkpoint) -> int | None:
    """The number of classes of the file's classifier; None if it has no classifier, or the model's own number."""
    cfg = get_pretrained_cfg(name)
    if cfg is None or not isinstance(cfg.classifier, str):
        return None
    weight = checkpoint.state_dict.get(f"{cfg.classifier}.weight")
    if weight is None or weight.ndim == 0 or len(weight) == cfg.num_classes:
        return None
    return len(weight)


def _follow_preprocessing(model: Any, args: Mapping[str, Any], origin: str) -> None:
    """Record the preprocessing of train.py's arguments (size, mean, interpolation, ...) in the model's config."""
    cfg = model.pretrained_cfg
    size = cfg["input_size"][1:]
    channels = input_channels(model)
    try:
        cfg.update(resolve_data_config({"in_chans": channels, **args}, cfg))
        _ = [float(value) for value in (*cfg["mean"], *cfg["std"])]  # timm takes "abc" for three means
    except Exception as error:  # arguments from a file can make timm raise anything, even without a word
        stated = {key: args[key] for key in ("img_size", "input_size", "mean", "std") if args.get(key) is not None}
        raise ValueError(f"{origin} states a preprocessing that timm does not understand: {stated}"[:500]) from error
    cfg["input_size"] = (channels, *cfg["input_size"][1:])
    if cfg["input_size"][1:] != size:
        cfg.update(test_input_size=None, pool_size=None)  # they belong to the old size


def assign(model: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Make `tensors` the parameters and buffers of `model`, without a copy and in their dtype.

    Args:
        model: A new model. After an error it is of no use.
        tensors: The tensors, by the names in the network's state dict.
        origin: Where the tensors come from, for messages.

    Raises:
        ValueError: if names, shapes or dtypes are not the network's. Nothing is assigned then.
        RuntimeError: from the network, if it recognises the state dict of another network.
    """
    expected = model.state_dict()
    tensors = fitted(tensors, expected)
    _check_names(model, tensors, expected, origin)
    _check_shapes(model, tensors, expected, origin)
    _check_dtypes(tensors, expected, origin)
    model.load_state_dict(tensors, assign=True)


def _check_names(model: nn.Module, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str) -> None:
    # The network may recognise whose names these are, and say so. It gets its own tensors under the file's names.
    stand_ins = {name: expected.get(name, tensor) for name, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(stand_ins, strict=False, assign=True)
    parts: list[str] = []
    if missing:
        parts.append(f"lacks {_counted(missing)}")
    if unexpected:
        parts.append(f"has beside them {_counted(unexpected)}")
    if parts:
        raise ValueError(
            f"{origin} is of another architecture: of {len(expected)} names it {' and '.join(parts)}"
            f"{_whole_under_a_prefix(tensors, expected)}"
        )


def _whole_under_a_prefix(names: Collection[str], expected: Collection[str]) -> str:
    """What to do if all expected names are there under one prefix, among others; empty otherwise."""
    first = next(iter(expected))
    for prefix in (name.removesuffix(first) for name in names if name.endswith(f".{first}")):
        if all(prefix + name in names for name in expected):
            return f". All are there under {prefix[:100]!r}: save those without it as a file of its own"
    return ""


def _counted(names: Sequence[str]) -> str:
    """The number of names, and the first two names."""
    shown = [name[:100] for name in sorted(names)[:2]]
    if len(names) > 2:
        shown.append("...")
    return f"{len(names)} ({', '.join(shown)})"


def _check_shapes(model: nn.Module, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str) -> None:
    wrong = [name for name in expected if tensors[name].shape != expected[name].shape]
    if not wrong:
        return
    classifier = {f"{name}.{part}" for name in _classifiers(model) for part in ("weight", "bias")}
    if set(wrong) <= classifier and all(tensors[name].ndim == expected[name].ndim for name in wrong):
        sizes = f"{len(tensors[wrong[0]])} classes, the network {len(expected[wrong[0]])}"
        raise ValueError(f"the classifier of {origin} has {sizes}: give the number of classes of the weights")
    name = min(wrong)
    raise ValueError(
        f"{origin} is of another architecture: {len(wrong)} of {len(expected)} shapes differ, say {name} "
        f"{list(tensors[name].shape)} where the network has {list(expected[name].shape)}"
    )


def _check_dtypes(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str) -> None:
    floats = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    pairs = [(tensors[name].dtype, expected[name].dtype) for name in expected]
    wrong = {stored for stored, wanted in pairs if not _same_arithmetic(stored, wanted)}
    if len(floats) > 1 or wrong:
        found = ", ".join(sorted(map(str, wrong or floats)))
        raise ValueError(
            f"expected one floating dtype in {origin}, and integers where the network has them, got {found}"
        )


def _same_arithmetic(first: torch.dtype, second: torch.dtype) -> bool:
    """Whether both dtypes are the same, or both are floats in which networks compute."""
    return first == second or (first in FLOATS and second in FLOATS)


def fitted(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors. A tensor of one number gets the shape that `expected` has: timm's skip gains are scalars."""
    fitting = dict(tensors)
    for name, tensor in tensors.items():
        if name in expected and tensor.numel() == expected[name].numel() == 1:
            fitting[name] = tensor.reshape(expected[name].shape)
    return fitting


def _classifiers(model: Any) -> tuple[str, ...]:
    """The names of the classifiers, without any if the config holds something else. A config.json may hold anything."""
    names: Any = model.pretrained_cfg.get("classifier")
    if isinstance(names, str):
        return (names,)
    if isinstance(names, list | tuple):
        return tuple(cast(Sequence[str], names))
    return ()
