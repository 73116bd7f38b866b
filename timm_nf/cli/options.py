"""Arguments that several commands have, each with one grammar and one message: networks, weights, dtype, pictures."""

from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from torch import nn

from ..checkpoint import read
from ..inference.named import is_known, load_model
from ..variants import VARIANTS
from .terminal import console, typer

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
    "UseEma",
    "Variant",
    "check_ema",
    "fastest",
    "load_network",
]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # as train.py spells them
_PLOTS = (".png", ".pdf", ".svg")
_NETWORK = "NAME or NAME.TAG as timm has it, hf-hub:USER/REPO, local-dir:FOLDER, or a folder in Hub layout."


def _network(name: str) -> str:
    """Refuse what can be no network, before anything is built or fetched."""
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise typer.BadParameter(f"expected a folder in Hub layout, but {name} has no config.json")
    elif not is_known(name):
        raise typer.BadParameter(f"no network or folder is called {name!r}; `timm-nf list` shows ours")
    return name


def _networks(names: list[str]) -> list[str]:
    return [_network(name) for name in names]


def _variant(name: str) -> str:
    if name.removesuffix(".dm_in1k") in VARIANTS:
        bare = name.removesuffix(".dm_in1k")
        if name == bare or VARIANTS[bare].hf_hub_id:
            return name
    raise typer.BadParameter(f"no network is called {name!r}; `timm-nf list` shows all {len(VARIANTS)}")


def _dtype(name: str) -> torch.dtype:
    """Torch's name of a dtype, or train.py's."""
    for short, dtype in _DTYPES.items():
        if name in (short, str(dtype).removeprefix("torch.")):
            return dtype
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES.values())
    raise typer.BadParameter(f"expected {names} (or {', '.join(_DTYPES)}), got {name}")


def _plot(file: Path) -> Path:
    """Refuse before the work what could not be written after it."""
    if not file.parent.is_dir() or file.suffix not in _PLOTS:
        known = ", ".join(_PLOTS)
        raise typer.BadParameter(f"expected an existing folder for --out and a name that ends in {known}, got {file}")
    return file


Network = Annotated[str, typer.Argument(metavar="NETWORK", help=_NETWORK, callback=_network)]
"""A network as the first argument."""
Networks = Annotated[list[str], typer.Argument(metavar="NETWORK...", help=_NETWORK, callback=_networks)]
"""Several networks as arguments."""
NetworkOption = Annotated[str, typer.Option("--model", metavar="NETWORK", help=_NETWORK, callback=_network)]
"""A network as `--model`."""
Variant = Annotated[str, typer.Argument(help="Name of a network of ours, see `timm-nf list`.", callback=_variant)]
"""The name of one of our networks."""
CheckpointFile = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        metavar="FILE",
        help="Weights: of train.py, safetensors, a state dict, or the authors' .npz.",
        exists=True,
        dir_okay=False,
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
Device = Annotated[str, typer.Option("--device", help="Where to run, as torch names it.")]
"""The device as torch names it."""
FastestDevice = Annotated[
    str | None, typer.Option("--device", help="As torch names it; an accelerator if there is one.")
]
"""The device; without it, an accelerator if there is one."""
Pictures = Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Picture files, or folders of them.")]
"""Picture files, or folders of them."""
PicturesFolder = Annotated[
    Path | None, typer.Option("--images", help="Folder of pictures instead of noise.", exists=True, file_okay=False)
]
"""A folder of pictures in place of noise."""
Plot = Annotated[Path, typer.Option("--out", "-o", help=f"Picture to write: {', '.join(_PLOTS)}.", callback=_plot)]
"""The picture file to write."""


class Loaded(NamedTuple):
    """A network, and in words which weights it has."""

    network: nn.Module
    weights: str


def check_ema(checkpoint: Path | None, use_ema: bool) -> None:
    """Refuse --use-ema where there is no file that it could be about.

    Raises:
        typer.BadParameter: which `main` prints in one line, with exit code 2.
    """
    if use_ema and checkpoint is None:
        raise typer.BadParameter("--use-ema is about the weights of a --checkpoint: give one")


def load_network(name: str, checkpoint: Path | None = None, use_ema: bool = False) -> Loaded:
    """The network that the command line names, in evaluation mode.

    Args:
        name: As `Network` takes it.
        checkpoint: File of weights instead of those that belong to the name.
        use_ema: The averaged weights in it.
    """
    check_ema(checkpoint, use_ema)
    with console(stderr=True).status(f"loading {name}"):
        if checkpoint is None:
            return Loaded(load_model(name), f"those of {name}")
        content = read(checkpoint, use_ema)
        return Loaded(load_model(name, content), content.origin)


def fastest() -> str:
    """The accelerator if there is one, as torch names it."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"
