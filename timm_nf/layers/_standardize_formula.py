"""The formula of scaled weight standardisation in plain tensor operations, with its derivatives and its vmap rule.

All three ways to compute it share this: group_norm on CPUs, Triton's kernels, and plain operations on other devices.

Shapes: O output channels, N fan-in, I * K * K. Sources: arXiv:2101.08692, section 4.2; deepmind-research
nfnets/base.py at f5de0ede.
"""

# torch.jit exports names without listing them.
# pyright: reportPrivateImportUsage=false

from typing import Any

import torch
from torch import Tensor

STD_EPS = 1e-4  # smallest value of N * variance, from nfnets/base.py


def check_gain(weight: Tensor, gain: Tensor) -> None:
    """Refuse a weight and a gain that do not fit together.

    Raises:
        ValueError: if there is not one gain for each output channel.
        TypeError: if the weight is not of floating point numbers, or the gain is None.
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
    """The dtype in which to compute: float64 if one of the two is float64, otherwise float32."""
    return torch.float64 if torch.float64 in (weight.dtype, gain.dtype) else torch.float32


def formula(weight: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The formula in plain tensor operations: four kernels over the weight, one temporary tensor of its size.

    Args:
        weight: (O, I, K, K).
        gain: (O, 1, 1, 1).
        eps: Smallest value of N * variance.

    Returns:
        (O, I, K, K).
    """
    if torch.jit.is_scripting() or torch.jit.is_tracing():
        return _plainest(weight, gain, eps)
    rows = weight.flatten(1)
    # The mean is subtracted twice. The rounding error of the first is relative to the mean, that of the second to the
    # spread of the row, which may be much smaller.
    rows = rows - rows.mean(1, keepdim=True)
    var, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
    scale = gain.view(-1, 1) * (rows.shape[1] * var).clamp(min=eps).rsqrt()
    if torch.compiler.is_compiling():  # some converters do not have addcmul
        return (rows * scale - mean * scale).view_as(weight)
    return torch.addcmul(-mean * scale, rows, scale).view_as(weight)


def _plainest(weight: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The formula for converters of TorchScript.

    coremltools 9.0 has no var_mean, no addcmul and no view_as. torch's older ONNX exporter loses nodes of a product
    with rsqrt.
    """
    rows = weight.flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows - rows.mean(1, keepdim=True)
    norm2 = rows.square().sum(1, keepdim=True).clamp(min=eps)
    return (rows * (gain.view(-1, 1) / norm2.sqrt())).view(weight.shape)


def _unit_rows(weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Centred rows divided by their norms (O, N), one over the norms (O, 1), and whether norms reach the floor (O, 1).

    A norm below the floor counts as the floor.
    """
    rows = weight.flatten(1).to(dtype)
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows - rows.mean(1, keepdim=True)
    norm2 = rows.square().sum(1, keepdim=True)
    inverse = norm2.clamp(min=eps).rsqrt()
    return rows * inverse, inverse, norm2 >= eps


def vjp(grad: Tensor, weight: Tensor, gain: Tensor, eps: float, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Gradients of the weight and of the gain, by plain operations that can be differentiated again."""
    dtype = statistics_dtype(weight, gain)
    unit, inverse, free = _unit_rows(weight, eps, dtype)
    grad = grad.reshape(unit.shape).to(dtype)  # not flatten: it has no vmap rule for batches of gradients
    along = (grad * unit).sum(1, keepdim=True)
    # A norm below the floor is a constant, so nothing is projected out of its row's gradient.
    inner = grad - grad.mean(1, keepdim=True) - torch.where(free, along, torch.zeros_like(along)) * unit
    grad_weight = inner * (gain.view(-1, 1).to(dtype) * scale * inverse)
    return grad_weight.view_as(weight).to(weight.dtype), (along * scale).view_as(gain).to(gain.dtype)


def jvp(
    weight: Tensor, gain: Tensor, grad_weight: Tensor | None, grad_gain: Tensor | None, eps: float, scale: float = 1.0
) -> Tensor:
    """Derivative in forward mode.

    The Jacobian of a row with respect to the weight is symmetric, so `vjp` computes that part. The output is linear in
    the gain.
    """
    dtype = statistics_dtype(weight, gain)
    out = torch.zeros_like(weight, dtype=dtype)
    if grad_weight is not None:
        out = out + vjp(grad_weight.to(dtype), weight.to(dtype), gain, eps, scale)[0]
    if grad_gain is not None:
        unit = _unit_rows(weight, eps, dtype)[0]
        out = out + (unit * (grad_gain.view(-1, 1).to(dtype) * scale)).view_as(weight)
    return out


def as_rows(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> list[Tensor]:
    """The vmap rule: rows are independent, so a batch of weights is one weight with more rows."""
    batch = [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(args, in_dims, strict=False)
    ]
    return [x.flatten(0, 1) for x in batch]
