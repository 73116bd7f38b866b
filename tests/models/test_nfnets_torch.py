import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.small_nets import FAMILIES, SHORT, batch, build, create, relative_error
from timm_nf.nfnets import NormFreeNet

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)


# --- torch's interface ---


def gradients(model: Any, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    model(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@EACH_FAMILY
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_grad_checkpointing_gives_equal_gradients(family: str, drop_path_rate: float) -> None:
    model, x = build(family, drop_path_rate=drop_path_rate).train(), batch(4)
    expected = gradients(model, x)
    model.set_grad_checkpointing()
    calls = []
    model.stages[1][1].register_forward_pre_hook(lambda *_: calls.append(1))
    got = gradients(model, x)
    assert len(calls) == 2  # once forward, once more in the backward pass
    assert got.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, g in expected.items():
        torch.testing.assert_close(got[name], g, rtol=1e-12, atol=1e-14)
    model.set_grad_checkpointing(False)
    gradients(model, x)
    assert len(calls) == 3


@EACH_FAMILY
def test_symbolic_trace_computes_the_same_at_other_sizes(family: str) -> None:
    model = build(family)
    traced = torch.fx.symbolic_trace(model)
    for size in ((1, 64, 64), (2, 97, 75)):
        assert torch.equal(traced(batch(*size)), model(batch(*size)))


def test_a_symbolic_trace_is_transformed_pickled_and_traced_again() -> None:
    model, x = build(SHORT["NF_ResNet"], drop_path_rate=0.9).train(), batch(4, 32, 32)
    traced = torch.fx.symbolic_trace(model)
    again = [torch.fx.Transformer(traced).transform(), pickle.loads(pickle.dumps(traced)), copy.deepcopy(traced)]
    torch.manual_seed(0)
    expected = model(x)
    for module in map(torch.fx.symbolic_trace, again):
        torch.manual_seed(0)
        assert relative_error(module(x), expected) < 1e-12


@EACH_FAMILY
@pytest.mark.parametrize("training", [False, True])
def test_compiles_to_one_graph(family: str, training: bool) -> None:
    torch._dynamo.reset()
    model, x = build(SHORT[family], drop_path_rate=0.5 * training).train(training), batch(4, 32, 33)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    got = compiled(x)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    if training:
        want = torch.autograd.grad(expected.sum(), list(model.parameters()))
        for a, b in zip(torch.autograd.grad(got.sum(), list(model.parameters())), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@EACH_FAMILY
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_inductor_trains_it_equally(family: str, memory_format: torch.memory_format) -> None:
    torch._dynamo.reset()
    model = build(SHORT[family]).train().to(memory_format=memory_format)
    x = batch(4, 33, 32).to(memory_format=memory_format)
    compiled = torch.compile(model, fullgraph=True)
    want, got = gradients(model, x), gradients(compiled, x)
    assert got.keys() == {f"_orig_mod.{name}" for name in want}
    for name, gradient in want.items():
        torch.testing.assert_close(got[f"_orig_mod.{name}"], gradient, rtol=1e-9, atol=1e-9)


@EACH_FAMILY
def test_exports_with_a_dynamic_batch(family: str) -> None:
    model = build(SHORT[family])
    program = torch.export.export(model, (batch(2),), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
    for n in (1, 2, 5):
        torch.testing.assert_close(program.module()(batch(n)), model(batch(n)), rtol=1e-12, atol=1e-12)


def test_ensembles_of_networks_by_vmap_over_parameters() -> None:
    models = [build("NFNet"), build("NFNet")]
    nn.init.normal_(models[1].stem.conv1.weight)
    parameters, _ = torch.func.stack_module_state(models)
    x = batch(2, 32, 32)
    got = torch.func.vmap(lambda p: torch.func.functional_call(models[0], p, x))(parameters)
    for a, model in zip(got, models, strict=True):
        torch.testing.assert_close(a, model(x), rtol=1e-11, atol=1e-11)


@EACH_FAMILY
def test_device_and_dtype_reach_every_parameter(family: str) -> None:
    model = create(family, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    half = create(family, dtype=torch.bfloat16)
    assert half(batch(dtype=torch.bfloat16)).dtype is torch.bfloat16


@EACH_FAMILY
def test_channels_last_computes_the_same(family: str) -> None:
    model, x = build(family), batch()
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    got = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    features = model.forward_features(x.to(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)


@EACH_FAMILY
def test_pickles_and_deep_copies(family: str) -> None:
    model, x = build(family, drop_path_rate=0.1), batch()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert torch.equal(other(x), model(x))
        assert other.cfg == model.cfg
    nn.init.zeros_(copies[1].head.fc.weight)
    assert model.head.fc.weight.any()


def test_an_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="depth_multiplier"):
        create("NFNet", depth_multiplier=2)


@EACH_FAMILY
def test_networks_are_our_own_and_have_timms_attributes(family: str) -> None:
    model = create(family)
    assert type(model) is NormFreeNet
    assert not [c for c in type(model).__mro__ if c.__module__.startswith("timm.")]
    assert (model.num_classes, model.in_chans) == (10, 3)
    assert model.num_features == model.head_hidden_size == model.head.fc.in_features
    assert model.default_cfg is model.pretrained_cfg
    assert model.get_classifier() is model.head.fc


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_with_dynamic_height_and_width(family: str) -> None:
    model, dynamic = build(SHORT[family]), torch.export.Dim.DYNAMIC
    exported = torch.export.export(model, (batch(2, 64, 64),), dynamic_shapes=({2: dynamic, 3: dynamic},)).module()
    for size in ((75, 97), (33, 40)):
        assert relative_error(exported(batch(2, *size)), model(batch(2, *size))) < 1e-12
