"""Finding pictures, and reading them as a model takes them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import (
    create_transform,
    get_img_extensions,
    resolve_model_data_config,
)
from torch import Tensor


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


def reader(model: Any) -> Callable[[Path], Tensor]:
    """What reads a picture file as the model takes it in evaluation: (in_chans, H, W)."""
    data = resolve_model_data_config(model, use_test_size=True)
    transform: Any = create_transform(**data, is_training=False)
    mode = "L" if data["input_size"][0] == 1 else "RGB"

    def read(path: Path) -> Tensor:
        with Image.open(path) as picture:
            return transform(picture.convert(mode))

    return read
