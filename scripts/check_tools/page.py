"""Writes docs/tools.md from the probes' answers."""

import re
from collections.abc import Mapping
from pathlib import Path

from .environments import ROOT, Answer
from .probes import PROBES

PAGE = ROOT / "docs" / "tools.md"

TEXT = """\
# In other people's tools

Written by `python -m scripts.check_tools`, which runs the tools; edit the scripts, not this page. Each tool is
installed into an environment of its own. It gets a small NFNet: four blocks with squeeze-excite and standardised
convolutions, whose skip gains and classifier are not 0. Errors are relative L2 errors against the same network in
float64, in eager mode. The verdicts:

- *as it is*: the network of `timm.create_model(...)` works.
- *fuse first*: that of `timm_nf.fuse(model)` works, the other does not.
- *not*: neither works.

**A tool that only looks at the weights of `nn.Conv2d` is silently wrong about standardised weights.** It quantises,
prunes or counts the parameter, which is not the weight that convolves. In a fused network it is. So fuse first for
every tool that changes weights, counts multiply-adds or converts layers.

| tool | tried | verdict | measured | version |
| --- | --- | --- | --- | --- |
{rows}

{notes}

Measured with:

{machines}
"""
NOTES = """\
- **Counting**: thop and ptflops look up layers by their exact type. They leave out layers that they do not know,
  without a word. Tell thop the types by `custom_ops`, and take ptflops' backend `aten`. 100 % in these rows is the
  number of multiply-adds of the fused network by torch's own `FlopCounterMode`.
- **Strided SAME convolutions** pad by the size of the input, as timm's own do. optimum-quanto replaces them by its own
  convolution, which does not pad. Exclude those whose `same_pad` is true.
- **nncf** compiles a C++ extension in the first call, and stops after 60 seconds by default. This row was measured with
  a limit of 10 minutes.
- **Adapters**: fuse, adapt, train, save the adapter, load it, merge, as in [Adapters with PEFT](guides/adapters.md).
  LoHa, LoKr, OFT and IA3 change the weight before it is standardised, so the scale and the mean of what they learned
  are lost. LoRA does the same to a linear layer with a standardised weight.
- **coremltools** has no `var_mean`, which an exported program of standardised weights holds. Fuse first, or trace.
- **Pruning**: zeros in a weight that is standardised become the negative mean. Fuse, then prune.
- **int8**: `timm-nf export NAME -o f0.int8.onnx --int8 PICTURES` quantises for onnxruntime and compares; see
  [export and deployment](guides/export.md#int8)."""


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
    return TEXT.format(rows="\n".join(lines), notes=NOTES, machines=_machines(answers, before))


def _machines(answers: Mapping[str, Answer | str], before: str) -> str:
    """One line for each machine, with its tools. Tools without an answer keep the machine of the old page."""
    machines: dict[str, str] = {}
    for where, titles in re.findall(r"^- (timm_nf .+?): (.+)$", before, re.MULTILINE):
        machines |= dict.fromkeys(titles.split(", "), where)
    machines |= {PROBES[name].title: found.machine for name, found in answers.items() if isinstance(found, Answer)}
    tools: dict[str, list[str]] = {}
    for title in dict.fromkeys(probe.title for probe in PROBES.values()):
        if title in machines:
            tools.setdefault(machines[title], []).append(title)
    return "\n".join(f"- {where}: {', '.join(titles)}" for where, titles in tools.items())


def write(answers: Mapping[str, Answer | str], file: Path = PAGE) -> None:
    """Write the page. Probes without an answer keep their rows."""
    file.write_text(page(answers, file.read_text(encoding="utf-8") if file.exists() else ""), encoding="utf-8")
