"""Time weight standardisation over all weights of NFNet-F0: ours against timm's batch_norm route, in one run.

Then 1-d and 3-d layers beside torch's plain ones, which is what standardising costs there.

    python -m benchmarks.weights [--repeats 15] [--check]

With --check the exit code is 1 if ours is less than 1.5 times as fast in the forward pass, or slower in forward and
backward pass together.
"""

import argparse
import statistics
import sys
import time

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import timm_nf
from benchmarks.stock import timm_route
from timm_nf.cli.terminal import track
from timm_nf.layers import ScaledStdConv1d, ScaledStdConv2d, ScaledStdConv3d

BOUNDS = {"forward, no grad": 1.5, "forward": 1.5, "forward + backward": 1.0}


LAYERS = {
    "1-d, 256 channels, kernel 5, batch 2 x 512": (ScaledStdConv1d, nn.Conv1d, (256, 256, 5), (2, 256, 512)),
    "3-d, 64 channels, kernel 3, batch 2 x 8 x 14 x 14": (ScaledStdConv3d, nn.Conv3d, (64, 64, 3), (2, 64, 8, 14, 14)),
}


def layer_times(repeats: int) -> Table:
    """Forward and backward of one layer, ours and torch's in turn."""
    table = Table("milliseconds, median", "timm_nf", "torch, plain", "ratio", title="one layer, forward and backward")
    for name, (ours, plain, sizes, shape) in LAYERS.items():
        layers, x = (
            (ours(*sizes, padding="same"), plain(*sizes, padding="same")),
            torch.randn(shape, requires_grad=True),
        )
        times: list[list[float]] = [[], []]
        for _ in range(repeats + 1):
            for layer, found in zip(layers, times, strict=True):
                start = time.perf_counter()
                layer(x).sum().backward()
                found.append(1e3 * (time.perf_counter() - start))
        mine, theirs = (statistics.median(found[1:]) for found in times)  # the first call chooses kernels
        table.add_row(name, f"{mine:.2f}", f"{theirs:.2f}", f"{mine / theirs:.2f}x")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()

    convs = [m for m in timm.create_model("nfnet_f0").modules() if isinstance(m, ScaledStdConv2d)]
    pairs = [(m.weight, m.gain, torch.randn_like(m.weight)) for m in convs]
    routes = {"timm_nf": timm_nf.standardize_weight, "timm": timm_route}

    def run(route: str, passes: str) -> float:
        start = time.perf_counter()
        with torch.set_grad_enabled(passes != "forward, no grad"):
            for weight, gain, grad in pairs:
                out = routes[route](weight, gain)
                if passes == "forward + backward":
                    torch.autograd.grad(out, (weight, gain), grad)
        return 1e3 * (time.perf_counter() - start)

    times: dict[tuple[str, str], list[float]] = {(route, passes): [] for passes in BOUNDS for route in routes}
    for _ in track(range(args.repeats), "repeats"):
        for route, passes in times:  # in turn, so that noise affects both routes
            times[route, passes].append(run(route, passes))

    table = Table(
        "milliseconds, median", *routes, "ratio", "asked",
        title=f"weight standardisation, {len(pairs)} weights, {sum(w.numel() for w, *_ in pairs) / 1e6:.1f} M values",
        caption=f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads, cpu, float32",
    )  # fmt: skip
    missed = False
    for passes, bound in BOUNDS.items():
        ours, theirs = (statistics.median(times[route, passes]) for route in routes)
        missed |= theirs / ours < bound
        table.add_row(passes, f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}x", f"{bound}x")
    Console().print(table)
    Console().print(layer_times(args.repeats))
    return int(args.check and missed)


if __name__ == "__main__":
    sys.exit(main())
