"""The gate of squeeze-excite. timm's layer also multiplies it into the activations; here the block does that."""

# torch's types of constructors and hooks are incomplete, and so are those of timm's initialisers.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportPrivateImportUsage=false

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ..variants import squeeze_chs
from .residual import global_mean

__all__ = ["GateConv2d", "SqueezeExcite"]


class GateConv2d(nn.Conv2d):
    """A 1x1 convolution of maps with one pixel, computed as a matrix product.

    A matrix product uses the weight in its own layout. For a convolution, oneDNN copies the weight into another layout
    in every call; `python -m benchmarks.profile_inference` shows these copies for the other convolutions.

    The arguments are those of nn.Conv2d, so that tools can build such a layer from another one. Most allow one value.

    Args:
        in_channels: Number of input channels, I.
        out_channels: Number of output channels, O.
        kernel_size: Only 1.
        stride: Only 1.
        padding: Only 0.
        dilation: Has no effect on a 1x1 kernel.
        groups: Only 1.
        bias: Whether there is a bias.
        padding_mode: Has no effect without padding.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: if kernel size, stride, padding or groups have another value.

    Source: nfnets/base.py, SqueezeExcite, whose layers are haiku's default linear layers.

    Examples:
        >>> GateConv2d(8, 4)(torch.zeros(2, 8, 1, 1)).shape
        torch.Size([2, 4, 1, 1])
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
        """Draw the weight from a normal distribution with std 1 / sqrt(I), truncated at 2 std. Set the bias to 0."""
        std = self.in_channels**-0.5
        # torch's own trunc_normal_ draws again by value, and fake tensors have no values.
        trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """(N, I, 1, 1) -> (N, O, 1, 1)."""
        # Exported files keep the convolution: run times pack its weight once, and a Reshape would stay in ONNX files.
        if torch.compiler.is_compiling():
            return F.conv2d(input, self.weight, self.bias)
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None]


class SqueezeExcite(nn.Module):
    """The gate of squeeze-excite, sigmoid(fc2(relu(fc1(mean(x))))). The block multiplies it in, with its constants.

    Args:
        channels: Channels of input and gate.
        rd_ratio: Hidden width over `channels`, see `squeeze_chs`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        axes: Number of axes behind the channels.

    Source: nfnets/base.py, SqueezeExcite. The code has a relu, arXiv:2102.06171 writes gelu.

    Examples:
        >>> SqueezeExcite(8)(torch.zeros(2, 8, 5, 5)).flatten(1)[0, :2]
        tensor([0.5000, 0.5000], grad_fn=<SliceBackward0>)
    """

    def __init__(
        self, channels: int, rd_ratio: float = 0.5, device: Any = None, dtype: Any = None, *, axes: int = 2
    ) -> None:
        super().__init__()
        self.axes = axes
        hidden = squeeze_chs(channels, rd_ratio)
        self.fc1 = GateConv2d(channels, hidden, device=device, dtype=dtype)
        self.act = nn.ReLU()
        self.fc2 = GateConv2d(hidden, channels, device=device, dtype=dtype)
        self.gate = nn.Sigmoid()

    def reset_parameters(self) -> None:
        """Initialise both layers, see `GateConv2d.reset_parameters`."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 1, 1), or as many axes as there are.

        Examples:
            >>> SqueezeExcite(6)(torch.zeros(2, 6, 5, 4)).shape
            torch.Size([2, 6, 1, 1])
            >>> SqueezeExcite(6, axes=1)(torch.zeros(2, 6, 5)).shape
            torch.Size([2, 6, 1])
        """
        mean = global_mean(x, self.axes)
        if self.axes == 2:
            return self.gate(self.fc2(self.act(self.fc1(mean))))
        gate = self.gate(self.fc2(self.act(self.fc1(mean.flatten(1)[:, :, None, None]))))
        return gate.view(mean.shape)
