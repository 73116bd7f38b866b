"""Writes a network as a folder in Hub layout. Every file is read back and compared.

Examples:
    >>> from pathlib import Path
    >>> model = timm.create_model("nfnet_f0", depths=(1,), channels=(16,), group_size=8, num_classes=3)
    >>> written = write_folder(model, "net", card=None)
    >>> isinstance(written, Written), sorted(written.files)
    (True, ['config.json', 'model.safetensors'])
    >>> written.sha256 == sha256_of(Path("net", "model.safetensors"))
    True
    >>> len(git_blob_id(Path("net", "config.json")))
    40
    >>> first_not_finite({"a": torch.ones(1), "b": torch.tensor([float("nan")])})
    'b'
"""

# timm and safetensors type only a part of what they export.
# pyright: reportPrivateImportUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import copy
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import safetensors
import timm
import torch
from huggingface_hub import ModelCardData
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.models._hub import save_config_for_hf  # timm.models has only save_for_hf, which writes weights too
from torch import Tensor, nn

from .._dtypes import FLOATS, dtype_name
from .._labels import own_labels
from .._relative_error import relative_error
from .._temporary import temporary_folder
from .._text import reason
from .._versions import input_channels, saved_arguments
from .._wrappers import innermost
from ..checkpoint import assign, fitted, skeleton
from ..version import __version__
from .card import Facts, metadata, network_card

__all__ = [
    "CONFIG", "README", "WEIGHTS", "Written", "first_not_finite", "git_blob_id", "sha256_of", "write_folder",
]  # fmt: skip

WEIGHTS = "model.safetensors"
"""The name of the file of weights in a Hub folder."""
CONFIG = "config.json"
"""The name of the config in a Hub folder."""
README = "README.md"
"""The name of the card in a Hub folder."""
_PINNED = re.compile(r"[^@]+@[0-9a-f]{40}")  # a repository and a commit, as `hub.pull` records them
# Arguments that every network has. The card names them only if they have another value.
_USUAL_ARGUMENTS = {"fused": False, "in_chans": 3, "global_pool": "avg", "num_classes": 1000}


@dataclass(frozen=True)
class Written:
    """What `write_folder` wrote, or `hub.push` published.

    Attributes:
        files: The size in bytes of every file, by name.
        sha256: The sha256 of model.safetensors.
        checks: What was compared, and the result, in words.
        card: The text of the card, even if an older README.md stays; empty without a card.
        url: The address of the commit or the pull request, None if nothing was uploaded.
        commit: The id of the commit, None if nothing was uploaded.
    """

    files: dict[str, int]
    sha256: str
    checks: list[tuple[str, str]]
    card: str
    url: str | None = None
    commit: str | None = None


def write_folder(
    model: nn.Module,
    folder: str | Path,
    *,
    card: ModelCardData | Mapping[str, Any] | None,
    dtype: torch.dtype | None = None,
    architecture: str | None = None,
    overwrite_card: bool = False,
    repo_id: str | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> Written:
    """Write a network as a Hub repository: model.safetensors, config.json and README.md, read back and compared.

    Args:
        model: Any model that timm's factory made. It is not changed.
        folder: A new folder appears whole or not at all. In an existing folder, each file is replaced whole.
        card: Fields of the card's metadata, with the license. None writes no README.md.
        dtype: Dtype to round floating weights to. By default they stay as they are.
        architecture: The name in timm's registry under which others load the files. By default the model's own.
        overwrite_card: Replace an existing README.md.
        repo_id: The repository that the card's snippet loads. By default it loads the folder.
        recipe: Settings of the training, for the card.

    Raises:
        ValueError: if the model cannot be saved, or the card has no license.
        RuntimeError: if the files do not give the same tensors and logits.
    """
    folder = Path(folder)
    source: Any = innermost(model)
    own = _own_architecture(source)
    architecture = architecture or own
    if not timm.is_model(architecture):
        raise ValueError(f"timm knows no architecture {architecture!r}")
    title = repo_id or folder.resolve().name
    data = None if card is None else _metadata(card, title, source)
    tensors = _publishable(source, dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder.parent) as temporary:
        new = temporary / "new"
        new.mkdir()
        _write_config(source, new / CONFIG, architecture, str(data.license) if data else None)
        tensors = _as_loaded(tensors, new, architecture)
        _write_weights(tensors, new)
        back = _read_back(source, tensors, new, None if architecture == own else architecture)
        sha256 = sha256_of(new / WEIGHTS)
        text = ""
        if data is not None:
            facts = Facts(
                architecture=architecture,
                arguments=_unusual_arguments(new / CONFIG),
                source=f"hf-hub:{repo_id}" if repo_id else f"local-dir:{folder}",
                parameters=sum(p.numel() for p in source.parameters()),
                dtype=", ".join(sorted({dtype_name(t.dtype) for t in tensors.values()})),
                sha256=sha256,
                size=(new / WEIGHTS).stat().st_size,
                versions=_versions(),
                base=_pinned_base(source),
                deviation=back.deviation,
                recipe=recipe or {},
            )
            text = network_card(data, title, facts)
            if overwrite_card or not (folder / README).exists():
                (new / README).write_text(text, encoding="utf-8")
        files = _move_into_place(new, folder)
    return Written(files, sha256, back.checks, text)


def sha256_of(file: Path) -> str:
    """The sha256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def git_blob_id(file: Path) -> str:
    """The id that git gives to a blob with a file's content."""
    header = b"blob %d\0" % file.stat().st_size
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.sha1(header)).hexdigest()


# -- the network -------------------------------------------------------------------------------------------------------


def _own_architecture(model: Any) -> str:
    """The model's name in timm's registry.

    Raises:
        ValueError: if timm's factory did not make the model, or cannot make it again.
    """
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    if not cfg.get("architecture") or not hasattr(model, "forward_head"):
        raise ValueError(f"expected a classifier made by timm.create_model, got {type(model).__name__}")
    # `fuse` sets this attribute on timm's own networks. Ours have a property of that name, and can be built fused.
    if vars(model).get("fused"):
        raise ValueError(
            f"a fused model of timm's own {cfg['architecture']} has no architecture in timm that loads it: save it "
            "before fusing, or write it with `timm-nf export` as .onnx, .pt2 or .ts"
        )
    return cfg["architecture"]


def _pinned_base(model: Any) -> str | None:
    """The repository and commit that the weights were pulled from, `user/repo@commit`; None if they were not."""
    recorded = str(model.pretrained_cfg.get("hf_hub_id"))
    return recorded if _PINNED.fullmatch(recorded) else None


def _metadata(card: ModelCardData | Mapping[str, Any], title: str, model: Any) -> ModelCardData:
    """The card's metadata. The repository that the weights were pulled from becomes the base model."""
    base = _pinned_base(model)
    return metadata(card, title.rpartition("/")[2], base.partition("@")[0] if base else None)


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None if all are finite."""
    for name, tensor in tensors.items():
        # Both extremes are NaN if one entry is. A mask of all entries would need memory.
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            return name
    return None


def _publishable(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors to write: on the CPU, contiguous, finite, in one floating dtype, and each in its own memory.

    Raises:
        ValueError: if a tensor is infinite or NaN, sparse, on the meta device, or has a dtype in which networks do not
            compute, or if there are several floating dtypes.
    """
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"expected a floating dtype ({', '.join(map(str, FLOATS))}), got {dtype}")
    tensors: dict[str, Tensor] = {}
    held: set[int] = set()
    for name, tensor in model.state_dict().items():
        _require_numbers(name, tensor)
        rounded = tensor.detach().cpu()
        if dtype is not None and rounded.is_floating_point():
            rounded = rounded.to(dtype)
        rounded = rounded.contiguous()
        if first_not_finite({name: rounded}):
            why = f"too large for {dtype}" if torch.isfinite(tensor).all() else "NaN or infinite"
            raise ValueError(f"{name} is {why}: such a network is not published")
        # safetensors refuses tensors that share memory, such as tied weights and views.
        memory = rounded.untyped_storage().data_ptr()
        tensors[name] = rounded.clone() if memory in held else rounded
        held.add(memory)
    dtypes = sorted({str(t.dtype) for t in tensors.values() if t.is_floating_point()})
    if len(dtypes) > 1:
        raise ValueError(f"expected weights in one floating dtype, got {', '.join(dtypes)}: give dtype to choose one")
    return tensors


def _require_numbers(name: str, tensor: Tensor) -> None:
    """Refuse a tensor without values, one that is not dense, and one with a dtype in which networks do not compute."""
    if tensor.is_meta:
        raise ValueError(f"expected a model with weights, {name} is on the meta device")
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        raise ValueError(f"expected dense tensors, {name} is sparse, nested or quantised")
    if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in FLOATS):
        raise ValueError(f"expected weights in {', '.join(map(str, FLOATS))}, {name} is {tensor.dtype}")


# -- writing -----------------------------------------------------------------------------------------------------------


def _write_config(model: Any, file: Path, architecture: str, license: str | None) -> None:
    """Write timm's config with these corrections.

    - `architecture` may differ from the model's own.
    - The license is the card's. timm would copy the tag and the license of the architecture's published weights.
    - The number of classes stands only at the top level, where timm finds it. timm repeats it in `model_args`, and
      transformers' Auto classes then pass it twice.

    Raises:
        ValueError: if the network is fused and the architecture is not its own, or if the labels do not fit.
    """
    labels = own_labels(model, "the model's config")
    save_config_for_hf(model, cast(Any, file), labels, **saved_arguments(model))  # typed str, opened as a Path
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    config["architecture"] = architecture
    pretrained_cfg: dict[str, Any] = config["pretrained_cfg"]
    for key in ("input_size", "test_input_size"):  # timm below 1.0.31 writes the architecture's number of channels
        if key in pretrained_cfg:
            pretrained_cfg[key][0] = input_channels(model)
    for key in ("tag", "license"):
        pretrained_cfg.pop(key, None)
    if license:
        pretrained_cfg["license"] = license
    arguments: dict[str, Any] = config.get("model_args", {})
    arguments.pop("num_classes", None)
    # Stock timm's networks raise at the argument `fused`, which keeps our weights out of its own nfnet_f0. Another
    # architecture is meant to load them, so the argument goes.
    if architecture != _own_architecture(model) and arguments.pop("fused", False):
        raise ValueError(f"a fused network cannot be loaded as {architecture}: push it before fusing")
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _unusual_arguments(file: Path) -> dict[str, Any]:
    """The arguments that a config gives to `timm.create_model`, without the usual ones."""
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    arguments: dict[str, Any] = config.get("model_args", {}) | {"num_classes": config["num_classes"]}
    unusual: dict[str, Any] = {}
    for key, value in arguments.items():
        if isinstance(value, list):
            unusual[key] = tuple(cast(list[Any], value))  # as callers write it; JSON has no tuples
        elif key not in _USUAL_ARGUMENTS or value != _USUAL_ARGUMENTS[key]:
            unusual[key] = value
    return unusual


def _as_loaded(tensors: Mapping[str, Tensor], folder: Path, architecture: str) -> dict[str, Tensor]:
    """The tensors in the shapes of the network that the folder's config describes.

    Raises:
        ValueError: if that network cannot be built, or does not take the tensors.
    """
    try:
        described = skeleton(f"local-dir:{folder}")
        shaped = fitted(tensors, described.state_dict())
        assign(described, shaped, "the model")
    except Exception as error:  # timm's, torch's and the networks' own
        raise ValueError(
            f"as {architecture}, with the arguments that timm.create_model recorded, the model could not be loaded "
            f"again ({reason(error)}): create it with timm.create_model, and push it as an architecture with its shapes"
        ) from error
    return shaped


def _write_weights(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write the tensors beside the config, with the config's file mode.

    Raises:
        RuntimeError: if safetensors cannot write them.
    """
    file = folder / WEIGHTS
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        size = sum(t.nbytes for t in tensors.values())
        raise RuntimeError(f"{size:,} bytes could not be written to {folder}: {error}; make room there") from error
    file.chmod((folder / CONFIG).stat().st_mode)  # safetensors lets only the owner read


def _move_into_place(new: Path, folder: Path) -> dict[str, int]:
    """Move the files into the folder, and return their sizes by name."""
    sizes = {file.name: file.stat().st_size for file in sorted(new.iterdir())}
    if not folder.exists():
        new.rename(folder)
    else:
        for name in sizes:
            os.replace(new / name, folder / name)
    return sizes


def _versions() -> dict[str, str]:
    """The versions of the packages that wrote the files. Packages that run from a checkout have one too."""
    return {
        "timm_nf": __version__,
        "timm": timm.__version__,
        "torch": torch.__version__.partition("+")[0],  # without the device that it was built for
        "safetensors": safetensors.__version__,
    }


# -- reading back ------------------------------------------------------------------------------------------------------


class _ReadBack(NamedTuple):
    """What was compared, in words, and the deviation of the logits if another architecture loads the files."""

    checks: list[tuple[str, str]]
    deviation: float | None


def _read_back(model: Any, tensors: Mapping[str, Tensor], folder: Path, other: str | None) -> _ReadBack:
    """Compare the tensors in a folder, and the network that timm makes of it, with the model.

    Args:
        model: The network that was written.
        tensors: The tensors that were written.
        folder: Where they were written.
        other: The architecture that loads the files, if it is not the model's own.

    Raises:
        RuntimeError: if the tensors differ, or the network does although the architecture is the model's own.
    """
    checks = [_compare_tensors(tensors, folder / WEIGHTS)]
    features, logits = _deviations(model, tensors, folder)
    if other is not None:
        return _ReadBack([*checks, (f"logits as {other}, deviation", f"{logits:.1e}")], logits)
    _require_equal(features, logits)
    return _ReadBack([*checks, ("features and logits of the network read back", "equal to the bit")], None)


def _compare_tensors(tensors: Mapping[str, Tensor], file: Path) -> tuple[str, str]:
    """Compare a file of weights with the tensors that were written to it.

    Raises:
        RuntimeError: if they differ.
    """
    read = load_file(file)
    wrong = [
        name
        for name, tensor in tensors.items()
        if name not in read or tensor.dtype != read[name].dtype or not torch.equal(tensor, read[name])
    ]
    if wrong or len(read) != len(tensors):
        raise RuntimeError(
            f"{len(wrong)} of {len(tensors)} tensors are not what was written ({wrong[:1]}): the disk or its driver "
            "loses data, or please report this"
        )
    return "tensors read back", f"{len(read)} of {len(tensors)} equal"


@torch.no_grad()
def _deviations(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> tuple[float, float]:
    """Relative errors of features and of logits of the network that timm loads, against the model with `tensors`.

    Logits alone would not do: some classifiers start at zero.
    """
    expected: Any = copy.deepcopy(model)
    expected = expected.cpu().float().to(memory_format=torch.contiguous_format).eval()
    expected.load_state_dict(fitted(tensors, expected.state_dict()))
    loaded: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    noise = torch.Generator().manual_seed(0)
    size = cast(tuple[int, int, int], resolve_model_data_config(loaded)["input_size"])
    x = torch.randn(1, *size, generator=noise)
    features, expected_features = loaded.forward_features(x), expected.forward_features(x)
    logits, expected_logits = loaded.forward_head(features), expected.forward_head(expected_features)
    return _deviation(features, expected_features), _deviation(logits, expected_logits)


def _deviation(measured: Tensor, expected: Tensor) -> float:
    """The relative error; 0 if the tensors are equal, even if both are 0."""
    return 0.0 if torch.equal(measured, expected) else relative_error(measured, expected)


def _require_equal(features: float, logits: float) -> None:
    if features or logits:  # also if they are NaN
        raise RuntimeError(
            f"the network read back gives other features by {features:.1e} and logits by {logits:.1e}; please "
            "report this with the output of `timm-nf env`"
        )
