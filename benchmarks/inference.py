"""Time inference and training side by side with timm's networks, in one run: ratios, and with --check their targets.

    python -m benchmarks.inference [--repeats 15] [--check] [--only training] [--plots docs] [--markdown]

The networks take turns, so that noise affects all of them. Numbers are medians. With --check the exit code is 1 if a
target is missed. With --plots it also times NFNet-F0 to F3 at their training sizes, and draws four pictures. With
--markdown it prints the tables of docs/performance.md.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from timm_nf.cli.terminal import track
from timm_nf.env import machine
from timm_nf.inference.bench import Work, bfloat16_is_fast, contenders, peak_memory, time_in_turn, time_inference
from timm_nf.inference.export import onnx_is_installed
from timm_nf.variants import VARIANTS

PIXELS = 192
PICTURES = {"memory": "peak memory", "rates": "multiply-adds per second"}
TITLES = {
    "speed": ("Speed beside timm's networks", "their time / our time, more is better"),
    "memory": ("Memory of a training step beside timm's network", "their peak / our peak, more is better"),
    "rates": ("Multiply-adds per second beside a matrix product", "our rate / the matrix product's, more is better"),
}
STEP = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 2e-5}


@dataclass
class Ratio:
    work: str
    against: str
    ours: str
    theirs: str
    ratio: float
    asked: float

    @property
    def missed(self) -> bool:
        return self.ratio < self.asked

    @property
    def kind(self) -> str:
        """The picture that it is in."""
        return next((kind for kind, words in PICTURES.items() if words in self.work), "speed")


def best(medians: dict[str, float], prefix: str) -> tuple[str, float]:
    """The label and the time of the faster layout."""
    layouts = {label: medians[label] for label in (prefix, f"{prefix}, channels_last")}
    label = min(layouts, key=lambda label: layouts[label])
    return label, layouts[label]


def timed(name: str, batch: int, size: int, labels: list[str], repeats: int) -> dict[str, float]:
    builders = contenders(name, batch, size)
    timings = time_inference({label: builders[label] for label in labels}, repeats, progress=track)
    return {label: timing.median for label, timing in timings.items()}


def inference_rows(repeats: int) -> list[Ratio]:
    layouts = ["stock", "stock, channels_last", "fused", "fused, channels_last"]
    labels = [*layouts, "fused, compiled", "fused, onnxruntime"]
    if bfloat16_is_fast():
        labels.append("fused, bfloat16")
    medians = timed("nfnet_f0", 1, PIXELS, labels, repeats)

    def row(work: str, label: str, against: str, asked: float) -> Ratio:
        ours, theirs = medians[label], medians[against]
        return Ratio(f"{work}: {label}", against, f"{ours:.1f} ms", f"{theirs:.1f} ms", theirs / ours, asked)

    rows = [row("F0, batch 1", best(medians, "fused")[0], "stock", 1.4)]
    if bfloat16_is_fast():
        rows.append(row("F0, batch 1", "fused, bfloat16", "stock", 2.2))
    rows.append(row("F0, batch 1", "fused, compiled", "stock", 1.8))
    rows.append(row("F0, batch 1", "fused, onnxruntime", "stock", 2.0))

    rate, macs = matmul_rate(), VARIANTS["nfnet_f0"].cfg.count(PIXELS)[1]
    for label in (best(medians, "fused")[0], "fused, compiled", "fused, onnxruntime"):
        achieved = macs / medians[label] / 1e6
        work = f"F0, batch 1: {label}, multiply-adds per second"
        rows.append(Ratio(work, "matrix product", f"{achieved:.0f} G", f"{rate:.0f} G", achieved / rate, 0.6))

    medians = timed("nfnet_f0", 8, PIXELS, layouts, max(5, repeats // 2))
    rows.append(row("F0, batch 8", best(medians, "fused")[0], best(medians, "stock")[0], 1.1))
    for name in ("nf_resnet50", "eca_nfnet_l0"):
        medians = timed(name, 1, 224, layouts, repeats)
        rows.append(row(f"{name}, batch 1, 224 px", best(medians, "fused")[0], "stock", 1.3))
    return rows


def matmul_rate(side: int = 2048) -> float:
    """10^9 multiply-adds per second of a float32 matrix product."""
    a = torch.randn(side, side)
    return side**3 / statistics.median(time_in_turn({"": lambda: a @ a}, 9)[""]) / 1e6


def training_step(name: str, batch: int, channels_last: bool) -> Work:
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = timm.create_model(name).train().to(memory_format=layout)
    images = torch.randn(batch, 3, PIXELS, PIXELS).to(memory_format=layout)
    labels = torch.arange(batch)
    optimizer = torch.optim.SGD(model.parameters(), **STEP)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def training_rows(repeats: int) -> list[Ratio]:
    rows = []
    for batch in (2, 8):
        labels = [f"{name}{layout}" for name in ("fused", "stock") for layout in ("", ", channels_last")]
        networks = [("nfnet_f0", False), ("nfnet_f0", True), ("dm_nfnet_f0", False), ("dm_nfnet_f0", True)]
        steps = {label: training_step(name, batch, last) for label, (name, last) in zip(labels, networks, strict=True)}
        times = time_in_turn(steps, repeats, progress=track)
        medians = {label: statistics.median(values) for label, values in times.items()}
        (ours, our_time), (theirs, their_time) = best(medians, "fused"), best(medians, "stock")
        layouts = ["channels_last" if "last" in label else "contiguous" for label in (ours, theirs)]
        work, against = f"F0, training step, batch {batch}: {layouts[0]}", f"dm_nfnet_f0, {layouts[1]}"
        rows.append(Ratio(work, against, f"{our_time:.0f} ms", f"{their_time:.0f} ms", their_time / our_time, 1.0))
        peaks = [peak_memory(steps[label]) / 2**20 for label in (ours, theirs)]
        work = f"F0, training step, batch {batch}: peak memory"
        rows.append(Ratio(work, against, f"{peaks[0]:.0f} MiB", f"{peaks[1]:.0f} MiB", peaks[1] / peaks[0], 1.0))
    return rows


def draw_ratios(rows: list[Ratio], kind: str, file: Path) -> None:
    """The rows of one picture, with their targets."""
    from matplotlib.figure import Figure

    rows = [row for row in reversed(rows) if row.kind == kind]
    figure = Figure(figsize=(9, 0.45 * len(rows) + 1.7), layout="constrained")
    axes = figure.subplots()
    colors = {"target met": "#1f6fb2", "target missed": "#c0392b"}
    for y, row in enumerate(rows):
        label = "target missed" if row.missed else "target met"
        axes.barh(y, row.ratio, height=0.6, color=colors[label], label=label)
        axes.plot([row.asked] * 2, [y - 0.38, y + 0.38], color="black", lw=2, label="target")
        end = max(row.ratio, row.asked)  # beyond the line, so that it does not strike the number through
        axes.annotate(f"{row.ratio:.2f}", (end, y), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [f"{row.work}\nagainst {row.against}" for row in rows], fontsize=8)
    title, words = TITLES[kind]
    axes.set_xlabel(words)
    axes.set_xlim(0, 1.12 * max(max(row.ratio, row.asked) for row in rows))
    axes.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{title}: timm {timm.__version__}, {torch.get_num_threads()} CPU threads", fontsize=11)
    figure.savefig(file, dpi=150)


Point = tuple[str, float, dict[str, float]]  # a network, its 10^9 multiply-adds, medians of stock and fused


def cost_points(repeats: int) -> list[Point]:
    """Times of F0 to F3 at their training sizes."""
    points = []
    for name in ("nfnet_f0", "nfnet_f1", "nfnet_f2", "nfnet_f3"):
        row = VARIANTS[name]
        medians = timed(name, 1, row.train_size, ["stock", "fused"], repeats)
        points.append((f"{name[6:].upper()}, {row.train_size} px", row.cfg.count(row.train_size)[1] / 1e9, medians))
    return points


def draw_cost(points: list[Point], file: Path) -> None:
    """Time over multiply-adds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for label, text, color in (("stock", "timm dm_nfnet", "#888888"), ("fused", "timm_nf, fused", "#1f6fb2")):
        axes.plot([p[1] for p in points], [p[2][label] for p in points], marker="o", color=color, label=text)
    for name, macs, medians in points:
        axes.annotate(name, (macs, medians["fused"]), (8, -14), textcoords="offset points", fontsize=9)
    axes.set(xscale="log", yscale="log", xlabel="multiply-adds, 10⁹", ylabel="milliseconds, batch 1")
    axes.set(xlim=(5, 130), ylim=(60, 1200))
    for axis, ticks in ((axes.xaxis, (5, 10, 20, 50, 100)), (axes.yaxis, (100, 200, 500, 1000))):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("NFNet-F0 to F3 at their training sizes: time over cost", fontsize=11)
    figure.savefig(file, dpi=150)


def describe() -> str:
    onnxruntime = f"onnxruntime {version('onnxruntime')}, " if onnx_is_installed() else ""
    bfloat16 = "with" if bfloat16_is_fast() else "without"
    return f"{onnxruntime}{machine()}, {torch.backends.cpu.get_cpu_capability()} {bfloat16} bfloat16 instructions"


def print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]], markdown: bool) -> None:
    if markdown:
        for cells in (columns, ("---",) * len(columns), *rows):
            print(f"| {' | '.join(cells)} |")
        print(f"\n{describe()}.\n")
        return
    table = Table(*columns, caption=describe())
    for cells in rows:
        table.add_row(*cells)
    Console(width=150).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", choices=("inference", "training"), help="one half of the rows")
    parser.add_argument("--plots", type=Path, metavar="FOLDER")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()

    rows: list[Ratio] = []
    if args.only != "training":
        rows += inference_rows(args.repeats)
    if args.only != "inference":
        rows += training_rows(max(5, args.repeats // 2))
    columns = ("work", "against", "ours", "theirs", "ratio", "at least")
    ratios = [f"{row.ratio:.2f}x{' missed' if row.missed else ''}" for row in rows]
    table = [(r.work, r.against, r.ours, r.theirs, ratio, f"{r.asked}x") for r, ratio in zip(rows, ratios, strict=True)]
    print_table(columns, table, args.markdown)
    if args.plots:
        for kind in sorted({row.kind for row in rows}):
            draw_ratios(rows, kind, args.plots / f"performance_{kind}.png")
        points = cost_points(max(5, args.repeats // 3))
        draw_cost(points, args.plots / "performance_cost.png")
        cells = [(name, f"{macs:.1f} G", f"{t['stock']:.0f} / {t['fused']:.0f} ms") for name, macs, t in points]
        print_table(("network", "multiply-adds", "stock / fused, batch 1"), cells, args.markdown)
    if not bfloat16_is_fast():
        print("bfloat16 was not timed: this processor has neither AVX512-BF16 nor AMX")
    return int(args.check and any(row.missed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
