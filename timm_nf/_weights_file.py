"""Reads files of weights: tells the kind by the first bytes, finds the entry with the weights, and unwraps its names.

No file can run code here. torch files are read with `weights_only=True`. safetensors files hold only tensors. The
authors' pickles are read by `timm_nf.convert`.
"""

# torch and safetensors type only a part of what they export.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import argparse
import itertools
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from . import convert
from ._text import counted, reason

__all__ = ["Weights", "load_tensors", "pick_weights", "read_content"]

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_ZIP, _PICKLE = b"PK\3\4", b"\x80"
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(\.\w+)")  # the Hub's clients name the parts of a large file like this
# Names of entries that hold tensors by name, but no weights.
_NO_WEIGHTS = re.compile(r"optim|sched|scaler|callback|loop|rng|random|hyper|config|args", re.IGNORECASE)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_AVERAGED = {"ema", "swa", "avg", "average", "averaged"}  # words in the name of an entry
# Wrappers of a whole network. They put one of these names in front of all parameter names.
_OUTER = {
    "module", "model", "net", "network", "timm_model", "ema", "model_ema", "ema_model", "averaged_model", "student",
    "teacher",
}  # fmt: skip
# Wrappers of layers or of networks. No layer has one of these names.
_INNER = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_COUNTER = "n_averaged"  # torch's AveragedModel counts its updates under this name, beside its `module`
# Objects of these packages lie beside the weights: hyper-parameters, paths, numbers, settings. They are left out.
_PASSED_OVER = {
    "pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "omegaconf",
    "deepspeed",
    "pathlib", "numpy", "typing", "datetime",
}  # fmt: skip
_PASSED_OVER_NAMES = {
    "collections.defaultdict",
    *(f"builtins.{kind}" for kind in ("dict", "list", "int", "float", "str", "frozenset", "range", "slice")),
}


class Weights(NamedTuple):
    """One set of weights in a file.

    Attributes:
        entry: The keys that lead to it, from outside to inside. () is the file itself.
        tensors: The tensors by name, without the names of wrappers. No two share memory.
        averaged: Whether the weights are an average over training steps.
    """

    entry: tuple[str, ...]
    tensors: dict[str, Tensor]
    averaged: bool


# -- the file ----------------------------------------------------------------------------------------------------------


def read_content(file: Path) -> object:
    """Read a file of weights.

    Args:
        file: The file. Its first bytes tell whether it is from torch or safetensors. A file of the authors ends in
            `.npz`, an index of several files in `.json`.

    Returns:
        Tensors by name for safetensors and for the authors' files. For a torch file, whatever was saved.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is of another kind, or reading it would run code.
    """
    if not file.is_file():
        found = "a folder, name a file in it" if file.is_dir() else "none"
        raise FileNotFoundError(f"expected a file of weights at {file}, found {found}")
    with file.open("rb") as stream:
        start = stream.read(512)
    _refuse_placeholders(file, start)
    suffix = file.suffix.lower()
    if suffix == ".npz":
        return _read_authors(file)
    if suffix == ".json":
        return _read_shards(file)
    shard = _SHARD.fullmatch(file.name)
    if shard and int(shard[3]) > 1:
        index = f"{shard[1]}{shard[4]}.index.json"
        raise ValueError(f"{file} is one of {int(shard[3])} parts of a network: give {index}, which lists them")
    return _read_one(file, start)


def _refuse_placeholders(file: Path, start: bytes) -> None:
    """Refuse what a failed download leaves in the place of the weights."""
    if not start:
        raise ValueError(f"{file} is empty: download or save it again")
    if start.startswith(_LFS_POINTER):
        raise ValueError(f"{file} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
    # HTML or XML is the answer of a server that refused.
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        raise ValueError(
            f"{file} is a web page, not the weights: download the file itself, on the Hub by its resolve link"
        )


def _read_one(file: Path, start: bytes) -> object:
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and length < 100_000_000:  # safetensors' own limit
        return _read_safetensors(file)
    if start.startswith((_ZIP, _PICKLE)):
        return _read_torch(file, is_zip=start.startswith(_ZIP))
    if file.suffix.lower() == ".safetensors" and b"\0" in start[:8]:
        return _read_safetensors(file)  # its error says what is wrong with the header
    raise ValueError(
        f"{file} is no file of weights: expected one of torch or safetensors, it begins with {start[:24]!r}"
    )


def _read_authors(file: Path) -> dict[str, Tensor]:
    params = convert.load_haiku(file)
    try:
        return convert.haiku_to_timm(params)
    except ValueError as error:
        raise ValueError(f"{file} does not have the parameters of one of the authors' networks: {error}") from error


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_tensors(file)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{file} cannot be read, it may be incomplete: {reason(error)}") from error


def load_tensors(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, each in memory of its own.

    safetensors' own reader maps the file, so its tensors are not aligned. For unaligned tensors the CPU has other
    kernels, and logits differ in the last bits. Copying the mapped tensors would take twice the memory.

    Raises:
        SafetensorError: if it is not a safetensors file, or if it becomes shorter while it is read.
    """
    mapped = load_file(file)  # checks the whole header
    tensors = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in mapped.items()}
    del mapped  # while the file is mapped, half of its pages were seen to count as used memory
    with Path(file).open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        for name, tensor in tensors.items():
            stream.seek(8 + length + header[name]["data_offsets"][0])
            memory: Any = tensor.view(-1).view(torch.uint8).numpy()
            if stream.readinto(memory) != tensor.nbytes:
                raise SafetensorError(f"{file} became shorter while it was read")
    return tensors


def _read_shards(file: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index lists."""
    try:
        places: dict[str, str] = json.loads(file.read_text("utf-8"))["weight_map"]
        shards = {shard: [name for name, at in places.items() if at == shard] for shard in sorted(set(places.values()))}
        paths = {shard: PurePosixPath(shard) for shard in shards}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"expected an index of weights in {file}, with a weight_map of names and files: {reason(error)}"
        ) from error
    tensors: dict[str, Tensor] = {}
    for shard, path in paths.items():
        if path.is_absolute() or ".." in path.parts or "\\" in shard or ":" in shard:
            raise ValueError(f"{file} names {shard!r}, expected files in its own folder")
        part = file.parent / path
        if not part.is_file():
            raise FileNotFoundError(f"{file} lists {shard}, which is not there: download all {len(shards)} files")
        with part.open("rb") as stream:
            start = stream.read(512)
        _refuse_placeholders(part, start)
        content = _read_one(part, start)
        held = cast(dict[Any, Any], content) if isinstance(content, dict) else {}
        missing = [name for name in shards[shard] if not isinstance(held.get(name), Tensor)]
        if missing:
            raise ValueError(f"{part} lacks tensors that {file.name} lists, such as {missing[0]!r}")
        tensors |= {name: held[name] for name in shards[shard]}
    return tensors


# -- torch files -------------------------------------------------------------------------------------------------------


class _PassedOver:
    """Takes the place of an object of another package, and keeps nothing of it."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _PassedOverDict:
    """Takes the place of a subclass of dict. It makes a plain dict, because torch only sets items of plain dicts."""

    def __new__(cls, *_: object) -> dict[Any, Any]:  # pyright: ignore[reportInconsistentConstructor]
        return {}


def _stand_in(name: str) -> tuple[type, str]:
    """The class that takes an object's place, and the name under which torch's reader looks for it."""
    is_dict = name.endswith(".AttributeDict") or name == "collections.defaultdict"
    return (_PassedOverDict if is_dict else _PassedOver), name


def _is_passed_over(name: str) -> bool:
    return name.partition(".")[0] in _PASSED_OVER or name in _PASSED_OVER_NAMES


def _read_torch(file: Path, is_zip: bool) -> object:
    asked: set[str] = set()  # the classes and functions that the file asks for
    try:
        if is_zip:
            _require_torch_zip(file)
            asked |= set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
        while True:
            passed_over = [_stand_in(name) for name in sorted(asked) if _is_passed_over(name)]
            try:
                # train.py saves its arguments as a Namespace. Before torch refuses a file, it may warn of its protocol.
                with (
                    torch.serialization.safe_globals([argparse.Namespace, *passed_over]),
                    warnings.catch_warnings(action="ignore"),
                    file.open("rb") as stream,  # not the path: torch would trust its suffix
                ):
                    return torch.load(stream, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                named: list[str] = re.findall(r"GLOBAL (\S+)", str(error))
                new = {name if "." in name else f"builtins.{name}" for name in named} - asked
                asked |= new
                if not any(map(_is_passed_over, new)):
                    raise
    except pickle.UnpicklingError as error:
        refused = sorted(name for name in asked if not _is_passed_over(name) and name != "argparse.Namespace")
        why = f"it asks for {', '.join(refused[:3])}" if refused else "it holds other things than tensors"
        if any(name.startswith(("torch.nn.modules.", "timm.", "timm_nf.")) for name in refused):
            why += ": it is a whole model and not its weights"
        raise ValueError(
            f"{file} is not read, because {why}; expected a checkpoint of timm's train.py, safetensors or a state "
            "dict: if you trust the file, load it yourself and save its state dict with safetensors"
        ) from error
    except Exception as error:  # torch raises many types of errors for broken files
        if isinstance(error, _NotTorchError):
            raise ValueError(str(error)) from None
        raise ValueError(f"{file} cannot be read, it may be incomplete: {reason(error)}") from error


class _NotTorchError(Exception):
    """A zip archive that torch did not write as a file of weights."""


def _require_torch_zip(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    if any(name.endswith("/constants.pkl") for name in names):
        raise _NotTorchError(f"{file} is a TorchScript program: load it yourself and save its state dict")
    if not any(name.endswith("/data.pkl") for name in names):
        held = ", ".join(name[:60] for name in names[:2]) or "nothing"
        raise _NotTorchError(f"{file} is a zip archive of other things than weights ({held}): unpack it, or save again")
    if packed:  # a few compressed bytes could fill the memory
        raise _NotTorchError(f"{file} is compressed, but torch does not compress: unpack it and save it again")


# -- the entry ---------------------------------------------------------------------------------------------------------


def pick_weights(file: Path, content: object, use_ema: bool) -> Weights:
    """Find the weights in what `read_content` returned. There must be one set, or one set of the kind asked for.

    Args:
        file: The file that it is from, for messages.
        content: What the file holds.
        use_ema: Whether to take weights that are averaged over training steps. If false, the weights of the last step
            are taken. A file that only has averaged weights gives those.

    Raises:
        ValueError: if there is no such set, or more than one. The message lists what the file holds.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"expected a state dict or a checkpoint in {file}, got {type(content).__name__}")
    entries = cast(Mapping[Any, Any], content)
    found = list(_sets(entries))
    averaged = [weights for weights in found if weights.averaged]
    if use_ema and not averaged:
        raise ValueError(f"{file} has no averaged weights (such as state_dict_ema): leave out --use-ema")
    wanted = averaged if use_ema else [weights for weights in found if not weights.averaged] or averaged
    if not wanted:
        raise ValueError(
            f"expected dense tensors by name in {file}, or in an entry such as state_dict; it holds "
            f"{_inventory(entries)}: save the network's state dict"
        )
    if len(wanted) > 1:
        names = ", ".join(f"{_name(w.entry)} ({counted(len(w.tensors), 'tensor')})" for w in wanted)
        hint = "; --use-ema takes the averaged ones" if averaged and not use_ema else ""
        raise ValueError(
            f"{file} holds several sets of weights: {names}{hint}. Save the right one as a file of its own"
        )
    (weights,) = wanted
    _refuse_what_is_not_dense(weights, file)
    return weights._replace(tensors=_apart(weights.tensors))


def _sets(entries: Mapping[Any, Any]) -> Iterator[Weights]:
    """All sets of weights in a file."""
    found = list(_nested(entries, ()))
    own = _tensors(entries)
    if own and (not found or _is_network(own)):
        found.append(((), own))
    for entry, tensors in found:
        # Lightning's callback for weight averaging stores the averages under state_dict, in the place of the weights.
        averaged = "current_model_state" in entries and entry == ("state_dict",)
        for weights in _unwrapped(Weights(entry, tensors, averaged)):
            yield weights._replace(averaged=weights.averaged or any(map(_is_averaged, weights.entry)))


def _nested(entries: Mapping[Any, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    for key, value in entries.items():
        if type(key) is not str or not isinstance(value, Mapping) or _NO_WEIGHTS.search(key):
            continue
        inner = cast(Mapping[Any, Any], value)
        tensors = _tensors(inner)
        if _is_network(tensors):
            yield (*path, key), tensors
        elif len(path) < 3:
            yield from _nested(inner, (*path, key))


def _tensors(entries: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in entries.items() if type(key) is str and isinstance(value, Tensor)}


def _is_network(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a matrix or a kernel is among the tensors. Counters and best scores are tensors by name, too."""
    return any(tensor.is_nested or tensor.ndim >= 2 for tensor in tensors.values())


def _unwrapped(weights: Weights) -> Iterator[Weights]:
    """The weights without the prefixes of wrappers. If names begin with several wrappers, each gives a set."""
    named = {_INNER.sub("", name): tensor for name, tensor in weights.tensors.items()}
    counted = named.pop(_COUNTER, None) is not None
    weights = weights._replace(averaged=weights.averaged or counted)
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in named.items():
        prefix, _, rest = name.partition(".")
        groups.setdefault(prefix if rest else "", {})[rest or name] = tensor
    wrapped = {prefix: inner for prefix, inner in groups.items() if prefix in _OUTER}
    beside = [tensor for prefix in groups.keys() - wrapped.keys() for tensor in groups[prefix].values()]
    if not beside or _in_a_holder(named):
        wrapped = groups
    elif any(tensor.is_nested or (tensor.ndim >= 2 and tensor.is_floating_point()) for tensor in beside):
        wrapped = {}  # a layer; a loss or a metric has vectors and counts
    if not any(map(_is_network, wrapped.values())):
        yield weights._replace(tensors={name: t for name, t in named.items() if not name.endswith(f".{_COUNTER}")})
        return
    for prefix, inner in wrapped.items():
        entry = (*weights.entry, prefix) if len(groups) > 1 else weights.entry
        yield from _unwrapped(weights._replace(entry=entry, tensors=inner))


def _in_a_holder(names: Iterable[str]) -> bool:
    """Whether all names begin with the same part and then differ. A network of timm has more than one child."""
    parts = [name.split(".") for name in names]
    common = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))))
    return common > 0 and len({name[common] for name in parts if len(name) > common + 1}) > 1


def _is_averaged(name: str) -> bool:
    return not _AVERAGED.isdisjoint(word.lower() for word in _WORD.findall(name))


def _name(entry: tuple[str, ...]) -> str:
    return ", ".join(part[:60] for part in entry) or "the file's own names"


def _inventory(entries: Mapping[Any, Any]) -> str:
    """The first entries of a file, in words."""
    words = [f"{str(key)[:60]} ({type(value).__name__})" for key, value in list(entries.items())[:8]]
    if len(entries) > 8:
        words.append(f"and {len(entries) - 8} more")
    return ", ".join(words) or "nothing"


def _refuse_what_is_not_dense(weights: Weights, file: Path) -> None:
    origin = ", ".join([str(file), *weights.entry])
    for name, tensor in weights.tensors.items():
        kind = None
        if tensor.is_meta:
            kind = "on the meta device, so that it has no values"
        elif tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
            kind = "sparse, nested or quantised"
        if kind:
            raise ValueError(f"expected dense tensors by name in {origin}, but {name[:100]} is {kind}")
    if weights.tensors and all(tensor.numel() == 0 for tensor in weights.tensors.values()):
        raise ValueError(
            f"all tensors in {origin} are empty. DeepSpeed leaves them empty if it shards parameters: join them with "
            "its zero_to_fp32.py first"
        )


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each in memory of its own. Otherwise training one name would change the other."""
    held: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        # A view's storage is larger than the tensor, that of an expanded tensor is smaller.
        if storage.data_ptr() in held or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        held.add(storage.data_ptr())
        apart[name] = tensor
    return apart
