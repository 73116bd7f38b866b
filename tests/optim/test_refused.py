"""What `agc` optimizers and timm's clip mode refuse: by name, before the first write."""

import copy
import math
import pickle

import pytest
import timm.optim
import timm.utils
import torch
from torch import nn

from timm_nf import optim
from timm_nf.optim.optimizer import agc_class

pytestmark = pytest.mark.filterwarnings("ignore:these parameters come without", "ignore:no classifier was found")

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
    assert optimizer._names == [["second.weight"]]


@pytest.mark.parametrize("second", [{}, {"clip_factor": 0.5}, {"clip_factor": None}], ids=str)
def test_a_gradient_shared_between_groups_is_clipped_in_each_as_that_one_says(second):
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.full((2,), 3.0))
    a.grad = b.grad = torch.ones(2)
    optim.AgcSGD([{"params": [a], "clip_factor": 0.1}, {"params": [b], **second}], lr=0.0).step()
    torch.testing.assert_close(a.grad, torch.full((2,), 0.1))
    factor = {"clip_factor": 0.01, **second}["clip_factor"]
    torch.testing.assert_close(b.grad, torch.ones(2) if factor is None else torch.full((2,), min(1.0, 3 * factor)))


def test_the_exempt_gradient_of_an_overlapping_pair_stays_what_it_is():
    buffer = torch.randn(9)
    exempt, clipped = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    exempt.grad, clipped.grad = buffer[:6].view(3, 2), buffer[3:].view(3, 2)
    before = exempt.grad.clone()
    optim.AgcSGD([{"params": [clipped]}, {"params": [exempt], "clip_factor": None}], lr=0.0).step()
    assert torch.equal(exempt.grad, before)


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
@pytest.mark.parametrize("clip_factor", [None, math.inf])
def test_a_group_that_is_not_clipped_may_have_sparse_gradients(base, clip_factor):
    sparse, dense = nn.Embedding(4, 2, sparse=True), nn.Linear(2, 1)
    groups = [{"params": sparse.parameters(), "clip_factor": clip_factor}, {"params": dense.parameters()}]
    optimizer = agc_class(getattr(torch.optim, base))(groups, lr=0.1)
    before = sparse.weight.detach().clone()
    dense(sparse(torch.tensor([1, 2]))).square().sum().backward()
    optimizer.step()
    assert (sparse.weight != before).any(1).tolist() == [False, True, True, False]
