"""Trains networks of your own on two examples at a time. The other examples use it.

A network without normalisation trains with adaptive clipping, its batch-normalised twin with plain SGD. Both have the
same number of steps and the same learning rates.
"""

import math
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

import timm_nf

Loss = Callable[[Tensor, Tensor], Tensor]


def train(model: nn.Module, x: Tensor, y: Tensor, loss: Loss, steps: int, lr: float, exempt: str | None) -> None:
    """Train with batches of 2, Nesterov momentum, and a learning rate that falls to 0 along a cosine.

    Args:
        model: Any network.
        x: The inputs, (N, ...).
        y: The targets, (N, ...).
        loss: The loss of outputs and targets.
        steps: Number of steps.
        lr: The first learning rate.
        exempt: The name of the last layer, whose weight is not clipped. None stands for SGD without clipping.
    """
    settings = {"lr": lr, "momentum": 0.9, "weight_decay": 2e-5}
    if exempt is None:
        optimizer = timm.optim.create_optimizer_v2(model, "sgd", **settings)
    else:
        optimizer = timm.optim.create_optimizer_v2(model, "agcsgd", clip_factor=0.1, clip_exempt=exempt, **settings)
    generator = torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(x), (2,), generator=generator)
        optimizer.zero_grad()
        loss(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent."""
    return 100 * (model(x).argmax(1) == y).float().mean().item()


def report(title: str, results: dict[str, float], unit: str) -> None:
    """Print one line for each network."""
    print(f"{title}, batches of 2, timm_nf {timm_nf.__version__}, torch {torch.__version__}")
    for name, value in results.items():
        print(f"  {name}: {value:.3g} {unit}")
