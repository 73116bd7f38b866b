"""Stochastic depth that does not rescale the survivors, where timm's layer does."""

import torch
from torch import Tensor, nn

__all__ = ["StochasticDepth"]


class StochasticDepth(nn.Module):
    """Zeroes the residual branch of whole examples in training; the survivors are not rescaled.

    Args:
        rate: Probability that an example loses its branch.

    Source: nfnets/base.py, StochDepth.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, coefficient: Tensor, x: Tensor) -> Tensor:
        """Coefficient of the branch, broadcastable to (N, C, 1, 1), with zeros for the dropped examples of `x`."""
        if not self.training:
            return coefficient
        return coefficient * (torch.rand_like(x[:, :1, :1, :1], dtype=torch.float32) >= self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"
