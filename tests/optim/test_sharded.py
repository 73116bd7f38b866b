"""Clipping in several processes: equal to one process with the whole batch, at most one small all-reduce a step.

Two gloo processes run all of `CHECKS`, three those that depend on the number, four `CHECKS_OF_A_GRID`, each once. The
tests read what came.
"""

import multiprocessing
import os
import re
import socket
import sys
import traceback
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from filelock import FileLock
from timm.optim import create_optimizer_v2
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.support import OLD_TORCH
from tests.support.fully_shard import skip_where_it_is_wrong
from tests.support.sharded_nets import (
    OPTIONS,
    STEPS,
    alone,
    assert_equal_to_one_process,
    network,
    policy,
    sharded_network,
    train,
)
from timm_nf.optim.agc import adaptive_clip_grad_, unitwise_norm

pytestmark = pytest.mark.filterwarnings(
    "ignore:these parameters come without their model", "ignore:no classifier was found"
)

SHAPES = [(7, 3, 3, 3), (5, 4), (2, 3), (1, 5), (7,), (7, 1, 1, 1), (1,)]  # few of them divide by 2 or 3


# Checks, run by every process


def ddp_equals_one_process_with_the_whole_batch(rank, world_size, _):
    model = nn.parallel.DistributedDataParallel(network())
    optimizer = create_optimizer_v2(model, "agcsgd", **OPTIONS)
    assert policy(optimizer) == alone()[2]
    train(model, optimizer, rank=rank, world_size=world_size)
    assert_equal_to_one_process(model.module.named_parameters())


@contextmanager
def sizes_of_all_reduces():
    """Collects how many numbers each of them is about."""
    sizes, original = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        yield sizes
    finally:
        dist.all_reduce = original


def fully_shard_equals_one_process_and_needs_one_all_reduce_a_step(rank, world_size, _):
    model, optimizer = sharded_network()
    assert policy(optimizer) == alone()[2]
    assert all(isinstance(p, DTensor) for p in model.parameters())
    seen = []
    with sizes_of_all_reduces() as sizes:
        train(model, optimizer, rank=rank, world_size=world_size, seen=seen)
    assert seen == [{"c10d.allreduce_": 1}] * STEPS
    single_units = sum(max(p.shape, default=1) == p.numel() for p in model.parameters())
    assert sizes == [2 * single_units] * STEPS  # a number for the weight and one for the gradient of each
    assert_equal_to_one_process(model.named_parameters())


def a_fused_step_that_was_asked_for_falls_back_for_shards(rank, world_size, _):
    model, _ = sharded_network()
    optimizer = create_optimizer_v2(model, "agcsgd", **OPTIONS, fused=True)
    for step in range(STEPS):
        train(model, optimizer, [step], rank, world_size, with_closure=step % 2 == 0)
    assert all(group["fused"] is True for group in optimizer.param_groups)
    assert_equal_to_one_process(model.named_parameters())


def other_optimizers_and_frozen_parameters_equal_one_process(rank, world_size, _):
    # The same batch in all processes. The sixth step is one of Lookahead's.
    for name, steps, options in (("agcadamw", 2, {"eps": 1e-3}), ("lookahead_agcsgd", 6, {"momentum": 0.9})):
        results = []
        for parallel in (False, True):
            model = network()
            model.stages[0].requires_grad_(False)
            if parallel:
                fully_shard(model)
            optimizer = create_optimizer_v2(model, name, lr=0.05, weight_decay=2e-3, clip_factor=0.01, **options)
            train(model, optimizer, range(steps))
            results.append([p.full_tensor() if parallel else p for p in model.parameters()])
            clipped = [row["clipped_fraction"] for row in optimizer.clip_stats() if row["units"]]
            assert clipped
            assert all(0 < fraction <= 1 for fraction in clipped)
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)  # of steps of 0.05


def groups_with_settings_of_their_own_share_the_all_reduce(rank, world_size, _):
    params = [p for p, _ in sharded([(5,), (7,), (4, 3)], [Shard(0)])]
    groups = [{"params": [p], "clip_factor": 0.01 * (i + 1)} for i, p in enumerate(params)]
    optimizer = create_optimizer_v2(groups, "agcsgd", lr=0.1)
    with CommDebugMode() as communication:
        optimizer.step()
    assert communication.get_total_counts() == 1


def a_checkpoint_of_two_processes_resumes_in_any_number(rank, world_size, directory):
    model, optimizer = sharded_network()
    if world_size == 2:
        train(model, optimizer, range(3), rank, world_size)
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save(state, checkpoint_id=directory / "checkpoint")
    resume(model, optimizer, directory, rank, world_size)


def resume(model, optimizer, directory, rank=0, world_size=1):
    if world_size != 2:  # those two just go on
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id=directory / "checkpoint", no_dist=world_size == 1)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert policy(optimizer) == alone()[2]
    train(model, optimizer, range(3, STEPS), rank, world_size)
    assert_equal_to_one_process(model.named_parameters())


def sharded(shapes, placements, mesh=None, **kwargs):
    """Pairs of a parameter with gradient and its whole, from the same numbers in every process."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for shape in shapes:
        whole = nn.Parameter(torch.randn(shape, generator=generator, **kwargs))
        whole.grad = torch.randn(shape, generator=generator, **kwargs)
        p = nn.Parameter(distribute_tensor(whole.detach(), mesh, placements))
        p.grad = distribute_tensor(whole.grad.clone(), mesh, placements)  # a replica may be the very same memory
        pairs.append((p, whole))
    return pairs


def every_sharding_equals_the_whole_for_every_norm(rank, world_size, _):
    for norm_type in (1.0, 2.0, 3.0, torch.inf):
        for placement in (Shard(0), Shard(1), Replicate()):
            shapes = [shape for shape in SHAPES if len(shape) > 1 or placement != Shard(1)]
            for dtype in (torch.float32, torch.float64):
                pairs = sharded(shapes, [placement], dtype=dtype)
                with CommDebugMode() as communication:
                    adaptive_clip_grad_([p for p, _ in pairs], 0.02, 1e-3, norm_type)
                assert communication.get_total_counts() == (placement != Replicate())
                assert adaptive_clip_grad_([whole for _, whole in pairs], 0.02, 1e-3, norm_type) > 0.9
                for p, whole in pairs:
                    torch.testing.assert_close(p.grad.full_tensor(), whole.grad, rtol=2e-6, atol=0)


def whole_rows_need_no_communication_and_the_fraction_is_that_of_the_own_ones(rank, world_size, _):
    ((p, whole),) = sharded([(7, 4)], [Shard(0)])
    limit = (unitwise_norm(whole.grad) / unitwise_norm(whole.detach())).median().item()
    own = (unitwise_norm(p.grad.to_local()) > limit * unitwise_norm(p.to_local().detach())).float().mean()
    with CommDebugMode() as communication:
        fraction = adaptive_clip_grad_(p, limit)
    assert fraction == own
    assert communication.get_total_counts() == 0


def one_process_with_nan_or_infinity_stops_the_clipping_of_the_unit_in_all(rank, world_size, _):
    for norm_type in (2.0, torch.inf):
        for bad in (torch.nan, torch.inf):
            ((p, whole), (other, _)) = sharded([(7,), (5,)], [Shard(0)])
            if rank == 0:
                p.grad.to_local()[0] = bad
            whole.grad[0] = bad
            adaptive_clip_grad_([p, other], 0.02, norm_type=norm_type)
            torch.testing.assert_close(p.grad.full_tensor(), whole.grad, rtol=0, atol=0, equal_nan=True)


def unit_limits(p):
    return unitwise_norm(p.to_local().detach()).clamp(min=1e-3)


def other_axes_equal_the_whole_for_every_norm(rank, world_size, _):
    for axis in (1, (1, 2), (1, 4)):
        for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
            for norm_type in (1.0, 2.0, torch.inf):
                pairs = sharded([(8, 6, 3), (4, 1, 5), (4, 7, 2)], [placement], dtype=torch.float64)
                adaptive_clip_grad_([p for p, _ in pairs], 0.02, 1e-3, norm_type, axis=axis)
                assert adaptive_clip_grad_([whole for _, whole in pairs], 0.02, 1e-3, norm_type, axis=axis) > 0.9
                for p, whole in pairs:
                    torch.testing.assert_close(p.grad.full_tensor(), whole.grad, rtol=1e-10, atol=0)


def what_cannot_be_clipped_is_refused_by_name_before_anything_is_written(rank, world_size, _):
    mesh = init_device_mesh("cpu", (world_size,))
    partial = nn.Parameter(DTensor.from_local(torch.ones(4, 2), mesh, [Partial()]))
    partial.grad = DTensor.from_local(torch.ones(4, 2), mesh, [Partial()])
    ((mismatched, _),) = sharded([(4, 2)], [Shard(0)])
    mismatched.grad = mismatched.grad.redistribute(mesh, [Replicate()])
    ((spread, _),) = sharded([(4, 2)], [Shard(1)])
    ((expanded, _), (inference, _), (uneven, _)) = sharded([(2 * world_size, 2)] * 3, [Shard(0)])
    shape = expanded.shape
    expanded.grad = DTensor.from_local(torch.ones(1, 1).expand(2, 2), mesh, [Shard(0)])
    with torch.inference_mode():
        made = torch.ones(2, 2)
    inference.grad = DTensor.from_local(made, mesh, [Shard(0)])
    rows = {0: 3, 1: 1}.get(rank, 2)
    uneven.grad = DTensor.from_local(torch.ones(rows, 2), mesh, [Shard(0)], shape=shape, stride=(2, 1))
    for p in (expanded, inference):
        assert adaptive_clip_grad_(p) == 1  # of a clone
        torch.testing.assert_close(p.grad.to_local(), 0.01 * unit_limits(p).expand(2, 2) / 2**0.5)
    cases = [
        (partial, 2.0, r"parameter 1 of shape \(4, 2\) has placements \(Partial.*\); adaptive clipping needs Shard"),
        (mismatched, 2.0, r"parameter 1 of shape \(4, 2\) has placements \(Shard.*\) but its gradient has \(Repl"),
        (spread, 0.0, r"norm_type must be above 0, got 0.0"),
    ]
    if rank < 2:  # where the shards differ
        cases.append((uneven, 2.0, rf"has a shard of shape \(2, 2\) here, its gradient \({rows}, 2\)"))
    for p, norm_type, message in cases:
        good = nn.Parameter(torch.ones(3))
        good.grad = torch.ones(3)
        with pytest.raises(ValueError, match=message):
            adaptive_clip_grad_([good, p], norm_type=norm_type)
        assert torch.equal(good.grad, torch.ones(3))


def parameters_flattened_by_the_older_wrapper_are_refused_by_name(rank, world_size, _):
    for use_orig_params in (False, True):
        cpu = torch.device("cpu")
        model = FullyShardedDataParallel(nn.Linear(4, 3), use_orig_params=use_orig_params, device_id=cpu)
        model(torch.ones(2, 4)).sum().backward()
        with pytest.raises(ValueError, match=r"^parameter 0 of shape .* flattened by .*; use fully_shard instead"):
            adaptive_clip_grad_(model.parameters())


def a_loss_scaler_and_shards_equal_one_process_and_skip_infinities_of_any(rank, world_size, _):
    results = []
    for parallel in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(6, 5)
        if parallel:
            fully_shard(model)
        optimizer = create_optimizer_v2(model.parameters(), "agcsgd", lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(4):
            optimizer.zero_grad()
            x = torch.randn(6, 6, generator=torch.Generator().manual_seed(step))
            loss = model(x).square().mean()  # the same batch in all processes
            scaler.scale(loss).backward()
            if step == 2:
                grad = model.weight.grad.to_local() if parallel else model.weight.grad
                if rank == 0 or not parallel:  # the first row is there
                    grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 512.0
        results.append([p.full_tensor() if parallel else p for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def hybrid_sharding_equals_one_process(rank, world_size, _):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model, optimizer = sharded_network(mesh=mesh)
    seen = []
    train(model, optimizer, rank=rank, world_size=world_size, seen=seen)
    assert seen == [{"c10d.allreduce_": 1}] * STEPS
    assert_equal_to_one_process(model.named_parameters())


def tensor_parallel_layers_under_fully_shard_equal_one_process(rank, world_size, _):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    results = []
    for parallel in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
        if parallel:
            parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
            fully_shard(model, mesh=mesh["data"])
        optimizer = create_optimizer_v2(model.parameters(), "agcsgd", lr=0.1, momentum=0.9)
        for step in range(STEPS):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            row = mesh["data"].get_local_rank()
            optimizer.zero_grad()
            model(x[4 * row : 4 * row + 4] if parallel else x).square().mean().backward()
            optimizer.step()
        results.append([p.full_tensor() if parallel else p for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def every_sharding_over_a_grid_equals_the_whole(rank, world_size, _):
    mesh = init_device_mesh("cpu", (2, 2))
    for placements in product((Shard(0), Shard(1), Replicate()), repeat=2):
        shapes = [shape for shape in SHAPES if len(shape) > 1 or Shard(1) not in placements]
        pairs = sharded(shapes, placements, mesh)
        with CommDebugMode() as communication:
            adaptive_clip_grad_([p for p, _ in pairs], 0.02)
        # Norms of a unit in several pieces are summed over one dimension of the grid after the other, and single units
        # may be in more pieces than rows.
        assert communication.get_total_counts() <= 3
        assert set(communication.get_comm_counts()) <= {torch.ops.c10d.allreduce_}
        adaptive_clip_grad_([whole for _, whole in pairs], 0.02)
        for p, whole in pairs:
            torch.testing.assert_close(p.grad.full_tensor(), whole.grad, rtol=2e-6, atol=0)


CHECKS = {
    check.__name__: check
    for check in (
        ddp_equals_one_process_with_the_whole_batch,
        fully_shard_equals_one_process_and_needs_one_all_reduce_a_step,
        a_fused_step_that_was_asked_for_falls_back_for_shards,
        other_optimizers_and_frozen_parameters_equal_one_process,
        groups_with_settings_of_their_own_share_the_all_reduce,
        a_checkpoint_of_two_processes_resumes_in_any_number,
        every_sharding_equals_the_whole_for_every_norm,
        whole_rows_need_no_communication_and_the_fraction_is_that_of_the_own_ones,
        one_process_with_nan_or_infinity_stops_the_clipping_of_the_unit_in_all,
        other_axes_equal_the_whole_for_every_norm,
        what_cannot_be_clipped_is_refused_by_name_before_anything_is_written,
        parameters_flattened_by_the_older_wrapper_are_refused_by_name,
        a_loss_scaler_and_shards_equal_one_process_and_skip_infinities_of_any,
    )
}

# In three processes most shapes do not divide. These say nothing about it, and are half of the time.
OF_TWO = {
    "ddp_equals_one_process_with_the_whole_batch",
    "a_fused_step_that_was_asked_for_falls_back_for_shards",
    "other_optimizers_and_frozen_parameters_equal_one_process",
    "parameters_flattened_by_the_older_wrapper_are_refused_by_name",
}

CHECKS_OF_A_GRID = {
    check.__name__: check
    for check in (
        hybrid_sharding_equals_one_process,
        tensor_parallel_layers_under_fully_shard_equal_one_process,
        every_sharding_over_a_grid_equals_the_whole,
    )
}


UNDER_FULLY_SHARD = {
    "fully_shard_equals_one_process_and_needs_one_all_reduce_a_step",
    "a_fused_step_that_was_asked_for_falls_back_for_shards",
    "other_optimizers_and_frozen_parameters_equal_one_process",
    "a_loss_scaler_and_shards_equal_one_process_and_skip_infinities_of_any",
    "hybrid_sharding_equals_one_process",
    "a_checkpoint_of_two_processes_resumes_in_any_number",
    "tensor_parallel_layers_under_fully_shard_equal_one_process",
}
# What older torch itself cannot do, and how it says so.
LACKING = {"every_sharding_over_a_grid_equals_the_whole": "resulted in a negative output size"} if OLD_TORCH else {}


def checks_of(world_size):
    if world_size == 3:
        return {name: check for name, check in CHECKS.items() if name not in OF_TWO}
    return CHECKS_OF_A_GRID if world_size == 4 else CHECKS


def worker(rank, world_size, directory):
    """Run all checks and leave for the tests what failed, by name."""
    torch.set_num_threads(1)
    if "lo" in dict(socket.if_nameindex()).values():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{directory}/store{world_size}"
    timeout = timedelta(minutes=5)  # for the others, where one has failed; not for one that waits for a processor
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=timeout)
    failed = {}
    for name, check in checks_of(world_size).items():
        try:
            check(rank, world_size, directory)
        except Exception:
            failed[name] = traceback.format_exc()
    torch.save(failed, directory / f"{world_size}.{rank}")
    dist.destroy_process_group()
    os._exit(0)  # what is to be said is on disk; in one of a dozen runs, torch's threads aborted the process at its end


@cache
def start_method():
    """A server that has imported this module, from which all nine processes are forked: an import takes seconds."""
    if sys.platform != "linux":
        return "spawn"
    multiprocessing.set_forkserver_preload([__name__])
    return "forkserver"


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """One for all of pytest's workers, with the checkpoint and what failed in each process."""
    own = tmp_path_factory.getbasetemp()
    directory = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "processes"
    directory.mkdir(exist_ok=True)
    return directory


@pytest.fixture(scope="session")
def outcomes(directory):
    """Reads what failed in so many processes. The first worker that asks starts them, the others wait for it."""

    @cache
    def outcomes(world_size):
        if world_size == 3:
            outcomes(2)  # writes the checkpoint
        files = [directory / f"{world_size}.{rank}" for rank in range(world_size)]
        with FileLock(directory / f"{world_size}.lock"):
            if not all(file.exists() for file in files):
                mp.start_processes(worker, (world_size, directory), world_size, start_method=start_method())
        return [torch.load(file) for file in files]

    return outcomes


@pytest.mark.parametrize(("world_size", "check"), [(n, check) for n in (2, 3, 4) for check in checks_of(n)])
def test_in_several_processes(world_size, check, outcomes):
    if check in UNDER_FULLY_SHARD:
        skip_where_it_is_wrong()
    failed = [f"process {rank}:\n{o[check]}" for rank, o in enumerate(outcomes(world_size)) if check in o]
    if check in LACKING:
        assert any(re.search(LACKING[check], text) for text in failed)
    else:
        assert not failed, "\n".join(failed)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_two_processes_resumes_in_one(outcomes, directory):
    skip_where_it_is_wrong()
    outcomes(2)
    model = network()
    resume(model, create_optimizer_v2(model, "agcsgd", **OPTIONS), directory)
