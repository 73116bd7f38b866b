import math
import pickle
import subprocess
import sys
import textwrap
import warnings
from fractions import Fraction

import numpy as np
import pytest
import timm
import timm.optim
import timm.utils
import torch
from timm.optim import get_optimizer_class, get_optimizer_info, list_optimizers
from timm.optim._optim_factory import default_registry
from torch import nn

from tests.support.small_problems import assert_identical, create, target_problem, train, values
from timm_nf import optim
from timm_nf.optim.agc import adaptive_clip_grad_
from timm_nf.optim.optimizer import AdaptiveClipping, agc_class

pytestmark = [
    pytest.mark.usefixtures("no_compiler", "known_optimizer_warnings"),
    pytest.mark.filterwarnings("ignore:these parameters come without their model", "ignore:no classifier was found"),
]

NAMES = list_optimizers("agc*")


ELSEWHERE = list_optimizers(["fused*", "bnb*"])  # apex and bitsandbytes


# The class


def test_sgd_is_nesterov_by_default_as_timms_is():
    params, _ = target_problem()
    assert create("agcsgd", params).param_groups[0]["nesterov"] is True
    assert create("agcmomentum", params).param_groups[0]["nesterov"] is False


def test_the_class_has_the_defaults_of_the_paper():
    params, loss = target_problem()
    optimizer = optim.AgcSGD(params, 0.1)
    assert optimizer.param_groups[0]["clip_factor"] == optimizer.defaults["clip_factor"] == 0.01
    assert optimizer.param_groups[0]["clip_eps"] == optimizer.defaults["clip_eps"] == 1e-3
    train(optimizer, loss, 1)


@pytest.mark.parametrize("bare_first", [False, True])
def test_hooks_fire_exactly_once(bare_first):
    class Base(torch.optim.SGD):
        """A class whose `step` torch has not wrapped yet."""

        def step(self, closure=None):
            return super().step.__wrapped__(self, closure)

    torch.optim.SGD([nn.Parameter(torch.ones(1))])
    if bare_first:
        Base([nn.Parameter(torch.ones(1))])
    assert getattr(Base.step, "hooked", False) is bare_first
    params, loss = target_problem()
    optimizer = agc_class(Base)(params, lr=0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(optimizer, loss, 1)
    assert calls == ["pre", "post"]
    assert getattr(Base.step, "hooked", False) is bare_first


def test_torch_schedulers_may_patch_the_step():
    params, loss = target_problem()
    optimizer = optim.AgcSGD(params, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
        train(optimizer, loss, 1)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_an_infinite_factor_equals_the_bare_class_for_every_implementation(base, flags):
    results = []
    for cls, kwargs in ((base, {}), (agc_class(base), {"clip_factor": math.inf})):
        params, loss = target_problem()
        train(cls(params, lr=0.1, weight_decay=0.1, **flags, **kwargs), loss, 5)
        results.append(values(params))
    assert_identical(*results)


def test_groups_have_their_own_clip_settings():
    params, loss = target_problem()
    exempt, tight = params
    optimizer = optim.AgcSGD(
        [{"params": [exempt], "clip_factor": None}, {"params": [tight], "clip_factor": 0.1, "clip_eps": 0.5}], lr=0.1
    )
    late = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late], "lr_scale": 0.5, "initial_lr": 1.0, "anything": 1})
    assert [g["clip_factor"] for g in optimizer.param_groups] == [None, 0.1, 0.01]
    assert [g["clip_eps"] for g in optimizer.param_groups] == [1e-3, 0.5, 1e-3]
    loss().backward()
    late.grad = torch.ones(3)
    limit = 0.1 * max(tight.norm().item(), 0.5)
    before = exempt.grad.clone()
    optimizer.step()
    assert torch.equal(exempt.grad, before)
    assert tight.grad.norm().item() == pytest.approx(limit)
    assert late.grad.norm().item() == pytest.approx(0.01 * math.sqrt(3))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"clip_factor": -0.1}, "clip_factor must be zero or positive, got -0.1"),
        ({"clip_factor": math.nan}, "clip_factor must be zero or positive, got nan"),
        ({"clip_eps": -1.0}, "clip_eps must be zero or positive, got -1.0"),
        ({"clip_norm": 1.0}, "unknown clip setting 'clip_norm'"),
        ({"clip_treshold": 1.0}, "unknown clip setting 'clip_treshold'"),
    ],
)
@pytest.mark.parametrize("name", ["agcsgd", "agcadafactor"])
def test_bad_clip_settings_are_refused_by_name(name, settings, problem):
    params, _ = target_problem()
    with pytest.raises(ValueError, match=problem):
        create(name, params, **settings)
    with pytest.raises(ValueError, match=problem):
        create(name, [{"params": params, **settings}])


def test_settings_that_the_base_optimizer_knows_are_not_ours_to_refuse():
    params, loss = target_problem()
    train(create("agcadafactor", [{"params": params, "clip_threshold": 2.0}], clip_threshold=1.0), loss, 1)
    train(create("agcadopt", params, clip_exp=None), loss, 1)


# torch 2.8 of itself, in LBFGS
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning")
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("clip_factor", [math.inf, 0.1])
def test_every_evaluation_of_a_closure_is_clipped_also_by_lbfgs(clip_factor, search):
    results = []
    for base in (True, False):
        params, _ = target_problem()
        cls, clip = (torch.optim.LBFGS, {}) if base else (agc_class(torch.optim.LBFGS), {"clip_factor": clip_factor})
        optimizer = cls(params, lr=0.5, line_search_fn=search, **clip)
        evaluations = 0

        def closure(params=params, optimizer=optimizer, base=base):
            nonlocal evaluations
            evaluations += 1
            optimizer.zero_grad()
            loss = sum((p - 1).square().square().sum() for p in params)
            loss.backward()
            if base:
                adaptive_clip_grad_(params, clip_factor)
            return loss

        optimizer.step(closure)
        assert evaluations > 1
        results.append(values(params))
    assert_identical(*results)


@pytest.mark.parametrize("name", ["lookahead_agcsgd", "Lookahead_AgcAdamW"])
def test_lookahead_takes_an_agc_form(name):
    params, loss = target_problem()
    optimizer = create(name, params, lr=0.1)
    assert isinstance(optimizer, timm.optim.Lookahead)
    assert isinstance(optimizer._base_optimizer, AdaptiveClipping)
    before = loss().item()
    assert train(optimizer, loss, 8) < before
    state = optimizer.state_dict()
    params, _ = target_problem()
    resumed = create(name, params, lr=0.1, clip_factor=0.5)
    with pytest.warns(UserWarning, match=r"the checkpoint's clip_factor=0.01 replaces 0.5 in parameter group 0"):
        resumed.load_state_dict(state)
    assert resumed.param_groups[0]["lookahead_step"] == 8
    assert resumed.param_groups[0]["clip_factor"] == 0.01


def test_a_compiled_step_clips():
    results = []
    with torch.compiler.set_stance("default"):
        for compiled in (False, True):
            params, loss = target_problem()
            optimizer = optim.AgcSGD(params, lr=0.1, momentum=0.9)
            step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
            for _ in range(3):
                optimizer.zero_grad()
                loss().backward()
                step()
            results.append(values(params))
    torch.testing.assert_close(*results)


# timm's registry


def test_unknown_names_get_timms_own_message():
    for name in ("agcfoo", "agcagcsgd", "foo"):
        with pytest.raises(ValueError, match=f"Optimizer {name} not found in registry"):
            get_optimizer_info(name)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_forms_of_optimizers_from_elsewhere_resolve_and_fail_only_when_used(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # with it, they may well be installed
    assert get_optimizer_info("agc" + name).defaults == get_optimizer_info(name).defaults
    messages = []
    for form in (name, "agc" + name):
        for use in (lambda form=form: get_optimizer_class(form), lambda form=form: create(form, target_problem()[0])):
            with pytest.raises((AssertionError, ImportError)) as caught:
                use()
            messages.append(str(caught.value))
    assert len(set(messages)) == 1
    assert not [n for n in NAMES if n.startswith(("agcfused", "agcbnb"))]


def test_optimizers_registered_later_have_an_agc_form(monkeypatch):
    class SGD(torch.optim.SGD):
        """Same name as torch's: the class made from it must not replace that of torch's."""

    monkeypatch.setattr(default_registry, "_optimizers", dict(default_registry._optimizers))
    default_registry.register(timm.optim.OptimInfo("homemade", SGD, has_eps=False, has_momentum=True))
    params, loss = target_problem()
    optimizer = create("agchomemade", params)
    assert isinstance(optimizer, SGD)
    assert optim.AgcSGD.base_class is torch.optim.SGD
    assert agc_class(SGD) is not optim.AgcSGD
    train(optimizer, loss, 1)
    assert type(pickle.loads(pickle.dumps(optimizer))) is type(optimizer)


def test_a_pickle_opens_in_a_process_that_has_built_no_optimizer(tmp_path):
    params, loss = target_problem()
    optimizer = create("agcnadamw", params)
    train(optimizer, loss, 1)
    (tmp_path / "optimizer.pkl").write_bytes(pickle.dumps(optimizer))
    code = """
        import pickle, sys
        from timm_nf import optim
        optim.register()
        print(type(pickle.load(open(sys.argv[1], "rb"))).__name__)
    """
    run = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "optimizer.pkl")]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "AgcNAdamW\n"


def test_a_base_whose_step_takes_no_closure_steps():
    class Plain(torch.optim.SGD):
        def step(self):
            return super().step()

    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    agc_class(Plain)([p], lr=1.0).step()
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.99))


def closed(optimizer, loss):
    """A closure for it, and the losses it will have computed."""
    losses = []

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        losses.append(value.item())
        return value

    return closure, losses


@pytest.mark.parametrize("fused", [None, True])
def test_sgd_with_a_closure_steps_as_without(fused):
    results = []
    for with_closure in (False, True):
        params, loss = target_problem()
        optimizer = optim.AgcSGD(params, lr=0.1, momentum=0.9, fused=fused)
        closure, losses = closed(optimizer, loss)
        for _ in range(3):
            if with_closure:
                with torch.no_grad():  # a closure has gradients all the same
                    assert optimizer.step(closure).item() == losses[-1]
            else:
                closure()
                optimizer.step()
        results.append([losses, values(params)])
    assert results[0][0] == results[1][0]
    assert_identical(results[0][1], results[1][1])


class ImitatesItsClass:
    """A wrapper as Lightning's: of the wrapped optimizer's class, it forwards the attributes that it does not have."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Wrapped", (type(self), type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


@pytest.mark.parametrize("name", ["agcsgd", "lookahead_agcsgd"])
def test_a_wrapper_of_the_same_class_has_the_statistics(name):
    params, loss = target_problem()
    optimizer = create(name, params)
    wrapper = ImitatesItsClass(optimizer)
    train(optimizer, loss, 1)
    assert wrapper.clip_stats() == optimizer.clip_stats()
    assert wrapper.clip_stats()[0]["units"] == 9


def test_a_group_added_through_a_wrapper_of_the_same_class_has_its_word_on_clipping():
    model = timm.create_model("test_resnet", num_classes=5)
    optimizer = timm.optim.create_optimizer_v2(model, "agcsgd", lr=0.1)
    model.reset_classifier(7)
    group = {"params": model.fc.parameters(), "clip_factor": 0.5}
    ImitatesItsClass(optimizer).add_param_group(group)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.clip_stats()[-1]["units"] == 7 + 1


# Settings as they arrive


@pytest.mark.parametrize("value", ["0.5", "5e-1", 0.5, np.float32(0.5), np.float64(0.5), Fraction(1, 2)], ids=repr)
def test_every_form_of_a_number_is_that_number(value):
    params, loss = target_problem()
    results = []
    for given in (value, 0.5):
        params, loss = target_problem()
        optimizer = optim.AgcSGD(params, lr=0.1, clip_factor=given, clip_eps=given, clip_exempt=())
        assert [type(optimizer.param_groups[0][name]) for name in ("clip_factor", "clip_eps")] == [float] * 2
        optimizer.param_groups[0]["clip_factor"] = given  # as people change it later
        train(optimizer, loss, 1)
        results.append(values(params))
    assert_identical(*results)


@pytest.mark.parametrize("text", ["inf", "Infinity"])
def test_infinity_as_text_clips_nothing(text):
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.full((2,), 100.0)
    assert adaptive_clip_grad_(p, text) == 0
    optim.AgcSGD([{"params": [p], "clip_factor": text}], lr=0.1).step()
    assert torch.equal(p.grad, torch.full((2,), 100.0))


NO_NUMBERS = [True, False, np.bool_(True), "nan", "-1", "", "True", "a lot", b"1", 1j, [1.0], math.nan, 10**400]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda v: repr(v)[:8])
def test_what_is_no_number_is_refused(value):
    for name in ("clip_factor", "clip_eps"):
        with pytest.raises(ValueError, match=f"^{name} must be zero or positive, got "):
            optim.AgcSGD([nn.Parameter(torch.ones(2))], lr=0.1, **{name: value})


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_is_refused_in_its_own_words(shape):
    for name in ("clip_factor", "clip_eps"):
        with pytest.raises(ValueError, match=rf"^{name} must be a number, got a tensor: .*; use \.item\(\)$"):
            optim.AgcSGD([nn.Parameter(torch.ones(2))], lr=0.1, **{name: torch.full(shape, 0.1)})
