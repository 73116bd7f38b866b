"""What `make gpu` runs, tried on a CPU in small sizes: a mistake in it shows before there is a device."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from tests.support import ROOT
from timm_nf.inference import bench

PAGE = ROOT / "docs/gpu.md"


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_every_part_is_measured_on_a_cpu_and_the_page_holds_its_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "_PAUSE", 0)
    sizes = gpu.TINY._replace(pixels={"nfnet_f0": 32})
    rows = [row for part in gpu.PARTS for row in gpu.in_this_process(part, "cpu", sizes)]
    assert [row[:4] for row in rows] == [case for part in gpu.PARTS for case in gpu.cases(part, sizes)]
    for row in rows:
        assert row.note == ""
        assert all(x is not None and x >= 0 for x in row[4:8])
    gpu.write(tmp_path, gpu.measured(rows, "the command"), None)
    gpu.write_csv(tmp_path, rows)
    page = (tmp_path / "gpu.md").read_text()
    assert all(gpu.line(row) in page for row in rows)
    assert "`the command`" in page
    assert "- driver: " in page
    with (tmp_path / "gpu.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["ours_ms"]) for row in table] == [row.ours_ms for row in rows]


def test_all_of_the_work_that_was_promised_is_a_row() -> None:
    rows = {case[1:] for part in gpu.PARTS for case in gpu.cases(part, gpu.FULL)}
    for network in ("nfnet_f0", "dm_nf_resnet50"):
        assert rows >= {(work, network, batch) for work in ("eager", "compiled") for batch in (8, 32, 128)}
        assert rows >= {("bfloat16", network, batch) for batch in (1, 64)}
        assert rows >= {("clip", network, None), ("clip and step", network, None)}


def one(monkeypatch: pytest.MonkeyPatch, build: Any) -> gpu.CaseResult:
    monkeypatch.setattr(bench, "_PAUSE", 0)
    monkeypatch.setitem(gpu.PARTS, "clipping", (build, 1))
    return gpu.measure(gpu.Case("clipping", "clip", "nfnet_f0"), "cpu", gpu.TINY)


@pytest.mark.parametrize(
    ("error", "note"),
    [(torch.OutOfMemoryError("too large"), "timm: out of memory"), (KeyError("x"), "timm: stopped, KeyError: 'x'")],
    ids=["memory", "other"],
)
def test_what_stops_one_contender_is_a_note_and_the_other_is_timed(
    error: Exception, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(case: gpu.Case, ours: bool, *_: Any) -> Any:
        if not ours:
            raise error
        return lambda: torch.ones(10).sum()

    row = one(monkeypatch, build)
    assert row.note == note
    assert row.timm_ms is row.timm_mib is None
    assert row.ours_ms is not None
    assert row.ours_ms > 0
    assert gpu.line(row).endswith(f"| {note} |")


def test_a_part_without_time_is_ended_and_its_rows_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(gpu.in_a_process("clipping", "cpu", True, 0.1))
    assert [row[:4] for row in rows] == gpu.cases("clipping", gpu.TINY)
    assert {row.note for row in rows} == {"cut, its part had 0 s"}


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cuda:77", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.main()
    error = capsys.readouterr().err
    assert "cuda:77 is no device of this machine" in error
    assert "--device cpu --tiny" in error
    assert not list(tmp_path.iterdir())


def test_the_page_says_what_was_measured_or_that_nothing_was() -> None:
    page = PAGE.read_text()
    before, counted = page.split(gpu.COUNTED)
    assert page == gpu.PAGE.format(measured=before.split("## Measured\n\n")[1], counted=counted)
    assert ("not measured yet" in page) != (PAGE.with_suffix(".csv").exists())


@pytest.mark.slow
def test_the_page_holds_the_counts_that_the_command_writes() -> None:
    assert PAGE.read_text().split(gpu.COUNTED)[1] == gpu.predicted()


# What a CPU does in the same way twice, or slowly: test_all_tests... below runs everything.
SLOW_ON_CPUS = "verify or compiled or kernels or 1536 or 40000 or agcadamw or agclamb or sharded"


def passed(*arguments: str) -> int:
    run = python(
        "-m", "pytest", "-c", "tests/gpu/pytest.ini", "tests/gpu", "-q", "-p", "no:xdist", *arguments,
        TIMM_NF_DEVICE="cpu",
    )  # fmt: skip
    (found,) = re.findall(r"^(\d+) passed", run.stdout, re.MULTILINE) or [run.stdout + run.stderr]
    assert run.returncode == 0, found
    return int(found)


def test_the_tests_for_a_device_pass_on_a_cpu_as_far_as_they_are_quick() -> None:
    assert passed("-k", f"not ({SLOW_ON_CPUS})") > 60


@pytest.mark.slow
def test_the_tests_for_a_device_pass_on_a_cpu() -> None:
    assert passed() > 120


@pytest.mark.slow
def test_the_command_measures_all_parts_on_a_cpu(tmp_path: Path) -> None:
    run = python("-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--minutes", "60", "--folder", str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    with (tmp_path / "gpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(gpu.cases(part, gpu.TINY)) for part in gpu.PARTS)
    assert not [row for row in rows if row["note"]]
