"""The loops of other people's tools, each with the real tool: Lightning, accelerate, transformers' Trainer."""

import os
import subprocess
from pathlib import Path

import pytest

from scripts.check_tools import environments
from tests.support import ROOT

REQUIREMENTS = ("lightning>=2.6", "accelerate>=1.15", "transformers>=5.24")
LOOPS = sorted(Path(__file__).parent.glob("*_loop.py"))


@pytest.fixture(scope="module")
def python():
    return environments.install("loops", REQUIREMENTS)


@pytest.mark.slow  # installs the tools
@pytest.mark.parametrize("file", [f for f in LOOPS if not f.name.startswith("test_")], ids=lambda f: f.stem)
def test_the_loop_trains_as_the_formula_says(file, python):
    # a warning of ours is an error, those of the tools about themselves are not
    warnings = ["-o", "filterwarnings=default\nerror:.*clip_exempt", "-p", "no:cacheprovider"]
    command = [str(python), "-m", "pytest", "-q", "-n0", *warnings, str(file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout
