"""Upper bounds on what NFNet-F0 asks of an accelerator, counted on meta tensors."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import counts
from tests.support import OLD_TORCH, fake_cuda
from tests.support.small_nets import create
from tests.support.triton_targets import NEEDS_TRITON
from timm_nf.layers import standardize_triton

# Of gradients of channels_last weights, which older torch has contiguous on the meta device, so that they are copied.
COPIES = 80 if OLD_TORCH else 0


class Names(TorchDispatchMode):
    """The operations that are counted, with the number of elements of their results and the dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[tuple[str, int, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(out, Tensor) and name not in counts.VIEWS and not name.startswith("empty"):
            self.kernels.append((name, out.numel(), out.dtype))
        return out


def test_a_training_step_keeps_within_its_kernels_bytes_and_memory() -> None:
    ours, stock = counts.step("nfnet_f0", 128), counts.step("dm_nfnet_f0", 128)
    assert ours.kernels - COPIES <= 500
    assert ours.moved <= (50.2e9 if COPIES else 50.0e9)
    assert ours.saved <= 11.9e9
    assert ours.kernels - COPIES < 0.65 * stock.kernels
    assert ours.moved < 0.5 * stock.moved
    assert ours.saved < 0.9 * stock.saved


def test_under_autocast_a_step_moves_half_of_its_bytes() -> None:
    ours, stock = counts.step("nfnet_f0", 128, half=True), counts.step("dm_nfnet_f0", 128, half=True)
    assert ours.kernels - COPIES <= 750
    assert ours.moved <= (25.9e9 if COPIES else 25.8e9)
    assert ours.saved <= 6.05e9
    assert ours.kernels - COPIES < 0.7 * stock.kernels
    assert ours.moved < 0.5 * stock.moved


def test_standardisation_by_itself_is_two_kernels_a_convolution() -> None:
    ours, weights = counts.standardisation("timm_nf")
    assert ours.kernels <= 3 * 57
    assert ours.moved <= 5.5 * weights
    assert ours.saved <= 1.01 * weights


def test_standardisation_without_triton_is_sixteen_kernels_a_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standardize_triton, "has_triton", lambda device_type: False)
    ours, weights = counts.standardisation("timm_nf")
    assert ours.kernels <= 16 * 57
    assert ours.moved <= 18 * weights
    assert ours.saved <= 1.05 * weights


@NEEDS_TRITON
@fake_cuda.NEEDS_NO_DRIVER
def test_the_casts_made_for_meta_tensors_are_those_of_autocast() -> None:
    # Forward only, as torch's engine asks for the device behind a fake tensor.
    model, found = create("NFNet", device="meta"), []
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for device, fake, casts in (
        ("meta", nullcontext(), counts.autocast()),
        ("cuda", FakeTensorMode(), fake_cuda.autocast()),
    ):
        with fake:
            parameters = {k: torch.empty(v, device=device, requires_grad=True) for k, v in shapes.items()}
            x = torch.empty(2, 3, 64, 64, device=device)
            with Names() as names, casts:
                assert torch.func.functional_call(model, parameters, (x,)).dtype is torch.bfloat16
        found.append(names.kernels)
    assert sorted(map(str, found[0])) == sorted(map(str, found[1]))


def test_views_products_and_allocations_are_free_and_the_rest_counts_what_it_reads_and_writes() -> None:
    weight = nn.Parameter(torch.empty(8, 4, device="meta"))
    x = torch.empty(2, 4, device="meta")

    def function() -> Tensor:
        return F.linear(x, weight).view(16).relu()

    # relu reads and writes 16 numbers, its backward pass reads twice as many; relu keeps its result, linear its input
    got = counts.count(function)
    assert got == counts.Counts(2, 4 * (32 + 48), 4 * (16 + 8))


@pytest.mark.slow  # the table counts six steps
def test_the_page_holds_the_table_that_the_command_writes() -> None:
    page = counts.PAGE.read_text()
    table = page.split(counts.START)[1].split(counts.END)[0]
    assert table == counts.tables(counts.BANDWIDTH)
