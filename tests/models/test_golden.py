"""The authors' own numbers, golden/README.md. A missing file is a failure."""

import copy
import gzip
import json
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import timm
from torch import Tensor

import timm_nf
from tests.support import GOLDEN, SHIPPED, golden_file
from tests.support.reference_nfnet import Net
from tests.support.small_nets import relative_error
from timm_nf.diagnostics import signal_stats
from timm_nf.verify.golden import fill, image

TREES = json.loads(gzip.decompress((GOLDEN / "haiku_trees.json.gz").read_bytes()))
# golden files: (registry name, haiku tree)
NETS = {
    "nfnet_F0": ("nfnet_f0", "NFNet-F0"),
    "nfnet_F0plus": ("nfnet_f0_plus", "NFNet-F0+"),
    "nfnet_F1": ("nfnet_f1", "NFNet-F1"),
    "nf_resnet_ResNet50": ("dm_nf_resnet50", "NF-ResNet50"),
    "nf_regnet_B0": ("dm_nf_regnet_b0", "NF-RegNet-B0"),
    "nf_regnet_B4": ("dm_nf_regnet_b4", "NF-RegNet-B4"),
}
SIZES = {
    "nfnet_F0": ("1x64x64", "2x97x75", "1x192x192"),
    "nfnet_F0plus": ("1x64x64",),
    "nfnet_F1": ("1x64x64",),
    "nf_resnet_ResNet50": ("1x64x64", "2x97x75"),
    "nf_regnet_B0": ("1x64x64", "2x97x75"),
    "nf_regnet_B4": ("1x64x64",),
}


def load(net: str, size: str) -> dict[str, np.ndarray]:
    with np.load(golden_file(f"{net}_{size}")) as file:
        return dict(file)


def parameters(net: str) -> dict[str, dict[str, np.ndarray]]:
    return {m: {n: fill(tuple(s), m, n) for n, s in entries.items()} for m, entries in TREES[NETS[net][1]].items()}


@lru_cache(maxsize=1)  # the files are in order of their network, and the largest takes a gigabyte
def networks(net: str) -> tuple[Any, Any]:
    """The network in float64 and in float32."""
    state_dict = timm_nf.convert.haiku_to_timm(parameters(net))
    model = timm.create_model(NETS[net][0], device="meta").eval().requires_grad_(False)
    single = copy.deepcopy(model)
    model.load_state_dict(state_dict, strict=True, assign=True)
    single.load_state_dict({k: v.float() for k, v in state_dict.items()}, strict=True, assign=True)
    return model, single


def test_every_forward_file_is_tested() -> None:
    stems = {path.stem for folder in (GOLDEN, SHIPPED) for path in folder.glob("*.npz")}
    files = {stem for stem in stems if not stem.startswith(("sgd_agc_", "T0_"))}
    assert files == {f"{net}_{size}" for net, sizes in SIZES.items() for size in sizes}
    assert len(files) == 10


@pytest.mark.parametrize(("net", "size"), [(net, size) for net, sizes in SIZES.items() for size in sizes])
def test_golden_logits_pool_and_signal_metrics(net: str, size: str) -> None:
    model, single = networks(net)
    expected, x = load(net, size), image(*map(int, size.split("x")))

    head: list[Tensor] = []
    with model.head.fc.register_forward_hook(lambda _, args, out: head.extend((*args, out))):
        rows = signal_stats(model, x)  # the one float64 pass
    pool, logits = head
    assert relative_error(pool, expected["pool"]) < 1e-11
    assert relative_error(logits, expected["logits"]) < 1e-11

    got = {f"{key}_{i}": row[key] for i, row in enumerate(rows) for key in ("avg_sq_mean", "avg_var")}
    got |= {f"res_avg_var_{i}": row["res_avg_var"] for i, row in enumerate(rows[1:])}
    assert got.keys() == expected.keys() - {"logits", "pool"}
    assert rows[0]["res_avg_var"] is None
    for key, value in got.items():
        assert value == pytest.approx(expected[key].item(), rel=1e-11), key

    assert relative_error(single(x.float()), expected["logits"]) < 1e-4


def test_reference_network_reproduces_the_golden_numbers() -> None:
    for family, net, size in (("NF_RegNet", "nf_regnet_B0", "2x97x75"), ("NF_ResNet", "nf_resnet_ResNet50", "1x64x64")):
        cfg, expected = timm_nf.models.nfnets.VARIANTS[NETS[net][0]].cfg, load(net, size)
        got = Net(family, cfg.depths, cfg.channels).forward(
            parameters(net), image(*map(int, size.split("x"))).permute(0, 2, 3, 1).numpy()
        )
        assert expected.keys() == got.keys() - {"features"}
        for key, value in expected.items():
            assert relative_error(got[key], value) < 1e-11, (net, key)
