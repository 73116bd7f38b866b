"""Convolutions under TensorFlow's SAME rule, with a plain or a standardised weight, equal to the authors' to rounding.

Shapes: O output channels, I input channels per group, K kernel size.
Source: deepmind-research nfnets/base.py at f5de0ede.
"""

# torch.jit does not list what it exports; torch types its constructors in part.
# pyright: reportPrivateImportUsage=false, reportUnknownMemberType=false

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._eager import has_fixed_sizes
from .padding import same_padding
from .standardize import standardize_weight
from .standardize_triton import standardize, takes_kernel

__all__ = ["SameConv2d", "ScaledStdConv2d", "bake"]

torch.fx.wrap("standardize_weight")  # symbolic tracing records one call of it; this holds for calls in this module

_Pair = int | tuple[int, int]


def _autocast_dtype(weight: Tensor) -> torch.dtype | None:
    """In which autocast would convolve with the weight, if a kernel can write that."""
    # autocast leaves float64 alone and knows no meta tensors
    if takes_kernel(weight) and not weight.is_meta and weight.dtype is not torch.float64:
        device = weight.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return None


def _both_axes(name: str, value: _Pair) -> int:
    """The number that holds for both axes."""
    if isinstance(value, int):
        return value
    height, width = value
    if height != width:
        raise ValueError(f"expected the same {name} along both axes, got {name}={value}")
    return height


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: the output is ceil(size / stride), zeros go to the end first.

    The arguments are nn.Conv2d's, in its order, so that what builds a layer of this class by it can: PEFT does.

    Args:
        in_channels: I times groups.
        out_channels: O.
        kernel_size: Odd, K, the same along both axes.
        stride: Of both axes, at most K; 1 if `dilation` is above 1.
        padding: May be left out. The layer pads SAME whatever it is, and takes nothing but what its own attribute
            `padding` will be: 0 if it pads by itself, (K - 1) * dilation / 2 otherwise.
        dilation: Of both axes.
        groups: Divides both channel counts.
        bias: Whether there is one.
        padding_mode: `zeros`.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: if the sizes do not fit together, or `padding` asks for another padding than SAME.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Pair,
        stride: _Pair = 1,
        padding: _Pair | None = None,
        dilation: _Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        kernel_size = _both_axes("kernel_size", kernel_size)
        stride, dilation = _both_axes("stride", stride), _both_axes("dilation", dilation)
        if kernel_size % 2 == 0 or 1 < kernel_size < stride or (stride > 1 and dilation > 1):
            raise ValueError(
                "expected an odd kernel_size, no larger stride and no dilation with a stride, got "
                f"kernel_size={kernel_size}, stride={stride}, dilation={dilation}"
            )
        if padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros', got {padding_mode!r}")
        # A 1x1 kernel needs no padding at any stride, and at stride 1 SAME is symmetric.
        self.same_pad = stride > 1 and kernel_size > 1
        own = 0 if self.same_pad else (kernel_size - 1) * dilation // 2
        if padding not in (None, own, (own, own)):
            raise ValueError(
                f"{type(self).__name__} pads SAME: leave padding out or pass the value of its attribute, {own} here, "
                f"got padding={padding!r}"
            )
        super().__init__(
            in_channels, out_channels, kernel_size, stride, own, dilation, groups, bias, device=device, dtype=dtype
        )

    def effective_weight(self) -> Tensor:
        """(O, I, K, K), what the input is convolved with."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        """(N, I * groups, H, W) -> (N, O, ceil(H / stride), ceil(W / stride)).

        >>> SameConv2d(3, 8, 3, stride=2)(torch.zeros(1, 3, 5, 6)).shape
        torch.Size([1, 8, 3, 3])
        """
        if self.same_pad:
            top, bottom = same_padding(input.shape[-2], self.kernel_size[0], self.stride[0])
            left, right = same_padding(input.shape[-1], self.kernel_size[1], self.stride[1])
            if not torch.jit.is_scripting() and self._cuts(input, (top, left), (bottom, right)):
                return self._unpadded(input, (top, left), (bottom, right))
            input = F.pad(input, (left, right, top, bottom))
        weight = self.effective_weight()
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    @torch.jit.unused
    def _cuts(self, input: Tensor, before: tuple[int, int], after: tuple[int, int]) -> bool:
        """Whether `_unpadded` is the way, since it costs less than a padded copy of the input.

        On CPUs a row and a column of outputs more do not: the activation behind them takes longer over the part that
        is left.
        """
        if not has_fixed_sizes(input):
            return False
        return before == after or (
            input.device.type != "cpu" and self.in_channels * self.stride[0] ** 2 > self.out_channels
        )

    @torch.jit.unused
    def _unpadded(self, input: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
        """The convolution without a padded copy of its input.

        torch pads both ends alike. Where SAME wants one zero more at the end, a stride more at either end moves no
        window and adds one in front, whose output is cut off.
        """
        more = [int(a != b) for a, b in zip(before, after, strict=True)]
        padding = [b + m * s for b, m, s in zip(before, more, self.stride, strict=True)]
        weight = self.effective_weight()
        out = F.conv2d(input, weight, self.bias, self.stride, padding, self.dilation, self.groups)
        return out[..., more[0] :, more[1] :] if any(more) else out


class ScaledStdConv2d(SameConv2d):
    """SAME convolution with a standardised weight, a gain (O, 1, 1, 1) and a bias (O,).

    Args:
        in_channels: I times groups.
        out_channels: O.
        kernel_size: Odd, K, the same along both axes.
        stride: Of both axes.
        padding: As for `SameConv2d`.
        dilation: Of both axes.
        groups: Divides both channel counts.
        bias: There is one.
        padding_mode: `zeros`.
        device: Of the parameters.
        dtype: Of the parameters.
        scale: Constant factor on the standardised weight. It carries what would otherwise be a multiplication of the
            input: gamma of the activation before it and 1 / beta of its block.

    Raises:
        ValueError: if the sizes do not fit together, or `padding` asks for another padding than SAME.
        TypeError: if there is to be no bias, as adapters ask for.

    Source: nfnets/base.py, WSConv2D.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Pair,
        stride: _Pair = 1,
        padding: _Pair | None = None,
        dilation: _Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        scale: float = 1.0,
    ) -> None:
        if not bias:
            raise TypeError(
                "a standardised convolution has a bias. If an adapter such as LoRA asked for none: it would be "
                "standardised itself, so give it the network that timm_nf.fuse(model) returns"
            )
        self.scale = scale
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self.gain = nn.Parameter(torch.ones(out_channels, 1, 1, 1, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Normal weight of variance 1 / fan-in, gain 1, bias 0, as the authors initialise it."""
        nn.init.kaiming_normal_(self.weight, nonlinearity="linear")
        assert self.bias is not None
        nn.init.zeros_(self.bias)
        if hasattr(self, "gain"):  # nn.Conv2d's constructor calls this before there is one
            nn.init.ones_(self.gain)

    def effective_weight(self) -> Tensor:
        """(O, I, K, K): the standardised weight with gain and scale in it.

        On an accelerator under autocast it comes in autocast's dtype, rounded once and without a copy in float32.
        """
        if (dtype := _autocast_dtype(self.weight)) is not None:
            return standardize(self.weight, self.gain, out_dtype=dtype, scale=self.scale)
        return standardize_weight(self.weight, self.gain, scale=self.scale)

    def fuse(self) -> nn.Conv2d:
        """A plain convolution of the same output; timm's `reparameterize_model` looks for this name.

        The padding of a larger kernel at a stride depends on the parity of the input's size, so that one is padded in
        `SameConv2d`, whose weight is plain as well.
        """
        cls: Any = SameConv2d if self.same_pad else nn.Conv2d
        plain: nn.Conv2d = cls(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            device="meta",
        )
        return bake(plain, self, standardize_weight(self.weight, self.gain, scale=self.scale))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:.4f}"


@torch.no_grad()
def bake(plain: nn.Conv2d, conv: nn.Conv2d, weight: Tensor) -> nn.Conv2d:
    """`plain` with this weight and the bias of `conv`, in the memory format, mode and requires_grad of `conv`.

    Args:
        plain: On the meta device.
        conv: What `plain` replaces.
        weight: (O, I, K, K).
    """
    plain.weight = nn.Parameter(torch.empty_like(conv.weight).copy_(weight), conv.weight.requires_grad)
    if conv.bias is not None:
        plain.bias = nn.Parameter(conv.bias.clone(), conv.bias.requires_grad)
    return plain.train(conv.training)
