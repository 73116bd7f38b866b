"""Seeded random numbers that leave the caller's generators as they were."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from ._accelerator import accelerators

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Seed torch's generators of all devices inside the context, and restore their states afterwards."""
    device_type, number = accelerators() or ("cuda", 0)
    with torch.random.fork_rng(range(number), device_type=device_type):  # pyright: ignore[reportUnknownMemberType]
        torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
        yield
