"""Seeded random numbers that leave the caller's generators as they were."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Seed torch's generators of all devices inside the context, and restore their states afterwards."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = range(torch.accelerator.device_count() if accelerator else 0)
    device_type = accelerator.type if accelerator else "cuda"
    with torch.random.fork_rng(devices, device_type=device_type):  # pyright: ignore[reportUnknownMemberType]
        torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
        yield
