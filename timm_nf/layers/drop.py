"""Stochastic depth. Unlike timm's layer, it does not rescale the branches that remain."""

# torch.jit exports names without listing them.
# pyright: reportPrivateImportUsage=false

import torch
from torch import Tensor, nn

from ._eager import recorded_call

__all__ = ["StochasticDepth"]


def _first_elements(x: Tensor) -> Tensor:
    """(N, ...) -> (N, 1, ..., 1)."""
    if not torch.jit.is_scripting():
        call = recorded_call(_first_elements, x)
        if call is not None:
            return call
    for axis in range(1, x.dim()):
        x = x.narrow(axis, 0, 1)
    return x


def check_drop_path_rate(rate: float) -> None:
    """Refuse a rate that is no probability.

    Raises:
        ValueError: if it does not lie between 0 and 1.
    """
    if not 0.0 <= rate <= 1.0:  # false for NaN
        raise ValueError(f"drop_path_rate must lie between 0 and 1, got {rate}")


class StochasticDepth(nn.Module):
    """Drops the residual branch of random examples in training. The other branches are not rescaled.

    Args:
        rate: Probability that the branch of an example is dropped.

    Source: nfnets/base.py, StochDepth.

    Examples:
        >>> StochasticDepth(rate=0.5)(torch.tensor(0.2), torch.zeros(4, 8, 2, 2)).shape
        torch.Size([4, 1, 1, 1])
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, coefficient: Tensor, x: Tensor) -> Tensor:
        """Set the branch's coefficient to 0 for dropped examples.

        Args:
            coefficient: Broadcastable to (N, C, 1, ..., 1).
            x: The branch, (N, ...), of any number of axes. Only its shape and device are used.

        Returns:
            In training (N, 1, ..., 1), as many axes as `x`, or more channels if the coefficient has them. Otherwise
            `coefficient`.
        """
        if not self.training:
            return coefficient
        remains = torch.rand_like(_first_elements(x), dtype=torch.float32) >= self.rate
        return coefficient * remains

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"
