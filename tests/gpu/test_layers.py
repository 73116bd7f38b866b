"""On a device: every layer and the kernels against float64, by every way that eager and compiled tensors take."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.device import COMPILER, DEVICE, ON_CPU
from tests.support.small_nets import FAMILIES, create
from tests.support.standardisation import SCALE, assert_equals_the_formula, formula, gain_like, mixed_rows
from timm_nf.layers import (
    ACTIVATIONS,
    GateConv2d,
    SameAvgPool2d,
    SameConv2d,
    SameMaxPool2d,
    ScaledStdConv2d,
    SqueezeExcite,
    StochasticDepth,
    create_activation,
    standardize_triton,
)
from timm_nf.layers.residual import add_scaled, global_mean
from timm_nf.layers.standardize_triton import standardize

pytestmark = pytest.mark.gpu
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Convolutions and matrix products in all 24 bits of float32, where GPUs would take 11."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=["kernels", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways that a device may take: that with Triton and that without."""
    if request.param == "plain":
        monkeypatch.setattr(standardize_triton, "has_triton", lambda device_type: False)
    else:
        assert standardize_triton.has_triton(DEVICE.type) or ON_CPU, "Triton does not start on this device"


# --- standardisation ---

SHAPES = [
    (64, 3, 3, 3), (256, 128, 3, 3), (250, 8, 3, 3), (1536, 768, 1, 1), (3, 1024, 3, 3), (4, 911, 3, 3), (5, 1, 1, 1),
    (1, 5), (3, 8192), (3, 8193), (2, 40000), (6, 2, 2, 2, 3),
]  # fmt: skip
DTYPES = [
    (torch.float32, torch.float32, 2e-6),
    (torch.float32, torch.bfloat16, 5e-3),
    (torch.float32, torch.float16, 1e-3),
    (torch.float64, torch.float64, 1e-11),
    (torch.bfloat16, torch.bfloat16, 5e-3),
    (torch.float16, torch.float16, 1e-3),
]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_standardised_weights_and_gradients_equal_float64(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    for dtype, out_dtype, tolerance in DTYPES:
        for memory_format in FORMATS if len(shape) == 4 else FORMATS[:1]:
            here = weight.to(DEVICE, dtype).to(memory_format=memory_format)
            if here[0].numel() > 1:
                assert_equals_the_formula(here, gain_like(here), tolerance, out_dtype=out_dtype)
            else:  # a row of one element has no spread, and no gradient to compare
                assert not standardize(here, gain_like(here), out_dtype=out_dtype).any()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_floored_constant_zero_and_mean_heavy_rows_equal_float64(scale: float) -> None:
    weight = (mixed_rows() * scale).to(DEVICE)
    assert_equals_the_formula(weight, gain_like(weight), 1e-11)
    assert not standardize(weight, gain_like(weight))[2:4].any()


@pytest.mark.usefixtures("way")
def test_two_calls_give_the_same_bits() -> None:
    weight = torch.randn(512, 384, 3, 3, device=DEVICE, requires_grad=True)
    gain = torch.ones(512, 1, 1, 1, device=DEVICE, requires_grad=True)
    cotangent = torch.randn_like(weight)

    def call() -> tuple[Tensor, ...]:
        out = standardize(weight, gain)
        return out, *torch.autograd.grad(out, (weight, gain), cotangent)

    first = call()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))


@pytest.mark.usefixtures("way")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_derivatives_and_transforms_equal_those_of_the_formula() -> None:
    weights = torch.stack([mixed_rows(), mixed_rows().flip(0)]).to(DEVICE)
    gains = torch.stack([gain_like(weights[0]), -gain_like(weights[1])])
    target = torch.randn(weights[0].shape, device=DEVICE, dtype=torch.float64)

    def results(function: Callable) -> list[Any]:
        def loss(w: Tensor, g: Tensor) -> Tensor:
            return (function(w, g, scale=SCALE) * target).sin().sum()

        return [
            torch.func.vmap(lambda w, g: function(w, g, scale=SCALE))(weights, gains),
            *torch.func.vmap(torch.func.grad(loss, (0, 1)))(weights, gains),
            torch.func.jvp(loss, (weights[0], gains[0]), (target, gains[1])),
            torch.func.jacrev(torch.func.grad(loss))(weights[0], gains[0]),
        ]

    torch.testing.assert_close(results(standardize), results(formula), rtol=1e-8, atol=1e-8)


# --- layers ---


class Residual(nn.Module):
    """A block's end."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.3]))

    def forward(self, x: Tensor) -> Tensor:
        return add_scaled(x.flip(0), x, self.gain, global_mean(x))


class Dropped(nn.Module):
    """Stochastic depth that keeps all, as its choice is drawn on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = StochasticDepth(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.drop(torch.ones_like(x[:, :, :1, :1]), x)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "3x3": lambda: ScaledStdConv2d(8, 12, 3, scale=SCALE),
    "1x1": lambda: ScaledStdConv2d(8, 12, 1),
    "grouped": lambda: ScaledStdConv2d(8, 12, 3, groups=4),
    "dilated": lambda: ScaledStdConv2d(8, 12, 3, dilation=2),
    "strided": lambda: ScaledStdConv2d(8, 12, 3, 2),
    "strided, cut": lambda: ScaledStdConv2d(8, 4, 3, 2),
    "strided 1x1": lambda: ScaledStdConv2d(8, 12, 1, 2),
    "plain": lambda: SameConv2d(8, 4, 3, 2),
    "max pool": SameMaxPool2d,
    "average pool": SameAvgPool2d,
    "average pool, stride 1": lambda: SameAvgPool2d(1),
    "squeeze-excite": lambda: SqueezeExcite(8),
    "gate": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), GateConv2d(8, 4)),
    "residual": Residual,
    "stochastic depth": Dropped,
    **{name: lambda name=name: create_activation(name) for name in ACTIVATIONS},
}


def result(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients of the input and of all parameters, in float64 on the CPU."""
    x = x.detach().requires_grad_()
    out = layer(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.device, out.dtype)
    gradients = torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])
    return [t.detach().cpu().double() for t in (out, *gradients)]


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * b.norm() + tolerance


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_equals_itself_in_float64_on_a_cpu(name: str) -> None:
    layer = LAYERS[name]().double()
    for size in (9, 12):
        x = torch.randn(4, 8, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        expected = result(layer, x)
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
            for memory_format in FORMATS:
                here = copy.deepcopy(layer).to(DEVICE, dtype).to(memory_format=memory_format)
                got = result(here, x.to(DEVICE, dtype).to(memory_format=memory_format))
                assert_close(got, expected, tolerance)


@pytest.mark.parametrize("name", ["3x3", "strided", "squeeze-excite", "residual", "max pool", "gelu"])
def test_compiled_layers_equal_float64(name: str) -> None:
    torch.compiler.reset()
    layer = LAYERS[name]().double()
    x = torch.randn(4, 8, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    here = torch.compile(copy.deepcopy(layer).to(DEVICE).float(), backend=COMPILER, fullgraph=True)
    assert_close(result(here, x.to(DEVICE).float()), result(layer, x), 1e-5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("family", FAMILIES)
def test_small_networks_equal_themselves_in_float64_on_a_cpu(family: str) -> None:
    torch.manual_seed(0)
    model = create(family, drop_path_rate=0.0, drop_rate=0.0).double().train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("skipinit_gain"):
                p.fill_(0.5)  # at 0 most gradients would be zero
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = result(model, x)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
        here = copy.deepcopy(model).to(DEVICE, dtype).to(memory_format=torch.channels_last)
        assert_close(result(here, x.to(DEVICE, dtype)), expected, tolerance)


@pytest.mark.usefixtures("way")
def test_autocast_to_bfloat16_is_as_far_off_as_bfloat16_is() -> None:
    torch.manual_seed(0)
    model = create("NFNet", drop_path_rate=0.0, drop_rate=0.0).to(DEVICE).eval()
    x = torch.randn(2, 3, 64, 64, device=DEVICE)
    expected = model(x)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got = model(x)
    assert got.dtype is torch.bfloat16
    assert 0 < (got - expected).norm() <= 5e-2 * expected.norm()
