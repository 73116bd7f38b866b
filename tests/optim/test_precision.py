"""`agc` optimizers in half precision, under autocast and with loss scaling."""

import math

import pytest
import torch
from torch import nn

from tests.support import OLD_TORCH
from tests.support.small_problems import assert_identical, create, target_problem, train, values
from timm_nf import optim
from timm_nf.optim.agc import adaptive_clip_grad_
from timm_nf.optim.optimizer import agc_class

pytestmark = pytest.mark.filterwarnings("ignore:these parameters come without", "ignore:no classifier was found")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["agcsgd", "agclion"])
def test_half_precision_trains_and_keeps_its_dtype(name, dtype):
    params, loss = target_problem(dtype)
    before = loss().item()
    assert train(create(name, params, lr=0.05, clip_factor=0.1), loss, 20) < before
    assert all(p.dtype == p.grad.dtype == dtype and p.isfinite().all() for p in params)


def test_half_precision_gradients_of_full_precision_parameters_are_clipped():
    p = nn.Parameter(torch.ones(2, 1000))
    p.grad_dtype = None  # torch's word for: any
    grad = torch.full((2, 1000), 6e4, dtype=torch.float16)
    if OLD_TORCH:  # it has no such word
        with pytest.raises(RuntimeError, match="attempting to assign a gradient with dtype"):
            p.grad = grad
        return
    p.grad = grad
    adaptive_clip_grad_(p)
    torch.testing.assert_close(p.grad, torch.full((2, 1000), 0.01, dtype=torch.float16), rtol=1e-3, atol=0)


@pytest.fixture(params=["cpu", "cuda"])
def scaler(request, monkeypatch):
    """A loss scaler of this device type; that of CUDA works on any tensors, but is off where CUDA is missing."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    return lambda **options: torch.amp.GradScaler(request.param, init_scale=1024.0, **options)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_no_loss_scaler_may_leave_the_unscaling_to_a_fused_step(base, fused):
    p = nn.Parameter(torch.ones(2))
    assert getattr(base([p], fused=True), "_step_supports_amp_scaling", False) is True  # what is to be overruled
    assert agc_class(base)([p], fused=fused)._step_supports_amp_scaling is False


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_loss_scaler_unscales_before_the_clipping_and_skips_infinities(base, fused, scaler):
    results = []
    for scaling in (False, True):
        params, loss = target_problem()
        optimizer = agc_class(base)(params, lr=0.1, fused=fused)
        scale = scaler(enabled=scaling)
        for _ in range(3):
            optimizer.zero_grad()
            scale.scale(loss()).backward()
            scale.step(optimizer)
            scale.update()
        results.append(values(params))
    assert_identical(*results)
    params[0].grad[0, 0] = math.inf
    scale.step(optimizer)
    scale.update()
    assert_identical(values(params), results[1])
    assert scale.get_scale() == 512.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_loss_scaler_equals_unscaling_and_clipping_by_hand(dtype, scaler):
    results = []
    for by_hand in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 2))
        cls = torch.optim.SGD if by_hand else optim.AgcSGD
        optimizer, scale = cls(model.parameters(), lr=0.1, momentum=0.9), scaler()
        for step in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                out = model(torch.randn(4, 6))
            assert out.dtype == dtype
            scale.scale(out.float().square().sum() * (math.inf if step == 2 else 1)).backward()
            before = values(model.parameters())
            if by_hand:
                scale.unscale_(optimizer)
                adaptive_clip_grad_(model.parameters())
            scale.step(optimizer)
            scale.update()
            moved = not torch.equal(before[0], model[0].weight)
            assert moved == (step != 2)  # infinities: no step
        assert scale.get_scale() == 512.0
        results.append(values(model.parameters()))
    assert_identical(*results)
