"""Files of weights, and a network that gets exactly what is in them.

Nothing read here can run code. torch files are read with `weights_only=True`, safetensors hold only tensors, and the
authors' pickles are read by `timm_nf.convert`.
"""

# timm, onnx and onnxruntime have no types or partial ones.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportMissingTypeStubs=false

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.models import clean_state_dict, get_pretrained_cfg
from torch import Tensor, nn

from . import convert
from ._text import reason

__all__ = ["Checkpoint", "assign", "build", "fill", "fitted", "load_tensors", "read", "skeleton"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # networks compute in these, not in 8 bits

# Arguments of timm.create_model that would load weights from elsewhere.
_SOURCES = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        state_dict: Without the prefixes that wrappers leave.
        origin: The file and the entry in it that the weights are from.
        args: train.py's arguments, empty if the file has none.
        epoch: Of the training, counted from 0.
        metric: What train.py measured of these weights on its validation split; None where it measured others, or only
            the training loss.
    """

    state_dict: dict[str, Tensor]
    origin: str
    args: dict[str, Any] = field(default_factory=dict[str, Any])
    epoch: int | None = None
    metric: float | None = None


def read(file: str | Path, use_ema: bool = False) -> Checkpoint:
    """Read train.py's checkpoints, safetensors, plain state dicts and the authors' checkpoints.

    Args:
        file: Its suffix says what it is: `.safetensors`, `.npz` for the authors', otherwise a torch file.
        use_ema: The averaged weights of a training with `--model-ema`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is none of these, needs code to be run, or has no averaged weights.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"expected a file of weights, found none at {file}")
    if file.suffix == ".npz":
        content: object = _read_authors(file)
    elif file.suffix == ".safetensors":
        content = _read_safetensors(file)
    else:
        content = _read_torch(file)
    return _checkpoint(file, content, use_ema)


def _checkpoint(file: Path, content: object, use_ema: bool) -> Checkpoint:
    """What a file holds, from what its reader returned."""
    if not isinstance(content, dict):
        raise ValueError(f"expected a state dict or a checkpoint in {file}, got {type(content).__name__}")
    entries = cast(dict[Any, Any], content)
    has_ema = entries.get("state_dict_ema") is not None
    if use_ema and not has_ema:
        raise ValueError(f"{file} has no averaged weights (state_dict_ema); leave out --use-ema")
    if not use_ema and "state_dict" not in entries:
        return Checkpoint(_state_dict(entries, str(file)), str(file))
    key = "state_dict_ema" if use_ema else "state_dict"
    origin = f"{file}, {key}"
    stored = entries.get("args")
    args = vars(stored) if isinstance(stored, argparse.Namespace) else {}
    metric = _number(entries.get("metric")) if _is_measured(args, use_ema, has_ema) else None
    return Checkpoint(_state_dict(entries[key], origin), origin, args, entries.get("epoch"), metric)


def _state_dict(value: object, origin: str) -> dict[str, Tensor]:
    """The tensors by name, without the prefixes that wrappers leave."""
    if isinstance(value, Mapping):
        tensors = dict(cast(Mapping[Any, Any], value))
        if all(type(name) is str and _is_dense(tensor) for name, tensor in tensors.items()):
            return clean_state_dict(tensors)
    raise ValueError(f"expected dense tensors by name in {origin}, got something else")


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_nested or value.is_quantized)


def _is_measured(args: Mapping[str, Any], use_ema: bool, has_ema: bool) -> bool:
    """Whether the file's metric is that of these weights: train.py validates one of the two kinds.

    That is the average if there is one, unless it is kept on the CPU. Without a validation split it is neither.
    """
    average_is_validated = has_ema and not args.get("model_ema_force_cpu", False)
    return bool(args.get("val_split")) and use_ema == average_is_validated


def _number(value: object) -> float | None:
    """The value as a float, None if it is not a number, NaN or infinite."""
    if type(value) not in (int, float):
        return None
    number = cast(float, value)
    return float(number) if abs(number) < 1e9 else None


def _read_authors(file: Path) -> dict[str, Tensor]:
    params = convert.load_haiku(file)
    try:
        return convert.haiku_to_timm(params)
    except ValueError as error:
        raise ValueError(f"{file} has not the parameters of one of the authors' networks: {error}") from error


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_tensors(file)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} cannot be read, it may be incomplete: {reason(error)}") from error


def _read_torch(file: Path) -> object:
    try:
        # train.py's arguments are a Namespace; torch warns of pickle protocols before it refuses what is in them.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        names = ", ".join(sorted(set(re.findall(r"GLOBAL (\S+)", str(error)))))
        why = f"it asks for {names}" if names else "it is no torch file of tensors alone"
        raise ValueError(
            f"{file} is not read, because {why}; expected a checkpoint of timm's train.py, safetensors or a state "
            "dict: load what you trust yourself and save its state dict with safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{file} cannot be read, it may be incomplete: {reason(error)}") from error


def load_tensors(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own that is allocated once.

    safetensors' own reader maps the file. That leaves tensors unaligned, for which the CPU has other kernels: logits
    differ in the last bits; and copies of them would need the memory twice.

    Raises:
        SafetensorError: if the file is none, or loses bytes meanwhile.
    """
    mapped = load_file(file)  # checks the whole header
    tensors = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in mapped.items()}
    del mapped  # half of the file's pages were seen to count as memory as long as it is mapped
    with Path(file).open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        for name, tensor in tensors.items():
            stream.seek(8 + length + header[name]["data_offsets"][0])
            memory: Any = tensor.view(-1).view(torch.uint8).numpy()
            if stream.readinto(memory) != tensor.nbytes:
                raise SafetensorError(f"{file} became shorter while it was read")
    return tensors


def skeleton(name: str, **kwargs: Any) -> nn.Module:
    """The network without memory for its parameters, to be filled by `assign`.

    A network with buffers that are in no state dict, computed when it is built, has memory.

    Args:
        name: As `timm.create_model` takes it.
        **kwargs: Likewise.
    """
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
    if {name for name, _ in model.named_buffers(remove_duplicate=False)} - model.state_dict().keys():
        return timm.create_model(name, **kwargs)
    return model


def build(
    name: str, checkpoint: Checkpoint, num_classes: int | None = None, labels: Sequence[str] | None = None
) -> nn.Module:
    """The trained network in evaluation mode, with the preprocessing it was trained with.

    Args:
        name: Of a registered model.
        checkpoint: As `read` gives it; of train.py's arguments those about the model and its input are followed.
        num_classes: By default train.py's, or else that of the classifier in the file, or else the model's.
        labels: Names of the classes.

    Raises:
        ValueError: if timm has no such model, or the weights or the labels are not this network's.
    """
    if not timm.is_model(name):
        raise ValueError(f"timm knows no model {name!r}; timm.list_models() has the names")
    return fill(name, checkpoint, num_classes, labels)


def fill(
    name: str, checkpoint: Checkpoint, num_classes: int | None = None, labels: Sequence[str] | None = None
) -> nn.Module:
    """As `build`, and `name` may also be a place: `hf-hub:user/repo`, `local-dir:folder`, which give the structure.

    Raises:
        ValueError: if the weights are of another network, or there is not one label for each class.
    """
    model = _structure(name, checkpoint, num_classes)
    assign(model, checkpoint.state_dict, checkpoint.origin)
    if labels is not None and len(labels) != model.num_classes:
        raise ValueError(f"expected {model.num_classes} labels, one for each class, got {len(labels)}")
    _follow_preprocessing(model, checkpoint.args)
    if labels is not None:
        model.pretrained_cfg["label_names"] = list(labels)
    return model.eval()


def _structure(name: str, checkpoint: Checkpoint, num_classes: int | None) -> Any:
    """The network that was trained, without weights."""
    args = checkpoint.args
    try:
        if num_classes is None:
            num_classes = args.get("num_classes")
        if num_classes is None:
            num_classes = _other_classes(name, checkpoint)
        stated = {"num_classes": num_classes, "in_chans": args.get("in_chans"), "global_pool": args.get("gp")}
        recorded = dict(args.get("model_kwargs") or {})
        if files := _SOURCES & recorded.keys():
            raise ValueError(f"{', '.join(sorted(files))} would load other weights")
        return skeleton(name, **(recorded | {key: value for key, value in stated.items() if value is not None}))
    except Exception as error:  # whatever the arguments in a checkpoint make timm raise
        raise ValueError(
            f"{name} cannot be built with the arguments of {checkpoint.origin} ({reason(error)}): are its weights "
            "another model's?"
        ) from error


def _other_classes(name: str, checkpoint: Checkpoint) -> int | None:
    """The number of classes of the file's classifier; None if it has none, or the model's own number."""
    cfg = get_pretrained_cfg(name)
    if cfg is None or not isinstance(cfg.classifier, str):
        return None
    weight = checkpoint.state_dict.get(f"{cfg.classifier}.weight")
    if weight is None or weight.ndim == 0 or len(weight) == cfg.num_classes:
        return None
    return len(weight)


def _follow_preprocessing(model: Any, args: Mapping[str, Any]) -> None:
    """Note on the model the size, mean, interpolation, ... that train.py's arguments state."""
    cfg = model.pretrained_cfg
    size = cfg["input_size"][1:]
    cfg.update(resolve_data_config({"in_chans": model.in_chans, **args}, cfg))
    cfg["input_size"] = (model.in_chans, *cfg["input_size"][1:])
    if cfg["input_size"][1:] != size:
        cfg.update(test_input_size=None, pool_size=None)  # belong to the other size


def assign(model: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Make `tensors` the parameters and buffers of `model`, without a copy and in their dtype.

    Args:
        model: A new one; after an error it is of no use.
        tensors: By the names in the network's state dict.
        origin: Of the tensors, for messages.

    Raises:
        ValueError: if names, shapes or dtypes are not the network's, before anything is assigned.
        RuntimeError: from the network, if it recognises the state dict as another network's.
    """
    expected = model.state_dict()
    tensors = fitted(tensors, expected)
    _check_names(model, tensors, expected, origin)
    _check_shapes(model, tensors, expected, origin)
    _check_dtypes(tensors, expected, origin)
    model.load_state_dict(tensors, assign=True)


def _check_names(model: nn.Module, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str) -> None:
    # The network's own tensors under the file's names: it may know whose state dict that is, and says so.
    stand_ins = {name: expected.get(name, tensor) for name, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(stand_ins, strict=False, assign=True)
    parts: list[str] = []
    if missing:
        parts.append(f"lacks {_counted(missing)}")
    if unexpected:
        parts.append(f"has beside them {_counted(unexpected)}")
    if parts:
        raise ValueError(f"{origin} is of another architecture: of {len(expected)} names it {' and '.join(parts)}")


def _counted(names: Sequence[str]) -> str:
    """How many names, and the first two of them."""
    shown = [name[:100] for name in sorted(names)[:2]]
    if len(names) > 2:
        shown.append("...")
    return f"{len(names)} ({', '.join(shown)})"


def _check_shapes(model: nn.Module, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str) -> None:
    wrong = [name for name in expected if tensors[name].shape != expected[name].shape]
    if not wrong:
        return
    classifier = {f"{name}.{part}" for name in _classifiers(model) for part in ("weight", "bias")}
    if set(wrong) <= classifier:
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
    """Whether both are floats that networks compute in, or the same dtype."""
    return first == second or (first in _FLOATS and second in _FLOATS)


def fitted(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with a single number as the shape that `expected` has for it: timm's skip gains are scalars."""
    return {
        name: tensor.reshape(expected[name].shape)
        if name in expected and tensor.numel() == expected[name].numel() == 1
        else tensor
        for name, tensor in tensors.items()
    }


def _classifiers(model: Any) -> tuple[str, ...]:
    """Names of the classifiers, () if the model's config says something that is no name: a config.json may."""
    names: Any = model.pretrained_cfg.get("classifier")
    if isinstance(names, str):
        return (names,)
    return tuple(names) if isinstance(names, list | tuple) else ()
