"""What a network sees in picture files, with the preprocessing and the labels that belong to its weights.

Examples:
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> Image.new("RGB", (64, 64), "grey").save("grey.png")
    >>> model = timm.create_model("nfnet_f0", depths=(1,), channels=(16,), group_size=8, num_classes=3).eval()
    >>> labels(model)
    ['class 0', 'class 1', 'class 2']
    >>> (prediction,) = classify(model, [Path("grey.png")])
    >>> isinstance(prediction, Prediction), len(prediction.classes)
    (True, 3)
    >>> preprocessing("nfnet_f0")["input_size"]
    (3, 256, 256)
"""

# timm, onnx and onnxruntime have no types or partial ones.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportMissingTypeStubs=false

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import CustomDatasetInfo, ImageNetInfo, infer_imagenet_subset, resolve_data_config
from timm.models import get_pretrained_cfg
from torch import nn

from .._labels import own_labels
from .images import reader
from .named import load_model

__all__ = ["Prediction", "classify", "labels", "load_model", "preprocessing"]


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one file.

    Attributes:
        path: The file.
        classes: The classes as (label, probability), the most probable one first; empty after an error.
        error: Why there are none, in one line.
    """

    path: Path
    classes: list[tuple[str, float]]
    error: str | None = None


def preprocessing(name: str) -> dict[str, Any]:
    """The preprocessing by timm of pictures for a registered name's weights, at the size of evaluation."""
    found = get_pretrained_cfg(name)
    cfg: dict[str, Any] = {}
    if found is not None:
        cfg = found.to_dict()
    return resolve_data_config(pretrained_cfg=cfg, use_test_size=True)


def labels(model: Any) -> list[str]:
    """The names of the classes: the labels of the weights, otherwise ImageNet's descriptions, otherwise numbers.

    Raises:
        ValueError: if the model's config has labels that do not fit.
    """
    info: CustomDatasetInfo | ImageNetInfo
    if own := own_labels(model, "the network's config"):
        info = CustomDatasetInfo(own["label_names"], own.get("label_descriptions"))
    elif subset := infer_imagenet_subset(model):
        info = ImageNetInfo(subset)
    else:
        return [f"class {i}" for i in range(model.num_classes)]
    return [info.index_to_description(i) for i in range(model.num_classes)]


@torch.inference_mode()
def classify(model: nn.Module, paths: Iterable[Path], topk: int = 5, device: str = "cpu") -> Iterator[Prediction]:
    """Classify one picture after the other. One that cannot be classified yields its error, and the next one follows.

    Args:
        model: A network in evaluation mode, for example from `load_model`.
        paths: Paths of picture files.
        topk: Number of classes to yield for each picture. At most all classes are.
        device: The device to run on, as torch names it.

    Raises:
        ValueError: before the first picture, if the model takes no pictures, or its labels do not fit.
    """
    names, read = labels(model), reader(model)
    model = model.to(device)
    for path in paths:
        try:
            image = read(path)
        except ValueError as error:
            yield Prediction(path, [], str(error))
            continue
        probabilities = model(image[None].to(device)).softmax(-1)[0]
        if not probabilities.isfinite().all():
            yield Prediction(path, [], f"{path} has logits that are infinite or NaN: look at the network's weights")
            continue
        top = probabilities.topk(min(topk, len(names)))
        pairs = zip(top.values.tolist(), top.indices.tolist(), strict=True)
        yield Prediction(path, [(names[index], probability) for probability, index in pairs])
