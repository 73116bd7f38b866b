import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import reference_nfnet as reference
from tests.support.small_nets import relative_error
from tests.support.standardisation import mixed_rows
from timm_nf.layers import ScaledStdConv2d
from timm_nf.layers.standardize import destandardize_weight, standardize_weight


class OtherTensor(Tensor):
    """Takes the route of every tensor that is not a plain one on the CPU."""


def plain(x: Tensor) -> Tensor:
    return x


def other(x: Tensor) -> Tensor:
    return x.as_subclass(OtherTensor)


ROUTES = pytest.mark.parametrize("route", [plain, other], ids=["cpu", "elsewhere"])


def gain_like(weight: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 1 + 0.3 * torch.randn(weight.shape[0], 1, 1, 1, generator=generator, dtype=weight.dtype)


def numpy_formula(weight: Tensor, gain: Tensor, eps: float = 1e-4) -> np.ndarray:
    """The reference on float64 copies, (O, I, K, K)."""
    w = weight.detach().double().numpy().transpose(2, 3, 1, 0)
    return reference.standardize(w, gain.detach().double().numpy().reshape(-1), eps).transpose(3, 2, 0, 1)


def formula(weight: Tensor, gain: Tensor, eps: float = 1e-4) -> Tensor:
    """Plain differentiable operations."""
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    return centred * gain / centred.square().sum((1, 2, 3), keepdim=True).clamp(min=eps).sqrt()


# --- standardize_weight: values ---


@ROUTES
def test_standardized_pair_is_plus_and_minus_gain_over_root_two(route: Callable) -> None:
    # mean 2, N * var = 2, so (3 - 2) / sqrt(2); the second row lies under the floor: 0.001 / sqrt(1e-4)
    weight = torch.tensor([[3.0, 1.0], [0.501, 0.499]], dtype=torch.float64).view(2, 2, 1, 1)
    gain = torch.tensor([5.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    expected = torch.tensor([[5 / math.sqrt(2), -5 / math.sqrt(2)], [0.1, -0.1]], dtype=torch.float64).view(2, 2, 1, 1)
    got = standardize_weight(route(weight), gain).as_subclass(Tensor)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)


@ROUTES
@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 7), st.sampled_from([1, 2, 3, 5])),
    log_scale=st.floats(-6, 4),
    mean_to_std=st.sampled_from([0.0, 0.5, 3.0, 1e3]),
    constant=st.booleans(),
    eps=st.sampled_from([1e-4, 1e-8, 10.0]),
    seed=st.integers(0, 2**31),
)
def test_standardized_weight_equals_the_numpy_formula(
    route: Callable,
    shape: tuple[int, int, int],
    log_scale: float,
    mean_to_std: float,
    constant: bool,
    eps: float,
    seed: int,
) -> None:
    out_chs, in_chs, kernel = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_chs, in_chs, kernel, kernel, generator=generator, dtype=torch.float64) + mean_to_std
    weight *= 10**log_scale
    if constant:
        weight[0] = 0.3
    gain = gain_like(weight, seed)
    expected = numpy_formula(weight, gain, eps)
    # absolute to the norm of a row, which is the gain; rounding of the input's mean is relative to the mean
    tolerance = 1e-13 * max(1, mean_to_std) * max(1, 10**log_scale / eps**0.5 if constant else 1)
    np.testing.assert_allclose(standardize_weight(route(weight), gain, eps).numpy(), expected, rtol=0, atol=tolerance)


@ROUTES
def test_rows_of_every_kind_in_one_weight_equal_the_numpy_formula(route: Callable) -> None:
    weight = mixed_rows()
    gain = gain_like(weight)
    got = standardize_weight(route(weight), gain).numpy()
    np.testing.assert_allclose(got, numpy_formula(weight, gain), rtol=0, atol=1e-13)
    assert not got[2:4].any()  # constant rows become exactly zero


@ROUTES
@pytest.mark.parametrize("mean", [0.1, 10.0, 1000.0])
def test_a_mean_far_larger_than_the_spread_loses_no_digits_in_float32(route: Callable, mean: float) -> None:
    weight = mean + 0.01 * torch.randn(64, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    gain = gain_like(weight)
    assert relative_error(standardize_weight(route(weight), gain), numpy_formula(weight, gain)) < 1e-6


@ROUTES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_statistics_of_half_precision_weights_are_float32(route: Callable, dtype: torch.dtype, autocast: bool) -> None:
    # A sum over 4608 entries in half precision would be off by percents; here only the result is rounded.
    weight = (0.05 * torch.randn(16, 512, 3, 3, generator=torch.Generator().manual_seed(0)) + 0.02).to(dtype)
    gain = gain_like(weight).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = standardize_weight(route(weight), gain)
    assert got.dtype is dtype
    expected = torch.from_numpy(numpy_formula(weight, gain))
    unit = torch.finfo(dtype).eps / 2  # of rounding to nearest; the constant is that of float16's subnormals
    assert ((got.as_subclass(Tensor).double() - expected).abs() <= 1.001 * unit * expected.abs() + 3e-8).all()


@ROUTES
def test_statistics_stay_float32_under_autocast(route: Callable) -> None:
    weight = torch.randn(8, 16, 3, 3, generator=torch.Generator().manual_seed(0)) + 1
    gain = gain_like(weight)
    expected = standardize_weight(route(weight), gain)
    with torch.autocast("cpu", torch.bfloat16):
        got = standardize_weight(route(weight), gain)
    assert got.dtype is torch.float32
    assert torch.equal(got, expected)


def test_the_two_routes_agree_in_float32() -> None:
    weight = torch.randn(32, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    gain = gain_like(weight)
    assert relative_error(standardize_weight(other(weight), gain), standardize_weight(weight, gain)) < 3e-7


def test_mixed_dtypes_promote_the_statistics_and_keep_the_dtype_of_the_weight() -> None:
    weight = torch.randn(4, 3, 3, 3)
    assert standardize_weight(weight, gain_like(weight).double()).dtype is torch.float32
    assert standardize_weight(weight.double(), gain_like(weight)).dtype is torch.float64
    assert standardize_weight(weight.bfloat16(), gain_like(weight)).dtype is torch.bfloat16


def test_nan_in_one_row_stays_in_that_row() -> None:
    weight = torch.randn(3, 4, 3, 3, dtype=torch.float64)
    weight[1, 0, 0, 0] = math.nan
    out = standardize_weight(weight, gain_like(weight))
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("gain", [torch.ones(3, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.ones(())])
def test_a_gain_of_another_length_is_refused_with_both_shapes(gain: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(4, 2, 3, 3\)") as error:
        standardize_weight(torch.ones(4, 2, 3, 3), gain)
    assert str(tuple(gain.shape)) in str(error.value)


# --- standardize_weight: gradients and transforms ---


@ROUTES
@pytest.mark.parametrize("rows", ["ordinary", "mixed"])
def test_first_and_second_derivatives_pass_the_numerical_check(route: Callable, rows: str) -> None:
    weight = mixed_rows()
    if rows == "ordinary":
        weight = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    inputs = (weight.requires_grad_(), gain_like(weight.detach()).requires_grad_())

    def function(w: Tensor, g: Tensor) -> Tensor:
        return standardize_weight(route(w), g).as_subclass(Tensor)

    assert gradcheck(function, inputs, atol=1e-6)
    assert gradgradcheck(function, inputs, atol=1e-5)


@ROUTES
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), shift=st.sampled_from([0.0, 1.0, 50.0]), scale=st.sampled_from([1.0, 1e-4]))
def test_gradients_equal_those_of_the_plain_formula(route: Callable, seed: int, shift: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(6, 5, 3, 3, generator=generator, dtype=torch.float64) + shift) * scale
    gain, cotangent = gain_like(weight, seed), torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    inputs = (weight.requires_grad_(), gain.requires_grad_())
    expected = torch.autograd.grad(formula(*inputs), inputs, cotangent)
    got = torch.autograd.grad(standardize_weight(route(weight), gain).as_subclass(Tensor), inputs, cotangent)
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_rows_have_finite_output_and_gradient(dtype: torch.dtype) -> None:
    weight = torch.stack([torch.zeros(4, 3, 3), torch.full((4, 3, 3), 0.7), torch.randn(4, 3, 3)]).to(dtype)
    weight.requires_grad_()
    gain = torch.ones(3, 1, 1, 1, dtype=dtype, requires_grad=True)
    out = standardize_weight(weight, gain)
    out.sum().backward()
    for x in (out, weight.grad, gain.grad):
        assert x is not None
        assert x.dtype is dtype
        assert x.isfinite().all()


def test_function_transforms_equal_those_of_the_plain_formula() -> None:
    weights = torch.stack([mixed_rows(), mixed_rows().flip(0), torch.randn(5, 3, 2, 2, dtype=torch.float64)])
    gain = gain_like(weights[0])
    gains = torch.stack([gain, 2 * gain, -gain])
    target = torch.randn(5, 3, 2, 2, dtype=torch.float64)

    def loss(function: Callable) -> Callable:
        return lambda w, g: (function(w, g) * target).sin().sum()

    def transforms(function: Callable) -> list[Any]:
        return [
            torch.func.vmap(function)(weights, gains),
            torch.func.vmap(function, (0, None))(weights, gain),
            torch.func.vmap(function, (None, 0))(weights[0], gains),
            torch.func.vmap(function, (1, 0), 1)(weights.movedim(0, 1), gains),
            *torch.func.grad(loss(function), (0, 1))(weights[0], gain),
            *torch.func.vmap(torch.func.grad(loss(function), (0, 1)))(weights, gains),
            *torch.func.jacrev(function, (0, 1))(weights[0], gain),
            torch.func.vmap(torch.func.vmap(function))(weights[None], gains[None]),
            torch.func.jacrev(torch.func.grad(loss(function)))(weights[2], gain),
        ]

    for got, expected in zip(transforms(standardize_weight), transforms(formula), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_meta_and_fake_tensors_give_shape_dtype_and_device() -> None:
    out = standardize_weight(torch.empty(8, 4, 3, 3, device="meta"), torch.empty(8, 1, 1, 1, device="meta"))
    assert (out.shape, out.device.type) == ((8, 4, 3, 3), "meta")
    with FakeTensorMode():
        out = standardize_weight(torch.empty(8, 4, 3, 3, dtype=torch.float16), torch.empty(8, 1, 1, 1))
    assert (out.shape, out.dtype, out.device.type) == ((8, 4, 3, 3), torch.float16, "cpu")


def test_compiles_to_one_graph_with_equal_values_and_gradients() -> None:
    weight, gain = mixed_rows().requires_grad_(), gain_like(mixed_rows()).requires_grad_()
    compiled = torch.compile(standardize_weight, backend="aot_eager", fullgraph=True)
    got, expected = compiled(weight, gain), standardize_weight(weight, gain)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    cotangent = torch.randn_like(weight)
    gradients = [torch.autograd.grad(out, (weight, gain), cotangent) for out in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


def test_symbolic_tracing_records_a_single_call() -> None:
    conv = ScaledStdConv2d(4, 8, 3, stride=2, scale=1.7)
    traced = torch.fx.symbolic_trace(conv)
    assert [n.target for n in traced.graph.nodes if n.target is standardize_weight] == [standardize_weight]
    for size in (7, 8):  # padding follows the size, it is not a constant of the trace
        x = torch.randn(2, 4, size, size)
        assert torch.equal(traced(x), conv(x))


def test_symbolic_tracing_takes_a_layer_of_ones_own_that_calls_the_formula() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.gain = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.ones(4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x @ standardize_weight(self.weight, gain=self.gain, scale=1.7).T

    own, x = Own(), torch.randn(2, 3)
    assert torch.equal(torch.fx.symbolic_trace(own)(x), own(x))


class _LargeResults(TorchDispatchMode):
    """Names of the operations that allocate at least `numel` elements, and of all operations."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.all, self.large = numel, [], []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.all.append(name)
        storages = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        results = out if isinstance(out, (tuple, list)) else (out,)
        fresh = [x for x in results if isinstance(x, Tensor) and x.untyped_storage()._cdata not in storages]
        self.large += [name for x in fresh if x.numel() >= self.numel]
        return out


def test_cpu_route_passes_once_over_the_weight_forward_and_once_backward() -> None:
    weight = torch.randn(32, 16, 3, 3, requires_grad=True)
    gain = torch.ones(32, 1, 1, 1, requires_grad=True)
    with _LargeResults(weight.numel()) as forward:
        out = standardize_weight(weight, gain)
    assert forward.large == ["native_group_norm"]
    cotangent = torch.randn_like(weight)
    with _LargeResults(weight.numel()) as backward:
        torch.autograd.grad(out, (weight, gain), cotangent)
    assert backward.large == ["native_group_norm_backward"]


def test_the_formula_makes_one_temporary_of_the_size_of_the_weight() -> None:
    with FakeTensorMode():  # as what compiles sees it
        weight, gain = torch.randn(32, 16, 3, 3), torch.ones(32, 1, 1, 1)
        with _LargeResults(weight.numel()) as ops:
            standardize_weight(weight, gain)
    assert ops.large == ["sub", "addcmul"]
    assert [op for op in ops.all if op in ("mean", "var_mean", "sub", "addcmul")] == [
        "mean",
        "sub",
        "var_mean",
        "addcmul",
    ]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")  # torch's own, on its way to jvp
def test_forward_mode_derivatives_pass_the_numerical_check() -> None:
    weight, gain = mixed_rows().requires_grad_(), gain_like(mixed_rows()).requires_grad_()
    assert gradcheck(standardize_weight, (weight[:3], gain[:3]), check_forward_ad=True)


@ROUTES
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1.0, 1e-4]))
def test_destandardized_weight_standardizes_to_itself_less_its_mean(route: Callable, seed: int, scale: float) -> None:
    weight = scale * torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    back = standardize_weight(*map(route, destandardize_weight(weight)))
    assert relative_error(back, weight - weight.mean((1, 2, 3), keepdim=True)) < 1e-12


@pytest.mark.parametrize("strides", [(1, 4), (2, 16)], ids=["transposed", "every second"])
def test_weights_and_gradients_that_do_not_lie_in_one_piece_give_the_same(strides: tuple[int, int]) -> None:
    gain = gain_like(torch.empty(4, 6, 1, 1, dtype=torch.float64))
    given = [torch.randn(200, dtype=torch.float64).as_strided((4, 6), strides) for _ in range(2)]
    found = []
    for weight, grad in (given, [x.contiguous() for x in given]):
        weight.requires_grad_()
        out = standardize_weight(weight, gain.view(4, 1))
        found.append((out, *torch.autograd.grad(out, weight, grad)))
    for strided, contiguous in zip(*found, strict=True):
        torch.testing.assert_close(strided, contiguous, rtol=0, atol=1e-12)
