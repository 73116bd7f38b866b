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
        """Coefficient of the branch with zeros for the dropped examples of `x`.

        Args:
            coefficient: (1,), or what broadcasts to (N, C, 1, ..., 1).
            x: (N, ...), the branch, of any number of axes.

        Returns:
            (N, 1, ..., 1), as many axes as `x`, or more channels if the coefficient has them.
        """
        if not self.training:
            return coefficient
        one = x
        for axis in range(1, x.dim()):
            one = one.narrow(axis, 0, 1)  # of every example
        return coefficient * (torch.rand_like(one, dtype=torch.float32) >= self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"
