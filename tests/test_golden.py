"""The authors' own numbers, golden/README.md. A missing file is a failure."""

import gc
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from reference_nfnet import Net
from small_nets import nchw, relative_error
from torch import nn

import timm_nf
from timm_nf.diagnostics import signal_stats
from timm_nf.verify import fill, image

GOLDEN = Path(__file__).parent / "golden"
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
    with np.load(GOLDEN / f"{net}_{size}.npz") as file:
        return dict(file)


def parameters(net: str) -> dict[str, dict[str, np.ndarray]]:
    return {m: {n: fill(tuple(s), m, n) for n, s in entries.items()} for m, entries in TREES[NETS[net][1]].items()}


@pytest.fixture(scope="module", params=NETS)
def golden(request: pytest.FixtureRequest) -> Iterator[tuple[str, nn.Module]]:
    """One network at a time, in float64: the largest takes a gigabyte."""
    state_dict = timm_nf.convert.haiku_to_timm(parameters(request.param))
    model = timm.create_model(NETS[request.param][0], dtype=torch.float64).eval()
    model.load_state_dict(state_dict, strict=True, assign=True)
    yield request.param, model.requires_grad_(False)
    del model, state_dict
    gc.collect()


def test_every_forward_file_is_tested() -> None:
    files = {path.stem for path in GOLDEN.glob("*.npz") if not path.stem.startswith(("sgd_agc_", "T0_"))}
    assert files == {f"{net}_{size}" for net, sizes in SIZES.items() for size in sizes}
    assert len(files) == 10


def test_golden_logits_pool_and_signal_metrics_in_float64_and_logits_in_float32(golden: Any) -> None:
    net, model = golden
    for size in SIZES[net]:
        expected = load(net, size)
        x = nchw(image(*map(int, size.split("x"))))
        pool = model.forward_head(model.forward_features(x), pre_logits=True)
        assert relative_error(pool, expected["pool"]) < 1e-11, size
        assert relative_error(model(x), expected["logits"]) < 1e-11, size

        rows = signal_stats(model, x)
        got = {f"{key}_{i}": row[key] for i, row in enumerate(rows) for key in ("avg_sq_mean", "avg_var")}
        got |= {f"res_avg_var_{i}": row["res_avg_var"] for i, row in enumerate(rows[1:])}
        assert got.keys() == expected.keys() - {"logits", "pool"}
        assert rows[0]["res_avg_var"] is None
        for key, value in got.items():
            assert value == pytest.approx(expected[key].item(), rel=1e-11), (size, key)

    model.float()  # last, as the network is not needed in float64 again
    for size in SIZES[net]:
        x = nchw(image(*map(int, size.split("x")))).float()
        assert relative_error(model(x), load(net, size)["logits"]) < 1e-4, size


def test_reference_network_reproduces_the_golden_numbers() -> None:
    for family, net, size in (("NF_RegNet", "nf_regnet_B0", "2x97x75"), ("NF_ResNet", "nf_resnet_ResNet50", "1x64x64")):
        cfg, expected = timm_nf.nfnets.VARIANTS[NETS[net][0]].cfg, load(net, size)
        got = Net(family, cfg.depths, cfg.channels).forward(parameters(net), image(*map(int, size.split("x"))))
        assert expected.keys() == got.keys() - {"features"}
        for key, value in expected.items():
            assert relative_error(got[key], value) < 1e-11, (net, key)
