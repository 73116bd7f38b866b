"""Seeded random numbers that leave the caller's generators as they were."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from ._accelerator import accelerators

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Seed torch's generators of all devices inside the context, and restore their states afterwards."""
    kind, count = accelerators() or ("cuda", 0)
    with torch.random.fork_rng(range(count), device_type=kind):  # pyright: ignore[reportUnknownMemberType]
        torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
        yield
