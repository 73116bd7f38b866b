"""Layers with a standardised weight: convolutions along one, two or three axes, transposed ones, and linear layers.

The 2-d convolution equals the authors' up to rounding. The others apply its formula to other shapes. A unit is an
output channel. Its fan-in is the number of its weights: the input channels of its group times the size of the kernel.

Shapes: O output channels, I input channels per group, K kernel size; "size" is one number for every axis.
Source: deepmind-research nfnets/base.py at f5de0ede.

Examples:
    >>> x = torch.zeros(1, 4, 9)  # (N, C, L)
    >>> [tuple(layer(4, 8, 3)(x).shape) for layer in (ScaledStdConv1d, ScaledStdConvTranspose1d)]
    [(1, 8, 7), (1, 8, 11)]
    >>> x = torch.zeros(1, 4, 9, 9, 9)  # (N, C, D, H, W)
    >>> [tuple(layer(4, 8, 3)(x).shape) for layer in (ScaledStdConv3d, ScaledStdConvTranspose3d)]
    [(1, 8, 7, 7, 7), (1, 8, 11, 11, 11)]
"""

# torch.jit exports names without listing them. A mixin uses attributes of the torch class that it is combined with.
# pyright: standard, reportPrivateImportUsage=false, reportIncompatibleVariableOverride=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._standardize_formula import STD_EPS
from .same_conv import Numbers, SameConv1d, SameConv2d, SameConv3d, per_axis
from .standardize import standardize_weight
from .standardize_triton import standardize, takes_kernel

__all__ = [
    "STANDARDIZED_LAYERS",
    "SameConv2d",
    "ScaledStdConv1d",
    "ScaledStdConv2d",
    "ScaledStdConv3d",
    "ScaledStdConvTranspose1d",
    "ScaledStdConvTranspose2d",
    "ScaledStdConvTranspose3d",
    "ScaledStdLinear",
    "bake",
]

_Plain = TypeVar("_Plain", bound=nn.Module)


@torch.jit.unused
def _autocast_dtype(weight: Tensor) -> torch.dtype | None:
    """The dtype in which autocast convolves, if a kernel can write the weight in it. Otherwise None."""
    # Autocast does not cast float64, and it has no entry for the meta device.
    if takes_kernel(weight) and not weight.is_meta and weight.dtype is not torch.float64:
        device = weight.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return None


class _Standardized:
    """The common part of all layers with a standardised weight: gain, scale, and the weight that they compute with."""

    def _add_gain(self, out_channels: int, scale: float, eps: float) -> None:
        self.scale, self.eps = scale, eps
        ones = torch.ones(
            out_channels, *[1] * (self.weight.ndim - 1), device=self.weight.device, dtype=self.weight.dtype
        )
        self.gain = nn.Parameter(ones)

    def reset_parameters(self) -> None:
        """Initialise as the authors do: a normal weight of variance 1 / fan-in, gain 1, bias 0."""
        rows = self._rows(self.weight)
        nn.init.normal_(self.weight, std=1 / math.sqrt(max(1, math.prod(rows.shape[1:]))))
        assert self.bias is not None
        nn.init.zeros_(self.bias)
        if hasattr(self, "gain"):  # torch's constructors call this method before the gain exists
            nn.init.ones_(self.gain)

    def _rows(self, weight: Tensor) -> Tensor:
        """The weight with its output channels first, (O, I, *K)."""
        return weight

    def _from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of `_rows`."""
        return rows

    def effective_weight(self) -> Tensor:
        """The weight of the convolution: the standardised weight times gain and scale, in the shape of the parameter.

        Under autocast on an accelerator it has autocast's dtype. It is rounded once, and no float32 copy is made.
        """
        if not torch.jit.is_scripting():
            dtype = _autocast_dtype(self.weight)
            if dtype is not None:
                rows = standardize(self._rows(self.weight), self.gain, self.eps, out_dtype=dtype, scale=self.scale)
                return self._from_rows(rows)
        return self._standardized_weight()

    def _standardized_weight(self) -> Tensor:
        return self._from_rows(standardize_weight(self._rows(self.weight), self.gain, self.eps, self.scale))

    def extra_repr(self) -> str:
        eps = "" if self.eps == STD_EPS else f", eps={self.eps}"
        return f"{super().extra_repr()}, scale={self.scale:.4f}{eps}"


def _require_bias(bias: bool) -> None:
    if not bias:
        # Adapters such as LoRA build their own layers of this type without a bias. Their weights would be standardised.
        raise TypeError(
            "a standardised layer needs a bias, got bias=False; for an adapter such as LoRA, adapt the network that "
            "timm_nf.fuse(model) returns"
        )


@torch.no_grad()
def bake(plain: _Plain, layer: Any, weight: Tensor) -> _Plain:
    """Give `plain` this weight, and the bias, memory format, mode and requires_grad of the layer that it replaces.

    Args:
        plain: The new layer, on the meta device.
        layer: The layer that `plain` replaces.
        weight: The weight for `plain`, in the shape of the layer's weight.

    Returns:
        `plain`.

    Examples:
        >>> layer = ScaledStdLinear(4, 8)
        >>> weight = timm_nf.standardize_weight(layer.weight, layer.gain)
        >>> x = torch.randn(2, 4)
        >>> torch.allclose(bake(torch.nn.Linear(4, 8, device="meta"), layer, weight)(x), layer(x), atol=1e-6)
        True
    """
    plain.weight = nn.Parameter(torch.empty_like(layer.weight).copy_(weight), layer.weight.requires_grad)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.clone(), layer.bias.requires_grad)
    return plain.train(layer.training)


# -- convolutions ------------------------------------------------------------------------------------------------------


class _ScaledStdConv(_Standardized):
    """The common part of standardised convolutions along any number of axes. Combined with a `SameConv` class."""

    _plain: tuple[Callable[..., Any], Callable[..., Any]]  # torch's layer, and the layer that pads SAME

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        stride: Numbers = 1,
        padding: str | Numbers | None = 0,
        dilation: Numbers = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        scale: float = 1.0,
        eps: float = STD_EPS,
    ) -> None:
        _require_bias(bias)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, True, padding_mode,
            device=device, dtype=dtype,
        )  # fmt: skip
        if self.same_pad:
            self.padding = "same"  # a layer that is built from this one's attributes then pads alike
        self._add_gain(out_channels, scale, eps)

    def _given(self, padding: str | Numbers | None, own: tuple[int, ...]) -> tuple[int, ...] | None:
        if padding is None or padding == "same":
            return None
        if padding == "valid":
            return (0,) * len(own)
        if isinstance(padding, str):
            raise ValueError(f"padding must be 'same', 'valid' or numbers, got {padding!r}")
        return per_axis("padding", padding, len(own))

    def fuse(self) -> Any:
        """The plain convolution with the same output. timm's `reparameterize_model` looks for this name.

        It is torch's layer. If the padding depends on the size of the input, it is a subclass that pads first.
        """
        plain, same = self._plain
        sizes = (self.in_channels, self.out_channels, self.kernel_size, self.stride)
        rest: dict[str, Any] = {
            "dilation": self.dilation, "groups": self.groups, "padding_mode": self.padding_mode, "device": "meta",
        }  # fmt: skip
        conv = same(*sizes, **rest) if self.same_pad else plain(*sizes, self.padding, **rest)
        return bake(conv, self, self._standardized_weight())


class ScaledStdConv1d(_ScaledStdConv, SameConv1d):
    """`ScaledStdConv2d` along one axis: (N, C, L), gain (O, 1, 1). Same arguments, but `padding` is 0 by default."""

    _plain = nn.Conv1d, SameConv1d


class ScaledStdConv2d(_ScaledStdConv, SameConv2d):
    """Convolution with a standardised weight, a gain (O, 1, 1, 1) and a bias (O,).

    The arguments are those of nn.Conv2d in its order. By default, `padding` is the authors' SAME rule.

    Examples:
        >>> [ScaledStdConv2d(3, 8, 3, 2, pad)(torch.zeros(1, 3, 6, 6)).shape[-1] for pad in (None, "same", 1, 0)]
        [3, 3, 3, 2]

    Args:
        in_channels: Number of input channels, I times groups.
        out_channels: Number of output channels, O.
        kernel_size: K of all axes, or one number for each.
        stride: Stride of all axes, or one number for each.
        padding: Numbers or "valid", as in torch. None or "same" pad SAME: the output has ceil(size / stride) pixels
            at every stride. torch's own "same" only allows stride 1.
        dilation: Dilation of all axes, or one number for each.
        groups: Divides both numbers of channels.
        bias: Must be true.
        padding_mode: What is padded, as torch names it.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        scale: Constant factor on the standardised weight. It takes the place of a multiplication of the input, by gamma
            of the activation before it and 1 / beta of its block.
        eps: Smallest value of N * variance, with N weights in a unit.

    Raises:
        ValueError: if the sizes do not fit together, or a stride under the SAME rule is larger than the kernel.
        TypeError: if `bias` is false. Adapters ask for that.

    Source: nfnets/base.py, WSConv2D.
    """

    _plain = nn.Conv2d, SameConv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        stride: Numbers = 1,
        padding: str | Numbers | None = None,
        dilation: Numbers = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        scale: float = 1.0,
        eps: float = STD_EPS,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype, scale=scale, eps=eps,
        )  # fmt: skip


class ScaledStdConv3d(_ScaledStdConv, SameConv3d):
    """`ScaledStdConv2d` along three axes: (N, C, D, H, W), gain (O, 1, 1, 1, 1). `padding` is 0 by default."""

    _plain = nn.Conv3d, SameConv3d


# -- transposed convolutions -------------------------------------------------------------------------------------------


class _ScaledStdConvTranspose(_Standardized):
    """The common part of standardised transposed convolutions. Combined with one of torch's classes."""

    axes: int
    _plain: Callable[..., Any]
    _convolve: Callable[..., Tensor]
    padding: Any  # numbers: a word is refused

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        stride: Numbers = 1,
        padding: Numbers = 0,
        output_padding: Numbers = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Numbers = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        scale: float = 1.0,
        eps: float = STD_EPS,
    ) -> None:
        _require_bias(bias)
        if isinstance(padding, str):
            raise ValueError(f"padding of a transposed convolution must be numbers, got {padding!r}")
        kernel_size, stride, padding, output_padding, dilation = (
            per_axis(name, value, self.axes)
            for name, value in (
                ("kernel_size", kernel_size),
                ("stride", stride),
                ("padding", padding),
                ("output_padding", output_padding),
                ("dilation", dilation),
            )
        )
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, True, dilation,
            padding_mode, device=device, dtype=dtype,
        )  # fmt: skip
        self._add_gain(out_channels, scale, eps)

    def _rows(self, weight: Tensor) -> Tensor:
        return self._swapped(weight, self.in_channels // self.groups, self.out_channels // self.groups)

    def _from_rows(self, rows: Tensor) -> Tensor:
        weight = self._swapped(rows, self.out_channels // self.groups, self.in_channels // self.groups)
        return weight.view(self.weight.shape)

    def _swapped(self, x: Tensor, first: int, second: int) -> Tensor:
        """(groups * first, second, *K) -> (groups * second, first, product of K)."""
        taps = 1
        for size in self.kernel_size:
            taps *= size
        return x.reshape(self.groups, first, second, taps).transpose(1, 2).flatten(0, 1)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, in_channels, *size) -> (N, O, *output size), as torch's layer.

        Args:
            input: The maps to enlarge.
            output_size: Size of the output, of the kernel's axes or of all axes. With a stride, several sizes are
                possible. By default, `output_padding` decides.
        """
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation
        )
        return self._convolve(input, output_padding)

    def fuse(self) -> Any:
        """Torch's transposed convolution with the same output. timm's `reparameterize_model` looks for this name."""
        plain = self._plain(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            dilation=self.dilation,
            device="meta",
        )
        return bake(plain, self, self._standardized_weight())


class ScaledStdConvTranspose1d(_ScaledStdConvTranspose, nn.ConvTranspose1d):
    """`ScaledStdConvTranspose2d` along one axis: (N, C, L), gain (O, 1, 1). It has the same arguments."""

    axes = 1
    _plain = nn.ConvTranspose1d

    def _convolve(self, input: Tensor, output_padding: list[int]) -> Tensor:
        weight = self.effective_weight()
        return F.conv_transpose1d(
            input, weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )


class ScaledStdConvTranspose2d(_ScaledStdConvTranspose, nn.ConvTranspose2d):
    """Transposed convolution with a standardised weight (I * groups, O / groups, K, K), a gain (O, 1, 1, 1), a bias.

    The arguments are those of nn.ConvTranspose2d in its order. A unit is an output channel, as in all layers here, so
    its fan-in is I * K * K. With a stride, an output pixel only sees 1 / stride of the kernel along each axis. To keep
    the variance of the input, give `scale=stride`, along one axis `stride**0.5`, along three axes `stride**1.5`.

    Examples:
        >>> ScaledStdConvTranspose2d(8, 3, 4, stride=2, padding=1, scale=2.0)(torch.zeros(1, 8, 6, 6)).shape
        torch.Size([1, 3, 12, 12])

    Args:
        in_channels: Number of input channels, I times groups.
        out_channels: Number of output channels, O.
        kernel_size: K of all axes, or one number for each.
        stride: Stride of all axes, or one number for each.
        padding: Numbers, as in torch.
        output_padding: Numbers, as in torch.
        groups: Divides both numbers of channels.
        bias: Must be true.
        dilation: Dilation of all axes, or one number for each.
        padding_mode: Only `zeros`, as in torch.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        scale: Constant factor on the standardised weight, as in `ScaledStdConv2d`.
        eps: Smallest value of N * variance, with N weights in a unit.

    Raises:
        ValueError: if the sizes do not fit together.
        TypeError: if `bias` is false. Adapters ask for that.
    """

    axes = 2
    _plain = nn.ConvTranspose2d

    def _convolve(self, input: Tensor, output_padding: list[int]) -> Tensor:
        weight = self.effective_weight()
        return F.conv_transpose2d(
            input, weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )


class ScaledStdConvTranspose3d(_ScaledStdConvTranspose, nn.ConvTranspose3d):
    """`ScaledStdConvTranspose2d` along three axes: (N, C, D, H, W), gain (O, 1, 1, 1, 1). Same arguments."""

    axes = 3
    _plain = nn.ConvTranspose3d

    def _convolve(self, input: Tensor, output_padding: list[int]) -> Tensor:
        weight = self.effective_weight()
        return F.conv_transpose3d(
            input, weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )


# -- linear layers -----------------------------------------------------------------------------------------------------


class ScaledStdLinear(_Standardized, nn.Linear):
    """Linear layer with a standardised weight (O, I), a gain (O, 1) and a bias (O,).

    For layers inside a network. The classifiers of the authors' networks are plain linear layers.

    Args:
        in_features: Number of input features, I.
        out_features: Number of output features, O.
        bias: Must be true.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        scale: Constant factor on the standardised weight, as in `ScaledStdConv2d`.
        eps: Smallest value of I * variance of a unit.

    Raises:
        TypeError: if `bias` is false. Adapters ask for that.

    Examples:
        >>> ScaledStdLinear(4, 8)(torch.zeros(2, 4)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        scale: float = 1.0,
        eps: float = STD_EPS,
    ) -> None:
        _require_bias(bias)
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        self._add_gain(out_features, scale, eps)

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return F.linear(input, self.effective_weight(), self.bias)

    def fuse(self) -> nn.Linear:
        """Torch's linear layer with the same output. timm's `reparameterize_model` looks for this name."""
        plain = nn.Linear(self.in_features, self.out_features, device="meta")
        return bake(plain, self, self._standardized_weight())


STANDARDIZED_LAYERS = (
    ScaledStdConv1d,
    ScaledStdConv2d,
    ScaledStdConv3d,
    ScaledStdConvTranspose1d,
    ScaledStdConvTranspose2d,
    ScaledStdConvTranspose3d,
    ScaledStdLinear,
)
"""All layers with a standardised weight. Each has a method `fuse`."""
