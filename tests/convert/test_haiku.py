import copy
import gzip
import json
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import GOLDEN
from tests.support.reference_nfnet import Net, authors_name
from tests.support.small_nets import FAMILIES, NETS, build, create, keywords, state_dict, tree
from timm_nf.convert import haiku_to_timm, infer_variant, load_haiku, timm_to_haiku
from timm_nf.variants import VARIANTS

TREES = json.loads(gzip.decompress((GOLDEN / "haiku_trees.json.gz").read_bytes()))
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


@pytest.mark.parametrize("variant", TREES)
def test_names_of_all_variants_survive_both_directions_bit_for_bit(variant: str) -> None:
    generator = np.random.default_rng(0)
    params = {  # real names and kernels, few channels
        m: {
            n: np.asarray(generator.standard_normal([*s[:-2], 2, 3][-len(s) :] if s else ()), np.float32)
            for n, s in e.items()
        }
        for m, e in TREES[variant].items()
    }
    converted = haiku_to_timm(params)
    assert len(converted) == sum(map(len, params.values()))
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


# -- both sides of a wrong tree ----------------------------------------------------------------------------------------


@EACH_FAMILY
def test_missing_and_unknown_names_are_in_one_error_in_both_directions(family: str) -> None:
    params, stem = tree(NETS[family]), "stem_conv2" if family == "NFNet" else "initial_conv"
    block = f"{family}/~/{NETS[family].block_name}_3"
    params[f"{family}/~/{stem}x"] = params.pop(f"{family}/~/{stem}")
    params[f"{block}/~/conv2"]["scale"] = params[f"{block}/~/conv2"].pop("gain")
    del params[block]
    with pytest.raises(ValueError, match=r"got 4 that it does not have: .*; 5 missing: ") as error:
        haiku_to_timm(params)
    unknown, missing = str(error.value).split("; 5 missing: ")
    for name in ("w", "gain", "bias"):
        assert f"{stem}x/{name}" in unknown
        assert f"{family}/~/{stem}/{name}" in missing
    assert f"{block}/~/conv2/scale" in unknown
    assert f"{block}/~/conv2/gain" in missing
    assert f"{block}/skip_gain" in missing

    state = state_dict(NETS[family])
    state["stages.1.1.conv2.scale"] = state.pop("stages.1.1.conv2.gain")
    del state["stages.2.0.downsample.conv.weight"], state["stages.0.0.skipinit_gain"]
    with pytest.raises(ValueError, match="expected the parameters of one") as error:
        timm_to_haiku(state)
    assert str(error.value) == (
        f"expected the parameters of one {family}, got 1 that it does not have: stages.1.1.conv2.scale; 3 missing: "
        "stages.0.0.skipinit_gain, stages.1.1.conv2.gain, stages.2.0.downsample.conv.weight"
    )


@pytest.mark.parametrize("entry", [("nf_block_2/~/conv1b", None), ("nf_block/~/squeeze_excite/~/linear_1", None)])
def test_what_one_block_has_the_others_must_have(entry: tuple[str, None]) -> None:
    params = tree(NETS["NFNet"])
    del params[f"NFNet/~/{entry[0]}"]
    with pytest.raises(ValueError, match=f"missing: NFNet/~/{entry[0]}/"):
        haiku_to_timm(params)


@EACH_FAMILY
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_every_parameter_is_missed(family: str, data: st.DataObject) -> None:
    params = tree(NETS[family])
    module = data.draw(st.sampled_from(sorted(params)))
    name = data.draw(st.sampled_from(sorted(params[module])))
    target = next(iter(haiku_to_timm(params).keys() - haiku_to_timm_without(params, module, name)))
    state = state_dict(NETS[family])
    del state[target]
    with pytest.raises(ValueError, match=f"1 missing: {target}$|with stem.conv1.weight or stem.conv.weight"):
        timm_to_haiku(state)


def haiku_to_timm_without(params: Any, module: str, name: str) -> set[str]:
    """timm's names of all but one parameter, which `haiku_to_timm` misses."""
    marked = copy.deepcopy(params)
    marked[module][name] = np.full_like(marked[module][name], np.nan)
    names = {k for k, v in haiku_to_timm(marked).items() if not v.isnan().any()}
    del marked[module][name]
    with pytest.raises(ValueError, match="missing: "):
        haiku_to_timm(marked)
    return names


def test_arrays_with_another_number_of_axes_are_refused() -> None:
    params = tree(NETS["NFNet"])
    params["NFNet/~/linear"]["w"] = np.ones(4)
    params["NFNet/~/nf_block"]["skip_gain"] = np.ones((1, 2))
    with pytest.raises(ValueError, match=r"2 with another number of axes: .*linear/w \(4,\), .*skip_gain \(1, 2\)"):
        haiku_to_timm(params)
    state = state_dict(NETS["NFNet"])
    state["stages.0.0.attn_last.fc1.weight"] = torch.ones(2, 2, 3, 3)
    state["head.fc.weight"] = torch.ones(4)
    state["stages.0.0.conv1.gain"] = torch.ones(4, 2, 1, 1)
    with pytest.raises(ValueError, match=r"3 with another number of axes: head\.fc\.weight \(4,\)"):
        timm_to_haiku(state)


def test_bfloat16_is_refused_with_a_way_out() -> None:
    state = state_dict(NETS["NFNet"], torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch\.bfloat16 for .*, tensor\.float\(\)"):
        timm_to_haiku(state)
    params = tree(NETS["NFNet"])
    for dtype in (">f4", "f4,f4", object):  # bfloat16 is one of ml_dtypes', of which torch knows as little
        params["NFNet/~/linear"]["b"] = np.ones(3).astype(dtype)
        with pytest.raises(ValueError, match=r"for NFNet/~/linear/b; .*astype\(np\.float32\)"):
            haiku_to_timm(params)


# -- the network of a tree ---------------------------------------------------------------------------------------------


def zeros(shapes: Any) -> dict[str, dict[str, np.ndarray]]:
    return {m: {n: np.broadcast_to(np.float32(0), tuple(s)) for n, s in e.items()} for m, e in shapes.items()}


def test_all_variants_are_recognised_by_their_shapes() -> None:
    found = {variant: infer_variant(zeros(shapes)) for variant, shapes in TREES.items()}
    assert found == {authors_name(name): (name, {}) for name in VARIANTS}


@pytest.mark.parametrize("variant", TREES)
def test_other_classes_and_input_channels_are_recognised_in_all_variants(variant: str) -> None:
    shapes = copy.deepcopy(TREES[variant])
    family = next(iter(shapes)).partition("/")[0]
    stem = f"{family}/~/{'stem_conv0' if family == 'NFNet' else 'initial_conv'}"
    shapes[stem]["w"][2] = 1
    name, _ = infer_variant(zeros(TREES[variant]))
    assert infer_variant(zeros(shapes)) == (name, {"in_chans": 1})
    shapes[f"{family}/~/linear"]["w"][1], shapes[f"{family}/~/linear"]["b"][0] = 7, 7
    assert infer_variant(zeros(shapes)) == (name, {"in_chans": 1, "num_classes": 7})
    del shapes[f"{family}/~/linear"]
    assert infer_variant(zeros(shapes)) == (name, {"in_chans": 1, "num_classes": 0})


def test_the_small_published_network_is_recognised() -> None:
    name, overrides = infer_variant(load_haiku(GOLDEN / "T0_haiku_flatmap.npz"))
    assert name == "nfnet_f0"
    assert overrides == {"depths": (1, 2, 1, 1), "channels": (32, 64, 96, 96), "group_size": 8, "num_classes": 10}


def test_the_variant_with_the_fewest_overrides_is_named() -> None:
    wide = Net("NFNet", (1, 2, 3), (384, 768, 2048))
    assert infer_variant(zeros(wide.shapes())) == ("nfnet_f0", {"depths": (1, 2, 3), "channels": (384, 768, 2048)})
    assert infer_variant(zeros(Net("NFNet", (9, 2, 1, 1), (384, 768, 2048, 2048)).shapes())) == (
        "nfnet_f0_plus",
        {"depths": (9, 2, 1, 1)},
    )
    assert infer_variant(zeros(Net("NFNet", (3, 6, 18, 9), (256, 512, 512, 512)).shapes())) == (
        "nfnet_f2",
        {"channels": (256, 512, 512, 512)},
    )


@EACH_FAMILY
@settings(deadline=None, max_examples=40)
@given(
    depths=st.lists(st.integers(1, 3), min_size=1, max_size=5).map(tuple),
    channels=st.lists(st.integers(20, 200), min_size=5, max_size=5),
    stem_chs=st.sampled_from([None, 16, 30]),
    num_features=st.sampled_from([None, 0, 33]),
    group_size=st.sampled_from([0, 4, 5, None]),
    in_chans=st.integers(1, 4),
    num_classes=st.sampled_from([1, 10, 1000]),
)
def test_create_model_with_the_overrides_takes_the_tree(
    family: str,
    depths: tuple[int, ...],
    channels: list[int],
    stem_chs: int | None,
    num_features: int | None,
    group_size: int | None,
    in_chans: int,
    num_classes: int,
) -> None:
    if group_size == 0 and family == "NFNet":
        channels = [256 + chs for chs in channels]  # the authors' groups are 128 wide
    net = Net(
        family,
        depths,
        tuple(channels[: len(depths)]),
        num_classes=num_classes,
        in_chans=in_chans,
        num_features=num_features,
        stem_chs=stem_chs,
        group_size=group_size,
    )
    params = zeros(net.shapes())
    name, overrides = infer_variant(params)
    model = timm.create_model(name, device="meta", **overrides)
    shapes = {k: v.shape for k, v in haiku_to_timm(params).items()}
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes


@pytest.mark.parametrize(
    "changes", [{"bottle_ratio": 0.3}, {"rd_ratio": 0.3}, {"rd_ratio": None}, {"extra_conv": False}]
)
def test_a_network_of_other_proportions_is_refused(changes: dict[str, Any]) -> None:
    net = Net("NFNet", (1, 2), (32, 64), group_size=4, **changes)
    with pytest.raises(ValueError, match=r"expected \d+ parameters in a nfnet_f0 with .*, got \d+"):
        infer_variant(zeros(net.shapes()))
