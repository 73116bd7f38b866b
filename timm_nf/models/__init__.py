"""The networks, as timm models."""

from .nfnets import NormFreeNet

__all__ = ["NormFreeNet"]
