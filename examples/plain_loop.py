"""Adaptive gradient clipping in a plain PyTorch loop, with accumulation, on the demo's digits.

python -m examples.plain_loop [--steps 20]
"""

import argparse

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn

import timm_nf  # noqa: F401  registers networks and optimizers
from timm_nf import demo

SETTINGS = {"lr": 0.5, "momentum": 0.9, "weight_decay": 2e-5, "clip_factor": 0.01}
PARTS = 2  # of a batch, one after the other


def network() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(demo.NETWORK, in_chans=1, num_classes=10, **demo.CONFIG)


def batches(steps: int, size: int = 64):
    pixels, labels = demo.load_digits()
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(pixels), (size,), generator=order)
        yield (pixels[chosen] / 255 - demo.MEAN) / demo.STD, labels[chosen]


def main(steps: int = 20) -> tuple[nn.Module, list[float]]:
    model = network()
    optimizer = create_optimizer_v2(model, "agcsgd", **SETTINGS)  # exempts the classifier's weight by itself
    losses = []
    for images, labels in batches(steps):
        optimizer.zero_grad()
        total = 0.0
        for part, wanted in zip(images.chunk(PARTS), labels.chunk(PARTS), strict=True):
            loss = F.cross_entropy(model(part), wanted) / PARTS
            loss.backward()  # gradients add up, and are clipped once, in step()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(
        *(f"{row['clipped_fraction']:.0%} of {row['units']} units clipped" for row in optimizer.clip_stats()), sep="\n"
    )
    return model, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    main(parser.parse_args().steps)
