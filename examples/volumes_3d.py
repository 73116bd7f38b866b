"""A 3-d network without normalisation, made by `timm_nf.normalizer_free` out of a batch-normalised one.

    python -m examples.volumes_3d

A volume is one of the demo's digits in 8 slices. Every slice shows it one pixel further.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_nf
from examples.small_batches import accuracy, report, train
from timm_nf.demo import load_digits


def volumes(count: int) -> tuple[Tensor, Tensor]:
    """The volumes (N, 1, 8, 14, 14) and their labels (N,), in random order."""
    pixels, labels = load_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
    slices = F.avg_pool2d(pixels[order].float() / 255, 2)
    tilted = torch.stack([slices.roll(depth - 4, dims=-1) for depth in range(8)], dim=2)
    return (tilted - tilted.mean()) / tilted.std(), labels[order]


class Block(nn.Module):
    """A residual block as in a ResNet, along three axes."""

    def __init__(self, chs_in: int, chs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(chs_in, chs, 3, stride, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm3d(chs), nn.BatchNorm3d(chs)
        self.conv2 = nn.Conv3d(chs, chs, 3, padding=1, bias=False)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv3d(chs_in, chs, 1, stride, bias=False), nn.BatchNorm3d(chs))
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.norm1(self.conv1(x)))
        return self.act2(self.shortcut(x) + self.norm2(self.conv2(out)))


def network() -> nn.Sequential:
    """(N, 1, 8, 14, 14) -> (N, 10)."""
    torch.manual_seed(0)
    stem = nn.Conv3d(1, 16, 3, padding=1, bias=False), nn.BatchNorm3d(16), nn.ReLU()
    blocks = Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, 10))


def main(steps: int = 2400, count: int = 1500) -> dict[str, float]:
    """Held-out accuracy of both networks, in percent."""
    x, y = volumes(count)
    held_out = count // 5
    results = {}
    for name, model in (("normalizer-free", timm_nf.normalizer_free(network())), ("batch-normalised", network())):
        exempt = f"{len(model) - 1}" if name == "normalizer-free" else None
        train(model, x[held_out:], y[held_out:], F.cross_entropy, steps, lr=0.05, exempt=exempt)
        results[name] = accuracy(model, x[:held_out], y[:held_out])
    return results


if __name__ == "__main__":
    report("digits as volumes", main(), "% of held-out volumes")
