"""Adaptive gradient clipping in a plain PyTorch loop, with accumulation, on the demo's digits.

python -m examples.plain_loop
"""

from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

import timm_nf  # noqa: F401  registers networks and optimizers
from timm_nf import demo

SETTINGS = {"lr": 0.5, "momentum": 0.9, "weight_decay": 2e-5, "clip_factor": 0.01}
PARTS = 2  # number of parts of a batch, which follow one another


def network():
    torch.manual_seed(0)
    return timm.create_model(demo.NETWORK, in_chans=1, num_classes=10, **demo.CONFIG)


def parts(steps: int, size: int = 64):
    """Parts of batches: images and labels. Every step takes `PARTS` of them."""
    pixels, labels = demo.load_digits()
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(pixels), (size,), generator=order)
        images = (pixels[chosen] / 255 - demo.MEAN) / demo.STD
        yield from zip(images.chunk(PARTS), labels[chosen].chunk(PARTS), strict=True)


def train(model, optimizer, data, dtype=torch.float32, after_step: Callable[[], object] = lambda: None):
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    for i, (images, labels) in enumerate(data, 1):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images), labels) / PARTS
        scaler.scale(loss).backward()  # gradients add up, and are clipped once a step
        if i % PARTS == 0:
            scaler.step(optimizer)  # unscales, clips and steps
            scaler.update()
            optimizer.zero_grad()
            after_step()


def main(steps: int = 20, optimizer: str = "agcsgd", precision: str = "float32"):
    model = network()
    agc = create_optimizer_v2(model, optimizer, **SETTINGS)  # exempts the classifier's weight by itself
    train(model, agc, parts(steps), getattr(torch, precision))
    for row in agc.clip_stats():
        print(f"{row['clipped_fraction']:.0%} of {row['units']} units clipped")
    return model


if __name__ == "__main__":
    main()
