"""Which clip factor would clip how much of a network: what its gradients say on a few batches of one's own pictures.

The ratio of gradient norm to weight norm is what a clip factor is the limit of. Where it lies depends on the network,
on how far it is trained and on the batch size (larger batches average larger gradients away), so it is measured.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.models import get_pretrained_cfg
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from .. import checkpoint as checkpoints
from ..optim import agc
from ..optim.exempt import classifier_weights
from ..optim.gradients import parameters_with_gradient
from ..optim.units import unit_axes
from ..variants import VARIANTS

QUANTILES = (0.05, 0.5, 0.95, 0.99)
SHARES = (0.01, 0.05, 0.10, 0.25)
_STAGE = re.compile(r"[^.\d]*(\.?\d+)?")  # stem, stages.0, layer1, blocks.3, head
_EPS = 1e-3  # of the clipping; weight norms below this count as this


@dataclass(frozen=True)
class Stage:
    """Ratios of gradient norm to weight norm of the units of one part of a network, over all batches."""

    name: str
    units: int  # that may be clipped, so without the classifier's weight
    zero_units: int  # whose gradient was exactly zero in every batch
    ratios: np.ndarray  # of every unit in every batch, without zeros; float32

    def quantiles(self, at: Sequence[float]) -> list[float]:
        """Quantiles of the ratios; NaN without any."""
        return np.quantile(self.ratios, at).tolist() if self.ratios.size else [float("nan")] * len(at)


@dataclass(frozen=True)
class ClipRange:
    """What `measure` has seen."""

    stages: list[Stage]
    batches: int
    warmup_losses: list[float]

    def clip_factor(self, share: float) -> float:
        """The clip factor that would have clipped this share of all units with a gradient; NaN if none has one."""
        ratios = np.concatenate([stage.ratios for stage in self.stages])
        return float(np.quantile(ratios, 1 - share)) if ratios.size else float("nan")

    def idle(self) -> float:
        """The share of all units whose gradient is zero or less than a millionth of their weight."""
        units = sum(stage.units for stage in self.stages)
        moving = units - sum(stage.zero_units for stage in self.stages)
        return 1 - self.share(1e-6) * moving / units if moving else 1.0

    def share(self, clip_factor: float) -> float:
        """The share of all units with a gradient that this clip factor would have clipped; NaN if none has one."""
        ratios = np.concatenate([stage.ratios for stage in self.stages])
        return float((ratios > clip_factor).mean()) if ratios.size else float("nan")


def load(
    name: str, data: Path, batch_size: int, img_size: int | None, pretrained: bool, checkpoint: Path | None, device: str
) -> tuple[nn.Module, Iterable[tuple[Tensor, Tensor]]]:
    """A network and shuffled, augmented batches for it, as timm's train.py makes them by default.

    Args:
        name: As `timm.create_model` takes it.
        data: A folder with one folder of pictures per class.
        batch_size: Of every batch; what is left over is dropped.
        img_size: Height and width in pixels, the network's own by default.
        pretrained: Start from the published weights.
        checkpoint: Start from these weights; a classifier of another size is replaced by a new one.
        device: Where to run, as torch names it.

    Raises:
        ValueError: There are fewer pictures than one batch, fewer than two classes, or weights of another network.
    """
    dataset: Any = create_dataset("", root=str(data))
    classes = len(dataset.reader.class_to_idx)
    if len(dataset) < batch_size:
        raise ValueError(
            f"expected at least one batch of {batch_size} pictures in {data}, got {len(dataset)}; "
            "give a smaller --batch-size"
        )
    if classes < 2:
        raise ValueError(f"expected a folder of pictures for each of at least 2 classes in {data}, got {classes}")
    if checkpoint is None:
        model: Any = timm.create_model(name, pretrained, num_classes=classes)
    else:
        model = _trained(name, checkpoint)
        if model.num_classes != classes:
            model.reset_classifier(classes)
    model = model.to(device)
    config = resolve_model_data_config(model)
    channels, *size = config["input_size"]
    loader = create_loader(
        dataset,
        input_size=(channels, img_size or size[0], img_size or size[1]),
        batch_size=batch_size,
        is_training=True,
        use_prefetcher=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        num_workers=2,
        device=torch.device(device),
    )
    return model, loader


def _trained(name: str, file: Path) -> nn.Module:
    """The network with the classifier that the file has."""
    if file.suffix == ".npz":  # the authors', which only our networks load
        if name.partition(".")[0] not in VARIANTS:
            raise ValueError(f"{file} cannot be loaded into {name}: expected a checkpoint of train.py or safetensors")
        return timm.create_model(name, checkpoint_path=file)
    weights = checkpoints.read(file)
    cfg = get_pretrained_cfg(name)
    classifier = weights.state_dict.get(f"{cfg.classifier}.weight") if cfg else None
    return checkpoints.build(name, weights, None if classifier is None else len(classifier)).float()


def measure(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    count: int = 8,
    warmup_steps: int = 0,
    track: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _: items,
) -> ClipRange:
    """Ratios of gradient norm to weight norm on a few batches, after a few steps of training.

    Args:
        model: Any timm model, on the device of its parameters; the warmup changes it.
        batches: (N, C, H, W) and labels (N,); begun again when they end.
        count: How many batches to measure, with one backward pass each and no step between them.
        warmup_steps: Steps of clipped SGD before that (clip factor 0.01, learning rate rising to 0.1 N / 256). A
            normalizer-free network starts with most of its gradients at exactly zero, as its skip gains are 0.
        track: Wraps an iterable to show its progress.

    Raises:
        ValueError: `batches` is empty, a loss or a gradient is not finite, or all gradients are zero.
    """
    device = next(model.parameters()).device
    endless = _again_and_again(batches)
    names = {id(p): name for name, p in model.named_parameters()}
    exempt = {id(p) for p in classifier_weights(model)}
    axes = unit_axes(model)
    model.train()

    def backward() -> tuple[float, int]:
        images, labels = next(endless)
        model.zero_grad()
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        loss.backward()
        return loss.item(), len(labels)

    losses: list[float] = []
    optimizer = create_optimizer_v2(model, "agcsgd", lr=0.0, momentum=0.9, weight_decay=2e-5, clip_factor=0.01)
    for step in track(range(warmup_steps), "warming up"):
        loss, batch_size = backward()
        losses.append(loss)
        if not np.isfinite(loss):
            raise ValueError(f"the loss was {loss} in step {step + 1} of the warmup; use fewer --warmup-steps")
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * batch_size / 256 * (step + 1) / warmup_steps
        optimizer.step()

    ratios: dict[int, list[Tensor]] = {}
    for batch in track(range(count), "measuring"):
        loss, _ = backward()
        if not np.isfinite(loss):
            raise ValueError(f"the loss was {loss} in batch {batch + 1}: these weights have diverged")
        clipped = (p for p in model.parameters() if id(p) not in exempt)
        checked = parameters_with_gradient(clipped, lambda _, p: f"parameter {names[id(p)]}")
        for units in agc.measure(checked, 0.01, _EPS, lambda p: axes.get(id(p), 0)):
            for p, ratio in zip(units.parameters, units.ratio.split_with_sizes(units.counts), strict=True):
                if not ratio.isfinite().all():
                    raise ValueError(f"the gradient of {names[id(p)]} was not finite in batch {batch + 1}")
                ratios.setdefault(id(p), []).append(ratio.cpu())
    if not any(ratio.any() for found in ratios.values() for ratio in found):
        raise ValueError(
            "no unit but the classifier's has a gradient, as at the beginning of training: take more --warmup-steps or "
            "start from a --checkpoint"
        )
    model.zero_grad()
    by_stage: dict[str, list[Tensor]] = {}
    for key, found in ratios.items():
        missing = [torch.zeros_like(found[0])] * (count - len(found))  # batches that left the parameter out
        by_stage.setdefault(_stage(names[key]), []).append(torch.stack(found + missing))
    order = list(dict.fromkeys(_stage(name) for name in names.values()))
    stages = [_summary(name, by_stage[name]) for name in order if name in by_stage]
    return ClipRange(stages, count, losses)


def _summary(name: str, ratios: Sequence[Tensor]) -> Stage:
    """Of (batches, units) for every parameter."""
    together = torch.cat(list(ratios), dim=1).float()
    zero = (together == 0).all(0)
    return Stage(name, together.shape[1], int(zero.sum()), together[together > 0].numpy())


def _stage(parameter: str) -> str:
    found = _STAGE.match(parameter)
    return found[0] if found and found[0] else parameter.partition(".")[0]


def _again_and_again(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        try:
            for batch in batches:
                empty = False
                yield batch
        except RuntimeError as error:  # of a loader's worker: a traceback, the reason in its last line
            raise ValueError(f"no batch could be read, {str(error).strip().splitlines()[-1]}") from error
        if empty:
            raise ValueError("expected at least one batch, got none")


class ParameterClipStats(agc.ClipStats):
    """What would be clipped of the units of one parameter."""

    name: str


def agc_stats(model: nn.Module, clip_factor: float = 0.01, eps: float = 1e-3) -> list[ParameterClipStats]:
    """What adaptive clipping would do to the gradients that a backward pass has left; nothing is changed.

    Args:
        model: Any model, wrapped or not.
        clip_factor: Largest ratio of gradient norm to weight norm.
        eps: Weight norms below this count as this.

    Returns:
        One row for every parameter with a gradient: `name`; `units`; `zero_grad_units`, those with a gradient of
        exactly zero (at initialisation, with skip gains of 0, most of a normalizer-free network's);
        `non_finite_units`, those where it is infinite or NaN;
        `clipped_fraction`, 0 for the classifier's weight, which is exempt; `ratio_quantiles` of gradient norm over
        weight norm.

    Raises:
        ValueError: A negative or NaN factor or eps, or a gradient that cannot be clipped.
    """
    clip_factor = agc.checked_setting("clip_factor", clip_factor)
    eps = agc.checked_setting("eps", eps)
    named = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    checked = parameters_with_gradient((p for _, p in named), lambda index, _: f"parameter {named[index][0]}")
    axes = unit_axes(model)
    measured = agc.measure(checked, clip_factor, eps, lambda p: axes.get(id(p), 0))
    exempt = {id(p) for p in classifier_weights(model)}
    rows: list[ParameterClipStats] = []
    for (name, p), row in zip(named, agc.summaries(measured, [[p] for _, p in named]), strict=True):
        if id(p) in exempt:
            row["clipped_fraction"] = 0.0
        rows.append({"name": name, **row})
    return rows
