"""The papers' training settings, as files for timm's `train.py --config`.

train.py turns such a file into defaults of its arguments and says nothing about a key that it has no argument for, so
tests/test_recipes.py holds every key and value against the arguments of the script.

Sources: arXiv:2102.06171, sections 4 to 6 and appendix A; deepmind-research nfnets/{experiment,experiment_nfnets,
experiment_nf_regnets,dataset,autoaugment,optim,utils}.py at f5de0ede. Where they differ the code is followed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import Any

import yaml

from ._clip_defaults import CLIP_EPS, CLIP_FACTOR
from .variants import VARIANTS, Variant

__all__ = ["RECIPES", "Recipe", "as_yaml", "purposes", "settings"]


@dataclass(frozen=True)
class Recipe:
    """Settings of one family and purpose.

    Attributes:
        title: What it is for.
        source: Where the settings are from.
        batch_size: Of all processes together.
        lr: Peak learning rate at that batch size; in proportion at another one.
        settings: train.py's arguments by name, without those that follow from network and batch size.
        chosen: What the sources leave open, as it was settled here.
    """

    title: str
    source: str
    batch_size: int
    lr: float
    settings: dict[str, Any]
    chosen: str = ""


_EVERYWHERE: dict[str, Any] = {
    "device_modules": ["timm_nf"],
    # The authors warm up from 0 and let the cosine begin after it, both by the step. train.py's defaults are another
    # schedule: constant in every epoch, the first one at warmup_lr, and the cosine already falling during warmup.
    "sched": "cosine", "sched_on_updates": True, "warmup_prefix": True, "warmup_lr": 0.0, "min_lr": 0.0,
    "momentum": 0.9,
    "scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "hflip": 0.5, "train_interpolation": "bicubic",
    "color_jitter": 0.0, "reprob": 0.0, "smoothing": 0.1,
}  # fmt: skip
_AGC: dict[str, Any] = {"opt": "agcsgd", "opt_kwargs": {"clip_factor": CLIP_FACTOR, "clip_eps": CLIP_EPS}}
_SGD: dict[str, Any] = {"opt": "sgd"}  # timm's is Nesterov's
_BFLOAT16: dict[str, Any] = {"amp": True, "amp_dtype": "bfloat16"}
_FLOAT32: dict[str, Any] = {"amp": False}
_MIX: dict[str, Any] = {
    "mixup": 0.2, "cutmix": 1.0, "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "elem",
}  # fmt: skip
# Every layer is applied, as in the authors' code, not half of them; and without mmax timm stops at magnitude 10.
_RAND_AUGMENT = {"aa": "rand-m{}-n4-p1-mmax15"}
_NO_EMA: dict[str, Any] = {"model_ema": False}


def _ema(decay: float) -> dict[str, Any]:
    # Without warmup, a third of the average would still be its start after 112 000 steps at 0.99999: 360 epochs.
    return {"model_ema": True, "model_ema_decay": decay, "model_ema_warmup": True}


def _epochs(total: int, warmup: int) -> dict[str, Any]:
    return {"epochs": total - warmup, "warmup_epochs": warmup}  # with warmup_prefix, epochs are those after it


_NFNET = Recipe(
    "from scratch on ImageNet",
    "arXiv:2102.06171, A.1 and A.3; deepmind-research nfnets/experiment_nfnets.py",
    4096, 1.6, _EVERYWHERE | _epochs(360, 5) | _AGC | {"weight_decay": 2e-5, "drop_path": 0.25} | _RAND_AUGMENT
    | _MIX | _ema(0.99999) | _BFLOAT16,
)  # fmt: skip
_AFTER_PRETRAINING = "arXiv:2102.06171, section 6.2 and A.5: ImageNet after pre-training on 300 million images"
# 15 000 steps of which 5000 warm up: at this batch size, an epoch of ImageNet has 625
_FINETUNE: dict[str, Any] = _EVERYWHERE | _epochs(24, 8) | {"pretrained": True}

# {purpose: {family: recipe}}; NFNet's dropout and RandAugment and NF-RegNet's dropout and decay come from the variant
RECIPES: dict[str, dict[str, Recipe]] = {
    "scratch": {
        "nfnet": _NFNET,
        "dm_nf_regnet": Recipe(
            "from scratch on ImageNet", "deepmind-research nfnets/experiment_nf_regnets.py", 1024, 0.4,
            _EVERYWHERE | _epochs(360, 5) | {"min_lr": 1e-3} | _SGD | {"drop_path": 0.1} | _MIX | _ema(0.99999)
            | _FLOAT32,
            "the weight decay of B6 to B8, by the rule of B0 to B5",
        ),
    },
    "finetune": {
        "nfnet": Recipe(
            "fine-tuning", _AFTER_PRETRAINING, 2048, 0.1,
            _FINETUNE | _AGC | {"weight_decay": 1e-5, "drop": 0.25, "drop_path": 0.1} | _ema(0.9999) | _BFLOAT16,
            "clip factor and image size as from scratch, average, label smoothing, bfloat16, no other augmentation",
        ),
        "dm_nf_resnet": Recipe(
            "fine-tuning", _AFTER_PRETRAINING, 2048, 0.1,
            _FINETUNE | _SGD | {"weight_decay": 0.0, "drop": 0.0, "drop_path": 0.0} | _ema(0.9999) | _BFLOAT16,
            "no clipping, label smoothing, bfloat16",
        ),
    },
    "small-batch": {
        "nfnet": replace(
            _NFNET, title="small batches from scratch, no clipping", batch_size=256, lr=0.1,
            source="arXiv:2102.06171, section 4.1: at small batches clipping helps less. Otherwise as for large ones",
            settings={k: v for k, v in _NFNET.settings.items() if k != "opt_kwargs"} | _SGD,
            chosen="no clipping at all, batch size",
        ),
        "dm_nf_resnet": Recipe(
            "small batches from scratch, no clipping",
            "deepmind-research nfnets/experiment.py, the authors' settings for a batch-normalised ResNet; stochastic "
            "depth from nf_resnet.py", 256, 0.1,
            _EVERYWHERE | _epochs(90, 5) | _SGD | {"weight_decay": 1e-4, "drop": 0.0, "drop_path": 0.1} | _NO_EMA
            | _FLOAT32,
            "batch size, no dropout",
        ),
    },
}  # fmt: skip


def purposes(name: str) -> list[str]:
    """The purposes that a network has a recipe for.

    Raises:
        ValueError: if there is no such network.
    """
    if name not in VARIANTS:
        raise ValueError(f"no network is called {name!r}; `timm-nf list` shows all {len(VARIANTS)}")
    return [purpose for purpose, families in RECIPES.items() if any(name.startswith(family) for family in families)]


def settings(name: str, purpose: str = "scratch", world_size: int = 1, batch_size: int | None = None) -> dict[str, Any]:
    """train.py's arguments by the names it keeps them under.

    Args:
        name: Of the network, without a tag.
        purpose: `scratch`, `finetune` or `small-batch`.
        world_size: Processes, each of which takes the same share of a batch.
        batch_size: Of all processes together, by default the recipe's. The learning rate follows in proportion.

    Raises:
        ValueError: if there is no such recipe, or the processes cannot share the batch.
    """
    recipe = _recipe(name, purpose)
    batch_size = recipe.batch_size if batch_size is None else batch_size
    share = _share(batch_size, world_size, even="mixup" in recipe.settings)
    row = VARIANTS[name]
    network = {"model": name, "img_size": row.train_size}
    pace = {"batch_size": share, "lr": round(recipe.lr * batch_size / recipe.batch_size, 12)}
    return network | pace | recipe.settings | _of_variant(name, row, recipe.settings)


def as_yaml(name: str, purpose: str = "scratch", world_size: int = 1, batch_size: int | None = None) -> str:
    """The settings as a file for `train.py --config`, headed by what train.py cannot express; arguments as `settings`.

    Raises:
        ValueError: if there is no such recipe, or the processes cannot share the batch.
    """
    values = settings(name, purpose, world_size, batch_size)
    recipe, row = _recipe(name, purpose), VARIANTS[name]
    processes = "1 process" if world_size == 1 else f"{world_size} processes"
    start = "python" if world_size == 1 else f"torchrun --nproc-per-node {world_size}"
    head = [
        f"{name}, {recipe.title}: a batch of {values['batch_size'] * world_size} images in {processes}.",
        f"{start} train.py --config THIS_FILE --data-dir IMAGENET",
        *wrap(f"Source: {recipe.source}.", 116),
        *(wrap(f"Not in the source, chosen here: {recipe.chosen}.", 116) if recipe.chosen else ()),
    ]
    if values.get("pretrained") and not row.hf_hub_id:
        head.append("No weights of this network are published: give yours by --pretrained-path FILE.")
    head += ["", "What train.py cannot express, or does in its own way:"]
    for text in _differences(row, values):
        head += [text] if text.startswith("python") else wrap(f"- {text}", 116, subsequent_indent="  ")
    dumped: str = yaml.safe_dump(values, sort_keys=False, default_flow_style=None)
    return "".join(f"# {line}".rstrip() + "\n" for line in head) + dumped


def _share(batch_size: int, world_size: int, even: bool) -> int:
    """Images of a batch for every process; `even` because MixUp pairs them.

    Raises:
        ValueError: if the processes cannot share the batch, with the nearest batch sizes that they can.
    """
    if world_size < 1:
        raise ValueError(f"expected a batch for at least one process, got {batch_size} for {world_size}")
    step = 2 * world_size if even else world_size
    if batch_size < 1 or batch_size % step:
        below = batch_size // step * step
        nearest = " or ".join(f"--batch-size {size}" for size in (below, below + step) if size > 0)
        pairs = ", and twice that as MixUp pairs images" if even else ""
        raise ValueError(
            f"expected a batch size that is a multiple of the number of processes{pairs}, got {batch_size} for "
            f"{world_size}: give {nearest}"
        )
    return batch_size // world_size


def _recipe(name: str, purpose: str) -> Recipe:
    if purpose not in (known := purposes(name)):
        raise ValueError(f"{name} has no recipe {purpose!r}; it has {', '.join(known)}")
    return next(recipe for family, recipe in RECIPES[purpose].items() if name.startswith(family))


def _of_variant(name: str, row: Variant, given: dict[str, Any]) -> dict[str, Any]:
    """What depends on the variant and is not the recipe's own."""
    values: dict[str, Any] = {} if "drop" in given else {"drop": row.drop_rate}
    if "aa" in given:
        values["aa"] = given["aa"].format(row.rand_augment)
    if "weight_decay" not in given:  # of an NF-RegNet, whose name ends in its level
        values["weight_decay"] = float(f"{5 + int(name[-1])}e-5")
    return values


def _differences(row: Variant, values: dict[str, Any]) -> Iterator[str]:
    """What the authors do otherwise than train.py with these settings."""
    nfnet = row.family == "NFNet"
    if "aa" in values:
        yield (
            "RandAugment: the authors apply it after MixUp and CutMix, train.py before. Theirs has a sixteenth "
            "operation, Cutout, and other distances of translation."
        )
    if "mixup" in values:
        yield (
            "MixUp on half of every batch and CutMix on the other half: here every image takes one of the two by "
            "chance, and its partner from the same batch, where the authors read one more image."
        )
    if values["model_ema"]:
        yield (
            "The average's warmup: after t steps the authors' decay is min(decay, (1+t)/(10+t)), timm's "
            "min(decay, 1-(1+t)^(-2/3)): an average over the last (1+t)^(2/3) steps instead of t/9."
        )
    if values["drop_path"]:
        yield (
            "Stochastic depth: this network does not rescale the blocks that survive, like the authors'. A stock model "
            "of timm in its place does."
        )
    if nfnet:
        yield (
            "Sharpness-aware minimisation: train.py has none. The paper's F6, its better F5 (86.3 %) and its "
            "fine-tuned networks (rho 0.05) have it."
        )
    if values["amp"]:
        yield (
            "bfloat16: under autocast the classifier rounds its logits to bfloat16 as well; parameters and gradients "
            "stay float32, where the authors cast the parameters for the forward and backward pass."
        )
    else:
        yield "float32: train.py turns on TF32 for matrix products on CUDA."
    whole = row.test_size + 32
    mode, how = (
        ("squash", f"resize to {whole} px in both directions and crop the center")
        if nfnet
        else ("center", f"crop {row.test_size} / {whole} of the shorter side")
    )
    yield f"Evaluation: train.py validates at the training size. The authors test at {row.test_size} px and {how}:"
    pct = math.floor(1e4 * row.test_size / whole) / 1e4  # down, as timm rounds size / pct down
    yield (
        f"python -m timm_nf validate.py IMAGENET/val --model {values['model']} --checkpoint FILE "
        f"{'--use-ema ' if values['model_ema'] else ''}--img-size {row.test_size} --crop-mode {mode} --crop-pct {pct}"
    )
