"""Lists the runs in phases, the most important first. docs/claims/plan.md says what each is for."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from scripts.claims.rule import TRAINED
from scripts.claims.training import STAGES, Result, Run
from timm_nf._clip_defaults import CLIP_FACTOR

Rows = dict[Run, Result]

SEEDS = (0, 1, 2, 3, 4)
FEWER = SEEDS[:3]  # for settings that would take too long with five seeds
TUNING = 100  # the runs of this seed choose rates and factors. They decide no claim.
RATES = (0.1, 0.4, 1.6)  # peak learning rates, the same three at every batch size
FACTORS = (0.0025, 0.01, 0.04, 0.16)
SMALLEST, LARGEST = 256, 4096
BATCHES = (256, 512, 1024, 2048, LARGEST)
FROM = 1024  # the paper says: from this batch size on, networks without clipping fail
SMALL_BATCHES = (2, 4, 8, 16)
SMALL_NETS = ("nf", "bn-zero")
SMALL_RATES = (1, 4, 16)  # times the rate of the linear rule, which is very low for small batches
GRIDS = {
    "unit": (0.000625, 0.0025, 0.01, 0.04, 0.16),
    "layer": (0.000625, 0.0025, 0.01, 0.04, 0.16),
    "global": (0.004, 0.016, 0.064, 0.256, 1.024),
}
RATIO = 4  # between two neighbours in a grid
MORE = 2  # number of points by which a grid is extended, if its best is at an end
HEAD = "head.fc.weight"
GAINS = " ".join(f"{stage}0.skipinit_gain" for stage in STAGES)
PARTS = {"the classifier's weight": HEAD, "the first convolution": "stem."} | {
    f"stage {i}": stage for i, stage in enumerate(STAGES, 1)
}
DEPTHS = ("5-1-1-1", "1-5-1-1", "1-1-5-1", "1-1-1-5")
WIDTHS = (2 / 3, 4 / 3)
DROPOUTS = (0.0, 0.25, 0.5)
DROP_PATHS = (0.0, 0.25)
OVERFIT = Run(batch=64, lr=0.025, images=6000, epochs=20)  # few images, each seen many times
TWIN, PLAIN, CLIPPED = "twin", "unclipped", "clipped"
KINDS = (TWIN, PLAIN, CLIPPED)


def linear(batch: int) -> float:
    """The peak learning rate by the paper's linear rule."""
    return 0.1 * batch / 256


def highest(rows: Rows, candidates: Iterable[Run]) -> Run:
    """The candidate with the highest accuracy, or the first of several. If a row is missing, the first candidate."""
    candidates = list(candidates)
    if any(run not in rows for run in candidates):
        return candidates[0]
    return max(candidates, key=lambda run: rows[run].accuracy)


def over(seeds: Sequence[int], runs: Iterable[Run]) -> list[Run]:
    """Every run with every seed, seed by seed."""
    runs = list(dict.fromkeys(runs))
    return [replace(run, seed=seed) for seed in seeds for run in runs]


def mean(rows: Rows, setting: Run, seeds: Sequence[int]) -> float:
    """The mean accuracy over the seeds in %."""
    return statistics.fmean(rows[replace(setting, seed=seed)].accuracy for seed in seeds)


# -- batch sizes -------------------------------------------------------------------------------------------------------


def clipped_at_linear(batch: int) -> list[Run]:
    """Runs for tuning: all clip factors at the rate of the linear rule, the paper's factor first."""
    factors = sorted(FACTORS, key=lambda factor: factor != CLIP_FACTOR)
    return [Run(clip="unit", factor=f, batch=batch, lr=linear(batch), seed=TUNING) for f in factors]


def tuning(rows: Rows, kind: str, batch: int) -> list[Run]:
    """All runs that choose the setting of a kind of network. Those at the rate of the linear rule come first."""
    if kind == CLIPPED:
        first = clipped_at_linear(batch)
        best = highest(rows, first)
        return [*first, *(replace(best, lr=lr) for lr in RATES if lr != best.lr)]
    base = Run(2, "bn-zero" if kind == TWIN else "nf", batch=batch, lr=linear(batch), seed=TUNING)
    return [base, *(replace(base, lr=lr) for lr in RATES if lr != base.lr)]


def at_linear(rows: Rows, kind: str, batch: int) -> Run:
    """The setting at the rate of the linear rule. A clipped network has its best factor at this rate."""
    return highest(rows, clipped_at_linear(batch)) if kind == CLIPPED else tuning(rows, kind, batch)[0]


def at_best(rows: Rows, kind: str, batch: int) -> Run:
    """The setting at the best of the three rates. The linear rule's rate is only a candidate if it is one of them."""
    return highest(rows, [run for run in tuning(rows, kind, batch) if run.lr in RATES])


SETTINGS: dict[str, Callable[[Rows, str, int], Run]] = {"best": at_best, "linear": at_linear}


def seeds_of(batch: int) -> tuple[int, ...]:
    return SEEDS if batch in (SMALLEST, FROM, LARGEST) else FEWER


def tune(batch: int) -> Callable[[Rows], list[Run]]:
    return lambda rows: [run for kind in (CLIPPED, TWIN, PLAIN) for run in tuning(rows, kind, batch)]


def compare(batch: int, setting: str) -> Callable[[Rows], list[Run]]:
    """Runs that decide: the three kinds of networks, at one of the settings."""
    return lambda rows: over(seeds_of(batch), (SETTINGS[setting](rows, kind, batch) for kind in KINDS))


def full_strength(rows: Rows) -> list[Run]:
    """The batch-normalised twin whose branches start at full strength, as in plan 1, at the largest batch size."""
    return over(FEWER, [replace(at_linear(rows, TWIN, LARGEST), net="bn")])


def crossed(rows: Rows, batch: int) -> tuple[Run, Run]:
    """At one batch size and the linear rule: the smaller and the larger of the factors chosen at both ends."""
    factors = sorted(at_linear(rows, CLIPPED, end).factor for end in (SMALLEST, LARGEST))
    smaller, larger = (replace(at_linear(rows, CLIPPED, batch), factor=factor) for factor in factors)
    return smaller, larger


# -- what is clipped, and how ------------------------------------------------------------------------------------------


def layers_base(rows: Rows) -> Run:
    """Batch 4096, its chosen factor, and the smallest rate at which only the clipped network trains."""
    factor = at_linear(rows, CLIPPED, LARGEST).factor
    for lr in RATES:
        clipped = Run(clip="unit", factor=factor, batch=LARGEST, lr=lr, seed=TUNING)
        pair = (rows.get(clipped), rows.get(Run(batch=LARGEST, lr=lr, seed=TUNING)))
        if None not in pair and pair[0].accuracy > TRAINED > pair[1].accuracy:  # type: ignore[union-attr]
            return clipped
    return Run(clip="unit", factor=factor, batch=LARGEST, lr=linear(LARGEST), seed=TUNING)


def layers(rows: Rows, base: Run | None = None) -> dict[str, Run]:
    """Each choice of clipped layers, in words, with its run. All else is as in the base, by default the plan's."""
    base = replace(base or layers_base(rows), spared="")
    return {
        "everything": base,
        "nothing": replace(base, clip="none", factor=0.0, spared=HEAD),
        **{f"all but {part}": replace(base, spared=name) for part, name in PARTS.items()},
        **{f"{part} alone": replace(base, alone=name) for part, name in PARTS.items()},
    }


def classifier(rows: Rows) -> list[Run]:
    """Runs with everything clipped, and with all but the classifier's weight clipped, for all seeds."""
    chosen = layers(rows)
    return over(SEEDS, [chosen["everything"], chosen[f"all but {next(iter(PARTS))}"]])


def thresholds(rows: Rows, clip: str) -> list[Run]:
    """Runs that tune a kind of clipping, at batch 4096 and the linear rule. The grid grows until its best is inside."""
    grid = [Run(clip=clip, factor=f, batch=LARGEST, lr=linear(LARGEST), seed=TUNING) for f in GRIDS[clip]]
    for _ in range(MORE):
        best = highest(rows, grid)
        if any(run not in rows for run in grid) or best not in (grid[0], grid[-1]):
            break
        if best == grid[0]:
            grid.insert(0, replace(best, factor=best.factor / RATIO))
        else:
            grid.append(replace(best, factor=best.factor * RATIO))
    return grid


def norms(rows: Rows) -> dict[str, Run]:
    """Each kind of clipping, at its best threshold."""
    return {clip: highest(rows, thresholds(rows, clip)) for clip in GRIDS}


# -- few images --------------------------------------------------------------------------------------------------------


def small_tuning(net: str, batch: int) -> list[Run]:
    base = Run(2, net, batch=batch, images=3000, epochs=3, seed=TUNING)
    return [replace(base, lr=times * linear(batch)) for times in SMALL_RATES]


def small_best(rows: Rows, net: str, batch: int) -> Run:
    return highest(rows, small_tuning(net, batch))


def small_batch_tuning(rows: Rows) -> list[Run]:
    return [run for batch in SMALL_BATCHES[::-1] for net in SMALL_NETS for run in small_tuning(net, batch)]


def small_batches(rows: Rows) -> list[Run]:
    return over(SEEDS, (small_best(rows, net, batch) for batch in SMALL_BATCHES[::-1] for net in SMALL_NETS))


def dropouts(width: float) -> list[Run]:
    return [replace(OVERFIT, width=width, dropout=rate) for rate in DROPOUTS]


def drop_paths(net: str) -> list[Run]:
    return [replace(OVERFIT, net=net, depths="2-2-2-2", drop_path=rate) for rate in DROP_PATHS]


def without_standardisation() -> Run:
    return replace(drop_paths("nf")[0], net="nf-plain")


def regularisation(rows: Rows) -> list[Run]:
    return over(SEEDS, [*drop_paths("nf"), *drop_paths("bn-zero"), without_standardisation()])


def deeper() -> list[Run]:
    """Four more blocks in one stage, clipped by the largest factor."""
    return [Run(depths=depths, clip="unit", factor=max(FACTORS), epochs=2) for depths in DEPTHS]


# -- all of it ---------------------------------------------------------------------------------------------------------


class Phase(NamedTuple):
    """Runs that are made before the next phase begins. The results of the first may add more."""

    name: str
    runs: Callable[[Rows], list[Run]]


PHASES = (
    Phase("batch 4096: tuning", tune(LARGEST)),
    Phase("batch 4096: best rates", compare(LARGEST, "best")),
    Phase("small batches: tuning", small_batch_tuning),
    Phase("small batches", small_batches),
    Phase("stochastic depth, weight standardisation", regularisation),
    Phase("batch 256: tuning", tune(SMALLEST)),
    Phase("batch 256: best rates", compare(SMALLEST, "best")),
    Phase("batch 4096: the linear rule", compare(LARGEST, "linear")),
    Phase("batch 4096: one part clipped or spared", lambda rows: over(FEWER, layers(rows).values())),
    Phase("batch 1024: tuning", tune(FROM)),
    Phase("batch 1024: best rates", compare(FROM, "best")),
    Phase("dropout and width", lambda rows: over(SEEDS, (run for width in WIDTHS for run in dropouts(width)))),
    Phase("batch 256: the linear rule", compare(SMALLEST, "linear")),
    Phase("clip factors crossed", lambda rows: over(SEEDS, [*crossed(rows, LARGEST), *crossed(rows, SMALLEST)])),
    Phase("unit, layer, global: tuning", lambda rows: [run for clip in GRIDS for run in thresholds(rows, clip)]),
    Phase("unit, layer, global", lambda rows: over(SEEDS, norms(rows).values())),
    Phase("the classifier's weight", classifier),
    Phase("batch 1024: the linear rule", compare(FROM, "linear")),
    Phase("depth by stage", lambda rows: over(SEEDS, deeper())),
    Phase("the twin of plan 1", full_strength),
    Phase("batch 2048: tuning", tune(2048)),
    Phase("batch 2048: best rates", compare(2048, "best")),
    Phase("batch 2048: the linear rule", compare(2048, "linear")),
    Phase("batch 512: tuning", tune(512)),
    Phase("batch 512: best rates", compare(512, "best")),
    Phase("batch 512: the linear rule", compare(512, "linear")),
)  # fmt: skip


def without_gains(rows: Rows) -> Run:
    """The clipped network at the largest batch size and its best rate, but its skip gains are not clipped."""
    return replace(at_best(rows, CLIPPED, LARGEST), spared=f"{HEAD} {GAINS}")


def layers_at_linear(rows: Rows) -> dict[str, Run]:
    """Each choice of clipped layers at the rate of the linear rule."""
    return layers(rows, at_linear(rows, CLIPPED, LARGEST))


# They were chosen after the results were seen, so they decide nothing.
EXPLORED = (
    Phase("after the plan: skip gains are not clipped", lambda rows: over(SEEDS, [without_gains(rows)])),
    Phase(
        "after the plan: one part at the linear rule", lambda rows: over(FEWER, layers_at_linear(rows).values())
    ),
)  # fmt: skip


def planned(rows: Rows, phases: Sequence[Phase] = PHASES) -> list[Run]:
    """All runs in their order, each once. A setting that is not chosen yet is counted as its first candidate."""
    return list(dict.fromkeys(run for phase in phases for run in phase.runs(rows)))


def next_runs(rows: Rows, phases: Sequence[Phase] = PHASES) -> tuple[str, list[Run]]:
    """The name of the first phase that lacks runs, and these runs. At the end both are empty."""
    for phase in phases:
        if missing := [run for run in dict.fromkeys(phase.runs(rows)) if run not in rows]:
            return phase.name, missing
    return "", []


QUICK = Run(batch=512, lr=0.8, images=6000, epochs=10)
QUICK_RUNS = {
    PLAIN: QUICK,
    CLIPPED: replace(QUICK, clip="unit", factor=CLIP_FACTOR),
    "clipped at 0.16": replace(QUICK, clip="unit", factor=0.16),
    TWIN: replace(QUICK, net="bn-zero"),
}
QUICK_PHASES = (Phase("three parts, three seeds", lambda rows: over(FEWER, QUICK_RUNS.values())),)


def cost(run: Run) -> float:
    """Expected processor time in seconds. It grows with the number of images and with the number of steps."""
    blocks = sum(map(int, run.depths.split("-")))
    each = 0.00022 * (1 + 0.15 * (blocks - 4)) * (1 if run.width < 1 else 2.2)
    passed = run.images * run.epochs
    return 3 + each * passed + 0.012 * passed / run.batch


def paired_spread(rows: Rows, batch: int) -> float:
    """Plan 1's standard deviation of paired differences: the root mean square over pairs of settings that trained."""
    by_setting: dict[Run, dict[int, float]] = {}
    for run, result in rows.items():
        if (run.plan, run.batch, run.depths, run.images) == (1, batch, "1-1-1-1", 60000):
            by_setting.setdefault(replace(run, seed=0), {})[run.seed] = result.accuracy
    trained = [found for found in by_setting.values() if min(found.values()) > TRAINED]
    spreads = [
        statistics.stdev(a[seed] - b[seed] for seed in a.keys() & b.keys())
        for i, a in enumerate(trained)
        for b in trained[:i]
    ]
    return statistics.fmean(spread**2 for spread in spreads) ** 0.5
