"""Small problems to optimize, and the steps of doing it."""

import torch
from timm.optim import create_optimizer_v2
from torch import nn


def target_problem(dtype=torch.float32):
    """A weight, a bias and a loss with a known minimum, far enough from it that gradients get clipped."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 6, generator=generator).to(dtype))
    bias = nn.Parameter(torch.randn(8, generator=generator).to(dtype))

    def loss():
        return ((weight - 1.0) ** 2).sum() + ((bias + 1.0) ** 2).sum()

    return [weight, bias], loss


def create(name, params, **kwargs):
    if "kron" in name:
        kwargs.setdefault("deterministic", True)
    if "agc" in name:
        kwargs.setdefault("clip_exempt", ())  # plain parameters, all of which are clipped
    return create_optimizer_v2(params, name, **{"lr": 1e-2, **kwargs})


def train(optimizer, loss, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward(create_graph=getattr(optimizer, "is_second_order", False))
        optimizer.step()
    return loss().item()


def values(params):
    return [p.detach().clone() for p in params]


def assert_identical(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def loop_of_the_formula(p, clip_factor, eps, axis=0, norm_type=2.0):
    """The clipped gradient of a parameter, unit by unit in float64; how many units were clipped, of how many."""
    weight, grad = p.detach().double(), p.grad.double().clone()
    if sum(n > 1 for n in p.shape) <= 1:
        units = [...]
    elif isinstance(axis, tuple):
        rows = p.shape[0] // axis[1]
        units = [
            (slice(block * rows, (block + 1) * rows), channel)
            for block in range(axis[1])
            for channel in range(p.shape[1])
        ]
    else:
        units = [(*[slice(None)] * (axis % p.ndim), i) for i in range(p.shape[axis])]
    clipped = 0
    for unit in units:
        limit = clip_factor * max(weight[unit].flatten().norm(norm_type).item(), eps)
        norm = grad[unit].flatten().norm(norm_type).item()
        if norm > limit:
            grad[unit] *= limit / norm
            clipped += 1
    return grad, clipped, len(units)
