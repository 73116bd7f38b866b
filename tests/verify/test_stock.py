"""`timm-nf verify --checkpoint`: weights of timm's dm_nfnet_* in both networks, on one's own pictures."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV3

from tests.support import haiku_files
from timm_nf import checkpoint, convert
from timm_nf._progress import silent
from timm_nf._relative_error import relative_error
from timm_nf.cli import main
from timm_nf.verify import checks
from timm_nf.verify.golden import golden_params, image
from timm_nf.verify.stock import Agreement, compare, load_pair

CPU = torch.device("cpu")
DIGITS = [str(i) for i in range(10)]
FIELDS: dict[str, Any] = {"depths": (1, 1, 2, 1), "channels": (32, 64, 96, 96), "group_size": 16}


def stock(**kwargs: Any) -> Any:
    """A small network of stock timm's with the synthetic parameters, and widths that follow no stage."""
    model: Any = timm.create_model("dm_nfnet_f0", **FIELDS, num_classes=10, **kwargs).eval()
    shapes = {n: p.shape for n, p in model.state_dict().items()}  # timm's skip gain is a scalar
    params = golden_params(model.state_dict())
    model.load_state_dict({n: p.reshape(shapes[n]) for n, p in params.items()})
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Any]:
    """A file as train.py leaves it, with an average, and the network in it."""
    folder, model = tmp_path_factory.mktemp("trained"), stock()
    args = argparse.Namespace(
        model="dm_nfnet_f0", num_classes=10, model_kwargs=FIELDS, img_size=48, val_split="val", in_chans=None
    )
    averaged = ModelEmaV3(model)
    torch.nn.init.zeros_(averaged.module.head.fc.weight)
    torch.nn.init.constant_(averaged.module.head.fc.bias[3:4], 9.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saver = CheckpointSaver(model, optimizer, args, averaged, checkpoint_dir=str(folder), recovery_dir=str(folder))
    saver.save_checkpoint(0, metric=1.0)
    return folder / "last.pth.tar", model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for digit in DIGITS:
        (folder / digit).mkdir()
        for i in range(2):
            Image.fromarray(rng.integers(0, 255, (60, 50, 3), dtype=np.uint8)).save(folder / digit / f"{i}.png")
    return folder


def test_a_checkpoint_of_timms_network_is_loaded_into_both(trained):
    file, model = trained
    pair = load_pair(file)
    assert (pair.name, pair.origin) == ("nfnet_f0", f"{file}, state_dict")
    x = image(2, 48, 48).float()
    with torch.no_grad():
        assert torch.equal(pair.stock(x), model(x))
        ours: Any = timm.create_model("nfnet_f0", **FIELDS, num_classes=10, stem_chs=128, num_features=3072).eval()
        ours.load_state_dict(checkpoint.fitted(model.state_dict(), ours.state_dict()))
        assert torch.equal(pair.ours(x), ours(x))
    assert [net.training for net in (pair.ours, pair.stock)] == [False, False]


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_weights_alone_are_recognised_by_their_shapes(kind, tmp_path):
    model = stock(in_chans=1)
    file = tmp_path / f"weights.{kind}"
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    save_file(tensors, file) if kind == "safetensors" else torch.save(tensors, file)
    pair = load_pair(file)
    x = image(1, 48, 48).float()[:, :1]
    with torch.no_grad():
        assert relative_error(pair.stock(x), model(x)) < 1e-2  # float16 in the file
    assert pair.stock(x).dtype == torch.float32


def test_the_authors_file_is_loaded_too(trained, tmp_path):
    model = trained[1]
    (tmp_path / "F_haiku.npz").write_bytes(haiku_files.dumps(convert.timm_to_haiku(model.state_dict())))
    pair = load_pair(tmp_path / "F_haiku.npz")
    x = image(1, 48, 48).float()
    with torch.no_grad():
        torch.testing.assert_close(pair.stock(x), model(x), rtol=1e-4, atol=1e-5)  # other strides, other kernels


def test_accuracies_and_the_error_are_those_of_the_networks(trained, pictures):
    pair = load_pair(trained[0])
    seen = compare(pair.ours, pair.stock, pictures, CPU, silent)
    data = timm.data.resolve_model_data_config(pair.ours)
    assert data["input_size"] == (3, 48, 48)  # as it was trained
    transform: Any = timm.data.create_transform(**data)
    x = torch.stack([transform(Image.open(pictures / digit / f"{i}.png")) for digit in DIGITS for i in range(2)])
    labels = torch.arange(10).repeat_interleave(2)
    with torch.no_grad():
        ours, theirs = pair.ours(x), pair.stock(x)
    assert seen.images == 20
    assert seen.error == pytest.approx(relative_error(ours, theirs), rel=1e-4)
    assert 1e-3 < seen.error < 3e-2
    assert seen.top1 == tuple(100 * (y.argmax(1) == labels).sum().item() / 20 for y in (ours, theirs))


def test_a_part_of_imagenet_is_counted_by_the_folders_names(tmp_path):
    for synset in ("n01440764", "n01443537", "n15075141"):  # classes 0, 1 and 999
        (tmp_path / synset).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / synset / "a.png")
    model: Any = timm.create_model("nfnet_f0", **FIELDS, pretrained_cfg_overlay={"test_input_size": (3, 32, 32)})
    torch.nn.init.zeros_(model.head.fc.weight)
    model.head.fc.bias.data[999] = 1.0
    assert compare(model, model, tmp_path, CPU, silent).top1 == pytest.approx((100 / 3, 100 / 3))


def test_another_number_of_classes_is_refused(trained, tmp_path):
    pair = load_pair(trained[0])
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="for each of 10 classes, got 1"):
        compare(pair.ours, pair.stock, tmp_path, CPU, silent)


@pytest.mark.parametrize("name", ["dm_nf_regnet_b0", "nfnet_f7"])
def test_a_network_that_has_no_twin_in_timm_is_refused(name, tmp_path):
    model: Any = timm.create_model(name, **({} if name != "nfnet_f7" else {"channels": (16,) * 4, "group_size": 8}))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=f"one of timm's dm_nfnet_f0 to f6 in .*, got a {name}'s"):
        load_pair(tmp_path / "weights.safetensors")


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def only_checkpoint(monkeypatch):
    """Leaves out the golden checks, and shows a call of those of the published weights."""
    monkeypatch.setattr(checks, "FORWARD", {})
    monkeypatch.setattr(checks, "_step_checks", lambda device: iter(()))
    monkeypatch.setattr(checks, "_waiting_checks", lambda device: iter(()))
    monkeypatch.setattr(checks, "_pretrained_checks", lambda *args: iter([checks.Verdict("hub", "0", "1", True)]))


def lines(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_the_command_prints_deviation_and_both_accuracies(trained, pictures, only_checkpoint, capsys):
    main(["verify", "--checkpoint", str(trained[0]), "--imagenet-val", str(pictures)])
    _, error, accuracy, total = lines(capsys)
    assert "last.pth.tar, state_dict as nfnet_f0 against timm's dm_nfnet_f0, logits of 20 images" in error
    assert "top-1 of 20 images, ours and timm's" in accuracy
    assert total == "2 passed, 0 failed, 0 not checked here"


def test_the_average_is_used_on_demand(trained, pictures, only_checkpoint, capsys):
    main(["verify", "--checkpoint", str(trained[0]), "--imagenet-val", str(pictures), "--use-ema"])
    _, error, accuracy, _ = lines(capsys)
    assert "state_dict_ema" in error
    assert "10.00 % and 10.00 %" in accuracy  # it says 3 to everything


def test_published_weights_are_compared_only_on_demand(trained, pictures, only_checkpoint, capsys):
    arguments = ["verify", "--checkpoint", str(trained[0]), "--imagenet-val", str(pictures)]
    main([*arguments, "--pretrained"])
    assert len(lines(capsys)) == 5
    main(["verify", "--imagenet-val", str(pictures)])
    assert [line.split()[0] for line in lines(capsys)][1] == "hub"


def test_networks_too_far_apart_fail(trained, pictures, only_checkpoint, monkeypatch, capsys):
    seen = Agreement(20, (50.0, 51.0), 0.5)
    monkeypatch.setattr("timm_nf.verify.stock.compare", lambda *args: seen)
    with pytest.raises(SystemExit) as stop:
        main(["verify", "--checkpoint", str(trained[0]), "--imagenet-val", str(pictures)])
    assert stop.value.code == 1
    assert lines(capsys)[-1] == "0 passed, 2 failed, 0 not checked here"


def test_weights_without_pictures_are_refused(trained):
    with pytest.raises(ValueError, match="imagenet_val"):
        next(checks.run(weights=trained[0]))


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--checkpoint", "FILE"], 2, "--imagenet-val"),
        (["--use-ema", "--imagenet-val", "."], 2, "--checkpoint"),
        (["--checkpoint", "nowhere.pt", "--imagenet-val", "."], 2, "nowhere.pt"),
        (["--checkpoint", __file__, "--imagenet-val", "."], 1, "is no file of weights"),
    ],
)
def test_bad_input_is_one_line(argv, code, message, trained, only_checkpoint, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["verify", *(str(trained[0]) if word == "FILE" else word for word in argv)])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (code, "")
    (line,) = err.splitlines()
    assert message in line
