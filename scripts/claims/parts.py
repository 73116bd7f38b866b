"""Splits each claim into parts. A part is a statement about differences between settings, which the rule decides."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from scripts.claims import grid
from scripts.claims.grid import (
    BATCHES,
    CLIPPED,
    DEPTHS,
    FEWER,
    FROM,
    LARGEST,
    PARTS,
    PLAIN,
    SEEDS,
    SETTINGS,
    SMALL_BATCHES,
    SMALLEST,
    TWIN,
    WIDTHS,
    Rows,
)
from scripts.claims.rule import TRAINED, Differences, Statement, decide, seeds_to_decide
from scripts.claims.training import Run


@dataclass(frozen=True)
class Part:
    """A statement about the sum of some settings' accuracies minus the sum of others, paired by seed.

    Attributes:
        statement: The statement in words.
        kind: Which of the rule's three kinds of statements it is.
        above: Settings whose accuracies are added.
        below: Settings whose accuracies are subtracted.
        seeds: The seeds of every setting.
        tuning: The runs that choose the settings. They are made first.
        reference: A setting that must have trained. Otherwise the part says nothing.
    """

    statement: str
    kind: Statement
    above: Sequence[Run]
    below: Sequence[Run]
    seeds: Sequence[int] = SEEDS
    tuning: Sequence[Run] = field(default=())
    reference: Run | None = None

    @property
    def runs(self) -> list[Run]:
        """All runs that the part needs."""
        return list(dict.fromkeys([*self.tuning, *grid.over(self.seeds, [*self.above, *self.below])]))

    def differences(self, rows: Rows) -> Differences:
        """The differences, one for each seed. Every run must have its row."""

        def total(settings: Sequence[Run], seed: int) -> float:
            return sum(rows[replace(run, seed=seed)].accuracy for run in settings)

        return Differences.of([total(self.above, seed) - total(self.below, seed) for seed in self.seeds])

    def numbers(self, rows: Rows) -> str:
        """The mean difference, its 95 % interval, and all that the rule finds. Every run must have its row."""
        d = self.differences(rows)
        low, high = d.interval(0.95)
        return f"{d.mean:+.2f} ({low:+.2f} to {high:+.2f}), {d.found}"

    def verdict(self, rows: Rows) -> tuple[str, str]:
        """The numbers, and whether the part holds."""
        if list(self.above) == list(self.below):
            return "", "not decided: both are the same setting"
        made = sum(run in rows for run in self.runs)
        if made < len(self.runs):
            return "", f"not run yet: {made} of {len(self.runs)} runs"
        numbers, d = self.numbers(rows), self.differences(rows)
        if self.reference and grid.mean(rows, self.reference, self.seeds) < TRAINED:
            return numbers, "not decided: the reference has not trained"
        outcome = decide(self.kind, d)
        if outcome != "not decided":
            return numbers, f"**{outcome}**"
        needed = seeds_to_decide(self.kind, d)
        return numbers, f"not decided: {needed or 'more than 1000'} seeds would, if mean and spread stay"


def batch_sizes(rows: Rows) -> list[Part]:
    found = []
    for setting, choose in SETTINGS.items():
        where = "best rates" if setting == "best" else "linear rule"
        for batch in BATCHES:
            seeds = grid.seeds_of(batch)
            tuning = [run for kind in grid.KINDS for run in grid.tuning(rows, kind, batch)]
            runs = {kind: choose(rows, kind, batch) for kind in grid.KINDS}
            clipped, plain, twin = ([runs[kind]] for kind in (CLIPPED, PLAIN, TWIN))

            def part(
                text: str, kind: Statement, above: list[Run], below: list[Run], reference: Run | None = None,
                head: str = f"{where}, batch {batch}: ", seeds: Sequence[int] = seeds, tuning: list[Run] = tuning,
            ) -> Part:  # fmt: skip
                return Part(head + text, kind, above, below, seeds, tuning, reference)

            found.append(part("clipped is as good as the twin", "as good", clipped, twin, twin[0]))
            if batch == SMALLEST:
                found.append(part("clipping changes little", "little", clipped, plain, plain[0]))
            if batch >= FROM:
                found.append(part("unclipped is below the twin", "better", twin, plain))
                found.append(part("unclipped is below clipped", "better", clipped, plain))
            if batch in (FROM, LARGEST):
                small = {kind: choose(rows, kind, SMALLEST) for kind in (CLIPPED, PLAIN)}
                more = [run for kind in grid.KINDS for run in grid.tuning(rows, kind, SMALLEST)]
                found.append(
                    part(
                        f"clipping helps more than at batch {SMALLEST}", "better", [*clipped, small[PLAIN]],
                        [*plain, small[CLIPPED]], tuning=[*tuning, *more],
                    )
                )  # fmt: skip
    strong = replace(grid.at_linear(rows, TWIN, LARGEST), net="bn")
    text = f"linear rule, batch {LARGEST}: a twin whose branches start at zero is better than one at full strength"
    return [*found, Part(text, "better", [grid.at_linear(rows, TWIN, LARGEST)], [strong], FEWER)]


def clip_factors(rows: Rows) -> list[Part]:
    tuning = [run for batch in (SMALLEST, LARGEST) for run in grid.clipped_at_linear(batch)]
    (small_large, large_large), (small_small, large_small) = (grid.crossed(rows, b) for b in (LARGEST, SMALLEST))
    small, large = small_large.factor, large_large.factor
    return [
        Part(
            f"batch {LARGEST}: the smaller one of the two factors chosen, {small:g}, is better than {large:g}",
            "better", [small_large], [large_large], tuning=tuning,
        ),
        Part(
            f"batch {SMALLEST}: the larger one, {large:g}, is better than {small:g}",
            "better", [large_small], [small_small], tuning=tuning,
        ),
    ]  # fmt: skip


def layers(rows: Rows) -> list[Part]:
    tuning = [run for kind in (CLIPPED, PLAIN) for run in grid.tuning(rows, kind, LARGEST)]
    runs = grid.layers(rows)
    everything = runs["everything"]
    head, stem, *stages = PARTS

    def part(text: str, kind: Statement, above: str, below: str, seeds: Sequence[int] = FEWER) -> Part:
        return Part(text, kind, [runs[above]], [runs[below]], seeds, tuning, everything if kind != "better" else None)

    return [
        part("clipping everything trains where clipping nothing does not", "better", "everything", "nothing"),
        part(f"sparing {head} is better", "better", f"all but {head}", "everything", SEEDS),
        part(f"sparing {head} is as good", "as good", f"all but {head}", "everything", SEEDS),
        part(f"sparing {stem} is as good", "as good", f"all but {stem}", "everything"),
        *(
            part(f"{name} has to be clipped: sparing it is worse", "better", "everything", f"all but {name}")
            for name in stages
        ),
        *(
            part(f"clipping {name} alone is as good as everything", "as good", f"{name} alone", "everything")
            for name in PARTS
        ),
    ]  # fmt: skip


def norms(rows: Rows) -> list[Part]:
    runs = grid.norms(rows)
    others = {"layer": "layer-wise", "global": "one norm for all"}
    return [
        Part(f"unit-wise is better than {text}", "better", [runs["unit"]], [runs[clip]],
             tuning=[*grid.thresholds(rows, "unit"), *grid.thresholds(rows, clip)])
        for clip, text in others.items()
    ]  # fmt: skip


def small_batches(rows: Rows) -> list[Part]:
    tuning = {(net, b): grid.small_tuning(net, b) for net in ("nf", "bn-zero") for b in SMALL_BATCHES}
    best = {(net, b): [grid.small_best(rows, net, b)] for net, b in tuning}
    least, most = SMALL_BATCHES[0], SMALL_BATCHES[-1]

    def part(text: str, kind: Statement, above: tuple[str, int], below: tuple[str, int]) -> Part:
        return Part(text, kind, best[above], best[below], tuning=[*tuning[above], *tuning[below]])

    return [
        *(part(f"batch {b}: NF is better than the twin", "better", ("nf", b), ("bn-zero", b)) for b in SMALL_BATCHES),
        part(f"from batch {most} to {least} the twin loses", "better", ("bn-zero", most), ("bn-zero", least)),
        part(f"from batch {most} to {least} NF loses no point", "as good", ("nf", least), ("nf", most)),
    ]


def capacity(rows: Rows) -> list[Part]:
    deeper = dict(zip(DEPTHS, grid.deeper(), strict=True))
    third = deeper.pop(DEPTHS[2])
    small, large = (grid.dropouts(width) for width in WIDTHS)
    return [
        *(Part(f"depth {DEPTHS[2]} is better than {d}", "better", [third], [run]) for d, run in deeper.items()),
        Part("dropout 0.5 helps the larger network more", "better", [large[2], small[0]], [large[0], small[2]]),
        Part("dropout 0.25 is better than none in the larger network", "better", [large[1]], [large[0]]),
    ]


def regularisation(rows: Rows) -> list[Part]:
    (nf, nf_dropped), (twin, twin_dropped) = grid.drop_paths("nf"), grid.drop_paths("bn-zero")
    return [
        Part("stochastic depth is better than none", "better", [nf_dropped], [nf]),
        Part("it helps NF more than the twin", "better", [nf_dropped, twin], [nf, twin_dropped]),
        Part("standardised weights are better than plain ones", "better", [nf], [grid.without_standardisation()]),
    ]


def quick(rows: Rows) -> list[Part]:
    """The three parts of `make claims-quick`."""
    runs = {name: [run] for name, run in grid.QUICK_RUNS.items()}
    head = f"batch {grid.QUICK.batch}, rate {grid.QUICK.lr}: "
    return [
        Part(f"{head}unclipped is below clipped", "better", runs[CLIPPED], runs[PLAIN], FEWER),
        Part(f"{head}unclipped is below the twin", "better", runs[TWIN], runs[PLAIN], FEWER),
        Part(f"{head}factor 0.01 is better than 0.16", "better", runs[CLIPPED], runs["clipped at 0.16"], FEWER),
    ]


CLAIMS: dict[str, Callable[[Rows], list[Part]]] = {
    "Clipping keeps networks without normalisation training at large batch sizes": batch_sizes,
    "The larger the batch, the smaller the best clip factor": clip_factors,
    "What has to be clipped": layers,
    "Unit-wise norms do better than layer-wise ones": norms,
    "Batch-normalised networks lose accuracy at small batch sizes": small_batches,
    "Depth belongs in the third stage, and dropout grows with the model": capacity,
    "Stochastic depth and weight standardisation": regularisation,
}
