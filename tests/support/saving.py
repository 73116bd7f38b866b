"""timm's own writer of folders, told by hand what a network was built with where timm does not record it."""

from pathlib import Path
from typing import Any

import timm
from torch import nn

from timm_nf._versions import saved_arguments


def save_for_hf(model: nn.Module, folder: str | Path, *args: Any, **kwargs: Any) -> None:
    """As `timm.models.save_for_hf`; below 1.0.31 that writes no arguments (docs/compatibility.md)."""
    timm.models.save_for_hf(model, folder, *args, **(saved_arguments(model) | kwargs))
