"""The gate of squeeze-excite, which timm's layer multiplies into the activations."""

# torch types its constructors and hooks in part.
# pyright: reportUnknownMemberType=false

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..variants import squeeze_chs
from .residual import global_mean

__all__ = ["GateConv2d", "SqueezeExcite"]


class GateConv2d(nn.Conv2d):
    """1x1 convolution of maps of one pixel, computed as the matrix product that it is.

    A matrix product takes the weight as it is. For a convolution oneDNN copies the weight into another layout at every
    call, as `python -m benchmarks.profile_inference` shows of the other ones.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: 1, as for all that follow: what nn.Conv2d has it for is the only value.
        stride: 1.
        padding: 0.
        dilation: 1.
        groups: 1.
        bias: Whether there is one.
        padding_mode: `zeros`.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: if it is not a 1x1 convolution of all channels.

    Source: nfnets/base.py, SqueezeExcite, whose layers are haiku's default linear layers.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 1,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros"] = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        geometry = (self.kernel_size, self.stride, self.padding, self.groups)
        if geometry != ((1, 1), (1, 1), (0, 0), 1):
            raise ValueError(
                f"expected a 1x1 convolution without stride, padding and groups, got kernel_size={kernel_size}, "
                f"stride={stride}, padding={padding}, groups={groups}; use nn.Conv2d for others"
            )

    def reset_parameters(self) -> None:
        """Weight from a normal distribution cut at two deviations, of deviation 1 / sqrt(I) before the cut; bias 0."""
        std = self.in_channels**-0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """(N, I, 1, 1) -> (N, O, 1, 1)."""
        if torch.compiler.is_compiling():  # run times pack weights once; a Reshape of them would stay in ONNX files
            return F.conv2d(input, self.weight, self.bias)
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None]


class SqueezeExcite(nn.Module):
    """The gate of squeeze-excite, sigmoid(fc2(relu(fc1(mean(x))))), which the block applies with its constants.

    Args:
        channels: C, of input and gate.
        rd_ratio: Hidden width as a fraction of `channels`, see `squeeze_chs`.
        device: Of the parameters.
        dtype: Of the parameters.

    Source: nfnets/base.py, SqueezeExcite; relu as in the code, where arXiv:2102.06171 writes gelu.
    """

    def __init__(self, channels: int, rd_ratio: float = 0.5, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        hidden = squeeze_chs(channels, rd_ratio)
        self.fc1 = GateConv2d(channels, hidden, device=device, dtype=dtype)
        self.act = nn.ReLU()
        self.fc2 = GateConv2d(hidden, channels, device=device, dtype=dtype)
        self.gate = nn.Sigmoid()

    def reset_parameters(self) -> None:
        """As `GateConv2d` initialises its layers."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 1, 1); of any number of axes behind the channels.

        >>> [tuple(SqueezeExcite(6)(torch.zeros(2, 6, *size)).shape) for size in ((5, 4), (5,))]
        [(2, 6, 1, 1), (2, 6, 1)]
        """
        mean = global_mean(x)
        if mean.dim() == 4:
            return self.gate(self.fc2(self.act(self.fc1(mean))))
        shape = list(mean.shape)
        return self.gate(self.fc2(self.act(self.fc1(mean.flatten(1)[:, :, None, None])))).view(shape)
