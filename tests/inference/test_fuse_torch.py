"""Fused networks under torch.compile, torch.export and tracing."""

import pytest
import torch
from torch import nn

import timm_nf
from tests.support.small_nets import FAMILIES, SHORT, batch, build, relative_error

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)


@EACH_FAMILY
def test_symbolic_trace_computes_the_same_at_other_sizes(family: str) -> None:
    model = build(family)
    traced = torch.fx.symbolic_trace(timm_nf.fuse(model))
    for size in ((1, 64, 64), (2, 97, 75)):
        assert relative_error(traced(batch(*size)), model(batch(*size))) < 1e-12


@EACH_FAMILY
def test_compiles_to_one_graph(family: str) -> None:
    torch._dynamo.reset()
    model, x = build(SHORT[family]), batch(2, 64, 49)
    compiled = torch.compile(timm_nf.fuse(model), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-11, atol=1e-11)


def test_a_compiled_network_can_be_fused() -> None:
    torch._dynamo.reset()
    model, x = build(SHORT["NF_ResNet"]), batch(1, 32, 32)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    fused = timm_nf.fuse(compiled)
    assert relative_error(fused(x), model(x)) < 1e-11
    assert {n.rpartition(".")[2] for n in fused.state_dict()} == {"weight", "bias", "skipinit_gain"}


@EACH_FAMILY
def test_exported_graphs_hold_no_arithmetic_on_weights(family: str) -> None:
    model, dynamic = build(SHORT[family]), torch.export.Dim.DYNAMIC
    fused = timm_nf.fuse(model)
    program = torch.export.export(fused, (batch(2, 64, 64),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},))
    for size in ((2, 64, 64), (3, 75, 97), (2, 33, 40)):
        assert relative_error(program.module()(batch(*size)), model(batch(*size))) < 1e-12
    weights = {spec.arg.name for spec in program.graph_signature.input_specs if str(spec.target).endswith(".weight")}
    users = {str(user.target) for node in program.graph.nodes if node.name in weights for user in node.users}
    assert users == {"aten.conv2d.default", "aten.linear.default"}  # not flattened for squeeze-excite
    convs = [m for m in fused.modules() if isinstance(m, nn.Conv2d)]
    targets = [str(node.target) for node in program.graph.nodes]
    assert len([t for t in targets if "conv2d" in t]) == len(convs)
    assert len([t for t in targets if "linear" in t]) == 1  # the classifier
