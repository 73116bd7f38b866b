import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.support import GOLDEN, SHIPPED, golden_file
from timm_nf._progress import silent
from timm_nf._relative_error import relative_error
from timm_nf.optim import agc
from timm_nf.verify import checks
from timm_nf.verify.golden import fill, golden_model, golden_params, image, load_golden

CPU = torch.device("cpu")


@pytest.mark.parametrize("file", [*checks.FORWARD.values(), checks.STEPS])
def test_shipped_golden_is_the_one_of_the_tests(file):
    assert golden_file(file) == Path(checks.__file__).parent / "golden" / f"{file}.npz"
    assert golden_file(file).is_file()


def test_no_golden_file_is_there_twice():
    assert not {path.name for path in SHIPPED.iterdir()} & {path.name for path in GOLDEN.iterdir()}


def test_nothing_else_is_shipped():
    files = {path.stem for path in (Path(checks.__file__).parent / "golden").iterdir()}
    assert files == {*checks.FORWARD.values(), checks.STEPS}


def test_fill_has_the_stated_moments():
    moments = {"w": (0.01, 0.01), "gain": (1.0, 0.1), "bias": (0.0, 0.1), "skip_gain": (0.7, 0.1)}
    for name, (mean, std) in moments.items():
        values = fill((100, 1, 100, 4) if name == "w" else (40_000,), "module", name)
        assert values.dtype == np.float64
        assert values.mean() == pytest.approx(mean, abs=5 * std / 200)
        assert values.std() == pytest.approx(std, rel=0.02)
    assert fill((), "module", "skip_gain").shape == ()
    with pytest.raises(KeyError):
        fill((3,), "module", "scale")


def test_golden_params_serve_any_config_and_class_count():
    a = timm.create_model("dm_nf_regnet_b0", depths=(1, 2), channels=(16, 24), num_classes=5, in_chans=1)
    params = golden_params(a.state_dict())
    assert {n: p.shape for n, p in params.items()} == {n: p.shape for n, p in a.state_dict().items()}
    assert {p.dtype for p in params.values()} == {torch.float64}
    a.load_state_dict(params)
    gain = fill((16 * 3 // 4,), "NF_RegNet/~/initial_conv", "gain")
    np.testing.assert_array_equal(params["stem.conv.gain"].flatten(), gain)


def test_small_golden_network_is_the_authors():
    model = golden_model("nfnet_f0", depths=(1, 2, 1, 1), channels=(32, 64, 96, 96), group_size=8, num_classes=10)
    model = model.float().double()  # these numbers belong to a checkpoint, which is float32
    with np.load(GOLDEN / "T0_2x64x64.npz") as golden, torch.no_grad():
        assert relative_error(model(image(2, 64, 64)), torch.from_numpy(golden["logits"])) < 1e-11


def test_forward_checks_pass_here():
    results = list(checks._forward_checks("dm_nf_regnet_b0", CPU))
    assert len(results) == 4
    assert all(verdict.ok for verdict in results), results


def test_forward_check_fails_on_a_perturbed_golden(monkeypatch):
    golden = load_golden(checks.FORWARD["dm_nf_regnet_b0"])
    golden["logits"] = golden["logits"] * (1 + 1e-3)
    monkeypatch.setattr(checks, "load_golden", lambda file: golden)
    assert [verdict.ok for verdict in checks._forward_checks("dm_nf_regnet_b0", CPU)] == [False, False, True, True]


def test_device_without_float64_is_not_counted_as_passed(monkeypatch):
    monkeypatch.setattr(checks, "_has_float64", lambda device: False)
    assert [verdict.ok for verdict in checks._forward_checks("dm_nf_regnet_b0", CPU)] == [None, True, True, True]


@pytest.mark.slow
def test_without_float64_training_steps_are_compared_in_float32(monkeypatch):
    monkeypatch.setattr(checks, "_has_float64", lambda device: False)
    results = list(checks._step_checks(CPU))
    assert [verdict.name for verdict in results if "float32" in verdict.name] == [verdict.name for verdict in results]
    assert all(verdict.ok for verdict in results), results


def test_not_a_number_fails():
    assert checks._at_most("x", math.nan, 1.0).ok is False


def test_part_that_stops_is_a_failure_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(checks, "FORWARD", {"dm_nf_regnet_b0": "missing"})
    monkeypatch.setattr(checks, "_step_checks", lambda device: iter([checks.Verdict("steps", "0", "1", True)]))
    results = list(checks.run())
    assert [verdict.ok for verdict in results] == [False, True, True, None]
    assert "FileNotFoundError" in results[0].measured


def test_unknown_device_stops_before_any_check():
    with pytest.raises(RuntimeError, match="nowhere"):
        next(checks.run("nowhere"))


def test_reads_are_counted_where_a_step_waits(monkeypatch):
    read, _ = checks._waiting_checks(CPU)
    assert read.ok

    monkeypatch.setattr(
        agc, "clip_checked_", lambda settings, *args: [p.sum().item() for ps, _ in settings for p in ps][:0]
    )
    read, _ = checks._waiting_checks(CPU)
    assert read.ok is False
    assert int(read.measured) > 0


@pytest.mark.gpu
def test_everything_passes_on_cuda():
    assert all(verdict.ok for verdict in checks.run("cuda"))


@pytest.mark.slow
def test_everything_passes_here():
    results = list(checks.run())
    assert len(results) == 17
    assert [verdict.name for verdict in results if not verdict.ok] == ["agcsgd step, waits for the device"]


@pytest.fixture
def hub(monkeypatch):
    """timm with synthetic weights instead of the authors', in a narrow network of ours and in stock timm's."""
    create_model = timm.create_model
    narrow = {"channels": (32, 64, 96, 96), "group_size": 16, "stem_chs": 128, "num_features": 192}

    def create(name, pretrained=False, **kwargs):
        assert pretrained
        model = create_model(name, pretrained_cfg_overlay={"test_input_size": (3, 64, 64)}, **narrow, **kwargs)
        shapes = {n: p.shape for n, p in model.state_dict().items()}  # timm's skip gain is a scalar
        params = golden_params(model.state_dict())
        model.load_state_dict({n: p.reshape(shapes[n]) for n, p in params.items()})
        return model

    monkeypatch.setattr(checks.timm, "create_model", create)


def test_pretrained_compares_with_stock_timm(hub, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8)
    for synset in ("n01440764", "n01443537"):
        (tmp_path / synset).mkdir()
        Image.fromarray(noise).save(tmp_path / synset / "a.png")
    error, top1, accuracy = checks._pretrained_checks(CPU, tmp_path / "n01440764" / "a.png", tmp_path, silent)
    assert error.ok
    assert float(error.measured) > 1e-3  # another floor in the weight standardisation
    assert top1.bound == "equal"
    assert accuracy.name.startswith("top-1 of 2 images")
