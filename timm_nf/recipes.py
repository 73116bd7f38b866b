"""The papers' training settings, as files for timm's `train.py --config`.

train.py uses such a file as the defaults of its arguments, and ignores keys that are not arguments. Therefore
tests/test_recipes.py compares every key and value with the script's arguments.

Sources: arXiv:2102.06171, sections 4 to 6 and appendix A; deepmind-research nfnets/{experiment,experiment_nfnets,
experiment_nf_regnets,dataset,autoaugment,optim,utils}.py at f5de0ede. If they differ, the code counts.

Examples:
    >>> recipe = RECIPES["finetune"]["nfnet"]
    >>> isinstance(recipe, Recipe), recipe.batch_size
    (True, 2048)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import Any

import yaml

from ._clip_defaults import CLIP_EPS, CLIP_FACTOR
from ._text import counted
from .variants import VARIANTS, Variant

__all__ = ["RECIPES", "Recipe", "as_yaml", "purposes", "settings"]


@dataclass(frozen=True)
class Recipe:
    """Settings of one family and purpose.

    Attributes:
        title: The purpose, in words.
        source: The source of the settings.
        batch_size: The batch size of all processes together.
        lr: The peak learning rate at that batch size. It scales linearly with the batch size.
        settings: train.py's arguments by name, except those that depend on the network or the batch size.
        chosen: The settings that the sources leave open.
        lr_follows_batch: Whether rate and smallest rate are proportional to the batch size. If not, they stay the same.
    """

    title: str
    source: str
    batch_size: int
    lr: float
    settings: dict[str, Any]
    chosen: str = ""
    lr_follows_batch: bool = True


IMAGES = 1_281_167  # of ImageNet's training set

_EVERYWHERE: dict[str, Any] = {
    "device_modules": ["timm_nf"],
    # The authors warm up from 0, start the cosine after the warmup, and update the rate at every step. By default,
    # train.py updates it once per epoch, starts at warmup_lr, and starts the cosine with the warmup.
    "sched": "cosine", "sched_on_updates": True, "warmup_prefix": True, "warmup_lr": 0.0, "min_lr": 0.0,
    "momentum": 0.9,
    "scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "hflip": 0.5, "train_interpolation": "bicubic",
    "color_jitter": 0.0, "reprob": 0.0, "smoothing": 0.1,
}  # fmt: skip
_AGC: dict[str, Any] = {"opt": "agcsgd", "opt_kwargs": {"clip_factor": CLIP_FACTOR, "clip_eps": CLIP_EPS}}
_SGD: dict[str, Any] = {"opt": "sgd"}  # timm's `sgd` has Nesterov momentum
_BFLOAT16: dict[str, Any] = {"amp": True, "amp_dtype": "bfloat16"}
_FLOAT32: dict[str, Any] = {"amp": False}
_MIX: dict[str, Any] = {
    "mixup": 0.2, "cutmix": 1.0, "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "elem",
}  # fmt: skip
# p1: the authors apply every layer, timm's default applies half of them. mmax15: timm's default maximum is 10.
_RAND_AUGMENT = {"aa": "rand-m{}-n4-p1-mmax15"}
_NO_EMA: dict[str, Any] = {"model_ema": False}


def _ema(decay: float) -> dict[str, Any]:
    # Without warmup, 112 000 steps (360 epochs) at 0.99999 would leave a third of the average at the initial weights.
    return {"model_ema": True, "model_ema_decay": decay, "model_ema_warmup": True}


def _epochs(total: int, warmup: int) -> dict[str, Any]:
    return {"epochs": total - warmup, "warmup_epochs": warmup}  # with warmup_prefix, `epochs` excludes the warmup


_NFNET = Recipe(
    "from scratch on ImageNet",
    "arXiv:2102.06171, A.1 and A.3; deepmind-research nfnets/experiment_nfnets.py",
    4096, 1.6, _EVERYWHERE | _epochs(360, 5) | _AGC | {"weight_decay": 2e-5, "drop_path": 0.25} | _RAND_AUGMENT
    | _MIX | _ema(0.99999) | _BFLOAT16,
)  # fmt: skip
_AFTER_PRETRAINING = "arXiv:2102.06171, section 6.2 and A.5: ImageNet after pre-training on 300 million images"
# 15 000 steps, of which 5000 are warmup. An epoch of ImageNet has 625 steps at this batch size.
_FINETUNE: dict[str, Any] = _EVERYWHERE | _epochs(24, 8) | {"pretrained": True}

# {purpose: {prefix of the network's name: recipe}}. `_of_variant` adds NFNets' dropout and RandAugment, and NF-RegNets'
# dropout and weight decay.
RECIPES: dict[str, dict[str, Recipe]] = {
    "scratch": {
        "nfnet": _NFNET,
        "dm_nf_regnet": Recipe(
            "from scratch on ImageNet", "deepmind-research nfnets/experiment_nf_regnets.py", 1024, 0.4,
            _EVERYWHERE | _epochs(360, 5) | {"min_lr": 1e-3} | _SGD | {"drop_path": 0.1} | _MIX | _ema(0.99999)
            | _FLOAT32,
            "the weight decay of B6 to B8, by the rule of B0 to B5", lr_follows_batch=False,
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
"""All recipes, by purpose and then by family."""


def purposes(name: str) -> list[str]:
    """The purposes for which a network has recipes.

    Raises:
        ValueError: if there is no such network.

    Examples:
        >>> purposes("nfnet_f0")
        ['scratch', 'finetune', 'small-batch']
    """
    if name not in VARIANTS:
        raise ValueError(f"no network is called {name!r}; `timm-nf list` shows all {len(VARIANTS)}")
    return [purpose for purpose, families in RECIPES.items() if any(name.startswith(family) for family in families)]


def settings(name: str, purpose: str = "scratch", world_size: int = 1, batch_size: int | None = None) -> dict[str, Any]:
    """The settings of a recipe, as train.py's arguments by name.

    Args:
        name: Name of the network, without a tag.
        purpose: `scratch`, `finetune` or `small-batch`.
        world_size: Number of processes. Each takes the same share of a batch.
        batch_size: Batch size of all processes together, by default the recipe's. The learning rate and its minimum are
            proportional to it. Those of NF-RegNets from scratch stay the same, as the authors' do.

    Raises:
        ValueError: if there is no such recipe, or the batch cannot be divided between the processes.

    Examples:
        >>> settings("nfnet_f0", "scratch", world_size=8)["batch_size"]  # of each process
        512
    """
    recipe = _recipe(name, purpose)
    batch_size = recipe.batch_size if batch_size is None else batch_size
    share = _share(batch_size, world_size, even="mixup" in recipe.settings)
    variant = VARIANTS[name]
    network = {"model": name, "img_size": variant.train_size}
    times = batch_size / recipe.batch_size if recipe.lr_follows_batch else 1.0
    pace = {"batch_size": share, "lr": round(recipe.lr * times, 12)}
    given = recipe.settings | {"min_lr": recipe.settings["min_lr"] * times}
    return network | pace | given | _of_variant(name, variant, given)


def as_yaml(name: str, purpose: str = "scratch", world_size: int = 1, batch_size: int | None = None) -> str:
    """The settings as a file for `train.py --config`. Comments at its top list what train.py does differently.

    Args:
        name: The network's name.
        purpose: The recipe's purpose.
        world_size: Number of processes.
        batch_size: Batch size of all processes together.

    Raises:
        ValueError: if there is no such recipe, or the batch cannot be divided between the processes.

    Examples:
        >>> print(as_yaml("nfnet_f0", "scratch", world_size=8).splitlines()[0])
        # nfnet_f0, from scratch on ImageNet: a batch of 4096 images in 8 processes.
    """
    values = settings(name, purpose, world_size, batch_size)
    recipe, variant = _recipe(name, purpose), VARIANTS[name]
    start = "python" if world_size == 1 else f"torchrun --nproc-per-node {world_size}"
    head = [
        f"{name}, {recipe.title}: a batch of {values['batch_size'] * world_size} images in "
        f"{counted(world_size, 'process', 'processes')}.",
        f"{start} train.py --config THIS_FILE --data-dir IMAGENET",
        *wrap(f"Source: {recipe.source}.", 116),
    ]
    if recipe.chosen:
        head += wrap(f"Not in the source, chosen here: {recipe.chosen}.", 116)
    if values.get("pretrained") and not variant.hf_hub_id:
        head.append("This network has no published weights: give yours by --pretrained-path FILE.")
    head += ["", "What train.py cannot express, or does in its own way:"]
    differences = list(_differences(variant, values))
    if purpose != "finetune":
        differences.insert(0, _pace(values, world_size))
    for text in differences:
        if text.startswith("python"):  # a command stays on one line
            head.append(text)
        else:
            head += wrap(f"- {text}", 116, subsequent_indent="  ")
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


def _of_variant(name: str, variant: Variant, given: dict[str, Any]) -> dict[str, Any]:
    """The settings that depend on the variant, without those that the recipe gives."""
    values: dict[str, Any] = {}
    if "drop" not in given:
        values["drop"] = variant.drop_rate
    if "aa" in given:
        values["aa"] = given["aa"].format(variant.rand_augment)
    if "weight_decay" not in given:  # an NF-RegNet: 5e-5 for B0 to 13e-5 for B8
        values["weight_decay"] = float(f"{5 + int(name[-1])}e-5")
    return values


def _updates(values: dict[str, Any], world_size: int) -> dict[str, tuple[float, float]]:
    """All updates and those of the warmup, with the authors' count and with train.py's.

    The authors count epochs in images, so that one has a fraction of a batch. train.py leaves out what does not fill a
    batch of every process.
    """
    batch_size, warmup = values["batch_size"] * world_size, values["warmup_epochs"]
    epochs = values["epochs"] + warmup
    each = -(-IMAGES // world_size) // values["batch_size"]
    return {
        "authors": (IMAGES * epochs // batch_size, warmup * IMAGES / batch_size),
        "train.py": (each * epochs, each * warmup),
    }


def _peak_share(step: float, updates: float, warmup: float) -> float:
    """The learning rate over its peak, with a minimum of 0."""
    return step / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (updates - warmup))) / 2


def _pace(values: dict[str, Any], world_size: int) -> str:
    """How the counts of updates differ, and the rates with them."""
    there, here = _updates(values, world_size).values()
    end = min(there[0], here[0])
    steps = (there[1], here[1], *(end * i / 1000 for i in range(1001)))  # the warmups' ends are the cusps
    gap = max(abs(_peak_share(step, *there) - _peak_share(step, *here)) for step in steps)
    return (
        f"Updates: {there[0]:,} there, {here[0]:,} here, where an epoch ends at its last whole batch. At the same "
        f"update the rates differ by up to {100 * gap:.2f} % of the peak."
    )


def _differences(variant: Variant, values: dict[str, Any]) -> Iterator[str]:
    """What the authors do otherwise than train.py with these settings."""
    nfnet = variant.family == "NFNet"
    yield (
        "Crops: the authors' have at least 10 % of the picture's area and a side that is drawn uniformly. Here the "
        "area is, from 8 %, and the logarithm of the aspect ratio."
    )
    yield "Resizing: theirs has no antialiasing, Pillow's bicubic here has."
    if "aa" in values and variant.rand_augment is not None:
        yield (
            "RandAugment: the authors apply it after MixUp and CutMix, train.py before. Theirs has a sixteenth "
            "operation, Cutout, and other distances of translation. Rotation, shear and translation take the nearest "
            "pixel and fill with 128; here they are bicubic and fill with the mean colour."
        )
        yield (
            "RandAugment's Contrast: the authors blend with the number of pixels / 256, at most 255, where timm takes "
            f"the mean grey. It is among the four operations of {100 * (1 - (15 / 16) ** 4):.0f} % of their images."
        )
        if (added := int(variant.rand_augment * 11)) > 128:
            yield f"RandAugment's SolarizeAdd: {added} is added there at this magnitude, 128 here, timm's limit."
        yield (
            "timm_nf.augment.AuthorsRandAugment has the authors' operations for a training loop of your own. train.py "
            "cannot take it."
        )
    if "mixup" in values:
        yield (
            "MixUp and CutMix: the authors apply each to one half of every batch and read one more image as the "
            "partner. train.py chooses one of the two for each image, and takes the partner from the same batch."
        )
    if values["model_ema"]:
        yield (
            "Warmup of the weight average: after t steps the authors' decay is min(decay, (1+t)/(10+t)), an average "
            "over about t/9 steps. timm's is min(decay, 1-(1+t)^(-2/3)), an average over (1+t)^(2/3) steps."
        )
    if values["drop_path"]:
        yield (
            "Stochastic depth: like the authors' code, this network does not rescale the branches that remain. timm's "
            "own networks do."
        )
    if nfnet:
        yield (
            "Sharpness-aware minimisation: train.py has none. The paper uses it for F6, for the better F5 (86.3 %) and "
            "for fine-tuning (rho 0.05)."
        )
    if values["amp"]:
        yield (
            "bfloat16: under autocast the classifier's logits are bfloat16 too, and parameters and gradients stay "
            "float32. The authors cast the parameters for the forward and backward pass."
        )
    else:
        yield "float32: train.py turns on TF32 for matrix products on CUDA."
    whole = variant.test_size + 32
    if nfnet:
        mode, how = "squash", f"resize to {whole} px in both directions and crop the center"
    else:
        mode, how = "center", f"crop {variant.test_size} / {whole} of the shorter side"
    yield f"Evaluation: train.py validates at the training size. The authors test at {variant.test_size} px and {how}:"
    pct = math.floor(1e4 * variant.test_size / whole) / 1e4  # rounded down: timm rounds size / pct down
    use_ema = "--use-ema " if values["model_ema"] else ""
    yield (
        f"python -m timm_nf validate.py IMAGENET/val --model {values['model']} --checkpoint FILE "
        f"{use_ema}--img-size {variant.test_size} --crop-mode {mode} --crop-pct {pct}"
    )
