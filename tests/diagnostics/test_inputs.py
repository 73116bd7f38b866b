"""`timm_nf.diagnostics.plots` and `timm-nf diagnose`: what goes in, what is said of what comes out, what is refused."""

import json
import math
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tests.support.saving import save_for_hf
from tests.support.small_nets import create
from timm_nf.cli import main
from timm_nf.diagnostics import signal_stats
from timm_nf.diagnostics.inputs import INPUTS, input_batch, named_network, open_branches, pick_pictures
from timm_nf.diagnostics.plots import draw_signals
from timm_nf.diagnostics.signals import DEAD, EXPLODED, troubles
from timm_nf.inference.images import find_images


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A tiny saved network, a folder of 40 pictures in two classes, and one with a broken picture."""
    root = tmp_path_factory.mktemp("local")
    args = {"depths": (1, 2), "channels": (16, 16), "group_size": 8, "num_classes": 3}
    model = timm.create_model("nfnet_f0", **args, pretrained_cfg_overlay={"test_input_size": (3, 32, 32)})
    save_for_hf(model, str(root / "model"), safe_serialization=True)
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 50, 3), dtype=np.uint8)
    for i, picture in enumerate(noise):
        file = root / "pictures" / ("ant" if i < 20 else "bee") / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    (root / "broken").mkdir()
    (root / "broken" / "half.png").write_bytes((root / "pictures" / "ant" / "00.png").read_bytes()[:60])
    (root / "empty").mkdir()
    return root


def scaled(factor):
    """A small network whose stem multiplies its output."""
    torch.manual_seed(0)
    model = create("NFNet")
    open_branches(model)
    stem = list(model.stem.children())[-1]
    nn.init.constant_(stem.gain, factor)
    return model


def rows_of(model):
    return signal_stats(model, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


def test_a_healthy_network_has_no_troubles():
    assert troubles(rows_of(scaled(1.0))) == []


def test_an_exploding_signal_is_named_with_the_first_place():
    signal, branch = troubles(rows_of(scaled(1e3)))
    assert signal.startswith("the signal explodes, first at stem (average channel variance 9")
    assert "half precision overflows soon" in signal
    assert branch.startswith("the residual branch explodes, first at stages.0.0 (")


def test_a_dying_signal_is_named_with_the_first_place():
    signal, branch = troubles(rows_of(scaled(1e-4)))
    assert signal.startswith("the signal dies, first at stem (average channel variance ")
    assert "pictures differ in it by less than a hundredth" in signal
    assert branch.startswith("the residual branch dies, first at stages.0.0 (")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_not_finite_are_named(value):
    model = scaled(1.0)
    nn.init.constant_(model.stages[1][0].conv3.bias, value)
    rows = rows_of(model)
    signal, branch = troubles(rows)
    assert signal.startswith("the signal is not finite, first at stages.1.0 (")
    assert branch.startswith("the residual branch is not finite, first at stages.1.0 (")


def test_a_network_whose_blocks_double_the_magnitude_is_found_out():
    torch.manual_seed(0)
    model = timm.create_model("dm_nf_resnet50", depths=(8, 4), channels=(32, 64), stem_chs=16, alpha=2.0, num_classes=2)
    assert troubles(rows_of(model)) == []  # its skip gains are 0
    for name, p in model.named_parameters():
        if name.endswith("skipinit_gain"):
            nn.init.constant_(p, 8.0)
    (found,) = (line for line in troubles(rows_of(model)) if "signal explodes" in line)
    assert "stages.0." in found


def test_the_limits_are_themselves_healthy():
    row = {"name": "stem", "avg_sq_mean": 0.0, "avg_var": EXPLODED, "res_avg_var": DEAD}
    assert troubles([row]) == []
    assert len(troubles([row | {"avg_var": 1.01 * EXPLODED, "res_avg_var": 0.99 * DEAD}])) == 2


@pytest.mark.parametrize(("name", "closed"), [("dm_nf_resnet50", 16), ("resnet26", 8), ("test_vit", 0)])
def test_branches_are_opened_where_they_start_closed(name, closed):
    model = timm.create_model(name, num_classes=0)
    before = {key: value.clone() for key, value in model.named_parameters()}
    assert open_branches(model) == closed
    changed = [key for key, value in model.named_parameters() if not torch.equal(value, before[key])]
    assert len(changed) == closed
    assert all(key.endswith(("skipinit_gain", "bn3.weight")) for key in changed)
    assert all((model.get_parameter(key) == 1).all() for key in changed)


def test_noise_has_the_training_size_and_unit_variance():
    noise = input_batch(timm.create_model("nfnet_f0", device="meta"))
    assert noise.shape == (INPUTS, 3, 192, 192)
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert input_batch(timm.create_model("resnet18", in_chans=1, device="meta")).shape == (INPUTS, 1, 224, 224)


def test_pictures_come_from_all_of_the_folder_with_the_preprocessing_of_the_network(local):
    picked = pick_pictures(find_images([local / "pictures"]).pictures)
    assert len(picked) == 14
    assert {file.parent.name for file in picked} == {"ant", "bee"}
    model, words = named_network(str(local / "model"))
    assert words == "its weights"
    assert input_batch(model, picked).shape == (14, 3, 32, 32)


def test_the_picture_has_a_line_for_every_network_and_the_expected_variance(tmp_path):
    row = {"name": "a", "avg_sq_mean": 0.0, "avg_var": 1.0, "res_avg_var": None, "expected_var": None}
    grown = [row | {"avg_var": 10.0**i, "res_avg_var": math.nan, "expected_var": 1.0} for i in range(4)]
    draw_signals({"one": [row, row | {"avg_var": math.inf}], "two": grown}, "two networks", tmp_path / "p.png")
    pixels = np.asarray(Image.open(tmp_path / "p.png").convert("RGB")).reshape(-1, 3).astype(int)
    assert (pixels[:, 2] - pixels[:, 0] > 100).any()  # blue
    assert ((pixels[:, 0] - pixels[:, 2] > 200) & (pixels[:, 1] > 100)).any()  # orange


def test_the_same_expectation_of_all_networks_has_one_line_in_the_legend(tmp_path):
    def rows(*expected):
        return [
            {"name": "a", "avg_sq_mean": 0.1, "avg_var": 1.0, "res_avg_var": None, "expected_var": e} for e in expected
        ]

    def labels(**measured):
        draw_signals(measured, "", tmp_path / "p.svg")  # each text is a comment beside its outlines
        return [text for text in re.findall("<!-- (.*?) -->", (tmp_path / "p.svg").read_text()) if "expected" in text]

    assert labels(one=rows(1, 1.04), two=rows(1, 1.04)) == ["expected variance"]
    assert labels(one=rows(1, 1.04), other=rows(None, None)) == ["one, expected variance"]  # not of the other
    assert labels(one=rows(1, 1.04), two=rows(1, 1.2)) == ["one, expected variance", "two, expected variance"]
    assert labels(other=rows(None, None)) == []


def test_the_command_prints_a_table_of_every_network_and_writes_the_picture(local, tmp_path, capsys):
    main(["diagnose", "test_resnet", str(local / "model"), "-o", str(tmp_path / "p.png")])
    captured = capsys.readouterr()
    out = captured.out
    for words in (
        "layer4.0",
        "stages.1.1",
        "residual branch variance",
        "16 images of unit-normal noise",
        "its weights",
    ):
        assert words in out
    assert "at initialisation, 4 zero scales of residual branches set to 1; 3 x 160 x 160" in out
    assert captured.err == ""
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_takes_pictures_and_warns_on_stderr(local, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("timm_nf.diagnostics.signals.EXPLODED", 1e-6)
    main(["diagnose", str(local / "model"), "--images", str(local / "pictures"), "-o", str(tmp_path / "p.png")])
    captured = capsys.readouterr()
    assert "14 pictures of" in captured.out
    assert f"warning: {local}/model: the signal explodes, first at stem" in captured.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["vgg99"], 2, "no network or folder is called 'vgg99'"),
        (["test_resnet", "no/such/folder"], 2, "'no/such/folder'"),
        (["{local}/pictures"], 2, "has no config.json"),
        (["{local}/bare"], 1, "{local}/bare has no weights"),
        (["test_resnet.no_tag"], 2, "no_tag"),
        (["rexnet_100"], 1, "expected a network with residual blocks"),
        (["test_resnet", "--images", "{local}/empty"], 1, "found none in"),
        (["test_resnet", "--images", "{local}/broken"], 1, "half.png cannot be read"),
        (["test_resnet", "--images", "{local}/missing"], 2, "missing"),
        (["test_resnet", "-o", "no/such/p.png"], 2, "existing folder for --out"),
        (["test_resnet", "-o", "{local}/p.txt"], 2, ".png"),
        ([], 2, "NETWORK"),
    ],
)
def test_wrong_arguments_are_one_line_and_write_nothing(arguments, code, message, local, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (local / "bare").mkdir(exist_ok=True)
    config = json.loads((local / "model" / "config.json").read_text())
    (local / "bare" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as stop:
        main(["diagnose", *(argument.format(local=local) for argument in arguments)])
    assert stop.value.code == code
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("timm-nf: error: ")
    assert message.format(local=local) in line
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_network_at_initialisation_leaves_the_users_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, _ = named_network("test_resnet")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second, _ = named_network("test_resnet")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
