"""A network as the folder of files that a Hub repository is, each of them read back and compared."""

import copy
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from huggingface_hub import ModelCardData
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from .._wrappers import innermost
from ..checkpoint import assign, fitted, skeleton
from ..version import __version__
from . import card as cards

WEIGHTS, CONFIG, README = "model.safetensors", "config.json", "README.md"
_PINNED = re.compile(r"[^@]+@[0-9a-f]{40}")  # as `hub.pull` records it


@dataclass(frozen=True)
class Written:
    """What `write_folder` wrote, or `hub.push` published.

    Attributes:
        files: Sizes in bytes by name.
        sha256: Of model.safetensors.
        checks: What was compared and what came of it, in words.
        card: Text of README.md, also where an older one stays; empty if there is none.
        url: Of the commit or the pull request; None if nothing was uploaded.
        commit: Its id.
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
    """Write a network as a Hub repository: model.safetensors, config.json and README.md, each read back and compared.

    Args:
        model: Any model that timm's factory made; not changed.
        folder: Made if it is not there, whole or not at all; in one that is there, each file is replaced whole.
        card: Fields of the card's metadata, the license among them; None for no README.md.
        dtype: To round floating weights to, as they are by default.
        architecture: Of timm's registry, to be loaded as by others; by default the model's own.
        overwrite_card: Replace a README.md that is there.
        repo_id: What the card's snippet loads, the folder by default.
        recipe: Settings of the training, for the card.

    Raises:
        ValueError: if the model cannot be saved so, or the card has no license.
        RuntimeError: if what was written does not give the same tensors and logits.
    """
    folder = Path(folder)
    source: Any = innermost(model)
    own = _own_architecture(source)
    architecture = architecture or own
    if not timm.is_model(architecture):
        raise ValueError(f"timm knows no architecture {architecture!r}")
    hf_hub_id = str(source.pretrained_cfg.get("hf_hub_id"))
    base = hf_hub_id if _PINNED.fullmatch(hf_hub_id) else None
    name = repo_id or folder.resolve().name
    data = None
    if card is not None:
        data = cards.metadata(card, name.rpartition("/")[2], base and base.partition("@")[0])
    state = _state(source, dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".writing-") as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        _write_config(source, new / CONFIG, architecture, str(data.license) if data else None)
        state = _as_loaded(state, new, architecture)
        try:
            save_file(state, new / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            size = sum(t.nbytes for t in state.values())
            raise RuntimeError(f"{size:,} bytes could not be written to {new}: {error}; make room there") from error
        (new / WEIGHTS).chmod((new / CONFIG).stat().st_mode)  # safetensors' own is for nobody but the owner
        checks = [_compare_tensors(state, new / WEIGHTS)]
        features, logits = _deviations(source, state, new)
        if architecture == own:
            if features or logits:
                raise RuntimeError(
                    f"the network read back gives other features by {features:.1e} and logits by {logits:.1e}; please "
                    "report this with the output of `timm-nf env`"
                )
            checks.append(("features and logits of the network read back", "equal to the bit"))
        else:
            checks.append((f"logits as {architecture}, deviation", f"{logits:.1e}"))
        facts = cards.Facts(
            architecture=architecture,
            arguments=_arguments(new / CONFIG),
            source=f"hf-hub:{repo_id}" if repo_id else f"local-dir:{folder}",
            parameters=sum(p.numel() for p in source.parameters()),
            dtype=", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in state.values()})),
            sha256=digest(new / WEIGHTS, "sha256"),
            size=(new / WEIGHTS).stat().st_size,
            versions={"timm_nf": __version__}
            | {package: version(package) for package in ("timm", "torch", "safetensors")},
            base=base,
            deviation=None if architecture == own else logits,
            recipe=recipe or {},
        )
        text = cards.network(data, name, facts) if data else ""
        if data and (overwrite_card or not (folder / README).exists()):
            (new / README).write_text(text, encoding="utf-8")
        files = {file.name: file.stat().st_size for file in sorted(new.iterdir())}
        if folder.exists():
            for file in files:
                os.replace(new / file, folder / file)
        else:
            new.rename(folder)
    return Written(files, facts.sha256, checks, text)


def digest(file: Path, kind: str) -> str:
    """Of a file's content: `sha256`, or `git` for what git calls a blob of it."""
    with file.open("rb") as stream:
        if kind == "git":
            header = b"blob %d\0" % file.stat().st_size
            return hashlib.file_digest(stream, lambda: hashlib.sha1(header)).hexdigest()
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _own_architecture(model: Any) -> str:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if not cfg.get("architecture") or not hasattr(model, "forward_head"):
        raise ValueError(f"expected a classifier made by timm.create_model, got {type(model).__name__}")
    if vars(model).get("fused"):  # which `fuse` sets on networks that cannot be built fused; ours look it up
        raise ValueError(
            f"a fused model of timm's own {cfg['architecture']} has no architecture in timm that loads it: save it "
            "before fusing, or write it with `timm-nf export` as .onnx, .pt2 or .ts"
        )
    return cfg["architecture"]


def _state(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors to write: on the CPU, in one memory layout, finite and in one floating dtype."""
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"expected a floating dtype, got {dtype}")
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"expected a model with weights, {name} is on the meta device")
        rounded = tensor.detach().cpu().to(dtype if tensor.is_floating_point() else None).contiguous()
        if not torch.isfinite(rounded).all():
            why = "NaN or infinite" if not torch.isfinite(tensor).all() else f"too large for {dtype}"
            raise ValueError(f"{name} is {why}: such a network is not published")
        state[name] = rounded
    if len(kinds := sorted({str(t.dtype) for t in state.values() if t.is_floating_point()})) > 1:
        raise ValueError(f"expected weights in one floating dtype, got {', '.join(kinds)}: give dtype to choose one")
    return state


def _write_config(model: Any, file: Path, architecture: str, license: str | None) -> None:
    own, cfg = _own_architecture(model), model.pretrained_cfg
    labels: dict[str, Any] = {key: cfg[key] for key in ("label_names", "label_descriptions") if cfg.get(key)}
    if labels and len(labels.get("label_names") or ()) != model.num_classes:
        labels = {}  # of the weights this one started from
    save_config_for_hf(model, str(file), labels)
    config = json.loads(file.read_text())
    config["architecture"] = architecture
    # timm takes over those of the published weights of the same architecture
    for key in ("tag", "license"):
        config["pretrained_cfg"].pop(key, None)
    if license:
        config["pretrained_cfg"]["license"] = license
    # The key keeps stock timm's nfnet_f0 from loading our weights, and other networks of stock timm as well.
    if architecture != own and config["model_args"].pop("fused", False):
        raise ValueError(f"a fused network cannot be loaded as {architecture}: push it before fusing")
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _arguments(config: Path) -> dict[str, Any]:
    """What a config has `timm.create_model` called with, but for what every one has."""
    args: dict[str, Any] = json.loads(config.read_text(encoding="utf-8")).get("model_args", {})
    usual = {"fused": False, "in_chans": 3, "global_pool": "avg", "num_classes": 1000}
    tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}
    return {key: value for key, value in tuples.items() if key not in usual or value != usual[key]}


def _as_loaded(state: Mapping[str, Tensor], folder: Path, architecture: str) -> dict[str, Tensor]:
    """The tensors in the shapes of the network in the folder's config, which has to be able to load them."""
    try:
        described = skeleton(f"local-dir:{folder}")
        state = fitted(state, described.state_dict())
        assign(described, state, "the model")
    except Exception as error:  # timm's, torch's and the networks' own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"as {architecture}, with the arguments that timm.create_model recorded, the model could not be loaded "
            f"again ({reason}): create it with timm.create_model, and push it as an architecture with its shapes"
        ) from error
    return state


def _compare_tensors(state: Mapping[str, Tensor], file: Path) -> tuple[str, str]:
    read = load_file(file)
    wrong = [name for name, t in state.items() if name not in read or t.dtype != read[name].dtype]
    wrong += [name for name, t in state.items() if name not in wrong and not torch.equal(t, read[name])]
    if wrong or len(read) != len(state):
        raise RuntimeError(
            f"{len(wrong)} of {len(state)} tensors are not what was written ({wrong[:1]}): the disk or its driver "
            "loses data, or please report this"
        )
    return "tensors read back", f"{len(read)} of {len(state)} equal"


@torch.no_grad()
def _deviations(model: nn.Module, state: Mapping[str, Tensor], folder: Path) -> tuple[float, float]:
    """Relative errors of features and of logits, the folder loaded by timm against the model with `state`.

    Features too: the logits of a classifier that starts at zero say nothing.
    """
    reference: Any = copy.deepcopy(model).cpu().float().to(memory_format=torch.contiguous_format).eval()
    reference.load_state_dict(fitted(state, reference.state_dict()))
    loaded: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(1, *resolve_model_data_config(loaded)["input_size"], generator=noise)
    got, want = loaded.forward_features(x), reference.forward_features(x)
    return _relative(got, want), _relative(loaded.forward_head(got), reference.forward_head(want))


def _relative(got: Tensor, want: Tensor) -> float:
    if torch.equal(got, want):
        return 0.0
    return float((got - want).norm() / want.norm().clamp_min(torch.finfo(want.dtype).tiny))
