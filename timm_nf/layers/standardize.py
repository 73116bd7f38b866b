"""Scaled weight standardisation, equal to the authors' to rounding, and its inverse.

timm's layers add an epsilon to the variance where the authors take a maximum, and go through batch_norm, which takes
longer: `python -m benchmarks.weights` compares.

Shapes: O output channels, I input channels per group, K kernel size. Sources: arXiv:2101.08692, section 4.2;
deepmind-research nfnets/base.py at f5de0ede.
"""

from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

__all__ = ["destandardize_weight", "standardize_weight"]

_STD_EPS = 1e-4  # floor on N * variance, nfnets/base.py
_MAX_MEAN_TO_STD = 4.0  # group_norm computes w * a + b: a row whose mean is larger than this loses more than 2 bits


def _standardize(weight: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The formula in plain tensor operations: four kernels over the weight, one temporary of its size.

    Args:
        weight: (O, I, K, K).
        gain: (O, 1, 1, 1).
        eps: Floor on N * variance.

    Returns:
        (O, I, K, K).
    """
    if torch.jit.is_tracing():
        return _traced(weight, gain, eps)
    rows = weight.flatten(1)
    # Two centrings: the first mean is rounded at the scale of the mean, the second at the scale of the spread.
    rows = rows - rows.mean(1, keepdim=True)
    var, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
    scale = gain.view(-1, 1) * (rows.shape[1] * var).clamp(min=eps).rsqrt()
    if torch.compiler.is_compiling():  # not every converter knows addcmul
        return (rows * scale - mean * scale).view_as(weight)
    return torch.addcmul(-mean * scale, rows, scale).view_as(weight)


def _traced(weight: Tensor, gain: Tensor, eps: float) -> Tensor:
    """`_standardize` for converters of traces.

    coremltools 9.0 knows neither var_mean, addcmul nor view_as; torch's older ONNX exporter loses nodes of a product
    with rsqrt.
    """
    axes = tuple(range(1, weight.ndim))
    centred = weight - weight.mean(axes, keepdim=True)
    centred = centred - centred.mean(axes, keepdim=True)
    norm2 = centred.square().sum(axes, keepdim=True).clamp(min=eps)
    return centred * (gain.view(-1, *[1] * len(axes)) / norm2.sqrt())


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
        try:
            exact = not bool(((rstd > (fan_in / eps) ** 0.5) | (mean.abs() * rstd > _MAX_MEAN_TO_STD)).any())
        except RuntimeError:  # under FakeTensorMode and make_fx the statistics have no values to look at
            exact = False
        if not exact:
            out, rstd = _standardize(weight, gain, eps), rstd[:, :0]  # of no elements, which tells backward
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
            return *_standardize_vjp(grad, weight, gain, ctx.eps), None
        out_chs, fan_in = weight.shape[0], weight[0].numel()
        rows = (1, out_chs, fan_in)
        grad_weight, grad_scale, _ = torch.ops.aten.native_group_norm_backward(
            grad.reshape(rows), weight.reshape(rows), mean.view(1, -1), rstd.view(1, -1),
            gain.reshape(-1) * fan_in**-0.5, 1, out_chs, fan_in, out_chs, [True, True, False],
        )  # fmt: skip
        return grad_weight.view_as(weight), (grad_scale * fan_in**-0.5).view_as(gain), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None, None]:
        """Forward mode: the Jacobian of a row is symmetric in the weight, and the output is linear in the gain."""
        (weight, gain), (grad_weight, grad_gain, _) = ctx.saved_for_forward, tangents
        out = torch.zeros_like(weight)
        if grad_weight is not None:
            out = out + _standardize_vjp(grad_weight, weight, gain, ctx.eps)[0]
        if grad_gain is not None:
            out = out + _standardize(weight, grad_gain, ctx.eps)
        return out, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Rows are independent, so a batch of weights is one weight with more rows."""
        weight, gain, eps = args
        batch = [
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip((weight, gain), in_dims, strict=False)
        ]
        outputs = _StandardizeOnCPU.apply(*(x.flatten(0, 1) for x in batch), eps)
        return tuple(x.unflatten(0, (info.batch_size, x.shape[0] // info.batch_size)) for x in outputs), (0, 0, 0)


def standardize_weight(weight: Tensor, gain: Tensor, eps: float = _STD_EPS, scale: float = 1.0) -> Tensor:
    """Weight with zero mean and norm `gain * scale` over the fan-in of every output channel.

    `w_hat = (w - mean(w)) * gain * scale / sqrt(max(N * var(w), eps))` with N = I * K * K and the population variance.
    Statistics are computed in at least float32, whatever the weight's dtype and whether autocast is on.

    Args:
        weight: (O, I, K, K), say (256, 128, 3, 3).
        gain: (O, 1, 1, 1), say (256, 1, 1, 1).
        eps: Floor on N * var, below which the divisor is constant.
        scale: Constant factor on the result.

    Returns:
        (O, I, K, K), in the weight's dtype and on its device.

    >>> standardize_weight(torch.tensor([3.0, 1.0]).view(1, 2, 1, 1), torch.ones(1, 1, 1, 1)).flatten()
    tensor([ 0.7071, -0.7071])

    Raises:
        ValueError: if there is not exactly one gain for every output channel.

    Source: arXiv:2101.08692, section 4.2; nfnets/base.py, WSConv2D.standardize_weight.
    """
    if not torch.jit.is_tracing() and gain.numel() != weight.shape[0]:  # sizes are tensors while torch.jit traces
        raise ValueError(
            f"expected one gain for each of the {weight.shape[0]} output channels of a weight of shape "
            f"{tuple(weight.shape)}, got a gain of shape {tuple(gain.shape)}; pass (O, 1, 1, 1)"
        )
    dtype = torch.promote_types(torch.promote_types(weight.dtype, gain.dtype), torch.float32)
    if dtype != weight.dtype:
        return standardize_weight(weight.to(dtype), gain, eps, scale).to(weight.dtype)
    gain = gain.to(dtype)
    if scale != 1.0:
        gain = gain * scale
    # Fake, distributed, traced and compiled tensors have no values to look at.
    eager = type(weight) in (Tensor, nn.Parameter) and not torch.jit.is_tracing() and not torch.compiler.is_compiling()
    if eager and weight.device.type == "cpu":
        return _StandardizeOnCPU.apply(weight, gain, eps)[0]
    return _standardize(weight, gain, eps)


def destandardize_weight(weight: Tensor, eps: float = _STD_EPS) -> tuple[Tensor, Tensor]:
    """A weight and a gain whose standardised weight is the given one, less its mean over the fan-in.

    Args:
        weight: (O, I, K, K).
        eps: As for `standardize_weight`.

    Returns:
        (O, I, K, K) and (O, 1, 1, 1).
    """
    axes = tuple(range(1, weight.ndim))
    weight = weight - weight.mean(axes, keepdim=True)
    return weight, weight.square().sum(axes, keepdim=True).clamp(min=eps).sqrt()


register_notrace_function(standardize_weight)  # timm's feature extractor records one call of it
