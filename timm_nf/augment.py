"""The authors' RandAugment on uint8 tensors, for training loops of one's own.

timm's `rand_augment_transform` works on Pillow images, as train.py needs. It has other fill colours, limits and
distances, another Contrast and no Cutout. `timm-nf recipe` lists the differences.

Source: arXiv:1909.13719; deepmind-research nfnets/autoaugment.py at f5de0ede, described in words and written anew.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["AuthorsRandAugment"]

FILL = 128  # the grey of pixels that an operation uncovers
_GREY = (0.2989, 0.587, 0.114)  # weights of red, green and blue


# -- what the operations share -----------------------------------------------------------------------------------------


def _blend(start: Tensor, image: Tensor, factor: float) -> Tensor:
    """Blend two images: `start` at factor 0, the image at 1, and beyond it above 1. Fractions are cut off."""
    first = start.float()
    mixed = first + factor * (image.float() - first)
    return mixed.clamp(0, 255).to(torch.uint8)


def _grey(image: Tensor) -> Tensor:
    """The image's grey values (1, H, W), rounded."""
    weights = torch.tensor(_GREY, device=image.device).view(3, 1, 1)
    return ((image * weights).sum(0, keepdim=True) * (255.5 / 255)).to(torch.uint8)


def _moved(image: Tensor, xx: float, xy: float, x: float, yx: float, yy: float, y: float) -> Tensor:
    """The image read at `(xx * column + xy * row + x, yx * column + yy * row + y)`, the nearest pixel of it."""
    height, width = image.shape[-2:]
    rows = torch.arange(height, dtype=torch.float64, device="cpu")[:, None]  # MPS has no float64
    columns = torch.arange(width, dtype=torch.float64, device="cpu")[None]
    # Halves are rounded up. Rounding to even would repeat pixels.
    from_column = (xx * columns + xy * rows + x + 0.5).floor().long().to(image.device)
    from_row = (yx * columns + yy * rows + y + 0.5).floor().long().to(image.device)
    inside = (from_column >= 0) & (from_column < width) & (from_row >= 0) & (from_row < height)
    read = image[:, from_row.clamp(0, height - 1), from_column.clamp(0, width - 1)]
    return torch.where(inside, read, FILL)


# -- the operations: (3, H, W) uint8 -> (3, H, W) uint8 ----------------------------------------------------------------


def auto_contrast(image: Tensor) -> Tensor:
    """Stretch every channel to 0 to 255. A channel with a single value stays."""
    pixels = image.float()
    low, high = pixels.amin((1, 2), keepdim=True), pixels.amax((1, 2), keepdim=True)
    scale = 255 / (high - low).clamp(min=1)
    stretched = (pixels * scale - low * scale).clamp(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, image)


def equalize(image: Tensor) -> Tensor:
    """Spread every channel's values until all are about as frequent. A channel with too few pixels stays."""
    channels: list[Tensor] = []
    for channel in image.unbind():
        counts = torch.bincount(channel.flatten().long(), minlength=256)
        step = (channel.numel() - counts[channel.max().long()]) // 255
        if step > 0:
            below = counts.cumsum(0) - counts
            channel = ((below + step // 2) // step).clamp(0, 255).to(torch.uint8)[channel.long()]
        channels.append(channel)
    return torch.stack(channels)


def invert(image: Tensor) -> Tensor:
    """255 - image."""
    return 255 - image


def posterize(image: Tensor, bits: int) -> Tensor:
    """Keep only the highest bits of every value."""
    return image & (256 - 2 ** (8 - bits))


def solarize(image: Tensor, threshold: int) -> Tensor:
    """Invert values from the threshold on."""
    return torch.where(image.int() < threshold, image, 255 - image)


def solarize_add(image: Tensor, added: int) -> Tensor:
    """Raise values below 128, at most to 255."""
    raised = (image.int() + added).clamp(0, 255).to(torch.uint8)
    return torch.where(image < 128, raised, image)


def color(image: Tensor, factor: float) -> Tensor:
    """Change the saturation: grey at factor 0, the image at 1."""
    return _blend(_grey(image).expand_as(image), image, factor)


def contrast(image: Tensor, factor: float) -> Tensor:
    """Blend with one grey: that grey at factor 0, the image at 1.

    The grey is the number of pixels / 256, at most 255. So it is white for images above 255 x 256 pixels.
    """
    grey = min(image.shape[-2] * image.shape[-1] // 256, 255)
    return _blend(torch.full_like(image, grey), image, factor)


def brightness(image: Tensor, factor: float) -> Tensor:
    """Change the brightness: black at factor 0, the image at 1."""
    return _blend(torch.zeros_like(image), image, factor)


def sharpness(image: Tensor, factor: float) -> Tensor:
    """Sharpen: the smoothed image at factor 0, the image at 1. The outermost pixels stay."""
    kernel = torch.ones(3, 1, 3, 3, device=image.device)
    kernel[:, :, 1, 1] = 5  # the sum is 13
    start = image.clone()
    if min(image.shape[-2:]) > 2:
        # Sums of whole numbers are exact in float32. One division follows.
        start[:, 1:-1, 1:-1] = (F.conv2d(image.float()[None], kernel, groups=3)[0] / 13).to(torch.uint8)
    return _blend(start, image, factor)


def rotate(image: Tensor, degrees: float) -> Tensor:
    """Rotate counterclockwise about the centre."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    row, column = (image.shape[-2] - 1) / 2, (image.shape[-1] - 1) / 2
    return _moved(image, cos, -sin, column - cos * column + sin * row, sin, cos, row - sin * column - cos * row)


def shear_x(image: Tensor, level: float) -> Tensor:
    """Shift every row left by `level` times its index."""
    return _moved(image, 1, level, 0, 0, 1, 0)


def shear_y(image: Tensor, level: float) -> Tensor:
    """Shift every column up by `level` times its index."""
    return _moved(image, 1, 0, 0, level, 1, 0)


def translate_x(image: Tensor, pixels: float) -> Tensor:
    """Shift the image left."""
    return _moved(image, 1, 0, pixels, 0, 1, 0)


def translate_y(image: Tensor, pixels: float) -> Tensor:
    """Shift the image up."""
    return _moved(image, 1, 0, 0, 0, 1, pixels)


def cutout(image: Tensor, half: int, row: int, column: int) -> Tensor:
    """Cover a square of twice `half` about a place with grey, as far as it is inside the image."""
    cut = image.clone()
    cut[:, max(0, row - half) : row + half, max(0, column - half) : column + half] = FILL
    return cut


# -- the policy --------------------------------------------------------------------------------------------------------


def _sign() -> int:
    return 1 if torch.rand(()) < 0.5 else -1


def _anywhere(image: Tensor, half: int) -> Tensor:
    row, column = (int(torch.randint(size, ())) for size in image.shape[-2:])
    return cutout(image, half, row, column)


# {name: (image, magnitude / 10) -> image}
OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "AutoContrast": lambda image, level: auto_contrast(image),
    "Equalize": lambda image, level: equalize(image),
    "Invert": lambda image, level: invert(image),
    "Rotate": lambda image, level: rotate(image, _sign() * 30 * level),
    "Posterize": lambda image, level: posterize(image, int(4 * level)),
    "Solarize": lambda image, level: solarize(image, int(256 * level)),
    "Color": lambda image, level: color(image, 1.8 * level + 0.1),
    "Contrast": lambda image, level: contrast(image, 1.8 * level + 0.1),
    "Brightness": lambda image, level: brightness(image, 1.8 * level + 0.1),
    "Sharpness": lambda image, level: sharpness(image, 1.8 * level + 0.1),
    "ShearX": lambda image, level: shear_x(image, _sign() * 0.3 * level),
    "ShearY": lambda image, level: shear_y(image, _sign() * 0.3 * level),
    "TranslateX": lambda image, level: translate_x(image, _sign() * 100 * level),
    "TranslateY": lambda image, level: translate_y(image, _sign() * 100 * level),
    "Cutout": lambda image, level: _anywhere(image, int(40 * level)),
    "SolarizeAdd": lambda image, level: solarize_add(image, int(110 * level)),
}


class AuthorsRandAugment(nn.Module):
    """The RandAugment with which NFNets were trained. It draws from sixteen operations, all of one magnitude.

    It is a transform like those of torchvision. torch draws the random numbers, so `torch.manual_seed` repeats them.
    Distances are in pixels, whatever the image's size.

    Args:
        magnitude: From 0 to 20: 5 for F0, 10 for F1 and F2, 15 from F3 on. At 20 Posterize keeps all bits.
        num_layers: Number of operations for an image. They follow each other.

    Raises:
        ValueError: if the magnitude or the number of layers is out of range.

    Examples:
        >>> AuthorsRandAugment(magnitude=5)(torch.zeros(3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([3, 32, 32])
    """

    def __init__(self, magnitude: float, num_layers: int = 4) -> None:
        super().__init__()
        if not 0 <= magnitude <= 20:  # false for NaN
            raise ValueError(f"expected a magnitude from 0 to 20, got {magnitude}")
        if num_layers < 0:
            raise ValueError(f"expected zero or more layers, got {num_layers}")
        self.magnitude = magnitude
        self.num_layers = num_layers

    def forward(self, image: Tensor) -> Tensor:
        """(3, H, W) uint8 -> (3, H, W) uint8, in red, green and blue. The input is not changed.

        Raises:
            TypeError: if the dtype or the shape is another one. A batch is refused too: each image gets its own
                operations.
        """
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
            raise TypeError(
                f"expected one image (3, H, W) of uint8, got {tuple(image.shape)} of {image.dtype}; "
                "convert with torchvision.transforms.v2.functional.pil_to_tensor, and augment before normalising"
            )
        operations = list(OPERATIONS.values())
        for index in torch.randint(len(operations), (self.num_layers,)):
            image = operations[int(index)](image, self.magnitude / 10)
        return image

    def extra_repr(self) -> str:
        return f"magnitude={self.magnitude}, num_layers={self.num_layers}"
