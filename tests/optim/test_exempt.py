"""`timm_nf.optim.exempt`: the classifier where people put the network, what callers name, and what comes later."""

import copy
import functools
import math
import pickle
import warnings

import pytest
import timm
import torch
from timm.optim import Lookahead, create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from tests.support.small_problems import target_problem, train
from timm_nf import optim
from timm_nf.optim.exempt import classifier_weights
from timm_nf.optim.groups import param_groups_agc

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.(weight|spectral)_norm.*:FutureWarning")


def network(**kwargs):
    return timm.create_model("test_resnet", **{"num_classes": 5, **kwargs})


class Holder(nn.Module):
    """A LightningModule, transformers' TimmWrapper or any other module that holds networks."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


class Forwarding(nn.Module):
    """Has all attributes of the network inside, as PEFT's models do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class Asking(nn.Module):
    """Asks the network inside for its classifier."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def get_classifier(self):
        return self.inner.get_classifier()


def exempt_names(model, groups):
    ids = {id(p) for group in groups for p in group["params"] if group.get("clip_factor", 1) is None}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def exempt_by_both(model, **options):
    """Names of the exempt parameters, from timm's factory and from `param_groups_agc`, which must agree."""
    optimizer = create_optimizer_v2(model, "agcsgd", lr=0.1, **options)
    ours = exempt_names(model, optimizer.param_groups)
    assert exempt_names(model, param_groups_agc(model, **options)) == ours
    return ours


def frozen(model):
    return model.requires_grad_(False)


# Where people put the network

PLACES = {
    "self.net": (lambda: Holder(net=network()), {"net.fc.weight"}),
    "self.backbone": (lambda: Holder(backbone=network(), scale=nn.Linear(3, 3)), {"backbone.fc.weight"}),
    "a sequence": (lambda: nn.Sequential(nn.Identity(), network()), {"1.fc.weight"}),
    "transformers": (lambda: Holder(timm_model=network()), {"timm_model.fc.weight"}),
    "two deep": (lambda: Holder(task=Holder(net=network())), {"task.net.fc.weight"}),
    "distributed inside": (lambda: Holder(net=Holder(module=network())), {"net.module.fc.weight"}),
    "compiled inside": (
        lambda: Holder(net=torch.compile(network(), backend="eager")),
        {"net._orig_mod.fc.weight"},
    ),
    "a frozen teacher": (lambda: Holder(net=network(), teacher=frozen(network())), {"net.fc.weight"}),
    "an average beside": (
        lambda: (lambda net: Holder(net=net, ema=ModelEmaV3(net)))(network()),
        {"net.fc.weight"},
    ),
    "the same twice": (lambda: (lambda net: Holder(net=net, again=net))(network()), {"net.fc.weight"}),
    "both the compiled and the bare one": (
        lambda: (lambda net: Holder(net=net, fast=torch.compile(net, backend="eager")))(network()),
        {"net.fc.weight"},
    ),
    "a tuple of heads": (
        lambda: Holder(net=timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, depth=1, embed_dim=48)),
        {"net.head.weight", "net.head_dist.weight"},
    ),
    "module beside": (lambda: Holder(module=nn.Linear(2, 2), net=network()), {"net.fc.weight"}),
    "a module that forwards attributes": (lambda: Holder(net=Forwarding(network())), {"net.inner.fc.weight"}),
    "a module that asks the network": (lambda: Asking(network()), {"inner.fc.weight"}),
}


@pytest.mark.parametrize("place", PLACES)
def test_one_classifier_is_exempt_wherever_it_is(place):
    build, expected = PLACES[place]
    model = build()
    assert exempt_by_both(model) == expected
    weights = {id(p) for p in classifier_weights(model)}
    assert {name for name, p in model.named_parameters() if id(p) in weights} == expected


def test_what_the_network_lists_does_not_decay_inside_a_holder():
    model = Holder(net=timm.create_model("test_vit", num_classes=5), extra=nn.Linear(2, 2))
    undecayed = param_groups_agc(model, 0.1)[0]
    assert undecayed["weight_decay"] == 0
    assert any(p is model.net.pos_embed for p in undecayed["params"])


class Listing(Asking):
    def __init__(self, inner):
        super().__init__(inner)
        self.token = nn.Parameter(torch.ones(3, 3))

    def no_weight_decay(self):
        return {"token"}


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        (Forwarding, {"inner.pos_embed", "inner.cls_token"}),
        (Asking, {"inner.pos_embed", "inner.cls_token"}),
        (Listing, {"token", "inner.pos_embed", "inner.cls_token"}),
        (lambda net: Holder(task=Listing(net)), {"task.token", "task.inner.pos_embed", "task.inner.cls_token"}),
    ],
    ids=range(4),
)
def test_what_the_network_and_the_modules_around_it_list_does_not_decay(wrap, expected):
    model = wrap(timm.create_model("test_vit", num_classes=5))
    optimizer = create_optimizer_v2(model, "agcsgd", lr=0.1, weight_decay=0.1)
    for groups in (optimizer.param_groups, param_groups_agc(model, 0.1)):
        undecayed = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
        assert {name for name, p in model.named_parameters() if id(p) in undecayed and p.ndim > 1} == expected


def test_several_classifiers_are_named_in_a_warning_and_none_is_exempt():
    model = Holder(a=network(), b=network())
    message = (
        r"Holder has 2 classifiers \(a.fc.weight, b.fc.weight\), and none is exempt.*clip_exempt=.*clip_factor=None"
    )
    with pytest.warns(UserWarning, match=message):
        optimizer = create_optimizer_v2(model, "agcsgd", lr=0.1)
    assert exempt_names(model, optimizer.param_groups) == set()
    with pytest.warns(UserWarning, match=message):
        param_groups_agc(model)


def test_only_the_parameters_given_count():
    model = Holder(a=network(), b=network())
    optimizer = create_optimizer_v2(model, "agcsgd", lr=0.1, param_group_fn=lambda m: list(m.b.parameters()))
    assert exempt_names(model, optimizer.param_groups) == {"b.fc.weight"}


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (lambda: nn.Linear(2, 2), ""),
        (lambda: Holder(encoder=network(num_classes=0)), "encoder"),
        (lambda: Holder(module=network(num_classes=0), head=nn.Linear(2, 2)), "module"),  # as wrappers call it
    ],
)
def test_no_classifier_is_a_warning_that_names_what_was_found(build, found):
    model = build()
    inside = rf"; {found} \(ResNet\) has none" if found else ""
    with pytest.warns(
        UserWarning, match=f"no classifier was found in {type(model).__name__}{inside}, so that all"
    ) as seen:
        optimizer = create_optimizer_v2(model, "agcsgd", lr=0.1)
    assert [w.filename for w in seen if "no classifier" in str(w.message)] == [__file__]
    assert exempt_names(model, optimizer.param_groups) == set()


def test_a_network_that_says_it_has_no_classes_needs_no_warning():
    assert exempt_by_both(network(num_classes=0)) == set()
    assert exempt_by_both(Holder(module=network(num_classes=0))) == set()


def test_somebody_elses_method_of_that_name_is_no_classifier():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def get_classifier(self, name):
            raise AssertionError(name)

    assert exempt_by_both(Holder(net=network(), other=Other())) == {"net.fc.weight"}


NORMED = {
    "weight_norm": (weight_norm, {"fc.weight_g", "fc.weight_v"}),
    "spectral_norm": (spectral_norm, {"fc.weight_orig"}),
    "parametrized weight_norm": (
        parametrizations.weight_norm,
        {"fc.parametrizations.weight.original0", "fc.parametrizations.weight.original1"},
    ),
    "parametrized spectral_norm": (parametrizations.spectral_norm, {"fc.parametrizations.weight.original"}),
}


@pytest.mark.parametrize("norm", NORMED)
def test_what_is_behind_a_normed_classifiers_weight_is_exempt_and_its_bias_is_not(norm):
    apply, expected = NORMED[norm]
    model = network()
    apply(model.fc)
    assert exempt_by_both(model) == expected


@pytest.mark.parametrize("apply", [weight_norm, parametrizations.weight_norm])
def test_a_norm_of_the_whole_weight_goes_with_it_by_model_by_module_and_by_name(apply):
    model = network()
    apply(model.fc, dim=None)  # weight_g is a single number
    expected = {name for name, _ in model.named_parameters() if name.startswith("fc.") and name != "fc.bias"}
    assert len(expected) == 2
    assert exempt_by_both(model) == expected
    for clip_exempt in ("fc", model.fc):
        optimizer = optim.AgcSGD(model.named_parameters(), lr=0.1, clip_exempt=clip_exempt)
        assert exempt_names(model, optimizer.param_groups) == expected


class Prototypes(nn.Module):
    """A classifier whose weight has another name than torch's."""

    def __init__(self):
        super().__init__()
        self.prototypes, self.gain, self.bias = (nn.Parameter(torch.ones(shape)) for shape in [(5, 4), (5, 1), (5,)])


class Pooled(nn.Module):
    """A network whose head has weights of several names."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.ModuleDict({"pool": nn.MultiheadAttention(4, 2), "last": Prototypes()})

    def get_classifier(self):
        return self.head


WEIGHTS = {"pool.in_proj_weight", "pool.out_proj.weight", "last.prototypes"}


def test_weights_of_a_classifier_are_exempt_whatever_their_names():
    assert exempt_by_both(Pooled()) == {f"head.{name}" for name in WEIGHTS}
    assert exempt_by_both(Holder(a=nn.Linear(2, 2), b=Pooled().head), clip_exempt="b") == {f"b.{n}" for n in WEIGHTS}
    model = Pooled()
    optimizer = optim.AgcSGD(model.named_parameters(), lr=0.1, clip_exempt="head")
    assert exempt_names(model, optimizer.param_groups) == {f"head.{name}" for name in WEIGHTS}


class Answering(nn.Module):
    """Answers the question for its classifier in whichever way."""

    def __init__(self, answer):
        super().__init__()
        self.body, self.one, self.two = (nn.Linear(4, 4) for _ in range(3))
        self.table = nn.Parameter(torch.ones(4, 3))
        self.answer = answer

    def get_classifier(self):
        return self.answer(self)


ANSWERS = {
    "a dict": (lambda m: {"a": m.one, "b": m.two}, {"one.weight", "two.weight"}),
    "nested": (lambda m: ((m.one, None), [m.two]), {"one.weight", "two.weight"}),
    "a parameter": (lambda m: m.table, {"table"}),
    "none": (lambda m: None, set()),
    "an identity": (lambda m: nn.Identity(), set()),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_every_form_of_a_classifier_is_understood_without_a_warning(answer):
    answered, expected = ANSWERS[answer]
    assert exempt_by_both(Answering(answered)) == expected


@pytest.mark.parametrize(
    "answer", [lambda m: "one", lambda m: abs, lambda m: m.deleted], ids=["text", "a function", "deleted"]
)
def test_an_answer_that_is_no_classifier_is_a_warning_and_no_error(answer):
    with pytest.warns(UserWarning, match="no classifier was found in Answering, so that all weights are clipped"):
        optimizer = create_optimizer_v2(Answering(answer), "agcsgd", lr=0.1)
    assert all(group["clip_factor"] is not None for group in optimizer.param_groups)
    assert exempt_by_both(Holder(net=network(), other=Answering(answer))) == {"net.fc.weight"}


# What the caller names


class Segmenter(nn.Module):
    """An encoder without classes and two heads."""

    def __init__(self):
        super().__init__()
        self.encoder = network(num_classes=0)
        self.segmentation_head = nn.Sequential(nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1))
        self.boxes = nn.Linear(8, 4)


@pytest.mark.parametrize(
    ("clip_exempt", "expected"),
    [
        ("segmentation_head", {"segmentation_head.0.weight", "segmentation_head.2.weight"}),
        (("segmentation_head.2", "boxes"), {"segmentation_head.2.weight", "boxes.weight"}),
        ("segmentation_head.2, boxes", {"segmentation_head.2.weight", "boxes.weight"}),
        ("boxes.bias", {"boxes.bias"}),
        (lambda m: m.boxes, {"boxes.weight"}),
        (lambda m: [m.boxes, m.segmentation_head[2]], {"segmentation_head.2.weight", "boxes.weight"}),
        (lambda m: [m.boxes.weight], {"boxes.weight"}),
        ((), set()),
        ("", set()),
    ],
    ids=range(9),
)
def test_named_modules_and_parameters_are_exempt(clip_exempt, expected):
    model = Segmenter()
    wanted = clip_exempt(model) if callable(clip_exempt) else clip_exempt
    assert exempt_by_both(model, clip_exempt=wanted) == expected


def test_named_modules_are_exempt_beside_the_classifier_and_an_empty_list_is_none_at_all():
    model = Holder(net=network(), extra=nn.Linear(2, 2))
    assert exempt_by_both(model, clip_exempt="extra") == {"net.fc.weight", "extra.weight"}
    assert exempt_by_both(model, clip_exempt=()) == set()
    assert exempt_by_both(network(), clip_exempt=()) == set()


def test_names_may_leave_out_what_a_wrapper_puts_in_front():
    compiled = torch.compile(Segmenter(), backend="eager")
    assert exempt_by_both(compiled, clip_exempt="boxes") == {"_orig_mod.boxes.weight"}
    assert exempt_by_both(compiled, clip_exempt="_orig_mod.boxes") == {"_orig_mod.boxes.weight"}


@pytest.mark.parametrize(
    ("clip_exempt", "problem"),
    [
        (
            "segmentation_haed",
            "names 'segmentation_haed', which is not in Segmenter; similar names are segmentation_head",
        ),
        ("boxes,nothing", "names 'nothing', which is not in Segmenter"),
        ("segmentation_head.1", "names 'segmentation_head.1', which has no weight with at least two axes"),
        (nn.Linear(2, 2), "holds a Linear, which is not in Segmenter"),
        (nn.Parameter(torch.ones(2)), r"holds a Parameter of shape \(2,\), which is not in Segmenter"),
        ((3,), "takes modules, parameters and names, got 3"),
        (3, "takes modules, parameters and names, got 3"),
    ],
    ids=range(7),
)
def test_what_is_not_there_is_refused_by_name(clip_exempt, problem):
    for use in (param_groups_agc, functools.partial(create_optimizer_v2, opt="agcsgd", lr=0.1)):
        with pytest.raises(ValueError, match=f"^clip_exempt {problem}"):
            use(Segmenter(), clip_exempt=clip_exempt)


def test_none_is_exempt_also_through_groups_of_the_caller():
    model = network()
    optimizer = create_optimizer_v2(
        model, "agcsgd", lr=0.1, param_group_fn=functools.partial(param_groups_agc, clip_exempt=())
    )
    assert exempt_names(model, optimizer.param_groups) == set()


# Parameters without their model


def in_a_group(model):
    return [{"params": list(model.parameters())}]


@pytest.mark.parametrize("form", [lambda m: m.parameters(), lambda m: list(m.named_parameters()), in_a_group])
@pytest.mark.parametrize("build", ["class", "factory", "lookahead"])
def test_parameters_without_a_word_on_clipping_are_a_warning_at_the_callers_line(form, build):
    builds = {
        "class": lambda params: optim.AgcSGD(params, lr=0.1),
        "factory": lambda params: create_optimizer_v2(params, "agcsgd", lr=0.1),
        "lookahead": lambda params: create_optimizer_v2(params, "lookahead_agcsgd", lr=0.1),
    }
    with pytest.warns(UserWarning, match="these parameters come without their model.*clip_exempt") as seen:
        builds[build](form(network()))
    assert [w.filename for w in seen if "come without" in str(w.message)] == [__file__]


@pytest.mark.parametrize("clip_factor", [None, math.inf, "inf"])
def test_nothing_is_said_where_nothing_is_clipped(clip_factor):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optim.AgcSGD(network().parameters(), lr=0.1, clip_factor=clip_factor)
        for given in (network().parameters(), nn.Linear(2, 2)):
            create_optimizer_v2(given, "agcsgd", lr=0.1, clip_factor=clip_factor)


def test_a_word_on_clipping_is_enough():
    model = network()
    for params, options in (
        (model.parameters(), {"clip_exempt": ()}),
        ([{"params": [model.fc.weight], "clip_factor": None}, {"params": [model.fc.bias]}], {}),
        (param_groups_agc(model), {}),
        (param_groups_agc(model, clip_exempt=()), {}),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = optim.AgcSGD(params, lr=0.1, **options)
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
            optimizer.load_state_dict(optimizer.state_dict())
            copy.deepcopy(optimizer)
            pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("named", [False, True])
def test_plain_parameters_are_exempt_by_module_and_by_name(named):
    model = network()
    params = model.named_parameters() if named else model.parameters()
    optimizer = optim.AgcSGD(params, lr=0.1, clip_exempt="fc" if named else model.fc)
    assert exempt_names(model, optimizer.param_groups) == {"fc.weight"}
    bare = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    bare.step()
    optimizer.load_state_dict(bare.state_dict())  # one group there, two here
    assert {g["lr"] for g in optimizer.param_groups} == {0.3}
    for p in model.parameters():
        assert torch.equal(optimizer.state[p]["momentum_buffer"], bare.state[p]["momentum_buffer"])


@pytest.mark.parametrize(
    ("clip_exempt", "problem"),
    [("head", "names 'head', which is not among"), (nn.Linear(2, 2), "holds a Linear, which has no weight among")],
    ids=str,
)
def test_plain_parameters_that_are_not_there_are_refused_by_name(clip_exempt, problem):
    with pytest.raises(ValueError, match=f"clip_exempt {problem}"):
        optim.AgcSGD(network().named_parameters(), lr=0.1, clip_exempt=clip_exempt)
    if isinstance(clip_exempt, str):
        with pytest.raises(ValueError, match=r"have no names, so give modules or named_parameters\(\)"):
            optim.AgcSGD(network().parameters(), lr=0.1, clip_exempt=clip_exempt)


# What comes later


def clipped_names(model, optimizer):
    """Who is clipped in a step with gradients that all exceed their limit."""
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e3)
    optimizer.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p.grad, torch.full_like(p, 1e3))}


def all_but(model, *exempt):
    return {name for name, _ in model.named_parameters()} - set(exempt)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m,
        lambda m: Holder(net=m),
        lambda m: Holder(module=m),
        Forwarding,
        Asking,
        lambda m: Holder(net=Asking(m)),
    ],
)
def test_a_new_head_is_recognised_when_its_group_is_added(wrap):
    model = network()
    optimizer = create_optimizer_v2(wrap(model), "agcsgd", lr=0.0)  # a wrapper that is gone by now
    groups = len(optimizer.param_groups)
    model.reset_classifier(7)
    optimizer.add_param_group({"params": list(model.get_classifier().parameters())})
    assert len(optimizer.param_groups) == groups + 1
    assert clipped_names(model, optimizer) == all_but(model, "fc.weight")
    for copy_of in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        twin, copied = copy_of((model, optimizer))
        assert clipped_names(twin, copied) == all_but(twin, "fc.weight")


def test_a_head_that_is_unfrozen_later_is_recognised():
    model = Holder(net=network())
    model.net.fc.requires_grad_(False)
    optimizer = create_optimizer_v2(model, "agcsgd", lr=0.0)
    model.net.fc.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.net.fc.parameters())})
    assert clipped_names(model, optimizer) == all_but(model, "net.fc.weight")


def test_a_group_that_states_a_clip_factor_has_the_last_word():
    model = network()
    optimizer = create_optimizer_v2(model, "agcsgd", lr=0.0)
    model.reset_classifier(7)
    optimizer.add_param_group({"params": list(model.fc.parameters()), "clip_factor": 0.5})
    assert clipped_names(model, optimizer) == all_but(model)


def test_a_factor_set_by_hand_for_the_classifiers_group_is_used():
    model = network()
    optimizer = create_optimizer_v2(model, "agcsgd", lr=0.0)
    (head,) = [g for g in optimizer.param_groups if g["clip_factor"] is None]
    head["clip_factor"] = 0.02
    assert clipped_names(model, optimizer) == all_but(model)


@pytest.mark.parametrize("restart", [False, True])
def test_unfreezing_the_backbone_as_lightning_does_gives_the_policy_of_one_go(restart):
    model = Holder(net=network())
    backbone = [p for name, p in model.named_parameters() if not name.startswith("net.fc")]
    for p in backbone:
        p.requires_grad_(False)
    optimizer = create_optimizer_v2(model, "agcsgd", lr=0.0)
    if restart:  # Lightning puts the groups of the interrupted run in place of those that it has just made
        saved = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        late = {k: v for k, v in saved[0].items() if not k.startswith("clip_")}
        late |= {"clip_factor": 0.01, "clip_eps": 1e-3, "clip_axis": 0}
        groups = [g | {"params": o["params"]} for g, o in zip(saved, optimizer.param_groups, strict=True)]
        optimizer.param_groups = [*groups, late | {"params": backbone}]
    else:
        optimizer.add_param_group({"params": backbone})
    for p in backbone:
        p.requires_grad_(True)
    assert clipped_names(model, optimizer) == all_but(model, "net.fc.weight")


def test_the_networks_are_not_kept_alive():
    model = Segmenter()
    optimizer = create_optimizer_v2(model, "agcsgd", lr=0.1, clip_exempt="boxes")
    sources = [reference for reference, _ in optimizer._exemption._sources]
    assert [reference() is not None for reference in sources] == [True] * 2
    del model
    assert [reference() for reference in sources] == [None] * 2


# Lookahead


def test_lookahead_by_hand_has_the_statistics_of_the_optimizer_inside():
    params, loss = target_problem()
    lookahead = Lookahead(optim.AgcSGD(params, lr=0.1, clip_exempt=()))
    train(lookahead, loss, 1)
    assert lookahead.clip_stats()[0]["units"] == 9
    assert not hasattr(Lookahead(torch.optim.SGD(params, lr=0.1)), "clip_stats")
