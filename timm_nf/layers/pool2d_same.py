"""Pooling under TensorFlow's SAME rule."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .padding import same_padding


class SameMaxPool2d(nn.Module):
    """3x3 max pool at stride 2 under TensorFlow's SAME rule, without a padded copy of the input."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # sizes may be symbols, of which the parity below would be fixed
            top, bottom = same_padding(x.shape[-2], 3, 2)
            left, right = same_padding(x.shape[-1], 3, 2)
            return F.max_pool2d(F.pad(x, (left, right, top, bottom), value=-math.inf), 3, 2)
        # Odd sizes are padded by one at both ends, even ones at the end only, where ceil_mode clips the window.
        return F.max_pool2d(x, 3, 2, padding=(x.shape[-2] % 2, x.shape[-1] % 2), ceil_mode=True)


class SameAvgPool2d(nn.Module):
    """2x2 average pool under TensorFlow's SAME rule, padding not counted.

    Args:
        stride: 2, or 1 where the output stride of a network is reduced and resolution stays.
    """

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            return F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
        # Padding is symmetric in torch: the first row and column are those of windows that begin outside.
        return F.avg_pool2d(x, 2, 1, padding=1, count_include_pad=False)[..., 1:, 1:]
