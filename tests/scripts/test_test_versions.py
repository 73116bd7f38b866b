"""`python -m scripts.test_versions`: its rows, what it makes of a report, and the table in the page."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts import test_versions as script

REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="one"/><testcase classname="tests.a" name="two"/>
<testcase classname="tests.a" name="three"><failure message="no"/></testcase>
<testcase classname="tests.b" name="four"><error message="no"/></testcase>
<testcase classname="tests.b" name="five"><skipped message="needs
 torch 2.9"/></testcase>
<testcase classname="tests.b" name="six"><skipped message="needs torch 2.9"/></testcase>
</testsuite></testsuites>"""
VERSIONS = dict.fromkeys(("python", *script.SHOWN), "1.2")


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results.json")
    script.PAGE.write_text(f"before\n{script.BEGIN}old\n{script.END}after\n")
    return script.PAGE


def test_every_lower_bound_is_tried_by_a_row():
    tried = {(name, version) for pins in script.rows().values() for name, version in pins.items()}
    assert set(script.oldest().items()) <= tried
    assert {"torch", "timm", "huggingface_hub", "numpy", "safetensors", "typer", "matplotlib"} <= script.oldest().keys()


def test_only_a_row_that_is_named_is_for_another_python(page, monkeypatch):
    tried = []

    def measure(name, pins, arguments):
        tried.append(name)
        raise subprocess.CalledProcessError(1, ["pip"])

    monkeypatch.setattr(script, "measure", measure)
    script.main([])
    assert {*tried, script.NEWEST_PYTHON} == set(script.rows())
    assert script.NEWEST_PYTHON not in tried
    script.main(["--only", script.NEWEST_PYTHON])
    assert tried[-1] == script.NEWEST_PYTHON


def test_a_report_becomes_counts_names_and_reasons():
    assert script.summary(REPORT) == {
        "passed": 2,
        "failed": ["tests.a.three", "tests.b.four"],
        "skipped": {"needs torch 2.9": 2},
    }


def test_rows_of_earlier_runs_stay_in_the_table(page):
    for name, passed in (("timm, oldest", 7), ("newest", 8), ("timm, oldest", 9)):
        row = {"date": "2026-01-02", "versions": VERSIONS, "pins": {}, "tests": [], "passed": passed}
        script.write(name, row | {"failed": ["tests.a.b"], "skipped": {"needs torch 2.9": 2}})
    text = page.read_text()
    assert text.startswith(f"before\n{script.BEGIN}")
    assert text.endswith(f"{script.END}after\n")
    assert [line.split(" | ")[0] for line in text.splitlines() if "2026-01-02" in line] == [
        "| newest",
        "| timm, oldest",
    ]
    assert "| timm, oldest | 2026-01-02 | 1.2 | 1.2 | 1.2 | 1.2 | 1.2 | 9 | 1 | 2 |" in text
    assert "- newest: skipped 2: needs torch 2.9." in text
    assert "- newest: failed `tests.a.b`." in text
    assert "old\n" not in text


def test_an_environment_gets_its_pins_runs_the_tests_and_is_deleted(page, tmp_path, monkeypatch, capsys):
    commands = []

    def fake_run(command, **options):
        commands.append(command)
        report = [part.partition("=")[2] for part in command if part.startswith("--junitxml=")]
        for file in report:
            (tmp_path / ".cache" / "versions" / "timm-oldest").mkdir(parents=True, exist_ok=True)
            Path(file).write_text(REPORT, encoding="utf-8")
        return SimpleNamespace(stdout=json.dumps(VERSIONS))

    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(
        script, "oldest", lambda: {"torch": "2.6", "timm": "1.0.27", "huggingface_hub": "2", "numpy": "2"}
    )
    monkeypatch.setattr(script.venv, "create", lambda folder, with_pip: folder.mkdir(parents=True))
    monkeypatch.setattr(script.subprocess, "run", fake_run)
    assert script.main(["--only", "timm, oldest", "--", "tests/layers"]) == 1  # two tests failed
    assert "timm==1.0.27" in commands[0]
    assert "tests/layers" in commands[-1]
    assert not list((tmp_path / ".cache" / "versions").iterdir())
    assert "- timm, oldest: only `tests/layers`." in page.read_text()
    assert "| timm, oldest |" in capsys.readouterr().out


def test_an_environment_that_cannot_be_made_does_not_stop_the_others(page, tmp_path, monkeypatch, capsys):
    def refuse(name, pins, arguments):
        raise subprocess.CalledProcessError(1, ["pip"])

    monkeypatch.setattr(script, "measure", refuse)
    assert script.main(["--only", "newest", "--only", "timm, oldest"]) == 1
    assert capsys.readouterr().err.count("returned non-zero") == 2
    assert page.read_text().count("old") == 1
