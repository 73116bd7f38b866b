"""Writes docs/tools.md from the probes' answers."""

from collections.abc import Mapping
from pathlib import Path

from timm_nf.env import machine

from .environments import ROOT, Answer
from .probes import PROBES

PAGE = ROOT / "docs" / "tools.md"

TEXT = """\
# In other people's tools

Written by `python -m scripts.check_tools`, all of it by running the tools; edit the scripts, not this page. Each tool
is installed into an environment of its own and given a small NFNet: four blocks with squeeze-excite and standardised
convolutions, skip gains and classifier not 0. Errors are relative L2 errors against the same network in float64, in
eager mode. *as it is*: `timm.create_model(...)` works. *fuse first*: `timm_nf.fuse(model)` works and the network with
standardised weights does not. *not*: neither does.

**A tool that only looks at the weights of `nn.Conv2d` is wrong about standardised weights and says nothing.** It
quantises, prunes or counts what is not yet the weight that convolves. Fuse first for every tool that changes
weights, counts multiply-adds or converts layers: a fused network's weights are those that convolve.

| tool | tried | verdict | measured | version |
| --- | --- | --- | --- | --- |
{rows}

{notes}

{machine}.
"""
NOTES = """\
- **Counting**: thop and ptflops look up layers by their exact type, and a count that leaves out some looks like any
  other. Tell thop the types by `custom_ops`, and take ptflops' backend `aten`. The truth in these rows is the number of
  multiply-adds of the fused network by torch's own `FlopCounterMode`.
- **Strided SAME convolutions** pad by the size of the input, as timm's own do. optimum-quanto puts its own convolution
  in their place, which does not pad: exclude those whose `same_pad` is true.
- **Adapters**: fuse, adapt, train, save the adapter, load it, merge; `examples/peft_lora.py` does it. LoHa, LoKr, OFT
  and IA3 replace the weight that is standardised afterwards, so that scale and mean of what they learned are lost.
- **Pruning**: zeros in a weight that is standardised become the negative mean. Fuse, then prune.
- **int8**: `timm-nf export NAME -o f0.int8.onnx --int8 PICTURES` quantises for onnxruntime and compares; see
  [inference and export](performance.md)."""


def cell(text: str) -> str:
    """Text for a cell of a Markdown table: one line, with `|` escaped."""
    return " ".join(text.split()).replace("|", "\\|")


def row(*cells: str) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(map(cell, cells)) + " |"


def page(answers: Mapping[str, Answer | str], before: str = "") -> str:
    """The whole page.

    Args:
        answers: Answers by the probes' names. A string is the reason why there is no answer.
        before: The old page. Probes without an answer keep their rows of it.
    """
    lines: list[str] = []
    for name, probe in PROBES.items():
        if name not in answers:
            lines += [line for line in before.splitlines() if line.startswith(row(probe.title)[:-1])]
            continue
        answer = answers[name]
        if isinstance(answer, str):
            lines.append(row(probe.title, "-", "-", answer, "-"))
            continue
        lines += [row(probe.title, *found, answer.versions) for found in answer.rows]
    return TEXT.format(rows="\n".join(lines), notes=NOTES, machine=machine())


def write(answers: Mapping[str, Answer | str], file: Path = PAGE) -> None:
    """Write the page. Probes without an answer keep their rows."""
    file.write_text(page(answers, file.read_text() if file.exists() else ""))
