"""What `agc` optimizers and timm's clip mode refuse: by name, before the first write."""

import copy
import functools
import inspect
import pickle
import re

import pytest
import timm.optim
import timm.utils
import torch
from torch import nn

from timm_nf import optim
from timm_nf.optim import factory
from timm_nf.optim.optimizer import agc_class

# Gradients


def test_a_bad_gradient_in_the_last_group_leaves_the_first_unclipped():
    good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 2))
    optimizer = optim.AgcSGD([{"params": [good], "clip_factor": 0.1}, {"params": [bad]}], lr=0.1)
    good.grad, bad.grad = torch.ones(3), torch.eye(3, 2).to_sparse()
    with pytest.raises(
        ValueError, match=r"parameter group 1, parameter 0 of shape \(3, 2\) has a gradient of layout torch.sparse"
    ):
        optimizer.step()
    assert torch.equal(good.grad, torch.ones(3))
    assert torch.equal(good.detach(), torch.ones(3))


class OneBadGradient(nn.Module):
    """Its second parameter has a sparse gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.first.weight.grad = torch.ones(2, 2)
        self.second.weight.grad = torch.eye(2).to_sparse()


@pytest.mark.parametrize(
    "create_it",
    [
        lambda model: timm.optim.create_optimizer_v2(model, "agcsgd", lr=0.1),
        lambda model: optim.AgcSGD(model.named_parameters(), lr=0.1),
    ],
    ids=["timm's factory", "named parameters"],
)
def test_a_bad_gradient_is_refused_by_the_parameters_name_before_anything_is_written(create_it):
    model = OneBadGradient()
    with pytest.raises(
        ValueError, match=r"^parameter group 0, parameter 1 second\.weight of shape \(2, 2\) has a gradient of layout"
    ):
        create_it(model).step()
    assert torch.equal(model.first.weight.grad, torch.ones(2, 2))


@pytest.mark.parametrize("copy_it", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_name_the_parameter_too_and_hold_no_others(copy_it):
    model = OneBadGradient()
    model.first.requires_grad_(False)
    model, optimizer = copy_it((model, timm.optim.create_optimizer_v2(model, "agcsgd", lr=0.1)))
    model.second.weight.grad = torch.eye(2).to_sparse()
    with pytest.raises(ValueError, match=r"^parameter group 0, parameter 0 second\.weight of shape"):
        optimizer.step()
    assert [name for _, name in optimizer._named] == ["second.weight"]


@pytest.mark.parametrize("second", [{}, {"clip_factor": 0.5}, {"clip_factor": None}], ids=str)
def test_a_gradient_shared_between_groups_is_refused_before_anything_is_written(second):
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    a.grad = b.grad = torch.ones(2)
    optimizer = optim.AgcSGD([{"params": [a]}, {"params": [b], **second}], lr=0.1)
    with pytest.raises(ValueError, match="has the gradient tensor of another parameter"):
        optimizer.step()
    assert torch.equal(a.grad, torch.ones(2))


def test_meta_in_another_group_is_refused_before_anything_is_written():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))
    a.grad, b.grad = torch.ones(2), torch.ones(2, device="meta")
    optimizer = optim.AgcSGD([{"params": [a]}, {"params": [b]}], lr=0.1)
    with pytest.raises(
        ValueError, match=r"^parameter group 1, parameter 0 of shape .* its gradient on meta, others on"
    ):
        optimizer.step()
    assert torch.equal(a.grad, torch.ones(2))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # torch, of its own Adagrad
@pytest.mark.parametrize("base", ["SGD", "Adagrad"])
def test_an_exempt_group_may_have_sparse_gradients(base):
    sparse, dense = nn.Embedding(4, 2, sparse=True), nn.Linear(2, 1)
    groups = [{"params": sparse.parameters(), "clip_factor": None}, {"params": dense.parameters()}]
    optimizer = agc_class(getattr(torch.optim, base))(groups, lr=0.1)
    before = sparse.weight.detach().clone()
    dense(sparse(torch.tensor([1, 2]))).square().sum().backward()
    optimizer.step()
    assert (sparse.weight != before).any(1).tolist() == [False, True, True, False]


# timm's clip mode


@pytest.mark.parametrize("module", [timm.utils, timm.utils.clip_grad, timm.utils.cuda])
def test_an_unknown_clip_mode_is_a_value_error_that_names_it(module):
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match="unknown clip mode 'acg'; timm's --clip-mode is one of norm, value, agc"):
        module.dispatch_clip_grad([p], 0.01, mode="acg")
    assert torch.equal(p.grad, torch.ones(2))


def test_our_clip_modes_are_those_of_timm():
    source = inspect.getsource(timm.utils.clip_grad.dispatch_clip_grad._timm_nf_original)
    assert tuple(re.findall(r"mode == '(\w+)'", source)) == factory._CLIP_MODES


def test_the_clip_mode_stays_one_function_however_often_it_is_registered(monkeypatch):
    original = timm.utils.clip_grad.dispatch_clip_grad._timm_nf_original
    for module in (timm.utils, timm.utils.clip_grad, timm.utils.cuda):
        monkeypatch.setattr(module, "dispatch_clip_grad", module.dispatch_clip_grad)  # put back afterwards
    optim.register()
    now = timm.utils.dispatch_clip_grad
    assert now is timm.utils.clip_grad.dispatch_clip_grad is timm.utils.cuda.dispatch_clip_grad
    assert now._timm_nf_original is original
    assert pickle.loads(pickle.dumps(now)) is now


@pytest.mark.parametrize("wrapped", [[timm.utils], [timm.utils, timm.utils.clip_grad, timm.utils.cuda]], ids=len)
def test_what_others_put_around_timms_functions_stays(wrapped, monkeypatch):
    ours, calls = timm.utils.clip_grad.dispatch_clip_grad, []

    @functools.wraps(ours)
    def counted(*args, **kwargs):
        calls.append(args)
        return ours(*args, **kwargs)

    for module in (timm.utils, timm.utils.clip_grad, timm.utils.cuda):
        monkeypatch.setattr(module, "dispatch_clip_grad", counted if module in wrapped else ours)
    optim.register()
    timm.utils.dispatch_clip_grad([], 1.0)
    assert len(calls) == 1
