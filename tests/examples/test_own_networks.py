"""The examples with networks of one's own: they run, and what they say of their networks holds."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import timm_nf
from examples import autoencoder, signals_1d, volumes_3d
from timm_nf.diagnostics import signal_stats
from timm_nf.diagnostics.inputs import open_branches

NETWORKS = {
    "1d": (lambda: signals_1d.network(False), lambda: signals_1d.network(True), (1, 64)),
    "3d": (lambda: timm_nf.normalizer_free(volumes_3d.network()), volumes_3d.network, (1, 8, 14, 14)),
    "decoder": (lambda: autoencoder.network(False), lambda: autoencoder.network(True), (1, 28, 28)),
}
EACH = pytest.mark.parametrize(("build", "build_twin", "shape"), NETWORKS.values(), ids=NETWORKS)


@pytest.mark.parametrize("example", [signals_1d, autoencoder], ids=["1d", "decoder"])
def test_both_networks_are_trained_and_measured(example: Any) -> None:
    results = example.main(steps=2)
    assert {"normalizer-free", "batch-normalised"} <= results.keys()
    assert all(0 < value < math.inf for value in results.values())


@pytest.mark.slow
def test_the_volumes_are_learnt_from_batches_of_two() -> None:
    assert volumes_3d.main()["normalizer-free"] > 80


@pytest.mark.slow
def test_the_decoder_draws_digits_better_than_their_mean() -> None:
    results = autoencoder.main()
    assert results["normalizer-free"] < results["the mean digit"]


@EACH
def test_examples_of_a_batch_are_independent_where_nothing_normalises(build: Any, build_twin: Any, shape: Any) -> None:
    x = torch.randn(2, *shape)
    for model, independent in ((build().train(), True), (build_twin().train(), False)):
        alone = torch.cat(
            [model(x[:1].repeat(2, *[1] * len(shape)))[:1], model(x[1:].repeat(2, *[1] * len(shape)))[:1]]
        )
        assert torch.allclose(model(x), alone, atol=1e-5) == independent


@EACH
def test_networks_are_grouped_fused_and_have_no_normalisation(build: Any, build_twin: Any, shape: Any) -> None:
    model, x = build().eval(), torch.randn(2, *shape)
    groups = timm_nf.param_groups_agc(model, 0.1, clip_exempt=f"{len(model) - 1}")
    settings = {id(p): g for g in groups for p in g["params"]}
    for name, module in model.named_modules():
        if isinstance(module, (nn.ConvTranspose2d,)) and name != f"{len(model) - 1}":
            assert settings[id(module.weight)]["clip_axis"] == 1
        if hasattr(module, "gain") and isinstance(module.gain, nn.Parameter):
            assert settings[id(module.gain)]["weight_decay"] == 0.0
    fused = timm_nf.fuse(model)
    assert not [n for n, _ in fused.named_parameters() if n.endswith(".gain") and "skip" not in n]
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_signals_of_the_network_built_by_hand_keep_their_variance() -> None:
    model = signals_1d.network(False, chs=256)
    open_branches(model)
    rows = signal_stats(model, torch.randn(64, 1, 64, generator=torch.Generator().manual_seed(0)))
    assert [row["avg_var"] for row in rows[1:]] == pytest.approx([1.04, 1.08, 1.12], rel=0.15)


def test_no_sample_of_the_signal_is_both_learnt_from_and_held_out() -> None:
    (x, y), (held_out, labels) = signals_1d.pieces()
    assert x.shape[1:] == held_out.shape[1:] == (1, 64)
    assert y.bincount().tolist() == [len(y) // 4] * 4
    assert not set(x.flatten().tolist()) & set(held_out.flatten().tolist())
    assert labels.bincount().tolist() == [len(labels) // 4] * 4
