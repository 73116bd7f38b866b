"""A small network, its training in one process or in several, sharded or not, and what one process makes of it."""

from functools import cache

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from tests.support.small_nets import create

OPTIONS = {"lr": 0.1, "weight_decay": 2e-3, "momentum": 0.9, "clip_factor": 0.01}
STEPS = 5


def network():
    torch.manual_seed(0)
    model = create("NFNet")  # ten classes, channels from 32
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("skipinit_gain"):
                p.fill_(0.5)  # at 0 most gradients would be zero
    return model


def train(model, optimizer, steps=range(STEPS), rank=0, world_size=1, seen=None, with_closure=False):
    """Steps on this process's share of a batch of twelve; appends the collectives of every optimizer step to `seen`."""
    share = slice(12 * rank // world_size, 12 * (rank + 1) // world_size)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(12, 3, 32, 32, generator=generator)
        labels = torch.randint(0, 10, (12,), generator=generator)

        def closure(images=images[share], labels=labels[share]):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()

        if not with_closure:
            closure()
        with CommDebugMode() as communication:
            optimizer.step(closure if with_closure else None)
        if seen is not None:
            seen.append({str(op): n for op, n in communication.get_comm_counts().items()})


@cache
def alone():
    """Parameters and momentum by name, and the policy of the groups, after all steps in a single process."""
    model = network()
    optimizer = create_optimizer_v2(model, "agcsgd", **OPTIONS)
    train(model, optimizer)
    params = {name: p.detach() for name, p in model.named_parameters()}
    momentum = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
    return params, momentum, policy(optimizer)


def policy(optimizer):
    return [(g["clip_factor"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]


def sharded_network(**options):
    model = network()
    for stage in model.stages:
        fully_shard(stage, **options)
    fully_shard(model, **options)
    return model, create_optimizer_v2(model, "agcsgd", **OPTIONS)


def assert_equal_to_one_process(named):
    for name, p in named:
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        torch.testing.assert_close(whole.detach(), alone()[0][name], rtol=1e-6, atol=1e-6, msg=lambda m, n=name: n + m)
