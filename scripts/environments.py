"""Virtual environments: where their interpreter is, how pip is called in them, and commands that are shown."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PIP_INSTALL = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
"""What follows an interpreter in the command that installs packages."""


def python_of(environment: Path) -> Path:
    """The interpreter of a virtual environment."""
    return environment / ("Scripts" if os.name == "nt" else "bin") / "python"


def show(*command: str | Path) -> None:
    """Print a command on stderr, before it runs."""
    print("$", *command, file=sys.stderr, flush=True)


def run(*command: str | Path, **options: Any) -> str:
    """Show a command, run it, and return what it printed on stdout.

    Args:
        *command: The command.
        **options: Of `subprocess.run`.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    show(*command)
    done = subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True, **options)
    return done.stdout
