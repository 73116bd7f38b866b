"""Creates networks by name, with weights from the Hub, from a file, or random ones.

Examples:
    >>> canonical_name("NFNet_F0"), is_known("nfnet_f0"), is_known("nfnet_f9")
    ('nfnet_f0', True, False)
    >>> require_tag("nfnet_f0", "dm_in1k")  # raises ValueError for a tag that it does not have
    >>> written = timm_nf.hub.write_folder(random_model("test_resnet"), "net", card=None)
    >>> load_model("net").training
    False
    >>> near_names("nfnet_f9", ["nfnet_f0", "resnet50"])
    ' (did you mean nfnet_f0?)'
    >>> timm_name("net"), timm_name("nfnet_f0")
    ('local-dir:net', 'nfnet_f0')
    >>> require_tag("test_resnet", "r160_in1k")  # raises if there are no weights of this tag
"""

# timm, onnx and onnxruntime have no types, or incomplete ones.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportMissingTypeStubs=false

import os
import re
from difflib import get_close_matches
from pathlib import Path

import timm
from timm.models import get_pretrained_cfg, is_model
from torch import nn

from .._repository import repository
from .._seed import seeded
from .._text import reason
from ..checkpoint import Checkpoint, fill, read, skeleton

__all__ = ["canonical_name", "is_known", "load_model", "near_names", "random_model", "require_tag", "timm_name"]

_LOCAL = "local-dir:"  # timm's prefix
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in a folder, the first that is there
_PLACE = re.compile(r"hf[-_]hub:|https?:", re.IGNORECASE)
_REPOSITORY = re.compile(r"\w[\w.-]*/[\w.-]+(@.+)?")


def is_known(name: str) -> bool:
    """Whether timm can build this: a registered name with or without a tag, or a source such as `hf-hub:user/repo`."""
    return ":" in name or is_model(name.partition(".")[0])


def canonical_name(name: str) -> str:
    """A network's name as timm has it: case is ignored, `~` and the ways to write a repository are resolved.

    Raises:
        ValueError: if no network can have this name, with what may have been meant.
    """
    if _PLACE.match(name):
        place = repository(name)
        if not _REPOSITORY.fullmatch(place.name):
            raise ValueError(f"expected a repository as hf-hub:user/name, got {name!r}")
        return f"hf-hub:{place}"
    is_place = name.startswith(_LOCAL)
    folder = Path(os.path.expanduser(name.removeprefix(_LOCAL)))
    if is_place or folder.is_dir():
        if not (folder / "config.json").is_file():
            why = f"{folder} has no config.json" if folder.is_dir() else f"there is no folder {folder}"
            raise ValueError(f"expected a folder in Hub layout, but {why}")
        return f"{_LOCAL}{folder}" if is_place else str(folder)
    bare, _, tag = name.lower().partition(".")
    if not is_model(bare):
        hint = near_names(bare, timm.list_models())
        if _REPOSITORY.fullmatch(name):
            hint = f"; a repository of the Hub is written hf-hub:{name}"
        raise ValueError(f"no network or folder is called {name!r}{hint}; `timm-nf list` shows ours")
    if not tag:
        return bare
    require_tag(bare, tag)
    return f"{bare}.{tag}"


def require_tag(name: str, tag: str) -> None:
    """Refuse a tag of weights that a registered network does not have.

    Raises:
        ValueError: with the tags that it has.
    """
    tags = [full.partition(".")[2] for full in timm.list_models(f"{name}.*", include_tags=True)]
    if tag not in tags:
        held = ", ".join(filter(None, tags[:5])) or "none"
        raise ValueError(f"{name} has no weights with the tag {tag!r}; it has {held}")


def near_names(name: str, names: list[str]) -> str:
    """The end of a message with the names that may have been meant; empty if there are none."""
    near = get_close_matches(name.lower(), names, 3)
    return f" (did you mean {', '.join(near)}?)" if near else ""


def timm_name(name: str) -> str:
    """The name that timm expects. For a folder it is `local-dir:` and the path."""
    return f"{_LOCAL}{name}" if Path(name).is_dir() else name


def load_model(name: str, checkpoint: Checkpoint | None = None) -> nn.Module:
    """Create a network with its weights, in float32 and evaluation mode.

    Args:
        name: A name for `timm.create_model` (with a tag of weights, `hf-hub:user/repo` or `local-dir:folder`), or the
            path of a folder.
        checkpoint: Weights to load instead of the published ones. Classes, arguments and preprocessing come from it
            too.

    Raises:
        ValueError: if the checkpoint belongs to another network, no weights of this name are published, or a folder
            does not hold a network.
        RuntimeError: if the weights cannot be loaded. The message says what to do.
    """
    if checkpoint is not None:
        return fill(timm_name(name), checkpoint).float()
    if timm_name(name).startswith(_LOCAL):
        return _load_folder(Path(name.removeprefix(_LOCAL)))
    if is_model(name.partition(".")[0]) and ":" not in name:
        cfg = get_pretrained_cfg(name)
        if cfg is None or not cfg.has_weights:
            raise ValueError(
                f"no weights of {name} are published, `timm-nf list` shows what has weights: give yours by "
                "--checkpoint FILE or as a folder in Hub layout"
            )
    try:
        return timm.create_model(name, pretrained=True).eval()
    except Exception as error:  # the Hub client, its HTTP library and timm have no common type of error
        raise RuntimeError(
            f"could not load {name} with its published weights ({reason(error)}). `timm-nf list` shows which networks "
            "have weights. Downloads need a network. For local weights give --checkpoint FILE, if the command has this "
            "option, or the path of a folder in Hub layout"
        ) from error


def _load_folder(folder: Path) -> nn.Module:
    """The network in a folder in Hub layout, as timm loads it. Errors are ours, and name the file."""
    try:
        return timm.create_model(f"{_LOCAL}{folder}", pretrained=True).eval()
    except Exception as error:  # files of other people can make timm raise anything
        try:
            skeleton(f"{_LOCAL}{folder}")
        except Exception as problem:
            raise ValueError(
                f"config.json in {folder} describes no network that timm can build here ({reason(problem)})"
            ) from problem
        weights = [file for name in _WEIGHTS if (file := folder / name).is_file()]
        if not weights:
            raise ValueError(f"{folder} has no weights: expected {_WEIGHTS[0]} beside config.json") from error
        fill(f"{_LOCAL}{folder}", read(weights[0]))  # says what is wrong with them
        raise RuntimeError(f"{weights[0]} cannot be loaded ({reason(error)})") from error


def random_model(name: str) -> nn.Module:
    """Create a network with random weights, the same in every call, in evaluation mode.

    Parameters that start at 0 (skip gains, biases, some classifiers) are random too, so that the logits depend on every
    layer.
    """
    with seeded(0):
        model = timm.create_model(name.partition(".")[0])
        for p in model.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.1)
    return model.eval()
