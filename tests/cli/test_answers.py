"""Command lines and what they are answered with: exit code, one line, nothing built or fetched, nothing left behind."""

import argparse
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_nf_command
from tests.support import ROOT, small_nets
from tests.support.published import create
from tests.support.saving import save_for_hf
from timm_nf import __version__
from timm_nf.cli import main, options

NET = small_nets.keywords(small_nets.NETS["NFNet"])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with pictures, a file of weights with its arguments and an average, and a network of four channels."""
    root = tmp_path_factory.mktemp("answers")
    rng = np.random.default_rng(0)
    for kind in ("ant", "bee"):
        (root / "pictures" / kind).mkdir(parents=True)
        for i in range(2):
            noise = rng.integers(0, 255, (70, 70, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / "pictures" / kind / f"{i}.png")
    (root / "folder.png").mkdir()
    state = create().state_dict()
    kwargs = {key: value for key, value in NET.items() if key != "num_classes"}
    stored = {
        "state_dict": {f"module.{name}": tensor for name, tensor in state.items()},
        "state_dict_ema": {name: tensor / 2 for name, tensor in state.items()},
        "args": argparse.Namespace(num_classes=10, model_kwargs=kwargs, img_size=64),
    }
    torch.save(stored, root / "best.pth.tar")
    four = timm.create_model("test_nfnet", in_chans=4, num_classes=2)
    save_for_hf(four, root / "four", model_args={"in_chans": 4}, safe_serialization=True)
    names = timm.create_model("test_nfnet", num_classes=3)
    labels = {"label_names": ["plain", "na\u00efve \u732b", "steer\x1b[2J\nit"]}
    save_for_hf(names, root / "named", labels, safe_serialization=True)
    return root


ANSWERS: list[tuple[str, int, str]] = [
    ("classify {place}/missing.png", 1, "found no file {place}/missing.png"),
    ("classify {place}/pictures --device gpu", 2, "expected a device of this machine, which has cpu"),
    ("classify {place}/pictures --device cpu:x", 2, "got 'cpu:x'"),
    ("classify {place}/pictures --model resnet5", 2, "no network or folder is called 'resnet5' (did you mean resnet50"),
    ("classify {place}/pictures --model me/net", 2, "a repository of the Hub is written hf-hub:me/net"),
    ("classify {place}/pictures --model ./none", 2, "no network or folder is called './none'; `timm-nf list` shows"),
    ("classify {place}/pictures --model hf-hub:net", 2, "expected a repository as hf-hub:user/name, got 'hf-hub:net'"),
    ("classify {place}/pictures --model ftp:x", 2, "no network or folder is called 'ftp:x'"),
    ("classify {place}/pictures --model local-dir:/no/such", 2, "there is no folder /no/such"),
    ("classify {place}/pictures --model nfnet_f0.other", 2, "has no weights with the tag 'other'; it has dm_in1k"),
    ("classify {place}/pictures --model dm_nf_regnet_b0", 1, "no weights of dm_nf_regnet_b0 are published"),
    ("classify {place}/pictures --checkpoint {place}/none.pt", 2, "expected a file, {place}/none.pt is not there"),
    ("classify {place}/pictures --checkpoint {place}", 2, "{place} is a directory"),
    ("classify {place}/pictures --use-ema", 2, "--use-ema is about the weights of a --checkpoint"),
    ("classify {place}/pictures --model {place}/four", 1, "1 or 3 input channels, as pictures have them, got one of 4"),
    ("diagnose {place}/four --images {place}/pictures -o {out}/p.png", 1, "got one of 4"),
    ("diagnose nfnet_f0 resnet18 --checkpoint {place}/best.pth.tar", 2, "the weights of one network, got 2 networks"),
    ("diagnose nfnet_f0 --images {place}/none", 2, "expected a folder, {place}/none is not there"),
    ("clip-range --model {place}/four --data {place}/pictures --pretrained --batch-size 2 -o {out}/p.png", 1, "of 4"),
    ("export {place}/four -o {out}/a.onnx --int8 {place}/best.pth.tar", 2, "best.pth.tar is a file"),
    ("export nfnet_f0 -o {out}/a.onnx --int8 {place}/pictures", 1, "at least 10 pictures to calibrate and compare on"),
    ("export nfnet_f0 -o {out}/no/a.onnx --random-weights", 2, "in an existing folder"),
    ("export resnet50 -o {out}/a.onnx", 2, "ResNet has no standardised convolution to fuse"),  # nothing is fetched
    ("export resnet50 -o {out}/a --license mit", 2, "ResNet has no standardised convolution to fuse"),
    ("diagnose nfnet_f0 -o {place}/folder.png", 2, "a name that ends in .png, .pdf, .svg, got a folder of this name"),
    ("verify --image /dev/null", 2, "/dev/null is a pipe or a device"),
    ("bench resnet50", 2, "ResNet has no standardised convolution to fuse"),
    ("bench {place}/four", 2, "expected the name of a network in timm's registry, got the place"),
    ("push {place}/none.pt me/net --model nfnet_f0 --license mit", 2, "{place}/none.pt is not there"),
    ("push {place}/best.pth.tar me/net --model nfnet_f00 --license mit", 2, "(did you mean nfnet_f0"),
    (
        "push {place}/best.pth.tar me/net --model nfnet_f0 --license mit --dry-run --architecture NFNet_F00",
        2,
        "Invalid value for '--architecture': no network or folder is called 'NFNet_F00' (did you mean nfnet_f0",
    ),
    ("push {place}/best.pth.tar net --model nfnet_f0 --license mit --dry-run", 1, "as user/name, got 'net'"),
    ("convert {place}/none.npz -o {out}/x", 2, "{place}/none.npz is not there"),
    ("info resnet50", 2, "timm_nf has no network 'resnet50'; timm has"),
    ("info nfnet_f10", 2, "timm_nf has no network 'nfnet_f10' (did you mean nfnet_f1"),
    ("list nfnet_g0", 2, "no network is called 'nfnet_g0' (did you mean nfnet_f"),
    ("recipe nfnet_f0 --world-size 3", 2, "got 4096 for 3: give --batch-size 4092 or --batch-size 4098"),
    ("verify --image {place}/none.png", 2, "{place}/none.png is not there"),
    ("verify --imagenet-val {place}/none", 2, "{place}/none is not there"),
]


@pytest.mark.parametrize(("line", "code", "message"), ANSWERS, ids=[line[:60] for line, _, _ in ANSWERS])
def test_a_command_line_that_cannot_work_is_one_line_and_leaves_nothing(
    line, code, message, place, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stop:
        main(line.format(place=place, out=tmp_path).split())
    captured = capsys.readouterr()
    assert stop.value.code == code
    (said,) = (text for text in captured.err.splitlines() if text.startswith("timm-nf: "))
    assert message.format(place=place) in said
    assert "Errno" not in said
    assert not captured.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["export nfnet_f0 -o x.onnx", "export nfnet_f0 -o x", "diagnose nfnet_f0 -o x.png"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser may write everywhere
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    assert stop.value.code == 2
    assert ". cannot be written: give another folder to --out" in capsys.readouterr().err


# -- one loader --------------------------------------------------------------------------------------------------------

WEIGHTS = {
    "classify": "classify {place}/pictures/ant/0.png --model nfnet_f0",
    "export": "export nfnet_f0 -o {out}/m.pt2",
    "diagnose": "diagnose nfnet_f0 -o {out}/p.png",
    "bench": "bench nfnet_f0 --size 64 --repeats 3",
    "clip-range": "clip-range --model nfnet_f0 --data {place}/pictures --batch-size 2 --batches 1 -o {out}/p.png",
    "push": "push {file} me/net --model nfnet_f0 --license mit --dry-run",
}


@pytest.mark.parametrize(
    ("name", "flags", "entry"),
    [
        *((name, [], "state_dict") for name in WEIGHTS if name != "export"),  # test_grammar.py exports these
        *((name, ["--use-ema"], "state_dict_ema") for name in WEIGHTS),
    ],
)
def test_every_command_takes_the_same_file_and_says_which_entry_it_used(
    name, flags, entry, place, tmp_path, capsys, monkeypatch
):
    from timm_nf.inference import bench

    whole = bench.contenders
    shortened = ("timm_nf", "fused")
    monkeypatch.setattr(bench, "contenders", lambda *args: {k: v for k, v in whole(*args).items() if k in shortened})
    monkeypatch.setattr(bench, "_PAUSE", 0)
    file = place / "best.pth.tar"
    line = WEIGHTS[name].format(place=place, out=tmp_path, file=file).split()
    main([*line, *([] if name == "push" else ["--checkpoint", str(file)]), *flags])
    captured = capsys.readouterr()
    assert re.search(rf"{re.escape(str(file))}, {entry}(?!\w)", captured.out + captured.err)


# -- what is printed ---------------------------------------------------------------------------------------------------


def test_labels_cannot_steer_the_terminal(place, capsys):
    main(["classify", str(place / "pictures" / "ant" / "0.png"), "--model", str(place / "named")])
    out = capsys.readouterr().out
    assert "steer\\x1b[2J\\nit" in out
    assert all(line.isprintable() for line in out.splitlines())


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "na\\xefve \\u732b"), ("cp1252", "na\u00efve \\u732b")])
def test_a_label_that_the_encoding_lacks_is_escaped_and_the_others_go_on(encoding, shown, place, tmp_path, monkeypatch):
    picture = tmp_path / "\u732b.png"
    picture.write_bytes((place / "pictures" / "ant" / "0.png").read_bytes())
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")  # as Python opens it
    monkeypatch.setattr(sys, "stdout", terminal)
    main(["classify", str(picture), "--model", str(place / "named")])
    terminal.flush()
    out = terminal.buffer.getvalue().decode(encoding)
    assert shown in out
    assert "\\u732b.png" in out
    assert len(out.splitlines()) == 4


def test_files_beside_the_pictures_are_counted_on_stderr(place, tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "b.heic").write_bytes(b"x")
    main(["classify", str(tmp_path), "--model", str(place / "named")])
    assert "left out: 1 of another kind (.heic 1)" in capsys.readouterr().err


def test_the_home_folder_is_expanded_in_every_path(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("USERPROFILE", str(place))
    main(["classify", "~/pictures/ant/0.png", "--model=~/named", "--topk=1"])
    assert capsys.readouterr().out.startswith(f"{place}/pictures/ant/0.png\n")
    main(["push", "~/best.pth.tar", "me/net", "--model", "NFNet_F0", "--license", "mit", "--dry-run"])
    assert f"{place}/best.pth.tar, state_dict" in capsys.readouterr().out
    assert options.any_path("~/x") == place / "x"
    assert options.any_path("~nobody-here/x") == Path("~nobody-here/x")


def test_the_version_is_printed(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"timm-nf {__version__}\n"


def test_help_is_wrapped_as_paragraphs(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    main(["classify", "--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("Every format"))
    paragraph = lines[start : lines.index("", start)]
    assert len(paragraph) > 3
    assert all(len(line) > 55 for line in paragraph[:-1])


def test_info_gives_stochastic_depth(capsys):
    for name, rate in (("nfnet_f0", 0.25), ("dm_nf_resnet50", 0.0), ("dm_nf_regnet_b0", 0.1)):
        main(["info", name])
        assert f"stochastic depth {rate}" in " ".join(capsys.readouterr().out.split())


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("timm_nf.recipes.as_yaml", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["recipe", "nfnet_f0"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "timm-nf: interrupted\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("url"), "KeyError: 'url'"),
        (AssertionError(), "AssertionError"),
        (ValueError("x"), "x"),
        (TypeError("expected a network"), "expected a network"),
    ],
)
def test_an_error_of_others_has_its_type_as_its_text_alone_says_nothing(error, line, monkeypatch, capsys):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("timm_nf.recipes.settings", fail)
    with pytest.raises(SystemExit) as stop:
        main(["info", "nfnet_f0"])
    assert stop.value.code == 1
    assert capsys.readouterr().err == f"timm-nf: error: {line}\n"


def test_an_interrupt_while_torch_is_imported_is_one_line(tmp_path):
    # This import ends when stdin is closed, which the test does not do before the process has ended.
    (tmp_path / "torch.py").write_text("import sys\nprint('importing', flush=True)\nsys.stdin.read()\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    # Where the tests run in the background of a shell, SIGINT is ignored, also in what they start.
    listens = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{listens}; runpy.run_module('timm_nf_command', run_name='__main__')", "list"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, env=environment, cwd=tmp_path, text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        code = process.wait()
        _, err = process.communicate()
    assert (code, err) == (130, "timm-nf: interrupted\n")


def test_the_console_script_runs_the_command_line_and_gives_the_signal_back(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["timm-nf", "--version"])
    before = signal.getsignal(signal.SIGINT)
    timm_nf_command.main()
    assert capsys.readouterr().out == f"timm-nf {__version__}\n"
    assert signal.getsignal(signal.SIGINT) is before
