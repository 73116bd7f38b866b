"""What is public is written down: tests/public_names.txt lists the names of every public module."""

import importlib
import pkgutil

import pytest

import timm_nf
from tests.support import ROOT

LIST = ROOT / "tests" / "public_names.txt"
WRITE = "python -m tests.test_public_names"


def public_modules() -> list[str]:
    found = [module.name for module in pkgutil.walk_packages(timm_nf.__path__, "timm_nf.")]
    return ["timm_nf", *sorted(name for name in found if not any(part.startswith("_") for part in name.split(".")))]


def public_names() -> str:
    lines = [f"{name}: {' '.join(sorted(importlib.import_module(name).__all__))}" for name in public_modules()]
    return "\n".join(lines) + "\n"


def test_the_public_names_are_those_that_are_written_down():
    assert public_names() == LIST.read_text(), f"if the change is wanted, {WRITE}, and say it in CHANGELOG.md"


@pytest.mark.parametrize("name", public_modules())
def test_a_public_module_has_all_that_it_names_and_names_nothing_private(name: str):
    module = importlib.import_module(name)
    assert not [each for each in module.__all__ if not hasattr(module, each)]
    assert not [each for each in module.__all__ if each.startswith("_") and each != "__version__"]


if __name__ == "__main__":
    LIST.write_text(public_names())
