"""The plain loop trains as the paper's formula says, unit by unit in float64."""

import io
from itertools import pairwise

import pytest
import torch
from timm.optim import Lookahead, create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.optim.swa_utils import AveragedModel

from examples import plain_loop
from tests.support import ROOT
from tests.support.formula_loop import differences, trajectory

ROUNDING = 2e-6  # of float32 in a few steps, relative to a parameter; measured are 6e-7
SIZE = 16  # of a batch, to be quick


@pytest.fixture(scope="module")
def expected():
    return trajectory(4, size=SIZE)


def start():
    model = plain_loop.network()
    return model, create_optimizer_v2(model, "agcsgd", **plain_loop.SETTINGS)


def furthest(model, expected):
    return max(differences(model, expected).values())


def test_every_loop_is_short():
    loops = [ROOT / "examples" / f"{name}.py" for name in ("plain_loop", "fsdp2")] + list(
        ROOT.glob("examples/with_*.py")
    )
    assert len(loops) == 5
    assert [file.name for file in loops if len(file.read_text().splitlines()) >= 60] == []


def test_it_equals_the_formula_in_float64(capsys):
    expected = trajectory(3)
    model = plain_loop.main(steps=3)
    assert "% of 1136 units clipped" in capsys.readouterr().out
    assert furthest(model, expected[-1]) < ROUNDING
    assert furthest(plain_loop.network(), expected[-1]) > 0.1  # it has moved


def test_averages_of_its_weights_are_those_of_the_formula(expected):
    model, optimizer = start()
    ema, swa = ModelEmaV3(model, decay=0.75), AveragedModel(model)
    first = {name: p.detach().double() for name, p in model.named_parameters()}

    def after_step():
        ema.update(model)
        swa.update_parameters(model)

    plain_loop.train(model, optimizer, plain_loop.parts(4, SIZE), after_step=after_step)
    exponential = first
    for step in expected:
        exponential = {name: 0.75 * exponential[name] + 0.25 * p for name, p in step.items()}
    assert furthest(ema.module, exponential) < ROUNDING
    assert furthest(swa.module, {name: sum(step[name] for step in expected) / 4 for name in first}) < ROUNDING


def test_it_resumes_in_the_middle_to_the_bit():
    model, optimizer = start()
    data, file = list(plain_loop.parts(4, SIZE)), io.BytesIO()

    def save():
        if not file.tell():  # after the first step
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)

    plain_loop.train(model, optimizer, data, after_step=save)
    resumed, optimizer = start()
    file.seek(0)
    saved = torch.load(file)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    plain_loop.train(resumed, optimizer, data[plain_loop.PARTS :])
    for name, p in model.named_parameters():
        assert torch.equal(resumed.get_parameter(name), p), name


def test_lookahead_equals_the_formula():
    model, optimizer = start()
    plain_loop.train(model, Lookahead(optimizer, k=2), plain_loop.parts(4, SIZE))
    assert furthest(model, trajectory(4, lookahead=2, size=SIZE)[-1]) < ROUNDING


@pytest.mark.parametrize(("dtype", "skipped"), [(torch.bfloat16, False), (torch.float16, True)], ids=str)
def test_in_half_precision_it_clips_as_the_formula_what_autocast_computes(dtype, skipped):
    """In float16 with a loss scaler, which skips a step."""
    expected = trajectory(3, dtype=dtype, size=SIZE)
    assert any(torch.equal(a["head.fc.weight"], b["head.fc.weight"]) for a, b in pairwise(expected)) is skipped
    model, optimizer = start()
    plain_loop.train(model, optimizer, plain_loop.parts(3, SIZE), dtype)
    assert furthest(model, expected[-1]) < ROUNDING
