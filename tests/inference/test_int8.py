"""`inference.int8`: which pictures are used for what, what is in the file, and that a failure leaves nothing."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from tests.support.exports import OVERLAY, fused, refused
from tests.support.saving import save_for_hf
from tests.support.small_nets import FAMILIES, build, create
from timm_nf.cli import main
from timm_nf.inference import int8, named


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
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as a picture: its content has no format"):
        int8.write(fused(), [*pictures, broken], tmp_path / "out" / "m.onnx")
    assert list((tmp_path / "out").iterdir()) == []


# The command


def test_the_command_prints_what_was_compared(pictures, tmp_path, capsys):
    model = build("NFNet", torch.float32, **OVERLAY)
    save_for_hf(fill(create("NFNet", **OVERLAY), model), tmp_path / "net", safe_serialization=True)
    main(["export", str(tmp_path / "net"), "-o", str(tmp_path / "m.onnx"), "--int8", str(pictures[0].parent)])
    out = capsys.readouterr().out
    assert "20 to calibrate, 5 others to compare" in out
    for fact in ("same best class", "relative error", "MB, float32", "ms, float32", "Gemm", str(tmp_path / "m.onnx")):
        assert fact in out
    assert int8.session(tmp_path / "m.onnx")(torch.zeros(3, 64, 64)).shape == (1, 10)


def fill(model, source):
    model.load_state_dict(source.state_dict())
    return model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "m.pt2", "--int8", "."], "a file that ends in .onnx"),
        (["-o", "m.onnx", "--int8", ".", "--dtype", "float16"], "without --dynamic-size and --dtype"),
        (["-o", "m.onnx", "--int8", ".", "--dynamic-size"], "without --dynamic-size and --dtype"),
        (["-o", "m.onnx", "--int8", "missing"], "missing"),
        (["-o", "m.onnx", "--random-weights", "--checkpoint", "w.pth"], "without --checkpoint"),
        (["-o", "net", "--random-weights"], "a folder is for weights"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_two(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").touch()
    code, line = refused("nfnet_f0", *arguments, capsys=capsys)
    assert code == 2
    assert message in line


def test_too_few_pictures_are_one_line(tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (64, 64)).save(pictures / "a.png")
    save_for_hf(create("NFNet", **OVERLAY), tmp_path / "net", safe_serialization=True)
    code, line = refused(tmp_path / "net", "-o", tmp_path / "m.onnx", "--int8", pictures, capsys=capsys)
    assert code == 1
    assert "at least 10 pictures" in line
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".ts"])
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_network_without_weights_is_exported_and_the_file_says_so(suffix, tmp_path, capsys, monkeypatch):
    small = create("NFNet", **OVERLAY)
    monkeypatch.setattr(named.timm, "create_model", lambda name: small)
    file = tmp_path / f"m{suffix}"
    main(["export", "dm_nf_resnet50", "-o", str(file), "--random-weights"])
    assert "random, of no use but to time" in capsys.readouterr().out
    said = {"weights": ""}
    if suffix == ".onnx":
        said = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    elif suffix == ".pt2":
        torch.export.load(file, extra_files=said)
    else:
        torch.jit.load(file, _extra_files=said)
    assert said["weights"] in ("random", b"random")


def test_random_weights_are_the_same_each_time_and_none_is_zero():
    before = torch.get_rng_state()
    one, two = (named.random_model("test_nfnet") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.any() for p in one.parameters())
    torch.testing.assert_close(dict(one.state_dict()), dict(two.state_dict()), rtol=0, atol=0)
