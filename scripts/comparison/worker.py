"""Answers questions about a package in the package's own environment. scripts/comparison starts it.

    python -m scripts.comparison.worker PEER

Input and output are lines, each a JSON object. A question is {"do": ..., its arguments}. A reply is {"answer": ...} or
{"error": the last line}. Arrays are npz files in PyTorch's layout, with keys `p|NAME` for parameters and `g|NAME` for
gradients.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from scripts.comparison import probes
from scripts.comparison.probes import EPS, FACTOR, last_line, prepare

QUESTIONS = ("load", "clip", "time", "sharded")  # all other questions are functions in probes.py
SHARDED = {"convolution": (8, 4, 3, 3), "linear layer": (7, 5), "bias": (7,)}  # 7 is not divisible by 2

Arrays = dict[str, np.ndarray]


class TorchPeer:
    """A package that clips the gradients of torch parameters in place."""

    def __init__(self, peer: str) -> None:
        self.peer, self.clip_ = peer, torch_clip(peer)
        self.parameters: list[Any] = []
        self.grads: list[Any] = []

    def load(self, source: str, dtype: str | None = None) -> list[str]:
        import torch

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(getattr(torch, dtype) if dtype else None)

        with np.load(source) as arrays:
            names = [key.removeprefix("p|") for key in arrays.files if key.startswith("p|")]
            self.parameters = [torch.nn.Parameter(tensor(arrays[f"p|{name}"])) for name in names]
            self.grads = [tensor(arrays[f"g|{name}"]) for name in names]
        return names

    def clip(self, source: str, target: str, dtype: str | None = None) -> None:
        import torch

        names = self.load(source, dtype)
        for p, grad in zip(self.parameters, self.grads, strict=True):
            p.grad = grad
        self.clip_(self.parameters)
        wide = torch.promote_types(self.grads[0].dtype, torch.float32)
        np.savez(target, **{n: p.grad.to(wide).numpy() for n, p in zip(names, self.parameters, strict=True)})
        self.parameters, self.grads = [], []

    def time(self, scale: float) -> float:
        for p, grad in zip(self.parameters, self.grads, strict=True):  # clipping clipped gradients does nothing
            p.grad = grad * scale
        start = time.perf_counter()
        self.clip_(self.parameters)
        return time.perf_counter() - start

    def sharded(self) -> str:
        """Whether the package clips parameters that are sharded over two processes like whole parameters."""
        import torch.multiprocessing as mp

        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(_torch_shards, (self.peer, folder), nprocs=2, start_method="spawn")
            return (Path(folder) / "answer").read_text()


class OptaxPeer:
    """optax, whose layout is the authors': kernels (K, K, I, O), linear layers (I, O), gains (O,)."""

    def __init__(self, peer: str) -> None:
        import jax
        import optax

        jax.config.update("jax_enable_x64", True)
        transform = optax.adaptive_grad_clip(FACTOR, EPS)
        self.clip_ = jax.jit(lambda grads, params: transform.update(grads, transform.init(params), params)[0])
        self.params: dict[str, Any] = {}
        self.grads: dict[float, dict[str, Any]] = {}

    def load(self, source: str, dtype: str | None = None) -> None:
        import jax.numpy as jnp

        with np.load(source) as arrays:
            trees: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
            for key in arrays.files:
                tree, _, name = key.partition("|")
                trees["pg".index(tree)][name] = jnp.asarray(to_haiku(name, arrays[key]), dtype)
        self.params, self.grads = trees[0], {1.0: trees[1]}

    def clip(self, source: str, target: str, dtype: str | None = None) -> None:
        self.load(source, dtype)
        clipped = {name: np.asarray(g) for name, g in self.clip_(self.grads[1.0], self.params).items()}
        with np.load(source) as arrays:
            shapes = {name: arrays[f"g|{name}"].shape for name in clipped}
        wide = {name: g.astype(np.result_type(g.dtype, np.float32)) for name, g in clipped.items()}
        np.savez(target, **{name: from_haiku(name, g, shapes[name]) for name, g in wide.items()})
        self.params, self.grads = {}, {}

    def time(self, scale: float) -> float:
        import jax

        if scale not in self.grads:
            self.grads[scale] = {name: g * scale for name, g in self.grads[1.0].items()}
        grads = jax.block_until_ready(self.grads[scale])
        start = time.perf_counter()
        jax.block_until_ready(self.clip_(grads, self.params))
        return time.perf_counter() - start

    def sharded(self) -> str:
        """Like `TorchPeer.sharded`, with two devices that XLA makes of one processor."""
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        with tempfile.TemporaryDirectory() as folder:
            process = multiprocessing.get_context("spawn").Process(target=_jax_shards, args=(folder,))
            process.start()
            process.join()
            return (Path(folder) / "answer").read_text()


def torch_clip(peer: str) -> Callable[[list[Any]], object]:
    """The package's clipping of a list of parameters, in place."""
    import torch

    if peer == "timm_nf":
        from timm_nf import adaptive_clip_grad_

        return lambda parameters: adaptive_clip_grad_(parameters, FACTOR, EPS)
    if peer == "timm":
        from timm.utils.agc import adaptive_clip_grad

        return lambda parameters: adaptive_clip_grad(parameters, FACTOR, EPS)
    if peer == "pytorch_optimizer":
        from pytorch_optimizer import agc

        @torch.no_grad()
        def clip_as_ranger21(parameters: list[torch.Tensor]) -> None:
            for p in parameters:
                p.grad.copy_(agc(p, p.grad, EPS, FACTOR))

        return clip_as_ranger21
    if peer == "composer":
        from composer.algorithms.gradient_clipping import apply_gradient_clipping

        def clip_model(parameters: list[torch.Tensor]) -> None:
            model: Any = SimpleNamespace(parameters=lambda: parameters)
            apply_gradient_clipping(model, "adaptive", FACTOR, fsdp_enabled=False)

        return clip_model
    from nfnets.agc import AGC

    nothing: Any = SimpleNamespace(defaults={}, param_groups=[], state={}, step=lambda closure: None)
    return lambda parameters: AGC(parameters, nothing, clipping=FACTOR, eps=EPS).step()


def to_haiku(name: str, array: np.ndarray) -> np.ndarray:
    """One array in the authors' layout."""
    if name.endswith("gain"):
        return array.reshape(()) if array.size == 1 else array.reshape(-1)
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def from_haiku(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("gain"):
        return array.reshape(shape)
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


# -- sharded parameters ------------------------------------------------------------------------------------------------


def _shard_arrays() -> tuple[Arrays, Arrays]:
    rng = np.random.default_rng(0)
    weights = {key: rng.standard_normal(shape) for key, shape in SHARDED.items()}
    return weights, {key: rng.standard_normal(shape) for key, shape in SHARDED.items()}


def _torch_shards(rank: int, peer: str, folder: str) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    prepare(peer)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh, clip = init_device_mesh("cpu", (2,)), torch_clip(peer)
    whole, sharded = [], []
    for weight, grad in zip(*(map(torch.from_numpy, arrays.values()) for arrays in _shard_arrays()), strict=True):
        whole.append(torch.nn.Parameter(weight))
        whole[-1].grad = grad.clone()
        sharded.append(torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)])))
        sharded[-1].grad = distribute_tensor(grad, mesh, [Shard(0)])
    clip(whole)
    answers, calls = [], 0
    for key, p, q in zip(SHARDED, whole, sharded, strict=True):
        try:
            with CommDebugMode() as communication:
                clip([q])
            calls += communication.get_total_counts()
            worst = (p.grad - q.grad.full_tensor()).abs().max().item()
            answers.append(f"{key}: {'equal' if worst < 1e-12 else f'wrong by {worst:.0e}'}")
        except Exception as error:
            answers.append(f"{key} fails ({last_line(error)[:60]}...)")
    equal = all(answer.endswith("equal") for answer in answers)
    answer = f"equal, {calls} collective call{'s'[: calls != 1]}" if equal else "; ".join(answers)
    if rank == 0:
        (Path(folder) / "answer").write_text(answer)
    dist.destroy_process_group()


def _jax_shards(folder: str) -> None:
    peer = OptaxPeer("optax")
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("data",))
    weights, grads = _shard_arrays()
    trees: list[dict[str, Any]] = []
    for arrays in (grads, weights):
        haiku = {key: to_haiku(key, array) for key, array in arrays.items()}
        # JAX refuses uneven shards, so only the convolution's 8 outputs are split
        spec = {key: PartitionSpec(*[None] * 3, "data") if a.ndim == 4 else PartitionSpec() for key, a in haiku.items()}
        trees += [haiku, {key: jax.device_put(a, NamedSharding(mesh, spec[key])) for key, a in haiku.items()}]
    whole, sharded = peer.clip_(trees[0], trees[2]), peer.clip_(trees[1], trees[3])
    worst = max(float(np.abs(np.asarray(whole[key]) - np.asarray(sharded[key])).max()) for key in whole)
    kept = len(sharded["convolution"].sharding.device_set)
    answer = f"{'equal' if worst < 1e-12 else f'wrong by {worst:.0e}'}, by XLA, result on {kept} devices"
    (Path(folder) / "answer").write_text(answer)


def main() -> None:
    peer = sys.argv[1]
    if hasattr(os, "sched_setaffinity"):  # XLA has no setting for its number of threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(os.environ["OMP_NUM_THREADS"])])
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what packages print must not get between the answers
    prepare(peer)
    clipper: Any = None
    for line in sys.stdin:
        arguments = json.loads(line)
        do = arguments.pop("do")
        try:
            if do in QUESTIONS:
                if clipper is None:
                    clipper = OptaxPeer(peer) if peer == "optax" else TorchPeer(peer)
                answer = getattr(clipper, do)(**arguments)
            else:
                answer = getattr(probes, do)(peer, **arguments)
            reply = {"answer": answer}
        except Exception as error:
            reply = {"error": last_line(error)}
        print(json.dumps(reply), file=channel)


if __name__ == "__main__":
    main()
