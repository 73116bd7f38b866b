"""Files become pixels: upright, on white, grey scaled by its depth; what a folder has beside pictures is counted."""

import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch.torch_version import TorchVersion

from timm_nf.inference.classify import classify
from timm_nf.inference.images import find_images, open_picture, reader

RNG = np.random.default_rng(0)
# Flat areas, so that formats with losses keep them.
COLOUR = np.kron(RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
GREY = np.kron(RNG.integers(0, 65536, (5, 7), dtype=np.uint16), np.ones((16, 16), np.uint16))
ALPHA = np.kron(RNG.integers(0, 256, (5, 7), dtype=np.uint8), np.ones((16, 16), np.uint8))
TURNS: dict[int, Any] = {  # from what is stored to what is seen, by the table of EXIF 2.3
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


AVIF = pytest.param(
    "a.avif",
    marks=pytest.mark.skipif(
        ".avif" not in Image.registered_extensions(), reason="this Pillow has no AVIF, as below 11.3"
    ),
)
READS_YCBCR = TorchVersion(PIL.__version__) >= "13"  # below, Pillow does not read the TIFF that it writes of YCbCr


def pixels(file: Path, channels: int = 3) -> np.ndarray:
    return np.asarray(open_picture(file, channels))


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


def close(got: np.ndarray, expected: np.ndarray, within: float = 1) -> bool:
    return got.shape == expected.shape and np.abs(got.astype(float) - expected).max() <= within


# -- orientation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", AVIF, "a.mpo"])
def test_pictures_are_turned_as_exif_says(name, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"a.mpo": {"save_all": True, "append_images": [Image.new("RGB", (112, 80))]}}.get(name, {})
    Image.fromarray(COLOUR).save(tmp_path / name, exif=exif, quality=95, **more)
    got = pixels(tmp_path / name)
    expected = TURNS[orientation](COLOUR)
    assert got.shape == expected.shape
    assert np.abs(got.astype(float) - expected).mean() < 6  # the format's own loss; another turn has 80


@pytest.mark.parametrize("orientation", TURNS)
def test_tiffs_of_every_mode_are_turned_as_exif_says(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    colour = Image.fromarray(COLOUR)
    pictures = {mode: colour.convert(mode) for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK")}
    for mode, picture in (pictures | {"I;16": Image.fromarray(GREY)}).items():
        picture.save(tmp_path / "plain.tif")
        picture.save(tmp_path / "turned.tif", exif=exif)
        assert np.array_equal(pixels(tmp_path / "turned.tif"), TURNS[orientation](pixels(tmp_path / "plain.tif"))), mode


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0"]
)
def test_broken_exif_turns_nothing(exif, tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert np.abs(pixels(tmp_path / "a.jpg").astype(float) - COLOUR).mean() < 6


# -- depth -------------------------------------------------------------------------------------------------------------


def tiff(values: np.ndarray, bits: int, sample_format: int = 1, photometric: int = 1, data: bytes = b"") -> bytes:
    """A grey TIFF of one strip, little-endian, written by hand: Pillow writes no 12 bits and no unsigned 32."""
    height, width = values.shape
    data = data or values.tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = sorted((tags | {339: sample_format}).items())
    ifd = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + ifd + struct.pack("<I", 0)


def twelve_bits(values: np.ndarray) -> bytes:
    pairs = values.reshape(-1, 2).astype(int)
    a, b = pairs[:, 0], pairs[:, 1]
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8).tobytes()


def deep_files(folder: Path) -> dict[str, tuple[Path, np.ndarray]]:
    """By kind: a file, and its levels from 0 to 1."""
    levels = GREY / 65535
    wide = GREY.astype(np.uint32) * 65537
    written: dict[str, tuple[str, Any, np.ndarray]] = {
        "png 16": ("a.png", Image.fromarray(GREY), levels),
        "tiff 16": ("b.tif", Image.fromarray(GREY), levels),
        "tiff 16, big-endian": ("c.tiff", Image.frombytes("I;16B", (112, 80), GREY.astype(">u2").tobytes()), levels),
        "tiff 16, white is zero": ("d.tif", tiff(GREY, 16, photometric=0), 1 - levels),
        "tiff 16, signed": ("e.tif", tiff((GREY >> 1).astype("<i2"), 16, 2), (GREY >> 1) / 32767),
        "tiff 12": ("f.tif", tiff(GREY, 12, data=twelve_bits(GREY >> 4)), (GREY >> 4) / 4095),
        "tiff 32": ("g.tif", tiff(wide, 32), levels),
        "tiff 32, signed": ("h.tif", Image.fromarray((wide >> 1).astype(np.int32)), levels),
        "tiff float": ("i.tif", Image.fromarray(levels.astype(np.float32)), levels),
        "jpeg2000 16": ("j.jp2", Image.fromarray(GREY), levels),
        "pgm 16": ("k.pgm", Image.fromarray(GREY), levels),
        "pgm, 1000 grey values": (
            "l.pgm",
            b"P5 112 80 1000\n" + (GREY % 1001).astype(">u2").tobytes(),
            GREY % 1001 / 1e3,
        ),
    }
    for name, content, _ in written.values():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content.save(folder / name)
    return {kind: (folder / name, levels) for kind, (name, _, levels) in written.items()}


@pytest.mark.parametrize("channels", [1, 3])
def test_deep_grey_is_scaled_by_its_depth(channels, tmp_path):
    for kind, (file, levels) in deep_files(tmp_path).items():
        got = pixels(file, channels)
        assert got.shape == (80, 112, 3)[: 3 if channels == 3 else 2], kind
        assert np.abs(got - 255 * (levels[..., None] if channels == 3 else levels)).max() <= 0.51, kind


@pytest.mark.parametrize("values", [[0, 255], [-0.1, 1], [0, float("nan")], [0, float("inf")]], ids=str)
def test_floats_outside_of_0_to_1_are_refused_by_name(values, tmp_path):
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif cannot be read .* expected floats from 0 to 1, got"):
        open_picture(tmp_path / "a.tif")


def test_negative_integers_are_refused_by_name(tmp_path):
    Image.fromarray(np.array([[-5, 5]], np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif .* expected integers from 0 to 2147483647, got -5 to 5"):
        open_picture(tmp_path / "a.tif")


# -- transparency ------------------------------------------------------------------------------------------------------


def palette(transparent: Any) -> Image.Image:
    indices = Image.frombytes("P", (112, 80), (ALPHA % 3).tobytes())
    indices.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    indices.info["transparency"] = transparent
    return indices


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with_colour_key(values: np.ndarray, key: tuple[int, ...], bits: int = 16) -> bytes:
    """A PNG, one value of which is transparent: Pillow writes none in deep colour, and no grey of 2 or 4 bits."""
    kind = 2 if values.ndim == 3 else 0
    if bits < 8:
        digits = values.astype(np.uint8)[..., None] >> np.arange(bits)[::-1] & 1
        lines = np.packbits(digits.reshape(len(values), -1), axis=1)
    else:
        lines = values.astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in lines)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, kind, 0, 0, 0)
    keyed = chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + keyed + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def transparent_files(folder: Path) -> dict[str, tuple[Path, np.ndarray]]:
    """By kind: a file, and the picture on white."""
    red_green_blue = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]])
    without_green = np.where((ALPHA % 3 == 1)[..., None], 255, red_green_blue[ALPHA % 3])
    steps = np.array([0, 128, 255], np.uint8)[ALPHA % 3]
    grey = (GREY >> 8).astype(np.uint8)
    rgba = np.dstack([COLOUR, ALPHA])
    key = (int(GREY[0, 0]),)
    deep = COLOUR.astype(np.uint16) * 257
    first = tuple(int(value) for value in COLOUR[0, 0])
    here = (first == COLOUR).all(-1, keepdims=True)
    expected = on_white(COLOUR, ALPHA)
    keyed_grey = np.dstack([np.where(grey == 7, 255, grey)] * 3)
    keyed_deep = np.dstack([np.where(key == GREY, 255, GREY / 257)] * 3)
    deep_first = tuple(257 * value for value in first)
    dark = np.where(here, 3, deep)
    on_dark = np.where(here | (COLOUR == 0).all(-1, keepdims=True), 255, COLOUR)

    def low_bits(bits: int) -> np.ndarray:
        value = grey >> (8 - bits)
        key = {1: 1, 2: 2, 4: 3}[bits]
        return np.dstack([np.where(value == key, 255, value * (255 / (2**bits - 1)))] * 3)

    written: dict[str, tuple[str, Any, np.ndarray, dict[str, Any]]] = {
        "RGBA png": ("a.png", Image.fromarray(rgba), expected, {}),
        "RGBA webp": ("b.webp", Image.fromarray(rgba), expected, {"lossless": True, "exact": True}),
        "RGBA tiff": ("c.tif", Image.fromarray(rgba), expected, {}),
        "LA png": ("d.png", Image.fromarray(np.dstack([grey, ALPHA])), on_white(np.dstack([grey] * 3), ALPHA), {}),
        "palette, one colour, png": ("e.png", palette(1), without_green, {}),
        "palette, one colour, gif": ("f.gif", palette(1), without_green, {"transparency": 1}),
        "palette, shares": ("g.png", palette(bytes([0, 128, 255])), on_white(red_green_blue[ALPHA % 3], steps), {}),
        "grey key": ("h.png", Image.fromarray(grey), keyed_grey, {"transparency": 7}),
        "colour key": ("i.png", Image.fromarray(COLOUR), np.where(here, 255, COLOUR), {"transparency": first}),
        "deep grey key": ("j.png", png_with_colour_key(GREY, key), keyed_deep, {}),
        "deep colour key": ("k.png", png_with_colour_key(deep, deep_first), np.where(here, 255, COLOUR), {}),
        "dark deep colour key": ("l.png", png_with_colour_key(dark, (3, 3, 3)), on_dark, {}),
        "grey key of 1 bit": ("m.png", png_with_colour_key(grey >> 7, (1,), 1), low_bits(1), {}),
        "grey key of 2 bits": ("n.png", png_with_colour_key(grey >> 6, (2,), 2), low_bits(2), {}),
        "grey key of 4 bits": ("o.png", png_with_colour_key(grey >> 4, (3,), 4), low_bits(4), {}),
    }  # fmt: skip
    for name, content, _, options in written.values():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content.save(folder / name, **options)
    return {kind: (folder / name, expected) for kind, (name, _, expected, _) in written.items()}


def test_transparent_pixels_are_white(tmp_path):
    for kind, (file, expected) in transparent_files(tmp_path).items():
        assert close(pixels(file), expected), kind


# -- kinds -------------------------------------------------------------------------------------------------------------

PLAIN = ["a.png", "a.bmp", "a.tif", "a.ppm", "a.tga", "a.gif", "a.webp", "a.jp2", "a.pcx", "a.sgi", "A.PNG", "a.JPE"]


def plain_files(folder: Path) -> dict[str, tuple[Path, np.ndarray]]:
    """By kind: a file, and its colours as Pillow converts them."""
    options = {"a.webp": {"lossless": True}, "a.jp2": {"irreversible": False}, "a.JPE": {"quality": 90}}
    modes = {"CMYK": "m.tif", "LAB": "o.tif", "1": "p.png", "L": "q.png", "P": "r.png"}
    if READS_YCBCR:
        modes["YCbCr"] = "n.tif"
    files: dict[str, tuple[Path, np.ndarray]] = {}
    folder = folder / "plain"
    folder.mkdir()
    for name in PLAIN:
        Image.fromarray(COLOUR).save(folder / name, **options.get(name, {}))
        files[name] = folder / name, COLOUR
    for mode, name in modes.items():
        if mode == "LAB":
            picture = Image.merge("LAB", Image.fromarray(COLOUR).split())
        else:
            picture = Image.fromarray(COLOUR).convert(mode)
        picture.save(folder / name)
        files[mode] = folder / name, np.asarray(picture.convert("RGB"))
    return files


def test_formats_and_modes_are_read_from_a_folder(tmp_path):
    files = plain_files(tmp_path)
    assert set(find_images([tmp_path]).pictures) == {file for file, _ in files.values()}
    for kind, (file, expected) in files.items():
        got = pixels(file)
        assert got.shape == expected.shape, kind
        loss = np.abs(got.astype(float) - expected).mean()
        assert loss < (6 if kind in ("a.JPE", "a.gif") else 1), kind


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_of_several_frames_the_first_is_read(name, tmp_path):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    assert close(pixels(tmp_path / name), np.full((30, 40, 3), [255, 0, 0]))


# -- what is no picture ------------------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("empty.png", b"", "its content has no format that Pillow reads by itself"),
        ("text.jpg", b"no picture", "its content has no format that Pillow reads by itself"),
        ("half.png", None, "truncated|broken|incomplete"),
        (
            "postscript.eps",
            EPS,
            "its content has no format that Pillow reads by itself",
        ),  # for which Pillow would start Ghostscript
        ("postscript.jpg", EPS, "its content has no format that Pillow reads by itself"),
        ("stub.grib", b"GRIB\0\0\0\1", "its content has no format that Pillow reads by itself"),
        ("film.mpg", b"\0\0\1\xb3\x10\0\x10\0", "its content has no format that Pillow reads by itself"),
        ("missing.png", None, "No such file or directory"),
    ],
)
def test_what_cannot_be_read_is_named(name, content, why, tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", None)  # calling it would be another error
    file = tmp_path / name
    if name == "half.png":
        noise = Image.fromarray(RNG.integers(0, 256, (80, 80, 3), dtype=np.uint8))
        noise.save(tmp_path / "whole.png")
        content = (tmp_path / "whole.png").read_bytes()[:9000]
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read as a picture: .*({why})") as caught:
        open_picture(file)
    assert "Errno" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_decompression_bomb_is_named_and_a_large_picture_is_read_without_a_warning(tmp_path, monkeypatch):
    Image.new("1", (300, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(ValueError, match=r"a\.png cannot be read as a picture: DecompressionBombError"):
        open_picture(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    with warnings.catch_warnings(action="error"):
        assert open_picture(tmp_path / "a.png").size == (300, 100)


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_pipe_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png cannot be read as a picture: expected a file, found .* a pipe"):
        open_picture(tmp_path / "a.png")


def test_a_folder_is_read_to_its_depth_and_what_is_left_out_is_counted(tmp_path):
    picture = Image.new("RGB", (8, 8))
    (tmp_path / "x.jpg" / "deep").mkdir(parents=True)  # a folder, whatever its name
    for name in ("b.PNG", "a.jpg", "x.jpg/deep/c.JPEG"):
        picture.save(tmp_path / name)
    for name in ("one.heic", "two.HEIC", "notes.txt", "README", "page.eps"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path)
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    picture.save(outside / "d.bmp")
    (tmp_path / "linked").symlink_to(outside)
    found = find_images([tmp_path])
    names = ["a.jpg", "b.PNG", "gone.png", "linked/d.bmp", "x.jpg/deep/c.JPEG"]
    assert [str(file.relative_to(tmp_path)) for file in found.pictures] == names
    assert found.left_out == {".heic": 2, ".txt": 1, "": 1, ".eps": 1}
    assert found.others() == "5 of another kind (no suffix 1, .eps 1, .heic 2, .txt 1)"
    for i in range(9):
        (tmp_path / f"part.{i}").touch()
    assert find_images([tmp_path]).others().startswith("14 of another kind (no suffix 1, ")
    assert find_images([tmp_path]).others().endswith(", and 5 more kinds)")


def test_a_folder_without_pictures_says_what_it_has(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"found none in {tmp_path}, but 1 of another kind \(\.heic 1\)"):
        find_images([tmp_path])


# -- as a model takes them ---------------------------------------------------------------------------------------------


def probabilities(model: Any, file: Path) -> np.ndarray:
    (prediction,) = classify(model, [file], topk=1000)
    assert prediction.error is None, prediction.error
    return np.array([p for _, p in sorted(prediction.classes, key=lambda pair: int(pair[0].split()[1]))])


def test_classify_is_a_pipeline_of_our_own(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5).eval()
    transform: Any = create_transform(**resolve_model_data_config(model, use_test_size=True), is_training=False)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(COLOUR).save(tmp_path / "turned.png", exif=exif)
    kinds = {"turned": (tmp_path / "turned.png", TURNS[6](COLOUR))}
    kinds |= {kind: (file, np.dstack([np.rint(255 * x)] * 3)) for kind, (file, x) in deep_files(tmp_path).items()}
    kinds |= transparent_files(tmp_path) | plain_files(tmp_path)
    for kind, (file, expected) in kinds.items():
        seen = pixels(file) if kind in ("a.JPE", "a.gif") or "share" in kind or expected.dtype == float else expected
        with torch.inference_mode():
            own = model(transform(Image.fromarray(np.asarray(seen).astype(np.uint8)))[None]).softmax(1)[0]
        np.testing.assert_allclose(probabilities(model, file), own, atol=1e-6, rtol=0, err_msg=kind)


def test_a_grey_network_takes_the_mean_of_a_colour_networks_preprocessing(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    model = timm.create_model("test_resnet", in_chans=1, num_classes=5)
    model.pretrained_cfg.update(input_size=(3, 80, 80), test_input_size=None, crop_pct=1.0, mean=(0.1, 0.2, 0.3))
    model.pretrained_cfg["std"] = (0.5, 0.6, 0.7)
    got = reader(model)(tmp_path / "a.png")
    assert got.shape == (1, 80, 80)
    expected = (pixels(tmp_path / "a.png", 1)[:, 16:96] / 255 - 0.2) / 0.6
    assert np.abs(got[0].numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("channels", [2, 4])
def test_pictures_are_refused_before_a_forward_pass_of_other_channels(channels, tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    model = timm.create_model("test_resnet", in_chans=channels, num_classes=5).eval()
    with pytest.raises(ValueError, match=f"1 or 3 input channels, as pictures have them, got one of {channels}"):
        next(classify(model, [tmp_path / "a.png"]))
