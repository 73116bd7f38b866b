"""Which runs scripts/claims makes, and in which order."""

from collections.abc import Iterable

from scripts.claims.training import STAGES, Result, Run
from timm_nf._clip_defaults import CLIP_FACTOR

SEEDS = (0, 1, 2)
FACTORS = (0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)  # the paper's five, and three below
PAPER = CLIP_FACTOR  # at batch 4096
LARGEST = 4096
BATCHES = (256, 512, 1024, 2048, LARGEST)
SMALL_BATCHES = (4, 8, 16)
THRESHOLDS = {"unit": FACTORS, "layer": FACTORS, "global": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)}
DEPTHS = ("3-1-1-1", "1-3-1-1", "1-1-3-1", "1-1-1-3")
DEPTH_WIDTH = 5 / 6  # 40 to 320 channels: 0.2 to 0.42 M parameters, and still the same cost in every stage
WIDTHS = (0.85, 1.3)  # 0.2 and 0.5 M parameters
DROPOUTS = (0.0, 0.25, 0.5)
HEAD, STEM = "head.fc.weight", "stem."
SPARED = {
    "nothing": "",
    "classifier's weight": HEAD,
    "and first convolution": f"{HEAD} {STEM}",
    **{f"and stage {i}": f"{HEAD} {stage}" for i, stage in enumerate(STAGES, 1)},
}

Rows = dict[Run, Result]


def batch_sizes(batches: Iterable[int], seed: int) -> list[Run]:
    """Claim 1, without those that claim 2 has."""
    return [Run(net, batch=batch, seed=seed) for batch in batches for net in ("nf", "bn")]


def clip_factors(batches: Iterable[int], seed: int) -> list[Run]:
    """Claim 2."""
    return [Run(clip="unit", factor=factor, batch=batch, seed=seed) for batch in batches for factor in FACTORS]


def layers(seed: int) -> list[Run]:
    """Claim 3."""
    return [Run(clip="unit", factor=PAPER, spared=spared, batch=LARGEST, seed=seed) for spared in SPARED.values()]


def norms(clip: str, seed: int) -> list[Run]:
    """Claim 4: all thresholds of a kind of clipping."""
    return [Run(clip=clip, factor=factor, batch=LARGEST, seed=seed) for factor in THRESHOLDS[clip]]


def small_batches(seed: int) -> list[Run]:
    """Claim 5."""
    return [Run(net, batch=batch, images=6000, seed=seed) for batch in SMALL_BATCHES for net in ("nf", "bn")]


def depths(seed: int) -> list[Run]:
    """Claim 6, the first half; clipped, as the paper's networks are, at the best factor of this batch size."""
    return [Run(depths=depths, width=DEPTH_WIDTH, clip="unit", factor=max(FACTORS), seed=seed) for depths in DEPTHS]


def dropouts(seed: int) -> list[Run]:
    """Claim 6, the second half; few images many times, as dropout is against overfitting, at a batch that is stable."""
    return [
        Run(width=width, dropout=dropout, batch=64, images=6000, epochs=10, seed=seed)
        for width in WIDTHS
        for dropout in DROPOUTS
    ]


def quick() -> list[Run]:
    """The first rows of claims 1 and 2 that show them: the smallest and the largest batch."""
    return batch_sizes((BATCHES[0], LARGEST), 0) + clip_factors([LARGEST], 0)


def plan() -> list[Run]:
    """All runs in their order, each once."""
    parts = (
        lambda seed: batch_sizes(BATCHES, seed) + clip_factors(BATCHES, seed),
        layers,
        small_batches,
        lambda seed: [run for clip in THRESHOLDS for run in norms(clip, seed)],
        depths,
        dropouts,
    )
    return list(dict.fromkeys(run for part in parts for seed in SEEDS for run in part(seed)))
