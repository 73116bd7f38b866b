"""The reference has every public name, and says of it what a user has to know."""

import ast
import doctest
import importlib
import inspect
import itertools
import re

import pytest

from scripts.site import reference


def test_every_public_name_is_in_the_reference():
    text = "\n".join(reference.pages().values())
    explained = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    linked = set(re.findall(r"^- \[`\w+`\]\[(\S+)\]$", text, re.MULTILINE))
    for module, names in reference.public_names().items():
        section = text[re.search(rf"^##? {re.escape(module)}$", text, re.MULTILINE).end() :]  # type: ignore[union-attr]
        section = re.split(r"^##? ", section, maxsplit=1, flags=re.MULTILINE)[0]
        missing = [name for name in names if not re.search(rf"(\.{name}$|`{name}`)", section, re.MULTILINE)]
        assert not missing, module
    assert linked <= explained


def explained() -> dict[str, object]:
    """What each entry of the reference explains."""
    names = re.findall(r"^::: (\S+)$", "\n".join(reference.pages().values()), re.MULTILINE)
    return {full: getattr(importlib.import_module(full.rpartition(".")[0]), full.rpartition(".")[2]) for full in names}


EXPLAINED = explained()
FUNCTIONS = {full: each for full, each in EXPLAINED.items() if inspect.isfunction(inspect.unwrap(each))}  # type: ignore[arg-type]


def docstring_of_data(full: str) -> str | None:
    """The string below an assignment, which Python itself drops."""
    module, _, name = full.rpartition(".")
    body = list(ast.parse(reference.source(module).read_text()).body)
    for node, after in itertools.pairwise(body):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
    return None


@pytest.mark.parametrize("full", EXPLAINED)
def test_every_public_name_has_a_docstring(full: str):
    each = EXPLAINED[full]
    assert inspect.getdoc(each) if inspect.isroutine(each) or inspect.isclass(each) else docstring_of_data(full)


@pytest.mark.parametrize("full", FUNCTIONS)
def test_every_public_function_has_types(full: str):
    signature = inspect.signature(inspect.unwrap(FUNCTIONS[full]))  # type: ignore[arg-type]
    assert signature.return_annotation is not inspect.Signature.empty
    assert not [p.name for p in signature.parameters.values() if p.annotation is inspect.Parameter.empty]


def raised(function: object) -> set[str]:
    """The kinds of error that a function raises by itself."""
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(inspect.unwrap(function))))  # type: ignore[arg-type]
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return {ast.unparse(node.exc.func) for node in nodes}  # type: ignore[union-attr]


@pytest.mark.parametrize("full", [full for full in FUNCTIONS if raised(FUNCTIONS[full])])
def test_a_function_that_raises_says_so(full: str):
    doc = inspect.getdoc(FUNCTIONS[full]) or ""
    assert "Raises:" in doc
    section = doc.split("Raises:")[1]
    assert not [kind for kind in raised(FUNCTIONS[full]) if f"{kind}:" not in section.replace("`", "")]


# What a reader meets first: the functions of the package itself, and of the modules that it hands on.
FIRST = [
    *("adaptive_clip_grad_", "fuse", "param_groups_agc", "standardize_weight", "unitwise_norm"),
    *("diagnostics.agc_stats", "diagnostics.signal_stats", "recipes.purposes", "recipes.settings"),
]


@pytest.mark.parametrize("name", FIRST)
def test_the_examples_of_the_first_names_give_what_they_show(name: str):
    module, _, function = f"timm_nf.{name}".rpartition(".")
    each = getattr(importlib.import_module(module), function)
    tests = doctest.DocTestFinder(recurse=False).find(each, name, globs=dict(vars(inspect.getmodule(each))))  # type: ignore[arg-type]
    results = [doctest.DocTestRunner().run(test) for test in tests]
    assert sum(result.attempted for result in results) > 0
    assert sum(result.failed for result in results) == 0
