"""Small networks of the three families, with the synthetic parameters of the golden files."""

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

import timm_nf
from tests.support.reference_nfnet import Net
from timm_nf import _relative_error
from timm_nf.verify.golden import fill, image

NAMES = {"NFNet": "nfnet_f0", "NF_ResNet": "dm_nf_resnet50", "NF_RegNet": "dm_nf_regnet_b0"}
NETS = {
    "NFNet": Net("NFNet", (1, 2, 1, 1), (32, 64, 96, 96), num_classes=10, group_size=8),
    "NF_ResNet": Net("NF_ResNet", (1, 2, 1, 1), (32, 64, 96, 128), num_classes=10),
    "NF_RegNet": Net("NF_RegNet", (1, 2, 1, 1), (32, 64, 96, 96), num_classes=10),
}
SHORT = {
    "NFNet": Net("NFNet", (1, 2), (32, 48), num_classes=4, group_size=8),
    "NF_ResNet": Net("NF_ResNet", (1, 2), (32, 64), num_classes=4),
    "NF_RegNet": Net("NF_RegNet", (1, 2), (32, 48), num_classes=4),
}
FAMILIES = list(NETS)


def tree(net: Net) -> dict[str, dict[str, np.ndarray]]:
    """The authors' parameter tree of `net`, in float64."""
    return {m: {n: fill(shape, m, n) for n, shape in entries.items()} for m, entries in net.shapes().items()}


def keywords(net: Net) -> dict[str, Any]:
    """`net` as keywords of `timm.create_model`, only what differs from the registry's row of its family."""
    default = Net(net.family, net.depths, net.channels)
    fields = {f.name: getattr(net, f.name) for f in dataclasses.fields(net) if f.name != "family"}
    kwargs = {k: v for k, v in fields.items() if k in ("depths", "channels") or v != getattr(default, k)}
    if "rd_ratio" in kwargs:
        rd_ratio = kwargs.pop("rd_ratio")
        kwargs |= (
            {"attn_layer": None} if rd_ratio is None else {"attn_layer": "se", "attn_kwargs": {"rd_ratio": rd_ratio}}
        )
    return kwargs


@cache
def _state_dict(net: Net) -> dict[str, Tensor]:
    return timm_nf.convert.haiku_to_timm(tree(net))


def state_dict(net: Net, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {k: v.to(dtype, copy=True) for k, v in _state_dict(net).items()}


def create(net: Net | str, **kwargs: Any) -> Any:
    """A small network, or that of a family, as timm initialises it."""
    net = NETS[net] if isinstance(net, str) else net
    return timm.create_model(NAMES[net.family], **(keywords(net) | kwargs))


def build(net: Net | str, dtype: torch.dtype = torch.float64, **kwargs: Any) -> Any:
    """The network in evaluation mode with the synthetic parameters; `kwargs` may not change their shapes."""
    net = NETS[net] if isinstance(net, str) else net
    # create_model would drop the keywords that are None
    model = timm.models.model_entrypoint(NAMES[net.family])(**keywords(net), **kwargs).to(dtype)
    model.load_state_dict(state_dict(net, dtype), strict=True)
    return model.eval()


def batch(n: int = 2, h: int = 64, w: int = 64, dtype: torch.dtype = torch.float64) -> Tensor:
    return image(n, h, w).to(dtype)


def nchw(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def relative_error(got: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    """The package's relative error, also of arrays."""
    return _relative_error.relative_error(torch.as_tensor(got), torch.as_tensor(expected))
