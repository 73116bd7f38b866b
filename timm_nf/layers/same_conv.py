"""Convolutions along one, two or three axes that pad by the size of their input: TensorFlow's SAME rule.

Shapes: O output channels, I input channels per group, K kernel size, size one number for every axis.
Source: deepmind-research nfnets/base.py at f5de0ede.
"""

# torch.jit does not list what it exports. A mixin uses what torch's classes beside it have.
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

Numbers = int | Sequence[int]  # of all axes, or one for each


def per_axis(name: str, value: Numbers, axes: int) -> tuple[int, ...]:
    """One number for every axis.

    Raises:
        ValueError: if there is another number of them.
    """
    numbers = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(numbers) != axes:
        raise ValueError(f"expected one {name} for each of the {axes} axes, or one for all, got {name}={value}")
    return numbers


class SamePadding:
    """What convolutions along any number of axes have in common that pad SAME, or by numbers where a subclass does.

    Attributes:
        axes: How many axes the kernel has.
        same_pad: Whether the padding depends on the input's size, or on its end, so that torch's layer has no number
            for it.
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
        # A kernel of one needs no padding at any stride, and at stride 1 SAME is symmetric if the kernel is odd.
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

    def _given(self, padding: Any, own: tuple[int, ...]) -> tuple[int, ...] | None:
        """The numbers that `padding` asks for, None for SAME. This class takes nothing but SAME.

        Args:
            padding: As given.
            own: The attribute `padding` under the SAME rule.
        """
        if padding is None or padding == own or (isinstance(padding, int) and own == (padding,) * self.axes):
            return None
        raise ValueError(
            f"{type(self).__name__} pads SAME: leave padding out or pass the value of its attribute, {own} here, got "
            f"padding={padding!r}; nn.Conv{self.axes}d pads by numbers"
        )

    def effective_weight(self) -> Tensor:
        """(O, I, *K), what the input is convolved with."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        """(N, I * groups, *size) -> (N, O, *ceil(size / stride)) under the SAME rule."""
        if not self.same_pad:
            return self._conv_forward(input, self.effective_weight(), self.bias)
        before, after = self._margins(input)
        if not torch.jit.is_scripting() and self._cuts(input, before, after):
            return self._unpadded(input, before, after)
        pads: list[int] = []
        for axis, _ in enumerate(self.kernel_size):  # TorchScript unrolls loops over tuples, exporters know no others
            pads.append(before[-1 - axis])  # the last axis first
            pads.append(after[-1 - axis])
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return self._convolve(F.pad(input, pads, mode), [0, 0, 0][: len(before)])

    def _margins(self, input: Tensor) -> tuple[list[int], list[int]]:
        """What the SAME rule pads before and after each axis."""
        before: list[int] = []
        after: list[int] = []
        axes = len(self.kernel_size)
        # TorchScript unrolls loops over tuples, but knows no argument `strict`.
        for axis, (k, s, d) in enumerate(zip(self.kernel_size, self.stride, self.dilation)):  # noqa: B905
            first, last = 0, 0
            if k > 1:
                first, last = same_padding(input.shape[axis - axes], (k - 1) * d + 1, s)
            before.append(first)
            after.append(last)
        return before, after

    @torch.jit.unused
    def _cuts(self, input: Tensor, before: list[int], after: list[int]) -> bool:
        """Whether `_unpadded` is the way, since it costs less than a padded copy of the input.

        On CPUs a row and a column of outputs more do not: the activation behind them takes longer over the part that
        is left.
        """
        if self.padding_mode != "zeros" or not has_fixed_sizes(input):
            return False
        return before == after or (
            input.device.type != "cpu" and self.in_channels * math.prod(self.stride) > self.out_channels
        )

    @torch.jit.unused
    def _unpadded(self, input: Tensor, before: list[int], after: list[int]) -> Tensor:
        """The convolution without a padded copy of its input.

        torch pads both ends alike. Where SAME wants one zero more at the end, a stride more at either end moves no
        window and adds one in front, whose output is cut off.
        """
        more = [int(a != b) for a, b in zip(before, after, strict=True)]
        padding = [b + m * s for b, m, s in zip(before, more, self.stride, strict=True)]
        out = self._convolve(input, padding)
        return out[(..., *(slice(m, None) for m in more))] if any(more) else out


class SameConv1d(SamePadding, nn.Conv1d):
    """`SameConv2d` along one axis, (N, C, L); its arguments.

    Examples:
        >>> SameConv1d(3, 8, 3, stride=2)(torch.zeros(1, 3, 5)).shape
        torch.Size([1, 8, 3])
    """

    axes = 1

    def _convolve(self, input: Tensor, padding: list[int]) -> Tensor:
        weight = self.effective_weight()
        return F.conv1d(input, weight, self.bias, self.stride, padding, self.dilation, self.groups)


class SameConv2d(SamePadding, nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: the output is ceil(size / stride), zeros go to the end first.

    The arguments are nn.Conv2d's, in its order, so that what builds a layer of this class by it can: PEFT does.

    Examples:
        >>> SameConv2d(3, 8, 3, stride=2)(torch.zeros(1, 3, 5, 6)).shape
        torch.Size([1, 8, 3, 3])

    Args:
        in_channels: I times groups.
        out_channels: O.
        kernel_size: K of all axes, or one for each.
        stride: Likewise; at most what the kernel reaches, (K - 1) * dilation + 1, unless that is 1.
        padding: May be left out. The layer pads SAME whatever it is, and takes nothing but what its own attribute
            `padding` will be: 0 if it pads by itself, (K - 1) * dilation / 2 otherwise.
        dilation: Of all axes, or one for each.
        groups: Divides both channel counts.
        bias: Whether there is one.
        padding_mode: What is padded, as torch names it.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: if the sizes do not fit together, or `padding` asks for another padding than SAME.
    """

    axes = 2

    def _convolve(self, input: Tensor, padding: list[int]) -> Tensor:
        weight = self.effective_weight()
        return F.conv2d(input, weight, self.bias, self.stride, padding, self.dilation, self.groups)


class SameConv3d(SamePadding, nn.Conv3d):
    """`SameConv2d` along three axes, (N, C, D, H, W); its arguments.

    Examples:
        >>> SameConv3d(3, 8, 3, stride=2)(torch.zeros(1, 3, 5, 6, 7)).shape
        torch.Size([1, 8, 3, 3, 4])
    """

    axes = 3

    def _convolve(self, input: Tensor, padding: list[int]) -> Tensor:
        weight = self.effective_weight()
        return F.conv3d(input, weight, self.bias, self.stride, padding, self.dilation, self.groups)
