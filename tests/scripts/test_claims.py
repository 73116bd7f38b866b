"""The scripts of docs/claims.md: their clippings, twin and rules, and that the page says what the rows say."""

import sys
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scripts.claims import __main__ as claims
from scripts.claims import report as claims_report
from scripts.claims.figures import ABOUT
from scripts.claims.grid import BATCHES, LARGEST, clip_factors, layers, plan, quick
from scripts.claims.page import CLAIMS, page
from scripts.claims.report import FLOOR, LITTLE, Cell, as_good, batch_size_parts, best, better, margin
from scripts.claims.training import Result, Run, batch_normalised, build, clip, clip_layerwise_, learning_rate

ROWS = claims.read(claims.CSV)


class Now:
    """An executor that does what it is asked at once, with an accuracy in place of a training."""

    def __init__(self, stop_after: int = 10**6) -> None:
        self.ran: list[Run] = []
        self.stop_after = stop_after

    def submit(self, train: Any, run: Run) -> Any:
        if len(self.ran) == self.stop_after:
            raise KeyboardInterrupt
        self.ran.append(run)
        future: Future[Result] = Future()
        future.set_result(result(50 - run.factor))
        return future


def result(accuracy: float) -> Result:
    return Result(accuracy, 1.0, 1, 1, 1.0, "a machine, with, commas")


# -- training ----------------------------------------------------------------------------------------------------------


def test_layerwise_clipping_has_one_norm_for_a_parameter():
    p = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))  # norm 5
    p.grad = torch.tensor([[6.0, 0.0], [0.0, 8.0]])  # norm 10
    clip_layerwise_([p], 0.5)  # to 2.5
    torch.testing.assert_close(p.grad, torch.tensor([[1.5, 0.0], [0.0, 2.0]]))
    clip_layerwise_([p], 0.6)  # below 3: nothing
    torch.testing.assert_close(p.grad, torch.tensor([[1.5, 0.0], [0.0, 2.0]]))


def test_layerwise_clipping_counts_small_weights_as_eps():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    clip_layerwise_([p], 0.5, eps=0.1)
    torch.testing.assert_close(p.grad, torch.tensor([0.03, 0.04]))


def gradients(run: Run) -> dict[str, torch.Tensor]:
    """Of a network whose every gradient was 1, after clipping."""
    model = build(run)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    clip(run, model)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("spared", [run.spared for run in layers(0)])
@pytest.mark.parametrize("kind", ["unit", "layer", "global"])
def test_exactly_the_spared_parameters_are_not_clipped(kind: str, spared: str):
    after = gradients(Run(clip=kind, factor=1e-3, spared=spared))
    kept = {name for name, grad in after.items() if (grad == 1).all()}
    assert kept == {name for name in after if any(name.startswith(beginning) for beginning in spared.split())}
    assert len(kept) == 0 if not spared else "head.fc.weight" in kept and "head.fc.bias" not in kept


def test_without_clipping_no_gradient_changes():
    assert all((grad == 1).all() for grad in gradients(Run()).values())


def test_the_twin_has_the_parameters_of_the_network_in_bias_free_convolutions_with_batch_norm():
    network, twin = build(Run()), build(Run("bn"))
    convs = [module for module in twin.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in twin.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(convs) == len(norms) == sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert all(conv.bias is None for conv in convs)
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in network.parameters())


def test_the_twin_has_alpha_beta_and_skip_gains_of_one():
    twin = build(Run("bn")).eval()
    block, x = twin.stages[1][0], torch.randn(2, 48, 8, 8)
    branch = block.conv3(block.act3(block.conv2(block.act2(block.conv1(block.act1(x))))))
    torch.testing.assert_close(block(x), block.downsample(block.act1(x)) + branch)
    # beta would be in the effective weight; a plain convolution has none
    conv = block.conv1[0]
    torch.testing.assert_close(conv.effective_weight(), conv.weight, rtol=0, atol=0)
    assert not any(p.requires_grad for name, p in twin.named_parameters() if name.endswith("skipinit_gain"))


def test_the_twin_is_the_same_network_in_training_and_test_but_for_its_statistics():
    twin = batch_normalised(build(Run())).train()
    x = torch.randn(8, 1, 32, 32)
    alone, together = twin(x[:4]), twin(x)[:4]
    assert (alone - together).abs().max() > 1e-3  # examples of a batch influence each other
    network = build(Run()).train()
    torch.testing.assert_close(network(x[:4]), network(x)[:4], rtol=1e-4, atol=1e-5)  # here they do not


def test_depth_costs_the_same_in_every_stage():
    counts = {build(run).cfg.count(32, 1, 10)[1] for run in claims_report.depths(0)}
    assert len(counts) == 1


def test_learning_rate_rises_for_a_quarter_and_falls_to_nothing():
    rates = [learning_rate(step, 40, 2.0) for step in range(40)]
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.01


# -- runs --------------------------------------------------------------------------------------------------------------


def test_every_run_is_made_once_and_a_second_start_makes_none(tmp_path: Path):
    file, pool = tmp_path / "runs.csv", Now()
    rows = claims.run_missing(plan(), file, pool, "runs")
    assert [run for run, times in Counter(pool.ran).items() if times > 1] == []
    assert set(pool.ran) == set(rows) == set(plan())
    assert claims.read(file) == rows
    again = Now()
    assert claims.run_missing(plan(), file, again, "runs") == rows
    assert again.ran == []


def test_an_interrupted_experiment_goes_on_where_it_stopped(tmp_path: Path):
    file, first, second = tmp_path / "runs.csv", Now(stop_after=7), Now()
    with pytest.raises(KeyboardInterrupt):
        claims.run_missing(plan(), file, first, "runs")
    kept = claims.read(file)
    assert len(kept) == 6  # one of two was on its way
    claims.run_missing(plan(), file, second, "runs")
    assert not set(kept) & set(second.ran)


def test_quick_runs_are_rows_of_the_whole_experiment():
    assert len(quick()) == 12
    assert set(quick()) <= set(plan())


def test_every_planned_run_has_a_committed_row_of_0_2_to_0_5_million_parameters():
    assert set(plan()) <= set(ROWS)
    assert all(0.2e6 < ROWS[run].params < 0.5e6 for run in plan())


def test_a_missing_data_set_is_one_line_and_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path):
    def missing(train: bool) -> None:
        raise FileNotFoundError("Fashion-MNIST is not there")

    monkeypatch.setattr(claims, "load", missing)
    monkeypatch.setattr(claims.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sys, "argv", ["claims.py", "--csv", str(tmp_path / "runs.csv")])
    assert claims.main() == 1
    assert capsys.readouterr().err == "Fashion-MNIST is not there\n"


def test_the_committed_page_is_that_of_the_committed_rows():
    assert (claims.FOLDER.parent / "claims.md").read_text() == page(ROWS)
    assert all((claims.FOLDER / f"{index}_{name}.png").exists() for index, name in enumerate(ABOUT, 1))
    assert [claim.name for claim in CLAIMS] == list(ABOUT)


# -- rules -------------------------------------------------------------------------------------------------------------


def test_better_asks_for_three_standard_errors():
    a = Cell(80.0, 3.0, 3)
    distance = 3 * (2 * 9 / 3) ** 0.5  # 7.35
    assert better(a, Cell(80.0 + distance - 0.01, 3.0, 3)) == 0
    assert better(a, Cell(80.0 + distance + 0.01, 3.0, 3)) == -1
    assert better(a, Cell(80.0 - distance - 0.01, 3.0, 3)) == 1
    assert better(Cell(80.0, 0.0, 3), Cell(79.0, 0.0, 3)) == 0  # the floor: 3 * 0.5 * sqrt(2 / 3) = 1.22
    assert better(Cell(80.0, 0.0, 3), Cell(78.7, 0.0, 3)) == 1


def test_one_seed_decides_nothing():
    assert better(Cell(90.0, 0.0, 1), Cell(10.0, 0.0, 1)) == as_good(Cell(90.0, 0.0, 1), Cell(10.0, 0.0, 1)) == 0


def test_as_good_excludes_a_loss_of_more_than_a_point():
    b = Cell(80.0, 0.1, 3)
    lost = margin(b, b) - LITTLE  # 0.22: that much above, a loss of a point is beyond three standard errors
    assert as_good(Cell(80.0 + lost + 0.01, 0.1, 3), b) == 1
    assert as_good(Cell(80.0 + lost - 0.01, 0.1, 3), b) == 0
    assert as_good(Cell(80.0 - margin(b, b) - 0.01, 0.1, 3), b) == -1
    assert as_good(Cell(50.0, 40.0, 3), Cell(50.0, 40.0, 3)) == 0


def test_being_as_good_as_what_has_not_trained_decides_nothing():
    rows = {
        Run(net, batch=batch, seed=seed): result(11.0) for net in ("nf", "bn") for batch in BATCHES for seed in (0, 1)
    }
    rows |= {replace(run, seed=seed): result(80.0) for run in clip_factors(BATCHES, 0) for seed in (0, 1)}
    verdicts = {part.statement: part.verdict for part in batch_size_parts(rows)}
    assert verdicts["batch 4096: clipped is as good as the twin, which has not trained"] == 0
    assert verdicts["batch 4096: clipped is above unclipped"] == 1


def test_the_best_has_the_highest_mean():
    runs = clip_factors([LARGEST], 0)
    rows = {replace(run, seed=seed): result(run.factor) for run in runs[:3] for seed in (0, 1)}
    assert best(rows, runs) == runs[2]
    assert best({}, runs) == runs[0]


@pytest.mark.parametrize(("seeds", "allowed"), [((80.0, 80.0, 80.0), 3 * FLOOR), ((78.0, 80.0, 82.0), 6.0)])
def test_quick_comparison_fails_beyond_three_spreads(seeds: tuple[float, ...], allowed: float):
    run = quick()[0]
    committed = {replace(run, seed=seed): result(accuracy) for seed, accuracy in enumerate(seeds)}
    for off, within in ((allowed - 0.01, True), (allowed + 0.01, False), (-allowed - 0.01, False)):
        assert claims.compare(committed, {run: result(80.0 + off)})[0][-1] is within
    assert claims.compare({}, {run: result(80.0)})[0][-1] is False  # no row, no agreement


def test_quick_exits_with_1_where_one_row_is_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    committed = {replace(run, seed=seed): result(50.0) for run in quick() for seed in range(3)}
    now = {run: result(50.0) for run in quick()}
    monkeypatch.setattr(claims, "train_with", lambda *_: now)
    assert claims.quick(committed) == 0
    now[quick()[3]] = result(40.0)
    assert claims.quick(committed) == 1
