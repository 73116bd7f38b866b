import json
import subprocess
import sys
from importlib.machinery import PathFinder
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from torch import nn
from typer.main import get_command

import timm_nf.inference.classify
import timm_nf.verify.checks
from tests.support import GOLDEN
from tests.support.saving import save_for_hf
from timm_nf import checkpoint
from timm_nf.cli import app, main
from timm_nf.variants import VARIANTS
from timm_nf.verify.checks import Verdict

COMMANDS = [
    *("list", "info", "recipe", "classify", "demo", "env", "verify"),
    *("convert", "push", "pull", "clip-range", "diagnose", "export", "bench"),
]


def fails(*argv, capsys):
    """Exit code and the one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("timm-nf: error: ")
    return stop.value.code, lines[0]


def test_the_tests_know_every_command():
    assert set(get_command(app).commands) == set(COMMANDS)


def test_bare_command_prints_help(capsys):
    main([])
    out = capsys.readouterr().out
    assert all(f" {command} " in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_in_two_examples(command, capsys):
    main([command, "--help"])
    *_, title, first, second = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert title == "Examples:"
    assert first.startswith(f"timm-nf {command}")
    assert second.startswith(f"timm-nf {command}")


def test_list_prints_every_row(capsys):
    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(VARIANTS)
    assert lines[1].split() == ["nfnet_f0", "71.5", "6.98", "192", "/", "256", "dm_in1k"]


def test_list_takes_a_pattern(capsys):
    main(["list", "*regnet_b?"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        name for name in VARIANTS if "regnet" in name
    ]
    assert fails("list", "vgg*", capsys=capsys)[0] == 2


def convolutions_and_linear_layers(model, size):
    """Multiply-adds from the outputs of a forward pass on the meta device."""
    total = 0

    def add(module, args, output):
        nonlocal total
        total += module.weight.numel() * output[0, 0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add)
    reference = next(model.parameters())
    model(reference.new_empty(1, model.in_chans, size, size))
    return total


@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [
        ("nfnet_f0", 192, {}),
        ("nfnet_f0", 97, {"num_classes": 0, "in_chans": 1, "width_factor": 0.7, "group_size": 16, "num_features": 0}),
        ("dm_nf_resnet50", 75, {"attn_layer": "se", "attn_kwargs": {"rd_ratio": 0.3}, "num_classes": 7}),
        ("dm_nf_regnet_b0", 101, {"depths": (2, 1), "channels": (40, 80), "stem_chs": 24}),
    ],
)
def test_counts_are_those_of_the_network_that_is_built(name, size, kwargs):
    model: Any = timm.create_model(name, device="meta", **kwargs)
    params, macs = model.cfg.count(size, model.in_chans, model.num_classes)
    assert params == sum(p.numel() for p in model.parameters())
    assert macs == convolutions_and_linear_layers(model, size)


def test_counts_are_the_authors():
    facts = json.loads((GOLDEN / "variants.json").read_text())
    for name, row in VARIANTS.items():
        kind, _, size = name.removeprefix("dm_").rpartition("_")
        if name.startswith("nfnet"):
            key = "NFNet-" + name.removeprefix("nfnet_").replace("_plus", "+").upper()
        else:
            key = f"NF-RegNet-{size.upper()}" if kind.endswith("regnet") else f"NF-ResNet{size.removeprefix('resnet')}"
            key = key if key in facts else f"NF-ResNet{name.removeprefix('dm_nf_resnet')}"
        params, macs = row.cfg.count(row.train_size)
        assert params == facts[key]["params"]
        if name.startswith("nfnet"):  # the authors' own count, with fractional map sizes, exists for these
            assert macs == facts[key]["macs_train"]


def test_info_shows_row_sizes_weights_and_how_to_create_it(capsys):
    main(["info", "nfnet_f0"])
    out = capsys.readouterr().out
    for fact in ("71,489,284", "6.977 G", "192 / 256", "0.2", "magnitude 5", "timm/dm_nfnet_f0.dm_in1k", "squash"):
        assert fact in out
    assert 'timm.create_model("nfnet_f0.dm_in1k", pretrained=True)' in out
    main(["info", "dm_nf_regnet_b4"])
    assert 'timm.create_model("dm_nf_regnet_b4")' in capsys.readouterr().out
    assert "resnet50" in fails("info", "resnet50", capsys=capsys)[1]


def test_env_names_versions_and_devices(capsys):
    main(["env"])
    out = capsys.readouterr().out
    for name in ("python", "torch", "timm", "timm_nf", "huggingface_hub", "safetensors", "threads", "device cpu"):
        assert f"\n{name} " in f"\n{out}"
    assert timm.__version__ in out


@pytest.fixture(scope="module")
def local_model(tmp_path_factory):
    """A tiny saved network and a folder of pictures, one of them broken, one of them in a folder below."""
    folder = tmp_path_factory.mktemp("local")
    args = {"depths": (1, 1), "channels": (16, 16), "group_size": 8, "num_classes": 3}
    model = timm.create_model("nfnet_f0", **args, pretrained_cfg_overlay={"test_input_size": (3, 32, 32)})
    labels = {"label_names": ["ant", "bee", "cat"]}
    save_for_hf(model, str(folder / "model"), labels, safe_serialization=True)
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    (folder / "pictures" / "below").mkdir(parents=True)
    Image.fromarray(noise).save(folder / "pictures" / "a[1].png")
    Image.fromarray(noise[..., 0]).save(folder / "pictures" / "below" / "grey.jpg")
    (folder / "pictures" / "notes.txt").write_text("not a picture")
    return folder


def test_classify_prints_labels_of_a_folder(local_model, capsys):
    main(["classify", str(local_model / "pictures"), "--model", f"local-dir:{local_model}/model", "--topk", "2"])
    captured = capsys.readouterr()
    blocks = captured.out.splitlines()
    assert [line for line in blocks if not line.startswith(" ")] == [
        f"{local_model}/pictures/a[1].png",
        f"{local_model}/pictures/below/grey.jpg",
    ]
    assert len(blocks) == 2 * 3
    assert all(line.split()[-1] in ("ant", "bee", "cat") for line in blocks if line.startswith(" "))
    assert "error" not in captured.err


def test_classify_reports_what_it_cannot_read_and_goes_on(local_model, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes((local_model / "pictures" / "a[1].png").read_bytes()[:60])
    files = [str(broken), str(tmp_path / "missing.jpg"), str(local_model / "pictures" / "a[1].png")]
    with pytest.raises(SystemExit) as stop:
        main(["classify", *files, "--model", f"local-dir:{local_model}/model"])
    captured = capsys.readouterr()
    assert stop.value.code == 1
    assert captured.out.startswith(files[2])
    errors = [line for line in captured.err.splitlines() if "error" in line]
    assert len(errors) == 2
    assert "broken.png" in errors[0]
    assert "missing.jpg cannot be read as a picture: FileNotFoundError: No such file" in errors[1]


def test_classify_without_pictures_or_weights_is_one_line(local_model, tmp_path, capsys):
    model = f"local-dir:{local_model}/model"
    code, line = fails("classify", str(tmp_path), "--model", model, capsys=capsys)
    assert code == 1
    assert str(tmp_path) in line
    code, line = fails("classify", f"{tmp_path}/no.png", "--model", model, capsys=capsys)
    assert code == 1
    assert f"found no file {tmp_path}/no.png" in line
    pictures = str(local_model / "pictures")
    assert "--checkpoint" in fails("classify", pictures, "--model", "dm_nf_regnet_b0", capsys=capsys)[1]
    assert "no_such" in fails("classify", pictures, "--model", "local-dir:no_such", capsys=capsys)[1]


def test_classify_without_a_network_says_so(local_model, monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise ConnectionError("[Errno -2] Name or service not known\nwith more lines")

    monkeypatch.setattr(timm, "create_model", offline)
    code, line = fails("classify", str(local_model / "pictures"), capsys=capsys)
    assert code == 1
    assert "Name or service not known" in line
    assert "network" in line


def test_checkpoint_loads_a_file_of_weights(local_model, tmp_path):
    model: Any = timm.create_model("dm_nf_regnet_b0")
    nn.init.constant_(model.head.fc.bias, 0.5)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    content = checkpoint.read(tmp_path / "model.safetensors")
    loaded: Any = timm_nf.inference.classify.load_model("dm_nf_regnet_b0", content)
    assert not loaded.training
    assert (loaded.head.fc.bias == 0.5).all()
    assert timm_nf.inference.classify.labels(loaded)[1].startswith("goldfish")


def test_verify_exits_with_1_only_if_a_check_fails(monkeypatch, capsys):
    rows = [Verdict("good", "0", "1", True), Verdict("elsewhere", "no device", "", None)]
    monkeypatch.setattr(timm_nf.verify.checks, "run", lambda *args, **kwargs: iter(rows))
    main(["verify"])
    out = capsys.readouterr().out
    assert "1 passed, 0 failed, 1 not checked here" in out
    rows.append(Verdict("bad", "2", "1", False))
    with pytest.raises(SystemExit) as stop:
        main(["verify"])
    assert stop.value.code == 1
    assert "FAILED" in capsys.readouterr().out


def test_demo_prints_what_was_measured(monkeypatch, tmp_path, capsys):
    import timm_nf.demo

    run = timm_nf.demo.run
    monkeypatch.setattr(timm_nf.demo, "run", lambda *args, **kwargs: run(*args, **kwargs, images=100))
    main(["demo", "-o", str(tmp_path), "--epochs", "1", "--batch-size", "40", "--lr", "0.1"])
    out = capsys.readouterr().out
    for fact in ("sgd", "agcsgd", "bit for bit", "curves.png", "predictions.png", "elapsed", timm.__version__):
        assert fact in out


@pytest.mark.parametrize(
    "argv", [["nothing"], ["info"], ["classify", "x.png", "--topk", "0"], ["list", "a", "b"], ["env", "--verbose"]]
)
def test_wrong_usage_is_one_line_and_exit_code_2(argv, capsys):
    assert fails(*argv, capsys=capsys)[0] == 2


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="found none"):
        main(["classify", str(tmp_path), "--debug"])


def test_without_typer_one_line_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; import timm_nf.cli"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith('timm-nf: error: typer is not installed: run pip install ".[cli]" in')


@pytest.mark.parametrize("argv", [["diagnose", "test_nfnet"], ["demo"]])
def test_without_matplotlib_one_line_says_what_to_install_before_the_work(argv, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib" or name.endswith("nostics.plots")]:
        monkeypatch.delitem(sys.modules, name)
    find = PathFinder.find_spec
    hide = {"matplotlib"}
    monkeypatch.setattr(PathFinder, "find_spec", lambda name, *rest: None if name in hide else find(name, *rest))
    code, line = fails(*argv, "-o", str(tmp_path / "out.png"), capsys=capsys)
    assert code == 1
    assert line.startswith('timm-nf: error: matplotlib is not installed: run pip install ".[cli]" in')
    assert not list(tmp_path.iterdir())
