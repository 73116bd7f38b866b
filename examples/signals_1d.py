"""A 1-d network on a real signal, without normalisation: from which electrode is a piece of an EEG?

    python -m examples.signals_1d

The EEG comes with matplotlib: 4 electrodes, 800 samples. The network learns from the first 560 samples and is tested on
the others. It is built by hand, so that every rule of docs/build_your_own.md is one line.
"""

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.cbook import get_sample_data
from torch import Tensor, nn

from examples.small_batches import accuracy, report, train
from timm_nf.layers import Activation, ScaledStdConv1d, SkipInit, activation_gain

WINDOW, SPLIT = 64, 560
GAMMA = activation_gain("relu")


def pieces() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Pieces (N, 1, 64) and their electrodes (N,), for training and for the test. No sample is in both."""
    eeg = torch.from_numpy(np.fromfile(get_sample_data("eeg.dat", asfileobj=False)).reshape(800, 4).T.copy()).float()

    def cut(signal: Tensor) -> tuple[Tensor, Tensor]:
        windows = signal.unfold(1, WINDOW, 4)  # (4, n, 64)
        labels = torch.arange(4)[:, None].expand(windows.shape[:2])
        return windows.flatten(0, 1)[:, None].clone(), labels.flatten()

    return cut(eeg[:, :SPLIT]), cut(eeg[:, SPLIT:])


class Block(nn.Module):
    """Two convolutions beside a shortcut; `beta` is the standard deviation that the input is expected to have."""

    def __init__(self, chs: int, beta: float) -> None:
        super().__init__()
        self.conv1 = ScaledStdConv1d(chs, chs, 5, padding="same", scale=GAMMA / beta)
        self.conv2 = ScaledStdConv1d(chs, chs, 5, padding="same", scale=GAMMA)
        self.skip = SkipInit(alpha=0.2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x.relu())
        return self.skip(x, self.conv2(out.relu()))


class NormalizedBlock(nn.Module):
    """The same with batch normalisation."""

    def __init__(self, chs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm1d(chs), nn.Conv1d(chs, chs, 5, padding="same", bias=False)
        self.norm2, self.conv2 = nn.BatchNorm1d(chs), nn.Conv1d(chs, chs, 5, padding="same", bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.norm1(x).relu())
        return x + self.conv2(self.norm2(out).relu())


def network(normalized: bool, chs: int = 32, depth: int = 3) -> nn.Sequential:
    """(N, 1, 64) -> (N, 4)."""
    torch.manual_seed(0)
    stem = nn.Conv1d(1, chs, 7, 2, padding=3) if normalized else ScaledStdConv1d(1, chs, 7, 2, padding=3)
    # The variance is 1 behind the stem, and every block adds alpha^2.
    blocks = [NormalizedBlock(chs) if normalized else Block(chs, beta=(1 + k * 0.2**2) ** 0.5) for k in range(depth)]
    return nn.Sequential(stem, *blocks, Activation("relu"), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(chs, 4))


def main(steps: int = 600) -> dict[str, float]:
    """Held-out accuracy of both networks, in percent."""
    learn, held_out = pieces()
    results = {}
    for name, normalized in (("normalizer-free", False), ("batch-normalised", True)):
        model = network(normalized)
        train(model, *learn, F.cross_entropy, steps, lr=0.02, exempt=None if normalized else f"{len(model) - 1}")
        results[name] = accuracy(model, *held_out)
    return results


if __name__ == "__main__":
    report("EEG, 4 electrodes", main(), "% of held-out pieces")
