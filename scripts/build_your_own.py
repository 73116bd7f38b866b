"""Draw docs/build_your_own.png: the signal's variance through a wrong and a right network without normalisation.

python -m scripts.build_your_own
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from examples.signals_1d import Block

DEPTH, CHANNELS, ALPHA = 24, 128, 0.2
FILE = Path(__file__).parents[1] / "docs" / "build_your_own.png"


class Wrong(nn.Module):
    """A block that is wrong: torch's convolutions with He's initialisation, and a plain addition."""

    def __init__(self, chs: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv1d(chs, chs, 5, padding="same") for _ in range(2))
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x.relu()).relu())


@torch.no_grad()
def variances(right: bool) -> list[float]:
    """The mean variance of the channels after each block, with skip gains of 1."""
    torch.manual_seed(0)
    x = torch.randn(16, CHANNELS, 256)
    found: list[float] = []
    for k in range(DEPTH):
        block = Block(CHANNELS, beta=(1 + k * ALPHA**2) ** 0.5) if right else Wrong(CHANNELS)
        if isinstance(block, Block):
            nn.init.ones_(block.skip.gain)
        x = block(x)
        found.append(x.transpose(0, 1).flatten(1).var(1).mean().item())
    return found


def expected() -> list[float]:
    """The expected variance after each block: 1 + k alpha^2 after the k-th."""
    return [1 + k * ALPHA**2 for k in range(1, DEPTH + 1)]


def draw(file: Path) -> None:
    """Write the figure."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    blocks = range(1, DEPTH + 1)
    axes.plot(
        blocks, variances(False), color="#c0392b", marker="o", markersize=3, label="wrong: plain convolutions, sums"
    )
    axes.plot(blocks, variances(True), color="#1f6fb2", marker="o", markersize=3, label="right: the rules of this page")
    axes.plot(blocks, expected(), color="0.3", ls="--", lw=1, label="expected: 1 + k alpha^2")
    axes.set(xlabel="block", ylabel="variance of the signal", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    draw(FILE)
