"""Arguments that several commands have, each with one grammar and one message: networks, weights, dtype, pictures."""

import os
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from timm.models import is_model
from torch import nn

from ..checkpoint import Checkpoint, read
from ..inference.images import Found
from ..inference.named import canonical_name, load_model, near_names
from ..variants import VARIANTS
from .terminal import console, note, typer

__all__ = [
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
    "writable",
]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # as train.py spells them
_PLOTS = (".png", ".pdf", ".svg")
_NETWORK = "NAME or NAME.TAG as timm has it, hf-hub:USER/REPO, local-dir:FOLDER, or a folder in Hub layout."
_REGISTERED = "NAME as timm has it; a TAG is passed over."


# -- parsers -----------------------------------------------------------------------------------------------------------


def any_path(text: str | Path) -> Path:
    """A path with its `~` expanded, which shells leave in `--out=~/x`."""
    return Path(os.path.expanduser(text))


def existing_file(text: str | Path) -> Path:
    """Refuse a file that is not there, before anything is built or fetched.

    Raises:
        typer.BadParameter: which `main` prints in one line, with exit code 2.
    """
    path = any_path(text)
    if not path.is_file():
        found = "is a directory" if path.is_dir() else "is a pipe or a device" if path.exists() else "is not there"
        raise typer.BadParameter(f"expected a file, {path} {found}")
    return path


def existing_folder(text: str | Path) -> Path:
    """Refuse a folder that is not there, before anything is built or fetched.

    Raises:
        typer.BadParameter: which `main` prints in one line, with exit code 2.
    """
    path = any_path(text)
    if not path.is_dir():
        raise typer.BadParameter(f"expected a folder, {path} {'is a file' if path.exists() else 'is not there'}")
    return path


def _network(name: str) -> str:
    """Refuse what can be no network, before anything is built or fetched."""
    try:
        return canonical_name(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _registered(name: str) -> str:
    """Refuse what is no name in timm's registry."""
    found = _network(name)
    if ":" in found or not is_model(found.partition(".")[0]):
        raise typer.BadParameter(f"expected the name of a network in timm's registry, got the place {name!r}")
    return found.partition(".")[0]


def _variant(name: str) -> str:
    bare, _, tag = name.lower().partition(".")
    if bare not in VARIANTS:
        known = "; timm has" if is_model(bare) else near_names(bare, list(VARIANTS))
        raise typer.BadParameter(f"timm_nf has no network {name!r}{known}; `timm-nf list` shows all {len(VARIANTS)}")
    if tag and not (tag == "dm_in1k" and VARIANTS[bare].hf_hub_id):
        held = "it has dm_in1k" if VARIANTS[bare].hf_hub_id else "none are published"
        raise typer.BadParameter(f"{bare} has no weights with the tag {tag!r}: {held}")
    return bare


def _dtype(name: str) -> torch.dtype:
    """Torch's name of a dtype, or train.py's."""
    for short, dtype in _DTYPES.items():
        if name in (short, str(dtype).removeprefix("torch.")):
            return dtype
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES.values())
    raise typer.BadParameter(f"expected {names} (or {', '.join(_DTYPES)}), got {name}")


def _devices() -> list[str]:
    """The devices of this machine, as torch names them."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    numbered = [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    return ["cpu", accelerator.type, *numbered]


def _device(name: str) -> str:
    if name.lower() not in (here := _devices()):
        raise typer.BadParameter(f"expected a device of this machine, which has {', '.join(here)}, got {name!r}")
    return name.lower()


def _plot(text: str | Path) -> Path:
    """Refuse before the work what could not be written after it."""
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
UseEma = Annotated[bool, typer.Option("--use-ema", help="The checkpoint's averaged weights, not those of the steps.")]
"""Whether to take the averaged weights of the file."""
Dtype = Annotated[
    torch.dtype | None,
    typer.Option("--dtype", metavar="DTYPE", help=f"Round to {', '.join(_DTYPES)}, in full or short.", parser=_dtype),
]
"""A dtype as `--dtype`, in torch's or train.py's spelling."""
License = Annotated[
    str | None,
    typer.Option("--license", help="Of the card, as the Hub spells it, apache-2.0 say. It is yours to choose."),
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
    """A network, and in words which weights it has."""

    network: nn.Module
    weights: str


def read_checkpoint(checkpoint: Path | None, use_ema: bool) -> Checkpoint | None:
    """The weights that --checkpoint and --use-ema name; None without a file.

    Raises:
        typer.BadParameter: which `main` prints in one line, with exit code 2.
    """
    if checkpoint is not None:
        return read(checkpoint, use_ema)
    if use_ema:
        raise typer.BadParameter("--use-ema is about the weights of a --checkpoint: give one")
    return None


def load_network(name: str, checkpoint: Path | None = None, use_ema: bool = False) -> Loaded:
    """The network that the command line names, in evaluation mode.

    Args:
        name: As `Network` takes it.
        checkpoint: File of weights instead of those that belong to the name.
        use_ema: The averaged weights in it.
    """
    with console(stderr=True).status(f"loading {name}"):
        content = read_checkpoint(checkpoint, use_ema)
        return Loaded(load_model(name, content), f"those of {name}" if content is None else content.origin)


def note_left_out(found: Found) -> None:
    """Say on stderr how many files of the folders are no pictures that can be read."""
    if found.left_out:
        note(f"left out: {found.others()}")


def fastest() -> str:
    """The accelerator if there is one, as torch names it."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"
