"""Layers of the normalizer-free networks, each equal to the authors' JAX layer to rounding.

timm has layers of the same names. These exist because timm's gelu is not the tanh form, its squeeze-excite multiplies
activations by constants, and its stochastic depth rescales survivors.

Shapes: N batch, C channels, H W height and width; O I K a convolution's output channels, input channels per group and
kernel size. Sources: arXiv:2101.08692, arXiv:2102.06171 and deepmind-research nfnets/base.py at f5de0ede.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .standardize import standardize_weight
from .variants import squeeze_chs

torch.fx.wrap("standardize_weight")  # symbolic tracing records one call of it; this holds for calls in this module


def _identity(x: Tensor) -> Tensor:
    return x


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")  # jax.nn.gelu's default


def _gelu_(x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_(x, approximate="tanh")


def _silu_(x: Tensor) -> Tensor:
    return F.silu(x, inplace=True)


def _softplus(x: Tensor) -> Tensor:
    # above torch's default threshold of 20 the linear form is off by 2e-9, above 40 by less than float64 resolves
    return F.softplus(x, threshold=40)


# name -> (function, gamma): gamma = 1 / std(act(z)), z ~ N(0, 1), the values of nfnets/base.py as they stand there.
# tests/test_layers.py::test_gamma_is_one_over_the_std_of_the_activated_normal re-derives them by quadrature.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "identity": (_identity, 1.0),
    "celu": (F.celu, 1.270926833152771),
    "elu": (F.elu, 1.2716004848480225),
    "gelu": (_gelu, 1.7015043497085571),
    "leaky_relu": (F.leaky_relu, 1.70590341091156),
    "log_sigmoid": (F.logsigmoid, 1.9193484783172607),
    "relu": (F.relu, 1.7139588594436646),
    "relu6": (F.relu6, 1.7131484746932983),
    "selu": (F.selu, 1.0008515119552612),
    "sigmoid": (torch.sigmoid, 4.803835391998291),
    "silu": (F.silu, 1.7881293296813965),
    "softplus": (_softplus, 1.9203323125839233),
    "softsign": (F.softsign, 2.338853120803833),
    "tanh": (torch.tanh, 1.5939117670059204),
}
# Those of the shipped networks where nobody needs the input afterwards: without a copy NFNet-F0's fused forward takes
# 3 % less time at batch 1 and 6 % less at batch 8 (scripts/bench_inference.py times them).
_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {"gelu": _gelu_, "relu": F.relu_, "silu": _silu_}
_ACTIVATION_ALIASES = {"swish": "silu", "soft_sign": "softsign", "logsigmoid": "log_sigmoid"}


def activation_name(name: str) -> str:
    """The key of `name` in `ACTIVATIONS`.

    Raises:
        ValueError: if the authors give no gamma for an activation of this name.
    """
    key = _ACTIVATION_ALIASES.get(name, name) if isinstance(name, str) else name
    if key not in ACTIVATIONS:
        raise ValueError(
            f"act_layer must be the name of an activation with a known gamma, got {name!r}; "
            f"choose one of {', '.join(ACTIVATIONS)}"
        )
    return key


def activation_gain(name: str) -> float:
    """Gamma, the factor that gives the activation of a unit normal variance 1 (arXiv:2101.08692, section 4.3)."""
    return ACTIVATIONS[activation_name(name)][1]


class Activation(nn.Module):
    """An elementwise activation by name.

    Args:
        name: A key of `ACTIVATIONS`.
        gain: Factor on the output. Left at 1 wherever a convolution follows, which carries gamma in its weight.
        inplace: Overwrite the input where no gradients are recorded.
    """

    def __init__(self, name: str, gain: float = 1.0, inplace: bool = False) -> None:
        super().__init__()
        self.name = activation_name(name)
        self.function = ACTIVATIONS[self.name][0]  # an attribute, as TorchScript cannot look it up in the table
        self.inplace_function = _IN_PLACE.get(self.name, self.function) if inplace else self.function
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(x) if torch.is_grad_enabled() else self.inplace_function(x)
        return x if self.gain == 1.0 else x * self.gain

    def extra_repr(self) -> str:
        return self.name if self.gain == 1.0 else f"{self.name}, gain={self.gain:.4f}"


def _same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Zeros before and after one axis under TensorFlow's SAME rule, for a kernel at least as large as its stride."""
    # (ceil(size / stride) - 1) * stride + kernel_size - size, in operations that a traced size has too; none of them
    # divides a negative number, which ONNX rounds the other way
    total = (size - 1) // stride * stride + kernel_size - size
    return total // 2, total - total // 2


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
            top, bottom = _same_padding(input.shape[-2], self.kernel_size[0], self.stride[0])
            left, right = _same_padding(input.shape[-1], self.kernel_size[1], self.stride[1])
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


class SameMaxPool2d(nn.Module):
    """3x3 max pool at stride 2 under TensorFlow's SAME rule, without a padded copy of the input."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # sizes may be symbols, of which the parity below would be fixed
            top, bottom = _same_padding(x.shape[-2], 3, 2)
            left, right = _same_padding(x.shape[-1], 3, 2)
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
        self.fc1 = nn.Conv2d(channels, hidden, 1, device=device, dtype=dtype)
        self.fc2 = nn.Conv2d(hidden, channels, 1, device=device, dtype=dtype)
        for fc in (self.fc1, self.fc2):  # haiku's default for a linear layer
            std = fc.in_channels**-0.5
            nn.init.trunc_normal_(fc.weight, std=std, a=-2 * std, b=2 * std)
            assert fc.bias is not None
            nn.init.zeros_(fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 1, 1)."""
        x = x.mean((2, 3), keepdim=True)
        if torch.jit.is_scripting() or torch.compiler.is_compiling() or self._calls_are_seen():
            x = self.fc2(F.relu(self.fc1(x)))
        else:
            # A matrix product takes the weight as it is; for a convolution oneDNN copies it into another layout at
            # every call, as scripts/profile_inference.py shows of the other ones.
            x = F.relu(F.linear(x.flatten(1), self.fc1.weight.flatten(1), self.fc1.bias))
            x = F.linear(x, self.fc2.weight.flatten(1), self.fc2.bias)[:, :, None, None]
        return torch.sigmoid(x)

    @torch.jit.unused
    def _calls_are_seen(self) -> bool:
        """Whether a convolution has a hook on it or is not torch's own, so that it has to be called as a module."""
        for fc in (self.fc1, self.fc2):
            hooks = (fc._forward_hooks, fc._forward_pre_hooks, fc._backward_hooks, fc._backward_pre_hooks)
            if type(fc) is not nn.Conv2d or any(hooks):
                return True
        return False


class StochasticDepth(nn.Module):
    """Zeroes the residual branch of whole examples in training; the survivors are not rescaled.

    Args:
        rate: Probability that an example loses its branch.

    Source: nfnets/base.py, StochDepth.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, coefficient: Tensor, x: Tensor) -> Tensor:
        """Coefficient of the branch, broadcastable to (N, C, 1, 1), with zeros for the dropped examples of `x`."""
        if not self.training:
            return coefficient
        return coefficient * (torch.rand_like(x[:, :1, :1, :1], dtype=torch.float32) >= self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"
