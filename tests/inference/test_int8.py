"""`inference.int8`: which pictures are used for what, what is in the file, and that a failure leaves nothing."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import timm_nf
from tests.support.small_nets import FAMILIES, build
from timm_nf.inference import int8

OVERLAY = {"pretrained_cfg_overlay": {"input_size": (3, 64, 64), "label_names": [f"label {i}" for i in range(10)]}}


def fused(family="NFNet", **kwargs):
    return timm_nf.fuse(build(family, torch.float32, **OVERLAY, **kwargs))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """25 pictures of coloured noise, each with its own colours."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(25):
        pixels = rng.normal(rng.uniform(60, 200, 3), rng.uniform(10, 60), (80, 90, 3)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02}.png")
    return sorted(folder.iterdir())


def paths(n):
    return [Path(f"{i:04}.png") for i in range(n)]


@pytest.mark.parametrize(("n", "calibration"), [(10, 8), (25, 20), (320, 256), (1000, 256)])
def test_at_most_256_and_four_fifths_of_the_pictures_calibrate_and_the_rest_compares(n, calibration):
    ours, rest = int8.split(paths(n))
    assert (len(ours), len(rest)) == (calibration, n - calibration)
    assert {*ours, *rest} == set(paths(n))
    assert int8.split(reversed(paths(n))) == (ours, rest)


def test_calibration_sees_all_parts_of_a_folder():
    ours, _ = int8.split(paths(1000))
    assert min(ours) < paths(1000)[50]
    assert max(ours) > paths(1000)[950]


def test_fewer_than_ten_pictures_are_refused_before_anything_is_written(pictures, tmp_path):
    with pytest.raises(ValueError, match="at least 10 pictures to calibrate and compare on, got 9"):
        int8.write(fused(), pictures[:9] * 2, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_convolutions_are_in_int8_per_channel_and_the_logits_stay_close(family, pictures, tmp_path):
    file, model = tmp_path / "m.onnx", fused(family)
    found = int8.write(model, pictures, file, dynamic_batch=True)
    graph = onnx.load(file).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    convs = [node for node in graph.node if node.op_type == "Conv"]
    assert convs
    for conv in convs:
        source = made[conv.input[1]]
        assert source.op_type == "DequantizeLinear"
        weight, scale = tensors[source.input[0]], tensors[source.input[1]]
        assert (weight.data_type, list(scale.dims)) == (onnx.TensorProto.INT8, [weight.dims[0]])
    assert "Conv" not in found.kept
    assert "Gemm" in found.kept
    assert (found.calibrated, found.compared) == (20, 5)
    assert 1e-4 < found.error < 0.15  # it is 8 bits
    assert found.size == file.stat().st_size < found.float_size
    assert found.milliseconds > 0
    assert list(tmp_path.iterdir()) == [file]
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert int8.session(file)(x).shape == (3, 10)


def test_the_error_is_that_of_the_pictures_it_was_not_calibrated_on(pictures, tmp_path):
    model, file = fused(), tmp_path / "m.onnx"
    found = int8.write(model, pictures, file)
    _, rest = int8.split(pictures)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    images = [transform(Image.open(path)) for path in rest]
    run = int8.session(file)
    ours, expected = torch.cat([run(x) for x in images]), model(torch.stack(images)).detach()
    assert found.error == pytest.approx(float((ours - expected).norm() / expected.norm()), rel=1e-3)
    assert found.same_class == (ours.argmax(1) == expected.argmax(1)).float().mean()


def test_the_file_says_what_it_is(pictures, tmp_path):
    int8.write(fused(), pictures, tmp_path / "m.onnx", size=48, metadata={"weights": "random"})
    proto = onnx.load(tmp_path / "m.onnx")
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    assert facts["quantized"] == "Conv in int8, all other nodes are float32"
    assert (facts["architecture"], facts["weights"]) == ("nfnet_f0", "random")
    assert [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 48, 48]


def test_a_file_that_is_no_better_than_noise_keeps_the_old_one(pictures, tmp_path, monkeypatch):
    file = tmp_path / "m.onnx"
    file.write_bytes(b"the old one")
    compare = int8._compare
    monkeypatch.setattr(int8, "_compare", lambda *a: compare(*a)._replace(error=0.63))
    with pytest.raises(RuntimeError, match="int8 was not written: its logits are 63 % off those of float32 on 5 pict"):
        int8.write(fused(), pictures, file)
    assert file.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [file]


def test_a_picture_that_cannot_be_read_is_named_and_leaves_nothing(pictures, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    broken = tmp_path / "in" / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as a picture: UnidentifiedImageError"):
        int8.write(fused(), [*pictures, broken], tmp_path / "out" / "m.onnx")
    assert list((tmp_path / "out").iterdir()) == []
