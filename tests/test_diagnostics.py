"""`timm_nf.diagnostics.agc_stats`; for `signal_stats` see test_golden.py."""

import math

import pytest
import torch
from small_nets import create
from torch import nn

from timm_nf.agc import adaptive_clip_grad_, unitwise_norm
from timm_nf.diagnostics import agc_stats

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def after_backward(skip_gain):
    torch.manual_seed(0)
    model = create("NFNet")
    for name, p in model.named_parameters():
        if name.endswith("skipinit_gain"):
            nn.init.constant_(p, skip_gain)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    return model


def test_rows_are_what_clipping_would_do_and_nothing_is_changed():
    model = after_backward(0.5)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    rows = agc_stats(model, clip_factor=0.05)
    assert [row["name"] for row in rows] == list(gradients)
    for row, (name, p) in zip(rows, model.named_parameters(), strict=True):
        assert torch.equal(p.grad, gradients[name])
        ratio = (unitwise_norm(p.grad) / unitwise_norm(p.detach()).clamp(min=1e-3)).flatten()
        assert row["units"] == ratio.numel()
        assert list(row["ratio_quantiles"]) == list(QUANTILES)
        assert list(row["ratio_quantiles"].values()) == pytest.approx(ratio.quantile(torch.tensor(QUANTILES)).tolist())
        expected = 0 if name == "head.fc.weight" else adaptive_clip_grad_(p, 0.05).item()
        assert row["clipped_fraction"] == pytest.approx(expected), name
    assert 0 < sum(row["clipped_fraction"] for row in rows) < len(rows)


def test_at_initialisation_most_gradients_of_a_normalizer_free_network_are_zero():
    rows = agc_stats(after_backward(0.0))
    silent = {row["name"] for row in rows if row["zero_grad_units"] == row["units"]}
    assert len(silent) > len(rows) / 2
    assert not any(name.endswith("skipinit_gain") or name.startswith(("stem", "head")) for name in silent)


def test_parameters_without_gradients_have_no_row_and_those_without_elements_no_units():
    model = nn.Linear(3, 2)
    assert agc_stats(model) == []
    model.empty = nn.Parameter(torch.ones(0, 2))
    model.empty.grad = torch.ones(0, 2)
    assert agc_stats(model) == [
        {"name": "empty", "units": 0, "zero_grad_units": 0, "clipped_fraction": 0.0, "ratio_quantiles": {}}
    ]


@pytest.mark.parametrize("settings", [{"clip_factor": -1.0}, {"eps": math.nan}])
def test_bad_settings_are_refused_by_name(settings):
    with pytest.raises(ValueError, match="must be zero or positive"):
        agc_stats(nn.Linear(2, 2), **settings)
