"""What the package imports from elsewhere is what pyproject.toml declares."""

import ast
import re
import sys
import tomllib
from pathlib import Path

from tests.support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORTED_AS = {"PyYAML": "yaml", "Pillow": "PIL"}
# Brought by what is declared: torch brings triton where it can use it, typer brings rich.
BROUGHT = {"triton", "rich"}


def declared(lines: list[str]) -> set[str]:
    names = {re.split(r"[\[<>=; ]", line)[0] for line in lines}
    return {IMPORTED_AS.get(name, name) for name in names}


def imported(file: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"timm_nf"}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    everything = set[str]().union(*(imported(file) for file in (ROOT / "timm_nf").rglob("*.py")))
    extras = PROJECT["optional-dependencies"]
    optional = declared(extras["cli"] + extras["export"] + extras["demo"]) - {"timm_nf"}
    assert everything - optional - BROUGHT == declared(PROJECT["dependencies"])
