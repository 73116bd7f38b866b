"""The scripts of docs/claims.md: their clippings, twin, plan and rule, and that the page says what the rows say."""

import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import timm_nf
from scripts.claims import __main__ as claims
from scripts.claims import grid, signals, training
from scripts.claims import page as pages
from scripts.claims.figures import FIGURES
from scripts.claims.grid import LARGEST, PARTS, PHASES, QUICK_PHASES, SEEDS, TUNING, Phase, Rows, planned
from scripts.claims.page import PLAN_COMMIT, page
from scripts.claims.parts import CLAIMS, Part
from scripts.claims.parts import quick as quick_parts
from scripts.claims.rule import Differences, decide, seeds_to_decide, simulate
from scripts.claims.training import Result, Run, build, clip, clip_layerwise_, learning_rate, train
from tests.support import ROOT

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
        future.set_result(result(90 - abs(run.factor - 0.01) - run.seed / 100 - run.lr))
        return future


def result(accuracy: float) -> Result:
    return Result(accuracy, 1.0, 1, 1, 1.0, 0.5, 0.5, 0.5, "a machine, with, commas")


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rows, list[Run]]:
    """The rows of a whole made-up experiment, and its runs in their order."""
    pool = Now()
    return claims.run_missing(PHASES, tmp_path_factory.mktemp("claims") / "runs.csv", pool, 2), pool.ran


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


@pytest.mark.parametrize("spared", ["", *PARTS.values()])
@pytest.mark.parametrize("kind", ["unit", "layer", "global"])
def test_exactly_the_spared_parameters_are_not_clipped(kind: str, spared: str):
    after = gradients(Run(clip=kind, factor=1e-3, spared=spared))
    kept = {name for name, grad in after.items() if (grad == 1).all()}
    assert kept == {name for name in after if any(name.startswith(beginning) for beginning in spared.split())}
    assert bool(kept) == bool(spared)


def test_skip_gains_are_spared_beside_the_classifiers_weight():
    after = gradients(replace(grid.without_gains({}), factor=1e-3))
    kept = {name for name, grad in after.items() if (grad == 1).all()}
    assert kept == {"head.fc.weight", *(f"stages.{i}.0.skipinit_gain" for i in range(4))}


@pytest.mark.parametrize("alone", PARTS.values())
def test_exactly_the_named_part_is_clipped_alone(alone: str):
    after = gradients(Run(clip="unit", factor=1e-3, alone=alone))
    clipped = {name for name, grad in after.items() if (grad != 1).any()}
    assert clipped == {name for name in after if name.startswith(alone)} != set()


def test_without_clipping_no_gradient_changes():
    assert all((grad == 1).all() for grad in gradients(Run()).values())


def test_the_twin_has_the_parameters_of_the_network_in_bias_free_convolutions_with_batch_norm():
    network, twin = build(Run()), build(Run(net="bn"))
    convs = [module for module in twin.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in twin.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(convs) == len(norms) == sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert all(conv.bias is None for conv in convs)
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in network.parameters())


def test_the_twin_has_alpha_beta_and_skip_gains_of_one():
    twin = build(Run(net="bn")).eval()
    block, x = twin.stages[1][0], torch.randn(2, 32, 8, 8)
    branch = block.conv3(block.act3(block.conv2(block.act2(block.conv1(block.act1(x))))))
    torch.testing.assert_close(block(x), block.downsample(block.act1(x)) + branch)
    # beta would be in the effective weight; a plain convolution has none
    conv = block.conv1[0]
    torch.testing.assert_close(conv.effective_weight(), conv.weight, rtol=0, atol=0)
    assert not any(p.requires_grad for name, p in twin.named_parameters() if name.endswith("skipinit_gain"))


def test_the_twin_is_the_same_network_in_training_and_test_but_for_its_statistics():
    twin = build(Run(net="bn")).train()
    x = torch.randn(8, 1, 32, 32)
    alone, together = twin(x[:4]), twin(x)[:4]
    assert (alone - together).abs().max() > 1e-3  # examples of a batch influence each other
    network = build(Run()).train()
    torch.testing.assert_close(network(x[:4]), network(x)[:4], rtol=1e-4, atol=1e-5)  # here they do not


def test_the_fair_twins_branches_start_at_zero_and_its_scales_are_not_decayed():
    twin, x = build(Run(net="bn-zero")).train(), torch.randn(4, 32, 8, 8)
    block = twin.stages[1][0]
    torch.testing.assert_close(block(x), block.downsample(block.act1(x)))
    groups = timm_nf.param_groups_agc(twin, weight_decay=2e-5)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in twin.named_parameters() if id(p) in decayed}
    assert names == {name for name, p in twin.named_parameters() if p.ndim > 1}


def test_plain_weights_start_at_the_variance_of_standardised_ones_and_keep_their_mean():
    torch.manual_seed(0)
    conv = build(Run(net="nf-plain")).stages[3][0].conv2
    weight = conv.effective_weight()
    torch.testing.assert_close(weight, conv.weight * conv.scale)
    assert (weight.var() * weight[0].numel() / conv.scale**2).item() == pytest.approx(1, rel=0.05)


def test_depth_costs_the_same_in_every_stage():
    assert len({build(run).cfg.count(32, 1, 10)[1] for run in grid.deeper()}) == 1


def test_networks_of_the_plan_have_0_1_to_0_5_million_parameters():
    runs = {replace(run, seed=0, batch=1, lr=0.1, factor=0.0, epochs=1, images=1) for run in planned({})}
    shapes = {(run.depths, run.width, run.net) for run in runs}
    sizes = [build(Run(net=net, depths=d, width=w)).cfg.count(32, 1, 10)[0] for d, w, net in shapes]
    assert 0.1e6 < min(sizes) <= max(sizes) < 0.6e6


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """384 pictures of noise, as many as the measures take, and no test."""
    images = torch.randn(384, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(training, "load", lambda train: (images, torch.arange(384) % 10))
    monkeypatch.setattr(training, "accuracy", lambda model: 50.0)
    monkeypatch.setattr(training.torch, "set_num_threads", lambda count: None)
    order = SimpleNamespace(permutation=lambda n: np.arange(384))
    monkeypatch.setattr(training.np.random, "default_rng", lambda seed: order)


def same(one: Result, other: Result) -> bool:
    """Whether two results agree but for their time, to rounding: sums over other memory differ by 3e-8."""
    a, b = ({**asdict(result), "seconds": 0.0, "machine": 0} for result in (one, other))
    return one.machine == other.machine and a == pytest.approx(b, rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.usefixtures("tiny")
def test_watching_a_run_changes_nothing_in_it_and_sees_every_part():
    run = Run(clip="unit", factor=0.01, batch=32, images=64, epochs=2)
    watch = signals.Watch(run)
    assert same(train(run, watch), train(run))
    assert [row["step"] for row in watch.rows] == [
        step for step in range(4) for _ in PARTS.keys() - {"the classifier's weight"}
    ]
    first = watch.rows[0]
    assert (first["part"], first["lr"]) == ("first convolution", 0.1)
    assert first["clipped"] > 0
    assert watch.rows[1]["clipped"] < first["clipped"]  # behind a skip gain of 0 there are no gradients yet


@pytest.mark.usefixtures("tiny")
def test_a_run_is_the_same_again_and_networks_of_a_seed_see_the_same_batches(monkeypatch: pytest.MonkeyPatch):
    cross_entropy, seen, results = training.F.cross_entropy, [], []

    def watched(logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(labels)
        return cross_entropy(logits, labels, **options)

    monkeypatch.setattr(training.F, "cross_entropy", watched)
    for net in ("nf", "nf", "bn-zero"):
        results.append(train(Run(net=net, batch=16, images=64, epochs=1, seed=3)))
    assert same(results[0], results[1])
    assert len(seen) == 3 * 4
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(seen[:4], seen[4:8], seen[8:], strict=True))
    assert results[0].mode_gap == 0 < results[2].mode_gap
    assert results[0].mates_gap < 1e-5 < results[2].mates_gap


def test_learning_rate_rises_for_a_quarter_and_falls_to_nothing():
    rates = [learning_rate(step, 40, 2.0) for step in range(40)]
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.01


# -- runs --------------------------------------------------------------------------------------------------------------


def test_every_run_is_made_once_and_a_second_start_makes_none(complete: tuple[Rows, list[Run]], tmp_path: Path):
    rows, ran = complete
    assert [run for run, times in Counter(ran).items() if times > 1] == []
    assert set(ran) == set(rows) == set(planned(rows))
    file, again = tmp_path / "runs.csv", Now()
    claims.write(file, rows)
    assert claims.run_missing(PHASES, file, again, 2) == rows == claims.read(file)
    assert again.ran == []


def test_an_interrupted_experiment_goes_on_where_it_stopped(tmp_path: Path):
    file, first, second = tmp_path / "runs.csv", Now(stop_after=7), Now(stop_after=9)
    with pytest.raises(KeyboardInterrupt):
        claims.run_missing(PHASES, file, first, 2)
    kept = claims.read(file)
    assert len(kept) == 6  # one of two was on its way
    with pytest.raises(KeyboardInterrupt):
        claims.run_missing(PHASES, file, second, 2)
    assert not set(kept) & set(second.ran)


def test_settings_are_chosen_on_a_seed_that_decides_nothing(complete: tuple[Rows, list[Run]]):
    rows, ran = complete
    for parts in CLAIMS.values():
        for part in parts(rows):
            assert {run.seed for run in part.tuning} <= {TUNING}
            assert TUNING not in part.seeds
            assert set(part.runs) <= set(rows), part.statement
    best = grid.at_linear(rows, grid.CLIPPED, LARGEST)
    assert (best.factor, best.lr) == (0.01, 1.6)  # the made-up results are the better, the closer to 0.01
    assert grid.at_best(rows, grid.CLIPPED, LARGEST) == replace(best, lr=0.1)  # and the smaller the rate
    first = next(i for i, run in enumerate(ran) if run.seed != TUNING)
    assert set(grid.tune(LARGEST)(rows)) == set(ran[:first])


def test_a_grid_is_extended_while_its_best_is_at_an_end():
    rows: Rows = {}

    def fill(best: float) -> list[float]:
        rows.clear()
        while missing := [run for run in grid.thresholds(rows, "layer") if run not in rows]:
            rows.update({run: result(-abs(run.factor - best)) for run in missing})
        return [run.factor for run in grid.thresholds(rows, "layer")]

    assert fill(0.01) == list(grid.GRIDS["layer"])
    assert fill(0.64) == [*grid.GRIDS["layer"], 0.64, 2.56]
    assert fill(0.0) == [0.000625 / 16, 0.000625 / 4, *grid.GRIDS["layer"]]  # two points at most


def test_a_part_is_decided_when_all_its_runs_are_there_and_not_before(complete: tuple[Rows, list[Run]]):
    rows = dict(complete[0])
    part = CLAIMS["Unit-wise norms do better than layer-wise ones"](rows)[0]
    assert part.verdict(rows)[1] != f"not run yet: {len(part.runs)} of {len(part.runs)} runs"
    del rows[part.runs[-1]]
    assert part.verdict(rows) == ("", f"not run yet: {len(part.runs) - 1} of {len(part.runs)} runs")


def test_differences_are_paired_by_seed():
    a, b = Run(), Run(net="bn-zero")
    rows = {replace(a, seed=s): result(80 + 5 * s) for s in SEEDS}
    rows |= {replace(b, seed=s): result(79 + 5 * s + 0.1 * (s % 2)) for s in SEEDS}
    part = Part("above", "better", [a], [b])
    assert part.differences(rows).spread < 0.06  # where the seeds of one spread over twenty points
    assert part.verdict(rows)[1] == "**holds**"
    assert "above" in part.verdict(rows)[0]
    # -0.96 with a spread of 0.055: 8 seeds make 1.895 * 0.055 / sqrt(8) = 0.037 of it, 7 seeds 0.040
    lost = Part("as good", "as good", [b], [a], reference=a)
    assert lost.verdict(rows)[1] == "not decided: 8 seeds would, if mean and spread stay"


def test_being_as_good_as_what_has_not_trained_decides_nothing():
    a, b = Run(), Run(net="bn-zero")
    rows = {replace(run, seed=s): result(accuracy) for s in SEEDS for run, accuracy in ((a, 80.0 + s), (b, 11.0))}
    assert Part("as good", "as good", [a], [b], reference=b).verdict(rows)[1].startswith("not decided: the reference")
    assert Part("better", "better", [a], [b]).verdict(rows)[1] == "**holds**"


def test_a_setting_beside_itself_decides_nothing():
    rows = {Run(seed=s): result(80.0 + s) for s in SEEDS}
    assert Part("as good", "as good", [Run()], [Run()]).verdict(rows)[1] == "not decided: both are the same setting"


def test_the_quick_runs_are_those_of_three_parts():
    rows: Rows = {}
    (phase,) = QUICK_PHASES
    parts = quick_parts(rows)
    assert len(parts) == 3
    assert {run for part in parts for run in part.runs} == set(phase.runs(rows))


@pytest.mark.parametrize(("clipped", "code"), [(80.0, 0), (10.0, 1)])
def test_quick_exits_with_1_where_a_part_does_not_hold(monkeypatch: pytest.MonkeyPatch, clipped: float, code: int):
    runs = grid.QUICK_RUNS
    means = {grid.CLIPPED: clipped, grid.TWIN: 80.0}
    rows = {replace(run, seed=s): result(means.get(name, 10.0) + 0.1 * s) for name, run in runs.items() for s in SEEDS}
    monkeypatch.setattr(claims, "train_with", lambda *_: rows)
    assert claims.quick(1) == code


def test_progress_says_what_ran_and_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    phases = (Phase("a phase", lambda rows: [Run(seed=s) for s in (0, 1)]),)
    claims.run_missing(phases, tmp_path / "runs.csv", Now(), 1)
    shown = capsys.readouterr().err
    assert "a phase | 0 of about 2 runs | nf 1-1-1-1 0.0, batch 256, rate 0.1, seed 0: 89.9 %" in shown
    assert "processor hours left" in shown


def test_a_missing_data_set_is_one_line_and_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path):
    def missing(train: bool) -> None:
        raise FileNotFoundError("Fashion-MNIST is not there")

    monkeypatch.setattr(claims, "load", missing)
    monkeypatch.setattr(claims.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sys, "argv", ["claims.py", "--csv", str(tmp_path / "runs.csv")])
    assert claims.main() == 1
    assert capsys.readouterr().err == "Fashion-MNIST is not there\n"


def test_the_rows_of_the_first_experiment_are_kept():
    assert sum(run.plan == 1 for run in ROWS) == 270


def test_the_committed_page_is_that_of_the_committed_rows_and_names_the_plans_commit():
    text = (claims.FOLDER.parent / "claims.md").read_text()
    assert text == page(ROWS, PLAN_COMMIT, signals.section(claims.FOLDER))
    drawn = {f"{index}_{name}.png" for index, (name, each) in enumerate(FIGURES.items(), 1) if each.ready(ROWS)}
    assert set(re.findall(r"\(claims/(\w+\.png)\)", text)) - {"ratios.png", "signals.png"} == drawn
    assert {file.name for file in claims.FOLDER.glob("?_*.png")} == drawn


@pytest.mark.slow  # not slow, but needs the history, which a shallow clone lacks
def test_the_plans_commit_added_the_plan_and_is_before_all_rows_of_plan_2():
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout

    added = git("log", "--diff-filter=A", "--format=%H", "--", "docs/claims/plan.md").split()
    assert added == [PLAN_COMMIT]
    at_plan = git("show", f"{PLAN_COMMIT}:docs/claims/runs.csv")
    assert {line.partition(",")[0] for line in at_plan.splitlines()} == {"plan", "1"}


def test_a_page_of_a_complete_plan_decides_every_part_and_draws_every_figure(
    complete: tuple[Rows, list[Run]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = {run: each for run, each in ROWS.items() if run.plan == 1} | complete[0]
    monkeypatch.setattr(pages, "PLAN_COMMIT", "a commit")
    pages.write_page(rows, tmp_path / "claims")
    text = (tmp_path / "claims.md").read_text()
    assert "as a commit." in text
    assert "not run yet:" not in text
    parts = [part for say in CLAIMS.values() for part in say(rows)]
    assert len(re.findall(r"^\| \d \| .*(holds|does not hold|not decided)", text, re.MULTILINE)) == len(parts) > 50
    counts = re.findall(r"^\| \d \| [^|]+((?:\| *\d* ){4})\|$", text, re.MULTILINE)
    assert len(counts) == len(CLAIMS)
    assert sum(int(number) for line in counts for number in re.findall(r"\d+", line)) == len(parts)
    assert len(list((tmp_path / "claims").glob("*.png"))) == len(FIGURES) == len(CLAIMS)
    assert "Its comparison with a batch-normalised twin was unfair" in text


def test_what_was_explored_after_the_plan_decides_nothing(complete: tuple[Rows, list[Run]], tmp_path: Path):
    planned_only = {run: each for run, each in ROWS.items() if run.plan == 1} | complete[0]
    pool = Now()
    claims.write(tmp_path / "runs.csv", planned_only)
    rows = claims.run_missing((*PHASES, *grid.EXPLORED), tmp_path / "runs.csv", pool, 2)
    assert pool.ran == [replace(grid.without_gains(rows), seed=seed) for seed in SEEDS]
    assert {(run.batch, run.lr) for run in grid.layers_at_linear(rows).values()} == {(LARGEST, 1.6)}
    before, after = page(planned_only, "a commit"), page(rows, "a commit")
    verdicts = re.compile(r"^\| \d \| .*", re.MULTILINE)
    assert verdicts.findall(after) == verdicts.findall(before)
    assert "## After the plan: skip gains" not in before
    _, gains, layers = after[: after.index("## The first experiment")].split("## After the plan")
    assert "decide nothing" in gains
    assert "Spared minus clipped, paired by seed: +0.00 (+0.00 to +0.00), within 1 point." in gains
    assert "decide nothing" in layers
    assert "| everything | 88.4 ± 0.0 | 88.4, 88.4, 88.4 |" in layers
    assert len(re.findall(r"^\| (?:all but )?(?:stage \d|the )", layers, re.MULTILINE)) == 2 * len(PARTS)


def test_the_rows_say_what_other_pages_say_of_them_in_words():
    """docs/concepts/why.md, "What was seen here", and docs/agc.md about skip gains."""
    parts = {part.statement: part for say in CLAIMS.values() for part in say(ROWS)}
    verdicts = {statement: part.verdict(ROWS) for statement, part in parts.items()}
    held = [
        *(f"linear rule, batch {batch}: unclipped is below clipped" for batch in (1024, 2048, 4096)),
        *(f"batch {batch}: NF is better than the twin" for batch in (2, 4)),
        *(
            statement
            for statement in parts
            if "of the two factors chosen" in statement or "the larger one" in statement
        ),
        "sparing the classifier's weight is better",
    ]
    assert len(held) == 8
    assert {verdicts[statement][1] for statement in held} == {"**holds**"}
    assert "above" in verdicts[f"linear rule, batch {LARGEST}: clipped is as good as the twin"][0]
    for batch in (512, 1024, 2048, 4096):
        behind = parts[f"best rates, batch {batch}: clipped is as good as the twin"]
        assert -3 < behind.differences(ROWS).mean < -1
        assert behind.differences(ROWS).worse
    alike = [s for s in parts if s.startswith(("unit-wise", "depth 1-1-5-1", "stochastic depth", "standardised"))]
    assert len(alike) == 7
    assert all("within 1 point" in verdicts[statement][0] for statement in alike)
    gained = Part("", "better", [grid.without_gains(ROWS)], behind.above).differences(ROWS)
    assert gained.mean == pytest.approx(-behind.differences(ROWS).mean, abs=0.5)
    standard, plain = grid.drop_paths("nf")[0], grid.without_standardisation()
    shift = [np.mean([ROWS[run].mean_shift for run in grid.over(SEEDS, [setting])]) for setting in (standard, plain)]
    assert shift[1] / shift[0] == pytest.approx(5, abs=0.5)


def test_a_page_without_runs_says_so(tmp_path: Path):
    text = page({run: each for run, each in ROWS.items() if run.plan == 1}, "a commit")
    assert not re.search(r"^\| \d \| .*(holds|does not hold)", text, re.MULTILINE)
    assert "not run yet: 0 of 22 runs" in text
    assert ".png" not in text


def test_the_plan_states_its_phases_and_the_power_of_its_rule():
    plan, simulated = (claims.FOLDER / "plan.md").read_text(), claims.powers(ROWS)
    print(simulated)  # pytest -s
    assert simulated in plan
    assert claims.expected({}) in plan


# -- rule --------------------------------------------------------------------------------------------------------------


def test_intervals_are_students():
    d = Differences.of([1.0, 2.0, 3.0])  # mean 2, standard error 1 / sqrt(3), t of two degrees 4.3027 and 2.9200
    assert d.interval(0.95) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert d.interval(0.9) == pytest.approx((2 - 2.92 / 3**0.5, 2 + 2.92 / 3**0.5), abs=1e-4)


@pytest.mark.parametrize(
    ("mean", "outcomes", "found"),
    [  # spread 0.3, five seeds: 95 % interval mean +- 0.37, 90 % interval mean +- 0.29
        (0.0, ("does not hold", "holds", "holds"), "within 1 point"),
        (0.5, ("holds", "holds", "holds"), "above and within 1 point"),
        (1.0, ("holds", "holds", "not decided"), "above"),
        (1.5, ("holds", "holds", "does not hold"), "above"),
        (-0.5, ("does not hold", "holds", "holds"), "below and within 1 point"),
        (-1.0, ("does not hold", "not decided", "not decided"), "below"),
        (-1.5, ("does not hold", "does not hold", "does not hold"), "below"),
    ],
)
def test_every_statement_can_come_out_both_ways(mean: float, outcomes: tuple[str, ...], found: str):
    d = Differences(mean, 0.3, 5)
    assert tuple(decide(kind, d) for kind in ("better", "as good", "little")) == outcomes
    assert d.found == found


def test_seeds_to_decide_is_the_smallest_number_that_does():
    d = Differences(1.0, 3.0, 5)
    needed = seeds_to_decide("better", d)
    assert needed
    assert decide("better", replace(d, seeds=needed)) != "not decided"
    assert decide("better", replace(d, seeds=needed - 1)) == "not decided"
    assert seeds_to_decide("little", Differences(1.0, 3.0, 5)) is None


@pytest.mark.parametrize("spread", [0.4, 1.7])
def test_wrong_verdicts_are_as_rare_as_the_plan_says(spread: float):
    # 1000 simulations: 2.5 % and 5 % are found within 1.5 and 2.1 points in all but 2 of 1000 cases
    assert simulate("better", 0.0, spread, 5)["holds"] < 0.04
    assert simulate("as good", -1.0, spread, 5)["holds"] < 0.071
    assert simulate("little", 1.0, spread, 5)["holds"] < 0.071


def test_the_rule_finds_what_is_there_at_the_spread_of_batch_256():
    spread = grid.paired_spread(ROWS, 256)
    assert 0.3 < spread < 0.5
    assert simulate("better", 1.0, spread, 5)["holds"] > 0.9
    assert simulate("as good", 0.0, spread, 5)["holds"] > 0.9
    assert simulate("as good", -2.0, spread, 5)["does not hold"] > 0.9
    assert simulate("little", 0.0, spread, 5)["holds"] > 0.9
