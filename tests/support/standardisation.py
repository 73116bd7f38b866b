"""Weight standardisation in plain differentiable operations, and what `standardize` is compared with it on."""

import torch
from torch import Tensor

from timm_nf.layers.standardize_triton import standardize

SCALE = 1.7015043497085571


def formula(weight: Tensor, gain: Tensor, eps: float = 1e-4, scale: float = 1.0) -> Tensor:
    """Plain differentiable operations, for weights of any rank."""
    axes = tuple(range(1, weight.ndim))
    centred = weight - weight.mean(axes, keepdim=True)
    centred = centred - centred.mean(axes, keepdim=True)
    norm = centred.square().sum(axes, keepdim=True).clamp(min=eps).sqrt()
    return centred * gain.view(norm.shape) * scale / norm


def gain_like(weight: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    gain = 1 + 0.3 * torch.randn(weight.shape[0], *[1] * (weight.ndim - 1), generator=generator, dtype=weight.dtype)
    return gain.to(weight.device)


def mixed_rows(dtype: torch.dtype = torch.float64) -> Tensor:
    """Ordinary, floored, constant, zero and mean-heavy rows, (5, 3, 2, 2)."""
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[1] *= 1e-3
    weight[2] = 0.5
    weight[3] = 0
    weight[4] += 100
    return weight.to(dtype)


def norm(x: Tensor) -> float:
    return float(x.detach().double().norm())


def assert_equals_the_formula(
    weight: Tensor, gain: Tensor, tolerance: float, eps: float = 1e-4, out_dtype: torch.dtype | None = None
) -> None:
    """Values and gradients, relative to their size, against float64 on the CPU."""
    weight, gain = weight.detach().requires_grad_(), gain.detach().requires_grad_()
    exact = weight.detach().cpu().double().requires_grad_(), gain.detach().cpu().double().requires_grad_()
    out, expected = standardize(weight, gain, eps, out_dtype, SCALE), formula(*exact, eps, SCALE)
    # A seed that no weight is drawn with: of a gradient along the weight rounding is all that would be left.
    generator = torch.Generator().manual_seed(2**32 - 1)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    gradients = torch.autograd.grad(out, (weight, gain), cotangent.to(out.device))
    expected_gradients = torch.autograd.grad(expected, exact, cotangent.double())
    assert [x.dtype for x in (out, *gradients)] == [out_dtype or weight.dtype, weight.dtype, gain.dtype]
    # That of the gain is a sum of N products, which may cancel.
    sizes = norm(expected), norm(expected_gradients[0]), norm(cotangent)
    for got, true, size in zip((out, *gradients), (expected, *expected_gradients), sizes, strict=True):
        assert got.shape == true.shape
        assert norm(got.cpu().double() - true) <= tolerance * size + 1e-30
