"""Draws a figure for each claim: a dot for every seed, mean and standard deviation, and a line at chance level."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts.claims import grid
from scripts.claims.grid import BATCHES, KINDS, LARGEST, SEEDS, SETTINGS, SMALL_BATCHES, SMALLEST, Rows
from scripts.claims.training import Run

COLOURS = ("#1f6fb2", "#c0392b", "#2e8b57", "#8e5ea2", "#7f8c8d")
CHANCE = 10.0
ASIDE = (0.95, 1.0, 1.05)  # factors on batch sizes


def accuracies(rows: Rows, setting: Run, seeds: Sequence[int] = SEEDS) -> list[float]:
    return [rows[run].accuracy for run in grid.over(seeds, [setting]) if run in rows]


def line(
    axes: Any, rows: Rows, at: dict[float, Run], label: str, colour: str, seeds: Sequence[int] = SEEDS, aside: float = 1
) -> None:
    """Draw means with their standard deviations. Settings without rows are left out.

    `aside` is a factor on the positions, so that lines of a logarithmic axis do not cover each other.
    """
    found = {x * aside: values for x, run in at.items() if (values := accuracies(rows, run, seeds))}
    for x, values in found.items():
        axes.plot([x] * len(values), values, "o", ms=5, alpha=0.4, color=colour, mew=0)
    means = [statistics.fmean(values) for values in found.values()]
    spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in found.values()]
    if found:
        axes.errorbar(list(found), means, spreads, marker="s", ms=4, capsize=3, label=label, color=colour, lw=1.3)


def dots(axes: Any, rows: Rows, settings: dict[str, Run]) -> None:
    """Draw a row of dots for each setting, the first on top. Settings without rows are left out."""
    found = {name: values for name, run in settings.items() if (values := accuracies(rows, run))}
    for y, values in enumerate(found.values()):
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        axes.plot(values, [y] * len(values), "o", ms=5, alpha=0.4, color=COLOURS[0], mew=0)
        axes.errorbar(statistics.fmean(values), y, xerr=spread, marker="s", ms=4, capsize=3, color=COLOURS[0])
    axes.set_yticks(range(len(found)), list(found))
    axes.set(ylim=(len(found) - 0.5, -0.5), xlabel="test accuracy, %")
    axes.grid(axis="y", alpha=0.3)


def log_axis(axes: Any, ticks: Iterable[float], label: str) -> None:
    ticks = list(ticks)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.set(xlabel=label, ylabel="test accuracy, %")


def mark_chance(axes: Any, vertical: bool = False) -> None:
    draw = axes.axvline if vertical else axes.axhline
    draw(CHANCE, color="black", lw=0.8, ls=":", label="chance", zorder=0)
    if vertical:  # there is no legend
        axes.text(CHANCE, 1.0, "chance", transform=axes.get_xaxis_transform(), ha="center", va="bottom")


def draw_batch_sizes(rows: Rows, figure: Any) -> None:
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, (name, choose) in zip(panels, SETTINGS.items(), strict=True):
        for colour, kind, aside in zip(COLOURS, KINDS, ASIDE, strict=False):
            line(axes, rows, {batch: choose(rows, kind, batch) for batch in BATCHES}, kind, colour, aside=aside)
        log_axis(axes, BATCHES, "batch size")
        axes.set_title("best of three rates" if name == "best" else "linear rule")
        mark_chance(axes)
    panels[0].set_ylim(0, 100)  # standard deviations reach further where some seeds diverge
    panels[1].set_ylabel("")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


def draw_clip_factors(rows: Rows, figure: Any) -> None:
    axes = figure.subplots()
    for colour, batch in zip(COLOURS, BATCHES, strict=True):
        at = {run.factor: run for run in sorted(grid.clipped_at_linear(batch), key=lambda run: run.factor)}
        line(axes, rows, at, f"batch {batch}", colour, (grid.TUNING, *SEEDS))
    log_axis(axes, sorted(grid.FACTORS), "clip factor")
    mark_chance(axes)
    axes.legend(frameon=False)


def draw_layers(rows: Rows, figure: Any) -> None:
    axes = figure.subplots()
    dots(axes, rows, grid.layers(rows))
    axes.set_ylabel("clipped")
    mark_chance(axes, vertical=True)


def draw_norms(rows: Rows, figure: Any) -> None:
    axes = figure.subplots()
    for colour, clip in zip(COLOURS, grid.GRIDS, strict=False):
        runs = {run.factor: run for run in grid.thresholds(rows, clip)}
        line(axes, rows, runs, {"global": "all parameters"}.get(clip, clip), colour, (grid.TUNING, *SEEDS))
    log_axis(axes, sorted({run.factor for clip in grid.GRIDS for run in grid.thresholds(rows, clip)}), "threshold")
    axes.tick_params(axis="x", rotation=60)
    mark_chance(axes)
    axes.legend(frameon=False)


def draw_small_batches(rows: Rows, figure: Any) -> None:
    axes = figure.subplots()
    for colour, net, label, aside in zip(COLOURS, grid.SMALL_NETS, ("NF", "twin"), ASIDE, strict=False):
        at = {batch: grid.small_best(rows, net, batch) for batch in SMALL_BATCHES}
        line(axes, rows, at, label, colour, aside=aside)
    log_axis(axes, SMALL_BATCHES, "batch size")
    mark_chance(axes)
    axes.legend(frameon=False)


def draw_capacity(rows: Rows, figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    dots(left, rows, {run.depths: run for run in grid.deeper()})
    left.set(title="four more blocks in one stage", ylabel="depths")
    for colour, width in zip(COLOURS, grid.WIDTHS, strict=False):
        line(right, rows, {run.dropout: run for run in grid.dropouts(width)}, f"width {width:.2f}", colour)
    right.set(title="dropout", xlabel="rate", ylabel="test accuracy, %", xticks=grid.DROPOUTS)
    right.legend(frameon=False)
    figure.suptitle("chance is 10 %")


def draw_regularisation(rows: Rows, figure: Any) -> None:
    axes = figure.subplots()
    names = {"nf": "NF", "bn-zero": "twin"}
    settings = {f"{names[n]}, rate {r.drop_path:g}": r for n in names for r in grid.drop_paths(n)}
    dots(axes, rows, settings | {"NF, plain weights": grid.without_standardisation()})
    axes.set(title="chance is 10 %", ylabel="rate of stochastic depth")


class Figure(NamedTuple):
    """How a figure is drawn, its caption, and its settings, of which at least one must have rows."""

    draw: Callable[[Rows, Any], None]
    caption: str
    settings: Callable[[Rows], list[Run]]

    def ready(self, rows: Rows) -> bool:
        return any(run in rows for run in self.settings(rows))


def batch_size_settings(rows: Rows) -> list[Run]:
    return grid.over(SEEDS, [choose(rows, k, b) for choose in SETTINGS.values() for k in KINDS for b in BATCHES])


MARKS = "Dots are seeds, squares their mean with the standard deviation; the dotted line is chance."
FIGURES = {
    "batch_sizes": Figure(
        draw_batch_sizes,
        f"Accuracy against batch size. {MARKS}",
        batch_size_settings,
    ),
    "clip_factors": Figure(
        draw_clip_factors,
        f"Accuracy against clip factor at the linear rule. {MARKS} One dot is the seed that chose.",
        lambda rows: [*grid.clipped_at_linear(SMALLEST), *grid.clipped_at_linear(LARGEST)],
    ),
    "layers": Figure(
        draw_layers,
        f"What is clipped at batch {LARGEST}. {MARKS}",
        lambda rows: grid.over(SEEDS, list(grid.layers(rows).values())[2:]),
    ),
    "norms": Figure(
        draw_norms,
        f"Accuracy against threshold at batch {LARGEST}. {MARKS} One dot is the seed that chose.",
        lambda rows: grid.thresholds(rows, "layer"),
    ),
    "small_batches": Figure(
        draw_small_batches, f"Accuracy at small batches. {MARKS}", grid.small_batches
    ),
    "capacity": Figure(
        draw_capacity,
        "Left: accuracy with four more blocks in one stage. Right: accuracy against dropout. Dots are seeds, squares "
        "their mean with the standard deviation. The axes do not begin at 0.",
        lambda rows: grid.over(SEEDS, [*grid.deeper(), *(run for w in grid.WIDTHS for run in grid.dropouts(w))]),
    ),
    "regularisation": Figure(
        draw_regularisation,
        "Accuracy with and without stochastic depth, and with weights that are not standardised. Dots are seeds, "
        "squares their mean with the standard deviation. The axis does not begin at 0.",
        grid.regularisation,
    ),
}  # fmt: skip


def draw(rows: Rows, what: Figure, file: Path) -> None:
    """Write one figure."""
    from matplotlib.figure import Figure as Canvas  # slow to import, and only needed here

    canvas = Canvas(figsize=(8, 4), layout="constrained")
    what.draw(rows, canvas)
    for axes in canvas.axes:
        axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(file, dpi=150, metadata={"Software": None})
