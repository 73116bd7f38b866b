"""The authors' checkpoints as Hub folders, through the command line, and what happens when that fails."""

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import timm_nf
from tests.support import GOLDEN
from tests.support.small_nets import batch, relative_error
from tests.support.stand_in_hub import answer
from timm_nf.cli import main
from timm_nf.convert import haiku_to_timm, load_haiku
from timm_nf.hub import HubError, from_haiku

T0 = GOLDEN / "T0_haiku_flatmap.npz"


def golden_error(model: Any) -> float:
    """The relative error of the logits, against the authors'."""
    with np.load(GOLDEN / "T0_2x64x64.npz") as golden, torch.no_grad():
        return relative_error(model.eval()(batch(dtype=next(model.parameters()).dtype)), golden["logits"])


def left(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name != "cache")


@pytest.fixture
def fails(capfd):
    """Runs `convert` where it has to fail; exit code and the one line."""

    def run(*argv: str) -> tuple[Any, str]:
        with pytest.raises(SystemExit) as stop:
            main(["convert", *argv])
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("timm-nf: error: ")
        return stop.value.code, line

    return run


def test_a_checkpoint_becomes_a_folder_that_timm_loads_to_the_golden_logits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["convert", str(T0), "-o", "t0/"])
    out = " ".join(capsys.readouterr().out.split())
    for fact in (
        "arrays of the checkpoint in the file 114 of 114 equal, bit for bit",
        "tensors read back 114 of 114 equal",
        "features and logits of the network read back equal to the bit",
        'timm.create_model("nfnet_f0", depths=(1, 2, 1, 1), channels=(32, 64, 96, 96), group_size=8, num_classes=10)',
        "152,303 parameters",
        f"sha256 {timm_nf.hub.folder.sha256_of(tmp_path / 't0' / 'model.safetensors')}",
    ):
        assert fact in out
    model: Any = timm.create_model("local-dir:t0", pretrained=True)
    assert golden_error(model) < 1e-5
    assert golden_error(model.double()) < 1e-13
    assert model.pretrained_cfg["architecture"] == "nfnet_f0"


@pytest.mark.parametrize("form", ["plain", "jaxarrays"])
def test_the_other_forms_give_the_same_file(form, tmp_path):
    made = [from_haiku.convert(GOLDEN / f"T0_haiku_{name}.npz", tmp_path / name) for name in (form, "flatmap")]
    assert made[0].written.sha256 == made[1].written.sha256


def test_without_a_license_there_is_no_card_and_no_guess(tmp_path, capsys):
    main(["convert", str(T0), "-o", str(tmp_path / "t0")])
    assert "never guessed" in capsys.readouterr().out
    assert left(tmp_path / "t0") == ["config.json", "model.safetensors"]
    assert "license" not in (tmp_path / "t0" / "config.json").read_text()


def test_with_a_license_the_card_states_the_network(tmp_path):
    made = from_haiku.convert(T0, tmp_path / "t0", license="apache-2.0")
    card = ModelCard.load(tmp_path / "t0" / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model is None
    assert made.written.sha256 in card.text
    assert "depths=(1, 2, 1, 1)" in card.text
    config = json.loads((tmp_path / "t0" / "config.json").read_text())
    assert config["pretrained_cfg"]["license"] == "apache-2.0"
    assert config["model_args"].items() >= {"depths": [1, 2, 1, 1], "group_size": 8, "fused": False}.items()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("float16", torch.float16)])
def test_half_precision_is_the_rounded_checkpoint(name, dtype, tmp_path, capsys):
    main(["convert", str(T0), "-o", str(tmp_path / "t0"), "--dtype", name])
    assert f"114 of 114 equal when rounded to {str(dtype)[6:]}" in capsys.readouterr().out
    stored = load_file(tmp_path / "t0" / "model.safetensors")
    want = haiku_to_timm(load_haiku(T0))
    assert stored.keys() == want.keys()
    assert all(torch.equal(tensor, want[key].to(dtype)) for key, tensor in stored.items())
    # three or two decimal digits a weight, through twelve layers
    assert golden_error(timm.create_model(f"local-dir:{tmp_path / 't0'}", pretrained=True)) < 0.1


# -- folders that are there --------------------------------------------------------------------------------------------


def test_what_is_in_a_folder_stays_as_it_is(tmp_path, fails):
    (tmp_path / "t0").mkdir()
    (tmp_path / "t0" / "config.json").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "t0")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("t0", "file", "link", "dangling"):
        code, line = fails(str(T0), "-o", str(tmp_path / name))
        assert code == 1
        assert f"{name} is there: remove it or name another" in line
    assert left(tmp_path) == ["dangling", "file", "link", "t0"]
    assert (tmp_path / "t0" / "config.json").read_text() == (tmp_path / "file").read_text() == "mine"
    assert left(tmp_path / "t0") == ["config.json"]


@pytest.mark.parametrize("where", ["empty", "new/below/another"])
def test_an_empty_or_a_new_folder_is_filled(where, tmp_path):
    (tmp_path / "empty").mkdir()
    from_haiku.convert(T0, tmp_path / where)
    assert left(tmp_path / where) == ["config.json", "model.safetensors"]
    assert not list(tmp_path.rglob(".*"))
    assert (tmp_path / where / "model.safetensors").stat().st_mode & 0o777 == (
        tmp_path / where / "config.json"
    ).stat().st_mode & 0o777


def test_arrays_that_are_not_found_again_leave_no_folder(tmp_path, monkeypatch):
    def spoil(file: Any) -> Any:
        tensors = load_file(file)
        tensors["stages.1.0.conv2.weight"][3, 2, 1, 0] += 1e-7
        return tensors

    monkeypatch.setattr(from_haiku, "load_tensors", spoil)
    with pytest.raises(RuntimeError, match=r"1 of 114 arrays .*NFNet/~/nf_block_1/~/conv1/w"):
        from_haiku.convert(T0, tmp_path / "t0")
    assert left(tmp_path) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(RuntimeError, match="1 of 114 arrays"):
        from_haiku.convert(T0, tmp_path / "mine")
    assert left(tmp_path) == ["mine"]  # an empty one stays
    assert left(tmp_path / "mine") == []


def test_a_full_disk_leaves_no_folder(tmp_path, monkeypatch, fails):
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/disk/file")

    monkeypatch.setattr("timm_nf.hub.folder.save_config_for_hf", full)
    assert "the disk is full (/disk/file): make room" in fails(str(T0), "-o", str(tmp_path / "t0"))[1]
    assert left(tmp_path) == []


def test_a_file_that_is_no_checkpoint_leaves_no_folder(tmp_path, fails):
    np.savez(tmp_path / "a.npz", w=np.ones(3))
    (tmp_path / "b.npz").write_bytes(T0.read_bytes()[:100_000])
    for name in ("a.npz", "b.npz", "missing.npz"):
        code, line = fails(str(tmp_path / name), "-o", str(tmp_path / "t0"))
        assert code == (2 if name == "missing.npz" else 1)
        assert name in line
    assert left(tmp_path) == ["a.npz", "b.npz"]


def test_wrong_usage_does_nothing(tmp_path, fails):
    out = str(tmp_path / "t0")
    code, line = fails(str(T0), "-o", out, "--push", "alice/t0")
    assert code == 2
    assert "--license" in line
    code, line = fails(str(T0), "-o", out, "--dtype", "int8")
    assert code == 2
    assert "fp32, fp16, bf16" in line
    assert fails(str(T0))[0] == 2
    assert left(tmp_path) == []


# -- to the Hub --------------------------------------------------------------------------------------------------------


def test_push_publishes_the_folder(hub, tmp_path, capsys):
    main(["convert", str(T0), "-o", str(tmp_path / "t0"), "--license", "mit", "--push", "alice/t0"])
    repo = hub.repos["alice/t0"]
    files = {file.name: file.read_bytes() for file in (tmp_path / "t0").iterdir()}
    assert len(files) == 3
    assert {name: data for name, data in repo.files().items() if name != ".gitattributes"} == files
    assert f"{hub.url}/alice/t0/commit/{repo.refs['main']}" in capsys.readouterr().out
    assert b"hf-hub:alice/t0" in files["README.md"]
    assert golden_error(timm_nf.hub.pull("alice/t0")) < 1e-5


def test_a_push_that_fails_leaves_no_folder_and_can_be_repeated(hub, tmp_path, monkeypatch):
    def convert() -> Any:
        return from_haiku.convert(T0, tmp_path / "t0", license="mit", repo_id="alice/t0")

    for pattern in ("POST .*create", "PUT", "POST .*commit"):
        hub.fault(pattern, answer(400, message="out of order"), times=9)
        with pytest.raises(HubError):
            convert()
        hub.faults.clear()
        assert left(tmp_path) == []
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="not logged in"):
        convert()
    assert left(tmp_path) == []
    monkeypatch.setenv("HF_TOKEN", "hf_aliceSecretToken")
    assert convert().written.commit == hub.repos["alice/t0"].refs["main"]
