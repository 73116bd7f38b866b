"""Signal propagation of a network, block by block (arXiv:2101.08692, section 3).

timm's `extract_spp_stats` leaves its hooks on the model, runs it in training mode and does not see the residual
branch. These numbers equal those that the authors' code reports (nfnets/base.py, signal_metrics).
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
    """The signal after one block, or at the input of the first; see `signal_stats`."""

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
_BRANCH_ENDS: dict[type[nn.Module], str] = {
    NormFreeBlock: "conv3",
    StockNormFreeBlock: "drop_path",
    PreActBasic: "drop_path",
    PreActBottleneck: "drop_path",
    BasicBlock: "bn2",
    Bottleneck: "bn3",
}
_CONTAINER = re.compile(r"stages|blocks|layers|layer[1-4]|s[1-4]")  # what timm calls the parts that hold blocks
# Parts beside those that hold blocks of other kinds: HRNet's stage2, CaiT's blocks_token_only.
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


def _skips(model: nn.Module) -> dict[str, tuple[nn.Module, SkipInit]]:
    """The blocks that end in a `SkipInit`, and these."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    ends = {name.rpartition(".")[0]: module for name, module in modules.items() if isinstance(module, SkipInit)}
    return {name: (modules[name], end) for name, end in ends.items()}


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
    """Mean over channels of the squared mean and of the variance of (N, C, ...), over all other axes."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(0, 1).flatten(1)
    var, mean = torch.var_mean(x, 1, correction=0)
    return mean.square().mean().item(), var.mean().item()


Branch = Callable[[tuple[Any, ...], Tensor], Tensor]  # a module's arguments and output -> its branch's output


def _gated(args: tuple[Any, ...], out: Tensor) -> Tensor:
    """The branch's output, if its last module returns the gate of its argument."""
    return 2 * out * args[0]


def _as_it_is(_: tuple[Any, ...], out: Tensor) -> Tensor:
    return out


def _branch_end(block: Any) -> tuple[nn.Module | None, Branch]:
    """The last module of a residual branch, and how the branch's output follows from its arguments and output."""
    if isinstance(block, NormFreeBlock) and block.attn_last is not None:
        return block.attn_last, _gated
    for block_class, end in _BRANCH_ENDS.items():
        if isinstance(block, block_class):
            return getattr(block, "se", None) or getattr(block, end), _as_it_is
    return None, _as_it_is


def _is_norm_free(block: nn.Module) -> bool:
    return isinstance(block, NormFreeBlock | StockNormFreeBlock)


def _is_fresh(norm: Any) -> bool:
    """Whether a module is batch normalisation with the running statistics of its initialisation."""
    if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
        return False
    return not norm.running_mean.any() and bool((norm.running_var == 1).all())


@torch.no_grad()
def signal_stats(model: nn.Module, x: Tensor) -> list[SignalStats]:
    """Statistics of the signal at the first block's input and after every block, in evaluation mode.

    Batch normalisation that has never seen data takes the statistics of `x`, as in the first step of a training. With
    its initial mean 0 and variance 1 it would do nothing.

    Args:
        model: A network of timm with blocks, wrapped or not; or any network whose residual blocks end in `SkipInit`, as
            those of `normalizer_free` do. Parameters, buffers, modes and hooks are left as found.
        x: (N, in_chans, H, W), on the model's device; of any number of axes for blocks that end in `SkipInit`.

    Returns:
        One row for the stem and one for every block: `name`; `avg_sq_mean`, mean over channels of the squared channel
        mean; `avg_var`, mean channel variance; `res_avg_var`, that of the residual branch before stochastic depth and
        the skip gain, None for the stem and outside NFNets and ResNets; `expected_var`, 1 for the
        stem and 1 + k alpha^2 for the k-th block of a stage, None outside NFNets and blocks that `normalizer_free` has
        converted, which have their own number. The variance follows it where skip
        gains are 1, as far as no shortcut pools: the mean of four independent values has a quarter of the variance.

    Raises:
        TypeError: if the model has no blocks, or some in parts with other names, or if its blocks return neither images
            nor tokens.

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
    skips = _skips(net)
    blocks = [] if skips else list(_blocks(net))
    if not blocks and not skips:
        raise TypeError(
            f"expected a network with residual blocks in stages, blocks, layers, layer1 or s1, as timm names them, got "
            f"{type(net).__name__}"
        )
    recorder = _Recorder(net)
    with ExitStack() as undo:
        _evaluate(net, undo)
        recorder.attach(blocks, undo)
        recorder.attach_skips(skips, undo)
        net(x)
    return recorder.rows


class _Recorder:
    """Hooks that write a row of statistics for the stem and for every block."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.rows: list[SignalStats] = []
        self.branch_vars: dict[nn.Module, float] = {}  # of the blocks whose output is still to come

    def attach(self, blocks: list[tuple[str, nn.Module]], undo: ExitStack) -> None:
        """Register the hooks; `undo` removes them."""
        for name, block in blocks:
            if block is blocks[0][1]:
                undo.enter_context(block.register_forward_pre_hook(self.on_first_input))
            end, branch = _branch_end(block)
            if end is not None:
                undo.enter_context(end.register_forward_hook(partial(self.on_branch, block, branch)))
            undo.enter_context(block.register_forward_hook(partial(self.on_block, name)))

    def attach_skips(self, skips: dict[str, tuple[nn.Module, SkipInit]], undo: ExitStack) -> None:
        """Likewise, for blocks that end in a `SkipInit`."""
        for index, (name, (block, skip)) in enumerate(skips.items()):
            if index == 0:
                undo.enter_context(block.register_forward_pre_hook(self.on_first_signal))
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

    def on_branch(self, block: nn.Module, branch: Branch, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        # Computed here, as later operations may overwrite the tensor.
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
    """Put a network into evaluation mode, its new batch normalisation excepted; `undo` puts all back as it was."""
    for module in net.modules():  # each has a mode of its own: parts of a network may be frozen
        undo.callback(setattr, module, "training", module.training)
    net.eval()
    for norm in filter(_is_fresh, net.modules()):
        undo.callback(setattr, norm, "track_running_stats", norm.track_running_stats)
        norm.training = True  # takes the batch's statistics
        setattr(norm, "track_running_stats", False)  # noqa: B010  (updates nothing)


# A signal begins with variance 1. At a hundred times its magnitude it has exploded, at a hundredth it has died. float16
# ends at 65504, so there is no room for squares above 1e4, and it loses digits below 6e-5. Initialised networks stay
# away from both: the smallest of each of timm's families and of ours have variances of 2e-3 to 18.
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
    """In words, where a signal is not finite, explodes or dies; [] if nowhere.

    Args:
        rows: As `signal_stats` returns them.

    Examples:
        >>> row = {"name": "stem", "avg_sq_mean": 0.0, "avg_var": 1e-9, "res_avg_var": None, "expected_var": None}
        >>> troubles([row])[0].partition(",")[0]
        'the signal dies'
    """
    meanings = {
        "is not finite": "nothing computed from it can be used",
        "explodes": "a hundred times the magnitude of the input and more; half precision overflows soon",
        "dies": "less than a hundredth of the magnitude of the input is left of what tells pictures apart",
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
