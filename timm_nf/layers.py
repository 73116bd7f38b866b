"""Layers of the normalizer-free networks, each equal to the authors' JAX layer to rounding.

timm has layers of the same names. These exist because timm's weight standardisation adds its epsilon to the variance
where the authors take a maximum, its gelu is not the tanh form, and its stochastic depth rescales survivors.

Shapes: N batch, C channels, H W height and width; O I K a convolution's output channels, input channels per group and
kernel size. Sources: arXiv:2101.08692, arXiv:2102.06171 and deepmind-research nfnets/base.py at f5de0ede.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

_STD_EPS = 1e-4  # floor on N * variance, nfnets/base.py
_MAX_MEAN_TO_STD = 4.0  # group_norm computes w * a + b: a row whose mean is larger than this loses more than 2 bits


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")  # jax.nn.gelu's default


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(
        x, threshold=40
    )  # torch's threshold of 20 is off by 2e-9, at 40 the two forms are equal in float64


# name -> (function, gamma): gamma = 1 / std(act(z)), z ~ N(0, 1), the values of nfnets/base.py as they stand there.
# tests/test_layers.py::test_gamma_is_one_over_the_std_of_the_activated_normal re-derives them by quadrature.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "identity": (lambda x: x, 1.0),
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
    """Gamma, the factor that gives the activation of a unit normal variance 1 (arXiv:2101.08692, section 4.1)."""
    return ACTIVATIONS[activation_name(name)][1]


class Activation(nn.Module):
    """An elementwise activation by name.

    Args:
        name: A key of `ACTIVATIONS`.
        gain: Factor on the output. Left at 1 wherever a convolution follows, which carries gamma in its weight.
    """

    def __init__(self, name: str, gain: float = 1.0) -> None:
        super().__init__()
        self.name = activation_name(name)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        x = ACTIVATIONS[self.name][0](x)
        return x if self.gain == 1.0 else x * self.gain

    def extra_repr(self) -> str:
        return self.name if self.gain == 1.0 else f"{self.name}, gain={self.gain:.4f}"


def _standardize(weight: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The formula in plain tensor operations: four kernels over the weight, one temporary of its size."""
    rows = weight.flatten(1)
    # Two centrings: the first mean is rounded at the scale of the mean, the second at the scale of the spread.
    rows = rows - rows.mean(1, keepdim=True)
    var, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
    scale = gain.view(-1, 1) * (rows.shape[1] * var).clamp(min=eps).rsqrt()
    return torch.addcmul(-mean * scale, rows, scale).view_as(weight)


def _standardize_vjp(grad: Tensor, weight: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of `_standardize` as an expression that can be differentiated again."""
    rows, grad = weight.flatten(1), grad.flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows - rows.mean(1, keepdim=True)
    norm2 = rows.square().sum(1, keepdim=True)  # N * variance
    inverse = norm2.clamp(min=eps).rsqrt()
    unit = rows * inverse
    along = (grad * unit).sum(1, keepdim=True)  # under the floor the scale is a constant and nothing is projected out
    inner = grad - grad.mean(1, keepdim=True) - torch.where(norm2 >= eps, along, torch.zeros_like(along)) * unit
    return (inner * (gain.view(-1, 1) * inverse)).view_as(weight), along.view_as(gain)


class _StandardizeOnCPU(torch.autograd.Function):
    """`_standardize` through the group_norm kernels: one fused pass forward, one backward.

    group_norm divides by sqrt(var + eps), not by sqrt(max(N * var, eps)): the two agree unless a row lies under the
    floor. Weights with such a row, or with a row whose mean dwarfs its spread, go through `_standardize`, as does a
    backward pass that is itself differentiated. Looking at the statistics costs nothing on a CPU.
    """

    @staticmethod
    def forward(weight: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        out_chs, fan_in = weight.shape[0], weight[0].numel()
        # eps 1e-38 is lost in any variance above 1e-30 and keeps a constant row from dividing by zero
        out, mean, rstd = torch.native_group_norm(
            weight.reshape(1, out_chs, fan_in),
            gain.reshape(-1) * fan_in**-0.5,
            None,
            1,
            out_chs,
            fan_in,
            out_chs,
            1e-38,
        )
        if bool(((rstd > (fan_in / eps) ** 0.5) | (mean.abs() * rstd > _MAX_MEAN_TO_STD)).any()):
            out, rstd = _standardize(weight, gain, eps), torch.zeros_like(rstd)  # 0 tells backward
        return out.view_as(weight), mean.view(-1), rstd.view(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor, Tensor]) -> None:
        weight, gain, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(weight, gain, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad, _, _ = grads
        weight, gain, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled() or not rstd[0]:
            return *_standardize_vjp(grad, weight, gain, ctx.eps), None
        out_chs, fan_in = weight.shape[0], weight[0].numel()
        rows = (1, out_chs, fan_in)
        grad_weight, grad_scale, _ = torch.ops.aten.native_group_norm_backward(
            grad.reshape(rows), weight.reshape(rows), mean.view(1, -1), rstd.view(1, -1),
            gain.reshape(-1) * fan_in**-0.5, 1, out_chs, fan_in, out_chs, [True, True, False],
        )  # fmt: skip
        return grad_weight.view_as(weight), (grad_scale * fan_in**-0.5).view_as(gain), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Rows are independent, so a batch of weights is one weight with more rows."""
        weight, gain, eps = args
        batch = [
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip((weight, gain), in_dims, strict=False)
        ]
        outputs = _StandardizeOnCPU.apply(*(x.flatten(0, 1) for x in batch), eps)
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0, 0, 0)


def standardize_weight(weight: Tensor, gain: Tensor, eps: float = _STD_EPS) -> Tensor:
    """Weight with zero mean and norm `gain` over the fan-in of every output channel.

    `w_hat = (w - mean(w)) * gain / sqrt(max(N * var(w), eps))` with N = I * K * K and the population variance.
    Statistics are computed in at least float32, whatever the weight's dtype and whether autocast is on.

    Args:
        weight: (O, I, K, K), say (256, 128, 3, 3).
        gain: (O, 1, 1, 1), say (256, 1, 1, 1).
        eps: Floor on N * var, below which the scale is constant.

    Returns:
        (O, I, K, K), in the weight's dtype and on its device.

    Raises:
        ValueError: if there is not exactly one gain for every output channel.

    Source: arXiv:2101.08692, section 4.3; nfnets/base.py, WSConv2D.standardize_weight.
    """
    if gain.numel() != weight.shape[0]:
        raise ValueError(
            f"expected one gain for each of the {weight.shape[0]} output channels of a weight of shape "
            f"{tuple(weight.shape)}, got a gain of shape {tuple(gain.shape)}; pass (O, 1, 1, 1)"
        )
    if (dtype := torch.promote_types(torch.promote_types(weight.dtype, gain.dtype), torch.float32)) != weight.dtype:
        return standardize_weight(weight.to(dtype), gain, eps).to(weight.dtype)
    # Fake, distributed and compiled tensors have no values to look at.
    eager = type(weight) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    if eager and weight.device.type == "cpu":
        return _StandardizeOnCPU.apply(weight, gain.to(dtype), eps)[0]
    return _standardize(weight, gain.to(dtype), eps)


torch.fx.wrap("standardize_weight")  # symbolic tracing records one call of it
register_notrace_function(standardize_weight)  # and so does timm's feature extractor


def _same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Zeros before and after one axis under TensorFlow's SAME rule, for a kernel at least as large as its stride."""
    # (ceil(size / stride) - 1) * stride + kernel_size - size, in operations that a traced size has too
    total = (-(-size // stride) - 1) * stride + kernel_size - size
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
        return standardize_weight(self.weight, self.gain if self.scale == 1.0 else self.gain * self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:.4f}"


class SameMaxPool2d(nn.Module):
    """3x3 max pool at stride 2 under TensorFlow's SAME rule, without a padded copy of the input."""

    def forward(self, x: Tensor) -> Tensor:
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
        rd_ratio: Hidden width as a fraction of `channels`, rounded down, at least 1.
        device: Of the parameters.
        dtype: Of the parameters.

    Source: nfnets/base.py, SqueezeExcite; relu as in the code, where arXiv:2102.06171 writes gelu.
    """

    def __init__(self, channels: int, rd_ratio: float = 0.5, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        hidden = max(1, int(channels * rd_ratio))
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
        return torch.sigmoid(self.fc2(F.relu(self.fc1(x))))


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
        return coefficient * (torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"
