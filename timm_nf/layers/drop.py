"""Stochastic depth. Unlike timm's layer, it does not rescale the branches that remain."""

import torch
from torch import Tensor, nn

__all__ = ["StochasticDepth"]


class StochasticDepth(nn.Module):
    """Drops the residual branch of random examples in training. The other branches are not rescaled.

    Args:
        rate: Probability that the branch of an example is dropped.

    Source: nfnets/base.py, StochDepth.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, coefficient: Tensor, x: Tensor) -> Tensor:
        """Set the branch's coefficient to 0 for dropped examples.

        Args:
            coefficient: Broadcastable to (N, 1, 1, 1).
            x: The branch, (N, C, H, W). Only its shape and device are used.

        Returns:
            (N, 1, 1, 1) in training, otherwise `coefficient`.
        """
        if not self.training:
            return coefficient
        remains = torch.rand_like(x[:, :1, :1, :1], dtype=torch.float32) >= self.rate
        return coefficient * remains

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"
