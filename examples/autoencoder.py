"""A decoder with transposed layers and no normalisation: an autoencoder of the demo's digits.

    python -m examples.autoencoder

With a stride of 2, an output pixel of a transposed layer sees a quarter of the kernel, so the scale has a factor of 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.small_batches import report, train
from timm_nf.demo import load_digits
from timm_nf.layers import ScaledStdConv2d, ScaledStdConvTranspose2d, ScaledStdLinear, activation_gain

CODE = 16  # numbers in the code of a digit
GAMMA = activation_gain("relu")


def digits(count: int) -> Tensor:
    """The digits (N, 1, 28, 28) from 0 to 1, in random order."""
    pixels, labels = load_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
    return pixels[order].float() / 255


def network(normalized: bool) -> nn.Sequential:
    """(N, 1, 28, 28) -> the same."""
    torch.manual_seed(0)
    view, relu = nn.Unflatten(1, (64, 7, 7)), nn.ReLU()
    if normalized:
        return nn.Sequential(
            *(nn.Conv2d(1, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), relu),
            *(nn.Conv2d(32, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), relu),
            *(nn.Flatten(), nn.Linear(64 * 49, CODE)),
            *(nn.Linear(CODE, 64 * 49, bias=False), nn.BatchNorm1d(64 * 49), relu, view),
            *(nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), relu),
            nn.ConvTranspose2d(32, 1, 4, 2, 1),
        )
    return nn.Sequential(
        *(ScaledStdConv2d(1, 32, 4, 2, 1), relu),
        *(ScaledStdConv2d(32, 64, 4, 2, 1, scale=GAMMA), relu),
        *(nn.Flatten(), ScaledStdLinear(64 * 49, CODE, scale=GAMMA)),
        *(ScaledStdLinear(CODE, 64 * 49), relu, view),
        *(ScaledStdConvTranspose2d(64, 32, 4, 2, 1, scale=2 * GAMMA), relu),
        nn.ConvTranspose2d(32, 1, 4, 2, 1),  # the last layer is plain, as a classifier is
    )


def main(steps: int = 600, count: int = 1500) -> dict[str, float]:
    """Mean squared error of both networks on held-out digits, times 1000."""
    x = digits(count)
    learn, held_out = x[count // 5 :], x[: count // 5]
    results = {}
    for name, normalized in (("normalizer-free", False), ("batch-normalised", True)):
        model = network(normalized)
        train(model, learn, learn, F.mse_loss, steps, lr=0.1, exempt=None if normalized else f"{len(model) - 1}")
        with torch.no_grad():
            results[name] = 1000 * F.mse_loss(model(held_out), held_out).item()
    results["the mean digit"] = 1000 * (held_out - learn.mean(0)).square().mean().item()
    return results


if __name__ == "__main__":
    report("autoencoder of digits", main(), "thousandths, mean squared error on held-out digits")
