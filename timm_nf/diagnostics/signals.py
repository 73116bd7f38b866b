"""Signal propagation of a network, block by block (arXiv:2101.08692, section 3).

The numbers equal those of the authors' code (nfnets/base.py, signal_metrics). timm's `extract_spp_stats` leaves its
hooks on the model, runs it in training mode and does not see the residual branch.
"""

# timm and torch type only a part of what they export.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, TypedDict

import torch
from timm.models.nfnet import NormFreeBlock as StockNormFreeBlock
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.resnetv2 import PreActBasic, PreActBottleneck
from torch import Tensor, nn

from .._wrappers import innermost
from ..layers.residual import SkipInit
from ..models.blocks import NormFreeBlock

__all__ = ["DEAD", "EXPLODED", "PANELS", "SignalStats", "signal_stats", "troubles"]

Statistic = Literal["avg_sq_mean", "avg_var", "res_avg_var"]


class SignalStats(TypedDict):
    """The signal after one block, or at the input of the first block.

    Attributes:
        name: The block's name in the model, or "stem".
        avg_sq_mean: The mean over channels of the squared channel mean.
        avg_var: The mean over channels of the channel variance.
        res_avg_var: The variance of the residual branch, before stochastic depth and the skip gain. None for the stem
            and outside NFNets and ResNets.
        expected_var: The variance that a normalizer-free network is built for; None for other networks.
    """

    name: str
    avg_sq_mean: float
    avg_var: float
    res_avg_var: float | None
    expected_var: float | None


PANELS: dict[Statistic, str] = {
    "avg_sq_mean": "average squared channel mean",
    "avg_var": "average channel variance",
    "res_avg_var": "variance of the residual branch",
}
"""The statistics that are drawn, with their titles."""
# The last module of a block's residual branch.
_BRANCH_ENDS: dict[type[nn.Module], str] = {
    NormFreeBlock: "conv3",
    StockNormFreeBlock: "drop_path",
    PreActBasic: "drop_path",
    PreActBottleneck: "drop_path",
    BasicBlock: "bn2",
    Bottleneck: "bn3",
}
_CONTAINER = re.compile(r"stages|blocks|layers|layer[1-4]|s[1-4]")  # timm's names of the parts that hold blocks
# Parts with blocks of another kind, beside those: HRNet's stage2, CaiT's blocks_token_only.
_ALIKE = re.compile(r"stage|block|layer(?!0)")


# -- finding blocks ----------------------------------------------------------------------------------------------------


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of a network, by the names that timm gives to the parts that hold them."""
    parts = dict(model.named_children())
    held = [name for name in parts if _CONTAINER.fullmatch(name)]
    for name, module in parts.items():
        if name in held:
            yield from _blocks_in(name, module)
        elif held and _ALIKE.match(name) and isinstance(module, nn.Sequential | nn.ModuleList):
            raise TypeError(f"{type(model).__name__} has blocks in {name!r} as well, which signal_stats does not know")


def _blocks_in(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks in one part of a network. `name` is the part's name."""
    children = dict(module.named_children())
    if "blocks" in children:  # beside a layer that changes resolution: ConvNeXt, ResNetV2, Swin
        yield from _blocks_in(f"{name}.blocks", children["blocks"])
    elif type(module) in (nn.Sequential, nn.ModuleList) or "b1" in children:  # RegNet has s1.b1
        for key, child in children.items():
            yield from _blocks_in(f"{name}.{key}", child)
    else:
        yield name, module


def _skips(model: nn.Module) -> dict[str, tuple[nn.Module, SkipInit]]:
    """The blocks that end in a `SkipInit`, by name, each with its `SkipInit`."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    ends = {name.rpartition(".")[0]: module for name, module in modules.items() if isinstance(module, SkipInit)}
    return {name: (modules[name], end) for name, end in ends.items()}


# -- statistics --------------------------------------------------------------------------------------------------------


def _channels_first(model: nn.Module, name: str, out: object) -> Tensor:
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
    """The mean squared channel mean and the mean channel variance of (N, C, ...)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(0, 1).flatten(1)
    var, mean = torch.var_mean(x, 1, correction=0)
    return mean.square().mean().item(), var.mean().item()


# Computes a branch's output from the arguments and the output of the branch's last module.
_Branch = Callable[[tuple[Any, ...], Tensor], Tensor]


def _gated(args: tuple[Any, ...], out: Tensor) -> Tensor:
    """The branch's output if its last module returns the gate of squeeze-excite for its argument."""
    return 2 * out * args[0]


def _as_it_is(_: tuple[Any, ...], out: Tensor) -> Tensor:
    return out


def _branch_end(block: Any) -> tuple[nn.Module | None, _Branch]:
    """The last module of a residual branch, and how to compute the branch's output from it."""
    if isinstance(block, NormFreeBlock) and block.attn_last is not None:
        return block.attn_last, _gated
    for block_class, end in _BRANCH_ENDS.items():
        if isinstance(block, block_class):
            return getattr(block, "se", None) or getattr(block, end), _as_it_is
    return None, _as_it_is


def _is_norm_free(block: nn.Module) -> bool:
    return isinstance(block, NormFreeBlock | StockNormFreeBlock)


def _is_fresh(norm: Any) -> bool:
    """Whether a module is batch normalisation whose running statistics are those of its initialisation."""
    if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
        return False
    return not norm.running_mean.any() and bool((norm.running_var == 1).all())


@torch.no_grad()
def signal_stats(model: nn.Module, x: Tensor) -> list[SignalStats]:
    """Statistics of the signal at the first block's input and after every block, in evaluation mode.

    Batch normalisation that has never seen data takes the statistics of `x`, as in the first step of a training. With
    its initial mean 0 and variance 1 it would do nothing.

    `expected_var` is 1 for the stem, and 1 + k alpha^2 for block k of a stage. Blocks that `normalizer_free` made have
    their own number. It is None for other networks. The variance follows it if skip gains are 1 and no shortcut pools:
    the mean of four independent values has a quarter of their variance.

    Args:
        model: A network of timm with blocks, wrapped or not; or any network whose residual blocks end in `SkipInit`, as
            those of `normalizer_free` do. Parameters, buffers, modes and hooks stay as they are.
        x: (N, in_chans, H, W) on the model's device. Networks with `SkipInit` may have any number of axes.

    Returns:
        One row for the stem and one for every block.

    Raises:
        TypeError: if the model has no blocks, or some in parts with unknown names, or if its blocks return neither
            images nor tokens.

    Examples:
        >>> import timm, timm_nf
        >>> model = timm.create_model(
        ...     "nfnet_f0", depths=(1, 1, 1, 1), channels=(16, 16, 32, 32), group_size=8, num_classes=3
        ... )
        >>> rows: list[SignalStats] = signal_stats(model, torch.randn(2, 3, 32, 32))
        >>> rows[1]["expected_var"]
        1.04
    """
    net = innermost(model)
    recorder = _Recorder(net)
    with ExitStack() as undo:
        _evaluate(net, undo)
        recorder.attach(undo)
        net(x)
    return recorder.rows


class _Recorder:
    """Hooks that add a row of statistics for the stem and for every block."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.rows: list[SignalStats] = []
        self.branch_vars: dict[nn.Module, float] = {}  # of blocks whose branch has run, and whose output has not come

    def attach(self, undo: ExitStack) -> None:
        """Register the hooks. `undo` removes them.

        Raises:
            TypeError: if there are no blocks.
        """
        if skips := _skips(self.net):
            self.attach_to_skips(skips, undo)
        elif blocks := list(_blocks(self.net)):
            self.attach_to_blocks(blocks, undo)
        else:
            raise TypeError(
                f"expected a network with residual blocks in stages, blocks, layers, layer1 or s1, as timm names them, "
                f"got {type(self.net).__name__}"
            )

    def attach_to_blocks(self, blocks: list[tuple[str, nn.Module]], undo: ExitStack) -> None:
        _, first = blocks[0]
        undo.enter_context(first.register_forward_pre_hook(self.on_first_input))
        for name, block in blocks:
            end, branch = _branch_end(block)
            if end is not None:
                undo.enter_context(end.register_forward_hook(partial(self.on_branch, block, branch)))
            undo.enter_context(block.register_forward_hook(partial(self.on_block, name)))

    def attach_to_skips(self, skips: dict[str, tuple[nn.Module, SkipInit]], undo: ExitStack) -> None:
        first, _ = next(iter(skips.values()))
        undo.enter_context(first.register_forward_pre_hook(self.on_first_signal))
        for name, (block, skip) in skips.items():
            undo.enter_context(skip.register_forward_hook(partial(self.on_skip, name, block)))

    def on_first_signal(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.add("stem", args[0], None, None)

    def on_skip(self, name: str, block: nn.Module, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        _, branch, *gate = args
        if gate and gate[0] is not None:
            branch = _gated((branch,), gate[0])
        self.add(name, out, _channel_stats(branch)[1], getattr(block, "expected_var", None))

    def on_first_input(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        x = _channels_first(self.net, "the first block's input", args[0])
        self.add("stem", x, None, 1.0 if _is_norm_free(block) else None)

    def on_branch(self, block: nn.Module, branch: _Branch, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        # Not later: an operation in place may overwrite the tensor.
        self.branch_vars[block] = _channel_stats(branch(args, out))[1]

    def on_block(self, name: str, block: Any, _: tuple[Any, ...], out: object) -> None:
        expected_var: float | None = None
        if _is_norm_free(block):
            position = int(name.rpartition(".")[2]) + 1
            expected_var = 1 + position * block.alpha**2
        self.add(name, _channels_first(self.net, name, out), self.branch_vars.pop(block, None), expected_var)

    def add(self, name: str, out: Tensor, res_avg_var: float | None, expected_var: float | None) -> None:
        avg_sq_mean, avg_var = _channel_stats(out)
        self.rows.append(
            {
                "name": name,
                "avg_sq_mean": avg_sq_mean,
                "avg_var": avg_var,
                "res_avg_var": res_avg_var,
                "expected_var": expected_var,
            }
        )


def _evaluate(net: nn.Module, undo: ExitStack) -> None:
    """Put a network into evaluation mode, except for batch normalisation that has never seen data.

    `undo` restores all modes.
    """
    for module in net.modules():  # each has its own mode: parts of a network may be frozen
        undo.callback(setattr, module, "training", module.training)
    net.eval()
    for norm in filter(_is_fresh, net.modules()):
        undo.callback(setattr, norm, "track_running_stats", norm.track_running_stats)
        norm.training = True  # takes the batch's statistics
        setattr(norm, "track_running_stats", False)  # noqa: B010  (updates nothing)


# -- what is wrong with a signal ---------------------------------------------------------------------------------------

# A signal begins with variance 1. It has exploded at a hundred times its magnitude, and died at a hundredth. float16
# has no values above 65504 and loses digits below 6e-5. Initialised networks stay away from both: the smallest of each
# of timm's families and of ours have variances from 2e-3 to 18.
EXPLODED = 1e4
"""A squared mean or variance above this is called exploded."""
DEAD = 1e-4
"""A variance below this is called dead."""


def _trouble(key: Statistic, value: float) -> str | None:
    if not math.isfinite(value):
        return "is not finite"
    if value > EXPLODED:
        return "explodes"
    if value < DEAD and key != "avg_sq_mean":  # a mean may be 0
        return "dies"
    return None


def troubles(rows: Sequence[SignalStats]) -> list[str]:
    """Where a signal is not finite, explodes or dies, in words. The list is empty if nothing is wrong.

    Args:
        rows: The statistics that `signal_stats` returns.

    Examples:
        >>> row = {"name": "stem", "avg_sq_mean": 0.0, "avg_var": 1e-9, "res_avg_var": None, "expected_var": None}
        >>> troubles([row])[0].partition(",")[0]
        'the signal dies'
    """
    meanings = {
        "is not finite": "nothing computed from it can be used",
        "explodes": "a hundred times the magnitude of the input and more; half precision overflows soon",
        "dies": "pictures differ in it by less than a hundredth of the input's magnitude",
    }
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for key, words in PANELS.items():
            value = row[key]
            if value is not None and (trouble := _trouble(key, value)):
                what = "residual branch" if key == "res_avg_var" else "signal"
                found.setdefault((trouble, what), []).append(f"{row['name']} ({words} {value:.2g})")
    return [
        f"the {what} {trouble}, first at {found[trouble, what][0]}; {meaning}"
        for trouble, meaning in meanings.items()
        for what in ("signal", "residual branch")
        if (trouble, what) in found
    ]
