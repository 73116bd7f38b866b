"""The kernels of clipping against float64, to be run under TRITON_INTERPRET=1; test_unit_triton.py does."""

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.small_problems import loop_of_the_formula
from timm_nf.optim import _unit_kernels, agc, unit_triton
from timm_nf.optim.sharded import Shard

assert os.environ["TRITON_INTERPRET"] == "1"
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MIXED = [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.bfloat16)]
# several launches, several tensors in each, rows of one chunk and of more
SHAPES = [(5, 7, 3, 3), (3, 2500), (1, 4), (6, 1, 1, 1), (2, 1024), (2, 1025), (1,), (9,), (), (4, 3, 2, 2, 2)]


@pytest.fixture(autouse=True)
def small_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_unit_kernels, "TENSORS", 4)  # the interpreter takes a millisecond for each that is compared


def tensors(dtype: torch.dtype, seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i, shape in enumerate(SHAPES):
        x = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        found.append(x.to(memory_format=formats[x.ndim]) if x.ndim in formats and (i + seed) % 2 else x)
    return found


def counts() -> list[int]:
    return [shape[0] if sum(n > 1 for n in shape) > 1 else 1 for shape in SHAPES]


def rows(x: Tensor, count: int) -> Tensor:
    return x.double().reshape(count, -1)


@pytest.mark.parametrize(("weight_dtype", "grad_dtype"), [*zip(DTYPES, DTYPES, strict=True), *MIXED], ids=str)
def test_norms_equal_float64_in_all_dtypes(weight_dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    inputs = tensors(weight_dtype, 0), tensors(grad_dtype, 1)
    for got, given in zip(unit_triton.unit_norms(*inputs, counts()), inputs, strict=True):
        expected = torch.cat([rows(x, n).norm(dim=1) for x, n in zip(given, counts(), strict=True)])
        assert got.dtype is torch.promote_types(given[0].dtype, torch.float32)
        tolerance = 1e-14 if got.dtype is torch.float64 else 1e-6
        assert ((got.double() - expected).abs() <= tolerance * expected).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_units_are_scaled_in_place_and_rounded_once(dtype: torch.dtype) -> None:
    grads, before = tensors(dtype, 1), tensors(dtype, 1)
    scales = torch.rand(sum(counts()), dtype=torch.promote_types(dtype, torch.float32))
    scales[::3] = 1
    unit_triton.scale_units_(grads, counts(), scales)
    # The interpreter cuts off what bfloat16 has no room for.
    room = (1.0 if dtype is torch.bfloat16 else 0.5) * torch.finfo(dtype).eps
    for x, old, n, scale in zip(grads, before, counts(), scales.split(counts()), strict=True):
        expected = rows(old, n) * scale[:, None].double()
        assert x.stride() == old.stride()
        assert ((rows(x, n) - expected).abs() <= room * expected.abs() + 1e-7).all()
        assert torch.equal(rows(x, n)[scale == 1], rows(old, n)[scale == 1])


def test_what_is_not_finite_stays_in_its_unit_and_is_not_written() -> None:
    grads = tensors(torch.float32, 1)
    grads[1][0, 2400], grads[1][1, 3] = math.nan, math.inf
    _, norms = unit_triton.unit_norms(tensors(torch.float32, 0), grads, counts())
    assert norms[:5].isfinite().all()
    assert norms[5].isnan()
    assert norms[6].isinf()
    assert norms[7:].isfinite().all()
    unit_triton.scale_units_(grads, counts(), torch.ones_like(norms))
    assert grads[1][0].isnan().sum() == grads[1].isinf().sum() == 1


def test_two_calls_give_the_same_bits() -> None:
    inputs = tensors(torch.float32, 0), tensors(torch.float32, 1), counts()
    for a, b in zip(unit_triton.unit_norms(*inputs), unit_triton.unit_norms(*inputs), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Clipping takes the kernels for CPU tensors as it does for an accelerator's; their names as they are called."""
    called: list[str] = []

    def by_kernel(shard: Shard) -> bool:
        dense = unit_triton._is_dense(shard.weight) and unit_triton._is_dense(shard.grad)
        return shard.blocks is None and dense and shard.layout.kept in ((), (0,))

    def spy(name: str) -> Any:
        function = getattr(agc, name)

        def call(*args: Any) -> Any:
            called.append(name)
            return function(*args)

        return call

    monkeypatch.setattr(agc, "_by_kernel", by_kernel)
    for name in ("unit_norms", "scale_units_"):
        monkeypatch.setattr(agc, name, spy(name))
    return called


@pytest.mark.parametrize("norm_type", [2.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_clipping_by_the_kernels_equals_a_loop_of_the_formula(
    dtype: torch.dtype, norm_type: float, kernels_on_the_cpu: list[str]
) -> None:
    parameters = [nn.Parameter(x) for x in tensors(dtype, 0)]
    for p, grad in zip(parameters, tensors(dtype, 1, 0.02), strict=True):
        p.grad = grad
    odd = nn.Parameter(torch.randn(6, 4).to(dtype).t())  # its rows do not lie in one piece
    odd.grad = torch.ones_like(odd)
    expected = [loop_of_the_formula(p, 0.02, 1e-3, norm_type=norm_type) for p in (*parameters, odd)]
    fraction = agc.adaptive_clip_grad_([*parameters, odd], 0.02, norm_type=norm_type)
    hits, units = (sum(row[i] for row in expected) for i in (1, 2))
    assert 0 < hits < units
    assert fraction.item() == pytest.approx(hits / units)
    assert set(kernels_on_the_cpu) == {"scale_units_", *(["unit_norms"] if norm_type == 2 else [])}
    for p, (grad, _, _) in zip((*parameters, odd), expected, strict=True):
        assert p.grad is not None
        tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-3}[dtype]
        assert (p.grad.double() - grad).norm() <= tolerance * grad.norm() + 1e-7
