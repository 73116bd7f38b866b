"""docs/claims.md from the rows of scripts/claims: tables, and verdicts by a rule that knows no claim."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from scripts.claims.grid import (
    BATCHES,
    DEPTHS,
    DROPOUTS,
    FACTORS,
    LARGEST,
    SMALL_BATCHES,
    SPARED,
    THRESHOLDS,
    WIDTHS,
    Rows,
    clip_factors,
    depths,
    dropouts,
    layers,
    norms,
)
from scripts.claims.training import Run

SPREADS = 3
# A test image is a coin: ten thousand of them give 0.3 points at 88 %, and three seeds may agree by chance.
FLOOR = 0.5
LITTLE = 1.0  # points that "little" and "as good" allow
TRAINED = 50.0  # a reference below this has not trained, and nothing is decided by being as good
VERDICTS = {1: "**holds**", 0: "not decided here", -1: "**does not hold**"}


class Cell(NamedTuple):
    """Accuracy of a run over its seeds."""

    mean: float  # % of the test images
    spread: float  # standard deviation over the seeds, 0 for one
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.spread:.1f}" if self.seeds > 1 else f"{self.mean:.1f} (one seed)"


class Part(NamedTuple):
    """One thing that a claim says, and what became of it."""

    statement: str
    numbers: str
    verdict: int  # a key of VERDICTS


def cell(rows: Rows, run: Run) -> Cell | None:
    """None without a row."""
    found = [result.accuracy for other, result in rows.items() if replace(other, seed=0) == replace(run, seed=0)]
    if not found:
        return None
    return Cell(statistics.mean(found), statistics.stdev(found) if len(found) > 1 else 0.0, len(found))


def margin(a: Cell, b: Cell) -> float:
    """Points by which two means have to differ: three standard errors of their difference."""
    return SPREADS * math.sqrt(sum(max(each.spread, FLOOR) ** 2 / each.seeds for each in (a, b)))


def better(a: Cell | None, b: Cell | None) -> int:
    """Whether a is above b: 1 if so, -1 if below, 0 if within the margin or if one has fewer than two seeds."""
    if a is None or b is None or min(a.seeds, b.seeds) < 2 or abs(a.mean - b.mean) <= margin(a, b):
        return 0
    return 1 if a.mean > b.mean else -1


def as_good(a: Cell | None, b: Cell | None) -> int:
    """Whether a is no worse than b: 1 if surely less than `LITTLE` below it, -1 if surely below, 0 otherwise."""
    if a is None or b is None or min(a.seeds, b.seeds) < 2:
        return 0
    return 1 if a.mean - margin(a, b) > b.mean - LITTLE else min(better(a, b), 0)


def same(a: Cell | None, b: Cell | None) -> int:
    """Whether a and b differ little, in either direction."""
    return min(as_good(a, b), as_good(b, a))


def part(statement: str, a: Cell | None, b: Cell | None, verdict: int) -> Part:
    return Part(statement, f"{a} against {b}" if a and b else "no rows", verdict)


def best(rows: Rows, candidates: Iterable[Run]) -> Run:
    """The candidate with the highest mean over its seeds; the first one while none has rows."""
    candidates = list(candidates)
    found = {run: mean.mean for run in candidates if (mean := cell(rows, run))}
    return max(found or candidates, key=lambda run: found.get(run, 0.0))


def factor_of(rows: Rows, batch: int) -> Run:
    """The clip factor with the highest mean at a batch size."""
    return best(rows, clip_factors([batch], 0))


def spared() -> dict[str, Run]:
    """Claim 3: what is spared, and the run that spares it."""
    return dict(zip(SPARED, layers(0), strict=True))


def thresholds(rows: Rows) -> dict[str, Run]:
    """Claim 4: each kind of clipping at its best threshold."""
    return {clip: best(rows, norms(clip, 0)) for clip in THRESHOLDS}


def batch_size_parts(rows: Rows) -> list[Part]:
    found = []
    for batch in BATCHES:
        plain, twin = (cell(rows, Run(net, batch=batch)) for net in ("nf", "bn"))
        clipped = cell(rows, factor_of(rows, batch))
        if batch == BATCHES[0]:
            found.append(part(f"batch {batch}: clipping changes little", clipped, plain, same(clipped, plain)))
        if batch == LARGEST:
            found.append(part(f"batch {batch}: unclipped is below the twin", plain, twin, better(twin, plain)))
            found.append(part(f"batch {batch}: clipped is above unclipped", clipped, plain, better(clipped, plain)))
        trained = twin is None or twin.mean > TRAINED
        statement = f"batch {batch}: clipped is as good as the twin" + ("" if trained else ", which has not trained")
        found.append(part(statement, clipped, twin, as_good(clipped, twin) if trained else 0))
    return found


def clip_factor_parts(rows: Rows) -> list[Part]:
    small, large = factor_of(rows, BATCHES[0]), factor_of(rows, LARGEST)
    moved = replace(small, batch=LARGEST)
    smaller, there, here = large.factor < small.factor, cell(rows, large), cell(rows, moved)
    back = replace(large, batch=BATCHES[0])
    return [
        part(
            f"batch {LARGEST}: its best factor, {large.factor}, is smaller than {small.factor}, the best one at batch "
            f"{BATCHES[0]}, and better",
            there, here, better(there, here) if smaller else min(0, -better(there, here)),
        ),
        part(
            f"batch {BATCHES[0]}: the larger factor, {small.factor}, is better than {large.factor}",
            cell(rows, small), cell(rows, back),
            better(cell(rows, small), cell(rows, back)) if smaller else 0,
        ),
    ]  # fmt: skip


def layer_parts(rows: Rows) -> list[Part]:
    everything, head, stem, *stages = (cell(rows, run) for run in spared().values())
    return [
        part("sparing the classifier's weight is better than clipping all", head, everything, better(head, everything)),
        part("sparing the first convolution too is as good", stem, head, as_good(stem, head)),
        *(
            part(f"stage {i} has to be clipped: sparing it is worse", stage, head, better(head, stage))
            for i, stage in enumerate(stages, 1)
        ),
    ]


def norm_parts(rows: Rows) -> list[Part]:
    cells = {clip: cell(rows, run) for clip, run in thresholds(rows).items()}
    unit, layer, whole = (cells.get(clip) for clip in ("unit", "layer", "global"))
    return [
        part("unit-wise is better than layer-wise", unit, layer, better(unit, layer)),
        part("unit-wise is better than one norm for all", unit, whole, better(unit, whole)),
    ]


def small_batch_parts(rows: Rows) -> list[Part]:
    found = []
    for batch in SMALL_BATCHES:
        nf, bn = (cell(rows, Run(net, batch=batch, images=6000)) for net in ("nf", "bn"))
        found.append(part(f"batch {batch}: NF is better than the twin", nf, bn, better(nf, bn)))
    ends = (SMALL_BATCHES[0], SMALL_BATCHES[-1])
    for net, statement, rule in (
        ("bn", "the twin loses accuracy", lambda at, than: better(than, at)),
        ("nf", "NF does not", as_good),
    ):
        least, most = (cell(rows, Run(net, batch=batch, images=6000)) for batch in ends)
        found.append(part(f"from batch {ends[1]} to {ends[0]} {statement}", least, most, rule(least, most)))
    return found


def capacity_parts(rows: Rows) -> list[Part]:
    cells = dict(zip(DEPTHS, (cell(rows, run) for run in depths(0)), strict=True))
    third = cells.pop(DEPTHS[2])
    found = [
        part(f"depth {DEPTHS[2]} is better than {depth}", third, other, better(third, other))
        for depth, other in cells.items()
    ]
    small, large = ([run for run in dropouts(0) if run.width == width] for width in WIDTHS)
    best_small, best_large = (
        max(runs, key=lambda run: getattr(cell(rows, run), "mean", 0.0)) for runs in (small, large)
    )
    grows = best_large.dropout - best_small.dropout
    gains = [better(cell(rows, run), cell(rows, replace(run, dropout=other.dropout))) for run, other in
             ((best_small, best_large), (best_large, best_small))]  # fmt: skip
    numbers = f"highest means at {best_small.dropout} for width {WIDTHS[0]}, {best_large.dropout} for width {WIDTHS[1]}"
    verdict = 0 if not grows or min(gains) < 1 else 1 if grows > 0 else -1
    return [*found, Part("the larger network wants more dropout", numbers, verdict)]


def table(header: Iterable[object], lines: Iterable[Iterable[object]]) -> str:
    """A Markdown table; None is an empty cell."""
    text = [list(header), ["---"] * len(list(header)), *map(list, lines)]
    return "\n".join("| " + " | ".join("" if each is None else str(each) for each in line) + " |" for line in text)


def clip_factor_table(rows: Rows) -> str:
    def line(batch: int) -> list[object]:
        highest = factor_of(rows, batch)
        clipped = (f"**{cell(rows, run)}**" if run == highest else cell(rows, run) for run in clip_factors([batch], 0))
        return [batch, cell(rows, Run(batch=batch)), *clipped, cell(rows, Run("bn", batch=batch))]

    header = ["batch", "NF, not clipped", *(f"clip factor {factor}" for factor in FACTORS), "batch-normalised twin"]
    return table(header, map(line, BATCHES))


def layer_table(rows: Rows) -> str:
    return table(["not clipped", "accuracy"], ([what, cell(rows, run)] for what, run in spared().items()))


def norm_table(rows: Rows) -> str:
    highest = thresholds(rows).values()
    runs = [run for clip in THRESHOLDS for run in norms(clip, 0)]
    cells = (f"**{cell(rows, run)}**" if run in highest else cell(rows, run) for run in runs)
    return table(
        ["norm of", "threshold", "accuracy"], ([run.clip, run.factor, c] for run, c in zip(runs, cells, strict=True))
    )


def small_batch_table(rows: Rows) -> str:
    runs = [Run(images=6000), Run("bn", images=6000)]
    lines = ([batch, *(cell(rows, replace(run, batch=batch)) for run in runs)] for batch in SMALL_BATCHES)
    return table(["batch", "NF, not clipped", "batch-normalised twin"], lines)


def capacity_table(rows: Rows) -> str:
    def size(run: Run) -> list[str]:
        result = rows.get(run)
        return [f"{result.params / 1e6:.2f} M", f"{result.macs / 1e6:.2f} M"] if result else ["", ""]

    deeper = table(
        ["depths", "parameters", "multiply-adds", "accuracy", "accuracy of the first try, width 1, not clipped"],
        ([run.depths, *size(run), cell(rows, run), cell(rows, Run(depths=run.depths))] for run in depths(0)),
    )
    lines = []
    for width in WIDTHS:
        runs = [run for run in dropouts(0) if run.width == width]
        lines.append([width, *size(runs[0]), *(cell(rows, run) for run in runs)])
    header = ["width factor", "parameters", "multiply-adds", *(f"dropout {rate}" for rate in DROPOUTS)]
    return f"{deeper}\n\n{table(header, lines)}"
