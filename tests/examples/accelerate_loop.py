"""The loop of accelerate: run by test_other_loops.py, where accelerate is installed."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from timm.optim import create_optimizer_v2

from examples import plain_loop
from examples.plain_loop import SETTINGS, network
from examples.with_accelerate import main
from tests.support.formula_loop import assert_equal, differences, trajectory

ROUNDING = 2e-6


@pytest.fixture(autouse=True)
def an_accelerator_of_its_own(tmp_path, monkeypatch):
    """For every test; accelerate keeps one for the process."""
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_it_equals_the_formula_and_has_the_statistics_inside():
    model, optimizer = main(4)
    assert max(differences(model, trajectory(4)[-1]).values()) < ROUNDING
    assert [row["units"] for row in optimizer.optimizer.clip_stats()] == [30, 1136, 0]


def test_lookahead_equals_the_formula():
    model, optimizer = main(12, "lookahead_agcsgd")
    assert max(differences(model, trajectory(12, lookahead=6)[-1]).values()) < ROUNDING
    assert optimizer.optimizer.clip_stats()[1]["units"] == 1136


def test_in_bfloat16_it_equals_the_plain_loop_to_the_bit():
    model, _ = main(2, precision="bf16")
    assert_equal(plain_loop.main(2, precision="bfloat16"), model)


def test_it_resumes_in_the_middle_to_the_bit(tmp_path):
    whole, _ = main(4)
    main(2, folder=tmp_path)
    resumed, _ = main(4, first=2, folder=tmp_path)
    assert_equal(whole, resumed)


@pytest.fixture
def shards_on_cpus():
    """An accelerator that shards with one process, which accelerate itself offers on GPUs alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
    yield accelerator
    dist.destroy_process_group()


def test_the_parameters_that_it_swaps_for_sharded_ones_are_freed(shards_on_cpus):
    model = network()
    optimizer = create_optimizer_v2(model, "agcsgd", **SETTINGS)
    before = [weakref.ref(p) for p in model.parameters()]
    model, optimizer = shards_on_cpus._prepare_fsdp2(model, optimizer)
    gc.collect()
    assert [reference for reference in before if reference() is not None] == []
    plain_loop.train(model, optimizer.optimizer, plain_loop.parts(2))
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}
    for name, p in plain_loop.main(2).named_parameters():
        torch.testing.assert_close(whole[name], p, rtol=1e-5, atol=1e-6, msg=name)
    assert [row["units"] for row in optimizer.optimizer.clip_stats()] == [30, 1136, 0]
