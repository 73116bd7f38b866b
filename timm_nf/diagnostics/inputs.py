"""Networks by name for `timm-nf diagnose`, and batches of pictures or noise for them.

Examples:
    >>> from pathlib import Path
    >>> model, weights = named_network("test_resnet")
    >>> input_batch(model).shape
    torch.Size([16, 3, 160, 160])
    >>> len(pick_pictures([Path(f"{number}.png") for number in range(100)]))
    15
    >>> open_branches(timm.create_model("nfnet_f0", depths=(1, 1), channels=(16, 32), group_size=8))
    2
"""

# timm and torch type only a part of what they export.
# pyright: reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from .._gain_names import is_gain
from .._seed import seeded
from .._text import counted
from .._versions import input_channels
from ..checkpoint import Checkpoint
from ..inference.classify import load_model
from ..inference.images import reader

__all__ = ["INPUTS", "input_batch", "named_network", "open_branches", "pick_pictures"]

# NFNet-F0's smallest maps have 6 x 6 pixels. With 16 images a channel has 576 values there, and the square of its mean
# has a noise of 2e-3.
INPUTS = 16
"""The number of pictures or noise images in a batch of `input_batch`."""


def open_branches(model: nn.Module) -> int:
    """Set the scales that start at 0 to 1, so that the residual branches of a new network take part.

    They are skip gains, and the scales of a branch's last normalisation or standardised convolution. A scale is only
    set if all its entries are 0.

    Returns:
        How many scales were set.
    """
    opened = 0
    for name, p in model.named_parameters():
        is_norm_scale = name.endswith(".weight") and p.ndim == 1
        if (is_gain(name) or is_norm_scale) and not p.any():
            nn.init.ones_(p)
            opened += 1
    return opened


def named_network(name: str, checkpoint: Checkpoint | None = None) -> tuple[nn.Module, str]:
    """A network by name, and in words which weights it has.

    Args:
        name: A folder in Hub layout, or a name for `timm.create_model`. A bare name is the network at initialisation,
            with seed 0 and with its residual branches opened. A name with a tag has published weights.
        checkpoint: Weights of this network, in place of those that the name stands for.

    Raises:
        ValueError: if the checkpoint belongs to another network.
        RuntimeError: if the weights cannot be loaded. The message says what to do.
    """
    if checkpoint is not None:
        return load_model(name, checkpoint), f"those of {checkpoint.origin}"
    if Path(name).is_dir():
        return load_model(f"local-dir:{name}"), "its weights"
    if {".", ":"} & set(name):
        return load_model(name), "its published weights"
    with seeded(0):
        model = timm.create_model(name)
    opened = open_branches(model)
    return model, f"at initialisation, {counted(opened, 'zero scale')} of residual branches set to 1"


def pick_pictures(found: Sequence[Path]) -> list[Path]:
    """At most `INPUTS` of these pictures, at even steps, so that they come from many classes."""
    return list(found[:: math.ceil(len(found) / INPUTS)])


def input_batch(model: Any, pictures: Sequence[Path] = ()) -> Tensor:
    """A batch for the network: these pictures, or `INPUTS` images of unit-normal noise.

    Args:
        model: A network of timm.
        pictures: Picture files, preprocessed as for the network's evaluation. Without them the batch is noise at the
            network's training size.

    Returns:
        (N, in_chans, H, W) in float32.

    Raises:
        ValueError: if a picture cannot be read, or the network takes no pictures.
    """
    if not pictures:
        input_size: tuple[int, int, int] = resolve_model_data_config(model)["input_size"]
        noise = torch.Generator().manual_seed(0)
        return torch.randn(INPUTS, input_channels(model), *input_size[1:], generator=noise)
    read = reader(model)
    return torch.stack([read(path) for path in pictures])
