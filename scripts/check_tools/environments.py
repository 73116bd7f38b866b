"""Makes an environment for each tool, which also sees this interpreter's packages, and runs the tool's probe in it."""

import json
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from scripts.environments import PIP_INSTALL, python_of

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".cache" / "check_tools"
# All tools use the same versions of these, so that their numbers can be compared.
PINNED = ("torch", "torchvision", "timm", "numpy")
SECONDS = 900  # for one installation or one probe
MARK = "check_tools: "  # begins the line with the answer, as tools print lines too


class ToolError(Exception):
    """A tool does not install, or its probe ended without an answer. The message is one line."""


class Outcome(NamedTuple):
    """One line of the page.

    Attributes:
        what: The call that was tried.
        verdict: `as it is`, `fuse first` or `not`.
        measured: The numbers or the errors behind the verdict.
    """

    what: str
    verdict: str
    measured: str


class Answer(NamedTuple):
    """The answer of a probe: the tool's versions, its rows of the page, and the machine that it ran on."""

    versions: str
    rows: list[Outcome]
    machine: str


def install(name: str, requirements: tuple[str, ...], folder: Path = FOLDER) -> Path:
    """Make an environment and return its interpreter. Without requirements, return this interpreter.

    Args:
        name: Name of the environment's folder.
        requirements: Requirements for pip.
        folder: The folder of all environments. An environment with the same requirements is used again.

    Raises:
        ToolError: if pip fails, with its last line.
    """
    if not requirements:
        return Path(sys.executable)
    environment = folder / name
    ready = environment / "requirements.txt"
    if ready.is_file() and ready.read_text().split() == list(requirements):
        return python_of(environment)
    _run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(environment)])
    (packages,) = environment.glob("**/site-packages")
    (packages / "host.pth").write_text(sysconfig.get_path("purelib"))
    pins = environment / "pinned.txt"
    pinned = [package for package in PINNED if not any(needed.startswith(package) for needed in requirements[1:])]
    pins.write_text("".join(f"{package}=={version(package).partition('+')[0]}\n" for package in pinned))
    pip = [str(python_of(environment)), *PIP_INSTALL]
    _run([*pip, "--constraint", str(pins), *requirements])
    ready.write_text("\n".join(requirements))
    return python_of(environment)


def ask(name: str, python: Path, module: str = "scripts.check_tools.probes") -> Answer:
    """Run a probe in its own process.

    Args:
        name: Name of the probe.
        python: Interpreter of the tool's environment.
        module: The module that runs as `python -m MODULE NAME`.

    Raises:
        ToolError: if the process ends without an answer, with its last line of output.
    """
    variables = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "0",
        "TORCH_EXTENSIONS_DIR": str(FOLDER / "extensions"),  # removed afterwards, like the environments
    }
    printed = _run([str(python), "-W", "ignore", "-m", module, name], os.environ | variables)
    answers = [line for line in printed.splitlines() if line.startswith(MARK)]
    if not answers:
        raise ToolError(f"the probe {name} ended without an answer")
    answer: dict[str, Any] = json.loads(answers[-1].removeprefix(MARK))
    return Answer(answer["versions"], [Outcome(*row) for row in answer["rows"]], answer["machine"])


def _run(command: list[str], environment: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ToolError(f"not ready after {SECONDS} seconds") from None
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR: ")] or lines
        raise ToolError(errors[-1].strip() if errors else f"{command[0]} ended with code {done.returncode}")
    return done.stdout
