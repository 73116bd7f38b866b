"""Convolutions along one, two or three axes under TensorFlow's SAME rule: the padding depends on the input's size.

Shapes: O output channels, I input channels per group, K kernel size; "size" is one number for every axis.
Source: deepmind-research nfnets/base.py at f5de0ede.
"""

# torch.jit exports names without listing them. A mixin uses attributes of the torch class that it is combined with.
# pyright: standard, reportPrivateImportUsage=false, reportIncompatibleVariableOverride=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._eager import has_fixed_sizes
from .padding import same_padding

__all__ = ["SameConv1d", "SameConv2d", "SameConv3d"]

Numbers = int | Sequence[int]  # one number for all axes, or one for each


def per_axis(name: str, value: Numbers, axes: int) -> tuple[int, ...]:
    """One number for every axis.

    Raises:
        ValueError: if there are neither one nor as many numbers as axes.
    """
    numbers = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(numbers) != axes:
        raise ValueError(f"expected one {name} for each of the {axes} axes, or one for all, got {name}={value}")
    return numbers


class _SamePadding:
    """The common part of convolutions along any number of axes that pad SAME. Subclasses may also pad by numbers.

    Attributes:
        axes: Number of the kernel's axes.
        same_pad: Whether the layer pads by itself. torch's layer pads both ends alike, and by the same number for all
            input sizes.
    """

    axes: int
    same_pad: bool

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        stride: Numbers = 1,
        padding: Any = None,
        dilation: Numbers = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        kernel_size, stride, dilation = (
            per_axis(name, value, self.axes)
            for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
        )
        reach = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True)]
        # A kernel of one needs no padding at any stride. At stride 1, SAME is symmetric if the kernel is odd.
        by_size = any(r > 1 and (s > 1 or r % 2 == 0) for r, s in zip(reach, stride, strict=True))
        own = (0,) * self.axes if by_size else tuple(r // 2 for r in reach)
        given = self._given(padding, own)
        if given is None and any(1 < r < s for r, s in zip(reach, stride, strict=True)):
            raise ValueError(
                "under the SAME rule, expected no larger stride than the kernel reaches with its dilation, got "
                f"kernel_size={kernel_size}, stride={stride}, dilation={dilation}"
            )
        numbers = own if given is None else given
        super().__init__(
            in_channels, out_channels, kernel_size, stride, numbers, dilation, groups, bias, padding_mode,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.same_pad = given is None and by_size
        self._pads = [number for number in reversed(numbers) for _ in range(2)]  # both ends, the last axis first

    def _given(self, padding: Any, own: tuple[int, ...]) -> tuple[int, ...] | None:
        """The numbers that `padding` asks for, None for SAME. This class only takes SAME.

        Args:
            padding: The constructor's argument.
            own: The value that the attribute `padding` has under the SAME rule.
        """
        if padding is None or padding == own or (isinstance(padding, int) and own == (padding,) * self.axes):
            return None
        raise ValueError(
            f"{type(self).__name__} pads SAME: leave padding out or pass the value of its attribute, {own} here, got "
            f"padding={padding!r}; nn.Conv{self.axes}d pads by numbers"
        )

    def effective_weight(self) -> Tensor:
        """The weight of the convolution, (O, I, *K)."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        """(N, I * groups, *size) -> (N, O, *ceil(size / stride)) under the SAME rule."""
        if not self.same_pad:
            if self.padding_mode == "zeros":
                return self._convolve_as_stated(input)
            return self._convolve(F.pad(input, self._pads, self.padding_mode), [0, 0, 0][: len(self.kernel_size)])
        before, after = self._margins(input)
        if not torch.jit.is_scripting() and self._cuts(input, before, after):
            return self._unpadded(input, before, after)
        pads: list[int] = []
        for axis, _ in enumerate(self.kernel_size):  # TorchScript and exporters only unroll loops over tuples
            pads.append(before[-1 - axis])  # the last axis first
            pads.append(after[-1 - axis])
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return self._convolve(F.pad(input, pads, mode), [0, 0, 0][: len(before)])

    def _margins(self, input: Tensor) -> tuple[list[int], list[int]]:
        """What the SAME rule pads before and after each axis."""
        before: list[int] = []
        after: list[int] = []
        axes = len(self.kernel_size)
        # TorchScript unrolls loops over tuples. Its zip has no argument `strict`.
        for axis, (k, s, d) in enumerate(zip(self.kernel_size, self.stride, self.dilation)):  # noqa: B905
            first, last = 0, 0
            if k > 1:
                first, last = same_padding(input.shape[axis - axes], (k - 1) * d + 1, s)
            before.append(first)
            after.append(last)
        return before, after

    @torch.jit.unused
    def _cuts(self, input: Tensor, before: list[int], after: list[int]) -> bool:
        """Whether `_unpadded` costs less than a padded copy of the input.

        If both ends are padded alike, it does. Otherwise it computes one more row and column and cuts them off. That
        pays on accelerators if the input is larger than the output. On CPUs it does not: the activation takes longer
        over the cut output.
        """
        if self.padding_mode != "zeros" or not has_fixed_sizes(input):
            return False
        return before == after or (
            input.device.type != "cpu" and self.in_channels * math.prod(self.stride) > self.out_channels
        )

    @torch.jit.unused
    def _unpadded(self, input: Tensor, before: list[int], after: list[int]) -> Tensor:
        """The convolution without a padded copy of its input.

        torch pads both ends alike. If SAME wants one more zero at the end, both ends get one more stride of padding.
        This moves no window, and adds one in front, whose output is cut off.
        """
        extra = [int(a != b) for a, b in zip(before, after, strict=True)]  # windows in front
        padding = [b + e * s for b, e, s in zip(before, extra, self.stride, strict=True)]
        out = self._convolve(input, padding)
        if any(extra):
            out = out[(..., *(slice(e, None) for e in extra))]
        return out


class SameConv1d(_SamePadding, nn.Conv1d):
    """`SameConv2d` along one axis, (N, C, L). It has the same arguments.

    Examples:
        >>> SameConv1d(3, 8, 3, stride=2)(torch.zeros(1, 3, 5)).shape
        torch.Size([1, 8, 3])
    """

    axes = 1

    def _convolve_as_stated(self, input: Tensor) -> Tensor:
        weight = self.effective_weight()
        return F.conv1d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def _convolve(self, input: Tensor, padding: list[int]) -> Tensor:
        weight = self.effective_weight()
        return F.conv1d(input, weight, self.bias, self.stride, padding, self.dilation, self.groups)


class SameConv2d(_SamePadding, nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: the output has ceil(size / stride) pixels.

    If the number of zeros is odd, one more is at the end.

    The arguments are those of nn.Conv2d in its order, so that tools such as PEFT can build this layer from another one.

    Examples:
        >>> SameConv2d(3, 8, 3, stride=2)(torch.zeros(1, 3, 5, 6)).shape
        torch.Size([1, 8, 3, 3])

    Args:
        in_channels: Number of input channels, I times groups.
        out_channels: Number of output channels, O.
        kernel_size: K of all axes, or one number for each.
        stride: Stride of all axes, or one number for each. At most the kernel's reach, (K - 1) * dilation + 1, unless
            that is 1.
        padding: May be left out. The only other value is that of the attribute `padding`: 0 if the layer pads by
            itself, otherwise (K - 1) * dilation / 2.
        dilation: Dilation of all axes, or one number for each.
        groups: Divides both numbers of channels.
        bias: Whether there is a bias.
        padding_mode: What is padded, as torch names it.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: if the sizes do not fit together, or `padding` asks for another padding than SAME.
    """

    axes = 2

    def _convolve_as_stated(self, input: Tensor) -> Tensor:
        weight = self.effective_weight()
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def _convolve(self, input: Tensor, padding: list[int]) -> Tensor:
        weight = self.effective_weight()
        return F.conv2d(input, weight, self.bias, self.stride, padding, self.dilation, self.groups)


class SameConv3d(_SamePadding, nn.Conv3d):
    """`SameConv2d` along three axes, (N, C, D, H, W). It has the same arguments.

    Examples:
        >>> SameConv3d(3, 8, 3, stride=2)(torch.zeros(1, 3, 5, 6, 7)).shape
        torch.Size([1, 8, 3, 3, 4])
    """

    axes = 3

    def _convolve_as_stated(self, input: Tensor) -> Tensor:
        weight = self.effective_weight()
        return F.conv3d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def _convolve(self, input: Tensor, padding: list[int]) -> Tensor:
        weight = self.effective_weight()
        return F.conv3d(input, weight, self.bias, self.stride, padding, self.dilation, self.groups)
