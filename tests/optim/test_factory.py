import copy
import pickle

import pytest
import timm
import timm.optim
import timm.task
import timm.utils
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from timm_nf.optim.groups import param_groups_agc

pytestmark = pytest.mark.filterwarnings("ignore:these parameters come without", "ignore:no classifier was found")


def values(params):
    return [p.detach().clone() for p in params]


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
    optimizer = create_optimizer_v2(model, "agcsgd", lr=0.1, param_group_fn=param_groups_agc)
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
