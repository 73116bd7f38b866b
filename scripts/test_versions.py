"""Run our tests with the oldest versions that pyproject.toml allows, some in between and the newest.

    python -m scripts.test_versions [--only NAME ...] [-- pytest arguments]

Each row gets a new environment under .cache/, which is deleted at the end. Its counts are written into
docs/compatibility.md when its tests end. On Linux every environment takes gigabytes, because torch brings CUDA.

An environment has the Python that runs this script. The row "Python, newest" is for another one than that of the rest,
so it is only run where --only names it.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import xml.etree.ElementTree as ElementTree
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

from scripts.environments import PIP_INSTALL, python_of, run, show

ROOT = Path(__file__).parents[1]
NEWEST_PYTHON = "Python, newest"
PAGE = ROOT / "docs" / "compatibility.md"
RESULTS = ROOT / "docs" / "compatibility.json"
BEGIN, END = "<!-- written by make test-versions -->\n", "<!-- end -->\n"
SHOWN = ("torch", "timm", "huggingface_hub", "numpy")  # a column each
VERSIONS = """
import json, platform
from importlib.metadata import version
print(json.dumps({"python": platform.python_version()} | {name: version(name) for name in %r}))
"""


def oldest() -> dict[str, str]:
    """The lower bounds of the requirements of the package and of its extra `cli`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["cli"]
    return {match[1]: match[2] for line in needed if (match := re.fullmatch(r"([\w-]+)>=([\d.]+)", line))}


def rows() -> dict[str, dict[str, str]]:
    """The pinned versions of each environment, by the row's name. All other packages are the newest."""
    bound = oldest()
    return {
        "newest": {},
        NEWEST_PYTHON: {},
        "torch, oldest": {"torch": bound["torch"]},
        "torch, in between": {"torch": "2.8.0", "numpy": "2.3.5"},  # Triton 3.4's interpreter fails with NumPy 2.4
        "timm, oldest": {"timm": bound["timm"]},
        "timm, in between": {"timm": "1.0.29"},
        "the others, oldest": {name: version for name, version in bound.items() if name not in ("torch", "timm")},
    }


def measure(name: str, pins: dict[str, str], arguments: list[str]) -> dict[str, Any]:
    """Make the environment, run the tests in it, and delete it."""
    folder = ROOT / ".cache" / "versions" / re.sub(r"\W+", "-", name)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        venv.create(folder, with_pip=True)
        python = python_of(folder)
        pinned = [f"{package}=={version}" for package, version in pins.items()]
        run(python, *PIP_INSTALL, "-e", f"{ROOT}[test]", *pinned, cwd=ROOT)
        versions = json.loads(run(python, "-c", VERSIONS % (SHOWN,), cwd=ROOT))
        report = folder / "report.xml"
        command = [python, "-m", "pytest", "-q", "-n", str(os.cpu_count() or 1), *arguments]
        show(*command)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*map(str, command), f"--junitxml={report}"], cwd=ROOT, env=environment, check=False)
        return {
            "date": date.today().isoformat(), "versions": versions, "pins": pins, "tests": arguments,
            **summary(report.read_text(encoding="utf-8")),
        }  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def summary(report: str) -> dict[str, Any]:
    """The counts, the failed tests and the reasons of skipped tests in a JUnit report."""
    cases = list(ElementTree.fromstring(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [mark.get("message") or "" for case in cases if (mark := case.find("skipped")) is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": sorted({f"{case.get('classname')}.{case.get('name')}" for case in failed}),
        "skipped": dict(sorted(Counter(" ".join(reason.split()) for reason in skipped).items())),
    }


def table(results: dict[str, Any]) -> str:
    """The rows as a Markdown table. Below it are the failed tests and the reasons of skipped tests."""
    columns = ["environment", "date", "Python", *SHOWN, "passed", "failed", "skipped"]
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    below: list[str] = []
    for name, row in results.items():
        versions = [row["versions"][package] for package in ("python", *SHOWN)]
        counts = [row["passed"], len(row["failed"]), sum(row["skipped"].values())]
        lines.append(f"| {' | '.join(map(str, [name, row['date'], *versions, *counts]))} |")
        others = {package: version for package, version in row["pins"].items() if package not in SHOWN}
        if others:
            below.append(f"- {name}: {', '.join(f'{package} {version}' for package, version in others.items())}.")
        below += [f"- {name}: failed `{test}`." for test in row["failed"]]
        below += [f"- {name}: skipped {count}: {reason}." for reason, count in row["skipped"].items()]
        if row["tests"]:
            below.append(f"- {name}: only `{' '.join(row['tests'])}`.")
    return "\n".join([*lines, "", *below]).rstrip() + "\n"


def write(name: str, row: dict[str, Any]) -> None:
    """Store a row's result, and write the table of all stored rows into the page."""
    results: dict[str, Any] = {}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
    results[name] = row
    ordered = {known: results[known] for known in rows() if known in results}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(head + BEGIN + "\n" + table(ordered) + "\n" + END + rest.split(END)[1], encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(rows()), metavar="NAME", help=", ".join(rows()))
    parser.add_argument("pytest_args", nargs="*", help="passed on to pytest, after --")
    args = parser.parse_args(argv)
    chosen = args.only or [name for name in rows() if name != NEWEST_PYTHON]
    failed = 0
    for index, name in enumerate(chosen, start=1):
        print(f"== {index} of {len(chosen)}: {name} {rows()[name]}", file=sys.stderr, flush=True)
        try:
            row = measure(name, rows()[name], args.pytest_args)
        except subprocess.CalledProcessError as error:  # the other rows are still run
            print(f"{name}: {error}", file=sys.stderr)
            failed += 1
            continue
        write(name, row)
        failed += bool(row["failed"])
        print(table({name: row}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
