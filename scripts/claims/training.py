"""Makes one training run on Fashion-MNIST: a small network or its batch-normalised twin, with any kind of clipping."""

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
from timm_nf._relative_error import relative_error
from timm_nf.diagnostics import signal_stats
from timm_nf.env import machine
from timm_nf.layers import SameConv2d, ScaledStdConv2d
from timm_nf.models.blocks import NormFreeBlock

CACHE = Path(__file__).parents[2] / ".cache" / "fashion-mnist"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
MEAN, STD = 0.2860, 0.3530  # of Fashion-MNIST's training pixels
PIXELS = 32
CHANNELS = (48, 96, 192, 384)  # widths double as the resolution halves, so that a block costs the same in every stage
STAGES = ("stages.0.", "stages.1.", "stages.2.", "stages.3.")


@dataclass(frozen=True)
class Run:
    """The settings of one run. They are the first columns of its row.

    Attributes:
        plan: 1 for the first experiment, whose old rows are kept. 2 for the experiment of plan.md.
        net: `nf`; `nf-plain`, without weight standardisation; `bn-zero`, the batch-normalised twin, its branches
            starting at zero; `bn`, the twin with branches that start at full strength.
        depths: Numbers of blocks in the stages, such as 1-1-1-1.
        width: Factor on the number of channels of all stages.
        clip: `none`; `unit`, adaptive; `layer`, adaptive with one norm for a whole parameter; `global`.
        factor: The clip factor of adaptive clipping, the largest norm for `global`, 0 for `none`.
        spared: Prefixes of the names of parameters that are not clipped, joined by spaces.
        alone: Prefixes of the names of the only parameters that are clipped. If empty, all but the spared ones are.
        batch: Batch size.
        lr: Peak learning rate.
        images: Number of training images. They are the first ones in a fixed order.
        epochs: Number of passes over the images.
        dropout: Rate of dropout before the classifier.
        drop_path: Rate of stochastic depth.
        seed: Seed for the initial weights, the batches and dropout.
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
    """The results of one run. They are the last columns of its row. In plan 1 the gaps and the shift are NaN."""

    accuracy: float  # in % of the 10 000 test images; chance level, 10, if a parameter is NaN or infinite
    loss: float  # mean training loss of the last epoch
    params: int
    macs: int  # of one image
    seconds: float  # of processor time, since runs share the machine and may be stopped for a while
    mode_gap: float  # relative L2 distance of the logits in training mode from those in test mode, without dropout
    mates_gap: float  # the same distance between logits in training mode, with other images in the batch
    mean_shift: float  # the share of squared channel means in the second moment after a block, averaged over blocks
    machine: str  # and versions


@cache
def load(train: bool) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 32, 32) in float32, padded with black and normalised, and labels (N,).

    Raises:
        FileNotFoundError: if the files are not in Debian's folder and cannot be downloaded.
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
    """Build the network of a run: the row of NF-ResNet-50 with other depths and widths, or its batch-normalised twin.

    Shortcuts average-pool instead of striding. At 32 pixels, three strided 1x1 shortcuts would see one of 64 positions.
    At first the network is little more than its shortcuts, as skip gains start at 0 and are clipped (see LOG.md).
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
    """The same convolution without standardisation: its weight has mean 0 and variance 1 / fan-in only at the start."""

    def effective_weight(self) -> Tensor:
        return self.weight * (self.gain * self.scale)


def without_standardisation(model: nn.Module) -> nn.Module:
    """The network without weight standardisation, with the same initial weights."""
    for module in model.modules():
        if isinstance(module, ScaledStdConv2d):
            module.__class__ = PlainConv2d
    return model


def batch_normalised(model: nn.Module, zero: bool) -> nn.Module:
    """Make the twin: convolutions without bias, batch normalisation after each, and alpha, beta and skip gains of 1.

    Args:
        model: The network. It is changed.
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
    """Clip adaptively with one norm for each parameter, instead of one for each unit."""
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
    """The learning rate of a step: linear over the first quarter of the steps, then a cosine to 0."""
    warmup = max(1, steps // 4)
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """The accuracy in % of the test images."""
    images, labels = load(train=False)
    hits = [(model(x).argmax(1) == y).sum() for x, y in zip(images.split(1000), labels.split(1000), strict=True)]
    return 100 * sum(hit.item() for hit in hits) / len(labels)


@torch.no_grad()
def measured(run: Run, model: nn.Module) -> tuple[float, float, float]:
    """Measure `mode_gap`, `mates_gap` and `mean_shift` of a trained network. With dropout, both gaps are NaN.

    This changes running statistics, so measure the accuracy first.
    """
    images = load(train=False)[0][:384]
    stats = signal_stats(model.eval(), images)[1:]  # after the blocks; the first entry is the input of the first block
    shift = float(np.mean([s["avg_sq_mean"] / (s["avg_sq_mean"] + s["avg_var"]) for s in stats]))
    if run.dropout or run.drop_path:
        return math.nan, math.nan, shift
    tested = model(images[:128])
    model.train()
    trained, others = (model(torch.cat((images[:128], mates)))[:128] for mates in (images[128:256], images[256:]))
    return relative_error(trained, tested), relative_error(others, trained), shift


def train(run: Run, watch: Callable[[int, nn.Module], None] = lambda step, model: None) -> Result:
    """Train and test one network. It uses one thread, so two runs at a time fill two cores.

    Args:
        run: A run of plan 2.
        watch: A function that is called in every step, before the gradients are clipped.
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
    shuffle = torch.Generator().manual_seed(run.seed)  # so that all networks of this seed see the same batches
    epoch_steps = run.images // run.batch
    losses = []
    for step in range(run.epochs * epoch_steps):
        if step % epoch_steps == 0:
            losses, batches = [], torch.randperm(run.images, generator=shuffle).split(run.batch)
        chosen = batches[step % epoch_steps]
        model.train()
        loss = F.cross_entropy(model(images[chosen]), labels[chosen], label_smoothing=0.1)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):  # NaN and infinite parameters do not recover
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
