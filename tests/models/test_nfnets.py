from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models._manipulate import group_with_matcher
from timm.optim._optim_factory import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay
from torch import Tensor, nn

from tests.support.reference_nfnet import ACTIVATIONS, Net, stochastic_depth_rates
from tests.support.small_nets import FAMILIES, NETS, batch, build, create, nchw, relative_error, state_dict, tree

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


@EACH_FAMILY
def test_five_stages_stride_in_every_one_and_smaller_output_strides_dilate(family: str) -> None:
    net = Net(family, (1, 1, 1, 1, 1), (32, 32, 48, 48, 64), num_classes=3, group_size=8)
    assert_equals_reference(net, (1, 97, 75))
    reductions = [f["reduction"] for f in build(net).feature_info]
    assert reductions == [2, 4, 8, 16, 32, 64]
    for output_stride in (8, 16, 32, 64):
        model = build(net, output_stride=output_stride)
        assert [f["reduction"] for f in model.feature_info] == [min(r, output_stride) for r in reductions]
        assert model.forward_features(batch(1, 128, 65)).shape[2:] == (128 // output_stride, -(-65 // output_stride))


@pytest.mark.parametrize("output_stride", [4, 12, 64])
def test_an_output_stride_that_the_network_cannot_have_is_refused(output_stride: int) -> None:
    with pytest.raises(ValueError, match=f"or None for the network's own, 32; got {output_stride}"):
        create("NFNet", output_stride=output_stride)


def test_dilation_follows_the_strides_that_became_one() -> None:
    model = create("NFNet", output_stride=8, device="meta")
    dilations = [(b.conv2.dilation[0], b.conv2b.dilation[0], b.conv2.stride[0]) for s in model.stages for b in s]
    # blocks: stage 0; stage 1 strides; stage 2 does not, its first 3x3 still sees the grid before it; stage 3
    assert dilations == [(1, 1, 1), (1, 1, 2), (1, 1, 1), (1, 2, 1), (2, 4, 1)]


def test_the_callers_feature_cfg_is_taken() -> None:
    model = create("NFNet", features_only=True, feature_cfg={"feature_cls": "getter", "out_indices": (1,)})
    assert type(model).__name__ == "FeatureGetterNet"
    assert [feature.shape for feature in model(torch.zeros(1, 3, 32, 32))] == [(1, 32, 8, 8)]


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
