"""torch.jit.script of networks and layers, fused and not: the same numbers, after saving too, at every size."""

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

import timm_nf
from tests.support.small_nets import FAMILIES, SHORT, batch, build, create, relative_error
from timm_nf import layers

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)
FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {"unfused": lambda model: model, "fused": timm_nf.fuse}
ONE_FAMILY = pytest.mark.parametrize(
    "family", [name if name == "NFNet" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
BOTH = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
# Older deployments load it. torch says at every call that it is deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated"),
    pytest.mark.filterwarnings("ignore:The TorchScript type system"),  # about torch.fx.GraphModule
]

Script = Any  # torch has no type for what torch.jit.script returns


def script(module: nn.Module) -> Script:
    return torch.jit.script(module)


# --- networks ---


@EACH_FAMILY
@BOTH
def test_a_network_scripts_saves_and_loads_at_any_size(family: str, form: Any) -> None:
    model = build(SHORT[family])
    scripted, buffer = script(form(model)), io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    for other in (scripted, torch.jit.load(buffer)):
        for size in ((1, 32, 32), (3, 33, 47)):
            assert relative_error(other(batch(*size)), model(batch(*size))) < 1e-12


def test_copies_of_a_script_and_what_timm_fuses_give_the_same() -> None:
    model, x = build(SHORT["NFNet"]), batch(2, 32, 32)
    scripted, fused = script(model), script(timm.utils.reparameterize_model(model))
    for other in (copy.copy(scripted), copy.deepcopy(scripted), fused):
        assert relative_error(other(x), model(x)) < 1e-12


@ONE_FAMILY
@BOTH
def test_a_script_trains_as_the_network_with_stochastic_depth_and_checkpointing(family: str, form: Any) -> None:
    model, x = form(build(SHORT[family], drop_path_rate=0.9)).train(), batch(4, 32, 32)
    model.set_grad_checkpointing()  # a script computes the same without
    scripted = script(model)
    model.set_grad_checkpointing(False)
    outputs, gradients = [], []
    for network in (model, scripted):
        for _ in range(2):  # the second call specialises
            network.zero_grad()
            torch.manual_seed(1)
            out = network(x)
            out.sin().sum().backward()
        outputs.append(out.detach())
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    assert relative_error(outputs[1], outputs[0]) < 1e-12
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12)
    assert relative_error(scripted(x), outputs[0]) > 1e-3  # other draws
    assert relative_error(scripted.eval()(x), model.eval()(x)) < 1e-12


# Each of another kind of arguments; the others are those of whole networks, and of the other tests of activations.
@pytest.mark.parametrize("act", ["identity", "relu6", "celu", "softplus"])
def test_every_kind_of_activation_scripts(act: str) -> None:
    model = build(SHORT["NF_ResNet"], act_layer=act)
    assert relative_error(script(model)(batch()), model(batch())) < 1e-12


@ONE_FAMILY
@BOTH
def test_freezing_for_inference_computes_the_same(family: str, form: Any) -> None:
    model, x = form(build(SHORT[family], torch.float32)), batch(dtype=torch.float32)
    frozen = torch.jit.freeze(script(model))
    for _ in range(3):  # the second call specialises
        assert relative_error(frozen(x), model(x)) < 1e-5


@BOTH
def test_what_optimises_for_inference_computes_the_same(form: Any) -> None:
    model, x = form(build(SHORT["NF_ResNet"], torch.float32)), batch(dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(torch.jit.optimize_for_inference(script(model))(x), model(x)) < 1e-5


@pytest.mark.parametrize("autocast", [False, True])
def test_a_script_computes_in_bfloat16_as_the_network(autocast: bool) -> None:
    model, x = build(SHORT["NFNet"], torch.float32 if autocast else torch.bfloat16), batch(dtype=torch.float32)
    scripted, x = script(model), x if autocast else x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, expected = scripted(x), model(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    assert relative_error(got.float(), expected.float()) < 0.02


@ONE_FAMILY
@BOTH
def test_a_script_exports_to_onnx_at_any_size(family: str, form: Any) -> None:
    model, file, x = form(build(SHORT[family], torch.float32)), io.BytesIO(), batch(dtype=torch.float32)
    axes = {"x": {0: "n", 2: "h", 3: "w"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about this exporter
        torch.onnx.export(script(model), (x,), file, dynamo=False, input_names=["x"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(file.getvalue())
    for size in ((2, 64, 64), (1, 47, 33)):
        x = batch(*size, dtype=torch.float32)
        assert relative_error(session.run(None, {"x": x.numpy()})[0], model(x)) < 1e-5


# --- features, and what other transformations made ---


@ONE_FAMILY
@pytest.mark.parametrize("feature_cls", [None, "getter", "fx"])
def test_features_script(family: str, feature_cls: str | None) -> None:
    model = create(SHORT[family], features_only=True, feature_cls=feature_cls, out_indices=(0, 2)).double().eval()
    scripted = script(model)
    x = batch(1, 47, 33)
    assert all(relative_error(*pair) < 1e-12 for pair in zip(scripted(x), model(x), strict=True))


@pytest.mark.parametrize(("indices", "stop_early"), [([0], True), ([0, 1], True), ([1, 2], False)])
def test_a_script_computes_the_intermediates_of_the_network(indices: list[int], stop_early: bool) -> None:
    model = build(SHORT["NFNet"])

    class Both(FeatureGetterNet):
        def forward(self, x: Tensor) -> Any:
            return self.model.forward_intermediates(x, indices=self.out_indices, stop_early=self.stop_early)

    module = Both(model, indices, prune=False)
    module.out_indices, module.stop_early = indices, stop_early
    (got, gots), (expected, all_expected) = script(module)(batch()), module(batch())
    assert relative_error(got, expected) < 1e-12
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(gots, all_expected, strict=True))


@ONE_FAMILY
@BOTH
def test_traced_networks_script_and_scripts_trace(family: str, form: Any) -> None:
    model, x = form(build(SHORT[family])), batch(2, 47, 33)
    assert relative_error(script(torch.fx.symbolic_trace(model))(x), model(x)) < 1e-12
    assert relative_error(torch.jit.trace(nn.Sequential(script(model)), batch())(x), model(x)) < 1e-12
    assert relative_error(script(nn.Sequential(torch.jit.trace(model, batch())))(x), model(x)) < 1e-12


@pytest.mark.parametrize("convert", [timm_nf.normalizer_free, timm_nf.replace_convs])
def test_converted_networks_script(convert: Any) -> None:
    model = convert(timm.create_model("resnet18", num_classes=3, channels=(16, 16, 32, 32))).double().eval()
    for module in model.modules():
        if isinstance(module, layers.SkipInit):
            nn.init.ones_(module.gain)
    assert relative_error(script(model)(batch()), model(batch())) < 1e-12


# --- layers ---

IMAGE, PIXEL, VOLUME = torch.Size([2, 8, 7, 10]), torch.Size([2, 8, 1, 1]), torch.Size([2, 8, 7, 5, 6])
LAYERS: dict[str, list[tuple[nn.Module, list[torch.Size]]]] = {
    "Activation": [(layers.Activation("gelu"), [IMAGE])],
    "GateConv2d": [(layers.GateConv2d(8, 4), [PIXEL])],
    "SameAvgPool2d": [(layers.SameAvgPool2d(stride), [IMAGE]) for stride in (1, 2)],
    "SameConv1d": [(layers.SameConv1d(8, 4, 3, 2), [IMAGE[:3]])],
    "SameConv2d": [
        (layers.SameConv2d(8, 4, size, 2, padding_mode=mode), [IMAGE]) for size, mode in [(2, "zeros"), (3, "reflect")]
    ],
    "SameConv3d": [(layers.SameConv3d(8, 4, 3, 2), [VOLUME])],
    "SameMaxPool2d": [(layers.SameMaxPool2d(), [IMAGE])],
    "SkipInit": [
        (layers.SkipInit(drop_path_rate=rate).eval(), [IMAGE, IMAGE, *gate])
        for rate in (0.0, 0.5)
        for gate in ([], [PIXEL])
    ],
    "SqueezeExcite": [(layers.SqueezeExcite(8, axes=axes), [VOLUME[: 2 + axes]]) for axes in range(4)],
    "StochasticDepth": [(layers.StochasticDepth(0.5).eval(), [PIXEL, IMAGE])],
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_scripts(name: str) -> None:
    for layer, shapes in LAYERS[name]:
        inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        layer = layer.double()
        torch.testing.assert_close(script(layer)(*inputs), layer(*inputs), rtol=0, atol=1e-12)


def test_every_layer_is_scripted_here_or_with_the_standardised_ones() -> None:
    classes = {name for name in layers.__all__ if isinstance(getattr(layers, name), type)}
    assert {name for name in classes if not name.startswith("ScaledStd")} == set(LAYERS)


def test_the_output_size_of_a_transposed_convolution_is_chosen_in_a_script_too() -> None:
    layer, x = layers.ScaledStdConvTranspose2d(8, 4, 3, 2, 1).double(), torch.randn(2, 8, 7, 9, dtype=torch.float64)
    for size in ([13, 17], [14, 18]):
        got = script(layer)(x, size)
        assert list(got.shape[2:]) == size
        torch.testing.assert_close(got, layer(x, size), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_formula_and_its_inverse_script(dtype: torch.dtype) -> None:
    weight, gain = torch.randn(4, 6, 3, 3).to(dtype), torch.randn(4, 1, 1, 1).to(dtype)
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
    standardize: Script = torch.jit.script(layers.standardize_weight)
    for further in ([], [0.5], [0.5, 2.0]):
        got = standardize(weight, gain, *further)
        torch.testing.assert_close(got, layers.standardize_weight(weight, gain, *further), **tolerance)
    invert: Script = torch.jit.script(layers.destandardize_weight)
    torch.testing.assert_close(invert(weight), layers.destandardize_weight(weight), **tolerance)
