"""The package as a whole: what importing it does and does not do, its inner order, and the wheel."""

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import timm_nf
from tests.support import ROOT

PACKAGE = ROOT / "timm_nf"
SOURCES = sorted(PACKAGE.glob("**/*.py"))
# A file may import those before it, never one after it. Lines are wings: no wing is entered twice, so that imports
# between wings run down as well. A package comes after its files, some of which it re-exports.
# fmt: off
WINGS = {
    "ground": "version _versions _progress _text _temporary _repository _labels _relative_error _clip_defaults "
    "_accelerator _seed _dtypes variants _variant_table _wrappers _gain_names _triton",
    "layers": "_eager _standardize_formula _standardize_kernels standardize_triton standardize padding activations "
    "drop residual same_conv std_conv pool2d_same squeeze_excite",
    "convert": "haiku_pickle haiku infer",
    "models": "blocks nfnets normalizer_free",
    "optim": "units sharded _unit_kernels unit_triton gradients agc exempt groups fused_where_equal optimizer factory",
    "inference": "fuse images named classify export int8 bench",
    "hub": "card folder errors client from_haiku",
    "diagnostics": "signals clipping inputs plots",
    "verify": "golden stock checks",
    "cli": "terminal options networks weights inference measure main",
}
# Modules at the root that stand on a wing: right after it.
AFTER = {
    "models": ["nfnets"], "optim": ["registration", "recipes", "env", "_weights_file", "checkpoint", "augment"],
    "inference": ["export"], "diagnostics": ["demo"], "cli": ["__main__"],
}
# fmt: on
ORDER: list[str] = []
for wing, files in WINGS.items():
    ORDER += files.split() if wing == "ground" else [*(f"{wing}.{file}" for file in files.split()), wing]
    ORDER += AFTER.get(wing, [])

# torch 2.6 leaves a temporary folder to be removed at the end, where timm is imported too.
STRICT = ("-W", "error", "-W", "ignore:Implicitly cleaning up:ResourceWarning")


def run_python(code: str, *options: str, path: Path = ROOT, cwd: Path = ROOT) -> str:
    """What the code prints on both streams, in an interpreter that finds the package under `path`."""
    paths = [str(path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


# -- importing ---------------------------------------------------------------------------------------------------------


def test_import_prints_and_warns_nothing():
    assert run_python("import timm_nf", *STRICT) == ""


def test_import_adds_little_to_importing_timm():
    # The processor's time of one process, so that neither the machine's speed nor other work counts: 0.02 of timm's.
    code = """
import sys, time
start = time.process_time()
import timm
before, middle = set(sys.modules), time.process_time()
import timm_nf
ours = time.process_time() - middle
print(ours / (middle - start), *sorted(set(sys.modules) - before))
"""
    ratio, *loaded = run_python(code).split()
    packages = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names  # torch 2.6 loads fewer of these
    assert packages == {"timm_nf", "timm", "huggingface_hub"}
    assert float(ratio) < 0.2


def test_import_reaches_for_no_network_and_starts_no_process():
    code = """
import sys, timm
before = set(sys.modules)
FORBIDDEN = "socket.connect socket.getaddrinfo subprocess.Popen os.system os.exec os.posix_spawn os.fork".split()
def refuse(event, arguments):
    if event in FORBIDDEN:
        raise RuntimeError(f"{event} {arguments} while importing timm_nf")
sys.addaudithook(refuse)
import timm_nf
print(*sorted({"torch._inductor.codecache", "torch.utils.cpp_extension"} & set(sys.modules) - before), end="")
"""
    assert run_python(code) == ""


REGISTRY = """
import dataclasses, json, sys, timm, timm.optim
if sys.argv[1:]: import timm_nf
from timm.models import get_pretrained_cfg, model_entrypoint
print(json.dumps({
    "modules": {name: model_entrypoint(name).__module__ for name in timm.list_models()},
    "configs": {name: repr(get_pretrained_cfg(name)) for name in timm.list_models(include_tags=True)},
    "pretrained": timm.list_pretrained(),
    "optimizers": {name: repr(timm.optim.get_optimizer_info(name)) for name in timm.optim.list_optimizers()},
}))
"""


@pytest.fixture(scope="module")
def registries() -> tuple[dict[str, Any], dict[str, Any]]:
    """timm's registries as they are without us, and after importing us."""
    stock, ours = (json.loads(run_python(REGISTRY.replace("sys.argv[1:]", flag))) for flag in ("False", "True"))
    return stock, ours


def test_import_takes_over_no_model_with_published_weights(registries: tuple[dict[str, Any], dict[str, Any]]):
    stock, ours = registries
    taken = {name for name, module in stock["modules"].items() if ours["modules"].get(name) != module}
    assert taken == {f"nfnet_f{i}" for i in range(8)}
    assert not taken & {name.split(".")[0] for name in stock["pretrained"]}
    assert set(stock["pretrained"]) <= set(ours["pretrained"])


def test_import_changes_no_config_of_another_model(registries: tuple[dict[str, Any], dict[str, Any]]):
    stock, ours = registries
    mine = {name for name, module in ours["modules"].items() if module == "timm_nf.models.nfnets"}
    assert len(mine) == 31
    others = {name: config for name, config in ours["configs"].items() if name.split(".")[0] not in mine}
    assert others == {name: config for name, config in stock["configs"].items() if name.split(".")[0] not in mine}


def test_import_changes_no_stock_optimizer(registries: tuple[dict[str, Any], dict[str, Any]]):
    stock, ours = registries
    assert {name: info for name, info in ours["optimizers"].items() if not name.startswith("agc")} == stock[
        "optimizers"
    ]


# -- inner order -------------------------------------------------------------------------------------------------------


def dotted(source: Path) -> str:
    """The module's name inside the package: `hub.client` of hub/client.py, `hub` of hub/__init__.py."""
    parts = source.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {dotted(source) for source in SOURCES}


def imported_modules(source: Path) -> set[str]:
    """Modules of ours that the file imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ("timm_nf", *source.relative_to(PACKAGE).parent.parts)
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            # `from .convert import haiku` imports a module of the package, or a name that it re-exports
            found |= {name if (name := f"{module}.{a.name}")[8:] in NAMES else module for a in node.names}
    return {name.removeprefix("timm_nf").removeprefix(".") for name in found if name.split(".")[0] == "timm_nf"}


@pytest.mark.parametrize("source", SOURCES, ids=dotted)
def test_imports_point_one_way(source: Path):
    name = dotted(source)
    if not name:  # the package itself
        return
    assert name in ORDER, f"give {name} a place in ORDER"
    later = ORDER[ORDER.index(name) :]
    wrong = sorted(imported_modules(source) & set(later))
    assert not wrong, f"{name} comes before {wrong}"


def test_clipping_stands_alone():
    assert {name.partition(".")[0] for path in (PACKAGE / "optim").glob("*.py") for name in imported_modules(path)} == {
        "optim",
        "_clip_defaults",
        "_dtypes",
        "_gain_names",
        "_triton",
        "_wrappers",
    }


def test_card_and_recipes_need_neither_torch_nor_a_network():
    # without the packages' own files, which import torch; importing a None raises
    code = f"""
import sys, types
sys.modules.update(torch=None, timm=None)
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise RuntimeError(f"{{event}} {{arguments}}")
sys.addaudithook(refuse)
for name, folder in (("timm_nf", {str(PACKAGE)!r}), ("timm_nf.hub", {str(PACKAGE / "hub")!r})):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from timm_nf import recipes
from timm_nf.hub import card
print(len(card.zoo()) > 1000, "opt: agcsgd" in recipes.as_yaml("nfnet_f0"))
"""
    assert run_python(code) == "True True\n"


@pytest.mark.parametrize("source", SOURCES, ids=dotted)
def test_no_module_is_a_stranger(source: Path):
    """It belongs to a wing, has a subject for a name, and says in its first sentence what it is for."""
    assert not dotted(source) or dotted(source) in ORDER
    assert source.stem not in {"utils", "helpers", "common", "misc"}
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    first = text.split("\n\n")[0]
    assert re.fullmatch(r"[A-Z`].{15,}[.?:]", first, re.DOTALL), f"{source.name} opens with {first!r}"


# -- distribution ------------------------------------------------------------------------------------------------------


def test_changelog_has_an_entry_for_this_version():
    assert f"## [{timm_nf.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_citation_is_of_this_version():
    assert f"\nversion: {timm_nf.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("tool", ["ruff", "pyright"])
def test_commits_are_checked_by_the_tools_of_the_extra_dev(tool: str):
    (pinned,) = set(re.findall(rf'"{tool}(?:\[nodejs\])?==([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    assert re.search(rf"{tool}.*\n +rev: v{re.escape(pinned)}\n", (ROOT / ".pre-commit-config.yaml").read_text())


def test_wheel_is_complete_and_imports_from_elsewhere(tmp_path: Path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, f"--wheel-dir={tmp_path}", str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "site")
    files = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert packed == files | {"timm_nf_command.py"}
    location = run_python("import timm_nf; print(timm_nf.__file__)", *STRICT, path=tmp_path / "site", cwd=tmp_path)
    assert Path(location.strip()) == tmp_path / "site" / "timm_nf" / "__init__.py"
