"""The oldest torch and timm: what is said below them, and what is made up for on timm before the newest."""

import json
import os
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import timm
import torch

import timm_nf
from tests.support import ROOT
from timm_nf import _versions
from timm_nf.hub import write_folder

SMALL = {"depths": (1, 1, 1, 1), "channels": (16, 16, 16, 16), "group_size": 8, "num_classes": 3}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_bounds_are_those_that_pip_reads():
    bounds = dict(re.findall(r"(\w+)>=([\d.]+)", " ".join(PROJECT["dependencies"])))
    assert {name: bounds[name] for name in _versions.OLDEST} == _versions.OLDEST


@pytest.mark.parametrize(
    ("name", "found"), [("timm", "1.0.26"), ("timm", "0.9.16"), ("timm", "1.0.27.dev0"), ("torch", "2.5.1+cu124")]
)
def test_below_the_bound_one_sentence_says_what_was_found_where_and_what_is_needed(name, found, monkeypatch):
    old = types.ModuleType(name)
    old.__version__, old.__file__ = found, "/home/me/clone/timm/__init__.py"
    monkeypatch.setattr(_versions, name, old)
    with pytest.raises(ImportError) as caught:
        _versions.require_versions()
    said = str(caught.value)
    needed = _versions.OLDEST[name]
    assert f"needs {name} {needed} or newer, but {name} {found} was imported from /home/me/clone/timm" in said.replace(
        "\\", "/"
    )
    assert "\n" not in said


@pytest.mark.parametrize("found", ["1.0.27", "1.0.29.dev0", "1.1", "2.0.0rc1"])
def test_from_the_bound_on_a_release_or_a_clone_is_taken(found, monkeypatch):
    new = types.ModuleType("timm")
    new.__version__ = found
    monkeypatch.setattr(_versions, "timm", new)
    _versions.require_versions()


def test_too_old_a_timm_in_the_current_folder_is_named_on_import(tmp_path):
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("__version__ = '1.0.3'\n")
    (tmp_path / "timm" / "models.py").write_text("")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", "import timm_nf"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: timm_nf needs timm ")
    assert "timm 1.0.3 was imported from " + str(tmp_path / "timm") in last


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_nfnet"])
@pytest.mark.parametrize("channels", [1, 4])
def test_the_input_channels_are_those_of_the_first_convolution_where_the_network_names_none(name, channels):
    model = timm.create_model(name, in_chans=channels)
    vars(model).pop("in_chans", None)  # as some of timm's have none
    assert _versions.input_channels(model) == channels


@pytest.fixture
def saved(tmp_path) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(0)
    model = timm.create_model("nfnet_f0", **SMALL, in_chans=4).eval()
    write_folder(model, tmp_path / "net", card=None)
    return tmp_path / "net", model


def test_a_written_folder_has_the_arguments_and_loads_as_the_same_network(saved):
    folder, model = saved
    config = json.loads((folder / "config.json").read_text())
    own = {"depths": [1] * 4, "channels": [16] * 4, "group_size": 8, "in_chans": 4, "fused": False}
    assert {key: config["model_args"].get(key) for key in own} == own
    assert config["pretrained_cfg"]["input_size"][0] == 4
    x = torch.randn(2, 4, 64, 64)
    with torch.no_grad():
        assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x), model(x))


@pytest.mark.parametrize("in_chans", [1, 4, 6])
@pytest.mark.parametrize("features_only", [False, True])
def test_a_converted_stem_keeps_its_weights(in_chans, features_only):
    """A picture whose channels are all equal gives what it gives with three of them; random weights would not."""
    torch.manual_seed(0)
    model = timm.create_model("nfnet_f0", **SMALL).eval()
    overlay = {"state_dict": model.state_dict(), "num_classes": 3}
    arguments = SMALL | {"features_only": True} if features_only else SMALL
    converted = timm.create_model(
        "nfnet_f0", pretrained=True, in_chans=in_chans, pretrained_cfg_overlay=overlay, **arguments
    ).eval()
    grey = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        got, want = converted(grey.expand(-1, in_chans, -1, -1)), model(grey.expand(-1, 3, -1, -1))
        if features_only:
            got, want = got[-1], model.forward_intermediates(grey.expand(-1, 3, -1, -1), intermediates_only=True)[-1]
    if in_chans == 4:  # not a multiple of 3: standardisation takes the converted weight's mean away
        assert not torch.equal(got, want)
        stem = converted.state_dict()[
            next(n for n in converted.state_dict() if n.startswith("stem") and n.endswith("conv1.weight"))
        ]
        old = timm_nf.models.nfnets.standardize_weight(model.stem.conv1.weight, model.stem.conv1.gain).detach()
        expected = old.repeat(1, 2, 1, 1)[:, :4] * 0.75
        torch.testing.assert_close(stem, expected - expected.mean((1, 2, 3), keepdim=True), rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_config_names_the_stem_also_after_loading():
    model = timm.create_model("nfnet_f0", **SMALL)
    assert model.pretrained_cfg["first_conv"] == "stem.conv1"
