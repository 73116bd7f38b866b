"""Time ours beside timm's on an accelerator, in one run, with events of the device.

    python -m benchmarks.gpu [--device cuda] [--minutes 5] [--folder docs]
    python -m benchmarks.gpu --predict                 # without an accelerator: what is counted, and no times
    python -m benchmarks.gpu --device cpu --tiny       # every line of it in a minute, into build/gpu

Writes gpu.md and gpu.csv. Contenders take turns, and numbers are medians. Each part runs in its own process, which is
ended when the part's time is over. The page names the rows that were cut. Memory is the most that was allocated for a
network in a step, with its weights. The script needs torch, timm and numpy, and Triton for kernels and the compiler.
"""

import argparse
import csv
import gc
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.stock import timm_clip, timm_route

# timm_nf puts a function of its own in the place of timm's.
# isort: split
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_nf
from benchmarks import counts
from timm_nf._clip_defaults import CLIP_FACTOR
from timm_nf._text import reason
from timm_nf.env import environment
from timm_nf.inference.bench import Work, peak_memory, stock_name, time_in_turn
from timm_nf.layers import ScaledStdConv2d
from timm_nf.layers.standardize_triton import standardize

ROOT = Path(__file__).parents[1]
STEP = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 2e-5}
WARM_UP = 3  # the first step makes momentum buffers, compiles kernels and lets cuDNN choose algorithms
SAMPLE = 50  # milliseconds, about the length of one timing
NOT_MEASURED = "Times are not measured yet: no accelerator was at hand.\n"
NOT_COUNTED = "`python -m benchmarks.gpu --predict` has not run in this folder.\n"


class Sizes(NamedTuple):
    """The sizes of what is measured."""

    pixels: dict[str, int]  # size of each network's images
    training: tuple[int, ...]  # batch sizes
    inference: tuple[int, ...]
    options: dict[str, dict[str, Any]]  # arguments of each network
    compiler: str
    repeats: int


FULL = Sizes({"nfnet_f0": 192, "dm_nf_resnet50": 224}, (8, 32, 128), (1, 64), {}, "inductor", 11)
_SMALL = {"depths": (1, 1), "channels": (32, 48), "num_classes": 10}
TINY = Sizes(
    {"nfnet_f0": 32, "dm_nf_resnet50": 32}, (2,), (1,),
    {"nfnet_f0": _SMALL | {"group_size": 16}, "dm_nf_resnet50": _SMALL}, "eager", 1,
)  # fmt: skip


class Case(NamedTuple):
    """One row to measure."""

    part: str
    work: str
    network: str
    batch: int | None = None


class CaseResult(NamedTuple):
    """The measurements of a case. Those that are missing are None, and the note says why."""

    part: str
    work: str
    network: str
    batch: int | None
    ours_ms: float | None = None
    timm_ms: float | None = None
    ours_mib: float | None = None
    timm_mib: float | None = None
    note: str = ""


# --- the work ---


def network(case: Case, ours: bool, device: str, sizes: Sizes) -> nn.Module:
    name = case.network if ours else stock_name(case.network)
    torch.manual_seed(0)
    with torch.device(device):
        model = timm.create_model(name, **sizes.options.get(case.network, {}))
    last: Any = torch.channels_last
    return model.to(memory_format=last)


def images(case: Case, device: str, sizes: Sizes) -> Tensor:
    assert case.batch is not None
    pixels = sizes.pixels[case.network]
    return torch.randn(case.batch, 3, pixels, pixels, device=device).to(memory_format=torch.channels_last)


def standardisation(case: Case, ours: bool, device: str, sizes: Sizes) -> Work:
    """Standardise all weights of a network, forward and backward."""
    dtype = torch.bfloat16 if case.work == "to bfloat16" else torch.float32
    convs = [m for m in network(case, True, device, sizes).modules() if isinstance(m, ScaledStdConv2d)]
    inputs = [(m.weight, m.gain, torch.randn_like(m.weight, dtype=dtype)) for m in convs]

    def run() -> None:
        for weight, gain, grad in inputs:
            out = standardize(weight, gain, out_dtype=dtype) if ours else timm_route(weight, gain).to(dtype)
            torch.autograd.grad(out, (weight, gain), grad)

    return run


def clipping(case: Case, ours: bool, device: str, sizes: Sizes) -> Work:
    """Clip gradients of which every unit is too large, alone or with the optimizer step after it."""
    parameters = list(network(case, True, device, sizes).parameters())
    for p in parameters:
        p.grad = torch.randn_like(p)
    if case.work == "clip":
        clip = timm_nf.adaptive_clip_grad_ if ours else timm_clip
        return lambda: clip(parameters, CLIP_FACTOR)
    if ours:
        optimizer = timm.optim.create_optimizer_v2(
            parameters, "agcsgd", clip_factor=CLIP_FACTOR, clip_exempt=(), nesterov=True, **STEP
        )
        return optimizer.step
    optimizer = torch.optim.SGD(parameters, nesterov=True, **STEP)

    def run() -> None:
        timm_clip(parameters, CLIP_FACTOR)
        optimizer.step()

    return run


def inference(case: Case, ours: bool, device: str, sizes: Sizes) -> Work:
    """Forward in bfloat16: ours fused, timm's as it is."""
    model = network(case, ours, device, sizes).eval()
    model = (timm_nf.fuse(model) if ours else model).bfloat16()
    x = images(case, device, sizes).bfloat16()
    return torch.no_grad()(lambda: model(x))


def training(case: Case, ours: bool, device: str, sizes: Sizes) -> Work:
    """Forward under bfloat16 autocast, backward, and a step of torch's SGD."""
    model = network(case, ours, device, sizes).train()
    optimizer = torch.optim.SGD(model.parameters(), **STEP)
    x, labels = images(case, device, sizes), torch.zeros(case.batch or 0, dtype=torch.long, device=device)
    forward = torch.compile(model, dynamic=False, backend=sizes.compiler) if case.work == "compiled" else model

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = F.cross_entropy(forward(x), labels)
        loss.backward()
        optimizer.step()

    return run


# part: its function, and its share of the time. Parts get the time that earlier parts have left
PARTS: dict[str, tuple[Callable[[Case, bool, str, Sizes], Work], float]] = {
    "standardisation": (standardisation, 1),
    "clipping": (clipping, 1),
    "fused inference": (inference, 2),
    "training step": (training, 4),
    "compiled training step": (training, 8),
}


def cases(part: str, sizes: Sizes) -> list[Case]:
    if part == "standardisation":
        return [Case(part, work, "nfnet_f0") for work in ("to float32", "to bfloat16")]
    if part == "clipping":
        return [Case(part, work, name) for name in sizes.pixels for work in ("clip", "clip and step")]
    if part == "fused inference":
        return [Case(part, "bfloat16", name, batch) for name in sizes.pixels for batch in sizes.inference]
    work = "compiled" if part.startswith("compiled") else "eager"
    # small batches first: compiling takes a minute each, so the last ones may be cut
    return [Case(part, work, name, batch) for batch in sizes.training for name in sizes.pixels]


# --- one process for each part ---


def warmed(build: Callable[[], Work], device: str) -> tuple[Work, float]:
    """The work, which has run `WARM_UP` times, and the MiB that it had allocated at most in one more run.

    On a CPU what lies there between the runs is not among them.
    """
    on_cpu = torch.device(device).type == "cpu"
    before = 0 if on_cpu else torch.accelerator.memory_allocated(device)
    work = build()
    for _ in range(WARM_UP):
        work()
    if on_cpu:
        return work, peak_memory(work) / 2**20
    torch.accelerator.synchronize(device)
    torch.accelerator.reset_peak_memory_stats(device)
    work()
    torch.accelerator.synchronize(device)
    return work, (torch.accelerator.max_memory_allocated(device) - before) / 2**20


def measure(case: Case, device: str, sizes: Sizes) -> CaseResult:
    """Measure times and memory of ours and timm's. If one of them fails, the other is still measured."""
    works: dict[str, Work] = {}
    found: dict[str, float] = {}
    notes: list[str] = []
    build = PARTS[case.part][0]
    for whose, ours in (("ours", True), ("timm", False)):
        try:
            works[whose], found[f"{whose}_mib"] = warmed(partial(build, case, ours, device, sizes), device)
        except torch.OutOfMemoryError:
            notes.append(f"{whose}: out of memory")
        except Exception as error:  # after any error, the other rows are still measured
            notes.append(f"{whose}: stopped, {reason(error)}")
    try:
        found |= {f"{whose}_ms": ms for whose, ms in medians(works, device, sizes.repeats).items()}
    except torch.OutOfMemoryError:
        notes.append("both at a time: out of memory")
    return CaseResult(*case, **found, note="; ".join(notes))


def medians(works: dict[str, Work], device: str, repeats: int) -> dict[str, float]:
    """Median milliseconds of each, in turn. Short ones run several times in a row, so that the host is ahead."""
    once = time_in_turn(works, 1, device)
    runs = {label: max(1, min(20, int(SAMPLE / ms[0]))) for label, ms in once.items()}

    def several(label: str) -> None:
        for _ in range(runs[label]):
            works[label]()

    times = time_in_turn({label: partial(several, label) for label in works}, repeats, device)
    return {label: statistics.median(values) / runs[label] for label, values in times.items()}


def in_this_process(part: str, device: str, sizes: Sizes) -> Iterator[CaseResult]:
    for case in cases(part, sizes):
        yield measure(case, device, sizes)
        gc.collect()  # frees networks that an error or a graph still refers to
        torch.compiler.reset()
        if torch.device(device).type != "cpu":
            torch.accelerator.empty_cache()


def in_a_process(part: str, device: str, tiny: bool, seconds: float) -> Iterator[CaseResult]:
    """The part's rows as they are measured, and then a row for each case that was cut."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--part",
        part,
        "--device",
        device,
    ]
    if tiny:
        command.append("--tiny")
    ended = threading.Event()
    left = cases(part, TINY if tiny else FULL)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:

        def end() -> None:
            ended.set()
            os.killpg(process.pid, signal.SIGKILL)  # also ends the compiler's processes

        timer = threading.Timer(seconds, end)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            yield CaseResult(*json.loads(line))
            left.pop(0)
        timer.cancel()
    why = f"cut, its part had {seconds:.0f} s" if ended.is_set() else f"its process ended with {process.returncode}"
    yield from (CaseResult(*case, note=why) for case in left)


# --- the page ---


def cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def line(row: CaseResult) -> str:
    """The result as a row of the page's table."""
    ratio = f"{row.timm_ms / row.ours_ms:.2f}x" if row.ours_ms and row.timm_ms else ""
    cells = [row.part, row.work, row.network, "" if row.batch is None else str(row.batch)]
    cells += [cell(row.ours_ms), cell(row.timm_ms), ratio, cell(row.ours_mib), cell(row.timm_mib), row.note]
    return f"| {' | '.join(text.replace('|', '/') for text in cells)} |"


HEAD = (
    "| part | work | network | batch | ours, ms | timm's, ms | ratio | ours, MiB | timm's, MiB | note |\n"
    "| --- | --- | --- | --: | --: | --: | --: | --: | --: | --- |\n"
)


def driver() -> str:
    """The version of NVIDIA's driver, by its own tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "not known, there is no nvidia-smi"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0] or "not known"


def measured(rows: list[CaseResult], command: str) -> str:
    """The page's section about measurements."""
    about = environment() | {"driver": driver(), "command": f"`{command}`"}
    return (
        "".join(f"- {name}: {value}\n" for name, value in about.items())
        + f"\n{HEAD}"
        + "".join(f"{line(row)}\n" for row in rows)
    )


def predicted(bandwidth: float = counts.BANDWIDTH) -> str:
    """The page's section about the counts of a training step."""
    lines = [
        "Training steps under bfloat16 autocast, forward and backward. Counts, not times: the milliseconds are the",
        f"bytes over {bandwidth:g} GB/s, which leaves out convolutions, matrix products and the start of kernels.",
        "",
        "| network | batch | kernels, ours | timm's | GB moved, ours | timm's | ms at that bandwidth, ours | timm's |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for name, pixels in FULL.pixels.items():
        for batch in FULL.training:
            ours, theirs = (counts.step(n, batch, True, pixels) for n in (name, stock_name(name)))
            kernels = f"{ours.kernels} | {theirs.kernels}"
            moved = " | ".join(f"{x.moved / 1e9:.2f}" for x in (ours, theirs))
            ms = " | ".join(f"{x.moved / 1e6 / bandwidth:.1f}" for x in (ours, theirs))
            lines.append(f"| {name} | {batch} | {kernels} | {moved} | {ms} |")
    return "\n".join(lines) + "\n"


PAGE = """# On an accelerator

`make gpu` runs the tests that need a device, then times ours beside timm's in one run and writes this page and
`gpu.csv`. It takes 8 minutes at most and needs no network. `make gpu PYTHON=python3` uses an environment that is there:
torch, timm, Triton and pytest are enough. The ratio is timm's time over ours; memory is the most that was allocated for
a network in a step, its weights included.

## Measured

{measured}
## Counted

`python -m benchmarks.gpu --predict` wrote this table, without a device.

{counted}"""
COUNTED = PAGE.split("{measured}")[1].split("{counted}")[0]


def write(folder: Path, measured: str, counted: str | None) -> None:
    """Write the page. If there are no new counts, the old page's section about counts stays."""
    file = folder / "gpu.md"
    if counted is None:
        counted = file.read_text().split(COUNTED)[1] if file.exists() else NOT_COUNTED
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(PAGE.format(measured=measured, counted=counted))


def write_csv(folder: Path, rows: list[CaseResult]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "gpu.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CaseResult._fields)
        writer.writerows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="as torch names it")
    parser.add_argument("--minutes", type=float, default=5.0, help="time for everything; rows that do not fit are cut")
    parser.add_argument(
        "--folder", type=Path, help="folder of the page and the CSV file: docs, or build/gpu with --tiny"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, and no compiler")
    parser.add_argument("--predict", action="store_true", help="write counts and no times")
    parser.add_argument("--part", choices=PARTS, help="measure only this part, and print a JSON line for each row")
    args = parser.parse_args()
    folder: Path = args.folder or ROOT / ("build/gpu" if args.tiny else "docs")
    if args.predict:
        write(folder, NOT_MEASURED, predicted())
        return 0
    try:
        torch.empty(1, device=args.device)
    except Exception as error:
        parser.error(
            f"{args.device} is no device of this machine ({reason(error)}); --device cpu --tiny tries all lines"
        )
    if args.part:
        for row in in_this_process(args.part, args.device, TINY if args.tiny else FULL):
            print(json.dumps(row), flush=True)
        return 0

    end = time.monotonic() + 60 * args.minutes
    rows: list[CaseResult] = []
    print(HEAD, end="")
    for i, part in enumerate(PARTS):
        left = end - time.monotonic()
        seconds = max(0.0, left * PARTS[part][1] / sum(share for _, share in list(PARTS.values())[i:]))
        print(f"{part}: at most {seconds:.0f} s of the {left:.0f} s that are left", file=sys.stderr)
        for row in in_a_process(part, args.device, args.tiny, seconds):
            rows.append(row)
            print(line(row), flush=True)
    command = " ".join(["python -m benchmarks.gpu", *sys.argv[1:]])
    write(folder, measured(rows, command), None)
    write_csv(folder, rows)
    print(f"wrote {folder / 'gpu.md'} and gpu.csv", file=sys.stderr)
    return int(any("stopped" in row.note or "ended with" in row.note for row in rows))


if __name__ == "__main__":
    sys.exit(main())
