"""Times of one network on this machine: timm's, ours, and what fusing, bfloat16 and compilers make of it."""

# timm, onnx and onnxruntime have no types or partial ones.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportMissingTypeStubs=false

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import is_model
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.profiler import ProfilerActivity, profile

from .._progress import Progress, silent
from .._seed import seeded
from ..checkpoint import skeleton
from ..variants import VARIANTS
from . import export, int8
from .fuse import fuse

__all__ = [
    "Timing",
    "Work",
    "bfloat16_is_fast",
    "contenders",
    "peak_memory",
    "stock_name",
    "time_in_turn",
    "time_inference",
]

Work = Callable[[], object]  # what is timed; what it returns does not count

# Seconds between two contenders. The threads of onnxruntime and of OpenMP wait in a loop for more work: without the
# pause the fused bfloat16 NFNet-F0 took 114 ms when its turn came after onnxruntime's, with it 68 ms (2 cores).
_PAUSE = 0.2


class Timing(NamedTuple):
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
    has = torch.cpu.get_capabilities()
    return has.get("avx512_bf16", False) or has.get("amx_tile", False)


def contenders(
    name: str, batch: int, size: int, device: str = "cpu", trained: nn.Module | None = None
) -> dict[str, Callable[[], Work]]:
    """What can be timed of one network: {label: function that builds it and returns its work}.

    Args:
        name: Of a network of ours, or of one of timm's with standardised convolutions.
        batch: Images in a forward pass.
        size: Their height and width.
        device: As torch names it.
        trained: The network with its weights, on the CPU. By default one with random weights is made by name.

    Returns:
        `stock`, timm's network; `timm_nf`, ours, if there is one; `fused`; those that are worth it also in
        channels_last, in bfloat16, compiled by inductor with frozen weights, and exported to onnxruntime, in float32
        and with convolutions in int8.

    Raises:
        ValueError: before anything is built, if the network has no standardised convolutions.
    """
    fuse(skeleton(name) if trained is None else trained)  # refuses what cannot be fused
    channels: int = getattr(trained, "in_chans", 3)
    images = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0)).to(device)

    def stock() -> nn.Module:
        return timm.create_model(stock_name(name), in_chans=channels).eval()

    def ours() -> nn.Module:
        return timm.create_model(name).eval() if trained is None else copy.deepcopy(trained)

    def fused() -> nn.Module:
        return fuse(ours())

    # to() takes a layout as a keyword only; its type says otherwise
    last: dict[str, Any] = {"memory_format": torch.channels_last}
    table: dict[str, Callable[[], Work]] = {}
    if is_model(stock_name(name)):
        table["stock"] = partial(_eager, stock, images)
        table["stock, channels_last"] = partial(_eager, stock, images, **last)
    if name in VARIANTS:
        table["timm_nf"] = partial(_eager, ours, images)
        table["timm_nf, channels_last"] = partial(_eager, ours, images, **last)
    table["fused"] = partial(_eager, fused, images)
    table["fused, channels_last"] = partial(_eager, fused, images, **last)
    if bfloat16_is_fast(device):
        table["fused, bfloat16"] = partial(_eager, fused, images, **last, dtype=torch.bfloat16)
    table["fused, compiled"] = partial(_compiled, fused, images)
    if torch.device(device).type == "cpu" and export.onnx_is_installed():
        table["fused, onnxruntime"] = partial(_onnxruntime, fused, images)
        table["fused, int8"] = partial(_int8, fused, images)
    return table


def _eager(create: Callable[[], nn.Module], images: Tensor, **options: Any) -> Work:
    """The network as it is; `options` of `to`, for it and the images."""
    model, x = create().to(images.device, **options), images.to(**options)
    return lambda: model(x)


def _compiled(create: Callable[[], nn.Module], images: Tensor) -> Work:
    """Compiled by inductor with constant weights, in channels_last."""
    last: Any = torch.channels_last
    x = images.to(memory_format=last)
    model = torch.compile(create().to(images.device).to(memory_format=last))
    # As one of torch.compile's options it freezes nothing: dynamo reads the setting before inductor sees its options.
    with torch.no_grad(), inductor.patch(freezing=True):
        model(x)  # compiles, and freezes only without gradients
    return lambda: model(x)


def _onnxruntime(create: Callable[[], nn.Module], images: Tensor) -> Work:
    """Exported to ONNX, with as many threads as torch has."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        export.write(create(), file, size=images.shape[-1], dynamic_batch=len(images) > 1)
        run = int8.session(file)
    return lambda: run(images)


def _int8(create: Callable[[], nn.Module], images: Tensor) -> Work:
    """The same with convolutions in int8, calibrated on the images, on which times do not depend."""
    with tempfile.TemporaryDirectory() as folder:
        wide, narrow = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        export.write(create(), wide, size=images.shape[-1], dynamic_batch=len(images) > 1)
        int8.quantize(wide, narrow, [images])
        run = int8.session(narrow)
    return lambda: run(images)


@torch.no_grad()
def time_inference(
    builders: Mapping[str, Callable[[], Work]],
    repeats: int = 11,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Timing]:
    """Build all contenders and time them in turn, so that noise meets all of them.

    Args:
        builders: As `contenders` gives them.
        repeats: Timed forward passes of each, after two that are not.
        device: Where they run.
        progress: Shows it.
    """
    work: dict[str, Work] = {}
    with seeded(0):
        for label in progress(list(builders), "building"):
            work[label] = builders[label]()
    times = time_in_turn(work, repeats, device, progress)
    return {label: _timing(values) for label, values in times.items()}


def time_in_turn(
    work: Mapping[str, Work], repeats: int, device: str = "cpu", progress: Progress = silent
) -> dict[str, list[float]]:
    """Milliseconds of everything, `repeats` times each, one after the other with a short pause before each.

    Args:
        work: What to time, by label.
        repeats: Timed rounds, after two that are not.
        device: Where it is done.
        progress: Shows it.
    """
    on_cpu = torch.device(device).type == "cpu"
    milliseconds = _time_on_cpu if on_cpu else partial(_time_on_accelerator, device=device)
    times: dict[str, list[float]] = {label: [] for label in work}
    for repeat in progress(range(repeats + 2), "timing"):
        for label, once in work.items():
            time.sleep(_PAUSE)
            taken = milliseconds(once)
            if repeat >= 2:
                times[label].append(taken)
    return times


def _time_on_cpu(work: Work) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def _time_on_accelerator(work: Work, device: str) -> float:
    """By events in the queue of the device, which works on after `work` has returned."""
    start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    torch.accelerator.synchronize(device)
    start.record()
    work()
    end.record()
    torch.accelerator.synchronize(device)
    return start.elapsed_time(end)


def peak_memory(work: Work) -> int:
    """Bytes that work on the CPU has allocated at its highest point, on top of what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        seen.export_chrome_trace(str(file))
        events: list[dict[str, Any]] = json.loads(file.read_text())["traceEvents"]
    allocations = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in allocations), default=0)


def _timing(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, low, high)
