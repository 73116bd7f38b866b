"""`diagnostics.clipping` and `timm-nf clip-range`: ratios by hand, shares that clipping confirms, what it refuses."""

import multiprocessing

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from tests.support.haiku_files import dumps
from tests.support.small_nets import create
from timm_nf import convert
from timm_nf.checkpoint import read
from timm_nf.cli import main
from timm_nf.diagnostics.clipping import ClipRange, Stage, measure_clip_range, network_and_batches
from timm_nf.diagnostics.plots import draw_clip_range
from timm_nf.optim import agc


def batches(count=2, size=32):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, size, size, generator=generator), torch.tensor([0, 3, 7, 9])) for _ in range(count)]


@pytest.fixture
def pictures(tmp_path):
    """Two classes of six pictures."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(6):
            picture = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def test_ratios_are_those_of_every_unit_in_every_batch():
    model = timm.create_model("test_resnet", num_classes=10)
    measured = measure_clip_range(model, batches(), count=2)
    assert [stage.name for stage in measured.stages] == ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]
    by_hand = {stage.name: [] for stage in measured.stages}
    for images, labels in batches():
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        for name, p in model.named_parameters():
            if name != "fc.weight":  # never clipped
                ratio = agc.unitwise_norm(p.grad) / agc.unitwise_norm(p.detach()).clamp(min=1e-3)
                by_hand[name.partition(".")[0]].append(ratio.flatten())
    for stage in measured.stages:
        expected = torch.cat(by_hand[stage.name])
        expected = expected[expected > 0].sort().values
        torch.testing.assert_close(torch.from_numpy(np.sort(stage.ratios)), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25])
def test_the_clip_factor_of_a_share_clips_that_share(share):
    model = timm.create_model("test_resnet", num_classes=10)
    measured = measure_clip_range(model, batches(1), count=1)
    images, labels = batches(1)[0]
    F.cross_entropy(model.train()(images), labels).backward()
    params = [p for name, p in model.named_parameters() if name != "fc.weight"]
    units = sum(stage.units for stage in measured.stages)
    moving = units - sum(stage.zero_units for stage in measured.stages)
    clipped = agc.adaptive_clip_grad_(params, measured.clip_factor(share)).item() * units / moving
    assert clipped == pytest.approx(share, abs=1 / moving)  # the quantile lies between two units
    assert measured.share(measured.clip_factor(share)) == pytest.approx(share, abs=1 / moving)


def test_units_without_gradient_are_counted_and_warmup_moves_them():
    torch.manual_seed(0)
    model = create("NFNet")
    zero = [sum(s.zero_units for s in measure_clip_range(model, batches(), 2, steps).stages) for steps in (0, 3)]
    assert zero[0] > 0.5 * sum(
        s.units for s in measure_clip_range(model, batches(), 1).stages
    )  # skip gains are 0 at first
    assert zero[1] < 0.1 * zero[0]
    assert all(p.grad is None for p in model.parameters())


def test_a_parameter_that_some_batches_leave_out_has_no_gradient_there():
    class EverySecond(nn.Module):
        """Takes one of its layers in every second batch only."""

        def __init__(self):
            super().__init__()
            self.first, self.second, self.seen = nn.Linear(12, 10), nn.Linear(12, 10), 0

        def forward(self, x):
            self.seen += 1
            x = x.flatten(1)
            return self.first(x) + self.second(x) if self.seen % 2 else self.first(x)

    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 2, 2), torch.arange(8)
    measured = measure_clip_range(EverySecond(), [(images, labels)], 4)
    found = {stage.name: stage for stage in measured.stages}
    assert found["second"].units == found["first"].units == 11  # ten rows and the bias
    assert len(found["second"].ratios) == len(found["first"].ratios) / 2


def test_batches_begin_again_and_the_warmup_learns():
    torch.manual_seed(0)
    measured = measure_clip_range(create("NFNet"), batches(1), count=3, warmup_steps=8)
    assert measured.batches == 3
    assert len(measured.warmup_losses) == 8
    assert measured.warmup_losses[-1] < measured.warmup_losses[0]


def test_a_unit_is_idle_without_gradient_or_below_a_millionth_of_its_weight():
    ratios = np.array([1e-9, 1e-7, 1e-5, 1e-2], dtype=np.float32)
    measured = ClipRange([Stage("stem", 5, 1, ratios), Stage("head", 1, 1, ratios[:0])], 1, [])
    assert measured.idle() == pytest.approx(4 / 6)  # two without gradient, two below
    assert ClipRange([Stage("stem", 5, 5, ratios[:0])], 1, []).idle() == 1
    assert np.isnan(measured.stages[1].quantiles([0.5])).all()


def test_no_batches_and_a_loss_that_is_not_finite_are_refused():
    model = timm.create_model("test_resnet", num_classes=10)
    with pytest.raises(ValueError, match="expected at least one batch, got none"):
        measure_clip_range(model, [])
    with pytest.raises(ValueError, match="the loss was nan in step 1 of the warmup"):
        measure_clip_range(model, [(torch.full((2, 3, 32, 32), torch.nan), torch.tensor([0, 1]))], warmup_steps=2)
    with pytest.raises(ValueError, match="the loss was nan in batch 1: these weights have diverged"):
        measure_clip_range(
            timm.create_model("test_resnet"), [(torch.full((2, 3, 32, 32), torch.nan), torch.tensor([0, 1]))]
        )


def test_a_gradient_that_is_not_finite_is_refused_by_name():
    model = timm.create_model("test_resnet", num_classes=10)
    model.fc.bias.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(ValueError, match=r"the gradient of fc.bias was not finite in batch 1"):
        measure_clip_range(model, batches())


def test_pictures_become_batches_of_the_size_asked_for(pictures):
    model, loader = network_and_batches("test_resnet", pictures, 5, 24, False, None, "cpu")
    assert model.num_classes == 2
    assert [(images.shape, len(labels)) for images, labels in loader] == [((5, 3, 24, 24), 5)] * 2


def test_too_few_pictures_or_classes_are_refused(pictures):
    with pytest.raises(ValueError, match=r"at least one batch of 13 pictures in .*data, got 12"):
        network_and_batches("test_resnet", pictures, 13, 24, False, None, "cpu")
    with pytest.raises(ValueError, match=r"at least 2 classes in .*cat, got 1"):
        network_and_batches("test_resnet", pictures / "cat", 2, 24, False, None, "cpu")


@pytest.mark.parametrize("classes", [2, 5])
def test_weights_are_loaded_and_a_classifier_of_another_size_is_replaced(classes, pictures, tmp_path):
    saved = timm.create_model("test_resnet", num_classes=classes)
    torch.save({"state_dict": saved.bfloat16().state_dict(), "epoch": 3}, tmp_path / "last.pth.tar")
    model, _ = network_and_batches("test_resnet", pictures, 5, 24, False, read(tmp_path / "last.pth.tar"), "cpu")
    loaded = model.state_dict()
    assert model.num_classes == 2
    for key, value in saved.float().state_dict().items():
        assert (classes != 2 and key.startswith("fc.")) or torch.equal(loaded[key], value), key
    assert loaded["fc.weight"].shape == (2, saved.fc.in_features)


def test_the_authors_checkpoint_starts_ours_with_a_new_classifier(pictures, tmp_path):
    saved = timm.create_model("dm_nf_regnet_b0", num_classes=1000)
    nn.init.normal_(saved.stem.conv.weight)
    (tmp_path / "b0.npz").write_bytes(dumps(convert.timm_to_haiku(saved.state_dict())))
    model, _ = network_and_batches("dm_nf_regnet_b0", pictures, 5, 24, False, read(tmp_path / "b0.npz"), "cpu")
    assert torch.equal(model.stem.conv.weight, saved.stem.conv.weight)
    assert model.head.fc.out_features == 2


def test_the_picture_shows_every_stage(tmp_path):
    generator = np.random.default_rng(0)
    stages = [Stage(f"stages.{i}", 50, 0, 10 ** generator.normal(-i, 1, 500)) for i in range(3)]
    stages.append(Stage("head", 1, 1, np.empty(0)))
    draw_clip_range(ClipRange(stages, 1, []), "three stages", tmp_path / "clip.png")
    pixels = np.asarray(Image.open(tmp_path / "clip.png").convert("RGB")).reshape(-1, 3).astype(int)
    blue = (pixels[:, 2] - pixels[:, 0] > 60).mean()
    red = (pixels[:, 0] - pixels[:, 2] > 60).mean()
    assert blue > 0.02
    assert red > 0.001


def test_the_command_prints_stages_and_clip_factors_and_writes_the_picture(pictures, tmp_path, capsys):
    options = ["--img-size", "32", "--batch-size", "4", "--warmup-steps", "2", "--batches", "2"]
    main(["clip-range", "--model", "test_resnet", "--data", str(pictures), *options, "-o", str(tmp_path / "p.png")])
    out = capsys.readouterr().out
    assert all(word in out for word in ("conv1", "layer4", "clips 25% of units", "2 steps, loss", "2 batches of 4"))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert not multiprocessing.active_children()  # readers that garbage collection ends make it wait for 5 s each


def test_the_command_says_where_most_gradients_are_almost_zero(pictures, tmp_path, capsys):
    options = ["--img-size", "32", "--batch-size", "2", "--warmup-steps", "1", "--batches", "1"]
    main(["clip-range", "--model", "test_nfnet", "--data", str(pictures), *options, "-o", str(tmp_path / "p.png")])
    assert "take more --warmup-steps, or measure a --checkpoint" in capsys.readouterr().err


def test_a_network_without_any_gradient_is_refused():
    model = timm.create_model("dm_nf_regnet_b0", depths=(1,), channels=(16,), num_classes=2)  # starts at zero
    with pytest.raises(ValueError, match=r"no unit but the classifier's has a gradient.* --warmup-steps"):
        measure_clip_range(model, [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]))])


def test_the_command_warns_where_only_the_head_has_a_gradient(pictures, tmp_path, capsys):
    options = ["--img-size", "32", "--batch-size", "3", "--warmup-steps", "0", "--batches", "1"]
    main(["clip-range", "--model", "dm_nf_regnet_b0", "--data", str(pictures), *options, "-o", str(tmp_path / "p.png")])
    captured = capsys.readouterr()
    assert "27198 of 27199 units" in captured.out
    assert "the gradients of 100% of the units are zero or below" in captured.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--pretrained", "--checkpoint", __file__], 2, "exclude each other"),
        (["-o", "missing/folder/p.png"], 2, "existing folder for --out"),
        (["--batch-size", "100"], 1, "at least one batch of 100 pictures"),
        (["--checkpoint", "missing.pth"], 2, "missing.pth"),
        (["--checkpoint", "{tmp}"], 2, "is a directory"),
        (["--checkpoint", "{tmp}/vit.pth"], 1, "vit.pth is of another architecture"),
        (["--checkpoint", "{tmp}/text.pth"], 1, "text.pth is no file of weights"),
        (["--checkpoint", "{tmp}/x.npz"], 1, "x.npz: expected the authors' checkpoint"),
        (["--model", "vgg99"], 2, "no network or folder is called 'vgg99'"),
        (["--data", __file__], 2, "is a file"),
        (["--data", "{tmp}/broken", "--img-size", "32"], 1, "no batch could be read, "),
        (["--device", "cuda:99"], 2, "expected a device of this machine"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, code, message, pictures, tmp_path, capsys):
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    (tmp_path / "text.pth").write_text("no weights")
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    for i in range(20):
        file = tmp_path / "broken" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((pictures / "cat" / "0.png").read_bytes()[:60])
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit) as stop:
        main(["clip-range", "--model", "test_resnet", "--data", str(pictures), "--batch-size", "4", *arguments])
    assert stop.value.code == code
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("timm-nf"))
    assert message in line
