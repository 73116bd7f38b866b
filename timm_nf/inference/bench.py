"""Times of one network on this machine: timm's, ours, and what fusing, bfloat16 and compilers make of it."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model
from torch import nn
from torch._inductor import config as inductor
from torch.profiler import ProfilerActivity, profile

from ..variants import VARIANTS
from . import export
from .fuse import fuse

Run = Callable[[], object]
Track = Callable[[Iterable[Any], str], Iterable[Any]]

# Seconds between two contenders. The threads of onnxruntime and of OpenMP wait in a loop for more work: without the
# pause the fused bfloat16 NFNet-F0 took 114 ms when its turn came after onnxruntime's, with it 68 ms (2 cores).
_PAUSE = 0.2


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender."""

    median: float
    low: float  # first quartile
    high: float  # third quartile


def stock_name(name: str) -> str:
    """Timm's own network that a network of ours stands for; the name itself where it is timm's already."""
    if name not in VARIANTS:
        return name
    return f"dm_{name}" if name.startswith("nfnet") else name.removeprefix("dm_")


def bfloat16_is_fast(device: str = "cpu") -> bool:
    """Whether the device has instructions of its own for bfloat16."""
    if torch.device(device).type != "cpu":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def contenders(name: str, batch: int, size: int, device: str = "cpu") -> dict[str, Callable[[], Run]]:
    """What can be timed of one network: {label: function that builds it and returns its run}. Weights are random.

    Args:
        name: Of a network of ours, or of one of timm's with standardised convolutions.
        batch: Images in a run.
        size: Their height and width.
        device: As torch names it.

    Returns:
        `stock`, timm's network; `timm_nf`, ours, if there is one; `fused`; those that are worth it also in
        channels_last, in bfloat16, compiled by inductor with frozen weights, and exported to onnxruntime.
    """
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size, device=device)
    last: Any = torch.channels_last

    def stock() -> nn.Module:
        return timm.create_model(stock_name(name)).eval()

    def ours() -> nn.Module:
        return timm.create_model(name).eval()

    def fused() -> nn.Module:
        return fuse(ours())

    def eager(create: Callable[[], nn.Module], **options: Any) -> Callable[[], Run]:
        def build() -> Run:
            model, x = create().to(device, **options), images.to(**options)
            return lambda: model(x)

        return build

    def compiled() -> Run:
        with inductor.patch(freezing=True):
            model: Any = torch.compile(fused().to(device).to(memory_format=last))
            x = images.to(memory_format=last)
            with torch.no_grad():
                model(x)  # compiles; freezing is looked up here
        return lambda: model(x)

    def onnxruntime() -> Run:
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "model.onnx")
            export.write(fused(), file, size=size, dynamic_batch=batch > 1)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        x = {"images": images.numpy()}
        return lambda: session.run(None, x)

    table = {"stock": eager(stock), "stock, channels_last": eager(stock, memory_format=last)}
    if not is_model(stock_name(name)):
        table = {}
    if name in VARIANTS:
        table |= {"timm_nf": eager(ours), "timm_nf, channels_last": eager(ours, memory_format=last)}
    table |= {"fused": eager(fused), "fused, channels_last": eager(fused, memory_format=last)}
    if bfloat16_is_fast(device):
        table["fused, bfloat16"] = eager(fused, memory_format=last, dtype=torch.bfloat16)
    table["fused, compiled"] = compiled
    if torch.device(device).type == "cpu" and export.onnx_is_installed():
        table["fused, onnxruntime"] = onnxruntime
    return table


@torch.no_grad()
def time_inference(
    builders: Mapping[str, Callable[[], Run]],
    repeats: int = 11,
    device: str = "cpu",
    track: Track = lambda items, _: items,
) -> dict[str, Timing]:
    """Build all contenders and time them in turn, so that noise meets all of them.

    Args:
        builders: As `contenders` gives them.
        repeats: Timed runs of each, after two that are not.
        device: Where they run.
        track: Wraps an iterable to show its progress.
    """
    runs = {label: builders[label]() for label in track(builders, "building")}
    times = time_in_turn(runs, repeats, device, track)
    return {label: _timing(values) for label, values in times.items()}


def time_in_turn(
    runs: Mapping[str, Run], repeats: int, device: str = "cpu", track: Track = lambda items, _: items
) -> dict[str, list[float]]:
    """Milliseconds of every run, `repeats` of each, one run of each after the other with a short pause before."""
    once = _time_on_cpu if torch.device(device).type == "cpu" else partial(_time_on_accelerator, device=device)
    times: dict[str, list[float]] = {label: [] for label in runs}
    for repeat in track(range(repeats + 2), "timing"):
        for label, run in runs.items():
            time.sleep(_PAUSE)
            milliseconds = once(run)
            if repeat >= 2:
                times[label].append(milliseconds)
    return times


def _time_on_cpu(run: Run) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _time_on_accelerator(run: Run, device: str) -> float:
    """By events in the queue of the device, which works on after `run` has returned."""
    start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    torch.accelerator.synchronize(device)
    start.record()
    run()
    end.record()
    torch.accelerator.synchronize(device)
    return start.elapsed_time(end)


def peak_memory(run: Run) -> int:
    """Bytes that a run on the CPU has allocated at its highest point, on top of what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    events: list[Any] = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())), default=0)


def _timing(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, low, high)
