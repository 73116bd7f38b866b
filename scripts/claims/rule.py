"""The rule that decides: differences paired by seed, t intervals, two one-sided tests, missing seeds."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from scipy.stats import t as student

MARGIN = 1.0  # difference in points of accuracy that "as good" and "changes little" allow
TRAINED = 50.0  # accuracy in %. A network below it has not trained, and a comparison with it says nothing
LIMIT = 1000  # the largest number of missing seeds that is computed
TRUE = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)  # the simulated differences, in points
Statement = Literal["better", "as good", "little"]
Outcome = Literal["holds", "does not hold", "not decided"]


@cache
def quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t distribution."""
    return float(student.ppf(probability, freedom))


@dataclass(frozen=True)
class Differences:
    """The mean, the standard deviation and the number of differences a - b in points, one for each seed."""

    mean: float
    spread: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Differences":
        return cls(statistics.fmean(values), statistics.stdev(values), len(values))

    def interval(self, probability: float) -> tuple[float, float]:
        """The two-sided t interval for the true difference."""
        half = quantile((1 + probability) / 2, self.seeds - 1) * self.spread / math.sqrt(self.seeds)
        return self.mean - half, self.mean + half

    @property
    def better(self) -> bool:
        """Whether the 95 % interval is above 0."""
        return self.interval(0.95)[0] > 0

    @property
    def worse(self) -> bool:
        """Whether the 95 % interval is below 0."""
        return self.interval(0.95)[1] < 0

    @property
    def as_good(self) -> bool:
        """Whether a one-sided test at 5 % rejects a loss of `MARGIN`."""
        return self.interval(0.9)[0] > -MARGIN

    @property
    def little(self) -> bool:
        """Whether both one-sided tests at 5 % reject a difference of `MARGIN`."""
        return self.as_good and self.interval(0.9)[1] < MARGIN

    @property
    def found(self) -> str:
        """All findings about the difference, in words."""
        facts = {
            "above": self.better,
            "below": self.worse,
            f"within {MARGIN:g} point": self.little,
            f"loses less than {MARGIN:g} point": self.as_good and not self.better and not self.little,
        }
        return " and ".join(fact for fact, true in facts.items() if true) or "open"


def decide(statement: Statement, d: Differences) -> Outcome:
    """Decide a statement about a compared with b.

    better: holds above 0 by the 95 % interval. Does not hold below 0, or within the margin and not above 0.
    as good: holds if a loss of the margin is rejected. Does not hold if less than such a loss is rejected.
    little: holds if both one-sided tests reject the margin. Does not hold if the 90 % interval is beyond it.
    """
    low, high = d.interval(0.9)
    holds, fails = {
        "better": (d.better, d.worse or d.little),
        "as good": (d.as_good, high < -MARGIN),
        "little": (d.little, low > MARGIN or high < -MARGIN),
    }[statement]
    if holds:
        return "holds"
    return "does not hold" if fails else "not decided"


def seeds_to_decide(statement: Statement, d: Differences) -> int | None:
    """The smallest number of seeds that decides, if mean and spread stay as they are; None above `LIMIT`."""
    numbers = range(d.seeds, LIMIT + 1)
    return next((n for n in numbers if decide(statement, Differences(d.mean, d.spread, n)) != "not decided"), None)


def simulate(statement: Statement, true: float, spread: float, seeds: int, times: int = 1000) -> dict[Outcome, float]:
    """How often each outcome occurs for a known true difference. Differences are normal, the generator is fixed."""
    drawn = np.random.default_rng(0).normal(true, spread, (times, seeds))
    means, spreads = drawn.mean(1), drawn.std(1, ddof=1)
    outcomes = [decide(statement, Differences(float(m), float(s), seeds)) for m, s in zip(means, spreads, strict=True)]
    kinds: tuple[Outcome, ...] = ("holds", "does not hold", "not decided")
    return {kind: outcomes.count(kind) / times for kind in kinds}


def power_table(spreads: dict[str, float], table: Callable[..., str]) -> str:
    """Simulated outcomes at true differences of 0, 0.5, 1 and 2 points in both directions, as Markdown.

    Args:
        spreads: The standard deviation of paired differences in points, by where it was measured.
        table: The function that writes a Markdown table.
    """
    lines = []
    statements: tuple[Statement, ...] = ("better", "as good", "little")
    for where, spread in spreads.items():
        for seeds in (3, 5):
            for statement in statements:
                rates = [simulate(statement, true, spread, seeds) for true in TRUE]
                shown = [f"{100 * r['holds']:.0f} / {100 * r['does not hold']:.0f}" for r in rates]
                lines.append([f"{where}: {spread:.1f}", seeds, statement, *shown])
    header = ["spread of differences, points", "seeds", "statement", *(f"{true:g}" for true in TRUE)]
    return table(header, lines)
