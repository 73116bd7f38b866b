"""The end of a residual branch: the mean for its gate, and the sum with the shortcut.

Both are plain operations with a backward pass of their own. It reads or writes 9 tensors of the branch's size. torch's
backward pass reads or writes 13: `mean` divides the expanded gradient instead of the small one, and `addcmul`
multiplies by its `value` of 1. Compilers, exporters, tracing and scripting get torch's own operations.

Shapes: N examples, C channels, H height, W width.
"""

# torch.jit exports names without listing them.
# pyright: reportPrivateImportUsage=false

import math
from typing import Any

import torch
from torch import Tensor, nn

from ._eager import is_eager
from .drop import StochasticDepth, check_drop_path_rate

__all__ = ["SkipInit", "add_scaled", "global_mean"]


class _GlobalMean(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.mean(tuple(range(2, x.ndim)), keepdim=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return (grads[0] / math.prod(ctx.shape[2:])).expand(ctx.shape)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0].mean(tuple(range(2, tangents[0].ndim)), keepdim=True)


def global_mean(x: Tensor, axes: int = 2) -> Tensor:
    """Mean over all axes behind the channels, (N, C, H, W) -> (N, C, 1, 1).

    Args:
        x: (N, C, ...).
        axes: Number of axes behind the channels. `x` itself cannot give it in symbolic tracing.

    Examples:
        >>> global_mean(torch.arange(4.0).view(1, 1, 2, 2))
        tensor([[[[1.5000]]]])
    """
    if axes == 0:
        return x
    if not torch.jit.is_scripting() and is_eager(x):
        return _GlobalMean.apply(x)
    # torch's older ONNX exporter cannot read a list that a loop makes.
    return x.mean([2, 3, 4][:axes] if axes <= 3 else list(range(2, 2 + axes)), keepdim=True)


class _AddScaled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(shortcut: Tensor, out: Tensor, gain: Tensor, gate: Tensor | None) -> Tensor:
        return torch.addcmul(shortcut, out, _coefficient(out, gain, gate))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (out, gain, gate) = grads, ctx.saved_tensors
        grad_shortcut = grad_out = grad_gain = grad_gate = None
        if ctx.needs_input_grad[0]:
            grad_shortcut = grad.to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_out = (grad * _coefficient(out, gain, gate)).to(out.dtype)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            along = _sum_to(grad * out, gain if gate is None else gate, gain.dtype)
            grad_gain = _sum_to(along if gate is None else along * gate, gain, gain.dtype)
            grad_gate = None if gate is None else (along * gain).to(gate.dtype)
        return grad_shortcut, grad_out, grad_gain, grad_gate

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (out, gain, gate), (shortcut_t, out_t, gain_t, gate_t) = ctx.saved_for_forward, tangents
        coefficient_t = gain_t if gate is None else gain_t * gate + gain * gate_t
        return shortcut_t + out_t * _coefficient(out, gain, gate) + out * coefficient_t.to(out.dtype)


def _coefficient(out: Tensor, gain: Tensor, gate: Tensor | None) -> Tensor:
    """`gain * gate` in the dtype of `out`. Under autocast the gain is float32, and would make the sum float32."""
    return (gain if gate is None else gain * gate).to(out.dtype)


def _sum_to(x: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` summed over the axes along which `like` was broadcast. The result has the shape of `like`."""
    shape = (1,) * (x.ndim - like.ndim) + like.shape
    axes = [axis for axis, size in enumerate(shape) if size == 1 and x.shape[axis] > 1]
    summed = x.sum(axes, keepdim=True, dtype=dtype) if axes else x.to(dtype)
    return summed.view(like.shape)


def add_scaled(shortcut: Tensor, out: Tensor, gain: Tensor, gate: Tensor | None = None) -> Tensor:
    """`shortcut + out * gain * gate`.

    Args:
        shortcut: (N, C, H, W), or any other number of axes.
        out: Output of the branch, (N, C, H, W).
        gain: (1,), or (N, 1, 1, 1) with one value per example.
        gate: (N, C, 1, 1). None stands for 1.

    Returns:
        (N, C, H, W), in the dtype of `shortcut` and `out`.

    Examples:
        >>> add_scaled(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), gain=torch.tensor([0.5])).flatten()
        tensor([1.5000, 1.5000, 1.5000, 1.5000])
    """
    if not torch.jit.is_scripting() and is_eager(out):
        return _AddScaled.apply(shortcut, out, gain, gate)
    coefficient = _coefficient(out, gain, gate)
    if torch.jit.is_tracing() or torch.compiler.is_compiling():  # some converters do not have addcmul
        return shortcut + out * coefficient
    return torch.addcmul(shortcut, out, coefficient)


class SkipInit(nn.Module):
    """The end of a residual block: `shortcut + alpha * gain * branch`, with a learnable gain (1,) that starts at 0.

    The block starts as its shortcut. Where the branch has unit variance, a gain of 1 adds alpha^2 to the variance of
    the shortcut. Stochastic depth does not rescale the examples that keep their branch.

    Args:
        alpha: Constant factor on the branch. The paper has 0.2.
        drop_path_rate: Rate of stochastic depth.
        device: Device of the gain.
        dtype: Dtype of the gain.

    Raises:
        ValueError: if the rate is not between 0 and 1.

    Examples:
        >>> SkipInit()(torch.ones(1, 1, 2), torch.ones(1, 1, 2)).tolist()
        [[[1.0, 1.0]]]

    Source: arXiv:2002.10444, section 3; deepmind-research nfnets/nfnet.py at f5de0ede, NFBlock.
    """

    def __init__(self, alpha: float = 0.2, drop_path_rate: float = 0.0, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        check_drop_path_rate(drop_path_rate)
        self.alpha = alpha
        self.drop_path = StochasticDepth(drop_path_rate) if drop_path_rate > 0 else None
        # One element, not a scalar: FSDP2 refuses to shard scalar parameters.
        self.gain = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set the gain to 0."""
        nn.init.zeros_(self.gain)

    def forward(self, shortcut: Tensor, out: Tensor, gate: Tensor | None = None) -> Tensor:
        """(N, C, ...), (N, C, ...) -> (N, C, ...), of any number of axes.

        Args:
            shortcut: Output of the shortcut.
            out: Output of the branch.
            gate: Output of `SqueezeExcite`, (N, C, 1, ..., 1). It is multiplied by the authors' factor of 2.
        """
        gain = (self.alpha if gate is None else 2 * self.alpha) * self.gain
        if self.drop_path is not None:
            gain = self.drop_path(gain, out)
        return add_scaled(shortcut, out, gain, gate)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"
