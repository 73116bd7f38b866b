"""One battery for every layer with a standardised weight: what it computes, and what other tools may do with it."""

import copy
import inspect
import io
import itertools
import math
import pickle
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_nf
from timm_nf import layers


class Case(NamedTuple):
    """A layer: its class, torch's, how many axes its kernel has, and its arguments."""

    ours: Any
    plain: Any
    axes: int
    kwargs: dict[str, Any]

    @property
    def transposed(self) -> bool:
        return "Transpose" in self.ours.__name__

    @property
    def sizes(self) -> dict[str, int]:
        names = ("in_features", "out_features") if self.axes == 0 else ("in_channels", "out_channels")
        return dict(zip(names, (4, 6), strict=True))

    def build(self, **more: Any) -> Any:
        """With random gain and bias, in float64 unless told otherwise."""
        torch.manual_seed(0)
        layer = self.ours(**self.sizes, **{"dtype": torch.float64, "scale": 1.7} | self.kwargs | more)
        with torch.no_grad():
            layer.gain.normal_()
            layer.bias.normal_()
        return layer

    def input(self, dtype: torch.dtype = torch.float64, size: int = 7) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(2, 4, *(size + i for i in range(self.axes)), generator=generator, dtype=dtype)


CASES: dict[str, Case] = {"linear": Case(layers.ScaledStdLinear, nn.Linear, 0, {})}
for n in (1, 2, 3):
    conv, plain = getattr(layers, f"ScaledStdConv{n}d"), getattr(nn, f"Conv{n}d")
    for name, kwargs in {
        "numbers": {"kernel_size": 3, "stride": 2, "padding": 1},
        "same": {"kernel_size": 3, "stride": 2, "padding": "same", "groups": 2},
        "even": {"kernel_size": 4, "padding": "same"},
        "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2},
        "reflect": {"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "reflect"},
        "circular": {"kernel_size": (3, 1, 2)[:n], "padding": (2, 0, 1)[:n], "padding_mode": "circular"},
        "replicated": {"kernel_size": 3, "stride": 2, "padding": "same", "padding_mode": "replicate"},
    }.items():
        CASES[f"{n}d-{name}"] = Case(conv, plain, n, kwargs)
    conv, plain = getattr(layers, f"ScaledStdConvTranspose{n}d"), getattr(nn, f"ConvTranspose{n}d")
    for name, kwargs in {
        "transposed": {"kernel_size": 4, "stride": 2, "padding": 1},
        "transposed-groups": {"kernel_size": 3, "stride": 3, "output_padding": 1, "groups": 2, "dilation": 2},
    }.items():
        CASES[f"{n}d-{name}"] = Case(conv, plain, n, kwargs)

EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# What does not look at geometry needs one of each kind of weight.
KINDS = {name: CASES[name] for name in ("linear", "1d-same", "2d-reflect", "3d-numbers", "2d-transposed-groups")}
EACH_KIND = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)


def units(weight: np.ndarray, transposed: bool, groups: int) -> list[tuple[Any, ...]]:
    """Where each output channel's weights lie, by a loop over channels."""
    if not transposed:
        return [(o,) for o in range(weight.shape[0])]
    ins = weight.shape[0] // groups
    return [(slice(g * ins, (g + 1) * ins), o) for g in range(groups) for o in range(weight.shape[1])]


def standardized(layer: Any, case: Case, eps: float = 1e-4) -> np.ndarray:
    """The formula in NumPy's float64, unit by unit."""
    weight, gain = layer.weight.detach().double().numpy(), layer.gain.detach().double().numpy().ravel()
    out = np.empty_like(weight)
    for channel, at in enumerate(units(weight, case.transposed, getattr(layer, "groups", 1))):
        unit = weight[at]
        norm2 = unit.size * unit.var()
        out[at] = (unit - unit.mean()) * gain[channel] * layer.scale / math.sqrt(max(norm2, eps))
    return out


def reference(layer: Any, case: Case, weight: Tensor) -> Any:
    """What the layer computes with a weight, by torch's layer or functions: a function of the input."""
    if case.kwargs.get("padding") != "same":
        plain = case.plain(**case.sizes, **case.kwargs, dtype=torch.float64)
        return lambda x: torch.func.functional_call(plain, {"weight": weight, "bias": layer.bias}, (x,))

    def padded(x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, k, s, d in zip(x.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True):
            total = max(0, (math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size)  # TensorFlow's documentation
            pads = [total // 2, total - total // 2, *pads]
        mode = case.kwargs.get("padding_mode", "constant")
        conv = (F.conv1d, F.conv2d, F.conv3d)[case.axes - 1]
        return conv(F.pad(x, pads, mode), weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)

    return padded


# --- values and gradients ---


@EACH
@pytest.mark.parametrize("eps", [1e-4, 3.0])
def test_output_equals_torchs_layer_with_the_formulas_weight_unit_by_unit(case: Case, eps: float) -> None:
    layer = case.build(eps=eps)
    expected_weight = torch.from_numpy(standardized(layer, case, eps))
    np.testing.assert_allclose(layer.effective_weight().detach(), expected_weight, rtol=0, atol=1e-13)
    for size in (6, 7):
        x = case.input(size=size)
        torch.testing.assert_close(layer(x), reference(layer, case, expected_weight)(x), rtol=0, atol=1e-12)
        if case.axes:  # a signal without a batch axis
            torch.testing.assert_close(layer(x[0]), layer(x)[0], rtol=0, atol=1e-12)


def formula_of(layer: Any, case: Case, weight: Tensor, gain: Tensor) -> Tensor:
    """`standardized` in torch's operations, which have gradients."""
    parts = []
    for channel, at in enumerate(units(weight.detach().numpy(), case.transposed, getattr(layer, "groups", 1))):
        centred = weight[at] - weight[at].mean()
        scale = gain.flatten()[channel] * layer.scale / centred.square().sum().clamp(min=layer.eps).sqrt()
        parts.append((centred * scale).flatten())
    rows = torch.stack(parts)
    if not case.transposed:
        return rows.view_as(weight)
    ins, outs = weight.shape[0] // layer.groups, weight.shape[1]
    return rows.view(layer.groups, outs, ins, *weight.shape[2:]).transpose(1, 2).reshape(weight.shape)


@EACH
def test_first_and_second_derivatives_equal_those_of_the_formula(case: Case) -> None:
    layer, x = case.build(), case.input().requires_grad_()
    inputs = (x, layer.weight, layer.gain, layer.bias)

    def derivatives(out: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(out.sin().sum(), inputs, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)]

    expected = derivatives(reference(layer, case, formula_of(layer, case, layer.weight, layer.gain))(x))
    for got, true in zip(derivatives(layer(x)), expected, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-9, atol=1e-9)


@EACH_KIND
def test_plain_backward_equals_that_of_the_formula(case: Case) -> None:
    # without create_graph, which takes the fused kernels
    layer, x = case.build(), case.input()
    inputs = (layer.weight, layer.gain, layer.bias)
    expected = torch.autograd.grad(reference(layer, case, formula_of(layer, case, *inputs[:2]))(x).sin().sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(layer(x).sin().sum(), inputs), expected, rtol=1e-10, atol=1e-10)


@EACH_KIND
def test_per_example_gradients_equal_those_of_one_example_at_a_time(case: Case) -> None:
    layer, x = case.build(), case.input()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (one[None],)).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, one in enumerate(x):
        for name, g in torch.func.grad(loss)(parameters, one).items():
            torch.testing.assert_close(got[name][i], g, rtol=1e-10, atol=1e-10)
    networks = {name: torch.stack([p, 2 * p.flip(0)]) for name, p in parameters.items()}
    out = torch.func.vmap(lambda p: torch.func.functional_call(layer, p, (x,)))(networks)
    for i in range(2):
        each = {name: p[i] for name, p in networks.items()}
        torch.testing.assert_close(out[i], torch.func.functional_call(layer, each, (x,)), rtol=1e-10, atol=1e-10)


@EACH_KIND
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_rounded_once(case: Case, dtype: torch.dtype) -> None:
    layer = case.build(dtype=torch.float32).to(dtype)
    got, expected = layer.effective_weight().detach(), standardized(layer, case)
    assert got.dtype is dtype
    assert (abs(got.double().numpy() - expected) <= 0.51 * torch.finfo(dtype).eps * abs(expected) + 3e-8).all()
    assert layer(case.input(dtype)).dtype is dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert case.build(dtype=torch.float32)(case.input(torch.float32)).dtype is torch.bfloat16


# --- what other tools do with a layer ---


@EACH
def test_fusing_gives_torchs_layer_and_the_same_output(case: Case) -> None:
    layer = case.build().eval()
    layer.weight.requires_grad_(False)
    fused: Any = timm_nf.fuse(nn.Sequential(layer))[0]
    for size in (6, 7):
        x = case.input(size=size)
        torch.testing.assert_close(fused(x), layer(x), rtol=0, atol=1e-12)
    assert fused.state_dict().keys() == {"weight", "bias"}
    assert (fused.training, fused.weight.requires_grad, fused.bias.requires_grad) == (False, False, True)
    same = case.kwargs.get("padding") == "same"
    assert type(fused) is (getattr(layers, f"SameConv{case.axes}d") if same else case.plain)
    reparameterized: Any = timm.utils.reparameterize_model(nn.Sequential(layer))[0]
    assert torch.equal(reparameterized.weight, fused.weight)


@EACH_KIND
def test_copies_pickles_and_state_dicts_keep_the_layer(case: Case) -> None:
    layer, x = case.build(), case.input()
    assert list(layer.state_dict()) == ["weight", "bias", "gain"]
    other = case.build()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(layer.state_dict(), strict=True)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False), other]
    assert all(torch.equal(each(x), layer(x)) for each in copies)


@EACH_KIND
def test_a_layer_is_made_on_meta_and_initialised_later(case: Case) -> None:
    wide = {name: 64 for name in case.sizes}
    layer: Any = case.ours(**wide, **case.kwargs, device="meta", dtype=torch.float32)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.manual_seed(0)
    other = case.ours(**wide, **case.kwargs)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters(), strict=True))
    fan_in = layer.weight.numel() // 64
    assert layer.weight.var().item() == pytest.approx(1 / fan_in, rel=0.1)
    assert torch.equal(layer.gain, torch.ones(64, *[1] * (layer.weight.ndim - 1)))
    assert not layer.bias.any()


def slow_but_for_kinds() -> list[Any]:
    return [pytest.param(c, id=n, marks=() if n in KINDS else pytest.mark.slow) for n, c in CASES.items()]


@pytest.mark.parametrize("case", slow_but_for_kinds())
def test_what_compiles_and_exports_gives_the_same(case: Case) -> None:
    layer, x = case.build().eval(), case.input()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-12)
    dynamic = {axis: torch.export.Dim.DYNAMIC for axis in range(2, 2 + case.axes)}
    for module in (layer, timm_nf.fuse(layer)):
        exported: Any = torch.export.export(module, (x,), dynamic_shapes=(dynamic,)).module()
        for size in (7, 8):
            x = case.input(size=size)
            torch.testing.assert_close(exported(x), layer(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", slow_but_for_kinds())
@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")  # torch's own
def test_torchscript_of_a_trace_of_the_layer_and_of_the_fused_one_gives_the_same(case: Case) -> None:
    layer, x = case.build().eval(), case.input()
    traced: Any = torch.jit.trace(layer, (x,))
    torch.testing.assert_close(traced(x), layer(x), rtol=0, atol=1e-12)
    for module in (layer, timm_nf.fuse(layer)):
        scripted: Any = torch.jit.script(module)
        for size in (6, 7):
            x = case.input(size=size)
            torch.testing.assert_close(scripted(x), layer(x), rtol=0, atol=1e-12)


@EACH
def test_symbolic_tracing_keeps_the_padding_a_function_of_the_size(case: Case) -> None:
    layer = case.build()
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    for size in (6, 7):
        x = case.input(size=size)
        torch.testing.assert_close(traced(x), layer(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["2d-same", "3d-numbers", "2d-transposed", "3d-transposed-groups"])
def test_channels_last_weights_and_inputs_give_the_same(name: str) -> None:
    case = CASES[name]
    memory_format = torch.channels_last if case.axes == 2 else torch.channels_last_3d
    layer, x = case.build(), case.input()
    expected = layer(x)
    inputs = (layer.weight, layer.gain)
    gradients = torch.autograd.grad(expected.sin().sum(), inputs)
    layer = layer.to(memory_format=memory_format)
    got = layer(x.to(memory_format=memory_format))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(got.sin().sum(), (layer.weight, layer.gain)), gradients)
    fused = timm_nf.fuse(layer)
    assert fused.weight.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(fused(x), got, rtol=0, atol=1e-12)


@EACH_KIND
def test_the_way_of_an_accelerator_is_one_call_of_its_kernel(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # Meta tensors go the way of the device they stand for.
    layer = case.build(device="meta")
    calls = []
    original = layers.standardize_triton.standardize
    monkeypatch.setattr(
        layers.standardize,
        "standardize",
        lambda weight, *a, **k: calls.append(weight.shape) or original(weight, *a, **k),
    )
    out = layer(case.input().to("meta"))
    assert out.device.type == "meta"
    groups = getattr(layer, "groups", 1)
    fan_in = layer.weight.numel() // 6
    assert [(shape[0], math.prod(shape[1:])) for shape in calls] == [(6, fan_in)]
    assert fan_in == 4 // groups * math.prod(getattr(layer, "kernel_size", ()))


# --- constructors ---


@pytest.mark.parametrize("case", {case.ours: case for case in CASES.values()}.values(), ids=lambda c: c.ours.__name__)
def test_arguments_are_those_of_torchs_layer_in_its_order(case: Case) -> None:
    theirs = list(inspect.signature(case.plain.__init__).parameters)
    ours = inspect.signature(case.ours.__init__).parameters
    assert list(ours)[: len(theirs)] == theirs
    assert {name for name in ours if name not in theirs} == {"scale", "eps"}


@EACH
def test_a_layer_built_by_the_attributes_of_another_pads_alike(case: Case) -> None:
    layer, x = case.build(), case.input(size=6)
    names = [
        name for name in inspect.signature(case.plain.__init__).parameters if name not in ("self", "device", "dtype")
    ]
    values = {name: getattr(layer, name) for name in names if name != "bias"}
    other = case.ours(**values, scale=layer.scale, eps=layer.eps, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert str(other) == str(layer)


@pytest.mark.parametrize("case", {case.ours: case for case in CASES.values()}.values(), ids=lambda c: c.ours.__name__)
def test_an_adapter_that_wants_no_bias_is_told_to_fuse(case: Case) -> None:
    with pytest.raises(TypeError, match=r"needs a bias.*timm_nf\.fuse"):
        case.ours(**case.sizes, **case.kwargs, bias=False)


@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "Conv3d"])
def test_valid_is_no_padding_and_other_words_are_refused(name: str) -> None:
    ours: Any = getattr(layers, f"ScaledStd{name}")
    axes = int(name[-2])
    assert ours(4, 6, 3, padding="valid").padding == (0,) * axes
    with pytest.raises(ValueError, match="'same', 'valid' or numbers, got 'full'"):
        ours(4, 6, 3, padding="full")
    with pytest.raises(ValueError, match=f"one padding for each of the {axes} axes.*padding=\\(1, 1, 1, 1\\)"):
        ours(4, 6, 3, padding=(1, 1, 1, 1))


@pytest.mark.parametrize("name", ["ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"])
def test_transposed_layers_refuse_what_torchs_refuse(name: str) -> None:
    ours: Any = getattr(layers, f"ScaledStd{name}")
    for kwargs in ({"padding": "same"}, {"padding_mode": "reflect"}):
        with pytest.raises(ValueError, match="padding"):
            ours(4, 6, 3, **kwargs)
    layer = ours(4, 6, 3, stride=2)
    x = torch.randn(2, 4, *[5] * layer.axes)
    assert layer(x, output_size=[12] * layer.axes).shape == (2, 6, *[12] * layer.axes)
    with pytest.raises(ValueError, match="requested an output size"):
        layer(x, output_size=[20] * layer.axes)


def test_strides_beyond_the_kernel_need_a_number_of_padding() -> None:
    with pytest.raises(ValueError, match=r"no larger stride.*kernel_size=\(3,\), stride=\(4,\)"):
        layers.ScaledStdConv1d(4, 6, 3, 4, "same")
    assert layers.ScaledStdConv1d(4, 6, 3, 4, 0)(torch.zeros(1, 4, 11)).shape == (1, 6, 3)
    assert layers.ScaledStdConv1d(4, 6, 1, 4, "same")(torch.zeros(1, 4, 11)).shape == (1, 6, 3)


# --- what the layers are for ---


@pytest.mark.parametrize("axes", [0, 1, 2, 3])
def test_unit_variance_survives_a_deep_stack(axes: int) -> None:
    torch.manual_seed(0)
    gamma = layers.activation_gain("relu")
    x = torch.randn(64, 128, *[2] * axes)
    for _ in range(8):
        layer = (
            layers.ScaledStdLinear(128, 128, scale=gamma)
            if axes == 0
            else getattr(layers, f"ScaledStdConv{axes}d")(128, 128, 1, scale=gamma)
        )
        x = layer(x.relu())
    assert x.transpose(0, 1).flatten(1).var(1).mean().item() == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize(("axes", "groups"), list(itertools.product((1, 2, 3), (1, 2))))
def test_a_transposed_layer_keeps_unit_variance_with_the_scale_that_its_docstring_gives(axes: int, groups: int) -> None:
    torch.manual_seed(0)
    layer: Any = getattr(layers, f"ScaledStdConvTranspose{axes}d")(
        64, 32, 4, stride=2, padding=1, groups=groups, scale=2 ** (axes / 2)
    )
    out = layer(torch.randn(8, 64, *[8] * axes))
    assert out[(..., *[slice(2, -2)] * axes)].var().item() == pytest.approx(1, rel=0.1)


# --- the other parts of a block, in any dimension ---


@pytest.mark.parametrize("axes", [0, 1, 2, 3])
def test_a_block_ends_alike_in_every_dimension(axes: int) -> None:
    torch.manual_seed(0)
    shape = (3, 6, *range(2, 2 + axes))
    shortcut, branch = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    skip: Any = layers.SkipInit(alpha=0.2, dtype=torch.float64)
    assert torch.equal(skip(shortcut, branch), shortcut)
    nn.init.constant_(skip.gain, 3.0)
    torch.testing.assert_close(skip(shortcut, branch), shortcut + 0.6 * branch)
    se: Any = layers.SqueezeExcite(6, dtype=torch.float64, axes=axes)
    mean = branch.flatten(2).mean(2) if axes else branch
    fc1, fc2 = ((fc.weight.flatten(1), fc.bias) for fc in (se.fc1, se.fc2))
    gate = F.linear(F.linear(mean, *fc1).relu(), *fc2).sigmoid().view(3, 6, *[1] * axes)
    torch.testing.assert_close(se(branch), gate)
    torch.testing.assert_close(skip(shortcut, branch, se(branch)), shortcut + 0.2 * 3 * 2 * gate * branch)
    assert torch.autograd.gradcheck(se, (branch.requires_grad_(),))


@pytest.mark.parametrize("axes", [0, 1, 2, 3])
def test_stochastic_depth_drops_whole_examples_in_every_dimension(axes: int) -> None:
    torch.manual_seed(0)
    branch = torch.ones(400, 2, *[2] * axes)
    skip: Any = layers.SkipInit(alpha=0.2, drop_path_rate=0.3)
    nn.init.ones_(skip.gain)
    out = skip(torch.zeros_like(branch), branch).flatten(1)
    assert (out == out[:, :1]).all()
    assert (out[:, 0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.08)
    assert torch.unique(out).tolist() == pytest.approx([0.0, 0.2])
    assert (skip.eval()(torch.zeros_like(branch), branch) == skip.alpha).all()


def test_rates_that_are_no_probability_are_refused() -> None:
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        layers.SkipInit(drop_path_rate=1.5)


# --- clipping ---


@EACH
def test_every_unit_is_clipped_to_its_limit(case: Case) -> None:
    layer = case.build()
    layer(case.input()).square().sum().backward()
    groups = [group for group in timm_nf.param_groups_agc(layer, weight_decay=0.1, clip_exempt=())]
    (group,) = [group for group in groups if any(p is layer.weight for p in group["params"])]
    assert [g["weight_decay"] for g in groups for p in g["params"] if p is layer.gain or p is layer.bias] == [0.0, 0.0]
    weight, before = layer.weight.detach().numpy(), layer.weight.grad.numpy().copy()
    timm_nf.adaptive_clip_grad_(layer.weight, 0.01, axis=group.get("clip_axis", 0))
    after = layer.weight.grad.numpy()
    for at in units(weight, case.transposed, getattr(layer, "groups", 1)):
        limit = 0.01 * max(np.linalg.norm(weight[at]), 1e-3)
        norm = np.linalg.norm(before[at])
        np.testing.assert_allclose(after[at], before[at] * min(1, limit / norm), rtol=1e-10)
