"""What a clipped step does on an accelerator, seen on meta tensors: nothing that a CUDA graph cannot record."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import timm_nf
from tests.support.small_nets import create

VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # the results' or their sizes


class Recorded(TorchDispatchMode):
    """Fails where a CUDA graph would: where the host reads a value, a size is one, or memory comes from the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name, given = func.overloadpacket.__name__, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        # torch says of all indexing that sizes depend on values; they do where masks index
        by_value = bool(VALUES & set(func.tags)) and (name != "index" or any(x.dtype is torch.bool for x in given))
        assert not by_value, f"{name} reads values"
        to = torch.device(kwargs.get("device") or "meta")
        assert to.type == "meta" or not any(x.is_meta for x in given), f"{name} leaves the device"
        out = func(*args, **kwargs)
        if any(x.is_meta for x in tree_leaves(out) if isinstance(x, Tensor)):
            # A tensor without axes is a number among a kernel's arguments, unless it is what is copied.
            copied = name in ("_to_copy", "copy_")
            assert all(x.is_meta or not (x.ndim or copied) for x in given), f"{name} takes memory of the host"
        return out


class HostNumbers(TorchFunctionMode):
    """Fails where numbers that the host writes become a tensor of the device, which meta tensors do without a copy."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        written = func in (torch.tensor, torch.as_tensor, torch.asarray) and out.is_meta
        assert not written, f"{func.__name__} takes memory of the host"
        return out


@contextmanager
def recorded() -> Iterator[None]:
    with Recorded(), HostNumbers():
        yield


def small() -> nn.Module:
    model = create("NFNet", device="meta")
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    return model


def test_a_clipped_step_can_be_recorded() -> None:
    optimizer = timm.optim.create_optimizer_v2(small(), "agcsgd", lr=0.1, weight_decay=2e-5, clip_factor=0.01)
    for _ in range(2):  # the first step makes the buffers
        with recorded():
            optimizer.step()


def test_clipping_gradients_by_themselves_can_be_recorded() -> None:
    with recorded():
        timm_nf.adaptive_clip_grad_(list(small().parameters()))


META = {"device": "meta"}


@pytest.mark.parametrize(
    ("work", "error"),
    [
        (lambda x: x[0].item(), "_local_scalar_dense reads values"),
        (lambda x: float(x[0]), "_local_scalar_dense reads values"),
        (lambda x: bool(x.any()), "_local_scalar_dense reads values"),
        (lambda x: x.nonzero(), "nonzero reads values"),
        (lambda x: x[x > 0], "index reads values"),
        (lambda x: x.masked_select(x > 0), "masked_select reads values"),
        (lambda x: x.unique(), "_unique2 reads values"),
        (lambda x: torch.equal(x, x), "equal reads values"),
        (lambda x: torch.empty(int(x[0]), **META), "_local_scalar_dense reads values"),
        (lambda x: x.cpu(), "_to_copy leaves the device"),
        (lambda x: x.to("cpu", torch.float64), "_to_copy leaves the device"),
        (lambda x: x + torch.tensor([1.0, 2.0]).to("meta"), "_to_copy takes memory of the host"),
        (lambda x: x + torch.tensor([1.0, 2.0], **META), "tensor takes memory of the host"),
        (lambda x: x.copy_(torch.ones(2)), "copy_ takes memory of the host"),
    ],
)
def test_what_a_graph_cannot_record_is_found(work: Callable[[Tensor], Any], error: str) -> None:
    # By the mode and not by meta tensors' own errors.
    with pytest.raises(AssertionError, match=f"^{error}"), recorded():
        work(torch.empty(2, device="meta"))


def test_numbers_indices_and_fills_can_be_recorded() -> None:
    with recorded():
        x = torch.zeros(2, device="meta") * 3 + torch.tensor(1.0)
        x.masked_fill_(x > 0, 1.0)[torch.zeros(2, dtype=torch.long, device="meta")].add_(1)
