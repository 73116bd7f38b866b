"""What Windows, macOS and ARM do otherwise, simulated here; docs/compatibility.md lists it."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import timm_nf
from tests.support import ROOT, small_nets
from timm_nf import augment
from timm_nf.cli import main
from timm_nf.hub import write_folder
from timm_nf.inference import export
from timm_nf.inference.named import canonical_name
from timm_nf.layers import standardize_triton
from timm_nf.optim import unit_triton

EACH_FAMILY = pytest.mark.parametrize("family", small_nets.FAMILIES)


def small_network() -> torch.nn.Module:
    net = small_nets.SHORT["NF_RegNet"]
    model = small_nets.create(net)
    model.load_state_dict(small_nets.state_dict(net, torch.float32))
    return model.eval()


# -- macOS: a device without float64, no Triton ------------------------------------------------------------------------


class NoFloat64(TorchDispatchMode):
    """The meta device refuses float64, as MPS does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.is_meta and x.dtype is torch.float64 for x in tree_leaves(out)):
            raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype as the MPS framework has none: {func}")
        return out


@pytest.fixture
def like_mps(monkeypatch):
    for module in (standardize_triton, unit_triton):
        monkeypatch.setattr(module, "has_triton", lambda device_type: False)
    with NoFloat64():
        yield


def test_the_stand_in_refuses_float64(like_mps):
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(1, device="meta", dtype=torch.float64)


@EACH_FAMILY
@pytest.mark.filterwarnings("ignore:these parameters come without")
def test_a_training_step_and_a_fused_network_need_no_float64(family, like_mps):
    model = small_nets.create(family, device="meta")
    optimizer = timm.optim.create_optimizer_v2(model, "agcsgd", lr=0.1, weight_decay=1e-4)
    x = torch.empty(2, 3, 64, 64, device="meta")
    model(x).sum().backward()
    optimizer.step()
    assert timm_nf.fuse(model).eval()(x).shape == (2, 10)


@pytest.mark.parametrize("move", [augment.rotate, augment.shear_x, augment.shear_y, augment.translate_x])
def test_pictures_are_moved_on_a_device_without_float64(move, like_mps):
    assert move(torch.empty(3, 20, 24, dtype=torch.uint8, device="meta"), 3).is_meta


def test_a_network_is_converted_where_another_device_is_the_default():
    with torch.device("meta"):
        model = timm_nf.normalizer_free(timm.create_model("resnet18", num_classes=2))
    assert all(p.is_meta for p in model.parameters())


# -- ARM: no oneDNN ----------------------------------------------------------------------------------------------------


@EACH_FAMILY
@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's, where it sets its flags
def test_without_onednn_the_numbers_are_the_same(family):
    model, x = small_nets.build(family, torch.float32), small_nets.batch(dtype=torch.float32)
    outputs = []
    for enabled in (True, False):
        with torch.backends.mkldnn.flags(enabled=enabled), torch.no_grad():
            outputs.append([model(x), timm_nf.fuse(model)(x)])
    assert small_nets.relative_error(torch.stack(outputs[1]), torch.stack(outputs[0])) < 1e-5


# -- Windows: drive letters and backslashes ----------------------------------------------------------------------------


@pytest.fixture
def drive(tmp_path, monkeypatch) -> str:
    r"""A folder with the name `D:\new nets\f0`, of which Linux does not know that it is a path."""
    monkeypatch.chdir(tmp_path)
    name = r"D:\new nets\f0"
    model = small_network()
    written = write_folder(model, name, card={"license": "mit"})
    (call,) = re.findall(r"create_model\((.*), pretrained=True\)", written.card)
    assert json.loads(call) == f"local-dir:{name}"  # in the card's code, backslashes are no escapes
    return name


def test_a_folder_with_a_drive_letter_is_a_network(drive, capsys):
    assert canonical_name(drive) == drive
    assert canonical_name(f"local-dir:{drive}") == f"local-dir:{drive}"
    main(["export", drive, "-o", r"D:\fused", "--license", "mit"])
    assert r'timm.create_model("local-dir:D:\\fused", pretrained=True)' in capsys.readouterr().out
    want, got = (timm.create_model(f"local-dir:{name}", pretrained=True).eval() for name in (drive, r"D:\fused"))
    assert got.fused
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert small_nets.relative_error(got(x), want(x)) < 1e-5


# -- Windows: a file that is open or mapped can be neither replaced nor removed ----------------------------------------


def _held(path: Path) -> set[str]:
    """Files at or below a path that this process has open, or maps."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    files = {line.split(maxsplit=5)[5] for line in maps if "/" in line}
    for descriptor in Path("/proc/self/fd").iterdir():
        if descriptor.is_symlink():  # not the one of the listing itself
            files.add(os.path.realpath(descriptor))
    return {file for file in files if Path(file).is_relative_to(path.resolve()) and Path(file).is_file()}


@pytest.fixture
def moves(monkeypatch):
    """What was renamed, replaced or removed while this process held a file of it, after `held` at its end."""
    seen: list[str] = []

    def watch(module: Any, name: str) -> None:
        original = getattr(module, name)

        def watched(path: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(str(path))
            assert not _held(Path(path)), f"{name} of {path}"
            return original(path, *args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    watch(os, "rename")
    watch(os, "replace")
    watch(tempfile._shutil, "rmtree")
    return seen


@pytest.mark.skipif(sys.platform != "linux", reason="Windows refuses by itself; elsewhere there is no /proc")
def test_a_mapped_file_is_seen_as_held(tmp_path):
    file = tmp_path / "x.bin"
    file.write_bytes(b"x" * 4096)
    assert not _held(tmp_path)
    mapped = torch.from_file(str(file), size=4096, dtype=torch.uint8)
    assert _held(tmp_path) == {str(file)}
    del mapped
    with file.open():
        assert _held(tmp_path) == {str(file)}


@pytest.mark.skipif(sys.platform != "linux", reason="Windows refuses by itself; elsewhere there is no /proc")
def test_a_folder_is_written_twice_without_moving_or_removing_an_open_file(tmp_path, moves):
    model = small_network()
    for _ in range(2):
        write_folder(model, tmp_path / "net", card={"license": "mit"}, overwrite_card=True)
    assert len([path for path in moves if path.endswith("model.safetensors")]) == 1
    assert len([path for path in moves if Path(path).name == "new"]) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="Windows refuses by itself; elsewhere there is no /proc")
@pytest.mark.parametrize(
    "suffix", [".ts", pytest.param(".pt2", marks=pytest.mark.slow), pytest.param(".onnx", marks=pytest.mark.slow)]
)
def test_an_exported_file_takes_its_place_closed(suffix, tmp_path, moves):
    model = timm_nf.fuse(small_network())
    export.write(model, tmp_path / f"net{suffix}", size=64)
    assert any(path.endswith(suffix) for path in moves)


# -- Windows and macOS: workers are spawned, not forked ----------------------------------------------------------------


@pytest.mark.slow
def test_workers_that_read_pictures_can_be_spawned(tmp_path):
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("RGB", (40, 40), (40 * number, 90, 90)).save(tmp_path / name / f"{number}.png")
    code = (
        "import sys, torch.multiprocessing as m\n"
        "from timm_nf.cli import main\n"
        "if __name__ == '__main__':\n"
        "    m.set_start_method('spawn')\n"
        "    main(sys.argv[1:])\n"
    )
    script = tmp_path / "run.py"
    script.write_text(code, encoding="utf-8")
    arguments = ["clip-range", "--model", "test_nfnet", "--data", str(tmp_path), "--img-size", "32"]
    arguments += ["--batch-size", "2", "--batches", "2", "--warmup-steps", "2", "-o", str(tmp_path / "c.png")]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c.png").is_file()
