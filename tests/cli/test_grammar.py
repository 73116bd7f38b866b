"""One grammar for every command: which network, which weights of a file, which dtype."""

import argparse
import copy
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.utils import CheckpointSaver, ModelEmaV3

from tests.support import haiku_files, small_nets
from tests.support.published import create, logits
from tests.support.reference_nfnet import Net
from tests.support.saving import save_for_hf
from timm_nf import convert
from timm_nf.cli import main, options
from timm_nf.inference import images

# Two blocks: a dozen of these tests export the network, which takes seconds for five.
NET = Net("NFNet", (1, 1), (32, 48), num_classes=10, group_size=8)


class Files(NamedTuple):
    """A network in all forms that name one, and what the commands need beside it."""

    folder: Path
    train_py: Path
    pictures: Path
    model: Any


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    root = tmp_path_factory.mktemp("grammar")
    model = create(NET)
    save_for_hf(model, root / "net", safe_serialization=True)
    fields = small_nets.keywords(NET)
    arguments = argparse.Namespace(
        model="nfnet_f0", num_classes=fields.pop("num_classes"), model_kwargs=fields, img_size=64
    )
    averaged = ModelEmaV3(model)
    torch.nn.init.zeros_(averaged.module.head.fc.weight)
    torch.nn.init.constant_(averaged.module.head.fc.bias[3:4], 9.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saver = CheckpointSaver(model, optimizer, arguments, averaged, checkpoint_dir=root, recovery_dir=root)
    saver.save_checkpoint(0)
    rng = np.random.default_rng(0)
    for kind in ("ant", "bee"):
        (root / "pictures" / kind).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 255, (70, 70, 3), dtype=np.uint8)).save(
                root / "pictures" / kind / f"{i}.png"
            )
    return Files(root / "net", root / "last.pth.tar", root / "pictures", model)


def command(name: str, network: str, files: Files, out: Path) -> list[str]:
    """A command line that does little work with the network."""
    picture, pictures = str(files.pictures / "ant" / "0.png"), str(files.pictures)
    return {
        "classify": ["classify", picture, "--model", network],
        "export": ["export", network, "-o", str(out / "m.pt2")],
        "bench": ["bench", network, "--size", "64", "--repeats", "3"],
        "diagnose": ["diagnose", network, "-o", str(out / "p.png")],
        "push": ["push", str(files.train_py), "me/net", "--model", network, "--license", "mit", "--dry-run"],
        "clip-range": [
            *("clip-range", "--model", network, "--data", pictures, "--batch-size", "2", "--batches", "1"),
            *("--warmup-steps", "1", "--img-size", "64", "-o", str(out / "p.png")),
        ],
    }[name]


NETWORK_COMMANDS = ["classify", "export", "bench", "diagnose", "push", "clip-range"]


def fails(argv: list[str], capsys) -> tuple[Any, str]:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    captured = capsys.readouterr()
    (line,) = (line for line in captured.err.splitlines() if line.startswith("timm-nf"))
    assert captured.out == ""
    return stop.value.code, line


@pytest.mark.parametrize("name", NETWORK_COMMANDS)
def test_an_unknown_network_has_one_message(name, files, tmp_path, capsys):
    code, line = fails(command(name, "vgg99", files, tmp_path), capsys)
    assert code == 2
    places = {"export": "'NETWORK'", "bench": "'NETWORK'", "diagnose": "'NETWORK...'"}
    where = places.get(name, "'--model'")
    near = "(did you mean vgg19, vgg19_bn, vgg16?)"
    expected = f"no network or folder is called 'vgg99' {near}; `timm-nf list` shows ours (see timm-nf --help)"
    assert line == f"timm-nf: error: Invalid value for {where}: {expected}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NETWORK_COMMANDS)
def test_a_folder_without_a_network_has_one_message(name, files, tmp_path, capsys):
    code, line = fails(command(name, str(files.pictures), files, tmp_path), capsys)
    assert code == 2
    assert f"expected a folder in Hub layout, but {files.pictures} has no config.json" in line


BROKEN_FOLDERS: dict[str, tuple[str, bytes | None, str]] = {
    "a config that is no JSON": (
        "config.json",
        b"{",
        "config.json in {} describes no network that timm can build here",
    ),
    "a list as config": ("config.json", b"[1]", "config.json in {} describes no network that timm can build here"),
    "another network": ("config.json", b'{"architecture": "vgg99"}', "config.json in {} describes no network"),
    "another number of classes": ("config.json", None, "the classifier of {}/model.safetensors has 10 classes"),
    "no weights": ("model.safetensors", None, "{} has no weights: expected model.safetensors beside config.json"),
    "a pointer": (
        "model.safetensors",
        b"version https://git-lfs.github.com/spec/v1\n",
        "safetensors is a Git LFS pointer",
    ),
    "half a file": ("model.safetensors", b"\x50\0\0\0\0\0\0\0{", "{}/model.safetensors cannot be read, it may be"),
}


@pytest.mark.parametrize("form", ["{}", "local-dir:{}"])
@pytest.mark.parametrize("what", BROKEN_FOLDERS)
def test_a_folder_that_holds_no_whole_network_says_which_file_it_is(what, form, files, tmp_path, capsys):
    name, content, message = BROKEN_FOLDERS[what]
    folder = tmp_path / "net"
    shutil.copytree(files.folder, folder)
    if content is not None:
        (folder / name).write_bytes(content)
    elif name == "config.json":
        config = json.loads((folder / name).read_text())
        config["num_classes"] = config["model_args"]["num_classes"] = 7
        (folder / name).write_text(json.dumps(config))
    else:
        (folder / name).unlink()
    code, line = fails(command("classify", form.format(folder), files, tmp_path), capsys)
    assert code == 1
    assert message.format(folder) in line
    assert "published" not in line


@pytest.mark.parametrize("form", ["{}", "local-dir:{}"])
@pytest.mark.parametrize("name", ["classify", "export", "diagnose", "clip-range"])
def test_a_folder_is_a_network(name, form, files, tmp_path, capsys):
    network = form.format(files.folder)
    main(command(name, network, files, tmp_path))
    assert capsys.readouterr().out
    if name == "export":
        exported = torch.export.load(tmp_path / "m.pt2").module()
        torch.testing.assert_close(exported(x := torch.randn(1, 3, 64, 64)), files.model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["{}", "local-dir:{}", "hf-hub:alice/net"])
def test_bench_and_push_take_registered_names_alone(form, files, tmp_path, capsys):
    network = form.format(files.folder)
    for name in ("bench", "push"):
        code, line = fails(command(name, network, files, tmp_path), capsys)
        assert code == 2
        assert f"expected the name of a network in timm's registry, got the place {network!r}" in line


@pytest.mark.parametrize("form", ["{}", "local-dir:{}", "nfnet_f0 --checkpoint {}/model.safetensors"])
def test_a_network_is_not_replaced_by_its_fused_form(form, files, tmp_path, capsys):
    (tmp_path / "link").symlink_to(files.folder)
    before = (files.folder / "model.safetensors").read_bytes()
    for out in (files.folder, tmp_path / "link"):
        code, line = fails(["export", *form.format(files.folder).split(), "-o", str(out), "--license", "mit"], capsys)
        assert code == 2
        assert f"{out} holds the network, whose weights would be lost: name another folder" in line
    assert (files.folder / "model.safetensors").read_bytes() == before


def test_logits_that_are_not_finite_are_no_classes(files, tmp_path, capsys):
    state = copy.deepcopy(torch.load(files.train_py, weights_only=False))
    state["state_dict"]["head.fc.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    argv = [*command("classify", "nfnet_f0", files, tmp_path), "--checkpoint", str(tmp_path / "nan.pth")]
    code, line = fails(argv, capsys)
    assert code == 1
    assert "0.png has logits that are infinite or NaN" in line


@pytest.mark.parametrize("name", ["classify", "export", "diagnose"])
@pytest.mark.parametrize("network", ["nfnet_f0.dm_in1k", "hf-hub:alice/net"])
def test_names_with_weights_are_given_to_timm_as_they_are(network, name, files, tmp_path, monkeypatch, capsys):
    asked = []

    def recorded(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
        asked.append((name, pretrained, kwargs))
        return copy.deepcopy(files.model)

    monkeypatch.setattr(timm, "create_model", recorded)
    main(command(name, network, files, tmp_path))
    assert [call for call in asked if call[1]] == [(network, True, {})]  # export builds one without weights before


def test_bench_takes_a_name_with_a_tag(monkeypatch, files, tmp_path, capsys):
    monkeypatch.setattr("timm_nf.inference.bench.contenders", lambda name, *_: {name: lambda: lambda: None})
    main(command("bench", "nfnet_f0.dm_in1k", files, tmp_path))
    assert "nfnet_f0, batch 1, 64 px" in capsys.readouterr().out


@pytest.mark.parametrize("network", ["nfnet_f0", "folder", "local-dir"])
def test_a_checkpoint_brings_its_classes_and_arguments(network, files, tmp_path, capsys):
    places = {"folder": str(files.folder), "local-dir": f"local-dir:{files.folder}"}
    main(
        [
            *("export", places.get(network, network), "-o", str(tmp_path / "m.pt2")),
            *("--checkpoint", str(files.train_py)),
        ]
    )
    facts = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["weights", f"{files.train_py},", "state_dict"] in facts
    exported = torch.export.load(tmp_path / "m.pt2").module()
    torch.testing.assert_close(exported(x := torch.randn(1, 3, 64, 64)), files.model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("flags", "entry"), [([], "state_dict"), (["--use-ema"], "state_dict_ema")])
def test_classify_takes_the_weights_that_were_asked_for(flags, entry, files, tmp_path, capsys):
    argv = command("classify", "nfnet_f0", files, tmp_path)
    main([*argv, "--checkpoint", str(files.train_py), "--topk", "10", *flags])
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == f"weights: {files.train_py}, {entry}"
    shown = dict(reversed(line.split(" %  ")) for line in captured.out.splitlines()[1:])
    if flags:
        expected = torch.zeros(10).index_fill(0, torch.tensor(3), 9.0).softmax(0)
    else:
        file = files.pictures / "ant" / "0.png"
        read = images.reader(options.load_network("nfnet_f0", files.train_py).network)  # nfnet_f0's crop, size 64
        expected = files.model(read(file)[None]).softmax(1)[0]
    for index, probability in enumerate(expected.tolist()):
        assert float(shown[f"class {index}"]) == pytest.approx(100 * probability, abs=0.051)


@pytest.mark.parametrize("form", ["net.safetensors", "net.pt", "half.pt", "net.npz"])
def test_files_of_every_kind_are_weights(form, files, tmp_path, capsys):
    file, tensors = tmp_path / form, files.model.state_dict()
    if form.endswith("safetensors"):
        save_file(tensors, file)
    elif form.endswith("npz"):
        file.write_bytes(haiku_files.dumps(convert.timm_to_haiku(tensors)))
    else:
        torch.save({n: t.half() if form == "half.pt" else t for n, t in tensors.items()}, file)
    loaded = options.load_network(str(files.folder), file)
    assert loaded.weights == str(file)
    tolerance = 1e-2 if form == "half.pt" else 1e-5
    torch.testing.assert_close(logits(loaded.network), logits(files.model), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("option", "code", "message"),
    [
        (["--use-ema"], 2, "--use-ema is about the weights of a --checkpoint: give one"),
        (["--checkpoint", "missing.pt"], 2, "missing.pt"),
        (["--checkpoint", "{pictures}"], 2, "is a directory"),
        (["--checkpoint", __file__], 1, "is no file of weights"),
        (["--checkpoint", "{vit}"], 1, "vit.pt is of another architecture: "),
    ],
)
@pytest.mark.parametrize("name", ["classify", "export"])
def test_what_is_wrong_with_a_checkpoint_is_said_by_name(name, option, code, message, files, tmp_path, capsys):
    vit = files.pictures.parent / "vit.pt"
    torch.save(timm.create_model("test_vit", num_classes=1000).state_dict(), vit)
    option = [word.format(pictures=files.pictures, vit=vit) for word in option]
    found, line = fails([*command(name, "nfnet_f0", files, tmp_path), *option], capsys)
    assert found == code
    assert message in line
    assert len(line) < 600


DTYPES = {
    **{"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16},
    **{"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16},
}


@pytest.mark.parametrize("spelling", DTYPES)
def test_export_takes_both_spellings_of_a_dtype(spelling, files, tmp_path):
    main([*command("export", str(files.folder), files, tmp_path), "--dtype", spelling])
    assert {p.dtype for p in torch.export.load(tmp_path / "m.pt2").state_dict.values()} == {DTYPES[spelling]}


@pytest.mark.parametrize("spelling", ["bf16", "bfloat16"])
def test_convert_and_push_take_both_spellings_of_a_dtype(spelling, files, tmp_path, capsys):
    (tmp_path / "f.npz").write_bytes(haiku_files.dumps(convert.timm_to_haiku(files.model.state_dict())))
    main(["convert", str(tmp_path / "f.npz"), "-o", str(tmp_path / "out"), "--dtype", spelling])
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    main([*command("push", "nfnet_f0", files, tmp_path), "--dtype", spelling])
    assert "nothing was uploaded" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["export", "push", "convert"])
def test_an_unknown_dtype_has_one_message(name, files, tmp_path, capsys):
    argv = ["convert", str(files.train_py), "-o", str(tmp_path / "out")]
    if name != "convert":
        argv = command(name, "nfnet_f0", files, tmp_path)
    assert fails([*argv, "--dtype", "int8"], capsys) == (
        2,
        "timm-nf: error: Invalid value for '--dtype': expected float32, float16, bfloat16 (or fp32, fp16, bf16), got "
        "int8 (see timm-nf --help)",
    )


@pytest.mark.parametrize("name", ["diagnose", "clip-range"])
@pytest.mark.parametrize("out", ["p.txt", "no/such/p.png"])
def test_a_plot_that_cannot_be_written_is_refused_before_the_work(name, out, files, tmp_path, capsys):
    argv = [*command(name, "nfnet_f0", files, tmp_path)[:-1], str(tmp_path / out)]
    code, line = fails(argv, capsys)
    assert code == 2
    assert "expected an existing folder for --out and a name that ends in .png, .pdf, .svg" in line


def test_commands_leave_the_callers_random_numbers_as_they_were(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("timm_nf.inference.bench.contenders", lambda *_: {"a": lambda: lambda: torch.rand(3)})
    for name in ("bench", "clip-range"):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        main(command(name, "nfnet_f0" if name == "bench" else str(files.folder), files, tmp_path))
        if name == "clip-range":
            assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(5)


def test_building_contenders_is_seeded_and_leaves_the_generator(monkeypatch):
    from timm_nf.inference import bench

    drawn = []
    before = torch.get_rng_state()
    for _ in range(2):
        bench.time_inference({"a": lambda: drawn.append(torch.rand(3)) or (lambda: None)}, repeats=3)
    assert torch.equal(*drawn)
    assert torch.equal(torch.get_rng_state(), before)
