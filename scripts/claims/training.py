"""One training run of scripts/claims: Fashion-MNIST, a small network, its batch-normalised twin, three clippings."""

import gzip
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torchvision.datasets import FashionMNIST

import timm_nf
from timm_nf._clip_defaults import CLIP_EPS
from timm_nf.diagnostics import signal_stats
from timm_nf.env import machine
from timm_nf.layers import SameConv2d, ScaledStdConv2d
from timm_nf.models.blocks import NormFreeBlock

CACHE = Path(__file__).parents[2] / ".cache" / "fashion-mnist"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
MEAN, STD = 0.2860, 0.3530  # of Fashion-MNIST's training pixels
PIXELS = 32
CHANNELS = (48, 96, 192, 384)  # each stage at half the resolution of the one before: a block costs the same in all
STAGES = ("stages.0.", "stages.1.", "stages.2.", "stages.3.")


@dataclass(frozen=True)
class Run:
    """What one run trains, and so the first columns of its row.

    Attributes:
        plan: 1 for the first experiment, whose rows are kept as they were; 2 for the one of plan.md.
        net: `nf`; `nf-plain`, without weight standardisation; `bn-zero`, the batch-normalised twin, its branches
            starting at zero; `bn`, the twin with branches that start at full strength.
        depths: Blocks of the stages, 1-1-1-1.
        width: Factor on all channels.
        clip: `none`; `unit`, adaptive; `layer`, adaptive with one norm for a whole parameter; `global`.
        factor: Clip factor of the adaptive ones, largest norm for `global`, 0 for `none`.
        spared: Beginnings of the names of the parameters that are not clipped, joined by spaces.
        alone: Beginnings of the names of the only parameters that are clipped; all but the spared ones if empty.
        batch: Batch size.
        lr: Peak learning rate.
        images: How many of the training images, the first ones of a fixed order.
        epochs: Passes over them.
        dropout: Before the classifier.
        drop_path: Rate of stochastic depth.
        seed: Of start, batches and dropout.
    """

    plan: int = 2
    net: str = "nf"
    depths: str = "1-1-1-1"
    width: float = 2 / 3
    clip: str = "none"
    factor: float = 0.0
    spared: str = "head.fc.weight"
    alone: str = ""
    batch: int = 256
    lr: float = 0.1
    images: int = 60000
    epochs: int = 10
    dropout: float = 0.0
    drop_path: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What came out, and so the last columns of the row; the three last but one are NaN in plan 1."""

    accuracy: float  # % of the 10 000 test images; 10, chance, for parameters that are not numbers
    loss: float  # mean training loss of the last epoch
    params: int
    macs: int  # of one image
    seconds: float  # of processor time: the runs share their machine and may be stopped for a while
    mode_gap: float  # relative L2 distance of logits in training mode from those in test mode, without dropping
    mates_gap: float  # the same of logits in training mode with other images in the batch
    mean_shift: float  # share of squared channel means in the second moment behind the blocks, their mean
    machine: str  # and versions


@cache
def load(train: bool) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 32, 32) in float32, padded with black and normalised, and labels (N,).

    Raises:
        FileNotFoundError: the files are neither in Debian's folder nor to be downloaded.
    """
    raw = CACHE / "FashionMNIST" / "raw"
    for file in DEBIAN.glob("*.gz"):
        if not (raw / file.stem).exists():
            raw.mkdir(parents=True, exist_ok=True)
            half = raw / f"{file.stem}.tmp"
            half.write_bytes(gzip.decompress(file.read_bytes()))
            half.rename(raw / file.stem)
    try:
        dataset = FashionMNIST(CACHE, train=train, download=True)  # downloads only what is missing
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"Fashion-MNIST is neither in {DEBIAN} nor can it be downloaded ({error}); "
            "on Debian or Ubuntu: apt-get install dataset-fashion-mnist"
        ) from None
    pad = (PIXELS - 28) // 2
    images = F.pad(dataset.data[:, None].float() / 255, (pad,) * 4)
    return (images - MEAN) / STD, dataset.targets


def build(run: Run) -> Any:
    """The network of a run: the row of NF-ResNet-50 with other depths and widths, or its twin.

    Shortcuts average-pool instead of striding: at 32 pixels three strided 1x1 shortcuts see one of 64 positions, and as
    skip gains start at 0 and clipping holds them back, there is little but shortcuts at first (tried, in LOG.md).
    """
    normalised = run.net.startswith("bn")
    options: dict[str, float] = {}
    if normalised:
        options["alpha"] = 1.0
    model = timm.create_model(
        "dm_nf_resnet50",
        depths=tuple(map(int, run.depths.split("-"))),
        channels=CHANNELS,
        width_factor=run.width,
        avg_down=True,
        in_chans=1,
        num_classes=10,
        drop_rate=run.dropout,
        drop_path_rate=run.drop_path,
        **options,
    )
    if normalised:
        return batch_normalised(model, zero=run.net == "bn-zero")
    return without_standardisation(model) if run.net == "nf-plain" else model


class PlainConv2d(ScaledStdConv2d):
    """The same convolution with its weight as it is: of mean 0 and variance 1 / fan-in at the start only."""

    def effective_weight(self) -> Tensor:
        return self.weight * (self.gain * self.scale)


def without_standardisation(model: nn.Module) -> nn.Module:
    """The network with weights that are not standardised, from the same start."""
    for module in model.modules():
        if isinstance(module, ScaledStdConv2d):
            module.__class__ = PlainConv2d
    return model


def batch_normalised(model: nn.Module, zero: bool) -> nn.Module:
    """The twin: bias-free convolutions followed by batch normalisation; alpha, beta and skip gains 1.

    Args:
        model: Is changed.
        zero: Start the scale of every branch's last normalisation at 0, as large-batch practice does
            (arXiv:1706.02677, section 5.1).
    """
    for name, conv in list(model.named_modules()):
        if isinstance(conv, ScaledStdConv2d):
            plain = SameConv2d(
                conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], groups=conv.groups
            )
            nn.init.kaiming_normal_(plain.weight, mode="fan_out", nonlinearity="relu")
            plain.bias = None
            model.set_submodule(name, nn.Sequential(plain, nn.BatchNorm2d(conv.out_channels)))
        elif isinstance(conv, NormFreeBlock):
            nn.init.ones_(conv.skipinit_gain).requires_grad_(False)
    if zero:
        for name, norm in model.named_modules():
            if name.endswith("conv3.1"):
                assert isinstance(norm, nn.BatchNorm2d)
                nn.init.zeros_(norm.weight)
    return model


def clip_layerwise_(parameters: list[nn.Parameter], factor: float, eps: float = CLIP_EPS) -> None:
    """Adaptive clipping with one norm for a whole parameter instead of one for each of its units."""
    for p in parameters:
        assert p.grad is not None
        limit = factor * p.detach().norm().clamp(min=eps)
        p.grad.mul_((limit / p.grad.norm().clamp(min=1e-6)).clamp(max=1.0))


def clip(run: Run, model: nn.Module) -> None:
    spared, alone = tuple(run.spared.split()), tuple(run.alone.split())
    parameters = [
        p
        for name, p in model.named_parameters()
        if p.grad is not None and (name.startswith(alone) if alone else not name.startswith(spared))
    ]
    if run.clip == "unit":
        timm_nf.adaptive_clip_grad_(parameters, run.factor)
    elif run.clip == "layer":
        clip_layerwise_(parameters, run.factor)
    elif run.clip == "global":
        nn.utils.clip_grad_norm_(parameters, run.factor)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear over the first quarter of the steps, then a cosine to 0."""
    warmup = max(1, steps // 4)
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """In % of the test images."""
    images, labels = load(train=False)
    hits = [(model(x).argmax(1) == y).sum() for x, y in zip(images.split(1000), labels.split(1000), strict=True)]
    return 100 * sum(hit.item() for hit in hits) / len(labels)


@torch.no_grad()
def measured(run: Run, model: nn.Module) -> tuple[float, float, float]:
    """`mode_gap`, `mates_gap` and `mean_shift` of a trained network; NaN where something is dropped by chance.

    Moves running statistics, so accuracy is taken before.
    """
    images = load(train=False)[0][:384]
    stats = signal_stats(model.eval(), images)[1:]  # behind the blocks, not the input of the first
    shift = float(np.mean([s["avg_sq_mean"] / (s["avg_sq_mean"] + s["avg_var"]) for s in stats]))
    if run.dropout or run.drop_path:
        return math.nan, math.nan, shift
    tested = model(images[:128])
    model.train()
    trained, others = (model(torch.cat((images[:128], mates)))[:128] for mates in (images[128:256], images[256:]))
    return relative(trained, tested), relative(others, trained), shift


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def train(run: Run, watch: Callable[[int, nn.Module], None] = lambda step, model: None) -> Result:
    """Train and test one network. Single-threaded, so that two runs at a time fill two cores.

    Args:
        run: Of plan 2.
        watch: Is called in every step with gradients that are not clipped yet.
    """
    assert run.plan == 2, "runs of plan 1 had batches that depended on the network"
    torch.set_num_threads(1)
    start = time.process_time()
    order = torch.from_numpy(np.random.default_rng(0).permutation(60000)[: run.images])
    images, labels = (data[order] for data in load(train=True))
    torch.manual_seed(run.seed)
    model = build(run).to(memory_format=torch.channels_last)
    groups = timm_nf.param_groups_agc(model, weight_decay=2e-5)
    optimizer = create_optimizer_v2(
        [{k: group[k] for k in ("params", "weight_decay")} for group in groups], "sgd", lr=0.0, momentum=0.9
    )  # timm's sgd has Nesterov momentum
    assert all(group["nesterov"] for group in optimizer.param_groups)
    shuffle = torch.Generator().manual_seed(run.seed)  # of its own: all networks of a seed see the same batches
    epoch_steps = run.images // run.batch
    losses = []
    for step in range(run.epochs * epoch_steps):
        if step % epoch_steps == 0:
            losses, batches = [], torch.randperm(run.images, generator=shuffle).split(run.batch)
        chosen = batches[step % epoch_steps]
        model.train()
        loss = F.cross_entropy(model(images[chosen]), labels[chosen], label_smoothing=0.1)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):  # parameters that are not numbers stay so
            break
        optimizer.zero_grad()
        loss.backward()
        watch(step, model)
        clip(run, model)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, run.epochs * epoch_steps, run.lr)
        optimizer.step()
    model.eval()
    tested = accuracy(model)
    gaps = measured(run, model) if math.isfinite(losses[-1]) else (math.nan,) * 3
    params, macs = model.cfg.count(PIXELS, in_chans=1, num_classes=10)
    seconds = time.process_time() - start
    return Result(tested, float(np.mean(losses)), params, macs, seconds, *gaps, machine())
