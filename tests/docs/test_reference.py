"""The reference has every public name, and says of it what a user has to know."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import itertools
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import timm
import torch

import timm_nf
from scripts.site import reference
from tests.support import ROOT


def test_every_public_name_is_in_the_reference():
    text = "\n".join(reference.pages().values())
    explained = set(explained_names())
    linked = set(re.findall(r"^- \[`\w+`\]\[(\S+)\]$", text, re.MULTILINE))
    for module, names in reference.public_names().items():
        section = text[re.search(rf"^##? {re.escape(module)}$", text, re.MULTILINE).end() :]  # type: ignore[union-attr]
        section = re.split(r"^##? ", section, maxsplit=1, flags=re.MULTILINE)[0]
        missing = [name for name in names if not re.search(rf"(\.{name}$|`{name}`)", section, re.MULTILINE)]
        assert not missing, module
    assert linked <= explained


def explained_names() -> list[str]:
    """The full names that have an entry of their own, or a place in a list of functions."""
    return re.findall(r"^(?:::: |- \[\]\(\)\{#)([\w.]+)", "\n".join(reference.pages().values()), re.MULTILINE)


def explained() -> dict[str, object]:
    """What each entry of the reference explains."""
    full_names = [full.rpartition(".") for full in explained_names()]
    return {".".join((module, name)): getattr(importlib.import_module(module), name) for module, _, name in full_names}


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


def test_a_function_that_is_made_at_import_is_in_a_list_and_links_find_it():
    page = reference.pages()["reference/models.md"]
    assert "\n- [](){#timm_nf.models.nfnets.nfnet_f0} `nfnet_f0`\n" in page
    assert "::: timm_nf.models.nfnets.nfnet_f0\n" not in page
    assert "- [`nfnet_f0`](models.md#timm_nf.models.nfnets.nfnet_f0)\n" in reference.pages()["reference/nfnets.md"]


def fields(of: object) -> list[str]:
    """The names of the entries that a dataclass, a NamedTuple or a TypedDict itself defines."""
    if not (dataclasses.is_dataclass(of) or hasattr(of, "_fields") or hasattr(of, "__total__")):
        return []
    (definition,) = ast.parse(inspect.getsource(of)).body  # type: ignore[arg-type]
    assert isinstance(definition, ast.ClassDef)
    return [ast.unparse(node.target) for node in definition.body if isinstance(node, ast.AnnAssign)]


RECORDS = {full: each for full, each in EXPLAINED.items() if inspect.isclass(each) and fields(each)}


def test_there_are_records_of_every_kind():
    kinds = {"hub.folder.Written", "inference.bench.Timing", "optim.agc.ClipStats"}
    assert {f"timm_nf.{kind}" for kind in kinds} <= RECORDS.keys()


@pytest.mark.parametrize("full", RECORDS)
def test_a_record_says_what_each_of_its_entries_is(full: str):
    doc = inspect.getdoc(RECORDS[full]) or ""
    assert not [name for name in fields(RECORDS[full]) if not re.search(rf"^    {name}: \S", doc, re.MULTILINE)]


@pytest.mark.parametrize("full", FUNCTIONS)
def test_no_text_about_a_result_is_read_as_its_type(full: str):
    _, returns, text = (inspect.getdoc(FUNCTIONS[full]) or "").partition("Returns:\n    ")
    assert not returns or not re.match(r"(\w+)?\s*(\(.+\))?:\s", text), (
        "the site shows what stands before `:` as a type"
    )


# They take weights of all shapes alike.
ANY_SHAPE = {
    *("timm_nf.layers.standardize_triton.takes_kernel", "timm_nf.optim.unit_triton.takes_kernel"),
    *("timm_nf.optim.gradients.gradient_problem", "timm_nf.optim.gradients.parameters_with_gradient"),
    *("timm_nf.optim.sharded.local_shard", "timm_nf.hub.folder.first_not_finite", "timm_nf._weights_file.load_tensors"),
    *("timm_nf.convert.haiku.timm_to_haiku", "timm_nf.convert.haiku_pickle.load_haiku"),
    "timm_nf.verify.golden.load_golden",
}
SHAPE = re.compile(r"\([A-Za-z0-9_. *]+,[^)]*\)|\(\.\.\.[^)]*\)|0-d|\bshapes?\b")


def types_in(function: object) -> list[str]:
    signature = inspect.signature(inspect.unwrap(function))  # type: ignore[arg-type]
    return [str(p.annotation) for p in signature.parameters.values()] + [str(signature.return_annotation)]


def test_functions_of_tensors_state_their_shapes():
    of_tensors = {full for full, each in FUNCTIONS.items() if re.search(r"Tensor|ndarray", " ".join(types_in(each)))}
    assert {full for full in of_tensors if not SHAPE.search(inspect.getdoc(FUNCTIONS[full]) or "")} == ANY_SHAPE


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


# -- examples ----------------------------------------------------------------------------------------------------------


def section(full: str) -> str:
    """The module whose section of the reference explains a name."""
    return reference.places()[full]


# What the command's modules share is not for others to call; their interface is the command.
CALLED = {
    full: each
    for full, each in EXPLAINED.items()
    if (full in FUNCTIONS or inspect.isclass(each)) and (not full.startswith("timm_nf.cli.") or full.endswith(".main"))
}


def shown_code(doc: str | None) -> str:
    return "".join(example.source for example in doctest.DocTestParser().get_examples(doc or ""))


def without_example(names: Mapping[tuple[str, str], str], modules: Mapping[str, str]) -> list[str]:
    """The names that no example calls; they are given as (module, name) with their docstrings.

    An example counts that stands at the name, at another name of its module, or at the top of the module. Names whose
    docstrings differ in nothing but the name are one group, and need one example.
    """
    code: dict[str, str] = {module: shown_code(doc) for module, doc in modules.items()}
    groups: dict[tuple[str, str], list[str]] = {}
    for (module, name), doc in names.items():
        code[module] = code.get(module, "") + shown_code(doc)
        groups.setdefault((module, re.sub(rf"\b{name}\b", "NAME", doc)), []).append(name)
    return [
        f"{module}.{names_of_group[0]}"
        for (module, _), names_of_group in groups.items()
        if not any(re.search(rf"\b{name}\b", code[module]) for name in names_of_group)
    ]


def test_every_public_name_that_is_called_has_an_example():
    modules = {section(full): importlib.import_module(section(full)).__doc__ or "" for full in CALLED}
    names = {(section(full), full.rpartition(".")[2]): inspect.getdoc(each) or "" for full, each in CALLED.items()}
    assert not without_example(names, modules), "write an example at the name, or at the top of its module"


def test_every_optimizer_class_is_in_the_reference():
    stub = (ROOT / "timm_nf" / "optim" / "__init__.pyi").read_text()
    classes = re.findall(r"^class (Agc\w+)\(", stub, re.MULTILINE)
    page = reference.pages()["reference/optim.md"]
    assert len(classes) > 30
    assert not [name for name in classes if f"| `{name}` | `" not in page]


def test_a_list_in_a_docstring_is_a_list_on_the_site():
    docs = {full: inspect.getdoc(each) or "" for full, each in EXPLAINED.items()}
    docs |= {module: importlib.import_module(module).__doc__ or "" for module in reference.public_names()}
    begins = re.compile(r"^(?! *- |\s*$).*\n *- ", re.MULTILINE)  # Markdown wants an empty line before the first item
    assert not [full for full, doc in docs.items() if begins.search(re.sub(r"\n +(?=[^ -])", " ", doc))]


def test_an_example_at_the_top_of_a_module_is_a_block_of_its_section():
    assert "\n\n```pycon\n>>> model = timm.create_model(" in reference.pages()["reference/models.md"]


def test_a_name_without_an_example_is_found():
    docs = {"f": "Does.\n\n>>> f(1)", "g": "See f.", "h": "`h` of a family.", "k": "`k` of a family."}
    names = {("m", name): doc for name, doc in docs.items()}
    assert without_example(names, {"m": ""}) == ["m.g", "m.h"]
    assert without_example(names, {"m": "All.\n\n>>> g(k(2))"}) == []


WITH_EXAMPLES = sorted(
    {
        section(full)
        for full, each in EXPLAINED.items()
        if shown_code(inspect.getdoc(each)) or shown_code(importlib.import_module(section(full)).__doc__)
    }
)


# Their examples train, quantise, time, draw or start processes, for seconds. Other tests call them in every run.
SLOW = (
    *("timm_nf.demo", "timm_nf.diagnostics.plots", "timm_nf.inference.bench", "timm_nf.inference.int8"),
    "timm_nf.verify.stock",
)


@pytest.mark.parametrize(
    "module", [pytest.param(module, marks=[pytest.mark.slow] * (module in SLOW)) for module in WITH_EXAMPLES]
)
def test_the_examples_of_a_module_give_what_they_show(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    monkeypatch.chdir(tmp_path)
    if module.startswith("timm_nf.hub."):
        request.getfixturevalue("hub")
    loaded = importlib.import_module(module)
    names = {name: getattr(loaded, name) for name in loaded.__all__} | {
        "timm": timm,
        "timm_nf": timm_nf,
        "torch": torch,
    }
    shown = [(module, loaded), *((full, each) for full, each in EXPLAINED.items() if section(full) == module)]
    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for full, each in shown:
        for test in finder.find(each, full, module=loaded, globs=dict(names)):
            runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
