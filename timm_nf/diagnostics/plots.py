"""The plots of the diagnostics. Only this module needs matplotlib.

Examples:
    >>> from pathlib import Path
    >>> from timm_nf.diagnostics.clipping import measure_clip_range
    >>> from timm_nf.diagnostics.signals import signal_stats
    >>> model = timm.create_model("test_resnet", num_classes=3)
    >>> x, y = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    >>> draw_signals({"test_resnet": signal_stats(model, x)}, "at initialisation", Path("signals.png"))
    >>> draw_clip_range(measure_clip_range(model, [(x, y)], count=1), "test_resnet", Path("clip_range.png"))
"""

# matplotlib types only a part of what it exports.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .._temporary import replacing
from .._text import counted
from .clipping import AT_REST, SHARES, ClipRange, Stage
from .signals import PANELS, SignalStats, Statistic

__all__ = ["draw_clip_range", "draw_signals"]

# The axis is logarithmic if the largest value is this many times the smallest. On a linear axis equal steps are a line.
_LOG_FROM = 20.0


def draw_signals(measured: Mapping[str, Sequence[SignalStats]], title: str, file: Path) -> None:
    """Draw three panels with a line for every network.

    The expected variance of a normalizer-free network is dashed: 1 + k alpha^2 at block k of a stage. If it is the same
    for all, there is one grey line.

    Args:
        measured: The statistics of `diagnostics.signal_stats`, by the name for the legend.
        title: The picture's title.
        file: The file to write. Its suffix names the format.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    expected = _expected(measured)
    for axes, (key, words) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        _draw_panel(axes, measured, key, expected if key == "avg_var" else {})
        axes.set_title(words, fontsize=10)
        axes.set_xlabel("block, 0 is the stem")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    lines = [
        Line2D([], [], color=f"C{index}", marker="o", markersize=3, label=name) for index, name in enumerate(measured)
    ]
    lines += [Line2D([], [], color=color, ls="--", lw=1, label=label) for label, (color, _) in expected.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title, fontsize=11)
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=130)


def _expected(measured: Mapping[str, Sequence[SignalStats]]) -> dict[str, tuple[str, list[float | None]]]:
    """The colour and the values of every line of expected variances, by its label."""
    lines: dict[str, tuple[str, list[float | None]]] = {}
    for index, (name, rows) in enumerate(measured.items()):
        values = [row["expected_var"] for row in rows]
        if any(value is not None for value in values):
            lines[f"{name}, expected variance"] = (f"C{index}", values)
    distinct = {tuple(values) for _, values in lines.values()}
    if len(distinct) == 1 and len(lines) == len(measured):
        return {"expected variance": ("0.4", [*distinct.pop()])}
    return lines


def _draw_panel(
    axes: Axes,
    measured: Mapping[str, Sequence[SignalStats]],
    key: Statistic,
    expected: Mapping[str, tuple[str, list[float | None]]],
) -> None:
    """Draw one statistic of every network, and dashed what is expected of it."""
    shown: list[float] = []

    def line(values: list[float], color: str, **style: Any) -> None:
        axes.plot(values, color=color, **style)
        shown.extend(value for value in values if 0 < value < math.inf)

    for index, rows in enumerate(measured.values()):
        line([_number(row[key]) for row in rows], f"C{index}", marker="o", markersize=3, lw=1.3)
    for color, values in expected.values():
        line([_number(value) for value in values], color, ls="--", lw=1)
    if shown and max(shown) > _LOG_FROM * min(shown):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)


def _number(value: float | None) -> float:
    """A value for matplotlib. It leaves a gap for NaN."""
    return math.nan if value is None else value


def draw_clip_range(measured: ClipRange, title: str, file: Path) -> None:
    """Draw the distribution of every stage's ratios, and lines at the clip factors of `SHARES`.

    A share has no line if only a factor below `AT_REST` would clip it.
    """
    stages = [stage for stage in measured.stages if stage.ratios.size]
    figure = Figure(figsize=(8, 1.6 + 0.42 * len(stages)), layout="constrained")
    axes = figure.subplots()
    logs = [np.log10(stage.ratios) for stage in stages]
    low, high = min(map(np.min, logs)), max(map(np.max, logs))
    grid = np.linspace(low - 0.2, high + 0.2, 160)
    for row, values in enumerate(reversed(logs)):
        density, _ = np.histogram(values, bins=grid, density=True)
        middles = (grid[1:] + grid[:-1]) / 2
        axes.fill_between(10**middles, row, row + 0.85 * density / density.max(), color="#1f6fb2", alpha=0.55, lw=0)
        axes.plot(10 ** np.median(values), row, marker="|", color="#10365a", markersize=9, markeredgewidth=2)
    for share, style in zip(SHARES, ("-", "--", "-.", ":"), strict=True):
        factor = measured.clip_factor(share)
        if factor >= AT_REST:
            axes.axvline(factor, color="#c0392b", linestyle=style, lw=1.2, label=f"{share:.0%}: {factor:.2g}")
    axes.set(xscale="log", ylim=(-0.3, len(stages)))
    axes.set_xlabel(
        "gradient norm / weight norm of a unit\n\nTick: the median of a stage. Height: how many of its units have this "
        "ratio, each stage\nscaled to its own peak. The classifier's weight is left out, as it is never clipped.",
        fontsize=9,
    )
    axes.set_yticks(range(len(stages)), [_name_and_units(stage) for stage in reversed(stages)])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(title="clip factor that clips", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, fontsize=11)
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight", pad_inches=0.15)  # names of stages may be long


def _name_and_units(stage: Stage) -> str:
    return f"{stage.name} ({counted(stage.units, 'unit')})"
