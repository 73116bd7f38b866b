"""Count the kernels and bytes of a training step on an accelerator, ours and timm's. It needs no accelerator.

    python -m benchmarks.counts [--bandwidth 2000] [--write]

The networks run on the meta device. A kernel is an operation other than a view, an allocation, a convolution or a
matrix product. Bytes are those that kernels read and write. "Saved" is what autograd keeps for the backward pass.

Autocast has no meta tensors, so this script makes its casts: convolutions and linear layers run in bfloat16, the loss
runs in float32. --write puts the tables into docs/performance.md.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.stock import timm_clip, timm_route

# timm_nf puts a function of its own in the place of timm's.
# isort: split
import timm_nf
from timm_nf.layers import ScaledStdConv2d, std_conv

PAGE = Path(__file__).parents[1] / "docs/performance.md"
START, END = "<!-- counts -->\n", "<!-- end of counts -->\n"
BANDWIDTH = 2000  # GB/s, typical of accelerators in 2020
VIEWS = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "expand", "squeeze", "unsqueeze",
    "slice", "select", "split", "split_with_sizes", "unbind", "as_strided", "alias", "detach", "lift_fresh",
}  # fmt: skip
PRODUCTS = {"convolution", "convolution_backward", "mm", "addmm", "bmm"}
CAST = (F.conv2d, F.linear)  # the functions of these networks that autocast runs in bfloat16


class Counts(NamedTuple):
    """The counts of one step."""

    kernels: int
    moved: int  # bytes
    saved: int  # bytes


class Counter(TorchDispatchMode):
    """Adds up kernels and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in VIEWS | PRODUCTS and not name.startswith(("empty", "new_empty")):
            self.kernels += 1
            self.moved += sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
        return out


class Autocast(TorchFunctionMode):
    """The casts of bfloat16 autocast on an accelerator, for meta tensors; each parameter is cast once."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[int, Tensor] = {}

    def lower(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype is not torch.float32:
            return x
        if not x.is_leaf or not x.requires_grad:
            return x.bfloat16()
        if id(x) not in self.cache:
            self.cache[id(x)] = x.bfloat16()
        return self.cache[id(x)]

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in CAST:
            args, kwargs = tuple(map(self.lower, args)), {k: self.lower(v) for k, v in kwargs.items()}
        return func(*args, **kwargs)


@contextmanager
def autocast() -> Iterator[None]:
    """`Autocast`, with standardised weights in bfloat16 as on an accelerator."""
    with mock.patch.object(std_conv, "_autocast_dtype", return_value=torch.bfloat16), Autocast():
        yield


def count(function: Callable[[], Tensor]) -> Counts:
    """Count a function, which returns a loss or an output, and its backward pass."""
    saved = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal saved
        saved += x.nbytes
        return x

    with Counter() as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function()
        out.backward(torch.empty_like(out))
    return Counts(counter.kernels, counter.moved, saved)


def _on_meta(x: Tensor) -> Tensor:
    """An empty tensor of the same shape. With four axes it is in channels_last."""
    like = torch.empty(x.shape, device="meta")
    return like.to(memory_format=torch.channels_last) if x.ndim == 4 else like


@cache
def step(name: str, batch_size: int, half: bool = False, size: int = 192) -> Counts:
    """Count a training step of a timm model, with weights and images in channels_last."""
    model = timm.create_model(name).train()
    parameters = {k: nn.Parameter(_on_meta(v)) for k, v in model.named_parameters()}
    images = _on_meta(torch.empty(batch_size, 3, size, size, device="meta"))
    labels = torch.empty(batch_size, dtype=torch.long, device="meta")

    def loss() -> Tensor:
        with autocast() if half else nullcontext():
            logits = torch.func.functional_call(model, parameters, (images,))
        return F.cross_entropy(logits.float(), labels)

    return count(loss)


def standardisation(route: str, name: str = "nfnet_f0") -> tuple[Counts, int]:
    """Count the standardisation of all weights of a network by `timm_nf` or `timm`. Also returns the weights' bytes."""
    function = {"timm_nf": timm_nf.standardize_weight, "timm": timm_route}[route]
    convs = [m for m in timm.create_model(name).modules() if isinstance(m, ScaledStdConv2d)]
    total, weights = Counts(0, 0, 0), 0
    for conv in convs:
        weight, gain = nn.Parameter(_on_meta(conv.weight)), nn.Parameter(_on_meta(conv.gain))
        one = count(lambda weight=weight, gain=gain: function(weight, gain))
        total = Counts(*(a + b for a, b in zip(total, one, strict=True)))
        weights += weight.nbytes
    return total, weights


def clipping(route: str, name: str = "nfnet_f0") -> int:
    """Kernels of clipping all gradients of a network, by `timm_nf` or `timm`."""
    function = {"timm_nf": timm_nf.adaptive_clip_grad_, "timm": timm_clip}[route]
    parameters = [nn.Parameter(_on_meta(p)) for p in timm.create_model(name).parameters()]
    for p in parameters:
        p.grad = torch.empty_like(p)
    with Counter() as counter:
        function(parameters)
    return counter.kernels


def tables(bandwidth: float, batch_sizes: tuple[int, ...] = (1, 32, 128)) -> str:
    """Both tables as Markdown."""
    lines = [
        "NFNet-F0, 192 px, channels_last, forward and backward. Counts, not times: the last column is the bytes over",
        f"{bandwidth:g} GB/s, which leaves out convolutions, matrix products and the start of kernels.",
        "",
        "| dtype | batch | network | kernels | GB moved | GB saved | ms at that bandwidth |",
        "| --- | --: | --- | --: | --: | --: | --: |",
    ]
    for half in (False, True):
        for batch_size in batch_sizes:
            for name in ("dm_nfnet_f0", "nfnet_f0"):
                kernels, moved, saved = step(name, batch_size, half)
                dtype, whose = "bfloat16 autocast" if half else "float32", "ours" if name == "nfnet_f0" else "timm's"
                gb = f"{moved / 1e9:.2f} | {saved / 1e9:.2f} | {moved / 1e6 / bandwidth:.1f}"
                lines.append(f"| {dtype} | {batch_size} | {whose} | {kernels} | {gb} |")
    lines += ["", "| standardisation alone | kernels | weights moved | weights saved |", "| --- | --: | --: | --: |"]
    for route in ("timm", "timm_nf"):
        counts, weights = standardisation(route)
        lines.append(f"| {route} | {counts.kernels} | {counts.moved / weights:.1f} | {counts.saved / weights:.2f} |")
    lines += ["", "| clipping alone | kernels |", "| --- | --: |"]
    for route in ("timm", "timm_nf"):
        lines.append(f"| {route} | {clipping(route)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="of the accelerator's memory, GB/s")
    parser.add_argument("--write", action="store_true", help=f"write into {PAGE.name}")
    args = parser.parse_args()
    text = tables(args.bandwidth)
    print(text, end="")
    if args.write:
        before, rest = PAGE.read_text().split(START)
        PAGE.write_text(f"{before}{START}{text}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
