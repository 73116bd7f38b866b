"""Networks by name, and what goes into them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from .._gain_names import is_gain
from ..inference.classify import load_model
from ..inference.images import find_images, reader

INPUTS = 16  # 16 x 6 x 6 values of a channel where NFNet-F0 is narrowest: the noise of a mean's square is 2e-3 there


def open_branches(model: nn.Module) -> int:
    """Set to 1 the scales that start at 0 and keep a new network's residual branches from adding anything.

    These are skip gains, and scales of last normalisations and standardised convolutions that are zero throughout.

    Returns:
        How many were set.
    """
    closed = [
        p
        for name, p in model.named_parameters()
        if is_gain(name) or (name.endswith(".weight") and p.ndim == 1)
        if not p.any()
    ]
    for p in closed:
        nn.init.ones_(p)
    return len(closed)


def load(name: str) -> tuple[nn.Module, str]:
    """A network by name, and what its weights are in words.

    Args:
        name: A folder in Hub layout, or what `timm.create_model` takes. A bare name is the network at initialisation,
            seed 0, with its residual branches opened; one with a tag has published weights.

    Raises:
        RuntimeError: if it cannot be loaded, with what to do.
    """
    if Path(name).is_dir():
        return load_model(f"local-dir:{name}"), "its weights"
    if {".", ":"} & set(name):
        return load_model(name), "its published weights"
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    model = timm.create_model(name)
    opened = open_branches(model)
    return model, f"at initialisation, {opened} zero scales of residual branches set to 1"


def pick(folder: Path) -> list[Path]:
    """At most `INPUTS` of the pictures below a folder, evenly from all of it, as classes lie one after the other.

    Raises:
        ValueError: if there are none.
    """
    found = find_images([folder])
    return found[:: -(-len(found) // INPUTS)]


def inputs(model: Any, pictures: Sequence[Path] = ()) -> Tensor:
    """A batch for the network: these pictures, or `INPUTS` images of unit-normal noise.

    Args:
        model: A network of timm.
        pictures: Read and scaled as the network takes them in evaluation; none for noise at its training size.

    Raises:
        ValueError: if one of the pictures cannot be read.
    """
    if not pictures:
        channels, *size = resolve_model_data_config(model)["input_size"]
        noise = torch.Generator().manual_seed(0)
        return torch.randn(INPUTS, getattr(model, "in_chans", channels), *size, generator=noise)
    read, batch = reader(model), []
    for path in pictures:
        try:
            batch.append(read(path))
        except Exception as error:  # the decoders raise all kinds for broken files
            raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); move it elsewhere") from error
    return torch.stack(batch)
