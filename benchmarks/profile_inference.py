"""Profile a fused NFNet-F0 on a CPU: the times of torch's operations, and of oneDNN's operations inside convolutions.

    python -m benchmarks.profile_inference [--batch 1] [--size 192] [--channels-last]

In every call of a convolution, oneDNN copies the weight into its own layout. Without channels_last it copies the
activations too. Compilers with frozen weights and onnxruntime copy the weights once.
"""

import argparse
import subprocess
import sys
from collections import defaultdict

import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import timm_nf
from timm_nf.env import machine
from timm_nf.variants import VARIANTS

RUNS = 10
LINE = "onednn_verbose,"


def network(args: argparse.Namespace) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = timm_nf.fuse(timm.create_model("nfnet_f0").eval()).to(memory_format=layout)
    return model, torch.randn(args.batch, 3, args.size, args.size).to(memory_format=layout)


@torch.no_grad()
def operations(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """torch's operations in a forward pass that take more than 1 % of its time: (name, calls, milliseconds)."""
    model, x = network(args)
    for _ in range(3):
        model(x)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(RUNS):
            model(x)
    rows = [(e.key, e.count / RUNS, e.self_cpu_time_total / RUNS / 1e3) for e in seen.key_averages()]
    total = sum(row[2] for row in rows)
    rows = sorted((row for row in rows if row[2] > 0.01 * total), key=lambda row: -row[2])
    return [(f"`{n}`", f"{calls:.0f}", f"{ms:.1f}") for n, calls, ms in rows] + [("all", "", f"{total:.1f}")]


@torch.no_grad()
def run_under_verbose(args: argparse.Namespace) -> None:
    model, x = network(args)
    for _ in range(3):
        model(x)
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        model(x)


def primitives(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """oneDNN's convolutions and copies in a forward pass, from its own log on stdout: (name, calls, milliseconds)."""
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--inner"], capture_output=True, text=True)
    lines = [line.split(",") for line in done.stdout.splitlines() if line.startswith(LINE) and ",exec," in line]
    if done.returncode or not lines:
        raise RuntimeError(f"oneDNN reported nothing: {done.stderr[-300:]}")
    shapes = {tuple(m.weight.shape) for m in network(args)[0].modules() if isinstance(m, nn.Conv2d)}
    seen: dict[str, list[float]] = defaultdict(list)
    for fields in lines:
        primitive, shape = fields[5], fields[-2]
        if primitive == "reorder":
            sizes = tuple(map(int, shape.split("x")))
            if len(sizes) == 5:  # the weight of a grouped convolution; groups are the first axis
                sizes = (sizes[0] * sizes[1], *sizes[2:])
            primitive = "copies of weights" if sizes in shapes else "copies of activations"
        seen[primitive].append(float(fields[-1]))
    return [(primitive, f"{len(times)}", f"{sum(times):.1f}") for primitive, times in seen.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inner:
        run_under_verbose(args)
        return 0
    layout = "channels_last" if args.channels_last else "contiguous"
    print(f"NFNet-F0 fused, float32, batch {args.batch}, {args.size} px, {layout}: milliseconds of a forward pass\n")
    inside = primitives(args)
    for title, rows in (("torch's operations", operations(args)), ("inside oneDNN", inside)):
        for cells in ((title, "calls", "ms"), ("---", "--:", "--:"), *rows):
            print(f"| {' | '.join(cells)} |")
        print()
    time = next(float(ms) for primitive, _, ms in inside if primitive == "convolution")
    macs = VARIANTS["nfnet_f0"].cfg.count(args.size)[1] * args.batch
    print(f"Convolutions without the copies: {macs / time / 1e6:.0f} G multiply-adds per second.\n\n{machine()}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
