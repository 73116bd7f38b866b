"""What the tests of the optimizers and of the Hub need around them."""

import os
import random
import subprocess
import sys
import time
import warnings

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.support import ROOT, stand_in_hub

# The same examples in every run, however slow the machine is: one that fails once fails always.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Before any fixture: what is drawn without a seed does not depend on the tests that this process ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def no_compiler():
    """Kron compiles four small functions; no test here may need a C++ compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def known_optimizer_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*opt_einsum.*")  # timm's Kron, if that is not installed
        warnings.filterwarnings("ignore", message=r"Using backward\(\) with create_graph=True")  # Adahessian needs it
        yield


class _Clock:
    """The module time, but for sleep: the Hub's client waits 1 to 8 s before it tries again."""

    def __init__(self):
        self.slept = []

    def sleep(self, seconds):
        self.slept.append(seconds)

    def __getattr__(self, name):
        return getattr(time, name)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in Hub that this process' client talks to, with a cache of its own, logged in as alice."""
    clock = _Clock()
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", clock)
    with stand_in_hub.running() as server, warnings.catch_warnings():
        # the client's, about what it calls in its own HTTP library
        warnings.filterwarnings("ignore", message="Use 'content=<...>' to upload raw", category=DeprecationWarning)
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_DOWNLOAD_TIMEOUT": 600,  # after 10 s it would ask again, and a busy machine may take them
            "HF_HUB_ETAG_TIMEOUT": 600,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_STORED_TOKENS_PATH": str(tmp_path / "tokens"),
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_aliceSecretToken")
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        server.slept = clock.slept
        yield server


@pytest.fixture
def client(hub, tmp_path):
    """Starts Python in the environment of someone who uses this Hub."""
    started = []

    def start(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        environment = {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_aliceSecretToken",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "600", "HF_HUB_ETAG_TIMEOUT": "600",
            "PYTHONPATH": str(ROOT), **environment,
        }  # fmt: skip
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(
            subprocess.Popen([sys.executable, "-c", code, *arguments], env=os.environ | environment, **pipes)
        )
        return started[-1]

    yield start
    for process in started:
        with process:  # closes its pipe, which may be closed already, and waits
            process.kill()
