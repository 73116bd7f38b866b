"""Networks for use: fused, exported, timed, asked for labels."""

from .fuse import fuse

__all__ = ["fuse"]
