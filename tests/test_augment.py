"""`timm_nf.augment`: every operation by values worked out by hand, by Pillow where both agree, and the policy."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from timm_nf import augment
from timm_nf.augment import OPERATIONS, AuthorsRandAugment
from timm_nf.variants import VARIANTS

BOARD = torch.arange(1, 10, dtype=torch.uint8).view(3, 3)


def picture(values: Any) -> Tensor:
    """(3, H, W) with the same values in all channels."""
    return torch.as_tensor(values, dtype=torch.uint8).expand(3, -1, -1)


def check(got: Tensor, expected: Any) -> None:
    assert got.dtype == torch.uint8
    assert torch.equal(got, picture(expected)), got[0]


@pytest.fixture(scope="module")
def noise() -> Tensor:
    """Values that are unevenly frequent, and not the same in all channels."""
    torch.manual_seed(0)
    return (torch.rand(3, 40, 52) ** torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1) * 200 + 20).to(torch.uint8)


def pillow(image: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    return torch.from_numpy(np.array(change(Image.fromarray(image.permute(1, 2, 0).numpy())))).permute(2, 0, 1)


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_auto_contrast_stretches_every_channel():
    image = torch.tensor([[[50, 100, 150]], [[7, 7, 7]], [[0, 255, 9]]], dtype=torch.uint8)
    # 255 / 100 * (100 - 50) = 127.5, cut off
    assert augment.auto_contrast(image).tolist() == [[[0, 127, 255]], [[7, 7, 7]], [[0, 255, 9]]]


def test_equalize_makes_values_as_frequent():
    # 510 pixels below the highest: a step of 510 // 255 = 2. Below 10 there are none: (0 + 1) // 2 = 0. Below 20 there
    # are 300: 301 // 2 = 150. Below 30 there are 510: 511 // 2 = 255
    row = [10] * 300 + [20] * 210 + [30] * 90
    check(augment.equalize(picture([row])), [[0] * 300 + [150] * 210 + [255] * 90])
    few = picture([[1, 2, 3]])  # a step of 0
    check(augment.equalize(few), few[0])


def test_invert_posterize_and_solarize():
    values = picture([[0, 100, 127, 128, 200, 255]])
    check(augment.invert(values), [[255, 155, 128, 127, 55, 0]])
    check(augment.posterize(values, 2), [[0, 64, 64, 128, 192, 192]])
    check(augment.posterize(values, 8), values[0])
    check(augment.posterize(values, 0), [[0] * 6])
    check(augment.solarize(values, 128), [[0, 100, 127, 127, 55, 0]])
    check(augment.solarize(values, 384), values[0])  # magnitude 15
    check(augment.solarize_add(values, 55), [[55, 155, 182, 128, 200, 255]])
    check(augment.solarize_add(values, 165), [[165, 255, 255, 128, 200, 255]])


def test_color_blends_with_grey():
    image = torch.tensor([255, 0, 100], dtype=torch.uint8).view(3, 1, 1)
    # 0.2989 * 255 + 0.114 * 100 = 87.6, times 255.5 / 255 = 87.8: 87
    assert augment.color(image, 0.0).flatten().tolist() == [87, 87, 87]
    assert augment.color(image, 1.0).flatten().tolist() == [255, 0, 100]
    assert augment.color(image, 0.5).flatten().tolist() == [171, 43, 93]
    assert augment.color(image, 2.0).flatten().tolist() == [255, 0, 113]


def test_contrast_blends_with_the_number_of_pixels_over_256():
    small, large = torch.full((3, 16, 32), 100, dtype=torch.uint8), torch.full((3, 300, 300), 100, dtype=torch.uint8)
    assert augment.contrast(small, 0.0).unique().tolist() == [2]  # 512 / 256
    assert augment.contrast(large, 0.0).unique().tolist() == [255]  # 351, clipped
    assert augment.contrast(small, 0.5).unique().tolist() == [51]
    assert augment.contrast(small, 1.5).unique().tolist() == [149]
    assert augment.contrast(large, 2.8).unique().tolist() == [0]  # 255 - 2.8 * 155 is below 0


def test_brightness_multiplies():
    check(augment.brightness(picture([[0, 10, 100, 200]]), 1.9), [[0, 19, 190, 255]])


def test_sharpness_blends_with_smoothed_pixels_inside():
    image = torch.zeros(3, 3, 4, dtype=torch.uint8)
    image[:, 1, 1] = 130
    expected = [[0, 0, 0, 0], [0, 50, 10, 0], [0, 0, 0, 0]]  # 5 / 13 of it, and 1 / 13 of its neighbour
    check(augment.sharpness(image, 0.0), expected)
    check(augment.sharpness(image, 0.5), [[0, 0, 0, 0], [0, 90, 5, 0], [0, 0, 0, 0]])
    check(augment.sharpness(image, 2.0), [[0, 0, 0, 0], [0, 210, 0, 0], [0, 0, 0, 0]])
    check(augment.sharpness(picture([[9, 1]]), 0.0), [[9, 1]])  # nothing is inside


def test_translations_move_left_and_up_and_fill_with_128():
    check(augment.translate_x(picture(BOARD), 1), [[2, 3, 128], [5, 6, 128], [8, 9, 128]])
    check(augment.translate_x(picture(BOARD), -1), [[128, 1, 2], [128, 4, 5], [128, 7, 8]])
    check(augment.translate_y(picture(BOARD), 2), [[7, 8, 9], [128] * 3, [128] * 3])
    check(augment.translate_y(picture(BOARD), -50), [[128] * 3] * 3)


def test_shears_move_every_row_or_column_by_the_nearest_pixel():
    check(augment.shear_x(picture(BOARD), 1), [[1, 2, 3], [5, 6, 128], [9, 128, 128]])
    check(augment.shear_x(picture(BOARD), 0.3), [[1, 2, 3], [4, 5, 6], [8, 9, 128]])  # shifts of 0, 0.3, 0.6
    check(augment.shear_y(picture(BOARD), 1), [[1, 5, 9], [4, 8, 128], [7, 128, 128]])
    check(augment.shear_y(picture(BOARD), -0.3), [[1, 2, 128], [4, 5, 3], [7, 8, 6]])


def test_rotation_is_about_the_center_and_counterclockwise():
    check(augment.rotate(picture(BOARD), 90), [[3, 6, 9], [2, 5, 8], [1, 4, 7]])
    # 45 degrees: an edge's middle reads sqrt(2) / 2 away in both directions, a corner sqrt(2) away, which is 1
    check(augment.rotate(picture(BOARD), 45), [[2, 3, 6], [1, 5, 9], [4, 7, 8]])
    check(augment.rotate(picture(BOARD), 0), BOARD)


def test_cutout_is_a_square_as_far_as_it_is_inside():
    image = torch.zeros(3, 4, 6, dtype=torch.uint8)
    check(augment.cutout(image, 1, 0, 3), [[0, 0, 128, 128, 0, 0]] + [[0] * 6] * 3)
    check(augment.cutout(image, 2, 3, 5), [[0] * 6, *[[0, 0, 0, 128, 128, 128]] * 3])
    check(augment.cutout(image, 0, 1, 1), image[0])
    assert not image.any()


# -- by Pillow ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (augment.equalize, ImageOps.equalize),
        (augment.invert, ImageOps.invert),
        (lambda x: augment.posterize(x, 4), lambda x: ImageOps.posterize(x, 4)),
        (lambda x: augment.solarize(x, 100), lambda x: ImageOps.solarize(x, 100)),
        (lambda x: augment.translate_x(x, 5), lambda x: moved(x, (1, 0, 5, 0, 1, 0))),
        (lambda x: augment.translate_y(x, -5), lambda x: moved(x, (1, 0, 0, 0, 1, -5))),
    ],
)
def test_pillow_gives_the_same(noise: Tensor, ours: Any, theirs: Any):
    assert torch.equal(ours(noise), pillow(noise, theirs))


def moved(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    fill = (augment.FILL,) * 3
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=fill)


@pytest.mark.parametrize("factor", [0.1, 0.6, 1.0, 1.9])
@pytest.mark.parametrize("name", ["color", "brightness", "sharpness", "auto_contrast"])
def test_pillow_gives_the_same_but_for_rounding(noise: Tensor, name: str, factor: float):
    # Pillow rounds grey and smoothed values, these are cut off; beyond 1 the factor enlarges that
    enhance = {"color": ImageEnhance.Color, "brightness": ImageEnhance.Brightness, "sharpness": ImageEnhance.Sharpness}
    if name == "auto_contrast":
        got, expected = augment.auto_contrast(noise), pillow(noise, ImageOps.autocontrast)
    else:
        got = getattr(augment, name)(noise, factor)
        expected = pillow(noise, lambda image: enhance[name](image).enhance(factor))
    assert (got.int() - expected.int()).abs().max() <= 2
    assert (got != noise).any() == (factor != 1.0 or name == "auto_contrast")


@pytest.mark.parametrize("degrees", [-30, 7.5, 15, 30])
def test_pillow_rotates_the_same_way_but_for_ties(noise: Tensor, degrees: float):
    image = noise[:, :, :40]  # Pillow's center is that of a square to the pixel
    fill = (augment.FILL,) * 3
    expected = pillow(image, lambda x: x.rotate(degrees, Image.Resampling.NEAREST, fillcolor=fill))
    same = (augment.rotate(image, degrees) == expected).all(0).float().mean()
    assert same > 0.97


@pytest.mark.parametrize("level", [-0.29, 0.17, 0.31])  # multiples of 0.1 and 0.15 have ties
def test_pillow_shears_the_same_way_but_for_half_a_pixel(noise: Tensor, level: float):
    # Pillow shears the centers of pixels, half a pixel away from their index
    expected = pillow(noise, lambda x: moved(x, (1, level, -0.5 * level, 0, 1, 0)))
    same = (augment.shear_x(noise, level) == expected).all(0).float().mean()
    assert same > 0.97


# -- the policy --------------------------------------------------------------------------------------------------------


def test_there_are_the_authors_sixteen_operations():
    assert set(OPERATIONS) == {
        "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast", "Brightness",
        "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd",
    }  # fmt: skip


# magnitude 5: {operation: what it is given}
ARGUMENTS = {
    "Posterize": ("posterize", 2), "Solarize": ("solarize", 128), "SolarizeAdd": ("solarize_add", 55),
    "Color": ("color", 1.0), "Contrast": ("contrast", 1.0), "Brightness": ("brightness", 1.0),
    "Sharpness": ("sharpness", 1.0), "Rotate": ("rotate", 15), "ShearX": ("shear_x", 0.15), "ShearY": ("shear_y", 0.15),
    "TranslateX": ("translate_x", 50), "TranslateY": ("translate_y", 50), "Cutout": ("cutout", 20),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("times", [1, 2, 3])
def test_magnitudes_become_the_authors_arguments(name: str, times: int, noise: Tensor, monkeypatch: Any):
    function, at_5 = ARGUMENTS[name]
    given: list[float] = []
    monkeypatch.setattr(augment, function, lambda image, argument, *place: given.append(argument) or image)
    torch.manual_seed(0)
    for _ in range(20):
        OPERATIONS[name](noise, times / 2)
    expected = 0.1 + 0.9 * times if at_5 == 1.0 else at_5 * times
    signs = {-1, 1} if name[:5] in ("Rotat", "Shear", "Trans") else {1}
    assert {round(value, 9) for value in given} == {round(sign * expected, 9) for sign in signs}


def test_operations_are_drawn_evenly_and_as_many_as_there_are_layers(monkeypatch: Any, noise: Tensor):
    drawn: Counter[str] = Counter()
    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, lambda image, level, name=name: drawn.update([name]) or image)
    torch.manual_seed(0)
    transform = AuthorsRandAugment(15)
    for _ in range(800):
        transform(noise)
    assert drawn.total() == 4 * 800
    assert len(drawn) == 16
    assert all(abs(times - 200) < 5 * math.sqrt(200 * 15 / 16) for times in drawn.values())


@pytest.mark.parametrize("magnitude", [0, 5, 10, 15, 20])
@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 2, 7), (3, 33, 20)])
def test_every_operation_takes_every_size_and_magnitude(magnitude: int, shape: tuple[int, ...]):
    torch.manual_seed(0)
    image = torch.randint(256, shape).to(torch.uint8)
    before = image.clone()
    for name, operation in OPERATIONS.items():
        out = operation(image, magnitude / 10)
        assert (out.shape, out.dtype) == (image.shape, torch.uint8), name
    assert torch.equal(image, before)


def test_it_is_a_transform_among_torchvisions_and_repeats_with_the_seed():
    transform = v2.Compose([v2.PILToTensor(), AuthorsRandAugment(5), v2.ToDtype(torch.float32, scale=True)])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    outs = []
    for seed in (1, 1, 3):
        torch.manual_seed(seed)
        outs.append(transform(image))
    assert outs[0].shape == (3, 48, 64)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_the_zoos_magnitudes_are_taken():
    assert {row.rand_augment for row in VARIANTS.values()} - {None} == {5, 10, 15}
    assert repr(AuthorsRandAugment(15)) == "AuthorsRandAugment(magnitude=15, num_layers=4)"
    assert AuthorsRandAugment(15, num_layers=0)(image := torch.zeros(3, 2, 2, dtype=torch.uint8)) is image


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(3, 4, 4),
        torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        torch.zeros(1, 4, 4, dtype=torch.uint8),
        torch.zeros(3, 0, 4, dtype=torch.uint8),
    ],
)
def test_what_is_not_one_uint8_image_is_refused(bad: Tensor):
    with pytest.raises(TypeError, match=r"expected one image \(3, H, W\) of uint8, got"):
        AuthorsRandAugment(5)(bad)


@pytest.mark.parametrize("magnitude", [-1, 20.1, float("nan")])
def test_magnitudes_out_of_range_are_refused(magnitude: float):
    with pytest.raises(ValueError, match="expected a magnitude from 0 to 20, got"):
        AuthorsRandAugment(magnitude)


def test_a_negative_number_of_layers_is_refused():
    with pytest.raises(ValueError, match="expected zero or more layers, got -1"):
        AuthorsRandAugment(5, num_layers=-1)
