"""Finds pictures, and reads them with a model's preprocessing.

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

# timm has no types, or incomplete ones.
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

# Pillow starts another program, Ghostscript, for EPS. It recognises MPEG but cannot read it.
_NOT_READ = {"EPS", "MPEG"}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # numbers of TIFF's tags
_WHITE_IS_ZERO, _SIGNED = 0, 2  # a value of _PHOTOMETRIC, and a value of _SAMPLE_FORMAT


class Found(NamedTuple):
    """The pictures among some files and folders.

    Attributes:
        pictures: The picture files.
        left_out: The number of other files in the folders, by suffix.
    """

    pictures: list[Path]
    left_out: Counter[str]

    def others(self) -> str:
        """The other files, in words."""
        shown = self.left_out.most_common(8)
        counts = [f"{suffix[:20] or 'no suffix'} {count}" for suffix, count in sorted(shown)]
        if len(self.left_out) > len(shown):
            counts.append(f"and {len(self.left_out) - len(shown)} more kinds")
        return f"{self.left_out.total()} of another kind ({', '.join(counts)})"


@cache
def _formats() -> tuple[str, ...]:
    """The formats that Pillow reads by itself. It only recognises some others, or needs another program for them."""
    from PIL.ImageFile import StubImageFile  # only here, because importing timm_nf does not need it

    Image.init()
    stubs = {
        name
        for name, (opener, _) in Image.OPEN.items()
        if isinstance(opener, type) and issubclass(opener, StubImageFile)
    }
    return tuple(sorted(Image.OPEN.keys() - stubs - _NOT_READ))


@cache
def _suffixes() -> frozenset[str]:
    """The suffixes of files in these formats, in lower case."""
    formats = {*_formats(), "MPO"}  # Pillow opens MPO files as JPEG
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def find_images(paths: Iterable[Path]) -> Found:
    """Find pictures: the given files, and all pictures below the given folders.

    The pictures of a folder are sorted. Links are followed.

    Raises:
        ValueError: if there is no picture, or none of the given paths exists.
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
    if not any(os.path.lexists(path) for path in found.pictures):  # before weights are downloaded
        raise ValueError(f"expected pictures, found no file {', no file '.join(map(str, found.pictures))}")
    return found


def _files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder. Links are followed. No folder is entered twice."""

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
    """Read the picture in a file. Every part of the package reads pictures by this function.

    The orientation in EXIF is applied. Transparent pixels become white. Grey with more than 8 bits is scaled to 8 bits.
    If there are several frames, the first is read.

    Args:
        file: A file in any format that Pillow reads without another program.
        channels: 1 for a grey picture. Any other number gives RGB.

    Raises:
        ValueError: with the file's name, if it cannot be read.
    """
    if os.path.exists(file) and not os.path.isfile(file):  # opening a pipe would wait until something is written to it
        raise ValueError(f"{file} cannot be read as a picture: expected a file, found a folder, a pipe or a device")
    try:
        # Pillow repairs some broken files with a warning, and raises an error for others. It gets a stream and not a
        # path: it maps a path into memory, and then mixes up the pixels of uncompressed TIFFs on their side (13.0).
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
    except Exception as error:  # the decoders raise many types of errors for broken files
        raise ValueError(f"{file} cannot be read as a picture: {reason(error)}") from error
    return upright.convert("L") if channels == 1 else upright


def _scale_colour_key(picture: Image.Image, stored: object) -> None:
    """Scale the transparent colour of a PNG like its pixels. Pillow scales the pixels to 8 bits, but not this colour.

    Args:
        picture: The loaded picture.
        stored: Pillow's name for the pixels' format in the file.
    """
    colour: Any = picture.info.get("transparency")
    if isinstance(colour, tuple) and stored == "RGB;16B":
        picture.info["transparency"] = tuple(value >> 8 for value in cast(tuple[int, ...], colour))
    elif isinstance(colour, int) and stored in ("L;2", "L;4"):
        picture.info["transparency"] = colour * (85 if stored == "L;2" else 17)


def _opaque(picture: Image.Image) -> Image.Image:
    """The picture in RGB. Transparent pixels become white."""
    if picture.mode == "F" or picture.mode.partition(";")[0] == "I":
        return _eight_bits(picture).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    visible = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", visible.size, "white"), visible).convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Scale a grey picture to 8 bits. It has more than 8 bits, or floats from 0 to 1."""
    values = np.asarray(picture).astype(np.float64)
    bits, signed = _depth(picture)
    if picture.mode == "F":
        largest, expected = 1.0, "floats from 0 to 1"
    else:
        largest, expected = 2.0 ** (bits - signed) - 1, f"integers from 0 to {2 ** (bits - signed) - 1}"
        if not signed:
            values[values < 0] += 2.0**bits  # Pillow stores unsigned 32 bit integers as signed ones
    if not (values.min() >= 0 and values.max() <= largest):  # false for NaN
        raise ValueError(f"expected {expected}, got {values.min():g} to {values.max():g}: scale the picture")
    levels = values / largest
    tags: Any = getattr(picture, "tag_v2", {})
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow only inverts 8 bit pictures
        levels = 1 - levels
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        levels[values == transparent] = 1
    return Image.fromarray(np.rint(255 * levels).astype(np.uint8))


def _depth(picture: Image.Image) -> tuple[int, bool]:
    """The number of bits of a value, and whether one of them is the sign."""
    tags: Any = getattr(picture, "tag_v2", None)
    if tags is not None and _BITS_PER_SAMPLE in tags:
        return tags[_BITS_PER_SAMPLE][0], tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED
    if picture.mode != "I" or picture.format in ("PNG", "PPM"):  # Pillow scales PPM to 16 bits
        return 16, False
    return 32, True


def _orientation(picture: Image.Image) -> int:
    """The orientation in EXIF, 1 to 8. It is 1 if there is none, or if it cannot be read."""
    try:
        return picture.getexif().get(ExifTag.Orientation, 1)
    except Exception:  # broken EXIF raises many types of errors, but the pixels are good
        return 1


def _upright(picture: Image.Image, orientation: int) -> Image.Image:
    # Only the orientation is kept: exif_transpose writes the whole EXIF again, and fails if it is broken.
    picture.info.clear()
    picture.getexif()[ExifTag.Orientation] = orientation
    return ImageOps.exif_transpose(picture)


def picture_config(model: Any, use_test_size: bool = True) -> dict[str, Any]:
    """Timm's preprocessing of pictures for a model, with the model's number of channels.

    Args:
        model: Any timm model.
        use_test_size: Whether to take the size of evaluation, if it differs from that of training.

    Returns:
        `input_size`, `mean`, `std` and the other arguments of `timm.data.create_transform`.

    Raises:
        ValueError: if the model has neither 1 nor 3 input channels.
    """
    data: dict[str, Any] = resolve_model_data_config(model, use_test_size=use_test_size)
    channels = input_channels(model)
    if channels not in (1, 3):
        raise ValueError(f"expected a network of 1 or 3 input channels, as pictures have them, got one of {channels}")
    data["input_size"] = (channels, *data["input_size"][1:])
    for key in ("mean", "std"):
        if len(data[key]) != channels:  # timm's loader also takes the mean for grey pictures
            data[key] = (statistics.fmean(data[key]),) * channels
    return data


def image_mode(channels: int) -> str:
    """Pillow's mode of the pictures that train.py reads for this number of input channels: RGB for 3, otherwise L."""
    return "RGB" if channels == 3 else "L"


def reader(model: Any, size: tuple[int, int] | None = None) -> Callable[[str | Path], Tensor]:
    """Make a function that reads a picture file with the model's preprocessing for evaluation.

    Args:
        model: Any timm model.
        size: Height and width in pixels, by default those of the model's evaluation.

    Returns:
        A function from a file to (in_chans, H, W) in float32. It raises a ValueError with the file's name if the file
        cannot be read.

    Raises:
        ValueError: if the model has neither 1 nor 3 input channels.
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

    The photograph is the portrait of Grace Hopper that matplotlib contains. For other numbers of channels than three,
    its three channels are repeated.

    Args:
        model: Any timm model.
        size: Height and width in pixels, by default those of the model's training.
        count: Number of crops.
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
