"""Nothing is held: parameters that somebody swaps, as accelerate does to shard them, can be freed."""

import copy
import gc
import weakref

import pytest
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from tests.support.small_problems import loop_of_the_formula
from timm_nf.optim import AgcSGD

pytestmark = pytest.mark.usefixtures("no_compiler", "known_optimizer_warnings")


@pytest.fixture(scope="module", autouse=True)
def frozen_heap():
    """Collections look only at objects that these tests make. All objects of torch and timm take 0.2 s each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_the_names_are_there():
    assert len(list_optimizers("agc*")) > 80
    assert issubclass(AgcSGD, torch.optim.SGD)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(4, 8), nn.Linear(8, 3)

    def get_classifier(self):
        return self.fc


def step(model, optimizer):
    optimizer.zero_grad()
    loss = 1e3 * model.fc(model.body(torch.ones(2, 4))).square().sum()
    loss.backward(create_graph=getattr(optimizer, "is_second_order", False))
    optimizer.step()
    optimizer.zero_grad()


def swap(model, optimizer):
    """Put copies in the place of all parameters, in the model and, by name, in the optimizer."""
    new = {p: nn.Parameter(p.detach().clone()) for p in model.parameters()}
    for group in optimizer.param_groups:
        group["params"] = [new[p] for p in group["params"]]
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            module._parameters[name] = new[p]


def alive_after_a_swap(name):
    torch.manual_seed(0)
    model = Net()
    options = {"deterministic": True} if "kron" in name else {}
    optimizer = create_optimizer_v2(model, name, lr=1e-3, **options)
    step(model, optimizer)
    old = [weakref.ref(p) for p in model.parameters()]
    swap(model, optimizer)
    optimizer.state.clear()  # keyed by parameters, in every optimizer of torch
    gc.collect()
    return sum(reference() is not None for reference in old)


@pytest.mark.parametrize("name", list_optimizers("agc*"))
def test_no_more_parameters_are_held_than_by_the_bare_optimizer(name):
    bare = alive_after_a_swap(name.removeprefix("agc"))
    assert alive_after_a_swap(name) == bare
    assert bare == 0 or "adahessian" in name or "kron" in name  # whose bare forms hold some beside the state


def test_after_a_swap_names_statistics_exemptions_and_bare_checkpoints_still_work():
    model = Net()
    optimizer = create_optimizer_v2(model, "agcsgd", lr=0.0, weight_decay=0.1)
    step(model, optimizer)
    stats = optimizer.clip_stats()
    swap(model, optimizer)
    assert optimizer.clip_stats() == stats
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e3)
    body, *_ = loop_of_the_formula(model.body.weight, 0.01, 1e-3)
    optimizer.step()
    assert torch.equal(model.fc.weight.grad, torch.full((3, 8), 1e3))
    torch.testing.assert_close(model.body.weight.grad.double(), body.double(), rtol=1e-5, atol=0)
    bare = create_optimizer_v2(model, "sgd", lr=0.0, weight_decay=0.1)
    bare.step()
    optimizer.load_state_dict(copy.deepcopy(bare.state_dict()))
    for p in model.parameters():
        assert torch.equal(optimizer.state[p]["momentum_buffer"], bare.state[p]["momentum_buffer"])
    model.body.weight.grad = torch.eye(8, 4).to_sparse()
    with pytest.raises(ValueError, match=r"parameter group \d, parameter 0 body.weight of shape"):
        optimizer.step()


def test_flat_parameters_in_the_place_of_layers_are_refused_by_group():
    model = Net()
    optimizer = create_optimizer_v2(model, "agcsgd", lr=0.1)
    for group in optimizer.param_groups:  # as DeepSpeed ZeRO does
        group["params"] = [nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))]
        group["params"][0].grad = torch.ones_like(group["params"][0])
    with pytest.raises(ValueError, match="parameter group 0 had 3 parameters and now has 1, all of them flat"):
        optimizer.step()


@pytest.mark.parametrize("name", ["agcsgd", "agcadamw"])
def test_fake_tensors_step_without_values(name):
    with torch._subclasses.fake_tensor.FakeTensorMode():
        model = Net()
        optimizer = create_optimizer_v2(model, name, lr=0.1)
        for _ in range(2):
            step(model, optimizer)
