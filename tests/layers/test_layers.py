import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support import reference_nfnet as reference
from timm_nf.layers import (
    ACTIVATIONS,
    Activation,
    GateConv2d,
    SameAvgPool2d,
    SameConv2d,
    SameMaxPool2d,
    ScaledStdConv2d,
    SqueezeExcite,
    StochasticDepth,
    activation_gain,
    activation_name,
    create_activation,
)
from timm_nf.layers.standardize import standardize_weight

# --- activations ---


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gamma_is_one_over_the_std_of_the_activated_normal(name: str) -> None:
    # Two half-line Gauss-Legendre rules, as most of the activations have a kink at 0 (and relu6 one at 6).
    nodes, weights = np.polynomial.legendre.leggauss(200)
    pieces = [(-12.0, 0.0), (0.0, 6.0), (6.0, 12.0)]
    z = np.concatenate([(b - a) / 2 * nodes + (a + b) / 2 for a, b in pieces])
    density = np.concatenate([(b - a) / 2 * weights for a, b in pieces]) * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    y = create_activation(name)(torch.from_numpy(z)).numpy()
    mean = (y * density).sum()
    std = math.sqrt((((y - mean) ** 2) * density).sum())
    # The authors estimated their constants from samples; the worst is 0.12 % off.
    assert activation_gain(name) == pytest.approx(1 / std, rel=1.2e-3)
    assert activation_gain(name) == reference.ACTIVATIONS[name][1]


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activation_equals_its_numpy_definition(name: str) -> None:
    x = torch.cat([torch.linspace(-60, 60, 4001, dtype=torch.float64), torch.tensor([-1e-9, 0.0, 1e-9, 700, -700.0])])
    got = Activation(name)(x)
    np.testing.assert_allclose(got.numpy(), reference.activation(name, x.numpy()), rtol=1e-13, atol=1e-14)
    assert torch.equal(got, create_activation(name)(x) * activation_gain(name))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_torchs_own_module_and_keeps_its_input(name: str) -> None:
    act, x = create_activation(name), torch.linspace(-3, 3, 7)
    assert type(act).__module__.startswith("torch.nn.modules.")
    assert type(Activation(name).act) is type(act)
    before = x.clone()
    with torch.inference_mode():
        act(x)
    assert torch.equal(x, before)


def test_there_are_exactly_the_fourteen_elementwise_activations_of_the_authors() -> None:
    assert ACTIVATIONS.keys() == reference.ACTIVATIONS.keys()
    assert len(ACTIVATIONS) == 14


@pytest.mark.parametrize(
    ("alias", "name"), [("swish", "silu"), ("soft_sign", "softsign"), ("logsigmoid", "log_sigmoid")]
)
def test_other_spellings_resolve(alias: str, name: str) -> None:
    assert activation_name(alias) == name
    assert activation_gain(alias) == activation_gain(name)


@pytest.mark.parametrize("name", ["glu", "log_softmax"])
def test_activations_of_the_authors_that_are_not_elementwise_are_refused_as_such(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is in the authors' table but not built here.*softsign"):
        activation_name(name)


@pytest.mark.parametrize("name", ["mish", "", nn.ReLU, None])
def test_an_activation_without_gamma_is_refused_with_the_choices(name: Any) -> None:
    with pytest.raises(ValueError, match="softsign") as error:
        activation_name(name)
    assert repr(name) in str(error.value)


# --- SAME padding ---

SIZES = list(itertools.product(range(1, 10), repeat=2))


def nhwc(x: Tensor) -> np.ndarray:
    return x.detach().numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_convolution_pads_as_tensorflow_does(kernel: int, stride: int) -> None:
    conv: Any = SameConv2d(4, 6, (kernel, kernel), (stride, stride), groups=2, dtype=torch.float64)
    w, bias = conv.weight.detach().numpy().transpose(2, 3, 1, 0), conv.bias.detach().numpy()
    for h, width in SIZES:
        x = torch.randn(2, 4, h, width, dtype=torch.float64)
        expected = reference.conv(nhwc(x), w, bias, stride)
        assert expected.shape[1:3] == (math.ceil(h / stride), math.ceil(width / stride))
        np.testing.assert_allclose(nhwc(conv(x)), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dilation", [2, 4])
def test_dilated_convolution_keeps_the_size_and_looks_at_its_own_grid(dilation: int) -> None:
    conv = SameConv2d(2, 2, 3, dilation=dilation, dtype=torch.float64)
    x = torch.randn(1, 2, 8, 12, dtype=torch.float64)
    out = conv(x)
    assert out.shape == x.shape
    dense = copy.deepcopy(conv)
    dense.dilation, dense.padding = (1, 1), (1, 1)
    torch.testing.assert_close(
        out[..., ::dilation, ::dilation], dense(x[..., ::dilation, ::dilation]), rtol=0, atol=1e-13
    )


def test_max_pool_pads_as_tensorflow_does() -> None:
    for h, w in SIZES:
        x = torch.randn(2, 3, h, w, dtype=torch.float64) - 5  # a zero from the padding would win
        np.testing.assert_array_equal(nhwc(SameMaxPool2d()(x)), reference.max_pool(nhwc(x), 3, 2))


@pytest.mark.parametrize("stride", [1, 2])
def test_average_pool_pads_as_tensorflow_does_and_counts_no_padding(stride: int) -> None:
    for h, w in SIZES:
        x = torch.randn(2, 3, h, w, dtype=torch.float64)
        np.testing.assert_allclose(
            nhwc(SameAvgPool2d(stride)(x)), reference.avg_pool(nhwc(x), 2, stride), rtol=0, atol=1e-15
        )


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"kernel_size": 3, "stride": 4}, r"no larger stride.*kernel_size=\(3, 3\), stride=\(4, 4\)"),
        ({"kernel_size": (3, 3, 3)}, r"one kernel_size for each of the 2 axes.*\(3, 3, 3\)"),
        ({"kernel_size": 3, "stride": (2,)}, r"one stride for each of the 2 axes.*\(2,\)"),
        ({"kernel_size": 3, "padding_mode": "mirror"}, "padding_mode.*'mirror'"),
    ],
)
@pytest.mark.parametrize("cls", [SameConv2d, ScaledStdConv2d])
def test_a_convolution_that_same_padding_does_not_cover_is_refused(cls: Any, kwargs: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        cls(4, 4, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "own"),
    [
        ({"kernel_size": 3, "padding": 0}, r"\(1, 1\) here, got padding=0"),
        ({"kernel_size": 3, "padding": "same"}, r"\(1, 1\) here, got padding='same'"),
        ({"kernel_size": 3, "stride": 2, "padding": (1, 1)}, r"\(0, 0\) here, got padding=\(1, 1\)"),
        ({"kernel_size": 3, "dilation": 2, "padding": 1}, r"\(2, 2\) here, got padding=1"),
    ],
)
def test_a_same_convolution_takes_no_other_padding(kwargs: Any, own: str) -> None:
    with pytest.raises(ValueError, match=f"pads SAME.*{own}"):
        SameConv2d(4, 4, **kwargs)


@pytest.mark.parametrize(
    "build",
    [
        lambda: SameConv2d(4, 6, 1),
        lambda: SameConv2d(4, 6, 1, 2),
        lambda: SameConv2d(4, 6, 3),
        lambda: SameConv2d(4, 6, 5, 2),
        lambda: GateConv2d(4, 6),
    ],
    ids=["1x1", "1x1 strided", "3x3", "5x5 strided", "gate"],
)
def test_an_adapter_builds_layers_of_the_class_by_the_attributes_of_one(build: Callable[[], nn.Conv2d]) -> None:
    # as PEFT's LoRA does: what adds to the output of `conv` is a layer of its class and geometry, then a 1x1 one
    conv: Any = build()
    down: Any = type(conv)(conv.in_channels, 2, conv.kernel_size, conv.stride, conv.padding, bias=False)
    up: Any = type(conv)(2, conv.out_channels, (1, 1), (1, 1), bias=False)
    assert (down.bias, up.bias) == (None, None)
    x = torch.randn(3, 4, 1, 1) if isinstance(conv, GateConv2d) else torch.randn(3, 4, 7, 10)
    merged = copy.deepcopy(conv)
    with torch.no_grad():
        merged.weight += torch.einsum("or,rihw->oihw", up.weight[:, :, 0, 0], down.weight)
    torch.testing.assert_close(conv(x) + up(down(x)), merged(x))


def test_an_adapter_on_a_standardised_convolution_is_refused_and_told_to_fuse() -> None:
    conv: Any = ScaledStdConv2d(4, 6, 3, 2)
    with pytest.raises(TypeError, match=r"standardised.*timm_nf\.fuse"):
        type(conv)(4, 2, conv.kernel_size, conv.stride, conv.padding, bias=False)


def test_max_pool_of_traced_sizes_pads_with_numbers_of_the_input() -> None:
    pool, dynamic = SameMaxPool2d(), torch.export.Dim.DYNAMIC
    program = torch.export.export(pool, (torch.randn(1, 2, 6, 6),), dynamic_shapes=({2: dynamic, 3: dynamic},))
    assert "inf" not in str(program.graph)
    exported = program.module()
    for h, w in itertools.product(range(3, 9), repeat=2):
        x = torch.randn(1, 2, h, w) - 5
        np.testing.assert_array_equal(nhwc(exported(x)), reference.max_pool(nhwc(x), 3, 2))


def test_compiled_max_pool_is_compiled_once_for_all_sizes() -> None:
    torch._dynamo.reset()
    graphs: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph.code)
        return graph

    pool = torch.compile(SameMaxPool2d(), backend=record, fullgraph=True, dynamic=True)
    for h, w in ((7, 6), (6, 8), (9, 5), (8, 8), (12, 11)):
        x = torch.randn(3, 2, h, w) - 5
        np.testing.assert_array_equal(nhwc(pool(x)), reference.max_pool(nhwc(x), 3, 2))
    (code,) = graphs
    # Inductor of torch 2.14 fails in the gradient of repeated edges. That of torch 2.6, which does not tell an export
    # from a compilation, takes them.
    assert ("replicate" in code) is not hasattr(torch.compiler, "is_exporting")


# --- the standardised convolution ---


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_standardised_convolution_equals_the_reference(groups: int, stride: int) -> None:
    conv: Any = ScaledStdConv2d(4, 6, 3, stride, groups=groups, scale=1.7, dtype=torch.float64)
    nn.init.normal_(conv.gain)
    nn.init.normal_(conv.bias)
    x = torch.randn(2, 4, 9, 6, dtype=torch.float64)
    p = {
        "w": conv.weight.detach().numpy().transpose(2, 3, 1, 0),
        "gain": conv.gain.detach().numpy().ravel(),
        "bias": conv.bias.detach().numpy(),
    }
    # scale is what a multiplication of the input would do
    np.testing.assert_allclose(nhwc(conv(x)), reference.ws_conv(1.7 * nhwc(x), p, stride), rtol=0, atol=1e-12)


def test_standardised_convolution_starts_with_unit_gain_no_bias_and_fan_in_variance() -> None:
    torch.manual_seed(0)
    conv: Any = ScaledStdConv2d(64, 256, 3, groups=2)
    assert conv.gain.shape == (256, 1, 1, 1)
    assert torch.equal(conv.gain, torch.ones_like(conv.gain))
    assert torch.equal(conv.bias, torch.zeros_like(conv.bias))
    assert conv.weight.var().item() == pytest.approx(1 / (32 * 9), rel=0.03)
    nn.init.normal_(conv.gain)
    conv.reset_parameters()
    assert torch.equal(conv.gain, torch.ones_like(conv.gain))


def test_unit_variance_survives_a_deep_stack_of_standardised_convolutions() -> None:
    # What the whole method is for: activation times gamma, standardised weight, variance 1 again.
    torch.manual_seed(0)
    x = torch.randn(8, 256, 8, 8)
    for _ in range(10):
        x = ScaledStdConv2d(256, 256, 1, scale=activation_gain("gelu"))(create_activation("gelu")(x))
    assert x.var((0, 2, 3)).mean().item() == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("cls", [SameConv2d, ScaledStdConv2d])
def test_parameters_are_made_on_the_given_device_and_dtype(cls: type[nn.Module]) -> None:
    layer = cls(4, 4, 3, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}


# --- squeeze-excite and stochastic depth ---


def test_squeeze_excite_is_the_reference_gate() -> None:
    se: Any = SqueezeExcite(6, 0.5, dtype=torch.float64)
    for p in se.parameters():
        nn.init.normal_(p)
    x = torch.randn(3, 6, 5, 4, dtype=torch.float64)
    fcs = [{"w": fc.weight.detach().numpy()[:, :, 0, 0].T, "b": fc.bias.detach().numpy()} for fc in (se.fc1, se.fc2)]
    got = se(x)
    assert got.shape == (3, 6, 1, 1)
    np.testing.assert_allclose(nhwc(got), reference.squeeze_excite(nhwc(x), *fcs), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("channels", "rd_ratio", "hidden"), [(7, 0.5, 3), (3, 0.25, 1), (1, 0.5, 1), (10, 0.29, 2)])
def test_squeeze_excite_truncates_its_hidden_width_to_at_least_one(channels: int, rd_ratio: float, hidden: int) -> None:
    se = SqueezeExcite(channels, rd_ratio)
    assert se.fc1.weight.shape == (hidden, channels, 1, 1)
    assert se.fc2.weight.shape == (channels, hidden, 1, 1)


@pytest.mark.parametrize("channels_last", [False, True])
def test_convolution_of_one_pixel_is_that_of_torch(channels_last: bool) -> None:
    conv, plain = GateConv2d(6, 4, dtype=torch.float64), nn.Conv2d(6, 4, 1, dtype=torch.float64)
    plain.load_state_dict(conv.state_dict(), strict=True)
    x: Any = torch.randn(3, 6, 1, 1, dtype=torch.float64, requires_grad=True)
    if channels_last:
        conv, plain = (c.to(memory_format=torch.channels_last) for c in (conv, plain))
    torch.testing.assert_close(conv(x), plain(x), rtol=1e-14, atol=1e-14)
    got, want = (torch.autograd.grad(c(x).square().sum(), [x, *c.parameters()]) for c in (conv, plain))
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("kwargs", [{"kernel_size": 3}, {"stride": 2}, {"padding": 1}, {"groups": 2}])
def test_convolution_of_one_pixel_refuses_what_is_no_matrix_product(kwargs: Any) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))}={next(iter(kwargs.values()))}.*nn.Conv2d"):
        GateConv2d(4, 4, **kwargs)


def test_squeeze_excite_starts_with_truncated_normal_weights_and_no_bias() -> None:
    torch.manual_seed(0)
    se: Any = SqueezeExcite(512, 0.5)
    for fc in (se.fc1, se.fc2):
        std = fc.in_channels**-0.5
        assert not fc.bias.any()
        assert fc.weight.abs().max() <= 2 * std
        assert fc.weight.std().item() == pytest.approx(0.88 * std, rel=0.02)  # of a normal cut at two deviations


def test_stochastic_depth_drops_whole_examples_at_its_rate_and_does_not_rescale() -> None:
    torch.manual_seed(0)
    n = 20_000
    coefficient, x = torch.full((1,), 0.3), torch.empty(n, 2, 1, 1)
    out = StochasticDepth(0.3).train()(coefficient, x)
    assert out.shape == (n, 1, 1, 1)
    assert set(out.unique().tolist()) == {0.0, coefficient.item()}
    dropped = (out == 0).float().mean().item()
    assert abs(dropped - 0.3) < 4 * math.sqrt(0.3 * 0.7 / n)
    gate = torch.rand(n, 2, 1, 1) + 1
    out = StochasticDepth(0.3).train()(gate, x)
    assert (((out == 0) | (out == gate)).all(1) & ((out == 0).all(1) | (out == gate).all(1))).all()


def test_stochastic_depth_is_off_in_evaluation_and_extreme_rates_are_exact() -> None:
    coefficient, x = torch.rand(64, 4, 1, 1) + 1, torch.empty(64, 4, 2, 2)
    assert StochasticDepth(0.9).eval()(coefficient, x) is coefficient
    assert torch.equal(StochasticDepth(0.0).train()(coefficient, x), coefficient)
    assert not StochasticDepth(1.0).train()(coefficient, x).any()


def test_stochastic_depth_keeps_the_dtype_of_the_coefficient() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        assert StochasticDepth(0.5).train()(torch.ones(1, dtype=dtype), torch.empty(4, 2, 1, 1)).dtype is dtype


def test_standardised_convolution_takes_channels_last() -> None:
    conv = ScaledStdConv2d(4, 8, 3, stride=2)
    x = torch.randn(2, 4, 9, 9)
    out = conv.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, conv(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_effective_half_precision_weight_is_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = ScaledStdConv2d(64, 64, 3, scale=1.7).to(dtype)
    expected = standardize_weight(conv.weight.double(), conv.gain.double() * conv.scale).to(dtype)
    # one in a thousand may fall on the other side, the arithmetic being float32
    assert (conv.effective_weight() != expected).double().mean() < 0.01
