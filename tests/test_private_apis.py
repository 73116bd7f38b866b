"""Private names of other libraries: each is in CONTRIBUTING.md with its reason, and each is still there."""

import ast
import importlib
import inspect
import re
from functools import reduce
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "timm_nf"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# | `owner`, dotted | `name` | where | why |
ROWS = re.findall(
    r"^\| `([\w.]+)` \| `(_\w+)` \| (`[^|]+) \| [^|]+ \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
)


def names_of_ours() -> set[str]:
    """Every name that the package itself defines or assigns."""
    found: set[str] = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return found


DOCUMENTED = {"_asdict", "_replace"}  # of named tuples, public for all their underscore


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def private_names(source: Path, ours: set[str]) -> set[str]:
    """Private names of others in a file: attributes, also by `getattr`, and parts of modules that it imports from."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in ours:
            found.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value) and name.value not in ours:
                found.add(name.value)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {part for part in node.module.split(".") if is_private(part)}
            found |= {alias.name for alias in node.names if is_private(alias.name)}
    return found


def test_every_private_name_is_in_the_table_with_its_file():
    ours = names_of_ours()
    used = {(name, str(f.relative_to(PACKAGE))) for f in SOURCES for name in private_names(f, ours)}
    listed = {(name, file) for _, name, files in ROWS for file in re.findall(r"`([\w/]+\.py)`", files)}
    assert used - listed == set(), "use a public form, or give each a row in CONTRIBUTING.md"


@pytest.mark.parametrize(("owner", "name", "files"), ROWS, ids=[f"{owner}.{name}" for owner, name, _ in ROWS])
def test_a_private_name_is_still_there(owner: str, name: str, files: str):
    for file in re.findall(r"`([\w/]+\.py)`", files):
        assert re.search(rf"\b{name}\b", (PACKAGE / file).read_text()), f"{file} does not use {name}: remove its row"
    assert has(owner, name), f"{owner} has no {name} in this version: {files} needs another way"


def has(owner: str, name: str) -> bool:
    """Whether a module, a class or an object by its dotted name has an attribute, or a submodule, of this name."""
    parts = owner.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        found = reduce(getattr, parts[cut:], found)
        if hasattr(found, name):
            return True
        if isinstance(found, type):  # an attribute that its instances get
            return any(re.search(rf"\b{name}\b", inspect.getsource(c)) for c in found.__mro__ if c is not object)
        try:
            return bool(importlib.import_module(f"{owner}.{name}"))
        except ModuleNotFoundError:  # an attribute that the module gives to other objects
            return name in re.findall(r"\w+", inspect.getsource(found))
    return False
