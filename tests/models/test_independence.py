"""What batch normalisation breaks: examples of a batch do not know of each other, and training equals evaluation.

Every test shows that its claim fails for a network with batch normalisation.
"""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import timm_nf
from tests.support.small_nets import SHORT, batch, build, relative_error

NETS: dict[str, Callable[[], Any]] = {
    "nfnet": lambda: build(SHORT["NFNet"]),
    "dm_nf_resnet": lambda: build(SHORT["NF_ResNet"]),
    "dm_nf_regnet": lambda: build(SHORT["NF_RegNet"]),
    "fused nfnet": lambda: timm_nf.fuse(build(SHORT["NFNet"])),
}
EACH_NET = pytest.mark.parametrize("name", NETS)
LABELS = torch.tensor([0, 3, 1, 2])
ROUNDING = 1e-11


def batch_norm_net() -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=4, zero_init_last=False).double()


def loss(model: nn.Module, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(functional_call(model, parameters, (x,)), y, reduction="sum")


def gradients_in_one_pass(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Of every example, (N, *parameter)."""
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def of_one(p: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return loss(model, p, one[None], label[None])

    return vmap(grad(of_one), (None, 0, 0))(parameters, x, y)


def gradients_in_a_loop(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    each = []
    for one, label in zip(x, y, strict=True):
        model.zero_grad()
        F.cross_entropy(model(one[None]), label[None], reduction="sum").backward()
        each.append({n: p.grad.clone() for n, p in model.named_parameters()})
    return {n: torch.stack([g[n] for g in each]) for n in each[0]}


def gradient_of_batch(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    F.cross_entropy(model(x), y, reduction="sum").backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def distance(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative error of any parameter's gradient."""
    assert got.keys() == expected.keys()
    return max(relative_error(got[n], expected[n]) for n in expected)


def input_gradients(model: nn.Module, x: Tensor, weights: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (model(x) * weights).sum().backward()
    assert x.grad is not None
    return x.grad


@EACH_NET
@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_every_example_by_vmap_equal_a_loop_and_sum_to_the_batchs(name: str, training: bool) -> None:
    model, x = NETS[name]().train(training), batch(4, 32, 32)
    each = gradients_in_one_pass(model, x, LABELS)
    assert distance(each, gradients_in_a_loop(model, x, LABELS)) < ROUNDING
    assert distance({n: g.sum(0) for n, g in each.items()}, gradient_of_batch(model, x, LABELS)) < ROUNDING

    bn = batch_norm_net().train()
    with pytest.raises(RuntimeError, match="in-place operation"):  # on its statistics
        gradients_in_one_pass(bn, x, LABELS)
    # One example after the other works, and adds up to something else than the gradient of the batch.
    x = batch(4)  # a single example of 32 pixels is refused: nothing is left to normalise over
    alone = {n: g.sum(0) for n, g in gradients_in_a_loop(bn, x, LABELS).items()}
    assert distance(alone, gradient_of_batch(bn, x, LABELS)) > 0.1


def influence(model: nn.Module, index: int, by: float) -> tuple[float, float]:
    """How much the other three outputs and input gradients change, relatively, when one example of four does."""
    x = batch(4, 32, 32)
    changed, others = x.clone(), [i for i in range(4) if i != index]
    changed[index] += by * torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(index), dtype=x.dtype)
    weights = torch.linspace(-1, 1, 16, dtype=x.dtype).view(4, 4)
    with torch.no_grad():
        assert relative_error(model(changed)[index], model(x)[index]) > 1e-4  # the change is one that matters
        outputs = relative_error(model(changed)[others], model(x)[others])
    gradients = (input_gradients(model, inputs, weights)[others] for inputs in (changed, x))
    return outputs, relative_error(*gradients)


@EACH_NET
@settings(max_examples=4, deadline=None)
@given(training=st.booleans(), index=st.integers(0, 3), by=st.sampled_from([0.1, 1.0, 100.0]))
def test_changing_one_example_changes_no_other_output_or_gradient(
    name: str, training: bool, index: int, by: float
) -> None:
    assert max(influence(NETS[name]().train(training), index, by)) < ROUNDING
    assert min(influence(batch_norm_net().train(), index, by)) > 0.01


@EACH_NET
@pytest.mark.parametrize("n", [1, 3])
def test_training_and_evaluation_agree_without_dropout(name: str, n: int) -> None:
    model, x = NETS[name](), batch(n, 32, 32)
    assert relative_error(model.train()(x), model.eval()(x)) < ROUNDING
    want = gradient_of_batch(model.eval(), x, LABELS[:n])
    assert distance(gradient_of_batch(model.train(), x, LABELS[:n]), want) < ROUNDING
    assert not list(model.buffers())  # there is nothing to drift

    bn, x = batch_norm_net(), batch(n)
    with torch.no_grad():
        assert relative_error(bn.train()(x), bn.eval()(x)) > 0.1
