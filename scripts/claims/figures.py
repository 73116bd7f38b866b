"""One figure for each claim of scripts/claims, with a caption that can be read alone."""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.claims.grid import (
    BATCHES,
    DROPOUTS,
    FACTORS,
    LARGEST,
    PAPER,
    SMALL_BATCHES,
    WIDTHS,
    Rows,
    depths,
    dropouts,
)
from scripts.claims.report import cell, factor_of, spared, thresholds
from scripts.claims.training import Run

COLOURS = ("#1f6fb2", "#c0392b", "#7f8c8d", "#2e8b57", "#8e5ea2")
NETWORK = (
    "Networks: the row of NF-ResNet-50 with one block in each of four stages, 48 to 384 channels, average-pooled "
    "shortcuts (0.29 M parameters unless noted), 32 x 32 pixels. SGD with Nesterov momentum 0.9, peak learning rate "
    "0.1 x batch / 256 (linear warmup over a quarter of the steps, then a cosine to 0), weight decay 2e-5, label "
    "smoothing 0.1. A clipped network clips everything but the classifier's weight unless noted."
)


def caption(rows: Rows, runs: Iterable[Run], text: str) -> str:
    """What the figure shows, on what, and what its bars are."""
    found = [run for run in rows if any(replace(run, seed=0) == other for other in runs)]
    images, epochs, seeds = (sorted({getattr(run, name) for run in found}) for name in ("images", "epochs", "seed"))
    data = f"Fashion-MNIST, {' or '.join(map(str, images))} training images, {' or '.join(map(str, epochs))} epochs."
    bars = (
        f"Accuracy on the 10 000 test images, mean and standard deviation over the seeds "
        f"{', '.join(map(str, seeds))}; chance is 10 %, where most diverged runs end."
    )
    return " ".join((text, data, NETWORK, bars, "; ".join(sorted({rows[run].machine for run in found})) + "."))


def line(axes: Any, rows: Rows, runs: Sequence[Run], x: Sequence[float], **style: Any) -> None:
    """Means with their spreads at x; runs without rows are left out."""
    found = [(at, mean) for at, run in zip(x, runs, strict=True) if (mean := cell(rows, run))]
    if found:
        at, cells = zip(*found, strict=True)
        axes.errorbar(at, [c.mean for c in cells], [c.spread for c in cells], marker="o", ms=4, capsize=3, **style)


def bars(axes: Any, rows: Rows, runs: dict[str, Run]) -> None:
    """Horizontal bars, the first on top, with their means written behind them."""
    for y, run in enumerate(runs.values()):
        if found := cell(rows, run):
            axes.barh(y, found.mean, xerr=found.spread, color=COLOURS[0], alpha=0.8, capsize=3, height=0.6)
            end = (found.mean + found.spread, y)
            axes.annotate(f"{found.mean:.1f}", end, (6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(runs)), list(runs))
    axes.margins(x=0.08)  # room for the numbers
    axes.set(ylim=(len(runs) - 0.5, -0.5), xlabel="test accuracy, %")


def log_axis(axes: Any, ticks: Sequence[float], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.set(xlabel=label, ylabel="test accuracy, %")


def draw_batch_size(rows: Rows, figure: Any) -> list[Run]:
    sizes, axes = BATCHES, figure.subplots()
    kinds = {
        "NF, clipped by its best factor": [factor_of(rows, batch) for batch in sizes],
        "NF, not clipped": [Run(batch=batch) for batch in sizes],
        "batch-normalised twin": [Run("bn", batch=batch) for batch in sizes],
    }
    for colour, (label, runs) in zip(COLOURS, kinds.items(), strict=False):
        line(axes, rows, runs, sizes, label=label, color=colour)
    log_axis(axes, sizes, "batch size")
    axes.legend(frameon=False, loc="center", bbox_to_anchor=(0.42, 0.45))
    return [run for runs in kinds.values() for run in runs]


def draw_clip_factor(rows: Rows, figure: Any) -> list[Run]:
    axes, shown = figure.subplots(), []
    for colour, batch in zip(COLOURS, BATCHES, strict=True):
        runs = [Run(clip="unit", factor=factor, batch=batch) for factor in FACTORS]
        line(axes, rows, runs, FACTORS, label=f"batch {batch}", color=colour)
        shown += runs
    log_axis(axes, FACTORS, "clip factor")
    axes.legend(frameon=False)
    return shown


def draw_layers(rows: Rows, figure: Any) -> list[Run]:
    runs, axes = spared(), figure.subplots()
    bars(axes, rows, runs)
    axes.set_ylabel("not clipped")
    return list(runs.values())


def draw_norms(rows: Rows, figure: Any) -> list[Run]:
    names = {"unit": "one unit", "layer": "one parameter", "global": "all parameters"}
    runs = {f"{names[clip]}, {run.factor:g}": run for clip, run in thresholds(rows).items()}
    axes = figure.subplots()
    bars(axes, rows, runs)
    axes.set_ylabel("norm of, threshold")
    return list(runs.values())


def draw_small_batches(rows: Rows, figure: Any) -> list[Run]:
    axes, shown = figure.subplots(), []
    for colour, net, label in ((COLOURS[0], "nf", "NF, not clipped"), (COLOURS[2], "bn", "batch-normalised twin")):
        runs = [Run(net, batch=batch, images=6000) for batch in SMALL_BATCHES]
        line(axes, rows, runs, SMALL_BATCHES, label=label, color=colour)
        shown += runs
    log_axis(axes, SMALL_BATCHES, "batch size")
    axes.legend(frameon=False)
    return shown


def draw_capacity(rows: Rows, figure: Any) -> list[Run]:
    left, right = figure.subplots(1, 2)
    sizes = [f"\n{rows[run].params / 1e6:.2f} M parameters" if run in rows else "" for run in depths(0)]
    deeper = {f"stage {i}: {run.depths}{sizes[i - 1]}": run for i, run in enumerate(depths(0), 1)}
    bars(left, rows, deeper)
    found = [mean for run in deeper.values() if (mean := cell(rows, run))]
    if found:  # bars of one length show nothing
        left.set_xlim(min(c.mean - c.spread for c in found) - 1, max(c.mean + c.spread for c in found) + 2)
    left.set(title="two more blocks in", xlabel="test accuracy, % (axis does not begin at 0)")
    for colour, width in zip(COLOURS, WIDTHS, strict=False):
        runs = [run for run in dropouts(0) if run.width == width]
        line(right, rows, runs, DROPOUTS, label=f"width x {width}", color=colour)
    right.set(title="dropout", xlabel="rate before the classifier", ylabel="test accuracy, %", xticks=DROPOUTS)
    right.legend(frameon=False)
    return [*deeper.values(), *dropouts(0)]


def draw(rows: Rows, plot: Callable[[Rows, Any], list[Run]], title: str, text: str, file: Path) -> None:
    """Write one figure, its caption below it."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure = Figure(figsize=(8, 6.2), layout="constrained")
    above, below = figure.subfigures(2, height_ratios=(4.6, 1.6))
    shown = plot(rows, above)
    for axes in above.axes:
        axes.spines[["top", "right"]].set_visible(False)
    above.suptitle(title, fontsize=11)
    below.text(0.02, 0.97, textwrap.fill(caption(rows, shown, text), 122), va="top", fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, metadata={"Software": None})


TWIN = "The twin has batch normalisation behind every convolution instead, and is not clipped."
ABOUT = {
    "batch_size": (
        draw_batch_size,
        "Accuracy against batch size",
        "The paper (arXiv:2102.06171, figure 2a): clipping lets networks without normalisation train at large batch "
        f"sizes. Each clipped point has the best of the clip factors {FACTORS[0]} to {FACTORS[-1]} there. {TWIN}",
    ),
    "clip_factor": (
        draw_clip_factor,
        "Accuracy against clip factor and batch size",
        "The paper (arXiv:2102.06171, figure 2b, with factors from 0.01): the larger the batch, the smaller the factor "
        "that it needs.",
    ),
    "layers": (
        draw_layers,
        f"What has to be clipped at batch {LARGEST}",
        "The paper (arXiv:2102.06171, section 4.1): best without clipping the classifier's weight; the first "
        "convolution can often be spared too, no stage can. Clip factor "
        f"{PAPER}, of all parameters but those named; rows that begin with 'and' spare the classifier's weight too.",
    ),
    "norms": (
        draw_norms,
        f"Three ways to clip at batch {LARGEST}",
        "The paper (arXiv:2102.06171, section 4): norms of units do better than those of layers. Gradients are scaled "
        "by the norm of a unit or of a whole parameter, relative to the weight, or by the norm of all of them; each at "
        "the best threshold tried. The classifier's weight is spared in all three.",
    ),
    "small_batches": (
        draw_small_batches,
        "Small batches",
        "The paper (arXiv:2102.06171, sections 1 and 3): networks without normalisation do better than normalised "
        f"ones at very small batches. {TWIN}",
    ),
    "capacity": (
        draw_capacity,
        "Where depth helps, and how much dropout",
        "The paper (arXiv:2102.06171, section 5): depth helps most in the third stage; larger networks need more "
        "dropout. Left: two blocks added to one stage, width x 5/6, all at 1.0 M multiply-adds, batch "
        f"{BATCHES[0]}, 60000 images, 2 epochs, clip factor {max(FACTORS)}. Right: 0.2 M (width x 0.85) and 0.5 M "
        "parameters (x 1.3), batch 64, 6000 images, 10 epochs, no clipping.",
    ),
}
