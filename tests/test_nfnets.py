import copy
import io
import json
import logging
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.models.nfnet  # timm's own networks, whose registry names ours replace
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_nfnet import ACTIVATIONS, Net, stochastic_depth_rates
from safetensors.torch import load_file, save_file
from small_nets import FAMILIES, NAMES, NETS, batch, build, create, keywords, nchw, relative_error, state_dict, tree
from timm.models._hub import save_for_hf
from timm.models._manipulate import group_with_matcher
from timm.optim._optim_factory import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay
from torch import Tensor, nn

from timm_nf.nfnets import NormFreeNet
from timm_nf.variants import VARIANTS

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)
# Two stages with every kind of block, for what compiles or traces for long.
SHORT = {
    "NFNet": Net("NFNet", (1, 2), (32, 48), num_classes=4, group_size=8),
    "NF_ResNet": Net("NF_ResNet", (1, 2), (32, 64), num_classes=4),
    "NF_RegNet": Net("NF_RegNet", (1, 2), (32, 48), num_classes=4),
}
STEM_FEATURES = {"NFNet": 64, "NF_ResNet": 8, "NF_RegNet": 24}  # channels at half resolution


def assert_equals_reference(net: Net, size: tuple[int, int, int]) -> None:
    x = np.random.default_rng(0).standard_normal((*size, net.in_chans))
    expected, model = net.forward(tree(net), x), build(net)
    with torch.no_grad():
        features = model.forward_features(nchw(x))
        assert relative_error(features, nchw(expected["features"])) < 1e-11
        assert relative_error(model.forward_head(features, pre_logits=True), expected["pool"]) < 1e-11
        assert relative_error(model(nchw(x)), expected["logits"]) < 1e-11


# --- the function ---


@EACH_FAMILY
@pytest.mark.parametrize("size", [(2, 64, 64), (1, 97, 75), (3, 33, 47), (1, 1, 1), (1, 32, 5)])
def test_network_equals_the_reference_at_even_odd_and_tiny_sizes(family: str, size: tuple[int, int, int]) -> None:
    assert_equals_reference(NETS[family], size)


@pytest.mark.parametrize("act_layer", ACTIVATIONS)
def test_network_equals_the_reference_with_every_activation(act_layer: str) -> None:
    for family in FAMILIES:
        net = Net(family, (1, 2), (32, 48), num_classes=5, group_size=8, act_layer=act_layer)
        assert_equals_reference(net, (1, 21, 18))


@EACH_FAMILY
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_network_equals_the_reference_for_any_fields_of_its_row(family: str, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, 4), "stages")
    depths = data.draw(st.tuples(*[st.integers(1, 3)] * stages), "depths")
    channels = data.draw(st.tuples(*[st.integers(32, 72)] * stages), "channels")
    net = Net(
        family,
        depths,
        channels,
        num_classes=data.draw(st.integers(1, 12), "num_classes"),
        in_chans=data.draw(st.integers(1, 5), "in_chans"),
        alpha=data.draw(st.floats(0.05, 1.5), "alpha"),
        act_layer=data.draw(st.sampled_from(["gelu", "relu", "silu", "softsign"]), "act_layer"),
        group_size=data.draw(st.sampled_from([2, 4, 8, None]), "group_size"),
        bottle_ratio=data.draw(st.sampled_from([0.5, 0.77, 1.0, 2.25]), "bottle_ratio"),
        width_factor=data.draw(st.sampled_from([0.75, 1.0, 1.3]), "width_factor"),
        rd_ratio=data.draw(st.sampled_from([0.5, 0.3, 0.01, None]), "rd_ratio"),
        extra_conv=data.draw(st.booleans(), "extra_conv") if family == "NFNet" else True,
        num_features=data.draw(st.sampled_from([None, 0, 40]), "num_features"),
        stem_chs=data.draw(st.sampled_from([None, 24]), "stem_chs"),
    )
    size = (data.draw(st.integers(1, 2)), data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)))
    assert_equals_reference(net, size)


@EACH_FAMILY
def test_training_and_evaluation_compute_the_same_by_default(family: str) -> None:
    model, x = build(family), batch()
    assert [m for m in model.modules() if type(m).__name__ == "StochasticDepth"] == []
    assert model.head.drop.p == 0
    assert torch.equal(model.train()(x), model.eval()(x))


@EACH_FAMILY
@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_stochastic_depth_of_block_i_of_n_is_the_rate_times_i_over_n(family: str, rate: float) -> None:
    model = create(family, depths=(1, 2, 3, 2), drop_path_rate=rate)
    blocks = [block for stage in model.stages for block in stage]
    rates = [block.drop_path.rate if block.drop_path else 0 for block in blocks]
    assert rates == pytest.approx(stochastic_depth_rates(rate, 8), abs=1e-15)


def test_network_with_stochastic_depth_is_the_reference_in_evaluation() -> None:
    model, x = build("NFNet", drop_path_rate=0.5), batch(16, 32, 32)
    assert torch.equal(model(x), build("NFNet")(x))
    assert not torch.equal(model.train()(x), model.eval()(x))


def test_dropout_is_inverted_and_acts_on_the_pooled_features() -> None:
    model = build("NFNet", drop_rate=0.25).train()
    features = torch.rand(64, model.num_features, 1, 1, dtype=torch.float64) + 1
    torch.manual_seed(0)
    dropped = model.forward_head(features, pre_logits=True)
    kept = dropped != 0
    assert abs(kept.double().mean().item() - 0.75) < 0.02
    torch.testing.assert_close(dropped[kept], (features.flatten(1) / 0.75)[kept])
    assert torch.equal(model.eval().forward_head(features, pre_logits=True), features.flatten(1))


def test_initial_classifier_is_small_or_zero_and_logits_are_finite() -> None:
    torch.manual_seed(0)
    for family in FAMILIES:
        model = create(family, num_classes=1000)
        std = 0 if family == "NF_RegNet" else 0.01
        assert model.head.fc.weight.std().item() == pytest.approx(std, rel=0.03)
        assert not model.head.fc.bias.any()
        assert model(batch(dtype=torch.float32)).isfinite().all()


def test_variance_at_initialisation_grows_by_alpha_squared_with_every_block() -> None:
    # Within a stage: the average pool of the next one's shortcut shrinks white noise.
    torch.manual_seed(0)
    model = create("NFNet", depths=(6,), channels=(256,), group_size=128, alpha=0.5)
    x = model.stem(torch.randn(8, 3, 64, 64))
    for index, block in enumerate(model.stages[0]):
        nn.init.ones_(block.skipinit_gain)
        x = block(x)
        assert x.var((0, 2, 3)).mean().item() == pytest.approx(1 + (index + 1) * 0.5**2, rel=0.15)


# --- timm's interface ---


def test_no_classifier_gives_pooled_features() -> None:
    for family in FAMILIES:
        model = create(family, num_classes=0)
        assert isinstance(model.get_classifier(), nn.Identity)
        assert model(batch(dtype=torch.float32)).shape == (2, model.num_features)
        assert model.num_classes == 0
        assert "head.fc.weight" not in model.state_dict()


@pytest.mark.parametrize(
    ("pool", "factor", "function"),
    [
        ("avg", 1, lambda f: f.mean((2, 3))),
        ("max", 1, lambda f: f.amax((2, 3))),
        ("catavgmax", 2, lambda f: torch.cat([f.mean((2, 3)), f.amax((2, 3))], 1)),
        ("", 1, lambda f: f),
    ],
)
def test_global_pool_is_timms(pool: str, factor: int, function: Any) -> None:
    model = create("NFNet", global_pool=pool, num_classes=10 if pool else 0).double().eval()
    features = model.forward_features(batch())
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, function(features))
    assert model.head_hidden_size == factor * model.num_features == pooled.shape[1]


@EACH_FAMILY
def test_reset_classifier_keeps_device_dtype_pooling_and_initialisation(family: str) -> None:
    model = create(family, global_pool="catavgmax", dtype=torch.float64)
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model.head.fc.weight.dtype is torch.float64
    assert model.head.fc.weight.shape == (7, 2 * model.num_features)
    assert model.head.fc.weight.std().item() == pytest.approx(0 if family == "NF_RegNet" else 0.01, rel=0.1)
    assert model(batch()).shape == (2, 7)
    model.reset_classifier(5, "max")
    assert model(batch()).shape == (2, 5)
    assert model.head_hidden_size == model.num_features
    model.reset_classifier(0)
    assert torch.equal(model.eval()(batch()), model.forward_features(batch()).amax((2, 3)))
    meta = create(family, device="meta")
    meta.reset_classifier(3)
    assert {p.device.type for p in meta.parameters()} == {"meta"}


@EACH_FAMILY
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_output_stride_changes_sizes_and_no_parameter(family: str, output_stride: int) -> None:
    model = build(family, output_stride=output_stride)
    assert model(batch()).isfinite().all()
    assert [f["reduction"] for f in model.feature_info] == [2] + [min(2**i, output_stride) for i in range(2, 6)]
    for h, w in ((64, 96), (75, 97)):
        features, intermediates = model.forward_intermediates(batch(1, h, w))
        for x, info in zip([*intermediates, features], [*model.feature_info, model.feature_info[-1]], strict=True):
            assert x.shape[2:] == (-(-h // info["reduction"]), -(-w // info["reduction"]))


def test_dilation_follows_the_strides_that_became_one() -> None:
    model = create("NFNet", output_stride=8, device="meta")
    dilations = [(b.conv2.dilation[0], b.conv2b.dilation[0], b.conv2.stride[0]) for s in model.stages for b in s]
    # blocks: stage 0; stage 1 strides; stage 2 does not, its first 3x3 still sees the grid before it; stage 3
    assert dilations == [(1, 1, 1), (1, 1, 2), (1, 1, 1), (1, 2, 1), (2, 4, 1)]


@EACH_FAMILY
def test_features_only_gives_the_intermediates_of_every_stage(family: str) -> None:
    full, x = build(family), batch(1, 97, 75)
    _, expected = full.forward_intermediates(x)
    assert expected[0].shape[1] == STEM_FEATURES[family]
    for index, y in zip(range(5), expected, strict=True):
        assert y.shape[1] == full.feature_info[index]["num_chs"]
    for cls in ("list", "getter", "fx", "hook", "dict"):
        model = create(family, features_only=True, feature_cls=cls).double().eval()
        load_features(model, {k: v for k, v in state_dict(NETS[family]).items() if not k.startswith("head.")})
        got = model(x)
        got = list(got.values()) if isinstance(got, dict) else got
        assert len(got) == 5
        for a, b in zip(got, expected, strict=True):
            assert relative_error(a, b) < 1e-12, cls
        assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
        assert model.feature_info.channels() == [y.shape[1] for y in expected]


def load_features(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load by the last parts of the names, as every feature wrapper names the modules in its own way."""
    own = model.state_dict()
    names = {
        k.removeprefix("model.")
        .removeprefix("graph_module.")
        .replace("stages_", "stages.")
        .replace("stem_", "stem."): k
        for k in own
    }
    for k in names:
        assert k.startswith("head.") or k in state
    model.load_state_dict(own | {names[k]: v for k, v in state.items()}, strict=True)
    assert all(torch.equal(own[names[k]], v) for k, v in state.items())


@EACH_FAMILY
@pytest.mark.parametrize("cls", ["list", "getter", "fx", "hook"])
def test_out_indices_select_and_drop_what_follows(family: str, cls: str) -> None:
    model = create(family, features_only=True, feature_cls=cls, out_indices=(1, 3))
    got = model(batch(dtype=torch.float32))
    assert [x.shape[2] for x in got] == [16, 4]
    assert [x.shape[1] for x in got] == model.feature_info.channels()
    if cls != "hook":  # which keeps the whole network
        assert not [n for n, _ in model.named_parameters() if "stages.3" in n or "stages_3" in n or "final_conv" in n]


@EACH_FAMILY
def test_forward_intermediates_agree_with_forward_features(family: str) -> None:
    model, x = build(family), batch()
    final, all_of_them = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    torch.testing.assert_close(model.final_act(all_of_them[-1]), final)  # taken before the last activation
    assert torch.equal(all_of_them[2], model.stages[1](model.stages[0](model.stem(x))))
    only = model.forward_intermediates(x, indices=2, intermediates_only=True)
    assert len(only) == 2
    assert all(torch.equal(a, b) for a, b in zip(only, all_of_them[-2:], strict=True))
    final, (first, third) = model.forward_intermediates(x, indices=[0, 2], stop_early=True)
    assert torch.equal(first, all_of_them[0])
    assert torch.equal(third, all_of_them[2])
    assert torch.equal(final, third)
    with pytest.raises(ValueError, match="NLC"):
        model.forward_intermediates(x, output_fmt="NLC")


@EACH_FAMILY
@pytest.mark.parametrize("indices", [[0], [0, 2], [3], [4], 2, [-3]])
def test_pruning_keeps_the_intermediates_and_removes_the_rest(family: str, indices: Any) -> None:
    model, x = build(family), batch()
    expected = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    parameters = len(list(model.parameters()))
    take = model.prune_intermediate_layers(indices)
    last = max(take)
    got = model.forward_intermediates(x, indices=take, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(model.stages) == last
    assert len(list(model.parameters())) < parameters
    assert isinstance(model.get_classifier(), nn.Identity)
    features = model.forward_features(x)
    assert features.shape[1] == model.num_features == model.feature_info[last]["num_chs"]
    if last < 4:
        assert torch.equal(features, expected[-1])
    assert torch.equal(model(x), features)  # without pooling
    model.reset_classifier(3, "avg")
    assert model.double()(x).shape == (2, 3)


def test_pruning_can_keep_the_head_where_the_last_stage_stays() -> None:
    model, x = build("NFNet"), batch()
    expected = model(x)
    model.prune_intermediate_layers([1, 4], prune_head=False)
    assert torch.equal(model(x), expected)
    model.prune_intermediate_layers([1], prune_head=False)  # it no longer fits
    assert isinstance(model.get_classifier(), nn.Identity)


@EACH_FAMILY
@pytest.mark.parametrize("coarse", [False, True])
def test_layer_groups_run_from_the_stem_to_the_head(family: str, coarse: bool) -> None:
    model = create(family, device="meta")
    groups = group_with_matcher(model.named_parameters(), model.group_matcher(coarse), reverse=True)
    blocks = 4 if coarse else 5
    for name in dict(model.named_parameters()):
        stage, _, rest = name.removeprefix("stages.").partition(".")
        if name.startswith("stem"):
            expected = 0
        elif name.startswith("stages"):
            expected = 1 + int(stage) + (int(int(stage) > 1) + int(rest[0]) if not coarse else 0)
        else:
            expected = blocks + name.startswith("head")  # the final convolution goes with the last block
        assert groups[name] == expected, name


def test_layer_decay_scales_learning_rates_from_the_head_down_and_keeps_gains_undecayed() -> None:
    model = create("NFNet")
    groups = param_groups_layer_decay(
        model, weight_decay=0.1, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay(), verbose=False
    )
    scale, decay = ({id(p): g[key] for g in groups for p in g["params"]} for key in ("lr_scale", "weight_decay"))
    parameters = dict(model.named_parameters())
    assert len(scale) == len(parameters)
    assert scale[id(parameters["head.fc.weight"])] == 1
    assert scale[id(parameters["stem.conv1.weight"])] == 0.5**6
    for name, p in parameters.items():
        assert decay[id(p)] == (0.1 if name.endswith("weight") else 0), name


@EACH_FAMILY
def test_gains_and_skip_gains_are_not_decayed(family: str) -> None:
    model = create(family, device="meta")
    names = {n for n, _ in model.named_parameters() if not n.endswith((".weight", ".bias"))}
    assert model.no_weight_decay() == names
    assert {n.rpartition(".")[2] for n in names} == {"gain", "skipinit_gain"}
    optimizer = create_optimizer_v2(create(family), "sgd", lr=0.1, weight_decay=0.1)
    decayed = [p for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]]
    assert len(decayed) == len([n for n, _ in model.named_parameters() if n.endswith(".weight")])


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


@EACH_FAMILY
def test_exports_with_a_dynamic_batch(family: str) -> None:
    model = build(SHORT[family])
    program = torch.export.export(model, (batch(2),), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
    for n in (1, 2, 5):
        torch.testing.assert_close(program.module()(batch(n)), model(batch(n)), rtol=1e-12, atol=1e-12)


@EACH_FAMILY
def test_per_example_gradients_by_function_transforms_sum_to_the_gradient_of_the_batch(family: str) -> None:
    model, x = build(SHORT[family]), batch(3, 32, 32)
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(p: dict[str, Tensor], example: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, example[None]).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for name, g in gradients(model, x).items():
        assert each[name].shape == (3, *g.shape)
        torch.testing.assert_close(each[name].sum(0), g, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(each[name][1], torch.func.grad(loss)(parameters, x[1])[name], rtol=1e-9, atol=1e-10)


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


# --- pretrained weights and files ---


@contextmanager
def no_warnings_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        yield
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


def config(name: str) -> dict[str, Any]:
    cfg = timm.get_pretrained_cfg(f"{name}.dm_in1k")
    assert cfg is not None
    return cfg.to_dict()


@pytest.mark.parametrize("name", [name for name, v in VARIANTS.items() if v.hf_hub_id])
def test_pretrained_config_is_that_of_timms_port(name: str) -> None:
    ours, timms = (config(n) for n in (name, f"dm_{name}"))
    same = ["hf_hub_id", "input_size", "test_input_size", "pool_size", "crop_pct", "crop_mode"]
    same += ["interpolation", "mean", "std", "num_classes"]
    assert {k: ours[k] for k in same} == {k: timms[k] for k in same} | {"hf_hub_id": f"timm/dm_{name}.dm_in1k"}
    assert ours["hf_hub_id"]
    assert (ours["first_conv"], ours["classifier"], ours["tag"]) == ("stem.conv1", "head.fc", "dm_in1k")
    assert ours["architecture"] == name


def test_seven_networks_have_weights_and_no_name_with_weights_was_taken_over() -> None:
    assert [name for name, v in VARIANTS.items() if v.hf_hub_id] == [f"nfnet_f{i}" for i in range(7)]
    assert config("dm_nfnet_f0")["architecture"] == "dm_nfnet_f0"
    assert type(timm.create_model("dm_nfnet_f0", device="meta")).__module__ == "timm.models.nfnet"
    assert type(timm.create_model("nf_resnet50", device="meta")).__module__ == "timm.models.nfnet"


def pretrained(family: str, overlay: dict[str, Any], **kwargs: Any) -> Any:
    overlay = {"num_classes": 10} | overlay
    return create(family, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


@EACH_FAMILY
@pytest.mark.parametrize("source", ["state_dict", "file", "safetensors"])
def test_pretrained_weights_load_from_a_dict_or_a_file(
    family: str, source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_dict(NETS[family], torch.float32)
    if source == "state_dict":
        overlay: dict[str, Any] = {"state_dict": state}
    elif source == "file":
        torch.save(state, tmp_path / "weights.pth")
        overlay = {"file": str(tmp_path / "weights.pth")}
    else:
        save_file(state, tmp_path / "model.safetensors")
        overlay = {"file": str(tmp_path / "model.safetensors")}
    with no_warnings_logged(caplog):
        model = pretrained(family, overlay)
    x = batch(dtype=torch.float32)
    assert torch.equal(model(x), build(family, torch.float32)(x))


@EACH_FAMILY
@pytest.mark.parametrize("num_classes", [0, 3])
def test_pretrained_weights_load_with_other_classes(
    family: str, num_classes: int, caplog: pytest.LogCaptureFixture
) -> None:
    with no_warnings_logged(caplog):
        model = pretrained(
            family, {"state_dict": state_dict(NETS[family])}, num_classes=num_classes, dtype=torch.float64
        )
    assert relative_error(model.forward_features(batch()), build(family).forward_features(batch())) < 1e-13
    assert model(batch()).shape == (2, num_classes or model.num_features)


@EACH_FAMILY
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_one_input_channel_keeps_the_function_for_grey_images(
    family: str, dtype: torch.dtype, tolerance: float, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_dict(NETS[family], dtype)
    before = {k: v.clone() for k, v in state.items()}
    with no_warnings_logged(caplog):
        grey = pretrained(family, {"state_dict": state}, in_chans=1, dtype=dtype)
    x = batch(2, 97, 75)[:, :1]
    expected = build(family)(x.expand(-1, 3, -1, -1))
    assert relative_error(grey.double()(x), expected) < tolerance
    assert state.keys() == before.keys()
    assert all(torch.equal(state[k], v) for k, v in before.items())


def test_one_input_channel_keeps_the_function_where_stem_rows_lie_under_the_floor() -> None:
    state = state_dict(NETS["NFNet"])
    state["stem.conv1.weight"][:4] *= 1e-4
    state["stem.conv1.weight"][5] = 0.3
    state["stem.conv1.weight"][6, 1:] = -state["stem.conv1.weight"][6, :1] / 2  # the channels of a grey image cancel
    model = build("NFNet")
    model.load_state_dict(state)
    grey = pretrained("NFNet", {"state_dict": state}, in_chans=1, dtype=torch.float64)
    x = batch()[:, :1]
    assert relative_error(grey(x), model(x.expand(-1, 3, -1, -1))) < 1e-12


@EACH_FAMILY
def test_input_channels_in_multiples_of_three_keep_the_function_for_repeated_images(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    with no_warnings_logged(caplog):
        six = pretrained(family, {"state_dict": state_dict(NETS[family])}, in_chans=6, dtype=torch.float64)
    x = batch()
    assert relative_error(six(x.repeat(1, 2, 1, 1)), build(family)(x)) < 1e-12


@pytest.mark.parametrize("in_chans", [2, 4, 5])
def test_other_input_channels_load_all_but_the_mean_of_the_stem(
    in_chans: int, caplog: pytest.LogCaptureFixture
) -> None:
    with no_warnings_logged(caplog):
        model = pretrained("NFNet", {"state_dict": state_dict(NETS["NFNet"])}, in_chans=in_chans, dtype=torch.float64)
    original = build("NFNet").stem.conv1.effective_weight()
    expected = original.repeat(1, 2, 1, 1)[:, :in_chans] * 3 / in_chans
    expected -= expected.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(model.stem.conv1.effective_weight(), expected, rtol=0, atol=1e-13)


def test_features_only_loads_pretrained_weights_for_grey_images(caplog: pytest.LogCaptureFixture) -> None:
    with no_warnings_logged(caplog):
        overlay = {"state_dict": state_dict(NETS["NFNet"])}
        model = pretrained("NFNet", overlay, in_chans=1, features_only=True, dtype=torch.float64)
    x = batch()[:, :1]
    expected = build("NFNet").forward_intermediates(x.expand(-1, 3, -1, -1), intermediates_only=True)
    for a, b in zip(model(x), expected, strict=True):
        assert relative_error(a, b) < 1e-12


def stock(name: str) -> Any:
    """timm's own network with the widths of `create("NFNet", stem_chs=128)`."""
    kwargs = {
        "depths": (1, 2, 1, 1),
        "channels": (32, 64, 96, 96),
        "group_size": 8,
        "stem_chs": 128,
        "num_features": 192,
    }
    model = getattr(timm.models.nfnet, name)(num_classes=10, **kwargs)
    assert type(model).__module__ == "timm.models.nfnet"
    return model


@pytest.mark.parametrize("num_classes", [10, 3, 0])
@pytest.mark.parametrize("in_chans", [3, 1])
def test_weights_of_timms_own_nfnet_are_refused_and_the_message_says_where_they_belong(
    num_classes: int, in_chans: int, tmp_path: Path
) -> None:
    state = stock("nfnet_f0").state_dict()
    assert "stages.0.0.conv1.gain" in state
    match = r"timm's own nfnet_f.*timm\.models\.nfnet\.nfnet_f0"
    with pytest.raises(RuntimeError, match=match):
        pretrained("NFNet", {"state_dict": dict(state)}, num_classes=num_classes, in_chans=in_chans, stem_chs=128)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=match):
            create("NFNet", num_classes=num_classes, in_chans=in_chans, stem_chs=128).load_state_dict(
                state, strict=strict
            )
    torch.save(state, tmp_path / "stock.pth")
    if (num_classes, in_chans) == (10, 3):
        with pytest.raises(RuntimeError, match=match):
            create("NFNet", stem_chs=128, checkpoint_path=str(tmp_path / "stock.pth"))


def test_one_missing_skip_gain_is_enough_to_be_refused() -> None:
    state = state_dict(NETS["NFNet"])
    del state["stages.1.1.skipinit_gain"]
    with pytest.raises(RuntimeError, match=r"1 of 5 blocks \(stages\.1\.1"):
        create("NFNet").load_state_dict(state, strict=False)


def test_state_dict_of_timms_port_loads_unchanged() -> None:
    theirs = stock("dm_nfnet_f0")
    for module in theirs.modules():
        if hasattr(module, "skipinit_gain"):
            nn.init.constant_(module.skipinit_gain, 0.7)
    state = theirs.state_dict()
    assert state["stages.0.0.skipinit_gain"].shape == ()
    model = create("NFNet", stem_chs=128)
    model.load_state_dict(state, strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name].reshape(tensor.shape))
    # The same network up to timm's epsilon and gelu, a percent or two.
    x = batch(dtype=torch.float32)
    assert relative_error(model.eval().forward_features(x), theirs.eval().forward_features(x)) < 0.05


@EACH_FAMILY
def test_saved_folder_records_fused_and_reloads_to_equal_logits(family: str, tmp_path: Path) -> None:
    model = create(family)
    model.load_state_dict(state_dict(NETS[family], torch.float32))
    save_for_hf(model.eval(), str(tmp_path), safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"]["fused"] is False
    assert config["model_args"]["channels"] == list(NETS[family].channels)
    assert config["architecture"] == NAMES[family]
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    reloaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = batch(dtype=torch.float32)
    assert torch.equal(reloaded(x), model(x))
    grey = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1, num_classes=0).eval()
    expected = model.forward_head(model.forward_features(x[:, :1].expand(-1, 3, -1, -1)), pre_logits=True)
    assert relative_error(grey(x[:, :1]), expected) < 2e-6


def test_stock_timm_stops_at_a_saved_folder(tmp_path: Path) -> None:
    save_for_hf(create("NFNet"), str(tmp_path), safe_serialization=True)
    code = f"import timm; timm.create_model('local-dir:{tmp_path}', pretrained=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 1
    assert "TypeError" in done.stderr
    assert "fused" in done.stderr


def test_fused_structure_has_plain_convolutions_without_gains() -> None:
    for family in FAMILIES:
        model = create(family, fused=True)
        names = create(family).state_dict().keys()
        assert model.state_dict().keys() == {n for n in names if not n.endswith(".gain")}
        assert model._model_args["fused"] is True
        assert model(batch(dtype=torch.float32)).shape == (2, 10)


def test_attention_can_be_left_out_through_create_model() -> None:
    model = timm.create_model("nfnet_f0", **(keywords(NETS["NFNet"]) | {"attn_layer": ""}))
    assert not [n for n, _ in model.named_parameters() if "attn" in n]


@pytest.mark.parametrize("training", [False, True])
def test_traces_with_stochastic_depth(training: bool) -> None:
    traced = torch.fx.symbolic_trace(build("NFNet", drop_path_rate=0.5).train(training))
    assert traced(batch(3)).shape == (3, 10)


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")  # torchvision: the head's dropout
def test_fx_features_take_any_batch_size_with_stochastic_depth() -> None:
    model = create("NFNet", features_only=True, feature_cls="fx", drop_path_rate=0.5)
    for n in (2, 3):
        assert len(model(batch(n, dtype=torch.float32))) == 5


def test_converting_the_stem_leaves_its_name_in_the_traits() -> None:
    overlay = {"num_classes": 10, "state_dict": state_dict(NETS["NFNet"])}
    model = create("NFNet", num_classes=3, in_chans=1, pretrained=True, pretrained_cfg_overlay=overlay)
    assert model._traits["first_conv"] == "stem.conv1"
    assert "head.fc.weight" in overlay["state_dict"]
