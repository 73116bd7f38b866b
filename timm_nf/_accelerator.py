"""The accelerators of this machine."""

from typing import NamedTuple

import torch

__all__ = ["Accelerators", "accelerators"]


class Accelerators(NamedTuple):
    """The type of the accelerators as torch names it (`cuda`, `mps`, `xpu`), and their number."""

    device_type: str
    number: int


def accelerators() -> Accelerators | None:
    """The accelerators that can be used now; None without any."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if found is None else Accelerators(found.type, torch.accelerator.device_count())
