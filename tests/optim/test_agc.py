"""`timm_nf.optim.agc`: the formula against a plain float64 one, its invariants, and who is clipped and who decays."""

import math
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from timm_nf.optim.agc import Settings, adaptive_clip_grad_, clip_checked_, unitwise_norm

SHAPES = [
    (8, 4, 3, 3),
    (8, 1, 3, 3),
    (6, 5),
    (1, 5),
    (7,),
    (7, 1, 1, 1),
    (1, 7, 1),
    (1,),
    (),
    (2, 3, 4),
    (2, 2, 2, 2, 2),
]


def parameter(shape, seed=0, dtype=torch.float64, weight=1.0, grad=1.0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    p = nn.Parameter((weight * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype))
    p.grad = (grad * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)
    return p


def reference(p, clip_factor=0.01, eps=1e-3):
    """The clipped gradient, unit by unit, and how many units were clipped out of how many."""
    single = sum(n > 1 for n in p.shape) <= 1
    rows = [(p.detach(), p.grad)] if single else list(zip(p.detach(), p.grad, strict=True))
    new, clipped = [], 0
    for w, g in rows:
        limit = clip_factor * max(w.double().square().sum().sqrt().item(), eps)
        norm = g.double().square().sum().sqrt().item()
        clipped += norm > limit
        new.append(g * (limit / max(norm, 1e-6)) if norm > limit else g)
    return (new[0] if single else torch.stack(new)), clipped, len(rows)


class CountOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names, self.lists = [], []  # of all operations, and the lists of tensors that some were given

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        if "_foreach_" in func.overloadpacket.__name__:
            self.lists += [tensors for tensors in args if isinstance(tensors, list)]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 4, 3, 3), (8, 1, 1, 1)),
        ((8, 1, 3, 3), (8, 1, 1, 1)),
        ((6, 5), (6, 1)),
        ((2, 2, 2, 2, 2), (2, 1, 1, 1, 1)),
        ((7,), ()),
        ((7, 1, 1, 1), ()),
        ((1, 5), ()),
        ((1,), ()),
        ((), ()),
        ((0,), ()),
        ((0, 3, 3), (0, 1, 1)),
        ((3, 0, 3), (3, 1, 1)),
    ],
)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_a_unit_is_an_output_row_unless_only_one_axis_is_longer_than_one(shape, expected, norm_type):
    assert unitwise_norm(torch.ones(shape), norm_type).shape == expected


def test_unitwise_norm_of_numbers_worked_by_hand():
    x = torch.tensor([[3.0, 4.0], [5.0, 12.0]])
    assert unitwise_norm(x).tolist() == [[5.0], [13.0]]
    assert unitwise_norm(x, 1.0).tolist() == [[7.0], [17.0]]
    assert unitwise_norm(x, math.inf).tolist() == [[4.0], [12.0]]
    assert unitwise_norm(torch.tensor([3.0, 4.0]).view(2, 1, 1, 1)).item() == 5.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_norms_are_at_least_float32(dtype):
    assert unitwise_norm(torch.full((2, 300, 300), 1.0, dtype=dtype)).tolist() == [[[300.0]], [[300.0]]]
    assert unitwise_norm(torch.ones(2, 2, dtype=dtype)).dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("grad", [1e-12, 0.01, 1.0, 1e6])
def test_clipping_equals_the_formula_unit_by_unit(grad):
    params = [parameter(shape, seed, grad=grad) for seed, shape in enumerate(SHAPES)]
    expected = [reference(p) for p in params]
    fraction = adaptive_clip_grad_(params)
    for p, (g, _, _) in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-14, atol=0)
    assert fraction.item() == pytest.approx(sum(e[1] for e in expected) / sum(e[2] for e in expected))


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_any_norm_type_holds_its_bound(norm_type):
    params = [parameter(shape, seed) for seed, shape in enumerate(SHAPES)]
    assert adaptive_clip_grad_(params, 0.02, 1e-3, norm_type).item() == 1
    for p in params:
        limit = 0.02 * unitwise_norm(p.detach(), norm_type).clamp(min=1e-3)
        torch.testing.assert_close(unitwise_norm(p.grad, norm_type), limit)


def test_the_default_call_takes_one_tensor():
    p = parameter((4, 3))
    expected = reference(p)[0]
    assert adaptive_clip_grad_(p).item() == 1
    torch.testing.assert_close(p.grad, expected)


@st.composite
def parameters(draw):
    shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
    scale = st.floats(-6, 3).map(lambda e: 10.0**e)
    return [
        parameter(draw(shapes), draw(st.integers(0, 99)), weight=draw(scale), grad=draw(scale))
        for _ in range(draw(st.integers(1, 4)))
    ]


factors = st.floats(1e-3, 10.0)


@given(parameters(), factors)
@settings(deadline=None)
def test_every_unit_ends_within_its_bound(params, clip_factor):
    adaptive_clip_grad_(params, clip_factor)
    for p in params:
        limit = clip_factor * unitwise_norm(p.detach()).clamp(min=1e-3)
        assert (unitwise_norm(p.grad) <= limit * (1 + 1e-12)).all()


@given(parameters(), factors)
@settings(deadline=None)
def test_clipping_twice_equals_clipping_once(params, clip_factor):
    adaptive_clip_grad_(params, clip_factor)
    once = [p.grad.clone() for p in params]
    adaptive_clip_grad_(params, clip_factor)
    for p, g in zip(params, once, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-14, atol=0)


@given(parameters(), factors, factors)
@settings(deadline=None)
def test_ever_tighter_clipping_equals_the_tightest_alone(params, first, second):
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    for copy, p in zip(copies, params, strict=True):
        copy.grad = p.grad.clone()
    adaptive_clip_grad_(params, max(first, second))
    adaptive_clip_grad_(params, min(first, second))
    adaptive_clip_grad_(copies, min(first, second))
    for p, copy in zip(params, copies, strict=True):
        torch.testing.assert_close(p.grad, copy.grad, rtol=1e-13, atol=0)


@given(parameters(), factors)
@settings(deadline=None)
def test_gradients_under_the_bound_stay_bit_identical(params, clip_factor):
    before = [p.grad.clone() for p in params]
    limits = [clip_factor * unitwise_norm(p.detach()).clamp(min=1e-3) for p in params]
    within = [unitwise_norm(g) <= limit for g, limit in zip(before, limits, strict=True)]
    adaptive_clip_grad_(params, clip_factor)
    for p, g, kept in zip(params, before, within, strict=True):
        kept = kept.expand_as(g)
        assert torch.equal(p.grad[kept], g[kept])


@given(parameters(), factors, st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_scaling_weights_gradients_and_eps_scales_the_result(params, clip_factor, scale):
    scaled = [nn.Parameter(p.detach() * scale) for p in params]
    for s, p in zip(scaled, params, strict=True):
        s.grad = p.grad * scale
    # eps of 1 keeps the limits above the guard against dividing by zero, which is not meant to scale
    adaptive_clip_grad_(params, clip_factor, 1.0)
    adaptive_clip_grad_(scaled, clip_factor, scale)
    for s, p in zip(scaled, params, strict=True):
        torch.testing.assert_close(s.grad, p.grad * scale, rtol=1e-12, atol=1e-300)


def test_units_with_nan_or_infinite_gradients_stay_what_they_are_and_others_are_clipped():
    p = parameter((4, 5))
    p.grad[0, 1], p.grad[1, 2], p.grad[2, 0] = math.nan, math.inf, -math.inf
    bias = parameter((3,))
    bias.grad[1] = math.nan
    before = p.grad.clone(), bias.grad.clone()
    row = reference(nn_like(p, 3))[0]
    assert adaptive_clip_grad_([p, bias]).item() == pytest.approx(1 / 5)
    assert torch.equal(p.grad[:3].nan_to_num(7), before[0][:3].nan_to_num(7))
    assert torch.equal(bias.grad.nan_to_num(7), before[1].nan_to_num(7))
    torch.testing.assert_close(p.grad[3], row)


def nn_like(p, row):
    single = nn.Parameter(p.detach()[row].clone())
    single.grad = p.grad[row].clone()
    return single


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_its_bound(dtype):
    params = [parameter(shape, seed, dtype) for seed, shape in enumerate(SHAPES)]
    adaptive_clip_grad_(params, 0.1)
    for p in params:
        assert p.grad.dtype == dtype
        limit = 0.1 * unitwise_norm(p.detach()).clamp(min=1e-3)
        # every entry is rounded to 8 (bfloat16) or 11 (float16) bits after the scaling
        torch.testing.assert_close(unitwise_norm(p.grad), limit, rtol=0.01, atol=0)


def test_half_precision_norms_do_not_overflow():
    p = nn.Parameter(torch.ones(2, 1000, dtype=torch.float16))
    p.grad = torch.full_like(p, 6e4)  # a norm of 1.9e6, largest float16 6.5e4
    adaptive_clip_grad_(p)
    torch.testing.assert_close(p.grad, torch.full_like(p, 0.01), rtol=1e-3, atol=0)


def test_mixed_dtypes_are_clipped_in_one_call():
    params = [parameter((4, 3), 1, dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    assert adaptive_clip_grad_(params).item() == 1


def test_channels_last_and_transposed_gradients_are_clipped_in_place():
    p = parameter((8, 4, 3, 3))
    q = parameter((5, 6))
    p.grad = p.grad.contiguous(memory_format=torch.channels_last)
    q.grad = q.grad.t().contiguous().t()
    expected = reference(p)[0], reference(q)[0]
    grads = p.grad, q.grad
    adaptive_clip_grad_([p, q])
    assert p.grad is grads[0]
    assert q.grad is grads[1]
    torch.testing.assert_close(grads, expected)


def test_a_parameter_given_twice_is_clipped_once():
    p = parameter((4, 3))
    expected = reference(p)[0]
    adaptive_clip_grad_([p, p])
    torch.testing.assert_close(p.grad, expected, rtol=1e-15, atol=0)


def test_parameters_without_gradients_or_elements_are_skipped():
    untouched, empty = nn.Parameter(torch.ones(2, 2)), parameter((0, 3))
    assert adaptive_clip_grad_([untouched, empty]).item() == 0
    assert untouched.grad is None
    assert adaptive_clip_grad_([]).item() == 0
    assert adaptive_clip_grad_(iter([untouched, parameter((2, 2))])).item() == 1


def test_an_infinite_factor_clips_nothing_and_a_zero_factor_everything():
    p = parameter((4, 3), grad=1e30)
    before = p.grad.clone()
    assert adaptive_clip_grad_(p, math.inf).item() == 0
    assert torch.equal(p.grad, before)
    assert adaptive_clip_grad_(p, 0.0).item() == 1
    assert not p.grad.any()


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_a_graph_through_the_gradients_survives():
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    (p**3).sum().backward(create_graph=True)
    adaptive_clip_grad_(p)
    (second,) = torch.autograd.grad(p.grad.sum(), p)
    torch.testing.assert_close(second, 6 * p.detach())  # of the loss itself: clipping leaves no trace in the graph


def nfnet_like(device="cpu"):
    """All kinds of parameters a normalizer-free network has, 60 of them."""
    shapes = [(32, 16, 3, 3), (32, 1, 1, 1), (32,), (16, 32, 1, 1), (16,), (1,)] * 10
    return [parameter(shape, seed, torch.float32, device=device) for seed, shape in enumerate(shapes)]


def test_accelerators_are_never_waited_for():
    # The meta device has no values at all: any code path that reads one fails there.
    params = nfnet_like("meta")
    with CountOperations() as count:
        fraction = adaptive_clip_grad_(params)
    assert fraction.device.type == "meta"
    assert not {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"} & set(count.names)
    assert len(count.names) <= 13 * len(params) / 4  # a quarter of what timm's function dispatches


def test_operations_on_lists_never_mix_devices_or_dtypes():
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    params = [
        parameter((4,), i, dtype, device=device) for i in range(2) for dtype in dtypes for device in ("meta", "cpu")
    ]
    with CountOperations() as count:  # behind the checks, which refuse meta beside others: it stands for an accelerator
        clip_checked_([(params, Settings())])
    assert count.names.count("_foreach_mul_") == count.names.count("scale_units_") == 3  # on the CPU, elsewhere
    for tensors in count.lists:
        assert len(tensors) == 2
        assert len({(t.device, t.dtype) for t in tensors}) == 1


def test_dispatched_operations_are_at_most_a_quarter_of_timms():
    from timm.utils.agc import unitwise_norm as timms_norm

    def timms(parameters):  # 13 operations a parameter; the name in timm is ours after `import timm_nf`
        for p in parameters:
            limit = timms_norm(p.detach()).clamp_(min=1e-3).mul_(0.01)
            norm = timms_norm(p.grad.detach())
            clipped = p.grad.detach() * (limit / norm.clamp(min=1e-6))
            p.grad.detach().copy_(torch.where(norm < limit, p.grad.detach(), clipped))

    counts = []
    for clip in (timms, adaptive_clip_grad_):
        params = nfnet_like()
        with CountOperations() as count:
            clip(params)
        counts.append(len(count.names))
    assert 4 * counts[1] <= counts[0]


def test_extra_memory_is_under_a_hundredth_of_the_parameters():
    params = [parameter((512, 256, 3, 3), seed, torch.float32, grad=100.0) for seed in range(8)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        adaptive_clip_grad_(params)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    in_use = list(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    assert in_use[-1] == 0  # of what was allocated, all was seen to be freed
    assert 0 < max(in_use) < 0.01 * sum(p.nbytes for p in params)


def test_nothing_is_written_where_nothing_exceeds_its_bound():
    params = [parameter((4, 3), grad=1e-9), parameter((3,), grad=1e-9)]
    versions = [p.grad._version for p in params]
    adaptive_clip_grad_(params)
    assert [p.grad._version for p in params] == versions


@pytest.mark.parametrize("value", [2e19, 1e30, 3e38])
@pytest.mark.parametrize("shape", [(2, 3), (6,)])
def test_finite_gradients_whose_norm_overflows_float32_are_clipped(value, shape):
    p = nn.Parameter(torch.ones(shape))
    p.grad = torch.full(shape, value)
    assert adaptive_clip_grad_([p], 0.01) == 1
    torch.testing.assert_close(unitwise_norm(p.grad), 0.01 * unitwise_norm(p.detach()))


@pytest.mark.parametrize("shape", [(2, 3), (6,)])
def test_finite_weights_whose_norm_overflows_float32_have_a_limit(shape):
    p = nn.Parameter(torch.full(shape, 1e30))
    p.grad = torch.full(shape, 1e30)
    assert adaptive_clip_grad_([p], 0.01) == 1
    torch.testing.assert_close(p.grad, torch.full(shape, 1e28))


def test_convolutions_of_any_number_of_dimensions_have_their_output_channels_as_units():
    for layer in (nn.Conv1d(3, 4, 5), nn.Conv2d(3, 4, 5), nn.Conv3d(3, 4, 2), nn.Embedding(4, 3), nn.Linear(3, 4)):
        assert unitwise_norm(layer.weight.detach()).shape == (4, *[1] * (layer.weight.ndim - 1))


def test_the_function_compiles_without_a_graph_break_to_the_same_gradients():
    eager, compiled = nfnet_like(), nfnet_like()
    clip = torch.compile(lambda: adaptive_clip_grad_(compiled), backend="aot_eager", fullgraph=True)
    assert clip() == adaptive_clip_grad_(eager) > 0.9
    torch.testing.assert_close([p.grad for p in compiled], [p.grad for p in eager])
