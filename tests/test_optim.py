"""`timm_nf.optim`: every `agc*` name behaves as its bare optimizer does, after clipping who has to be clipped."""

import copy
import inspect
import logging
import math
import pickle
import subprocess
import sys
import textwrap
import warnings

import pytest
import timm
import timm.optim
import timm.task
import timm.utils
import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from timm.optim._optim_factory import default_registry
from timm.scheduler import CosineLRScheduler
from torch import nn

from timm_nf import agc, optim
from timm_nf.agc import adaptive_clip_grad_

optim.register()  # what `import timm_nf` does; repeating it must not hurt

NAMES = list_optimizers("agc*")
BARE = list_optimizers(exclude_filters=["agc*", "fused*", "bnb*"])
ELSEWHERE = list_optimizers(["fused*", "bnb*"])  # apex and bitsandbytes


@pytest.fixture(autouse=True)
def _no_compiler():
    """Kron compiles four small functions; no test here may need a C++ compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(autouse=True)
def _known_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*opt_einsum.*")  # timm's Kron, if that is not installed
        warnings.filterwarnings("ignore", message=r"Using backward\(\) with create_graph=True")  # Adahessian needs it
        yield


def target_problem(dtype=torch.float32):
    """A weight, a bias and a loss with a known minimum, far enough from it that gradients get clipped."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 6, generator=generator).to(dtype))
    bias = nn.Parameter(torch.randn(8, generator=generator).to(dtype))

    def loss():
        return ((weight - 1.0) ** 2).sum() + ((bias + 1.0) ** 2).sum()

    return [weight, bias], loss


def create(name, params, **kwargs):
    if "kron" in name:
        kwargs.setdefault("deterministic", True)
    return create_optimizer_v2(params, name, **{"lr": 1e-2, **kwargs})


def train(optimizer, loss, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward(create_graph=getattr(optimizer, "is_second_order", False))
        optimizer.step()
    return loss().item()


def values(params):
    return [p.detach().clone() for p in params]


def assert_identical(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# Every registered name


def test_every_bare_name_has_its_agc_form():
    assert [name.removeprefix("agc") for name in NAMES] == BARE
    assert len(NAMES) > 80
    assert {"agcsgd", "agcnesterov", "agcadamw", "agclion", "agcadahessian"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_agc_form_is_a_subclass_with_the_same_information(name):
    cls, bare = (get_optimizer_class(n, bind_defaults=False) for n in (name, name.removeprefix("agc")))
    info, bare_info = get_optimizer_info(name), get_optimizer_info(name.removeprefix("agc"))
    assert issubclass(cls, bare)
    assert cls is get_optimizer_class(name, bind_defaults=False)
    assert getattr(optim, cls.__name__) is cls
    assert info.name == "agc" + bare_info.name
    assert bare_info.description in info.description
    for field in ("defaults", "has_eps", "has_momentum", "has_betas", "num_betas", "second_order"):
        assert getattr(info, field) == getattr(bare_info, field)
    parameters = inspect.signature(cls.__init__).parameters
    expected = inspect.signature(bare.__init__).parameters
    assert {k: v for k, v in parameters.items() if not k.startswith("clip_") or k in expected} == dict(expected)
    assert parameters["clip_factor"].default == 0.01
    assert parameters["clip_eps"].default == 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_it_converges_and_keeps_dtypes(name):
    params, loss = target_problem()
    before = loss().item()
    optimizer = create(name, params, clip_factor=0.1)
    assert train(optimizer, loss, 20) < before
    assert [p.dtype for p in params] == [torch.float32] * 2
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("name", NAMES)
def test_it_equals_the_bare_optimizer_bit_for_bit_without_a_limit(name):
    results = []
    for form, kwargs in ((name, {"clip_factor": math.inf}), (name.removeprefix("agc"), {})):
        params, loss = target_problem()
        torch.manual_seed(0)
        train(create(form, params, weight_decay=0.01, **kwargs), loss, 5)
        results.append(values(params))
    assert_identical(*results)


@pytest.mark.parametrize("name", NAMES)
def test_it_equals_clipping_by_hand_before_the_bare_optimizer(name):
    results = []
    for form in (name, name.removeprefix("agc")):
        params, loss = target_problem()
        torch.manual_seed(0)
        kwargs = {"clip_factor": 0.05, "clip_eps": 1e-2} if form == name else {}
        optimizer = create(form, params, **kwargs)
        for _ in range(5):
            optimizer.zero_grad()
            loss().backward(create_graph=getattr(optimizer, "is_second_order", False))
            if form != name:
                assert adaptive_clip_grad_(params, 0.05, 1e-2).item() > 0
            optimizer.step()
        results.append(values(params))
    assert_identical(*results)


@pytest.mark.parametrize("name", NAMES)
def test_it_resumes_from_its_own_and_from_the_bare_checkpoint(name):
    params, loss = target_problem()
    optimizer = create(name, params, clip_factor=0.2)
    train(optimizer, loss, 3)
    own = copy.deepcopy(optimizer.state_dict())
    bare = copy.deepcopy(own)
    for group in bare["param_groups"]:
        del group["clip_factor"], group["clip_eps"]
    start, seed = values(params), torch.get_rng_state()
    hessians = [copy.deepcopy(getattr(p, "hess", None)) for p in params]  # Adahessian keeps them on the parameter
    train(optimizer, loss, 3)
    expected = values(params)
    for checkpoint, clip_factor in ((own, 0.7), (bare, 0.2)):
        saved = copy.deepcopy(checkpoint)
        params, loss = target_problem()
        resumed = create(name, params, clip_factor=clip_factor)
        resumed.load_state_dict(checkpoint)
        assert repr(checkpoint) == repr(saved)
        torch.set_rng_state(seed)
        for p, value, hess in zip(params, start, hessians, strict=True):
            p.data.copy_(value)
            p.hess = hess
        if name == "agcadahessian":
            resumed.generator.set_state(optimizer_generator_after(3))
        train(resumed, loss, 3)
        assert resumed.param_groups[0]["clip_factor"] == 0.2
        assert_identical(values(params), expected)


def optimizer_generator_after(steps):
    """The state of Adahessian's own random numbers, which its state dict leaves out."""
    params, loss = target_problem()
    optimizer = create("adahessian", params)
    train(optimizer, loss, steps)
    return optimizer.generator.get_state()


@pytest.mark.parametrize("name", NAMES)
def test_it_takes_a_scheduler(name):
    params, loss = target_problem()
    optimizer = create(name, params)
    scheduler = CosineLRScheduler(optimizer, t_initial=10, warmup_t=2, warmup_lr_init=1e-4)
    for epoch in range(4):
        train(optimizer, loss, 1)
        scheduler.step(epoch + 1)
    assert 0 < optimizer.param_groups[0]["lr"] < 1e-2


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "agcadahessian"])  # whose bare form cannot be copied
def test_a_copy_goes_on_as_the_original_does(name, copy_of):
    params, loss = target_problem()
    optimizer = create(name, params, clip_factor=0.05)
    train(optimizer, loss, 2)
    for p in params:
        p.grad = torch.ones_like(p)
    torch.manual_seed(0)
    params2, optimizer2 = copy_of((params, optimizer))
    assert type(optimizer2) is type(optimizer)
    for p in params2:
        p.grad = torch.ones_like(p)
    optimizer2.step()
    torch.manual_seed(0)
    optimizer.step()
    assert_identical(values(params2), values(params))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "agcadahessian"])
def test_a_closure_is_evaluated_with_gradients_and_clipped(name):
    results = []
    for with_closure in (False, True):
        params, loss = target_problem()
        optimizer = create(name, params)
        torch.manual_seed(0)

        def closure(optimizer=optimizer, loss=loss):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        for _ in range(3):
            if with_closure:
                assert torch.is_tensor(optimizer.step(closure))
            else:
                closure()
                optimizer.step()
        results.append(values(params))
    assert_identical(*results)


@pytest.mark.parametrize("name", ["agcadahessian", "lookahead_agcadahessian"])
def test_second_order_optimizers_say_so_and_take_a_closure(name):
    params, loss = target_problem()
    optimizer = create(name, params)
    assert optimizer.is_second_order

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward(create_graph=True)
        return value

    before = loss().item()
    for _ in range(5):
        optimizer.step(closure)
    assert loss().item() < before


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
    optimizer = optim.agc_class(Base)(params, lr=0.1)
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
    for cls, kwargs in ((base, {}), (optim.agc_class(base), {"clip_factor": math.inf})):
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


def test_a_bad_gradient_in_the_last_group_leaves_the_first_unclipped():
    good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 2))
    optimizer = optim.AgcSGD([{"params": [good], "clip_factor": 0.1}, {"params": [bad]}], lr=0.1)
    good.grad, bad.grad = torch.ones(3), torch.eye(3, 2).to_sparse()
    with pytest.raises(ValueError, match=r"parameter group 1, parameter 0 of shape \(3, 2\) has a sparse gradient"):
        optimizer.step()
    assert torch.equal(good.grad, torch.ones(3))
    assert torch.equal(good.detach(), torch.ones(3))


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scaler_unscales_before_the_clipping_and_skips_infinities(fused):
    results = []
    for scaling in (False, True):
        params, loss = target_problem()
        optimizer = optim.AgcSGD(params, lr=0.1, momentum=0.9, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaling)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(loss()).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(values(params))
    assert_identical(*results)
    params[0].grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert_identical(values(params), results[1])
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("name", ["lookahead_agcsgd", "Lookahead_AgcAdamW"])
def test_lookahead_takes_an_agc_form(name):
    params, loss = target_problem()
    optimizer = create(name, params, lr=0.1)
    assert isinstance(optimizer, timm.optim.Lookahead)
    assert isinstance(optimizer._base_optimizer, optim.AdaptiveClipping)
    before = loss().item()
    assert train(optimizer, loss, 8) < before
    state = optimizer.state_dict()
    params, _ = target_problem()
    resumed = create(name, params, lr=0.1, clip_factor=0.5)
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the message depends on what is installed")
@pytest.mark.parametrize("name", ELSEWHERE)
def test_forms_of_optimizers_from_elsewhere_resolve_and_fail_only_when_used(name):
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
    assert optim.AgcSGD.__mro__[2] is torch.optim.SGD
    assert optim.agc_class(SGD) is not optim.AgcSGD
    train(optimizer, loss, 1)
    assert type(pickle.loads(pickle.dumps(optimizer))) is type(optimizer)


def test_registering_again_is_silent_and_changes_nothing(caplog, capsys):
    methods = ("create_optimizer", "get_optimizer_info", "get_optimizer_class")
    originals = [getattr(default_registry, m)._timm_nf_original for m in methods]
    classes = [get_optimizer_class(name, bind_defaults=False) for name in NAMES]
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("error")
        optim.register()
    assert not caplog.records
    assert capsys.readouterr() == ("", "")
    assert [getattr(default_registry, m)._timm_nf_original for m in methods] == originals
    assert not any(hasattr(original, "_timm_nf_original") for original in originals)
    assert [get_optimizer_class(name, bind_defaults=False) for name in NAMES] == classes


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


def test_timms_clip_mode_uses_our_function():
    assert timm.utils.agc.adaptive_clip_grad is adaptive_clip_grad_
    assert timm.utils.adaptive_clip_grad is adaptive_clip_grad_
    gain = nn.Parameter(torch.ones(4, 1, 1, 1))
    gain.grad = torch.tensor([3.0, 0.0, 4.0, 0.0]).view(4, 1, 1, 1)
    timm.utils.dispatch_clip_grad([gain], 0.01, mode="agc")
    # one unit of weight norm 2 and gradient norm 5; timm's own function clips every entry to 0.01
    torch.testing.assert_close(gain.grad.flatten(), torch.tensor([0.012, 0.0, 0.016, 0.0]))
    timm.utils.dispatch_clip_grad([gain], 1.0, mode="value")


# A model given to the factory


class Wrapper(nn.Module):
    """What DistributedDataParallel looks like from outside."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def model_of(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def policy(model, optimizer):
    """(clip factor, weight decay) by parameter name."""
    of = {id(p): (g["clip_factor"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    return {name: of[id(p)] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("dm_nfnet_f0", {"head.fc.weight"}),
        ("nf_regnet_b0", {"head.fc.weight"}),
        ("resnet50", {"fc.weight"}),
        ("vit_tiny_patch16_224", {"head.weight"}),
        ("convnext_atto", {"head.fc.weight"}),
        ("deit_tiny_distilled_patch16_224", {"head.weight", "head_dist.weight"}),
        ("dla34", {"fc.weight"}),
    ],
)
@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper, lambda m: Wrapper(torch.compile(m, backend="eager"))])
def test_exactly_the_classifiers_weight_is_exempt_and_no_gain_decays(name, heads, wrap):
    model = model_of(name)
    optimizer = create_optimizer_v2(wrap(model), "agcsgd", lr=0.1, weight_decay=2e-5, clip_factor=0.02)
    listed = getattr(model, "no_weight_decay", set)()
    shapes = dict(model.named_parameters())
    for parameter, (clip_factor, decay) in policy(model, optimizer).items():
        assert clip_factor == (None if parameter in heads else 0.02), parameter
        last = parameter.rpartition(".")[2]
        spared = shapes[parameter].ndim <= 1 or last in ("gain", "skipinit_gain", "bias") or parameter in listed
        assert decay == (0 if spared else 2e-5), parameter


@pytest.mark.parametrize("name", ["resnet50", "dm_nfnet_f0"])
def test_a_model_without_classes_has_nothing_exempt(name):
    model = model_of(name, num_classes=0)
    clip_factors = {c for c, _ in policy(model, create_optimizer_v2(model, "agcsgd", lr=0.1)).values()}
    assert clip_factors == {0.01}


@pytest.mark.parametrize("kind", ["feature", "logit"])
def test_distillation_keeps_its_own_parameters_and_exempts_the_students_classifier(kind):
    model, teacher = (timm.create_model("test_resnet", num_classes=5) for _ in range(2))
    kwargs = {"criterion": nn.CrossEntropyLoss(), "verbose": False, "distill_loss_weight": 1.0}
    if kind == "logit":
        task = timm.task.LogitDistillationTask(model, teacher, **kwargs)
    else:
        task = timm.task.FeatureDistillationTask(model, teacher, student_feature_dim=4, **kwargs)
    for given in (task.get_trainable_module(), Wrapper(task.get_trainable_module()), task):
        optimizer = create_optimizer_v2(given, "agcsgd", lr=0.1, weight_decay=1e-4)
        by_name = policy(given, optimizer)
        head = {name for name, p in given.named_parameters() if p is model.fc.weight}
        assert {name for name, (clip_factor, _) in by_name.items() if clip_factor is None} == head
        assert len(by_name) == len([p for p in given.parameters() if p.requires_grad])


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper])
def test_layer_decay_is_timms_with_the_head_split_off(wrap):
    model = model_of("vit_tiny_patch16_224")
    kwargs = {"lr": 0.1, "weight_decay": 0.05, "layer_decay": 0.7, "layer_decay_min_scale": 0.01}
    bare = create_optimizer_v2(model, "sgd", **kwargs)
    ours = create_optimizer_v2(wrap(model), "agcsgd", **kwargs)
    keys = ("lr_scale", "weight_decay")
    expected = {id(p): [g[k] for k in keys] for g in bare.param_groups for p in g["params"]}
    assert {id(p): [g[k] for k in keys] for g in ours.param_groups for p in g["params"]} == expected
    (head,) = [g for g in ours.param_groups if g["clip_factor"] is None]
    assert [id(p) for p in head["params"]] == [id(model.head.weight)]


def test_fallback_lists_reach_the_optimizer():
    model = timm.create_model("test_vit", num_classes=5)
    ours = create_optimizer_v2(model, "agcmuon", lr=0.1, weight_decay=0.05, fallback_list=["head.*"])
    (head,) = [g for g in ours.param_groups if g["clip_factor"] is None]
    assert head["use_fallback"] is True


def test_groups_of_the_callers_own_function_are_split_and_keep_their_keys():
    model, given = model_of("resnet50"), []

    def param_group_fn(received):
        given.append(received)
        stem = {"params": received.conv1.parameters(), "lr_scale": 0.1}
        rest = [(n, p) for n, p in received.named_parameters() if not n.startswith("conv1")]
        return [{"params": [("conv1.weight", next(stem["params"]))], "lr_scale": 0.1}, {"params": rest, "lr": 0.5}]

    optimizer = create_optimizer_v2(model, "agcsgd", lr=0.1, weight_decay=0.3, param_group_fn=param_group_fn)
    assert given == [model]
    stem, rest, head = optimizer.param_groups
    assert (stem["lr_scale"], rest["lr"], head["lr"]) == (0.1, 0.5, 0.5)
    assert head["param_names"] == ["fc.weight"]
    assert head["clip_factor"] is None
    assert "fc.weight" not in rest["param_names"]
    assert all(g["weight_decay"] == 0.3 for g in optimizer.param_groups)


@pytest.mark.parametrize("form", ["list", "generator", "one tensor", "names beside"])
def test_every_form_of_parameters_from_the_callers_function_works(form):
    model = nn.Linear(3, 2)
    model.get_classifier = lambda: model
    weight, bias = model.weight, model.bias
    forms = {
        "list": lambda m: [weight, bias],
        "generator": lambda m: m.parameters(),
        "one tensor": lambda m: [{"params": weight}, {"params": bias}],
        "names beside": lambda m: [{"params": [weight, bias], "param_names": ["w", "b"]}],
    }
    optimizer = create_optimizer_v2(model, "agcsgd", lr=0.1, param_group_fn=forms[form])
    assert sorted(str(g["clip_factor"]) for g in optimizer.param_groups) == ["0.01", "None"]
    if form == "names beside":
        assert [g["param_names"] for g in optimizer.param_groups] == [["b"], ["w"]]


def test_the_groups_of_param_groups_agc_pass_through():
    model = model_of("dm_nfnet_f0")
    optimizer = create_optimizer_v2(model, "agcsgd", lr=0.1, param_group_fn=agc.param_groups_agc)
    assert [g["clip_factor"] for g in optimizer.param_groups] == [0.01, 0.01, None]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 2e-5, 2e-5]


def test_with_plain_parameters_nothing_is_exempt():
    model = timm.create_model("test_resnet")
    optimizer = create_optimizer_v2(model.parameters(), "agcsgd", lr=0.1)
    assert [g["clip_factor"] for g in optimizer.param_groups] == [0.01]


def test_other_names_go_straight_through():
    model = timm.create_model("test_resnet")
    for name in ("sgd", "lookahead_adamw"):
        optimizer = create_optimizer_v2(model, name, lr=0.1, weight_decay=0.1)
        assert len(optimizer.param_groups) == 2
        assert not any(key.startswith("clip_") for group in optimizer.param_groups for key in group)


def fake_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper])
@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.9}])
@pytest.mark.parametrize("name", ["test_resnet", "test_nfnet", "test_vit"])
def test_the_bare_checkpoint_of_a_model_resumes_with_the_states_in_place(name, options, wrap):
    model = timm.create_model(name, num_classes=5)
    given = model if "layer_decay" in options else wrap(model)
    kwargs = {"lr": 0.1, "weight_decay": 1e-3, **options}
    bare = create_optimizer_v2(given, "sgd", **kwargs)
    for step in range(2):
        fake_gradients(model, step)
        bare.step()
    bare.param_groups[0]["lr"] = bare.param_groups[1]["lr"] = 0.05
    momentum = {p: bare.state[p]["momentum_buffer"] for p in model.parameters()}
    checkpoint = copy.deepcopy(bare.state_dict())
    ours = create_optimizer_v2(given, "agcsgd", clip_factor=0.5, **kwargs)
    expected = [(g["clip_factor"], g["weight_decay"]) for g in ours.param_groups]
    for optimizer in (ours, pickle.loads(pickle.dumps(ours))):
        saved = copy.deepcopy(checkpoint)
        optimizer.load_state_dict(saved)
        assert str(saved) == str(checkpoint)
        assert [(g["clip_factor"], g["weight_decay"]) for g in optimizer.param_groups] == expected
        assert optimizer.param_groups[0]["lr"] == 0.05
    for p, buffer in momentum.items():
        assert torch.equal(ours.state[p]["momentum_buffer"], buffer)
    ours.step()


def test_a_group_added_later_is_part_of_the_bare_checkpoint_too():
    model, late = timm.create_model("test_resnet", num_classes=5), nn.Parameter(torch.ones(3))
    bare, ours = (create_optimizer_v2(model, name, lr=0.1, weight_decay=1e-3) for name in ("sgd", "agcsgd"))
    for optimizer in (bare, ours):
        optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(3)
    fake_gradients(model, 0)
    bare.step()
    ours.load_state_dict(bare.state_dict())
    assert torch.equal(ours.state[late]["momentum_buffer"], bare.state[late]["momentum_buffer"])


def test_a_checkpoint_that_fits_neither_layout_gets_torchs_error():
    model = timm.create_model("test_resnet", num_classes=5)
    ours = create_optimizer_v2(model, "agcsgd", lr=0.1, weight_decay=1e-3)
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        ours.load_state_dict(other.state_dict())
