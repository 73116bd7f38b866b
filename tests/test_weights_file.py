"""Shapes of weights files: each is read if it is clear what is meant, otherwise the error says what it holds."""

import argparse
import collections
import json
import os
import pathlib
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_nf import checkpoint

RAW = {"stem.weight": torch.arange(12.0).view(3, 4), "head.bias": torch.ones(3)}
MEAN = {name: tensor + 100 for name, tensor in RAW.items()}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3, 4)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def under(prefix: str, tensors: dict[str, Any] = RAW, **more: Any) -> dict[str, Any]:
    return {prefix + name: tensor for name, tensor in tensors.items()} | more


def lightning(**state: Any) -> dict[str, Any]:
    best = {"best_model_score": torch.tensor(0.5), "best_k_models": {"/a.ckpt": torch.tensor(0.5)}}
    return {
        "epoch": 3, "global_step": 10, "pytorch-lightning_version": "2.5.0", "state_dict": state,
        "callbacks": {"ModelCheckpoint{'monitor': None}": best}, "optimizer_states": [OPTIMIZER], "lr_schedulers": [],
        "loops": {"fit_loop": {"state_dict": {}}}, "hyper_parameters": {"lr": 0.1},
    }  # fmt: skip


# {what: (content, entry that is read without --use-ema, entry that is read with it)}; None where it is refused.
SHAPES: dict[str, tuple[Any, str | None, str | None]] = {
    "a plain state dict": (RAW, "", None),
    "an OrderedDict": (collections.OrderedDict(RAW), "", None),
    "with counters beside": (RAW | {"epoch": 3, "best": torch.tensor(1.0), "note": "x", "none": None}, "", None),
    "state_dict": ({"state_dict": RAW, "optimizer": OPTIMIZER, "epoch": 1}, "state_dict", None),
    "both": ({"state_dict": RAW, "state_dict_ema": MEAN}, "state_dict", "state_dict_ema"),
    "the average alone": ({"state_dict_ema": MEAN, "epoch": 1}, "state_dict_ema", "state_dict_ema"),
    "an average that is none": ({"state_dict": RAW, "state_dict_ema": None}, "state_dict", None),
    "model": ({"model": RAW, "optimizer": OPTIMIZER}, "model", None),
    "model and its average": ({"model": RAW, "model_ema": MEAN, "ema_decay": 0.9}, "model", "model_ema"),
    "model_state_dict": ({"model_state_dict": RAW, "optimizer_state_dict": OPTIMIZER}, "model_state_dict", None),
    "net": ({"net": RAW, "acc": 91.2, "epoch": 4}, "net", None),
    "module, as DeepSpeed": (
        {"module": RAW, "optimizer": None, "param_shapes": [{"a": torch.Size([3])}], "ds_config": {}},
        "module", None,
    ),
    "nested": ({"model": {"state_dict": RAW}, "optimizer": {"state_dict": OPTIMIZER}}, "model, state_dict", None),
    "averages by name": ({"state_dict": RAW, "ema": {"module": MEAN}}, "state_dict", "ema, module"),
    "optimizer by names": ({"model": RAW, "optimizer": {"stem": {"exp_avg": MEAN["stem.weight"]}}}, "model", None),
    "module.": (under("module."), "", None),
    "module.module.": (under("module.module."), "", None),
    "_orig_mod.module.": (under("_orig_mod.module."), "", None),
    "module._orig_mod.model.": ({"model": under("module._orig_mod.model.")}, "model", None),
    "compiled inside": ({"stem._orig_mod.weight": RAW["stem.weight"], "head.bias": RAW["head.bias"]}, "", None),
    "net.": (under("net."), "", None),
    "backbone.": (under("backbone."), "", None),
    "a holder's own name": (lightning(**under("wrapped.encoder.")), "state_dict", None),
    "Lightning": (lightning(**under("model.")), "state_dict", None),
    "Lightning, compiled": (lightning(**under("model._orig_mod.")), "state_dict", None),
    "Lightning with an average": (
        lightning(**under("model."), **under("ema_model.module.", MEAN)), "state_dict, model", "state_dict, ema_model",
    ),
    "Lightning with a loss and metrics": (
        lightning(**under("model."), **{"criterion.weight": torch.ones(3), "matrix.confmat": torch.ones(3, 3).int()}),
        "state_dict, model", None,
    ),
    "AveragedModel": (under("module.", MEAN, n_averaged=torch.tensor(7)), "", ""),
    "AveragedModel beside another": (
        {"net": RAW, "second": under("module.", MEAN, n_averaged=torch.tensor(7))}, "net", "second",
    ),
    "averages in other spellings": ({"model": RAW, "modelEMA": MEAN}, "model", "modelEMA"),
    "averages with a hyphen": ({"model": RAW, "ema-model": {"shadow": MEAN}}, "model", "ema-model, shadow"),
    "no average, for all its letters": ({"schemas": RAW}, "schemas", None),
    "AveragedModel in Lightning": (
        lightning(**under("model.module.", MEAN, **{"model.n_averaged": torch.tensor(7)})), "state_dict", "state_dict",
    ),
    "averages by Lightning's callback": (
        lightning(**under("model.", MEAN))
        | {"current_model_state": under("model."), "averaging_state": {"n_averaged": torch.tensor(7)}},
        "current_model_state", "state_dict",
    ),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("what", SHAPES)
def test_a_shape_is_read_and_its_entry_is_said(what, zipped, tmp_path):
    content, *entries = SHAPES[what]
    file = tmp_path / "file.ckpt"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    for use_ema, entry in zip((False, True), entries, strict=True):
        if entry is None:
            with pytest.raises(ValueError, match=r"file\.ckpt has no averaged weights .* leave out --use-ema"):
                checkpoint.read(file, use_ema)
            continue
        read = checkpoint.read(file, use_ema)
        assert read.origin == f"{file}, {entry}".removesuffix(", ")
        assert read.state_dict.keys() >= RAW.keys()
        averaged = use_ema or what in ("the average alone", "AveragedModel", "AveragedModel in Lightning")
        for name, tensor in (MEAN if averaged else RAW).items():
            assert torch.equal(read.state_dict[name], tensor)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"generator": RAW, "discriminator": RAW}, "several sets of weights: generator .2 tensors., discriminator"),
        (
            {"model": RAW, "state_dict": RAW, "ema": MEAN},
            "model .2 .*state_dict .2 .*--use-ema takes the averaged ones",
        ),
        (under("student.") | under("teacher."), "student .2 tensors., teacher .2 tensors.*Save the right one"),
        (OPTIMIZER, r"expected dense tensors by name in .* it holds state \(dict\), param_groups \(list\)"),
        ({"optimizer": OPTIMIZER, "epoch": 3}, r"it holds optimizer \(dict\), epoch \(int\)"),
        ({"state_dict": {}}, r"it holds state_dict \(dict\)"),
        ({}, "it holds nothing"),
        ({f"key {i}": i for i in range(99)}, "key 7 .int., and 91 more"),
        ([RAW], "expected a state dict or a checkpoint in .*, got list"),
        (RAW["stem.weight"], "got Tensor"),
        ({"model": under("", sparse=torch.eye(3).to_sparse())}, "in .*, model, but sparse is sparse"),
        ({"a": torch.empty(3, 4, device="meta")}, "but a is on the meta device, so that it has no values"),
        ({"module": {"a": torch.ones(0, 4), "b": torch.ones(0)}, "ds_version": "1"}, "zero_to_fp32.py"),
    ],
)
def test_what_is_not_clear_says_what_the_file_holds(content, message, tmp_path):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.read(tmp_path / "file.pt")
    assert len(str(caught.value)) < 700


def test_names_that_are_whole_under_a_prefix_say_how_to_pass_them(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3)
    tensors = {f"encoder.net.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(tensors | {"decoder.weight": torch.ones(3, 4)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"All are there under 'encoder\.net\.': save those without it as a file"):
        checkpoint.build("test_resnet", checkpoint.read(tmp_path / "a.ckpt"), num_classes=3)


# -- kinds of files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.safetensors", "a.SAFETENSORS", "a.bin", "a.pth", "a.ckpt", "a"])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "pickle"])
def test_the_content_says_what_a_file_is(kind, name, tmp_path):
    file = tmp_path / name
    if kind == "safetensors":
        save_file(RAW, file)
    else:
        torch.save(RAW, file, _use_new_zipfile_serialization=kind == "zip")
    assert torch.equal(checkpoint.read(file).state_dict["stem.weight"], RAW["stem.weight"])


def archive(folder: Path, name: str, compression: int = zipfile.ZIP_STORED) -> bytes:
    with zipfile.ZipFile(folder / "made.zip", "w", compression) as made:
        made.writestr(name, b"x")
    return (folder / "made.zip").read_bytes()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
NO_WEIGHTS: dict[str, tuple[str, bytes | Callable[[Path], bytes], str]] = {
    "nothing": ("a.pt", b"", "a.pt is empty"),
    "nothing, npz": ("a.npz", b"", "a.npz is empty"),
    "pointer": ("a.safetensors", LFS, "a.safetensors is a Git LFS pointer.*git lfs pull"),
    "pointer, npz": ("a.npz", LFS, "Git LFS pointer"),
    "page": ("a.pth", b"\n<!DOCTYPE html><html>Not found</html>", "a.pth is a web page"),
    "page, after a mark": ("a.pth", b"\xef\xbb\xbf<!-- x --><html>", "a.pth is a web page"),
    "a store's error": ("a.safetensors", b"<Error><Code>AccessDenied</Code></Error>", "a.safetensors is a web page"),
    "page of another case": ("a.safetensors", b"<HTML><body>", "a.safetensors is a web page"),
    "archive": ("a.pth", lambda folder: archive(folder, "readme.txt"), r"a zip archive of other .* \(readme.txt\)"),
    "TorchScript": ("a.pt", lambda folder: archive(folder, "a/constants.pkl"), "a TorchScript program"),
    "half an archive": ("a.pt", lambda folder: archive(folder, "a/data.pkl")[:30], "a.pt cannot be read.*incomplete"),
    "text": ("a.pt", b"hello", "a.pt is no file of weights: expected one of torch .* it begins with b'hello'"),
    "an answer": ("a.safetensors", b'{"error": 1}', r"a.safetensors is no file of weights: .* begins with b.{.error"),
    "another format": ("a.bin", b"\x89HDF\r\n\x1a\n", "a.bin is no file of weights"),
    "packed": ("a.pt", lambda folder: archive(folder, "a/data.pkl", zipfile.ZIP_DEFLATED), "a.pt is compressed"),
    "half of safetensors": ("a.safetensors", b"\x50\0\0\0\0\0\0\0{", "a.safetensors cannot be read"),
    "no safetensors": ("a.safetensors", b"hello hello hello", "a.safetensors is no file of weights"),
    "too long a header": ("a.safetensors", b"\xff" * 7 + b"\0{", "a.safetensors cannot be read"),
    "one of several": ("model-00001-of-00002.safetensors", b"x", "one of 2 parts .* give model.safetensors.index.json"),
    "a config": ("config.json", b"{}", "expected an index of weights in .*config.json"),
    "a nested index": ("a.json", b"[" * 100_000, "expected an index of weights"),
}


@pytest.mark.parametrize("what", NO_WEIGHTS)
def test_what_is_saved_in_the_place_of_weights_is_named(what, tmp_path):
    name, content, message = NO_WEIGHTS[what]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content(tmp_path))
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.read(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="found a folder, name a file in it"):
        checkpoint.read(tmp_path)


# -- several files -----------------------------------------------------------------------------------------------------


def index(folder: Path, places: Any) -> Path:
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return file


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_index_joins_its_files(suffix, tmp_path):
    places = {}
    for number, (name, tensor) in enumerate(under("module.").items(), start=1):
        shard = f"model-0000{number}-of-00002.{suffix}"
        (save_file if suffix == "safetensors" else torch.save)({name: tensor, "other": torch.ones(1)}, tmp_path / shard)
        places[name] = shard
    read = checkpoint.read(index(tmp_path, places))
    assert read.state_dict.keys() == RAW.keys()
    assert all(torch.equal(tensor, RAW[name]) for name, tensor in read.state_dict.items())


def test_an_index_whose_files_are_not_all_there_names_one(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    with pytest.raises(FileNotFoundError, match=r"lists two\.safetensors, which is not there: download all 2 files"):
        checkpoint.read(index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}))
    with pytest.raises(ValueError, match=r"one\.safetensors lacks tensors that .* lists, such as 'b'"):
        checkpoint.read(index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"}))
    (tmp_path / "two.safetensors").write_bytes(LFS)
    with pytest.raises(ValueError, match=r"two\.safetensors is a Git LFS pointer"):
        checkpoint.read(index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}))


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "a/../../x.safetensors", "/x.safetensors", "..\\x", "C:x", 3, None]
)
def test_an_index_stays_in_its_folder(shard, tmp_path):
    (tmp_path / "in").mkdir()
    save_file({"a": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"expected files in its own folder|expected an index of weights"):
        checkpoint.read(index(tmp_path / "in", {"a": shard}))


# -- nothing is run ----------------------------------------------------------------------------------------------------


def class_named(name: str, base: type = object) -> type:
    """A class that pickles call by this name, for packages that are not installed here."""
    module, _, short = name.rpartition(".")
    return type(short, (base,), {"__module__": module})


@pytest.fixture
def elsewhere(monkeypatch):
    """Makes classes of other packages importable, as far as saving needs it."""

    def make(name: str, base: type = object) -> type:
        made, module = class_named(name, base), name.rpartition(".")[0]
        for end in range(1, module.count(".") + 2):
            part = ".".join(module.split(".")[:end])
            monkeypatch.setitem(sys.modules, part, sys.modules.get(part) or types.ModuleType(part))
        setattr(sys.modules[module], made.__name__, made)
        return made

    return make


@pytest.mark.parametrize("zipped", [True, False])
def test_what_lies_beside_the_weights_is_passed_over(zipped, elsewhere, tmp_path):
    settings = elsewhere("pytorch_lightning.utilities.parsing.AttributeDict", dict)(lr=0.1)
    config = elsewhere("omegaconf.dictconfig.DictConfig")()
    config.__dict__.update(_content={"lr": 0.1}, _type=dict)
    beside = {
        "hyper_parameters": settings, "config": config, "scaler": elsewhere("deepspeed.runtime.LossScaler")(),
        "path": pathlib.PurePosixPath("/runs"), "metric": np.float64(81.5), "groups": collections.defaultdict(list),
        "args": argparse.Namespace(num_classes=3), "kinds": (frozenset([1]), range(3), slice(1)),
    }  # fmt: skip
    torch.save({"state_dict": under("model."), **beside}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    read = checkpoint.read(tmp_path / "a.ckpt")
    assert torch.equal(read.state_dict["stem.weight"], RAW["stem.weight"])
    assert read.args == {"num_classes": 3}
    assert read.metric is None


class Hostile:
    def __init__(self, what: Any) -> None:
        self.what = what

    def __reduce__(self) -> Any:
        return self.what, ("touch owned",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("what", [os.system, eval, exec, np.load, pathlib.Path.touch, torch.load])
def test_what_would_run_is_not_run(what, zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": RAW, "x": Hostile(what)}, "a.pt", _use_new_zipfile_serialization=zipped)
    if what is np.load:  # a name in a package that is passed over: nothing of it is called
        assert checkpoint.read("a.pt").state_dict.keys() == RAW.keys()
    else:
        with pytest.raises(ValueError, match=r"a\.pt (is not read, because it asks for|cannot be read)"):
            checkpoint.read("a.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"a.pt"}


def test_a_whole_model_is_named_as_one(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(
        ValueError, match=r"asks for torch\.nn\.modules.linear.Linear: it is a whole model and not its weights"
    ):
        checkpoint.read(tmp_path / "a.pt")


# -- memory ------------------------------------------------------------------------------------------------------------


def test_tied_tensors_and_views_get_memory_of_their_own(tmp_path):
    flat = torch.arange(24.0)
    tied = {
        "a": flat[:12].view(3, 4),
        "b": flat[12:].view(3, 4),
        "c": flat[:12].view(3, 4),
        "d": torch.ones(1).expand(5),
    }
    torch.save(tied, tmp_path / "a.pt")
    read = checkpoint.read(tmp_path / "a.pt").state_dict
    assert all(torch.equal(read[name], tensor) for name, tensor in tied.items())
    read["a"].zero_()
    assert torch.equal(read["c"], tied["c"])
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in read.values())
