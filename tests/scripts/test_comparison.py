"""What scripts/comparison stands on: its reference, its processes, its tables. No network."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import timm_nf
from scripts.comparison import __main__ as comparison
from scripts.comparison import (
    features,
    measure,
)
from scripts.comparison.peers import PEERS, Absent, Peer, PeerError, Worker, install, remaining
from scripts.comparison.worker import from_haiku, to_haiku
from tests.support import ROOT

SAMPLES = measure.samples()


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    process = Worker(PEERS["timm_nf"], sys.executable)
    yield process
    process.close()


# -- the reference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_the_reference_is_our_clipping_in_float64(name: str):
    weight, grad = SAMPLES[name]
    p = torch.nn.Parameter(torch.from_numpy(np.array(weight)))
    p.grad = torch.from_numpy(grad.copy())
    timm_nf.adaptive_clip_grad_(p, measure.FACTOR, measure.EPS)
    np.testing.assert_allclose(p.grad.numpy(), measure.clip_reference(weight, grad), rtol=1e-13)


def test_every_sample_is_clipped_and_some_only_in_part():
    same = {name: np.isclose(measure.clip_reference(*pair), pair[1], rtol=1e-12) for name, pair in SAMPLES.items()}
    assert not [name for name, equal in same.items() if equal.all()]
    assert all(same[name].any() for name in SAMPLES if name.startswith(("convolution (", "1x1", "linear")))


def test_the_reference_keeps_the_bound_by_hand():
    weight = np.array([[3.0, 4.0], [0.0, 0.0]])  # norms 5 and, floored, 1e-3
    grad = np.array([[0.0, 1.0], [0.0, 1.0]])
    np.testing.assert_allclose(measure.clip_reference(weight, grad), [[0.0, 0.05], [0.0, 1e-5]], rtol=1e-14)


# -- the processes -----------------------------------------------------------------------------------------------------


def test_a_process_clips_the_samples_as_the_reference_does(worker: Worker, tmp_path: Path):
    clipped = measure.clip(worker, SAMPLES, tmp_path)
    for name, (weight, grad) in SAMPLES.items():
        np.testing.assert_allclose(clipped[name], measure.clip_reference(weight, grad), rtol=1e-13, err_msg=name)


def test_a_process_times_clipping(worker: Worker, tmp_path: Path):
    np.savez(tmp_path / "one.npz", **{"p|w": np.ones((4, 3)), "g|w": np.ones((4, 3))})
    worker.ask("load", source=str(tmp_path / "one.npz"))
    start = time.perf_counter()
    seconds = worker.ask("time", scale=1.0)
    assert 0 < seconds < time.perf_counter() - start  # it was asked in between


def test_an_error_in_a_process_is_one_line_and_the_process_goes_on(worker: Worker):
    with pytest.raises(PeerError, match=r"^FileNotFoundError: .*nowhere\.npz'$"):
        worker.ask("load", source="nowhere.npz")
    assert worker.ask("versions")["version"] == timm_nf.__version__


def test_a_process_that_ended_says_with_which_words(tmp_path: Path):
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\necho no such interpreter >&2\nexit 3\n")
    silent.chmod(0o755)
    process = Worker(PEERS["timm"], str(silent))
    with pytest.raises(PeerError, match="ended with code 3: no such interpreter"):
        process.ask("versions")
    process.close()


def test_a_package_that_does_not_install_is_a_row_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    absent = Peer("absent", "nothing", ("timm-nf-no-such-package==1.0",))
    with pytest.raises(PeerError, match="No matching distribution found for timm-nf-no-such-package") as error:
        install(absent, tmp_path)
    peer = Absent(str(error.value))
    cells = measure.clip_errors(peer, tmp_path)
    assert len(cells) == len(measure.clip_cases())
    assert all(cell.startswith("did not install: ERROR: No matching") for cell in cells)
    assert features.cell(peer, "networks").startswith("fails: did not install")


def test_what_needs_no_installing_runs_in_this_interpreter(tmp_path: Path):
    assert install(PEERS["timm"], tmp_path) == sys.executable
    assert not list(tmp_path.iterdir())


def test_requirements_are_left_out_by_their_whole_name():
    declared = ["torch<2.7.1,>=2.6.0", "torchmetrics>=1.0", "torch_optimizer", "x; extra == 'dev'"]
    assert remaining(declared, ("torch",)) == ["torchmetrics>=1.0", "torch_optimizer", "x; extra == 'dev'"][:2]


@pytest.mark.parametrize("name", SAMPLES)
def test_the_authors_layout_there_and_back_is_the_same_array(name: str):
    weight, _ = SAMPLES[name]
    haiku = to_haiku(name, np.asarray(weight))
    np.testing.assert_array_equal(from_haiku(name, haiku, np.shape(weight)), weight)
    assert not name.endswith("gain") or haiku.ndim <= 1


# -- the page ----------------------------------------------------------------------------------------------------------


def test_a_cell_keeps_to_its_line_and_column():
    assert comparison.table(["a", "b"], [["x|y", "two\nlines"]]) == "| a | b |\n| --- | --- |\n| x\\|y | two lines |"


def test_what_became_of_an_infinite_unit_is_told_apart():
    before = np.array([np.inf, 1.0])
    assert measure.what_became(before, before.copy()) == "stays as it is"
    assert measure.what_became(before, np.array([np.nan, 0.0])) == "nan, its other entries 0"
    assert measure.what_became(before, np.array([0.0, 0.0])) == "becomes finite"


def test_changes_equal_to_the_golden_ones_have_no_error():
    golden = np.load(measure.GOLDEN / "sgd_agc_nfnet_F0_2x32x32.npz")

    after: dict[str, dict[str, np.ndarray]] = {}
    for key in golden.files:
        if key.startswith("param3|"):
            _, module, name = key.split("|")
            after.setdefault(module, {})[name] = golden[key][1:]
    before = {module: {name: entry + 1 for name, entry in entries.items()} for module, entries in after.items()}
    assert measure.change_errors(before, after, golden) == [0.0] * len(measure.TYPES)
    assert measure.change_errors(before, before, golden) == pytest.approx([1.0] * len(measure.TYPES))


def test_the_page_is_of_this_script():
    page = (ROOT / "docs" / "comparison.md").read_text()
    titles = [*features.READ, *(row[0] for row in features.ASKED), *measure.clip_cases(), *PEERS, *features.COLUMNS]
    assert not [title for title in titles if f"| {title} |" not in page]
    assert not [peer.clipping for peer in PEERS.values() if f"| {peer.clipping} |" not in page]


def test_every_feature_has_a_cell_for_every_package():
    for cells, _ in features.READ.values():
        assert set(cells) == set(features.COLUMNS)
    measured = {"classifier", "decayed_gains"}  # by benchmarks/differences.py, for the first two
    for _, question, asked, read, _ in features.ASKED:
        first_two = set(features.COLUMNS[:2]) if question in measured else set()
        assert set(asked) | set(read) | first_two == set(features.COLUMNS), question
