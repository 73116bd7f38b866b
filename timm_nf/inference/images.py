"""Finds pictures, and reads them as a model takes them.

Examples:
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> Image.new("L", (40, 30)).save("grey.png")
    >>> found = find_images([Path(".")])
    >>> isinstance(found, Found), found.pictures
    (True, [PosixPath('grey.png')])
    >>> open_picture("grey.png").mode, open_picture("grey.png", channels=1).mode
    ('RGB', 'L')
    >>> image_mode(3), image_mode(1)
    ('RGB', 'L')
    >>> model = timm.create_model("test_resnet")
    >>> picture_config(model)["input_size"], image_mode(3)
    ((3, 160, 160), 'RGB')
    >>> reader(model)("grey.png").shape, photographs(model, size=64, count=2).shape
    (torch.Size([3, 160, 160]), torch.Size([2, 3, 64, 64]))
"""

# timm, onnx and onnxruntime have no types or partial ones.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportMissingTypeStubs=false

import os
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base as ExifTag
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from .._text import reason
from .._versions import input_channels

__all__ = ["Found", "find_images", "image_mode", "open_picture", "photographs", "picture_config", "reader"]

# Pillow starts Ghostscript for EPS, and only recognises MPEG.
_NOT_READ = {"EPS", "MPEG"}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_WHITE_IS_ZERO, _SIGNED = 0, 2  # values of the last two


class Found(NamedTuple):
    """Picture files, and how many files of the folders were left out, by their suffix."""

    pictures: list[Path]
    left_out: Counter[str]

    def others(self) -> str:
        """What was left out, in words."""
        shown = self.left_out.most_common(8)
        counts = [f"{suffix[:20] or 'no suffix'} {count}" for suffix, count in sorted(shown)]
        if len(self.left_out) > len(shown):
            counts.append(f"and {len(self.left_out) - len(shown)} more kinds")
        return f"{self.left_out.total()} of another kind ({', '.join(counts)})"


@cache
def _formats() -> tuple[str, ...]:
    """Formats that Pillow reads by itself: no stubs, which know a format by name, and none that needs a program."""
    from PIL.ImageFile import StubImageFile  # which importing timm_nf does not need

    Image.init()
    stubs = {
        name
        for name, (opener, _) in Image.OPEN.items()
        if isinstance(opener, type) and issubclass(opener, StubImageFile)
    }
    return tuple(sorted(Image.OPEN.keys() - stubs - _NOT_READ))


@cache
def _suffixes() -> frozenset[str]:
    """Of files in these formats, in lower case."""
    formats = {*_formats(), "MPO"}  # which Pillow opens as JPEG
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def find_images(paths: Iterable[Path]) -> Found:
    """The files as given, and for every folder all pictures below it, sorted; links are followed.

    Raises:
        ValueError: if there is no picture at all, or nothing of what was given exists.
    """
    given = list(paths)
    found = Found([], Counter())
    for path in given:
        if not path.is_dir():
            found.pictures.append(path)
            continue
        for file in sorted(_files_below(path)):
            if file.suffix.lower() in _suffixes():
                found.pictures.append(file)
            else:
                found.left_out[file.suffix.lower()] += 1
    names = ", ".join(map(str, given))
    if not found.pictures:
        others = f", but {found.others()}" if found.left_out else ""
        raise ValueError(
            f"expected pictures that Pillow can open (.jpg, .png, .tif, ...), found none in {names}{others}"
        )
    if not any(os.path.lexists(path) for path in found.pictures):  # said before the weights are downloaded
        raise ValueError(f"expected pictures, found no file {', no file '.join(map(str, found.pictures))}")
    return found


def _files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder. Links are followed, each folder is entered once."""

    def refuse(error: OSError) -> None:
        raise error

    seen = {folder.resolve()}
    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        for name in list(folders):
            real = Path(root, name).resolve()
            if real in seen:
                folders.remove(name)
            seen.add(real)
        yield from (Path(root, name) for name in files)


def open_picture(file: str | Path, channels: int = 3) -> Image.Image:
    """The picture in a file, upright and on white: the one place where a file becomes pixels.

    The orientation in EXIF is applied. What is transparent shows white. Grey of more than 8 bits is scaled by its
    depth. Of several frames, the first is read.

    Args:
        file: In any format that Pillow reads without another program.
        channels: 1 for grey, otherwise the picture has three.

    Raises:
        ValueError: with the file's name, if it cannot be read.
    """
    if os.path.exists(file) and not os.path.isfile(file):  # opening a pipe would wait for who writes to it
        raise ValueError(f"{file} cannot be read as a picture: expected a file, found a folder, a pipe or a device")
    try:
        # Pillow warns of what it repairs. What it cannot repair is raised. A file given as a path would be mapped into
        # memory, and the pixels of an uncompressed TIFF that lies on its side would come out of order (Pillow 13.0).
        with warnings.catch_warnings(action="ignore"), open(file, "rb") as stream:
            picture = Image.open(stream, formats=_formats())
            stored = picture.tile[0].args if picture.tile else None
            picture.load()
            _scale_colour_key(picture, stored)
            upright = _upright(_opaque(picture), _orientation(picture))
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{file} cannot be read as a picture: its content has no format that Pillow reads by itself"
        ) from error
    except Exception as error:  # the decoders raise all kinds for broken files
        raise ValueError(f"{file} cannot be read as a picture: {reason(error)}") from error
    return upright.convert("L") if channels == 1 else upright


def _scale_colour_key(picture: Image.Image, stored: object) -> None:
    """Give the transparent colour of a PNG the depth that Pillow gives its pixels: it does that with palettes alone.

    Args:
        picture: As loaded.
        stored: How the pixels lie in the file, in Pillow's words.
    """
    colour: Any = picture.info.get("transparency")
    if isinstance(colour, tuple) and stored == "RGB;16B":
        picture.info["transparency"] = tuple(value >> 8 for value in cast(tuple[int, ...], colour))
    elif isinstance(colour, int) and stored in ("L;2", "L;4"):
        picture.info["transparency"] = colour * (85 if stored == "L;2" else 17)


def _opaque(picture: Image.Image) -> Image.Image:
    """The picture in RGB, on white where it is transparent."""
    if picture.mode == "F" or picture.mode.partition(";")[0] == "I":
        return _eight_bits(picture).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    visible = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", visible.size, "white"), visible).convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A grey picture of more than 8 bits, or of floats in 0..1, with 8 bits."""
    values = np.asarray(picture).astype(np.float64)
    bits, signed = _depth(picture)
    if picture.mode == "F":
        largest, expected = 1.0, "floats from 0 to 1"
    else:
        largest, expected = 2.0 ** (bits - signed) - 1, f"integers from 0 to {2 ** (bits - signed) - 1}"
        if not signed:
            values[values < 0] += 2.0**bits  # Pillow keeps 32 bits without a sign in 32 bits with one
    if not (values.min() >= 0 and values.max() <= largest):  # false for NaN
        raise ValueError(f"expected {expected}, got {values.min():g} to {values.max():g}: scale the picture")
    levels = values / largest
    tags: Any = getattr(picture, "tag_v2", {})
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # which Pillow applies to 8 bits alone
        levels = 1 - levels
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        levels[values == transparent] = 1
    return Image.fromarray(np.rint(255 * levels).astype(np.uint8))


def _depth(picture: Image.Image) -> tuple[int, bool]:
    """Bits of a value, and whether one of them is a sign."""
    tags: Any = getattr(picture, "tag_v2", None)
    if tags is not None and _BITS_PER_SAMPLE in tags:
        return tags[_BITS_PER_SAMPLE][0], tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED
    if picture.mode != "I" or picture.format in ("PNG", "PPM"):  # Pillow scales PPM to 16 bits
        return 16, False
    return 32, True


def _orientation(picture: Image.Image) -> int:
    """The orientation in EXIF, 1 to 8; 1 where there is none that can be read."""
    try:
        return picture.getexif().get(ExifTag.Orientation, 1)
    except Exception:  # broken EXIF raises all kinds, and the pixels are good
        return 1


def _upright(picture: Image.Image, orientation: int) -> Image.Image:
    # The rest of a file's EXIF is left out: Pillow would write it again, and may fail at it.
    picture.info.clear()
    picture.getexif()[ExifTag.Orientation] = orientation
    return ImageOps.exif_transpose(picture)


def picture_config(model: Any, use_test_size: bool = True) -> dict[str, Any]:
    """Timm's preprocessing of pictures for a model, in as many channels as the model has.

    Args:
        model: Any timm model.
        use_test_size: Of evaluation, where it differs from that of training.

    Returns:
        `input_size`, `mean`, `std` and the other arguments of `timm.data.create_transform`.

    Raises:
        ValueError: if the model takes neither grey nor colour.
    """
    data: dict[str, Any] = resolve_model_data_config(model, use_test_size=use_test_size)
    channels = input_channels(model)
    if channels not in (1, 3):
        raise ValueError(f"expected a network of 1 or 3 input channels, as pictures have them, got one of {channels}")
    data["input_size"] = (channels, *data["input_size"][1:])
    for key in ("mean", "std"):
        if len(data[key]) != channels:  # timm's loader does that with a colour network's on grey
            data[key] = (statistics.fmean(data[key]),) * channels
    return data


def image_mode(channels: int) -> str:
    """The mode in which timm's data sets open pictures for this many input channels, as train.py sets it."""
    return "RGB" if channels == 3 else "L"


def reader(model: Any, size: tuple[int, int] | None = None) -> Callable[[str | Path], Tensor]:
    """What reads a picture file as the model takes it in evaluation: (in_chans, H, W), float32.

    Args:
        model: Any timm model.
        size: Height and width in pixels, by default those of the model's evaluation.

    Raises:
        ValueError: if the model takes no pictures; what is returned raises it with a file's name.
    """
    data = picture_config(model, use_test_size=size is None)
    channels: int = data["input_size"][0]
    if size is not None:
        data["input_size"] = (channels, *size)
    transform: Any = create_transform(**data, is_training=False)

    def read(file: str | Path) -> Tensor:
        return transform(open_picture(file, channels))

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
    for key in ("mean", "std"):
        if len(data[key]) != 3:
            data[key] = (statistics.fmean(data[key]),) * 3
    transform: Any = create_transform(**data, is_training=False)
    whole = open_picture(str(get_sample_data("grace_hopper.jpg", asfileobj=False)))
    corners = [50 * i for i in range(count)]
    crops = torch.stack([transform(whole.crop((at, at, whole.width, whole.height))) for at in corners])
    return crops[:, [i % 3 for i in range(input_channels(model))]]
