"""The formula of scaled weight standardisation in plain tensor operations, its derivatives, and batches of weights.

What every way to compute it has in common: the CPU's, the kernels', and that of a device without Triton.

Shapes: O output channels, N fan-in, I * K * K. Sources: arXiv:2101.08692, section 4.2; deepmind-research
nfnets/base.py at f5de0ede.
"""

# torch.jit does not list what it exports.
# pyright: reportPrivateImportUsage=false

from typing import Any

import torch
from torch import Tensor

STD_EPS = 1e-4  # floor on N * variance, nfnets/base.py


def check_gain(weight: Tensor, gain: Tensor) -> None:
    """Raise an error if there is not one gain for every output channel, or the weight is not of real numbers.

    Raises:
        ValueError: the former.
        TypeError: the latter, or there is no gain.
    """
    if not weight.is_floating_point():
        raise TypeError(f"expected a weight of floating point numbers, got {weight.dtype}")
    if gain is None:  # pyright: ignore[reportUnnecessaryComparison]
        raise TypeError("expected a gain, got None; pass torch.ones(O, 1, 1, 1), with O output channels")
    if weight.ndim == 0 or gain.numel() != weight.shape[0]:
        raise ValueError(
            f"expected one gain for each of the {weight.shape[0] if weight.ndim else 0} output channels of a weight of "
            f"shape {tuple(weight.shape)}, got a gain of shape {tuple(gain.shape)}; pass (O, 1, 1, 1)"
        )


def statistics_dtype(weight: Tensor, gain: Tensor) -> torch.dtype:
    """Of the computation, whatever the dtype of the result."""
    return torch.float64 if torch.float64 in (weight.dtype, gain.dtype) else torch.float32


def formula(weight: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The formula in plain tensor operations: four kernels over the weight, one temporary of its size.

    Args:
        weight: (O, I, K, K).
        gain: (O, 1, 1, 1).
        eps: Floor on N * variance.

    Returns:
        (O, I, K, K).
    """
    if torch.jit.is_scripting() or torch.jit.is_tracing():
        return _plainest(weight, gain, eps)
    rows = weight.flatten(1)
    # Two centrings: the first mean is rounded at the scale of the mean, the second at the scale of the spread.
    rows = rows - rows.mean(1, keepdim=True)
    var, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
    scale = gain.view(-1, 1) * (rows.shape[1] * var).clamp(min=eps).rsqrt()
    if torch.compiler.is_compiling():  # not every converter knows addcmul
        return (rows * scale - mean * scale).view_as(weight)
    return torch.addcmul(-mean * scale, rows, scale).view_as(weight)


def _plainest(weight: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The formula for converters of TorchScript.

    coremltools 9.0 knows neither var_mean, addcmul nor view_as. torch's older ONNX exporter loses nodes of a product
    with rsqrt.
    """
    rows = weight.flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows - rows.mean(1, keepdim=True)
    norm2 = rows.square().sum(1, keepdim=True).clamp(min=eps)
    return (rows * (gain.view(-1, 1) / norm2.sqrt())).view(weight.shape)


def _unit_rows(weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(O, N) centred rows over their floored norm, (O, 1) one over that norm, (O, 1) whether it is not the floor."""
    rows = weight.flatten(1).to(dtype)
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows - rows.mean(1, keepdim=True)
    norm2 = rows.square().sum(1, keepdim=True)
    inverse = norm2.clamp(min=eps).rsqrt()
    return rows * inverse, inverse, norm2 >= eps


def vjp(grad: Tensor, weight: Tensor, gain: Tensor, eps: float, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Gradients of weight and gain, in plain operations that can be differentiated again."""
    dtype = statistics_dtype(weight, gain)
    unit, inverse, free = _unit_rows(weight, eps, dtype)
    grad = grad.reshape(unit.shape).to(dtype)  # torch has no batches of gradients for flatten
    along = (grad * unit).sum(1, keepdim=True)  # under the floor the norm is a constant, nothing is projected out
    inner = grad - grad.mean(1, keepdim=True) - torch.where(free, along, torch.zeros_like(along)) * unit
    grad_weight = inner * (gain.view(-1, 1).to(dtype) * scale * inverse)
    return grad_weight.view_as(weight).to(weight.dtype), (along * scale).view_as(gain).to(gain.dtype)


def jvp(
    weight: Tensor, gain: Tensor, grad_weight: Tensor | None, grad_gain: Tensor | None, eps: float, scale: float = 1.0
) -> Tensor:
    """Forward mode: the Jacobian of a row is symmetric in the weight, and the output is linear in the gain."""
    dtype = statistics_dtype(weight, gain)
    out = torch.zeros_like(weight, dtype=dtype)
    if grad_weight is not None:
        out = out + vjp(grad_weight.to(dtype), weight.to(dtype), gain, eps, scale)[0]
    if grad_gain is not None:
        unit = _unit_rows(weight, eps, dtype)[0]
        out = out + (unit * (grad_gain.view(-1, 1).to(dtype) * scale)).view_as(weight)
    return out


def as_rows(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> list[Tensor]:
    """Rows are independent, so a batch of weights is one weight with more rows."""
    batch = [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(args, in_dims, strict=False)
    ]
    return [x.flatten(0, 1) for x in batch]
