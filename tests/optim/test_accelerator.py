"""What a clipped step does on an accelerator, seen on meta tensors: nothing that a CUDA graph cannot record."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import timm_nf
from tests.support.small_nets import create

# What reads a value on the host or gives a result whose size is a value.
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2"}


class Recorded(TorchDispatchMode):
    """Fails where a CUDA graph would: at a read on the host, a copy to it, a size or an index that is a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in READS, name
        out = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and x.is_meta for x in args):
            for x in out if isinstance(out, (tuple, list)) else [out]:
                assert not isinstance(x, Tensor) or x.is_meta, f"{name} leaves the device"
        return out


def small() -> nn.Module:
    model = create("NFNet", device="meta")
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    return model


def test_a_clipped_step_can_be_recorded() -> None:
    optimizer = timm.optim.create_optimizer_v2(small(), "agcsgd", lr=0.1, weight_decay=2e-5, clip_factor=0.01)
    for _ in range(2):  # the first step makes the buffers
        with Recorded():
            optimizer.step()


def test_clipping_gradients_by_themselves_can_be_recorded() -> None:
    with Recorded():
        timm_nf.adaptive_clip_grad_(list(small().parameters()))


@pytest.mark.parametrize(
    ("read", "operation"),
    [(Tensor.item, "_local_scalar_dense"), (float, "_local_scalar_dense"), (Tensor.nonzero, "nonzero")],
    ids=["item", "float", "nonzero"],
)
def test_what_a_graph_cannot_record_is_found(read: Callable[[Tensor], Any], operation: str) -> None:
    # The mode's own error: meta tensors refuse copies to the host and masks by themselves, with other ones.
    with pytest.raises(AssertionError, match=f"^{operation}"), Recorded():
        read(torch.empty(1, device="meta"))
