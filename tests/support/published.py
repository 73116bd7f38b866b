"""A small network as people publish it: with labels, a licence, and no parameter that is zero."""

from typing import Any

import torch

from tests.support import small_nets
from tests.support.reference_nfnet import Net
from tests.support.small_nets import batch

CARD = {"license": "mit"}
LABELS = [f"kind {i}" for i in range(10)]


def create(net: Net | str = "NFNet", **kwargs: Any) -> Any:
    """A small network as timm's factory makes it. None of its parameters is zero."""
    overlay = {"input_size": (3, 64, 64), "test_input_size": None, "label_names": LABELS, "crop_pct": 0.77}
    net = small_nets.NETS[net] if isinstance(net, str) else net
    model = small_nets.create(net, pretrained_cfg_overlay=overlay, **kwargs)
    model.load_state_dict(small_nets.state_dict(net, torch.float32))
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch(dtype=next(model.parameters()).dtype))
