"""Tells what a clip factor would clip: in the gradients that are there, or on one's own pictures.

A clip factor limits the ratio of gradient norm to weight norm. The ratio depends on the network, on how far it is
trained, and on the batch size: gradients of larger batches are smaller. Therefore it is measured.

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
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
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
from ..inference.images import image_mode, picture_config
from ..optim import agc
from ..optim.exempt import classifier_weights
from ..optim.gradients import parameters_with_gradient
from ..optim.units import Axis, unit_axes

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
"""A unit with a smaller ratio of gradient norm to weight norm hardly moves. No clip factor is meant for it."""
_STAGE = re.compile(r"[^.\d]*(\.?\d+)?")  # stem, stages.0, layer1, blocks.3, head

Batch = tuple[Tensor, Tensor]  # pictures (N, C, H, W), labels (N,)


# -- the gradients that are there --------------------------------------------------------------------------------------


class ParameterClipStats(agc.ClipStats):
    """What clipping would do to the gradient of one parameter: the entries of `ClipStats`, and the name.

    Attributes:
        name: The parameter's name in the model.
    """

    name: str


def agc_stats(model: nn.Module, clip_factor: float = CLIP_FACTOR, eps: float = CLIP_EPS) -> list[ParameterClipStats]:
    """What adaptive clipping would do to the gradients of a backward pass. Nothing is changed.

    Args:
        model: Any model, wrapped or not.
        clip_factor: Largest ratio of gradient norm to weight norm.
        eps: Floor on the weight norm.

    Returns:
        One row for every parameter with a gradient. `units` counts its units, `zero_grad_units` those with a gradient
        of exactly zero, and `non_finite_units` those where it is infinite or NaN. At initialisation, most units of a
        normalizer-free network have a gradient of zero, as its skip gains are 0. `clipped_fraction` is 0 for the
        classifier's weight, which is exempt. `ratio_quantiles` are those of gradient norm over weight norm.

    Raises:
        ValueError: if the factor or eps is negative or NaN, or if a gradient cannot be clipped.

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


# -- one's own pictures ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """Ratios of gradient norm to weight norm of the units of one part of a network, over all batches.

    Attributes:
        name: The part's name in the network.
        units: Number of units that may be clipped: the classifier's weight does not count.
        zero_units: Number of units whose gradient was exactly zero in every batch.
        ratios: (units * batches,) in float32, without the zeros.
    """

    name: str
    units: int
    zero_units: int
    ratios: np.ndarray

    def quantiles(self, at: Sequence[float]) -> list[float]:
        """Quantiles of the ratios; NaN if there are no ratios."""
        return np.quantile(self.ratios, at).tolist() if self.ratios.size else [float("nan")] * len(at)


@dataclass(frozen=True)
class ClipRange:
    """What `measure_clip_range` has measured.

    Attributes:
        stages: The stages in the order of the network.
        batches: Number of measured batches.
        warmup_losses: The loss of every step of the warmup.
    """

    stages: list[Stage]
    batches: int
    warmup_losses: list[float]

    def ratios(self) -> np.ndarray:
        """The ratios of all stages: of every unit in every batch that gave it a gradient."""
        return np.concatenate([stage.ratios for stage in self.stages])

    def clip_factor(self, share: float) -> float:
        """The clip factor that would have clipped this share of all units with a gradient; NaN if none has one."""
        ratios = self.ratios()
        return float(np.quantile(ratios, 1 - share)) if ratios.size else float("nan")

    def idle(self) -> float:
        """The share of all units whose gradient is zero or less than `AT_REST` of their weight."""
        units = sum(stage.units for stage in self.stages)
        moving = units - sum(stage.zero_units for stage in self.stages)
        return 1 - self.share(AT_REST) * moving / units if moving else 1.0

    def share(self, clip_factor: float) -> float:
        """The share of all units with a gradient that this clip factor would have clipped; NaN if none has one."""
        ratios = self.ratios()
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
        name: The network's name for `timm.create_model`.
        data: A folder with one folder of pictures per class.
        batch_size: Number of pictures in every batch. An incomplete last batch is dropped.
        img_size: Height and width in pixels, the network's own by default.
        pretrained: Start from the published weights.
        checkpoint: Start from these weights. A classifier of another size is replaced by a new one.
        device: Where to run, as torch names it.

    Returns:
        The network, and batches of pictures (N, C, H, W) and labels (N,).

    Raises:
        ValueError: if there are fewer pictures than one batch, or fewer than two classes, if the weights belong to
            another network, or if the network takes no pictures.
    """
    dataset = _dataset(data, batch_size)
    model = _network(name, len(dataset.reader.class_to_idx), pretrained, checkpoint)
    config = picture_config(model, use_test_size=False)
    if img_size is not None:
        config["input_size"] = (config["input_size"][0], img_size, img_size)
    return model.to(device), _loader(dataset, config, batch_size, device)


def _dataset(data: Path, batch_size: int) -> Any:
    """The pictures in a folder, which must be at least one batch in at least two classes."""
    dataset: Any = create_dataset("", root=str(data))
    if len(dataset) < batch_size:
        raise ValueError(
            f"expected at least one batch of {batch_size} pictures in {data}, got {len(dataset)}; "
            "give a smaller --batch-size"
        )
    classes = len(dataset.reader.class_to_idx)
    if classes < 2:
        raise ValueError(f"expected a folder of pictures for each of at least 2 classes in {data}, got {classes}")
    return dataset


def _network(name: str, classes: int, pretrained: bool, checkpoint: Checkpoint | None) -> Any:
    """The network with a classifier of this many classes."""
    if checkpoint is None:
        return timm.create_model(name, pretrained, num_classes=classes)
    model: Any = fill(name, checkpoint).float()
    if model.num_classes != classes:
        model.reset_classifier(classes)
    return model


def _loader(dataset: Any, config: dict[str, Any], batch_size: int, device: str) -> Iterable[Batch]:
    """train.py's loader for training, with the defaults of its arguments."""
    dataset.input_img_mode = image_mode(config["input_size"][0])
    loader: Any = create_loader(
        dataset,
        input_size=config["input_size"],
        batch_size=batch_size,
        is_training=True,
        use_prefetcher=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        num_workers=2,
        persistent_workers=False,  # or they would wait to be collected as garbage, where torch waits 5 s for each
        device=torch.device(device),
    )
    return loader


def measure_clip_range(
    model: nn.Module,
    batches: Iterable[Batch],
    count: int = 8,
    warmup_steps: int = 0,
    track: Progress = silent,
) -> ClipRange:
    """Ratios of gradient norm to weight norm on a few batches, after a few steps of training.

    Args:
        model: Any timm model. The warmup changes it.
        batches: Pictures (N, C, H, W) and labels (N,). They are read again from the beginning when they end.
        count: How many batches to measure. Each has one backward pass, and no step follows.
        warmup_steps: Steps of clipped SGD before the measurement, with clip factor 0.01 and a learning rate that rises
            to 0.1 N / 256. Without them most gradients of a new normalizer-free network are exactly zero, as its skip
            gains are 0.
        track: Shows progress.

    Raises:
        ValueError: if `batches` is empty, a loss or a gradient is not finite, or all gradients are zero.
    """
    model.train()
    with closing(_again_and_again(batches)) as endless:
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
    """Compute the loss of a batch and return it. Its gradients are left in the parameters."""
    images, labels = batch
    device = next(model.parameters()).device
    model.zero_grad()
    loss = F.cross_entropy(model(images.to(device)), labels.to(device))
    loss.backward()
    return loss.item()


def _warm_up(model: nn.Module, batches: Iterator[Batch], steps: int, track: Progress) -> list[float]:
    """Train for a few steps, and return the loss of each."""
    losses: list[float] = []
    # Naming the exempt weights silences a warning: the ratios of a network without a classifier are measured too.
    exempt = classifier_weights(model)
    optimizer = create_optimizer_v2(
        model, "agcsgd", lr=0.0, momentum=0.9, weight_decay=2e-5, clip_factor=CLIP_FACTOR, clip_exempt=exempt
    )
    for step in track(range(steps), "warming up"):
        batch = next(batches)
        loss = _backward(model, batch)
        if not np.isfinite(loss):
            raise ValueError(f"the loss was {loss} in step {step + 1} of the warmup; use fewer --warmup-steps")
        losses.append(loss)
        peak = 0.1 * len(batch[1]) / 256
        for group in optimizer.param_groups:
            group["lr"] = peak * (step + 1) / steps
        optimizer.step()
    return losses


def _ratios(model: nn.Module, batches: Iterator[Batch], count: int, track: Progress) -> dict[str, list[Tensor]]:
    """For each parameter, the ratios of its units (units,) in every batch that gave it a gradient."""
    exempt = {id(p) for p in classifier_weights(model)}
    clipped = {name: p for name, p in model.named_parameters() if id(p) not in exempt}
    axes = unit_axes(model)
    found: dict[str, list[Tensor]] = {}
    for batch in track(range(count), "measuring"):
        loss = _backward(model, next(batches))
        if not np.isfinite(loss):
            raise ValueError(f"the loss was {loss} in batch {batch + 1}: these weights have diverged")
        for name, ratio in _ratios_of_gradients(clipped, axes).items():
            if not ratio.isfinite().all():
                raise ValueError(f"the gradient of {name} was not finite in batch {batch + 1}")
            found.setdefault(name, []).append(ratio.cpu())
    return found


def _ratios_of_gradients(parameters: dict[str, nn.Parameter], axes: Mapping[int, Axis]) -> dict[str, Tensor]:
    """The ratios (units,) of the parameters that have a gradient now."""
    names = {id(p): name for name, p in parameters.items()}
    checked = parameters_with_gradient(parameters.values(), lambda _, p: f"parameter {names[id(p)]}")
    ratios: dict[str, Tensor] = {}
    for units in agc.measure(checked, CLIP_FACTOR, CLIP_EPS, lambda p: axes.get(id(p), 0)):
        for p, ratio in zip(units.parameters, units.ratio.split_with_sizes(units.counts), strict=True):
            ratios[names[id(p)]] = ratio
    return ratios


def _stages(model: nn.Module, ratios: dict[str, list[Tensor]], count: int) -> list[Stage]:
    """The stages in the order of the network, from the ratios of their parameters in `count` batches."""
    by_stage: dict[str, list[Tensor]] = {}
    for name, _ in model.named_parameters():
        if name in ratios:
            found = ratios[name]
            # A batch without the parameter has given it no gradient.
            missing = [torch.zeros_like(found[0])] * (count - len(found))
            by_stage.setdefault(_stage_of(name), []).append(torch.stack(found + missing))
    return [_stage(name, found) for name, found in by_stage.items()]


def _stage(name: str, ratios: Sequence[Tensor]) -> Stage:
    """A stage, from the ratios (batches, units) of its parameters."""
    together = torch.cat(list(ratios), dim=1).float()
    zero = (together == 0).all(0)
    return Stage(name, together.shape[1], int(zero.sum()), together[together > 0].numpy())


def _stage_of(parameter: str) -> str:
    """The stage in a parameter's name, such as `stages.0` in `stages.0.1.conv1.weight`."""
    found = _STAGE.match(parameter)
    return found[0] if found and found[0] else parameter.partition(".")[0]


def _again_and_again(batches: Iterable[Batch]) -> Generator[Batch, None, None]:
    """The batches, again from the beginning whenever they end."""
    while True:
        problem = "expected at least one batch, got none"
        try:
            for batch in batches:
                problem = ""
                yield batch
        except (RuntimeError, OSError) as error:  # of a worker it is a whole traceback; its last line has the reason
            problem = f"no batch could be read, {str(error).strip().splitlines()[-1]}"
        if problem:
            raise ValueError(problem)  # not from the error, whose traceback would keep the loader's workers
