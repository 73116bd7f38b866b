"""Time adaptive gradient clipping, and a whole clipped SGD step: ours against timm's function, in one run.

    python -m benchmarks.agc [--repeats 11] [--models nfnet_f0 resnet50 vit_small_patch16_224] [--check]

The floor is one pass that reads parameters and gradients and writes gradients. Gradients are set again before every
run, because clipped gradients do not change a second time. Extra memory is the peak of allocations while clipping,
divided by the memory of the parameters.

With --check the exit code is 1 if nfnet_f0 misses a target: clipping 2x as fast as timm's, a clipped step 2.2x as fast,
at most a quarter of the operations, at most 1 % of extra memory.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import timm
import torch
from rich.console import Console
from rich.table import Table
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.stock import timm_clip

# timm_nf puts a function of its own in the place of timm's.
# isort: split
import timm_nf
from timm_nf._clip_defaults import CLIP_FACTOR
from timm_nf.cli.terminal import track
from timm_nf.inference.bench import peak_memory

SETTINGS = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 2e-5}
TARGETS = {"clip": 2.0, "step": 2.2}
MOST_MEMORY = 0.01
SCALES = {"all units clipped": 1.0, "none clipped": 1e-9}  # factors on gradients from N(0, 1)
Contenders = dict[str, tuple[list[Tensor], Callable[[], object]]]


class CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def one_pass(parameters: list[Tensor]) -> None:
    for p in parameters:
        assert p.grad is not None
        p.grad.add_(p.detach(), alpha=1e-9)


def contenders(name: str) -> Contenders:
    """{label: (parameters, function to time)}; no two share parameters."""
    models = [timm.create_model(name) for _ in range(5)]
    ours, theirs, floor, our_step, their_step = (list(model.parameters()) for model in models)
    agcsgd = create_optimizer_v2(models[3], "agcsgd", clip_factor=CLIP_FACTOR, **SETTINGS)
    sgd = create_optimizer_v2(models[4], "sgd", **SETTINGS)
    return {
        "clip, timm_nf": (ours, lambda: timm_nf.adaptive_clip_grad_(ours, CLIP_FACTOR)),
        "clip, timm": (theirs, lambda: timm_clip(theirs, CLIP_FACTOR)),
        "floor": (floor, lambda: one_pass(floor)),
        "step, timm_nf": (our_step, agcsgd.step),
        "step, timm": (their_step, lambda: (timm_clip(their_step, CLIP_FACTOR), sgd.step())),
    }


class ClipCosts(NamedTuple):
    """What each contender costs, by its label. Operations and memory are those of clipping alone."""

    medians: dict[str, float]  # milliseconds
    operations: dict[str, int]
    memory: dict[str, float]  # share of the parameters


def measure(runs: Contenders, scale: float, repeats: int, title: str) -> ClipCosts:
    """Run all contenders in turn, so that noise affects all of them. The first round is not timed."""
    grads = [scale * torch.randn_like(p) for p in runs["floor"][0]]
    times: dict[str, list[float]] = {label: [] for label in runs}
    operations: dict[str, int] = {}
    memory: dict[str, float] = {}
    for repeat in track(range(repeats + 1), title):
        for label, (parameters, run) in runs.items():
            set_gradients(parameters, grads)
            if repeat > 0:
                start = time.perf_counter()
                run()
                times[label].append(1e3 * (time.perf_counter() - start))
            else:  # this also makes the momentum buffers
                if label.startswith("clip"):
                    memory[label] = peak_memory(run) / sum(p.nbytes for p in parameters)
                    set_gradients(parameters, grads)
                with CountOperations() as counter:
                    run()
                operations[label] = counter.count
            for p in parameters:
                p.grad = None
    return ClipCosts({label: statistics.median(values) for label, values in times.items()}, operations, memory)


def set_gradients(parameters: list[Tensor], grads: list[Tensor]) -> None:
    for p, grad in zip(parameters, grads, strict=True):
        p.grad = grad.clone()


def cells_of(what: str, found: ClipCosts) -> list[str]:
    """The cells of `clip` or `step`, from the third column on."""
    ours, theirs = f"{what}, timm_nf", f"{what}, timm"
    milliseconds = found.medians[ours], found.medians[theirs]
    cells = [what, *(f"{ms:.1f}" for ms in milliseconds), f"{milliseconds[1] / milliseconds[0]:.2f}x"]
    if what == "clip":
        cells.append(f"{found.medians[ours] / found.medians['floor']:.2f}x")
        cells.append(f"{found.operations[ours]} / {found.operations[theirs]}")
        cells.append(f"{found.memory[ours]:.2%} / {found.memory[theirs]:.1%}")
    return cells


def missed_targets(found: ClipCosts) -> Iterator[str]:
    for what, target in TARGETS.items():
        ratio = found.medians[f"{what}, timm"] / found.medians[f"{what}, timm_nf"]
        if ratio < target:
            yield f"{what}: {ratio:.2f}x, target {target}x"
    ours, theirs = (found.operations[f"clip, {whose}"] for whose in ("timm_nf", "timm"))
    if ours > theirs / 4:
        yield f"operations: {ours}, target at most a quarter of {theirs}"
    if (memory := found.memory["clip, timm_nf"]) > MOST_MEMORY:
        yield f"extra memory: {memory:.2%}, target at most {MOST_MEMORY:.0%}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--models", nargs="+", default=["nfnet_f0", "resnet50", "vit_small_patch16_224"])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()

    table = Table(
        "model", "gradients", "what", "timm_nf ms", "timm ms", "ratio", "ours / floor", "operations", "extra memory",
        title="adaptive gradient clipping, medians",
        caption=f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads, cpu, float32",
    )  # fmt: skip
    missed: list[str] = []
    for name in args.models:
        runs = contenders(name)
        for label, scale in SCALES.items():
            found = measure(runs, scale, args.repeats, f"{name}, {label}")
            for what in TARGETS:
                table.add_row(name, label, *cells_of(what, found))
            if name == "nfnet_f0":
                missed += [f"{label}, {target}" for target in missed_targets(found)]
    console = Console(width=140)
    console.print(table)
    for line in missed:
        console.print(f"missed: {line}")
    return int(args.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
