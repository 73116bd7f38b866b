"""What `timm_nf.optim.agc` refuses: by name, before the first write."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.support.small_problems import loop_of_the_formula
from timm_nf.optim.agc import adaptive_clip_grad_


def parameter(grad, dtype=torch.float32):
    p = nn.Parameter(torch.ones(3, 2, dtype=dtype))
    p.grad = grad
    return p


@pytest.mark.parametrize("value", [-0.1, math.nan, -math.inf, None, "a", "-1", "nan", "", True, False, [0.1]])
@pytest.mark.parametrize("name", ["clip_factor", "eps"])
def test_settings_that_are_negative_nan_or_no_number_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name} must be zero or positive, got {value!r}")):
        adaptive_clip_grad_(parameter(torch.ones(3, 2)), **{name: value})


@pytest.mark.parametrize(("text", "number"), [("inf", math.inf), ("0.02", 0.02), (" 1e-2 ", 0.01)])
def test_numbers_as_text_are_numbers(text, number):
    results = []
    for value in (text, number):
        p = parameter(torch.ones(3, 2))
        results.append((adaptive_clip_grad_(p, value, value), p.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(("text", "number"), [("inf", math.inf), (" 1 ", 1.0), ("2.5", 2.5)])
def test_an_order_as_text_is_that_order(text, number):
    results = []
    for value in (text, number):
        p = parameter(torch.arange(6.0).view(3, 2))
        results.append((adaptive_clip_grad_(p, norm_type=value), p.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["clip_factor", "eps", "norm_type"])
def test_a_tensor_is_refused_as_a_setting_in_its_own_words(name):
    with pytest.raises(ValueError, match=rf"^{name} must be a number, got a tensor: .*; use .item\(\)"):
        adaptive_clip_grad_(parameter(torch.ones(3, 2)), **{name: torch.tensor(0.1)})


@pytest.mark.parametrize("value", [0, -1.0, -math.inf, math.nan, "fro", None, True])
def test_orders_that_are_no_norm_are_refused(value):
    with pytest.raises(ValueError, match=re.escape(f"norm_type must be above 0, got {value!r}")):
        adaptive_clip_grad_(parameter(torch.ones(3, 2)), norm_type=value)


def of_another_shape():
    p = parameter(torch.ones(3, 2))
    p.data = torch.ones(3, 4)  # as many units: their norms would be taken for each other
    return p


def parameter_on_meta():
    p = nn.Parameter(torch.ones(3, 2, device="meta"))
    p.grad = torch.ones(3, 2, device="meta")
    return p


def in_inference_mode():
    with torch.inference_mode():
        return torch.ones(3, 2)


GOOD = parameter(torch.ones(3, 2))
BAD = {
    "a gradient of layout torch.sparse_coo": lambda: parameter(torch.eye(3, 2).to_sparse()),
    "torch.complex64": lambda: parameter(torch.ones(3, 2).cfloat(), torch.complex64),
    "torch.float8_e4m3fn": lambda: parameter(torch.ones(3, 2).to(torch.float8_e4m3fn), torch.float8_e4m3fn),
    # torch refuses to assign such a gradient, but it can come about by moving a parameter's data
    "cpu but itself lies on meta": lambda: SimpleNamespace(
        grad=torch.ones(3, 2), device=torch.device("meta"), shape=torch.Size((3, 2))
    ),
    "a gradient of shape (3, 2)": of_another_shape,
    "its gradient on meta, others on cpu": parameter_on_meta,
}


@pytest.mark.parametrize("problem", BAD)
def test_a_bad_gradient_is_refused_by_index_and_shape_before_anything_is_written(problem):
    bad = BAD[problem]()
    opening = re.escape(f"parameter 1 of shape {tuple(bad.shape)} has ")
    with pytest.raises(ValueError, match=f"^{opening}.*{re.escape(problem)}"):
        adaptive_clip_grad_([GOOD, bad])
    assert torch.equal(GOOD.grad, torch.ones(3, 2))


def half_in_each_other():
    return torch.ones(4).as_strided((3, 2), (1, 1))


@pytest.mark.parametrize(
    "grad", [lambda: torch.ones(1, 1).expand(3, 2), half_in_each_other, in_inference_mode], ids=lambda f: f.__name__
)
def test_gradients_that_cannot_be_written_to_are_cloned_and_clipped_as_the_formula_says(grad):
    p, given = parameter(None), grad()
    p.grad = given
    before = given.clone()
    assert adaptive_clip_grad_(p) == 1
    torch.testing.assert_close(p.grad, torch.full((3, 2), 0.01))
    assert torch.equal(given, before)


@pytest.mark.parametrize("second", [lambda g: g, lambda g: g.view(3, 2)], ids=["the same", "a view"])
def test_a_gradient_that_two_parameters_share_is_clipped_for_each_by_its_own_weight(second):
    shared = torch.ones(3, 2)
    first, other = parameter(shared), parameter(second(shared))
    other.data.fill_(5.0)
    assert adaptive_clip_grad_([first, other]) == 1
    torch.testing.assert_close(first.grad, torch.full((3, 2), 0.01))
    torch.testing.assert_close(other.grad, torch.full((3, 2), 0.05))


def test_gradients_that_overlap_are_clipped_each_by_its_own_weight_wherever_they_begin():
    buffer, params = torch.randn(20), [nn.Parameter(torch.randn(3, 2)) for _ in range(4)]
    for p, start in zip(params, (8, 0, 4, 14), strict=True):  # the last one is alone
        p.grad = buffer[start : start + 6].view(3, 2)
    expected = [loop_of_the_formula(p, 0.01, 1e-3)[0] for p in params]
    before = buffer.clone()
    adaptive_clip_grad_(params)
    for p, grad in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad.double(), grad, rtol=1e-5, atol=1e-7)
    assert torch.equal(buffer[:14], before[:14])
    assert params[3].grad.data_ptr() == buffer[14:].data_ptr()


def test_nothing_is_cloned_where_another_gradient_is_refused():
    p = parameter(torch.ones(1, 1).expand(3, 2))
    with pytest.raises(ValueError, match="layout"):
        adaptive_clip_grad_([p, parameter(torch.eye(3, 2).to_sparse())])
    assert p.grad.stride() == (0, 0)


def test_a_cloned_gradient_keeps_its_graph_for_second_order_optimizers():
    p = parameter(None)
    (grad,) = torch.autograd.grad(p.square().sum(), p, create_graph=True)
    p.grad = grad[:1, :1].expand(3, 2)
    adaptive_clip_grad_(p)
    assert p.grad.requires_grad


def test_gradients_made_in_inference_mode_are_clipped_inside_it():
    p = parameter(in_inference_mode())
    with torch.inference_mode():
        adaptive_clip_grad_(p)
    torch.testing.assert_close(torch.linalg.vector_norm(p.grad, dim=1), torch.full((3,), 0.01 * 2**0.5))


@pytest.mark.parametrize(
    "grad",
    [
        torch.ones(3, 5)[:, ::2],
        torch.ones(3, 3, 3, 3)[..., ::2, ::2],
        torch.ones(2, 3).t(),
        torch.ones(3, 2, 2, 2).contiguous(memory_format=torch.channels_last),
        torch.ones(3, 1).expand(3, 1),
        torch.ones(20)[4:10].view(3, 2),
    ],
    ids=["odd rows", "odd pixels", "transposed", "channels_last", "one column", "part of a buffer"],
)
def test_gradients_whose_entries_lie_apart_are_clipped(grad):
    p = nn.Parameter(torch.ones(grad.shape))
    p.grad = grad
    assert adaptive_clip_grad_(p) == 1
    torch.testing.assert_close(p.grad, torch.full_like(p, 0.01))


def test_parts_of_one_buffer_are_gradients_of_their_own():
    buffer, params = torch.ones(12), [nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    for p, part in zip(params, buffer.split(6), strict=True):
        p.grad = part.view(3, 2)
    adaptive_clip_grad_(params)
    torch.testing.assert_close(buffer, torch.full_like(buffer, 0.01))
