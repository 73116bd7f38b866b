"""Times a network on this machine: timm's version, ours, and ours fused, in bfloat16, compiled and exported.

Examples:
    >>> stock_name("nfnet_f0")
    'dm_nfnet_f0'
    >>> versions = contenders("nfnet_f0", batch=1, size=192)  # nothing is built yet
    >>> "stock" in versions and "fused" in versions
    True
    >>> x = torch.ones(1000)
    >>> builders = {"sum": lambda: x.sum, "double": lambda: x.double}  # in place of the versions, to be quick
    >>> timings = time_inference(builders, repeats=2)
    >>> isinstance(timings["sum"], Timing)
    True
    >>> times = time_in_turn({"sum": x.sum, "double": x.double}, repeats=2)
    >>> len(times["double"])  # milliseconds
    2
    >>> peak_memory(x.double)  # bytes
    8000
    >>> ("fused, bfloat16" in left_out("cpu")) != bfloat16_is_fast("cpu")  # not timed where it is slow
    True
"""

# timm, onnx and onnxruntime have no types, or incomplete ones.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportMissingTypeStubs=false

import copy
import json
import statistics
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
from .._temporary import temporary_folder
from .._versions import input_channels
from ..checkpoint import skeleton
from ..variants import VARIANTS
from . import export, int8
from .fuse import fuse

__all__ = [
    "Timing",
    "Work",
    "bfloat16_is_fast",
    "contenders",
    "left_out",
    "peak_memory",
    "stock_name",
    "time_in_turn",
    "time_inference",
]

Work = Callable[[], object]
"""What is timed: a call without arguments, whose result is ignored."""

# Seconds between two contenders. The threads of onnxruntime and OpenMP wait in a loop for more work, and slow down the
# next contender. The fused bfloat16 NFNet-F0 after onnxruntime: 114 ms without the pause, 68 ms with it (2 cores).
_PAUSE = 0.2


class Timing(NamedTuple):
    """The times of one contender, in milliseconds.

    Attributes:
        median: The median.
        low: The first quartile.
        high: The third quartile.
    """

    median: float
    low: float
    high: float


def stock_name(name: str) -> str:
    """The name of timm's version of our network. Other names are returned as they are."""
    if name not in VARIANTS:
        return name
    if name.startswith("nfnet"):
        return f"dm_{name}"
    return name.removeprefix("dm_")


def bfloat16_is_fast(device: str = "cpu") -> bool:
    """Whether the device has instructions for bfloat16. Without them a CPU takes longer in bfloat16 than in float32."""
    if torch.device(device).type != "cpu":
        return True
    return any("bf16" in name for name in _cpu_instructions())


def _cpu_instructions() -> set[str]:
    """Names of what this CPU can do: avx512_bf16 and amx_bf16 on x86, bf16 on ARM."""
    if hasattr(torch.cpu, "get_capabilities"):  # older torch has none
        return {name for name, has in torch.cpu.get_capabilities().items() if has is True}
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # neither Linux nor a torch that can tell
        return set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.partition(":")[2].split()}


def left_out(device: str = "cpu") -> dict[str, str]:
    """The versions of a network that are not timed on a device of this machine, each with its reason.

    Examples:
        >>> left_out("cuda")["fused, onnxruntime"]
        'it is timed on CPUs'
    """
    reasons: dict[str, str] = {}
    if not bfloat16_is_fast(device):
        reasons["fused, bfloat16"] = "the CPU has no bfloat16 instructions, and takes longer than in float32"
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu and not _compiler_is_there():
        reasons["fused, compiled"] = "torch.compile finds no C++ compiler"
    if not on_cpu or not export.onnx_is_installed():
        why = "it is not installed" if on_cpu else "it is timed on CPUs"
        reasons |= {"fused, onnxruntime": why, "fused, int8": f"onnxruntime computes it: {why}"}
    return reasons


def _compiler_is_there() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler  # only this asks for it

    try:
        get_cpp_compiler()
    except RuntimeError:
        return False
    return True


def contenders(
    name: str, batch: int, size: int, device: str = "cpu", trained: nn.Module | None = None
) -> dict[str, Callable[[], Work]]:
    """The versions of a network that can be timed here, with random weights by default.

    Args:
        name: A network of ours, or one of timm's with standardised convolutions.
        batch: Images in a forward pass.
        size: Height and width of the images.
        device: The device, as torch names it.
        trained: The network with its weights, on the CPU. By default one with random weights is made by name.

    Returns:
        `{label: function that builds the version and returns its work}`. The versions are `stock` (timm's network),
        `timm_nf` (ours, if there is one) and `fused`. Some are also timed in channels_last, in bfloat16, compiled by
        inductor with frozen weights, and in onnxruntime, in float32 and with convolutions in int8. `left_out` says
        which of these are not.

    Raises:
        ValueError: before anything is built, if the network has no standardised convolutions.
    """
    fuse(skeleton(name) if trained is None else trained)  # refuses what cannot be fused
    channels = 3 if trained is None else input_channels(trained)
    images = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0)).to(device)

    def stock() -> nn.Module:
        return timm.create_model(stock_name(name), in_chans=channels).eval()

    def ours() -> nn.Module:
        return timm.create_model(name).eval() if trained is None else copy.deepcopy(trained)

    def fused() -> nn.Module:
        return fuse(ours())

    # The types of `to` do not know this keyword for modules.
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
    table["fused, bfloat16"] = partial(_eager, fused, images, **last, dtype=torch.bfloat16)
    table["fused, compiled"] = partial(_compiled, fused, images)
    table["fused, onnxruntime"] = partial(_onnxruntime, fused, images)
    table["fused, int8"] = partial(_int8, fused, images)
    without = left_out(device)
    return {label: build for label, build in table.items() if label not in without}


def _eager(create: Callable[[], nn.Module], images: Tensor, **options: Any) -> Work:
    """The network in eager mode. `options` are arguments of `to`, for the network and the images."""
    model, x = create().to(images.device, **options), images.to(**options)
    return lambda: model(x)


def _compiled(create: Callable[[], nn.Module], images: Tensor) -> Work:
    """The network compiled by inductor, with frozen weights and in channels_last."""
    last: Any = torch.channels_last
    x = images.to(memory_format=last)
    model = torch.compile(create().to(images.device).to(memory_format=last))
    # `freezing` has no effect in torch.compile's options: dynamo reads the setting before inductor sees the options.
    with torch.no_grad(), inductor.patch(freezing=True):  # weights are frozen only without gradients
        model(x)  # compiles
    return lambda: model(x)


def _onnxruntime(create: Callable[[], nn.Module], images: Tensor) -> Work:
    """The network in onnxruntime, with as many threads as torch has."""
    with temporary_folder() as folder:
        file = folder / "model.onnx"
        export.write(create(), file, size=images.shape[-1], dynamic_batch=len(images) > 1)
        run = int8.session(file)
    return lambda: run(images)


def _int8(create: Callable[[], nn.Module], images: Tensor) -> Work:
    """The network in onnxruntime with convolutions in int8. The images calibrate it; times do not depend on them."""
    with temporary_folder() as folder:
        wide, narrow = folder / "float32.onnx", folder / "int8.onnx"
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
    """Build all contenders and time them in turn, so that noise affects all of them.

    Args:
        builders: The result of `contenders`.
        repeats: Timed forward passes of each contender, after two for warming up.
        device: The device of the contenders.
        progress: Shows progress.

    Returns:
        The timing of every contender, by label.
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
    """Time calls in turn, with a short pause before each on a CPU.

    Args:
        work: The calls, by label.
        repeats: Timed rounds, after two for warming up.
        device: The device of the calls.
        progress: Shows progress.

    Returns:
        `repeats` times of every call in milliseconds, by label.
    """
    on_cpu = torch.device(device).type == "cpu"
    milliseconds = _time_on_cpu if on_cpu else partial(_time_on_accelerator, device=device)
    times: dict[str, list[float]] = {label: [] for label in work}
    for repeat in progress(range(repeats + 2), "timing"):
        for label, once in work.items():
            taken = milliseconds(once)
            if repeat >= 2:
                times[label].append(taken)
    return times


def _time_on_cpu(work: Work) -> float:
    time.sleep(_PAUSE)
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def _time_on_accelerator(work: Work, device: str) -> float:
    """Time by events in the device's queue: the device is still working when `work` returns."""
    start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    torch.accelerator.synchronize(device)
    start.record()
    work()
    end.record()
    torch.accelerator.synchronize(device)
    return start.elapsed_time(end)


def peak_memory(work: Work) -> int:
    """The largest number of bytes that a call holds at once on the CPU, in addition to those before the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    with temporary_folder() as folder:
        file = folder / "trace.json"
        seen.export_chrome_trace(str(file))
        events: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    allocations = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in allocations), default=0)


def _timing(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, low, high)
