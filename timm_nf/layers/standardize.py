"""Scaled weight standardisation, equal to the authors' up to rounding, and its inverse.

timm's layers add an epsilon to the variance, the authors take a maximum. timm's layers call batch_norm, which takes
longer. `python -m benchmarks.weights` compares both.

Shapes: O output channels, I input channels per group, K kernel size. Sources: arXiv:2101.08692, section 4.2;
deepmind-research nfnets/base.py at f5de0ede.
"""

# torch.jit exports names without listing them.
# pyright: reportPrivateImportUsage=false

from typing import Any

import torch
from torch import Tensor, nn

from ._eager import is_eager, recorded_call
from ._standardize_formula import STD_EPS, as_rows, check_gain, formula, jvp, statistics_dtype, vjp
from .standardize_triton import standardize, takes_kernel

__all__ = ["destandardize_weight", "standardize_weight"]

# group_norm computes w * a + b. If the mean of a row is more than 4 times its spread, the sum loses more than 2 bits.
_MAX_MEAN_TO_STD = 4.0


class _StandardizeOnCPU(torch.autograd.Function):
    """The formula by torch's group_norm kernels: one fused pass forward, one backward.

    group_norm divides by sqrt(var + eps), the formula by sqrt(max(N * var, eps)). The results agree if no row is under
    the floor. Plain operations compute the formula if a row is under the floor or has a mean far above its spread, and
    for derivatives of the backward pass. Reading the statistics to decide this costs nothing on a CPU.
    """

    @staticmethod
    def forward(weight: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        out_chs, fan_in = weight.shape[0], weight[0].numel()
        # An eps of 1e-38 does not change a variance above 1e-30. It keeps a constant row from dividing by zero.
        out, mean, rstd = torch.native_group_norm(
            weight.reshape(1, out_chs, fan_in).contiguous(),  # torch 2.6 refuses other views
            gain.reshape(-1) * fan_in**-0.5,
            None,
            1,
            out_chs,
            fan_in,
            out_chs,
            1e-38,
        )
        try:
            exact = not bool(((rstd > (fan_in / eps) ** 0.5) | (mean.abs() * rstd > _MAX_MEAN_TO_STD)).any())
        except RuntimeError:  # under FakeTensorMode and make_fx the statistics have no values
            exact = False
        if not exact:
            out, rstd = formula(weight, gain, eps), rstd[:, :0]  # an empty rstd tells backward to use the formula
        return out.view_as(weight), mean.view(-1), rstd.view(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor, Tensor]) -> None:
        weight, gain, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(weight, gain, *output[1:])
        ctx.save_for_forward(weight, gain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad, _, _ = grads
        weight, gain, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled() or rstd.numel() == 0:
            return *vjp(grad, weight, gain, ctx.eps), None
        out_chs, fan_in = weight.shape[0], weight[0].numel()
        rows = (1, out_chs, fan_in)
        grad_weight, grad_scale, _ = torch.ops.aten.native_group_norm_backward(
            grad.reshape(rows).contiguous(), weight.reshape(rows).contiguous(), mean.view(1, -1), rstd.view(1, -1),
            gain.reshape(-1) * fan_in**-0.5, 1, out_chs, fan_in, out_chs, [True, True, False],
        )  # fmt: skip
        return grad_weight.view_as(weight), (grad_scale * fan_in**-0.5).view_as(gain), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None, None]:
        weight, gain = ctx.saved_for_forward
        return jvp(weight, gain, tangents[0], tangents[1], ctx.eps), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        outputs = _StandardizeOnCPU.apply(*as_rows(info, in_dims, *args[:2]), args[2])
        return tuple(x.unflatten(0, (info.batch_size, x.shape[0] // info.batch_size)) for x in outputs), (0, 0, 0)


def standardize_weight(weight: Tensor, gain: Tensor, eps: float = STD_EPS, scale: float = 1.0) -> Tensor:
    """Weight with zero mean and norm `gain * scale` over the fan-in of every output channel.

    `w_hat = (w - mean(w)) * gain * scale / sqrt(max(N * var(w), eps))` with N = I * K * K and the population variance.
    Statistics are computed in at least float32, whatever the weight's dtype and whether autocast is on.

    Args:
        weight: (O, I, K, K), for example (256, 128, 3, 3), or any other shape with the output channels first. N is the
            number of weights of one output channel.
        gain: One element for each output channel, for example (256, 1, 1, 1).
        eps: Smallest value of N * var. Below it the divisor is constant.
        scale: Constant factor on the result.

    Returns:
        The standardised weight, with the shape, dtype and device of `weight`.

    Examples:
        >>> standardize_weight(torch.tensor([3.0, 1.0]).view(1, 2, 1, 1), torch.ones(1, 1, 1, 1)).flatten()
        tensor([ 0.7071, -0.7071])

    Raises:
        ValueError: if there is not exactly one gain for every output channel.

    Source: arXiv:2101.08692, section 4.2; nfnets/base.py, WSConv2D.standardize_weight.
    """
    if not torch.jit.is_scripting():
        call = recorded_call(standardize_weight, weight, gain, eps, scale)
        if call is not None:
            return call
        if takes_kernel(weight):
            return standardize(weight, gain, eps, scale=scale)
        if not torch.jit.is_tracing():  # when tracing, sizes are tensors
            check_gain(weight, gain)
    given = weight.dtype
    dtype = statistics_dtype(weight, gain)
    if dtype != given:
        weight = weight.to(dtype)
    gain = gain.to(dtype)
    if scale != 1.0:
        gain = gain * scale
    if not torch.jit.is_scripting() and _has_values(weight):
        out = _StandardizeOnCPU.apply(weight, gain, eps)[0]
    else:
        out = formula(weight, gain, eps)
    return out if dtype == given else out.to(given)


@torch.jit.unused
def _has_values(weight: Tensor) -> bool:
    """Whether the tensor is on a CPU and has values. Fake, distributed, traced and compiled tensors have none here."""
    return is_eager(weight) and type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu"


def destandardize_weight(weight: Tensor, eps: float = STD_EPS) -> tuple[Tensor, Tensor]:
    """Find a weight and a gain whose standardised weight is the given weight minus its mean over the fan-in.

    Args:
        weight: (O, I, K, K).
        eps: The `eps` of the `standardize_weight` that this inverts.

    Returns:
        The weight (O, I, K, K), and the gain (O, 1, 1, 1).

    Examples:
        >>> weight = torch.tensor([3.0, -3.0]).view(1, 2, 1, 1)
        >>> standardize_weight(*destandardize_weight(weight)).flatten()
        tensor([ 3.0000, -3.0000])
    """
    axes = list(range(1, weight.ndim))
    weight = weight - weight.mean(axes, keepdim=True)
    return weight, weight.square().sum(axes, keepdim=True).clamp(min=eps).sqrt()
