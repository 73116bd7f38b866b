"""What `standardize` promises, of whichever way it takes on this machine's CPU.

That is the plain way as a rule, and the kernels under TRITON_INTERPRET=1: test_standardize_triton_targets.py runs this
file once more so, in a process of its own, since Triton decides when it is imported.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tests.support.standardisation import SCALE, assert_equals_the_formula, formula, gain_like, mixed_rows
from timm_nf.layers.standardize_triton import standardize

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 9), st.sampled_from([1, 2, 3, 5])),
    log_scale=st.floats(-6, 4),
    mean_to_std=st.sampled_from([0.0, 0.5, 3.0, 1e4]),
    constant=st.booleans(),
    eps=st.sampled_from([1e-4, 1e-8, 10.0]),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients_equal_the_formula(
    shape: tuple[int, int, int],
    log_scale: float,
    mean_to_std: float,
    constant: bool,
    eps: float,
    memory_format: torch.memory_format,
    seed: int,
) -> None:
    out_chs, in_chs, kernel = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_chs, in_chs, kernel, kernel, generator=generator, dtype=torch.float64) + mean_to_std
    weight *= 10**log_scale
    if constant:
        weight[0] = 0.25  # its mean is exact at any number of elements
    # A row of one element has no gradient; a row of two has one of rounding only, so it is not compared.
    if weight[0].numel() > 2:
        assert_equals_the_formula(
            weight.to(memory_format=memory_format), gain_like(weight, seed), 1e-11 * max(1, mean_to_std), eps
        )


@pytest.mark.parametrize("mean", [0.0, 0.1, 10.0, 100.0])
@FORMATS
def test_a_mean_far_above_the_spread_loses_no_digits_in_float32(
    mean: float, memory_format: torch.memory_format
) -> None:
    weight = mean + 0.01 * torch.randn(24, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    assert_equals_the_formula(weight.to(memory_format=memory_format), gain_like(weight), 1e-6)


@pytest.mark.parametrize(
    ("weight_dtype", "gain_dtype", "out_dtype"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.float16),
        (torch.float32, torch.float64, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.float64, torch.float64, torch.float16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float16),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
)
@FORMATS
def test_every_dtype_is_rounded_once(
    weight_dtype: torch.dtype, gain_dtype: torch.dtype, out_dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    weight = 0.02 + 0.05 * torch.randn(6, 64, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gain = gain_like(weight).to(gain_dtype)
    weight = weight.to(weight_dtype).to(memory_format=memory_format)

    def unit(dtype: torch.dtype) -> float:
        # Triton's interpreter cuts off what bfloat16 has no room for; test_standardize_triton_targets.py sees in the
        # code of a GPU that it rounds to nearest.
        half = 1.0 if INTERPRETED and dtype is torch.bfloat16 else 0.5
        return half * torch.finfo(dtype).eps

    out = standardize(weight, gain, out_dtype=out_dtype, scale=SCALE)
    expected = formula(weight.double(), gain.double(), scale=SCALE)
    statistics = 1e-6 if torch.float64 not in (weight_dtype, gain_dtype) else 1e-14
    room = (unit(out_dtype) + statistics) * expected.abs() + statistics * expected.abs().max() + 3e-8
    assert ((out.double() - expected).abs() <= room).all()
    tolerance = max(unit(x) for x in (weight_dtype, gain_dtype, out_dtype)) + 1e-6
    assert_equals_the_formula(weight, gain, tolerance, out_dtype=out_dtype)


@pytest.mark.parametrize(
    "shape",
    [
        (3, 8193),
        (2, 1024, 3, 3),
        (4, 911, 3, 3),
        (3, 8192),
        (2, 2, 4097),
        (300, 4),
        (70, 3, 3),
        (1, 5),
        (6, 2, 2, 2, 3),
    ],
    ids=str,
)
def test_rows_of_any_number_and_length(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    assert_equals_the_formula(weight, gain_like(weight), 1e-11)
    assert_equals_the_formula(weight.float(), gain_like(weight).float(), 1e-6)


def test_a_long_row_loses_no_digits_to_its_mean_and_keeps_its_floor() -> None:
    weight = torch.randn(5, 9000, generator=torch.Generator().manual_seed(0)) + 1e4
    weight[1] = 1e-5 * torch.randn(9000, generator=torch.Generator().manual_seed(1))
    weight[2] = 0.25
    assert_equals_the_formula(weight, gain_like(weight), 1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_rows_of_every_kind_in_one_weight(scale: float) -> None:
    weight = mixed_rows() * scale
    assert_equals_the_formula(weight, gain_like(weight), 1e-11)
    assert not standardize(weight, gain_like(weight))[2:4].any()  # constant rows become exactly zero


def test_a_gain_of_zero_has_a_gradient() -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_equals_the_formula(weight, torch.zeros(4, 1, 1, 1, dtype=torch.float64), 1e-12)


def test_nan_in_one_row_stays_in_that_row() -> None:
    weight = torch.randn(3, 4, 3, 3)
    weight[1, 0, 0, 0] = math.nan
    out = standardize(weight, gain_like(weight))
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", ["nchw", "nhwc", "ndhwc", "transposed", "every second", "expanded", "part"])
def test_strides_are_the_weights_and_odd_ones_are_copied(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, 4, 4, generator=generator, dtype=torch.float64)
    weight = {
        "nchw": lambda x: x,
        "nhwc": lambda x: x.to(memory_format=torch.channels_last),
        "ndhwc": lambda x: x[..., None].expand(-1, -1, -1, -1, 2).contiguous(memory_format=torch.channels_last_3d),
        "transposed": lambda x: x.transpose(0, 1),
        "every second": lambda x: x[:, :, ::2, 1::2],
        "expanded": lambda x: x[:1].expand(5, -1, -1, -1),
        "part": lambda x: x.to(memory_format=torch.channels_last)[1:5],
    }[kind](weight)
    assert_equals_the_formula(weight, gain_like(weight), 1e-12)
    weight.requires_grad_()
    out = standardize(weight, gain_like(weight).detach())
    (grad,) = torch.autograd.grad(out.square().sum(), weight)
    expected = weight.stride() if kind in ("nchw", "nhwc", "ndhwc", "part") else weight.contiguous().stride()
    assert out.stride() == grad.stride() == expected


def test_a_gain_between_other_numbers_is_read_where_it_is() -> None:
    weight, gains = torch.randn(5, 2, 3, 3, dtype=torch.float64), torch.randn(10, 1, 1, 1, dtype=torch.float64)
    assert_equals_the_formula(weight, gains[::2], 1e-12)


def test_a_gradient_of_other_strides_is_the_same_gradient() -> None:
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    cotangent = torch.randn(4, 3, 3, 3)
    out = standardize(weight, gain_like(weight).detach())
    (expected,) = torch.autograd.grad(out, weight, cotangent.to(memory_format=torch.channels_last), retain_graph=True)
    (got,) = torch.autograd.grad(out, weight, cotangent)
    assert torch.equal(got, expected)


def test_two_calls_give_the_same_bits() -> None:
    weight, gain = torch.randn(33, 40, 3, 3, requires_grad=True), torch.ones(33, 1, 1, 1, requires_grad=True)
    cotangent = torch.randn(33, 40, 3, 3)

    def call() -> tuple[Tensor, ...]:
        out = standardize(weight, gain)
        return out, *torch.autograd.grad(out, (weight, gain), cotangent)

    assert all(torch.equal(a, b) for a, b in zip(call(), call(), strict=True))


@pytest.mark.parametrize("gain", [torch.ones(3, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.ones(())])
def test_a_gain_of_another_length_is_refused_with_both_shapes(gain: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(4, 2, 3, 3\)") as error:
        standardize(torch.ones(4, 2, 3, 3), gain)
    assert str(tuple(gain.shape)) in str(error.value)


@pytest.mark.parametrize("shape", [(0, 3, 3, 3), (4, 0, 3, 3), (4, 3, 0, 3), (0,), (0, 0)], ids=str)
def test_weights_without_elements_have_gradients_of_zero(shape: tuple[int, ...]) -> None:
    weight, gain = torch.empty(shape, requires_grad=True), torch.ones(shape[0], requires_grad=True)
    out = standardize(weight, gain, out_dtype=torch.bfloat16)
    grad_weight, grad_gain = torch.autograd.grad(out.sum(), (weight, gain))
    assert out.shape == grad_weight.shape == shape
    assert out.dtype is torch.bfloat16
    assert torch.equal(grad_gain, torch.zeros_like(gain))


@pytest.mark.parametrize("shape", [(4, 1, 1, 1), (4, 1), (4,), (1, 1, 1, 1)], ids=str)
def test_rows_of_one_element_become_zero(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, requires_grad=True)
    out = standardize(weight, torch.ones(shape[0]))
    (grad,) = torch.autograd.grad(out.sum(), weight)
    assert not out.any()
    assert not grad.any()


@pytest.mark.filterwarnings("ignore:.* encountered in")  # NumPy's, in Triton's interpreter
def test_half_precision_neither_overflows_in_the_sums_nor_hides_that_a_gain_does() -> None:
    weight = torch.full((2, 4, 3, 3), 6e4).half()
    weight[:, ::2] *= -1
    out = standardize(weight, torch.ones(2).half())
    torch.testing.assert_close(out, formula(weight.double(), torch.ones(2).double()).half())
    assert standardize(weight, torch.full((2,), 6e4).half(), scale=40.0).isinf().all()


@pytest.mark.filterwarnings("ignore:.* encountered in")  # NumPy's, in Triton's interpreter
def test_without_a_floor_only_constant_rows_are_not_numbers() -> None:
    weight = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    weight[1] = 0.5
    out = standardize(weight, torch.ones(2, dtype=torch.float64), eps=0.0)
    assert out[1].isnan().all()
    torch.testing.assert_close(out[0].norm(), torch.tensor(1.0, dtype=torch.float64))


def test_what_comes_out_can_be_changed_in_place() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    standardize(weight, torch.ones(3)).mul_(2).sum().backward()
    assert weight.grad is not None


def test_a_weight_that_changed_before_the_backward_pass_is_noticed() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    out = standardize(weight, torch.ones(3))
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("weight", "gain", "options", "message"),
    [
        (torch.ones(2, 3), None, {}, r"got None; pass torch\.ones"),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(2), {}, "floating point numbers, got torch.int64"),
        (torch.ones(2, 3, dtype=torch.complex64), torch.ones(2), {}, "floating point numbers, got torch.complex64"),
        (torch.ones(2, 3), torch.ones(2), {"out_dtype": torch.int32}, "out_dtype of floating point numbers, got"),
        (torch.ones(2, 3), torch.ones(2, device="meta"), {}, "on one device, got cpu and meta"),
        (torch.ones(()), torch.ones(()), {}, r"a weight of shape \(\)"),
    ],
    ids=["no gain", "integers", "complex", "integers out", "two devices", "no axes"],
)
def test_what_cannot_be_standardised_is_refused(
    weight: Tensor, gain: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        standardize(weight, gain, **options)


# --- derivatives and transforms ---


def scaled(weight: Tensor, gain: Tensor) -> Tensor:
    return standardize(weight, gain, scale=SCALE)


def scaled_formula(weight: Tensor, gain: Tensor) -> Tensor:
    return formula(weight, gain, scale=SCALE)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")  # torch's own, on its way to jvp
def test_first_and_second_derivatives_pass_the_numerical_check() -> None:
    weight = mixed_rows()[..., :1].contiguous()
    inputs = weight.requires_grad_(), gain_like(weight.detach()).requires_grad_()
    assert gradcheck(scaled, inputs, atol=1e-6, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(scaled, inputs, atol=1e-5)


def test_function_transforms_equal_those_of_the_formula() -> None:
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
            *torch.func.grad(lambda w, g: torch.func.vmap(loss(function))(w, g).sum(), (0, 1))(weights, gains),
            *torch.func.jacrev(function, (0, 1))(weights[0], gain),
            torch.func.vmap(torch.func.vmap(function))(weights[None], gains[None]),
            torch.func.jacrev(torch.func.grad(loss(function)))(weights[2], gain),
        ]

    for got, expected in zip(transforms(scaled), transforms(scaled_formula), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_forward_mode_equals_that_of_the_formula_also_over_reverse_mode() -> None:
    weight, gain = mixed_rows()[:3], gain_like(mixed_rows())[:3]
    tangents = torch.randn(weight.shape, dtype=torch.float64), torch.randn(gain.shape, dtype=torch.float64)

    def derivatives(function: Callable) -> list[Any]:
        def slope(w: Tensor, g: Tensor) -> Any:
            return torch.func.grad(lambda w, g: function(w, g).sin().sum(), (0, 1))(w, g)

        return [torch.func.jvp(f, (weight, gain), tangents) for f in (function, slope)]

    torch.testing.assert_close(derivatives(scaled), derivatives(scaled_formula), rtol=1e-9, atol=1e-10)
