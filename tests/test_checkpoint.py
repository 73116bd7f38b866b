import argparse
import os
import pickle
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.utils import CheckpointSaver, ModelEmaV3

from tests.support import haiku_files, small_nets
from tests.support.published import create, logits
from timm_nf import checkpoint, convert

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


def arguments(**kwargs: Any) -> argparse.Namespace:
    """train.py's, as far as they are read."""
    net = small_nets.keywords(small_nets.NETS["NFNet"])
    stated = {
        "model": "nfnet_f0",
        "num_classes": net.pop("num_classes"),
        "model_kwargs": net,
        "val_split": "validation",
    }
    return argparse.Namespace(**(stated | {"model_ema_force_cpu": False, "eval_metric": "top1"} | kwargs))


def save(folder: Any, args: argparse.Namespace, ema: bool) -> Any:
    """A file that timm's own saver writes."""
    model = create()
    averaged = ModelEmaV3(model) if ema else None
    if averaged:
        torch.nn.init.constant_(averaged.module.head.fc.bias, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=averaged, checkpoint_dir=folder, recovery_dir=folder)
    saver.save_checkpoint(3, metric=75.5)
    return folder / "last.pth.tar"


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 5), max_size=4), st.sampled_from(DTYPES)),
        max_size=6,
    )
)
@settings(max_examples=60, deadline=None)
def test_tensors_are_those_of_safetensors_own_reader(tmp_path_factory, described):
    file = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file({name: (100 * torch.rand(shape)).to(dtype) for name, (shape, dtype) in described.items()}, file)
    expected, got = load_file(file), checkpoint.load_tensors(file)
    assert expected.keys() == got.keys()
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])
        assert tensor.data_ptr() % 64 == 0


def test_tensors_stay_when_the_file_changes(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(1000)}, file)
    tensors = checkpoint.load_tensors(file)
    os.truncate(file, 0)
    assert (tensors["a"] == 1).all()


def test_a_file_that_is_cut_while_it_is_read_gives_no_weights(tmp_path, monkeypatch):
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(1000), "b": torch.ones(1000)}, file)

    def load_and_cut(file: Any) -> Any:
        tensors = load_file(file)
        os.truncate(file, 5000)
        return tensors

    monkeypatch.setattr("timm_nf._weights_file.load_file", load_and_cut)
    with pytest.raises(SafetensorError, match="became shorter"):
        checkpoint.load_tensors(file)


@pytest.mark.parametrize("name", ["net.safetensors", "net.pt"])
def test_a_plain_state_dict(tmp_path, name):
    model = create()
    (save_file if name.endswith("safetensors") else torch.save)(model.state_dict(), tmp_path / name)
    content = checkpoint.read(tmp_path / name)
    assert content.args == {}
    assert content.metric is None
    assert content.origin == str(tmp_path / name)
    net = small_nets.keywords(small_nets.NETS["NFNet"])
    built = checkpoint.build("nfnet_f0", checkpoint.Checkpoint(content.state_dict, "x", {"model_kwargs": net}))
    assert torch.equal(logits(built), logits(model))


def test_train_pys_checkpoints(tmp_path):
    file = save(tmp_path, arguments(), ema=True)
    plain, averaged = checkpoint.read(file), checkpoint.read(file, use_ema=True)
    assert plain.origin == f"{file}, state_dict"
    assert averaged.origin == f"{file}, state_dict_ema"
    assert (averaged.state_dict["head.fc.bias"] == 0.5).all()
    assert (plain.state_dict["head.fc.bias"] != 0.5).all()
    assert averaged.epoch == 3
    assert torch.equal(logits(checkpoint.build("nfnet_f0", plain)), logits(create()))


@pytest.mark.parametrize(
    ("ema", "use_ema", "kwargs", "metric"),
    [
        (False, False, {}, 75.5),
        (True, True, {}, 75.5),
        (True, False, {}, None),  # it is the average's
        (True, False, {"model_ema_force_cpu": True}, 75.5),  # which is not validated on the CPU
        (True, True, {"model_ema_force_cpu": True}, None),
        (False, False, {"val_split": ""}, None),  # it is the loss of the training
    ],
)
def test_the_metric_is_stated_of_the_weights_it_was_measured_of(tmp_path, ema, use_ema, kwargs, metric):
    assert checkpoint.read(save(tmp_path, arguments(**kwargs), ema), use_ema).metric == metric


def test_wrappers_leave_no_prefix(tmp_path):
    torch.save({f"_orig_mod.module.{k}": v for k, v in create().state_dict().items()}, tmp_path / "net.pt")
    assert checkpoint.read(tmp_path / "net.pt").state_dict.keys() == create().state_dict().keys()


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch owned",)


@pytest.mark.parametrize("zipped", [False, True])
def test_nothing_in_a_file_is_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "args": Hostile()}, "net.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"posix.system"):
        checkpoint.read("net.pt")
    (tmp_path / "net.pkl").write_bytes(pickle.dumps(Hostile(), protocol=2))
    with pytest.raises(ValueError, match=r"posix.system"):
        checkpoint.read("net.pkl")
    assert not (tmp_path / "owned").exists()


def test_files_that_are_no_weights(tmp_path):
    for name, content in (("a.pt", b""), ("b.pt", b"PK\3\4"), ("c.safetensors", b""), ("d.pt", b"\x80\x02}q\x00.")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as caught:
            checkpoint.read(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1
    whole = save(tmp_path, arguments(), ema=False).read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="half"):
        checkpoint.read(tmp_path / "half.pt")
    for name, value in (("list.pt", [1]), ("epoch.pt", {"epoch": 3}), ("nested.pt", {"state_dict": {"a": 1}})):
        torch.save(value, tmp_path / name)
        with pytest.raises(ValueError, match="expected"):
            checkpoint.read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="missing"):
        checkpoint.read(tmp_path / "missing.pt")
    with pytest.raises(ValueError, match="--use-ema"):
        checkpoint.read(save(tmp_path, arguments(), ema=False), use_ema=True)


@pytest.mark.parametrize("metric", ["abc", float("nan"), float("inf"), True, torch.tensor(1.0), [1], 10**400])
def test_a_metric_that_is_no_number_is_none(tmp_path, metric):
    torch.save({"state_dict": create().state_dict(), "args": arguments(), "metric": metric}, tmp_path / "net.pt")
    assert checkpoint.read(tmp_path / "net.pt").metric is None


def test_tensors_that_are_not_dense_are_refused(tmp_path):
    torch.save({"a": torch.ones(2, 2).to_sparse()}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match="expected dense tensors by name"):
        checkpoint.read(tmp_path / "net.pt")


def test_the_authors_checkpoints_are_read(tmp_path):
    model, file = create(), tmp_path / "F0.npz"
    file.write_bytes(haiku_files.dumps(convert.timm_to_haiku(model.state_dict())))
    content = checkpoint.read(file)
    assert (content.origin, content.args, content.epoch, content.metric) == (str(file), {}, None, None)
    assert content.state_dict.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in content.state_dict.items())
    with pytest.raises(ValueError, match=r"F0\.npz has no averaged weights"):
        checkpoint.read(file, use_ema=True)


def test_what_is_no_checkpoint_of_the_authors_is_named(tmp_path):
    (tmp_path / "F0.npz").write_bytes(b"\x80\x04}.")
    with pytest.raises(ValueError, match=r"F0\.npz does not have the parameters of one of the authors' networks"):
        checkpoint.read(tmp_path / "F0.npz")
    (tmp_path / "F0.pth").write_bytes(b"\x80\x04}.")  # torch warns of its protocol first
    with pytest.raises(ValueError, match=r"F0\.pth cannot be read"):
        checkpoint.read(tmp_path / "F0.pth")


def test_the_classifier_in_a_file_says_how_many_classes_there_are():
    file = checkpoint.Checkpoint(timm.create_model("test_resnet", num_classes=7).state_dict(), "it")
    assert checkpoint.build("test_resnet", file).num_classes == 7
    with pytest.raises(ValueError, match="classifier of it has 7 classes, the network 5"):
        checkpoint.build("test_resnet", file, num_classes=5)


def test_names_that_are_no_names_are_refused(tmp_path):
    torch.save({1: torch.ones(1)}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match="expected dense tensors by name"):
        checkpoint.read(tmp_path / "net.pt")


@pytest.mark.parametrize(
    "args",
    [
        *({"model_kwargs": {key: "/etc/passwd"}} for key in ("checkpoint_path", "pretrained", "pretrained_cfg")),
        *({"model_kwargs": value} for value in ("x", [1], {"evil": 1})),
        *({key: "evil"} for key in ("num_classes", "gp", "in_chans")),
    ],
    ids=str,
)
def test_arguments_in_a_checkpoint_load_nothing_and_build_nothing_else(args, tmp_path, monkeypatch):
    monkeypatch.setattr("timm.models._builder.load_pretrained", None)  # calling it would be another error
    content = checkpoint.Checkpoint(create().state_dict(), "it", vars(arguments(**args)))
    with pytest.raises(ValueError, match="nfnet_f0 cannot be built with the arguments of it"):
        checkpoint.build("nfnet_f0", content)


@pytest.mark.parametrize("args", [{"mean": "abc"}, {"img_size": "x"}, {"std": [1, 2]}], ids=str)
def test_a_preprocessing_that_timm_does_not_understand_is_shown(args):
    content = checkpoint.Checkpoint(timm.create_model("test_resnet").state_dict(), "it", args)
    with pytest.raises(ValueError, match="it states a preprocessing that timm does not understand") as caught:
        checkpoint.build("test_resnet", content)
    assert str(args) in str(caught.value)


def test_a_classifier_without_axes_is_a_shape_that_differs():
    state = timm.create_model("test_resnet", num_classes=7).state_dict() | {"fc.weight": torch.tensor(1.0)}
    with pytest.raises(ValueError, match="2 of 92 shapes differ"):
        checkpoint.build("test_resnet", checkpoint.Checkpoint(state, "it"))


@pytest.mark.parametrize("name", ["no_such", "hf-hub:alice/net", "local-dir:/etc", ""])
def test_a_model_that_timm_does_not_know_is_named(name):
    with pytest.raises(ValueError, match=f"timm knows no model '{name}'"):
        checkpoint.build(name, checkpoint.Checkpoint({}, "it"))


def test_preprocessing_is_train_pys(tmp_path):
    args = arguments(img_size=96, mean=[0.5], std=[0.25], interpolation="bilinear", crop_pct=1.0, in_chans=None)
    content = checkpoint.read(save(tmp_path, args, ema=False))
    built: Any = checkpoint.build("nfnet_f0", content, labels=list("abcdefghij"))
    cfg = built.pretrained_cfg
    assert cfg["input_size"] == (3, 96, 96)
    assert cfg["test_input_size"] is None
    assert (cfg["mean"], cfg["std"], cfg["interpolation"], cfg["crop_pct"]) == (
        (0.5,) * 3,
        (0.25,) * 3,
        "bilinear",
        1.0,
    )
    assert cfg["label_names"] == list("abcdefghij")


def test_the_test_size_stays_where_training_was_at_the_models_own_size(tmp_path):
    content = checkpoint.read(save(tmp_path, arguments(img_size=192), ema=False))
    cfg: Any = checkpoint.build("nfnet_f0", content).pretrained_cfg
    assert (cfg["input_size"], cfg["test_input_size"]) == ((3, 192, 192), (3, 256, 256))
    with pytest.raises(ValueError, match="expected 10 labels, one for each class, got 2"):
        checkpoint.build("nfnet_f0", content, labels=["a", "b"])


def test_weights_are_checked_before_any_is_assigned():
    model = checkpoint.skeleton("nfnet_f0", **small_nets.keywords(small_nets.NETS["NFNet"]))
    right = create().state_dict()

    def refuses(change: dict[str, Any], match: str, without: str | None = None) -> None:
        tensors = {k: v for k, v in (right | change).items() if k != without}
        with pytest.raises(ValueError, match=match):
            checkpoint.assign(model, tensors, "it")
        assert all(p.is_meta for p in model.parameters())

    refuses({}, "lacks 1 .head.fc.bias.", without="head.fc.bias")
    refuses({"more": torch.ones(1)}, "has beside them 1 .more.")
    refuses({"stem.conv1.bias": torch.ones(3)}, r"1 of 114 shapes differ, say stem.conv1.bias \[3\].*\[16\]")
    refuses({"head.fc.bias": torch.ones(3), "head.fc.weight": torch.ones(3, 192)}, "3 classes, the network 10")
    refuses({"head.fc.bias": torch.ones(10, dtype=torch.int64)}, "one floating dtype.*got torch.int64")
    refuses({"head.fc.bias": torch.ones(10).half()}, "got torch.float16, torch.float32")
    refuses({k: v.to(torch.float8_e4m3fn) for k, v in right.items()}, "got torch.float8_e4m3fn$")
    refuses({k: v.to(torch.int8) for k, v in right.items()}, "got torch.int8$")
    refuses({"a" * 10**6: torch.ones(1)}, f"has beside them 1 .{'a' * 100}.$")
    checkpoint.assign(model, right, "it")
    assert torch.equal(logits(model), logits(create()))


def test_scalars_and_tensors_of_one_element_are_the_same():
    model = checkpoint.skeleton("nfnet_f0", **small_nets.keywords(small_nets.NETS["NFNet"]))
    scalars = {k: v.reshape(()) if k.endswith("skipinit_gain") else v for k, v in create().state_dict().items()}
    checkpoint.assign(model, scalars, "it")
    assert torch.equal(logits(model), logits(create()))
