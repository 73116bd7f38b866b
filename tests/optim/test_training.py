"""`agc` optimizers inside training loops: the fused step, odd parameters, torch.compile, timm's train.py."""

import argparse
import copy
import math

import pytest
import timm
import timm.task
import timm.utils
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.small_nets import create as create_network
from tests.support.small_problems import assert_identical, values
from timm_nf import optim
from timm_nf.optim import agc

pytestmark = pytest.mark.filterwarnings("ignore:these parameters come without", "ignore:no classifier was found")


class Operations(TorchDispatchMode):
    """The names of all operations that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations_of(optimizer, *closure):
    with Operations() as seen:
        optimizer.step(*closure)
    return seen.names


# The fused step


SHAPES = [(32, 16, 3, 3), (64, 32, 1, 1), (16, 9), (1008,), (16,), (0, 3)]
IN_PART = [(64, 3), (7,), (16, 4), (1,)]  # two of them do not fill their last cache line


def random_problem(dtype=torch.float32, grads=lambda g: g, shapes=SHAPES):
    """Parameters of every shape, and a function that gives them new gradients."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]

    def new_gradients():
        for p in params:
            p.grad = grads(torch.randn(p.shape, generator=generator).to(dtype))

    return params, new_gradients


def steps_of_both(problem, options):
    """Bare and clipping SGD, the latter without a limit, after three steps; and what the latter's last one called."""
    results, seen = [], set()
    for cls, clip in ((torch.optim.SGD, {}), (optim.AgcSGD, {"clip_factor": math.inf})):
        params, new_gradients = problem()
        optimizer = cls(params, lr=0.1, **options, **clip)
        for _ in range(3):
            new_gradients()
            seen = operations_of(optimizer)
        results.append((values(params), optimizer.state_dict()))
    return results, seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
)
def test_the_step_is_fused_and_equals_the_default_one_to_the_bit(options, dtype):
    ((bare, bare_state), (ours, state)), seen = steps_of_both(lambda: random_problem(dtype), options)
    assert "_fused_sgd_" in seen
    assert_identical(ours, bare)
    params, new_gradients = random_problem(dtype)
    assert "_fused_sgd_" in operations_of(optim.AgcSGD(params, lr=0.1, **options), new_gradients)  # as a closure
    for group in state["param_groups"]:
        del group["clip_factor"], group["clip_eps"], group["clip_axis"]
    assert state["param_groups"] == bare_state["param_groups"]  # fused=None among them
    assert_identical(state["state"], bare_state["state"])


def channels_last(grad):
    return grad.contiguous(memory_format=torch.channels_last) if grad.ndim == 4 else grad


def transposed(grad):
    return grad.t().contiguous().t()


@pytest.mark.parametrize(
    ("problem", "options"),
    [
        (lambda: random_problem(grads=channels_last, shapes=[(32, 16, 3, 3), (8, 4, 3, 3)]), {}),
        (lambda: random_problem(grads=transposed, shapes=[(32, 16), (8, 64)]), {}),
        (lambda: random_problem(torch.bfloat16), {}),
        (lambda: random_problem(shapes=[(7,), (1,)]), {}),
        (random_problem, {"dampening": 0.5}),
        (random_problem, {"maximize": True}),
        (random_problem, {"foreach": False}),
        (random_problem, {"fused": False}),
        (random_problem, {"foreach": True}),
    ],
    ids=[
        "gradients in another order",
        "transposed gradients",
        "bfloat16",
        "part of a cache line",
        "dampening",
        "maximize",
        "foreach=False",
        "fused=False",
        "foreach=True",
    ],
)
def test_the_step_is_the_bare_one_where_fused_would_differ_or_the_user_has_chosen(problem, options):
    ((bare, _), (ours, _)), seen = steps_of_both(problem, {"momentum": 0.9, "weight_decay": 0.1, **options})
    assert "_fused_sgd_" not in seen
    assert_identical(ours, bare)


@pytest.mark.parametrize(
    "problem",
    [lambda: random_problem(shapes=IN_PART), lambda: random_problem(grads=channels_last)],
    ids=["part of a cache line", "gradients in another order"],
)
def test_parameters_that_may_not_be_fused_leave_the_others_fused(problem):
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    ((bare, bare_state), (ours, state)), seen = steps_of_both(problem, options)
    assert {"_fused_sgd_", "add_"} <= seen
    assert_identical(ours, bare)
    assert_identical(state["state"], bare_state["state"])


def test_parameters_that_get_gradients_later_are_stepped_as_by_the_bare_optimizer():
    def problem():
        params, new_gradients = random_problem()
        rounds = iter(range(3))

        def late():
            new_gradients()
            if next(rounds) == 0:
                params[0].grad = params[3].grad = None

        return params, late

    ((bare, _), (ours, _)), _ = steps_of_both(problem, {"momentum": 0.9})
    assert_identical(ours, bare)


def test_the_groups_are_as_before_when_a_fused_step_fails(monkeypatch):
    params, new_gradients = random_problem()
    optimizer = optim.AgcSGD(params, lr=0.1)
    new_gradients()
    groups = copy.copy(optimizer.param_groups[0])
    monkeypatch.setattr(torch.optim.SGD, "_init_group", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert optimizer.param_groups == [groups]


def test_a_step_never_waits_for_an_accelerator():
    # The meta device has no values at all: any code path that reads one fails there.
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in [(8, 4, 3, 3), (8, 1, 1, 1), (8,), (1,)]]
    optimizer = create_optimizer_v2(params, "agcsgd", lr=0.1, weight_decay=0.1)
    for _ in range(2):
        for p in params:
            p.grad = torch.empty_like(p)
        seen = operations_of(optimizer)
    assert not seen & {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"}


# Accumulation, parameters


def test_accumulated_gradients_are_clipped_once_as_a_whole():
    results = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        optimizer = create_optimizer_v2(model, "agcsgd", lr=0.1)
        x, y = torch.randn(8, 5), torch.randn(8, 3)
        for _ in range(3):
            optimizer.zero_grad()
            for part in range(parts):
                own = slice(part * 8 // parts, (part + 1) * 8 // parts)
                (F.mse_loss(model(x[own]), y[own]) / parts).backward()
            optimizer.step()
        results.append(values(model.parameters()))
    torch.testing.assert_close(*results)


def test_unused_frozen_shared_empty_and_late_parameters_in_one_training():
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("first", "second", "unused", "frozen", "late")})
    model.second.weight = model.first.weight
    model.frozen.requires_grad_(False)
    model.empty = nn.Parameter(torch.empty(0, 4))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    late = model.pop("late")
    optimizer = create_optimizer_v2(model, "agcsgd", lr=0.1, weight_decay=0.0)
    for step in range(3):
        if step == 1:
            optimizer.add_param_group({"params": late.parameters()})
        optimizer.zero_grad()
        x = model.second(model.frozen(model.first(torch.ones(2, 4))))
        x = late(x) if step else x
        ((x - 3).square().sum() * 100 + model.empty.sum()).backward()
        grad, weight = model.first.weight.grad.clone(), model.first.weight.detach().clone()
        optimizer.step()
        limit = 0.01 * weight.norm(dim=1, keepdim=True)
        torch.testing.assert_close(model.first.weight.grad, grad * (limit / grad.norm(dim=1, keepdim=True)))
    moved = {name for name, p in [*model.named_parameters(), *late.named_parameters("late")] if p.numel()}
    now = {**dict(model.named_parameters()), **dict(late.named_parameters("late"))}
    moved = {name for name in moved if not torch.equal(now[name], start[name])}
    assert moved == {"first.weight", "first.bias", "second.bias", "late.weight", "late.bias"}


# Around the optimizer


def compiled_training(name, compiled, **options):
    """Parameters after three steps, and how often the compiler had to leave the graph."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = create_optimizer_v2(model, name, lr=0.1, **options)
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model

    def step(x):
        optimizer.zero_grad()
        forward(x).square().sum().backward()
        optimizer.step()

    run = torch.compile(step, backend="aot_eager") if compiled else step
    for seed in range(3):
        run(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)))
    return values(model.parameters()), counters["graph_break"].copy()


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_a_compiled_training_step_breaks_only_in_the_optimizer(base):
    eager, _ = compiled_training(f"agc{base}", compiled=False)
    compiled, breaks = compiled_training(f"agc{base}", compiled=True)
    torch.testing.assert_close(compiled, eager)
    _, bare_breaks = compiled_training(base, compiled=True)
    ours = {reason: count for reason, count in breaks.items() if reason not in bare_breaks}
    assert sum(breaks.values()) <= sum(bare_breaks.values()) + 2  # one in each of two compilations
    assert all("AdaptiveClipping.step" in reason or "_fused_sgd" in reason for reason in ours), ours


def test_lookahead_scheduler_and_layer_decay_together_with_statistics():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5)
    optimizer = create_optimizer_v2(model, "lookahead_agcadamw", lr=0.1, weight_decay=0.05, layer_decay=0.7)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=4, warmup_epochs=1)
    assert optimizer.clip_stats() is None
    for epoch in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 160, 160)).square().sum().backward()
        optimizer.step()
        scheduler.step(epoch + 1)
    assert len({group["lr"] for group in optimizer.param_groups}) > 2
    stats = optimizer.clip_stats()
    exempt = [row["units"] == 0 for row in stats]
    assert exempt == [group["clip_factor"] is None for group in optimizer.param_groups]
    assert sum(exempt) == 1


# clip_stats


def test_statistics_are_those_of_the_last_step_by_group():
    weight, bias, exempt = (nn.Parameter(torch.ones(shape)) for shape in [(100, 4), (4,), (3, 3)])
    optimizer = create_optimizer_v2(
        [{"params": [weight]}, {"params": [bias], "clip_eps": 4.0}, {"params": [exempt], "clip_factor": None}], "agcsgd"
    )
    assert optimizer.clip_stats() is None
    for scale in (5.0, 1.0):
        ratios = torch.arange(100.0) * 0.001  # 0 to 0.099
        weight.grad = scale * ratios[:, None].expand(100, 4).clone()
        bias.grad, exempt.grad = torch.ones(4), torch.ones(3, 3)
        with torch.no_grad():
            weight.fill_(1.0), bias.fill_(1.0)
        optimizer.step()
    rows, single, none = optimizer.clip_stats()
    assert (rows["units"], rows["zero_grad_units"]) == (100, 1)
    assert rows["clipped_fraction"] == pytest.approx(0.89, abs=0.011)  # 0.010 may round to either side
    expected = {q: 0.099 * q for q in (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)}
    assert rows["ratio_quantiles"] == pytest.approx(expected)
    assert (single["units"], single["clipped_fraction"]) == (1, 1.0)
    assert single["ratio_quantiles"][0.5] == pytest.approx(2 / 4)  # gradient norm 2, weight norm 2, eps 4
    nothing = {"units": 0, "zero_grad_units": 0, "non_finite_units": 0}
    assert none == {**nothing, "clipped_fraction": 0.0, "ratio_quantiles": {}}
    assert copy.deepcopy(optimizer).clip_stats() is None


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_units_that_are_not_finite_are_counted_and_left_out_of_the_quantiles(bad):
    weight = nn.Parameter(torch.ones(5, 4))
    optimizer = create_optimizer_v2([weight], "agcsgd", lr=0.0)
    weight.grad = 0.5 * torch.ones(5, 4)
    weight.grad[2, 1] = bad
    optimizer.step()
    (row,) = optimizer.clip_stats()
    assert (row["units"], row["non_finite_units"], row["clipped_fraction"]) == (5, 1, pytest.approx(0.8))
    assert set(row["ratio_quantiles"].values()) == {0.5}
    weight.grad.fill_(bad)
    optimizer.step()
    assert optimizer.clip_stats()[0]["ratio_quantiles"] == {}


@pytest.mark.parametrize(("value", "zero"), [(0.0, 5), (1.0, 0)])
def test_statistics_of_units_without_weight_are_of_their_gradients(value, zero):
    weight = nn.Parameter(torch.zeros(5, 4))
    optimizer = create_optimizer_v2([weight], "agcsgd", lr=0.0, clip_eps=0.0)
    weight.grad = torch.full((5, 4), value)
    optimizer.step()
    (row,) = optimizer.clip_stats()
    assert (row["zero_grad_units"], row["non_finite_units"], row["ratio_quantiles"]) == (zero, 0, {})


def test_only_a_few_numbers_per_unit_are_kept_for_the_statistics():
    params, new_gradients = random_problem()
    optimizer = create_optimizer_v2(params, "agcsgd", lr=0.1)
    new_gradients()
    optimizer.step()
    kept = sum(t.numel() for _, units in optimizer._measured for t in units if isinstance(t, torch.Tensor))
    assert kept == 4 * (32 + 64 + 16 + 2)


# The calls of timm's train.py, in its order


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("where", ["clip mode", "optimizer"])
def test_the_calls_of_timms_training_script(where, bfloat16, monkeypatch):
    calls = []
    original = agc._scale_gradients_
    monkeypatch.setattr(agc, "_scale_gradients_", lambda shards, units: calls.append(original(shards, units)))
    torch.manual_seed(0)
    args = argparse.Namespace(
        opt="agcsgd" if where == "optimizer" else "sgd",
        opt_kwargs={"clip_factor": 0.02} if where == "optimizer" else {},
        lr=0.1,
        weight_decay=2e-5,
        momentum=0.9,
        clip_grad=0.01 if where == "clip mode" else None,
        clip_mode="agc" if where == "clip mode" else "norm",
    )
    model = create_network("NFNet")
    task = timm.task.ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    scaler = None if bfloat16 else timm.utils.NativeScaler(device="cpu")  # train.py has one for float16 only
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=2, updates_per_epoch=2)
    assert epochs == 2
    before = values(ema.module.parameters())
    for update in range(1, 4):
        for need_update in (False, True):  # gradient accumulation over two batches
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = task(torch.randn(2, 3, 32, 32), torch.tensor([1, 7]))["loss"] / 2
            parameters = None
            if args.clip_grad is not None:
                parameters = task.get_clip_parameters(exclude_head="agc" in args.clip_mode)
            options = {"clip_grad": args.clip_grad, "clip_mode": args.clip_mode, "parameters": parameters}
            if scaler is not None:
                scaler(loss, optimizer, **options, create_graph=False, need_update=need_update)
            else:
                loss.backward(create_graph=False)
                if need_update:
                    if args.clip_grad is not None:
                        timm.utils.dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
                    optimizer.step()
        assert calls, "the clip function did not run"
        calls.clear()
        optimizer.zero_grad()
        ema.update(model, step=update)
        scheduler.step_update(num_updates=update)
    scheduler.step(1)
    if where == "optimizer":
        assert {g["clip_factor"] for g in optimizer.param_groups} == {0.02, None}
    assert not all(torch.equal(a, b) for a, b in zip(ema.module.parameters(), before, strict=True))
    assert all(p.isfinite().all() for p in model.parameters())
