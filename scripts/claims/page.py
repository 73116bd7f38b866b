"""docs/claims.md: what the paper says, what was measured, and the verdicts."""

from collections.abc import Callable
from typing import NamedTuple

from scripts.claims import report
from scripts.claims.grid import SEEDS, Rows, plan
from scripts.claims.report import FLOOR, LITTLE, SPREADS, TRAINED, VERDICTS, Part

INTRODUCTION = """\
# The paper's claims, re-run

Written by `python -m scripts.claims --report` from [claims/runs.csv](claims/runs.csv), which
`python -m scripts.claims` fills. Do not edit.

The networks of arXiv:2102.06171 were trained on ImageNet for 90 to 360 epochs. These are small ones on Fashion-MNIST
for two: what holds here supports a claim, what does not may be due to the scale.

- Data: Fashion-MNIST padded to 32 x 32, no augmentation; Debian's package `dataset-fashion-mnist`, or a download.
- Network: the row of `dm_nf_resnet50` with one block a stage and 48, 96, 192, 384 channels; 0.29 M parameters,
  1.1 M multiply-adds. Its shortcuts average-pool, unlike that row's. The other sizes, of claim 6, are in its tables.
- The batch-normalised twin: the same row with bias-free convolutions followed by BatchNorm2d; alpha, beta and the skip
  gains are 1. It is never clipped.
- Training: SGD, Nesterov momentum 0.9, peak learning rate 0.1 * batch / 256, warmup over a quarter of the steps, then
  a cosine to 0; weight decay 2e-5 but not on gains and biases; label smoothing 0.1; float32. 2 epochs of all 60 000
  images where nothing else is said: 468 steps at batch 256, 28 at batch 4096.
- Accuracy: of the 10 000 test images after the last step, mean ± standard deviation over the seeds. A run ends where
  its loss leaves the finite numbers, mostly at the chance level of 10 %.
- Chosen after results were seen, so weaker evidence than the rest: average-pooled shortcuts, after strided ones had
  trained badly in one run (the cause was not tested); both parts of claim 5 about going from batch 16 to 4; factors and
  thresholds below the paper's 0.01, as the best lay at the edge, where that of layers still does; dropout at batch
  64, after three of six networks diverged at batch 256, whose six rows were removed; depths with clipping and at width
  x 5/6, after one of twelve networks had diverged without and one had 0.60 M parameters (the last column of claim 6;
  their rows are in the CSV); that being as good as a twin that has not trained decides nothing; the margin in *as
  good* and *little*.
- Best clip factors and thresholds are chosen on the seeds that are reported, which favours them a little.
- What the paper says is retold from the sections named."""

RULE = f"""\
**Rule.** One mean is above another if it is so by more than {SPREADS} standard errors of their difference. A standard
deviation below {FLOOR} points counts as {FLOOR}: the test images alone give 0.3, and a few seeds may agree by chance.
*As good* and *little* allow {LITTLE:g} point: by the same three standard errors, no more than that may be lost. A part
holds if it is so by this rule, does not hold if the opposite is, and is not decided here otherwise, or with fewer than
two seeds, or if what it should be as good as has not trained (below {TRAINED:g} %).

`make claims-quick` re-runs the first rows with one seed and compares them with these, in minutes: each has to be within
{SPREADS} standard deviations (at least {FLOOR} points each) of the mean.
"""


# the verdicts of one part and of several
COUNTED = {
    1: ("**holds**", "**hold**"),
    -1: ("**does not hold**", "**do not hold**"),
    0: ("is not decided here", "are not decided here"),
}


class Claim(NamedTuple):
    name: str  # key of claims_figures.ABOUT
    title: str
    paper: str
    measured: str
    parts: Callable[[Rows], list[Part]]
    table: Callable[[Rows], str]


CLAIMS = (
    Claim(
        "batch_size",
        "Clipping keeps networks without normalisation training at large batch sizes",
        "Sections 3 and 4.1, figure 2a: not clipped, NF-ResNets do worse than batch-normalised ones at batch 4096, "
        "with adaptive clipping they train up to there as well or better. At small batch sizes it helps less.",
        "Clipped means at the clip factor with the highest mean at that batch size, in bold. An epoch has 29 steps at "
        "batch 2048 and 14 at batch 4096.",
        report.batch_size_parts,
        report.clip_factor_table,
    ),
    Claim(
        "clip_factor",
        "The larger the batch, the smaller the best clip factor",
        "Sections 4 and 4.1, figure 2b: of 0.01 to 0.16, larger batch sizes need smaller clip factors to be stable.",
        "The table is that of claim 1. Compared are the two ends; the factors in between are in bold there.",
        report.clip_factor_parts,
        lambda rows: "",
    ),
    Claim(
        "layers",
        "What has to be clipped",
        "Section 4.1: not clipping the classifier's weight is always better; the first convolution may often be left "
        "out too; all four stages have to be clipped for stability at batch 4096.",
        "Batch 4096, the paper's clip factor 0.01. From the third line on the classifier's weight is spared as well.",
        report.layer_parts,
        report.layer_table,
    ),
    Claim(
        "norms",
        "Unit-wise norms do better than layer-wise ones",
        "Section 4: unit-wise clipping does better than layer-wise. Clipping by one norm of all gradients allows "
        "larger batches than none, but its threshold has to be tuned finely for depth, batch and learning rate.",
        "Batch 4096, each kind at the threshold with the highest mean, in bold. All spare the classifier's weight, the "
        "one norm too. The paper does not compare that one with unit-wise norms at the best of each; this page does.",
        report.norm_parts,
        report.norm_table,
    ),
    Claim(
        "small_batches",
        "Batch-normalised networks lose accuracy at small batch sizes",
        "Sections 1 and 3: batch-normalised networks do badly when batches are too small; NF-ResNets do significantly "
        "better there.",
        "The first 6000 images of a fixed order, nothing is clipped.",
        report.small_batch_parts,
        report.small_batch_table,
    ),
    Claim(
        "capacity",
        "Depth belongs in the third stage, and dropout grows with the model",
        "Section 5: the third of the four stages tends to be the best place to add capacity; larger networks are given "
        "more dropout, as they overfit otherwise.",
        "Depth: two blocks are added to one stage at batch 256; as every stage has half the resolution and twice the "
        "channels of the one before, they cost the same in all. Width x 5/6, clip factor 0.16. Dropout: 6000 images, "
        "10 epochs, batch 64, two widths, not clipped.",
        report.capacity_parts,
        report.capacity_table,
    ),
)


def page(rows: Rows) -> str:
    """The Markdown text; rows decide every number and verdict in it."""
    planned = plan()
    made = [rows[run] for run in planned if run in rows]
    machines = "; ".join(sorted({result.machine for result in made}))
    hours = sum(result.seconds for result in made) / 3600
    state = (
        f"Runs: {len(made)} of {len(planned)}, {len(SEEDS)} seeds. Machine: {machines} a run, two at a time on two "
        f"cores, {hours:.1f} hours of processor time, so half of that on the clock."
    )
    lines = [INTRODUCTION, f"- {state}\n", RULE]
    parts = [(index, part) for index, claim in enumerate(CLAIMS, 1) for part in claim.parts(rows)]
    summary = ((index, part.statement, part.numbers, VERDICTS[part.verdict]) for index, part in parts)
    lines.append(report.table(["claim", "part", "measured, %", "verdict"], summary))
    for index, claim in enumerate(CLAIMS, 1):
        found = [part.verdict for at, part in parts if at == index]
        verdict = ", ".join(
            f"{found.count(value)} {words[found.count(value) > 1]}"
            for value, words in COUNTED.items()
            if value in found
        )
        lines += ["", f"## {index}. {claim.title}", "", f"The paper: {claim.paper}", "", f"Here: {claim.measured}"]
        lines += ["", f"Of {len(found)} parts, {verdict}.", ""]
        lines += [f"![{claim.title}](claims/{index}_{claim.name}.png)"]
        lines += ["", table] if (table := claim.table(rows)) else []
    return "\n".join(lines) + "\n"
