"""Write docs/comparison.md, which compares timm_nf with other implementations of NFNets and adaptive clipping.

    python -m scripts.comparison

The other packages are installed into environments in a temporary folder, which is removed. Each package runs in its own
process and gets the same arrays. If a package does not install or does not run, the page says so.

This takes minutes and much memory. The packages are timed in turn, so six processes hold F0's parameters and gradients
at once.
"""

import functools
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks import differences
from scripts.comparison import measure  # before timm_nf, so that stock timm is measured as it is
from scripts.comparison.features import COLUMNS, rows
from scripts.comparison.peers import PEERS, THREADS, Absent, PeerError, Worker, how_installed, install
from timm_nf.env import machine

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "comparison.md"
T0 = {"depths": (1, 2, 1, 1), "channels": (32, 64, 96, 96), "group_size": 8, "num_classes": 10}

track = functools.partial(track, console=Console(stderr=True))


def table(header: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(
        "| " + " | ".join(" ".join(str(c).split()).replace("|", "\\|") for c in row) + " |" for row in lines
    )


def start(folder: Path) -> dict[str, Any]:
    """Start a process for every package. If a package does not install, its answers are the reason."""
    peers: dict[str, Any] = {}
    for title, peer in track(PEERS.items(), "installing"):
        try:
            peers[title] = Worker(peer, install(peer, folder))
        except PeerError as error:
            peers[title] = Absent(str(error))
    return peers


def known() -> dict[str, dict[str, str]]:
    """The cells of the first table that benchmarks/differences.py measures."""
    return {
        "classifier": {"timm_nf": differences.bias_is_clipped("ours"), "timm": differences.bias_is_clipped("timm")},
        "decayed_gains": {
            "timm_nf": differences.decayed_gains("agcsgd", "nfnet_f0"),
            "timm": differences.decayed_gains("sgd", "dm_nfnet_f0"),
        },
    }


def page(peers: dict[str, Any], folder: Path) -> str:
    """The text of docs/comparison.md."""
    installed = [
        [title, getattr(peers[title], "reason", None) or "yes", how_installed(peer)] for title, peer in PEERS.items()
    ]
    installed.insert(
        2, ["authors' code", "not a package", "its numbers are tests/golden, computed by running nfnets/ at f5de0ede"]
    )
    checkpoint = {"file": str(ROOT / "tests" / "golden" / "T0_haiku_plain.npz"), "overrides": T0}
    features = rows(peers, known(), {"authors_checkpoint": checkpoint}, track)
    clipped = {title: measure.clip_errors(peer, folder) for title, peer in track(peers.items(), "clipping")}
    steps = []
    for title, peer in track(peers.items(), "three steps of F0"):
        try:
            steps.append([title, *measure.three_steps(peer, folder)])
        except PeerError as error:
            steps.append([title, *[str(error)] * len(measure.TYPES)])
    forward = measure.forward_rows(peers, folder)
    standardised = measure.standardisation_rows(peers, folder)
    times = measure.clip_times(peers, folder)
    return PAGE_TEXT.format(
        installed=table(["package", "installed", "how"], installed),
        features=table(["", *COLUMNS, "how obtained"], features),
        clipped=table(["", *clipped], zip(measure.clip_cases(), *clipped.values(), strict=True)),
        steps=table(["", *measure.TYPES], steps),
        times=table(["", "every unit clipped", "no unit clipped", "called"], times),
        forward=table(["network", "golden", "relative L2 error", "how obtained"], forward),
        standardised=table(["layer", "relative L2 error"], standardised),
        machine=machine(),
        differences=differences.table(),
        repeats=measure.REPEATS,
    )


PAGE_TEXT = """\
# Beside other packages

Written by `python -m scripts.comparison`; edit the script, not this page. The page puts this package beside timm, the
authors' code and four others. Every table comes from one run. *L2 error* is the norm of the difference over the norm of
what is expected. If a cell begins with *fails* or *did not install*, the rest of it is the last line of the error.

## Beside timm, in short

{differences}

The last row is the network that is not fused. [Fused](performance.md), it takes less time.

## Features

The rows hold for the versions in the first row. The last column says how a row was obtained: *tried*, *counted* and
*metadata* come from running the package, *read* from its source in that version.

{features}

## One step of clipping

Every package clips the same parameters and gradients (clip factor 0.01, eps 1e-3). The reference is the paper's formula
in float64 NumPy (`clip_reference` in scripts/comparison/measure.py). Cells are relative L2 errors of the clipped
gradient: 1e+00 means that all of it is wrong. Packages on torch get PyTorch's layout. optax gets the authors' layout:
kernels HWIO, linear layers IO, gains as vectors.

{clipped}

The sources of the packages explain the differences:

- The paper treats a gain as one unit. timm stores gains as (O, 1, 1, 1), and most packages take each entry of such a
  tensor for a unit of its own. optax and the authors store gains as vectors.
- nfnets-pytorch takes the norm of a weight with two axes over axis 0. The authors do so too, for weights stored as
  (in, out), but PyTorch stores (out, in). The only such weight in an NFNet is the classifier's, which is not clipped.
- composer has no eps. If a unit's weight is zero, its gradient becomes zero, and the unit never moves.
- nfnets-pytorch holds eps in float32.
- Norms rounded to float16, and squares that overflow, become infinite. The clipped gradient is then zero.

## Three steps of F0 against the authors' numbers

The reference is the golden run (tests/golden/README.md: float64, Nesterov momentum, clip factor 0.01). Here our network
takes three steps of torch's SGD. Before each step the package clips every gradient but that of the classifier's weight.
Cells are relative L2 errors of what the three steps changed, in the three entries of every tensor that the golden file
holds.

{steps}

## Time to clip F0's gradients

{times}

float32, 71.5 million parameters, medians of {repeats} runs. The packages take turns, each in its own process, with a
pause before every run. The ratio in brackets is to timm_nf's time. Restoring the gradients before a run is not counted.
On the CPU; {machine}.

## Networks against the authors' logits

Synthetic parameters, one image of 64 x 64 pixels, float64, relative L2 error of the logits.

{forward}

The network of nfnets-pytorch is a different one (models/resnet.py): its beta is the same for all blocks, its shortcuts
convolve the input before the activation, a plain ReLU follows the stem, and no activation precedes the pooling.

The next table compares the standardised weights of one convolution (64, 32, 3, 3) with the authors' formula in float64.
The weights are read from the layers' answers to unit impulses.

{standardised}

nfnets-pytorch's `WSConv2d` takes the number of all entries for the fan-in. The authors take that of one output.

## How the packages were run

The other packages are installed into environments of their own, which are deleted afterwards. They run as processes
over the same arrays.

{installed}
"""


def main() -> None:
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as name:
        peers = start(Path(name))
        try:
            text = page(peers, Path(name))
        finally:
            for peer in peers.values():
                peer.close()
    PAGE.write_text(text)
    Console(stderr=True).print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
