"""Convolutions under TensorFlow's SAME rule, with a plain or a standardised weight, equal to the authors' to rounding.

Shapes: O output channels, I input channels per group, K kernel size.
Source: deepmind-research nfnets/base.py at f5de0ede.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .padding import same_padding
from .standardize import standardize_weight

torch.fx.wrap("standardize_weight")  # symbolic tracing records one call of it; this holds for calls in this module


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: the output is ceil(size / stride), zeros go to the end first.

    Args:
        in_channels: I times groups.
        out_channels: O.
        kernel_size: Odd, K.
        stride: Of both axes; 1 if `dilation` is above 1.
        dilation: Of both axes.
        groups: Divides both channel counts.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if kernel_size % 2 == 0 or (stride > 1 and dilation > 1):
            raise ValueError(
                f"expected an odd kernel_size and no dilation with a stride, got kernel_size={kernel_size}, "
                f"stride={stride}, dilation={dilation}"
            )
        # A 1x1 kernel needs no padding at any stride, and at stride 1 SAME is symmetric.
        self.same_pad = stride > 1 and kernel_size > 1
        padding = 0 if self.same_pad else (kernel_size - 1) * dilation // 2
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, device=device, dtype=dtype
        )

    def effective_weight(self) -> Tensor:
        """(O, I, K, K), what the input is convolved with."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        if self.same_pad:
            top, bottom = same_padding(input.shape[-2], self.kernel_size[0], self.stride[0])
            left, right = same_padding(input.shape[-1], self.kernel_size[1], self.stride[1])
            input = F.pad(input, (left, right, top, bottom))
        return self._conv_forward(input, self.effective_weight(), self.bias)


class ScaledStdConv2d(SameConv2d):
    """SAME convolution with a standardised weight, a gain (O, 1, 1, 1) and a bias (O,).

    Args:
        in_channels: I times groups.
        out_channels: O.
        kernel_size: Odd, K.
        stride: Of both axes.
        dilation: Of both axes.
        groups: Divides both channel counts.
        scale: Constant factor on the standardised weight. It carries what would otherwise be a multiplication of the
            input: gamma of the activation before it and 1 / beta of its block.
        device: Of the parameters.
        dtype: Of the parameters.

    Source: nfnets/base.py, WSConv2D.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        scale: float = 1.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        self.scale = scale
        super().__init__(in_channels, out_channels, kernel_size, stride, dilation, groups, device=device, dtype=dtype)
        self.gain = nn.Parameter(torch.ones(out_channels, 1, 1, 1, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Normal weight of variance 1 / fan-in, gain 1, bias 0, as the authors initialise it."""
        nn.init.kaiming_normal_(self.weight, nonlinearity="linear")
        assert self.bias is not None
        nn.init.zeros_(self.bias)
        if hasattr(self, "gain"):  # nn.Conv2d's constructor calls this before there is one
            nn.init.ones_(self.gain)

    def effective_weight(self) -> Tensor:
        """(O, I, K, K): the standardised weight with gain and scale in it."""
        gain = self.gain
        if self.scale != 1.0:  # in float32 for a half-precision gain, or it would be rounded once more
            gain = gain.to(torch.promote_types(gain.dtype, torch.float32)) * self.scale
        return standardize_weight(self.weight, gain)

    def fuse(self) -> nn.Conv2d:
        """A plain convolution of the same output; timm's `reparameterize_model` looks for this name.

        The padding of a larger kernel at a stride depends on the parity of the input's size, so that one is padded in
        `SameConv2d`, whose weight is plain as well.
        """
        channels, size, stride = (self.in_channels, self.out_channels), self.kernel_size[0], self.stride[0]
        if self.same_pad:
            plain = SameConv2d(*channels, size, stride, groups=self.groups, device="meta")
        else:
            padding: Any = self.padding
            plain = nn.Conv2d(*channels, size, stride, padding, self.dilation[0], self.groups, device="meta")
        return bake(plain, self, self.effective_weight())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:.4f}"


@torch.no_grad()
def bake(plain: nn.Conv2d, conv: nn.Conv2d, weight: Tensor) -> nn.Conv2d:
    """`plain` with this weight and the bias of `conv`, in the memory format, mode and requires_grad of `conv`."""
    plain.weight = nn.Parameter(torch.empty_like(conv.weight).copy_(weight), conv.weight.requires_grad)
    if conv.bias is not None:
        plain.bias = nn.Parameter(conv.bias.clone(), conv.bias.requires_grad)
    return plain.train(conv.training)
