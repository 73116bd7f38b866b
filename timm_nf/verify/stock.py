"""Loads one file of weights into our network and into timm's, and compares the two on a user's pictures.

timm's dm_nfnet_f* has the same parameters as our nfnet_f* but another formula. Its logits differ by 1.8 %.

Examples:
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> arguments = {"depths": (1, 1, 1, 1), "channels": (256, 16, 32, 32), "group_size": 8, "num_classes": 2}
    >>> torch.save(timm.create_model("nfnet_f0", **arguments).state_dict(), "net.pt")
    >>> pair = load_pair("net.pt")
    >>> isinstance(pair, NetworkPair), pair.name
    (True, 'nfnet_f0')
    >>> for name in ("cat", "dog"):
    ...     Path("pictures", name).mkdir(parents=True)
    ...     Image.new("RGB", (64, 64)).save(Path("pictures", name, "0.png"))
    >>> agreement = compare(pair.ours, pair.stock, "pictures", torch.device("cpu"), track=lambda items, text: items)
    >>> isinstance(agreement, Agreement), agreement.images
    (True, 2)
"""

# timm's data sets and loaders have no types.
# pyright: standard, reportPrivateImportUsage=false

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, create_dataset, create_loader
from timm.models import is_model
from torch import nn

from .. import checkpoint, convert
from .._progress import Progress
from .._text import counted
from ..convert.infer import infer_variant
from ..inference.images import image_mode, picture_config

__all__ = ["Agreement", "NetworkPair", "compare", "load_pair"]


@dataclass(frozen=True)
class NetworkPair:
    """The same weights in our network and in timm's, in float32 and evaluation mode.

    Attributes:
        name: Our network's name. timm's is `dm_` + `name`.
        origin: The file, and the entry in it that holds the weights.
        ours: Our network.
        stock: timm's network.
    """

    name: str
    origin: str
    ours: nn.Module
    stock: nn.Module


@dataclass(frozen=True)
class Agreement:
    """How closely two networks agree on the same pictures.

    Attributes:
        images: Number of pictures.
        top1: Top-1 accuracy of both networks, in percent.
        error: Relative L2 error of the first network's logits, with the second network's as the reference.
    """

    images: int
    top1: tuple[float, float]
    error: float


def load_pair(file: str | Path, use_ema: bool = False) -> NetworkPair:
    """Load weights that were trained as one of timm's dm_nfnet_f*. Their shapes say which one.

    Args:
        file: A checkpoint of train.py, a safetensors file, a state dict, or the authors' .npz.
        use_ema: Whether to take the averaged weights of train.py's `--model-ema`.

    Raises:
        ValueError: if the file cannot be read, or timm has no such network.
    """
    content = checkpoint.read(file, use_ema)
    name, fields = infer_variant(convert.timm_to_haiku(content.state_dict))
    if not is_model(f"dm_{name}"):
        raise ValueError(f"expected weights of one of timm's dm_nfnet_f0 to f6 in {content.origin}, got a {name}'s")
    num_classes = fields.pop("num_classes", 1000)
    shape: dict[str, Any] = {"in_chans": fields.pop("in_chans", 3)}

    def build(name: str, fields: dict[str, Any]) -> Any:
        # Some fields do not show in shapes, such as the activation. They come from train.py's arguments.
        fields = (content.args.get("model_kwargs") or {}) | fields
        described = replace(content, args=content.args | shape | {"model_kwargs": fields})
        return checkpoint.build(name, described, num_classes).float()

    ours = build(name, fields)
    # timm's network does not derive these two widths from `channels`.
    widths = {"stem_chs": ours.cfg.stem_out_chs(), "num_features": ours.cfg.final_chs()}
    return NetworkPair(name, content.origin, ours, build(f"dm_{name}", fields | widths))


@torch.no_grad()
def compare(
    ours: Any,
    stock: nn.Module,
    folder: str | Path,
    device: torch.device,
    track: Progress,
) -> Agreement:
    """Compare two networks on the pictures of a folder, with the first network's preprocessing.

    Args:
        ours: A network.
        stock: Another network with the same classes.
        folder: It holds one subfolder of pictures per class. The subfolders are either ImageNet's synsets (all or some
            of them), or one for each class of the networks, sorted by name.
        device: The device of both networks.
        track: Shows progress.

    Raises:
        ValueError: if the subfolders are neither, or the networks take no pictures.
    """
    data = picture_config(ours)
    synsets: list[str] = ImageNetInfo().label_names()
    classes = {path.name for path in Path(folder).iterdir() if path.is_dir()}
    is_imagenet = ours.num_classes == len(synsets) and classes <= set(synsets)
    if not is_imagenet and len(classes) != ours.num_classes:
        raise ValueError(
            f"expected a folder of pictures in {folder} for each of {ours.num_classes} classes, got {len(classes)}"
        )
    class_map: Any = ""
    if is_imagenet:
        class_map = {name: i for i, name in enumerate(synsets)}
    dataset: Any = create_dataset("", root=str(folder), class_map=class_map)
    dataset.input_img_mode = image_mode(data["input_size"][0])
    loader = create_loader(
        dataset,
        batch_size=32,
        use_prefetcher=False,
        num_workers=2,
        persistent_workers=False,  # they end with the loop, see diagnostics/clipping.py
        **data,
    )
    count, hits, sums = 0, torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.float64)
    for x, labels in track(loader, counted(len(dataset), "image")):
        a, b = (model(x.to(device)).cpu() for model in (ours, stock))
        hits += torch.stack([(logits.argmax(1) == labels).sum() for logits in (a, b)])
        sums += torch.stack([(a - b).double().square().sum(), b.double().square().sum()])
        count += len(labels)
    ours_top1, stock_top1 = (100 * hits / count).tolist()
    return Agreement(count, (ours_top1, stock_top1), (sums[0] / sums[1]).sqrt().item())
