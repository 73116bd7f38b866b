"""Arguments that several commands have, each with one grammar and one message: networks, weights, dtype, pictures."""

import os
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from timm.models import is_model
from torch import nn

from .._accelerator import accelerators
from .._dtypes import dtype_name
from ..checkpoint import Checkpoint, read
from ..inference.images import Found
from ..inference.named import canonical_name, load_model, near_names, require_tag
from ..variants import VARIANTS
from .terminal import console, note, typer

__all__ = [
    "Architecture",
    "CheckpointFile",
    "Device",
    "Dtype",
    "FastestDevice",
    "License",
    "Loaded",
    "Network",
    "NetworkOption",
    "Networks",
    "Pictures",
    "PicturesFolder",
    "Plot",
    "RegisteredNetwork",
    "RegisteredOption",
    "UseEma",
    "Variant",
    "any_path",
    "existing_file",
    "existing_folder",
    "fastest",
    "load_network",
    "note_left_out",
    "read_checkpoint",
    "require_checkpoint",
    "writable",
]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # as train.py spells them
_PLOTS = (".png", ".pdf", ".svg")
_NETWORK = "NAME or NAME.TAG as timm has it, hf-hub:USER/REPO, local-dir:FOLDER, or a folder in Hub layout."
_REGISTERED = "NAME as timm has it; a TAG is ignored."


# -- parsers -----------------------------------------------------------------------------------------------------------


def any_path(text: str | Path) -> Path:
    """A path with its `~` expanded. Shells leave it in `--out=~/x`."""
    return Path(os.path.expanduser(text))


def existing_file(text: str | Path) -> Path:
    """Refuse a file that is not there, before anything is built or fetched.

    Raises:
        typer.BadParameter: which `main` prints in one line, with exit code 2.
    """
    path = any_path(text)
    if not path.is_file():
        found = "is not there"
        if path.is_dir():
            found = "is a directory"
        elif path.exists():
            found = "is a pipe or a device"
        raise typer.BadParameter(f"expected a file, {path} {found}")
    return path


def existing_folder(text: str | Path) -> Path:
    """Refuse a folder that is not there, before anything is built or fetched.

    Raises:
        typer.BadParameter: which `main` prints in one line, with exit code 2.
    """
    path = any_path(text)
    if not path.is_dir():
        found = "is a file" if path.exists() else "is not there"
        raise typer.BadParameter(f"expected a folder, {path} {found}")
    return path


def _network(name: str) -> str:
    """Refuse a name that no network can have, before anything is built or fetched."""
    try:
        return canonical_name(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _registered(name: str) -> str:
    """Refuse a name that is not in timm's registry."""
    found = _network(name)
    if ":" in found or not is_model(found.partition(".")[0]):
        raise typer.BadParameter(f"expected the name of a network in timm's registry, got the place {name!r}")
    return found.partition(".")[0]


def _variant(name: str) -> str:
    """Refuse a name that is none of our networks, and a tag of weights that the network does not have."""
    bare, _, tag = name.lower().partition(".")
    if bare not in VARIANTS:
        known = "; timm has" if is_model(bare) else near_names(bare, list(VARIANTS))
        raise typer.BadParameter(f"timm_nf has no network {name!r}{known}; `timm-nf list` shows all {len(VARIANTS)}")
    if tag:
        try:
            require_tag(bare, tag)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return bare


def _dtype(name: str) -> torch.dtype:
    """Torch's name of a dtype, or train.py's."""
    by_name = _DTYPES | {dtype_name(dtype): dtype for dtype in _DTYPES.values()}
    if name not in by_name:
        full = ", ".join(map(dtype_name, _DTYPES.values()))
        raise typer.BadParameter(f"expected {full} (or {', '.join(_DTYPES)}), got {name}")
    return by_name[name]


def _devices() -> list[str]:
    """The devices of this machine, as torch names them."""
    found = accelerators()
    if found is None:
        return ["cpu"]
    return ["cpu", found.device_type, *(f"{found.device_type}:{i}" for i in range(found.number))]


def _device(name: str) -> str:
    here = _devices()
    if name.lower() not in here:
        raise typer.BadParameter(f"expected a device of this machine, which has {', '.join(here)}, got {name!r}")
    return name.lower()


def _plot(text: str | Path) -> Path:
    """Refuse a file that could not be written, before the work that it would hold."""
    file = any_path(text)
    if not file.parent.is_dir() or file.suffix not in _PLOTS or file.is_dir():
        known = ", ".join(_PLOTS)
        found = "a folder of this name" if file.is_dir() else file
        raise typer.BadParameter(f"expected an existing folder for --out and a name that ends in {known}, got {found}")
    return writable(file)


def writable(file: Path) -> Path:
    """Refuse a file or folder in a folder that cannot be written, before the work.

    Raises:
        typer.BadParameter: which `main` prints in one line, with exit code 2.
    """
    if not os.access(file.parent, os.W_OK):
        raise typer.BadParameter(f"{file.parent} cannot be written: give another folder to --out")
    return file


# -- arguments and options ---------------------------------------------------------------------------------------------

Network = Annotated[str, typer.Argument(metavar="NETWORK", help=_NETWORK, parser=_network)]
"""A network as the first argument."""
Networks = Annotated[list[str], typer.Argument(metavar="NETWORK...", help=_NETWORK, parser=_network)]
"""Several networks as arguments."""
NetworkOption = Annotated[str, typer.Option("--model", metavar="NETWORK", help=_NETWORK, parser=_network)]
"""A network as `--model`."""
RegisteredNetwork = Annotated[str, typer.Argument(metavar="NETWORK", help=_REGISTERED, parser=_registered)]
"""The name of a network in timm's registry, as the first argument."""
RegisteredOption = Annotated[str, typer.Option("--model", metavar="NETWORK", help=_REGISTERED, parser=_registered)]
"""The name of a network in timm's registry, as `--model`."""
Architecture = Annotated[
    str | None,
    typer.Option(
        metavar="NETWORK",
        help="Load as this model: with dm_nfnet_f0, stock timm loads an nfnet_f0.",
        parser=_registered,
    ),
]
"""The name of the network in timm's registry as which others load the weights."""
Variant = Annotated[str, typer.Argument(metavar="NAME", help="A network of ours, see `timm-nf list`.", parser=_variant)]
"""The name of one of our networks."""
CheckpointFile = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        metavar="FILE",
        help="Weights: of train.py, Lightning, DeepSpeed, safetensors or their index, a state dict, the authors' .npz.",
        parser=existing_file,
    ),
]
"""A file of weights as `--checkpoint`."""
UseEma = Annotated[
    bool, typer.Option("--use-ema", help="Take the checkpoint's averaged weights, not those of the last step.")
]
"""Whether to take the averaged weights of the file."""
Dtype = Annotated[
    torch.dtype | None,
    typer.Option(
        "--dtype", metavar="DTYPE", help=f"Dtype of the weights: {', '.join(_DTYPES)}, or torch's name.", parser=_dtype
    ),
]
"""A dtype as `--dtype`, in torch's or train.py's spelling."""
License = Annotated[
    str | None,
    typer.Option(
        "--license", help="License of the card, as the Hub spells it, for example apache-2.0. It is never guessed."
    ),
]
"""The license of a card."""
Device = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="Where to run, as torch names it.", parser=_device)
]
"""The device as torch names it."""
FastestDevice = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="DEVICE", help="As torch names it; an accelerator if there is one.", parser=_device
    ),
]
"""The device; without it, an accelerator if there is one."""
Pictures = Annotated[
    list[Path], typer.Argument(metavar="IMAGE...", help="Picture files, or folders of them.", parser=any_path)
]
"""Picture files, or folders of them."""
PicturesFolder = Annotated[
    Path | None,
    typer.Option("--images", metavar="FOLDER", help="Folder of pictures instead of noise.", parser=existing_folder),
]
"""A folder of pictures in place of noise."""
Plot = Annotated[
    Path,
    typer.Option("--out", "-o", metavar="FILE", help=f"Picture to write: {', '.join(_PLOTS)}.", parser=_plot),
]
"""The picture file to write."""


# -- what they name ----------------------------------------------------------------------------------------------------


class Loaded(NamedTuple):
    """A network that a command line names.

    Attributes:
        network: The network, in evaluation mode.
        weights: Which weights it has, in words.
    """

    network: nn.Module
    weights: str


def read_checkpoint(checkpoint: Path | None, use_ema: bool) -> Checkpoint | None:
    """The weights that --checkpoint and --use-ema name; None without a file.

    Raises:
        typer.BadParameter: which `main` prints in one line, with exit code 2.
    """
    require_checkpoint(checkpoint, use_ema)
    return None if checkpoint is None else read(checkpoint, use_ema)


def require_checkpoint(checkpoint: Path | None, use_ema: bool) -> None:
    """Refuse --use-ema without --checkpoint.

    Raises:
        typer.BadParameter: which `main` prints in one line, with exit code 2.
    """
    if use_ema and checkpoint is None:
        raise typer.BadParameter("--use-ema is about the weights of a --checkpoint: give one")


def load_network(name: str, checkpoint: Path | None = None, use_ema: bool = False) -> Loaded:
    """The network that the command line names, in evaluation mode.

    Args:
        name: The network's name, in any form that the argument `Network` accepts.
        checkpoint: A file of weights to load instead of the published ones.
        use_ema: Whether to load the file's averaged weights.
    """
    with console(stderr=True).status(f"loading {name}"):
        content = read_checkpoint(checkpoint, use_ema)
        weights = f"those of {name}" if content is None else content.origin
        return Loaded(load_model(name, content), weights)


def note_left_out(found: Found) -> None:
    """Say on stderr how many files of the folders are no pictures that Pillow reads."""
    if found.left_out:
        note(f"left out: {found.others()}")


def fastest() -> str:
    """The accelerator if there is one, as torch names it; otherwise the CPU."""
    found = accelerators()
    return "cpu" if found is None else found.device_type
