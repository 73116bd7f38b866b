"""What a network sees in picture files, with the preprocessing and the labels that belong to its weights."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import (
    CustomDatasetInfo,
    ImageNetInfo,
    infer_imagenet_subset,
    resolve_data_config,
)
from timm.models import get_pretrained_cfg
from torch import nn

from .images import reader


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one file, as (label, probability), or the error that kept it from being read."""

    path: Path
    classes: list[tuple[str, float]]
    error: str | None = None


def load_model(name: str, checkpoint: Path | None = None) -> nn.Module:
    """The network with its weights, in evaluation mode.

    Args:
        name: As `timm.create_model` takes it: a name with a tag of weights, `hf-hub:user/repo` or `local-dir:folder`.
        checkpoint: A file of weights to load instead of the published ones.

    Raises:
        RuntimeError: if it cannot be had, with what to do.
    """
    try:
        if checkpoint is not None:
            return timm.create_model(name, checkpoint_path=str(checkpoint)).eval()
        return timm.create_model(name, pretrained=True).eval()
    except Exception as error:  # the Hub client, its HTTP library and timm each raise their own kinds
        source = f"{name} with the weights of {checkpoint}" if checkpoint else f"{name} with its published weights"
        reason = f"{type(error).__name__}: {error}"
        raise RuntimeError(
            f"could not load {source} ({reason}); `timm-nf list` shows what has weights, downloads need a network; "
            "local weights are loaded by --checkpoint FILE, where a command has it, or as a folder (local-dir:FOLDER)"
        ) from error


def preprocessing(name: str) -> dict[str, Any]:
    """What timm does to a picture before it is evaluated with a registered name's weights."""
    cfg = get_pretrained_cfg(name)
    return resolve_data_config(pretrained_cfg=cfg.to_dict() if cfg else {}, use_test_size=True)


def labels(model: Any) -> list[str]:
    """What to call the classes: by the weights' own labels, ImageNet's descriptions, or else their numbers."""
    info: CustomDatasetInfo | ImageNetInfo
    cfg: dict[str, Any] = model.pretrained_cfg
    if cfg.get("label_names"):
        info = CustomDatasetInfo(cfg["label_names"], cfg.get("label_descriptions"))
    elif subset := infer_imagenet_subset(model):
        info = ImageNetInfo(subset)
    else:
        return [f"class {i}" for i in range(model.num_classes)]
    return [info.index_to_description(i) for i in range(model.num_classes)]


@torch.inference_mode()
def classify(model: nn.Module, paths: Iterable[Path], topk: int = 5, device: str = "cpu") -> Iterator[Prediction]:
    """Classify picture after picture; one that cannot be read yields its error and the others go on.

    Args:
        model: In evaluation mode, as `load_model` gives it.
        paths: Of picture files.
        topk: How many classes of each, at most all.
        device: Where to run, as torch names it.
    """
    model = model.to(device)
    names = labels(model)
    read = reader(model)
    for path in paths:
        try:
            x = read(path)
        except Exception as error:  # the decoders raise all kinds for broken files
            yield Prediction(path, [], f"{type(error).__name__}: {error}")
            continue
        top = model(x[None].to(device)).softmax(-1)[0].topk(min(topk, len(names)))
        yield Prediction(path, [(names[i], p) for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)])
