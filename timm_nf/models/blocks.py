"""The residual block and the stems of the normalizer-free networks (arXiv:2102.06171, section 3).

No constant scales an activation, which would cost a pass over memory:

- gamma and beta scale the standardised weight of the next convolution, also if an average pool stands between.
- alpha, the skip gain and the 2 of squeeze-excite scale the gate. A block ends in one addcmul, see `add_scaled`.

Source: deepmind-research nfnets/{nfnet,nf_resnet,nf_regnet}.py at f5de0ede.

Examples:
    >>> from timm_nf.variants import NfCfg
    >>> cfg = NfCfg(depths=(1,), channels=(32,), group_size=8)
    >>> stem, stride, _ = make_stem(cfg, in_chans=3, dd={})
    >>> block = NormFreeBlock(
    ...     cfg, 16, 32, beta=1.0, nominal_stride=1, stride=1, dilation=(1, 1), drop_path_rate=0.0, first=True
    ... )
    >>> stride, block(stem(torch.zeros(1, 3, 32, 32))).shape
    (4, torch.Size([1, 32, 8, 8]))
"""

# torch's types of constructors and hooks are incomplete.
# pyright: reportUnknownMemberType=false

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.activations import activation_gain, create_activation
from ..layers.drop import StochasticDepth
from ..layers.pool2d_same import SameAvgPool2d, SameMaxPool2d
from ..layers.residual import add_scaled
from ..layers.squeeze_excite import SqueezeExcite
from ..layers.std_conv import ScaledStdConv2d
from ..variants import DEEP_STEM, NfCfg

__all__ = ["Downsample", "NormFreeBlock", "make_stem"]


class Downsample(nn.Module):
    """Shortcut of a block that changes resolution or width: a 1x1 convolution, after an average pool if there is one.

    Args:
        conv: The convolution.
        pool_stride: Stride of the average pool, None for no pool.

    Examples:
        >>> Downsample(torch.nn.Conv2d(8, 16, 1), pool_stride=2)(torch.zeros(1, 8, 5, 5)).shape
        torch.Size([1, 16, 3, 3])
    """

    def __init__(self, conv: nn.Module, pool_stride: int | None) -> None:
        super().__init__()
        self.pool = nn.Identity() if pool_stride is None else SameAvgPool2d(pool_stride)
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, ceil(H / stride), ceil(W / stride))."""
        return self.conv(self.pool(x))


class NormFreeBlock(nn.Module):
    """`shortcut + alpha * skip_gain * branch(act(x) / beta)`, arXiv:2102.06171, section 3.

    Args:
        cfg: The network's configuration.
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        beta: Expected standard deviation of the input.
        nominal_stride: The block's stride at the network's full output stride. It decides whether the block has a
            shortcut convolution. Parameter names therefore do not depend on the output stride.
        stride: The block's actual stride.
        dilation: Dilations of the first and of the second 3x3 convolution.
        drop_path_rate: Rate of stochastic depth.
        first: Whether it is the first block of the network.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        cfg: NfCfg,
        in_chs: int,
        out_chs: int,
        beta: float,
        nominal_stride: int,
        stride: int,
        dilation: tuple[int, int],
        drop_path_rate: float,
        first: bool,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        conv = partial(ScaledStdConv2d, **dd)
        gamma = activation_gain(cfg.act_layer)
        mid_chs, groups = cfg.bottleneck(in_chs, out_chs, first)
        attn = partial(SqueezeExcite, **cfg.attn_kwargs, **dd)
        self.alpha = cfg.alpha

        if nominal_stride > 1 or in_chs != out_chs:
            pool = cfg.avg_down and nominal_stride > 1
            shortcut = conv(in_chs, out_chs, 1, stride=1 if pool else stride, scale=gamma / beta)
            self.downsample = Downsample(shortcut, stride if pool else None)
        else:
            self.downsample = None
        self.act1 = create_activation(cfg.act_layer)
        self.conv1 = conv(in_chs, mid_chs, 1, scale=gamma / beta)
        self.act2 = create_activation(cfg.act_layer)
        self.conv2 = conv(mid_chs, mid_chs, 3, stride, dilation=dilation[0], groups=groups, scale=gamma)
        self.act2b = self.conv2b = None
        if cfg.extra_conv:
            self.act2b = create_activation(cfg.act_layer)
            self.conv2b = conv(mid_chs, mid_chs, 3, dilation=dilation[1], groups=groups, scale=gamma)
        self.attn = attn(mid_chs) if cfg.attn_layer and cfg.reg else None
        self.act3 = create_activation(cfg.act_layer)
        self.conv3 = conv(mid_chs, out_chs, 1, scale=gamma)
        self.attn_last = attn(out_chs) if cfg.attn_layer and not cfg.reg else None
        self.drop_path = StochasticDepth(drop_path_rate) if drop_path_rate > 0 else None
        # Shape (1,), not (): FSDP2 refuses to shard scalar parameters.
        self.skipinit_gain = nn.Parameter(torch.zeros(1, **dd))

    def reset_parameters(self) -> None:
        """Set the skip gain to 0, so that the block starts as its shortcut. Its layers have their own method."""
        nn.init.zeros_(self.skipinit_gain)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        key = f"{prefix}skipinit_gain"
        if key in state_dict and state_dict[key].ndim == 0:  # timm's blocks have a scalar
            state_dict[key] = state_dict[key].reshape(1)  # torch has copied the caller's dict
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, ceil(H / stride), ceil(W / stride))."""
        out = self.act1(x)
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.conv2(self.act2(self.conv1(out)))
        if self.act2b is not None and self.conv2b is not None:
            out = self.conv2b(self.act2b(out))
        if self.attn is not None:
            out = out * (2 * self.attn(out))
        out = self.conv3(self.act3(out))
        scale = self.alpha
        gate: Tensor | None = None
        if self.attn_last is not None:
            scale = 2 * scale
            gate = self.attn_last(out)
        gain = scale * self.skipinit_gain
        if self.drop_path is not None:
            gain = self.drop_path(gain, out)
        return add_scaled(shortcut, out, gain, gate)


def make_stem(cfg: NfCfg, in_chans: int, dd: dict[str, Any]) -> tuple[nn.Sequential, int, dict[str, Any]]:
    """Build the stem.

    Args:
        cfg: The network's configuration.
        in_chans: Channels of the input.
        dd: Device and dtype of the parameters.

    Returns:
        The stem, its stride, and the entry in timm's `feature_info` for its feature at half resolution.
    """
    out_chs, conv = cfg.stem_out_chs(), partial(ScaledStdConv2d, **dd)
    if cfg.stem_type == "3x3":
        stem = nn.Sequential(OrderedDict(conv=conv(in_chans, out_chs, 3, stride=2)))
        return stem, 2, {"num_chs": out_chs, "reduction": 2, "module": "stem.conv"}
    if cfg.stem_type == "7x7_pool":
        stem = nn.Sequential(OrderedDict(conv=conv(in_chans, out_chs, 7, stride=2), pool=SameMaxPool2d()))
        return stem, 4, {"num_chs": out_chs, "reduction": 2, "module": "stem.conv"}
    gamma = activation_gain(cfg.act_layer)
    chs1, chs2, chs3 = DEEP_STEM
    stem = nn.Sequential(
        OrderedDict(
            conv1=conv(in_chans, chs1, 3, stride=2),
            act2=create_activation(cfg.act_layer),
            conv2=conv(chs1, chs2, 3, scale=gamma),
            act3=create_activation(cfg.act_layer),
            conv3=conv(chs2, chs3, 3, scale=gamma),
            act4=create_activation(cfg.act_layer),
            conv4=conv(chs3, out_chs, 3, stride=2, scale=gamma),
        )
    )
    return stem, 4, {"num_chs": chs3, "reduction": 2, "module": "stem.conv3"}
