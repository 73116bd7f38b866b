"""What a clip factor would clip: statistics of given gradients, and ratios measured on one's own pictures.

A clip factor limits the ratio of gradient norm to weight norm. That ratio depends on the network, on how far it is
trained, and on the batch size: gradients of larger batches are smaller. So it is measured.

Examples:
    >>> model = timm.create_model("test_resnet", num_classes=3)
    >>> batches = [(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0]))]
    >>> measured = measure_clip_range(model, batches, count=1)
    >>> isinstance(measured, ClipRange), isinstance(measured.stages[0], Stage)
    (True, True)
    >>> 0 <= measured.share(0.01) <= 1  # of units that a factor of 0.01 would have clipped
    True

    On pictures, with train.py's augmentation:

    >>> from pathlib import Path
    >>> from PIL import Image
    >>> for name in ("cat", "dog"):
    ...     Path("pictures", name).mkdir(parents=True)
    ...     Image.new("RGB", (64, 64)).save(Path("pictures", name, "0.png"))
    >>> model, batches = network_and_batches(
    ...     "test_resnet", Path("pictures"), 2, 64, pretrained=False, checkpoint=None, device="cpu"
    ... )
    >>> next(iter(batches))[0].shape
    torch.Size([2, 3, 64, 64])
"""

# timm and torch type only a part of what they export.
# pyright: reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from .._clip_defaults import CLIP_EPS, CLIP_FACTOR
from .._progress import Progress, silent
from ..checkpoint import Checkpoint, fill
from ..inference.images import picture_config
from ..optim import agc
from ..optim.exempt import classifier_weights
from ..optim.gradients import parameters_with_gradient
from ..optim.units import unit_axes

__all__ = [
    "AT_REST",
    "QUANTILES",
    "SHARES",
    "ClipRange",
    "ParameterClipStats",
    "Stage",
    "agc_stats",
    "measure_clip_range",
    "network_and_batches",
]

QUANTILES = (0.05, 0.5, 0.95, 0.99)
"""The quantiles of the ratio of gradient norm to weight norm that statistics report."""
SHARES = (0.01, 0.05, 0.10, 0.25)
"""The shares of units for which `ClipRange` states a clip factor."""
AT_REST = 1e-6
"""A unit with a smaller ratio of gradient norm to weight norm hardly moves; no clip factor is meant for it."""
_STAGE = re.compile(r"[^.\d]*(\.?\d+)?")  # stem, stages.0, layer1, blocks.3, head

Batch = tuple[Tensor, Tensor]  # pictures (N, C, H, W), labels (N,)


# -- statistics of the gradients that are there ------------------------------------------------------------------------


class ParameterClipStats(agc.ClipStats):
    """What clipping would do to the gradient of one parameter."""

    name: str


def agc_stats(model: nn.Module, clip_factor: float = CLIP_FACTOR, eps: float = CLIP_EPS) -> list[ParameterClipStats]:
    """What adaptive clipping would do to the gradients of a backward pass. Nothing is changed.

    Args:
        model: Any model, wrapped or not.
        clip_factor: Largest ratio of gradient norm to weight norm.
        eps: Smaller weight norms count as this one.

    Returns:
        One row for every parameter with a gradient: `name`; `units`; `zero_grad_units`, those with a gradient of
        exactly zero (at initialisation, with skip gains of 0, most of a normalizer-free network's);
        `non_finite_units`, those where it is infinite or NaN;
        `clipped_fraction`, 0 for the classifier's weight, which is exempt; `ratio_quantiles` of gradient norm over
        weight norm.

    Raises:
        ValueError: A negative or NaN factor or eps, or a gradient that cannot be clipped.

    Examples:
        >>> layer = torch.nn.Linear(2, 3, bias=False)
        >>> layer.weight.grad = torch.ones(3, 2)
        >>> row: ParameterClipStats = agc_stats(layer)[0]
        >>> row["units"]
        3
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


# -- ratios on one's own pictures --------------------------------------------------------------------------------------


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
    """What `measure_clip_range` has measured."""

    stages: list[Stage]
    batches: int
    warmup_losses: list[float]

    def clip_factor(self, share: float) -> float:
        """The clip factor that would have clipped this share of all units with a gradient; NaN if none has one."""
        ratios = np.concatenate([stage.ratios for stage in self.stages])
        return float(np.quantile(ratios, 1 - share)) if ratios.size else float("nan")

    def idle(self) -> float:
        """The share of all units whose gradient is zero or less than `AT_REST` of their weight."""
        units = sum(stage.units for stage in self.stages)
        moving = units - sum(stage.zero_units for stage in self.stages)
        return 1 - self.share(AT_REST) * moving / units if moving else 1.0

    def share(self, clip_factor: float) -> float:
        """The share of all units with a gradient that this clip factor would have clipped; NaN if none has one."""
        ratios = np.concatenate([stage.ratios for stage in self.stages])
        return float((ratios > clip_factor).mean()) if ratios.size else float("nan")


def network_and_batches(
    name: str,
    data: Path,
    batch_size: int,
    img_size: int | None,
    pretrained: bool,
    checkpoint: Checkpoint | None,
    device: str,
) -> tuple[nn.Module, Iterable[Batch]]:
    """A network and shuffled, augmented batches for it, as timm's train.py makes them by default.

    Args:
        name: As `timm.create_model` takes it.
        data: A folder with one folder of pictures per class.
        batch_size: Of every batch; an incomplete last batch is dropped.
        img_size: Height and width in pixels, the network's own by default.
        pretrained: Start from the published weights.
        checkpoint: Start from these weights; a classifier of another size is replaced by a new one.
        device: Where to run, as torch names it.

    Returns:
        The network, and batches of pictures (N, C, H, W) and labels (N,).

    Raises:
        ValueError: There are fewer pictures than one batch, fewer than two classes, weights of another network, or a
            network that takes no pictures.
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
        model = fill(name, checkpoint).float()
        if model.num_classes != classes:
            model.reset_classifier(classes)
    config = picture_config(model, use_test_size=False)
    model = model.to(device)
    channels, *size = config["input_size"]
    dataset.input_img_mode = "RGB" if channels == 3 else "L"  # as in train.py
    loader: Any = create_loader(
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


def measure_clip_range(
    model: nn.Module,
    batches: Iterable[Batch],
    count: int = 8,
    warmup_steps: int = 0,
    track: Progress = silent,
) -> ClipRange:
    """Ratios of gradient norm to weight norm on a few batches, after a few steps of training.

    Args:
        model: Any timm model, on the device of its parameters; the warmup changes it.
        batches: (N, C, H, W) and labels (N,); begun again when they end.
        count: How many batches to measure, with one backward pass each and no step between them.
        warmup_steps: Steps of clipped SGD before the measurement (clip factor 0.01, learning rate rising to
            0.1 N / 256). A normalizer-free network starts with most of its gradients at exactly zero, as its skip gains
            are 0.
        track: Shows progress.

    Raises:
        ValueError: `batches` is empty, a loss or a gradient is not finite, or all gradients are zero.
    """
    endless = _again_and_again(batches)
    model.train()
    losses = _warm_up(model, endless, warmup_steps, track)
    ratios = _ratios(model, endless, count, track)
    if not any(ratio.any() for found in ratios.values() for ratio in found):
        raise ValueError(
            "no unit but the classifier's has a gradient, as at the beginning of training: take more --warmup-steps or "
            "start from a --checkpoint"
        )
    model.zero_grad()
    return ClipRange(_stages(model, ratios, count), count, losses)


def _backward(model: nn.Module, batch: Batch) -> float:
    """The loss of a batch, its gradients left in the parameters."""
    images, labels = batch
    device = next(model.parameters()).device
    model.zero_grad()
    loss = F.cross_entropy(model(images.to(device)), labels.to(device))
    loss.backward()
    return loss.item()


def _warm_up(model: nn.Module, batches: Iterator[Batch], steps: int, track: Progress) -> list[float]:
    """Train for a few steps; the loss of each."""
    losses: list[float] = []
    # Said here, as a network without a classifier is no reason to warn: its ratios are measured all the same.
    exempt = classifier_weights(model)
    optimizer = create_optimizer_v2(
        model, "agcsgd", lr=0.0, momentum=0.9, weight_decay=2e-5, clip_factor=CLIP_FACTOR, clip_exempt=exempt
    )
    for step in track(range(steps), "warming up"):
        batch = next(batches)
        loss = _backward(model, batch)
        losses.append(loss)
        if not np.isfinite(loss):
            raise ValueError(f"the loss was {loss} in step {step + 1} of the warmup; use fewer --warmup-steps")
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * len(batch[1]) / 256 * (step + 1) / steps
        optimizer.step()
    return losses


def _ratios(model: nn.Module, batches: Iterator[Batch], count: int, track: Progress) -> dict[str, list[Tensor]]:
    """By parameter, the ratios of its units (units,) in every batch that gave it a gradient."""
    names = {id(p): name for name, p in model.named_parameters()}
    exempt = {id(p) for p in classifier_weights(model)}
    axes = unit_axes(model)
    found: dict[str, list[Tensor]] = {}
    for batch in track(range(count), "measuring"):
        loss = _backward(model, next(batches))
        if not np.isfinite(loss):
            raise ValueError(f"the loss was {loss} in batch {batch + 1}: these weights have diverged")
        clipped = (p for p in model.parameters() if id(p) not in exempt)
        checked = parameters_with_gradient(clipped, lambda _, p: f"parameter {names[id(p)]}")
        for units in agc.measure(checked, CLIP_FACTOR, CLIP_EPS, lambda p: axes.get(id(p), 0)):
            for p, ratio in zip(units.parameters, units.ratio.split_with_sizes(units.counts), strict=True):
                if not ratio.isfinite().all():
                    raise ValueError(f"the gradient of {names[id(p)]} was not finite in batch {batch + 1}")
                found.setdefault(names[id(p)], []).append(ratio.cpu())
    return found


def _stages(model: nn.Module, ratios: dict[str, list[Tensor]], count: int) -> list[Stage]:
    """The ratios of the parameters, stage by stage, in the order of the network."""
    by_stage: dict[str, list[Tensor]] = {}
    for name, _ in model.named_parameters():
        if name in ratios:
            found = ratios[name]
            # A batch that left the parameter out has given it no gradient.
            missing = [torch.zeros_like(found[0])] * (count - len(found))
            by_stage.setdefault(_stage_of(name), []).append(torch.stack(found + missing))
    return [_stage(name, found) for name, found in by_stage.items()]


def _stage(name: str, ratios: Sequence[Tensor]) -> Stage:
    """A stage from the ratios (batches, units) of its parameters."""
    together = torch.cat(list(ratios), dim=1).float()
    zero = (together == 0).all(0)
    return Stage(name, together.shape[1], int(zero.sum()), together[together > 0].numpy())


def _stage_of(parameter: str) -> str:
    """The stage in a parameter's name: `stages.0` of `stages.0.1.conv1.weight`."""
    found = _STAGE.match(parameter)
    return found[0] if found and found[0] else parameter.partition(".")[0]


def _again_and_again(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, from the beginning whenever they end."""
    while True:
        empty = True
        try:
            for batch in batches:
                empty = False
                yield batch
        except RuntimeError as error:  # a loader's worker raises a traceback, with the reason in its last line
            raise ValueError(f"no batch could be read, {str(error).strip().splitlines()[-1]}") from error
        if empty:
            raise ValueError("expected at least one batch, got none")
