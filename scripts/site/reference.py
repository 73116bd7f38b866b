"""Makes the pages of the reference from tests/public_names.txt and the source, without importing the package.

A public name is documented where it is defined. Packages that re-export it, and old paths, link to that place.
"""

import ast
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = ROOT / "tests" / "public_names.txt"
PACKAGE = "timm_nf"

# The text at the top of every page.
IN_SCOPE = """*The examples assume that `torch`, `timm`, `timm_nf` and the names of the module are imported. A test runs
all of them.*"""

# Above the names of the functions that timm_nf.models.nfnets makes from its table of variants.
BUILDERS = """The functions behind `timm.create_model(name)`, one for every row of
[`VARIANTS`][timm_nf.variants.VARIANTS]. Each takes `pretrained: bool = False` and, as keywords, the arguments of
[`NormFreeNet`][timm_nf.models.nfnets.NormFreeNet] and of timm's model builder. It returns the network, and raises what
`NormFreeNet` raises:"""

# The wings in the order in which a reader needs them. A wing that is not named here comes last.
ORDER = ("timm_nf", "models", "layers", "optim", "inference", "hub", "convert", "diagnostics", "recipes", "verify")


@cache
def public_names() -> dict[str, list[str]]:
    """The public names of every public module."""
    lines = (line.split(": ") for line in NAMES.read_text().splitlines())
    return {module: names.split() for module, names in lines}


@cache
def source(module: str) -> Path:
    """The file of a module. For a package it is the __init__.py."""
    path = ROOT.joinpath(*module.split("."))
    file = path.with_suffix(".py")
    return path / "__init__.py" if path.is_dir() and not file.is_file() else file


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, including those inside `try` and `if`."""
    for node in body:
        yield node
        if isinstance(node, ast.Try | ast.If):
            yield from _statements(node.body)


def _assigned(node: ast.Assign | ast.AnnAssign) -> set[str]:
    """The names that an assignment defines."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def _origin(node: ast.ImportFrom, package: list[str]) -> str:
    """The full name of the module that names are imported from. `package` is the importing module's package."""
    parts: list[str] = []
    if node.level:
        parts += package[: len(package) - node.level + 1]
    if node.module:
        parts.append(node.module)
    return ".".join(parts)


@cache
def definitions(module: str) -> tuple[frozenset[str], dict[str, str]]:
    """The names that a module or its stub defines, and the full names of what it imports."""
    defined: set[str] = set()
    imported: dict[str, str] = {}
    file = source(module)
    package = (module if file.name == "__init__.py" else module.rpartition(".")[0]).split(".")
    for path in (file, file.with_suffix(".pyi")):
        if not path.is_file():
            continue
        for node in _statements(ast.parse(path.read_text()).body):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                defined |= _assigned(node)
            elif isinstance(node, ast.Import):
                imported.update({alias.asname or alias.name: alias.name for alias in node.names})
            elif isinstance(node, ast.ImportFrom):
                origin = _origin(node, package)
                if node.names[0].name == "*":
                    imported.update({name: f"{origin}.{name}" for name in public_names().get(origin, ())})
                else:
                    imported.update({alias.asname or alias.name: f"{origin}.{alias.name}" for alias in node.names})
    return frozenset(defined), imported


def home(module: str, name: str) -> str:
    """The full name under which a public name is documented.

    Raises:
        LookupError: if the module neither defines it nor imports it from the package.
    """
    defined, imported = definitions(module)
    if name in defined:
        return f"{module}.{name}"
    if name not in imported:
        raise LookupError(f"{module}.{name} is public, and {source(module)} neither defines nor imports it")
    origin = imported[name]
    if not origin.startswith(PACKAGE) or source(origin).is_file():
        return origin
    return home(*origin.rsplit(".", 1))


def pages() -> dict[str, str]:
    """The pages in Markdown, by file name, in the order of the navigation."""
    wings: dict[str, list[str]] = {}
    for module in public_names():
        wings.setdefault(module.removeprefix(f"{PACKAGE}.").partition(".")[0], []).append(module)
    order = sorted(wings, key=lambda wing: (ORDER.index(wing) if wing in ORDER else len(ORDER), wing))
    return {f"reference/{wing}.md": _page(wing, wings[wing]) for wing in order}


def _page(wing: str, modules: list[str]) -> str:
    title = wing if wing == PACKAGE else f"{PACKAGE}.{wing}"
    return "\n\n".join([f"# {title}", IN_SCOPE, *(_section(module, module == title) for module in modules)]) + "\n"


@cache
def places() -> dict[str, str]:
    """The module whose section explains a public name, by its full name: its own, or the first that lists it."""
    found: dict[str, str] = {}
    for module, names in public_names().items():
        for name in names:
            where = home(module, name)
            if where.rpartition(".")[0] == module or where not in found:
                found[where] = module
    return found


def _section(module: str, is_title: bool) -> str:
    homes = {name: home(module, name) for name in public_names()[module]}
    here = [name for name, where in homes.items() if places()[where] == module and _is_ours(where)]
    elsewhere = [f"- {_link(name, where)}" for name, where in homes.items() if name not in here]
    made = _made_functions(module)
    parts: list[str] = []
    if not is_title:
        parts.append(f"## {module}")
    parts.append(_as_markdown(ast.get_docstring(ast.parse(source(module).read_text())) or ""))
    if elsewhere:
        parts += ["Names that are explained elsewhere:", "\n".join(elsewhere)]
    parts.append(_made_classes(module))
    parts += [f"::: {homes[name]}" for name in here if name not in made]
    if made:
        parts += [BUILDERS, "\n".join(f"- [](){{#{homes[name]}}} `{name}`" for name in here if name in made)]
    return "\n\n".join(part for part in parts if part)


def _as_markdown(docstring: str) -> str:
    """A module's docstring, with its examples as blocks of code."""
    text, _, examples = docstring.partition("Examples:\n")
    if not examples:
        return text
    blocks = [
        f"```pycon\n{block}\n```" if block.startswith(">>>") else block
        for block in textwrap.dedent(examples).split("\n\n")
    ]
    return "\n\n".join([text.rstrip(), *blocks])


def _made_classes(module: str) -> str:
    """A table of the classes that a module makes at import. Only its stub has their names."""
    stub = source(module).with_suffix(".pyi")
    if not stub.is_file():
        return ""
    classes = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ClassDef)]
    rows = [f"| `{node.name}` | `{ast.unparse(node.bases[-1])}` |" for node in classes]
    made = "Classes with clipping. Each takes the arguments of the class that it extends, and those of `agc_class`:"
    return "\n".join([made, "", "| class | extends |", "| --- | --- |", *rows])


def _made_functions(module: str) -> set[str]:
    """The names that a module only annotates: it makes these functions at import."""
    body = ast.parse(source(module).read_text()).body
    return {node.target.id for node in body if isinstance(node, ast.AnnAssign) and not node.value}


def _is_ours(where: str) -> bool:
    """Whether a full name belongs to the package and is not a module."""
    return where.startswith(PACKAGE) and not source(where).is_file()


def _link(name: str, where: str) -> str:
    """A link to the section of a name, or to the page of a module."""
    if not where.startswith(PACKAGE):
        return f"`{name}`, from the package {where.split('.')[0]}"
    page = f"{where.split('.')[1]}.md"
    if source(where).is_file():
        return f"[`{name}`]({page})"
    if name in _made_functions(where.rpartition(".")[0]):
        return f"[`{name}`]({page}#{where})"
    return f"[`{name}`][{where}]"
