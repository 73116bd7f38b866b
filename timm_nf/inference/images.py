"""Finding pictures, and reading them as a model takes them."""

# timm, onnx and onnxruntime have no types or partial ones.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportMissingTypeStubs=false

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, get_img_extensions, resolve_model_data_config
from torch import Tensor

__all__ = ["find_images", "open_picture", "photographs", "reader"]


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The files as given, and for every folder all pictures below it, sorted.

    Raises:
        ValueError: if there is no picture at all, or nothing of what was given exists.
    """
    given = list(paths)
    extensions = set(get_img_extensions())
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            found += sorted(file for file in path.rglob("*") if file.suffix.lower() in extensions and file.is_file())
        else:
            found.append(path)
    if not found:
        raise ValueError(f"expected {', '.join(sorted(extensions))}, found none in {', '.join(map(str, given))}")
    if not any(path.exists() for path in found):  # said before the weights are downloaded
        raise ValueError(f"expected pictures, found no file {', no file '.join(map(str, found))}")
    return found


def open_picture(file: str | Path, channels: int = 3) -> Image.Image:
    """The picture in a file, read to its end: the one place where a file becomes pixels.

    Args:
        file: In any format that Pillow knows.
        channels: 1 for grey, otherwise the picture has three.
    """
    with Image.open(file) as picture:
        return picture.convert("L" if channels == 1 else "RGB")


def reader(model: Any) -> Callable[[str | Path], Tensor]:
    """What reads a picture file as the model takes it in evaluation: (in_chans, H, W), float32."""
    data: dict[str, Any] = resolve_model_data_config(model, use_test_size=True)
    transform: Any = create_transform(**data, is_training=False)

    def read(file: str | Path) -> Tensor:
        return transform(open_picture(file, data["input_size"][0]))

    return read


def photographs(model: Any, size: int | None = None, count: int = 4) -> Tensor:
    """Crops of a real photograph with the model's preprocessing: (count, in_chans, size, size), float32.

    It is the portrait of Grace Hopper that comes inside matplotlib; other than three channels are its three, repeated.

    Args:
        model: Any timm model.
        size: Height and width in pixels, by default those the model is trained at.
        count: How many crops.
    """
    from matplotlib.cbook import get_sample_data

    data: dict[str, Any] = resolve_model_data_config(model)
    height, width = data["input_size"][1:]
    data["input_size"] = (3, size or height, size or width)
    transform: Any = create_transform(**data, is_training=False)
    whole = open_picture(str(get_sample_data("grace_hopper.jpg", asfileobj=False)))
    corners = [50 * i for i in range(count)]
    crops = torch.stack([transform(whole.crop((at, at, whole.width, whole.height))) for at in corners])
    return crops[:, [i % 3 for i in range(getattr(model, "in_chans", 3))]]
