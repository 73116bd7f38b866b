"""Adaptive gradient clipping of sharded parameters (FSDP2), on the demo's digits.

torchrun --nproc-per-node 2 -m examples.fsdp2
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from examples.plain_loop import PARTS, SETTINGS, network, parts


def main(steps: int = 20) -> dict[str, Tensor]:
    """Train, and return the whole parameters."""
    model = network()
    for stage in model.stages:
        fully_shard(stage)
    fully_shard(model)
    optimizer = create_optimizer_v2(model, "agcsgd", **SETTINGS)
    rank, processes = dist.get_rank(), dist.get_world_size()
    for i, (images, labels) in enumerate(parts(steps), 1):
        images, labels = (x.chunk(processes)[rank] for x in (images, labels))  # every process takes its share
        model.set_requires_gradient_sync(i % PARTS == 0)
        (F.cross_entropy(model(images), labels) / PARTS).backward()
        if i % PARTS == 0:
            optimizer.step()  # one all-reduce of a few numbers for the clipping
            optimizer.zero_grad()
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


if __name__ == "__main__":
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    main()
    dist.destroy_process_group()
