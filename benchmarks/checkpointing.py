"""What gradient checkpointing costs and saves: peak memory and time of a training step, with and without, in one run.

    python -m benchmarks.checkpointing [--model nfnet_f0] [--batch 8] [--repeats 5]

The two take turns, so that noise affects both. Times are medians. Peak memory is what a step on the CPU allocates in
addition to parameters, gradients and momentum.
"""

import argparse
import statistics

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import timm_nf  # noqa: F401  registers networks and optimizers
from timm_nf.cli.terminal import track
from timm_nf.env import machine
from timm_nf.inference.bench import Work, peak_memory, time_in_turn
from timm_nf.variants import VARIANTS


def training_step(name: str, batch: int, bfloat16: bool, checkpointing: bool) -> Work:
    torch.manual_seed(0)
    model = timm.create_model(name).train()
    model.set_grad_checkpointing(checkpointing)
    size = VARIANTS[name].train_size
    images, labels = torch.randn(batch, 3, size, size), torch.arange(batch)
    optimizer = timm.optim.create_optimizer_v2(model, "agcsgd", lr=1e-4, momentum=0.9, weight_decay=2e-5)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # gradients stay allocated, so the peak does not include them

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nfnet_f0", choices=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    title = f"{args.model}, training step, batch {args.batch}, {VARIANTS[args.model].train_size} px"
    table = Table("precision", "checkpointing", "peak memory", "time", title=title)
    for precision in ("float32", "bfloat16 autocast"):
        bfloat16 = precision != "float32"
        steps = {label: training_step(args.model, args.batch, bfloat16, label == "on") for label in ("off", "on")}
        times = time_in_turn(steps, args.repeats, progress=track)
        medians = {label: statistics.median(values) for label, values in times.items()}
        peaks = {label: peak_memory(step) / 2**20 for label, step in steps.items()}
        for label in steps:
            memory, time = peaks[label] / peaks["off"], medians[label] / medians["off"]
            cells = f"{peaks[label]:.0f} MiB ({memory:.2f}x)", f"{medians[label]:.0f} ms ({time:.2f}x)"
            table.add_row(precision, label, *cells)
    console = Console(width=120)
    console.print(table)
    console.print(machine())


if __name__ == "__main__":
    main()
