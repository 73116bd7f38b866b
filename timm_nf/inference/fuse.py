"""Networks for inference: standardised weights are computed once and baked into plain convolutions.

timm's `reparameterize_model` does the same to our layers. This exists because it leaves timm's own standardised
layers as they are, and because a model should say that it was fused.
"""

# The layers of timm that are taken apart here have no types.
# pyright: standard, reportPrivateImportUsage=false

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d as StockScaledStdConv2d
from timm.layers import ScaledStdConv2dSame, StdConv2d, StdConv2dSame, create_conv2d
from torch import nn

from ..layers.std_conv import (
    ScaledStdConv1d,
    ScaledStdConv2d,
    ScaledStdConv3d,
    ScaledStdConvTranspose1d,
    ScaledStdConvTranspose2d,
    ScaledStdConvTranspose3d,
    ScaledStdLinear,
    bake,
)

__all__ = ["fuse"]


def _fuse_stock(conv: Any) -> nn.Conv2d:
    """One of timm's layers, which standardise by batch_norm over the fan-in: eps is added to the variance."""
    scale = (conv.gain * conv.scale).view(-1) if hasattr(conv, "gain") else None
    rows = conv.weight.reshape(1, conv.out_channels, -1)
    weight = F.batch_norm(rows, None, None, scale, training=True, eps=conv.eps).view_as(conv.weight)
    # A 1x1 kernel needs no padding at any stride, where timm's SAME layers go through a copy of the input.
    same = getattr(conv, "same_pad", False) and max(conv.kernel_size) > 1
    plain: Any = create_conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding="same" if same else conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=conv.bias is not None,
        device="meta",
    )
    return bake(plain, conv, weight)


_OURS = (
    ScaledStdConv1d,
    ScaledStdConv2d,
    ScaledStdConv3d,
    ScaledStdConvTranspose1d,
    ScaledStdConvTranspose2d,
    ScaledStdConvTranspose3d,
    ScaledStdLinear,
)
_FUSE: dict[type, Callable[[Any], nn.Module]] = {
    **{layer: layer.fuse for layer in _OURS},
    StockScaledStdConv2d: _fuse_stock,
    ScaledStdConv2dSame: _fuse_stock,
    StdConv2d: _fuse_stock,
    StdConv2dSame: _fuse_stock,
}


def fuse(model: nn.Module) -> nn.Module:
    """A copy with plain convolutions and the same outputs, for inference.

    Works on our networks, on timm's with `ScaledStdConv2d`, `StdConv2d` and their SAME forms (NFNets, BiT, hybrid
    vision transformers), on every layer of `timm_nf.layers` with a standardised weight, and on modules that contain
    them. Names stay, gains are gone. Where the padding depends on the size of the input (SAME, a stride, a kernel
    larger than 1), a subclass of torch's convolution pads before it convolves.

    A fused network of ours saves and reloads as `create_model(name, fused=True)`. timm's architectures have no such
    argument: `hub.write_folder` and `push` refuse them, and as `model_args` says fused all the same, a folder that timm
    itself saved stops timm instead of loading wrong weights. `timm-nf export` writes both for other run times.

    Modes are kept, module by module: in training mode dropout and stochastic depth act as before. A fused model can be
    trained, but nothing keeps its weights standardised, so that it is another, worse behaved network than the original;
    fine-tune that one and fuse the result.

    Args:
        model: Any module with standardised convolutions; not changed. No tensors are shared with it.

    Returns:
        The copy, whose attribute `fused` is true.

    Raises:
        ValueError: if there is nothing to fuse, as after fusing, or something that cannot be fused: a traced graph, a
            subclass or parametrisation of a known layer, a layer with hooks.
    """
    if any(isinstance(module, torch.fx.GraphModule) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} holds a traced graph with the old formula in it: fuse, then trace")
    convs = {name: module for name, module in model.named_modules() if isinstance(module, tuple(_FUSE))}
    if not convs:
        hint = "it is fused already" if getattr(model, "fused", False) else "expected an NFNet, a BiT or a hybrid"
        raise ValueError(f"{type(model).__name__} has no standardised convolution to fuse: {hint}")
    for name, conv in convs.items():
        if type(conv) not in _FUSE:
            raise ValueError(
                f"{name} is a {type(conv).__name__}, a formula of its own: fuse works on the layer it extends"
            )
        if conv._forward_hooks or conv._forward_pre_hooks:
            raise ValueError(f"{name} has hooks, which would be lost: remove them, fuse, and put them on the copy")
    with torch.no_grad():
        # What is in the memo counts as copied already.
        fused: Any = copy.deepcopy(model, {id(conv): _FUSE[type(conv)](conv) for conv in convs.values()})
    if not getattr(fused, "fused", False):  # ours, compiled or not, look it up
        fused.fused = True
        fused._model_args = getattr(model, "_model_args", {}) | {"fused": True}
    return fused
