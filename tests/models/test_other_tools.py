"""What tools of other people do to a network, each by the mechanism it uses: what timm's networks take, ours take."""

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_hook

import timm_nf
from tests.support.small_nets import FAMILIES, SHORT, batch, build, create, relative_error
from timm_nf.layers import ACTIVATIONS, GateConv2d, ScaledStdConv2d, SqueezeExcite
from timm_nf.models.blocks import NormFreeBlock

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)
BOTH = pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
NO_GRAD = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


def network(family: str, fused: bool, dtype: torch.dtype = torch.float64, **kwargs: Any) -> Any:
    model = build(SHORT[family], dtype, **kwargs)
    return timm_nf.fuse(model) if fused else model


# --- hooks ---


def kept(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What a forward hook on every layer was given, as it is after the pass."""
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(lambda _, args, out, name=name: outputs.update({name: out})))
    model(x)
    for handle in handles:
        handle.remove()
    return outputs


@EACH_FAMILY
@BOTH
@NO_GRAD
def test_hooks_keep_the_same_with_and_without_gradients(family: str, fused: bool, mode: Any) -> None:
    model, x = network(family, fused), batch(2, 32, 32)
    expected = {name: out.detach() for name, out in kept(model, x).items()}
    with mode():
        got = kept(model, x)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], out) for name, out in expected.items())


@pytest.mark.parametrize("act_layer", ACTIVATIONS)
def test_what_a_convolution_gave_is_not_overwritten_whatever_follows_it(act_layer: str) -> None:
    model, x = network("NFNet", fused=False, act_layer=act_layer), batch(1, 32, 32)
    given: list[tuple[Tensor, Tensor]] = []
    for module in model.modules():
        module.register_forward_hook(lambda _, args, out: given.append((out, out.clone())))
    with torch.no_grad():
        model(x)
    assert all(torch.equal(out, copy_) for out, copy_ in given)


@EACH_FAMILY
@NO_GRAD
def test_a_graph_traced_without_gradients_gives_every_feature(family: str, mode: Any) -> None:
    # as torchvision's and timm's feature extractors build theirs
    model, x = network(family, fused=False), batch(2, 40, 33)
    expected = kept(model, x)
    with mode():
        traced = torch.fx.symbolic_trace(model)
    for node in list(traced.graph.nodes):
        if node.op == "output":
            nodes = {str(n.target): n for n in traced.graph.nodes if n.op == "call_module"}
            node.args = (nodes,)
    traced.recompile()
    got = traced(x)
    assert {"stages.0.0.act1", "stages.1.0.act3"} <= got.keys()
    assert all(torch.equal(out, expected[name]) for name, out in got.items())


@EACH_FAMILY
@BOTH
def test_global_hooks_see_every_layer_with_parameters(family: str, fused: bool) -> None:
    model, seen = network(family, fused), set[int]()
    handle = register_module_forward_hook(lambda module, args, out: seen.add(id(module)))
    try:
        with torch.no_grad():
            model(batch(1, 32, 32))
    finally:
        handle.remove()
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            assert id(module) in seen, name


# --- what replaces forwards and weights ---


@EACH_FAMILY
@BOTH
def test_a_replaced_forward_of_any_layer_is_called(family: str, fused: bool) -> None:
    model, x = network(family, fused), batch(1, 32, 32)
    expected = model(x)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.ReLU, nn.GELU))}
    for name, layer in layers.items():
        forward, calls = layer.forward, []

        def replaced(input: Tensor, forward: Callable[[Tensor], Tensor] = forward, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return forward(input) + 0.5

        layer.forward = replaced
        assert not torch.equal(model(x), expected), name
        assert calls == [1], name
        del layer.forward
    assert torch.equal(model(x), expected)


@contextmanager
def offloaded(model: nn.Module) -> Iterator[None]:
    """Weights on the meta device, which replaced forwards bring and take away, as accelerate's hooks do."""
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        meta = {name: nn.Parameter(p.to("meta")) for name, p in own.items()}

        def forward(
            *args: Any, module: Any = module, inner: Any = module.forward, own: Any = own, meta: Any = meta
        ) -> Any:
            module._parameters.update(own)
            try:
                return inner(*args)
            finally:
                module._parameters.update(meta)

        module._parameters.update(meta)
        module.forward = forward
    yield


@EACH_FAMILY
@BOTH
def test_weights_that_arrive_when_their_layer_is_called_arrive_in_time(family: str, fused: bool) -> None:
    model, x = network(family, fused), batch(2, 32, 32)
    expected = model(x)
    with offloaded(model), torch.no_grad():
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert torch.equal(model(x), expected)


def test_guided_gradients_differ_from_plain_ones_where_activations_are_relus() -> None:
    # as captum's GuidedBackprop: a hook on every nn.ReLU lets only positive gradients pass
    model, x = network("NF_ResNet", fused=False), batch(1, 32, 32).requires_grad_()
    (plain,) = torch.autograd.grad(model(x).sum(), x)
    relus = [m for m in model.modules() if isinstance(m, nn.ReLU)]
    assert len(relus) == 3 * 3 + 1  # three in every block, and the last
    for relu in relus:
        relu.register_full_backward_hook(lambda _, grads, __: (grads[0].clamp(min=0),))
    (guided,) = torch.autograd.grad(model(x).sum(), x)
    assert relative_error(guided, plain) > 0.1


# --- tracing and exporting ---

TRACED = pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")


@TRACED
@EACH_FAMILY
@BOTH
@pytest.mark.parametrize("training", [False, True])
def test_jit_trace_by_its_defaults_computes_the_same_at_other_sizes(family: str, fused: bool, training: bool) -> None:
    model = network(family, fused).train(training)
    traced, buffer = torch.jit.trace(model, batch(2, 32, 32)), io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    assert "addcmul" not in str(loaded.inlined_graph)
    for size in ((2, 32, 32), (1, 47, 33), (3, 20, 41)):
        assert relative_error(loaded(batch(*size)), model(batch(*size))) < 1e-12


@TRACED
@EACH_FAMILY
@BOTH
@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export")
@pytest.mark.filterwarnings("ignore:The feature will be removed")
def test_torchscript_based_onnx_export_computes_the_same_at_other_sizes(family: str, fused: bool) -> None:
    model, file = network(family, fused, torch.float32), io.BytesIO()
    axes = {"x": {0: "n", 2: "h", 3: "w"}}
    x = batch(2, 32, 32, torch.float32)
    torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"], dynamic_axes=axes, opset_version=18)
    session = onnxruntime.InferenceSession(file.getvalue())
    for size in ((2, 32, 32), (1, 47, 33)):
        x = batch(*size, dtype=torch.float32)
        assert relative_error(session.run(None, {"x": x.numpy()})[0], model(x)) < 1e-5


@EACH_FAMILY
@BOTH
def test_exported_graphs_add_products_where_eager_blocks_fuse_them(family: str, fused: bool) -> None:
    program = torch.export.export(network(family, fused), (batch(2, 32, 32),))
    assert "addcmul" not in str(program.graph)


@pytest.mark.parametrize(
    "family", [name if name == "NFNet" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
@BOTH
def test_fx_quantisation_prepares_observes_and_converts(family: str, fused: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about itself
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        model, x = network(family, fused, torch.float32), batch(2, 64, 64, torch.float32)
        expected = model(x)
        prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(), (x,))
        assert torch.equal(prepared(x), expected)
        assert relative_error(convert_fx(prepared)(x), expected) < 0.2  # eight bits


@EACH_FAMILY
@BOTH
def test_a_network_is_built_and_trained_under_fake_tensors(family: str, fused: bool) -> None:
    with FakeTensorMode():
        model = create(family, fused=fused)
        model.init_weights()
        optimizer = timm.optim.create_optimizer_v2(model, "agcsgd", lr=0.1)
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        optimizer.step()
    assert all(isinstance(p.grad, FakeTensor) for p in model.parameters())


@EACH_FAMILY
@BOTH
def test_fake_tensors_of_the_cpu_give_shapes_forward_and_backward(family: str, fused: bool) -> None:
    model = network(family, fused)
    for weights_are_fake in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            parameters = dict(model.named_parameters())
            if weights_are_fake:
                parameters = {k: mode.from_tensor(v) for k, v in parameters.items()}
            out = torch.func.functional_call(model, parameters, (torch.empty(3, 3, 32, 32, dtype=torch.float64),))
            assert out.shape == (3, 4)
            assert out.device.type == "cpu"
            gradients = torch.autograd.grad(out.sum(), list(parameters.values()))
        assert [g.shape for g in gradients] == [p.shape for p in parameters.values()]


@EACH_FAMILY
@BOTH
def test_make_fx_computes_the_same(family: str, fused: bool) -> None:
    model, x = network(family, fused), batch(2, 32, 32)
    assert relative_error(make_fx(model)(x)(x), model(x)) < 1e-12


@EACH_FAMILY
@BOTH
@pytest.mark.parametrize(("mode", "size"), [(torch.enable_grad, (33, 48)), (torch.no_grad, (32, 41))])
def test_make_fx_with_symbols_for_sizes_computes_the_same_at_other_sizes(
    family: str, fused: bool, mode: Any, size: tuple[int, int]
) -> None:
    model = network(family, fused)
    with mode():
        graph = make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(batch(2, *size))
        for size in [(32, 32), (64, 48), (33, 40), (37, 51)]:
            other = batch(3, *size)
            assert relative_error(graph(other), model(other)) < 1e-12


@EACH_FAMILY
@BOTH
@pytest.mark.parametrize("size", [(32, 32), (33, 40)])
def test_vmap_without_gradients_computes_the_same_and_warns_of_nothing(
    family: str, fused: bool, size: tuple[int, int]
) -> None:
    model, x = network(family, fused), batch(3, *size)
    with torch.no_grad():
        got = torch.func.vmap(lambda one: model(one[None])[0])(x)
        assert relative_error(got, model(x)) < 1e-12


# --- memory without values ---


def poisoned(model: Any) -> Any:
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    return model


@EACH_FAMILY
@BOTH
def test_init_weights_restores_what_the_constructor_gives(family: str, fused: bool) -> None:
    torch.manual_seed(3)
    fresh = create(family, fused=fused, num_classes=500)
    model = poisoned(create(family, fused=fused, num_classes=500, device="meta").to_empty(device="cpu"))
    torch.manual_seed(3)
    model.init_weights()
    for name, p in fresh.state_dict().items():
        if fused and name == "head.fc.weight":  # another draw
            assert model.head.fc.weight.std().item() == pytest.approx(p.std().item(), rel=0.05)
        else:
            assert torch.equal(model.state_dict()[name], p), name


@EACH_FAMILY
def test_init_weights_of_a_pruned_network_restores_what_is_left(family: str) -> None:
    for fused in (False, True):
        model = create(family, fused=fused)
        model.prune_intermediate_layers([1])
        poisoned(model).init_weights()
        assert all(p.isfinite().all() for p in model.parameters())


@EACH_FAMILY
def test_reset_parameters_of_every_module_restores_all_but_the_classifiers_distribution(family: str) -> None:
    torch.manual_seed(3)
    fresh = create(family)
    model = poisoned(create(family, device="meta").to_empty(device="cpu"))
    torch.manual_seed(3)
    for module in model.modules():
        if list(module.parameters(recurse=False)):
            module.reset_parameters()
    for name, p in fresh.state_dict().items():
        if name.startswith("head.fc."):
            assert model.state_dict()[name].isfinite().all()
        else:
            assert torch.equal(model.state_dict()[name], p), name


def test_squeeze_excite_and_blocks_reset_what_is_theirs() -> None:
    se = poisoned(SqueezeExcite(6))
    se.reset_parameters()
    assert all(p.isfinite().all() for p in se.parameters())
    block = poisoned(next(m for m in create("NFNet").modules() if isinstance(m, NormFreeBlock)))
    block.reset_parameters()
    assert not block.skipinit_gain.any()
    assert block.conv1.weight.isnan().all()


# --- layers by class ---


@EACH_FAMILY
def test_convolutions_are_convolutions_to_who_looks_for_them(family: str) -> None:
    model = create(family)
    weights = [name for name, p in model.named_parameters() if p.ndim == 4 and name.endswith(".weight")]
    assert [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Conv2d)] == weights
    assert {type(m) for m in model.modules() if isinstance(m, nn.Conv2d)} <= {ScaledStdConv2d, GateConv2d}
