"""On a device: clipping, the optimizer, and what trains around them."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import timm_nf
from tests.support.device import COMPILER, DEVICE, ON_CPU
from tests.support.sharded_nets import network
from tests.support.small_problems import loop_of_the_formula
from timm_nf.verify import run

pytestmark = pytest.mark.gpu
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 2e-3, "clip_factor": 0.01}
SHAPES = [(40, 7, 3, 3), (64, 16, 1, 1), (16, 1, 1, 1), (33, 20), (1, 50), (17,), (1,), (300, 900), (2, 70000)]


def parameters(dtype: torch.dtype, scale: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for i, shape in enumerate(SHAPES):
        last = {"memory_format": torch.channels_last} if len(shape) == 4 and i % 2 else {}
        weight, grad = (torch.randn(shape, generator=generator) for _ in range(2))
        p = nn.Parameter(weight.to(DEVICE, dtype).to(**last))
        p.grad = (scale * grad).to(DEVICE, dtype).to(**last)
        found.append(p)
    return found


def host(p: Tensor) -> nn.Parameter:
    assert p.grad is not None
    copied = nn.Parameter(p.detach().cpu().double())
    copied.grad = p.grad.cpu().double()
    return copied


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)],
)
def test_clipped_gradients_equal_a_loop_of_the_formula(dtype: torch.dtype, tolerance: float, norm_type: float) -> None:
    ours = parameters(dtype, 0.02)
    expected = [loop_of_the_formula(host(p), 0.01, 1e-3, norm_type=norm_type) for p in ours]
    fraction = timm_nf.adaptive_clip_grad_(ours, 0.01, norm_type=norm_type)
    hits, units = (sum(row[i] for row in expected) for i in (1, 2))
    assert fraction.item() == pytest.approx(hits / units, abs=0.01)
    for p, (grad, _, _) in zip(ours, expected, strict=True):
        assert p.grad is not None
        assert (p.grad.cpu().double() - grad).norm() <= tolerance * grad.norm()


def test_units_that_are_not_finite_and_units_within_their_limit_keep_their_bits() -> None:
    ours = parameters(torch.float32, 1e-6)
    for p in ours:
        assert p.grad is not None
        p.grad.view(-1)[0] = math.nan if p.grad.is_contiguous() else 0.0
    before = [p.grad.clone() for p in ours if p.grad is not None]
    timm_nf.adaptive_clip_grad_(ours, 0.01)
    for p, grad in zip(ours, before, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=0, equal_nan=True)


def train(model: nn.Module, optimizer: Any, steps: int = 3) -> list[float]:
    p = next(model.parameters())
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 3, 32, 32, generator=generator).to(p.device, p.dtype)
        labels = torch.randint(0, 10, (6,), generator=generator).to(p.device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def agcsgd(model: nn.Module, **options: Any) -> Any:
    return timm.optim.create_optimizer_v2(model, "agcsgd", **OPTIONS | options)


def assert_equal(ours: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        p, q = (x.detach().cpu().double() for x in (p, q))
        assert (p - q).norm() <= tolerance * q.norm() + tolerance, name


@pytest.mark.parametrize("name", ["agcsgd", "agcadamw", "agclamb"])
def test_three_clipped_steps_equal_those_of_a_cpu_in_float64(name: str) -> None:
    options = OPTIONS if name == "agcsgd" else {k: v for k, v in OPTIONS.items() if k != "momentum"} | {"lr": 1e-3}
    cpu = network().double()
    here = copy.deepcopy(cpu).to(DEVICE)
    for model in (cpu, here):
        train(model, timm.optim.create_optimizer_v2(model, name, **options))
    assert_equal(here, cpu, 1e-8)


def test_statistics_say_what_the_last_step_clipped() -> None:
    model = network().to(DEVICE)
    optimizer = agcsgd(model)
    train(model, optimizer, 1)
    stats = optimizer.clip_stats()
    assert sum(row["units"] for row in stats) > 500
    assert any(0 < row["clipped_fraction"] <= 1 for row in stats)


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Fails where the host waits for CUDA; other devices have no such mode."""
    if DEVICE.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_step_does_not_wait_for_the_device() -> None:
    model = network().to(DEVICE)
    optimizer = agcsgd(model)
    train(model, optimizer, 2)  # the libraries' own first calls may wait
    with nothing_waits():
        optimizer.step()


@pytest.mark.parametrize("optimizer", ["agcsgd", "agcadamw"])
def test_a_loss_scaler_skips_a_step_that_overflows_and_clips_the_next(optimizer: str) -> None:
    model = network().to(DEVICE)
    steps = timm.optim.create_optimizer_v2(model, optimizer, lr=1e-3, clip_factor=0.01)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**40, backoff_factor=2.0**-12)
    before, taken = [p.detach().clone() for p in model.parameters()], 0
    x, labels = torch.randn(6, 3, 32, 32, device=DEVICE), torch.arange(6, device=DEVICE)
    for _ in range(4):
        steps.zero_grad()
        with torch.autocast(DEVICE.type, torch.float16):
            loss = F.cross_entropy(model(x), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(steps)
        scale = scaler.get_scale()
        scaler.step(steps)
        scaler.update()
        if scaler.get_scale() == scale:
            taken += 1
            assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
            break
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert taken == 1
    assert all(p.isfinite().all() for p in model.parameters())
    assert scaler.get_scale() < 2.0**40


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """What replays the step: a CUDA graph of it, or the step itself on other devices."""
    if DEVICE.type != "cuda":
        step()
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_recorded_training_step_does_what_an_eager_one_does(set_to_none: bool) -> None:
    x, labels = torch.randn(4, 3, 32, 32, device=DEVICE), torch.arange(4, device=DEVICE)
    found = []
    for record in (False, True):
        model = network().to(DEVICE)
        optimizer = agcsgd(model, foreach=True)

        def step(model: nn.Module = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad(set_to_none=set_to_none)
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()

        replay = recorded(step) if record else step
        if not record:
            step()  # as recording does first
        for _ in range(3):
            replay()
        found.append(model)
    assert_equal(found[1], found[0], 1e-5)


def test_a_compiled_network_trains_as_an_eager_one() -> None:
    torch.compiler.reset()
    eager = network().to(DEVICE)
    compiled = copy.deepcopy(eager)
    train(eager, agcsgd(eager))
    train(torch.compile(compiled, backend=COMPILER), agcsgd(compiled))
    assert_equal(compiled, eager, 1e-2)  # TF32 and other orders of summation


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    backend = "gloo" if ON_CPU else "nccl"
    if not ON_CPU:
        torch.accelerator.set_device_index(0)
    dist.init_process_group(backend, store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*barrier.*")
def test_a_network_sharded_on_one_device_trains_as_a_whole_one() -> None:
    whole = network().to(DEVICE)
    sharded = copy.deepcopy(whole)
    for stage in sharded.stages:
        fully_shard(stage)
    fully_shard(sharded)
    for model in (whole, sharded):
        train(model, agcsgd(model))
    for (name, p), q in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        p = p.full_tensor().detach().cpu().double()
        q = q.detach().cpu().double()
        assert (p - q).norm() <= 1e-4 * q.norm() + 1e-4, name


def test_verify_finds_no_difference() -> None:
    failed = [check for check in run(str(DEVICE)) if check.ok is False]
    assert not failed
