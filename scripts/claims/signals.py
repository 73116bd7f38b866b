"""Measures what clipping does over a training: ratios of gradient norm to weight norm, and signals before and after.

python -m scripts.claims.signals    # three runs, docs/claims/ratios.csv, docs/claims/signals.csv and their figures
"""

import csv
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from scripts.claims.figures import COLOURS
from scripts.claims.grid import LARGEST, SMALLEST, linear
from scripts.claims.markdown import table
from scripts.claims.training import STAGES, Run, build, learning_rate, load, train
from timm_nf._clip_defaults import CLIP_EPS, CLIP_FACTOR
from timm_nf.diagnostics import signal_stats
from timm_nf.diagnostics.plots import draw_signals

FOLDER = Path(__file__).parents[2] / "docs" / "claims"
POINTS = 70  # number of points of a curve
PARTS = {"stem.": "first convolution"} | {stage: f"stage {i}" for i, stage in enumerate(STAGES, 1)}
CLIPPED = {batch: Run(clip="unit", factor=CLIP_FACTOR, batch=batch, lr=linear(batch)) for batch in (SMALLEST, LARGEST)}
AT_256 = CLIPPED[SMALLEST]
UNCLIPPED = replace(AT_256, clip="none", factor=0.0)

Values = dict[str, Any]


class Watch:
    """Called in every step of a run. It keeps the network, and the `clip_stats` of each part of it.

    The classifier is left out, since its weight is not clipped and its bias starts at zero.

    Its optimizer has a group for each part, and a learning rate of 0. It measures and clips like the run's optimizer,
    but does not change the network.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.steps = run.epochs * (run.images // run.batch)
        self.rows: list[Values] = []
        self.model: Any = None

    def __call__(self, step: int, model: nn.Module) -> None:
        if self.model is None:
            self.model = model
            groups: dict[str, list[nn.Parameter]] = {name: [] for name in PARTS}
            for name, p in model.named_parameters():
                if not name.startswith("head."):
                    groups[next(beginning for beginning in PARTS if name.startswith(beginning))].append(p)
            self.optimizer: Any = create_optimizer_v2(
                [{"params": group} for group in groups.values()], "agcsgd", lr=0.0, momentum=0.9, weight_decay=0.0,
                clip_factor=self.run.factor, clip_exempt=(),
            )  # fmt: skip
        if step % -(-self.steps // POINTS):
            return
        self.optimizer.step()
        for part, stats in zip(PARTS.values(), self.optimizer.clip_stats(), strict=True):
            quantiles = {f"q{100 * at:g}": value for at, value in stats["ratio_quantiles"].items()}
            lr = learning_rate(step, self.steps, self.run.lr)
            self.rows.append(
                {"batch": self.run.batch, "step": step, "lr": lr, "part": part}
                | quantiles | {"clipped": stats["clipped_fraction"]}
            )  # fmt: skip


def signals_and_gains(model: Any) -> list[Values]:
    """The signals behind the stem and behind every block on 384 test images, with the skip gain of the block."""
    stats = signal_stats(model, load(train=False)[0][:384])
    gains = [block.skipinit_gain.item() for stage in model.stages for block in stage]
    return [each | {"skip_gain": gain} for each, gain in zip(stats, [None, *gains], strict=True)]


def measure() -> tuple[list[Values], dict[str, list[Values]]]:
    """Measure the ratios in both clipped runs, and the signals of their networks and of an unclipped one."""
    torch.manual_seed(0)
    signals = {"before training": signals_and_gains(build(AT_256))}
    rows: list[Values] = []
    for batch, run in CLIPPED.items():
        watch = Watch(run)
        train(run, watch)
        rows += watch.rows
        signals[f"clipped, batch {batch}"] = signals_and_gains(watch.model)
    models: list[nn.Module] = []
    train(UNCLIPPED, lambda step, model: None if step else models.append(model))
    signals[f"not clipped, batch {SMALLEST}"] = signals_and_gains(models[0])
    return rows, signals


def write(rows: Iterable[Mapping[str, Any]], file: Path) -> None:
    rows = list(rows)
    half = file.with_suffix(".tmp")
    with half.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(half, file)


def read(file: Path) -> list[Values]:
    if not file.exists():
        return []

    def value(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text or None

    with file.open(encoding="utf-8", newline="") as lines:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(lines)]


def signals_of(rows: list[Values]) -> dict[str, list[Values]]:
    """The rows of signals.csv, by network."""
    found: dict[str, list[Values]] = {}
    for row in rows:
        found.setdefault(row["network"], []).append({key: value for key, value in row.items() if key != "network"})
    return found


def draw_ratios(rows: list[Values], file: Path) -> None:
    """Draw the median and the 5 to 95 % range of the ratios over the steps: a column per batch size, a row per part."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(8, 7.5), layout="constrained")
    panels: Any = canvas.subplots(len(PARTS), 2, sharex="col", sharey="row")
    for column, batch in enumerate(CLIPPED):
        for line, (part, colour) in enumerate(zip(PARTS.values(), COLOURS, strict=True)):
            axes = panels[line][column]
            found = [row for row in rows if (row["batch"], row["part"]) == (batch, part)]
            steps = [row["step"] for row in found]
            # zeros are below the axis; skip gains of 0 cause them at the start
            shown = [[max(row[q], 1e-12) for row in found] for q in ("q5", "q50", "q95")]
            axes.fill_between(steps, shown[0], shown[2], alpha=0.25, color=colour, lw=0)
            axes.plot(steps, shown[1], color=colour, lw=1.3)
            axes.axhline(CLIPPED[batch].factor, color="black", lw=0.8, ls="--")
            axes.set_yscale("log")
            axes.set_ylim(1e-6, 10)
            axes.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axes.set_ylabel(part)
        panels[0][column].set_title(f"batch {batch}")
        panels[-1][column].set_xlabel("training step")
    canvas.savefig(file, dpi=130, metadata={"Software": None})


def section(folder: Path) -> str:
    """The page's section from the two CSV files. It is empty if they are missing."""
    ratios, signals = read(folder / "ratios.csv"), signals_of(read(folder / "signals.csv"))
    if not ratios or not signals:
        return ""
    lines = []
    for batch in CLIPPED:
        of_batch = [row for row in ratios if row["batch"] == batch]
        last = max(row["step"] for row in of_batch)
        for part in PARTS.values():
            shares = [
                [row["clipped"] for row in of_batch if row["part"] == part and low * last <= row["step"] <= high * last]
                for low, high in ((0, 0.25), (0.25, 0.75), (0.75, 1))
            ]
            lines.append([batch, part, *(f"{100 * sum(share) / len(share):.0f} %" for share in shares)])
    clipped = table(["batch", "part", "first quarter", "middle half", "last quarter"], lines)
    blocks = [
        [name, row["name"], *(f"{row[key]:.2g}" for key in ("avg_sq_mean", "avg_var", "res_avg_var", "skip_gain"))]
        for name, rows in signals.items()
        for row in rows[1:]
    ]
    header = ["network", "block", "squared channel mean", "channel variance", "residual branch variance", "skip gain"]
    shown = table(header, blocks)
    return f"""\
## What clipping does when

Gradient norm over weight norm of every unit during one clipped training at each end, factor {CLIP_FACTOR}, linear rule,
seed 0, from `optimizer.clip_stats()`. `python -m scripts.claims.signals` makes these runs.

![Ratios over training steps, by part of the network and batch size](claims/ratios.png)

Lines are medians over the units of a part, bands reach from 5 to 95 %. The dashed line is the clip factor: what is
above is clipped. The first quarter of the steps is the warmup. The share of units that were clipped, mean over steps:

{clipped}

Signals of the network before and after training, clipped and not, on 384 test images, from what `timm-nf diagnose`
draws with. Skip gains are 0 before training, so that branches add nothing there. They are clipped too: while a gain is
below {CLIP_EPS:g}, its gradient is held at {CLIP_EPS * CLIP_FACTOR:g}, so few steps open a branch only a little.

![Signals before and after training](claims/signals.png)

{shown}
"""


def main() -> int:
    torch.set_num_threads(1)
    try:
        rows, signals = measure()
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    write(rows, FOLDER / "ratios.csv")
    write(({"network": name} | stats for name, found in signals.items() for stats in found), FOLDER / "signals.csv")
    draw_ratios(rows, FOLDER / "ratios.png")
    draw_signals(cast(Any, signals), "", FOLDER / "signals.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
