import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_nfnet import Net
from small_nets import FAMILIES, NETS, build, create, keywords, state_dict, tree

from timm_nf.convert import haiku_to_timm, timm_to_haiku

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def assert_same_tree(got: Any, expected: Any) -> None:
    assert got.keys() == expected.keys()
    for module, entries in expected.items():
        assert got[module].keys() == entries.keys()
        for name, array in entries.items():
            assert got[module][name].dtype == array.dtype, (module, name)
            np.testing.assert_array_equal(got[module][name], array)


def random_tree(net: Net, dtype: Any = np.float64, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    return {
        m: {n: np.asarray(generator.standard_normal(shape), dtype=dtype) for n, shape in entries.items()}
        for m, entries in net.shapes().items()
    }


@EACH_FAMILY
@settings(deadline=None, max_examples=25)
@given(
    depths=st.lists(st.integers(1, 4), min_size=1, max_size=5).map(tuple),
    channels=st.lists(st.sampled_from([16, 24, 32]), min_size=5, max_size=5),
    stem_chs=st.sampled_from([None, 16]),
    rd_ratio=st.sampled_from([0.5, 0.25, None]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    seed=st.integers(0, 2**31),
)
def test_trees_of_any_depth_survive_both_directions_bit_for_bit(
    family: str,
    depths: tuple[int, ...],
    channels: list[int],
    stem_chs: int | None,
    rd_ratio: float | None,
    dtype: Any,
    seed: int,
) -> None:
    net = Net(
        family,
        depths,
        tuple(channels[: len(depths)]),
        num_classes=3,
        group_size=4,
        stem_chs=stem_chs,
        rd_ratio=rd_ratio,
    )
    params = random_tree(net, dtype, seed)
    converted = haiku_to_timm(params)
    assert {v.numpy().dtype for v in converted.values()} == {np.dtype(dtype)}
    assert_same_tree(timm_to_haiku(converted), params)


@EACH_FAMILY
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_state_dicts_survive_both_directions_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    before = {k: torch.randn(v.shape).to(dtype) for k, v in create(family).state_dict().items()}
    after = haiku_to_timm(timm_to_haiku(before))
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype is dtype
        assert after[name].is_contiguous()
        assert torch.equal(after[name], tensor), name


@EACH_FAMILY
def test_converted_tree_has_exactly_the_names_and_shapes_of_the_network(family: str) -> None:
    net = NETS[family]
    expected = {k: v.shape for k, v in create(family).state_dict().items()}
    assert {k: v.shape for k, v in haiku_to_timm(tree(net)).items()} == expected
    assert keywords(net)["depths"] == net.depths


def test_axes_are_permuted_from_hwio_to_oihw_and_io_to_oi() -> None:
    params = random_tree(NETS["NFNet"])
    converted = haiku_to_timm(params)
    block = "NFNet/~/nf_block_1"
    pairs = [
        ("stages.1.0.conv2.weight", (f"{block}/~/conv1", "w"), lambda w: np.transpose(w, (3, 2, 0, 1))),
        ("stages.1.0.conv2.gain", (f"{block}/~/conv1", "gain"), lambda g: g.reshape(-1, 1, 1, 1)),
        ("stages.1.0.conv2b.bias", (f"{block}/~/conv1b", "bias"), lambda b: b),
        (
            "stages.1.0.attn_last.fc1.weight",
            (f"{block}/~/squeeze_excite/~/linear", "w"),
            lambda w: w.T[:, :, None, None],
        ),
        ("stages.1.0.skipinit_gain", (block, "skip_gain"), lambda g: g.reshape(1)),
        ("head.fc.weight", ("NFNet/~/linear", "w"), lambda w: w.T),
        ("head.fc.bias", ("NFNet/~/linear", "b"), lambda b: b),
    ]
    for name, (module, entry), expected in pairs:
        np.testing.assert_array_equal(converted[name].numpy(), expected(params[module][entry]))


def test_scalar_skip_gains_of_timm_convert_too() -> None:
    state = state_dict(NETS["NFNet"])
    scalars = {k: v.reshape(()) if k.endswith("skipinit_gain") else v for k, v in state.items()}
    assert_same_tree(timm_to_haiku(scalars), timm_to_haiku(state))


@EACH_FAMILY
def test_inputs_stay_as_they_are_and_share_no_memory_with_the_result(family: str) -> None:
    params = tree(NETS[family])
    before = copy.deepcopy(params)
    for value in haiku_to_timm(params).values():
        value.fill_(-1)
    assert_same_tree(params, before)
    state = state_dict(NETS[family])
    for entries in timm_to_haiku(state).values():
        for array in entries.values():
            array[...] = -1
    assert state.keys() == state_dict(NETS[family]).keys()
    for name, tensor in state_dict(NETS[family]).items():
        assert torch.equal(state[name], tensor)


def test_parameters_on_a_graph_convert() -> None:
    model = build("NF_ResNet")
    params = timm_to_haiku(dict(model.named_parameters()))
    assert_same_tree(params, tree(NETS["NF_ResNet"]))


@EACH_FAMILY
def test_every_unknown_haiku_name_is_in_one_error(family: str) -> None:
    params = tree(NETS[family])
    block = NETS[family].block_name
    params[f"{family}/~/batchnorm"] = {"scale": np.ones(3), "offset": np.ones(3)}
    params[f"{family}/~/{block}_99/~/conv0"] = {"w": np.ones((1, 1, 2, 2))}
    params[f"{family}/~/linear"]["extra"] = np.ones(2)
    with pytest.raises(ValueError, match=f"4 .*{family}|{family}.* 4 ") as error:
        haiku_to_timm(params)
    for name in ("batchnorm/scale", "batchnorm/offset", f"{block}_99/~/conv0/w", "linear/extra"):
        assert f"{family}/~/{name}" in str(error.value)


@EACH_FAMILY
def test_every_unknown_timm_name_is_in_one_error(family: str) -> None:
    state = state_dict(NETS[family]) | {"stages.7.0.conv1.weight": torch.ones(1), "norm.weight": torch.ones(1)}
    with pytest.raises(ValueError, match="2") as error:
        timm_to_haiku(state)
    assert "stages.7.0.conv1.weight" in str(error.value)
    assert "norm.weight" in str(error.value)


@pytest.mark.parametrize(
    "params",
    [{}, {"ResNet/~/conv": {"w": np.ones((1, 1, 1, 1))}}, {"NFNet/~/linear": {}, "NF_ResNet/~/linear": {}}],
    ids=["empty", "other", "two"],
)
def test_a_tree_that_is_not_of_one_network_is_refused(params: Any) -> None:
    with pytest.raises(ValueError, match="NFNet, NF_ResNet, NF_RegNet"):
        haiku_to_timm(params)


def test_a_state_dict_of_another_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer1\.0\.conv1\.weight"):
        timm_to_haiku({"layer1.0.conv1.weight": torch.ones(1)})
