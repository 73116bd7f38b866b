"""Pooling under TensorFlow's SAME rule."""

# torch.jit exports names without listing them.
# pyright: reportPrivateImportUsage=false

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._eager import has_fixed_sizes, is_compiled_here
from .padding import same_padding

__all__ = ["SameAvgPool2d", "SameMaxPool2d"]


class SameMaxPool2d(nn.Module):
    """3x3 max pool with stride 2 under TensorFlow's SAME rule. Eager calls make no padded copy of the input.

    Examples:
        >>> SameMaxPool2d()(torch.arange(4.0).view(1, 1, 1, 4))
        tensor([[[[2., 3.]]]])
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, ceil(H / 2), ceil(W / 2))."""
        if not torch.jit.is_scripting() and has_fixed_sizes(x):
            # Odd sizes need one row of padding at both ends. Even sizes need one at the end, by ceil_mode.
            return F.max_pool2d(x, 3, 2, padding=(x.shape[-2] % 2, x.shape[-1] % 2), ceil_mode=True)
        top, bottom = same_padding(x.shape[-2], 3, 2)
        left, right = same_padding(x.shape[-1], 3, 2)
        pads = (left, right, top, bottom)
        # Exported graphs repeat the edge: windows that reach outside contain the edge already, so no maximum changes.
        # Minus infinity would be right too, but would spoil the ranges that quantisers measure. Compiled graphs
        # take it: inductor of torch 2.14 cannot train with repeated edges, as it asserts other strides of the gradient.
        if not torch.jit.is_scripting() and is_compiled_here():
            return F.max_pool2d(F.pad(x, pads, value=-math.inf), 3, 2)
        return F.max_pool2d(F.pad(x, pads, mode="replicate"), 3, 2)


class SameAvgPool2d(nn.Module):
    """2x2 average pool under TensorFlow's SAME rule. Padding does not count in the averages.

    Args:
        stride: 2, or 1 if a reduced output stride keeps the resolution.

    Examples:
        >>> SameAvgPool2d()(torch.arange(3.0).view(1, 1, 1, 3))
        tensor([[[[0.5000, 2.0000]]]])
    """

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride)).

        Examples:
            >>> SameAvgPool2d()(torch.tensor([[[[1.0, 3.0, 5.0]]]]))
            tensor([[[[2., 5.]]]])
        """
        if self.stride == 2:
            return F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
        # SAME pads only at the end here, but torch pads both ends. The first output row and column belong to windows
        # that begin in the padding.
        return F.avg_pool2d(x, 2, 1, padding=1, count_include_pad=False)[..., 1:, 1:]
