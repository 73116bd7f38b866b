"""The workflows of .github. They cannot run here: `make workflows` checks their syntax, and this what they call."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.test_versions import rows
from tests.support import ROOT
from tests.test_makefile import TARGETS

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def jobs(file: Path) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_calls_make_and_nothing_else_but_pip(file: Path):
    commands = [step["run"] for job in jobs(file).values() for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        if command == 'python -m pip install -e ".[test]"':  # where there is no virtual environment with a bin folder
            continue
        assert "\n" not in command
        program, *arguments = re.sub(r'\w+=("[^"]*"|\S+)', "", command).split()
        assert program == "make"
        assert set(arguments) <= set(TARGETS)


def matrix(job: str) -> dict[str, list[str]]:
    return jobs(ROOT / ".github" / "workflows" / "tests.yml")[job]["strategy"]["matrix"]


def test_every_python_that_the_package_names_is_tried():
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.fullmatch(r".* :: 3\.\d+", line)]
    assert matrix("linux")["python"] == named


def test_the_rows_of_older_torch_are_those_of_the_script():
    assert matrix("torch")["row"] == [name for name, pins in rows().items() if "torch" in pins]


def test_macos_and_windows_are_tried():
    assert {name.partition("-")[0] for name in matrix("elsewhere")["os"]} == {"macos", "windows"}
