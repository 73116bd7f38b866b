"""Signal propagation of a network, block by block (arXiv:2101.08692, section 3).

timm's `extract_spp_stats` leaves its hooks on the model, runs it in training mode and does not see the residual
branch. These numbers equal those that the authors' code reports (nfnets/base.py, signal_metrics).
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from timm.models.nfnet import NormFreeBlock as StockNormFreeBlock
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.resnetv2 import PreActBasic, PreActBottleneck
from torch import Tensor, nn

from .._wrappers import innermost
from ..models.blocks import NormFreeBlock

PANELS = {
    "avg_sq_mean": "average squared channel mean",
    "avg_var": "average channel variance",
    "res_avg_var": "variance of the residual branch",
}
_BRANCH_ENDS: dict[type[nn.Module], str] = {
    NormFreeBlock: "conv3",
    StockNormFreeBlock: "drop_path",
    PreActBasic: "drop_path",
    PreActBottleneck: "drop_path",
    BasicBlock: "bn2",
    Bottleneck: "bn3",
}
_CONTAINER = re.compile(r"stages|blocks|layers|layer[1-4]|s[1-4]")  # what timm calls the parts that hold blocks
# Holding blocks too, of other kinds, beside those: HRNet's stage2, CaiT's blocks_token_only.
_ALIKE = re.compile(r"stage|block|layer(?!0)")


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of a network, found by the names that timm gives to what holds them."""

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        children = dict(module.named_children())
        if "blocks" in children:  # beside a layer that changes resolution: ConvNeXt, ResNetV2, Swin
            yield from walk(f"{name}.blocks", children["blocks"])
        elif type(module) in (nn.Sequential, nn.ModuleList) or "b1" in children:  # RegNet has s1.b1
            for key, child in children.items():
                yield from walk(f"{name}.{key}", child)
        else:
            yield name, module

    parts = dict(model.named_children())
    held = [name for name in parts if _CONTAINER.fullmatch(name)]
    for name, module in parts.items():
        if name in held:
            yield from walk(name, module)
        elif held and _ALIKE.match(name) and isinstance(module, nn.Sequential | nn.ModuleList):
            raise TypeError(f"{type(model).__name__} has blocks in {name!r} as well, which signal_stats does not know")


def _channels_first(model: Any, name: str, out: Any) -> Tensor:
    """A block's output as (N, C, ...).

    Raises:
        TypeError: if it is not clear which axis holds the channels.
    """
    if not isinstance(out, Tensor) or out.ndim not in (3, 4):
        got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"expected (N, C, H, W), (N, H, W, C) or (N, L, C) at {name}, got {got}")
    axis = 1 if out.ndim == 4 and getattr(model, "output_fmt", "NCHW") == "NCHW" else -1
    for info in getattr(model, "feature_info", ()):
        channels, of_stage = info["num_chs"], f"{name}.".startswith(f"{info['module']}.")
        if of_stage and out.shape[axis] != channels and channels in out.shape[1:]:
            raise TypeError(
                f"expected {channels} channels on axis {axis} at {name}, got shape {tuple(out.shape)}: blocks of "
                f"{type(model).__name__} have a layout that is not known here"
            )
    return out.movedim(axis, 1)


def _channel_stats(x: Tensor) -> tuple[float, float]:
    """Mean over channels of the squared mean and of the variance of (N, C, ...), over all other axes."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(0, 1).flatten(1)
    var, mean = torch.var_mean(x, 1, correction=0)
    return mean.square().mean().item(), var.mean().item()


def _branch_end(block: Any) -> tuple[nn.Module | None, Callable[[Any, Tensor], Tensor]]:
    """The last module of a residual branch, and the branch's output from that module's arguments and output."""
    if isinstance(block, NormFreeBlock) and block.attn_last is not None:
        return block.attn_last, lambda args, out: 2 * out * args[0]  # a gate, of the branch that is its argument
    for kind, end in _BRANCH_ENDS.items():
        if isinstance(block, kind):
            return getattr(block, "se", None) or getattr(block, end), lambda _, out: out
    return None, lambda _, out: out


def _is_norm_free(block: nn.Module) -> bool:
    return isinstance(block, NormFreeBlock | StockNormFreeBlock)


def _is_fresh(norm: Any) -> bool:
    """Whether it is batch normalisation with the running statistics it was made with."""
    if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
        return False
    return not norm.running_mean.any() and bool((norm.running_var == 1).all())


@torch.no_grad()
def signal_stats(model: nn.Module, x: Tensor) -> list[dict[str, Any]]:
    """Statistics of the signal at the first block's input and after every block, in evaluation mode.

    Batch normalisation whose running statistics are still those it was made with takes those of `x`, as in the first
    step of a training: with mean 0 and variance 1 it would do nothing.

    Args:
        model: A network of timm with blocks, wrapped or not. Parameters, buffers, modes and hooks are left as found.
        x: (N, in_chans, H, W), on the model's device.

    Returns:
        One row for the stem and one for every block: `name`; `avg_sq_mean`, mean over channels of the squared channel
        mean; `avg_var`, mean channel variance; `res_avg_var`, that of the residual branch before stochastic depth and
        the skip gain, None for the stem and outside NFNets and ResNets; `expected_var`, 1 for the
        stem and 1 + k alpha^2 for the k-th block of a stage, None outside NFNets. The variance follows it where skip
        gains are 1 and as far as no shortcut pools: the mean of four independent values has a quarter of the variance.

    Raises:
        TypeError: if the model has no blocks, some in parts with other names, or blocks that return something else
            than images or tokens.
    """
    net: Any = innermost(model)
    blocks = list(_blocks(net))
    if not blocks:
        raise TypeError(
            f"expected a network with residual blocks in stages, blocks, layers, layer1 or s1, as timm names them, got "
            f"{type(net).__name__}"
        )
    rows: list[dict[str, Any]] = []
    branches: dict[nn.Module, float] = {}

    def add_row(name: str, out: Tensor, res_avg_var: float | None, expected_var: float | None) -> None:
        avg_sq_mean, avg_var = _channel_stats(out)
        rows.append(
            {
                "name": name,
                "avg_sq_mean": avg_sq_mean,
                "avg_var": avg_var,
                "res_avg_var": res_avg_var,
                "expected_var": expected_var,
            }
        )

    def stem_hook(block: nn.Module, args: Any) -> None:
        x = _channels_first(net, "the first block's input", args[0])
        add_row("stem", x, None, 1.0 if _is_norm_free(block) else None)

    def block_hook(name: str) -> Any:
        def hook(block: Any, _: Any, out: Any) -> None:
            index = int(name.rpartition(".")[2]) if _is_norm_free(block) else None
            expected_var = None if index is None else 1 + (index + 1) * block.alpha**2
            add_row(name, _channels_first(net, name, out), branches.pop(block, None), expected_var)

        return hook

    def branch_hook(block: nn.Module, branch: Callable[[Any, Tensor], Tensor]) -> Any:
        def hook(_: nn.Module, args: Any, out: Tensor) -> None:  # now, as what follows may overwrite it
            branches[block] = _channel_stats(branch(args, out))[1]

        return hook

    with ExitStack() as stack:
        for module in net.modules():  # each has a mode of its own: parts of a network may be frozen
            stack.callback(setattr, module, "training", module.training)
        net.eval()
        norm: Any
        for norm in filter(_is_fresh, net.modules()):
            stack.callback(setattr, norm, "track_running_stats", norm.track_running_stats)
            norm.training, norm.track_running_stats = True, False  # takes the batch's, updates nothing
        stack.enter_context(blocks[0][1].register_forward_pre_hook(stem_hook))
        for name, block in blocks:
            end, branch = _branch_end(block)
            if end is not None:
                stack.enter_context(end.register_forward_hook(branch_hook(block, branch)))
            stack.enter_context(block.register_forward_hook(block_hook(name)))
        net(x)
    return rows


# Where a signal that began with variance 1 has exploded or died: at a hundred times its magnitude, or a hundredth.
# Above 1e4 its square has no room left in float16, which ends at 65504, and below 1e-4 it soon loses digits, at 6e-5.
# Networks as they are made keep away: the smallest of each of timm's families and of ours have variances of 2e-3 to 18.
EXPLODED, DEAD = 1e4, 1e-4


def _trouble(key: str, value: float) -> str | None:
    if not math.isfinite(value):
        return "is not finite"
    if value > EXPLODED:
        return "explodes"
    return "dies" if value < DEAD and key != "avg_sq_mean" else None  # a mean may well be 0


def troubles(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """In plain words, where in the rows of `signal_stats` something is not finite, explodes or dies; [] if nowhere."""
    meanings = {
        "is not finite": "nothing computed from it can be used",
        "explodes": "a hundred times the magnitude of the input and more; half precision overflows soon",
        "dies": "less than a hundredth of the magnitude of the input is left of what tells pictures apart",
    }
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for key, words in PANELS.items():
            value = row[key]
            if value is not None and (kind := _trouble(key, value)):
                what = "residual branch" if key == "res_avg_var" else "signal"
                found.setdefault((kind, what), []).append(f"{row['name']} ({words} {value:.2g})")
    return [
        f"the {what} {kind}, first at {found[kind, what][0]}; {meanings[kind]}"
        for kind in meanings
        for what in ("signal", "residual branch")
        if (kind, what) in found
    ]
