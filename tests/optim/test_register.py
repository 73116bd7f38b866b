"""What `timm_nf.optim.register` changes in timm, what `unregister` undoes, and the stub that type checkers read."""

import functools
import warnings

import pytest
import timm.utils
import torch
from timm.optim import Lookahead, create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.optim._optim_factory import default_registry
from torch import nn

from scripts import optimizer_stub
from timm_nf import optim
from timm_nf.optim import factory
from timm_nf.optim.agc import adaptive_clip_grad_

MODULES = (timm.utils, timm.utils.agc, timm.utils.clip_grad)
METHODS = ("create_optimizer", "get_optimizer_info", "get_optimizer_class")


def state():
    """Everything of timm that registering may touch."""
    return (
        [module.adaptive_clip_grad for module in MODULES],
        timm.utils.dispatch_clip_grad,
        [vars(default_registry).get(name) for name in METHODS],
        vars(Lookahead).get("clip_stats"),
        dict(default_registry._optimizers),
    )


@pytest.fixture
def registered():
    """As it is after importing, whatever the test does."""
    yield
    if factory._installed:
        optim.unregister()
    optim.register()


@pytest.mark.usefixtures("registered")
def test_registering_again_changes_nothing():
    before = state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optim.register()
    assert state() == before
    names = [record.name for record in factory._installed]
    assert sorted(names) == sorted([*METHODS, *["adaptive_clip_grad"] * 3, "clip_stats"])


@pytest.mark.usefixtures("registered")
def test_unregistering_leaves_timm_as_it_was_and_registering_brings_all_back():
    names = list_optimizers("agc*")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optim.unregister() == []
    assert {module.adaptive_clip_grad.__module__ for module in MODULES} == {"timm.utils.agc"}
    assert [vars(default_registry).get(name) for name in METHODS] == [None] * 3
    assert list_optimizers("agc*") == []
    assert not hasattr(Lookahead, "clip_stats")
    with pytest.raises(ValueError, match="Optimizer agcsgd not found in registry"):
        get_optimizer_class("agcsgd")
    optim.register()
    assert list_optimizers("agc*") == names
    assert get_optimizer_class("agcsgd", bind_defaults=False) is optim.AgcSGD


@pytest.mark.usefixtures("registered")
def test_what_others_put_around_ours_stays_and_is_named(monkeypatch):
    ours, calls = default_registry.create_optimizer, []

    @functools.wraps(ours)
    def counted(*args, **kwargs):
        calls.append(args)
        return ours(*args, **kwargs)

    monkeypatch.setattr(default_registry, "create_optimizer", counted)
    optim.register()
    assert default_registry.create_optimizer is counted
    with pytest.warns(UserWarning, match="^OptimizerRegistry.create_optimizer: replaced by others since"):
        assert optim.unregister() == ["OptimizerRegistry.create_optimizer"]
    assert default_registry.create_optimizer is counted
    create_optimizer_v2(nn.Linear(2, 2), "sgd", lr=0.1)
    assert len(calls) == 1


def test_timms_clip_mode_uses_our_function():
    assert [module.adaptive_clip_grad for module in MODULES] == [adaptive_clip_grad_] * 3
    gain = nn.Parameter(torch.ones(4, 1, 1, 1))
    gain.grad = torch.tensor([3.0, 0.0, 4.0, 0.0]).view(4, 1, 1, 1)
    timm.utils.dispatch_clip_grad([gain], 0.01, mode="agc")
    # one unit of weight norm 2 and gradient norm 5; timm's own function clips every entry to 0.01
    torch.testing.assert_close(gain.grad.flatten(), torch.tensor([0.012, 0.0, 0.016, 0.0]))


def test_the_stub_lists_the_classes_of_the_registry():
    text = optimizer_stub.FILE.read_text()
    assert text == optimizer_stub.stub(), "run python -m scripts.optimizer_stub"
    for name in list_optimizers("agc*"):
        assert f"class {get_optimizer_class(name, bind_defaults=False).__name__}(" in text
    assert {cls for name in optim.__all__ for cls in [name] if f"as {name}\n" not in text} == set()
