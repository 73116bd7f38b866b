"""`inference.export` and `timm-nf export`: what is written was measured, nothing is left after a failure."""

import json

import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from tests.support import OLD_TORCH
from tests.support.exports import OVERLAY, fused, refused
from tests.support.saving import save_for_hf
from tests.support.small_nets import FAMILIES, NETS, build, create, state_dict
from timm_nf.cli import main
from timm_nf.inference import export


def read(file):
    """Function that runs an ONNX file on a float32 tensor."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_runs_as_the_network_on_any_batch(family, tmp_path):
    model, file = fused(family), tmp_path / "m.onnx"
    assert all(check.ok for check in export.write(model, file, dynamic_batch=True))
    run = read(file)
    for batch in (1, 3, 5):
        x = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(run(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_onnx_runs_as_the_network_at_any_size(tmp_path):
    model, file = fused(), tmp_path / "m.onnx"
    if OLD_TORCH:
        with pytest.raises(RuntimeError, match="ONNX was not written, as it does not run: Fail: "):
            export.write(model, file, dynamic_size=True)
        assert not file.exists()
        return
    export.write(model, file, dynamic_size=True)
    run = read(file)
    for size in [(64, 64), (97, 75), (66, 129), (33, 35)]:
        x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(run(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_file_that_does_not_run_is_not_kept(tmp_path, monkeypatch):
    def write(model, images, dims, file, metadata):
        file.touch()
        return export._ReadBack(lambda images: images.view(7), [])

    monkeypatch.setattr(export, "_write_torchscript", write)
    with pytest.raises(RuntimeError, match="TorchScript was not written, as it does not run: RuntimeError: "):
        export.write(create("NFNet"), tmp_path / "m.ts")
    assert not list(tmp_path.iterdir())


def test_onnx_holds_convolutions_and_no_arithmetic_on_weights(tmp_path):
    model = fused()
    export.write(model, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    kinds = {node.op_type for node in graph.node}
    if OLD_TORCH:  # it writes gelu by its formula
        assert {"Pow", "Tanh"} <= kinds
        kinds -= {"Pow", "Tanh"}
    assert kinds <= {
        "Conv",
        "Gelu",
        "Relu",
        "Sigmoid",
        "Mul",
        "Add",
        "AveragePool",
        "ReduceMean",
        "Reshape",
        "Gemm",
        "Pad",
    }
    assert sum(node.op_type == "Conv" for node in graph.node) == sum(isinstance(m, nn.Conv2d) for m in model.modules())


@pytest.mark.filterwarnings("ignore")  # that torch has a newer exporter, and of its tracer
def test_torchs_older_exporter_takes_a_network_that_is_not_fused(tmp_path):
    # Its constant folding lost a node of some networks, this one among them.
    small = {"depths": (1, 1, 1, 1), "channels": (32, 64, 64, 64), "group_size": 16, "num_classes": 10}
    model, file = timm.create_model("nfnet_f0", **small).eval(), tmp_path / "m.onnx"
    model.head.fc.weight.data.normal_(0, 0.1)
    for block in (block for stage in model.stages for block in stage):
        block.skipinit_gain.data.fill_(0.5)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.onnx.export(model, (x,), file, dynamo=False, input_names=["images"])
    torch.testing.assert_close(read(file)(x), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # half a minute, most of it torch taking the standardisation apart
def test_a_graph_that_was_not_fused_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError, match=r"ONNX was not written.*, which timm_nf\.fuse\(model\) bakes in"):
        export.write(build("NFNet", torch.float32, **OVERLAY), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_normalisation_and_arithmetic_on_weights_are_found_in_a_graph():
    node, weight = onnx.helper.make_node, onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [1.0])
    nodes = [
        node("Mul", ["w", "w"], ["a"]),
        node("Identity", ["a"], ["b"]),
        node("ReduceMean", ["b"], ["c"]),
        node("Mul", ["x", "c"], ["d"]),
        node("InstanceNormalization", ["d", "w", "w"], ["y"]),
    ]
    normalisation, arithmetic = export._graph_checks(onnx.helper.make_graph(nodes, "g", [], [], [weight]))
    assert (normalisation.ok, normalisation.measured) == (False, "InstanceNormalization")
    assert (arithmetic.ok, arithmetic.measured) == (False, "Mul, ReduceMean, which timm_nf.fuse(model) bakes in")
    assert all(check.ok for check in export._graph_checks(onnx.helper.make_graph(nodes[3:4], "g", [], [], [weight])))


def test_onnx_carries_preprocessing_and_labels(tmp_path):
    model = fused()
    export.write(model, tmp_path / "m.onnx")
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert facts["architecture"] == "nfnet_f0"
    assert json.loads(facts["labels"]) == [f"label {i}" for i in range(10)]
    data = timm.data.resolve_model_data_config(model, use_test_size=True)
    assert json.loads(facts["preprocessing"]) == json.loads(json.dumps(data))


@pytest.mark.parametrize("suffix", [".pt2", ".ts"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_programs_and_torchscript_run_without_the_package(family, suffix, tmp_path):
    model, file = fused(family), tmp_path / f"m{suffix}"
    export.write(model, file, dynamic_batch=True)
    loaded = torch.export.load(file).module() if suffix == ".pt2" else torch.jit.load(file)
    x = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("suffix", "dtype"), [(".onnx", torch.float16), (".pt2", torch.float16), (".pt2", torch.bfloat16)]
)
def test_half_precision_is_written_as_such(suffix, dtype, tmp_path):
    file = tmp_path / f"m{suffix}"
    export.write(fused(), file, dtype=dtype)
    if suffix == ".onnx":
        weights = {tensor.data_type for tensor in onnx.load(file).graph.initializer if len(tensor.dims) == 4}
        assert weights == {onnx.TensorProto.FLOAT16}
    else:
        assert {p.dtype for p in torch.export.load(file).state_dict.values()} == {dtype}


def test_the_model_is_left_as_it_was(tmp_path):
    model = fused().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export.write(model, tmp_path / "m.pt2", dtype=torch.bfloat16)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_a_network_that_differs_after_reading_back_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "m.pt2"
    file.write_bytes(b"the old one")
    load = torch.export.load
    monkeypatch.setattr(torch.export, "load", lambda f: DoubledProgram(load(f)))
    with pytest.raises(RuntimeError, match=r"failed: logits of 4 crops as 1 x 3 x 64 x 64: relative error 1\.0e\+00"):
        export.write(fused(), file)
    assert file.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [file]


class DoubledProgram:
    def __init__(self, program):
        self.program = program

    def module(self):
        return lambda x: 2 * self.program.module()(x)


def test_sizes_a_model_cannot_take_are_refused(tmp_path):
    model = timm.create_model("test_vit", **OVERLAY)
    with pytest.raises(ValueError, match=r"the model does not take images of \(3, 70, 70\)"):
        export.write(model, tmp_path / "m.onnx", size=70)
    assert list(tmp_path.iterdir()) == []


def test_photographs_are_preprocessed_pictures():
    photos = export.photographs(create("NFNet", **OVERLAY), 96)
    assert photos.shape == (4, 3, 96, 96)
    assert all(0.3 < photo.std() < 3 for photo in photos)
    assert not torch.equal(photos[0], photos[1])
    assert export.photographs(create("NFNet", in_chans=1), 32).shape == (4, 1, 32, 32)


# The command


@pytest.fixture
def net(tmp_path):
    """A folder in Hub layout."""
    model = create("NFNet", **OVERLAY)
    model.load_state_dict(state_dict(NETS["NFNet"], torch.float32))
    save_for_hf(model, tmp_path / "net", safe_serialization=True)
    return tmp_path / "net"


def test_a_folder_in_hub_layout_is_exported(net, tmp_path, capsys):
    main(["export", str(tmp_path / "net"), "-o", str(tmp_path / "m.onnx"), "--size", "48", "--dynamic-batch"])
    out = capsys.readouterr().out
    assert "logits of 4 crops as 4 x 3 x 48 x 48" in out
    assert f"{tmp_path / 'm.onnx'}, " in out
    assert read(tmp_path / "m.onnx")(torch.zeros(2, 3, 48, 48)).shape == (2, 10)


def test_a_folder_is_exported_to_a_fused_folder_that_timm_loads(net, tmp_path, capsys):
    main(["export", str(net), "-o", f"{tmp_path / 'fused'}/", "--license", "mit"])
    out = capsys.readouterr().out
    assert "features and logits of the network read back  equal to the bit" in out
    assert sorted(file.name for file in (tmp_path / "fused").iterdir()) == [
        *("README.md", "config.json", "model.safetensors")
    ]
    before, after = (timm.create_model(f"local-dir:{f}", pretrained=True).eval() for f in (net, tmp_path / "fused"))
    assert (before.fused, after.fused) == (False, True)
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["architecture"] == "nfnet_f0"
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(after(x), before(x), rtol=1e-4, atol=1e-5)

    code, line = refused(tmp_path / "fused", "-o", tmp_path / "twice", "--license", "mit", capsys=capsys)
    assert code == 1
    assert "fused already" in line
    assert not (tmp_path / "twice").exists()
    main(["export", str(tmp_path / "fused"), "-o", str(tmp_path / "m.pt2")])  # a file of it is nothing new to fuse


def test_a_folder_without_a_license_and_a_fused_network_of_timms_are_refused(net, tmp_path, capsys):
    code, line = refused(net, "-o", tmp_path / "fused", capsys=capsys)
    assert code == 1
    assert "a license is required" in line
    args = {"depths": (1, 1), "channels": (32, 48)}
    stock = timm.create_model("nf_resnet50", num_classes=4, **args, **OVERLAY)
    save_for_hf(stock, tmp_path / "stock", model_args=args, safe_serialization=True)
    code, line = refused(tmp_path / "stock", "-o", tmp_path / "fused", "--license", "mit", capsys=capsys)
    assert code == 1
    assert "timm-nf export" in line
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nfnet_f99", "-o", "m.onnx"], "no network or folder is called 'nfnet_f99'"),
        (["nfnet_f0", "-o", "m.gguf"], "ends in .onnx, .pt2, .ts or a folder, got m.gguf"),
        (["nfnet_f0", "-o", "missing/m.onnx"], "in an existing folder"),
        (["nfnet_f0", "-o", "net", "--size", "64"], "no --size, no --dynamic-*"),
        (
            ["nfnet_f0", "-o", "m.onnx", "--dtype", "int8"],
            "expected float32, float16, bfloat16 (or fp32, fp16, bf16), got int8",
        ),
        (["nfnet_f0", "-o", "m.onnx", "--size", "0"], "size"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_two(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, line = refused(*arguments, capsys=capsys)
    assert code == 2
    assert message in line


def test_a_missing_extra_is_one_line(net, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "onnx_is_installed", lambda: False)
    code, line = refused(net, "-o", tmp_path / "m.onnx", capsys=capsys)
    assert code == 1
    assert 'pip install ".[export]"' in line
    assert list(tmp_path.iterdir()) == [net]
