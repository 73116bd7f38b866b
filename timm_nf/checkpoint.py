"""Files of weights, and a network that gets exactly what is in them.

Nothing read here can run code: safetensors, and torch files with `weights_only=True`.
"""

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.models import clean_state_dict
from torch import Tensor, nn

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # networks compute in these, not in 8 bits


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
    args: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    metric: float | None = None


def read(file: str | Path, use_ema: bool = False) -> Checkpoint:
    """Read train.py's checkpoints, safetensors and plain state dicts.

    Args:
        file: By its name, `*.safetensors` or a torch file.
        use_ema: The averaged weights of a training with `--model-ema`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is none of these, needs code to be run, or has no averaged weights.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"expected a file of weights, found none at {file}")
    content = _read(file)
    if not isinstance(content, dict):
        raise ValueError(f"expected a state dict or a checkpoint in {file}, got {type(content).__name__}")
    ema = content.get("state_dict_ema") is not None
    if use_ema and not ema:
        raise ValueError(f"{file} has no averaged weights (state_dict_ema); leave out --use-ema")
    key = "state_dict_ema" if use_ema else "state_dict" if "state_dict" in content else ""
    state_dict = content[key] if key else content
    if not isinstance(state_dict, Mapping) or not all(type(k) is str and _dense(v) for k, v in state_dict.items()):
        raise ValueError(f"expected dense tensors by name in {file}{f', {key}' if key else ''}, got something else")
    stored = content.get("args") if key else None
    args = vars(stored) if isinstance(stored, argparse.Namespace) else {}
    # With an average, train.py validates that; unless it is kept on the CPU, where it is not validated.
    measured = bool(args.get("val_split")) and use_ema == (ema and not args.get("model_ema_force_cpu", False))
    return Checkpoint(
        clean_state_dict(dict(state_dict)),
        f"{file}, {key}" if key else str(file),
        args,
        content.get("epoch") if key else None,
        _number(content.get("metric")) if key and measured else None,
    )


def _dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_nested or value.is_quantized)


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and abs(value) < 1e9 else None  # neither NaN nor infinite


def _read(file: Path) -> Any:
    if file.suffix == ".npz":
        raise ValueError(
            f"{file} is not read here: `timm-nf convert` takes the authors' checkpoints, no other .npz is one"
        )
    try:
        if file.suffix == ".safetensors":
            return load_tensors(file)
        # train.py's arguments; and torch announces pickle protocols before it refuses what is in them
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        names = ", ".join(sorted(set(re.findall(r"GLOBAL (\S+)", str(error)))))
        reason = f"it asks for {names}" if names else "it is no torch file of tensors alone"
        raise ValueError(
            f"{file} is not read, because {reason}; expected a checkpoint of timm's train.py, safetensors or a state "
            "dict: load what you trust yourself and save its state dict with safetensors"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} cannot be read, it may be incomplete: {reason}") from error


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

    Args:
        name: As `timm.create_model` takes it.
        **kwargs: Likewise.
    """
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
    if any(module._non_persistent_buffers_set for module in model.modules()):
        return timm.create_model(name, **kwargs)  # computed when built and in no file
    return model


def build(
    name: str, checkpoint: Checkpoint, num_classes: int | None = None, labels: Sequence[str] | None = None
) -> nn.Module:
    """The trained network in evaluation mode, with the preprocessing it was trained with.

    Args:
        name: Of the model, as `timm.create_model` takes it.
        checkpoint: As `read` gives it; of train.py's arguments those about the model and its input are followed.
        num_classes: By default train.py's, or else the model's.
        labels: Names of the classes.

    Raises:
        ValueError: if timm has no such model, or the weights or the labels are not this network's.
    """
    if not timm.is_model(name):
        raise ValueError(f"timm knows no model {name!r}; timm.list_models() has the names")
    args = checkpoint.args
    num_classes = args.get("num_classes") if num_classes is None else num_classes
    given = {"num_classes": num_classes, "in_chans": args.get("in_chans"), "global_pool": args.get("gp")}
    given = {key: value for key, value in given.items() if value is not None}
    try:
        recorded = dict(args.get("model_kwargs") or {})
        if files := _SOURCES & recorded.keys():
            raise ValueError(f"{', '.join(sorted(files))} would load other weights")
        model: Any = skeleton(name, **(recorded | given))
    except Exception as error:  # whatever the arguments in a checkpoint make timm raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"{name} cannot be built with the arguments of {checkpoint.origin} ({reason}): are its weights another "
            "model's?"
        ) from error
    assign(model, checkpoint.state_dict, checkpoint.origin)
    if labels is not None and len(labels) != model.num_classes:
        raise ValueError(f"expected {model.num_classes} labels, one for each class, got {len(labels)}")
    cfg = model.pretrained_cfg
    size = cfg["input_size"][1:]
    cfg.update(resolve_data_config({"in_chans": model.in_chans, **args}, cfg))
    cfg["input_size"] = (model.in_chans, *cfg["input_size"][1:])
    if cfg["input_size"][1:] != size:
        cfg.update(test_input_size=None, pool_size=None)  # belong to the other size
    if labels is not None:
        cfg["label_names"] = list(labels)
    return model.eval()


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
    # Its own tensors under these names: a network may know whose state dict that is, and says so.
    names = {name: expected.get(name, tensor) for name, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(names, strict=False, assign=True)
    if missing or unexpected:
        parts = [
            f"{what} {len(names)} ({', '.join(n[:100] for n in sorted(names)[:2])}{', ...' if len(names) > 2 else ''})"
            for what, names in (("lacks", missing), ("has beside them", unexpected))
            if names
        ]
        raise ValueError(f"{origin} is of another architecture: of {len(expected)} names it {' and '.join(parts)}")
    wrong = [name for name in expected if tensors[name].shape != expected[name].shape]
    classifier = {f"{name}.{part}" for name in _classifiers(model) for part in ("weight", "bias")}
    if wrong and set(wrong) <= classifier:
        sizes = f"{len(tensors[wrong[0]])} classes, the network {len(expected[wrong[0]])}"
        raise ValueError(f"the classifier of {origin} has {sizes}: give the number of classes of the weights")
    if wrong:
        name = min(wrong)
        raise ValueError(
            f"{origin} is of another architecture: {len(wrong)} of {len(expected)} shapes differ, say {name} "
            f"{list(tensors[name].shape)} where the network has {list(expected[name].shape)}"
        )
    floats = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    kinds = [n for n in expected if _kind(tensors[n]) != _kind(expected[n])]
    if len(floats) > 1 or kinds:
        found = sorted({str(tensors[name].dtype) for name in kinds} or map(str, floats))
        raise ValueError(
            f"expected one floating dtype in {origin}, and integers where the network has them, got {', '.join(found)}"
        )
    model.load_state_dict(tensors, assign=True)


def fitted(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with a single number as the shape that `expected` has for it: timm's skip gains are scalars."""
    return {
        name: tensor.reshape(expected[name].shape)
        if name in expected and tensor.numel() == expected[name].numel() == 1
        else tensor
        for name, tensor in tensors.items()
    }


def _kind(tensor: Tensor) -> Any:
    return "floating" if tensor.dtype in _FLOATS else tensor.dtype


def _classifiers(model: Any) -> tuple[str, ...]:
    names = model.pretrained_cfg.get("classifier")  # as a config.json says, which may be anything
    return (names,) if isinstance(names, str) else tuple(names) if isinstance(names, list | tuple) else ()
