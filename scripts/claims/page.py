"""Writes docs/claims.md and its figures from the rows: what the paper says, what was measured, and the verdicts."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from scripts.claims import grid, parts, signals
from scripts.claims.figures import FIGURES, draw
from scripts.claims.grid import BATCHES, KINDS, LARGEST, SEEDS, SETTINGS, TUNING, Phase, Rows
from scripts.claims.markdown import table
from scripts.claims.rule import MARGIN
from scripts.claims.training import Run

# The commit that added plan.md. It is not read from git, since a copy of the repository may have no history.
PLAN_COMMIT = "33620fcb2bdd6da695608aa4f52ddd1ae5c6f352"

LOSS = {"training loss": ("loss", 3)}
SHIFT = {"share of means": ("mean_shift", 2)}
VERDICTS = ("holds", "does not hold", "not decided", "not run yet")

INTRODUCTION = """\
# The paper's claims, re-run

`make claims` makes the runs and writes this page from [claims/runs.csv](claims/runs.csv). Do not edit it.

The networks of arXiv:2102.06171 were trained on ImageNet for 90 to 360 epochs. These have 0.13 M parameters. They see
Fashion-MNIST for ten epochs, which are 140 steps at batch 4096. What holds here supports a claim. What does not may be
due to the scale.

[claims/plan.md](claims/plan.md) has the networks, the data, the rule and its power. It was committed before its runs,
as {commit}. Parts, runs and the order of runs are those of that commit.

- A claim has several parts. Each compares two networks or settings. The *twin* is the same network with batch
  normalisation.
- The difference of a part is in points of test accuracy, paired by seed, with its 95 % t interval.
- The words beside it say all that holds: *above* 0, *below* 0, *within {margin:g} point* of 0. Two of them can hold. If
  only this is known, it is *loses less than {margin:g} point*. Where nothing holds, it is *open*.
- A part is decided when all its runs are there. `make claims` goes on where it stopped.
- Tables have means ± standard deviations over the seeds. Chance is 10 %. A run that diverges ends there.
- `make claims-quick` decides three parts in minutes, with small runs of its own.
"""

MEASURED = """\
Relative L2 distances between the logits of 128 test images: in training mode and in test mode, and in training mode
with other images in the batch (median over runs that trained, and the largest). The share of means is that of squared
channel means in the second moment behind the blocks. There are no verdicts: these are measured in every run."""

GAINS_SPARED = """\
## After the plan: skip gains that are not clipped

These runs were chosen after the results were seen, so they decide nothing. Skip gains start at 0, and are clipped like
everything else. What if they are spared, beside the classifier's weight? Batch {batch}, {setting}.

{table}

Spared minus clipped, paired by seed: {numbers}.
"""

LAYERS_AT_LINEAR = """\
## After the plan: one part clipped or spared, at the linear rule

These runs were chosen after the results were seen, so they decide nothing. The plan took {base}, the smallest rate at
which only the clipped network trains with the seed that chooses. With the seeds that decide, the network without
clipping reached {nothing} % there.

Here the rate is that of the linear rule. Batch {batch}, {setting}, three seeds.

{table}
"""

FIRST = """\
## The first experiment

{runs} runs of an earlier experiment are in the CSV as plan 1. Its comparison with a batch-normalised twin was unfair:
the twin's branches started at full strength, where those of the normalizer-free network start at zero, as does
large-batch practice (arXiv:1706.02677, section 5.1). At batch 4096, in 28 steps, that twin reached {twin}, so that
clipping seemed to win at large batches. Every verdict of that experiment about a twin at batch 1024 and above is
withdrawn. It also had three seeds, a rule that could not find "as good", and parts that were chosen after results were
seen. Its rows decide nothing here. The plan took the spread of paired differences from them.
"""


def spread(values: Iterable[float], digits: int = 1) -> str:
    """The mean ± the standard deviation."""
    values = list(values)
    if len(values) < 2:
        return "".join(f"{value:.{digits}f} (one seed)" for value in values)
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def cell(rows: Rows, setting: Run, value: str = "accuracy", digits: int = 1) -> str:
    """The cell for the seeds that decide. It is empty if there are no rows."""
    found = [rows[run] for run in grid.over(SEEDS, [setting]) if run in rows]
    return spread((getattr(result, value) for result in found), digits) + (
        f" ({len(found)} seeds)" if 1 < len(found) < 3 else ""
    )


def seed_by_seed(rows: Rows, setting: Run, seeds: Sequence[int]) -> str:
    """The accuracies, one for each seed. Every run must have its row."""
    return ", ".join(single(rows, run) for run in grid.over(seeds, [setting]))


def single(rows: Rows, run: Run) -> str:
    """The cell for one run."""
    return f"{rows[run].accuracy:.1f}" if run in rows else ""


def setting_text(run: Run) -> str:
    return f"rate {run.lr:g}" + (f", factor {run.factor:g}" if run.clip != "none" else "")


def batch_tables(rows: Rows) -> str:
    texts = []
    for name, choose in SETTINGS.items():
        lines = []
        for batch in BATCHES:
            chosen = [choose(rows, kind, batch) for kind in KINDS]
            tuned = all(run in rows for kind in KINDS for run in grid.tuning(rows, kind, batch))
            cells = (f"{cell(rows, run)} ({setting_text(run)})" if cell(rows, run) and tuned else "" for run in chosen)
            lines.append([batch, *cells])
        title = "At the best of the three rates:" if name == "best" else "At the linear rule:"
        texts.append(f"{title}\n\n{table(['batch', *KINDS], lines)}")
    lines = [
        [batch, kind, setting_text(run), single(rows, run)]
        for batch in BATCHES
        for kind in KINDS
        for run in grid.tuning(rows, kind, batch)
        if run in rows
    ]
    if lines:
        texts.append(f"What chose them, seed {TUNING}:\n\n{table(['batch', 'network', 'setting', 'accuracy'], lines)}")
    return "\n\n".join(texts)


def factor_table(rows: Rows) -> str:
    lines = []
    for batch in (grid.SMALLEST, LARGEST):
        lines += [[batch, run.factor, cell(rows, run)] for run in grid.crossed(rows, batch) if cell(rows, run)]
    return table(["batch", "factor", "accuracy"], lines) if lines else ""


def layer_table(rows: Rows) -> str:
    lines = [[name, cell(rows, run)] for name, run in grid.layers(rows).items() if cell(rows, run)]
    base = grid.layers_base(rows)
    return f"Batch {LARGEST}, {setting_text(base)}.\n\n{table(['clipped', 'accuracy'], lines)}" if lines else ""


def good_range(rows: Rows, clip: str) -> str:
    """The range of the thresholds whose accuracy is within two points of the best."""
    runs = [run for run in grid.thresholds(rows, clip) if run in rows]
    best = max(rows[run].accuracy for run in runs)
    good = [run.factor for run in runs if rows[run].accuracy > best - 2]
    return f"{min(good):g} to {max(good):g}"


def norm_table(rows: Rows) -> str:
    lines = []
    for clip in grid.GRIDS:
        runs = grid.thresholds(rows, clip)
        if all(run in rows for run in runs):
            values = ", ".join(f"{run.factor:g}: {single(rows, run)}" for run in runs)
            lines.append([clip, values, good_range(rows, clip), cell(rows, grid.norms(rows)[clip])])
    header = ["norm of", f"threshold: accuracy, seed {TUNING}", "within 2 points of its best", "accuracy at the best"]
    return table(header, lines) if lines else ""


def small_batch_table(rows: Rows) -> str:
    lines = []
    for batch in grid.SMALL_BATCHES:
        chosen = [grid.small_best(rows, net, batch) for net in grid.SMALL_NETS]
        if any(cell(rows, run) for run in chosen):
            lines.append([batch, *(f"{cell(rows, run)} (rate {run.lr:.2g})" for run in chosen)])
    return table(["batch", "NF, not clipped", "twin"], lines) if lines else ""


def size_table(rows: Rows, settings: dict[str, Run], measured: Mapping[str, tuple[str, int]] = {}) -> str:
    """A table of networks; `measured` has the heading, the name and the digits of further results."""
    lines = []
    for name, run in settings.items():
        if text := cell(rows, run):
            result = next(rows[each] for each in grid.over(SEEDS, [run]) if each in rows)
            more = (cell(rows, run, value, digits) for value, digits in measured.values())
            lines.append([name, f"{result.params / 1e6:.2f} M", f"{result.macs / 1e6:.2f} M", *more, text])
    header = ["network", "parameters", "multiply-adds", *measured, "accuracy"]
    return table(header, lines) if lines else ""


def depth_settings() -> dict[str, Run]:
    return {f"depths {run.depths}": run for run in grid.deeper()}


def dropout_settings() -> dict[str, Run]:
    return {f"width {width:.2f}, dropout {run.dropout:g}": run for width in grid.WIDTHS for run in grid.dropouts(width)}


def regularisation_settings() -> dict[str, Run]:
    runs = {
        f"{name}, stochastic depth {run.drop_path:g}": run
        for net, name in (("nf", "NF"), ("bn-zero", "twin"))
        for run in grid.drop_paths(net)
    }
    return runs | {"NF, plain weights": grid.without_standardisation()}


def capacity_tables(rows: Rows) -> str:
    found = [size_table(rows, depth_settings()), size_table(rows, dropout_settings(), LOSS)]
    return "\n\n".join(filter(None, found))


class Claim(NamedTuple):
    paper: str
    here: str
    table: Callable[[Rows], str]


CLAIMS = dict(
    zip(
        parts.CLAIMS,
        (
            Claim(
                "Sections 3 and 4.1, figure 2a: not clipped, NF-ResNets do worse than batch-normalised ones at batch "
                "4096. Clipped, they train up to there as well or better. At small batch sizes clipping helps less.",
                "Every kind of network at the linear rule and at its own best rate.",
                batch_tables,
            ),
            Claim(
                "Sections 4 and 4.1, figure 2b: of 0.01 to 0.16, larger batch sizes need smaller factors to be stable.",
                "The factors that were chosen at both ends at the linear rule, each at both batch sizes.",
                factor_table,
            ),
            Claim(
                "Section 4.1: not clipping the classifier's weight is always better. The first convolution may often "
                "be left out too. All four stages have to be clipped for stability at batch 4096.",
                "A rate at which clipping everything trains and clipping nothing does not. One part at a time is "
                "spared, or clipped alone.",
                layer_table,
            ),
            Claim(
                "Section 4: unit-wise clipping does better than layer-wise. One norm of all gradients allows larger "
                "batches than none, but its threshold has to be tuned finely.",
                "Batch 4096 and the linear rule, each kind at its best threshold. The range of good thresholds is "
                "measured with one seed and gets no verdict.",
                norm_table,
            ),
            Claim(
                "Sections 1 and 3: batch-normalised networks do badly when batches are too small. NF-ResNets do "
                "significantly better there.",
                "The first 3000 images of a fixed order, three epochs, nothing is clipped. Rates are the best of 1, 4 "
                "and 16 times the linear rule.",
                small_batch_table,
            ),
            Claim(
                "Section 5: the third of the four stages tends to be the best place to add capacity. Larger networks "
                "are given more dropout, as they overfit otherwise.",
                "Depth: four more blocks in one stage, at equal cost, batch 256, two epochs, clip factor 0.16. "
                "Dropout: 6000 images, 20 epochs, batch 64.",
                capacity_tables,
            ),
            Claim(
                "Section 3 and arXiv:2101.08692: stochastic depth stands in for a regularisation that batch "
                "normalisation gives. Standardised weights keep the means of activations from growing.",
                "6000 images, 20 epochs, batch 64, two blocks a stage. The share of means is that of squared channel "
                "means in the second moment behind the blocks.",
                lambda rows: size_table(rows, regularisation_settings(), LOSS | SHIFT),
            ),
        ),
        strict=True,
    )
)


def measured_table(rows: Rows) -> str:
    """A table of what every run measured, by kind of network."""
    names = {"nf": "NF", "nf-plain": "NF, plain weights", "bn-zero": "twin", "bn": "twin of plan 1"}
    lines = []
    for net, name in names.items():
        found = [result for run, result in rows.items() if run.plan == 2 and run.net == net]
        trained = [result for result in found if not math.isnan(result.mode_gap)]
        if trained:
            largest = [max(getattr(result, value) for result in trained) for value in ("mode_gap", "mates_gap")]
            medians = [statistics.median(getattr(r, value) for r in trained) for value in ("mode_gap", "mates_gap")]
            shift = spread((result.mean_shift for result in trained), 2)
            both = (f"{middle:.1e}, at most {most:.1e}" for middle, most in zip(medians, largest, strict=True))
            lines.append([name, len(trained), *both, shift])
    header = [
        "network", "runs", "training mode against test mode", "other images in the batch", "share of means",
    ]  # fmt: skip
    return table(header, lines) if lines else ""


def gains_spared(rows: Rows) -> str:
    """The section about skip gains that are not clipped. It is empty if runs are missing."""
    spared, clipped = grid.without_gains(rows), grid.at_best(rows, grid.CLIPPED, LARGEST)
    twin = grid.at_best(rows, grid.TWIN, LARGEST)
    part = parts.Part("", "better", [spared], [clipped])
    if any(run not in rows for run in [*part.runs, *grid.over(SEEDS, [twin])]):
        return ""
    settings = {"clipped": clipped, "clipped, but not the skip gains": spared, "twin": twin}
    shown = table(["network", "accuracy"], [[name, cell(rows, run)] for name, run in settings.items()])
    return GAINS_SPARED.format(batch=LARGEST, setting=setting_text(clipped), table=shown, numbers=part.numbers(rows))


def layers_at_linear(rows: Rows) -> str:
    """The section about what has to be clipped at the linear rule. It is empty if runs are missing."""
    settings, nothing = grid.layers_at_linear(rows), grid.layers(rows)["nothing"]
    if any(run not in rows for run in [*grid.over(grid.FEWER, settings.values()), *grid.over(SEEDS, [nothing])]):
        return ""
    lines = []
    for name, run in settings.items():
        values = [rows[each].accuracy for each in grid.over(grid.FEWER, [run])]  # some settings have more seeds
        lines.append([name, spread(values), seed_by_seed(rows, run, grid.FEWER)])
    return LAYERS_AT_LINEAR.format(
        base=f"rate {nothing.lr:g}",
        nothing=seed_by_seed(rows, nothing, SEEDS),
        batch=LARGEST,
        setting=setting_text(settings["everything"]),
        table=table(["clipped", "accuracy", "seed by seed"], lines),
    )


def state(rows: Rows, phases: Iterable[Phase]) -> str:
    """How many runs of the plan are done, their time, and on which machine."""
    planned = grid.planned(rows, list(phases))
    made = {run: rows[run] for run in planned if run in rows}
    count = f"- Runs: {len(made)} of {'about ' * (len(made) < len(planned))}{len(planned)}, in the plan's order."
    if not made:
        return f"{count} `make claims` begins them."
    machines = "; ".join(sorted({result.machine for result in made.values()}))
    hours = sum(result.seconds for result in made.values()) / 3600
    return f"{count} Processor time: {hours:.1f} hours. Machine: {machines} a run."


def page(rows: Rows, commit: str, about_signals: str = "") -> str:
    """The page in Markdown. All its numbers and verdicts follow from the rows.

    Args:
        rows: The rows of both experiments.
        commit: The commit that added the plan.
        about_signals: The section that scripts/claims/signals.py writes.
    """
    lines = [INTRODUCTION.format(commit=commit, margin=MARGIN) + state(rows, grid.PHASES), ""]
    found = {
        title: [(part.statement, *part.verdict(rows)) for part in say(rows)] for title, say in parts.CLAIMS.items()
    }
    counts = []
    for index, (title, verdicts) in enumerate(found.items(), 1):
        of_each = Counter(verdict.partition(":")[0].strip("*") for *_, verdict in verdicts)
        counts.append([index, title, *map(of_each.get, VERDICTS)])
    lines += [table(["", "claim", *VERDICTS], counts), ""]
    summary = [[index, *verdict] for index, title in enumerate(found, 1) for verdict in found[title]]
    lines.append(table(["claim", "part", "difference, points", "verdict"], summary))
    for index, (title, claim) in enumerate(CLAIMS.items(), 1):
        lines += ["", f"## {index}. {title}", "", f"The paper: {claim.paper}", "", f"Here: {claim.here}"]
        name, figure = list(FIGURES.items())[index - 1]
        if figure.ready(rows):
            lines += ["", f"![{title}](claims/{index}_{name}.png)", "", figure.caption]
        if text := claim.table(rows):
            lines += ["", text]
    lines += ["", "## Training and test, and independence of examples", ""]
    lines += [MEASURED, "", measured_table(rows) or "Not run yet.", ""]
    if about_signals:
        lines.append(about_signals)
    lines += filter(None, (gains_spared(rows), layers_at_linear(rows)))
    first = {run: result for run, result in rows.items() if run.plan == 1}
    twin = Run(1, "bn", width=1.0, batch=LARGEST, lr=1.6, epochs=2)
    reached = spread([first[replace(twin, seed=seed)].accuracy for seed in range(3)])
    return "\n".join(lines) + "\n" + FIRST.format(runs=len(first), twin=f"{reached} %")


def write_page(rows: Rows, folder: Path) -> None:
    """Write docs/claims.md, and the figures that have rows into `folder`."""
    (folder.parent / "claims.md").write_text(page(rows, PLAN_COMMIT, signals.section(folder)))
    for index, (name, figure) in enumerate(FIGURES.items(), 1):
        file: Any = folder / f"{index}_{name}.png"
        if figure.ready(rows):
            draw(rows, figure, file)
        else:
            file.unlink(missing_ok=True)
