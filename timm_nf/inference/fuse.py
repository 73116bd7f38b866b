"""Fuses networks for inference: computes the standardised weights once, and stores them in plain convolutions.

timm's `reparameterize_model` does the same to our layers, but it does not fuse timm's own standardised layers, and it
does not mark the model as fused.
"""

# timm's layers have no types.
# pyright: standard, reportPrivateImportUsage=false

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d as StockScaledStdConv2d
from timm.layers import ScaledStdConv2dSame, StdConv2d, StdConv2dSame, create_conv2d
from torch import nn

from ..layers.std_conv import STANDARDIZED_LAYERS, bake

__all__ = ["fuse"]


def _fuse_stock(conv: Any) -> nn.Conv2d:
    """Fuse one of timm's layers. They standardise by batch_norm over the fan-in, which adds eps to the variance."""
    scale = (conv.gain * conv.scale).view(-1) if hasattr(conv, "gain") else None
    rows = conv.weight.reshape(1, conv.out_channels, -1)
    weight = F.batch_norm(rows, None, None, scale, training=True, eps=conv.eps).view_as(conv.weight)
    # A 1x1 kernel needs no padding at any stride. timm's SAME layers would copy the input.
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


_FUSE: dict[type, Callable[[Any], nn.Module]] = {
    **{layer: layer.fuse for layer in STANDARDIZED_LAYERS},
    StockScaledStdConv2d: _fuse_stock,
    ScaledStdConv2dSame: _fuse_stock,
    StdConv2d: _fuse_stock,
    StdConv2dSame: _fuse_stock,
}


def fuse(model: nn.Module) -> nn.Module:
    """Copy a model and replace its standardised convolutions by plain ones with the same outputs. For inference.

    It works on our networks, on timm's networks with `ScaledStdConv2d`, `StdConv2d` or their SAME forms (NFNets, BiT,
    hybrid vision transformers), on every layer of `timm_nf.layers` with a standardised weight, and on modules that
    contain such networks or layers.

    Parameter names stay. Gains disappear. If the padding depends on the size of the input (SAME, with a stride and a
    kernel larger than 1), the plain convolution is a subclass of torch's that pads first.

    Saving: a fused network of ours is saved and created again with `create_model(name, fused=True)`. timm's
    architectures have no such argument, so `hub.write_folder` and `push` refuse them once fused. If timm itself saves
    them, its loader raises on `fused` in the saved arguments, and loads no wrong weights. `timm-nf export` writes both
    for other run times.

    Training: every module keeps its mode, so dropout and stochastic depth act as before. A fused model can be trained,
    but nothing keeps its weights standardised, and it trains worse. Fine-tune the original and fuse the result.

    Args:
        model: A module with standardised convolutions. It is not changed.

    Returns:
        The copy. It shares no tensor with `model`. Its attribute `fused` is true.

    Raises:
        ValueError: if there is nothing to fuse, or if something cannot be fused: a traced graph, a subclass or
            parametrisation of a known layer, or a layer with hooks.

    Examples:
        >>> import timm, timm_nf
        >>> model = timm.create_model(
        ...     "nfnet_f0", depths=(1, 1, 1, 1), channels=(16, 16, 32, 32), group_size=8, num_classes=3
        ... )
        >>> type(fuse(model).stages[0][0].conv1)
        <class 'torch.nn.modules.conv.Conv2d'>
    """
    if any(isinstance(module, torch.fx.GraphModule) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} holds a traced graph, which cannot be fused: fuse the model first, then trace it"
        )
    convs = {name: module for name, module in model.named_modules() if isinstance(module, tuple(_FUSE))}
    if not convs:
        hint = "it is fused already" if getattr(model, "fused", False) else "expected an NFNet, a BiT or a hybrid"
        raise ValueError(f"{type(model).__name__} has no standardised convolution to fuse: {hint}")
    for name, conv in convs.items():
        if type(conv) not in _FUSE:
            raise ValueError(
                f"{name} is a {type(conv).__name__}, which may have another formula: fuse only knows the layer that "
                "it extends"
            )
        if conv._forward_hooks or conv._forward_pre_hooks:
            raise ValueError(f"{name} has hooks, which would be lost: remove them, fuse, and add them to the copy")
    with torch.no_grad():
        # deepcopy does not copy what its memo contains: it uses the fused convolutions instead.
        fused: Any = copy.deepcopy(model, {id(conv): _FUSE[type(conv)](conv) for conv in convs.values()})
    if not getattr(fused, "fused", False):  # for our networks it is a property, also if they are compiled
        fused.fused = True
        fused._model_args = getattr(model, "_model_args", {}) | {"fused": True}
    return fused
