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
