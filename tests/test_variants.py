import dataclasses
import gzip
import json
import math
from typing import Any

import pytest
import timm
import torch

from tests.support import GOLDEN
from tests.support.reference_nfnet import Net, authors_name
from timm_nf import convert
from timm_nf.models import nfnets
from timm_nf.variants import VARIANTS, NfCfg

FACTS = json.loads((GOLDEN / "variants.json").read_text())
TREES = json.loads(gzip.decompress((GOLDEN / "haiku_trees.json.gz").read_bytes()))


def reference_net(name: str) -> Net:
    cfg = VARIANTS[name].cfg
    return Net(VARIANTS[name].family, cfg.depths, cfg.channels)


ALL = pytest.mark.parametrize("name", VARIANTS)


def test_there_is_one_row_for_each_of_the_authors_31_networks() -> None:
    assert sorted(map(authors_name, VARIANTS)) == sorted(FACTS) == sorted(TREES)
    assert len(VARIANTS) == 31


@ALL
def test_row_has_the_authors_widths_depths_sizes_and_recipe(name: str) -> None:
    variant, facts = VARIANTS[name], FACTS[authors_name(name)]
    assert list(variant.cfg.channels) == facts["width"]
    assert list(variant.cfg.depths) == facts["depth"]
    assert variant.train_size == facts.get("train_imsize", 224)
    assert variant.test_size == facts.get("test_imsize", 224)
    assert variant.drop_rate == facts.get("drop_rate", 0)
    assert variant.rand_augment == (int(facts["randaugment"][1:]) if "randaugment" in facts else None)


@ALL
def test_parameters_and_names_are_the_authors(name: str) -> None:
    model = timm.create_model(name, device="meta")
    parameters = dict(model.named_parameters())
    facts, tree = FACTS[authors_name(name)], TREES[authors_name(name)]
    assert not list(model.buffers())
    assert sum(p.numel() for p in parameters.values()) == facts["params"]
    assert len(parameters) == facts["tensors"]
    # A byte per number: timm_to_haiku copies, and the largest network has 0.9 billion.
    zero = torch.zeros((), dtype=torch.uint8)
    params = convert.timm_to_haiku({k: zero.expand(v.shape) for k, v in parameters.items()})
    assert {m: {n: list(a.shape) for n, a in entries.items()} for m, entries in params.items()} == tree


@ALL
def test_reference_network_has_the_same_tree(name: str) -> None:
    shapes = reference_net(name).shapes()
    assert {m: {n: list(s) for n, s in entries.items()} for m, entries in shapes.items()} == TREES[authors_name(name)]


def test_every_entrypoint_is_declared_for_type_checkers() -> None:
    declared = {name for name in nfnets.__annotations__ if not name.startswith("_")}
    assert declared == set(VARIANTS) == set(timm.list_models(module="nfnets"))


@ALL
def test_row_yields_an_entrypoint_and_a_default_config(name: str) -> None:
    variant = VARIANTS[name]
    assert timm.is_model(name)
    assert name in timm.list_models(module="nfnets")
    assert getattr(nfnets, name).__name__ == name
    assert name in nfnets.__all__
    cfg: Any = timm.get_pretrained_cfg(name)
    assert cfg.input_size == (3, variant.train_size, variant.train_size)
    assert cfg.test_input_size == (3, variant.test_size, variant.test_size)
    assert cfg.pool_size == (-(-variant.train_size // 32),) * 2
    assert cfg.crop_mode == ("squash" if variant.family == "NFNet" else "center")
    assert cfg.first_conv == ("stem.conv1" if variant.family == "NFNet" else "stem.conv")
    assert cfg.classifier == "head.fc"
    assert bool(cfg.has_weights) == (variant.hf_hub_id is not None)


def test_default_pool_size_is_what_the_network_pools() -> None:
    for name in ("nfnet_f0", "dm_nf_resnet50", "dm_nf_regnet_b2"):
        model: Any = timm.create_model(name, device="meta")
        features = model.forward_features(torch.empty(1, *model.default_cfg["input_size"], device="meta"))
        assert tuple(features.shape[2:]) == model.default_cfg["pool_size"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem_type": "deep"}, "deep_quad, 3x3, 7x7_pool"),
        ({"attn_layer": "eca"}, "'eca'"),
        ({"depths": (1, 2)}, r"\(1, 2\)"),
        ({"depths": ()}, "as many depths as channels"),
        ({"act_layer": "mish"}, "'mish'"),
        ({"group_size": 256}, "128.*256"),
        ({"output_stride": 4}, "got 4"),
        ({"drop_path_rate": 1.5}, "1.5"),
        ({"drop_path_rate": -0.1}, "-0.1"),
    ],
)
def test_a_value_without_a_network_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("nfnet_f0", device="meta", **changes)


def test_a_row_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        VARIANTS["nfnet_f0"].cfg.alpha = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def test_stem_and_final_widths_follow_the_channels_unless_given() -> None:
    cfg = NfCfg(depths=(1, 1), channels=(32, 48))
    assert (cfg.stem_out_chs(), cfg.final_chs()) == (16, 96)
    wide = dataclasses.replace(cfg, width_factor=1.5)
    assert (wide.stage_chs(), wide.stem_out_chs(), wide.final_chs()) == ([48, 72], 16, 144)
    given = dataclasses.replace(wide, stem_chs=10, num_features=101)
    assert (given.stem_out_chs(), given.final_chs()) == (15, 151)
    assert dataclasses.replace(cfg, num_features=0).final_chs() == 0
    reg = dataclasses.replace(cfg, reg=True, stem_type="3x3", width_factor=0.75)
    assert (reg.stage_chs(), reg.stem_out_chs(), reg.final_chs()) == ([24, 36], 24, 104)
    assert dataclasses.replace(cfg, stem_type="7x7_pool").stem_out_chs() == 8


def test_bottleneck_is_truncated_to_whole_groups() -> None:
    cfg = NfCfg(depths=(1,), channels=(100,), group_size=8)
    assert cfg.bottleneck(16, 100, first=False) == (48, 6)
    reg = dataclasses.replace(cfg, reg=True, bottle_ratio=2.25)
    assert reg.bottleneck(18, 100, first=True) == (16, 2)
    assert reg.bottleneck(18, 100, first=False) == (40, 5)
    assert dataclasses.replace(cfg, group_size=None).bottleneck(16, 101, first=False) == (50, 1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"depths": (1, 0, 1, 1)}, "depths"),
        ({"depths": (1, -1, 1, 1)}, "depths"),
        ({"depths": (1, 1)}, "depths"),
        ({"bottle_ratio": 0.0, "group_size": 0}, "bottleneck"),
        ({"channels": (1, 8, 8, 8)}, "widths"),
        ({"alpha": math.nan}, "alpha must be zero or positive and finite, got nan"),
        ({"alpha": -0.2}, "alpha must be .* got -0.2"),
        ({"alpha": math.inf}, "alpha must be .* got inf"),
        ({"bottle_ratio": math.nan}, "bottle_ratio must be .* got nan"),
        ({"width_factor": math.nan}, "width_factor must be .* got nan"),
        ({"attn_kwargs": {"rd_ratio": -0.5}}, "rd_ratio must be .* got -0.5"),
        ({"attn_kwargs": {"rd_ratio": math.inf}}, "rd_ratio must be .* got inf"),
    ],
)
def test_a_network_without_blocks_or_channels_is_refused(bad: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("nfnet_f0", device="meta", **bad)


def test_squeeze_excite_of_an_nf_resnet_has_the_authors_default_ratio() -> None:
    block = timm.create_model("dm_nf_resnet50", attn_layer="se", device="meta").stages[0][0]
    assert block.attn_last.fc1.out_channels == 256 // 4  # nfnets/nf_resnet.py: se_ratio=0.25
