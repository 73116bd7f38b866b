"""One throw-away environment a tool, which sees the packages of this interpreter, and one process a probe in it."""

import json
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".cache" / "check_tools"
# No tool may bring another torch: it would be another one than what the numbers of this project belong to.
PINNED = ("torch", "torchvision", "timm", "numpy")
SECONDS = 900  # for one installation or one probe
MARK = "check_tools: "  # what stands before the answer on a probe's output; tools print as well


class ToolError(Exception):
    """A tool does not install, or its probe ended without an answer; the message is one line."""


class Row(NamedTuple):
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
    """What a probe found out about its tool."""

    versions: str
    rows: list[Row]


def python_of(environment: Path) -> Path:
    """The interpreter of a virtual environment."""
    return environment / ("Scripts" if os.name == "nt" else "bin") / "python"


def install(name: str, requirements: tuple[str, ...], folder: Path = FOLDER) -> Path:
    """Make an environment with these requirements and return its Python; without any, this interpreter.

    Args:
        name: Of the environment's folder.
        requirements: As pip takes them.
        folder: Where environments live. A complete one of the same requirements is used again.

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
    pip = [str(python_of(environment)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "--constraint", str(pins), *requirements])
    ready.write_text("\n".join(requirements))
    return python_of(environment)


def ask(name: str, python: Path, module: str = "scripts.check_tools.probes") -> Answer:
    """Run one probe as a process of its own.

    Args:
        name: Of the probe.
        python: Of the tool's environment.
        module: What is run as `python -m MODULE NAME`.

    Raises:
        ToolError: if the process ends without an answer, with the last line that it printed.
    """
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
    printed = _run([str(python), "-W", "ignore", "-m", module, name], os.environ | variables)
    answers = [line for line in printed.splitlines() if line.startswith(MARK)]
    if not answers:
        raise ToolError(f"the probe {name} ended without an answer")
    answer: dict[str, Any] = json.loads(answers[-1].removeprefix(MARK))
    return Answer(answer["versions"], [Row(*row) for row in answer["rows"]])


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
