"""Draw docs/concepts/block.png: one residual block with its scalars, and the variance that they keep.

python -m scripts.site.block_figure

The lower half shows the expected variance that a network of the zoo has for its blocks. It is not drawn by hand.
"""

from itertools import pairwise
from pathlib import Path

import timm
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import timm_nf
from timm_nf.diagnostics import signal_stats

FILE = Path(__file__).parents[2] / "docs" / "concepts" / "block.png"
NETWORK = "dm_nf_resnet50"
BLUE, RED, GREY = "#1f6fb2", "#c0392b", "0.35"


def box(axes: Axes, x: float, y: float, width: float, text: str, color: str = BLUE) -> None:
    patch = FancyBboxPatch(
        (x - width / 2, y - 0.32), width, 0.64, boxstyle="round,pad=0.02", facecolor="white", edgecolor=color, lw=1.6
    )
    axes.add_patch(patch)
    axes.text(x, y, text, ha="center", va="center", fontsize=9.5)


def arrow(axes: Axes, *points: tuple[float, float]) -> None:
    for start, end in pairwise(points[:-1]):
        axes.plot(*zip(start, end, strict=True), color=GREY, lw=1.3)
    axes.add_patch(FancyArrowPatch(points[-2], points[-1], arrowstyle="-|>", mutation_scale=11, color=GREY, lw=1.3))


def draw_block(axes: Axes) -> None:
    axes.set(xlim=(-0.2, 11.2), ylim=(-1.9, 2.2))
    axes.set_axis_off()
    steps = [
        (1.5, 1.5, "activation\n× γ, ÷ β", BLUE), (3.7, 2.3, "convolutions,\nweights standardised", BLUE),
        (6.0, 1.5, "squeeze-\nexcite × 2", BLUE), (7.9, 1.4, "× skip gain", RED), (9.3, 0.7, "× α", RED),
    ]  # fmt: skip
    for x, width, text, color in steps:
        box(axes, x, 0.9, width, text, color)
    axes.text(0.0, -0.9, "h", fontsize=13, style="italic", ha="center", va="center")
    axes.text(10.4, -0.9, "+", fontsize=17, ha="center", va="center")
    arrow(axes, (0.15, -0.9), (0.3, -0.9), (0.3, 0.9), (0.73, 0.9))
    for (x, width, *_), (after, other, *_) in pairwise(steps):
        arrow(axes, (x + width / 2 + 0.02, 0.9), (after - other / 2 - 0.02, 0.9))
    arrow(axes, (9.67, 0.9), (10.4, 0.9), (10.4, -0.6))
    arrow(axes, (0.3, -0.9), (10.2, -0.9))
    arrow(axes, (10.6, -0.9), (11.1, -0.9))
    axes.text(5.2, -1.3, "shortcut: variance 1 + k α² after k blocks", ha="center", fontsize=9, color=GREY)
    axes.text(3.7, 1.75, "variance 1 in, variance 1 out", ha="center", fontsize=9, color=GREY)
    axes.text(
        8.5, 1.55, "the skip gain starts at 0: at\nfirst the block is its shortcut", ha="center", fontsize=9, color=RED
    )


def draw_variance(axes: Axes) -> None:
    torch.manual_seed(0)
    model = timm.create_model(NETWORK).eval()
    expected = [row["expected_var"] for row in signal_stats(model, torch.randn(1, 3, 64, 64))]
    axes.plot(range(len(expected)), expected, color=BLUE, marker="o", ms=4, lw=1)
    axes.set(xlabel="block, 0 is the stem", ylabel="expected variance,\nβ² of the next block")
    axes.set_title("the first block of a stage sets it back", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    figure = Figure(figsize=(8, 5.4), layout="constrained")  # a page shows about 80 pixels per inch
    above, below = figure.subplots(2, 1, height_ratios=(1.2, 1))
    draw_block(above)
    draw_variance(below)
    figure.suptitle(f"A block of a normalizer-free network, and the variance through {NETWORK}", fontsize=11)
    figure.savefig(FILE, dpi=130)
    print(f"wrote {FILE.name} with timm_nf {timm_nf.__version__}")


if __name__ == "__main__":
    main()
