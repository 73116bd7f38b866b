import pytest
import timm
import timm.task
import torch
from timm.utils import ModelEmaV3
from torch import nn

from timm_nf.optim.exempt import classifier_weights
from timm_nf.optim.groups import param_groups_agc

# Who is clipped and who decays


def names_of(model, wanted):
    ids = {id(p) for p in wanted}
    return {name for name, p in model.named_parameters() if id(p) in ids}


class Wrapper(nn.Module):
    """What DistributedDataParallel and its like look like from outside."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def small_model(**kwargs):
    return timm.create_model("test_resnet", num_classes=5, **kwargs)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50", {"fc.weight"}),
        ("vit_tiny_patch16_224", {"head.weight"}),
        ("convnext_atto", {"head.fc.weight"}),
        ("dm_nfnet_f0", {"head.fc.weight"}),
        ("deit_tiny_distilled_patch16_224", {"head.weight", "head_dist.weight"}),
        ("dla34", {"fc.weight"}),  # a convolution
        ("crossvit_tiny_240", {"head.0.weight", "head.1.weight"}),  # a list
        ("levit_128s", {"head.linear.weight", "head_dist.linear.weight"}),  # norm and linear layer
        ("caformer_s18", {"head.fc.fc2.weight"}),  # a hidden layer inside the head
    ],
)
def test_the_classifier_is_found_through_the_model(name, expected):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert names_of(model, classifier_weights(model)) == expected


@pytest.mark.parametrize("name", ["resnet50", "vit_tiny_patch16_224", "dla34", "deit_tiny_distilled_patch16_224"])
def test_without_classes_nothing_is_exempt(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    assert classifier_weights(model) == []


def test_models_without_get_classifier_are_asked_for_their_configured_name():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert classifier_weights(model) == []
    model.pretrained_cfg = {"classifier": "1"}
    assert names_of(model, classifier_weights(model)) == {"1.weight"}
    model.pretrained_cfg = {"classifier": ("0", "7")}
    assert names_of(model, classifier_weights(model)) == {"0.weight"}


WRAPPERS = {
    "plain": lambda model: model,
    "distributed": Wrapper,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "distributed and compiled": lambda model: Wrapper(torch.compile(model, backend="eager")),
    "compiled and distributed": lambda model: torch.compile(Wrapper(model), backend="eager"),
}


def tasks(model):
    teacher = small_model()
    kwargs = {"criterion": nn.CrossEntropyLoss(), "verbose": False}
    feature = timm.task.FeatureDistillationTask(model, teacher, distill_loss_weight=1.0, **kwargs)
    return {
        "task": timm.task.ClassificationTask(model, **kwargs),
        "logit distillation": timm.task.LogitDistillationTask(model, teacher, **kwargs),
        "feature distillation": feature,
        "what train.py optimizes": feature.get_trainable_module(),
        "the same, distributed": Wrapper(feature.get_trainable_module()),
    }


def assert_the_classifier_is_found(wrapped, model):
    assert names_of(model, classifier_weights(wrapped)) == {"fc.weight"}
    (exempt,) = [g for g in param_groups_agc(wrapped) if "clip_factor" in g]
    assert [id(p) for p in exempt["params"]] == [id(model.fc.weight)]


@pytest.mark.parametrize("wrapping", WRAPPERS)
def test_the_classifier_is_found_inside_every_wrapper(wrapping):
    model = small_model()
    assert_the_classifier_is_found(WRAPPERS[wrapping](model), model)


@pytest.mark.parametrize(
    "name",
    ["task", "logit distillation", "feature distillation", "what train.py optimizes", "the same, distributed"],
)
def test_the_classifier_is_found_inside_every_task(name):
    model = small_model()
    assert_the_classifier_is_found(tasks(model)[name], model)


def test_the_classifier_is_found_inside_an_average_of_the_weights():
    ema = ModelEmaV3(small_model())
    assert names_of(ema.module, classifier_weights(ema)) == {"fc.weight"}


def test_a_model_with_a_submodule_called_module_is_no_wrapper():
    model = small_model()
    model.module = nn.Linear(2, 2)
    assert names_of(model, classifier_weights(model)) == {"fc.weight"}


def test_groups_follow_the_paper_for_a_normalizer_free_network():
    with torch.device("meta"):
        model = timm.create_model("dm_nfnet_f0")
    undecayed, decayed, head = param_groups_agc(model)
    last = {name.rpartition(".")[2] for name in names_of(model, undecayed["params"])}
    assert last == {"gain", "skipinit_gain", "bias"}
    assert {name.rpartition(".")[2] for name in names_of(model, decayed["params"])} == {"weight"}
    assert names_of(model, head["params"]) == {"head.fc.weight"}
    assert [g["weight_decay"] for g in (undecayed, decayed, head)] == [0.0, 2e-5, 2e-5]
    assert "clip_factor" not in undecayed
    assert "clip_factor" not in decayed
    assert head["clip_factor"] is None
    assert sum(len(g["params"]) for g in (undecayed, decayed, head)) == 233


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper, lambda m: torch.compile(m, backend="eager")])
def test_what_the_model_lists_does_not_decay(wrap):
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224")
    undecayed = param_groups_agc(wrap(model), weight_decay=0.1)[0]
    assert {"pos_embed", "cls_token"} <= names_of(model, undecayed["params"])


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = small_model()
    model.requires_grad_(False)
    assert param_groups_agc(model) == []
    model.fc.requires_grad_(True)
    bias, weight = param_groups_agc(model)
    assert names_of(model, bias["params"]) == {"fc.bias"}
    assert names_of(model, weight["params"]) == {"fc.weight"}
