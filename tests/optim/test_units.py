"""`timm_nf.optim.units`: the units of transposed and transformers' layers against a plain float64 loop."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from tests.support.small_problems import loop_of_the_formula
from timm_nf import diagnostics, optim
from timm_nf.optim.agc import adaptive_clip_grad_, unitwise_norm
from timm_nf.optim.groups import param_groups_agc
from timm_nf.optim.units import unit_axes

pytestmark = pytest.mark.filterwarnings(
    "ignore:these parameters come without", "ignore:.*torch.nn.utils.(weight|spectral)_norm.*:FutureWarning"
)


def with_gradient(shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
    p.grad = torch.randn(shape, generator=generator, dtype=dtype)
    return p


@st.composite
def axes_and_shapes(draw):
    groups = draw(st.integers(1, 3))
    shape = (groups * draw(st.integers(1, 3)), *draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    axis = draw(st.sampled_from([(1, groups), *range(-len(shape), len(shape))]))
    return shape, axis


@settings(max_examples=60)
@given(axes_and_shapes(), st.sampled_from([1.0, 2.0, math.inf]), st.integers(0, 100))
def test_every_axis_clips_as_the_formula_unit_by_unit(case, norm_type, seed):
    shape, axis = case
    p = with_gradient(shape, seed)
    expected, clipped, units = loop_of_the_formula(p, 0.4, 1e-3, axis, norm_type)
    assert adaptive_clip_grad_(p, 0.4, 1e-3, norm_type, axis=axis).item() == pytest.approx(clipped / units)
    torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", [1, (1, 1), (1, 2), (1, 4)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_any_memory_format_is_clipped_in_place(axis, memory_format):
    p = with_gradient((4, 6, 3, 3))
    p.grad = p.grad.contiguous(memory_format=memory_format)
    expected, *_ = loop_of_the_formula(p, 0.01, 1e-3, axis)
    place = p.grad.data_ptr()
    adaptive_clip_grad_(p, axis=axis)
    assert p.grad.data_ptr() == place
    torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-12)


def test_unitwise_norm_broadcasts_to_a_transposed_weight():
    weight = torch.tensor([[[3.0], [1.0]], [[4.0], [0.0]], [[5.0], [2.0]], [[12.0], [0.0]]])  # (4, 2, 1)
    torch.testing.assert_close(unitwise_norm(weight, axis=1).flatten(), torch.tensor([194.0, 5.0]).sqrt())
    grouped = unitwise_norm(weight, axis=(1, 2))
    assert grouped.shape == (4, 2, 1)
    torch.testing.assert_close(grouped[..., 0], torch.tensor([[5.0, 1.0], [5.0, 1.0], [13.0, 2.0], [13.0, 2.0]]))


class Conv1D(nn.Module):
    """transformers' linear layer, whose weight is (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))


Conv1D.__module__ = "transformers.pytorch_utils"


class Decoder(nn.Module):
    """Every kind of layer whose output units do not lie on axis 0, and a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.up = nn.ConvTranspose2d(8, 6, 3)
        self.grouped = nn.ConvTranspose3d(8, 6, 3, groups=2)
        self.line = nn.ConvTranspose1d(8, 6, 3)
        self.token = Conv1D(5, 4)
        self.normed = weight_norm(nn.ConvTranspose2d(8, 6, 3), dim=1)
        self.parametrized = parametrizations.weight_norm(nn.ConvTranspose2d(8, 6, 3), dim=1)
        self.spectral = spectral_norm(nn.ConvTranspose2d(8, 6, 3))
        self.segmentation_head = nn.Conv2d(6, 2, 1)


AXES = {
    "up.weight": 1,
    "grouped.weight": (1, 2),
    "line.weight": 1,
    "token.weight": 1,
    "normed.weight_g": 1,
    "normed.weight_v": 1,
    "parametrized.parametrizations.weight.original0": 1,
    "parametrized.parametrizations.weight.original1": 1,
    "spectral.weight_orig": 1,
}


def test_the_layers_say_where_their_units_lie():
    model = Decoder()
    axes = unit_axes(model)
    assert {name: axes[id(p)] for name, p in model.named_parameters() if id(p) in axes} == AXES


class Flat(nn.Module):
    """A parametrization whose parameter has another shape than the weight."""

    def forward(self, flat):
        return flat.view(6, 2, 3, 3)

    def right_inverse(self, weight):
        return weight.reshape(3, 36)


def test_a_parameter_that_cannot_have_its_weights_axis_is_stepped_by_rows():
    layer = nn.ConvTranspose2d(6, 4, 3, groups=2)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Flat())
    optimizer = create_optimizer_v2(layer, "agcsgd", lr=0.1, clip_exempt=())
    flat = layer.parametrizations.weight.original
    flat.grad = torch.randn(3, 36)
    expected, *_ = loop_of_the_formula(flat, 0.01, 1e-3)
    optimizer.step()
    torch.testing.assert_close(flat.grad.double(), expected, rtol=1e-5, atol=1e-7)


def axis_of_each(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: g.get("clip_axis", 0) for g in groups for p in g["params"]}


@pytest.mark.parametrize("build", ["factory", "param_groups_agc", "layers of the caller"])
def test_groups_made_from_a_model_are_split_by_axis(build):
    model = Decoder()
    if build == "param_groups_agc":
        groups = param_groups_agc(model, clip_exempt="segmentation_head")
    else:
        fn = {"param_group_fn": lambda m: [{"params": m.parameters(), "lr": 0.3}]} if build != "factory" else {}
        groups = create_optimizer_v2(model, "agcsgd", lr=0.1, clip_exempt="segmentation_head", **fn).param_groups
        if fn:
            assert {g["lr"] for g in groups} == {0.3}
    expected = {name: AXES.get(name, 0) for name, _ in model.named_parameters()}
    assert axis_of_each(model, groups) == expected
    (head,) = [g for g in groups if g.get("clip_factor", 0) is None]
    assert [id(p) for p in head["params"]] == [id(model.segmentation_head.weight)]


def test_an_axis_that_a_group_states_is_the_last_word():
    model = Decoder()

    def param_group_fn(model):
        return [{"params": model.up.parameters(), "clip_axis": 0}, {"params": model.line.parameters()}]

    options = {"lr": 0.1, "param_group_fn": param_group_fn, "clip_exempt": ()}
    optimizer = create_optimizer_v2(model, "agcsgd", **options)
    assert axis_of_each(model, optimizer.param_groups) == {
        "up.weight": 0,
        "up.bias": 0,
        "line.weight": 1,
        "line.bias": 0,
    }


def stepped(optimizer, model):
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    expected = {
        name: loop_of_the_formula(p, 0.01, 1e-3, AXES.get(name, 0))[0]
        for name, p in model.named_parameters()
        if name != "segmentation_head.weight"
    }
    optimizer.step()
    for name, p in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad.double(), expected[name].double(), rtol=1e-5, atol=1e-7, msg=name)


def rebuilt(how, model, optimizer):
    if how == "state dict":
        state = copy.deepcopy(optimizer.state_dict())
        again = create_optimizer_v2(model, "agcsgd", lr=0.1, clip_exempt="segmentation_head")
        again.load_state_dict(state)
        return model, again
    if how == "pickle":
        return pickle.loads(pickle.dumps((model, optimizer)))
    if how == "deepcopy":
        return copy.deepcopy((model, optimizer))
    if how == "swap":
        twin = copy.deepcopy(model)
        new = dict(zip(model.parameters(), twin.parameters(), strict=True))
        for group in optimizer.param_groups:
            group["params"] = [new[p] for p in group["params"]]
        return twin, optimizer
    return model, optimizer


@pytest.mark.parametrize("how", ["as built", "state dict", "pickle", "deepcopy", "swap"])
def test_a_step_clips_output_units_of_all_layers(how):
    torch.manual_seed(0)
    model = Decoder()
    del model.normed, model.parametrized, model.spectral  # the older norms do not copy
    if how == "pickle":
        del model.token  # of a module that is not there
    optimizer = create_optimizer_v2(model, "agcsgd", lr=0.1, clip_exempt="segmentation_head")
    model, optimizer = rebuilt(how, model, optimizer)
    stepped(optimizer, model)


def test_a_loud_output_channel_of_a_transposed_convolution_leaves_the_others_alone():
    layer = nn.ConvTranspose2d(4, 3, 2, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    layer.weight.grad = torch.full_like(layer.weight, 1e-3)
    layer.weight.grad[:, 0] = 1e3
    optimizer = create_optimizer_v2(layer, "agcsgd", lr=0.0, clip_exempt=())
    optimizer.step()
    assert optimizer.clip_stats()[0]["units"] == 3
    torch.testing.assert_close(layer.weight.grad[:, 0], torch.full((4, 2, 2), 0.01))
    assert torch.equal(layer.weight.grad[:, 1:], torch.full((4, 2, 2, 2), 1e-3))


def test_agc_stats_counts_output_units():
    model = Decoder()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    units = {row["name"]: row["units"] for row in diagnostics.agc_stats(model)}
    assert units["up.weight"] == units["grouped.weight"] == units["line.weight"] == 6
    assert (units["token.weight"], units["conv.weight"]) == (5, 8)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, (1,), (0, 2), (1, 0), (1, True), (1, 2, 3), [1, 2.0]])
def test_what_is_no_axis_is_refused(value):
    p = with_gradient((4, 4))
    for use in (lambda: adaptive_clip_grad_(p, axis=value), lambda: optim.AgcSGD([p], lr=0.1, clip_axis=value)):
        with pytest.raises(ValueError, match="clip_axis must be an axis or"):
            use()
    with pytest.raises(ValueError, match="clip_axis must be an axis or"):
        optim.AgcSGD([{"params": [p], "clip_axis": value}], lr=0.1)


@pytest.mark.parametrize(("axis", "problem"), [(2, "but only 2 axes"), (-3, "but only"), ((1, 3), "into 3 groups")])
def test_an_axis_that_a_parameter_does_not_have_is_refused_by_name_before_anything_is_written(axis, problem):
    good, bad = with_gradient((4, 4)), with_gradient((4, 4))
    before = good.grad.clone()
    optimizer = optim.AgcSGD([{"params": [good]}, {"params": [bad], "clip_axis": axis}], lr=0.1)
    with pytest.raises(ValueError, match=rf"^parameter group 1, parameter 0 of shape \(4, 4\) has .*{problem}"):
        optimizer.step()
    assert torch.equal(good.grad, before)


def test_an_axis_from_a_file_that_knows_no_tuples_is_the_same():
    p = with_gradient((4, 6, 3))
    optimizer = optim.AgcSGD([{"params": [p], "clip_axis": (1, 2)}], lr=0.1)
    state = optimizer.state_dict()
    state["param_groups"][0]["clip_axis"] = [1, 2]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["clip_axis"] == (1, 2)
